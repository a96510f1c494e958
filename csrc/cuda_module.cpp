// secant._cuda: launches kernels by index, with their one parameter struct as bytes. Knows no torch and no family.
//
// The CUDA runtime is linked statically; it shares the primary context of a device with torch's own runtime, so that
// torch's pointers and streams are valid here. Importing needs no driver: the first call that needs a device reports
// its absence.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_kernels.h"

namespace py = pybind11;

namespace {

constexpr int kMaxDevices = 64;
constexpr int kDefaultShared = 48 * 1024;  // more needs an attribute of the function, once a device

void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // a failed call must not be blamed on the next one
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

// Makes a device current for a scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) {
      check(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// The kernels of all families, one after the other.
const std::vector<secant::CudaKernel>& table() {
  static const std::vector<secant::CudaKernel> all = [] {
    std::vector<secant::CudaKernel> x;
    for (const auto* family = secant::CudaFamily::first(); family != nullptr; family = family->next) {
      x.insert(x.end(), family->kernels, family->kernels + family->count);
    }
    return x;
  }();
  return all;
}

const secant::CudaKernel& kernel(int index) {
  if (index < 0 || size_t(index) >= table().size()) {
    throw py::index_error("kernel: expected an index below " + std::to_string(table().size()) + ", got " +
                          std::to_string(index));
  }
  return table()[size_t(index)];
}

// Largest dynamic shared memory that a kernel has been allowed on a device so far. The GIL guards it.
int& allowed_shared(int index, int device) {
  static std::vector<int> allowed(table().size() * kMaxDevices, kDefaultShared);
  return allowed.at(size_t(index) * kMaxDevices + size_t(device));
}

void allow_shared(int index, int device, int bytes) {
  int& allowed = allowed_shared(index, device);
  if (bytes <= allowed) return;
  check(cudaFuncSetAttribute(kernel(index).function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
  allowed = bytes;
}

void launch(int index, unsigned grid_x, unsigned grid_y, unsigned threads, int shared, bool cooperative, int device,
            uintptr_t stream, const py::bytes& parameters) {
  const secant::CudaKernel& k = kernel(index);
  char* data = nullptr;
  Py_ssize_t length = 0;
  if (PyBytes_AsStringAndSize(parameters.ptr(), &data, &length) != 0) throw py::error_already_set();
  if (size_t(length) != k.parameter_bytes) {
    throw py::value_error(std::string("parameters of ") + k.name + ": expected " + std::to_string(k.parameter_bytes) +
                          " bytes, got " + std::to_string(length));
  }
  const OnDevice scope(device);
  allow_shared(index, device, shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid_x, grid_y, 1);
  config.blockDim = dim3(threads, 1, 1);
  config.dynamicSmemBytes = size_t(shared);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  void* arguments[] = {data};
  check(cudaLaunchKernelExC(&config, k.function, arguments), k.name);
}

int occupancy(int index, int threads, int shared, int device) {
  const OnDevice scope(device);
  allow_shared(index, device, shared);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel(index).function, threads, size_t(shared)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

py::dict device_properties(int device) {
  py::dict result;
  result["multiprocessors"] = attribute(cudaDevAttrMultiProcessorCount, device);
  result["shared"] = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  result["cooperative"] = attribute(cudaDevAttrCooperativeLaunch, device) != 0;
  result["major"] = attribute(cudaDevAttrComputeCapabilityMajor, device);
  result["minor"] = attribute(cudaDevAttrComputeCapabilityMinor, device);
  return result;
}

// None, or why no kernel of this module can run on the device: it has no code for it, or the driver is too old.
py::object reason(int device) {
  cudaFuncAttributes found{};
  cudaError_t code = cudaSuccess;
  {
    const OnDevice scope(device);
    code = cudaFuncGetAttributes(&found, kernel(0).function);
  }
  if (code == cudaSuccess) return py::none();
  cudaGetLastError();
  return py::str(cudaGetErrorString(code));
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

py::dict kernels() {
  py::dict result;
  for (size_t i = 0; i < table().size(); ++i) result[table()[i].name] = i;
  return result;
}

py::dict build_config() {
  py::dict result;
  result["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  result["architectures"] = SECANT_CUDA_ARCHITECTURES;
  result["compiler"] = SECANT_COMPILER;
  result["kernels"] = table().size();
  return result;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels, launched by index with one packed struct.";
  m.def("launch", &launch, "launch(kernel, grid_x, grid_y, threads, shared, cooperative, device, stream, parameters)");
  m.def("occupancy", &occupancy, "occupancy(kernel, threads, shared, device): resident blocks of a multiprocessor");
  m.def("device_properties", &device_properties, "device_properties(device): what a launch planner needs");
  m.def("device_count", &device_count, "Number of devices, 0 without a driver");
  m.def("reason", &reason, "reason(device): None, or why the kernels cannot run there");
  m.def("kernels", &kernels, "Kernel name -> index");
  m.def("build_config", &build_config, "CUDA version, architectures, compiler");
}
