// The two products of a block of rows with vectors, Z = X V and G += X^T R, for a block that lies in the cache between
// them.
//
// "Along": lanes run along the features; an entry of X that is in a register meets several vectors.
// "Across", for many vectors of few features: they are interleaved and padded to whole registers of L lanes; lanes run
// across the vectors, and an entry of X is broadcast.
#pragma once

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace SECANT_ISA {
namespace hvp {

// Lanes along the features. The vectors are kept in groups that fit in registers with four rows (`pack`), the gradient
// in chunks of W features, vector after vector in each. Rows are read as they are stored and converted in registers.
//
// Hardware fetches ahead within the rows that are being read; when they come from the cache, memory would be idle.
// So the next block is fetched into the second-level cache meanwhile: a quarter of it on the way up, the rest on the
// way down.
template <class S, class T>
struct Along {
  using V = vec<T>;
  using Stored = S;
  static constexpr int W = kLanes<T>;
  static constexpr bool kWide = kBytes == 64;  // 32 registers rather than 16
  static constexpr int kRowsUp = 4, kGroup = kWide ? 6 : 3;
  static constexpr int kRowsDown = kWide ? 8 : 4, kChunks = 3;
  // Of the vectors of a group, and of the gradient, while the rows of a block pass by: most of the first-level cache.
  static constexpr int64_t kUpBytes = 20 * 1024, kDownBytes = 16 * 1024;

  static SECANT_INLINE void fetch(const S* p) { __builtin_prefetch(p, 0, 2); }

  // The first `count` entries, at most a register of them.
  static SECANT_INLINE V load_end(const S* p, int64_t count) {
    if constexpr (__is_same(S, T)) {
      return load_some(p, count);
    } else {
      S end[W] = {};
      std::memcpy(end, p, static_cast<size_t>(std::min<int64_t>(count, W)) * sizeof(S));
      return load_t<T>(end);
    }
  }

  // The group i of the k vectors: how many there are, and where it begins.
  static int64_t groups(int64_t k) { return (k + kGroup - 1) / kGroup; }
  static int64_t begin(int64_t k, int64_t i) { return k * i / groups(k); }

  // v (d, k) into groups, in each group chunks of W features, in each chunk vector after vector.
  static void pack(const T* v, int64_t d, int64_t k, T* to) {
    for (int64_t i = 0; i < groups(k); ++i) {
      for (int64_t j = 0; j < d; j += W) {
        for (int64_t c = begin(k, i); c < begin(k, i + 1); ++c) {
          for (int64_t l = j; l < j + W; ++l) *to++ = l < d ? v[l * k + c] : T(0);
        }
      }
    }
  }

  // z[r * k + c] = x_r . v_c over `d` features, or += of them.
  template <int R, int C>
  static SECANT_INLINE void up(const S* x, int64_t ld, int64_t d, int64_t k, const T* v, T* z, bool add,
                               const S* ahead) {
    // Two sets of accumulators for a single vector, so that the additions do not wait for each other.
    constexpr int U = R * C <= 4 ? 2 : 1;
    V sum[U][R][C] = {};
    int64_t j = 0;
    for (; j + U * W <= d; j += U * W) {
      unroll<U>([&](auto u) SECANT_LAMBDA {
        constexpr bool line = u * W * static_cast<int>(sizeof(S)) % 64 == 0;
        if (line && ahead != nullptr) fetch(ahead + j + u * W);
        V column[C];
        unroll<C>([&](auto c) SECANT_LAMBDA { column[c] = load<V>(v + (u * C + c) * W); });
        unroll<R>([&](auto r) SECANT_LAMBDA {
          const V row = load_t<T>(x + r * ld + j + u * W);
          unroll<C>([&](auto c) SECANT_LAMBDA { sum[u][r][c] += row * column[c]; });
        });
      });
      v += U * C * W;
    }
    for (; j < d; j += W) {
      unroll<R>([&](auto r) SECANT_LAMBDA {
        const V row = load_end(x + r * ld + j, d - j);
        unroll<C>([&](auto c) SECANT_LAMBDA { sum[0][r][c] += row * load<V>(v + c * W); });
      });
      v += C * W;
    }
    unroll<C>([&](auto c) SECANT_LAMBDA {
      const auto whole = [&](int r) SECANT_LAMBDA {
        if constexpr (U == 2) return sum[0][r][c] + sum[1][r][c];
        return sum[0][r][c];
      };
      T s[R];
      if constexpr (R == 4) {
        sum_lanes_of_four<T>(whole(0), whole(1), whole(2), whole(3), s);
      } else {
        for (int r = 0; r < R; ++r) s[r] = sum_lanes<T>(whole(r));
      }
      for (int r = 0; r < R; ++r) z[r * k + c] = add ? z[r * k + c] + s[r] : s[r];
    });
  }

  template <int C>
  static void up_rows(const S* x, int64_t ld, int64_t rows, int64_t d, int64_t k, const T* v, T* z, bool add,
                      const S* ahead) {
    int64_t r = 0;
    for (; r + kRowsUp <= rows; r += kRowsUp)
      up<kRowsUp, C>(x + r * ld, ld, d, k, v, z + r * k, add, ahead == nullptr ? nullptr : ahead + r * ld);
    for (; r < rows; ++r) up<1, C>(x + r * ld, ld, d, k, v, z + r * k, add, nullptr);
  }

  // Z = X V for a block of rows; v is packed.
  static void logits(const S* x, int64_t ld, int64_t rows, int64_t d, int64_t k, const T* v, T* z, const S* ahead) {
    const int64_t chunks = (d + W - 1) / W;
    for (int64_t i = 0; i < groups(k); ++i) {
      const int64_t c = begin(k, i), size = begin(k, i + 1) - c;
      const int64_t ranges = (chunks * size * kBytes + kUpBytes - 1) / kUpBytes, step = (chunks + ranges - 1) / ranges;
      for (int64_t j = 0; j < d; j += step * W) {
        const auto call = [&](auto C) {
          up_rows<C>(x + j, ld, rows, std::min(step * W, d - j), k, v + j * size, z + c, j > 0,
                     ahead == nullptr || i > 0 ? nullptr : ahead + j);
        };
        with_constant<kGroup>(size, call);
      }
      v += chunks * W * size;
    }
  }

  // g_c += sum_r z[r * k + c] x_r for Q chunks, the last of them of `count` features.
  template <int R, int Q>
  static SECANT_INLINE void down(const S* x, int64_t ld, int64_t count, int64_t k, const T* z, T* g, const S* ahead) {
    V row[R][Q];
    unroll<R>([&](auto r) SECANT_LAMBDA {
      unroll<Q>([&](auto q) SECANT_LAMBDA {
        const S* const p = x + r * ld + q * W;
        row[r][q] = q + 1 == Q && count < W ? load_end(p, count) : load_t<T>(p);
        constexpr bool line = r % kRowsUp != 0 && q * W * static_cast<int>(sizeof(S)) % 64 == 0;
        if (line && ahead != nullptr) fetch(ahead + r * ld + q * W);
      });
    });
    for (int64_t c = 0; c < k; ++c) {
      V sum[Q];
      unroll<Q>([&](auto q) SECANT_LAMBDA { sum[q] = load<V>(g + (q * k + c) * W); });
      unroll<R>([&](auto r) SECANT_LAMBDA {
        const V factor = splat(z[r * k + c]);
        unroll<Q>([&](auto q) SECANT_LAMBDA { sum[q] += row[r][q] * factor; });
      });
      unroll<Q>([&](auto q) SECANT_LAMBDA { store(g + (q * k + c) * W, sum[q]); });
    }
  }

  template <int R>
  static SECANT_INLINE void down_rows(const S* x, int64_t ld, int64_t d, int64_t k, const T* z, T* g, const S* ahead) {
    const auto next = [&](int64_t j) SECANT_LAMBDA { return ahead == nullptr ? nullptr : ahead + j; };
    int64_t j = 0;
    for (; j + kChunks * W <= d; j += kChunks * W) down<R, kChunks>(x + j, ld, W, k, z, g + j * k, next(j));
    for (; j < d; j += W) down<R, 1>(x + j, ld, d - j, k, z, g + j * k, next(j));
  }

  // G += X^T Z for a block of rows.
  static void gradient(const S* x, int64_t ld, int64_t rows, int64_t d, int64_t k, const T* z, T* g, const S* ahead) {
    constexpr int64_t tile = kChunks * W;
    const int64_t step = std::max<int64_t>(kDownBytes / (tile * k * static_cast<int64_t>(sizeof(T))), 1) * tile;
    for (int64_t j = 0; j < d; j += step) {
      const int64_t width = std::min(step, d - j);
      int64_t r = 0;
      for (; r + kRowsDown <= rows; r += kRowsDown)
        down_rows<kRowsDown>(x + r * ld + j, ld, width, k, z + r * k, g + j * k,
                             ahead == nullptr ? nullptr : ahead + r * ld + j);
      for (; r < rows; ++r) down_rows<1>(x + r * ld + j, ld, width, k, z + r * k, g + j * k, nullptr);
    }
  }
};

template <class T, int L>
struct Across {
  using V = typename VecN<T, L>::type;
  using Stored = T;

  static void pack(const T* v, int64_t d, int64_t k, T* to) {
    const int64_t width = (k + L - 1) / L * L;
    for (int64_t j = 0; j < d; ++j, to += width) {
      for (int64_t c = 0; c < width; ++c) to[c] = c < k ? v[j * k + c] : T(0);
    }
  }

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

  static void logits(const T* x, int64_t ld, int64_t rows, int64_t d, int64_t width, const T* v, T* z, const T*) {
    tiles(rows, width, [&](int64_t r, int64_t c, auto R, auto N) SECANT_LAMBDA {
      up<R, N>(x + r * ld, ld, d, width, v + c, z + r * width + c);
    });
  }

  static void gradient(const T* x, int64_t ld, int64_t rows, int64_t d, int64_t width, const T* z, T* g, const T*) {
    tiles(rows, width, [&](int64_t r, int64_t c, auto R, auto N) SECANT_LAMBDA {
      down<R, N>(x + r * ld, ld, d, width, z + r * width + c, g + c);
    });
  }
};

}  // namespace hvp
}  // namespace SECANT_ISA
