// Every family's CUDA kernels, compiled ahead of time, and their table. Kernels of a new family: one include, one
// table.
#include "cuda_kernels.h"

#include "../kernels/cuda_portable.cuh"
#include "../kernels/lbfgs/cuda.cu"

namespace secant {

#define SECANT_KERNEL(name, Params) {#name, reinterpret_cast<const void*>(&name), sizeof(Params)},
#define SECANT_LBFGS_ROWS(TAG, T, H) SECANT_LBFGS_TABLE(SECANT_KERNEL, TAG)

extern const CudaKernel kCudaKernels[] = {SECANT_LBFGS_PAIRS(SECANT_LBFGS_ROWS)};
extern const int kCudaKernelCount = int(sizeof(kCudaKernels) / sizeof(kCudaKernels[0]));

}  // namespace secant
