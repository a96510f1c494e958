// What the CUDA sources of every family take from the hardware: integer names, 16-byte accesses, asynchronous copies
// into shared memory, dynamic shared memory, and the wait of a grid barrier. No header is included, so that NVRTC needs
// no include path: the text of this file goes in front of the text of a family's cuda.cu. csrc/standin/cuda_on_cpu.h
// implements the same names on the CPU.
#pragma once

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

#define SECANT_DEVICE static __device__ __forceinline__
#define SECANT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define SECANT_UNROLL _Pragma("unroll")
#define SECANT_UNROLL_4 _Pragma("unroll 4")
#define SECANT_LOOP _Pragma("unroll 1")  // a loop that stays one: unrolling would cost registers and gain nothing

// N elements in as few accesses of at most 16 bytes as they need; p is aligned to min(16, N sizeof(X)).
template <class X, int N>
struct alignas(N * sizeof(X) < 16 ? N * sizeof(X) : 16) Packet {
  X v[N];
};

template <int N, class X>
SECANT_DEVICE void load_wide(const X* p, X* x) {
  constexpr int step = N * sizeof(X) <= 16 ? N : int(16 / sizeof(X));
  SECANT_UNROLL
  for (int k = 0; k < N; k += step) {
    const Packet<X, step> packet = *reinterpret_cast<const Packet<X, step>*>(p + k);
    SECANT_UNROLL
    for (int e = 0; e < step; ++e) x[k + e] = packet.v[e];
  }
}

template <int N, class X>
SECANT_DEVICE void store_wide(X* p, const X* x) {
  constexpr int step = N * sizeof(X) <= 16 ? N : int(16 / sizeof(X));
  SECANT_UNROLL
  for (int k = 0; k < N; k += step) {
    Packet<X, step> packet;
    SECANT_UNROLL
    for (int e = 0; e < step; ++e) packet.v[e] = x[k + e];
    *reinterpret_cast<Packet<X, step>*>(p + k) = packet;
  }
}

// 16 bytes from global to shared memory without passing through registers; visible to the issuing thread after
// copy_async_wait().
SECANT_DEVICE void copy_async16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// One element of 4 or 8 bytes, likewise.
template <class X>
SECANT_DEVICE void copy_async(X* shared, const X* global) {
  static_assert(sizeof(X) == 4 || sizeof(X) == 8, "cp.async copies 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(shared))),
               "l"(global), "n"(int(sizeof(X)))
               : "memory");
#else
  *shared = *global;
#endif
}

// Of two bytes there is no such copy.
SECANT_DEVICE void copy_async(u16* shared, const u16* global) { *shared = *global; }

SECANT_DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The bits of a float16 and back, to nearest even.
SECANT_DEVICE float half_to_float(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

SECANT_DEVICE u16 float_to_half(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

// Returns once *flag differs from `old`. The writer must be running: cooperative launches only.
SECANT_DEVICE void wait_while_equal(const u32* flag, u32 old) {
  while (*reinterpret_cast<const volatile u32*>(flag) == old) __nanosleep(40);
}
