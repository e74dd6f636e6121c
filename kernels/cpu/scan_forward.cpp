// The scan's forward pass: one block of channels per vector, sequential in time, states in the nearest cache.
#include <ATen/Parallel.h>

#include <algorithm>

#include "scan.h"

namespace boldforge {
namespace {

// Tokens that all channel blocks of a program scan before any goes on: what they read stays in the second cache.
constexpr int32_t kTile = 256;

// One tile of a sequence; ``state`` holds the state before it, unless it is the first one, and takes the state after it.
template <int W, int N>
void forward_block(const Scan& scan, const Sequence& sequence, const Sequence& tile, float* state, int64_t first,
                   int count) {
  using F = Floats<W>;
  const int padded = padded_states<N>(scan);
  alignas(64) float A[(N > 0 ? N : kMaxStates) * kLanes], h[(N > 0 ? N : kMaxStates) * kLanes];
  alignas(64) float B_scratch[kMaxStates], C_scratch[kMaxStates];
  load_rates<W>(scan, first, count, padded, A);
  for (int n = 0; n < padded; ++n) at<W>(h, n) = tile.start == sequence.start ? F{} : at<W>(state, n);
  const F bias = load_vector<W>(scan.bias, first, count), skip = load_vector<W>(scan.D, first, count);
  for (int32_t place = tile.start; place < tile.stop; ++place) {
    const int32_t code = scan.rows[place];
    const int64_t row = sequence.first_row + row_of(code);
    if (code < 0) {
      for (int n = 0; n < padded; ++n) at<W>(h, n) = F{};
    }
    const F u = load<W>(scan.u, row, first, count);
    const F delta = softplus<W>(load<W>(scan.dt, row, first, count) + bias);
    const F x = delta * u;
    const float* B = weights<N>(scan.B, row, scan.n_states, B_scratch);
    const float* C = weights<N>(scan.C, row, scan.n_states, C_scratch);
    F y[4] = {skip * u, F{}, F{}, F{}};  // four sums at once: one would wait for itself at every state
#pragma GCC unroll 4
    for (int n = 0; n < padded; n += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const F state = exp2_lanes<W>(delta * at<W>(A, n + i)) * at<W>(h, n + i) + x * B[n + i];
        at<W>(h, n + i) = state;
        y[i] += state * C[n + i];
      }
    }
    F total = (y[0] + y[1]) + (y[2] + y[3]);
    if (scan.z.data != nullptr) {
      const F z = load<W>(scan.z, row, first, count);
      total *= z * sigmoid<W>(z);
    }
    store<W>(scan.out, row, first, count, total);
  }
  if (tile.stop == sequence.stop) return;
  for (int n = 0; n < padded; ++n) at<W>(state, n) = at<W>(h, n);
}

template <int N>
void forward_program(const Scan& scan, int64_t task, const Group& group) {
  const int64_t size = padded_states<N>(scan) * kLanes;
  const Array states = aligned_floats((group.last - group.first) * size);
  for (int64_t number = scan.tasks[task]; number < scan.tasks[task + 1]; ++number) {
    const Sequence sequence = sequence_of(scan, number);
    for (int32_t start = sequence.start; start < sequence.stop; start += kTile) {
      const Sequence tile = {sequence.first_row, start, std::min(start + kTile, sequence.stop)};
      for (int64_t block = group.first; block < group.last; ++block) {
        const int count = channels_in_block(scan, block);
        float* state = states.get() + (block - group.first) * size;
        if (count > kNarrow) {
          forward_block<kLanes, N>(scan, sequence, tile, state, block * kLanes, count);
        } else {
          forward_block<kNarrow, N>(scan, sequence, tile, state, block * kLanes, count);
        }
      }
    }
  }
}

}  // namespace
}  // namespace boldforge

extern "C" void boldforge_scan_forward(const boldforge::Scan* scan) {
  at::parallel_for(0, scan->n_tasks * scan->n_groups, 1, [scan](int64_t begin, int64_t end) {
    for (int64_t program = begin; program < end; ++program) {
      const boldforge::Group group = boldforge::group_of(*scan, program % scan->n_groups);
      if (scan->n_states == 16) {
        boldforge::forward_program<16>(*scan, program / scan->n_groups, group);
      } else {
        boldforge::forward_program<0>(*scan, program / scan->n_groups, group);
      }
    }
  });
}
