// The hvp family's CUDA kernels, compiled ahead of time, and their table.
#include "cuda_kernels.h"

#include "../cuda_portable.cuh"

#include "cuda.cu"

namespace {

#define SECANT_HVP_TILE_ROW(K, E, TAG, C, T) SECANT_CUDA_ROW(SECANT_HVP_TILE_NAME(K, E, TAG), OfX)
#define SECANT_HVP_CROSS_ENTROPY_ROW(TAG, C, T) SECANT_CUDA_ROW(SECANT_HVP_OTHER_NAME(cross_entropy, TAG), CrossEntropy)
#define SECANT_HVP_REST_ROWS(TAG, C)                            \
  SECANT_CUDA_ROW(SECANT_HVP_OTHER_NAME(between, TAG), OfX)     \
  SECANT_CUDA_ROW(SECANT_HVP_OTHER_NAME(finish, TAG), OfX)      \
  SECANT_CUDA_ROW(SECANT_HVP_OTHER_NAME(product, TAG), Product) \
  SECANT_CUDA_ROW(SECANT_HVP_OTHER_NAME(sum, TAG), Product)     \
  SECANT_CUDA_ROW(SECANT_HVP_OTHER_NAME(gram, TAG), Gram)       \
  SECANT_CUDA_ROW(SECANT_HVP_OTHER_NAME(gram_sum, TAG), Gram)

const secant::CudaKernel kernels[] = {SECANT_HVP_TILES(SECANT_HVP_TILE_ROW) SECANT_HVP_CROSS_ENTROPY(
    SECANT_HVP_CROSS_ENTROPY_ROW) SECANT_HVP_REST(SECANT_HVP_REST_ROWS)};
const secant::CudaFamily family(kernels);

}  // namespace
