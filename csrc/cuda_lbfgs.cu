// The lbfgs family's CUDA kernels, compiled ahead of time, and their table.
#include "cuda_kernels.h"

#include "../kernels/cuda_portable.cuh"

#include "../kernels/lbfgs/cuda.cu"

namespace secant {

#define SECANT_LBFGS_ROWS(TAG, T, H) SECANT_LBFGS_TABLE(SECANT_CUDA_ROW, TAG)

CudaTable lbfgs_kernels() {
  static const CudaKernel kernels[] = {SECANT_LBFGS_PAIRS(SECANT_LBFGS_ROWS)};
  return {kernels, int(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace secant
