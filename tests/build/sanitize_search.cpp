// The `search` kernels on buffers of exactly their size, for AddressSanitizer and UndefinedBehaviorSanitizer to watch:
// every tail, searches in all phases, numbers that are not finite, rows that are no places, one thread and more.
#include <cmath>
#include <limits>

#include "../../kernels/search/cpu.h"
#include "simd.h"
// After the kernels.
#include "sanitize.h"

namespace SECANT_ISA {
extern const secant::SearchCpu search_table;
}

namespace {

template <class T>
void rounds(int type, int64_t batch, int64_t n, int threads) {
  std::vector<T> x = numbers<T>(batch * n), g = x, d = numbers<T>(batch * n), kept = x, trial = x;
  std::vector<double> step(static_cast<size_t>(batch)), numbers_of = numbers<double>(17 * batch);
  std::vector<int32_t> counts(static_cast<size_t>(6 * batch));
  for (size_t i = 0; i < static_cast<size_t>(batch); ++i) {
    counts[3 * static_cast<size_t>(batch) + i] = i % 7 == 6 ? 0 : -1;
    counts[2 * static_cast<size_t>(batch) + i] = static_cast<int32_t>(random_bits() % 16);
    counts[i] = static_cast<int32_t>(random_bits() % 26);
  }
  std::vector<double> slopes(static_cast<size_t>(3 * batch), -1.0);  // slope, g_max and t, three apart
  std::vector<int64_t> rows;
  for (int64_t i = batch - 1; i >= 0; i -= 2) rows.push_back(i);
  for (int64_t hostile : {int64_t(-1), batch, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()})
    rows.push_back(hostile);
  for (int turn = 0; turn < 40; ++turn) {
    const bool all = turn % 2 == 0;
    const int64_t count = all ? batch : static_cast<int64_t>(rows.size());
    auto value = numbers<double>(count);
    auto grad = numbers<T>(count * n);
    if (turn % 5 == 4) value[0] = std::numeric_limits<double>::infinity();
    if (turn % 5 == 3) grad[0] = std::numeric_limits<T>::quiet_NaN();
    const secant::SearchState state{batch,
                                    n,
                                    x.data(),
                                    g.data(),
                                    d.data(),
                                    kept.data(),
                                    trial.data(),
                                    step.data(),
                                    numbers_of.data(),
                                    counts.data(),
                                    all ? nullptr : rows.data(),
                                    count};
    const secant::SearchRule rule{1e-4, 0.9, 1e-9, 5, 1e-7, -1.0, turn % 3 == 0 ? 1e-3 : 0.0, 1 << 30, 1 << 30};
    search_table.advance[type]({state, value.data(), grad.data(), rule, threads});
    const secant::SearchScalars first{turn % 4 == 0 ? nullptr : slopes.data() + 2, 3};
    search_table.begin[type]({state, {slopes.data(), 3}, {slopes.data() + 1, 3}, first, rule, threads});
    for (double& s : slopes) s = -std::abs(entry<double>()) - 1e-3;
  }
  int64_t stepped = 0;
  for (int64_t i = 4 * batch; i < 5 * batch; ++i) stepped += counts[static_cast<size_t>(i)];
  expect(batch < 10 || stepped > 0, "steps");
}

}  // namespace

int main() {
  for (int threads : {1, 3}) {
    for (int64_t n : {1, 2, 5, 8, 9, 16, 17, 40}) {
      for (int64_t batch : {1, 7, 33}) {
        rounds<float>(0, batch, n, threads);
        rounds<double>(1, batch, n, threads);
      }
    }
  }
  std::puts("clean");
}
