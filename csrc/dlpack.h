// What of DLPack 1.x this library reads: the view of a tensor, and the table of functions that a type of tensors offers
// under the attribute __dlpack_c_exchange_api__ (https://dmlc.github.io/dlpack/latest/c_api.html). It is a stable C
// ABI, so a tensor's address, shape and strides cost one C call without the headers of torch.
#pragma once

#include <Python.h>

#include <cstdint>

namespace secant::dlpack {

struct Tensor {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;

  template <class T = char>
  T* address() const {
    return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset);
  }
  int64_t size(int back) const { return shape[ndim - back]; }
  int64_t stride(int back) const { return strides[ndim - back]; }  // back = 1: of the last dimension
  // Bytes from the first to the last element; none may be empty.
  int64_t span() const {
    int64_t elements = 1;
    for (int i = 0; i < ndim; ++i) elements += (shape[i] - 1) * strides[i];
    return elements * dtype.bits / 8;
  }
};

constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Exchange {
  struct {
    uint32_t major, minor;
  } version;
  Exchange* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*view)(void* object, Tensor* out);  // borrowed, 0 on success, else a Python error is set
  void* current_stream;
};

inline bool overlap(const Tensor& a, const Tensor& b) {
  return a.address() < b.address() + b.span() && b.address() < a.address() + a.span();
}

// The table of torch.Tensor, once Python has handed it over.
inline const Exchange* exchange = nullptr;

// Views a dense CPU tensor; false for anything else, and without the table.
inline bool view(PyObject* object, Tensor* out) {
  if (exchange == nullptr) return false;
  if (exchange->view(object, out) == 0) return out->device.type == kCpu && out->dtype.lanes == 1;
  PyErr_Clear();
  return false;
}

// The number of a dtype in the tables of kernels: float32 (0), float64 (1), bfloat16 (2), -1 for another.
inline int dtype_code(const Tensor& x) {
  if (x.dtype.code == kFloat && x.dtype.bits == 32) return 0;
  if (x.dtype.code == kFloat && x.dtype.bits == 64) return 1;
  return x.dtype.code == kBfloat && x.dtype.bits == 16 ? 2 : -1;
}

}  // namespace secant::dlpack
