// What the `search` CPU kernels take: raw pointers and sizes, checked by the Python gate. Shapes are those of
// reference.py.
#pragma once

#include <cstdint>

namespace secant {

struct SearchState {
  int64_t batch, n;
  void *x, *g;
  const void* d;
  void *kept, *trial;
  double *step, *numbers;
  int32_t* counts;
  const int64_t* rows;  // null: all
  int64_t count;        // of rows
};

struct SearchRule {
  double c1, c2, tolerance;
  int64_t max_trials;
  double eps, gtol, ftol;
  int64_t max_iter, max_nfev;
};

struct SearchAdvance {
  SearchState state;
  const double* value;
  const void* grad;
  SearchRule rule;
  int threads;  // 0: as many as pay off
};

// One number of each problem, `stride` apart; null: 1.
struct SearchScalars {
  const double* data;
  int64_t stride;
};

struct SearchBegin {
  SearchState state;
  SearchScalars slope, g_max, t;
  SearchRule rule;
  int threads;  // 0: as many as pay off
};

// One entry for each dtype of points: float32 (0), float64 (1).
struct SearchCpu {
  void (*advance[2])(const SearchAdvance&);
  void (*begin[2])(const SearchBegin&);
};

}  // namespace secant
