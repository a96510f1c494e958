// (diag(p) - p p^T) u row by row: the exponentials of a row stay in the cache between the sum and the result.
#include <cmath>

#include "cpu_ops.h"
#include "cpu_rows.h"

namespace SECANT_ISA {
namespace hvp {
namespace {

using secant::HvpCrossEntropy;

constexpr int64_t kSumRun = 4096;  // entries that are summed in T before they go into a double

template <class S, class T>
void cross_entropy(const HvpCrossEntropy& c) {
  using V = vec<T>;
  constexpr int W = kLanes<T>;
  const double work = static_cast<double>(c.rows) * static_cast<double>(c.size);
  int threads = c.threads > 0 ? c.threads : work < 16384 ? 1 : secant::max_threads();
  threads = static_cast<int>(std::min<int64_t>(threads, c.rows));
  const T* const lse = static_cast<const T*>(c.lse);
  secant::run_team(threads, [&](const secant::Team& team) {
    Buffer<T> kept(c.size);
    T* const e = kept.get();
    const auto [first, last] = team.share(c.rows, 1);
    for (int64_t i = first; i < last; ++i) {
      const S* const logits = static_cast<const S*>(c.logits) + i * c.logits_row;
      const S* const u = static_cast<const S*>(c.u) + i * c.u_row;
      S* const out = static_cast<S*>(c.out) + i * c.size;
      const int64_t whole = c.size / W * W;
      T shift;
      if (lse != nullptr) {
        shift = lse[i];
      } else {
        V high = splat(-std::numeric_limits<T>::infinity());
        for (int64_t j = 0; j < whole; j += W) {
          const V x = load_t<T>(logits + j);
          high = select<T>(less<T>(high, x), x, high);
        }
        T lanes[W];
        store(lanes, high);
        shift = lanes[0];
        for (int l = 1; l < W; ++l) shift = lanes[l] > shift ? lanes[l] : shift;
        for (int64_t j = whole; j < c.size; ++j) shift = to_float(logits[j]) > shift ? to_float(logits[j]) : shift;
      }
      double sum = 0, product = 0;
      for (int64_t begin = 0; begin < c.size; begin += kSumRun) {
        const int64_t end = std::min(c.size, begin + kSumRun);
        V s = {}, t = {};
        int64_t j = begin;
        for (; j + W <= end; j += W) {
          const V x = exponential(load_t<T>(logits + j) - shift);
          store(e + j, x);
          s += x;
          t += x * load_t<T>(u + j);
        }
        if (j < end) {
          T x[W] = {}, y[W] = {};
          for (int64_t l = 0; l < end - j; ++l) x[l] = to_float(logits[j + l]), y[l] = to_float(u[j + l]);
          store(x, exponential(load<V>(x) - shift));
          for (int64_t l = end - j; l < W; ++l) x[l] = 0;
          for (int64_t l = 0; l < end - j; ++l) e[j + l] = x[l];
          s += load<V>(x);
          t += load<V>(x) * load<V>(y);
        }
        sum += static_cast<double>(sum_lanes<T>(s));
        product += static_cast<double>(sum_lanes<T>(t));
      }
      const T scale = lse != nullptr ? T(1) : static_cast<T>(1 / sum);
      const T mean = static_cast<T>(lse != nullptr ? product : product / sum);
      int64_t j = 0;
      for (; j < whole; j += W) {
        const V y = (load<V>(e + j) * scale) * (load_t<T>(u + j) - mean);
        if constexpr (__is_same(S, T)) {
          store(out + j, y);
        } else if constexpr (__is_same(S, bf16)) {
          store_bf16(out + j, y);
        } else {
          T lanes[W];
          store(lanes, y);
          for (int l = 0; l < W; ++l) out[j + l] = Round<S>::from(lanes[l]);
        }
      }
      for (; j < c.size; ++j) out[j] = Round<S>::from((e[j] * scale) * (static_cast<T>(to_float(u[j])) - mean));
    }
  });
}

}  // namespace

void cross_entropy_f32(const HvpCrossEntropy& c) { cross_entropy<float, float>(c); }
void cross_entropy_f64(const HvpCrossEntropy& c) { cross_entropy<double, double>(c); }
void cross_entropy_bf16(const HvpCrossEntropy& c) { cross_entropy<bf16, float>(c); }
void cross_entropy_f16(const HvpCrossEntropy& c) { cross_entropy<f16, float>(c); }

}  // namespace hvp
}  // namespace SECANT_ISA
