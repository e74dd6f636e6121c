// The scan's backward pass: states kept every kSteps tokens on the way there, computed again for the way back.
//
// A program adds dB and dC of all its channel blocks lane by lane before it sums the lanes, and carries dA, dD and dbias
// through all its sequences. Every sum has one order and one owner, so two runs give the same bits.
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "scan.h"

namespace boldforge {
namespace {

constexpr int kSteps = 8;  // two states per step of one block must stay in the nearest cache
constexpr int32_t kTile = 32;  // chunks that every block goes through in turn: what they read stays in the second cache

// What one program needs beside its arguments; every array consists of lane blocks.
struct Scratch {
  explicit Scratch(const Scan& scan, const Group& group, int padded, int64_t longest)
      : blocks(group.last - group.first), padded(padded) {
    const int64_t state = blocks * padded * kLanes;
    A = aligned_floats(state);
    dh = aligned_floats(state);
    dA = aligned_floats(state);
    dD = aligned_floats(blocks * kLanes);
    dbias = aligned_floats(blocks * kLanes);
    kept = aligned_floats((longest + kSteps - 1) / kSteps * state);
    states = aligned_floats((kSteps + 1) * padded * kLanes);
    decays = aligned_floats(kSteps * padded * kLanes);
    dB = aligned_floats(kSteps * padded * kLanes);
    dC = aligned_floats(kSteps * padded * kLanes);
    zeros = aligned_floats(padded * kLanes);
    std::memset(zeros.get(), 0, padded * kLanes * sizeof(float));
    std::memset(dA.get(), 0, state * sizeof(float));
    std::memset(dD.get(), 0, blocks * kLanes * sizeof(float));
    std::memset(dbias.get(), 0, blocks * kLanes * sizeof(float));
  }
  int64_t blocks;
  int padded;
  Array A, dh, dA;        // [blocks, N]
  Array dD, dbias;        // [blocks]
  Array kept;             // [steps / kSteps, blocks, N]: the state before every kSteps-th token
  Array states, decays;      // [kSteps (+ 1), N] of the block at hand
  Array dB, dC;              // [kSteps, N], summed over the blocks
  Array zeros;               // [N]: the state after a restart
};

// One channel block of a program.
struct Block {
  int64_t number;  // within the group
  int64_t first;   // channel
  int count;
};

template <int W, int N>
struct BlockPass {
  using F = Floats<W>;
  const Scan& scan;
  Scratch& scratch;
  const Sequence& sequence;
  Block block;
  F bias, skip;

  BlockPass(const Scan& scan, Scratch& scratch, const Sequence& sequence, Block block)
      : scan(scan), scratch(scratch), sequence(sequence), block(block),
        bias(load_vector<W>(scan.bias, block.first, block.count)),
        skip(load_vector<W>(scan.D, block.first, block.count)) {}

  BOLDFORGE_INLINE int padded() const { return N > 0 ? N : scratch.padded; }
  BOLDFORGE_INLINE float* of_block(const Array& array) const {
    return array.get() + block.number * padded() * kLanes;
  }
  BOLDFORGE_INLINE void write(const Rows& rows, int64_t row, F value) const {
    store<W>(rows, row, block.first, block.count, value);
  }
  BOLDFORGE_INLINE F read(const Rows& rows, int64_t row) const { return load<W>(rows, row, block.first, block.count); }

  float* kept_before(int32_t chunk) const {
    return of_block(scratch.kept) + chunk * scratch.blocks * padded() * kLanes;
  }

  // Run through these whole chunks, from the state that the ones before them left, and keep the state after each.
  void keep_states(int32_t first_chunk, int32_t last_chunk) {
    float* A = of_block(scratch.A);
    alignas(64) float h[(N > 0 ? N : kMaxStates) * kLanes], B_scratch[kMaxStates];
    for (int n = 0; n < padded(); ++n) at<W>(h, n) = first_chunk == 0 ? F{} : at<W>(kept_before(first_chunk), n);
    if (first_chunk == 0) {
      for (int n = 0; n < padded(); ++n) at<W>(kept_before(0), n) = F{};
    }
    for (int32_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      for (int32_t place = sequence.start + chunk * kSteps; place < sequence.start + (chunk + 1) * kSteps; ++place) {
        const int32_t code = scan.rows[place];
        const int64_t row = sequence.first_row + row_of(code);
        const F delta = softplus<W>(read(scan.dt, row) + bias), x = delta * read(scan.u, row);
        const float* B = weights<N>(scan.B, row, scan.n_states, B_scratch);
        if (code < 0) {
          for (int n = 0; n < padded(); ++n) at<W>(h, n) = F{};
        }
#pragma GCC unroll 4
        for (int n = 0; n < padded(); ++n) {
          at<W>(h, n) = exp2_lanes<W>(delta * at<W>(A, n)) * at<W>(h, n) + x * B[n];
        }
      }
      float* kept = kept_before(chunk + 1);
      for (int n = 0; n < padded(); ++n) at<W>(kept, n) = at<W>(h, n);
    }
  }

  // Compute all states and decays of one chunk again, then go back through it.
  void reverse_chunk(int32_t chunk) {
    const int32_t start = sequence.start + chunk * kSteps;
    const int32_t steps = sequence.stop - start < kSteps ? sequence.stop - start : kSteps;
    float* kept = kept_before(chunk);
    float* states = scratch.states.get();
    for (int n = 0; n < padded(); ++n) at<W>(states, n) = at<W>(kept, n);
    F step[kSteps], delta[kSteps], u[kSteps];
    float* A = of_block(scratch.A);
    alignas(64) float B_scratch[kMaxStates], C_scratch[kMaxStates];
    for (int k = 0; k < steps; ++k) {
      const int32_t code = scan.rows[start + k];
      const int64_t row = sequence.first_row + row_of(code);
      step[k] = read(scan.dt, row) + bias;
      delta[k] = softplus<W>(step[k]);
      u[k] = read(scan.u, row);
      prefetch(scan.out, row, block.first);
      if (scan.z.data != nullptr) prefetch(scan.z, row, block.first);
      const F x = delta[k] * u[k];
      const float* B = weights<N>(scan.B, row, scan.n_states, B_scratch);
      float* before = code < 0 ? scratch.zeros.get() : states + k * padded() * kLanes;
      float* after = states + (k + 1) * padded() * kLanes;
      float* decay = scratch.decays.get() + k * padded() * kLanes;
#pragma GCC unroll 4
      for (int n = 0; n < padded(); ++n) {
        const F a = exp2_lanes<W>(delta[k] * at<W>(A, n));
        at<W>(decay, n) = a;
        at<W>(after, n) = a * at<W>(before, n) + x * B[n];
      }
    }
    for (int k = steps - 1; k >= 0; --k) {
      const int32_t code = scan.rows[start + k];
      const int64_t row = sequence.first_row + row_of(code);
      reverse_step(k, row, code < 0, step[k], delta[k], u[k], weights<N>(scan.B, row, scan.n_states, B_scratch),
                   weights<N>(scan.C, row, scan.n_states, C_scratch));
    }
  }

  BOLDFORGE_INLINE void reverse_step(int k, int64_t row, bool restart, F step, F delta, F u, const float* B,
                                     const float* C) {
    const F x = delta * u;
    const F dout = read(scan.out, row);
    F dy = dout, gate = F{}, z = F{};
    if (scan.z.data != nullptr) {
      z = read(scan.z, row);
      gate = sigmoid<W>(z);
      dy = dout * z * gate;
    }
    const int64_t at_step = static_cast<int64_t>(k) * padded() * kLanes;
    float* after = scratch.states.get() + at_step + padded() * kLanes;
    float* before = restart ? scratch.zeros.get() : scratch.states.get() + at_step;
    float *decay = scratch.decays.get() + at_step, *dB = scratch.dB.get() + at_step, *dC = scratch.dC.get() + at_step;
    float *A = of_block(scratch.A), *dh = of_block(scratch.dh), *dA = of_block(scratch.dA);
    F y = skip * u, gB = F{}, pA = F{};
#pragma GCC unroll 4
    for (int n = 0; n < padded(); ++n) {
      const F h = at<W>(after, n);
      const F g = at<W>(dh, n) + dy * C[n];
      y += h * C[n];
      at<W>(dC, n) += dy * h;
      at<W>(dB, n) += x * g;
      gB += g * B[n];
      const F passed = at<W>(decay, n) * g;
      const F p = passed * at<W>(before, n);
      pA += p * at<W>(A, n);
      at<W>(dA, n) += p * delta;
      at<W>(dh, n) = passed;
    }
    if (restart) {  // by assignment: a NaN after the restart must not reach the tokens before it
      for (int n = 0; n < padded(); ++n) at<W>(dh, n) = F{};
    }
    const F ddt = (gB * u + pA * kLn2) * sigmoid<W>(step);
    at<W>(scratch.dD.get(), block.number) += dy * u;
    at<W>(scratch.dbias.get(), block.number) += ddt;
    write(scan.du, row, gB * delta + dy * skip);
    write(scan.ddt, row, ddt);
    if (scan.z.data != nullptr) write(scan.dz, row, dout * gate * (1.f + z * (1.f - gate)) * y);
  }
};

template <class Work>
BOLDFORGE_INLINE void with_width(const Scan& scan, const Group& group, int64_t number, const Work& work) {
  const int64_t block = group.first + number;
  const Block where = {number, block * kLanes, channels_in_block(scan, block)};
  if (where.count > kNarrow) {
    work(std::integral_constant<int, kLanes>(), where);
  } else {
    work(std::integral_constant<int, kNarrow>(), where);
  }
}

// Sum dB and dC of one chunk over the lanes and write this group's share of its rows.
void write_weight_gradients(const Scan& scan, const Scratch& scratch, const Sequence& sequence, int32_t chunk,
                            int64_t group) {
  const int32_t start = sequence.start + chunk * kSteps;
  for (int k = 0; k < kSteps && start + k < sequence.stop; ++k) {
    const int64_t row = group * scan.n_clips * scan.n_tokens + sequence.first_row + row_of(scan.rows[start + k]);
    for (int n = 0; n < scan.n_states; ++n) {
      const int64_t i = static_cast<int64_t>(k) * scratch.padded + n;
      scan.dB[row * scan.n_states + n] = sum_lanes<kLanes>(at<kLanes>(scratch.dB.get(), i));
      scan.dC[row * scan.n_states + n] = sum_lanes<kLanes>(at<kLanes>(scratch.dC.get(), i));
    }
  }
}

// Write what the program summed over its sequences: its share of dA, dD and dbias.
void write_sums(const Scan& scan, const Scratch& scratch, const Group& group, int64_t task) {
  for (int64_t block = 0; block < scratch.blocks; ++block) {
    const int64_t first = (group.first + block) * kLanes;
    const size_t bytes = channels_in_block(scan, group.first + block) * sizeof(float);
    for (int n = 0; n < scan.n_states; ++n) {
      float* target = scan.dA + (task * scan.n_states + n) * scan.n_channels + first;
      std::memcpy(target, scratch.dA.get() + (block * scratch.padded + n) * kLanes, bytes);
    }
    std::memcpy(scan.dD + task * scan.n_channels + first, scratch.dD.get() + block * kLanes, bytes);
    std::memcpy(scan.dbias + task * scan.n_channels + first, scratch.dbias.get() + block * kLanes, bytes);
  }
}

template <int N>
void backward_program(const Scan& scan, int64_t task, int64_t group_number) {
  const Group group = group_of(scan, group_number);
  int64_t longest = 1;
  for (int64_t number = scan.tasks[task]; number < scan.tasks[task + 1]; ++number) {
    const Sequence sequence = sequence_of(scan, number);
    longest = std::max<int64_t>(longest, sequence.stop - sequence.start);
  }
  Scratch scratch(scan, group, padded_states<N>(scan), longest);
  const size_t chunk_bytes = kSteps * scratch.padded * kLanes * sizeof(float);
  for (int64_t block = 0; block < scratch.blocks; ++block) {
    with_width(scan, group, block, [&](auto width, Block where) {
      load_rates<width>(scan, where.first, where.count, scratch.padded,
                        scratch.A.get() + where.number * scratch.padded * kLanes);
    });
  }
  for (int64_t number = scan.tasks[task]; number < scan.tasks[task + 1]; ++number) {
    const Sequence sequence = sequence_of(scan, number);
    const int32_t last_chunk = (sequence.stop - sequence.start - 1) / kSteps;
    for (int32_t chunk = 0; chunk == 0 || chunk < last_chunk; chunk += kTile) {
      for (int64_t block = 0; block < scratch.blocks; ++block) {
        with_width(scan, group, block, [&](auto width, Block where) {
          BlockPass<width, N>(scan, scratch, sequence, where).keep_states(chunk, std::min(chunk + kTile, last_chunk));
        });
      }
    }
    std::memset(scratch.dh.get(), 0, scratch.blocks * scratch.padded * kLanes * sizeof(float));
    for (int32_t chunk = last_chunk; chunk >= 0; --chunk) {
      std::memset(scratch.dB.get(), 0, chunk_bytes);
      std::memset(scratch.dC.get(), 0, chunk_bytes);
      for (int64_t block = 0; block < scratch.blocks; ++block) {
        with_width(scan, group, block, [&](auto width, Block where) {
          BlockPass<width, N>(scan, scratch, sequence, where).reverse_chunk(chunk);
        });
      }
      write_weight_gradients(scan, scratch, sequence, chunk, group_number);
    }
  }
  write_sums(scan, scratch, group, task);
}

}  // namespace
}  // namespace boldforge

extern "C" void boldforge_scan_backward(const boldforge::Scan* scan) {
  at::parallel_for(0, scan->n_tasks * scan->n_groups, 1, [scan](int64_t begin, int64_t end) {
    for (int64_t program = begin; program < end; ++program) {
      if (scan->n_states == 16) {
        boldforge::backward_program<16>(*scan, program / scan->n_groups, program % scan->n_groups);
      } else {
        boldforge::backward_program<0>(*scan, program / scan->n_groups, program % scan->n_groups);
      }
    }
  });
}
