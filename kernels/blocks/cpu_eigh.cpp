// Symmetric eigenproblems by Jacobi rotations, and the matrix functions made of them.
//
// Rotations come in odd-even order: a stage rotates the neighbours (0, 1), (2, 3), ... and the next one (1, 2), (3, 4),
// ..., and every rotation also exchanges its two indices, so that n stages meet every pair once and leave the order
// reversed. The rotations of a stage touch different rows and columns: their angles are computed side by side, and each
// 2 x 2 block of the matrix is loaded once for the two rotations that change it. The exchange is the same in all lanes
// and costs nothing. A lane whose pairs are all below the tolerance is rotated by zero, that is only permuted.
#include <array>
#include <numeric>

#include "cpu_columns.h"
#include "cpu_ops.h"
#include "cpu_tile.h"
#include "cpu_tridiagonal.h"

namespace SECANT_ISA {
namespace blocks {
namespace {

// As EISPACK and LAPACK allow QL iterations per eigenvalue. Convergence is quadratic: 6 to 10 sweeps are usual.
constexpr int kSweeps = 30;

template <class T>
struct Rotation {
  vec<T> c, s;
};

// Rows p and q of a matrix whose columns they rotate: p' = c p - s q goes to where q was, q' = s p + c q to p.
template <class T>
SECANT_INLINE void rotate(const Rotation<T>& r, vec<T>& p, vec<T>& q) {
  const vec<T> x = p, y = q;
  p = r.s * x + r.c * y;
  q = r.c * x - r.s * y;
}

template <class T>
class Jacobi {
  using V = vec<T>;

 public:
  // Packed lower triangle, transposed eigenvectors, rotations of a stage, multipliers of `function`; of a given basis,
  // the triangle and a row before it is rotated.
  static int64_t vectors(int n) { return triangle(n) + 1 + n * n + n + 1 + kPanel * n + triangle(n) + n + 1; }

  Jacobi(int size, V* memory)
      : n(size),
        a(memory),
        v(a + triangle(n) + 1),
        multipliers(v + n * n + n + 1),
        spare(multipliers + kPanel * n),
        rotations(reinterpret_cast<Rotation<T>*>(v + n * n)) {}

  // One group. On return row position(k) of vectors and of the diagonal belongs to the same k however many sweeps the
  // group took. `code` is 0, -1, or the number of entries left above the tolerance.
  // `given` are earlier eigenvectors, in columns, or null: in their basis the block is nearly diagonal.
  void run(const Plan<T>& plan, const T* const* in, const Damping<T>& damped, const T* const* given = nullptr) {
    interleave<T>(plan, in, a);
    for (int i = 0; i < n; ++i) a[lower(i, i)] = damped(a[lower(i, i)]);
    normalise();
    if (given) {
      begin(given);
    } else {
      for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j) v[i * n + j] = splat(T(i == j));
      }
    }
    bool turning = n > 1;
    for (int sweep = 0; turning && sweep < kSweeps; ++sweep) {
      mask<T> turned = less<T>(V{}, V{});
      for (int stage = 0; stage < n; ++stage) turned |= this->stage(stage & 1);
      turning = any<T>(turned);
      reversed = !reversed;
    }
    if (turning) count_remaining();
  }

  int position(int k) const { return reversed ? n - 1 - k : k; }
  V value(int k) const { return a[lower(position(k), position(k))] * unscale; }
  const V* vector(int k) const { return v + position(k) * n; }

  // Replaces the packed triangle by sum over k of f[k] v_k v_k^T.
  V* function(const V* f) {
    for (int i = 0; i < triangle(n); ++i) a[i] = V{};
    for_panels(n, [&](auto panel, int k) SECANT_LAMBDA {
      constexpr int P = decltype(panel)::value;
      const V* w[P];
      unroll<P>([&](auto c) SECANT_LAMBDA {
        w[c] = vector(k + c);
        for (int i = 0; i < n; ++i) multipliers[i * P + c] = -(f[k + c] * w[c][i]);
      });
      update_triangle<T, P>(a, 0, n, multipliers, w);
    });
    return a;
  }

  V code;

 private:
  // Scales by a power of two so that the largest entry is in [1, 2), and replaces what is not finite by the identity.
  void normalise() {
    using I = vec<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
    using Scalar = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    constexpr int kMantissa = std::numeric_limits<T>::digits - 1;
    constexpr Scalar kBias = std::numeric_limits<T>::max_exponent - 1;
    V largest{};
    for (int i = 0; i < triangle(n); ++i) largest = select<T>(larger<T>(a[i], largest), absolute<T>(a[i]), largest);
    const mask<T> finite = less<T>(largest, splat(std::numeric_limits<T>::infinity()));
    code = select<T>(finite, V{}, splat(T(-1)));
    I exponent = (I)select<T>(finite, largest, splat(T(1))) >> kMantissa;
    for (int l = 0; l < kLanes<T>; ++l) {
      exponent[l] = std::min<Scalar>(std::max<Scalar>(exponent[l], 1), 2 * kBias - 1);
    }
    unscale = (V)(exponent << kMantissa);
    const V scale = (V)((2 * kBias - exponent) << kMantissa);
    const bool all = !any<T>(less<T>(code, V{}));
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j <= i; ++j) {
        V& x = a[triangle(i) + j];
        x = all ? x * scale : select<T>(finite, x * scale, splat(T(i == j)));
      }
    }
  }

  // A = V^T A V where the given V is orthonormal, ||I - V^T V||_1 <= 10 n eps: what the rotations start from is within
  // the bound that their product has. Else V = I.
  void begin(const T* const* given) {
    const Plan<T> plan(n, n, n, triangle(n), [this](int i, int j) { return j * n + i; });
    interleave<T>(plan, given, v);
    V* const row = spare + triangle(n) + 1;
    V worst{};
    for (int i = 0; i < n; ++i) row[i] = V{};
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j <= i; ++j) {
        const V off = absolute<T>(dot(v + i * n, v + j * n) - T(i == j));
        row[i] += off;
        if (j < i) row[j] += off;
      }
    }
    for (int i = 0; i < n; ++i) worst = select<T>(larger<T>(row[i], worst), row[i], worst);
    const mask<T> good = less<T>(worst, splat(T(10) * static_cast<T>(n) * std::numeric_limits<T>::epsilon()));
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) v[i * n + j] = select<T>(good, v[i * n + j], splat(T(i == j)));
    }
    for (int k = 0; k < n; ++k) {
      const V* const x = v + k * n;
      for (int i = 0; i < n; ++i) row[i] = V{};
      for (int i = 0; i < n; ++i) {
        V sum = a[triangle(i) + i] * x[i];
        for (int j = 0; j < i; ++j) {
          sum += a[triangle(i) + j] * x[j];
          row[j] += a[triangle(i) + j] * x[i];
        }
        row[i] += sum;
      }
      for (int l = 0; l <= k; ++l) spare[triangle(k) + l] = dot(row, v + l * n);
    }
    for (int i = 0; i < triangle(n); ++i) a[i] = select<T>(good, spare[i], a[i]);
  }
  SECANT_INLINE V dot(const V* x, const V* y) const {
    V sum{};
    for (int i = 0; i < n; ++i) sum += x[i] * y[i];
    return sum;
  }

  // Whether |a_pq| exceeds eps sqrt(|a_pp a_qq|): relative, for the small eigenvalues of a definite matrix (Demmel and
  // Veselic, 1992). Squares that underflow, below 1e-19 of the largest entry, count as zero.
  SECANT_INLINE static mask<T> above(const V& pp, const V& qq, const V& pq) {
    constexpr T eps = std::numeric_limits<T>::epsilon();
    return less<T>(absolute<T>(pp * qq) * (eps * eps), pq * pq);
  }

  // Rotates the pairs (first, first + 1), (first + 2, first + 3), ...; which lanes needed it.
  mask<T> stage(int first) {
    const int pairs = (n - first) / 2;
    mask<T> turned = less<T>(V{}, V{});
    for (int h = 0; h < pairs; ++h) {
      const int p = first + 2 * h;
      V &pp = a[triangle(p) + p], &pq = a[triangle(p + 1) + p], &qq = a[triangle(p + 1) + p + 1];
      const mask<T> turn = above(pp, qq, pq);
      turned |= turn;
      // tan of the smaller angle: 2 a_pq / (d +- sqrt(d^2 + 4 a_pq^2)), d = a_qq - a_pp, the sign that of d.
      const V d = qq - pp, twice = pq + pq, root = square_root<T>(d * d + twice * twice);
      const V t = select<T>(turn, twice / (d + select<T>(less<T>(d, V{}), -root, root)), V{});
      const V c = T(1) / square_root<T>(T(1) + t * t);
      rotations[h] = {c, t * c};
      const V x = pp - t * pq, y = qq + t * pq;
      pp = y;
      qq = x;
      pq = select<T>(turn, V{}, pq);
    }
    for (int g = 0; g < pairs; ++g) {
      const int row = first + 2 * g;
      const Rotation<T> r = rotations[g];
      V *p = a + triangle(row), *q = p + row + 1;
      if (first) rotate<T>(r, p[0], q[0]);
      for (int h = 0; h < g; ++h) {
        const int k = first + 2 * h;
        V x = p[k], y = p[k + 1], z = q[k], w = q[k + 1];
        rotate<T>(r, x, z);
        rotate<T>(r, y, w);
        rotate<T>(rotations[h], x, y);
        rotate<T>(rotations[h], z, w);
        p[k] = x, p[k + 1] = y, q[k] = z, q[k + 1] = w;
      }
      V *e = v + row * n, *f = e + n;
      for (int k = 0; k < n; ++k) rotate<T>(r, e[k], f[k]);
    }
    if (first + 2 * pairs < n) {
      V* const p = a + triangle(n - 1);
      for (int h = 0; h < pairs; ++h) rotate<T>(rotations[h], p[first + 2 * h], p[first + 2 * h + 1]);
    }
    return turned;
  }

  void count_remaining() {
    V left{};
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < i; ++j) {
        const mask<T> m = above(a[lower(i, i)], a[lower(j, j)], a[lower(i, j)]);
        left += select<T>(m, splat(T(1)), V{});
      }
    }
    code = select<T>(less<T>(code, V{}), code, left);
  }

  const int n;
  V *const a, *const v, *const multipliers, *const spare;
  Rotation<T>* const rotations;
  V unscale;
  bool reversed = false;
};

// Earlier eigenvectors of a group, or null.
template <class T>
class Given {
 public:
  SECANT_INLINE Given(const Blocks& c, const Group<T>& group) {
    if (c.b == nullptr) return;
    group.pointers(static_cast<const T*>(c.b), c.b_batch, lanes);
    any = lanes;
  }
  Given(const Given&) = delete;
  Given& operator=(const Given&) = delete;
  const T* const* any = nullptr;

 private:
  const T* lanes[kLanes<T>];
};

template <class T>
SECANT_INLINE Damping<T> no_damping(const Group<T>& group) {
  return Damping<T>(Blocks{}, group);
}

}  // namespace

template <class T>
void eigh(const Blocks& c) {
  const int n = c.n;
  const Plan<T> plan = lower_plan<T>(n);
  const int64_t vectors = Jacobi<T>::vectors(n);
  for_groups<T>(c, kLanes<T> * n * n * 50.0, vectors + n, n * n, [&](const Group<T>& group, vec<T>* memory, Ahead&) {
    const T* in[kLanes<T>];
    group.pointers(static_cast<const T*>(c.a), c.a_batch, in);
    Jacobi<T> jacobi(n, memory);
    jacobi.run(plan, in, no_damping(group), Given<T>(c, group).any);
    vec<T>* const w = memory + vectors;
    for (int k = 0; k < n; ++k) w[k] = jacobi.value(k);
    for (int l = 0; l < group.count; ++l) {
      T* const values = static_cast<T*>(c.values) + (group.first + l) * n;
      T* const basis = static_cast<T*>(c.out) + (group.first + l) * n * n;
      if (jacobi.code[l] < 0) {
        std::fill(values, values + n, std::numeric_limits<T>::quiet_NaN());
        std::fill(basis, basis + n * n, std::numeric_limits<T>::quiet_NaN());
        continue;
      }
      std::array<int, kLargest> order;
      std::iota(order.begin(), order.begin() + n, 0);
      std::stable_sort(order.begin(), order.begin() + n, [&](int i, int j) { return w[i][l] < w[j][l]; });
      for (int k = 0; k < n; ++k) {
        const vec<T>* const x = jacobi.vector(order[k]);
        // How many more sweeps the neighbours took shows in nothing but the signs of zeros: 0 + -0 is 0.
        values[k] = w[order[k]][l] + T(0);
        for (int i = 0; i < n; ++i) basis[i * n + k] = x[i][l] + T(0);
      }
    }
    group.store_info(jacobi.code, c.info);
  });
}

template <class T>
void function(const Blocks& c) {
  const int n = c.n;
  const Plan<T> plan = lower_plan<T>(n);
  const int64_t vectors = Jacobi<T>::vectors(n);
  const Plan<T> out_plan(n, n, n, triangle(n), lower);
  for_groups<T>(c, kLanes<T> * n * n * 50.0, vectors + n, n * n, [&](const Group<T>& group, vec<T>* memory, Ahead&) {
    using V = vec<T>;
    const T* in[kLanes<T>];
    T* out[kLanes<T>];
    group.pointers(static_cast<const T*>(c.a), c.a_batch, in);
    group.pointers(static_cast<T*>(c.out), n * n, out);
    const Damping<T> shift(c, group);  // without scaling, `plus` is the floor of |A|^-1
    Jacobi<T> jacobi(n, memory);
    jacobi.run(plan, in, c.root == 0 || c.clamped ? no_damping(group) : shift, Given<T>(c, group).any);
    V* const f = memory + vectors;
    V fault{}, plus{};
    if (c.clamped) {
      for (int k = 0; k < n; ++k) plus = select<T>(less<T>(plus, jacobi.value(k)), jacobi.value(k), plus);
      plus *= shift.plus;
    }
    for (int k = 0; k < n; ++k) {
      V w = jacobi.value(k);
      if (c.root == 0) {
        const V size = absolute<T>(w);
        f[k] = T(1) / select<T>(less<T>(size, shift.plus), shift.plus, size);
      } else {
        if (c.clamped) {
          const mask<T> negative = less<T>(w, V{});
          fault += select<T>(negative, splat(T(1)), V{});
          w = select<T>(negative, V{}, w) + plus;
        } else {
          fault += select<T>(less<T>(V{}, w), V{}, splat(T(1)));
        }
        f[k] = T(1) / (c.root == 1 ? w : c.root == 2 ? square_root<T>(w) : square_root<T>(square_root<T>(w)));
        if (c.clamped) f[k] = select<T>(equal<T>(w, V{}), V{}, f[k]);
      }
    }
    V code = select<T>(equal<T>(jacobi.code, V{}), fault, jacobi.code);
    V* const x = jacobi.function(f);
    mask<T> bad = less<T>(V{}, absolute<T>(code));
    if (c.clamped) {
      code = select<T>(less<T>(V{}, jacobi.code), splat(T(kNotConverged)), code);
      bad = less<T>(code, V{});
    }
    if (any<T>(bad)) {
      for (int i = 0; i < triangle(n); ++i) poison<T>(x[i], bad);
    }
    deinterleave<T>(out_plan, x, out);
    group.store_info(code, c.info);
  });
}

template void eigh<float>(const Blocks&);
template void eigh<double>(const Blocks&);
template void function<float>(const Blocks&);
template void function<double>(const Blocks&);

}  // namespace blocks
}  // namespace SECANT_ISA
