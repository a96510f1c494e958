// CUDA C++ on the CPU, for tests only: the names that kernels/cuda_portable.cuh and a family's cuda.cu use, so that the
// very source that runs on a GPU runs under g++ and AddressSanitizer. It proves logic (indices, barriers, aliasing),
// not speed and not precision modes.
//
// A block is an operating-system thread; its CUDA threads are fibers (ucontext) that one scheduler resumes in an order
// drawn from a seed, and that change hands only at __syncthreads, __syncwarp, warp collectives and waits. The worst
// case for a missing barrier is a neighbour that is far ahead or far behind, so the scheduler keeps to one warp, mostly
// as long as that warp can go on, and then draws another: what a neighbour should have written is not there yet, or is
// already overwritten. A barrier that not all threads reach at the same line, a collective whose lanes disagree and a
// wait that nothing ends are reported as errors.
//
// Shared memory is filled with 0xff bytes (NaN) at the start of a block. Asynchronous copies happen at the wait, not
// before.
//
// Use: include this file, then the .cu file, then write a table of kernels:
//     static const secant_standin::Kernel kKernels[] = {SECANT_STANDIN_KERNEL(name, Params), ...};
// and call secant_standin::launch(kernel, grid, block, shared bytes, seed, parameters): an empty string, or what went
// wrong.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SECANT_STANDIN_ASAN 1
#else
#define SECANT_STANDIN_ASAN 0
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

#define SECANT_DEVICE static inline
#define SECANT_DYNAMIC_SHARED(name) unsigned char* name = secant_standin::block().shared.get()
#define SECANT_UNROLL
#define SECANT_UNROLL_4
#define SECANT_LOOP

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace secant_standin {

constexpr int kWarp = 32;
constexpr unsigned kPatience = 64;  // the scheduler leaves a warp that could go on once in so many rounds

enum class State { ready, barrier, collective, waiting, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// A fiber starts through ucontext, which sets up its stack. After that _setjmp and _longjmp change stacks without the
// two system calls that swapcontext makes for the signal mask; AddressSanitizer needs swapcontext.
struct Point {
  ucontext_t context;
  jmp_buf jump;
};

struct Fiber {
  Point point;
  bool started = false;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  State state = State::ready;
  int line = 0;       // of the barrier or collective it stands at
  unsigned mask = 0;  // lanes of the collective
  uint64_t sent = 0, received[kWarp] = {};
  const u32* flag = nullptr;  // wait_while_equal
  u32 old = 0;
  std::vector<Copy> copies;
};

struct Launch {
  void (*body)(const void*);
  const void* parameters;
  dim3 grid, block;
  size_t shared_bytes;
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string error;
  void fail(const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (error.empty()) error = what;
    failed = true;
  }
};

struct BlockState {
  Launch* launch = nullptr;
  dim3 index;
  std::unique_ptr<unsigned char[]> shared;
  std::vector<Fiber> fibers;
  Point scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  int current = 0;
};

inline BlockState*& current_block() {
  static thread_local BlockState* pointer = nullptr;
  return pointer;
}
inline BlockState& block() { return *current_block(); }
inline Fiber& fiber() { return block().fibers[block().current]; }

// ASan calls these `switches`: it must know which stack is in use.
inline void enter_stack(void** save, const void* bottom, size_t size) {
#if SECANT_STANDIN_ASAN
  __sanitizer_start_switch_fiber(save, bottom, size);
#else
  (void)save, (void)bottom, (void)size;
#endif
}
inline void entered_stack(void* save, const void** bottom, size_t* size) {
#if SECANT_STANDIN_ASAN
  __sanitizer_finish_switch_fiber(save, bottom, size);
#else
  (void)save, (void)bottom, (void)size;
#endif
}

inline void change(Point& from, Point& to, bool started) {
#if SECANT_STANDIN_ASAN
  (void)started;
  swapcontext(&from.context, &to.context);
#else
  if (_setjmp(from.jump) == 0) {
    if (started) _longjmp(to.jump, 1);
    setcontext(&to.context);
  }
#endif
}

constexpr size_t kStack = size_t(SECANT_STANDIN_ASAN ? 256 : 64) << 10;

inline void yield(State state, int line) {
  BlockState& b = block();
  Fiber& f = fiber();
  f.state = state;
  f.line = line;
  enter_stack(&f.fake_stack, b.scheduler_stack, b.scheduler_size);
  change(f.point, b.scheduler, true);
  entered_stack(f.fake_stack, nullptr, nullptr);
}

inline void trampoline() {
  BlockState& b = block();
  entered_stack(nullptr, &b.scheduler_stack, &b.scheduler_size);
  b.launch->body(b.launch->parameters);
  fiber().state = State::done;
  enter_stack(nullptr, b.scheduler_stack, b.scheduler_size);
  change(fiber().point, b.scheduler, true);
}

inline uint64_t* exchange(uint64_t value, unsigned mask, int line) {
  Fiber& f = fiber();
  f.sent = value;
  f.mask = mask;
  yield(State::collective, line);
  return f.received;
}

// Releases the collectives of the warp that starts at `first` whose lanes have all come; an error where they disagree.
inline std::string release_warp(BlockState& b, int first) {
  const int threads = int(b.fibers.size());
  for (int lane = 0; lane < kWarp && first + lane < threads; ++lane) {
    const Fiber& f = b.fibers[first + lane];
    if (f.state != State::collective) continue;
    if (!(f.mask >> lane & 1u)) return "a lane calls a warp collective whose mask leaves it out";
    bool complete = true;
    for (int other = 0; other < kWarp; ++other) {
      if (!(f.mask >> other & 1u)) continue;
      if (first + other >= threads) return "the mask of a warp collective names lanes that do not exist";
      const Fiber& o = b.fibers[first + other];
      if (o.state != State::collective) {
        complete = false;
      } else if (o.mask != f.mask || o.line != f.line) {
        return "divergent warp collective: lanes wait at lines " + std::to_string(f.line) + " and " +
               std::to_string(o.line);
      }
    }
    if (!complete) continue;
    const unsigned mask = f.mask;
    uint64_t sent[kWarp];
    for (int from = 0; from < kWarp; ++from)
      sent[from] = mask >> from & 1u ? b.fibers[first + from].sent : ~uint64_t(0);
    for (int to = 0; to < kWarp; ++to) {
      if (!(mask >> to & 1u)) continue;
      std::memcpy(b.fibers[first + to].received, sent, sizeof(sent));
      b.fibers[first + to].state = State::ready;
    }
  }
  return "";
}

// Releases the barrier if every thread stands at it; an error where threads stand at different ones.
inline std::string release_block(BlockState& b) {
  size_t at_barrier = 0;
  int line = 0;
  for (const Fiber& f : b.fibers) {
    if (f.state != State::barrier) continue;
    ++at_barrier;
    if (line != 0 && line != f.line) {
      return "divergent __syncthreads: threads wait at lines " + std::to_string(line) + " and " +
             std::to_string(f.line);
    }
    line = f.line;
  }
  if (at_barrier == b.fibers.size()) {
    for (Fiber& f : b.fibers) f.state = State::ready;
  }
  return "";
}

inline void run_block(Launch& launch, dim3 index, uint64_t seed) {
  BlockState b;
  current_block() = &b;
  b.launch = &launch;
  b.index = index;
  b.shared.reset(new unsigned char[launch.shared_bytes]);  // 16-byte aligned, as operator new is
  std::memset(b.shared.get(), 0xff, launch.shared_bytes);
  const int threads = int(launch.block.x * launch.block.y * launch.block.z);
  b.fibers = std::vector<Fiber>(threads);
  for (Fiber& f : b.fibers) {
    f.stack.reset(new char[kStack]);
    ucontext_t& context = f.point.context;
    getcontext(&context);
    context.uc_stack.ss_sp = f.stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, trampoline, 0);
  }
  std::mt19937_64 random(seed);
  std::vector<int> ready, warps;
  int first = 0;  // of the warp at work
  auto since = std::chrono::steady_clock::now();
  while (!launch.failed) {
    ready.clear();
    for (int i = first; i < std::min(first + kWarp, threads); ++i) {
      Fiber& f = b.fibers[i];
      if (f.state == State::waiting && __atomic_load_n(f.flag, __ATOMIC_ACQUIRE) != f.old) f.state = State::ready;
      if (f.state == State::ready) ready.push_back(i);
    }
    if (!ready.empty()) {
      std::shuffle(ready.begin(), ready.end(), random);
      for (const int i : ready) {
        b.current = i;
        void* save = nullptr;
        enter_stack(&save, b.fibers[i].stack.get(), kStack);
        const bool started = b.fibers[i].started;
        b.fibers[i].started = true;
        change(b.scheduler, b.fibers[i].point, started);
        entered_stack(save, nullptr, nullptr);
      }
      const std::string error = release_warp(b, first);
      if (!error.empty()) launch.fail(error);
      since = std::chrono::steady_clock::now();
      if (random() % kPatience != 0) continue;
    }
    const std::string error = release_block(b);
    if (!error.empty()) launch.fail(error);
    int done = 0, waiting = 0;
    warps.clear();
    for (int i = 0; i < threads; ++i) {
      const State state = b.fibers[i].state;
      done += state == State::done;
      waiting += state == State::waiting;
      const bool can_go_on = state == State::ready || state == State::waiting;
      if (can_go_on && (warps.empty() || warps.back() != i / kWarp * kWarp)) warps.push_back(i / kWarp * kWarp);
    }
    if (done == threads) break;
    if (warps.empty()) {
      launch.fail("deadlock: " + std::to_string(done) + " of " + std::to_string(threads) +
                  " threads of a block have ended and the others wait at a barrier or collective");
      break;
    }
    if (ready.empty() && waiting > 0) {
      if (std::chrono::steady_clock::now() - since > std::chrono::seconds(20)) {
        launch.fail("deadlock: a block waits for a flag that no other block changes");
      }
      std::this_thread::yield();
    }
    first = warps[random() % warps.size()];
  }
  current_block() = nullptr;
}

struct Kernel {
  const char* name;
  void (*body)(const void*);
};

// At most this many blocks run at a time where they need not meet.
constexpr size_t kConcurrent = 4;

inline std::string launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, bool cooperative,
                          uint64_t seed, const void* parameters) {
  Launch state;
  state.body = kernel.body;
  state.parameters = parameters;
  state.grid = grid;
  state.block = block;
  state.shared_bytes = shared_bytes;
  std::vector<dim3> order;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) order.push_back({x, y, z});
    }
  }
  std::mt19937_64 random(seed);
  std::shuffle(order.begin(), order.end(), random);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next++) < order.size() && !state.failed;) run_block(state, order[i], seed * 1000003u + i);
  };
  std::vector<std::thread> pool;
  const size_t size = cooperative ? order.size() : std::min(order.size(), kConcurrent);
  for (size_t i = 0; i < size; ++i) pool.emplace_back(work);
  for (std::thread& thread : pool) thread.join();
  return state.error.empty() ? "" : std::string(kernel.name) + ": " + state.error;
}

inline dim3 thread_index() {
  const BlockState& b = block();
  const dim3 size = b.launch->block;
  const unsigned i = unsigned(b.current);
  return {i % size.x, i / size.x % size.y, i / size.x / size.y};
}

template <class X>
uint64_t to_bits(X x) {
  static_assert(sizeof(X) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(X));
  return bits;
}
template <class X>
X from_bits(uint64_t bits) {
  X x;
  std::memcpy(&x, &bits, sizeof(X));
  return x;
}

template <class X>
X shuffle(unsigned mask, X x, int from, int line) {
  return from_bits<X>(exchange(to_bits(x), mask, line)[from & (kWarp - 1)]);
}
inline int lane() { return block().current % kWarp; }

inline unsigned ballot(unsigned mask, bool x, int line) {
  const uint64_t* all = exchange(x, mask, line);
  unsigned bits = 0;
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1u) bits |= unsigned(all[i]) << i;
  }
  return bits;
}

inline void aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    block().launch->fail("misaligned access of " + std::to_string(bytes) + " bytes");
  }
}

}  // namespace secant_standin

#define threadIdx (secant_standin::thread_index())
#define blockIdx (secant_standin::block().index)
#define blockDim (secant_standin::block().launch->block)
#define gridDim (secant_standin::block().launch->grid)
#define __syncthreads() secant_standin::yield(secant_standin::State::barrier, __LINE__)
#define __syncwarp(...) ((void)secant_standin::exchange(0, 0xffffffffu, __LINE__))
#define __shfl_sync(mask, x, from) secant_standin::shuffle(mask, x, from, __LINE__)
#define __shfl_xor_sync(mask, x, bits) secant_standin::shuffle(mask, x, secant_standin::lane() ^ (bits), __LINE__)
#define __ballot_sync(mask, x) secant_standin::ballot(mask, x, __LINE__)
#define __threadfence() __atomic_thread_fence(__ATOMIC_SEQ_CST)

inline u32 atomicAdd(u32* p, u32 x) { return __atomic_fetch_add(p, x, __ATOMIC_ACQ_REL); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline float __uint_as_float(u32 x) { return secant_standin::from_bits<float>(x); }
inline u32 __float_as_uint(float x) { return u32(secant_standin::to_bits(x)); }
inline double __longlong_as_double(i64 x) { return secant_standin::from_bits<double>(uint64_t(x)); }
inline i64 __double_as_longlong(double x) { return i64(secant_standin::to_bits(x)); }
// Rounded to nearest one by one: the stand-in is built without optimisation, which fuses nothing.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
using std::exp;
using std::fabs;
using std::log;
using std::log1p;
using std::sqrt;

template <int N, class X>
inline void load_wide(const X* p, X* x) {
  secant_standin::aligned(p, std::min<size_t>(16, N * sizeof(X)));
  std::memcpy(x, p, N * sizeof(X));
}

template <int N, class X>
inline void store_wide(X* p, const X* x) {
  secant_standin::aligned(p, std::min<size_t>(16, N * sizeof(X)));
  std::memcpy(p, x, N * sizeof(X));
}

inline void copy_async16(void* shared, const void* global) {
  secant_standin::aligned(shared, 16);
  secant_standin::aligned(global, 16);
  secant_standin::fiber().copies.push_back({shared, global, 16});
}

template <class X>
inline void copy_async(X* shared, const X* global) {
  static_assert(sizeof(X) == 4 || sizeof(X) == 8, "cp.async copies 4, 8 or 16 bytes");
  secant_standin::aligned(shared, sizeof(X));
  secant_standin::aligned(global, sizeof(X));
  secant_standin::fiber().copies.push_back({shared, global, sizeof(X)});
}

inline void copy_async(unsigned short* shared, const unsigned short* global) { *shared = *global; }

inline void copy_async_wait() {
  for (const secant_standin::Copy& copy : secant_standin::fiber().copies) std::memcpy(copy.to, copy.from, copy.bytes);
  secant_standin::fiber().copies.clear();
}

// Float16 by arithmetic: a power of two brings its exponents to float32's, subnormals included.
inline float half_to_float(u16 x) {
  const u32 sign = u32(x & 0x8000u) << 16, rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

inline u16 float_to_half(float x) {
  const u16 sign = u16(__float_as_uint(x) >> 16 & 0x8000u);
  const double size = std::fabs(double(x));
  if (x != x) return 0x7fff;
  if (size >= 65520.0) return u16(sign | 0x7c00u);
  int exponent;
  std::frexp(size, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 11, -24));  // 11 bits, subnormals of 2^-24
  return u16(sign | u16(__float_as_uint(float(std::nearbyint(size / unit) * unit * 0x1p-112)) >> 13));
}

inline void wait_while_equal(const u32* flag, u32 old) {
  secant_standin::fiber().flag = flag;
  secant_standin::fiber().old = old;
  secant_standin::yield(secant_standin::State::waiting, 0);
}

#define SECANT_STANDIN_KERNEL(name, Params) {#name, [](const void* p) { name(*static_cast<const Params*>(p)); }}

// A C function for ctypes: launches by name, and returns "" or the error (valid until the thread's next call).
#define SECANT_STANDIN_EXPORT(kernels)                                                                               \
  extern "C" const char* secant_standin_launch(const char* name, unsigned grid_x, unsigned grid_y, unsigned threads, \
                                               size_t shared_bytes, int cooperative, uint64_t seed,                  \
                                               const void* parameters) {                                             \
    static thread_local std::string error;                                                                           \
    error = std::string("no kernel ") + name;                                                                        \
    for (const secant_standin::Kernel& kernel : kernels) {                                                           \
      if (std::string(kernel.name) == name) {                                                                        \
        error = secant_standin::launch(kernel, {grid_x, grid_y, 1}, {threads, 1, 1}, shared_bytes, cooperative != 0, \
                                       seed, parameters);                                                            \
      }                                                                                                              \
    }                                                                                                                \
    return error.c_str();                                                                                            \
  }
