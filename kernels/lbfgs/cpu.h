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
  double *dots, *coefs;  // (batch, 4 m + 8), (batch, 2 m + 2); null: memory of its own
  bool pair, direction;  // what there is to do: offer s and y, compute out
  int phases;            // kDots, kSolve, kCombine
  int block;             // elements that are read of a row at a time, where vectors are long
  int threads;           // 0: as many as pay off
};

// The parts of an update: sums over the elements; gate, Gram matrices and coefficients; the rows combined.
enum LbfgsPhase { kDots = 1, kSolve = 2, kCombine = 4, kAllPhases = 7 };

struct LbfgsTwoLoop {
  int64_t batch, m, n;
  const void *grad, *s, *y;
  int64_t s_batch, s_row, y_batch, y_row;  // strides in elements
  double gamma;                            // NaN: from the newest valid pair
  void* out;
  int64_t panel_bytes;  // histories beyond it go by panels of many pairs, where `panel` is 0
  int panel;            // pairs read together, 0: one, or many
  int threads;          // 0: as many as pay off
};

// A dense inverse Hessian: see reference.dense_update.
struct LbfgsDense {
  int64_t n;
  void *h, *steps;  // the triangle, s and H y of the last pair
  double* coefs;
  int32_t* count;
  double* stats;
  const void *grad, *s, *y, *y_prev;  // null: absent
  const double* t_ptr;                // null: `t`
  double t, tol;
  int rule;
  void *out, *prev_out;
  int threads;  // 0: as many as pay off
};

// One entry per pair of dtypes: vectors float32 (0), float64 (1); rings float32 (0), float64 (1), bfloat16 (2).
struct LbfgsCpu {
  void (*update[2][3])(const LbfgsUpdate&);
  void (*two_loop[2][3])(const LbfgsTwoLoop&);
};

// One entry per dtype: float32 (0), float64 (1).
struct LbfgsDenseCpu {
  void (*update[2])(const LbfgsDense&);
};

}  // namespace secant
