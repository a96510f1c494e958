// How a family's CUDA kernels enter the module secant._cuda: by one `CudaFamily` in its bind.cu, with their table.
#pragma once

#include <cstddef>

namespace secant {

struct CudaKernel {
  const char* name;
  const void* function;
  size_t parameter_bytes;  // of the one struct that every kernel takes
};

struct CudaFamily {
  const CudaKernel* kernels;
  int count;
  const CudaFamily* next;

  template <int N>
  explicit CudaFamily(const CudaKernel (&table)[N]) : kernels(table), count(N), next(first()) {
    first() = this;
  }
  static const CudaFamily*& first() {
    static const CudaFamily* head = nullptr;
    return head;
  }
};

}  // namespace secant

// A row of a table; the second macro makes a string of the name, which may come from a macro itself.
#define SECANT_CUDA_ROW(name, Params) SECANT_CUDA_NAMED_ROW(name, Params)
#define SECANT_CUDA_NAMED_ROW(name, Params) {#name, reinterpret_cast<const void*>(&name), sizeof(Params)},
