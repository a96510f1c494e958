// A pass over the rows of X by a team of threads. Each thread takes a run of rows, block by block: Z = X V, a function
// of each row of Z, G += X^T of it; the block is in the cache when it is read for the second time. In float, G is
// summed over runs of at most 256 rows plus a block, which go into sums of double.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "buffer.h"
#include "cpu.h"
#include "cpu_math.h"
#include "cpu_tiles.h"
#include "parallel.h"

namespace SECANT_ISA {
namespace hvp {

using secant::Buffer;
using secant::HvpRows;

constexpr int64_t kBlockBytes = 256 * 1024;  // of a block of X: a quarter of the second-level cache
constexpr int64_t kRun = 256;

// Where the entries of the gradient lie: chunks of features, `width` arrays in each.
struct Layout {
  int64_t d, k, width, chunk;
  int64_t size() const { return (d + chunk - 1) / chunk * chunk * width; }
  int64_t at(int64_t j, int64_t c) const { return (j / chunk * width + c) * chunk + j % chunk; }
};

// The function of the rows: z becomes the coefficients of the gradient.
template <class T>
struct RowFunction {
  const HvpRows& c;
  const T* const weights;
  const Layout layout;
  const T* const bias;  // the row of the intercept, or null

  // Z of rows i, i + 1, ...; returns what they add to the value of the objective.
  double operator()(int64_t i, int64_t rows, T* z) const {
    if (bias != nullptr) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < layout.k; ++j) z[r * layout.width + j] += bias[j];
      }
    }
    switch (c.op) {
      case secant::kGlmHvp:
        return weigh(i, rows, z);
      case secant::kGlmValueGrad:
        return c.loss == secant::kLogistic  ? losses<secant::kLogistic>(i, rows, z)
               : c.loss == secant::kPoisson ? losses<secant::kPoisson>(i, rows, z)
               : c.loss == secant::kHuber   ? losses<secant::kHuber>(i, rows, z)
               : c.loss == secant::kGamma   ? losses<secant::kGamma>(i, rows, z)
               : c.loss == secant::kTweedie ? losses<secant::kTweedie>(i, rows, z)
                                            : losses<secant::kSquared>(i, rows, z);
      case secant::kSoftmaxHvp:
        return softmax(i, rows, z);
      default:
        return softmax_losses(i, rows, z);
    }
  }

 private:
  double weigh(int64_t i, int64_t rows, T* z) const {
    const T* w = static_cast<const T*>(c.row) + i;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < layout.width; ++j) z[r * layout.width + j] *= w[r];
    }
    return 0;
  }

  template <int Loss>
  double losses(int64_t i, int64_t rows, T* z) const {
    using V = vec<T>;
    const T* target = static_cast<const T*>(c.row) + i;
    T* curvature = static_cast<T*>(c.row_out) + i;
    const V zero = {}, one = splat(T(1)), delta = splat(static_cast<T>(c.delta));
    // Of the Tweedie loss with power p: 2 - p and 1 - p.
    const double above = 2 - c.delta, below = 1 - c.delta;
    double total = 0;
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const int64_t count = std::min<int64_t>(rows - r, kLanes<T>);
      const V x = load_some(z + r, count), t = load_some(target + r, count);
      V value, first, second;
      if constexpr (Loss == secant::kSquared) {
        first = x - t, second = one, value = first * first * T(0.5);
      } else if constexpr (Loss == secant::kPoisson) {
        second = exponential(x), first = second - t, value = second - t * x;
      } else if constexpr (Loss == secant::kLogistic) {
        const V e = exponential(-absolute<T>(x)), inverse = one / (one + e);
        const auto positive = less<T>(zero, x);
        const V q = e * inverse;  // of the less likely label
        // The difference of the two large terms is taken where it is exact, so that a tail keeps its digits.
        first = select<T>(positive, (one - t) - q, q - t);
        second = q * inverse;
        value = select<T>(positive, (one - t) * x, -t * x) + log1p_unit(e);
      } else if constexpr (Loss == secant::kGamma) {
        second = times_exponential(t, -x), first = one - second, value = second + x;
      } else if constexpr (Loss == secant::kTweedie) {
        const V up = exponential(x * static_cast<T>(above));
        const V down = times_exponential(t, x * static_cast<T>(below));
        first = up - down;
        second = up * static_cast<T>(above) - down * static_cast<T>(below);
        value = up * static_cast<T>(1 / above) - down * static_cast<T>(1 / below);
      } else {
        const V d = x - t, size = absolute<T>(d);
        const auto outer = less<T>(delta, size);
        const V limit = select<T>(less<T>(zero, d), delta, -delta);
        first = select<T>(outer, limit, d);
        second = select<T>(outer, zero, one + (d - d));  // NaN stays
        value = select<T>(outer, delta * (size - T(0.5) * delta), d * d * T(0.5));
      }
      if (weights != nullptr) {
        const V w = load_some(weights + i + r, count);
        value *= w, first *= w, second *= w;
      }
      store_some(z + r, first, count);
      store_some(curvature + r, second, count);
      T terms[kLanes<T>];
      store(terms, value);
      for (int64_t l = 0; l < count; ++l) total += static_cast<double>(terms[l]);
    }
    return total;
  }

  // t e^x, zero for t = 0 where the exponential overflows; NaN stays.
  static SECANT_INLINE vec<T> times_exponential(const vec<T>& t, const vec<T>& x) {
    const vec<T> zero = {};
    return select<T>(equal<T>(t, zero) & equal<T>(x, x), zero, t * exponential(x));
  }

  double softmax(int64_t i, int64_t rows, T* z) const {
    int64_t r = 0;
    if (layout.k <= kLanes<T>) {
      for (; r + 4 <= rows; r += 4) softmax_of_four(i + r, z + r * layout.width);
    }
    for (; r < rows; ++r) {
      const T* p = static_cast<const T*>(c.row) + (i + r) * layout.k;
      T* y = z + r * layout.width;
      vec<T> sum = {};
      for (int64_t j = 0; j < layout.k; j += kLanes<T>)
        sum += load_some(p + j, layout.k - j) * load_some(y + j, layout.k - j);
      const T mean = sum_lanes<T>(sum), w = weight_of(i + r);
      for (int64_t j = 0; j < layout.k; j += kLanes<T>) {
        const int64_t count = layout.k - j;
        store_some(y + j, w * (load_some(p + j, count) * (load_some(y + j, count) - mean)), count);
      }
    }
    return 0;
  }

  // Rows of at most one register. All are read before any is written: the lanes behind a row that is written are those
  // of the next one, which a load would have to wait for.
  void softmax_of_four(int64_t i, T* z) const {
    const T* const p = static_cast<const T*>(c.row) + i * layout.k;
    vec<T> x[4], y[4];
    unroll<4>([&](auto r) SECANT_LAMBDA {
      x[r] = load_some(p + r * layout.k, layout.k);
      y[r] = load_some(z + r * layout.width, layout.k);
    });
    T mean[4];
    sum_lanes_of_four<T>(x[0] * y[0], x[1] * y[1], x[2] * y[2], x[3] * y[3], mean);
    unroll<4>([&](auto r) SECANT_LAMBDA {
      store_some(z + r * layout.width, weight_of(i + r) * (x[r] * (y[r] - mean[r])), layout.k);
    });
  }

  static SECANT_INLINE vec<T> lane_numbers() {
    vec<T> x;
    for (int l = 0; l < kLanes<T>; ++l) x[l] = static_cast<T>(l);
    return x;
  }

  T weight_of(int64_t i) const { return weights == nullptr ? T(1) : weights[i]; }

  double softmax_losses(int64_t i, int64_t rows, T* z) const {
    double total = 0;
    for (int64_t r = 0; r < rows; ++r) {
      T* y = z + r * layout.width;
      T* p = static_cast<T*>(c.row_out) + (i + r) * layout.k;
      const int64_t given = static_cast<const int64_t*>(c.row)[i + r];
      const bool known = given >= 0 && given < layout.k;  // else the row is NaN, and so are value and gradient
      const int64_t target = known ? given : -1;
      T high = y[0];
      for (int64_t j = 1; j < layout.k; ++j) high = y[j] > high || y[j] != y[j] ? y[j] : high;
      const T at_target = known ? y[target] : std::numeric_limits<T>::quiet_NaN();
      vec<T> sum = {};  // of the other classes
      for (int64_t j = 0; j < layout.k; j += kLanes<T>) {
        const int64_t count = layout.k - j;
        const vec<T> e = exponential(load_some(y + j, count) - high);
        store_some(p + j, e, count);
        // Lanes beyond the row are zero again.
        sum +=
            select<T>(equal<T>(lane_numbers(), splat(static_cast<T>(target - j))), vec<T>{}, load_some(p + j, count));
      }
      const T own = known ? p[target] : T(0), others = sum_lanes<T>(sum);
      const T inverse = T(1) / (own + others), w = known ? weight_of(i + r) : at_target;
      for (int64_t j = 0; j < layout.k; j += kLanes<T>) {
        const int64_t count = layout.k - j;
        const vec<T> q = load_some(p + j, count) * inverse;
        store_some(p + j, q, count);
        store_some(y + j, q * w, count);
      }
      // p - 1 of the target is minus the sum of the other probabilities, and the sum of exponentials may be 1 and a
      // little: its logarithm is that of what it has above 1.
      if (known) y[target] = -w * (others * inverse);
      const double log_sum = std::log1p((static_cast<double>(own) - 1) + static_cast<double>(others));
      total += static_cast<double>(w) * (log_sum + (static_cast<double>(high) - at_target));
    }
    return total;
  }
};

// With many vectors of few features, adding up the lanes of each inner product would take longer than the products.
template <class T>
Layout layout_of(const HvpRows& c) {
  constexpr int64_t W = kLanes<T>, H = W > 2 ? W / 2 : W;
  if (c.k <= 4 || c.d >= 5 * c.k) return {c.d, c.k, c.k, W};
  return {c.d, c.k, c.k <= H ? H : (c.k + W - 1) / W * W, 1};
}

template <class S, class T, class F>
void with_tiles(const Layout& layout, const F& f) {
  constexpr int W = kLanes<T>, H = W > 2 ? W / 2 : W;
  if (layout.chunk > 1) return f(Along<S, T>{});
  return layout.width % W != 0 ? f(Across<T, H>{}) : f(Across<T, W>{});
}

// Rows converted to T.
template <class S, class T>
void widen(const S* x, int64_t ld, int64_t rows, int64_t d, T* to) {
  for (int64_t r = 0; r < rows; ++r, x += ld, to += d) {
    int64_t j = 0;
    for (; j + kLanes<T> <= d; j += kLanes<T>) store(to + j, load_t<T>(x + j));
    for (; j < d; ++j) to[j] = to_float(x[j]);
  }
}

// The result: the sums of the threads, in their order, and the penalty.
template <class T>
void add_up(const HvpRows& c, const Layout& layout, const double* sums, int64_t stride, const secant::Team& team) {
  const T* const v = static_cast<const T*>(c.v);
  T* const out = static_cast<T*>(c.out);
  const auto [begin, end] = team.share(c.d, 64);
  for (int64_t j = begin; j < end; ++j) {
    for (int64_t k = 0; k < c.k; ++k) {
      double s = c.l2 == 0 ? 0 : c.l2 * static_cast<double>(v[j * c.k + k]);
      for (int t = 0; t < team.size; ++t) s += sums[t * stride + layout.at(j, k)];
      out[j * c.k + k] = static_cast<T>(s);
    }
  }
  if (team.rank != 0) return;
  for (int64_t k = 0; c.intercept && k < c.k; ++k) {
    double s = 0;
    for (int t = 0; t < team.size; ++t) s += sums[t * stride + layout.size() + k];
    out[c.d * c.k + k] = static_cast<T>(s);
  }
  if (c.value == nullptr) return;
  double losses = 0, squares = 0;
  for (int t = 0; t < team.size; ++t) losses += sums[t * stride + stride - 1];
  for (int64_t j = 0; c.l2 != 0 && j < c.d * c.k; ++j) squares += static_cast<double>(v[j]) * static_cast<double>(v[j]);
  *c.value = losses + c.l2 / 2 * squares;
}

template <class S, class T>
void rows(const HvpRows& c) {
  const Layout layout = layout_of<T>(c);
  const T* const v = static_cast<const T*>(c.v);
  Buffer<T> vectors(layout.size());
  with_tiles<S, T>(layout, [&](auto tiles) { tiles.pack(v, c.d, c.k, vectors.get()); });
  const RowFunction<T> function{c, static_cast<const T*>(c.sample_weight), layout,
                                c.intercept ? v + c.d * c.k : nullptr};

  // A block is a multiple of the rows of a tile.
  const int64_t fit = kBlockBytes / (c.d * static_cast<int64_t>(layout.chunk > 1 ? sizeof(S) : sizeof(T)));
  const int64_t block = std::min<int64_t>(std::max<int64_t>(fit / 8 * 8, c.d > 16384 ? 4 : 8), kRun);
  const double work = static_cast<double>(c.n) * static_cast<double>(c.d) * static_cast<double>(c.k);
  int threads = c.threads > 0 ? c.threads : work < 65536 ? 1 : secant::max_threads();
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, c.n / 8)));
  const int64_t stride = layout.size() + c.k + 1;  // sums of a thread: gradient, that of the intercept, value
  Buffer<double> sums(threads * stride);

  secant::run_team(threads, [&](const secant::Team& team) {
    double* const total = sums.get() + team.rank * stride;
    double* const of_bias = total + layout.size();
    double* const value = of_bias + c.k;
    std::fill_n(total, stride, 0.0);
    constexpr bool direct = __is_same(T, double);
    Buffer<T> z(block * layout.width + kLanes<T>), run(direct ? 0 : layout.size());
    Buffer<T> wide(__is_same(S, T) || layout.chunk > 1 ? 0 : block * c.d);
    T* g = run.get();
    if constexpr (direct) {
      g = total;
    } else {
      std::fill_n(g, layout.size(), T(0));
    }
    int64_t summed = 0;
    const auto flush = [&] {
      if constexpr (!direct) {
        for (int64_t j = 0; j < layout.size(); ++j) {
          total[j] += static_cast<double>(g[j]);
          g[j] = T(0);
        }
      }
      summed = 0;
    };
    const auto [first, last] = team.share(c.n, 8);
    with_tiles<S, T>(layout, [&](auto tiles) {
      using X = typename decltype(tiles)::Stored;
      for (int64_t i = first; i < last; i += block) {
        const int64_t count = std::min(block, last - i);
        const S* const stored = static_cast<const S*>(c.x) + i * c.x_row;
        const X* x;
        int64_t ld = c.x_row;
        if constexpr (__is_same(S, X)) {
          x = stored;
        } else {
          widen(stored, ld, count, c.d, wide.get());
          x = wide.get(), ld = c.d;
        }
        // The next block is fetched if it is whole and both fit in the second-level cache.
        const X* const ahead = __is_same(S, X) && fit >= 8 && i + 2 * block <= last ? x + block * ld : nullptr;
        tiles.logits(x, ld, count, c.d, layout.width, vectors.get(), z.get(), ahead);
        *value += function(i, count, z.get());
        tiles.gradient(x, ld, count, c.d, layout.width, z.get(), g, ahead);
        if (c.intercept) {
          for (int64_t r = 0; r < count; ++r) {
            for (int64_t k = 0; k < c.k; ++k) of_bias[k] += static_cast<double>(z.get()[r * layout.width + k]);
          }
        }
        summed += count;
        if (summed >= kRun) flush();
      }
    });
    flush();
    team.barrier();
    add_up<T>(c, layout, sums.get(), stride, team);
  });
}

}  // namespace hvp
}  // namespace SECANT_ISA
