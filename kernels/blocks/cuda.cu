// Many small blocks on CUDA: inverse, solve, and functions of eigenvalues, n = 1..64. Include-free:
// kernels/cuda_portable.cuh (or the CPU stand-in of the tests) goes in front.
//
// C is the type of the arithmetic; what is stored may be C, bfloat16 or float16 (Blocks::type). Three mappings:
//
//   t   one thread a matrix, n compile time, all of it in registers
//   w   one thread a row, W registers a row (W >= n, a multiple of 4), as many matrices a warp as fit
//   b   the same with two warps a matrix
//
// In all of them a warp (or the block) is a "team" that handles a "tile" of matrices: it copies them into shared memory
// element by element, neighbouring threads neighbouring addresses, and the result back the same way. Nothing but the
// place of a thread depends on the batch, so that a matrix has the same bits wherever it stands.
//
// With a row in registers, step k of an elimination would index registers at run time. Instead the row turns: step k
// finds column k in register 0 and writes the new column j to register j - 1, which costs nothing as every register is
// written anyway. So loops over k stay loops, and one body of W multiply-adds serves all n <= W.
//
// plan.py chooses kernel, grid and shared memory, and packs the struct below.

struct Blocks {
  u64 a, b, out, values, info, damping;  // pointers, 0 where absent; damping (B,) of C, or the floor
  i64 batch, a_stride, b_stride;         // strides between matrices, in elements
  double shift;                          // damping or floor where it is no tensor
  int n, k, type, mode;    // k: right-hand sides; type: kSame, kBf16, kF16; mode: kNone, kAdd, kScale, kMax
  int function, p;         // kEigh, kAbsInv, kInvRoot
  int sweeps, team_bytes;  // cap on sweeps; shared memory of a team
};

namespace secant_blocks {

constexpr u32 kAll = 0xffffffffu;
constexpr int kSame = 0, kBf16 = 1, kF16 = 2;
constexpr int kNone = 0, kAdd = 1, kScale = 2, kMax = 3;
constexpr int kEigh = 0, kAbsInv = 1, kInvRoot = 2;
constexpr int kColumns = 8;  // right-hand sides that a team of rows solves for at a time

// ---------------------------------------------------------------------------------------------------- numbers

template <class C>
struct Real;

template <>
struct Real<float> {
  typedef u32 Bits;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float eps = 1.1920928955078125e-07f;
  SECANT_DEVICE u32 bits(float x) { return __float_as_uint(x); }
  SECANT_DEVICE float from(u32 x) { return __uint_as_float(x); }
};

template <>
struct Real<double> {
  typedef u64 Bits;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double eps = 2.220446049250313e-16;
  SECANT_DEVICE u64 bits(double x) { return u64(__double_as_longlong(x)); }
  SECANT_DEVICE double from(u64 x) { return __longlong_as_double(i64(x)); }
};

template <class C>
SECANT_DEVICE bool finite(C x) {
  return x - x == C(0);
}

// |x| as an integer: ordered as the magnitudes are, infinity above them, NaN above infinity.
template <class C>
SECANT_DEVICE typename Real<C>::Bits magnitude(C x) {
  return Real<C>::bits(x) << 1 >> 1;
}

template <class C>
SECANT_DEVICE typename Real<C>::Bits infinity() {
  return typename Real<C>::Bits(2 * Real<C>::bias + 1) << Real<C>::mantissa;
}

template <class C>
SECANT_DEVICE C nan() {
  return Real<C>::from(infinity<C>() | infinity<C>() >> 1);
}

// 2^e, -bias < e <= bias.
template <class C>
SECANT_DEVICE C power(int e) {
  return Real<C>::from(typename Real<C>::Bits(e + Real<C>::bias) << Real<C>::mantissa);
}

// e with 2^e <= |x| < 2^(e + 1), of the bits of |x|; -bias for subnormal numbers.
template <class C>
SECANT_DEVICE int exponent(typename Real<C>::Bits magnitude) {
  return int(magnitude >> Real<C>::mantissa) - Real<C>::bias;
}

// A power of two s such that 1 <= s d s < 4; 1 where d is not finite and positive.
template <class C>
SECANT_DEVICE C balance(C d) {
  return d > C(0) && finite(d) ? power<C>(-(exponent<C>(magnitude(d)) >> 1)) : C(1);
}

// A power of two that keeps a general matrix of this largest magnitude away from over- and underflow.
template <class C>
SECANT_DEVICE C restrain(typename Real<C>::Bits largest) {
  constexpr int far = Real<C>::bias / 4 * 3, by = (Real<C>::bias + 1) / 2;
  const int e = exponent<C>(largest);
  return e > far ? power<C>(-by) : (e < -far && largest != 0 ? power<C>(by) : C(1));
}

SECANT_DEVICE float bf16_to_float(u16 x) { return __uint_as_float(u32(x) << 16); }

SECANT_DEVICE u16 float_to_bf16(float x) {
  const u32 bits = __float_as_uint(x);
  return x != x ? u16(0x7fc0) : u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class C>
SECANT_DEVICE C shift_of(const Blocks& a, i64 b) {
  return a.damping ? reinterpret_cast<const C*>(a.damping)[b] : C(a.shift);
}

template <class C>
SECANT_DEVICE C damped(const Blocks& a, C x, C shift) {
  return a.mode == kAdd ? x + shift : (a.mode == kScale ? x * (C(1) + shift) : x);
}

// ---------------------------------------------------------------------------------------------------- copies

// Where `rows` rows of `cols` elements of consecutive matrices lie in global memory, and where in a tile.
struct Layout {
  i64 stride;     // between matrices
  int row;        // between rows
  int ld, pitch;  // the same in the tile: between rows, between matrices
  int rows, cols;
};

// The elements of `count` matrices that this thread copies: offsets in global memory and in the tile. Runtime steps
// instead of a division an element.
struct Cursor {
  i64 global, step, next_row, next;
  int tile, tile_step, tile_row, tile_next, i, j, di, dj, rows, cols;
};

SECANT_DEVICE Cursor cursor(const Layout& x, int rank, int size) {
  Cursor c;
  c.rows = x.rows;
  c.cols = x.cols;
  c.j = rank % x.cols;
  c.i = rank / x.cols % x.rows;
  c.dj = size % x.cols;
  c.di = size / x.cols % x.rows;
  const int m = rank / (x.rows * x.cols), dm = size / (x.rows * x.cols);
  c.global = m * x.stride + c.i * x.row + c.j;
  c.step = dm * x.stride + c.di * x.row + c.dj;
  c.next_row = x.row - x.cols;
  c.next = x.stride - i64(x.rows) * x.row;
  c.tile = m * x.pitch + c.i * x.ld + c.j;
  c.tile_step = dm * x.pitch + c.di * x.ld + c.dj;
  c.tile_row = x.ld - x.cols;
  c.tile_next = x.pitch - x.rows * x.ld;
  return c;
}

SECANT_DEVICE void advance(Cursor& c) {
  c.global += c.step;
  c.tile += c.tile_step;
  c.j += c.dj;
  c.i += c.di;
  if (c.j >= c.cols) {
    c.j -= c.cols;
    ++c.i;
    c.global += c.next_row;
    c.tile += c.tile_row;
  }
  if (c.i >= c.rows) {
    c.i -= c.rows;
    c.global += c.next;
    c.tile += c.tile_next;
  }
}

// Copies matrices into a tile. What needs no conversion goes past the registers, all of it in flight at once; of half
// precision four elements are, so that four loads wait for memory together.
template <class C>
SECANT_DEVICE void fetch(int type, u64 from, i64 offset, const Layout& x, int count, C* tile, int rank, int size) {
  const int total = count * x.rows * x.cols;
  Cursor c = cursor(x, rank, size);
  if (sizeof(C) == 8 || type == kSame) {
    const C* p = reinterpret_cast<const C*>(from) + offset;
    SECANT_LOOP
    for (int e = rank; e < total; e += size, advance(c)) copy_async(tile + c.tile, p + c.global);
    copy_async_wait();
    return;
  }
  const u16* p = reinterpret_cast<const u16*>(from) + offset;
  SECANT_LOOP
  for (int e = rank; e < total; e += 4 * size) {
    u16 bits[4];
    int to[4];
    SECANT_UNROLL
    for (int v = 0; v < 4; ++v) {
      to[v] = e + v * size < total ? c.tile : -1;
      bits[v] = to[v] < 0 ? u16(0) : p[c.global];
      advance(c);
    }
    SECANT_UNROLL
    for (int v = 0; v < 4; ++v) {
      if (to[v] >= 0) tile[to[v]] = C(type == kBf16 ? bf16_to_float(bits[v]) : half_to_float(bits[v]));
    }
  }
}

template <class C>
SECANT_DEVICE void store(int type, u64 to, i64 offset, const Layout& x, int count, const C* tile, int rank, int size) {
  const int total = count * x.rows * x.cols;
  Cursor c = cursor(x, rank, size);
  SECANT_LOOP
  for (int e = rank; e < total; e += size, advance(c)) {
    const C y = tile[c.tile];
    if (sizeof(C) == 8 || type == kSame) {
      reinterpret_cast<C*>(to)[offset + c.global] = y;
    } else {
      reinterpret_cast<u16*>(to)[offset + c.global] = type == kBf16 ? float_to_bf16(float(y)) : float_to_half(float(y));
    }
  }
}

// ---------------------------------------------------------------------------------------------------- teams

// A warp, or a block of two warps, and its tile. The grid has a team for every tile: there are at most 2^31 of them.
template <int Warps>
struct Team {
  int rank, size;
  i64 first;  // the tile: of 32 matrices, or as many as have room
  unsigned char* memory;
};

template <int Warps>
SECANT_DEVICE Team<Warps> team_of(const Blocks& a, unsigned char* memory) {
  Team<Warps> t;
  const int index = Warps == 1 ? int(threadIdx.x / 32u) : 0;
  const i64 teams = Warps == 1 ? i64(blockDim.x / 32u) : 1;
  t.rank = Warps == 1 ? int(threadIdx.x % 32u) : int(threadIdx.x);
  t.size = 32 * Warps;
  t.first = i64(blockIdx.x) * teams + index;
  t.memory = memory + index * a.team_bytes;
  return t;
}

template <int Warps>
SECANT_DEVICE void sync() {
  if (Warps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

SECANT_DEVICE int smaller(i64 a, int b) { return a < b ? int(a) : b; }

// ---------------------------------------------------------------------------------------------------- one thread

// Turns an spd matrix (lower triangle) into -A^-1 by the sweep operator. Returns the first bad pivot, 1-based, or 0.
//
// Row k of the swept part is what forward elimination makes of the identity, so this is L D L^T, L^-1 by substitution
// and L^-T D^-1 L^-1 in one loop, with their error bounds: every factor is taken from the lower triangle.
template <class C, int N>
SECANT_DEVICE int sweep(C (&a)[N][N]) {
  int bad = 0;
  SECANT_UNROLL
  for (int k = 0; k < N; ++k) {
    const C d = a[k][k], inverse = C(1) / d;
    if (bad == 0 && !(d > C(0) && finite(d))) bad = k + 1;
    C column[N];
    SECANT_UNROLL
    for (int i = 0; i < N; ++i) column[i] = i < k ? a[k][i] : a[i][k];
    SECANT_UNROLL
    for (int i = 0; i < N; ++i) {
      const C t = column[i] * inverse;
      SECANT_UNROLL
      for (int j = 0; j <= i; ++j) {
        if (i == k || j == k) {
          a[i][j] = i == j ? -inverse : (i == k ? column[j] : column[i]) * inverse;
        } else {
          a[i][j] -= t * column[j];
        }
      }
    }
  }
  return bad;
}

// L D L^T: the strict lower triangle becomes L, the diagonal D.
template <class C, int N>
SECANT_DEVICE int factor_spd(C (&a)[N][N]) {
  int bad = 0;
  SECANT_UNROLL
  for (int k = 0; k < N; ++k) {
    const C d = a[k][k], inverse = C(1) / d;
    if (bad == 0 && !(d > C(0) && finite(d))) bad = k + 1;
    C column[N];
    SECANT_UNROLL
    for (int i = k + 1; i < N; ++i) column[i] = a[i][k];
    SECANT_UNROLL
    for (int i = k + 1; i < N; ++i) {
      a[i][k] = column[i] * inverse;
      SECANT_UNROLL
      for (int j = k + 1; j <= i; ++j) a[i][j] -= a[i][k] * column[j];
    }
  }
  return bad;
}

// P A = L U in place, rows exchanged in registers; below the diagonal stays L, or L^-1 where Inverse.
template <bool Inverse, class C, int N>
SECANT_DEVICE int factor_lu(C (&a)[N][N], int (&order)[N]) {
  typedef typename Real<C>::Bits Bits;
  int bad = 0;
  SECANT_UNROLL
  for (int i = 0; i < N; ++i) order[i] = i;
  SECANT_UNROLL
  for (int k = 0; k < N; ++k) {
    Bits most = magnitude(a[k][k]);
    int chosen = k;
    SECANT_UNROLL
    for (int i = k + 1; i < N; ++i) {
      const Bits x = magnitude(a[i][k]);
      if (x > most) {
        most = x;
        chosen = i;
      }
    }
    SECANT_UNROLL
    for (int i = k + 1; i < N; ++i) {
      const bool exchange = chosen == i;
      SECANT_UNROLL
      for (int j = 0; j < N; ++j) {
        const C x = a[k][j], y = a[i][j];
        a[k][j] = exchange ? y : x;
        a[i][j] = exchange ? x : y;
      }
      const int x = order[k], y = order[i];
      order[k] = exchange ? y : x;
      order[i] = exchange ? x : y;
    }
    const C pivot = a[k][k];
    if (bad == 0 && !(pivot != C(0) && finite(pivot))) bad = k + 1;
    SECANT_UNROLL
    for (int i = k + 1; i < N; ++i) {
      const C f = a[i][k] / pivot;
      SECANT_UNROLL
      for (int j = Inverse ? 0 : k + 1; j < N; ++j) {
        if (j != k) a[i][j] -= f * a[k][j];
      }
      a[i][k] = Inverse ? -f : f;
    }
  }
  return bad;
}

// The matrix of this thread, damped, from a tile: its lower triangle, or all of it.
template <bool Spd, class C, int N>
SECANT_DEVICE void take(const Blocks& a, const C* tile, C shift, C (&x)[N][N]) {
  SECANT_UNROLL
  for (int i = 0; i < N; ++i) {
    SECANT_UNROLL
    for (int j = 0; j < N; ++j) {
      if (!Spd || j <= i) x[i][j] = tile[i * N + j];
    }
    x[i][i] = damped(a, x[i][i], shift);
  }
}

// Scales by powers of two: s_i s_j a_ij (Spd) or s a_ij.
template <bool Spd, class C, int N>
SECANT_DEVICE void scale(C (&x)[N][N], C (&s)[N]) {
  if (Spd) {
    SECANT_UNROLL
    for (int i = 0; i < N; ++i) s[i] = balance(x[i][i]);
  } else {
    typename Real<C>::Bits most = 0;
    SECANT_UNROLL
    for (int i = 0; i < N; ++i) {
      SECANT_UNROLL
      for (int j = 0; j < N; ++j) {
        const typename Real<C>::Bits m = magnitude(x[i][j]);
        most = m > most ? m : most;
      }
    }
    s[0] = restrain<C>(most);
  }
  SECANT_UNROLL
  for (int i = 0; i < N; ++i) {
    SECANT_UNROLL
    for (int j = 0; j < N; ++j) {
      if (!Spd) {
        x[i][j] *= s[0];
      } else if (j <= i) {
        x[i][j] = x[i][j] * s[i] * s[j];
      }
    }
  }
}

template <class C, int N>
SECANT_DEVICE Layout whole(i64 stride, int ld, int pitch) {
  return Layout{stride, N, ld, pitch, N, N};
}

template <bool Spd, class C, int N>
SECANT_DEVICE void thread_inv(const Blocks& a, unsigned char* memory) {
  constexpr int pitch = N * N | 1;
  const Team<1> team = team_of<1>(a, memory);
  C* tiles = reinterpret_cast<C*>(team.memory);
  C* tile = tiles + team.rank * pitch;
  if (team.first * 32 >= a.batch) return;
  const i64 first = team.first * 32;
  const int count = smaller(a.batch - first, 32);
  fetch(a.type, a.a, first * a.a_stride, whole<C, N>(a.a_stride, N, pitch), count, tiles, team.rank, 32);
  __syncwarp();
  const i64 b = first + (team.rank < count ? team.rank : 0);
  C x[N][N], s[N];
  take<Spd>(a, tile, shift_of<C>(a, b), x);
  scale<Spd>(x, s);
  int bad;
  if (Spd) {
    bad = sweep(x);
    SECANT_UNROLL
    for (int i = 0; i < N; ++i) {
      SECANT_UNROLL
      for (int j = 0; j <= i; ++j) {
        const C y = bad ? nan<C>() : -x[i][j] * s[i] * s[j];
        tile[i * N + j] = y;
        tile[j * N + i] = y;
      }
    }
  } else {
    int order[N];
    bad = factor_lu<true>(x, order);
    C reciprocal[N];
    SECANT_UNROLL
    for (int i = 0; i < N; ++i) reciprocal[i] = C(1) / x[i][i];
    SECANT_UNROLL
    for (int j = 0; j < N; ++j) {  // column j of U^-1 L^-1, which belongs to row order[j] of A
      C y[N];
      SECANT_UNROLL
      for (int i = 0; i < N; ++i) y[i] = i > j ? x[i][j] : C(i == j);
      SECANT_UNROLL
      for (int k = N - 1; k >= 0; --k) {
        y[k] *= reciprocal[k];
        SECANT_UNROLL
        for (int i = 0; i < k; ++i) y[i] -= x[i][k] * y[k];
        tile[k * N + order[j]] = bad ? nan<C>() : y[k] * s[0];
      }
    }
  }
  if (team.rank < count) reinterpret_cast<int*>(a.info)[b] = bad;
  __syncwarp();
  store(a.type, a.out, first * (N * N), whole<C, N>(N * N, N, pitch), count, tiles, team.rank, 32);
}

template <bool Spd, class C, int N>
SECANT_DEVICE void thread_solve(const Blocks& a, unsigned char* memory) {
  constexpr int pitch = N * N | 1;
  const Team<1> team = team_of<1>(a, memory);
  C* tiles = reinterpret_cast<C*>(team.memory);
  C* tile = tiles + team.rank * pitch;
  if (team.first * 32 >= a.batch) return;
  const i64 first = team.first * 32;
  const int count = smaller(a.batch - first, 32);
  fetch(a.type, a.a, first * a.a_stride, whole<C, N>(a.a_stride, N, pitch), count, tiles, team.rank, 32);
  __syncwarp();
  const i64 b = first + (team.rank < count ? team.rank : 0);
  C x[N][N], s[N];
  int order[N];
  take<Spd>(a, tile, shift_of<C>(a, b), x);
  scale<Spd>(x, s);
  const int bad = Spd ? factor_spd(x) : factor_lu<false>(x, order);
  if (team.rank < count) reinterpret_cast<int*>(a.info)[b] = bad;
  C reciprocal[N];
  SECANT_UNROLL
  for (int i = 0; i < N; ++i) reciprocal[i] = C(1) / x[i][i];
  SECANT_LOOP
  for (int c0 = 0; c0 < a.k; c0 += N) {  // at most N columns at a time, so that they fit into the same tile
    const int columns = a.k - c0 < N ? a.k - c0 : N;
    const int narrow = N * columns | 1;
    Layout layout{a.b_stride, a.k, columns, narrow, N, columns};
    __syncwarp();
    fetch(a.type, a.b, first * a.b_stride + c0, layout, count, tiles, team.rank, 32);
    __syncwarp();
    C* mine = tiles + team.rank * narrow;
    SECANT_LOOP
    for (int c = 0; c < columns; ++c) {
      C y[N];
      SECANT_UNROLL
      for (int i = 0; i < N; ++i) y[i] = Spd ? mine[i * columns + c] * s[i] : mine[order[i] * columns + c];
      SECANT_UNROLL
      for (int k = 0; k < N; ++k) {
        SECANT_UNROLL
        for (int i = k + 1; i < N; ++i) y[i] -= x[i][k] * y[k];
      }
      if (Spd) {
        SECANT_UNROLL
        for (int i = 0; i < N; ++i) y[i] *= reciprocal[i];
      }
      SECANT_UNROLL
      for (int k = N - 1; k >= 0; --k) {
        if (!Spd) y[k] *= reciprocal[k];
        SECANT_UNROLL
        for (int i = 0; i < k; ++i) y[i] -= (Spd ? x[k][i] : x[i][k]) * y[k];
        mine[k * columns + c] = bad ? nan<C>() : y[k] * (Spd ? s[k] : s[0]);
      }
    }
    __syncwarp();
    layout.stride = i64(N) * a.k;
    store(a.type, a.out, first * layout.stride + c0, layout, count, tiles, team.rank, 32);
  }
}

// ---------------------------------------------------------------------------------------------------- rows

// Threads of a team that share a matrix of at most W rows; for spd inverse and solve, which reduce nothing over rows,
// as many as there are rows.
template <int W>
struct Lanes {
  static constexpr int value = W <= 8 ? 8 : (W <= 16 ? 16 : (W <= 32 ? 32 : 64));
};

template <class C>
struct Vec {
  static constexpr int value = 16 / int(sizeof(C));
};

// Elements from one row of W to the next: 16-byte accesses of neighbouring rows fall on different banks.
template <class C, int W>
struct Padded {
  static constexpr int value = (W / Vec<C>::value | 1) * Vec<C>::value;
};

template <class C>
SECANT_DEVICE int round_up(int elements) {
  return (elements + Vec<C>::value - 1) / Vec<C>::value * Vec<C>::value;
}

// The place of a thread: which matrix of the tile, which row. A thread without a row (`mine` false) computes along.
struct Place {
  int matrices, matrix, row;
  bool mine;
};

template <int Warps>
SECANT_DEVICE Place place_of(int rank, int lanes) {
  Place p;
  p.matrices = Warps == 1 ? 32 / lanes : 1;
  const int matrix = rank / lanes;
  p.mine = matrix < p.matrices;
  p.matrix = p.mine ? matrix : 0;
  p.row = p.mine ? rank % lanes : 0;
  return p;
}

// row[j - 1] = row[j] - f x[j], and `last` at the end.
template <int W, class C>
SECANT_DEVICE void turn(C (&row)[W], const C* x, C f, C last) {
  constexpr int vec = Vec<C>::value;
  SECANT_UNROLL
  for (int c = 0; c < W; c += vec) {
    C y[vec];
    load_wide<vec>(x + c, y);
    SECANT_UNROLL
    for (int e = 0; e < vec; ++e) {
      if (c + e > 0) row[c + e - 1] = row[c + e] - f * y[e];
    }
  }
  row[W - 1] = last;
}

// The row of this thread, from the lower triangle of a tile, scaled by powers of two: s_i a_ij s_j. `scales` receives
// s, and 0 behind it up to W.
template <int W, int Warps, class C>
SECANT_DEVICE void take_spd(const Blocks& a, const Place& at, const C* tile, int ld, C shift, C* scales, C (&row)[W]) {
  const int n = a.n, r = at.row;
  const C diagonal = damped(a, tile[r * ld + r], shift), s = balance(diagonal);
  if (at.mine) {
    scales[r] = s;
    if (r < W - n) scales[n + r] = C(0);
  }
  sync<Warps>();
  SECANT_UNROLL
  for (int j = 0; j < W; ++j) {
    row[j] = C(0);
    if (j < n) row[j] = (j == r ? diagonal : tile[j < r ? r * ld + j : j * ld + r]) * s * scales[j];
  }
}

// Shared memory of a matrix: tile n (n | 1), posts 2 W, scales W.
template <class C, int W, int Warps>
SECANT_DEVICE void rows_inv_spd(const Blocks& a, unsigned char* memory) {
  const Team<Warps> team = team_of<Warps>(a, memory);
  const int n = a.n, ld = n | 1;
  const Place at = place_of<Warps>(team.rank, n);
  const int r = at.row;
  C* tiles = reinterpret_cast<C*>(team.memory);
  C* tile = tiles + at.matrix * n * ld;
  C* posts = tiles + round_up<C>(at.matrices * n * ld) + at.matrix * (3 * W);
  C* scales = posts + 2 * W;
  const i64 first = team.first * at.matrices;
  if (first >= a.batch) return;
  const int count = smaller(a.batch - first, at.matrices);
  fetch(a.type, a.a, first * a.a_stride, Layout{a.a_stride, n, ld, n * ld, n, n}, count, tiles, team.rank, team.size);
  sync<Warps>();
  const bool stored = at.mine && at.matrix < count;
  const i64 b = first + (stored ? at.matrix : 0);
  C row[W];
  take_spd<W, Warps>(a, at, tile, ld, shift_of<C>(a, b), scales, row);
  int bad = 0;
  SECANT_LOOP
  for (int k = 0; k < n; ++k) {  // sweep() above, a row a thread
    C* post = posts + k % 2 * W;
    const int slot = r - k;
    if (at.mine) {
      post[slot < 0 ? slot + W : slot] = row[0];
      if (r < W - n) post[n + r - k] = C(0);
    }
    sync<Warps>();
    const C d = post[0], inverse = C(1) / d, own = row[0] * inverse;
    if (bad == 0 && !(d > C(0) && finite(d))) bad = k + 1;
    // Row k itself becomes row k / d: its registers equal what is posted, so that 1 - 1/d times that is to go. 1/d is
    // above 1/4 after the scaling, hence no cancellation to speak of.
    turn(row, post, r == k ? C(1) - inverse : own, r == k ? -inverse : own);
  }
  const C s = bad ? nan<C>() : -scales[r];
  SECANT_UNROLL
  for (int j = 0; j < W; ++j) {
    const int col = j + n - W;
    if (col >= 0 && col <= r && at.mine) {
      const C x = row[j] * s * scales[col];
      tile[r * ld + col] = x;
      tile[col * ld + r] = x;
    }
  }
  if (stored && r == 0) reinterpret_cast<int*>(a.info)[b] = bad;
  sync<Warps>();
  store(a.type, a.out, first * (n * n), Layout{i64(n) * n, n, ld, n * ld, n, n}, count, tiles, team.rank, team.size);
}

// Largest value of u64 or u32 over the threads of a matrix; `board` holds two words for Warps == 2.
template <int Lanes_, class B>
SECANT_DEVICE B lanes_max(B x, u64* board) {
  SECANT_UNROLL
  for (int o = 1; o < Lanes_ && o < 32; o <<= 1) {
    const B y = __shfl_xor_sync(kAll, x, o);
    x = y > x ? y : x;
  }
  if (Lanes_ == 64) {
    if (threadIdx.x % 32u == 0) board[threadIdx.x / 32u] = x;
    __syncthreads();
    const u64 low = board[0], high = board[1];
    x = B(low > high ? low : high);
    __syncthreads();
  }
  return x;
}

// Implicit pivoting: the rows stay where they are. `order` of a row is the step that has chosen it, or -1; `position`
// is where LAPACK's exchanges would have brought it, which decides between equal candidates.
struct Pivoting {
  int position, order;
};

// What the two warps of a block tell each other at each step.
struct Candidate {
  u64 key;
  int position, row;
};

// Chooses the row for step k and has it post its registers at `posts` (W, for two warps 2 W); after this the posted row
// may be read. Returns where it is.
template <int W, int Warps, class C>
SECANT_DEVICE const C* choose(int k, bool in, const C (&row)[W], Pivoting& x, C* posts, Candidate* candidates) {
  typedef typename Real<C>::Bits Bits;
  constexpr int lanes = Lanes<W>::value < 32 ? Lanes<W>::value : 32;
  const int lane = int(threadIdx.x % 32u), warp = Warps == 1 ? 0 : int(threadIdx.x / 32u);
  const u32 group = lanes == 32 ? kAll : ((1u << lanes % 32) - 1u) << lane / lanes * lanes;
  const Bits key = in && x.order < 0 ? magnitude(row[0]) + 1 : 0;
  const Bits best = lanes_max<lanes>(key, nullptr);
  u32 equal = __ballot_sync(kAll, key == best) & group;
  if (__ballot_sync(kAll, best != 0 && (equal & (equal - 1u)) != 0)) {  // more than one somewhere in the warp
    const u32 mine = key == best ? u32(127 - x.position) : 0u;
    const u32 lowest = lanes_max<lanes>(mine, nullptr);
    equal = __ballot_sync(kAll, mine == lowest) & group;
  }
  const int winner = __ffs(int(equal)) - 1;
  int chosen = (Warps == 2 ? warp * 32 : 0) + winner, position = __shfl_sync(kAll, x.position, winner);
  if (lane == winner) {
    store_wide<W>(posts + warp * W, row);
    if (Warps == 2) candidates[warp] = Candidate{best, position, chosen};
  }
  sync<Warps>();
  const C* post = posts;
  if (Warps == 2) {
    const bool second = candidates[1].key > candidates[0].key ||
                        (candidates[1].key == candidates[0].key && candidates[1].position < candidates[0].position);
    chosen = candidates[second].row;
    position = candidates[second].position;
    if (second) post += W;
  }
  if ((Warps == 2 ? int(threadIdx.x) : lane) == chosen) {
    x.position = k;
    x.order = k;
  } else if (x.position == k) {
    x.position = position;
  }
  return post;
}

// The row of this thread of a general matrix, scaled by `s`, a power of two for all of it.
template <int W, class C>
SECANT_DEVICE void take_general(const Blocks& a, const Place& at, const C* tile, int ld, C shift, u64* board, C& s,
                                C (&row)[W]) {
  const int n = a.n, r = at.row;
  typename Real<C>::Bits most = 0;
  SECANT_UNROLL
  for (int j = 0; j < W; ++j) {
    row[j] = C(0);
    if (j < n && r < n) row[j] = tile[r * ld + j];
    if (j == r) row[j] = damped(a, row[j], shift);
    const typename Real<C>::Bits m = magnitude(row[j]);
    most = m > most ? m : most;
  }
  s = restrain<C>(lanes_max<Lanes<W>::value>(most, board));
  SECANT_UNROLL
  for (int j = 0; j < W; ++j) row[j] *= s;
}

// Shared memory of a matrix: n columns of max(n | 1, Padded), posts 2 W (for two warps 4 W), for two warps 4 candidates
// and 2 words.
//
// LU with L^-1 in the place of L, then back substitution with one column of the inverse a thread: A X = I is solved
// column by column, so that A X - I is small whatever the condition. Gauss-Jordan would promise that of neither side.
template <class C, int W, int Warps>
SECANT_DEVICE void rows_inv_lu(const Blocks& a, unsigned char* memory) {
  constexpr int vec = Vec<C>::value, ldm = Padded<C, W>::value;
  const Team<Warps> team = team_of<Warps>(a, memory);
  const int n = a.n, ld = n | 1, pitch = round_up<C>(n * (ld > ldm ? ld : ldm));
  const Place at = place_of<Warps>(team.rank, Lanes<W>::value);
  const int r = at.row;
  C* tiles = reinterpret_cast<C*>(team.memory);
  C* tile = tiles + at.matrix * pitch;
  C* posts = tiles + at.matrices * pitch + at.matrix * (2 * W);
  Candidate* candidates = reinterpret_cast<Candidate*>(tiles + pitch + 4 * W);
  u64* board = reinterpret_cast<u64*>(candidates + 4);
  const i64 first = team.first * at.matrices;
  if (first >= a.batch) return;
  const int count = smaller(a.batch - first, at.matrices);
  fetch(a.type, a.a, first * a.a_stride, Layout{a.a_stride, n, ld, pitch, n, n}, count, tiles, team.rank, team.size);
  sync<Warps>();
  const bool stored = at.matrix < count;
  const i64 b = first + (stored ? at.matrix : 0);
  C row[W], s;
  take_general(a, at, tile, ld, shift_of<C>(a, b), board, s, row);
  Pivoting x{r, -1};
  int bad = 0;
  SECANT_LOOP
  for (int k = 0; k < n; ++k) {
    const bool left = x.order < 0;
    const C* post = choose<W, Warps>(k, r < n, row, x, posts + k % 2 * (Warps * W), candidates + k % 2 * 2);
    const C pivot = post[0];
    if (bad == 0 && !(pivot != C(0) && finite(pivot))) bad = k + 1;
    const bool eliminate = left && x.order < 0;
    const C f = eliminate ? row[0] / pivot : C(0);
    turn(row, post, f, eliminate ? -f : row[0]);
  }
  // Column k of both factors at tile + k ldm: U from the end backwards, row i at W - 1 - k + i; L^-1 at i - k - 1.
  const int mine = x.order < 0 ? 0 : x.order;
  SECANT_UNROLL
  for (int j = 0; j < W; ++j) {
    const int col = j + n - W;
    if (col >= 0 && r < n) tile[col * ldm + (mine <= col ? W - 1 - col + mine : mine - col - 1)] = row[j];
  }
  sync<Warps>();
  // Column `mine` of L^-1, row i at register W - n + i; then U x = y with the last row left always in register W - 1.
  SECANT_UNROLL
  for (int j = 0; j < W; ++j) {
    const int i = j + n - W;
    row[j] = i == mine ? C(1) : C(0);
    if (i > mine) row[j] = tile[mine * ldm + i - mine - 1];
  }
  SECANT_LOOP
  for (int k = n - 1; k >= 0; --k) {
    const C* u = tile + k * ldm;
    const C y = row[W - 1] / u[W - 1];
    SECANT_UNROLL
    for (int c = W - vec; c >= 0; c -= vec) {
      C column[vec];
      load_wide<vec>(u + c, column);
      SECANT_UNROLL
      for (int e = vec - 1; e >= 0; --e) {
        if (c + e < W - 1) row[c + e + 1] = row[c + e] - y * column[e];
      }
    }
    sync<Warps>();  // column k has been read; its place takes row k of the inverse
    if (r < n) tile[k * ldm + r] = bad ? nan<C>() : y * s;
  }
  if (stored && r == 0) reinterpret_cast<int*>(a.info)[b] = bad;
  sync<Warps>();
  store(a.type, a.out, first * (n * n), Layout{i64(n) * n, n, ldm, pitch, n, n}, count, tiles, team.rank, team.size);
}

// Forward and back substitution with R columns: `f` (n, n) the multipliers by step, `u` the pivot rows, each starting
// at its pivot. Row r of the right-hand sides is in x; the components of the solution go to `to` by elimination order.
template <int R, int Warps, class C>
SECANT_DEVICE void substitute(int n, int r, int order, const C* f, const C* u, int ldu, C* posts, C (&x)[R]) {
  SECANT_LOOP
  for (int k = 0; k + 1 < n; ++k) {
    C* post = posts + k % 2 * kColumns;
    if (order == k) {
      SECANT_UNROLL
      for (int c = 0; c < R; ++c) post[c] = x[c];
    }
    sync<Warps>();
    if (order > k) {
      const C factor = f[k * n + r];
      SECANT_UNROLL
      for (int c = 0; c < R; ++c) x[c] -= factor * post[c];
    }
  }
  SECANT_LOOP
  for (int k = n - 1; k >= 0; --k) {
    C* post = posts + k % 2 * kColumns;
    if (order == k) {
      const C pivot = u[k * ldu];
      SECANT_UNROLL
      for (int c = 0; c < R; ++c) {
        x[c] /= pivot;
        post[c] = x[c];
      }
    }
    sync<Warps>();
    if (order >= 0 && order < k) {
      const C factor = u[order * ldu + k - order];
      SECANT_UNROLL
      for (int c = 0; c < R; ++c) x[c] -= factor * post[c];
    }
  }
}

// Shared memory of a matrix: pivot rows n max(n | 1, Padded), multipliers n n, right-hand sides n (min(k, 8) | 1),
// posts 2 W (for two warps 4 W) which also serve the substitution, scales W; for two warps 4 candidates and 2 words.
template <bool Spd, class C, int W, int Warps>
SECANT_DEVICE void rows_solve(const Blocks& a, unsigned char* memory) {
  constexpr int ldu = Padded<C, W>::value;
  const Team<Warps> team = team_of<Warps>(a, memory);
  const int n = a.n, ld = n | 1, pitch = round_up<C>(n * (ld > ldu ? ld : ldu));
  const int widest = a.k < kColumns ? a.k : kColumns, right_pitch = n * (widest | 1);
  const Place at = place_of<Warps>(team.rank, Spd ? n : Lanes<W>::value);
  const int r = at.row, m = at.matrix;
  const bool in = at.mine && r < n;
  C* tiles = reinterpret_cast<C*>(team.memory);
  C* u = tiles + m * pitch;
  C* posts = tiles + at.matrices * pitch + m * (2 * Warps * W + W);
  C* scales = posts + 2 * Warps * W;
  C* multipliers = tiles + at.matrices * (pitch + 2 * Warps * W + W);
  C* f = multipliers + m * n * n;
  C* rights = multipliers + at.matrices * n * n;
  Candidate* candidates = reinterpret_cast<Candidate*>(multipliers + round_up<C>(n * n + right_pitch));
  u64* board = reinterpret_cast<u64*>(candidates + 4);
  const i64 first = team.first * at.matrices;
  if (first >= a.batch) return;
  const int count = smaller(a.batch - first, at.matrices);
  fetch(a.type, a.a, first * a.a_stride, Layout{a.a_stride, n, ld, pitch, n, n}, count, tiles, team.rank, team.size);
  sync<Warps>();
  const bool stored = at.mine && m < count;
  const i64 b = first + (stored ? m : 0);
  C row[W], s = C(1);
  if (Spd) {
    take_spd<W, Warps>(a, at, u, ld, shift_of<C>(a, b), scales, row);
    s = scales[r];
  } else {
    take_general(a, at, u, ld, shift_of<C>(a, b), board, s, row);
  }
  Pivoting x{r, -1};
  int bad = 0;
  SECANT_LOOP
  for (int k = 0; k < n; ++k) {
    C* pivot_row = u + k * ldu;
    const C* post = pivot_row;
    bool eliminate;
    if (Spd) {  // by symmetry row k is the column of register 0
      if (in && r >= k) pivot_row[r - k] = row[0];
      sync<Warps>();
      if (r == k) x.order = k;
      eliminate = in && r > k;
    } else {
      const bool left = x.order < 0;
      post = choose<W, Warps>(k, in, row, x, posts + k % 2 * (Warps * W), candidates + k % 2 * 2);
      if (x.order == k) store_wide<W>(pivot_row, row);
      eliminate = in && left && x.order < 0;
    }
    const C pivot = post[0];
    if (bad == 0 && !((Spd ? pivot > C(0) : pivot != C(0)) && finite(pivot))) bad = k + 1;
    const C factor = eliminate ? row[0] / pivot : C(0);
    if (in) f[k * n + r] = factor;
    turn(row, post, factor, C(0));
  }
  if (!in) x.order = -1;
  if (stored && r == 0) reinterpret_cast<int*>(a.info)[b] = bad;
  const C out_scale = bad ? nan<C>() : s;
  SECANT_LOOP
  for (int c0 = 0; c0 < a.k; c0 += kColumns) {
    const int columns = a.k - c0 < kColumns ? a.k - c0 : kColumns, ldb = columns | 1;
    Layout layout{a.b_stride, a.k, ldb, right_pitch, n, columns};
    fetch(a.type, a.b, first * a.b_stride + c0, layout, count, rights, team.rank, team.size);
    sync<Warps>();
    C* right = rights + m * right_pitch;
    if (columns == 1) {
      C y[1] = {in ? right[r] * (Spd ? s : C(1)) : C(0)};
      substitute<1, Warps>(n, r, x.order, f, u, ldu, posts, y);
      if (x.order >= 0) right[x.order] = y[0] * out_scale;
    } else {
      C y[kColumns];
      SECANT_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        y[c] = C(0);
        if (c < columns && in) y[c] = right[r * ldb + c] * (Spd ? s : C(1));
      }
      substitute<kColumns, Warps>(n, r, x.order, f, u, ldu, posts, y);
      SECANT_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        if (c < columns && x.order >= 0) right[x.order * ldb + c] = y[c] * out_scale;
      }
    }
    sync<Warps>();
    layout.stride = i64(n) * a.k;
    store(a.type, a.out, first * layout.stride + c0, layout, count, rights, team.rank, team.size);
    sync<Warps>();
  }
}

// ---------------------------------------------------------------------------------------------------- eigenvalues

// Whether an off-diagonal entry x between diagonal entries p and q is still to be zeroed, in a matrix whose largest
// entry is about 1: |x| > eps max(sqrt |p q|, eps). Relative to p and q, which keeps small eigenvalues of graded
// positive matrices accurate (Demmel and Veselic), with a floor far below the rounding of the whole.
template <class C>
SECANT_DEVICE bool above(C p, C q, C x) {
  constexpr C square = Real<C>::eps * Real<C>::eps;
  const C size = fabs(p * q);
  return x * x > square * (size > square ? size : square);
}

// The rotation that zeroes x: t the tangent, |t| <= 1 (Golub and Van Loan, Algorithm 8.5.1).
template <class C>
SECANT_DEVICE C tangent(C p, C q, C x, C& c, C& s) {
  const C tau = (q - p) / (x + x), size = fabs(tau) + sqrt(C(1) + tau * tau);
  const C t = C(1) / (tau < C(0) ? -size : size);
  c = C(1) / sqrt(C(1) + t * t);
  s = t * c;
  return t;
}

// Power of two that brings a largest magnitude near 1; `back` its inverse.
template <class C>
SECANT_DEVICE C normalise(typename Real<C>::Bits largest, C& back) {
  constexpr int most = Real<C>::bias - 1;
  const int e = exponent<C>(largest), kept = e > most ? most : (e < -most ? -most : e);
  back = power<C>(kept);
  return power<C>(-kept);
}

// The function of an eigenvalue that abs_inv or inv_root asks for; `floor`, of kMax, is what the clamped are damped by.
template <class C>
SECANT_DEVICE C function_of(const Blocks& a, C w, C floor) {
  if (a.function == kAbsInv) return C(1) / (fabs(w) > floor ? fabs(w) : floor);
  if (a.mode == kMax) {
    w = (w > C(0) ? w : C(0)) + floor;
    if (w == C(0)) return w;
  }
  if (a.p == 2) w = sqrt(w);
  if (a.p == 4) w = sqrt(sqrt(w));
  return C(1) / w;
}

SECANT_DEVICE int eigen_info(const Blocks& a, bool broken, int left, int nonpositive) {
  if (a.mode == kMax && left != 0 && !broken) return -3;
  return broken ? -1 : (left != 0 ? left : (a.function == kInvRoot ? nonpositive : 0));
}

// Whether a function has no result.
SECANT_DEVICE bool fails(const Blocks& a, int info) { return a.mode == kMax ? info < 0 : info != 0; }

// Whether `inv_root` counts this eigenvalue.
template <class C>
SECANT_DEVICE bool counts(const Blocks& a, C w) {
  return a.mode == kMax ? w < C(0) : w <= C(0);
}

template <class C, int N>
SECANT_DEVICE void thread_eigen(const Blocks& a, unsigned char* memory) {
  typedef typename Real<C>::Bits Bits;
  constexpr int pitch = N * N | 1;
  const Team<1> team = team_of<1>(a, memory);
  C* tiles = reinterpret_cast<C*>(team.memory);
  C* tile = tiles + team.rank * pitch;
  if (team.first * 32 >= a.batch) return;
  const i64 first = team.first * 32;
  const int count = smaller(a.batch - first, 32);
  fetch(a.type, a.a, first * a.a_stride, whole<C, N>(a.a_stride, N, pitch), count, tiles, team.rank, 32);
  __syncwarp();
  const i64 b = first + (team.rank < count ? team.rank : 0);
  const C shift = shift_of<C>(a, b);
  C x[N][N], v[N][N], back;
  take<true>(a, tile, shift, x);
  Bits most = 0;
  SECANT_UNROLL
  for (int i = 0; i < N; ++i) {
    SECANT_UNROLL
    for (int j = 0; j < N; ++j) {
      if (j <= i) most = magnitude(x[i][j]) > most ? magnitude(x[i][j]) : most;
      v[i][j] = C(i == j);
    }
  }
  const bool broken = team.rank >= count || most >= infinity<C>();
  const C s = normalise(most, back);
  SECANT_UNROLL
  for (int i = 0; i < N; ++i) {
    SECANT_UNROLL
    for (int j = 0; j <= i; ++j) x[i][j] *= s;
  }
  bool live = !broken;
  SECANT_LOOP
  for (int sweep = 0; live && sweep < a.sweeps; ++sweep) {
    live = false;
    SECANT_UNROLL
    for (int p = 0; p < N; ++p) {
      SECANT_UNROLL
      for (int q = p + 1; q < N; ++q) {
        if (!above(x[p][p], x[q][q], x[q][p])) continue;
        live = true;
        C c, d;
        const C t = tangent(x[p][p], x[q][q], x[q][p], c, d);
        x[p][p] -= t * x[q][p];
        x[q][q] += t * x[q][p];
        x[q][p] = C(0);
        SECANT_UNROLL
        for (int i = 0; i < N; ++i) {
          if (i != p && i != q) {
            C& left = i > p ? x[i][p] : x[p][i];
            C& right = i > q ? x[i][q] : x[q][i];
            const C y = left, z = right;
            left = c * y - d * z;
            right = d * y + c * z;
          }
          const C y = v[i][p], z = v[i][q];
          v[i][p] = c * y - d * z;
          v[i][q] = d * y + c * z;
        }
      }
    }
  }
  int left = 0, nonpositive = 0;
  C w[N], top = C(0);
  SECANT_UNROLL
  for (int i = 0; i < N; ++i) {
    SECANT_UNROLL
    for (int j = 0; j < i; ++j) left += live && above(x[i][i], x[j][j], x[i][j]);
    w[i] = x[i][i] * back;
    nonpositive += counts(a, w[i]);
    top = w[i] > top ? w[i] : top;
  }
  const int info = eigen_info(a, broken, left, nonpositive);
  if (team.rank < count) reinterpret_cast<int*>(a.info)[b] = info;
  int place[N];
  SECANT_UNROLL
  for (int i = 0; i < N; ++i) {
    place[i] = 0;
    SECANT_UNROLL
    for (int j = 0; j < N; ++j) place[i] += w[j] < w[i] || (j < i && w[j] == w[i]);
  }
  if (a.function == kEigh) {
    SECANT_UNROLL
    for (int i = 0; i < N; ++i) {
      SECANT_UNROLL
      for (int j = 0; j < N; ++j) tile[i * N + (broken ? j : place[j])] = broken ? nan<C>() : v[i][j];
    }
  } else {
    C f[N];
    const C floor = a.mode == kMax ? shift * top : shift;
    SECANT_UNROLL
    for (int i = 0; i < N; ++i) f[i] = function_of(a, w[i], floor);
    SECANT_UNROLL
    for (int i = 0; i < N; ++i) {
      SECANT_UNROLL
      for (int j = 0; j <= i; ++j) {
        C y = C(0);
        SECANT_UNROLL
        for (int k = 0; k < N; ++k) y += v[i][k] * f[k] * v[j][k];
        tile[i * N + j] = tile[j * N + i] = fails(a, info) ? nan<C>() : y;
      }
    }
  }
  __syncwarp();
  store(a.type, a.out, first * (N * N), whole<C, N>(N * N, N, pitch), count, tiles, team.rank, 32);
  __syncwarp();
  if (a.function == kEigh) {
    SECANT_UNROLL
    for (int i = 0; i < N; ++i) tile[broken ? i : place[i]] = broken ? nan<C>() : w[i];
    __syncwarp();
    store(a.type, a.values, first * N, Layout{N, N, N, pitch, 1, N}, count, tiles, team.rank, 32);
    __syncwarp();
  }
}

// One round of disjoint rotations. In even rounds positions 2 i and 2 i + 1 meet, in odd ones 2 i + 1 and 2 i + 2, and
// each pair changes places as it is rotated: after W rounds all have met once, and their order is reversed. So pairs
// are always neighbours and no register is indexed at run time. In odd rounds the first and the last position pause:
// that is the rotation by a right angle, which exchanged is the identity but for the sign of the first.
//
// The lower triangle x is rotated from both sides, 2 x 2 blocks (pair of rows) x (pair of columns); v is a row of V.
template <int Odd, int W, int Warps, class C>
SECANT_DEVICE void jacobi_round(bool live, int r, C* x, C* rotations, C (&v)[W]) {
  constexpr int vec = Vec<C>::value, ld = W + 2, pairs = W / 2, slices = Lanes<W>::value / pairs;
  const int i = r % pairs, slice = r / pairs;
  const bool pause = Odd && i == pairs - 1, player = live && slice < slices;
  const int p = 2 * i + Odd, q = pause ? 0 : p + 1;
  const C app = x[p * ld + p], aqq = x[q * ld + q], apq = pause ? C(0) : x[q * ld + p];
  C c = pause ? C(0) : C(1), s = pause ? C(1) : C(0), t = C(0);
  const bool rotate = player && above(app, aqq, apq);
  if (rotate) t = tangent(app, aqq, apq, c, s);
  if (slice == 0) {
    rotations[2 * i] = c;
    rotations[2 * i + 1] = s;
  }
  sync<Warps>();
  if (player && slice == 0) {
    if (pause) {
      x[p * ld] = -x[p * ld];
    } else {
      x[p * ld + p] = aqq + t * apq;
      x[q * ld + q] = app - t * apq;
      x[q * ld + p] = rotate ? C(0) : apq;
    }
  }
  SECANT_LOOP
  for (int d = slice == 0 ? slices : slice; player && 2 * d <= pairs; d += slices) {
    if (2 * d == pairs && 2 * i >= pairs) break;  // seen from the other pair
    const int u = i + d < pairs ? i + d : i + d - pairs;
    const int pu = 2 * u + Odd, qu = Odd && u == pairs - 1 ? 0 : pu + 1;
    const C cu = rotations[2 * u], su = rotations[2 * u + 1];
    C& a00 = x[p > pu ? p * ld + pu : pu * ld + p];
    C& a01 = x[p > qu ? p * ld + qu : qu * ld + p];
    C& a10 = x[q > pu ? q * ld + pu : pu * ld + q];
    C& a11 = x[q > qu ? q * ld + qu : qu * ld + q];
    const C y0 = cu * a00 - su * a01, y1 = su * a00 + cu * a01, z0 = cu * a10 - su * a11, z1 = su * a10 + cu * a11;
    a11 = c * y0 - s * z0;
    a10 = c * y1 - s * z1;
    a01 = s * y0 + c * z0;
    a00 = s * y1 + c * z1;
  }
  if (live) {
    SECANT_UNROLL
    for (int j = 0; j < pairs; j += vec / 2) {
      C cs[vec];
      load_wide<vec>(rotations + 2 * j, cs);
      SECANT_UNROLL
      for (int e = 0; e < vec / 2; ++e) {
        const int at = 2 * (j + e) + Odd;
        if (at + 1 < W) {
          const C y = v[at], z = v[at + 1];
          v[at] = cs[2 * e + 1] * y + cs[2 * e] * z;
          v[at + 1] = cs[2 * e] * y - cs[2 * e + 1] * z;
        }
      }
    }
    if (Odd) v[0] = -v[0];
  }
  sync<Warps>();
}

// Shared memory of a matrix, in elements: the matrix, later V, W max(W + 2, Padded); the result n (n | 1); rotations W,
// eigenvalues W, functions or sorted eigenvalues W, places W; for two warps 2 words behind it.
template <class C, int W, int Warps>
SECANT_DEVICE void rows_eigen(const Blocks& a, unsigned char* memory) {
  typedef typename Real<C>::Bits Bits;
  constexpr int vec = Vec<C>::value, ldv = Padded<C, W>::value, ld = W + 2, lanes = Lanes<W>::value;
  constexpr int square = (W * (ld > ldv ? ld : ldv) + vec - 1) / vec * vec;
  const Team<Warps> team = team_of<Warps>(a, memory);
  const int n = a.n, ldx = n | 1, pitch = square + round_up<C>(n * ldx) + 4 * W;
  const Place at = place_of<Warps>(team.rank, lanes);
  const int r = at.row;
  C* tiles = reinterpret_cast<C*>(team.memory);
  C* x = tiles + at.matrix * pitch;
  C* rotations = x + pitch - 4 * W;
  C* values = rotations + W;
  C* results = values + W;
  int* places = reinterpret_cast<int*>(results + W);
  u64* board = reinterpret_cast<u64*>(tiles + at.matrices * pitch);
  const i64 first = team.first * at.matrices;
  if (first >= a.batch) return;
  const int count = smaller(a.batch - first, at.matrices);
  fetch(a.type, a.a, first * a.a_stride, Layout{a.a_stride, n, ld, pitch, n, n}, count, tiles, team.rank, team.size);
  sync<Warps>();
  const bool stored = at.matrix < count;
  const i64 b = first + (stored ? at.matrix : 0);
  const C shift = shift_of<C>(a, b);
  Bits most = 0;
  if (r < n) x[r * ld + r] = damped(a, x[r * ld + r], shift);
  SECANT_LOOP
  for (int j = 0; j <= r && r < n; ++j) {
    const Bits m = magnitude(x[r * ld + j]);
    most = m > most ? m : most;
  }
  most = lanes_max<lanes>(most, board);
  C back;
  const C scale = normalise(most, back);
  SECANT_LOOP
  for (int j = 0; j <= r && r < W; ++j) x[r * ld + j] = r < n ? x[r * ld + j] * scale : C(0);
  C v[W];
  SECANT_UNROLL
  for (int j = 0; j < W; ++j) v[j] = C(j == r);
  const bool broken = !stored || most >= infinity<C>();
  bool live = !broken;
  int swept = 0;
  SECANT_LOOP
  for (int done = 0;; ++done) {
    sync<Warps>();
    u32 left = 0;
    SECANT_LOOP
    for (int j = 0; j < r && r < W && live; ++j) left |= above(x[r * ld + r], x[j * ld + j], x[r * ld + j]);
    live = lanes_max<lanes>(left, board) != 0;
    if (done == a.sweeps || __ballot_sync(kAll, live) == 0) break;
    swept += live;
    SECANT_LOOP
    for (int round = 0; round < W; round += 2) {
      jacobi_round<0, W, Warps>(live, r, x, rotations, v);
      jacobi_round<1, W, Warps>(live, r, x, rotations, v);
    }
  }
  int left = 0;
  SECANT_LOOP
  for (int j = 0; live && j < W; ++j) {
    SECANT_LOOP
    for (int k = 0; k < j; ++k) left += above(x[j * ld + j], x[k * ld + k], x[j * ld + k]);
  }
  // After an odd number of sweeps everything stands in reversed order, the padding in front.
  const int begin = swept % 2 ? W - n : 0;
  const bool real = r >= begin && r < begin + n;
  const C w = r < W ? x[r * ld + r] * back : C(0);
  if (r < W) values[r] = w;
  sync<Warps>();
  int place = 0, nonpositive = 0;
  C top = C(0);
  SECANT_LOOP
  for (int j = begin; j < begin + n; ++j) {
    const C y = values[j];
    place += y < w || (j < r && y == w);
    nonpositive += counts(a, y);
    top = y > top ? y : top;
  }
  const int info = eigen_info(a, broken, left, nonpositive);
  if (stored && r == 0) reinterpret_cast<int*>(a.info)[b] = info;
  if (r < W) store_wide<W>(x + r * ldv, v);
  C* result = x + square;
  if (a.function == kEigh) {
    if (real) {
      places[r] = broken ? r : place;
      results[places[r]] = broken ? nan<C>() : w;
    }
    sync<Warps>();
    SECANT_LOOP
    for (int j = begin; j < begin + n && r < n; ++j) {
      result[r * ldx + places[j]] = broken ? nan<C>() : x[r * ldv + j];
    }
  } else {
    if (r < W) results[r] = real ? function_of(a, w, a.mode == kMax ? shift * top : shift) : C(0);
    sync<Warps>();
    SECANT_UNROLL
    for (int j = 0; j < W; j += vec) {
      C f[vec];
      load_wide<vec>(results + j, f);
      SECANT_UNROLL
      for (int e = 0; e < vec; ++e) v[j + e] *= f[e];
    }
    SECANT_LOOP
    for (int j = 0; j < n; ++j) {
      C sums[vec] = {};
      SECANT_UNROLL
      for (int k = 0; k < W; k += vec) {
        C y[vec];
        load_wide<vec>(x + j * ldv + k, y);
        SECANT_UNROLL
        for (int e = 0; e < vec; ++e) sums[e] += v[k + e] * y[e];
      }
      C total = sums[0];
      SECANT_UNROLL
      for (int e = 1; e < vec; ++e) total += sums[e];
      if (j <= r && r < n) result[r * ldx + j] = result[j * ldx + r] = fails(a, info) ? nan<C>() : total;
    }
  }
  sync<Warps>();
  store(a.type, a.out, first * (n * n), Layout{i64(n) * n, n, ldx, pitch, n, n}, count, tiles + square, team.rank,
        team.size);
  if (a.function == kEigh) {
    store(a.type, a.values, first * n, Layout{n, n, n, pitch, 1, n}, count, tiles + (results - x), team.rank,
          team.size);
  }
}

// ---------------------------------------------------------------------------------------------------- entry points

template <class C, int N>
SECANT_DEVICE void inv_spd_t(const Blocks& a, unsigned char* memory) {
  thread_inv<true, C, N>(a, memory);
}
template <class C, int N>
SECANT_DEVICE void inv_lu_t(const Blocks& a, unsigned char* memory) {
  thread_inv<false, C, N>(a, memory);
}
template <class C, int N>
SECANT_DEVICE void solve_spd_t(const Blocks& a, unsigned char* memory) {
  thread_solve<true, C, N>(a, memory);
}
template <class C, int N>
SECANT_DEVICE void solve_lu_t(const Blocks& a, unsigned char* memory) {
  thread_solve<false, C, N>(a, memory);
}
template <class C, int N>
SECANT_DEVICE void eigen_t(const Blocks& a, unsigned char* memory) {
  thread_eigen<C, N>(a, memory);
}
template <class C, int W>
SECANT_DEVICE void inv_spd_w(const Blocks& a, unsigned char* memory) {
  rows_inv_spd<C, W, 1>(a, memory);
}
template <class C, int W>
SECANT_DEVICE void inv_lu_w(const Blocks& a, unsigned char* memory) {
  rows_inv_lu<C, W, 1>(a, memory);
}
template <class C, int W>
SECANT_DEVICE void solve_spd_w(const Blocks& a, unsigned char* memory) {
  rows_solve<true, C, W, 1>(a, memory);
}
template <class C, int W>
SECANT_DEVICE void solve_lu_w(const Blocks& a, unsigned char* memory) {
  rows_solve<false, C, W, 1>(a, memory);
}
template <class C, int W>
SECANT_DEVICE void eigen_w(const Blocks& a, unsigned char* memory) {
  rows_eigen<C, W, 1>(a, memory);
}
template <class C, int W>
SECANT_DEVICE void inv_spd_b(const Blocks& a, unsigned char* memory) {
  rows_inv_spd<C, W, 2>(a, memory);
}
template <class C, int W>
SECANT_DEVICE void inv_lu_b(const Blocks& a, unsigned char* memory) {
  rows_inv_lu<C, W, 2>(a, memory);
}
template <class C, int W>
SECANT_DEVICE void solve_spd_b(const Blocks& a, unsigned char* memory) {
  rows_solve<true, C, W, 2>(a, memory);
}
template <class C, int W>
SECANT_DEVICE void solve_lu_b(const Blocks& a, unsigned char* memory) {
  rows_solve<false, C, W, 2>(a, memory);
}
template <class C, int W>
SECANT_DEVICE void eigen_b(const Blocks& a, unsigned char* memory) {
  rows_eigen<C, W, 2>(a, memory);
}

constexpr int kThreads_t = 128, kThreads_w = 128, kThreads_b = 64;  // of a block: four warps, or one team

// Blocks of a multiprocessor that the registers have to allow for: those of a row, and others by operation.
constexpr int kSpare_inv_spd = 64, kSpare_inv_lu = 80, kSpare_solve_spd = 80, kSpare_solve_lu = 80, kSpare_eigen = 84;

template <class C, int N>
constexpr int blocks_t(int) {
  return 1;
}
template <class C, int W>
constexpr int blocks_w(int spare) {
  return 65536 / (kThreads_w * (W * int(sizeof(C) / 4) + spare));
}
template <class C, int W>
constexpr int blocks_b(int spare) {
  return 65536 / (kThreads_b * (W * int(sizeof(C) / 4) + spare + 32));
}

}  // namespace secant_blocks

#define SECANT_BLOCKS_NAME(OP, KIND, N, TAG) blocks_##OP##_##KIND##N##_##TAG
#define SECANT_BLOCKS_BOUNDS(OP, KIND, N, C) \
  __launch_bounds__(secant_blocks::kThreads_##KIND, secant_blocks::blocks_##KIND<C, N>(secant_blocks::kSpare_##OP))
#define SECANT_BLOCKS_ENTRY(OP, KIND, N, TAG, C)                                                                   \
  extern "C" __global__ void SECANT_BLOCKS_BOUNDS(OP, KIND, N, C) SECANT_BLOCKS_NAME(OP, KIND, N, TAG)(Blocks a) { \
    SECANT_DYNAMIC_SHARED(memory);                                                                                 \
    secant_blocks::OP##_##KIND<C, N>(a, memory);                                                                   \
  }

// The sizes of plan.py. A build may choose fewer kernels by defining SECANT_BLOCKS_KERNELS before this file.
#define SECANT_BLOCKS_THREADS(X, OP, TAG, C) \
  X(OP, t, 1, TAG, C)                        \
  X(OP, t, 2, TAG, C) X(OP, t, 3, TAG, C) X(OP, t, 4, TAG, C) X(OP, t, 5, TAG, C) X(OP, t, 6, TAG, C)
#define SECANT_BLOCKS_MORE_THREADS(X, OP, TAG, C) X(OP, t, 7, TAG, C) X(OP, t, 8, TAG, C)
#define SECANT_BLOCKS_ROWS(X, OP, TAG, C) \
  X(OP, w, 16, TAG, C) X(OP, w, 24, TAG, C) X(OP, w, 32, TAG, C) X(OP, b, 48, TAG, C) X(OP, b, 64, TAG, C)
#define SECANT_BLOCKS_MORE_ROWS(X, OP, TAG, C) \
  X(OP, w, 12, TAG, C) X(OP, w, 20, TAG, C) X(OP, w, 28, TAG, C) X(OP, b, 40, TAG, C) X(OP, b, 56, TAG, C)
#define SECANT_BLOCKS_INV_SPD(X, TAG, C)         \
  SECANT_BLOCKS_THREADS(X, inv_spd, TAG, C)      \
  SECANT_BLOCKS_MORE_THREADS(X, inv_spd, TAG, C) \
  SECANT_BLOCKS_ROWS(X, inv_spd, TAG, C) SECANT_BLOCKS_MORE_ROWS(X, inv_spd, TAG, C)
#define SECANT_BLOCKS_INV_LU(X, TAG, C)    \
  SECANT_BLOCKS_THREADS(X, inv_lu, TAG, C) \
  SECANT_BLOCKS_MORE_THREADS(X, inv_lu, TAG, C) SECANT_BLOCKS_ROWS(X, inv_lu, TAG, C) X(inv_lu, w, 12, TAG, C)
#define SECANT_BLOCKS_SOLVE(X, OP, TAG, C) \
  SECANT_BLOCKS_THREADS(X, OP, TAG, C) SECANT_BLOCKS_MORE_THREADS(X, OP, TAG, C) SECANT_BLOCKS_ROWS(X, OP, TAG, C)
#define SECANT_BLOCKS_EIGEN(X, TAG, C)    \
  SECANT_BLOCKS_THREADS(X, eigen, TAG, C) \
  X(eigen, w, 8, TAG, C) X(eigen, w, 12, TAG, C) SECANT_BLOCKS_ROWS(X, eigen, TAG, C)
#define SECANT_BLOCKS_TYPE(X, TAG, C) \
  SECANT_BLOCKS_INV_SPD(X, TAG, C)    \
  SECANT_BLOCKS_INV_LU(X, TAG, C)     \
  SECANT_BLOCKS_SOLVE(X, solve_spd, TAG, C) SECANT_BLOCKS_SOLVE(X, solve_lu, TAG, C) SECANT_BLOCKS_EIGEN(X, TAG, C)
#ifndef SECANT_BLOCKS_KERNELS
#define SECANT_BLOCKS_KERNELS(X) SECANT_BLOCKS_TYPE(X, f32, float) SECANT_BLOCKS_TYPE(X, f64, double)
#endif
SECANT_BLOCKS_KERNELS(SECANT_BLOCKS_ENTRY)
