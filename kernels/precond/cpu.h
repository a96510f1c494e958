// What the `precond` CPU kernels take: raw pointers and sizes, checked by the Python gate. Shapes are those of
// reference.py.
#pragma once

#include <cstdint>

namespace secant {

// The addresses of one tensor in the order of contract.Tensors; null: absent.
struct PrecondTensor {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq, *left, *right;
  const void *left_root, *right_root;
  const float* step;
};

struct PrecondLayout {
  int64_t rows, columns, down, across, row_stride, column_stride;
};

enum { kGrams = 1, kApply = 2 };
enum { kGraftNone, kGraftAdam, kGraftSgd, kGraftRms };

struct PrecondStep {
  int64_t count;
  const PrecondTensor* tensors;
  const PrecondLayout* layout;
  const void* lr_ptr;  // of a float or, where `wide_lr`, a double; null: `lr`
  bool wide_lr;
  double lr, beta1, beta2, beta_gram, eps, weight_decay, rms;  // eps > 0 in the arithmetic
  int graft;
  bool rotate, maximize;
  int phases;
  int64_t* skipped;
  int threads;  // 0: as many as pay off
};

struct NewtonSchulz {
  int64_t batch, m, n;
  const void* x;
  int steps;
  double a, b, c, eps;
  void* out;
  int threads;  // 0: as many as pay off
};

struct NewtonRoot {
  int64_t batch, n;
  const void* a;  // of which the lower triangle is read
  int p, steps, squarings;
  double damping, tolerance, growth;
  void* out;
  int32_t* info;
  int threads;  // 0: as many as pay off
};

// One entry for each dtype of tensors: float32 (0), float64 (1), bfloat16 (2), float16 (3); of `step`, for states in
// the dtype of the arithmetic (0) and in bfloat16 (1).
struct PrecondCpu {
  void (*step[4][2])(const PrecondStep&);
  void (*newton_schulz[4])(const NewtonSchulz&);
  void (*newton_root[4])(const NewtonRoot&);
};

}  // namespace secant
