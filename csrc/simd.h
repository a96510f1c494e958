// Vector types over the GCC/Clang vector extensions, one namespace per instruction set.
//
// The vector types keep their natural alignment and every load and store goes through memcpy: an under-aligned vector
// typedef makes GCC spill each operand. Every translation unit of a kernel is compiled once per instruction set with
// SECANT_ISA (the name of the namespace) and SECANT_VECTOR_BYTES set by the build.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef SECANT_ISA
#error "SECANT_ISA and SECANT_VECTOR_BYTES are set per translation unit by the build"
#endif

#define SECANT_INLINE inline __attribute__((always_inline))

namespace SECANT_ISA {

constexpr int kBytes = SECANT_VECTOR_BYTES;

// Storage of a bfloat16: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

template <class E, int N>
struct VecN {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};
template <class E>
using vec = typename VecN<E, kBytes / sizeof(E)>::type;

using vd = vec<double>;
constexpr int kDoubles = kBytes / 8;
template <class T>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));

template <class V, class E>
SECANT_INLINE V load(const E* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class E>
SECANT_INLINE void store(E* p, const V& v) {
  std::memcpy(p, &v, sizeof(V));
}

template <class T>
SECANT_INLINE vec<T> splat(T x) {
  return x - vec<T>{};
}

// Widening loads. GCC lowers __builtin_convertvector to halves of a register, so the wide forms name the instruction.
template <int N>
SECANT_INLINE typename VecN<uint32_t, N>::type widen_u16(const uint16_t* p) {
  using V16 = typename VecN<uint16_t, N>::type;
  using V32 = typename VecN<uint32_t, N>::type;
#ifdef __AVX2__
  if constexpr (N == 4) return (V32)_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  if constexpr (N == 8) return (V32)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
#ifdef __AVX512F__
  if constexpr (N == 16) return (V32)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#endif
  return __builtin_convertvector(load<V16>(p), V32);
}

template <int N>
SECANT_INLINE typename VecN<double, N>::type widen_float(const typename VecN<float, N>::type& x) {
#ifdef __AVX2__
  if constexpr (N == 4) return (typename VecN<double, N>::type)_mm256_cvtps_pd((__m128)x);
#endif
#ifdef __AVX512F__
  if constexpr (N == 8) return (typename VecN<double, N>::type)_mm512_cvtps_pd((__m256)x);
#endif
  return __builtin_convertvector(x, typename VecN<double, N>::type);
}

template <int N>
SECANT_INLINE typename VecN<float, N>::type widen_bf16(const bf16* p) {
  return (typename VecN<float, N>::type)(widen_u16<N>(&p->bits) << 16);
}

// N values of type S, as a vector of N values of type T.
template <class T, int N, class S>
SECANT_INLINE typename VecN<T, N>::type load_as(const S* p) {
  using V = typename VecN<T, N>::type;
  if constexpr (__is_same(S, bf16) && __is_same(T, double)) {
    return widen_float<N>(widen_bf16<N>(p));
  } else if constexpr (__is_same(S, bf16)) {
    return widen_bf16<N>(p);
  } else if constexpr (__is_same(S, float) && __is_same(T, double)) {
    return widen_float<N>(load<typename VecN<float, N>::type>(p));
  } else {
    return __builtin_convertvector(load<typename VecN<S, N>::type>(p), V);
  }
}

template <class S>
SECANT_INLINE vd load_d(const S* p) {
  return load_as<double, kDoubles>(p);
}

template <class T, class S>
SECANT_INLINE vec<T> load_t(const S* p) {
  return load_as<T, kLanes<T>>(p);
}

// Fixed order: lane 0, 1, 2, ...
SECANT_INLINE double hsum(const vd& v) {
  double s = v[0];
  for (int i = 1; i < kDoubles; ++i) s += v[i];
  return s;
}

SECANT_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
SECANT_INLINE float to_float(float x) { return x; }
SECANT_INLINE double to_float(double x) { return x; }

// One stored value from a computed one; to nearest, ties to even, NaN stays a quiet NaN.
template <class S>
struct Round {
  template <class T>
  static SECANT_INLINE S from(T x) {
    return static_cast<S>(x);
  }
};
template <>
struct Round<bf16> {
  template <class T>
  static SECANT_INLINE bf16 from(T x) {
    const float f = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return bf16{static_cast<uint16_t>(f != f ? 0x7fc0u : rounded)};
  }
};

}  // namespace SECANT_ISA
