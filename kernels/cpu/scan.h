// What Python hands to the scan (the mirror of ``ScanCall`` in cpu_backend.py), and how the work is cut.
//
// A program is one task (some neighbouring sequences) times one group (some neighbouring channel blocks). How many there
// are follows from the shapes alone, so the number of threads changes no bit of the result.
#pragma once

#include <memory>
#include <new>

#include "lanes.h"

namespace boldforge {

struct FreeAligned {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using Array = std::unique_ptr<float[], FreeAligned>;

inline Array aligned_floats(int64_t size) {
  return Array(static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t(64))));
}

struct Scan {
  Rows u, dt, B, C, z, out;           // z.data may be null; out is y forward and the gradient of y backward
  Rows du, ddt, dz;                   // backward only
  const float* A;                     // [N, D], times log2 e
  const float* D;                     // [D] or null
  const float* bias;                  // [D] or null
  float *dA, *dD, *dbias;             // backward: [n_tasks, N, D], [n_tasks, D], [n_tasks, D]
  float *dB, *dC;                     // backward: [n_groups, clips * n_tokens, N]
  const int32_t* rows;                // [n_tokens], sign bit: the state restarts before this token
  const int32_t* edges;               // [n_sequences + 1], cu_seqlens
  const int64_t* tasks;               // [n_tasks + 1], first sequence (clip * n_sequences + i) of every task
  int64_t n_tasks, n_groups, n_sequences, n_tokens, n_clips, n_channels, n_states;
};

// Where one sequence lies.
struct Sequence {
  int64_t first_row;  // of its clip
  int32_t start, stop;
};

BOLDFORGE_INLINE Sequence sequence_of(const Scan& scan, int64_t number) {
  const int64_t clip = number / scan.n_sequences, i = number % scan.n_sequences;
  return {clip * scan.n_tokens, scan.edges[i], scan.edges[i + 1]};
}

BOLDFORGE_INLINE int64_t row_of(int32_t code) { return code & 0x7fffffff; }

// Blocks first … last - 1 of a group, in units of kLanes channels; groups differ by at most one block.
struct Group {
  int64_t first, last;
};

BOLDFORGE_INLINE Group group_of(const Scan& scan, int64_t number) {
  const int64_t blocks = (scan.n_channels + kLanes - 1) / kLanes;
  return {blocks * number / scan.n_groups, blocks * (number + 1) / scan.n_groups};
}

BOLDFORGE_INLINE int channels_in_block(const Scan& scan, int64_t block) {
  const int64_t left = scan.n_channels - block * kLanes;
  return static_cast<int>(left < kLanes ? left : kLanes);
}

// The N weights of one token as floats, followed by zeros up to a multiple of four; ``scratch`` holds kMaxStates.
template <int N>
BOLDFORGE_INLINE const float* weights(const Rows& rows, int64_t row, int64_t n_states, float* scratch) {
  if (N > 0 && rows.type == Type::kFloat) return static_cast<const float*>(rows.data) + row * rows.stride;
  int n = 0;
  for (; n + 8 <= n_states; n += 8) {
    const Floats<8> eight = load<8>(rows, row, n, 8);
    std::memcpy(scratch + n, &eight, sizeof(eight));
  }
  if (n < n_states) {
    const Floats<8> rest = load<8>(rows, row, n, static_cast<int>(n_states - n));
    std::memcpy(scratch + n, &rest, sizeof(rest));
  }
  return scratch;
}

// States to loop over: N where it is known when compiling, else a multiple of four (A, B and C are zero in the rest).
template <int N>
BOLDFORGE_INLINE int padded_states(const Scan& scan) {
  return N > 0 ? N : static_cast<int>((scan.n_states + 3) / 4 * 4);
}

template <int W>
BOLDFORGE_INLINE void load_rates(const Scan& scan, int64_t first, int count, int padded, float* A) {
  for (int n = 0; n < padded; ++n) {
    at<W>(A, n) = n < scan.n_states ? load_vector<W>(scan.A + n * scan.n_channels, first, count) : Floats<W>{};
  }
}

}  // namespace boldforge
