// Symmetric positive definite blocks: inverse by the symmetric sweep (Gauss-Jordan on the lower triangle), solution by
// L D L^T. README.md says why these.
//
// Both take n^3 / 2 and n^3 / 6 multiply-adds, neither takes a square root, and in neither can an intermediate value
// over- or underflow unless A or A^-1 does: all are entries of Schur complements and of inverses of leading blocks, or
// geometric means of two such. So a symmetric scaling by powers of two would change no bit, and there is none.
#include "cpu_columns.h"
#include "cpu_ops.h"
#include "cpu_tile.h"

namespace SECANT_ISA {
namespace blocks {
namespace {

// The sweep operator on pivot k turns A_ij into A_ij - A_ik A_jk / A_kk, A_ik into A_ik / A_kk and A_kk into -1 / A_kk;
// after all pivots A holds -A^-1. Here the entries among pivots already swept hold the opposite sign, so that the
// inverse itself is left: the update of such rows adds where that of the others subtracts.
//
// kPanel pivots are swept at once. Their columns are transformed row by row, with the same operations in the same order
// as one by one, and all other entries then take one update of rank kPanel.
template <class T, int P>
struct Panel {
  using V = vec<T>;
  V l[P][P];     // unit lower triangular factor of the diagonal block
  V m[P][P];     // minus its inverse, below the diagonal
  V inverse[P];  // of the pivots

  // a: rows of the packed lower triangle.
  SECANT_INLINE void factor(const V* a, int k, Pivots<T>& pivots) {
    V d[P][P];
    unroll<P>([&](auto i) SECANT_LAMBDA {
      unroll<i + 1>([&](auto j) SECANT_LAMBDA { d[i][j] = a[triangle(k + i) + k + j]; });
    });
    unroll<P>([&](auto c) SECANT_LAMBDA {
      pivots.check(d[c][c], k + c);
      inverse[c] = T(1) / d[c][c];
      unroll<P - 1 - c>([&](auto o) SECANT_LAMBDA { l[c + 1 + o][c] = d[c + 1 + o][c] * inverse[c]; });
      unroll<P - 1 - c>([&](auto o) SECANT_LAMBDA {
        constexpr int i = c + 1 + o;
        unroll<o + 1>([&](auto q) SECANT_LAMBDA { d[i][c + 1 + q] -= l[i][c] * d[c + 1 + q][c]; });
      });
    });
  }

  SECANT_INLINE void invert_factor() {
    unroll<P>([&](auto i) SECANT_LAMBDA {
      unroll<i>([&](auto j) SECANT_LAMBDA {
        V x = l[i][j];
        unroll<i - j - 1>([&](auto o) SECANT_LAMBDA { x -= l[i][j + 1 + o] * m[j + 1 + o][j]; });
        m[i][j] = x;
      });
    });
  }

  // w: the columns as each pivot meets them; x becomes them divided by the pivots.
  SECANT_INLINE void eliminate(V (&x)[P], V (&w)[P]) const {
    unroll<P>([&](auto c) SECANT_LAMBDA {
      w[c] = x[c];
      unroll<P - 1 - c>([&](auto o) SECANT_LAMBDA { x[c + 1 + o] -= w[c] * l[c + 1 + o][c]; });
      x[c] = w[c] * inverse[c];
    });
  }

  // The later pivots of the panel, on the columns of the earlier ones.
  SECANT_INLINE void finish(V (&x)[P]) const {
    unroll<P>([&](auto c) SECANT_LAMBDA {
      unroll<P - 1 - c>([&](auto o) SECANT_LAMBDA { x[c] -= x[c + 1 + o] * m[c + 1 + o][c]; });
    });
  }
};

// Rows [begin, end) and columns [0, columns).
template <class T, int P>
SECANT_INLINE void update_rectangle(vec<T>* a, int begin, int end, int columns, const vec<T>* u,
                                    const vec<T>* const (&w)[P]) {
  for_rows(begin, end, [&](auto rows, int i) SECANT_LAMBDA {
    constexpr int R = decltype(rows)::value;
    vec<T>* c[R];
    vec<T> x[R][P];
    unroll<R>([&](auto r) SECANT_LAMBDA {
      c[r] = a + triangle(i + r);
      unroll<P>([&](auto p) SECANT_LAMBDA { x[r][p] = u[(i + r) * P + p]; });
    });
    rank_update<T, R, P>(c, x, w, 0, columns);
  });
}

template <class T, int P>
void sweep(vec<T>* a, int n, int k, vec<T>* scratch, Pivots<T>& pivots, Ahead& ahead) {
  using V = vec<T>;
  Panel<T, P> panel;
  panel.factor(a, k, pivots);
  panel.invert_factor();
  V *u = scratch, *columns = scratch + n * P;
  const V* w[P];
  unroll<P>([&](auto c) SECANT_LAMBDA { w[c] = columns + c * n; });
  const auto transform = [&](int i, V(&x)[P], T sign) SECANT_LAMBDA {
    V y[P];
    ahead.fetch(kLines);
    panel.eliminate(x, y);
    unroll<P>([&](auto c) SECANT_LAMBDA {
      columns[c * n + i] = y[c];
      u[i * P + c] = sign < 0 ? -x[c] : x[c];
    });
    panel.finish(x);
  };
  for (int i = 0; i < k; ++i) {  // swept before
    V x[P];
    unroll<P>([&](auto c) SECANT_LAMBDA { x[c] = a[triangle(k + c) + i]; });
    transform(i, x, T(-1));
    unroll<P>([&](auto c) SECANT_LAMBDA { a[triangle(k + c) + i] = -x[c]; });
  }
  for (int i = k + P; i < n; ++i) {
    V x[P], *row = a + triangle(i) + k;
    unroll<P>([&](auto c) SECANT_LAMBDA { x[c] = row[c]; });
    transform(i, x, T(1));
    unroll<P>([&](auto c) SECANT_LAMBDA { row[c] = x[c]; });
  }
  // The diagonal block is its own inverse now, L^-T D^-1 L^-1.
  unroll<P>([&](auto i) SECANT_LAMBDA {
    unroll<i + 1>([&](auto j) SECANT_LAMBDA {
      V x = panel.inverse[i];
      if constexpr (j < i) x *= -panel.m[i][j];
      unroll<P - 1 - i>([&](auto o) SECANT_LAMBDA {
        constexpr int c = i + 1 + o;
        x += panel.m[c][i] * (panel.m[c][j] * panel.inverse[c]);
      });
      a[triangle(k + i) + k + j] = x;
    });
  });
  update_triangle<T, P>(a, 0, k, u, w);
  update_rectangle<T, P>(a, k + P, n, k, u, w);
  update_triangle<T, P>(a, k + P, n, u, w);
}

// Leaves L below the diagonal and the reciprocals of D in `inverse`.
template <class T, int P>
void factor(vec<T>* a, int n, int k, vec<T>* inverse, vec<T>* scratch, Pivots<T>& pivots, Ahead& ahead) {
  using V = vec<T>;
  Panel<T, P> panel;
  panel.factor(a, k, pivots);
  V *u = scratch, *columns = scratch + n * P;
  const V* w[P];
  unroll<P>([&](auto c) SECANT_LAMBDA {
    w[c] = columns + c * n;
    inverse[k + c] = panel.inverse[c];
    unroll<c>([&](auto j) SECANT_LAMBDA { a[triangle(k + c) + k + j] = panel.l[c][j]; });
  });
  for (int i = k + P; i < n; ++i) {
    ahead.fetch(kLines);
    V x[P], y[P], *row = a + triangle(i) + k;
    unroll<P>([&](auto c) SECANT_LAMBDA { x[c] = row[c]; });
    panel.eliminate(x, y);
    unroll<P>([&](auto c) SECANT_LAMBDA {
      columns[c * n + i] = y[c];
      u[i * P + c] = row[c] = x[c];
    });
  }
  update_triangle<T, P>(a, k + P, n, u, w);
}

// X = A^-1 X from L and D^-1; X is n rows of `columns` vectors.
template <class T>
void substitute(const vec<T>* a, int n, const vec<T>* inverse, vec<T>* x, int columns) {
  forward<T>(n, x, columns, [a](int i, int j) SECANT_LAMBDA { return a[triangle(i) + j]; });
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < columns; ++j) x[i * columns + j] *= inverse[i];
  }
  backward<T>(n, x, columns, nullptr, [a](int i, int j) SECANT_LAMBDA { return a[triangle(j) + i]; });
}

// -------------------------------------------------------------------------------------- n <= kSmall, all in registers

template <class T, int N>
SECANT_INLINE void sweep_small(vec<T>* a, Pivots<T>& pivots) {
  using V = vec<T>;
  unroll<N>([&](auto k) SECANT_LAMBDA {
    const V pivot = a[lower(k, k)], inverse = T(1) / pivot;
    pivots.check(pivot, k);
    V u[N], w[N];
    unroll<N>([&](auto i) SECANT_LAMBDA {
      w[i] = a[lower(i, k)];
      u[i] = w[i] * inverse;
    });
    unroll<N>([&](auto i) SECANT_LAMBDA {
      unroll<i + 1>([&](auto j) SECANT_LAMBDA {
        if constexpr (i != k && j != k) {
          if constexpr (i < k) {
            a[lower(i, j)] += u[i] * w[j];
          } else {
            a[lower(i, j)] -= u[i] * w[j];
          }
        }
      });
    });
    unroll<N>([&](auto i) SECANT_LAMBDA {
      if constexpr (i < k) a[lower(i, k)] = -u[i];
      if constexpr (i > k) a[lower(i, k)] = u[i];
    });
    a[lower(k, k)] = inverse;
  });
}

template <class T, int N>
void inv_small(const Blocks& c) {
  constexpr int kEntries = triangle(N);
  for_groups<T>(c, kLanes<T> * N * N * 0.5, 0, N * N, [&](const Group<T>& group, vec<T>*, Ahead& ahead) {
    const auto invert = [&](const auto& in, const auto& out) SECANT_LAMBDA {
      vec<T> a[kEntries];
      load_unrolled<LowerTriangle, T, N>(in, a);
      if constexpr (N > 1) ahead.fetch_all();  // a stream of single numbers is one that the hardware sees
      const Damping<T> damped(c, group);
      unroll<N>([&](auto i) SECANT_LAMBDA { a[lower(i, i)] = damped(a[lower(i, i)]); });
      Pivots<T> pivots;
      sweep_small<T, N>(a, pivots);
      if (pivots.bad()) {
        for (vec<T>& x : a) poison<T>(x, pivots.lanes());
      }
      store_unrolled<LowerTriangle, T, N>(a, out);
      group.store_info(pivots.code, c.info);
    };
    const T* const a = static_cast<const T*>(c.a);
    T* const out = static_cast<T*>(c.out);
    if (group.count == kLanes<T> && c.a_batch == N * N) {
      invert(Even<const T, N * N>{a + group.first * N * N}, Even<T, N * N>{out + group.first * N * N});
    } else {
      const T* from[kLanes<T>];
      T* to[kLanes<T>];
      group.pointers(a, c.a_batch, from);
      group.pointers(out, N * N, to);
      invert(from, to);
    }
  });
}

template <class T, int N>
SECANT_INLINE void factor_small(vec<T>* a, vec<T>* inverse, Pivots<T>& pivots) {
  unroll<N>([&](auto k) SECANT_LAMBDA {
    pivots.check(a[lower(k, k)], k);
    inverse[k] = T(1) / a[lower(k, k)];
    unroll<N - 1 - k>([&](auto o) SECANT_LAMBDA {
      constexpr int i = k + 1 + o;
      const vec<T> l = a[lower(i, k)] * inverse[k];
      unroll<o>([&](auto q) SECANT_LAMBDA { a[lower(i, k + 1 + q)] -= l * a[lower(k + 1 + q, k)]; });
      a[lower(i, i)] -= l * a[lower(i, k)];
    });
    unroll<N - 1 - k>([&](auto o) SECANT_LAMBDA { a[lower(k + 1 + o, k)] *= inverse[k]; });
  });
}

template <class T, int N>
struct SmallFactor {
  vec<T> a[triangle(N)], inverse[N];

  SECANT_INLINE void factor(const Blocks& c, const Group<T>& group, const T* const* in, Pivots<T>& pivots) {
    load_unrolled<LowerTriangle, T, N>(in, a);
    const Damping<T> damped(c, group);
    unroll<N>([&](auto i) SECANT_LAMBDA { a[lower(i, i)] = damped(a[lower(i, i)]); });
    factor_small<T, N>(a, inverse, pivots);
  }

  SECANT_INLINE void solve(vec<T>* x, int columns) const {
    for (int r = 0; r < columns; ++r) {
      vec<T> y[N];
      unroll<N>([&](auto i) SECANT_LAMBDA {
        y[i] = x[i * columns + r];
        unroll<i>([&](auto j) SECANT_LAMBDA { y[i] -= a[lower(i, j)] * y[j]; });
      });
      unroll<N>([&](auto i) SECANT_LAMBDA { y[i] *= inverse[i]; });
      unroll<N>([&](auto o) SECANT_LAMBDA {
        constexpr int i = N - 1 - o;
        unroll<i>([&](auto j) SECANT_LAMBDA { y[j] -= a[lower(i, j)] * y[i]; });
      });
      unroll<N>([&](auto i) SECANT_LAMBDA { x[i * columns + r] = y[i]; });
    }
  }
};

// ------------------------------------------------------------------------------------------------------ n > kSmall

template <class T>
void inv_large(const Blocks& c) {
  const int n = c.n, entries = triangle(n);
  const Plan<T> in_plan = lower_plan<T>(n);
  const Plan<T> out_plan(n, n, n, entries, lower);
  const auto work = [&](const Group<T>& group, vec<T>* a, Ahead& ahead) {
    const T* in[kLanes<T>];
    T* out[kLanes<T>];
    group.pointers(static_cast<const T*>(c.a), c.a_batch, in);
    group.pointers(static_cast<T*>(c.out), n * n, out);
    interleave<T>(in_plan, in, a);
    const Damping<T> damped(c, group);
    for (int i = 0; i < n; ++i) a[lower(i, i)] = damped(a[lower(i, i)]);
    Pivots<T> pivots;
    for_panels(n, [&](auto panel, int k) {
      constexpr int P = decltype(panel)::value;
      sweep<T, P>(a, n, k, a + entries + 1, pivots, ahead);
    });
    if (pivots.bad()) {
      for (int i = 0; i < entries; ++i) poison<T>(a[i], pivots.lanes());
    }
    deinterleave<T>(out_plan, a, out);
    group.store_info(pivots.code, c.info);
  };
  for_groups<T>(c, kLanes<T> * n * n * 1.0, entries + 1 + 2 * kPanel * n, n * n, work);
}

template <class T>
struct LargeFactor {
  int n;
  Plan<T> plan;
  explicit LargeFactor(int size) : n(size), plan(lower_plan<T>(n)) {}
  int64_t vectors() const { return triangle(n) + 1 + n + 2 * kPanel * n; }

  void factor(const Blocks& c, const Group<T>& group, const T* const* in, Ahead& ahead, vec<T>* a,
              Pivots<T>& pivots) const {
    interleave<T>(plan, in, a);
    const Damping<T> damped(c, group);
    for (int i = 0; i < n; ++i) a[lower(i, i)] = damped(a[lower(i, i)]);
    vec<T>* const inverse = a + triangle(n) + 1;
    for_panels(n, [&](auto panel, int k) {
      blocks::factor<T, decltype(panel)::value>(a, n, k, inverse, inverse + n, pivots, ahead);
    });
  }
  void solve(const vec<T>* a, vec<T>* x, int columns) const { substitute<T>(a, n, a + triangle(n) + 1, x, columns); }
};

template <class T>
void solve_large(const Blocks& c) {
  const LargeFactor<T> f(c.n);
  const Columns<T> columns(c.n, c.k);
  const int64_t vectors = f.vectors() + c.n * columns.widest();
  for_groups<T>(
      c, kLanes<T> * c.n * c.n * 0.5, vectors, c.n * c.k, [&](const Group<T>& group, vec<T>* a, Ahead& ahead) {
        const T* in[kLanes<T>];
        group.pointers(static_cast<const T*>(c.a), c.a_batch, in);
        Pivots<T> pivots;
        f.factor(c, group, in, ahead, a, pivots);
        solve_columns<T>(c, columns, group, a + f.vectors(), pivots, [&](vec<T>* x, int k) { f.solve(a, x, k); });
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
                  Pivots<T> pivots;
                  SmallFactor<T, N> f;
                  ahead.fetch_all();
                  f.factor(c, group, in, pivots);
                  solve_columns<T>(c, columns, group, buffer, pivots, [&](vec<T>* x, int k) { f.solve(x, k); });
                  group.store_info(pivots.code, c.info);
                });
}

}  // namespace

template <class T>
void inv_spd(const Blocks& c) {
  if (c.n > kSmall) return inv_large<T>(c);
  with_constant<kSmall>(c.n, [&](auto n) { inv_small<T, decltype(n)::value>(c); });
}

template <class T>
void solve_spd(const Blocks& c) {
  if (c.n > kSmall) return solve_large<T>(c);
  with_constant<kSmall>(c.n, [&](auto n) { solve_small<T, decltype(n)::value>(c); });
}

template void inv_spd<float>(const Blocks&);
template void inv_spd<double>(const Blocks&);
template void solve_spd<float>(const Blocks&);
template void solve_spd<double>(const Blocks&);

}  // namespace blocks
}  // namespace SECANT_ISA
