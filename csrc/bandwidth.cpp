#include "bandwidth.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace SECANT_ISA {
namespace {

double read(const void* data, int64_t bytes, int repeats) {
  using Clock = std::chrono::steady_clock;
  const char* p = static_cast<const char*>(data);
  const int threads = secant::max_threads();
  std::vector<double> sums(static_cast<size_t>(threads) * 8);
  double best = 0;
  for (int r = 0; r < repeats; ++r) {
    const auto start = Clock::now();
    secant::run_team(threads, [&](const secant::Team& team) {
      constexpr int kStep = 4 * kBytes;
      const auto [begin, end] = team.share(bytes / kStep * kStep, kStep);
      vd a[4] = {};
      for (int64_t i = begin; i < end; i += kStep)
        for (int u = 0; u < 4; ++u) a[u] += load<vd>(p + i + u * kBytes);
      sums[static_cast<size_t>(team.rank) * 8] += sum_lanes<double>(a[0] + a[1] + a[2] + a[3]);
    });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = std::max(best, static_cast<double>(bytes) / seconds);
  }
  // The sums keep the loads alive; a NaN in them changes nothing.
  volatile double sink = sums[0];
  (void)sink;
  return best;
}

}  // namespace

extern const secant::Bandwidth bandwidth;
const secant::Bandwidth bandwidth = {read};

}  // namespace SECANT_ISA
