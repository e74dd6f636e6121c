// Blocks of neighbouring channels as vectors, rows of any floating type, and the functions the scan needs per lane.
//
// Written with the compiler's vector types: one source for every instruction set. Two intrinsics replace the bit tricks
// of 2^x where AVX-512 is at hand. No -ffast-math anywhere: the order of every sum is the one written here.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace boldforge {

#define BOLDFORGE_INLINE inline __attribute__((always_inline))

template <int W>
struct Lanes;
template <>
struct Lanes<16> {
  typedef float Float __attribute__((vector_size(64), may_alias));
  typedef int32_t Int __attribute__((vector_size(64), may_alias));
};
template <>
struct Lanes<8> {
  typedef float Float __attribute__((vector_size(32), may_alias));
  typedef int32_t Int __attribute__((vector_size(32), may_alias));
};
template <>
struct Lanes<4> {
  typedef float Float __attribute__((vector_size(16), may_alias));
  typedef int32_t Int __attribute__((vector_size(16), may_alias));
};
template <int W>
using Floats = typename Lanes<W>::Float;
template <int W>
using Ints = typename Lanes<W>::Int;

// Channels of a full block, which is one register: arrays per block have this stride. A narrow last block of 16 takes 8.
#if defined(__AVX512F__) && defined(__AVX512VL__)
constexpr int kLanes = 16, kNarrow = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kNarrow = 8;
#else
constexpr int kLanes = 4, kNarrow = 4;
#endif
constexpr int kMaxStates = 64;  // N at most
constexpr int kMaxTaps = 16;    // K at most

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

enum class Type : int32_t { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

// A matrix whose row r starts at data + r * stride elements; data may be null (no such argument).
struct Rows {
  void* data;
  int64_t stride;
  Type type;
};

template <int W, class T>
BOLDFORGE_INLINE Floats<W> load_as(const T* source, int count) {
  if constexpr (std::is_same_v<T, float>) {
    Floats<W> out;
    if (count == W) {
      std::memcpy(&out, source, sizeof(out));
      return out;
    }
  }
  float lanes[W];
  if (count == W) {
    for (int v = 0; v < W; ++v) lanes[v] = static_cast<float>(source[v]);
  } else {
    for (int v = 0; v < W; ++v) lanes[v] = v < count ? static_cast<float>(source[v]) : 0.f;
  }
  Floats<W> out;
  std::memcpy(&out, lanes, sizeof(out));
  return out;
}

// Channels first … first + count - 1 of a row; zero in the lanes beyond.
template <int W>
BOLDFORGE_INLINE Floats<W> load(const Rows& rows, int64_t row, int64_t first, int count) {
  const int64_t offset = row * rows.stride + first;
  switch (rows.type) {
    case Type::kFloat:
      return load_as<W>(static_cast<const float*>(rows.data) + offset, count);
    case Type::kBFloat16:
      return load_as<W>(static_cast<const c10::BFloat16*>(rows.data) + offset, count);
    default:
      return load_as<W>(static_cast<const c10::Half*>(rows.data) + offset, count);
  }
}

// Ask for a row that will be read soon: along a scan path the processor cannot guess the next one.
BOLDFORGE_INLINE void prefetch(const Rows& rows, int64_t row, int64_t first) {
  const int64_t bytes = rows.type == Type::kFloat ? 4 : 2;
  const char* start = static_cast<const char*>(rows.data) + (row * rows.stride + first) * bytes;
  __builtin_prefetch(start);
  __builtin_prefetch(start + (kLanes - 1) * bytes);
}

template <int W, class T>
BOLDFORGE_INLINE void store_as(T* target, int count, Floats<W> value) {
  float lanes[W];
  std::memcpy(lanes, &value, sizeof(value));
  if (count == W) {
    for (int v = 0; v < W; ++v) target[v] = static_cast<T>(lanes[v]);
  } else {
    for (int v = 0; v < count; ++v) target[v] = static_cast<T>(lanes[v]);
  }
}

template <int W>
BOLDFORGE_INLINE void store(const Rows& rows, int64_t row, int64_t first, int count, Floats<W> value) {
  const int64_t offset = row * rows.stride + first;
  switch (rows.type) {
    case Type::kFloat:
      return store_as<W>(static_cast<float*>(rows.data) + offset, count, value);
    case Type::kBFloat16:
      return store_as<W>(static_cast<c10::BFloat16*>(rows.data) + offset, count, value);
    default:
      return store_as<W>(static_cast<c10::Half*>(rows.data) + offset, count, value);
  }
}

// The channels of a float vector, zero in the lanes beyond and where there is no vector.
template <int W>
BOLDFORGE_INLINE Floats<W> load_vector(const float* source, int64_t first, int count) {
  Floats<W> out = {};
  return source == nullptr ? out : load_as<W>(source + first, count);
}

// One lane-block of a float array with stride kLanes.
template <int W>
BOLDFORGE_INLINE Floats<W>& at(float* array, int64_t i) {
  return *reinterpret_cast<Floats<W>*>(array + i * kLanes);
}

template <int W>
BOLDFORGE_INLINE Floats<W> filled(float value) {
  return Floats<W>{} + value;
}

// 2^f for f in [-1/2, 1/2], relative error 1.6e-7 in float32; exactly 1 at 0, so that slow decays do not drift.
template <int W>
BOLDFORGE_INLINE Floats<W> exp2_fraction(Floats<W> f) {
  Floats<W> p = f * 0.0013264729641377926f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  return p * f + 1.f;
}

template <int W>
BOLDFORGE_INLINE Floats<W> clamped(Floats<W> x, float low, float high) {
#if defined(__AVX2__)
  if constexpr (W == 8) {
    const __m256 raised = _mm256_max_ps(_mm256_set1_ps(low), reinterpret_cast<__m256>(x));
    return reinterpret_cast<Floats<W>>(_mm256_min_ps(_mm256_set1_ps(high), raised));
  }
#endif
  const Floats<W> raised = x < low ? filled<W>(low) : x;
  return raised > high ? filled<W>(high) : raised;
}

// 2^x; zero below -126 or so, infinite above 127.
template <int W>
BOLDFORGE_INLINE Floats<W> exp2_lanes(Floats<W> x) {
#if defined(__AVX512F__) && defined(__AVX512VL__)
  if constexpr (W == 16) {
    const __m512 whole = _mm512_roundscale_ps(reinterpret_cast<__m512>(x), 0);
    const Floats<W> p = exp2_fraction<W>(x - reinterpret_cast<Floats<W>>(whole));
    return reinterpret_cast<Floats<W>>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), whole));
  } else {
    const __m256 whole = _mm256_roundscale_ps(reinterpret_cast<__m256>(x), 0);
    const Floats<W> p = exp2_fraction<W>(x - reinterpret_cast<Floats<W>>(whole));
    return reinterpret_cast<Floats<W>>(_mm256_scalef_ps(reinterpret_cast<__m256>(p), whole));
  }
#else
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits, from where it goes to the exponent.
  // At the bounds the fraction is zero, so that exponent makes an exact zero or infinity; a NaN passes through.
  const Floats<W> bounded = clamped<W>(x, -127.f, 128.f);
  const Floats<W> shifted = bounded + 12582912.f;
  const Floats<W> p = exp2_fraction<W>(bounded - (shifted - 12582912.f));
  return reinterpret_cast<Floats<W>>(reinterpret_cast<Ints<W>>(p) + (reinterpret_cast<Ints<W>>(shifted) << 23));
#endif
}

// e^x. The whole powers of two come off before the multiplication by log2 e, which would round them away: at x = -12 the
// plain way is off by 1e-6.
template <int W>
BOLDFORGE_INLINE Floats<W> exp_lanes(Floats<W> x) {
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the first has nine bits, so products are exact
  const Floats<W> bounded = clamped<W>(x, -104.f, 104.f);
  const Floats<W> whole = (bounded * kLog2E + 12582912.f) - 12582912.f;
  const Floats<W> rest = (bounded - whole * kLn2High) - whole * kLn2Low;
  return exp2_fraction<W>(rest * kLog2E) * exp2_lanes<W>(whole);
}

// max(x, 0) + log1p(e^-|x|), with log1p(v) = 2 atanh(v / (2 + v)): seven terms reach 2e-8 for v in [0, 1].
template <int W>
BOLDFORGE_INLINE Floats<W> softplus(Floats<W> x) {
  const Floats<W> zero = {};
  const Floats<W> v = exp_lanes<W>(x < 0.f ? x : -x);
  const Floats<W> s = v / (v + 2.f);
  const Floats<W> s2 = s * s;
  Floats<W> series = s2 * (1.f / 13.f) + 1.f / 11.f;
  series = series * s2 + 1.f / 9.f;
  series = series * s2 + 1.f / 7.f;
  series = series * s2 + 1.f / 5.f;
  series = series * s2 + 1.f / 3.f;
  return (x < 0.f ? zero : x) + 2.f * s * (series * s2 + 1.f);
}

template <int W>
BOLDFORGE_INLINE Floats<W> sigmoid(Floats<W> x) {
  return 1.f / (exp_lanes<W>(-x) + 1.f);
}

// The sum of a full block, halves first.
template <int W>
BOLDFORGE_INLINE float sum_lanes(Floats<W> lanes) {
  if constexpr (W == 4) {
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  } else {
    Floats<W / 2> halves[2];
    std::memcpy(halves, &lanes, sizeof(halves));
    return sum_lanes<W / 2>(halves[0] + halves[1]);
  }
}

}  // namespace boldforge
