// The causal depthwise convolution with SiLU along the scan path, and its gradients.
//
// One pass over a sequence in the order of time with the last taps of x in a ring; backwards the gradient of x waits in a
// second ring until the last token that saw it has passed.
#include <ATen/Parallel.h>

#include "lanes.h"

namespace boldforge {

struct Conv {
  Rows x, out, dx;       // out is y forward and the gradient of y backward; dx backward only
  const float* weight;   // [K, D]
  const float* bias;     // [D] or null
  float *dweight, *dbias;  // backward: [n_tasks, K, D], [n_tasks, D]
  const int32_t* rows;   // as in scan.h
  const int32_t* edges;
  const int64_t* tasks;
  int64_t n_tasks, n_sequences, n_tokens, n_channels, n_taps;
};

namespace {

constexpr int kRing = kMaxTaps;  // a power of two

// One channel block of one task: its taps, and the last values of x by place.
template <int W>
struct Taps {
  using F = Floats<W>;
  alignas(64) F weight[kMaxTaps], x[kRing];
  F bias;
  int n_taps, known = 0;  // tokens since the start or restart, at most n_taps

  Taps(const Conv& conv, int64_t first, int count)
      : bias(load_vector<W>(conv.bias, first, count)), n_taps(static_cast<int>(conv.n_taps)) {
    // weight[j] meets the token j places back.
    for (int j = 0; j < n_taps; ++j) {
      weight[j] = load_vector<W>(conv.weight + (n_taps - 1 - j) * conv.n_channels, first, count);
    }
  }

  BOLDFORGE_INLINE F advance(int32_t place, F value) {
    x[place & (kRing - 1)] = value;
    known = known < n_taps ? known + 1 : n_taps;
    F total = bias;
    if (known == 4 && n_taps == 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) total += weight[j] * x[(place - j) & (kRing - 1)];
    } else {
      for (int j = 0; j < known; ++j) total += weight[j] * x[(place - j) & (kRing - 1)];
    }
    return total;
  }
};

template <int W>
void forward_block(const Conv& conv, int64_t task, int64_t first, int count) {
  using F = Floats<W>;
  Taps<W> taps(conv, first, count);
  for (int64_t number = conv.tasks[task]; number < conv.tasks[task + 1]; ++number) {
    const int64_t first_row = number / conv.n_sequences * conv.n_tokens, i = number % conv.n_sequences;
    taps.known = 0;
    for (int32_t place = conv.edges[i]; place < conv.edges[i + 1]; ++place) {
      const int32_t code = conv.rows[place];
      const int64_t row = first_row + (code & 0x7fffffff);
      if (code < 0) taps.known = 0;
      const F total = taps.advance(place, load<W>(conv.x, row, first, count));
      store<W>(conv.out, row, first, count, total * sigmoid<W>(total));
    }
  }
}

template <int W>
void backward_block(const Conv& conv, int64_t task, int64_t first, int count) {
  using F = Floats<W>;
  Taps<W> taps(conv, first, count);
  const int n_taps = taps.n_taps;
  alignas(64) F dx[kRing], dweight[kMaxTaps];
  for (int j = 0; j < n_taps; ++j) dweight[j] = F{};
  F dbias = F{};
  for (int64_t number = conv.tasks[task]; number < conv.tasks[task + 1]; ++number) {
    const int64_t first_row = number / conv.n_sequences * conv.n_tokens, i = number % conv.n_sequences;
    // Gradients of the tokens from ``waiting`` on are not complete yet.
    int32_t waiting = conv.edges[i];
    const auto write_until = [&](int32_t stop) {
      for (; waiting < stop; ++waiting) {
        const int64_t row = first_row + (conv.rows[waiting] & 0x7fffffff);
        store<W>(conv.dx, row, first, count, dx[waiting & (kRing - 1)]);
      }
    };
    taps.known = 0;
    for (int32_t place = conv.edges[i]; place < conv.edges[i + 1]; ++place) {
      const int32_t code = conv.rows[place];
      const int64_t row = first_row + (code & 0x7fffffff);
      if (code < 0) {
        write_until(place);
        taps.known = 0;
      } else {
        write_until(place - n_taps + 1);
      }
      dx[place & (kRing - 1)] = F{};
      const F total = taps.advance(place, load<W>(conv.x, row, first, count));
      const F gate = sigmoid<W>(total);
      const F dtotal = load<W>(conv.out, row, first, count) * gate * (1.f + total * (1.f - gate));
      dbias += dtotal;
      for (int j = 0; j < taps.known; ++j) {
        const int32_t slot = (place - j) & (kRing - 1);
        dweight[j] += dtotal * taps.x[slot];
        dx[slot] += dtotal * taps.weight[j];
      }
    }
    write_until(conv.edges[i + 1]);
  }
  const Rows targets = {conv.dweight, conv.n_channels, Type::kFloat}, bias_target = {conv.dbias, conv.n_channels, Type::kFloat};
  for (int j = 0; j < n_taps; ++j) store<W>(targets, task * n_taps + n_taps - 1 - j, first, count, dweight[j]);
  store<W>(bias_target, task, first, count, dbias);
}

template <class Work>
void for_every_block(const Conv& conv, const Work& work) {
  const int64_t blocks = (conv.n_channels + kLanes - 1) / kLanes;
  at::parallel_for(0, conv.n_tasks * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t program = begin; program < end; ++program) {
      const int64_t task = program / blocks, first = program % blocks * kLanes;
      const int64_t left = conv.n_channels - first;
      work(task, first, static_cast<int>(left < kLanes ? left : kLanes));
    }
  });
}

}  // namespace
}  // namespace boldforge

extern "C" void boldforge_conv_forward(const boldforge::Conv* conv) {
  boldforge::for_every_block(*conv, [conv](int64_t task, int64_t first, int count) {
    if (count > boldforge::kNarrow) {
      boldforge::forward_block<boldforge::kLanes>(*conv, task, first, count);
    } else {
      boldforge::forward_block<boldforge::kNarrow>(*conv, task, first, count);
    }
  });
}

extern "C" void boldforge_conv_backward(const boldforge::Conv* conv) {
  boldforge::for_every_block(*conv, [conv](int64_t task, int64_t first, int count) {
    if (count > boldforge::kNarrow) {
      boldforge::backward_block<boldforge::kLanes>(*conv, task, first, count);
    } else {
      boldforge::backward_block<boldforge::kNarrow>(*conv, task, first, count);
    }
  });
}
