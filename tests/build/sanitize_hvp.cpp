// Runs the `hvp` kernels over every path, on buffers of exactly their size, under the sanitizers.
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "../../kernels/hvp/cpu_ops.h"

using namespace SECANT_ISA;
using secant::HvpCrossEntropy;
using secant::HvpRows;

namespace {

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
bf16 entry<bf16>() {
  return Round<bf16>::from(entry<float>());
}
template <>
f16 entry<f16>() {
  return Round<f16>::from(entry<float>());
}

template <class S>
std::vector<S> numbers(int64_t size) {
  std::vector<S> x(static_cast<size_t>(size));
  for (S& e : x) e = entry<S>();
  return x;
}

// Classes of n rows, all of them in turn.
std::vector<int64_t> labels(int64_t n, int64_t k) {
  std::vector<int64_t> x(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) x[static_cast<size_t>(i)] = i % k;
  return x;
}

template <class S, class T>
void dense(void (*rows)(const HvpRows&), int64_t n, int64_t d, int64_t k, bool intercept, int threads) {
  const int64_t row = d + 3;
  const auto x = numbers<S>((n - 1) * row + d);
  const auto v = numbers<T>((d + intercept) * k), w = numbers<T>(n), weights = numbers<T>(n);
  std::vector<T> out(v.size()), row_out(static_cast<size_t>(n * k));
  const auto probs = numbers<T>(n * k);
  const auto classes = labels(n, k);
  double value = 0;
  HvpRows c{};
  c.n = n, c.d = d, c.x = x.data(), c.x_row = row, c.k = k, c.intercept = intercept, c.v = v.data(), c.l2 = 0.5;
  c.out = out.data(), c.threads = threads, c.delta = 1.5;
  c.op = secant::kGlmHvp, c.row = w.data();
  rows(c);
  c.sample_weight = weights.data();
  c.op = secant::kSoftmaxHvp, c.row = probs.data();
  rows(c);
  c.value = &value, c.row_out = row_out.data();
  c.op = secant::kSoftmaxValueGrad, c.row = classes.data();
  rows(c);
  if (k > 1) return;
  c.op = secant::kGlmValueGrad, c.row = w.data();
  for (c.loss = 0; c.loss < 6; ++c.loss) rows(c);
}

template <class T, class I>
void sparse(void (*rows)(const HvpRows&), int64_t n, int64_t d, int64_t k, bool intercept, int threads) {
  std::vector<I> crow{0}, col;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i % 3; j < d && i % 5 != 4; j += 3) col.push_back(static_cast<I>(j));
    crow.push_back(static_cast<I>(col.size()));
  }
  const auto values = numbers<T>(static_cast<int64_t>(col.size()));
  const auto v = numbers<T>((d + intercept) * k), w = numbers<T>(n), probs = numbers<T>(n * k);
  std::vector<T> out(v.size()), row_out(static_cast<size_t>(n * k));
  const auto classes = labels(n, k);
  double value = 0;
  HvpRows c{};
  c.n = n, c.d = d, c.x = values.data(), c.crow = crow.data(), c.col = col.data(), c.wide_index = sizeof(I) == 8;
  c.k = k, c.intercept = intercept, c.v = v.data(), c.row = w.data(), c.out = out.data(), c.threads = threads;
  c.op = secant::kGlmHvp;
  rows(c);
  c.sample_weight = w.data();
  c.op = secant::kSoftmaxHvp, c.row = probs.data();
  rows(c);
  c.value = &value, c.row_out = row_out.data();
  c.op = secant::kSoftmaxValueGrad, c.row = classes.data();
  rows(c);
  if (k > 1) return;
  c.op = secant::kGlmValueGrad, c.row = w.data(), c.delta = 1.5;
  for (c.loss = 0; c.loss < 6; ++c.loss) rows(c);
}

template <class S, class T>
void cross_entropy(void (*kernel)(const HvpCrossEntropy&), int64_t rows, int64_t size, int threads) {
  const auto logits = numbers<S>((rows - 1) * (size + 1) + size), u = numbers<S>(rows * size);
  const std::vector<T> lse(static_cast<size_t>(rows), T(9));
  std::vector<S> out(static_cast<size_t>(rows * size));
  kernel({rows, size, logits.data(), size + 1, u.data(), size, lse.data(), out.data(), threads});
  kernel({rows, size, logits.data(), size + 1, u.data(), size, nullptr, out.data(), threads});
}

}  // namespace

int main() {
  for (int threads : {1, 2}) {
    for (int64_t n : {1, 7, 40}) {
      for (int64_t d : {1, 5, 16, 29, 37, 300}) {
        for (int64_t k : {1, 2, 3, 4, 5, 8, 11, 17, 33}) {
          const bool intercept = (n + d + k) % 2 == 0;
          dense<float, float>(hvp::dense_f32, n, d, k, intercept, threads);
          dense<double, double>(hvp::dense_f64, n, d, k, intercept, threads);
          dense<bf16, float>(hvp::dense_bf16, n, d, k, intercept, threads);
          dense<f16, float>(hvp::dense_f16, n, d, k, intercept, threads);
          sparse<float, int32_t>(hvp::sparse_f32, n, d, k, intercept, threads);
          sparse<double, int64_t>(hvp::sparse_f64, n, d, k, intercept, threads);
        }
      }
      for (int64_t size : {1, 9, 64, 4099}) {
        cross_entropy<float, float>(hvp::cross_entropy_f32, n, size, threads);
        cross_entropy<double, double>(hvp::cross_entropy_f64, n, size, threads);
        cross_entropy<bf16, float>(hvp::cross_entropy_bf16, n, size, threads);
        cross_entropy<f16, float>(hvp::cross_entropy_f16, n, size, threads);
      }
    }
  }
  // More rows than a block or a run of sums has.
  dense<float, float>(hvp::dense_f32, 700, 130, 1, true, 2);
  dense<double, double>(hvp::dense_f64, 700, 130, 8, true, 2);
  // Blocks that fetch the next one, and more columns than stay in the first-level cache.
  dense<float, float>(hvp::dense_f32, 1600, 130, 7, true, 2);
  dense<bf16, float>(hvp::dense_bf16, 700, 1500, 6, true, 2);
  dense<float, float>(hvp::dense_f32, 70, 1500, 13, true, 1);
  std::puts("clean");
}
