// Preconditioned steps and Newton-Schulz on CUDA; the contract is reference.py. Include-free: kernels/cuda_portable.cuh
// (or the CPU stand-in of the tests) goes in front.
//
//   precond_tile_S_Q           a block a tile of at most 64 x 64, for as many tensors as one parameter struct holds
//   precond_entries_S_Q        a block a tile without sides, of any size
//   precond_newton_schulz_S    a block a matrix of at most 64 x 64
//   precond_newton_root_S      the same
//
// S is the type of parameters and gradients, Q that of the states, T that of the arithmetic. What is multiplied lies in
// shared memory, three squares in rows of `line` numbers: the gradient, the momentum which becomes the step, and a
// root. A thread of 256 has 16 entries of a product, 16 rows and columns apart. Sums have a fixed order. All that is
// not multiplied is read again where it is needed, from the cache, as the second half of a step writes what the first
// half must not have touched when the tile turns out to be bad.

struct PrecondTensor {
  u64 param, grad, exp_avg, exp_avg_sq, left, right, left_root, right_root, count;  // pointers, 0 where absent
  i64 rows, columns, row_stride, column_stride, first;                              // first: number of its first tile
  double t;                                                                         // where `count` is 0
  int down, across;
};

struct PrecondStep {
  u64 lr, skipped;  // pointers; lr 0: `rate`
  double rate, beta1, beta2, beta_gram, eps, weight_decay, rms;
  int wide_lr, graft, rotate, maximize, phases, tensors, side, line;  // side: the largest; line: of shared memory
  PrecondTensor tensor[24];
};

struct NewtonSchulz {
  u64 x, out;
  double a, b, c, eps;
  i64 m, n, row, column;  // m <= n: of the matrix that is iterated, with its strides
  int steps, line;
};

struct NewtonRoot {
  u64 a, out, info;
  double damping, tolerance, growth;
  int n, p, steps, squarings, line, unused;
};

namespace {

constexpr u32 kAll = 0xffffffffu;
constexpr int kBlock = 256, kEach = 4, kApart = 16;
constexpr int kGrams = 1, kApply = 2;
enum { kGraftNone, kGraftAdam, kGraftSgd, kGraftRms };

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

template <class S>
struct Arithmetic {
  typedef float type;
};
template <>
struct Arithmetic<double> {
  typedef double type;
};

SECANT_DEVICE float widen(float x) { return x; }
SECANT_DEVICE double widen(double x) { return x; }
SECANT_DEVICE float widen(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
SECANT_DEVICE float widen(f16 x) { return half_to_float(x.bits); }

template <class X>
struct Narrow {
  template <class T>
  SECANT_DEVICE X from(T x) {
    return X(x);
  }
};
template <>
struct Narrow<bf16> {  // to nearest even
  template <class T>
  SECANT_DEVICE bf16 from(T x) {
    const float f = float(x);
    const u32 bits = __float_as_uint(f);
    return bf16{f != f ? u16(0x7fc0) : u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  }
};
template <>
struct Narrow<f16> {
  template <class T>
  SECANT_DEVICE f16 from(T x) {
    return f16{float_to_half(float(x))};
  }
};

template <class T>
SECANT_DEVICE bool finite(T x) {
  return x - x == T(0);
}

// The sum over the block, for every thread; `board` has room for one number a warp.
template <class T>
SECANT_DEVICE T block_sum(T x, T* board) {
  SECANT_UNROLL
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(kAll, x, o);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32u == 0) board[threadIdx.x / 32u] = x;
  __syncthreads();
  T sum = board[0];
  SECANT_UNROLL
  for (int k = 1; k < kBlock / 32; ++k) sum += board[k];
  return sum;
}

// This thread's entries of A (r, k) B (k, w), whose strides are given: rows and columns `kApart` apart.
template <class T, class X, class Y>
SECANT_DEVICE void multiply(T (&sum)[kEach][kEach], const X* a, int a_row, int a_column, const Y* b, int b_row,
                            int b_column, int r, int k, int w) {
  const int first = int(threadIdx.x) / kApart, second = int(threadIdx.x) % kApart;
  int from_a[kEach], from_b[kEach];
  SECANT_UNROLL
  for (int q = 0; q < kEach; ++q) {  // what is outside is computed of what is inside, and not stored
    const int i = first + q * kApart, j = second + q * kApart;
    from_a[q] = (i < r ? i : r - 1) * a_row;
    from_b[q] = (j < w ? j : w - 1) * b_column;
    SECANT_UNROLL
    for (int p = 0; p < kEach; ++p) sum[q][p] = T(0);
  }
  SECANT_LOOP
  for (int t = 0; t < k; ++t) {
    T x[kEach], y[kEach];
    SECANT_UNROLL
    for (int q = 0; q < kEach; ++q) {
      x[q] = a[from_a[q] + t * a_column];
      y[q] = b[from_b[q] + t * b_row];
    }
    SECANT_UNROLL
    for (int q = 0; q < kEach; ++q) {
      SECANT_UNROLL
      for (int p = 0; p < kEach; ++p) sum[q][p] += x[q] * y[p];
    }
  }
}

// Leaves a product in shared memory, where its factors may have been.
template <class T>
SECANT_DEVICE void put(T* to, int line, const T (&sum)[kEach][kEach], int r, int w) {
  const int first = int(threadIdx.x) / kApart, second = int(threadIdx.x) % kApart;
  __syncthreads();  // the factors have been read
  SECANT_UNROLL
  for (int q = 0; q < kEach; ++q) {
    SECANT_UNROLL
    for (int p = 0; p < kEach; ++p) {
      const int i = first + q * kApart, j = second + p * kApart;
      if (i < r && j < w) to[i * line + j] = sum[q][p];
    }
  }
  __syncthreads();  // and the product can be
}

// A Gram average, of which the lower triangle is stored, row behind row.
template <class T, class Q>
SECANT_DEVICE void average(Q* packed, const T (&sum)[kEach][kEach], int n, T keep, T add) {
  const int first = int(threadIdx.x) / kApart, second = int(threadIdx.x) % kApart;
  SECANT_UNROLL
  for (int q = 0; q < kEach; ++q) {
    SECANT_UNROLL
    for (int p = 0; p < kEach; ++p) {
      const int i = first + q * kApart, j = second + p * kApart, at = i * (i + 1) / 2 + j;
      if (i < n && j <= i) packed[at] = Narrow<Q>::from(keep * T(widen(packed[at])) + add * sum[q][p]);
    }
  }
}

SECANT_DEVICE i64 piece(i64 size, i64 pieces, i64 i) {
  const i64 more = size % pieces;
  return i * (size / pieces) + (i < more ? i : more);
}

// A tile: where it begins, its sides, the places of its entries and the numbers of its step.
template <class S, class Q>
struct Tile {
  typedef typename Arithmetic<S>::type T;
  i64 rows, columns;   // of the first entry
  int r, w, nl, nr;    // sides, and those of the largest tile
  i64 number, length;  // in its tensor; entries of a row of the states
  i64 row_stride, column_stride;
  S* param;
  const S* grad;
  Q *exp_avg, *exp_avg_sq;
  T beta1, new1, beta2, new2, unbias1, unbias2, eps, sign, decay, rate;

  SECANT_DEVICE double unbias(double beta, double t) { return 1.0 / (1.0 - (beta > 0.0 ? exp(log(beta) * t) : 0.0)); }
};

template <class S, class Q>
SECANT_DEVICE Tile<S, Q> tile_of(const PrecondStep& a, const PrecondTensor& x, i64 block) {
  typedef typename Arithmetic<S>::type T;
  Tile<S, Q> y;
  y.number = block - x.first;
  const i64 i = y.number / x.across, j = y.number % x.across;
  y.rows = piece(x.rows, x.down, i);
  y.columns = piece(x.columns, x.across, j);
  y.r = int(piece(x.rows, x.down, i + 1) - y.rows);
  y.w = int(piece(x.columns, x.across, j + 1) - y.columns);
  y.nl = int((x.rows + x.down - 1) / x.down);
  y.nr = int((x.columns + x.across - 1) / x.across);
  y.length = x.columns;
  y.row_stride = x.row_stride;
  y.column_stride = x.column_stride;
  const i64 given = y.rows * x.row_stride + y.columns * x.column_stride, held = y.rows * x.columns + y.columns;
  y.param = reinterpret_cast<S*>(x.param) + given;
  y.grad = reinterpret_cast<const S*>(x.grad) + given;
  y.exp_avg = reinterpret_cast<Q*>(x.exp_avg) + held;
  y.exp_avg_sq = x.exp_avg_sq ? reinterpret_cast<Q*>(x.exp_avg_sq) + held : nullptr;
  y.sign = a.maximize ? T(-1) : T(1);
  y.beta1 = T(a.beta1);
  y.new1 = T(1.0 - a.beta1);
  y.beta2 = T(a.beta2);
  y.new2 = T(1.0 - a.beta2);
  y.eps = T(a.eps);
  if (a.phases & kApply) {
    const double t = x.count ? double(*reinterpret_cast<const float*>(x.count)) : x.t;
    y.unbias1 = T(Tile<S, Q>::unbias(a.beta1, t));
    y.unbias2 = T(Tile<S, Q>::unbias(a.beta2, t));
    const double lr = !a.lr       ? a.rate
                      : a.wide_lr ? *reinterpret_cast<const double*>(a.lr)
                                  : double(*reinterpret_cast<const float*>(a.lr));
    y.decay = T(1.0 - lr * a.weight_decay);
    y.rate = T(lr);
  }
  return y;
}

template <class S, class Q>
SECANT_DEVICE typename Arithmetic<S>::type gradient(const Tile<S, Q>& x, i64 i, i64 j) {
  typedef typename Arithmetic<S>::type T;
  return x.sign * T(widen(x.grad[i * x.row_stride + j * x.column_stride]));
}

template <class S, class Q>
SECANT_DEVICE typename Arithmetic<S>::type momentum(const Tile<S, Q>& x, i64 i, i64 j) {
  typedef typename Arithmetic<S>::type T;
  return x.beta1 * T(widen(x.exp_avg[i * x.length + j])) + x.new1 * gradient(x, i, j);
}

// V, of G or of what became of it.
template <class S, class Q, class T>
SECANT_DEVICE T second_moment(const Tile<S, Q>& x, i64 i, i64 j, T g) {
  return x.beta2 * T(widen(x.exp_avg_sq[i * x.length + j])) + x.new2 * (g * g);
}

template <class S, class Q, class T>
SECANT_DEVICE T adam(const Tile<S, Q>& x, T m, T v) {
  return x.unbias1 * m / (sqrt(x.unbias2 * v) + x.eps);
}

template <class S, class Q, class T>
SECANT_DEVICE void write_back(const Tile<S, Q>& x, i64 i, i64 j, T step, T m) {
  S& param = x.param[i * x.row_stride + j * x.column_stride];
  param = Narrow<S>::from(x.decay * T(widen(param)) - x.rate * step);
  x.exp_avg[i * x.length + j] = Narrow<Q>::from(m);
}

// One more tile that is left as it is; 64 bits by two atomic additions of 32, of which the second carries.
SECANT_DEVICE void count_bad(u64 skipped) {
  u32* low = reinterpret_cast<u32*>(skipped);
  if (atomicAdd(low, 1u) == 0xffffffffu) atomicAdd(low + 1, 1u);
}

SECANT_DEVICE int tensor_of(const PrecondStep& a, i64 block) {
  int k = 0;
  SECANT_LOOP
  while (k + 1 < a.tensors && block >= a.tensor[k + 1].first) ++k;
  return k;
}

// A root of a tile with n rows of `side`, into shared memory.
template <class T, class Q>
SECANT_DEVICE void take_root(T* to, int line, const Q* root, int n, int side) {
  __syncthreads();  // the last root has been used
  SECANT_LOOP
  for (int e = int(threadIdx.x); e < n * n; e += kBlock)
    to[e / n * line + e % n] = T(widen(root[e / n * side + e % n]));
  __syncthreads();
}

template <class S, class Q>
SECANT_DEVICE void precond_tile(const PrecondStep& a, unsigned char* memory) {
  typedef typename Arithmetic<S>::type T;
  const PrecondTensor& of = a.tensor[tensor_of(a, blockIdx.x)];
  const Tile<S, Q> x = tile_of<S, Q>(a, of, blockIdx.x);
  const int rank = int(threadIdx.x), r = x.r, w = x.w, line = a.line, size = r * w;
  T* g = reinterpret_cast<T*>(memory);
  T* m = g + a.side * line;
  T* root = m + a.side * line;
  T* board = root + a.side * line;
  T squares = T(0);
  SECANT_LOOP
  for (int e = rank; e < size; e += kBlock) {
    const int i = e / w, j = e % w;
    const T value = gradient(x, i, j);
    squares += value * value;
    g[i * line + j] = value;
    if (a.phases & kApply) m[i * line + j] = momentum(x, i, j);
  }
  const bool good = finite(block_sum(squares, board));  // a barrier: all of G and M is there
  T sum[kEach][kEach];
  if (good && (a.phases & kGrams)) {
    const T keep = T(a.beta_gram), add = T(1.0 - a.beta_gram);
    if (of.left) {
      multiply(sum, g, line, 1, g, 1, line, r, w, r);
      average(reinterpret_cast<Q*>(of.left) + x.number * (i64(x.nl) * (x.nl + 1) / 2), sum, r, keep, add);
    }
    if (of.right) {
      multiply(sum, g, 1, line, g, line, 1, w, r, w);
      average(reinterpret_cast<Q*>(of.right) + x.number * (i64(x.nr) * (x.nr + 1) / 2), sum, w, keep, add);
    }
  }
  if (!(a.phases & kApply)) return;
  const Q* left = reinterpret_cast<const Q*>(of.left_root) + x.number * x.nl * x.nl;
  const Q* right = reinterpret_cast<const Q*>(of.right_root) + x.number * x.nr * x.nr;
  if (of.right_root) {
    take_root(root, line, right, w, x.nr);
    multiply(sum, m, line, 1, root, line, 1, r, w, w);
    put(m, line, sum, r, w);
    if (a.rotate) {
      multiply(sum, g, line, 1, root, line, 1, r, w, w);
      put(g, line, sum, r, w);
    }
  }
  if (of.left_root) {
    take_root(root, line, left, r, x.nl);
    const int row = a.rotate ? 1 : line, column = a.rotate ? line : 1;
    multiply(sum, root, row, column, m, line, 1, r, r, w);
    put(m, line, sum, r, w);
    if (a.rotate) {
      multiply(sum, root, row, column, g, line, 1, r, r, w);
      put(g, line, sum, r, w);
    }
  }
  T scale = x.unbias1;
  if (a.rotate) {
    SECANT_LOOP
    for (int e = rank; e < size; e += kBlock) {
      const int i = e / w, j = e % w;
      m[i * line + j] = adam(x, m[i * line + j], second_moment(x, i, j, g[i * line + j]));
    }
    __syncthreads();
    if (of.left_root) {  // which is still there
      multiply(sum, root, line, 1, m, line, 1, r, r, w);
      put(m, line, sum, r, w);
    }
    if (of.right_root) {
      if (of.left_root) take_root(root, line, right, w, x.nr);
      multiply(sum, m, line, 1, root, 1, line, r, w, w);
      put(m, line, sum, r, w);
    }
    scale = T(1);
  }
  T own = T(0), length = T(0);
  SECANT_LOOP
  for (int e = rank; e < size; e += kBlock) {
    const int i = e / w, j = e % w;
    own += m[i * line + j] * m[i * line + j];
    if (a.rotate || a.graft == kGraftNone || a.graft == kGraftRms) continue;
    T n = x.unbias1 * momentum(x, i, j);
    if (a.graft == kGraftAdam) n = adam(x, momentum(x, i, j), second_moment(x, i, j, gradient(x, i, j)));
    length += n * n;
  }
  own = block_sum(own, board);
  length = block_sum(length, board);
  if (!a.rotate && a.graft != kGraftNone) {
    length = a.graft == kGraftRms ? T(a.rms * sqrt(double(r) * double(w))) : T(sqrt(length));
    scale = own == T(0) ? T(0) : length / sqrt(own);
  }
  if (!(good && finite(scale * scale * own))) {
    if (rank == 0) count_bad(a.skipped);
    return;
  }
  SECANT_LOOP
  for (int e = rank; e < size; e += kBlock) {
    const int i = e / w, j = e % w;
    if (x.exp_avg_sq) {
      const T v = second_moment(x, i, j, a.rotate ? g[i * line + j] : gradient(x, i, j));
      x.exp_avg_sq[i * x.length + j] = Narrow<Q>::from(v);
    }
    write_back(x, i, j, scale * m[i * line + j], momentum(x, i, j));
  }
}

template <class S, class Q>
SECANT_DEVICE void precond_entries(const PrecondStep& a, unsigned char* memory) {
  typedef typename Arithmetic<S>::type T;
  const Tile<S, Q> x = tile_of<S, Q>(a, a.tensor[tensor_of(a, blockIdx.x)], blockIdx.x);
  const i64 size = i64(x.r) * x.w;
  T* board = reinterpret_cast<T*>(memory);
  T of_g = T(0), of_p = T(0);
  SECANT_LOOP
  for (i64 e = threadIdx.x; e < size; e += kBlock) {
    const i64 i = e / x.w, j = e % x.w;
    const T g = gradient(x, i, j), p = adam(x, momentum(x, i, j), second_moment(x, i, j, g));
    of_g += g * g;
    of_p += p * p;
  }
  of_g = block_sum(of_g, board);
  of_p = block_sum(of_p, board);
  if (!(finite(of_g) && finite(of_p))) {
    if (threadIdx.x == 0) count_bad(a.skipped);
    return;
  }
  SECANT_LOOP
  for (i64 e = threadIdx.x; e < size; e += kBlock) {
    const i64 i = e / x.w, j = e % x.w;
    const T m = momentum(x, i, j), v = second_moment(x, i, j, gradient(x, i, j));
    x.exp_avg_sq[i * x.length + j] = Narrow<Q>::from(v);
    write_back(x, i, j, adam(x, m, v), m);
  }
}

template <class S>
SECANT_DEVICE void newton_schulz(const NewtonSchulz& c, unsigned char* memory) {
  typedef typename Arithmetic<S>::type T;
  const int rank = int(threadIdx.x), m = int(c.m), n = int(c.n), line = c.line, size = m * n;
  T* x = reinterpret_cast<T*>(memory);
  T* gram = x + n * line;
  T* factor = gram + n * line;
  // On 8 bytes, which three squares of float32 need not end on.
  double* board = reinterpret_cast<double*>(x + (3 * n * line + 1) / 2 * 2);
  const S* from = reinterpret_cast<const S*>(c.x) + i64(blockIdx.x) * size;
  S* to = reinterpret_cast<S*>(c.out) + i64(blockIdx.x) * size;
  double squares = 0.0;
  SECANT_LOOP
  for (int e = rank; e < size; e += kBlock) {
    const int i = e / n, j = e % n;
    x[i * line + j] = T(widen(from[i * c.row + j * c.column]));
  }
  __syncthreads();
  // The norm from scaled entries, so that squares neither overflow nor vanish.
  T top = T(0);
  SECANT_LOOP
  for (int e = rank; e < size; e += kBlock) {
    const T value = x[e / n * line + e % n], magnitude = value < T(0) ? -value : value;
    top = magnitude > top ? magnitude : top;
  }
  SECANT_UNROLL
  for (int o = 16; o > 0; o >>= 1) {
    const T other = __shfl_xor_sync(kAll, top, o);
    top = other > top ? other : top;
  }
  if (rank % 32 == 0) board[rank / 32] = double(top);
  __syncthreads();
  double most = 0.0;
  SECANT_UNROLL
  for (int k = 0; k < kBlock / 32; ++k) most = board[k] > most ? board[k] : most;
  if (!(most > 0.0)) most = 1.0;
  SECANT_LOOP
  for (int e = rank; e < size; e += kBlock) {
    const double value = double(x[e / n * line + e % n]) / most;
    squares += value * value;
  }
  const double norm = sqrt(block_sum(squares, board)) * most;
  const double scale = norm <= c.eps ? c.eps : norm;
  SECANT_LOOP
  for (int e = rank; e < size; e += kBlock) {
    T& value = x[e / n * line + e % n];
    value = T(double(value) / scale);
  }
  __syncthreads();
  const T a = T(c.a), b = T(c.b), d = T(c.c);
  T sum[kEach][kEach];
  const int first = rank / kApart, second = rank % kApart;
  SECANT_LOOP
  for (int step = 0; step < c.steps; ++step) {
    multiply(sum, x, line, 1, x, 1, line, m, n, m);
    put(gram, line, sum, m, m);
    multiply(sum, gram, line, 1, gram, line, 1, m, m, m);
    SECANT_UNROLL
    for (int q = 0; q < kEach; ++q) {
      SECANT_UNROLL
      for (int p = 0; p < kEach; ++p) {
        const int i = first + q * kApart, j = second + p * kApart;
        if (i < m && j < m) sum[q][p] = b * gram[i * line + j] + d * sum[q][p];
      }
    }
    put(factor, line, sum, m, m);
    multiply(sum, factor, line, 1, x, line, 1, m, m, n);
    SECANT_UNROLL
    for (int q = 0; q < kEach; ++q) {
      SECANT_UNROLL
      for (int p = 0; p < kEach; ++p) {
        const int i = first + q * kApart, j = second + p * kApart;
        if (i < m && j < n) sum[q][p] += a * x[i * line + j];
      }
    }
    put(x, line, sum, m, n);
  }
  SECANT_LOOP
  for (int e = rank; e < size; e += kBlock) {
    const int i = e / n, j = e % n;
    to[i * c.row + j * c.column] = Narrow<S>::from(x[i * line + j]);
  }
}

// |A|_F of a square in shared memory, for every thread; a barrier before and behind.
template <class T>
SECANT_DEVICE double frobenius(const T* a, int n, int line, double* board) {
  double squares = 0.0;
  SECANT_LOOP
  for (int e = int(threadIdx.x); e < n * n; e += kBlock) {
    const double value = double(a[e / n * line + e % n]);
    squares += value * value;
  }
  return sqrt(block_sum(squares, board));
}

// a <- a b or, where `left`, b a.
template <class T>
SECANT_DEVICE void replace(T* a, const T* b, int n, int line, bool left) {
  T sum[kEach][kEach];
  multiply(sum, left ? b : a, line, 1, left ? static_cast<const T*>(a) : b, line, 1, n, n, n);
  put(a, line, sum, n, n);
}

template <class S>
SECANT_DEVICE void newton_root(const NewtonRoot& c, unsigned char* memory) {
  typedef typename Arithmetic<S>::type T;
  const int rank = int(threadIdx.x), n = c.n, line = c.line, size = n * n;
  T* m = reinterpret_cast<T*>(memory);
  T* x = m + n * line;
  T* t = x + n * line;
  double* board = reinterpret_cast<double*>(m + (3 * n * line + 1) / 2 * 2);
  const S* from = reinterpret_cast<const S*>(c.a) + i64(blockIdx.x) * size;
  S* to = reinterpret_cast<S*>(c.out) + i64(blockIdx.x) * size;
  int* info = reinterpret_cast<int*>(c.info) + blockIdx.x;
  T largest = T(0), wrong = T(0);  // wrong: zero, or NaN
  SECANT_LOOP
  for (int e = rank; e < size; e += kBlock) {
    const int i = e / n, j = e % n;
    const T value = T(widen(j <= i ? from[i * n + j] : from[j * n + i]));
    const T magnitude = value < T(0) ? -value : value;
    largest = magnitude > largest ? magnitude : largest;
    wrong += value - value;
    m[i * line + j] = value;
  }
  const double bad = block_sum(double(wrong), board);
  SECANT_UNROLL
  for (int o = 16; o > 0; o >>= 1) {
    const T other = __shfl_xor_sync(kAll, largest, o);
    largest = other > largest ? other : largest;
  }
  __syncthreads();  // the sum has been read
  if (rank % 32 == 0) board[rank / 32] = double(largest);
  __syncthreads();
  double top = 0.0;
  SECANT_UNROLL
  for (int k = 0; k < kBlock / 32; ++k) top = board[k] > top ? board[k] : top;
  if (bad != 0.0 || !(top > 0.0)) {  // NaN is not zero
    SECANT_LOOP
    for (int e = rank; e < size; e += kBlock) to[e] = Narrow<S>::from(T(0));
    if (rank == 0) *info = bad != 0.0 ? -1 : 0;
    return;
  }
  SECANT_LOOP
  for (int e = rank; e < size; e += kBlock) {
    T& value = m[e / n * line + e % n];
    value = T(double(value) / top);
    t[e / n * line + e % n] = value;
  }
  double factor = frobenius(t, n, line, board), norm = factor, power = 1.0;
  SECANT_LOOP
  for (int k = 0; k < c.squarings; ++k) {
    SECANT_LOOP
    for (int e = rank; e < size; e += kBlock) t[e / n * line + e % n] *= T(1.0 / factor);
    __syncthreads();
    replace(t, t, n, line, false);
    factor = frobenius(t, n, line, board);
    power /= 2.0;
    norm *= exp(log(factor) * power);
  }
  const double z = (c.p + 1) / (2.0 * (1.0 + c.damping) * norm);
  const T shift = T(c.damping * norm), part = T(1) / T(c.p);
  SECANT_LOOP
  for (int e = rank; e < size; e += kBlock) {
    const int i = e / n, j = e % n;
    T& value = m[i * line + j];
    value = T(z) * (i == j ? value + shift : value);
    x[i * line + j] = i == j ? T(1) : T(0);
  }
  int code = c.steps;
  double last = -1.0;  // of no step yet
  SECANT_LOOP
  for (int k = 0; k < c.steps; ++k) {
    SECANT_LOOP
    for (int e = rank; e < size; e += kBlock) {
      const int i = e / n, j = e % n;
      t[i * line + j] = (i == j ? part : T(0)) - part * m[i * line + j];
    }
    const double error = c.p * frobenius(t, n, line, board);
    if (last >= 0.0 && !(error <= c.growth * last)) {
      code = k;
      break;
    }
    last = error;
    if (rank < n) t[rank * line + rank] += T(1);
    __syncthreads();
    replace(x, t, n, line, false);
    if (error <= c.tolerance) {
      code = 0;
      break;
    }
    SECANT_LOOP
    for (int q = c.p; q > 1; q /= 2) replace(t, t, n, line, false);
    replace(m, t, n, line, true);
  }
  const double most = sizeof(T) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
  const double whole = c.p == 1 ? z / top : c.p == 2 ? sqrt(z / top) : sqrt(sqrt(z / top));
  const T half = T((whole < most ? whole : most) / 2.0);
  SECANT_LOOP
  for (int e = rank; e < size; e += kBlock) {
    const int i = e / n, j = e % n;
    to[e] = Narrow<S>::from(half * (x[i * line + j] + x[j * line + i]));
  }
  if (rank == 0) *info = code;
}

}  // namespace

#define SECANT_PRECOND_STEP_ENTRIES(TAG, S, Q)                                                      \
  extern "C" __global__ void __launch_bounds__(256, 2) precond_tile_##TAG(const PrecondStep a) {    \
    SECANT_DYNAMIC_SHARED(memory);                                                                  \
    precond_tile<S, Q>(a, memory);                                                                  \
  }                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256, 2) precond_entries_##TAG(const PrecondStep a) { \
    SECANT_DYNAMIC_SHARED(memory);                                                                  \
    precond_entries<S, Q>(a, memory);                                                               \
  }
#define SECANT_PRECOND_ITERATION_ENTRIES(TAG, S)                                                       \
  extern "C" __global__ void __launch_bounds__(256, 1) precond_newton_schulz_##TAG(NewtonSchulz a) {   \
    SECANT_DYNAMIC_SHARED(memory);                                                                     \
    newton_schulz<S>(a, memory);                                                                       \
  }                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, 1) precond_newton_root_##TAG(const NewtonRoot a) { \
    SECANT_DYNAMIC_SHARED(memory);                                                                     \
    newton_root<S>(a, memory);                                                                         \
  }

// Every kernel by name, for the tables of the host: X(kernel, parameter struct).
#define SECANT_PRECOND_STEP_TABLE(X, TAG) X(precond_tile_##TAG, PrecondStep) X(precond_entries_##TAG, PrecondStep)
#define SECANT_PRECOND_ITERATION_TABLE(X, TAG) \
  X(precond_newton_schulz_##TAG, NewtonSchulz) X(precond_newton_root_##TAG, NewtonRoot)

// A build may choose fewer by defining these before this file.
#ifndef SECANT_PRECOND_STEPS
#define SECANT_PRECOND_STEPS(X) \
  X(f32_f32, float, float)      \
  X(f32_bf16, float, bf16)      \
  X(f64_f64, double, double)    \
  X(f64_bf16, double, bf16)     \
  X(bf16_f32, bf16, float) X(bf16_bf16, bf16, bf16) X(f16_f32, f16, float) X(f16_bf16, f16, bf16)
#endif
#ifndef SECANT_PRECOND_ITERATIONS
#define SECANT_PRECOND_ITERATIONS(X) X(f32, float) X(f64, double) X(bf16, bf16) X(f16, f16)
#endif
SECANT_PRECOND_STEPS(SECANT_PRECOND_STEP_ENTRIES)
SECANT_PRECOND_ITERATIONS(SECANT_PRECOND_ITERATION_ENTRIES)
