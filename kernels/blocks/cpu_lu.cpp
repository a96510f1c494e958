// General blocks: P A = L U with partial pivoting, each lane choosing its own rows, and two triangular solves.
//
// Not Gauss-Jordan: its inverse of an ill-conditioned matrix leaves a residual that grows with the condition number
// (Higham, section 14.4), where substitution column by column keeps it at rounding.
#include "cpu_columns.h"
#include "cpu_ops.h"
#include "cpu_tile.h"

namespace SECANT_ISA {
namespace blocks {
namespace {

template <class T, int N>
struct SmallFactor {
  using V = vec<T>;
  V a[N * N], inverse[N];
  V row[N];  // which row of the matrix came to stand here

  __attribute__((noinline)) void factor(const Blocks& c, const Group<T>& group, const T* const* in, Pivots<T>& pivots) {
    load_unrolled<Square<N>, T, N>(in, a);
    const Damping<T> damped(c, group);
    unroll<N>([&](auto i) SECANT_LAMBDA {
      a[i * N + i] = damped(a[i * N + i]);
      row[i] = splat(T(i));
    });
    unroll<N>([&](auto k) SECANT_LAMBDA {
      V best = a[k * N + k], where = splat(T(k));
      unroll<N - 1 - k>([&](auto o) SECANT_LAMBDA {
        constexpr int i = k + 1 + o;
        const mask<T> m = larger<T>(a[i * N + k], best);
        best = select<T>(m, a[i * N + k], best);
        where = select<T>(m, splat(T(i)), where);
      });
      unroll<N - 1 - k>([&](auto o) SECANT_LAMBDA {
        constexpr int i = k + 1 + o;
        const mask<T> m = equal<T>(where, splat(T(i)));
        unroll<N>([&](auto j) SECANT_LAMBDA { exchange(m, a[k * N + j], a[i * N + j]); });
        exchange(m, row[k], row[i]);
      });
      pivots.check(absolute<T>(best), k);
      inverse[k] = T(1) / best;
      unroll<N - 1 - k>([&](auto o) SECANT_LAMBDA {
        constexpr int i = k + 1 + o;
        const V l = a[i * N + k] * inverse[k];
        a[i * N + k] = l;
        unroll<N - 1 - k>([&](auto q) SECANT_LAMBDA { a[i * N + k + 1 + q] -= l * a[k * N + k + 1 + q]; });
      });
    });
  }

  static SECANT_INLINE void exchange(mask<T> m, V& x, V& y) {
    const V t = x;
    x = select<T>(m, y, t);
    y = select<T>(m, t, y);
  }

  SECANT_INLINE void substitute(V (&y)[N]) const {
    unroll<N>([&](auto i) SECANT_LAMBDA { unroll<i>([&](auto j) SECANT_LAMBDA { y[i] -= a[i * N + j] * y[j]; }); });
    unroll<N>([&](auto o) SECANT_LAMBDA {
      constexpr int i = N - 1 - o;
      y[i] *= inverse[i];
      unroll<i>([&](auto j) SECANT_LAMBDA { y[j] -= a[j * N + i] * y[i]; });
    });
  }

  SECANT_INLINE void invert(V* x) const {
    for (int j = 0; j < N; ++j) {
      V y[N];
      unroll<N>([&](auto i)
                    SECANT_LAMBDA { y[i] = select<T>(equal<T>(row[i], splat(static_cast<T>(j))), splat(T(1)), V{}); });
      substitute(y);
      unroll<N>([&](auto i) SECANT_LAMBDA { x[i * N + j] = y[i]; });
    }
  }

  SECANT_INLINE void solve(V* x, int columns) const {
    for (int r = 0; r < columns; ++r) {
      V y[N];
      unroll<N>([&](auto i) SECANT_LAMBDA {
        y[i] = x[r];
        unroll<N - 1>([&](auto j) SECANT_LAMBDA {
          y[i] = select<T>(equal<T>(row[i], splat(T(j + 1))), x[(j + 1) * columns + r], y[i]);
        });
      });
      substitute(y);
      unroll<N>([&](auto i) SECANT_LAMBDA { x[i * columns + r] = y[i]; });
    }
  }
};

// Rows of n + 1 vectors: the last one says which row of the matrix came to stand here, and moves along with it.
template <class T>
class LargeFactor {
  using V = vec<T>;
  static constexpr int L = kLanes<T>;

 public:
  explicit LargeFactor(int size)
      : n(size), pitch(n + 1), plan(n, n, n, 0, [size](int i, int j) { return i * (size + 1) + j; }) {}

  int64_t vectors() const { return n * pitch + n; }

  void factor(const Blocks& c, const Group<T>& group, const T* const* in, Ahead& ahead, V* a, Pivots<T>& pivots) const {
    interleave<T>(plan, in, a);
    const Damping<T> damped(c, group);
    for (int i = 0; i < n; ++i) {
      a[i * pitch + i] = damped(a[i * pitch + i]);
      a[i * pitch + n] = splat(static_cast<T>(i));
    }
    for_panels(n, [&](auto p, int k) { panel<decltype(p)::value>(a, k, pivots, ahead); });
  }

  V row(const V* a, int i) const { return a[i * pitch + n]; }

  void substitute(const V* a, V* x, int columns) const {
    const auto entry = [a, m = pitch](int i, int j) SECANT_LAMBDA { return a[i * m + j]; };
    forward<T>(n, x, columns, entry);
    backward<T>(n, x, columns, a + n * pitch, entry);
  }

 private:
  // Rows k and where[l] of lane l change places. With whole vectors, for the few rows that any lane chose: single
  // elements would be stored just before they are loaded as part of a vector, which stalls the load.
  void exchange(V* a, int k, const V& where) const {
    uint64_t chosen = 0;
    for (int l = 0; l < L; ++l) chosen |= uint64_t{1} << static_cast<int>(where[l]);
    chosen &= ~(uint64_t{1} << k);
    V* const x = a + k * pitch;
    while (chosen != 0) {
      const int i = take(chosen), j = chosen != 0 ? take(chosen) : i;
      const mask<T> mi = equal<T>(where, splat(static_cast<T>(i))), mj = equal<T>(where, splat(static_cast<T>(j)));
      V *const y = a + i * pitch, *const z = a + j * pitch;
      if (i == j) {
        for (int c = 0; c < pitch; ++c) {
          const V top = x[c], t = y[c];
          x[c] = select<T>(mi, t, top);
          y[c] = select<T>(mi, top, t);
        }
      } else {
        for (int c = 0; c < pitch; ++c) {
          const V top = x[c], t = y[c], u = z[c];
          x[c] = select<T>(mi, t, select<T>(mj, u, top));
          y[c] = select<T>(mi, top, t);
          z[c] = select<T>(mj, top, u);
        }
      }
    }
  }

  static int take(uint64_t& bits) {
    const int i = __builtin_ctzll(bits);
    bits &= bits - 1;
    return i;
  }

  template <int P>
  void panel(V* a, int k, Pivots<T>& pivots, Ahead& ahead) const {
    V* const inverse = a + n * pitch + k;
    unroll<P>([&](auto c) SECANT_LAMBDA {
      const int pivot = k + c;
      V best = a[pivot * pitch + pivot], where = splat(static_cast<T>(pivot));
      for (int i = pivot + 1; i < n; ++i) {
        const V x = a[i * pitch + pivot];
        const mask<T> m = larger<T>(x, best);
        best = select<T>(m, x, best);
        where = select<T>(m, splat(static_cast<T>(i)), where);
      }
      pivots.check(absolute<T>(best), pivot);
      exchange(a, pivot, where);
      inverse[c] = T(1) / best;
      V upper[P];
      unroll<P - 1 - c>([&](auto o) SECANT_LAMBDA { upper[c + 1 + o] = a[pivot * pitch + pivot + 1 + o]; });
      for (int i = pivot + 1; i < n; ++i) {
        ahead.fetch(kLines);
        V* const x = a + i * pitch + k;
        const V l = x[c] * inverse[c];
        x[c] = l;
        unroll<P - 1 - c>([&](auto o) SECANT_LAMBDA { x[c + 1 + o] -= l * upper[c + 1 + o]; });
      }
    });
    const V* w[P];
    unroll<P>([&](auto i) SECANT_LAMBDA {
      V* const row[1] = {a + (k + i) * pitch};
      w[i] = row[0];
      unroll<i>([&](auto j) SECANT_LAMBDA {
        const V l[1][1] = {{row[0][k + j]}};
        const V* const from[1] = {w[j]};
        rank_update<T, 1, 1>(row, l, from, k + P, n);
      });
    });
    for_rows(k + P, n, [&](auto rows, int i) SECANT_LAMBDA {
      constexpr int R = decltype(rows)::value;
      V *c[R], l[R][P];
      unroll<R>([&](auto r) SECANT_LAMBDA {
        c[r] = a + (i + r) * pitch;
        unroll<P>([&](auto p) SECANT_LAMBDA { l[r][p] = c[r][k + p]; });
      });
      rank_update<T, R, P>(c, l, w, k + P, n);
    });
  }

  int n, pitch;
  Plan<T> plan;
};

template <class T, int N>
void inv_small(const Blocks& c) {
  for_groups<T>(c, kLanes<T> * N * N * 1.0, 0, N * N, [&](const Group<T>& group, vec<T>*, Ahead& ahead) {
    const T* in[kLanes<T>];
    T* out[kLanes<T>];
    group.pointers(static_cast<const T*>(c.a), c.a_batch, in);
    group.pointers(static_cast<T*>(c.out), N * N, out);
    SmallFactor<T, N> f;
    Pivots<T> pivots;
    ahead.fetch_all();
    f.factor(c, group, in, pivots);
    vec<T> x[N * N];
    f.invert(x);
    if (pivots.bad()) {
      for (vec<T>& v : x) poison<T>(v, pivots.lanes());
    }
    store_unrolled<Square<N>, T, N>(x, out);
    group.store_info(pivots.code, c.info);
  });
}

template <class T, int N>
void solve_small(const Blocks& c) {
  const Columns<T> columns(N, c.k);
  for_groups<T>(c, kLanes<T> * N * N * 0.5, N * columns.widest(), N * c.k,
                [&](const Group<T>& group, vec<T>* buffer, Ahead& ahead) {
                  const T* in[kLanes<T>];
                  group.pointers(static_cast<const T*>(c.a), c.a_batch, in);
                  SmallFactor<T, N> f;
                  Pivots<T> pivots;
                  ahead.fetch_all();
                  f.factor(c, group, in, pivots);
                  solve_columns<T>(c, columns, group, buffer, pivots, [&](vec<T>* x, int k) { f.solve(x, k); });
                  group.store_info(pivots.code, c.info);
                });
}

template <class T>
void inv_large(const Blocks& c) {
  const int n = c.n;
  const LargeFactor<T> f(n);
  const Columns<T> columns(n, n);
  const int64_t vectors = f.vectors() + n * columns.widest();
  for_groups<T>(c, kLanes<T> * n * n * 2.0, vectors, n * n, [&](const Group<T>& group, vec<T>* a, Ahead& ahead) {
    const T* in[kLanes<T>];
    T* out[kLanes<T>];
    group.pointers(static_cast<const T*>(c.a), c.a_batch, in);
    group.pointers(static_cast<T*>(c.out), n * n, out);
    Pivots<T> pivots;
    f.factor(c, group, in, ahead, a, pivots);
    vec<T>* const x = a + f.vectors();
    columns.each([&](const Plan<T>& plan, int64_t begin, int width) {
      for (int i = 0; i < n; ++i) {
        for (int j = 0; j < width; ++j) {
          const vec<T> column = splat(static_cast<T>(begin + j));
          x[i * width + j] = select<T>(equal<T>(f.row(a, i), column), splat(T(1)), vec<T>{});
        }
      }
      f.substitute(a, x, width);
      if (pivots.bad()) {
        for (int i = 0; i < n * width; ++i) poison<T>(x[i], pivots.lanes());
      }
      deinterleave<T>(plan, x, out, begin);
    });
    group.store_info(pivots.code, c.info);
  });
}

template <class T>
void solve_large(const Blocks& c) {
  const int n = c.n;
  const LargeFactor<T> f(n);
  const Columns<T> columns(n, c.k);
  const int64_t size = n * columns.widest();
  const int64_t vectors = f.vectors() + 2 * size;
  for_groups<T>(c, kLanes<T> * n * n * 1.0, vectors, n * c.k, [&](const Group<T>& group, vec<T>* a, Ahead& ahead) {
    const T* in[kLanes<T>];
    group.pointers(static_cast<const T*>(c.a), c.a_batch, in);
    Pivots<T> pivots;
    f.factor(c, group, in, ahead, a, pivots);
    vec<T>*const x = a + f.vectors(), *const y = x + size;
    solve_columns<T>(c, columns, group, x, pivots, [&](vec<T>* b, int width) {
      for (int i = 0; i < n; ++i) {
        for (int l = 0; l < kLanes<T>; ++l) {
          const vec<T>* from = b + static_cast<int>(f.row(a, i)[l]) * width;
          for (int j = 0; j < width; ++j) y[i * width + j][l] = from[j][l];
        }
      }
      f.substitute(a, y, width);
      std::copy(y, y + n * width, b);
    });
    group.store_info(pivots.code, c.info);
  });
}

}  // namespace

template <class T>
void inv_general(const Blocks& c) {
  if (c.n > kSmall) return inv_large<T>(c);
  with_constant<kSmall>(c.n, [&](auto n) { inv_small<T, decltype(n)::value>(c); });
}

template <class T>
void solve_general(const Blocks& c) {
  if (c.n > kSmall) return solve_large<T>(c);
  with_constant<kSmall>(c.n, [&](auto n) { solve_small<T, decltype(n)::value>(c); });
}

template void inv_general<float>(const Blocks&);
template void inv_general<double>(const Blocks&);
template void solve_general<float>(const Blocks&);
template void solve_general<double>(const Blocks&);

}  // namespace blocks
}  // namespace SECANT_ISA
