// General blocks of up to four vectors of rows: each matrix by itself, its columns in vectors.
//
// Where a lane holds a whole matrix, every lane wants another pivot row and rows change places under masks, which costs
// as much as the elimination. Here a row is chosen by its number and stays where it is: the rows that are not used up
// are a mask, multipliers of all others are zero. The search and the division are one chain of dependent steps, so that
// a group of matrices takes each step together.
#include "cpu_lanes.h"
#include "cpu_ops.h"

namespace SECANT_ISA {
namespace blocks {

#ifdef __AVX2__

namespace {

// Matrices that take each step together: where the columns are long, one has enough to do while it searches.
template <int V>
constexpr int kTogether = V <= 2 ? 4 : 1;

// Columns of right-hand sides that are solved for together.
constexpr int kWidth = 16;

template <class T>
using bits = vec<typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type>;

template <class T>
SECANT_INLINE bits<T> maximum(const bits<T>& x, const bits<T>& y) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return (bits<T>)_mm512_maskz_max_epi32(kAllFloats, (__m512i)x, (__m512i)y);
  if constexpr (sizeof(T) == 8) return (bits<T>)_mm512_maskz_max_epi64(kAllDoubles, (__m512i)x, (__m512i)y);
#else
  if constexpr (sizeof(T) == 4) return (bits<T>)_mm256_max_epi32((__m256i)x, (__m256i)y);
  if constexpr (sizeof(T) == 8) return x > y ? x : y;
#endif
}

// The largest of all lanes, in all lanes.
template <class T>
SECANT_INLINE bits<T> maximum(bits<T> x) {
#ifdef __AVX512F__
  x = maximum<T>(x, (bits<T>)_mm512_maskz_shuffle_i32x4(kAllFloats, (__m512i)x, (__m512i)x, 0x4e));
  x = maximum<T>(x, (bits<T>)_mm512_maskz_shuffle_i32x4(kAllFloats, (__m512i)x, (__m512i)x, 0xb1));
  x = maximum<T>(x, (bits<T>)_mm512_maskz_shuffle_epi32(kAllFloats, (__m512i)x, (_MM_PERM_ENUM)0x4e));
  if constexpr (sizeof(T) == 4) {
    x = maximum<T>(x, (bits<T>)_mm512_maskz_shuffle_epi32(kAllFloats, (__m512i)x, (_MM_PERM_ENUM)0xb1));
  }
#else
  x = maximum<T>(x, (bits<T>)_mm256_permute2x128_si256((__m256i)x, (__m256i)x, 1));
  x = maximum<T>(x, (bits<T>)_mm256_shuffle_epi32((__m256i)x, 0x4e));
  if constexpr (sizeof(T) == 4) x = maximum<T>(x, (bits<T>)_mm256_shuffle_epi32((__m256i)x, 0xb1));
#endif
  return x;
}

// Bit l of the result: lane l of x and y agree.
template <class T>
SECANT_INLINE uint64_t agreement(const bits<T>& x, const bits<T>& y) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return _mm512_cmpeq_epi32_mask((__m512i)x, (__m512i)y);
  if constexpr (sizeof(T) == 8) return _mm512_cmpeq_epi64_mask((__m512i)x, (__m512i)y);
#else
  if constexpr (sizeof(T) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(x == y)));
  if constexpr (sizeof(T) == 8) return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)(x == y)));
#endif
}

template <class T>
struct Lanes {
  T at[kLanes<T>];
};
template <class T, int... I>
constexpr Lanes<T> numbered(std::integer_sequence<int, I...>) {
  return {{T(I)...}};
}

constexpr int kRowsMost = 64;

// Columns of V vectors: those of the matrix, which become those of U, and behind them right-hand sides.
template <class T, int V>
class Pivoting {
  using X = vec<T>;
  using I = bits<T>;
  using E = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;
  static constexpr int L = kLanes<T>, Q = kPiece<T>, kPitch = V * L;

 public:
  void place(int size, T* memory) {
    n = size;
    columns = memory;
  }
  // Vectors of a matrix with `width` columns behind it, the ones that a step of kStride columns touches beyond the end
  // included.
  static int64_t vectors(int n, int width) { return int64_t{V} * (n + width + kStride); }

  SECANT_INLINE void start(const T* a, T times, T plus) {
    transpose(n, n, a, n, columns);
    if (times != T(1) || plus != T(0)) {
      for (int i = 0; i < n; ++i) {
        T* const x = columns + i * kPitch + i / L * L;
        const X d = load<X>(x);
        store(x, select<T>(equal<T>(iota(), splat(static_cast<T>(i % L))), d * times + plus, d));
      }
    }
    unroll<V>([&](auto v) SECANT_LAMBDA { alive[v] = (I)less_lanes(n - v * L); });
    code = 0;
  }

  // Chooses the row of pivot k and makes the multipliers of the rows that are left.
  template <bool keep>
  SECANT_INLINE void pivot(int k) {
    T* const column = columns + k * kPitch;
    X c[V];
    I size[V];
    unroll<V>([&](auto v) SECANT_LAMBDA {
      c[v] = load<X>(column + v * L);
      size[v] = (I)absolute<T>(c[v]) & alive[v];
    });
    I best = size[0];
    unroll<V - 1>([&](auto v) SECANT_LAMBDA { best = maximum<T>(best, size[v + 1]); });
    best = maximum<T>(best);
    uint64_t found = 0;
    unroll<V>([&](auto v) SECANT_LAMBDA { found |= agreement<T>(size[v], best) << (v * L); });
    const int p = __builtin_ctzll(found);
    const T largest = ((X)best)[0];
    const bool good = largest > 0 && largest < std::numeric_limits<T>::infinity();
    code = code == 0 && !good ? k + 1 : code;
    const I sign = (I)splat(T(-0.0));
    const X times = (X)((I)splat(T(1) / largest) | ((I)splat(column[p]) & sign));
    row[k] = p;
    inverse[k] = times[0];
    unroll<V>([&](auto v) SECANT_LAMBDA {
      alive[v] = without(alive[v], p - v * L);
      const I m = (I)(c[v] * times) & alive[v];
      store(multiplier + v * L, (X)m);
      if (keep) store(column + v * L, (X)(((I)c[v] & ~alive[v]) | m));
    });
  }

  // Pivot k out of the columns behind it, up to `end`.
  SECANT_INLINE void eliminate(int k, int end) {
    X l[V];
    multipliers(l);
    for (int j = k + 1; j < end; j += kStride) update<kStride>(columns + j * kPitch, row[k], l);
  }

  // The same where the columns behind the matrix are those of L^-1 P, in the order of the pivots.
  SECANT_INLINE void eliminate_inverse(int k) {
    X l[V];
    multipliers(l);
    const int p = row[k];
    T* x = columns + (k + 1) * kPitch;
    int left = n - 1;
    for (; left >= kStride; left -= kStride, x += kStride * kPitch) update<kStride>(x, p, l);
    for (; left > 0; --left, x += kPitch) update<1>(x, p, l);
    unroll<V>([&](auto v) SECANT_LAMBDA {
      const X unit = select<T>(equal<T>(iota(), splat(static_cast<T>(p - v * L))), splat(T(1)), X{});
      store(x + v * L, unit - l[v]);
    });
    slot[p] = k;
  }

  // Right-hand sides [0, width) of `b`, whose rows are `pitch` apart.
  SECANT_INLINE void take(const T* b, int64_t pitch, int width) {
    T* const y = columns + n * kPitch;
    if (width >= Q) return transpose(n, width, b, pitch, y);
    for (int r = 0; r < width; ++r) {
      for (int i = 0; i < n; ++i) y[r * kPitch + i] = b[i * pitch + r];
    }
  }

  // L^-1 of right-hand sides that came after the factor was made.
  void forward(int width) {
    I rows[V];
    unroll<V>([&](auto v) SECANT_LAMBDA { rows[v] = (I)less_lanes(n - v * L); });
    for (int k = 0; k < n; ++k) {
      X l[V];
      unroll<V>([&](auto v) SECANT_LAMBDA {
        rows[v] = without(rows[v], row[k] - v * L);
        l[v] = (X)((I)load<X>(columns + k * kPitch + v * L) & rows[v]);
      });
      for (int r = 0; r < width; ++r) update<1>(columns + (n + r) * kPitch, row[k], l);
    }
  }

  // Row k of U^-1 times the right-hand sides, to `x`; rows that are done hold anything from then on.
  SECANT_INLINE void back(int k, int width, T* x) {
    X u[V];
    unroll<V>([&](auto v) SECANT_LAMBDA { u[v] = load<X>(columns + k * kPitch + v * L); });
    const int p = row[k];
    const T d = inverse[k];
    T* y = columns + n * kPitch;
    for (int r = 0; r < width; ++r, y += kPitch) {
      const T s = y[p] * d;
      x[r] = s;
      unroll<V>([&](auto v) SECANT_LAMBDA { store(y + v * L, load<X>(y + v * L) - u[v] * s); });
    }
  }

  // U^-1 (L^-1 P), by rows: those of L^-1 P, transposed into `memory`, are found where their pivots stand.
  SECANT_INLINE void invert(T* memory, T* out) {
    const T* from[kPitch];
    for (int r = 0; r < kPitch; ++r) from[r] = r < n ? columns + (n + slot[r]) * kPitch : kZeros;
    transpose_lanes(from, kPitch, memory);
    constexpr int R = V > 2 && kBytes < 64 ? 2 : 4;
    int i = n;
    for (; i % R != 0; --i) rows<1>(i - 1, memory, out);
    for (; i > 0; i -= R) rows<R>(i - R, memory, out);
  }

  int n, code;

 private:
  static constexpr int kStride = 4;
  alignas(64) static constexpr T kZeros[kRowsMost] = {};

  static SECANT_INLINE X iota() {
    static constexpr Lanes<T> number = numbered<T>(std::make_integer_sequence<int, L>{});
    return load<X>(number.at);
  }
  static SECANT_INLINE I numbers() {
    static constexpr Lanes<E> number = numbered<E>(std::make_integer_sequence<int, L>{});
    return load<I>(number.at);
  }
  static SECANT_INLINE I less_lanes(int count) { return numbers() < static_cast<E>(count); }
  static SECANT_INLINE I without(const I& rows, int lane) { return rows & (numbers() != static_cast<E>(lane)); }

  // Column j of `height` rows of `width` elements that are `pitch` apart, to y + j * kPitch.
  SECANT_INLINE void transpose(int height, int width, const T* x, int64_t pitch, T* y) const {
    const T* from[kPitch];
    for (int r = 0; r < kPitch; ++r) from[r] = r < height ? x + r * pitch : kZeros;
    transpose_lanes(from, width, y);
  }
  static SECANT_INLINE void transpose_lanes(const T* const (&from)[kPitch], int width, T* y) {
    for (int c = 0; c < width; c += Q) {
      const int start = std::min(c, width - Q);
      unroll<V>([&](auto v) SECANT_LAMBDA {
        X x[Q];
        unroll<Q>([&](auto t) SECANT_LAMBDA { x[t] = load_pieces<T>(from + v * L + t, Q, start); });
        transpose_pieces<T>(x);
        unroll<Q>([&](auto t) SECANT_LAMBDA { store(y + (start + t) * kPitch + v * L, x[t]); });
      });
    }
  }

  SECANT_INLINE void multipliers(X (&l)[V]) const {
    unroll<V>([&](auto v) SECANT_LAMBDA { l[v] = load<X>(multiplier + v * L); });
  }

  template <int W>
  SECANT_INLINE void update(T* x, int p, const X (&l)[V]) const {
    X u[W];
    unroll<W>([&](auto w) SECANT_LAMBDA { u[w] = splat(x[w * kPitch + p]); });
    unroll<W>([&](auto w) SECANT_LAMBDA {
      unroll<V>([&](auto v) SECANT_LAMBDA {
        T* const y = x + w * kPitch + v * L;
        store(y, load<X>(y) - l[v] * u[w]);
      });
    });
  }

  template <int R>
  SECANT_INLINE void rows(int first, const T* y, T* out) {
    T* const done = columns + n * kPitch;
    X sum[R][V];
    const T* u[R];
    unroll<R>([&](auto r) SECANT_LAMBDA {
      u[r] = columns + row[first + r];
      unroll<V>([&](auto v) SECANT_LAMBDA { sum[r][v] = load<X>(y + row[first + r] * kPitch + v * L); });
    });
    for (int j = n - 1; j >= first + R; --j) {
      X x[V];
      unroll<V>([&](auto v) SECANT_LAMBDA { x[v] = load<X>(done + j * kPitch + v * L); });
      unroll<R>([&](auto r) SECANT_LAMBDA {
        const X s = splat(u[r][j * kPitch]);
        unroll<V>([&](auto v) SECANT_LAMBDA { sum[r][v] -= s * x[v]; });
      });
    }
    unroll<R>([&](auto o) SECANT_LAMBDA {
      constexpr int r = R - 1 - o;
      const int i = first + r;
      unroll<V>([&](auto v) SECANT_LAMBDA {
        sum[r][v] *= inverse[i];
        store(done + i * kPitch + v * L, sum[r][v]);
        if constexpr (v < V - 1) {
          store(out + i * n + v * L, sum[r][v]);
        } else {
          store_some<T>(out + i * n + v * L, sum[r][v], n - v * L);
        }
      });
      unroll<r>([&](auto q) SECANT_LAMBDA {
        const X s = splat(u[q][i * kPitch]);
        unroll<V>([&](auto v) SECANT_LAMBDA { sum[q][v] -= s * sum[r][v]; });
      });
    });
  }

  T* columns;
  I alive[V];
  int row[kRowsMost], slot[kRowsMost] = {};
  T inverse[kRowsMost], multiplier[kPitch];
};

// Asks for the next matrices while these are computed, a few lines at each step.
class Next {
 public:
  void range(int i, const void* at, int64_t bytes, int steps) {
    at_[i] = static_cast<const char*>(at);
    lines_[i] = static_cast<int>((bytes + 64 * steps - 1) / (64 * steps));
  }
  SECANT_INLINE void fetch() {
    for (int i = 0; i < 2; ++i) {
      for (int l = 0; l < lines_[i]; ++l, at_[i] += 64) __builtin_prefetch(at_[i], 0, 2);
    }
  }

 private:
  const char* at_[2] = {};
  int lines_[2] = {};
};

// work(matrices, which blocks, memory behind their columns, next) for all groups of kTogether<V> blocks; a last one
// that is not full repeats the last block.
template <class T, int V, class F>
void for_matrices(const Blocks& c, double nanoseconds, int width, int64_t more, int64_t out_size, const F& work) {
  constexpr int M = kTogether<V>;
  const int64_t each = Pivoting<T, V>::vectors(c.n, width), groups = (c.batch + M - 1) / M;
  const int wanted = c.threads > 0                                          ? c.threads
                     : static_cast<double>(c.batch) * nanoseconds < kSerial ? 1
                                                                            : secant::max_threads();
  const int threads = static_cast<int>(std::min<int64_t>(wanted, groups));
  const Scratch<T> scratch(threads, M * each + more);
  secant::run_team(threads, [&](const Team& team) {
    const auto [begin, end] = team.share(groups, 1);
    T* const memory = reinterpret_cast<T*>(scratch.of(team.rank));
    std::fill(memory, memory + (M * each + more) * kLanes<T>, T(0));
    Pivoting<T, V> m[M];
    for (int i = 0; i < M; ++i) m[i].place(c.n, memory + i * each * kLanes<T>);
    for (int64_t g = begin; g < end; ++g) {
      int64_t block[M];
      for (int i = 0; i < M; ++i) block[i] = std::min(g * M + i, c.batch - 1);
      Next next;
      if (g * M + 2 * M <= c.batch) {
        const T* const a = static_cast<const T*>(c.a) + (g + 1) * M * c.a_batch;
        const T* const out = static_cast<const T*>(c.out) + (g + 1) * M * out_size;
        if (c.a_batch == c.n * c.n) next.range(0, a, M * c.a_batch * static_cast<int64_t>(sizeof(T)), c.n);
        next.range(1, out, M * out_size * static_cast<int64_t>(sizeof(T)), c.n);
      }
      for (int i = 0; i < M; ++i) {
        T times = 1, plus = 0;
        if (c.shift != nullptr) {
          const T s = static_cast<const T*>(c.shift)[block[i]];
          c.scaled ? times += s : plus = s;
        } else {
          c.scaled ? times = static_cast<T>(1 + c.shift_value) : plus = static_cast<T>(c.shift_value);
        }
        m[i].start(static_cast<const T*>(c.a) + block[i] * c.a_batch, times, plus);
      }
      work(m, block, memory + M * each * kLanes<T>, next);
      for (int i = 0; i < M; ++i) {
        c.info[block[i]] = m[i].code;
        if (m[i].code != 0) {
          T* const out = static_cast<T*>(c.out) + block[i] * out_size;
          std::fill(out, out + out_size, std::numeric_limits<T>::quiet_NaN());
        }
      }
    }
  });
}

// All n pivots: one half of the matrices searches while the other eliminates, which waits for nothing.
template <bool keep, class T, int V, class F>
SECANT_INLINE void factor(Pivoting<T, V> (&m)[kTogether<V>], int n, Next& next, const F& eliminate) {
  constexpr int M = kTogether<V>, H = M / 2;
  unroll<H>([&](auto i) SECANT_LAMBDA { m[i].template pivot<keep>(0); });
  for (int k = 0; k < n; ++k) {
    next.fetch();
    unroll<M - H>([&](auto i) SECANT_LAMBDA { m[H + i].template pivot<keep>(k); });
    unroll<H>([&](auto i) SECANT_LAMBDA { eliminate(m[i], k); });
    if (k + 1 < n) {
      unroll<H>([&](auto i) SECANT_LAMBDA { m[i].template pivot<keep>(k + 1); });
    }
    unroll<M - H>([&](auto i) SECANT_LAMBDA { eliminate(m[H + i], k); });
  }
}

template <class T, int V>
void inv_columns(const Blocks& c) {
  const int n = c.n;
  for_matrices<T, V>(c, n * n * 2.0, n, int64_t{V} * V * kLanes<T>, int64_t{n} * n,
                     [&](Pivoting<T, V>(&m)[kTogether<V>], const int64_t* block, T* memory, Next& next) SECANT_LAMBDA {
                       factor<false>(m, n, next,
                                     [](Pivoting<T, V>& matrix, int k) SECANT_LAMBDA { matrix.eliminate_inverse(k); });
                       for (int i = 0; i < kTogether<V>; ++i) {
                         m[i].invert(memory, static_cast<T*>(c.out) + block[i] * n * n);
                       }
                     });
}

template <class T, int V, bool many>
void solve_columns(const Blocks& c) {
  const int n = c.n;
  const int widest = static_cast<int>(std::min<int64_t>(c.k, kWidth));
  for_matrices<T, V>(c, n * n * 1.0, widest, 0, n * c.k,
                     [&](Pivoting<T, V>(&m)[kTogether<V>], const int64_t* block, T*, Next& next) SECANT_LAMBDA {
                       for (int64_t begin = 0; begin < c.k; begin += kWidth) {
                         const int width = many ? static_cast<int>(std::min<int64_t>(c.k - begin, kWidth)) : 1;
                         for (int i = 0; i < kTogether<V>; ++i) {
                           m[i].take(static_cast<const T*>(c.b) + block[i] * c.b_batch + begin, c.k, width);
                         }
                         if (begin == 0) {
                           factor<many>(m, n, next, [end = n + width](Pivoting<T, V>& matrix, int k) SECANT_LAMBDA {
                             matrix.eliminate(k, end);
                           });
                         } else {
                           for (auto& matrix : m) matrix.forward(width);
                         }
                         for (int k = n - 1; k >= 0; --k) {
                           for (int i = 0; i < kTogether<V>; ++i) {
                             m[i].back(k, width, static_cast<T*>(c.out) + block[i] * n * c.k + k * c.k + begin);
                           }
                         }
                       }
                     });
}

// f(constant V) for n rows in V vectors.
template <class T, class F>
void with_vectors(int n, const F& f) {
  unroll<4>([&](auto i) {
    if ((n + kLanes<T> - 1) / kLanes<T> == i + 1) f(std::integral_constant<int, i + 1>{});
  });
}

}  // namespace

template <class T>
void inv_pivot(const Blocks& c) {
  with_vectors<T>(c.n, [&](auto v) { inv_columns<T, decltype(v)::value>(c); });
}

template <class T>
void solve_pivot(const Blocks& c) {
  with_vectors<T>(c.n, [&](auto v) {
    constexpr int V = decltype(v)::value;
    c.k == 1 ? solve_columns<T, V, false>(c) : solve_columns<T, V, true>(c);
  });
}

template void inv_pivot<float>(const Blocks&);
template void inv_pivot<double>(const Blocks&);
template void solve_pivot<float>(const Blocks&);
template void solve_pivot<double>(const Blocks&);

#endif

}  // namespace blocks
}  // namespace SECANT_ISA
