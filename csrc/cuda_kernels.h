// The table of CUDA kernels that cuda_kernels.cu exports to cuda_module.cpp.
#pragma once

#include <cstddef>

namespace secant {

struct CudaKernel {
  const char* name;
  const void* function;
  size_t parameter_bytes;  // of the one struct that every kernel takes
};

extern const CudaKernel kCudaKernels[];
extern const int kCudaKernelCount;

}  // namespace secant
