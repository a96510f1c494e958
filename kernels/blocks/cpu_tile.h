// The inner loop of every elimination: rows of interleaved matrices minus a product of rank P.
#pragma once

#include "cpu_lanes.h"

namespace SECANT_ISA {
namespace blocks {

// Pivots that are eliminated together, and rows that share the load of a pivot row. The multipliers of kRows rows stay
// in registers: 2 x 4 of the 16 that AVX2 has, 4 x 4 of 32. A step then takes kRows + kPanel loads for kRows * kPanel
// multiply-adds.
constexpr int kPanel = 4;
constexpr int kRows = kBytes == 64 ? 4 : 2;

// Lines of cache that a row of a panel fetches: n rows in each of n / kPanel panels bring a group of n x n matrices.
constexpr int kLines = kPanel * kBytes / 64;

// c[r][j] -= sum over p of u[r][p] * w[p][j], for j in [begin, end).
template <class T, int R, int P>
SECANT_INLINE void rank_update(vec<T>* const (&c)[R], const vec<T> (&u)[R][P], const vec<T>* const (&w)[P], int begin,
                               int end) {
  for (int j = begin; j < end; ++j) {
    vec<T> x[R];
    unroll<R>([&](auto r) SECANT_LAMBDA { x[r] = c[r][j]; });
    unroll<P>([&](auto p) SECANT_LAMBDA {
      const vec<T> y = w[p][j];
      unroll<R>([&](auto r) SECANT_LAMBDA { x[r] -= u[r][p] * y; });
    });
    unroll<R>([&](auto r) SECANT_LAMBDA { c[r][j] = x[r]; });
  }
}

// f(constant P, k) for the panels [k, k + P) of n pivots: of kPanel each, and what is left.
template <class F>
SECANT_INLINE void for_panels(int n, const F& f) {
  int k = 0;
  for (; k + kPanel <= n; k += kPanel) f(std::integral_constant<int, kPanel>{}, k);
  if (n - k == 3) f(std::integral_constant<int, 3>{}, k);
  if (n - k == 2) f(std::integral_constant<int, 2>{}, k);
  if (n - k == 1) f(std::integral_constant<int, 1>{}, k);
}
template <class F>
SECANT_INLINE void for_panels_backwards(int n, const F& f) {
  int k = n / kPanel * kPanel;
  if (n - k == 3) f(std::integral_constant<int, 3>{}, k);
  if (n - k == 2) f(std::integral_constant<int, 2>{}, k);
  if (n - k == 1) f(std::integral_constant<int, 1>{}, k);
  while ((k -= kPanel) >= 0) f(std::integral_constant<int, kPanel>{}, k);
}

// f(constant R, i) for the rows [begin, end), kRows at a time and then one by one.
template <class F>
SECANT_INLINE void for_rows(int begin, int end, const F& f) {
  int i = begin;
  for (; i + kRows <= end; i += kRows) f(std::integral_constant<int, kRows>{}, i);
  for (; i < end; ++i) f(std::integral_constant<int, 1>{}, i);
}

// Rows [begin, end) and columns [begin, row] of a packed lower triangle: A -= U W^T. u is row by row, w column by
// column.
template <class T, int P>
SECANT_INLINE void update_triangle(vec<T>* a, int begin, int end, const vec<T>* u, const vec<T>* const (&w)[P]) {
  for_rows(begin, end, [&](auto rows, int i) SECANT_LAMBDA {
    constexpr int R = decltype(rows)::value;
    vec<T>* c[R];
    vec<T> x[R][P];
    unroll<R>([&](auto r) SECANT_LAMBDA {
      c[r] = a + triangle(i + r);
      unroll<P>([&](auto p) SECANT_LAMBDA { x[r][p] = u[(i + r) * P + p]; });
    });
    rank_update<T, R, P>(c, x, w, begin, i);
    unroll<R>([&](auto r) SECANT_LAMBDA {
      vec<T>* const row[1] = {c[r]};
      const vec<T>(&multipliers)[1][P] = reinterpret_cast<const vec<T>(&)[1][P]>(x[r]);
      unroll<r + 1>([&](auto q) SECANT_LAMBDA { rank_update<T, 1, P>(row, multipliers, w, i + q, i + q + 1); });
    });
  });
}

// X = T^-1 X for a unit lower triangular T of n rows, entry(i, j) = T_ij; X is n rows of `columns` vectors.
template <class T, class F>
SECANT_INLINE void forward(int n, vec<T>* x, int columns, const F& entry) {
  using V = vec<T>;
  for_panels(n, [&](auto panel, int k) SECANT_LAMBDA {
    constexpr int P = decltype(panel)::value;
    const V* w[P];
    unroll<P>([&](auto i) SECANT_LAMBDA {
      V* const row[1] = {x + (k + i) * columns};
      w[i] = row[0];
      unroll<i>([&](auto j) SECANT_LAMBDA {
        const V t[1][1] = {{entry(k + i, k + j)}};
        const V* const from[1] = {w[j]};
        rank_update<T, 1, 1>(row, t, from, 0, columns);
      });
    });
    for_rows(k + P, n, [&](auto rows, int i) SECANT_LAMBDA {
      constexpr int R = decltype(rows)::value;
      V *c[R], t[R][P];
      unroll<R>([&](auto r) SECANT_LAMBDA {
        c[r] = x + (i + r) * columns;
        unroll<P>([&](auto p) SECANT_LAMBDA { t[r][p] = entry(i + r, k + p); });
      });
      rank_update<T, R, P>(c, t, w, 0, columns);
    });
  });
}

// The same for an upper triangular T with the reciprocals of its diagonal in `inverse`; null: a unit diagonal.
template <class T, class F>
SECANT_INLINE void backward(int n, vec<T>* x, int columns, const vec<T>* inverse, const F& entry) {
  using V = vec<T>;
  for_panels_backwards(n, [&](auto panel, int k) SECANT_LAMBDA {
    constexpr int P = decltype(panel)::value;
    const V* w[P];
    unroll<P>([&](auto c) SECANT_LAMBDA { w[c] = x + (k + c) * columns; });
    unroll<P>([&](auto o) SECANT_LAMBDA {
      constexpr int i = P - 1 - o;
      V* const solved = x + (k + i) * columns;
      if (inverse != nullptr) {
        for (int j = 0; j < columns; ++j) solved[j] *= inverse[k + i];
      }
      unroll<i>([&](auto j) SECANT_LAMBDA {
        V* const row[1] = {x + (k + j) * columns};
        const V t[1][1] = {{entry(k + j, k + i)}};
        const V* const from[1] = {solved};
        rank_update<T, 1, 1>(row, t, from, 0, columns);
      });
    });
    for_rows(0, k, [&](auto rows, int i) SECANT_LAMBDA {
      constexpr int R = decltype(rows)::value;
      V *c[R], t[R][P];
      unroll<R>([&](auto r) SECANT_LAMBDA {
        c[r] = x + (i + r) * columns;
        unroll<P>([&](auto p) SECANT_LAMBDA { t[r][p] = entry(i + r, k + p); });
      });
      rank_update<T, R, P>(c, t, w, 0, columns);
    });
  });
}

}  // namespace blocks
}  // namespace SECANT_ISA
