// The lbfgs family's CUDA kernels, compiled ahead of time, and their table.
#include "cuda_kernels.h"

#include "../cuda_portable.cuh"

#include "cuda.cu"
#include "cuda_dense.cu"

namespace {

#define SECANT_LBFGS_ROWS(TAG, T, H) SECANT_LBFGS_TABLE(SECANT_CUDA_ROW, TAG)
#define SECANT_LBFGS_DENSE_ROWS(TAG, T) SECANT_LBFGS_DENSE_TABLE(SECANT_CUDA_ROW, TAG)

const secant::CudaKernel kernels[] = {SECANT_LBFGS_PAIRS(SECANT_LBFGS_ROWS)
                                          SECANT_LBFGS_DENSE(SECANT_LBFGS_DENSE_ROWS)};
const secant::CudaFamily family(kernels);

}  // namespace
