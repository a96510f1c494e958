// The tables of CUDA kernels that one source a family (cuda_<family>.cu) exports to cuda_module.cpp. A new family: its
// source in CMakeLists.txt, its table here and in cuda_module.cpp.
#pragma once

#include <cstddef>

namespace secant {

struct CudaKernel {
  const char* name;
  const void* function;
  size_t parameter_bytes;  // of the one struct that every kernel takes
};

struct CudaTable {
  const CudaKernel* kernels;
  int count;
};

CudaTable lbfgs_kernels();
CudaTable blocks_kernels();
CudaTable hvp_kernels();

}  // namespace secant

// A row of a table; the second macro makes a string of the name, which may come from a macro itself.
#define SECANT_CUDA_ROW(name, Params) SECANT_CUDA_NAMED_ROW(name, Params)
#define SECANT_CUDA_NAMED_ROW(name, Params) {#name, reinterpret_cast<const void*>(&name), sizeof(Params)},
