// SIMD kernels of the `lbfgs` family, compiled once per instruction set. The contract is in reference.py, the counts of
// bytes and the choices behind the blocking are in README.md.
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "parallel.h"
#include "simd.h"

namespace SECANT_ISA {
namespace {

using secant::LbfgsTwoLoop;
using secant::LbfgsUpdate;
using secant::Team;

// Elements per block. A row is read in bursts of one block, long enough for the hardware prefetcher, and the two
// float64 copies of a block that pass 1 keeps (g and y) stay in the first-level cache. For long vectors a processor may
// ask for longer ones (`secant.defaults`).
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

template <class A, class S>
SECANT_INLINE void convert(const S* x, int len, A* out) {
  int i = 0;
  for (; i + kLanes<A> <= len; i += kLanes<A>) store(out + i, load_t<A>(x + i));
  for (; i < len; ++i) out[i] = static_cast<A>(to_float(x[i]));
}

// x.y, accumulated in double.
template <class X, class Y>
SECANT_INLINE double dot(const X* x, const Y* y, int len) {
  vd a[4] = {};
  int i = 0;
  for (; i + 4 * kDoubles <= len; i += 4 * kDoubles)
    for (int u = 0; u < 4; ++u) a[u] += load_d(x + i + u * kDoubles) * load_d(y + i + u * kDoubles);
  double r = sum_lanes<double>((a[0] + a[1]) + (a[2] + a[3]));
  for (; i < len; ++i) r += static_cast<double>(to_float(x[i])) * to_float(y[i]);
  return r;
}

// r += the lanes of a, in double.
template <class A>
SECANT_INLINE void add_lanes(vd& r, const vec<A>& a) {
  for (int h = 0; h < kHalves<A>; ++h) r += half<A>(a, h);
}

// The type that products with a row of the history are computed in, where g and y are held as such: float for a
// bfloat16 history, in runs of kRun elements that are summed in double, else double.
template <class T, class S>
using Product = std::conditional_t<__is_same(T, float) && __is_same(S, bf16), float, double>;
constexpr int kRun = 256;

constexpr int kLine = 64;

// To the second level of cache.
SECANT_INLINE void ask_for_line(const void* p) { __builtin_prefetch(p, 0, 2); }

// Four dots in one walk over four sums of two chains each. kBoth: r[0] += x0.v, r[1] += x1.v, r[2] += x0.w, r[3] +=
// x1.w; else r[i] += xi.v.
// kAsk: the rows that come after these, next[0..3] (kBoth: two), are asked for as these are read.
template <bool kBoth, bool kAsk, class A, class S>
SECANT_INLINE void four_dots(const S* x0, const S* x1, const S* x2, const S* x3, const A* v, const A* w, int len,
                             const S* const* next, double* r) {
  using V = vec<A>;
  constexpr int kStep = 2 * kLanes<A>;
  vd sum[4] = {};
  int i = 0;
  while (i + kLanes<A> <= len) {
    V a[2][4] = {};
    const auto add = [&](int k, V(&to)[4]) __attribute__((always_inline)) {
      const V vv = load<V>(v + k), r0 = load_t<A>(x0 + k), r1 = load_t<A>(x1 + k);
      to[0] += r0 * vv;
      to[1] += r1 * vv;
      if (kBoth) {
        const V wv = load<V>(w + k);
        to[2] += r0 * wv;
        to[3] += r1 * wv;
      } else {
        to[2] += load_t<A>(x2 + k) * vv;
        to[3] += load_t<A>(x3 + k) * vv;
      }
    };
    const int end = __is_same(A, float) ? std::min(len, i + kRun) : len;
    for (; i + kStep <= end; i += kStep) {
      if constexpr (kAsk) {
        for (int row = 0; row < (kBoth ? 2 : 4); ++row) {
          for (int at = 0; at < kStep; at += kLine / static_cast<int>(sizeof(S))) ask_for_line(next[row] + i + at);
        }
      }
      add(i, a[0]);
      add(i + kLanes<A>, a[1]);
    }
    if (i + kLanes<A> <= end) add(i, a[0]), i += kLanes<A>;
    for (int c = 0; c < 4; ++c) add_lanes<A>(sum[c], a[0][c] + a[1][c]);
  }
  double tail[4] = {}, total[4];
  for (; i < len; ++i) {
    const double r0 = to_float(x0[i]), r1 = to_float(x1[i]);
    tail[0] += r0 * v[i], tail[1] += r1 * v[i];
    if (kBoth) {
      tail[2] += r0 * w[i], tail[3] += r1 * w[i];
    } else {
      tail[2] += static_cast<double>(to_float(x2[i])) * v[i], tail[3] += static_cast<double>(to_float(x3[i])) * v[i];
    }
  }
  sum_lanes_of_four<double>(sum[0], sum[1], sum[2], sum[3], total);
  for (int c = 0; c < 4; ++c) r[c] += total[c] + tail[c];
}

// The largest of top and |x_i|; a NaN is passed over.
template <class T>
SECANT_INLINE T largest(const T* x, int len, T top) {
  vec<T> v = splat(top);
  int i = 0;
  for (; i + kLanes<T> <= len; i += kLanes<T>) {
    const vec<T> size = absolute<T>(load<vec<T>>(x + i));
    v = select<T>(less<T>(v, size), size, v);
  }
  for (int k = 0; k < kLanes<T>; ++k) top = std::max(top, v[k]);
  for (; i < len; ++i) top = std::max(top, std::fabs(x[i]));
  return top;
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

// A history of this many bytes may be asked for ahead: it and the current one fit in the second-level cache. The rows
// of one problem of a batch are too short for the hardware to see the next one coming.
constexpr int64_t kPrefetchBytes = 64 * 1024;

SECANT_INLINE void ask_for(const void* p, int64_t bytes) {
  if (p == nullptr) return;
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(static_cast<const char*>(p) + at);
}

bool valid(double sy, double yy) { return std::isfinite(sy) && std::isfinite(yy) && sy > 0; }

// ---------------------------------------------------------------------------------------------------------- update

// What the dot products of pass 1 leave per problem: s_i.g, y_i.g, s_i.y', y_i.y' of every slot, and behind them the
// ones of the new pair s', y' and the gradient.
enum { kSY, kSS, kYY, kSG, kYG, kGG, kGMax, kUnused, kScalars };
// Coefficients: -gamma, the slot of an accepted pair (-1: none), then those of the rows of S and of Y.
enum { kScale, kSlot, kRows };

// From sums to coefficients: d = -gamma g + sum cs_j s_j + cy_j y_j. Returns g.d. `slot` holds a pair that is new,
// whose products with g are sg and yg. Slots follow each other by comparison: a division for the remainder took longer
// than everything else of a short problem.
double solve(int64_t m, int64_t newest, const double* sy, const double* yy, const double* sums, int64_t slot, double sg,
             double yg, double gg, double* coefs, double* alpha) {
  const auto older = [m](int64_t i) { return i == 0 ? m - 1 : i - 1; };
  const auto newer = [m](int64_t i) { return i == m - 1 ? 0 : i + 1; };
  const auto s_dot_g = [&](int64_t i) { return i == slot ? sg : sums[4 * i]; };
  const auto y_dot_g = [&](int64_t i) { return i == slot ? yg : sums[4 * i + 1]; };
  double *cs = coefs + kRows, *cy = cs + m;
  const int64_t oldest = newer(newest);
  double gamma = 1;
  bool first = true;
  std::fill(alpha, alpha + m, 0.0);
  int64_t i = newest;
  for (int64_t a = 0; a < m; ++a, i = older(i)) {
    const double sy_ii = sy[i * m + i];
    if (!valid(sy_ii, yy[i * m + i])) continue;
    if (first) gamma = sy_ii / yy[i * m + i], first = false;
    double x = -s_dot_g(i);
    for (int64_t j = newest; j != i; j = older(j))
      if (alpha[j] != 0) x -= alpha[j] * sy[i * m + j];
    alpha[i] = x / sy_ii;
  }
  double gd = -gamma * gg;
  i = oldest;
  for (int64_t a = 0; a < m; ++a, i = newer(i)) {
    const double sy_ii = sy[i * m + i];
    cs[i] = cy[i] = 0;
    if (!valid(sy_ii, yy[i * m + i])) continue;
    double x = -y_dot_g(i);
    for (int64_t j = 0; j < m; ++j)
      if (alpha[j] != 0) x -= alpha[j] * yy[i * m + j];
    x *= gamma;
    for (int64_t j = oldest; j != i; j = newer(j))
      if (cs[j] != 0) x += cs[j] * sy[j * m + i];
    cs[i] = alpha[i] - x / sy_ii;
    cy[i] = -gamma * alpha[i];
    gd += cs[i] * s_dot_g(i) + cy[i] * y_dot_g(i);
  }
  coefs[kScale] = -gamma;
  return gd;
}

// The new pair over a block, as the ring stores it.
template <class T, class S>
SECANT_INLINE void new_pair(const T* s, const T* y, const T* y_prev, T t, int len, S* s_out, S* y_out) {
  int i = 0;
  if constexpr (__is_same(S, bf16) && __is_same(T, float)) {  // the rounding of the others vectorises by itself
    using V = vec<float>;
    for (; i + kLanes<float> <= len; i += kLanes<float>) {
      store_bf16(s_out + i, t * load<V>(s + i));
      store_bf16(y_out + i, y_prev == nullptr ? load<V>(y + i) : load<V>(y + i) - load<V>(y_prev + i));
    }
  }
  for (int k = i; k < len; ++k) s_out[k] = Round<S>::from(t * s[k]);
  if (y_prev != nullptr) {
    for (int k = i; k < len; ++k) y_out[k] = Round<S>::from(static_cast<T>(y[k] - y_prev[k]));
  } else {
    for (int k = i; k < len; ++k) y_out[k] = Round<S>::from(y[k]);
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
  double *dots, *coefs;
  bool pair, direction;
  int phases, block;
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
        dots(a.dots == nullptr ? nullptr : a.dots + b * (4 * m + kScalars)),
        coefs(a.coefs == nullptr ? nullptr : a.coefs + b * (2 * m + kRows)),
        pair(a.pair),
        direction(a.direction),
        phases(a.phases),
        block(a.block),
        t(static_cast<T>(a.t_ptr != nullptr ? a.t_ptr[b * a.t_stride] : a.t)),
        tol(a.tol) {}

 private:
  const T* at(const void* p, int64_t b) const { return p == nullptr ? nullptr : static_cast<const T*>(p) + b * n; }
};

// What the threads of a team share.
template <class T, class S>
struct UpdateScratch {
  std::vector<double> partial, coefs, alpha;
  std::vector<const S*> rows;  // those with a coefficient
  std::vector<T> coef;
};

// What a thread needs of its own for a block of elements.
template <class T, class S>
struct Lines {
  Product<T, S>*g, *y;
  S *s_new, *y_new;
  T* acc;
  int block;
};

// Memory for longer blocks than the stack has room for.
template <class T, class S>
struct WideLines {
  secant::Buffer<Product<T, S>> products;
  secant::Buffer<S> pair;
  secant::Buffer<T> acc;
  explicit WideLines(int block) : products(2 * block), pair(2 * block), acc(block) {}
  Lines<T, S> lines(int block) const {
    return {products.get(), products.get() + block, pair.get(), pair.get() + block, acc.get(), block};
  }
};

// The rows of `slots` slots after those of j, in this block or, from the first slot on, in the next one. What is asked
// for beyond the end of a row is memory that nobody reads.
template <class S, class T>
SECANT_INLINE void following(const Problem<T, S>& p, int64_t j, int slots, int64_t at, int64_t block, const S** rows) {
  for (int k = 0; k < slots; ++k) {
    const int64_t slot = j + slots + k;
    const bool over = slot >= p.m;
    const int64_t offset = (over ? (slot - p.m) % p.m : slot) * p.n + at + (over ? block : 0);
    rows[2 * k] = p.s_ring + offset, rows[2 * k + 1] = p.y_ring + offset;
  }
}

// A row is read in bursts of a block, and another burst of memory begins with each: where the history is not in the
// cache, the next burst is asked for while this one is read.
template <bool G, bool P, bool kAsk, class T, class S>
void pass1(const Problem<T, S>& p, int64_t begin, int64_t end, const Lines<T, S>& x, double* part) {
  double* scalars = part + 4 * p.m;
  for (int64_t at = begin; at < end; at += x.block) {
    const int len = static_cast<int>(std::min<int64_t>(x.block, end - at));
    if (G) {
      const T* grad = p.grad + at;
      convert(grad, len, x.g);
      scalars[kGMax] = largest(grad, len, static_cast<T>(scalars[kGMax]));
      scalars[kGG] += dot(grad, grad, len);
    }
    if (P) {
      new_pair(p.s + at, p.y + at, p.y_prev != nullptr ? p.y_prev + at : nullptr, p.t, len, x.s_new, x.y_new);
      convert(x.y_new, len, x.y);
      scalars[kSY] += dot(x.s_new, x.y_new, len);
      scalars[kSS] += dot(x.s_new, x.s_new, len);
      scalars[kYY] += dot(x.y_new, x.y_new, len);
      if (G) {
        scalars[kSG] += dot(x.s_new, p.grad + at, len);
        scalars[kYG] += dot(x.y_new, p.grad + at, len);
      }
    }
    for (int64_t j = 0; j < p.m; j += G && P ? 1 : 2) {
      const S *s_row = p.s_ring + j * p.n + at, *y_row = p.y_ring + j * p.n + at;
      const S* next[4];
      if constexpr (kAsk) following(p, j, G && P ? 1 : 2, at, x.block, next);
      double* r = part + 4 * j;
      if (G && P) {
        four_dots<true, kAsk>(s_row, y_row, s_row, y_row, x.g, x.y, len, next, r);
        continue;
      }
      const int64_t second = j + 1 < p.m ? p.n : 0;
      double sums[4] = {};
      four_dots<false, kAsk>(s_row, y_row, s_row + second, y_row + second, G ? x.g : x.y, x.y, len, next, sums);
      r[G ? 0 : 2] += sums[0], r[G ? 1 : 3] += sums[1];
      if (second != 0) r[G ? 4 : 6] += sums[2], r[G ? 5 : 7] += sums[3];
    }
  }
}

// The sums of all threads, in the place of the first.
inline void reduce(double* sums, int64_t m, int threads) {
  const int64_t width = 4 * m + kScalars;
  for (int r = 1; r < threads; ++r) {
    const double* other = sums + r * width;
    for (int64_t k = 0; k < width; ++k) {
      if (k == 4 * m + kGMax) {
        sums[k] = std::max(sums[k], other[k]);
      } else {
        sums[k] += other[k];
      }
    }
  }
  if (std::isnan(sums[4 * m + kGG])) sums[4 * m + kGMax] = sums[4 * m + kGG];
}

// Gate, Gram matrices, counters, statistics and coefficients of a problem, from its sums.
template <class T, class S>
void settle(const Problem<T, S>& p, const double* sums, double* coefs, double* alpha) {
  const int64_t m = p.m;
  const double* sc = sums + 4 * m;
  std::fill(p.stats, p.stats + 8, 0.0);
  coefs[kSlot] = -1;
  int64_t slot = -1;
  if (p.pair) {
    const double norms = std::sqrt(sc[kSS]) * std::sqrt(sc[kYY]);
    const bool finite = std::isfinite(sc[kSY]) && std::isfinite(sc[kSS]) && std::isfinite(sc[kYY]);
    p.stats[3] = sc[kSY], p.stats[4] = std::sqrt(sc[kSS]), p.stats[5] = std::sqrt(sc[kYY]);
    if (finite && sc[kSY] > p.tol * norms) {
      slot = *p.head;
      coefs[kSlot] = static_cast<double>(slot);
      p.stats[6] = 1;
      for (int64_t j = 0; j < m; ++j) {
        p.sy[slot * m + j] = 0;
        p.sy[j * m + slot] = sums[4 * j + 2];
        p.yy[slot * m + j] = p.yy[j * m + slot] = sums[4 * j + 3];
      }
      p.sy[slot * m + slot] = sc[kSY];
      p.yy[slot * m + slot] = sc[kYY];
      *p.head = static_cast<int32_t>((slot + 1) % m);
      *p.count = static_cast<int32_t>(std::min<int64_t>(*p.count + 1, m));
    }
  }
  if (!p.direction) return;
  const int64_t newest = (*p.head + m - 1) % m;
  const double gd = solve(m, newest, p.sy, p.yy, sums, slot, sc[kSG], sc[kYG], sc[kGG], coefs, alpha);
  p.stats[0] = gd, p.stats[1] = std::sqrt(sc[kGG]), p.stats[2] = sc[kGMax], p.stats[7] = -coefs[kScale];
}

// The rows that a direction is made of.
template <class T, class S>
void list_rows(const Problem<T, S>& p, const double* coefs, UpdateScratch<T, S>& w) {
  w.rows.clear();
  w.coef.clear();
  if (!p.direction) return;
  for (int64_t j = 0; j < p.m; ++j) {
    for (int which = 0; which < 2; ++which) {
      const double c = coefs[kRows + which * p.m + j];
      if (c == 0) continue;
      w.rows.push_back((which == 0 ? p.s_ring : p.y_ring) + j * p.n);
      w.coef.push_back(static_cast<T>(c));
    }
  }
}

// Backwards, so that what pass 1 left in the cache is used first. The accepted pair is written here, not in pass 1:
// until the gate has spoken the slot still holds a pair that a rejection must keep.
template <class T, class S>
void pass2(const Problem<T, S>& p, int64_t begin, int64_t end, const Lines<T, S>& x, const double* coefs,
           const UpdateScratch<T, S>& w) {
  T* const acc = x.acc;
  const int64_t blocks = (end - begin + x.block - 1) / x.block;
  const T scale = static_cast<T>(coefs[kScale]);
  const int64_t slot = static_cast<int64_t>(coefs[kSlot]);
  for (int64_t b = blocks - 1; b >= 0; --b) {
    const int64_t at = begin + b * x.block;
    const int len = static_cast<int>(std::min<int64_t>(x.block, end - at));
    if (slot >= 0) {
      new_pair(p.s + at, p.y + at, p.y_prev != nullptr ? p.y_prev + at : nullptr, p.t, len, p.s_ring + slot * p.n + at,
               p.y_ring + slot * p.n + at);
    }
    if (p.direction) {
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
  w.coefs.resize(2 * m + kRows), w.alpha.resize(m);
  w.rows.reserve(2 * m), w.coef.reserve(2 * m);
}

// Histories of more bytes than this, a thread, are asked for ahead: less stays in the second level of cache by itself.
constexpr int64_t kAskBytes = 1 << 20;

template <bool kAsk, class T, class S>
void first_pass(const Problem<T, S>& p, int64_t begin, int64_t end, const Lines<T, S>& x, double* part) {
  if (!p.pair) {
    pass1<true, false, kAsk>(p, begin, end, x, part);
  } else if (p.grad == nullptr) {
    pass1<false, true, kAsk>(p, begin, end, x, part);
  } else {
    pass1<true, true, kAsk>(p, begin, end, x, part);
  }
}

template <class T, class S>
void update_team(const Problem<T, S>& p, const Team& team, UpdateScratch<T, S>& w) {
  const auto [begin, end] = team.share(p.n, kBlock);
  const int64_t width = 4 * p.m + kScalars;
  alignas(64) Product<T, S> g[kBlock], y[kBlock];
  alignas(64) T acc[kBlock];
  alignas(64) S s_new[kBlock], y_new[kBlock];
  Lines<T, S> x{g, y, s_new, y_new, acc, kBlock};
  const int wide = p.block > kBlock && end - begin >= 16 * p.block ? p.block : 0;
  std::optional<WideLines<T, S>> memory;
  if (wide > 0) x = memory.emplace(wide).lines(wide);
  if (p.phases & secant::kDots) {
    double* part = w.partial.data() + team.rank * width;
    std::fill(part, part + width, 0.0);
    if (2 * p.m * (end - begin) * static_cast<int64_t>(sizeof(S)) > kAskBytes) {
      first_pass<true>(p, begin, end, x, part);
    } else {
      first_pass<false>(p, begin, end, x, part);
    }
    team.barrier();
  }
  double* coefs = p.coefs != nullptr ? p.coefs : w.coefs.data();
  if (team.rank == 0) {
    if (p.phases & secant::kDots) {
      reduce(w.partial.data(), p.m, team.size);
      if (p.dots != nullptr) std::copy_n(w.partial.data(), width, p.dots);
    }
    const double* sums = p.dots != nullptr ? p.dots : w.partial.data();
    if (p.phases & secant::kSolve) settle(p, sums, coefs, w.alpha.data());
    if (p.phases & secant::kCombine) list_rows(p, coefs, w);
  }
  if (!(p.phases & secant::kCombine)) return;
  team.barrier();
  pass2(p, begin, end, x, coefs, w);
}

// Asks for what a problem will read and write.
template <class T, class S>
SECANT_INLINE void prefetch(const Problem<T, S>& p, bool grams) {
  const int64_t ring = p.m * p.n * static_cast<int64_t>(sizeof(S)), vector = p.n * static_cast<int64_t>(sizeof(T));
  const int64_t gram = p.m * p.m * static_cast<int64_t>(sizeof(double));
  for (const T* x : {p.grad, p.s, p.y, p.y_prev, static_cast<const T*>(p.out)}) ask_for(x, vector);
  for (const S* x : {p.s_ring, p.y_ring}) ask_for(x, ring);
  if (!grams) return;
  for (const double* x : {p.sy, p.yy}) ask_for(x, gram);
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

// The type that the products of a panel are computed in: float where the history and the vectors have no more digits.
// Runs of kGramBlock / kLanes<float> products are summed in it, and the runs in double; the bound is in README.md.
template <class T, class S>
using Panel = std::conditional_t<sizeof(T) == 4 && sizeof(S) <= 4, float, double>;

// The same sums, one vector each: a block adds to them, and only the end of a pass folds the lanes.
struct PanelLanes {
  vd first[kPanel], sy[kPanel][kPanel], yy[kPanel], unused[kPanel];
};

template <class A>
struct PanelRows {
  const A *s[kPanel], *y[kPanel];
};

// s_i.y_j (i <= j) over `len` elements, a multiple of the lanes. A tile of 4 x 2 needs 6 loads for 8
// products. What a tile computes beyond the triangle, or with a repeated row, is never read.
template <class A>
SECANT_INLINE void gram(const PanelRows<A>& rows, int k, int len, PanelLanes& r) {
  using V = vec<A>;
  for (int j = 0; j < k; j += 2) {
    const A *y0 = rows.y[j], *y1 = rows.y[j + 1];
    for (int i = 0; i <= j + 1 && i < k; i += 4) {
      const A *s0 = rows.s[i], *s1 = rows.s[i + 1], *s2 = rows.s[i + 2], *s3 = rows.s[i + 3];
      V a[4][2] = {};
      for (int c = 0; c < len; c += kLanes<A>) {
        const V v0 = load<V>(y0 + c), v1 = load<V>(y1 + c);
        const V x0 = load<V>(s0 + c), x1 = load<V>(s1 + c), x2 = load<V>(s2 + c), x3 = load<V>(s3 + c);
        a[0][0] += x0 * v0, a[0][1] += x0 * v1;
        a[1][0] += x1 * v0, a[1][1] += x1 * v1;
        a[2][0] += x2 * v0, a[2][1] += x2 * v1;
        a[3][0] += x3 * v0, a[3][1] += x3 * v1;
      }
      for (int u = 0; u < 4; ++u) {
        add_lanes<A>(r.sy[i + u][j], a[u][0]);
        add_lanes<A>(r.sy[i + u][j + 1], a[u][1]);
      }
    }
  }
}

// x_i.q, and x_i.x_i when asked.
template <bool kNorms, class A>
SECANT_INLINE void row_dots(const A* const* x, const A* q, int k, int len, vd* dots, vd* norms) {
  using V = vec<A>;
  for (int i = 0; i < k; i += 4) {
    const A *x0 = x[i], *x1 = x[i + 1], *x2 = x[i + 2], *x3 = x[i + 3];
    V a[4] = {}, b[4] = {};
    for (int c = 0; c < len; c += kLanes<A>) {
      const V qv = load<V>(q + c);
      const V v0 = load<V>(x0 + c), v1 = load<V>(x1 + c), v2 = load<V>(x2 + c), v3 = load<V>(x3 + c);
      a[0] += v0 * qv, a[1] += v1 * qv, a[2] += v2 * qv, a[3] += v3 * qv;
      if (kNorms) b[0] += v0 * v0, b[1] += v1 * v1, b[2] += v2 * v2, b[3] += v3 * v3;
    }
    for (int u = 0; u < 4; ++u) {
      add_lanes<A>(dots[i + u], a[u]);
      if (kNorms) add_lanes<A>(norms[i + u], b[u]);
    }
  }
}

SECANT_INLINE void fold(const PanelLanes& v, int k, PanelSums& r) {
  for (int i = 0; i < k; ++i) {
    r.first[i] = sum_lanes<double>(v.first[i]);
    r.yy[i] = sum_lanes<double>(v.yy[i]);
    for (int j = i; j < k; ++j) r.sy[i][j] = sum_lanes<double>(v.sy[i][j]);
  }
}

// A block as A, padded with zeros to whole vectors.
template <class A, class S>
SECANT_INLINE int to_padded(const S* x, int len, A* out) {
  convert(x, len, out);
  const int whole = (len + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  std::fill(out + len, out + whole, A(0));
  return whole;
}

// Where the rows of a block start as A: in the history itself where that holds whole vectors of A, else converted into
// `buffer`. Rows beyond the last repeat it, so that tiles are whole.
template <class A, class S>
SECANT_INLINE void stage(const S* x, int64_t stride, int k, int len, A* buffer, const A** rows) {
  const bool in_place = __is_same(A, S) && len % kLanes<A> == 0;
  for (int i = 0; i < k; ++i) {
    if (in_place) {
      rows[i] = reinterpret_cast<const A*>(x + i * stride);
    } else {
      rows[i] = buffer + i * kGramBlock;
      to_padded<A>(x + i * stride, len, buffer + i * kGramBlock);
    }
  }
  for (int i = k; i < (k + 3) / 4 * 4; ++i) rows[i] = rows[k - 1];
}

enum class Dots { kNone, kGram, kRows };

// A pass for one pair, in registers: v = scale src + c x, stored to `out`, and its dots with the pair: s.v, s.y and y.y
// (kGram) or y.v (kRows), accumulated in double.
template <Dots kDots, bool kNorms, bool kRow, bool kStore, class T, class S>
SECANT_INLINE void single(const T* src, T scale, T c, const S* x, T* out, const S* s, const S* y, int64_t begin,
                          int64_t end, PanelSums& r) {
  using V = vec<T>;
  const V sv = splat(scale), cv = splat(c);
  vd a[2][kHalves<T>][3] = {};
  int64_t i = begin;
  const auto step = [&](int64_t at, vd(&sum)[kHalves<T>][3]) __attribute__((always_inline)) {
    V v = sv * load<V>(src + at);
    if (kRow) v += cv * load_t<T>(x + at);
    if (kStore) store(out + at, v);
    if (kDots == Dots::kNone) return;
    for (int h = 0; h < kHalves<T>; ++h) {
      const vd vh = half<T>(v, h), yh = load_d(y + at + h * kDoubles);
      if (kDots == Dots::kRows) {
        sum[h][0] += yh * vh;
      } else {
        const vd sh = load_d(s + at + h * kDoubles);
        sum[h][0] += sh * vh;
        sum[h][1] += sh * yh;
        if (kNorms) sum[h][2] += yh * yh;
      }
    }
  };
  for (; i + 2 * kLanes<T> <= end; i += 2 * kLanes<T>) {
    step(i, a[0]);
    step(i + kLanes<T>, a[1]);
  }
  if (i + kLanes<T> <= end) step(i, a[0]), i += kLanes<T>;
  double t[3] = {};
  for (; i < end; ++i) {
    T v = scale * src[i];
    if (kRow) v += c * static_cast<T>(to_float(x[i]));
    if (kStore) out[i] = v;
    if (kDots == Dots::kNone) continue;
    const double yi = to_float(y[i]);
    if (kDots == Dots::kRows) {
      t[0] += yi * v;
    } else {
      const double si = to_float(s[i]);
      t[0] += si * v, t[1] += si * yi, t[2] += yi * yi;
    }
  }
  const auto total = [&](int which) {
    vd sum = a[0][0][which] + a[1][0][which];
    for (int h = 1; h < kHalves<T>; ++h) sum += a[0][h][which] + a[1][h][which];
    return sum_lanes<double>(sum) + t[which];
  };
  if (kDots != Dots::kNone) r.first[0] = total(0);
  if (kDots == Dots::kGram) r.sy[0][0] = total(1);
  if (kDots == Dots::kGram && kNorms) r.yy[0] = total(2);
}

// One pass: v = scale * src + sum coef row, stored to `out` when that changes anything, and the dots of a panel with v.
// `norms` asks for y_i.y_i too.
template <class T, class S>
void panel_pass(const T* src, T scale, const TwoLoopScratch<T, S>& w, T* out, Dots dots, bool norms, const S* s,
                int64_t s_row, const S* y, int64_t y_row, int k, int64_t begin, int64_t end, bool backwards,
                PanelSums& r) {
  using A = Panel<T, S>;
  alignas(64) T acc[kBlock];
  alignas(64) A sa[kPanel * kGramBlock], ya[kPanel * kGramBlock], q[kGramBlock];
  PanelLanes lanes;
  std::memset(&lanes, 0, sizeof(lanes));
  const int64_t block = dots == Dots::kNone ? kBlock : kGramBlock;
  const int64_t blocks = (end - begin + block - 1) / block;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = begin + (backwards ? blocks - 1 - b : b) * block;
    const int len = static_cast<int>(std::min<int64_t>(block, end - at));
    for (int i = 0; i < len; ++i) acc[i] = scale * src[at + i];
    combine(w.rows, w.coef, at, acc, len);
    if (out != nullptr) std::copy(acc, acc + len, out + at);
    if (dots == Dots::kNone) continue;
    PanelRows<A> rows;
    stage<A>(y + at, y_row, k, len, ya, rows.y);
    if (dots == Dots::kRows) {
      row_dots<false>(rows.y, q, k, to_padded<A>(acc, len, q), lanes.first, lanes.yy);
      continue;
    }
    stage<A>(s + at, s_row, k, len, sa, rows.s);
    const int whole = to_padded<A>(acc, len, q);
    gram(rows, k, whole, lanes);
    row_dots<false>(rows.s, q, k, whole, lanes.first, lanes.yy);
    if (norms) row_dots<true>(rows.y, q, k, whole, lanes.unused, lanes.yy);
  }
  fold(lanes, k, r);
}

// The same for a panel of one pair.
template <class T, class S>
void single_pass(const T* src, T scale, const TwoLoopScratch<T, S>& w, T* out, Dots dots, bool norms, const S* s,
                 const S* y, int64_t begin, int64_t end, PanelSums& r) {
  const bool row = !w.rows.empty();
  const T c = row ? w.coef[0] : T(0);
  const S* x = row ? w.rows[0] : nullptr;
  const auto run = [&](auto kind, auto norm) __attribute__((always_inline)) {
    if (row) {
      single<decltype(kind)::value, decltype(norm)::value, true, true>(src, scale, c, x, out, s, y, begin, end, r);
    } else if (out != nullptr) {
      single<decltype(kind)::value, decltype(norm)::value, false, true>(src, scale, c, x, out, s, y, begin, end, r);
    } else {
      single<decltype(kind)::value, decltype(norm)::value, false, false>(src, scale, c, x, out, s, y, begin, end, r);
    }
  };
  using std::integral_constant;
  if (dots == Dots::kNone) {
    run(integral_constant<Dots, Dots::kNone>{}, std::false_type{});
  } else if (dots == Dots::kRows) {
    run(integral_constant<Dots, Dots::kRows>{}, std::false_type{});
  } else if (norms) {
    run(integral_constant<Dots, Dots::kGram>{}, std::true_type{});
  } else {
    run(integral_constant<Dots, Dots::kGram>{}, std::false_type{});
  }
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
    // y.y is for gamma, and in double it may overflow where s.y does not; in float a finite s.y says that y is finite.
    const bool norms = !w.have_gamma || sizeof(S) == 8;
    const T* src = stored ? out : grad;
    const T sign = stored ? T(1) : T(-1);
    const S *s_lo = s + lo * p.s_row, *y_lo = y + lo * p.y_row;
    if (panel == 1) {
      single_pass(src, sign, w, change ? out : nullptr, Dots::kGram, norms, s_lo, y_lo, begin, end, mine);
    } else {
      panel_pass(src, sign, w, change ? out : nullptr, Dots::kGram, norms, s_lo, p.s_row, y_lo, p.y_row, k, begin, end,
                 backwards, mine);
    }
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
    const T* src = stored ? out : grad;
    const Dots dots = last ? Dots::kNone : Dots::kRows;
    const S* y_lo = y + lo * p.y_row;
    if (panel == 1) {
      single_pass(src, scale, w, change ? out : nullptr, dots, false, s, y_lo, begin, end, mine);
    } else {
      panel_pass(src, scale, w, change ? out : nullptr, dots, false, s, p.s_row, y_lo, p.y_row, k, begin, end,
                 backwards, mine);
    }
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

// The recursion for one problem on one thread with the running vector q in double: for the short ones, where the steps
// between the passes cost as much as the passes.
constexpr int64_t kShort = 2048;
struct ShortScratch {
  alignas(64) double q[kShort];
  std::vector<double> alpha, rho;
};

// q = scale q + c x (x null: no row), and the dots of `single` with it.
template <Dots kDots, bool kNorms, class S>
SECANT_INLINE void short_pass(double* q, double scale, double c, const S* x, const S* s, const S* y, int64_t n,
                              PanelSums& r) {
  if (x != nullptr) {
    single<kDots, kNorms, true, true>(q, scale, c, x, q, s, y, 0, n, r);
  } else {
    single<kDots, kNorms, false, true>(q, scale, c, x, q, s, y, 0, n, r);
  }
}

// Asks for what a problem will read.
template <class T, class S>
SECANT_INLINE void prefetch(const LbfgsTwoLoop& p, int64_t b) {
  const int64_t row = p.n * static_cast<int64_t>(sizeof(S));
  for (int64_t i = 0; i < p.m; ++i) {
    ask_for(static_cast<const S*>(p.s) + b * p.s_batch + i * p.s_row, row);
    ask_for(static_cast<const S*>(p.y) + b * p.y_batch + i * p.y_row, row);
  }
  ask_for(static_cast<const T*>(p.grad) + b * p.n, p.n * static_cast<int64_t>(sizeof(T)));
}

// The recursion on w.q, which holds g on entry and d on return; row(i) gives the i-th pair, oldest first. Returns
// gamma.
template <class S, class Row>
double short_recursion(int64_t m, int64_t n, double given, const Row& row, ShortScratch& w) {
  bool have_gamma = !std::isnan(given);
  double gamma = have_gamma ? given : 1;
  double scale = -1, c = 0;  // what the next pass does to q: q = scale q + c x
  const S* x = nullptr;
  PanelSums r;
  for (int64_t i = m - 1; i >= 0; --i) {  // newest to oldest
    const auto [si, yi] = row(i);
    r.yy[0] = 0;
    if (have_gamma && sizeof(S) < 8) {
      short_pass<Dots::kGram, false>(w.q, scale, c, x, si, yi, n, r);
    } else {
      short_pass<Dots::kGram, true>(w.q, scale, c, x, si, yi, n, r);
    }
    scale = 1, x = nullptr;
    const bool ok = valid(r.sy[0][0], r.yy[0]);
    w.rho[i] = ok ? 1 / r.sy[0][0] : 0;
    if (!ok) continue;
    if (!have_gamma) gamma = r.sy[0][0] / r.yy[0], have_gamma = true;
    w.alpha[i] = w.rho[i] * r.first[0];
    c = -w.alpha[i], x = yi;
  }
  scale *= gamma, c *= gamma;
  for (int64_t i = 0; i < m; ++i) {  // oldest to newest
    if (w.rho[i] == 0) continue;
    const auto [si, yi] = row(i);
    short_pass<Dots::kRows, false>(w.q, scale, c, x, si, yi, n, r);
    scale = 1, c = w.alpha[i] - w.rho[i] * r.first[0], x = si;
  }
  short_pass<Dots::kNone, false, S>(w.q, scale, c, x, nullptr, nullptr, n, r);
  return gamma;
}

template <class T, class S>
void two_loop_short(const LbfgsTwoLoop& p, int64_t b, ShortScratch& w) {
  const S* s = static_cast<const S*>(p.s) + b * p.s_batch;
  const S* y = static_cast<const S*>(p.y) + b * p.y_batch;
  T* out = static_cast<T*>(p.out) + b * p.n;
  convert(static_cast<const T*>(p.grad) + b * p.n, static_cast<int>(p.n), w.q);
  const auto row = [&](int64_t i) { return std::pair(s + i * p.s_row, y + i * p.y_row); };
  short_recursion<S>(p.m, p.n, p.gamma, row, w);
  for (int64_t i = 0; i < p.n; ++i) out[i] = static_cast<T>(w.q[i]);
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
  const int threads = team_size(a.threads, a.batch * bytes);
  const bool is_short = a.panel == 0 && a.n <= kShort;
  // Where memory is slow for what the processor computes, a history beyond the caches wants few passes over it; else it
  // is fastest without the extra products of a panel. `secant.defaults` says where.
  const int panel = a.panel > 0 ? std::min(a.panel, kPanel) : bytes > a.panel_bytes ? kPanel : 1;
  if (a.batch > 1 || (is_short && threads == 1)) {
    secant::run_team(static_cast<int>(std::min<int64_t>(threads, a.batch)), [&](const Team& team) {
      const auto [begin, end] = team.share(a.batch, 1);
      if (is_short) {
        ShortScratch w;
        w.alpha.resize(a.m), w.rho.resize(a.m);
        for (int64_t b = begin; b < end; ++b) {
          if (bytes <= kPrefetchBytes && b + 1 < end) prefetch<T, S>(a, b + 1);
          two_loop_short<T, S>(a, b, w);
        }
        return;
      }
      TwoLoopScratch<T, S> w;
      reserve(w, a.m, panel, 1);
      for (int64_t b = begin; b < end; ++b) two_loop_team(a, b, panel, Team{0, 1, nullptr}, w);
    });
    return;
  }
  TwoLoopScratch<T, S> w;
  reserve(w, a.m, panel, threads);
  secant::run_team(threads, [&](const Team& team) { two_loop_team(a, 0, panel, team, w); });
}

// ------------------------------------------------------------------------------------------------ update, launched

// A direction alone, of a history so short that the recursion over coefficients would take longer than two passes over
// the rows in the cache: the recursion on the ring itself, which needs no Gram matrix.
constexpr int64_t kShortDirection = 256;

template <class T, class S>
void direction_short(const Problem<T, S>& p, ShortScratch& w) {
  const int len = static_cast<int>(p.n);
  convert(p.grad, len, w.q);
  const double gg = dot(p.grad, p.grad, len);
  const double top = std::isnan(gg) ? gg : static_cast<double>(largest(p.grad, len, T(0)));
  const int64_t oldest = *p.head;
  const auto row = [&](int64_t i) {
    const int64_t k = oldest + i < p.m ? oldest + i : oldest + i - p.m;
    return std::pair<const S*, const S*>(p.s_ring + k * p.n, p.y_ring + k * p.n);
  };
  const double gamma = short_recursion<S>(p.m, p.n, std::numeric_limits<double>::quiet_NaN(), row, w);
  std::fill(p.stats, p.stats + 8, 0.0);
  p.stats[0] = dot(p.grad, w.q, len), p.stats[1] = std::sqrt(gg), p.stats[2] = top, p.stats[7] = gamma;
  if (p.prev_out != nullptr) std::copy(p.grad, p.grad + len, p.prev_out);
  for (int i = 0; i < len; ++i) p.out[i] = static_cast<T>(w.q[i]);
}

template <class T, class S>
void update(const LbfgsUpdate& a) {
  const int64_t bytes = 2 * a.m * a.n * static_cast<int64_t>(sizeof(S));
  if (!a.pair && a.phases == secant::kAllPhases && a.n <= kShortDirection && bytes < kSerialBytes) {
    const int threads = static_cast<int>(std::min<int64_t>(team_size(a.threads, a.batch * bytes), a.batch));
    secant::run_team(threads, [&](const Team& team) {
      ShortScratch w;
      w.alpha.resize(a.m), w.rho.resize(a.m);
      const auto [begin, end] = team.share(a.batch, 1);
      for (int64_t b = begin; b < end; ++b) {
        if (bytes <= kPrefetchBytes && b + 1 < end) prefetch(Problem<T, S>(a, b + 1), false);
        direction_short(Problem<T, S>(a, b), w);
      }
    });
    return;
  }
  if (a.batch > 1) {
    const int threads = static_cast<int>(std::min<int64_t>(team_size(a.threads, a.batch * bytes), a.batch));
    secant::run_team(threads, [&](const Team& team) {
      UpdateScratch<T, S> w;
      reserve(w, a.m, 1);
      const auto [begin, end] = team.share(a.batch, 1);
      for (int64_t b = begin; b < end; ++b) {
        if (bytes <= kPrefetchBytes && b + 1 < end) prefetch(Problem<T, S>(a, b + 1), true);
        update_team(Problem<T, S>(a, b), Team{0, 1, nullptr}, w);
      }
    });
    return;
  }
  const int threads = team_size(a.threads, bytes);
  UpdateScratch<T, S> w;
  reserve(w, a.m, threads);
  const Problem<T, S> p(a, 0);
  secant::run_team(threads, [&](const Team& team) { update_team(p, team, w); });
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
