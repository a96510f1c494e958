// What the programs for the sanitizers share: inputs of exactly their size, a check, and allocations that fail in turn.
// It follows the header of a family's kernels, whose instruction set SECANT_ISA names.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <vector>

using namespace SECANT_ISA;

// The aligned allocations are those of the kernels. One of them fails: the next when `countdown` is 0.
static std::atomic<int> countdown{-1}, failed{0};
void* operator new(std::size_t size, std::align_val_t alignment) {
  if (countdown.fetch_sub(1) == 0) {
    ++failed;
    throw std::bad_alloc();
  }
  const auto step = static_cast<std::size_t>(alignment);
  void* const p = std::aligned_alloc(step, (size + step - 1) / step * step);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace {

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

std::mt19937 random_bits(0);

template <class S>
S entry();
template <>
float entry<float>() {
  return std::normal_distribution<float>()(random_bits);
}
template <>
double entry<double>() {
  return std::normal_distribution<double>()(random_bits);
}
template <>
[[maybe_unused]] bf16 entry<bf16>() {
  return Round<bf16>::from(entry<float>());
}
template <>
[[maybe_unused]] f16 entry<f16>() {
  return Round<f16>::from(entry<float>());
}

template <class S>
std::vector<S> numbers(int64_t size) {
  std::vector<S> x(static_cast<size_t>(size));
  for (S& e : x) e = entry<S>();
  return x;
}

// Each allocation of a call fails in turn: the caller gets the exception, whichever thread it was.
template <class F>
void without_memory(const F& call) {
  for (int i = 0;; ++i) {
    failed = 0, countdown = i;
    bool thrown = false;
    try {
      call();
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    countdown = -1;
    expect(thrown == (failed > 0), "an exception for an allocation that failed");
    if (failed == 0) return expect(i > 0, "a kernel that allocates");
  }
}

}  // namespace
