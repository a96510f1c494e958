// The yardstick of the benchmarks: how fast this machine reads memory, with the threads and the loads of the kernels.
#pragma once

#include <cstdint>

namespace secant {

struct Bandwidth {
  // Best rate, in bytes per second, over `repeats` reads of `bytes` bytes by all threads.
  double (*read)(const void* data, int64_t bytes, int repeats);
};

}  // namespace secant
