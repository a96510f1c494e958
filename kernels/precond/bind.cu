// The precond family's CUDA kernels, compiled ahead of time, and their table.
#include "cuda_kernels.h"

#include "../cuda_portable.cuh"

#include "cuda.cu"

namespace {

#define SECANT_PRECOND_STEP_ROWS(TAG, S, Q) SECANT_PRECOND_STEP_TABLE(SECANT_CUDA_ROW, TAG)
#define SECANT_PRECOND_ITERATION_ROWS(TAG, S) SECANT_PRECOND_ITERATION_TABLE(SECANT_CUDA_ROW, TAG)

const secant::CudaKernel kernels[] = {SECANT_PRECOND_STEPS(SECANT_PRECOND_STEP_ROWS)
                                          SECANT_PRECOND_ITERATIONS(SECANT_PRECOND_ITERATION_ROWS)};
const secant::CudaFamily family(kernels);

}  // namespace
