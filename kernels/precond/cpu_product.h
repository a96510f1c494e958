// Products of small matrices that lie in the cache: rows of whole registers, padded with zeros where a side is no
// multiple of them.
#pragma once

#include <algorithm>

#include "simd.h"

namespace SECANT_ISA {
namespace precond {

template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// A factor that is read entry by entry: (i, k) is at p[i * row + k * column].
template <class T>
struct Entries {
  const T* p;
  int64_t row, column;
};

// Rows and registers of columns that are summed at a time.
#if defined(__aarch64__)
constexpr int kRows = 4, kColumns = 4;
#else
constexpr int kRows = kBytes == 64 ? 4 : 3, kColumns = kBytes == 64 ? 4 : 3;
#endif

template <class T, int R, int C>
SECANT_INLINE void product_tile(const Entries<T>& a, const T* b, int64_t b_row, int64_t terms, T* c, int64_t c_row) {
  using V = vec<T>;
  V sum[R][C] = {};
  const T* entry = a.p;
  for (int64_t k = 0; k < terms; ++k, entry += a.column, b += b_row) {
    V row[C];
    unroll<C>([&](auto j) SECANT_LAMBDA { row[j] = load<V>(b + j * kLanes<T>); });
    unroll<R>([&](auto i) SECANT_LAMBDA {
      const V x = splat(entry[i * a.row]);
      unroll<C>([&](auto j) SECANT_LAMBDA { sum[i][j] += x * row[j]; });
    });
  }
  unroll<R>([&](auto i) SECANT_LAMBDA {
    unroll<C>([&](auto j) SECANT_LAMBDA { store(c + i * c_row + j * kLanes<T>, sum[i][j]); });
  });
}

// C = A B for A (rows, terms) and B (terms, columns), in whole registers of columns. `lower`: of a symmetric result
// what lies beyond the register of the diagonal is left out.
template <class T>
void product(int64_t rows, int64_t columns, int64_t terms, Entries<T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
             bool lower = false) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t j = 0; j < columns; j += kColumns * L) {
    const int64_t last = lower ? j : 0;
    for (int64_t i = last / kRows * kRows; i < rows; i += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - i);
      const int64_t end = lower ? std::min(columns, padded<T>(i + count)) : columns;
      with_constant<kColumns>(std::min<int64_t>(kColumns, (end - j + L - 1) / L), [&](auto C) SECANT_LAMBDA {
        with_constant<kRows>(count, [&](auto R) SECANT_LAMBDA {
          product_tile<T, R, C>({a.p + i * a.row, a.row, a.column}, b + j, b_row, terms, c + i * c_row + j, c_row);
        });
      });
    }
  }
}

// to = from^T for `from` (rows, columns) in whole registers of columns; to has rows of whole registers, whose ends hold
// copies of the last one.
template <class T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int64_t L = kLanes<T>, piece = kPiece<T>;
  for (int64_t i = 0; i < rows; i += L) {
    const T* row[L];
    for (int64_t l = 0; l < L; ++l) row[l] = from + std::min(i + l, rows - 1) * from_row;
    for (int64_t k = 0; k < columns; k += piece) {
      vec<T> v[piece];
      unroll<piece>([&](auto r) SECANT_LAMBDA { v[r] = load_pieces<T>(row + r, piece, k); });
      transpose_pieces<T>(v);
      const int64_t some = std::min(piece, columns - k);
      unroll<piece>([&](auto r) SECANT_LAMBDA {
        if (r < some) store(to + (k + r) * to_row + i, v[r]);
      });
    }
  }
}

// ------------------------------------------------------------------------------------------- rows, converted and back

// n entries `step` apart, then zeros up to `size`.
template <class T, class S>
SECANT_INLINE void read(const S* from, int64_t step, int64_t n, T* to, int64_t size) {
  int64_t k = 0;
  if (step == 1) {
    for (; k + kLanes<T> <= n; k += kLanes<T>) store(to + k, load_t<T>(from + k));
  }
  for (; k < n; ++k) to[k] = static_cast<T>(to_float(from[k * step]));
  for (; k < size; ++k) to[k] = T(0);
}

template <class T, class S>
SECANT_INLINE void write(const T* from, S* to, int64_t step, int64_t n) {
  int64_t k = 0;
  if (step == 1) {
    if constexpr (__is_same(S, T)) {
      for (; k + kLanes<T> <= n; k += kLanes<T>) store(to + k, load<vec<T>>(from + k));
    } else if constexpr (__is_same(S, bf16) && __is_same(T, float)) {
      for (; k + kLanes<T> <= n; k += kLanes<T>) store_bf16(to + k, load<vec<T>>(from + k));
    }
  }
  for (; k < n; ++k) to[k * step] = Round<S>::from(from[k]);
}

}  // namespace precond
}  // namespace SECANT_ISA
