// The `blocks` kernels on buffers of exactly their size, for AddressSanitizer and UndefinedBehaviorSanitizer to watch:
// every path by size, tails, strides between blocks, one thread and two, good blocks and singular ones.
#include <cstdio>
#include <memory>
#include <vector>

#include "../../kernels/blocks/cpu.h"

namespace SECANT_ISA {
extern const secant::BlocksCpu blocks_table;
}

namespace {

// Every third block is singular.
template <class T>
std::unique_ptr<T[]> matrices(int64_t batch, int n, int64_t stride) {
  const int64_t size = (batch - 1) * stride + n * n;
  std::unique_ptr<T[]> a(new T[static_cast<size_t>(size)]());
  for (int64_t i = 0; i < batch && (stride > 0 || i == 0); ++i) {
    for (int r = 0; r < n; ++r) {
      for (int c = 0; c < n; ++c) {
        a[i * stride + r * n + c] = i % 3 == 2 ? 0 : static_cast<T>(r == c ? 4 : ((r + c + i) % 5 - 2) / 64.0);
      }
    }
  }
  return a;
}

template <class T>
void run(int n, int64_t batch, int64_t stride, int threads) {
  const auto& kernels = SECANT_ISA::blocks_table;
  constexpr int t = sizeof(T) == 8;
  const auto a = matrices<T>(batch, n, stride);
  const size_t count = static_cast<size_t>(batch), size = static_cast<size_t>(batch * n * n);
  std::unique_ptr<T[]> out(new T[size]), values(new T[count * static_cast<size_t>(n)]), shift(new T[count]());
  std::unique_ptr<int32_t[]> info(new int32_t[count]);
  secant::Blocks c{};
  c.batch = batch, c.n = n, c.a = a.get(), c.a_batch = stride, c.threads = threads, c.info = info.get();
  for (const bool each : {false, true}) {
    c.shift = each ? shift.get() : nullptr;
    for (const bool spd : {false, true}) {
      c.spd = spd, c.scaled = spd, c.out = out.get();
      kernels.inv[t](c);
      for (const int64_t k : {1, 3, 17}) {
        const size_t sides = count * static_cast<size_t>(n * k);
        std::unique_ptr<T[]> b(new T[sides]()), x(new T[sides]);
        c.b = b.get(), c.b_batch = n * k, c.k = k, c.out = x.get();
        kernels.solve[t](c);
      }
    }
    c.out = out.get(), c.scaled = false, c.b = nullptr;  // else it is the basis to begin with
    for (const int root : {0, 4}) {
      c.root = root;
      kernels.function[t](c);
    }
    c.clamped = true;
    kernels.function[t](c);
    c.clamped = false;
  }
  c.values = values.get();
  kernels.eigh[t](c);
}

}  // namespace

int main() {
  for (int n : {1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 19, 24, 33}) {
    for (int64_t batch : {1, 3, 17, 35}) {
      for (int64_t stride : {n * n, n * n + 3, 0}) {
        run<float>(n, batch, stride, batch % 2 + 1);
        run<double>(n, batch, stride, batch % 2 + 1);
      }
    }
  }
  std::puts("clean");
}
