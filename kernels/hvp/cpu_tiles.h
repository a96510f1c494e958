// The two products of a block of rows with vectors, Z = X V and G += X^T R, for a block that lies in the cache between
// them.
//
// "Along": few vectors, each in an array of its own; lanes run along the features.
// "Across": more vectors, interleaved and padded to whole registers of L lanes; lanes run across the vectors, and an
// entry of X is broadcast.
#pragma once

#include "simd.h"

namespace SECANT_ISA {
namespace hvp {

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

// The sum of the lanes, by halves.
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

template <class T, int K>
struct Along {
  using V = vec<T>;
  static constexpr int W = kLanes<T>;
  static constexpr int kRegisters = kBytes == 64 ? 32 : 16;  // half of which hold sums or coefficients
  static constexpr int kRowsUp = K <= 2 ? 4 : kRegisters / 2 / K < 4 ? kRegisters / 2 / K : 4;
  static constexpr int kRowsDown = kRegisters / 2 / K < 8 ? kRegisters / 2 / K : 8;

  // z[r * K + c] = x_r . v_c, with v_c at v + c * d.
  template <int R>
  static SECANT_INLINE void up(const T* x, int64_t ld, int64_t d, const T* v, T* z) {
    // Two sets of accumulators for a single vector, so that the additions do not wait for each other.
    constexpr int U = R * K <= 4 ? 2 : 1;
    V sum[U][R][K] = {};
    int64_t j = 0;
    for (; j + U * W <= d; j += U * W) {
      unroll<U>([&](auto u) SECANT_LAMBDA {
        V row[R];
        unroll<R>([&](auto r) SECANT_LAMBDA { row[r] = load<V>(x + r * ld + j + u * W); });
        unroll<K>([&](auto c) SECANT_LAMBDA {
          const V column = load<V>(v + c * d + j + u * W);
          unroll<R>([&](auto r) SECANT_LAMBDA { sum[u][r][c] += row[r] * column; });
        });
      });
    }
    for (; j < d; j += W) {
      V row[R];
      unroll<R>([&](auto r) SECANT_LAMBDA { row[r] = load_some(x + r * ld + j, d - j); });
      unroll<K>([&](auto c) SECANT_LAMBDA {
        const V column = load_some(v + c * d + j, d - j);
        unroll<R>([&](auto r) SECANT_LAMBDA { sum[0][r][c] += row[r] * column; });
      });
    }
    unroll<R>([&](auto r) SECANT_LAMBDA {
      unroll<K>([&](auto c) SECANT_LAMBDA {
        V s = sum[0][r][c];
        if constexpr (U == 2) s += sum[1][r][c];
        z[r * K + c] = sum_lanes<T>(s);
      });
    });
  }

  // g_c += sum_r z[r * K + c] x_r, with g_c at g + c * d.
  template <int R>
  static SECANT_INLINE void down(const T* x, int64_t ld, int64_t d, const T* z, T* g) {
    V factor[R][K];
    unroll<R>([&](auto r)
                  SECANT_LAMBDA { unroll<K>([&](auto c) SECANT_LAMBDA { factor[r][c] = splat(z[r * K + c]); }); });
    int64_t j = 0;
    for (; j + W <= d; j += W) {
      V row[R];
      unroll<R>([&](auto r) SECANT_LAMBDA { row[r] = load<V>(x + r * ld + j); });
      unroll<K>([&](auto c) SECANT_LAMBDA {
        V sum = load<V>(g + c * d + j);
        unroll<R>([&](auto r) SECANT_LAMBDA { sum += row[r] * factor[r][c]; });
        store(g + c * d + j, sum);
      });
    }
    if (j < d) {
      V row[R];
      unroll<R>([&](auto r) SECANT_LAMBDA { row[r] = load_some(x + r * ld + j, d - j); });
      unroll<K>([&](auto c) SECANT_LAMBDA {
        V sum = load_some(g + c * d + j, d - j);
        unroll<R>([&](auto r) SECANT_LAMBDA { sum += row[r] * factor[r][c]; });
        store_some(g + c * d + j, sum, d - j);
      });
    }
  }

  static void logits(const T* x, int64_t ld, int64_t rows, int64_t d, int64_t, const T* v, T* z) {
    int64_t r = 0;
    for (; r + kRowsUp <= rows; r += kRowsUp) up<kRowsUp>(x + r * ld, ld, d, v, z + r * K);
    for (; r < rows; ++r) up<1>(x + r * ld, ld, d, v, z + r * K);
  }

  static void gradient(const T* x, int64_t ld, int64_t rows, int64_t d, int64_t, const T* z, T* g) {
    int64_t r = 0;
    for (; r + kRowsDown <= rows; r += kRowsDown) down<kRowsDown>(x + r * ld, ld, d, z + r * K, g);
    for (; r < rows; ++r) down<1>(x + r * ld, ld, d, z + r * K, g);
  }
};

template <class T, int L>
struct Across {
  using V = typename VecN<T, L>::type;

  static SECANT_INLINE V broadcast(T x) { return x - V{}; }

  // z[r * width + c] = x_r . v_c for N registers of vectors, with v[j * width + c].
  template <int R, int N>
  static SECANT_INLINE void up(const T* x, int64_t ld, int64_t d, int64_t width, const T* v, T* z) {
    V sum[R][N] = {};
    for (int64_t j = 0; j < d; ++j) {
      V column[N];
      unroll<N>([&](auto c) SECANT_LAMBDA { column[c] = load<V>(v + j * width + c * L); });
      unroll<R>([&](auto r) SECANT_LAMBDA {
        const V entry = broadcast(x[r * ld + j]);
        unroll<N>([&](auto c) SECANT_LAMBDA { sum[r][c] += entry * column[c]; });
      });
    }
    unroll<R>([&](auto r)
                  SECANT_LAMBDA { unroll<N>([&](auto c) SECANT_LAMBDA { store(z + r * width + c * L, sum[r][c]); }); });
  }

  template <int R, int N>
  static SECANT_INLINE void down(const T* x, int64_t ld, int64_t d, int64_t width, const T* z, T* g) {
    V factor[R][N];
    unroll<R>([&](auto r) SECANT_LAMBDA {
      unroll<N>([&](auto c) SECANT_LAMBDA { factor[r][c] = load<V>(z + r * width + c * L); });
    });
    for (int64_t j = 0; j < d; ++j) {
      V sum[N];
      unroll<N>([&](auto c) SECANT_LAMBDA { sum[c] = load<V>(g + j * width + c * L); });
      unroll<R>([&](auto r) SECANT_LAMBDA {
        const V entry = broadcast(x[r * ld + j]);
        unroll<N>([&](auto c) SECANT_LAMBDA { sum[c] += entry * factor[r][c]; });
      });
      unroll<N>([&](auto c) SECANT_LAMBDA { store(g + j * width + c * L, sum[c]); });
    }
  }

  // Rows and registers of vectors of a tile: eight accumulators.
  template <class F>
  static SECANT_INLINE void tiles(int64_t rows, int64_t width, const F& f) {
    int64_t r = 0;
    if (width == L) {
      for (; r + 8 <= rows; r += 8) f(r, 0, std::integral_constant<int, 8>{}, std::integral_constant<int, 1>{});
    } else {
      for (; r + 4 <= rows; r += 4) {
        int64_t c = 0;
        for (; c + 2 * L <= width; c += 2 * L)
          f(r, c, std::integral_constant<int, 4>{}, std::integral_constant<int, 2>{});
        for (; c < width; c += L) f(r, c, std::integral_constant<int, 4>{}, std::integral_constant<int, 1>{});
      }
    }
    for (; r < rows; ++r) {
      for (int64_t c = 0; c < width; c += L)
        f(r, c, std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{});
    }
  }

  static void logits(const T* x, int64_t ld, int64_t rows, int64_t d, int64_t width, const T* v, T* z) {
    tiles(rows, width, [&](int64_t r, int64_t c, auto R, auto N) SECANT_LAMBDA {
      up<R, N>(x + r * ld, ld, d, width, v + c, z + r * width + c);
    });
  }

  static void gradient(const T* x, int64_t ld, int64_t rows, int64_t d, int64_t width, const T* z, T* g) {
    tiles(rows, width, [&](int64_t r, int64_t c, auto R, auto N) SECANT_LAMBDA {
      down<R, N>(x + r * ld, ld, d, width, z + r * width + c, g + c);
    });
  }
};

}  // namespace hvp
}  // namespace SECANT_ISA
