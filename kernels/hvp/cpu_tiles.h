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

template <class T>
SECANT_INLINE T sum_lanes(const vec<T>& v) {
  T s[kLanes<T>];
  store(s, v);
  for (int step = kLanes<T> / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) s[i] += s[i + step];
  }
  return s[0];
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
    T tail[R][K] = {};
    for (; j < d; ++j) {
      unroll<R>([&](auto r) SECANT_LAMBDA {
        unroll<K>([&](auto c) SECANT_LAMBDA { tail[r][c] += x[r * ld + j] * v[c * d + j]; });
      });
    }
    unroll<R>([&](auto r) SECANT_LAMBDA {
      unroll<K>([&](auto c) SECANT_LAMBDA {
        V s = sum[0][r][c];
        if constexpr (U == 2) s += sum[1][r][c];
        z[r * K + c] = sum_lanes<T>(s) + tail[r][c];
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
    for (; j < d; ++j) {
      unroll<R>([&](auto r) SECANT_LAMBDA {
        unroll<K>([&](auto c) SECANT_LAMBDA { g[c * d + j] += x[r * ld + j] * z[r * K + c]; });
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
