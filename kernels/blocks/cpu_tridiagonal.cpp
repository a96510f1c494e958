// Symmetric eigenproblems of larger blocks, each matrix by itself: Householder reflections to tridiagonal form and
// implicit QL, all in float64. The vectors of the processor hold parts of rows, and threads share the matrices.
//
// A chain of divisions and square roots decides the time of QL: a rotation waits for the one before for longer than it
// takes to turn two rows of eigenvectors, which the processor does meanwhile. It is no longer in float64 than in
// float32, and in float64 blocks of float32 keep what Jacobi gives them, the relative accuracy of small eigenvalues.
#include "cpu_tridiagonal.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <type_traits>

#include "buffer.h"
#include "cpu_lanes.h"
#include "cpu_ops.h"
#include "parallel.h"
#include "simd.h"

namespace SECANT_ISA {
namespace blocks {

using secant::Blocks;

namespace {

using secant::Team;

constexpr int W = kDoubles;
constexpr double kEps = 0x1p-52;
// An off-diagonal entry is none where its square is this much smaller than the product of its neighbours on the
// diagonal, or where it is below the rounding errors of float64. Results of float32 are rounded to 2^-24.
template <class T>
constexpr double kTolerance = sizeof(T) == 8 ? kEps * kEps : 0x1p-80;
// QL iterations for an eigenvalue, as in EISPACK and LAPACK. Two are usual.
constexpr int kIterations = 30;
// Of a block whose largest entry is in [1, 2): squares below this one are no part of it.
constexpr double kNothing = 1e-100;

constexpr int round_up(int n) { return (n + W - 1) / W * W; }

SECANT_INLINE double sum(const vd& x) { return sum_lanes<double>(x); }

class Tridiagonal {
 public:
  // Rows are a vector longer than they need to be: a column then does not fall on few sets of the cache.
  static int64_t doubles(int n) { return 2 * int64_t{n} * stride(n) + 8 * (round_up(n) + W); }

  Tridiagonal(int size, double* memory)
      : n(size), ld(stride(size)), basis(memory), a(basis + int64_t{n} * ld), line(a + int64_t{n} * ld) {}

  // The damped lower triangle of a block: eigenvalues in `values`, vectors in the rows of `basis`, unordered. `code` is
  // 0, -1, or how many off-diagonal entries were left.
  template <class T, class F>
  void run(const T* in, const F& damped) {
    relative = kTolerance<T>;
    read(in, damped);
    reduce();
    accumulate();
    iterate();
    for (int i = 0; i < n; ++i) values()[i] *= unscale;
  }

  double* values() const { return at(0); }
  const double* vector(int k) const { return basis + k * ld; }

  // out = sum over k of f[k] v_k v_k^T, its lower triangle mirrored.
  template <class T>
  void function(const double* f, T* out) {
    for (int k = 0; k < n; ++k) {
      const vd y = splat(f[k]);
      for (int j = 0; j < ld; j += W) store(a + k * ld + j, y * load<vd>(basis + k * ld + j));
    }
    constexpr int R = 4;
    for (int i = 0; i < n; i += R) {
      const int rows = std::min(R, n - i), last = i + rows - 1;
      int j = 0;
      for (; j + W <= last; j += 2 * W) tile<R, 2>(i, rows, j, out);
      if (j <= last) tile<R, 1>(i, rows, j, out);
    }
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < i; ++j) out[j * n + i] = out[i * n + j];
    }
  }

  int code = 0;

 private:
  static int stride(int n) { return round_up(n) + W; }
  double* at(int i) const { return line + i * (round_up(n) + W); }

  // Reads the block as a whole matrix, scaled by a power of two so that its largest entry is in [1, 2).
  template <class T, class F>
  void read(const T* in, const F& damped) {
    double largest = 0;
    bool finite = true;
    for (int i = 0; i < n; ++i) {
      double* const row = a + i * ld;
      for (int j = 0; j < i; ++j) row[j] = static_cast<double>(in[i * n + j]);
      row[i] = static_cast<double>(damped(in[i * n + i]));
      std::fill(row + i + 1, row + ld, 0.0);
      vd most{};
      for (int j = 0; j <= i; j += W) {
        const vd x = absolute<double>(load<vd>(row + j));
        finite &= !any<double>(larger<double>(x, splat(std::numeric_limits<double>::max())));
        most = select<double>(less<double>(most, x), x, most);
      }
      for (int l = 0; l < W; ++l) largest = std::max(largest, most[l]);
    }
    code = finite ? 0 : -1;
    int exponent = 0;
    std::frexp(finite ? largest : 1.0, &exponent);
    exponent = std::min(std::max(exponent - 1, -1021), 1022);
    unscale = std::ldexp(1.0, exponent);
    const vd scale = splat(std::ldexp(1.0, -exponent));
    for (int i = 0; i < n; ++i) {
      double* const row = a + i * ld;
      for (int j = 0; j <= i; j += W) store(row + j, finite ? load<vd>(row + j) * scale : vd{});
    }
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < i; ++j) a[j * ld + i] = a[i * ld + j];
    }
  }

  // A = Q T Q^T, Q = H_(n-1) ... H_2 and H_k = I - beta_k u_k u_k^T of the first k rows; u_k is left in row k of `a`.
  // The rank-2 update that a reflection asks for is done in the pass over the rows that multiplies with the next u.
  void reduce() {
    double *const d = at(0), *const e = at(1), *const beta = at(2), *const v = at(3), *const w = at(4),
                  *const p = at(5);
    for (int j = 0; j < ld; j += W) store(v + j, vd{}), store(w + j, vd{});
    for (int k = n - 1; k > 0; --k) {
      double* const u = a + k * ld;
      for (int j = 0; j <= k; j += W) {
        store(u + j, load<vd>(u + j) - v[k] * load<vd>(w + j) - w[k] * load<vd>(v + j));
      }
      d[k] = u[k];
      const double first = u[k - 1];
      u[k - 1] = 0;
      std::fill(u + k, u + ld, 0.0);
      vd square{};
      for (int j = 0; j < k; j += W) square += load<vd>(u + j) * load<vd>(u + j);
      const double rest = sum(square);
      if (rest <= kNothing) {
        for (int j = 0; j < k; j += W) store(u + j, vd{});
        beta[k] = 0, e[k - 1] = first;
      } else {
        const double length = std::sqrt(first * first + rest), size = std::abs(first);
        e[k - 1] = first < 0 ? length : -length;
        u[k - 1] = first < 0 ? first - length : first + length;
        beta[k] = 1 / (length * (length + size));
      }
      multiply(k, u, v, w, p);
      vd dot{};
      for (int j = 0; j < k; j += W) {
        const vd x = beta[k] * load<vd>(p + j);
        store(p + j, x);
        dot += x * load<vd>(u + j);
      }
      const double half = beta[k] / 2 * sum(dot);
      for (int j = 0; j < k; j += W) {
        const vd y = load<vd>(u + j);
        store(w + j, load<vd>(p + j) - half * y);
        store(v + j, y);
      }
    }
    d[0] = a[0] - 2 * v[0] * w[0];
    e[n - 1] = 0;
  }

  // Rows j < k of A -= v w^T + w v^T, and p = A u.
  void multiply(int k, const double* u, const double* v, const double* w, double* p) {
    int c = 0;
    for (; c + 3 * W < k; c += 4 * W) multiply_part<4>(k, c, u, v, w, p);
    if (c + 2 * W < k)
      multiply_part<3>(k, c, u, v, w, p);
    else if (c + W < k)
      multiply_part<2>(k, c, u, v, w, p);
    else if (c < k)
      multiply_part<1>(k, c, u, v, w, p);
  }
  template <int C>
  void multiply_part(int k, int c, const double* u, const double* v, const double* w, double* p) {
    vd x[C], y[C], z[C];
    unroll<C>([&](auto i)
                  SECANT_LAMBDA { x[i] = load<vd>(v + c + i * W), y[i] = load<vd>(w + c + i * W), z[i] = vd{}; });
    for (int j = 0; j < k; ++j) {
      double* const row = a + j * ld + c;
      const vd vj = splat(v[j]), wj = splat(w[j]), uj = splat(u[j]);
      unroll<C>([&](auto i) SECANT_LAMBDA {
        const vd r = load<vd>(row + i * W) - vj * y[i] - wj * x[i];
        store(row + i * W, r);
        z[i] += uj * r;
      });
    }
    unroll<C>([&](auto i) SECANT_LAMBDA { store(p + c + i * W, z[i]); });
  }

  // Q^T = H_2 ... H_(n-1) in `basis`; before the k-th one its rows below k are those of the identity.
  void accumulate() {
    const double* const beta = at(2);
    for (int i = 0; i < n; ++i) {
      std::fill(basis + i * ld, basis + (i + 1) * ld, 0.0);
      basis[i * ld + i] = 1;
    }
    // Two at a time: M H_k H_(k+1) = M - y u_k^T - z u_(k+1)^T, z = beta_(k+1) (M u_(k+1) - y (u_k . u_(k+1))).
    int k = 2;
    if (n % 2 == 1) {
      for (int i = 0; i < k; ++i) reflect<1>(i, k, beta[k], a + k * ld, 0, a + k * ld);
      ++k;
    }
    for (; k < n; k += 2) {
      int i = 0;
      for (; i + 4 <= k + 1; i += 4) reflect<4>(i, k + 1, beta[k], a + k * ld, beta[k + 1], a + (k + 1) * ld);
      for (; i < k + 1; ++i) reflect<1>(i, k + 1, beta[k], a + k * ld, beta[k + 1], a + (k + 1) * ld);
    }
  }
  template <int R>
  void reflect(int first, int k, double beta, const double* u, double gamma, const double* v) {
    double* const row = basis + first * ld;
    vd s[R], t[R], both{};
    unroll<R>([&](auto r) SECANT_LAMBDA { s[r] = vd{}, t[r] = vd{}; });
    for (int j = 0; j < k; j += W) {
      const vd x = load<vd>(u + j), y = load<vd>(v + j);
      both += x * y;
      unroll<R>([&](auto r) SECANT_LAMBDA {
        const vd z = load<vd>(row + r * ld + j);
        s[r] += z * x, t[r] += z * y;
      });
    }
    const double product = sum(both);
    double y[R], z[R];
    if constexpr (R == 4) {
      sum_lanes_of_four<double>(s[0], s[1], s[2], s[3], y);
      sum_lanes_of_four<double>(t[0], t[1], t[2], t[3], z);
    } else {
      unroll<R>([&](auto r) SECANT_LAMBDA { y[r] = sum(s[r]), z[r] = sum(t[r]); });
    }
    unroll<R>([&](auto r) SECANT_LAMBDA {
      y[r] *= beta;
      s[r] = splat(y[r]), t[r] = splat(gamma * (z[r] - y[r] * product));
    });
    for (int j = 0; j < k; j += W) {
      const vd x = load<vd>(u + j), w = load<vd>(v + j);
      unroll<R>([&](auto r)
                    SECANT_LAMBDA { store(row + r * ld + j, load<vd>(row + r * ld + j) - s[r] * x - t[r] * w); });
    }
  }

  // The first m >= l after which the matrix splits.
  int split(int l, const double* d, const double* e) const {
    for (; l < n - 1; ++l) {
      if (e[l] * e[l] <= relative * std::abs(d[l] * d[l + 1]) + noise) break;
    }
    return l;
  }

  // Implicit QL with Wilkinson's shift (EISPACK's tql2); eigenvalues in d, eigenvectors of A in the rows of `basis`.
  void iterate() {
    double *const d = at(0), *const e = at(1);
    double size = 0;
    for (int i = 0; i < n; ++i) size = std::max(size, std::abs(d[i]) + std::abs(e[i]));
    noise = kEps * kEps * size * size;
    for (int l = 0; l < n; ++l) {
      int count = 0;
      for (int m; (m = split(l, d, e)) > l;) {
        if (count++ == kIterations) {
          if (code == 0) {
            for (int i = 0; i < n - 1; ++i) code += split(i, d, e) > i;
          }
          return;
        }
        m == l + 1 ? rotate(l, d, e) : sweep(l, m, d, e);
      }
    }
  }

  // The rotation that makes the rows l and l + 1 diagonal, where they stand alone.
  void rotate(int l, double* d, double* e) {
    double *const c = at(2), *const s = at(3);
    const double q = (d[l + 1] - d[l]) / (2 * e[l]), t = std::copysign(1 / (std::abs(q) + std::sqrt(q * q + 1)), q);
    c[l] = 1 / std::sqrt(1 + t * t), s[l] = t * c[l];
    d[l] -= t * e[l], d[l + 1] += t * e[l], e[l] = 0;
    turn<1>(l, c, s);
  }

  // One step of QL on rows l to m: rotations of the rows i and i + 1, i = m - 1, ..., l. What the next one waits for is
  // one division: the root is taken beside it.
  void sweep(int l, int m, double* d, double* e) {
    const double q = (d[l + 1] - d[l]) / (2 * e[l]), shift = e[l] / (q + std::copysign(std::sqrt(q * q + 1), q));
    double *const c = at(2), *const s = at(3);
    int last = m;
    double g = d[m] - d[l] + shift, f = e[m - 1], b = f, ff = f * f, high = d[m], p = 0;
    for (int i = m - 1;; --i) {
      const double h = g * g + ff, x = d[i] - high;
      double inverse = 0, root = 0, cosine = 1, sine = 0;
      if (h > kNothing * kNothing) {
        inverse = 1 / h, root = std::sqrt(h);
        const double reciprocal = root * inverse;
        cosine = g * reciprocal, sine = f * reciprocal;
      }
      c[i] = cosine, s[i] = sine;
      if (i < m - 1) e[i + 1] = root;
      const double t = f * x + 2 * g * b;
      p = f * t * inverse;
      d[i + 1] = high + p;
      g = (g * t) * inverse - b;
      if (h <= kNothing * kNothing) g = b;
      if (last - i == 4) last -= 2, turn<2>(last, c, s);
      if (i == l) break;
      const double next = e[i - 1];
      f = sine * next, b = cosine * next, ff = ff * (next * next) * inverse, high = d[i] - p;
    }
    d[l] -= p;
    e[l] = g;
    e[m] = 0;
    for (; last - l >= 2;) last -= 2, turn<2>(last, c, s);
    if (last > l) turn<1>(l, c, s);
  }

  // R rotations of rows of the basis, the last one of the rows i and i + 1.
  template <int R>
  SECANT_INLINE void turn(int i, const double* c, const double* s) {
    double* const row = basis + i * ld;
    vd cosine[R], sine[R];
    unroll<R>([&](auto r) SECANT_LAMBDA { cosine[r] = splat(c[i + r]), sine[r] = splat(s[i + r]); });
    for (int j = 0; j < n; j += 2 * W) {
      vd x[2];
      unroll<2>([&](auto h) SECANT_LAMBDA { x[h] = load<vd>(row + R * ld + j + h * W); });
      unroll<R>([&](auto t) SECANT_LAMBDA {
        constexpr int r = R - 1 - t;
        unroll<2>([&](auto h) SECANT_LAMBDA {
          const vd y = load<vd>(row + r * ld + j + h * W);
          store(row + (r + 1) * ld + j + h * W, sine[r] * y + cosine[r] * x[h]);
          x[h] = cosine[r] * y - sine[r] * x[h];
        });
      });
      unroll<2>([&](auto h) SECANT_LAMBDA { store(row + j + h * W, x[h]); });
    }
  }

  // Rows [i, i + rows) and C vectors of columns from j of sum over k of a_k basis_k^T.
  template <int R, int C, class T>
  void tile(int i, int rows, int j, T* out) {
    vd x[R][C];
    unroll<R>([&](auto r) SECANT_LAMBDA { unroll<C>([&](auto c) SECANT_LAMBDA { x[r][c] = vd{}; }); });
    for (int k = 0; k < n; ++k) {
      const double *const left = a + k * ld + i, *const right = basis + k * ld + j;
      vd y[C];
      unroll<C>([&](auto c) SECANT_LAMBDA { y[c] = load<vd>(right + c * W); });
      unroll<R>([&](auto r) SECANT_LAMBDA {
        const vd f = splat(left[r]);
        unroll<C>([&](auto c) SECANT_LAMBDA { x[r][c] += f * y[c]; });
      });
    }
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < C; ++c) {
        for (int l = 0; l < W; ++l) {
          const int column = j + c * W + l;
          if (column <= i + r) out[(i + r) * n + column] = static_cast<T>(x[r][c][l]);
        }
      }
    }
  }

  const int n, ld;
  double *const basis, *const a, *const line;
  double unscale = 1, relative = 0, noise = 0;  // of squares
};

// work(b, solver) for every block.
template <class F>
void for_blocks(const Blocks& c, const F& work) {
  const double nanoseconds = 12.0 * c.n * c.n + 0.3 * c.n * c.n * c.n;
  const int wanted = c.threads > 0                                          ? c.threads
                     : static_cast<double>(c.batch) * nanoseconds < kSerial ? 1
                                                                            : secant::max_threads();
  const int threads = static_cast<int>(std::min<int64_t>(wanted, c.batch));
  const int64_t each = (Tridiagonal::doubles(c.n) + W - 1) / W;
  const secant::Buffer<vd> memory(threads * each);
  secant::run_team(threads, [&](const Team& team) {
    const auto [begin, end] = team.share(c.batch, 1);
    for (int64_t b = begin; b < end; ++b) {
      Tridiagonal solver(c.n, reinterpret_cast<double*>(memory.get() + team.rank * each));
      work(b, solver);
    }
  });
}

// The diagonal of block b under damping, in the arithmetic of the block.
template <class T>
class Shift {
 public:
  Shift(const Blocks& c, int64_t b)
      : amount(c.shift ? static_cast<const T*>(c.shift)[b] : static_cast<T>(c.shift_value)) {
    if (c.scaled) {
      times = c.shift ? T(1) + amount : static_cast<T>(1 + c.shift_value);
    } else {
      plus = amount;
    }
  }
  T operator()(T x) const { return x * times + plus; }
  const T amount;

 private:
  T times = 1, plus = 0;
};

// Whether a block may be definite and has a diagonal that falls by more than 2^26. Small eigenvalues of such a block
// may be right in every digit, which QL loses: it is Jacobi's (Demmel and Veselic, 1992).
template <class T, class F>
bool graded(const T* a, int n, const F& damped) {
  T least = std::numeric_limits<T>::max(), most = 0;
  for (int i = 0; i < n; ++i) {
    const T d = damped(a[i * n + i]);
    if (!(d > 0)) return false;
    least = std::min(least, d), most = std::max(most, d);
  }
  return most / least > T(1 << 26);
}

// Block b alone.
template <class T>
Blocks only(const Blocks& c, int64_t b) {
  Blocks one = c;
  one.batch = one.threads = 1;
  one.a = static_cast<const T*>(c.a) + b * c.a_batch;
  if (c.b) one.b = static_cast<const T*>(c.b) + b * c.b_batch;
  if (c.shift) one.shift = static_cast<const T*>(c.shift) + b;
  if (c.values) one.values = static_cast<T*>(c.values) + b * c.n;
  one.out = static_cast<T*>(c.out) + b * c.n * c.n;
  one.info = c.info + b;
  return one;
}

}  // namespace

template <class T>
void eigh_tridiagonal(const Blocks& c) {
  const int n = c.n;
  for_blocks(c, [&](int64_t b, Tridiagonal& solver) {
    const auto same = [](T x) { return x; };
    if (graded(static_cast<const T*>(c.a) + b * c.a_batch, n, same)) return eigh<T>(only<T>(c, b));
    solver.run(static_cast<const T*>(c.a) + b * c.a_batch, same);
    T* const values = static_cast<T*>(c.values) + b * n;
    T* const out = static_cast<T*>(c.out) + b * n * n;
    c.info[b] = solver.code;
    if (solver.code < 0) {
      std::fill(values, values + n, std::numeric_limits<T>::quiet_NaN());
      std::fill(out, out + n * n, std::numeric_limits<T>::quiet_NaN());
      return;
    }
    const double* const w = solver.values();
    std::array<int, kLargest> order;
    std::iota(order.begin(), order.begin() + n, 0);
    std::stable_sort(order.begin(), order.begin() + n, [&](int i, int j) { return w[i] < w[j]; });
    for (int k = 0; k < n; ++k) {
      const double* const x = solver.vector(order[k]);
      values[k] = static_cast<T>(w[order[k]]);
      for (int i = 0; i < n; ++i) out[i * n + k] = static_cast<T>(x[i]);
    }
  });
}

template <class T>
void function_tridiagonal(const Blocks& c) {
  const int n = c.n;
  for_blocks(c, [&](int64_t b, Tridiagonal& solver) {
    const Shift<T> shift(c, b);
    const T* const in = static_cast<const T*>(c.a) + b * c.a_batch;
    if (c.root != 0 && !c.clamped && graded(in, n, shift)) return blocks::function<T>(only<T>(c, b));
    if (c.root == 0 || c.clamped) {
      solver.run(in, [](T x) { return x; });
    } else {
      solver.run(in, shift);
    }
    double* const w = solver.values();
    const double amount = static_cast<double>(shift.amount);
    const double plus = c.clamped ? amount * std::max(0.0, *std::max_element(w, w + n)) : 0;
    int count = 0;
    for (int k = 0; k < n; ++k) {
      if (c.root == 0) {
        w[k] = 1 / std::max(std::abs(w[k]), amount);
        continue;
      }
      count += c.clamped ? w[k] < 0 : !(w[k] > 0);
      const double x = c.clamped ? std::max(w[k], 0.0) + plus : w[k];
      w[k] = c.clamped && x == 0 ? 0 : 1 / (c.root == 1 ? x : c.root == 2 ? std::sqrt(x) : std::sqrt(std::sqrt(x)));
    }
    const int code = solver.code == 0 ? count : c.clamped && solver.code > 0 ? kNotConverged : solver.code;
    c.info[b] = code;
    T* const out = static_cast<T*>(c.out) + b * n * n;
    if (c.clamped ? code < 0 : code != 0) {
      std::fill(out, out + n * n, std::numeric_limits<T>::quiet_NaN());
    } else {
      solver.function(w, out);
    }
  });
}

template void eigh_tridiagonal<float>(const Blocks&);
template void eigh_tridiagonal<double>(const Blocks&);
template void function_tridiagonal<float>(const Blocks&);
template void function_tridiagonal<double>(const Blocks&);

}  // namespace blocks
}  // namespace SECANT_ISA
