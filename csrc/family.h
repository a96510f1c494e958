// How a family of kernels enters the module secant._cpu: by one `Family` in its bind.cpp, which defines its functions.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace secant {

class Family {
 public:
  explicit Family(void (*define)(pybind11::module_&)) : define_(define), next_(first()) { first() = this; }

  static void define_all(pybind11::module_& m) {
    for (const Family* f = first(); f != nullptr; f = f->next_) f->define_(m);
  }

 private:
  static Family*& first() {
    static Family* head = nullptr;
    return head;
  }
  void (*define_)(pybind11::module_&);
  const Family* next_;
};

// The place of the chosen instruction set among those of the build, SECANT_ISAS.
int isa_index();

template <class T = void>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace secant
