// Vector types over the GCC/Clang vector extensions, one namespace per instruction set.
//
// The vector types keep their natural alignment and every load and store goes through memcpy: an under-aligned vector
// typedef makes GCC spill each operand. Every translation unit of a kernel is compiled once per instruction set with
// SECANT_ISA (the name of the namespace) and SECANT_VECTOR_BYTES set by the build.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef SECANT_ISA
#error "SECANT_ISA and SECANT_VECTOR_BYTES are set per translation unit by the build"
#endif

#define SECANT_INLINE inline __attribute__((always_inline))
#define SECANT_LAMBDA __attribute__((always_inline))

namespace SECANT_ISA {

constexpr int kBytes = SECANT_VECTOR_BYTES;

// Storage of a bfloat16: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

// Storage of an IEEE half.
struct f16 {
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

#ifdef __AVX512F__
// Under a mask of ones, because GCC's own unmasked forms start from a variable that was never set, and warn of it at
// every use (GCC bug 105593). The instruction is the same.
constexpr __mmask16 kAllFloats = 0xffff;
constexpr __mmask8 kAllDoubles = 0xff;
#endif

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

template <int N>
SECANT_INLINE typename VecN<float, N>::type widen_f16(const f16* p) {
  using F = typename VecN<float, N>::type;
#ifdef __AVX2__
  if constexpr (N == 4) return (F)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  if constexpr (N == 8) return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
#ifdef __AVX512F__
  if constexpr (N == 16)
    return (F)_mm512_maskz_cvtph_ps(kAllFloats, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#endif
  // The bits of the magnitude are those of the float 2^-112 times as large; infinities and NaN have its top exponent.
  using U = typename VecN<uint32_t, N>::type;
  const U bits = widen_u16<N>(&p->bits), magnitude = (bits & 0x7fffu) << 13;
  const U special = (U)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  const F value = (F)magnitude * 5192296858534827628530496329220096.0f;  // 2^112
  return (F)(((U)value | special) | ((bits & 0x8000u) << 16));
}

// N values of type S, as a vector of N values of type T.
template <class T, int N, class S>
SECANT_INLINE typename VecN<T, N>::type load_as(const S* p) {
  using V = typename VecN<T, N>::type;
  if constexpr (__is_same(S, f16)) {
    return widen_f16<N>(p);
  } else if constexpr (__is_same(S, bf16) && __is_same(T, double)) {
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

// Vectors of doubles in a vector of T, and the h-th of them, lower lanes first.
template <class T>
constexpr int kHalves = kLanes<T> / kDoubles;

template <class T>
SECANT_INLINE vd half(const vec<T>& v, int h) {
  if constexpr (__is_same(T, double)) {
    return v;
  } else {
    using F = typename VecN<float, kDoubles>::type;
#if defined(__AVX512F__)
    return widen_float<kDoubles>(
        (F)(h == 0 ? _mm512_castps512_ps256((__m512)v) : _mm512_extractf32x8_ps((__m512)v, 1)));
#elif defined(__AVX2__)
    return widen_float<kDoubles>((F)(h == 0 ? _mm256_castps256_ps128((__m256)v) : _mm256_extractf128_ps((__m256)v, 1)));
#else
    F part;
    std::memcpy(&part, reinterpret_cast<const char*>(&v) + h * sizeof(F), sizeof(F));
    return widen_float<kDoubles>(part);
#endif
  }
}

// The sum of the lanes, by halves: the order is fixed.
template <class V, int... I>
SECANT_INLINE auto add_halves(const V& v, std::integer_sequence<int, I...>) {
  constexpr int h = sizeof...(I);
  return __builtin_shufflevector(v, v, I...) + __builtin_shufflevector(v, v, (I + h)...);
}

template <class T>
SECANT_INLINE T sum_lanes(const vec<T>& v) {
  const auto halve = [](const auto& x) SECANT_LAMBDA {
    return add_halves(x, std::make_integer_sequence<int, sizeof(x) / sizeof(T) / 2>{});
  };
  if constexpr (kLanes<T> == 16) {
    const auto x = halve(halve(halve(v)));
    return x[0] + x[1];
  } else if constexpr (kLanes<T> == 8) {
    const auto x = halve(halve(v));
    return x[0] + x[1];
  } else if constexpr (kLanes<T> == 4) {
    const auto x = halve(v);
    return x[0] + x[1];
  } else {
    return v[0] + v[1];
  }
}

// The lanes of a, then of b, in groups of G: the halves of each group added, so that a group of the result has G / 2.
template <int G, class V, int... I>
SECANT_INLINE V add_group_halves(const V& a, const V& b, std::integer_sequence<int, I...>) {
  constexpr int h = G / 2;
  return __builtin_shufflevector(a, b, (I / h * G + I % h)...) +
         __builtin_shufflevector(a, b, (I / h * G + h + I % h)...);
}

// The sums of the lanes of four vectors.
template <class T>
SECANT_INLINE void sum_lanes_of_four(const vec<T>& a, const vec<T>& b, const vec<T>& c, const vec<T>& d, T* sums) {
  constexpr int W = kLanes<T>;
  if constexpr (W == 2) {
    sums[0] = a[0] + a[1], sums[1] = b[0] + b[1], sums[2] = c[0] + c[1], sums[3] = d[0] + d[1];
  } else {
    constexpr auto all = std::make_integer_sequence<int, W>{};
    vec<T> s = add_group_halves<W / 2>(add_group_halves<W>(a, b, all), add_group_halves<W>(c, d, all), all);
    if constexpr (W == 16) s = add_group_halves<4>(s, s, all);
    if constexpr (W >= 8) s = add_group_halves<2>(s, s, all);
    for (int i = 0; i < 4; ++i) sums[i] = s[i];
  }
}

SECANT_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
SECANT_INLINE float to_float(f16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 5192296858534827628530496329220096.0f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits |= special | (static_cast<uint32_t>(x.bits & 0x8000u) << 16);
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
template <>
struct Round<f16> {
  static SECANT_INLINE f16 from(float f) {
    uint32_t bits, rounded;
    std::memcpy(&bits, &f, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more
    if (magnitude < 0x38800000u) {
      // Subnormal: the last place of a float in [1/2, 1) is 2^-24, that of the half.
      float m;
      std::memcpy(&m, &magnitude, 4);
      m += 0.5f;
      std::memcpy(&rounded, &m, 4);
      return f16{static_cast<uint16_t>(sign | (rounded - 0x3f000000u))};
    }
    rounded = magnitude - (112u << 23);
    rounded = (rounded + 0xfffu + ((rounded >> 13) & 1u)) >> 13;
    return f16{static_cast<uint16_t>(sign | rounded)};
  }
};

// ------------------------------------------------------------------------------- masks, lane by lane, and transposes

// One truth value per lane: a bit mask where the instruction set has them, else all bits of the lane.
#ifdef __AVX512F__
template <class T>
using mask = typename std::conditional<sizeof(T) == 4, __mmask16, __mmask8>::type;
#else
template <class T>
using mask = vec<typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type>;
#endif

// x < y; false where either is NaN.
template <class T>
SECANT_INLINE mask<T> less(const vec<T>& x, const vec<T>& y) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_LT_OQ);
  if constexpr (sizeof(T) == 8) return _mm512_cmp_pd_mask((__m512d)x, (__m512d)y, _CMP_LT_OQ);
#else
  return x < y;
#endif
}

template <class T>
SECANT_INLINE mask<T> equal(const vec<T>& x, const vec<T>& y) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_EQ_OQ);
  if constexpr (sizeof(T) == 8) return _mm512_cmp_pd_mask((__m512d)x, (__m512d)y, _CMP_EQ_OQ);
#else
  return x == y;
#endif
}

// |x| > |y| by their bits: NaN is larger than infinity.
template <class T>
SECANT_INLINE mask<T> larger(const vec<T>& x, const vec<T>& y) {
  using I = vec<typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type>;
  const I bits = ~(I)splat(T(-0.0)), a = (I)x & bits, b = (I)y & bits;
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
  if constexpr (sizeof(T) == 8) return _mm512_cmpgt_epi64_mask((__m512i)a, (__m512i)b);
#else
  return a > b;
#endif
}

template <class T>
SECANT_INLINE vec<T> select(mask<T> m, const vec<T>& yes, const vec<T>& no) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return (vec<T>)_mm512_mask_blend_ps(m, (__m512)no, (__m512)yes);
  if constexpr (sizeof(T) == 8) return (vec<T>)_mm512_mask_blend_pd(m, (__m512d)no, (__m512d)yes);
#else
  return m ? yes : no;
#endif
}

template <class T>
SECANT_INLINE bool any(mask<T> m) {
#if defined(__AVX512F__)
  return m != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)m) != 0;
#else
  bool r = false;
  for (int i = 0; i < kLanes<T>; ++i) r |= m[i] != 0;
  return r;
#endif
}

template <class T>
SECANT_INLINE vec<T> absolute(const vec<T>& x) {
  using I = vec<typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type>;
  return (vec<T>)((I)x & ~(I)splat(T(-0.0)));
}

template <class T>
SECANT_INLINE vec<T> square_root(const vec<T>& x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (vec<T>)_mm512_maskz_sqrt_ps(kAllFloats, (__m512)x);
  if constexpr (sizeof(T) == 8) return (vec<T>)_mm512_maskz_sqrt_pd(kAllDoubles, (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (vec<T>)_mm256_sqrt_ps((__m256)x);
  if constexpr (sizeof(T) == 8) return (vec<T>)_mm256_sqrt_pd((__m256d)x);
#else
  vec<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r[i] = std::sqrt(x[i]);
  return r;
#endif
}

// A vector is kPieces pieces of 16 bytes. Small matrices that lie side by side in memory are interleaved, lane by lane,
// from pieces of kPiece<T> elements: each piece of a register belongs to another matrix, and kPiece<T> registers are
// transposed within their pieces. That takes half the shuffles of a transpose across the whole register.
constexpr int kPieces = kBytes / 16;
template <class T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));

// Piece i from p[i * step] + offset.
template <class T, class P>
SECANT_INLINE vec<T> load_pieces(const P& p, int step, int64_t offset) {
#if defined(__AVX2__)
  const auto at = [&](int i) __attribute__((always_inline)) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(p[i * step] + offset));
  };
#endif
#if defined(__AVX512F__)
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(at(0)), at(1), 1);
  const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(at(2)), at(3), 1);
  return (vec<T>)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
#elif defined(__AVX2__)
  return (vec<T>)_mm256_insertf128_ps(_mm256_castps128_ps256(at(0)), at(1), 1);
#else
  (void)step;
  return load<vec<T>>(p[0] + offset);
#endif
}

template <class T, class P>
SECANT_INLINE void store_pieces(const P& p, int step, int64_t offset, const vec<T>& v) {
#if defined(__AVX2__)
  const auto at = [&](int i) __attribute__((always_inline)) { return reinterpret_cast<float*>(p[i * step] + offset); };
#endif
#if defined(__AVX512F__)
  _mm_storeu_ps(at(0), _mm256_castps256_ps128(_mm512_castps512_ps256((__m512)v)));
  _mm_storeu_ps(at(1), _mm512_maskz_extractf32x4_ps(0xf, (__m512)v, 1));
  _mm_storeu_ps(at(2), _mm512_maskz_extractf32x4_ps(0xf, (__m512)v, 2));
  _mm_storeu_ps(at(3), _mm512_maskz_extractf32x4_ps(0xf, (__m512)v, 3));
#elif defined(__AVX2__)
  _mm_storeu_ps(at(0), _mm256_castps256_ps128((__m256)v));
  _mm_storeu_ps(at(1), _mm256_extractf128_ps((__m256)v, 1));
#else
  (void)step;
  store(p[0] + offset, v);
#endif
}

template <class V>
SECANT_INLINE V unpack_low(const V& a, const V& b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_maskz_unpacklo_ps(kAllFloats, (__m512)a, (__m512)b);
  if constexpr (sizeof(a[0]) == 8) return (V)_mm512_maskz_unpacklo_pd(kAllDoubles, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_unpacklo_ps((__m256)a, (__m256)b);
  if constexpr (sizeof(a[0]) == 8) return (V)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
#else
  if constexpr (sizeof(a[0]) == 4) return V{a[0], b[0], a[1], b[1]};
  if constexpr (sizeof(a[0]) == 8) return V{a[0], b[0]};
#endif
}

template <class V>
SECANT_INLINE V unpack_high(const V& a, const V& b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_maskz_unpackhi_ps(kAllFloats, (__m512)a, (__m512)b);
  if constexpr (sizeof(a[0]) == 8) return (V)_mm512_maskz_unpackhi_pd(kAllDoubles, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_unpackhi_ps((__m256)a, (__m256)b);
  if constexpr (sizeof(a[0]) == 8) return (V)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
#else
  if constexpr (sizeof(a[0]) == 4) return V{a[2], b[2], a[3], b[3]};
  if constexpr (sizeof(a[0]) == 8) return V{a[1], b[1]};
#endif
}

// Transposes kPiece<T> registers within their pieces; its own inverse.
template <class T>
SECANT_INLINE void transpose_pieces(vec<T> (&v)[kPiece<T>]) {
  if constexpr (sizeof(T) == 4) {
    const vd a = (vd)unpack_low(v[0], v[1]), b = (vd)unpack_low(v[2], v[3]);
    const vd c = (vd)unpack_high(v[0], v[1]), d = (vd)unpack_high(v[2], v[3]);
    v[0] = (vec<T>)unpack_low(a, b);
    v[1] = (vec<T>)unpack_high(a, b);
    v[2] = (vec<T>)unpack_low(c, d);
    v[3] = (vec<T>)unpack_high(c, d);
  } else {
    const vec<T> a = v[0];
    v[0] = unpack_low(a, v[1]);
    v[1] = unpack_high(a, v[1]);
  }
}

// The first `count` lanes, the others zero or left alone.
#if defined(__AVX512F__)
template <class T>
SECANT_INLINE mask<T> first_lanes(int64_t count) {
  return static_cast<mask<T>>(count >= kLanes<T> ? -1 : (1 << count) - 1);
}

template <class T>
SECANT_INLINE vec<T> load_some(const T* p, int64_t count) {
  if constexpr (sizeof(T) == 4) return (vec<T>)_mm512_maskz_loadu_ps(first_lanes<T>(count), p);
  if constexpr (sizeof(T) == 8) return (vec<T>)_mm512_maskz_loadu_pd(first_lanes<T>(count), p);
}

template <class T>
SECANT_INLINE void store_some(T* p, const vec<T>& v, int64_t count) {
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, first_lanes<T>(count), (__m512)v);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, first_lanes<T>(count), (__m512d)v);
}
#elif defined(__AVX2__)
alignas(64) constexpr int32_t kLaneMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

template <class T>
SECANT_INLINE __m256i first_lanes(int64_t count) {
  const int64_t words = (count >= kLanes<T> ? kLanes<T> : count) * static_cast<int64_t>(sizeof(T) / 4);
  return load<__m256i>(kLaneMask + 8 - words);
}

template <class T>
SECANT_INLINE vec<T> load_some(const T* p, int64_t count) {
  if constexpr (sizeof(T) == 4) return (vec<T>)_mm256_maskload_ps(p, first_lanes<T>(count));
  if constexpr (sizeof(T) == 8) return (vec<T>)_mm256_maskload_pd(p, first_lanes<T>(count));
}

template <class T>
SECANT_INLINE void store_some(T* p, const vec<T>& v, int64_t count) {
  if constexpr (sizeof(T) == 4) _mm256_maskstore_ps(p, first_lanes<T>(count), (__m256)v);
  if constexpr (sizeof(T) == 8) _mm256_maskstore_pd(p, first_lanes<T>(count), (__m256d)v);
}
#else
template <class T>
SECANT_INLINE vec<T> load_some(const T* p, int64_t count) {
  if (count >= kLanes<T>) return load<vec<T>>(p);
  T t[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) t[i] = p[i];
  return load<vec<T>>(t);
}

template <class T>
SECANT_INLINE void store_some(T* p, const vec<T>& v, int64_t count) {
  if (count >= kLanes<T>) return store(p, v);
  T t[kLanes<T>];
  store(t, v);
  for (int64_t i = 0; i < count; ++i) p[i] = t[i];
}
#endif

// f(0), f(1), ... f(N - 1), each with its index as a constant: arrays indexed by it stay in registers.
template <class F, int... I>
SECANT_INLINE void unroll(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
SECANT_INLINE void unroll(const F& f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}

// f with n as a constant, for an n from 1 to N.
template <int N, class F>
SECANT_INLINE void with_constant(int64_t n, const F& f) {
  unroll<N>([&](auto i) SECANT_LAMBDA {
    if (n == i + 1) f(std::integral_constant<int, i + 1>{});
  });
}

// A vector of float as bfloat16, rounded as Round<bf16>.
SECANT_INLINE void store_bf16(bf16* p, const vec<float>& v) {
  constexpr int N = kLanes<float>;
  using U = typename VecN<uint32_t, N>::type;
  const U bits = (U)v;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U nan = (U)(v != v);
  const U half = (rounded & ~nan) | (0x7fc0u & nan);
#if defined(__AVX512F__)
  store(p, _mm512_cvtepi32_epi16((__m512i)half));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)half, (__m256i)half);  // within 128-bit lanes
  store(p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  store(p, __builtin_convertvector(half, VecN<uint16_t, N>::type));
#endif
}

}  // namespace SECANT_ISA
