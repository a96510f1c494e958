// Exponentials and what the losses need, lane by lane.
#pragma once

#include "simd.h"

namespace SECANT_ISA {
namespace hvp {

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Int = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kHigh = 88.8f, kLow = -104.0f;
  static constexpr float kLn2 = 0.693145751953125f, kLn2Rest = 1.42860677e-6f;  // 15 bits, so that n * kLn2 is exact
  static constexpr int kTerms = 7;                                              // (ln2/2)^8 / 8! = 5e-9
  static constexpr int kSeries = 7;                                             // (1/9)^7 / 15 = 1.4e-8, see log1p
};
template <>
struct Bits<double> {
  using Int = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kMagic = 6755399441055744.0;
  static constexpr double kHigh = 709.8, kLow = -746.0;
  static constexpr double kLn2 = 0.693147180369123816490, kLn2Rest = 1.90821492927058770002e-10;
  static constexpr int kTerms = 13;
  static constexpr int kSeries = 16;
};

template <class V>
using element = typename std::remove_reference<decltype(std::declval<V&>()[0])>::type;

template <class V>
SECANT_INLINE V all(element<V> x) {
  return x - V{};
}

// exp(x) within 2 ulp; 0 and infinity beyond the range, subnormal results rounded, NaN stays NaN.
template <class V>
SECANT_INLINE V exponential(const V& x) {
  using T = element<V>;
  using B = Bits<T>;
  using I = typename VecN<typename B::Int, sizeof(V) / sizeof(T)>::type;
  const V high = all<V>(B::kHigh), low = all<V>(B::kLow);
  V y = x > high ? high : x;
  y = y < low ? low : y;
  const V shifted = y * T(1.4426950408889634074) + B::kMagic;
  const V whole = shifted - B::kMagic;
  const V r = (y - whole * B::kLn2) - whole * B::kLn2Rest;
  V p = all<V>(T(1));
  unroll<B::kTerms>([&](auto k) SECANT_LAMBDA { p = p * r * (T(1) / T(B::kTerms - k)) + T(1); });
  // 2^n in two factors, so that neither over- nor underflows where the result does not.
  const I n = (I)shifted - (I)all<V>(B::kMagic);
  const I first = ((n + 4096) >> 1) - 2048, second = n - first;
  const V a = (V)((first + B::kBias) << B::kMantissa), b = (V)((second + B::kBias) << B::kMantissa);
  return p * a * b;
}

// log(1 + e) for 0 <= e <= 1: 2 artanh(s), s = e / (2 + e) <= 1/3, whose series has the ratio 1/9.
template <class V>
SECANT_INLINE V log1p_unit(const V& e) {
  using T = element<V>;
  using B = Bits<T>;
  const V s = e / (e + T(2)), q = s * s;
  V p = all<V>(T(1) / T(2 * B::kSeries + 1));
  unroll<B::kSeries>([&](auto k) SECANT_LAMBDA { p = p * q + T(1) / T(2 * (B::kSeries - 1 - k) + 1); });
  return T(2) * s * p;
}

}  // namespace hvp
}  // namespace SECANT_ISA
