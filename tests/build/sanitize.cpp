// The CPU kernels on buffers of exactly their size, for AddressSanitizer and UndefinedBehaviorSanitizer to watch: every
// pair of dtypes, sizes around the vector width and the block, flat and batched, one thread and two.
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "../../kernels/lbfgs/cpu.h"

namespace SECANT_ISA {
extern const secant::LbfgsCpu lbfgs;
extern const secant::LbfgsDenseCpu lbfgs_dense;
}  // namespace SECANT_ISA

namespace {

const int64_t kVectorBytes[] = {4, 8}, kRingBytes[] = {4, 8, 2};

// Heap memory of exactly `count` elements; small values, exact in every dtype.
std::vector<char> filled(int64_t count, int64_t bytes, int seed) {
  std::vector<char> data(static_cast<size_t>(count * bytes));
  for (int64_t i = 0; i < count; ++i) {
    const double value = static_cast<double>((i * 7 + seed * 13) % 17) / 8 - 1;
    const float single = static_cast<float>(value);
    char* at = data.data() + i * bytes;
    if (bytes == 8) *reinterpret_cast<double*>(at) = value;
    if (bytes == 4) *reinterpret_cast<float*>(at) = single;
    if (bytes == 2) {
      uint32_t bits;
      __builtin_memcpy(&bits, &single, 4);
      *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(bits >> 16);
    }
  }
  return data;
}

void run(int v, int r, int64_t batch, int64_t m, int64_t n, int threads) {
  const int64_t vb = kVectorBytes[v], rb = kRingBytes[r];
  auto s_ring = std::vector<char>(static_cast<size_t>(batch * m * n * rb)), y_ring = s_ring;
  std::vector<double> sy(static_cast<size_t>(batch * m * m)), yy = sy, stats(static_cast<size_t>(8 * batch));
  std::vector<int32_t> head(static_cast<size_t>(batch)), count = head;
  const double t = 0.5;
  for (int step = 0; step < static_cast<int>(m) + 2; ++step) {
    auto grad = filled(batch * n, vb, step), prev = filled(batch * n, vb, step + 5),
         d = filled(batch * n, vb, step + 3);
    const bool pair = step % 3 != 2, direction = step % 4 != 1 || !pair;
    secant::LbfgsUpdate a{};
    a.batch = batch, a.m = m, a.n = n;
    a.s_ring = s_ring.data(), a.y_ring = y_ring.data(), a.sy = sy.data(), a.yy = yy.data();
    a.head = head.data(), a.count = count.data(), a.stats = stats.data();
    a.grad = direction ? grad.data() : nullptr;
    a.s = pair ? d.data() : nullptr, a.y = pair ? grad.data() : nullptr, a.y_prev = pair ? prev.data() : nullptr;
    a.t_ptr = step % 2 ? &t : nullptr, a.t = t, a.tol = 1e-7;
    a.out = direction ? d.data() : nullptr, a.prev_out = direction && pair ? prev.data() : nullptr;
    a.threads = threads;
    SECANT_ISA::lbfgs.update[v][r](a);
  }
  for (int panel : {0, 1, 3, 16}) {
    auto grad = filled(batch * n, vb, 1), out = filled(batch * n, vb, 2);
    auto s = filled(batch * m * n, rb, 4), y = filled(batch * m * n, rb, 4);
    secant::LbfgsTwoLoop a{};
    a.batch = batch, a.m = m, a.n = n, a.grad = grad.data(), a.s = s.data(), a.y = y.data();
    a.s_batch = a.y_batch = m * n, a.s_row = a.y_row = n;
    a.gamma = panel == 3 ? 0.5 : std::numeric_limits<double>::quiet_NaN();
    a.out = out.data(), a.panel = panel, a.threads = threads;
    SECANT_ISA::lbfgs.two_loop[v][r](a);
  }
}

// Steps with a dense inverse Hessian: pair and direction, one of them, a pair that is refused, and a H that is spoilt.
void run_dense(int v, int64_t n, int rule, int threads) {
  const int64_t vb = kVectorBytes[v];
  auto h = std::vector<char>(static_cast<size_t>(n * (n + 1) / 2 * vb)), steps = filled(2 * n, vb, 1);
  std::vector<double> coefs = {0, 0, 0, 0, 1}, stats(10);
  int32_t count = 0;
  const double t = 0.5;
  for (int step = 0; step < 8; ++step) {
    auto grad = filled(n, vb, step), prev = filled(n, vb, step + 5), d = filled(n, vb, step);
    const bool pair = step % 3 != 2, direction = step % 4 != 1 || !pair;
    if (step == 6) coefs[0] = -1;
    secant::LbfgsDense a{};
    a.n = n, a.h = h.data(), a.steps = steps.data(), a.coefs = coefs.data(), a.count = &count, a.stats = stats.data();
    a.grad = direction ? grad.data() : nullptr;
    a.s = pair ? d.data() : nullptr, a.y = pair ? grad.data() : nullptr;
    a.y_prev = pair && step % 2 ? prev.data() : nullptr;
    a.t_ptr = step % 2 ? &t : nullptr, a.t = t, a.tol = 1e-7, a.rule = rule;
    a.out = direction ? d.data() : nullptr, a.prev_out = direction && pair ? prev.data() : nullptr;
    a.threads = threads;
    SECANT_ISA::lbfgs_dense.update[v](a);
  }
}

}  // namespace

int main() {
  for (int v = 0; v < 2; ++v)
    for (int64_t n : {1, 2, 3, 5, 8, 17, 64, 259, 530})
      for (int rule : {0, 1, 2})
        for (int threads : {1, 2}) run_dense(v, n, rule, threads);
  for (int v = 0; v < 2; ++v)
    for (int r = 0; r < 3; ++r)
      for (int64_t n : {1, 3, 8, 15, 16, 17, 257, 1025, 2050})
        for (int64_t m : {1, 2, 5, 17})
          for (int64_t batch : {1, 3})
            for (int threads : {1, 2}) run(v, r, batch, m, n, threads);
  std::puts("clean");
}
