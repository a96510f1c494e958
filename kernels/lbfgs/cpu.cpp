// SIMD kernels of the `lbfgs` family, compiled once per instruction set. The contract is in reference.py, the counts of
// bytes and the choices behind the blocking are in README.md.
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace SECANT_ISA {
namespace {

using secant::LbfgsTwoLoop;
using secant::LbfgsUpdate;
using secant::Team;

// Elements per block. A row is read in bursts of one block, long enough for the hardware prefetcher, and the two
// float64 copies of a block that pass 1 keeps (g and y) stay in the first-level cache.
constexpr int kBlock = 1024;
// Rows of the panel Gram matrix are converted to float64 first; 2 * kPanel rows of this many elements stay in the
// second level.
constexpr int kGramBlock = 256;
constexpr int kPanel = 16;

// Below this many bytes of history one thread is faster than waking two.
constexpr int64_t kSerialBytes = 512 * 1024;

int team_size(int asked, int64_t bytes) {
  if (asked > 0) return asked;
  return bytes < kSerialBytes ? 1 : secant::max_threads();
}

template <class T, class S>
SECANT_INLINE void to_doubles(const S* x, int len, double* out) {
  int i = 0;
  for (; i + kDoubles <= len; i += kDoubles) store(out + i, load_d(x + i));
  for (; i < len; ++i) out[i] = to_float(x[i]);
}

// x.y, two vectors of doubles.
SECANT_INLINE double dot(const double* x, const double* y, int len) {
  vd a0{}, a1{}, a2{}, a3{};
  int i = 0;
  for (; i + 4 * kDoubles <= len; i += 4 * kDoubles) {
    a0 += load<vd>(x + i) * load<vd>(y + i);
    a1 += load<vd>(x + i + kDoubles) * load<vd>(y + i + kDoubles);
    a2 += load<vd>(x + i + 2 * kDoubles) * load<vd>(y + i + 2 * kDoubles);
    a3 += load<vd>(x + i + 3 * kDoubles) * load<vd>(y + i + 3 * kDoubles);
  }
  double r = hsum((a0 + a1) + (a2 + a3));
  for (; i < len; ++i) r += x[i] * y[i];
  return r;
}

// Dots of one pair of rows with g and with y, as asked: r[0] += s.g, r[1] += y_j.g, r[2] += s.y, r[3] += y_j.y.
template <bool G, bool P, class S>
SECANT_INLINE void pair_dots(const S* s, const S* y, const double* g, const double* p, int len, double* r) {
  vd a[2][4] = {};
  int i = 0;
  for (; i + 2 * kDoubles <= len; i += 2 * kDoubles) {
    for (int u = 0; u < 2; ++u) {
      const int k = i + u * kDoubles;
      const vd sv = load_d(s + k), yv = load_d(y + k);
      if (G) {
        const vd gv = load<vd>(g + k);
        a[u][0] += sv * gv;
        a[u][1] += yv * gv;
      }
      if (P) {
        const vd pv = load<vd>(p + k);
        a[u][2] += sv * pv;
        a[u][3] += yv * pv;
      }
    }
  }
  double tail[4] = {};
  for (; i < len; ++i) {
    const double sv = to_float(s[i]), yv = to_float(y[i]);
    if (G) tail[0] += sv * g[i], tail[1] += yv * g[i];
    if (P) tail[2] += sv * p[i], tail[3] += yv * p[i];
  }
  for (int c = G ? 0 : 2; c < (P ? 4 : 2); ++c) r[c] += hsum(a[0][c] + a[1][c]) + tail[c];
}

// acc += a x + b y over a block, in T.
template <class T, class S>
SECANT_INLINE void axpy2(T a, const S* x, T b, const S* y, T* acc, int len) {
  const vec<T> av = splat(a), bv = splat(b);
  int i = 0;
  for (; i + kLanes<T> <= len; i += kLanes<T>) {
    vec<T> v = load<vec<T>>(acc + i);
    v += av * load_t<T>(x + i);
    v += bv * load_t<T>(y + i);
    store(acc + i, v);
  }
  for (; i < len; ++i) acc[i] += a * static_cast<T>(to_float(x[i])) + b * static_cast<T>(to_float(y[i]));
}

template <class T, class S>
SECANT_INLINE void axpy4(const T* c, const S* w, const S* x, const S* y, const S* z, T* acc, int len) {
  const vec<T> c0 = splat(c[0]), c1 = splat(c[1]), c2 = splat(c[2]), c3 = splat(c[3]);
  int i = 0;
  for (; i + kLanes<T> <= len; i += kLanes<T>) {
    vec<T> v = load<vec<T>>(acc + i);
    v += c0 * load_t<T>(w + i);
    v += c1 * load_t<T>(x + i);
    v += c2 * load_t<T>(y + i);
    v += c3 * load_t<T>(z + i);
    store(acc + i, v);
  }
  for (; i < len; ++i) {
    acc[i] += c[0] * static_cast<T>(to_float(w[i])) + c[1] * static_cast<T>(to_float(x[i])) +
              c[2] * static_cast<T>(to_float(y[i])) + c[3] * static_cast<T>(to_float(z[i]));
  }
}

// acc += sum of c[r] row[r]; the list holds no zero coefficient, since a skipped row may hold anything.
template <class T, class S>
SECANT_INLINE void combine(const std::vector<const S*>& rows, const std::vector<T>& c, int64_t at, T* acc, int len) {
  size_t r = 0;
  for (; r + 4 <= rows.size(); r += 4)
    axpy4(&c[r], rows[r] + at, rows[r + 1] + at, rows[r + 2] + at, rows[r + 3] + at, acc, len);
  for (; r + 2 <= rows.size(); r += 2) axpy2(c[r], rows[r] + at, c[r + 1], rows[r + 1] + at, acc, len);
  for (; r < rows.size(); ++r) axpy2(c[r], rows[r] + at, T(0), rows[r] + at, acc, len);
}

bool valid(double sy, double yy) { return std::isfinite(sy) && std::isfinite(yy) && sy > 0; }

// ---------------------------------------------------------------------------------------------------------- update

// What the dot products of pass 1 leave per problem: four per slot, and the ones of the new pair and the gradient.
enum { kGG, kGMax, kSY, kSS, kYY, kSG, kYG, kScalars };

// From dot products to coefficients: d = -gamma g + sum cs_j s_j + cy_j y_j. Returns {gamma, g.d}.
struct Direction {
  double gamma, gd;
};
Direction solve(int64_t m, int64_t newest, const double* sy, const double* yy, const double* dots, double gg,
                double* cs, double* cy, double* alpha) {
  double gamma = 1;
  bool first = true;
  for (int64_t a = 0; a < m; ++a) {  // newest to oldest
    const int64_t i = (newest - a + m) % m;
    alpha[i] = 0;
    const double sy_ii = sy[i * m + i];
    if (!valid(sy_ii, yy[i * m + i])) continue;
    if (first) gamma = sy_ii / yy[i * m + i], first = false;
    double x = -dots[4 * i];
    for (int64_t b = 0; b < a; ++b) {
      const int64_t j = (newest - b + m) % m;
      if (alpha[j] != 0) x -= alpha[j] * sy[i * m + j];
    }
    alpha[i] = x / sy_ii;
  }
  double gd = -gamma * gg;
  for (int64_t a = m - 1; a >= 0; --a) {  // oldest to newest
    const int64_t i = (newest - a + m) % m;
    cs[i] = cy[i] = 0;
    const double sy_ii = sy[i * m + i];
    if (!valid(sy_ii, yy[i * m + i])) continue;
    double x = -dots[4 * i + 1];
    for (int64_t j = 0; j < m; ++j)
      if (alpha[j] != 0) x -= alpha[j] * yy[i * m + j];
    x *= gamma;
    for (int64_t b = m - 1; b > a; --b) {
      const int64_t j = (newest - b + m) % m;
      if (cs[j] != 0) x += cs[j] * sy[j * m + i];
    }
    cs[i] = alpha[i] - x / sy_ii;
    cy[i] = -gamma * alpha[i];
    gd += cs[i] * dots[4 * i] + cy[i] * dots[4 * i + 1];
  }
  return {gamma, gd};
}

// The new pair over a block, as the ring stores it.
template <class T, class S>
SECANT_INLINE void new_pair(const T* s, const T* y, const T* y_prev, T t, int len, S* s_out, S* y_out) {
  for (int i = 0; i < len; ++i) s_out[i] = Round<S>::from(t * s[i]);
  if (y_prev != nullptr) {
    for (int i = 0; i < len; ++i) y_out[i] = Round<S>::from(static_cast<T>(y[i] - y_prev[i]));
  } else {
    for (int i = 0; i < len; ++i) y_out[i] = Round<S>::from(y[i]);
  }
}

template <class T, class S>
struct Problem {
  int64_t m, n;
  S *s_ring, *y_ring;
  double *sy, *yy, *stats;
  int32_t *head, *count;
  const T *grad, *s, *y, *y_prev;
  T *out, *prev_out;
  T t;
  double tol;

  Problem(const LbfgsUpdate& a, int64_t b)
      : m(a.m),
        n(a.n),
        s_ring(static_cast<S*>(a.s_ring) + b * m * n),
        y_ring(static_cast<S*>(a.y_ring) + b * m * n),
        sy(a.sy + b * m * m),
        yy(a.yy + b * m * m),
        stats(a.stats + 8 * b),
        head(a.head + b),
        count(a.count + b),
        grad(at(a.grad, b)),
        s(at(a.s, b)),
        y(at(a.y, b)),
        y_prev(at(a.y_prev, b)),
        out(const_cast<T*>(at(a.out, b))),
        prev_out(const_cast<T*>(at(a.prev_out, b))),
        t(static_cast<T>(a.t_ptr != nullptr ? a.t_ptr[b * a.t_stride] : a.t)),
        tol(a.tol) {}

 private:
  const T* at(const void* p, int64_t b) const { return p == nullptr ? nullptr : static_cast<const T*>(p) + b * n; }
};

// What the threads of a team share.
template <class T, class S>
struct UpdateScratch {
  std::vector<double> partial, dots, cs, cy, alpha;
  std::vector<const S*> rows;
  std::vector<T> coef;
  double gamma = 1;
  int64_t accepted = -1;  // slot of the accepted pair
};

template <bool G, bool P, class T, class S>
void pass1(const Problem<T, S>& p, int64_t begin, int64_t end, double* part) {
  alignas(64) double g[kBlock], y[kBlock], s[kBlock];
  S s_new[kBlock], y_new[kBlock];
  double* scalars = part + 4 * p.m;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int len = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    if (G) {
      to_doubles<T>(p.grad + at, len, g);
      double top = scalars[kGMax];
      for (int i = 0; i < len; ++i) top = std::max(top, std::fabs(g[i]));
      scalars[kGMax] = top;
      scalars[kGG] += dot(g, g, len);
    }
    if (P) {
      new_pair(p.s + at, p.y + at, p.y_prev != nullptr ? p.y_prev + at : nullptr, p.t, len, s_new, y_new);
      to_doubles<T>(s_new, len, s);
      to_doubles<T>(y_new, len, y);
      scalars[kSY] += dot(s, y, len);
      scalars[kSS] += dot(s, s, len);
      scalars[kYY] += dot(y, y, len);
      if (G) {
        scalars[kSG] += dot(s, g, len);
        scalars[kYG] += dot(y, g, len);
      }
    }
    for (int64_t j = 0; j < p.m; ++j)
      pair_dots<G, P>(p.s_ring + j * p.n + at, p.y_ring + j * p.n + at, g, y, len, part + 4 * j);
  }
}

// Between the passes, on one thread: reduce, gate, Gram matrices, coefficients.
template <class T, class S>
void middle(const Problem<T, S>& p, int threads, UpdateScratch<T, S>& w) {
  const int64_t m = p.m, width = 4 * m + kScalars;
  double* sum = w.partial.data();
  for (int r = 1; r < threads; ++r) {
    const double* other = w.partial.data() + r * width;
    for (int64_t k = 0; k < width; ++k) {
      if (k == 4 * m + kGMax) {
        sum[k] = std::max(sum[k], other[k]);
      } else {
        sum[k] += other[k];
      }
    }
  }
  const double* sc = sum + 4 * m;
  std::fill(p.stats, p.stats + 8, 0.0);
  w.accepted = -1;
  if (p.s != nullptr) {
    const double norms = std::sqrt(sc[kSS]) * std::sqrt(sc[kYY]);
    const bool finite = std::isfinite(sc[kSY]) && std::isfinite(sc[kSS]) && std::isfinite(sc[kYY]);
    p.stats[3] = sc[kSY], p.stats[4] = std::sqrt(sc[kSS]), p.stats[5] = std::sqrt(sc[kYY]);
    if (finite && sc[kSY] > p.tol * norms) {
      const int64_t k = *p.head;
      w.accepted = k;
      p.stats[6] = 1;
      for (int64_t j = 0; j < m; ++j) {
        p.sy[k * m + j] = 0;
        p.sy[j * m + k] = sum[4 * j + 2];
        p.yy[k * m + j] = p.yy[j * m + k] = sum[4 * j + 3];
      }
      p.sy[k * m + k] = sc[kSY];
      p.yy[k * m + k] = sc[kYY];
      sum[4 * k] = sc[kSG], sum[4 * k + 1] = sc[kYG];
      *p.head = static_cast<int32_t>((k + 1) % m);
      *p.count = static_cast<int32_t>(std::min<int64_t>(*p.count + 1, m));
    }
  }
  if (p.out == nullptr) return;
  const int64_t newest = (*p.head + m - 1) % m;
  const Direction d = solve(m, newest, p.sy, p.yy, sum, sc[kGG], w.cs.data(), w.cy.data(), w.alpha.data());
  w.gamma = d.gamma;
  p.stats[0] = d.gd, p.stats[1] = std::sqrt(sc[kGG]), p.stats[7] = d.gamma;
  p.stats[2] = std::isnan(sc[kGG]) ? sc[kGG] : sc[kGMax];
  w.rows.clear();
  w.coef.clear();
  for (int64_t j = 0; j < m; ++j) {
    for (int which = 0; which < 2; ++which) {
      const double c = which == 0 ? w.cs[j] : w.cy[j];
      if (c == 0) continue;
      w.rows.push_back((which == 0 ? p.s_ring : p.y_ring) + j * p.n);
      w.coef.push_back(static_cast<T>(c));
    }
  }
}

// Backwards, so that what pass 1 left in the cache is used first. The accepted pair is written here, not in pass 1:
// until the gate has spoken the slot still holds a pair that a rejection must keep.
template <class T, class S>
void pass2(const Problem<T, S>& p, int64_t begin, int64_t end, const UpdateScratch<T, S>& w) {
  alignas(64) T acc[kBlock];
  const int64_t blocks = (end - begin + kBlock - 1) / kBlock;
  const T scale = static_cast<T>(-w.gamma);
  for (int64_t b = blocks - 1; b >= 0; --b) {
    const int64_t at = begin + b * kBlock;
    const int len = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    if (w.accepted >= 0) {
      new_pair(p.s + at, p.y + at, p.y_prev != nullptr ? p.y_prev + at : nullptr, p.t, len,
               p.s_ring + w.accepted * p.n + at, p.y_ring + w.accepted * p.n + at);
    }
    if (p.out != nullptr) {
      for (int i = 0; i < len; ++i) acc[i] = scale * p.grad[at + i];
      combine(w.rows, w.coef, at, acc, len);
      if (p.prev_out != nullptr) std::copy(p.grad + at, p.grad + at + len, p.prev_out + at);
      std::copy(acc, acc + len, p.out + at);
    }
  }
}

template <class T, class S>
void reserve(UpdateScratch<T, S>& w, int64_t m, int threads) {
  w.partial.resize(static_cast<size_t>(threads * (4 * m + kScalars)));
  w.cs.resize(m), w.cy.resize(m), w.alpha.resize(m);
  w.rows.reserve(2 * m), w.coef.reserve(2 * m);
}

template <class T, class S>
void update_team(const Problem<T, S>& p, const Team& team, UpdateScratch<T, S>& w) {
  const auto [begin, end] = team.share(p.n, kBlock);
  double* part = w.partial.data() + team.rank * (4 * p.m + kScalars);
  std::fill(part, part + 4 * p.m + kScalars, 0.0);
  if (p.s == nullptr) {
    pass1<true, false>(p, begin, end, part);
  } else if (p.grad == nullptr) {
    pass1<false, true>(p, begin, end, part);
  } else {
    pass1<true, true>(p, begin, end, part);
  }
  team.barrier();
  if (team.rank == 0) middle(p, team.size, w);
  team.barrier();
  pass2(p, begin, end, w);
}

template <class T, class S>
void update(const LbfgsUpdate& a) {
  const int64_t bytes = 2 * a.m * a.n * static_cast<int64_t>(sizeof(S));
  if (a.batch > 1) {
    const int threads = static_cast<int>(std::min<int64_t>(team_size(a.threads, a.batch * bytes), a.batch));
    secant::run_team(threads, [&](const Team& team) {
      UpdateScratch<T, S> w;
      reserve(w, a.m, 1);
      const auto [begin, end] = team.share(a.batch, 1);
      for (int64_t b = begin; b < end; ++b) update_team(Problem<T, S>(a, b), Team{0, 1, nullptr}, w);
    });
    return;
  }
  const int threads = team_size(a.threads, bytes);
  UpdateScratch<T, S> w;
  reserve(w, a.m, threads);
  const Problem<T, S> p(a, 0);
  secant::run_team(threads, [&](const Team& team) { update_team(p, team, w); });
}

// -------------------------------------------------------------------------------------------------------- two_loop

// The recursion over panels of k pairs; see README.md. One panel is one pass; the dots of a pass:
struct PanelSums {
  double first[kPanel];       // s_i.q in loop 1, y_i.q in loop 2
  double sy[kPanel][kPanel];  // s_i.y_j, i older or equal
  double yy[kPanel];          // y_i.y_i

  // Only what k pairs use: for the many passes of a small problem the whole would be most of the work.
  void clear(int k) {
    for (int i = 0; i < k; ++i) {
      first[i] = yy[i] = 0;
      for (int j = i; j < k; ++j) sy[i][j] = 0;
    }
  }
};

template <class T, class S>
struct TwoLoopScratch {
  std::vector<PanelSums> partial;
  std::vector<double> sy;  // (panels, kPanel, kPanel)
  std::vector<double> alpha, rho, delta;
  std::vector<const S*> rows;
  std::vector<T> coef;
  double gamma = 1;
  bool have_gamma = false;
};

// The same sums, one vector each: a block adds to them, and only the end of a pass folds the lanes.
struct PanelLanes {
  vd first[kPanel], sy[kPanel][kPanel], yy[kPanel];
};

// s_i.q, s_i.y_j (i <= j) and y_i.y_i over a block held as doubles, rows kGramBlock apart and padded with zeros: to
// whole pairs of vectors, and to a multiple of four rows. A tile of 4 x 2 needs 6 loads for 8 products; the rows of a
// tile are constants away from one pointer, since an indexed operand would cost a second micro-operation.
SECANT_INLINE void gram(const double* s, const double* y, const double* q, int k, int len, PanelLanes& r) {
  for (int j = 0; j < k; j += 2) {
    for (int i = 0; i <= j + 1; i += 4) {
      vd a0[4] = {}, a1[4] = {};
      const double *sp = s + i * kGramBlock, *yp = y + j * kGramBlock;
      for (const double* end = yp + len; yp != end; yp += kDoubles, sp += kDoubles) {
        const vd v0 = load<vd>(yp), v1 = load<vd>(yp + kGramBlock);
        for (int u = 0; u < 4; ++u) {
          const vd x = load<vd>(sp + u * kGramBlock);
          a0[u] += x * v0;
          a1[u] += x * v1;
        }
      }
      for (int u = 0; u < 4; ++u) {
        r.sy[i + u][j] += a0[u];
        r.sy[i + u][j + 1] += a1[u];
      }
    }
  }
  for (int i = 0; i < k; i += 4) {
    vd a[4] = {}, b[4] = {};
    const double *sp = s + i * kGramBlock, *yp = y + i * kGramBlock;
    for (int c = 0; c < len; c += kDoubles, sp += kDoubles, yp += kDoubles) {
      const vd qv = load<vd>(q + c);
      for (int u = 0; u < 4; ++u) {
        const vd v = load<vd>(yp + u * kGramBlock);
        a[u] += load<vd>(sp + u * kGramBlock) * qv;
        b[u] += v * v;
      }
    }
    for (int u = 0; u < 4; ++u) {
      r.first[i + u] += a[u];
      r.yy[i + u] += b[u];
    }
  }
}

SECANT_INLINE void fold(const PanelLanes& v, int k, PanelSums& r) {
  for (int i = 0; i < k; ++i) {
    r.first[i] = hsum(v.first[i]);
    r.yy[i] = hsum(v.yy[i]);
    for (int j = i; j < k; ++j) r.sy[i][j] = hsum(v.sy[i][j]);
  }
}

// Doubles of a block, padded with zeros to two vectors.
template <class T, class S>
SECANT_INLINE int to_padded(const S* x, int len, double* out) {
  to_doubles<T>(x, len, out);
  const int whole = (len + 2 * kDoubles - 1) / (2 * kDoubles) * (2 * kDoubles);
  for (int i = len; i < whole; ++i) out[i] = 0;
  return whole;
}

// One pair: s.q, s.y and y.y straight from the rows.
template <class S>
SECANT_INLINE void single(const S* s, const S* y, const double* q, int len, PanelSums& r) {
  vd a[2][3] = {};
  int i = 0;
  for (; i + 2 * kDoubles <= len; i += 2 * kDoubles) {
    for (int u = 0; u < 2; ++u) {
      const vd sv = load_d(s + i + u * kDoubles), yv = load_d(y + i + u * kDoubles);
      a[u][0] += sv * load<vd>(q + i + u * kDoubles);
      a[u][1] += sv * yv;
      a[u][2] += yv * yv;
    }
  }
  double t0 = 0, t1 = 0, t2 = 0;
  for (; i < len; ++i) {
    const double sv = to_float(s[i]), yv = to_float(y[i]);
    t0 += sv * q[i], t1 += sv * yv, t2 += yv * yv;
  }
  r.first[0] += hsum(a[0][0] + a[1][0]) + t0;
  r.sy[0][0] += hsum(a[0][1] + a[1][1]) + t1;
  r.yy[0] += hsum(a[0][2] + a[1][2]) + t2;
}

// x.q for one row.
template <class S>
SECANT_INLINE double row_dot(const S* x, const double* q, int len) {
  vd a[4] = {};
  int i = 0;
  for (; i + 4 * kDoubles <= len; i += 4 * kDoubles)
    for (int u = 0; u < 4; ++u) a[u] += load_d(x + i + u * kDoubles) * load<vd>(q + i + u * kDoubles);
  double r = hsum((a[0] + a[1]) + (a[2] + a[3]));
  for (; i < len; ++i) r += static_cast<double>(to_float(x[i])) * q[i];
  return r;
}

enum class Dots { kNone, kGram, kRows };

// One pass: v = scale * src + sum coef row, stored to `out` when that changes anything, and the dots of a panel with v.
template <class T, class S>
void panel_pass(const T* src, T scale, const TwoLoopScratch<T, S>& w, T* out, Dots dots, const S* s, int64_t s_row,
                const S* y, int64_t y_row, int k, int64_t begin, int64_t end, bool backwards, PanelSums& r) {
  const int64_t block = dots == Dots::kGram && k > 1 ? kGramBlock : kBlock;
  alignas(64) T acc[kBlock];
  alignas(64) double q[kBlock];
  alignas(64) double sd[kPanel * kGramBlock], yd[kPanel * kGramBlock];
  PanelLanes lanes;
  if (dots == Dots::kGram && k > 1) {
    std::memset(&lanes, 0, sizeof(lanes));
    for (int i = k; i < (k + 3) / 4 * 4; ++i) {
      std::fill(sd + i * kGramBlock, sd + (i + 1) * kGramBlock, 0.0);
      std::fill(yd + i * kGramBlock, yd + (i + 1) * kGramBlock, 0.0);
    }
  }
  const int64_t blocks = (end - begin + block - 1) / block;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = begin + (backwards ? blocks - 1 - b : b) * block;
    const int len = static_cast<int>(std::min<int64_t>(block, end - at));
    for (int i = 0; i < len; ++i) acc[i] = scale * src[at + i];
    combine(w.rows, w.coef, at, acc, len);
    if (out != nullptr) std::copy(acc, acc + len, out + at);
    if (dots == Dots::kNone) continue;
    if (dots == Dots::kRows || k == 1) to_doubles<T>(acc, len, q);
    if (dots == Dots::kRows) {
      for (int i = 0; i < k; ++i) r.first[i] += row_dot(y + i * y_row + at, q, len);
    } else if (k == 1) {
      single(s + at, y + at, q, len, r);
    } else {
      for (int i = 0; i < k; ++i) {
        to_padded<T>(s + i * s_row + at, len, sd + i * kGramBlock);
        to_padded<T>(y + i * y_row + at, len, yd + i * kGramBlock);
      }
      gram(sd, yd, q, k, to_padded<T>(acc, len, q), lanes);
    }
  }
  if (dots == Dots::kGram && k > 1) fold(lanes, k, r);
}

SECANT_INLINE void add(PanelSums& a, const PanelSums& b, int k) {
  for (int i = 0; i < k; ++i) {
    a.first[i] += b.first[i];
    a.yy[i] += b.yy[i];
    for (int j = i; j < k; ++j) a.sy[i][j] += b.sy[i][j];
  }
}

template <class T, class S>
void two_loop_team(const LbfgsTwoLoop& p, int64_t b, int panel, const Team& team, TwoLoopScratch<T, S>& w) {
  const int64_t m = p.m, n = p.n;
  const T* grad = static_cast<const T*>(p.grad) + b * n;
  const S* s = static_cast<const S*>(p.s) + b * p.s_batch;
  const S* y = static_cast<const S*>(p.y) + b * p.y_batch;
  T* out = static_cast<T*>(p.out) + b * n;
  const auto [begin, end] = team.share(n, kBlock);
  const int64_t panels = (m + panel - 1) / panel;
  const bool leader = team.rank == 0;
  PanelSums& mine = w.partial[team.rank];
  if (leader) {
    w.have_gamma = !std::isnan(p.gamma);
    w.gamma = w.have_gamma ? p.gamma : 1;
    w.rows.clear();
    w.coef.clear();
  }
  team.barrier();
  bool backwards = false;
  bool stored = false;  // whether `out` holds the running vector yet
  // Loop 1, newest panel to oldest. Panel c holds the pairs [c * panel, min(m, (c + 1) * panel)).
  for (int64_t c = panels - 1; c >= 0; --c) {
    const int64_t lo = c * panel;
    const int k = static_cast<int>(std::min<int64_t>(panel, m - lo));
    mine.clear(k);
    const bool change = !w.rows.empty();
    panel_pass(stored ? out : grad, stored ? T(1) : T(-1), w, change ? out : nullptr, Dots::kGram, s + lo * p.s_row,
               p.s_row, y + lo * p.y_row, p.y_row, k, begin, end, backwards, mine);
    stored = stored || change;
    backwards = !backwards;
    team.barrier();
    if (leader) {
      for (int r = 1; r < team.size; ++r) add(w.partial[0], w.partial[r], k);
      const PanelSums& r = w.partial[0];
      w.rows.clear();
      w.coef.clear();
      for (int i = k - 1; i >= 0; --i) {
        for (int j = i; j < k; ++j) w.sy[(c * kPanel + i) * kPanel + j] = r.sy[i][j];
        const bool ok = valid(r.sy[i][i], r.yy[i]);
        w.rho[lo + i] = ok ? 1 / r.sy[i][i] : 0;
        w.alpha[lo + i] = 0;
        if (!ok) continue;
        if (!w.have_gamma) w.gamma = r.sy[i][i] / r.yy[i], w.have_gamma = true;
        double x = r.first[i];
        for (int j = i + 1; j < k; ++j)
          if (w.rho[lo + j] != 0) x -= w.alpha[lo + j] * r.sy[i][j];
        w.alpha[lo + i] = x / r.sy[i][i];
        w.rows.push_back(y + (lo + i) * p.y_row);
        w.coef.push_back(static_cast<T>(-w.alpha[lo + i]));
      }
    }
    team.barrier();
  }
  // Loop 2, oldest panel to newest. The first pass still completes q; the scale gamma enters with the second.
  for (int64_t c = 0; c <= panels; ++c) {
    const bool last = c == panels;
    const int64_t lo = c * panel;
    const int k = last ? 0 : static_cast<int>(std::min<int64_t>(panel, m - lo));
    mine.clear(k);
    T scale = c == 1 ? static_cast<T>(w.gamma) : T(1);
    if (!stored) scale = -scale;
    const bool change = !w.rows.empty() || scale != T(1) || last;
    panel_pass(stored ? out : grad, scale, w, change ? out : nullptr, last ? Dots::kNone : Dots::kRows, s, p.s_row,
               y + lo * p.y_row, p.y_row, k, begin, end, backwards, mine);
    stored = stored || change;
    backwards = !backwards;
    team.barrier();
    if (last) break;
    if (leader) {
      for (int r = 1; r < team.size; ++r) add(w.partial[0], w.partial[r], k);
      w.rows.clear();
      w.coef.clear();
      const double unit = c == 0 ? w.gamma : 1;  // y_i.q was taken before the scale
      for (int i = 0; i < k; ++i) {
        w.delta[lo + i] = 0;
        if (w.rho[lo + i] == 0) continue;
        double x = unit * w.partial[0].first[i];
        for (int j = 0; j < i; ++j)
          if (w.rho[lo + j] != 0) x += w.delta[lo + j] * w.sy[(c * kPanel + j) * kPanel + i];
        w.delta[lo + i] = w.alpha[lo + i] - w.rho[lo + i] * x;
        w.rows.push_back(s + (lo + i) * p.s_row);
        w.coef.push_back(static_cast<T>(w.delta[lo + i]));
      }
    }
    team.barrier();
  }
}

template <class T, class S>
void reserve(TwoLoopScratch<T, S>& w, int64_t m, int panel, int threads) {
  const int64_t panels = (m + panel - 1) / panel;
  w.partial.resize(threads);
  w.sy.resize(panels * kPanel * kPanel);
  w.alpha.resize(m), w.rho.resize(m), w.delta.resize(m);
  w.rows.reserve(panel), w.coef.reserve(panel);
}

template <class T, class S>
void two_loop(const LbfgsTwoLoop& a) {
  const int64_t bytes = 2 * a.m * a.n * static_cast<int64_t>(sizeof(S));
  // Measured: a history beyond the caches wants few passes over it; a batch of small ones few passes at all; a single
  // one that the caches hold is fastest without the extra products of a panel.
  const int panel = a.panel > 0 ? std::min(a.panel, kPanel) : a.batch > 1 ? 8 : bytes > (8 << 20) ? kPanel : 1;
  if (a.batch > 1) {
    const int threads = static_cast<int>(std::min<int64_t>(team_size(a.threads, a.batch * bytes), a.batch));
    secant::run_team(threads, [&](const Team& team) {
      TwoLoopScratch<T, S> w;
      reserve(w, a.m, panel, 1);
      const auto [begin, end] = team.share(a.batch, 1);
      for (int64_t b = begin; b < end; ++b) two_loop_team(a, b, panel, Team{0, 1, nullptr}, w);
    });
    return;
  }
  const int threads = team_size(a.threads, bytes);
  TwoLoopScratch<T, S> w;
  reserve(w, a.m, panel, threads);
  secant::run_team(threads, [&](const Team& team) { two_loop_team(a, 0, panel, team, w); });
}

}  // namespace

extern const secant::LbfgsCpu lbfgs;
const secant::LbfgsCpu lbfgs = {
    {{update<float, float>, update<float, double>, update<float, bf16>},
     {update<double, float>, update<double, double>, update<double, bf16>}},
    {{two_loop<float, float>, two_loop<float, double>, two_loop<float, bf16>},
     {two_loop<double, float>, two_loop<double, double>, two_loop<double, bf16>}},
};

}  // namespace SECANT_ISA
