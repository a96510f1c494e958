// Memory of a kernel's own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace secant {

// Aligned to cache lines, so that registers do not straddle them. Not initialised; running out of memory throws.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(
            ::operator new(static_cast<size_t>(std::max<int64_t>(size, 1)) * sizeof(T), std::align_val_t(64)))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace secant
