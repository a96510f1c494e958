// The Newton-Schulz iteration of small matrices, one thread to each. The contract is reference.newton_schulz.
#include <cmath>

#include "buffer.h"
#include "cpu_ops.h"
#include "cpu_product.h"
#include "parallel.h"

namespace SECANT_ISA {
namespace precond {

using secant::Buffer;
using secant::NewtonSchulz;
using secant::Team;

namespace {

constexpr double kWorkOfThread = 3e5;  // multiplications below which a second thread is not woken

template <class S, class T>
void newton_schulz(const NewtonSchulz& c) {
  using V = vec<T>;
  constexpr int64_t L = kLanes<T>;
  const bool tall = c.m > c.n;
  const int64_t m = tall ? c.n : c.m, n = tall ? c.m : c.n, side = padded<T>(m), row = padded<T>(n);
  const int64_t x_row = tall ? 1 : c.n, x_column = tall ? c.n : 1;  // of the matrix that is iterated
  const auto a = static_cast<T>(c.a), b = static_cast<T>(c.b), d = static_cast<T>(c.c);
  const double work =
      static_cast<double>(c.batch * c.steps) * static_cast<double>(m * m) * static_cast<double>(2 * n + m);
  int64_t threads = c.threads;
  if (threads < 1) threads = std::clamp<int64_t>(static_cast<int64_t>(work / kWorkOfThread), 1, secant::max_threads());
  secant::run_team(static_cast<int>(std::min(threads, c.batch)), [&](const Team& team) {
    const Buffer<T> memory(2 * m * row + n * side + 2 * m * side);
    T* x = memory.get();
    T* y = x + m * row;
    T* const turned = y + m * row;
    T* const gram = turned + n * side;
    T* const factor = gram + m * side;
    const auto [begin, end] = team.share(c.batch, 1);
    for (int64_t k = begin; k < end; ++k) {
      const S* from = static_cast<const S*>(c.x) + k * m * n;
      for (int64_t i = 0; i < m; ++i) read(from + i * x_row, x_column, n, x + i * row, row);
      // The norm from scaled entries, so that squares neither overflow nor vanish.
      T top = 0;
      for (int64_t i = 0; i < m * row; ++i) top = std::max(top, std::fabs(x[i]));
      double sum = 0;
      if (top > 0) {
        for (int64_t i = 0; i < m * row; ++i) {
          const double e = static_cast<double>(x[i]) / static_cast<double>(top);
          sum += e * e;
        }
      } else {
        for (int64_t i = 0; i < m * row; ++i) sum += static_cast<double>(x[i]);  // zero, or NaN
      }
      const double norm = std::sqrt(sum) * (top > 0 ? static_cast<double>(top) : 1);
      const T scale = static_cast<T>(norm > c.eps || norm != norm ? norm : c.eps);
      for (int64_t i = 0; i < m * row; i += L) store(x + i, load<V>(x + i) / scale);
      for (int step = 0; step < c.steps; ++step) {
        transpose(m, n, x, row, turned, side);
        product<T>(m, side, n, {x, row, 1}, turned, side, gram, side);
        product<T>(m, side, m, {gram, side, 1}, gram, side, factor, side);
        for (int64_t i = 0; i < m * side; i += L) store(factor + i, b * load<V>(gram + i) + d * load<V>(factor + i));
        product<T>(m, row, m, {factor, side, 1}, x, row, y, row);
        for (int64_t i = 0; i < m * row; i += L) store(y + i, a * load<V>(x + i) + load<V>(y + i));
        std::swap(x, y);
      }
      S* to = static_cast<S*>(c.out) + k * m * n;
      for (int64_t i = 0; i < m; ++i) write(x + i * row, to + i * x_row, x_column, n);
    }
  });
}

}  // namespace

void newton_schulz_f32(const NewtonSchulz& c) { newton_schulz<float, float>(c); }
void newton_schulz_f64(const NewtonSchulz& c) { newton_schulz<double, double>(c); }
void newton_schulz_bf16(const NewtonSchulz& c) { newton_schulz<bf16, float>(c); }
void newton_schulz_f16(const NewtonSchulz& c) { newton_schulz<f16, float>(c); }

}  // namespace precond
}  // namespace SECANT_ISA
