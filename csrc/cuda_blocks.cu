// The blocks family's CUDA kernels, compiled ahead of time, and their table.
#include "cuda_kernels.h"

#include "../kernels/cuda_portable.cuh"

#include "../kernels/blocks/cuda.cu"

namespace secant {

#define SECANT_BLOCKS_ROW(OP, KIND, N, TAG, C) SECANT_CUDA_ROW(SECANT_BLOCKS_NAME(OP, KIND, N, TAG), Blocks)

CudaTable blocks_kernels() {
  static const CudaKernel kernels[] = {SECANT_BLOCKS_KERNELS(SECANT_BLOCKS_ROW)};
  return {kernels, int(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace secant
