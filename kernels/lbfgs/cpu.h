// What the `lbfgs` CPU kernels take: raw pointers and sizes, checked by the Python gate. Shapes are those of
// reference.py.
#pragma once

#include <cstdint>

namespace secant {

struct LbfgsUpdate {
  int64_t batch, m, n;
  void *s_ring, *y_ring;
  double *sy, *yy;
  int32_t *head, *count;
  double* stats;
  const void *grad, *s, *y, *y_prev;  // null: absent
  const double* t_ptr;                // null: `t`
  int64_t t_stride;                   // 0: one step length for all problems
  double t, tol;
  void *out, *prev_out;
  int threads;  // 0: as many as pay off
};

struct LbfgsTwoLoop {
  int64_t batch, m, n;
  const void *grad, *s, *y;
  int64_t s_batch, s_row, y_batch, y_row;  // strides in elements
  double gamma;                            // NaN: from the newest valid pair
  void* out;
  int panel;    // 0: chosen by size
  int threads;  // 0: as many as pay off
};

// One entry per pair of dtypes: vectors float32 (0), float64 (1); rings float32 (0), float64 (1), bfloat16 (2).
struct LbfgsCpu {
  void (*update[2][3])(const LbfgsUpdate&);
  void (*two_loop[2][3])(const LbfgsTwoLoop&);
};

}  // namespace secant
