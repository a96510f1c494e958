// The coupled Newton iteration for inverse roots of small matrices, one thread to each. The contract is
// reference.newton_inv_root.
#include <cmath>
#include <limits>

#include "buffer.h"
#include "cpu_ops.h"
#include "cpu_product.h"
#include "parallel.h"

namespace SECANT_ISA {
namespace precond {

using secant::Buffer;
using secant::NewtonRoot;
using secant::Team;

namespace {

constexpr double kWorkOfThread = 3e5;  // multiplications below which a second thread is not woken

template <class S, class T>
struct Root {
  using V = vec<T>;
  static constexpr int64_t L = kLanes<T>;

  const NewtonRoot& c;
  const int64_t n, side, size;
  T *m, *x, *t, *spare;

  Root(const NewtonRoot& call, T* memory)
      : c(call), n(call.n), side(padded<T>(n)), size(n * side), m(memory), x(m + size), t(x + size), spare(t + size) {}

  static int64_t numbers(int64_t n) { return 4 * n * padded<T>(n); }

  double norm(const T* a) const {
    V sum[4] = {};
    int64_t k = 0;
    for (; k + 4 * L <= size; k += 4 * L) {
      unroll<4>([&](auto u) SECANT_LAMBDA {
        const V v = load<V>(a + k + u * L);
        sum[u] += v * v;
      });
    }
    for (; k < size; k += L) {
      const V v = load<V>(a + k);
      sum[0] += v * v;
    }
    return std::sqrt(static_cast<double>(sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]))));
  }

  void scale(const T* from, T by, T* to) const {
    for (int64_t k = 0; k < size; k += L) store(to + k, by * load<V>(from + k));
  }

  // a <- a b or, where `left`, b a.
  void times(T*& a, const T* b, bool left) {
    product<T>(n, side, n, {left ? b : a, side, 1}, left ? a : b, side, spare, side);
    std::swap(a, spare);
  }

  int run(const S* from, S* to) {
    T top = 0;
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
      read(from + i * n, 1, i + 1, m + i * side, side);
      for (int64_t j = 0; j <= i; ++j) {
        const T e = std::fabs(m[i * side + j]);
        finite &= e <= std::numeric_limits<T>::max();
        top = std::max(top, e);
      }
    }
    if (!(finite && top > 0)) {
      std::fill(to, to + n * n, Round<S>::from(T(0)));
      return finite ? 0 : -1;
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) m[i * side + j] /= top;
      for (int64_t j = 0; j < i; ++j) m[j * side + i] = m[i * side + j];
    }
    double factor = norm(m), size_of_a = factor, power = 1;
    const T* a = m;
    for (int k = 0; k < c.squarings; ++k) {
      scale(a, static_cast<T>(1 / factor), t);
      times(t, t, false);
      factor = norm(t), power /= 2, a = t;
      size_of_a *= std::pow(factor, power);
    }
    const double z = (c.p + 1) / (2 * (1 + c.damping) * size_of_a);
    for (int64_t i = 0; i < n; ++i) m[i * side + i] += static_cast<T>(c.damping * size_of_a);
    scale(m, static_cast<T>(z), m);
    std::fill(x, x + size, T(0));
    for (int64_t i = 0; i < n; ++i) x[i * side + i] = 1;
    int code = c.steps;
    double last = std::numeric_limits<double>::infinity();
    const T part = T(1) / static_cast<T>(c.p);
    for (int k = 0; k < c.steps; ++k) {
      scale(m, -part, t);
      for (int64_t i = 0; i < n; ++i) t[i * side + i] += part;
      const double error = c.p * norm(t);
      if (!(error <= c.growth * last)) {
        code = k;
        break;
      }
      last = error;
      for (int64_t i = 0; i < n; ++i) t[i * side + i] += 1;
      times(x, t, false);
      if (error <= c.tolerance) {
        code = 0;
        break;
      }
      for (int q = c.p; q > 1; q /= 2) times(t, t, false);
      times(m, t, true);
    }
    const double whole = std::pow(z / static_cast<double>(top), 1.0 / c.p);
    const T half = static_cast<T>(std::min(whole, static_cast<double>(std::numeric_limits<T>::max())) / 2);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) m[i * side + j] = half * (x[i * side + j] + x[j * side + i]);
      write(m + i * side, to + i * n, 1, n);
    }
    return code;
  }
};

template <class S, class T>
void newton_root(const NewtonRoot& c) {
  const auto n = static_cast<double>(c.n);
  const double work = static_cast<double>(c.batch) * (c.steps * 3.5 + c.squarings) * n * n * n;
  int64_t threads = c.threads;
  if (threads < 1) threads = std::clamp<int64_t>(static_cast<int64_t>(work / kWorkOfThread), 1, secant::max_threads());
  secant::run_team(static_cast<int>(std::min(threads, c.batch)), [&](const Team& team) {
    const Buffer<T> memory(Root<S, T>::numbers(c.n));
    const auto [begin, end] = team.share(c.batch, 1);
    for (int64_t k = begin; k < end; ++k) {
      Root<S, T> root(c, memory.get());
      c.info[k] = root.run(static_cast<const S*>(c.a) + k * c.n * c.n, static_cast<S*>(c.out) + k * c.n * c.n);
    }
  });
}

}  // namespace

void newton_root_f32(const NewtonRoot& c) { newton_root<float, float>(c); }
void newton_root_f64(const NewtonRoot& c) { newton_root<double, double>(c); }
void newton_root_bf16(const NewtonRoot& c) { newton_root<bf16, float>(c); }
void newton_root_f16(const NewtonRoot& c) { newton_root<f16, float>(c); }

}  // namespace precond
}  // namespace SECANT_ISA
