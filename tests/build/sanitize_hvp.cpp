// Runs the `hvp` kernels over every path, on buffers of exactly their size, under the sanitizers: with inputs as they
// should be, with indices and classes out of range, and with every allocation failing in turn.
#include <limits>

#include "../../kernels/hvp/cpu_ops.h"
// After the kernels.
#include "sanitize.h"

using secant::HvpCrossEntropy;
using secant::HvpGram;
using secant::HvpRows;

namespace {

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

template <class T, class R, class I>
void sparse(int64_t (*rows)(const HvpRows&), int64_t n, int64_t d, int64_t k, bool intercept, int threads) {
  std::vector<R> crow{0};
  std::vector<I> col;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i % 3; j < d && i % 5 != 4; j += 3) col.push_back(static_cast<I>(j));
    crow.push_back(static_cast<R>(col.size()));
  }
  const auto values = numbers<T>(static_cast<int64_t>(col.size()));
  const auto v = numbers<T>((d + intercept) * k), w = numbers<T>(n), probs = numbers<T>(n * k);
  std::vector<T> out(v.size()), row_out(static_cast<size_t>(n * k));
  const auto classes = labels(n, k);
  double value = 0;
  HvpRows c{};
  c.n = n, c.d = d, c.x = values.data(), c.crow = crow.data(), c.col = col.data(), c.wide_crow = sizeof(R) == 8;
  c.wide_col = sizeof(I) == 8, c.entries = static_cast<int64_t>(col.size());
  c.k = k, c.intercept = intercept, c.v = v.data(), c.row = w.data(), c.out = out.data(), c.threads = threads;
  c.op = secant::kGlmHvp;
  expect(rows(c) == -1, "sparse rows that are right");
  c.sample_weight = w.data();
  c.op = secant::kSoftmaxHvp, c.row = probs.data();
  expect(rows(c) == -1, "sparse rows that are right");
  c.value = &value, c.row_out = row_out.data();
  c.op = secant::kSoftmaxValueGrad, c.row = classes.data();
  expect(rows(c) == -1, "sparse rows that are right");
  if (k > 1) return;
  c.op = secant::kGlmValueGrad, c.row = w.data(), c.delta = 1.5;
  for (c.loss = 0; c.loss < 6; ++c.loss) expect(rows(c) == -1, "sparse losses");
}

// Indices that are wrong in one place: the row is named, and neither the product nor memory beyond it is touched.
template <class T, class R, class I>
void hostile(int64_t (*rows)(const HvpRows&), int64_t n, int64_t d, int64_t k, int threads) {
  std::vector<R> crow{0};
  std::vector<I> col;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i % d; ++j) col.push_back(static_cast<I>(j));
    crow.push_back(static_cast<R>(col.size()));
  }
  const auto entries = static_cast<int64_t>(col.size());
  const auto values = numbers<T>(entries), v = numbers<T>(d * k), w = numbers<T>(n);
  std::vector<T> out(v.size(), T(7));
  HvpRows c{};
  c.op = secant::kGlmHvp, c.n = n, c.d = d, c.x = values.data(), c.k = k, c.v = v.data(), c.row = w.data();
  c.wide_crow = sizeof(R) == 8, c.wide_col = sizeof(I) == 8, c.entries = entries, c.threads = threads;
  c.out = out.data();
  const auto check = [&](const std::vector<R>& pointers, const std::vector<I>& columns, int64_t row) {
    c.crow = pointers.data(), c.col = columns.data();
    expect(rows(c) == row, "the row that is named");
    for (const T x : out) expect(x == T(7), "a product of wrong rows");
  };
  for (const int64_t row : {int64_t(0), n / 2, n - 1}) {
    for (const I wrong : {static_cast<I>(d), I(-1), std::numeric_limits<I>::max(), std::numeric_limits<I>::min()}) {
      auto columns = col;
      columns[static_cast<size_t>(crow[static_cast<size_t>(row + 1)] - 1)] = wrong;
      check(crow, columns, row);
    }
  }
  for (const R wrong :
       {static_cast<R>(entries + 1), R(-1), std::numeric_limits<R>::max(), std::numeric_limits<R>::min()}) {
    for (const int64_t place : {int64_t(0), n / 2, n}) {
      auto pointers = crow;
      pointers[static_cast<size_t>(place)] = wrong;
      check(pointers, col, place == 0 ? 0 : place - 1);
    }
  }
  check(std::vector<R>(crow.size(), R(0)), col, n - 1);
}

template <class S, class T>
void cross_entropy(void (*kernel)(const HvpCrossEntropy&), int64_t rows, int64_t size, int threads) {
  const auto logits = numbers<S>((rows - 1) * (size + 1) + size), u = numbers<S>(rows * size);
  const std::vector<T> lse(static_cast<size_t>(rows), T(9));
  std::vector<S> out(static_cast<size_t>(rows * size));
  kernel({rows, size, logits.data(), size + 1, u.data(), size, lse.data(), out.data(), threads});
  kernel({rows, size, logits.data(), size + 1, u.data(), size, nullptr, out.data(), threads});
}

// Rows or columns of one piece, and neither; weights, and a result to add to.
template <class T>
void gram(void (*kernel)(const HvpGram&), int64_t m, int64_t n, int threads) {
  const auto rows = numbers<T>((m - 1) * (n + 1) + n), columns = numbers<T>((n - 1) * (m + 1) + m);
  const auto spread = numbers<T>((m - 1) * 2 * n + (n - 1) * 2 + 1), weight = numbers<T>(m);
  std::vector<T> out(static_cast<size_t>(n * n));
  kernel({m, n, rows.data(), n + 1, 1, weight.data(), false, out.data(), threads});
  kernel({m, n, columns.data(), 1, m + 1, nullptr, true, out.data(), threads});
  kernel({m, n, spread.data(), 2 * n, 2, weight.data(), true, out.data(), threads});
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      expect(out[static_cast<size_t>(i * n + j)] == out[static_cast<size_t>(j * n + i)], "a symmetric result");
    }
  }
}

// Classes that are none, among some that are.
template <class T>
void classes(void (*rows)(const HvpRows&), int64_t n, int64_t k, int threads) {
  const auto x = numbers<T>(n * 3), v = numbers<T>(3 * k);
  auto targets = labels(n, k);
  std::vector<T> out(v.size()), probs(static_cast<size_t>(n * k));
  double value = 0;
  HvpRows c{};
  c.op = secant::kSoftmaxValueGrad, c.n = n, c.d = 3, c.x = x.data(), c.x_row = 3, c.k = k, c.v = v.data();
  c.row = targets.data(), c.out = out.data(), c.value = &value, c.row_out = probs.data(), c.threads = threads;
  for (const int64_t wrong :
       {int64_t(-1), k, int64_t(1) << 32, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()}) {
    targets[static_cast<size_t>(n / 2)] = wrong;
    rows(c);
    expect(value != value && out[0] != out[0], "NaN for a class out of range");
  }
}

}  // namespace

int main() {
  for (int threads : {1, 2, 3}) {
    hostile<float, int32_t, int32_t>(hvp::sparse_f32, 9, 5, 1, threads);
    hostile<float, int64_t, int32_t>(hvp::sparse_f32, 300, 5, 3, threads);
    hostile<double, int32_t, int64_t>(hvp::sparse_f64, 300, 5, 1, threads);
    hostile<double, int64_t, int64_t>(hvp::sparse_f64, 9, 5, 20, threads);
    for (int64_t k : {1, 3, 20, 40}) {
      classes<float>(hvp::dense_f32, 40, k, threads);
      classes<double>(hvp::dense_f64, 40, k, threads);
    }
    without_memory([=] { gram<float>(hvp::gram_f32, 40, 5, threads); });
    without_memory([=] { cross_entropy<float, float>(hvp::cross_entropy_f32, 7, 9, threads); });
    without_memory([=] { dense<bf16, float>(hvp::dense_bf16, 40, 5, 3, true, threads); });
    without_memory([=] { sparse<double, int64_t, int64_t>(hvp::sparse_f64, 40, 5, 1, true, threads); });
  }
  for (int threads : {1, 2}) {
    for (int64_t n : {1, 7, 40}) {
      for (int64_t d : {1, 5, 16, 29, 37, 300}) {
        for (int64_t k : {1, 2, 3, 4, 5, 8, 11, 17, 33}) {
          const bool intercept = (n + d + k) % 2 == 0;
          dense<float, float>(hvp::dense_f32, n, d, k, intercept, threads);
          dense<double, double>(hvp::dense_f64, n, d, k, intercept, threads);
          dense<bf16, float>(hvp::dense_bf16, n, d, k, intercept, threads);
          dense<f16, float>(hvp::dense_f16, n, d, k, intercept, threads);
          sparse<float, int64_t, int32_t>(hvp::sparse_f32, n, d, k, intercept, threads);
          sparse<double, int32_t, int64_t>(hvp::sparse_f64, n, d, k, intercept, threads);
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
  for (int threads : {1, 2, 3}) {
    for (int64_t m : {1, 7, 257, 1600}) {
      for (int64_t n : {1, 2, 5, 24, 31, 49, 130}) {
        gram<float>(hvp::gram_f32, m, n, threads);
        gram<double>(hvp::gram_f64, m, n, threads);
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
