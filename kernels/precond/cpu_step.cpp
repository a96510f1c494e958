// Preconditioned steps, one tile after another: gradient, momenta and parameter of a tile pass through the cache once.
// The contract is reference.step.
#include <atomic>
#include <cmath>
#include <vector>

#include "buffer.h"
#include "cpu_ops.h"
#include "cpu_product.h"
#include "parallel.h"

namespace SECANT_ISA {
namespace precond {

using secant::Buffer;
using secant::PrecondLayout;
using secant::PrecondStep;
using secant::PrecondTensor;
using secant::Team;

namespace {

constexpr double kWorkOfThread = 3e5;  // multiplications below which a second thread is not woken

// A piece of a side: where it begins and how long it is.
struct Piece {
  int64_t begin, size;
};
Piece piece(int64_t n, int64_t pieces, int64_t i) {
  const int64_t least = n / pieces, more = n % pieces;
  return {i * least + std::min(i, more), least + (i < more)};
}

struct Place {
  int64_t tensor, i, j;
};

// S: dtype of parameters and gradients, Q: of the states, T: of the arithmetic.
template <class S, class Q, class T>
struct Step {
  using V = vec<T>;
  static constexpr int64_t L = kLanes<T>;

  const PrecondStep& c;
  int64_t height = 1, width = 1, square = 1;  // the largest tile, in padded rows, and the largest padded square
  std::vector<Place> places;
  double work = 0;

  explicit Step(const PrecondStep& call) : c(call) {
    for (int64_t k = 0; k < c.count; ++k) {
      const PrecondLayout& l = c.layout[k];
      const PrecondTensor& x = c.tensors[k];
      const int64_t r = (l.rows + l.down - 1) / l.down, w = (l.columns + l.across - 1) / l.across;
      height = std::max(height, r), width = std::max(width, padded<T>(w));
      double each = 20;
      if (x.left != nullptr || x.left_root != nullptr)
        square = std::max(square, padded<T>(r) * padded<T>(r)), each += 2 * static_cast<double>(r);
      if (x.right != nullptr || x.right_root != nullptr)
        square = std::max(square, padded<T>(w) * padded<T>(w)), each += 2 * static_cast<double>(w);
      work += each * static_cast<double>(l.rows) * static_cast<double>(l.columns);
      for (int64_t i = 0; i < l.down; ++i) {
        for (int64_t j = 0; j < l.across; ++j) places.push_back({k, i, j});
      }
    }
  }

  // The memory of a thread: G, M, the step and two more of the shape of a tile, one transposed, and one of a side.
  struct Scratch {
    Buffer<T> memory;
    T *g, *m, *p, *x, *t, *q;
    explicit Scratch(const Step& s) : memory(4 * s.height * s.width + padded<T>(s.height) * s.width + s.square) {
      const int64_t tile = s.height * s.width;
      g = memory.get(), m = g + tile, p = m + tile, x = p + tile, t = x + tile;
      q = t + padded<T>(s.height) * s.width;
    }
  };

  // A side's average += (1 - beta) of a product, of which the lower triangle counts.
  void average(Q* packed, int64_t n, const T* product, int64_t row) const {
    const T keep = static_cast<T>(c.beta_gram), add = static_cast<T>(1 - c.beta_gram);
    for (int64_t i = 0; i < n; ++i, product += row) {
      int64_t k = 0;
      for (; k + L <= i + 1; k += L) {
        const V sum = keep * load_t<T>(packed + k) + add * load<V>(product + k);
        if constexpr (__is_same(Q, T)) {
          store(packed + k, sum);
        } else {
          T some[L];
          store(some, sum);
          write(some, packed + k, 1, L);
        }
      }
      const int64_t left = i + 1 - k;
      if constexpr (__is_same(Q, T)) {
        if (left > 0) store_some(packed + k, keep * load_some(packed + k, left) + add * load<V>(product + k), left);
      } else {
        for (; k <= i; ++k) packed[k] = Round<Q>::from(keep * static_cast<T>(to_float(packed[k])) + add * product[k]);
      }
      packed += i + 1;
    }
  }

  // A root (n, n) of a tile with `size` rows, as rows of whole registers: itself, or a copy in `to`.
  static const T* operand(const Q* root, int64_t n, int64_t size, T* to, int64_t* row) {
    if constexpr (__is_same(Q, T)) {
      if (n % L == 0 && size == n) {
        *row = n;
        return root;
      }
    }
    *row = padded<T>(size);
    for (int64_t i = 0; i < size; ++i) read(root + i * n, 1, size, to + i * *row, *row);
    return to;
  }

  static T squares(const T* x, int64_t size) {
    V sum[4] = {};
    int64_t k = 0;
    for (; k + 4 * L <= size; k += 4 * L) {
      unroll<4>([&](auto u) SECANT_LAMBDA {
        const V v = load<V>(x + k + u * L);
        sum[u] += v * v;
      });
    }
    for (; k < size; k += L) {
      const V v = load<V>(x + k);
      sum[0] += v * v;
    }
    return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  // One tile; false: it is left as it is.
  bool tile(const Place& place, const Scratch& s) const {
    const PrecondLayout& l = c.layout[place.tensor];
    const PrecondTensor& x = c.tensors[place.tensor];
    const Piece down = piece(l.rows, l.down, place.i), across = piece(l.columns, l.across, place.j);
    const int64_t r = down.size, w = across.size, row = padded<T>(w), size = r * row;
    const int64_t nl = (l.rows + l.down - 1) / l.down, nr = (l.columns + l.across - 1) / l.across;
    const int64_t number = place.i * l.across + place.j;
    const int64_t origin = down.begin * l.row_stride + across.begin * l.column_stride;

    const S* grad = static_cast<const S*>(x.grad) + origin;
    for (int64_t i = 0; i < r; ++i) read(grad + i * l.row_stride, l.column_stride, w, s.g + i * row, row);
    if (c.maximize) {
      for (int64_t k = 0; k < size; k += L) store(s.g + k, -load<V>(s.g + k));
    }
    if (!std::isfinite(squares(s.g, size))) return false;

    if ((c.phases & secant::kGrams) != 0) {
      if (x.left != nullptr) {
        const int64_t side = padded<T>(r);
        transpose(r, w, s.g, row, s.t, side);
        product<T>(r, side, w, {s.t, 1, side}, s.t, side, s.q, side, true);
        average(static_cast<Q*>(x.left) + number * (nl * (nl + 1) / 2), r, s.q, side);
      }
      if (x.right != nullptr) {
        product<T>(w, row, r, {s.g, 1, row}, s.g, row, s.q, row, true);
        average(static_cast<Q*>(x.right) + number * (nr * (nr + 1) / 2), w, s.q, row);
      }
    }
    if ((c.phases & secant::kApply) == 0) return true;

    const double t = static_cast<double>(*x.step);
    const T unbias1 = static_cast<T>(1 / (1 - std::pow(c.beta1, t)));
    const T unbias2 = static_cast<T>(1 / (1 - std::pow(c.beta2, t)));
    const int64_t momenta = down.begin * l.columns + across.begin;  // of the states, whose rows follow each other
    Q* const exp_avg = static_cast<Q*>(x.exp_avg) + momenta;
    Q* const exp_avg_sq = x.exp_avg_sq == nullptr ? nullptr : static_cast<Q*>(x.exp_avg_sq) + momenta;
    const bool has_left = x.left_root != nullptr, has_right = x.right_root != nullptr;
    const bool sided = has_left || has_right, rotate = c.rotate && sided;
    const Q* left_root = static_cast<const Q*>(x.left_root) + number * nl * nl;
    const Q* right_root = static_cast<const Q*>(x.right_root) + number * nr * nr;

    for (int64_t i = 0; i < r; ++i) read(exp_avg + i * l.columns, 1, w, s.m + i * row, row);
    const T beta1 = static_cast<T>(c.beta1), new1 = static_cast<T>(1 - c.beta1);
    for (int64_t k = 0; k < size; k += L) store(s.m + k, beta1 * load<V>(s.m + k) + new1 * load<V>(s.g + k));

    // A root that has to be copied has one place, so that one side is multiplied at a time.
    const auto times_left = [&](const T* from, T* to, bool turned) {
      int64_t step;
      const T* a = operand(left_root, nl, r, s.q, &step);
      product<T>(r, row, r, turned ? Entries<T>{a, 1, step} : Entries<T>{a, step, 1}, from, row, to, row);
    };
    const auto times_right = [&](const T* from, T* to) {
      int64_t step;
      const T* b = operand(right_root, nr, w, s.q, &step);
      product<T>(r, row, w, {from, row, 1}, b, step, to, row);
    };
    const auto times_right_turned = [&](const T* from, T* to) {
      for (int64_t i = 0; i < w; ++i) read(right_root + i, nr, w, s.q + i * row, row);
      product<T>(r, row, w, {from, row, 1}, s.q, row, to, row);
    };

    // Which buffers hold what becomes V, the M that is divided by it, and the step.
    T* v = s.g;
    const T *m = s.m, *p = s.p;
    if (rotate) {
      const T *g1 = s.g, *m1 = s.m;
      if (has_right) {
        times_right(s.g, has_left ? s.t : s.x);
        times_right(s.m, has_left ? s.g : s.t);
        g1 = s.t, m1 = s.g;
      }
      if (has_left) {
        times_left(g1, s.x, true);
        times_left(m1, s.t, true);
      }
      v = s.x, m = s.t;
    }
    if (exp_avg_sq != nullptr) {
      const T beta2 = static_cast<T>(c.beta2), new2 = static_cast<T>(1 - c.beta2);
      for (int64_t i = 0; i < r; ++i) read(exp_avg_sq + i * l.columns, 1, w, s.p + i * row, row);
      for (int64_t k = 0; k < size; k += L) {
        const V g = load<V>(v + k);
        store(v + k, beta2 * load<V>(s.p + k) + new2 * (g * g));
      }
    }
    T scale = 1;
    if (rotate) {
      adam(m, v, size, unbias1, unbias2, s.p);
      if (has_left) times_left(s.p, s.g, false);
      if (has_right) times_right_turned(has_left ? s.g : s.p, s.t);
      p = has_right ? s.t : s.g;
    } else if (sided) {
      const T length = c.graft == secant::kGraftAdam  ? std::sqrt(adam(m, v, size, unbias1, unbias2, nullptr))
                       : c.graft == secant::kGraftSgd ? unbias1 * std::sqrt(squares(m, size))
                       : c.graft == secant::kGraftRms
                           ? static_cast<T>(c.rms * std::sqrt(static_cast<double>(r) * static_cast<double>(w)))
                           : T(0);
      if (has_right) times_right(m, has_left ? s.x : s.p);
      if (has_left) times_left(has_right ? s.x : m, s.p, false);
      if (c.graft == secant::kGraftNone) {
        scale = unbias1;
      } else {
        const T own = std::sqrt(squares(s.p, size));
        scale = own == 0 ? T(0) : length / own;
      }
    } else {
      adam(m, v, size, unbias1, unbias2, s.p);
    }
    if (!std::isfinite(scale * scale * squares(p, size))) return false;

    const double lr = c.lr_ptr == nullptr ? c.lr
                      : c.wide_lr         ? *static_cast<const double*>(c.lr_ptr)
                                          : static_cast<double>(*static_cast<const float*>(c.lr_ptr));
    const T decay = static_cast<T>(1 - lr * c.weight_decay), rate = static_cast<T>(lr) * scale;
    T* const new_w = p == s.t ? s.p : s.t;
    S* const param = static_cast<S*>(x.param) + origin;
    for (int64_t i = 0; i < r; ++i) {
      read(param + i * l.row_stride, l.column_stride, w, new_w, row);
      for (int64_t k = 0; k < row; k += L) {
        store(new_w + k, decay * load<V>(new_w + k) - rate * load<V>(p + i * row + k));
      }
      write(new_w, param + i * l.row_stride, l.column_stride, w);
      write(s.m + i * row, exp_avg + i * l.columns, 1, w);
      if (exp_avg_sq != nullptr) write(v + i * row, exp_avg_sq + i * l.columns, 1, w);
    }
    return true;
  }

  // A = M^ / (sqrt(V^) + eps), into `to` where there is one; its squared norm.
  T adam(const T* m, const T* v, int64_t size, T unbias1, T unbias2, T* to) const {
    const V eps = splat(static_cast<T>(c.eps));  // > 0, or the padding would be divided by zero
    V sum = {};
    for (int64_t k = 0; k < size; k += L) {
      const V a = unbias1 * load<V>(m + k) / (square_root<T>(unbias2 * load<V>(v + k)) + eps);
      if (to != nullptr) store(to + k, a);
      sum += a * a;
    }
    return sum_lanes<T>(sum);
  }

  void run() const {
    int64_t threads = c.threads;
    if (threads < 1)
      threads = std::clamp<int64_t>(static_cast<int64_t>(work / kWorkOfThread), 1, secant::max_threads());
    threads = std::min<int64_t>(threads, static_cast<int64_t>(places.size()));
    std::atomic<size_t> next{0};
    std::atomic<int64_t> skipped{0};
    secant::run_team(static_cast<int>(threads), [&](const Team&) {
      const Scratch scratch(*this);
      for (size_t at; (at = next.fetch_add(1, std::memory_order_relaxed)) < places.size();) {
        if (!tile(places[at], scratch)) skipped.fetch_add(1, std::memory_order_relaxed);
      }
    });
    if ((c.phases & secant::kApply) != 0) *c.skipped += skipped.load();
  }
};

}  // namespace

void step_f32(const PrecondStep& c) { Step<float, float, float>(c).run(); }
void step_f64(const PrecondStep& c) { Step<double, double, double>(c).run(); }
void step_bf16(const PrecondStep& c) { Step<bf16, float, float>(c).run(); }
void step_f16(const PrecondStep& c) { Step<f16, float, float>(c).run(); }
void step_f32_bf16(const PrecondStep& c) { Step<float, bf16, float>(c).run(); }
void step_f64_bf16(const PrecondStep& c) { Step<double, bf16, double>(c).run(); }
void step_bf16_bf16(const PrecondStep& c) { Step<bf16, bf16, float>(c).run(); }
void step_f16_bf16(const PrecondStep& c) { Step<f16, bf16, float>(c).run(); }

}  // namespace precond
}  // namespace SECANT_ISA
