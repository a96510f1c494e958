// The blocks family's CUDA kernels, compiled ahead of time, and their table.
#include "cuda_kernels.h"

#include "../cuda_portable.cuh"

#include "cuda.cu"

namespace {

#define SECANT_BLOCKS_ROW(OP, KIND, N, TAG, C) SECANT_CUDA_ROW(SECANT_BLOCKS_NAME(OP, KIND, N, TAG), Blocks)

const secant::CudaKernel kernels[] = {SECANT_BLOCKS_KERNELS(SECANT_BLOCKS_ROW)};
const secant::CudaFamily family(kernels);

}  // namespace
