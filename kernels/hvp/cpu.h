// What the `hvp` CPU kernels take: raw pointers and sizes, checked by the Python gate. Shapes are those of
// reference.py.
#pragma once

#include <cstdint>

namespace secant {

enum HvpRowOp { kGlmHvp, kGlmValueGrad, kSoftmaxHvp, kSoftmaxValueGrad };
enum HvpLoss { kSquared, kLogistic, kPoisson, kHuber, kGamma, kTweedie };

// A pass over the rows of X: Z = X V, a function of each row of Z, and X^T of it.
struct HvpRows {
  int op;  // HvpRowOp
  int64_t n, d;
  const void* x;
  int64_t x_row;  // elements between rows
  int64_t k;      // columns of v and out
  bool intercept;
  const void* v;    // v or coef
  const void* row;  // weight, target (real or int64) or probs
  const void* sample_weight;
  double l2, delta;  // delta: the number of a loss, see reference.py
  int loss;          // HvpLoss
  void* out;         // the product or the gradient
  double* value;     // of the objective
  void* row_out;     // weights or probabilities
  int threads;       // 0: as many as pay off
  // Sparse rows: `x` holds the values, `entries` of them; null for dense ones. Of the indices nothing is known.
  const void* crow;
  const void* col;
  bool wide_crow, wide_col;  // int64, else int32
  int64_t entries;
};

struct HvpCrossEntropy {
  int64_t rows, size;
  const void* logits;
  int64_t logits_row;
  const void* u;
  int64_t u_row;
  const void* lse;
  void* out;
  int threads;
};

// X^T diag(weight) X, float32 or float64.
struct HvpGram {
  int64_t m, n;
  const void* x;
  int64_t x_row, x_column;  // elements between rows, between columns
  const void* weight;       // null for ones
  bool accumulate;
  void* out;
  int threads;
};

// One entry per storage type: float32 (0), float64 (1), bfloat16 (2), float16 (3). `sparse` returns the first row whose
// pointers or columns are out of range, and has then written nothing but `row_out`; else -1.
struct HvpCpu {
  void (*rows[4])(const HvpRows&);
  int64_t (*sparse[2])(const HvpRows&);
  void (*cross_entropy[4])(const HvpCrossEntropy&);
  void (*gram[2])(const HvpGram&);
};

}  // namespace secant
