// The search family's CUDA kernels, compiled ahead of time, and their table.
#include "cuda_kernels.h"

#include "../cuda_portable.cuh"

#include "cuda.cu"

namespace {

#define SECANT_SEARCH_ROWS(TAG, S) SECANT_SEARCH_TABLE(SECANT_CUDA_ROW, TAG)

const secant::CudaKernel kernels[] = {SECANT_SEARCH_TYPES(SECANT_SEARCH_ROWS)};
const secant::CudaFamily family(kernels);

}  // namespace
