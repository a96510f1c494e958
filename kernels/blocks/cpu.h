// What the `blocks` CPU kernels take: raw pointers and sizes, checked by the Python gate. Shapes are those of
// reference.py.
#pragma once

#include <cstdint>

namespace secant {

struct Blocks {
  int64_t batch;
  int n;
  const void* a;
  int64_t a_batch;  // strides between blocks, in elements
  const void* b;    // right-hand sides; of eigenvalues, an earlier basis or null
  int64_t b_batch;
  int64_t k;           // columns of b
  void *out, *values;  // out: inverse, solution, eigenvectors or function
  int32_t* info;
  const void* shift;  // damping or floor of each block; null: `shift_value` for all
  double shift_value;
  bool scaled;  // damping multiplies the diagonal
  bool spd;
  bool clamped;  // of a root: negative eigenvalues count as 0, and the damping is relative to the largest
  int root;      // 1, 2, 4: the power -1 / root of A; 0: |A|^-1
  int threads;   // 0: as many as pay off
};

// One entry per arithmetic: float32 (0), float64 (1).
struct BlocksCpu {
  void (*inv[2])(const Blocks&);
  void (*solve[2])(const Blocks&);
  void (*eigh[2])(const Blocks&);
  void (*function[2])(const Blocks&);
};

}  // namespace secant
