// The dense update of the `lbfgs` family: one pass over the lower triangle of H makes the update that is due and
// multiplies by the gradient and by the change of it. The contract is reference.dense_update.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "buffer.h"
#include "cpu.h"
#include "parallel.h"
#include "simd.h"

namespace SECANT_ISA {
namespace {

using secant::Buffer;
using secant::LbfgsDense;
using secant::Team;

// Rows that go through the registers together, and columns of them that stay in the first level of cache between the
// update and the products.
constexpr int kRows = 4;
constexpr int kColumns = 256;
// Below this many bytes of the triangle one thread is faster than waking two.
constexpr int64_t kSerialBytes = 512 * 1024;
constexpr int kLine = 64;

enum { kSY, kSS, kYY, kYW, kWW, kSP, kSG, kWG, kPG, kGG, kSums };
enum { kBfgs, kScaledBfgs, kScaledBroyden };

// The call, and what the threads share. Vectors that are read along the rows are copied, padded with zeros to whole
// registers.
template <class T>
struct Work {
  static constexpr int kPad = 2 * kLanes<float>;

  Work(const LbfgsDense& a, int threads)
      : direction(a.out != nullptr),
        n(a.n),
        padded(a.n + kPad),
        products((a.s != nullptr) + (a.out != nullptr)),
        vectors(4 * padded),
        sums(products * threads * padded),
        wy(a.s != nullptr ? a.n : 0),
        hg(a.out != nullptr ? a.n : 0),
        partial(threads * (kSums + 1)) {
    s = vectors.get(), w = s + padded, g = w + padded, y = g + padded;
    const double* c = a.coefs;
    scale = c[0], ss = c[1], sw = c[2], ww = c[3], delta = c[4];
    fresh = scale == 0;
    due = !fresh && (scale != 1 || ss != 0 || sw != 0 || ww != 0);
    t = a.t_ptr != nullptr ? static_cast<T>(*a.t_ptr) : static_cast<T>(a.t);
    step = a.t_ptr != nullptr ? *a.t_ptr : a.t;
  }
  double* sum(int product, int rank) { return sums.get() + (rank * products + product) * padded; }

  bool direction;
  int64_t n, padded;
  int products;
  Buffer<T> vectors;
  Buffer<double> sums, wy, hg, partial;
  T *s, *w, *g, *y;
  double scale, ss, sw, ww, delta;
  bool fresh, due;
  T t;
  double step;
  double next[5], gamma, along_s, along_w;  // the next update, and the coefficients of s and H y in -d
  double s_unit, w_unit;                    // powers of two over which s and H y are kept
  bool accepted, spoilt;
};

// Columns [0, len) of R rows: h <- a h + c s + e w. kTail: row r ends after count[r] columns.
template <class T, int R, bool kTail>
SECANT_INLINE void update(T* const (&h)[R], const int64_t (&count)[R], int len, T scale, const T (&c)[R],
                          const T (&e)[R], const T* s, const T* w) {
  using V = vec<T>;
  for (int k = 0; k < len; k += kLanes<T>) {
    const V sv = load<V>(s + k), wv = load<V>(w + k);
    unroll<R>([&](auto r) SECANT_LAMBDA {
      if constexpr (kTail) {
        const int64_t left = std::max<int64_t>(count[r] - k, 0);
        store_some<T>(h[r] + k, scale * load_some<T>(h[r] + k, left) + (c[r] * sv + e[r] * wv), left);
      } else {
        store(h[r] + k, scale * load<V>(h[r] + k) + (c[r] * sv + e[r] * wv));
      }
    });
  }
}

// The same columns: row[r] += h[r].v, and to[j] += sum_r h[r][j] of[r].
template <class T, int R, bool kTail>
SECANT_INLINE void multiply(const T* const (&h)[R], const int64_t (&count)[R], int len, const T* v, const T (&of)[R],
                            vd (&row)[R], double* to) {
  using V = vec<T>;
  V dot[R] = {};
  for (int k = 0; k < len; k += kLanes<T>) {
    const V vv = load<V>(v + k);
    V column = {};
    unroll<R>([&](auto r) SECANT_LAMBDA {
      V x;
      if constexpr (kTail) {
        x = load_some<T>(h[r] + k, std::max<int64_t>(count[r] - k, 0));
      } else {
        x = load<V>(h[r] + k);
      }
      dot[r] += x * vv;
      column += x * of[r];
    });
    for (int b = 0; b < kHalves<T>; ++b) {
      double* const at = to + k + b * kDoubles;
      store(at, load<vd>(at) + half<T>(column, b));
    }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < kHalves<T>; ++b) row[r] += half<T>(dot[r], b);
}

// Rows i .. i + R - 1 of the triangle.
template <class T, int R>
void do_rows(Work<T>& x, T* triangle, int64_t i, int rank) {
  T* row[R];
  int64_t length[R];
  T c[R], e[R];
  for (int r = 0; r < R; ++r) {
    length[r] = i + r;  // left of the diagonal
    row[r] = triangle + length[r] * (length[r] + 1) / 2;
    c[r] = static_cast<T>(x.ss * x.s[i + r] + x.sw * x.w[i + r]);
    e[r] = static_cast<T>(x.sw * x.s[i + r] + x.ww * x.w[i + r]);
    if (x.fresh) {
      std::fill(row[r], row[r] + length[r], T(0));
      row[r][length[r]] = static_cast<T>(x.delta);
    } else if (x.due) {
      T& d = row[r][length[r]];
      d = static_cast<T>(x.scale) * d + (c[r] * x.s[i + r] + e[r] * x.w[i + r]);
    }
  }
  const T* const along[2] = {x.g, x.y};
  const int first = x.direction ? 0 : 1;
  T of[2][R];
  vd sum[2][R] = {};
  for (int p = 0; p < x.products; ++p)
    for (int r = 0; r < R; ++r) of[p][r] = along[first + p][i + r];
  const auto columns = [&](auto tail, int64_t j, int len) SECANT_LAMBDA {
    constexpr bool kTail = decltype(tail)::value;
    T* h[R];
    const T* read[R];
    int64_t count[R];
    for (int r = 0; r < R; ++r) read[r] = h[r] = row[r] + j, count[r] = length[r] - j;
    if (x.due) update<T, R, kTail>(h, count, len, static_cast<T>(x.scale), c, e, x.s + j, x.w + j);
    for (int p = 0; p < x.products; ++p)
      multiply<T, R, kTail>(read, count, len, along[first + p] + j, of[p], sum[p], x.sum(p, rank) + j);
  };
  if (!x.fresh) {
    const int64_t whole = i / kLanes<T> * kLanes<T>;
    for (int64_t j = 0; j < whole; j += kColumns)
      columns(std::false_type{}, j, static_cast<int>(std::min<int64_t>(kColumns, whole - j)));
    if (whole < i + R - 1) columns(std::true_type{}, whole, static_cast<int>(i + R - 1 - whole));
  }
  for (int p = 0; p < x.products; ++p) {
    double* const to = x.sum(p, rank);
    for (int r = 0; r < R; ++r)
      to[i + r] += sum_lanes<double>(sum[p][r]) + static_cast<double>(row[r][length[r]]) * of[p][r];
  }
}

// tau and phi: reference.scaling.
void scaling(double sy, double sbs, double yhy, bool first, int64_t n, int rule, double* tau, double* phi) {
  *tau = *phi = 1;
  const double b = sbs / sy, h = yhy / sy;
  if (rule == kBfgs || first || !(b > 0 && std::isfinite(b))) return;
  const double shrink = std::min(1 / b, 1.0);
  *tau = shrink;
  if (rule == kScaledBfgs) return;
  const double a = std::max(b * h - 1, std::numeric_limits<double>::epsilon());
  const double rho = std::min(h / ((1 + a) * (1 + std::sqrt(a / (1 + a)))), 1.0);
  const double theta = std::max((rho - 1) / a, std::min(1 / rho, (1 - b) / b));
  const double sigma = 1 + a * theta;
  const double power = n > 1 ? std::pow(sigma, -1.0 / static_cast<double>(n - 1)) : 1;
  *tau = theta > 0 ? shrink * std::min(power, 1 / theta) : std::min(shrink * power, sigma);
  *phi = (1 - theta) / sigma;
}

// reference.power_of_two: half the exponent.
double power_of_two(double square) {
  uint64_t bits;
  std::memcpy(&bits, &square, 8);
  const uint64_t half = static_cast<uint64_t>(((static_cast<int64_t>(bits >> 52 & 0x7ff) - 1023) >> 1) + 1023) << 52;
  double unit;
  std::memcpy(&unit, &half, 8);
  return unit;
}

// The gate, the next update and the coefficients of the direction, from the sums.
template <class T>
void decide(const LbfgsDense& a, Work<T>& x, const double* r, double top) {
  std::fill(a.stats, a.stats + 10, 0.0);
  const double none[5] = {1, 0, 0, 0, 0};
  std::copy(none, none + 5, x.next);
  x.accepted = x.spoilt = false;
  x.gamma = x.s_unit = x.w_unit = 1;
  if (a.s != nullptr) {
    const double norms = std::sqrt(r[kSS]) * std::sqrt(r[kYY]), sy = r[kSY], yhy = r[kYW];
    const bool first = *a.count == 0;
    double tau, phi;
    scaling(sy, a.y_prev != nullptr ? -x.step * r[kSP] : 0, yhy, first, a.n, a.rule, &tau, &phi);
    const double scale = (first ? sy / yhy : 1) / tau;
    const double ss = scale * phi * yhy / sy / sy + 1 / sy, sw = -scale * phi / sy, ww = -scale * (1 - phi) / yhy;
    const double size = std::fabs(ss) * r[kSS] + 2 * std::fabs(sw) * (std::sqrt(r[kSS]) * std::sqrt(r[kWW])) +
                        std::fabs(ww) * r[kWW] + scale;
    x.accepted = sy > a.tol * norms && yhy > 0 && std::isfinite(r[kYY]) && std::isfinite(r[kSS]) &&
                 std::min(r[kSS], r[kWW]) >= std::numeric_limits<double>::min() &&
                 size < 0.25 * static_cast<double>(std::numeric_limits<T>::max());
    a.stats[3] = sy, a.stats[4] = std::sqrt(r[kSS]), a.stats[5] = std::sqrt(r[kYY]), a.stats[7] = yhy;
    if (x.accepted) {
      const double next[5] = {scale, ss, sw, ww, 0};
      std::copy(next, next + 5, x.next);
      x.gamma = sy / r[kYY], x.s_unit = power_of_two(r[kSS]), x.w_unit = power_of_two(r[kWW]);
      a.stats[6] = 1, a.stats[8] = tau, a.stats[9] = phi;
    }
  }
  int32_t count = *a.count + x.accepted;
  if (a.out != nullptr) {
    const double gs = x.accepted ? r[kSG] : 0, gw = x.accepted ? r[kWG] : 0, *c = x.next;
    x.along_s = c[1] * gs + c[2] * gw, x.along_w = c[2] * gs + c[3] * gw;
    double gd = -(c[0] * r[kPG] + x.along_s * gs + x.along_w * gw);
    if (!(gd < 0) && r[kGG] > 0 && std::isfinite(r[kGG])) {
      x.spoilt = true;
      const double anew[5] = {0, 0, 0, 0, x.gamma};
      std::copy(anew, anew + 5, x.next);
      gd = -x.gamma * r[kGG];
      count = 0;
    }
    a.stats[0] = gd, a.stats[1] = std::sqrt(r[kGG]), a.stats[2] = std::isnan(r[kGG]) ? r[kGG] : top;
  }
  std::copy(x.next, x.next + 5, a.coefs);
  a.coefs[1] *= x.s_unit * x.s_unit, a.coefs[2] *= x.s_unit * x.w_unit, a.coefs[3] *= x.w_unit * x.w_unit;
  *a.count = count;
}

template <class T>
void dense_team(const LbfgsDense& a, Work<T>& x, const Team& team) {
  const int64_t n = a.n;
  const auto [begin, end] = team.share(n, kRows);
  const bool pair = a.s != nullptr, direction = a.out != nullptr, last = team.rank == team.size - 1;
  const T* grad = static_cast<const T*>(a.grad);
  const T* s = static_cast<const T*>(a.s);
  const T* y = static_cast<const T*>(a.y);
  const T* y_prev = static_cast<const T*>(a.y_prev);
  T* steps = static_cast<T*>(a.steps);
  const auto copy = [&, begin = begin, end = end](T* to, const auto& from) SECANT_LAMBDA {
    for (int64_t i = begin; i < end; ++i) to[i] = from(i);
    if (last) std::fill(to + n, to + x.padded, T(0));
  };
  // What no update reads may hold anything.
  copy(x.s, [&](int64_t i) { return x.due ? steps[i] : T(0); });
  copy(x.w, [&](int64_t i) { return x.due ? steps[n + i] : T(0); });
  if (direction) copy(x.g, [&](int64_t i) { return grad[i]; });
  if (pair) copy(x.y, [&](int64_t i) { return y_prev != nullptr ? y[i] - y_prev[i] : y[i]; });
  for (int p = 0; p < x.products; ++p) std::fill(x.sum(p, team.rank), x.sum(p, team.rank) + x.padded, 0.0);
  team.barrier();

  // The pass: rows so that each thread has as much of the triangle.
  const auto bound = [&](int rank) {
    const int64_t row = std::llround(static_cast<double>(n) * std::sqrt(static_cast<double>(rank) / team.size));
    return rank == team.size ? n : row / kRows * kRows;
  };
  T* triangle = static_cast<T*>(a.h);
  int64_t i = bound(team.rank);
  const int64_t stop = bound(team.rank + 1);
  for (; i + kRows <= stop; i += kRows) do_rows<T, kRows>(x, triangle, i, team.rank);
  with_constant<kRows - 1>(stop - i, [&](auto rows) { do_rows<T, decltype(rows)::value>(x, triangle, i, team.rank); });
  team.barrier();

  double r[kSums] = {}, top = 0;
  const int of_y = direction ? 1 : 0;
  for (int64_t k = begin; k < end; ++k) {
    double g = 0, p = 0;
    if (direction) {
      for (int rank = 0; rank < team.size; ++rank) p += x.sum(0, rank)[k];
      g = grad[k], x.hg.get()[k] = p;
      r[kPG] += p * g, r[kGG] += g * g, top = std::max(top, std::fabs(g));
    }
    if (pair) {
      double q = 0;
      for (int rank = 0; rank < team.size; ++rank) q += x.sum(of_y, rank)[k];
      const double w = static_cast<T>(q), sk = x.t * s[k], yk = x.y[k];
      x.wy.get()[k] = w;
      r[kSY] += sk * yk, r[kSS] += sk * sk, r[kYY] += yk * yk, r[kYW] += yk * w, r[kWW] += w * w;
      if (y_prev != nullptr) r[kSP] += sk * y_prev[k];
      if (direction) r[kSG] += sk * g, r[kWG] += w * g;
    }
  }
  double* const mine = x.partial.get() + team.rank * (kSums + 1);
  std::copy(r, r + kSums, mine);
  mine[kSums] = top;
  team.barrier();
  if (team.rank == 0) {
    for (int rank = 1; rank < team.size; ++rank) {
      const double* other = x.partial.get() + rank * (kSums + 1);
      for (int k = 0; k < kSums; ++k) r[k] += other[k];
      top = std::max(top, other[kSums]);
    }
    decide(a, x, r, top);
  }
  team.barrier();

  const double scale = x.spoilt ? x.gamma : x.next[0];
  T *out = static_cast<T*>(a.out), *prev_out = static_cast<T*>(a.prev_out);
  for (int64_t k = begin; k < end; ++k) {
    const double sk = x.accepted ? static_cast<double>(static_cast<T>(x.t * s[k])) : 0;
    const double w = x.accepted ? x.wy.get()[k] : 0;
    if (x.accepted) steps[k] = static_cast<T>(sk / x.s_unit), steps[n + k] = static_cast<T>(w / x.w_unit);
    if (!direction) continue;
    const double g = grad[k];
    const double d = x.spoilt ? -scale * g : -(scale * x.hg.get()[k] + x.along_s * sk + x.along_w * w);
    if (prev_out != nullptr) prev_out[k] = grad[k];
    out[k] = static_cast<T>(d);
  }
}

template <class T>
void dense_update(const LbfgsDense& a) {
  const int64_t bytes = a.n * (a.n + 1) / 2 * static_cast<int64_t>(sizeof(T));
  const int threads = a.threads > 0 ? a.threads : bytes < kSerialBytes ? 1 : secant::max_threads();
  Work<T> x(a, threads);
  secant::run_team(threads, [&](const Team& team) { dense_team(a, x, team); });
}

}  // namespace

extern const secant::LbfgsDenseCpu lbfgs_dense;
const secant::LbfgsDenseCpu lbfgs_dense = {{dense_update<float>, dense_update<double>}};

}  // namespace SECANT_ISA
