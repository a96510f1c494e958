// Products without a Hessian on CUDA: functions of X, cross entropy, paired matrix products. Include-free:
// kernels/cuda_portable.cuh (or the CPU stand-in of the tests) goes in front.
//
// The functions of X have the form out = X^T f(X V), f a function of one row of X V at a time:
//
//   hvp_tile_<K>x<E>   A block copies a tile of rows into shared memory, while it works on the one before. For the tile
//                      in hand: lanes of a warp share a row for X V (K columns of V); a thread takes a row for f; a
//                      thread owns E columns of X for X^T R, with E K sums in registers. So X is read once. After at
//                      most 256 rows the sums go to float64 in memory, where every block has its own.
//   hvp_between        where a row of X is too long for a block, or f too wide: X V from slabs of columns, and f of it,
//                      between two launches of hvp_tile that read X once each.
//   hvp_finish         adds the sums of all blocks in their order.
//
// C is the type of the arithmetic, T what X is stored in (unsigned short: the bits of bfloat16 or float16, told apart
// by `type`). Nothing is atomic and every order is fixed, so results repeat bit for bit.
//
// plan.py chooses kernel, grid and shared memory, and packs the structs below.

struct OfX {
  u64 x, v, weight, sample_weight, target, probs;  // pointers, 0 where absent
  u64 z, partial, values, out, value;              // z: X V (slabs, rows, k); partial (splits, k, length), values: sums
  i64 stride, first, last, d, length, each;        // rows first..last, `each` of them a block; length: rows of V
  double l2, delta;
  int k, type, op, loss;        // op: kGlm, ...; loss: kSquared, ...
  int dots, gather, carry;      // the parts of the work; carry: add to `partial`
  int rows, run, slices, flat;  // rows of a tile, tiles to a run; threads that share a column; whether tiles are runs
  int width, pitch, stage;      // columns of a slab; elements of a row of a tile, and of a tile
  int lanes, shares;            // lanes that share a row for X V; with 32, warps that share its columns
  int slabs, groups, splits, parts;  // parts: of the value
};

struct CrossEntropy {
  u64 logits, u, lse, out;
  i64 rows, vocabulary, logits_stride, u_stride;
  int type, wide, resident, unused;  // resident: pieces of a thread that stay in shared memory
};

struct Product {
  u64 a, b, c, e, bias, scale, p, q, out;
  i64 m, n, k1, k2, each1, each2;                              // each: terms of a part
  i64 a_row, a_col, b_row, b_col, c_row, c_col, e_row, e_col;  // strides
  int tiles_n, parts;                                          // parts > 1: sums go to out[part], hvp_sum ends the work
};

struct Gram {
  u64 x, y, out;                               // y: x, or its weighted rows
  i64 m, n, each, x_row, x_col, y_row, y_col;  // each: rows of a part
  int tiles, parts, accumulate, unused;        // parts > 1: sums go to out[part], hvp_gram_sum (x: them) ends the work
};

namespace secant_hvp {

constexpr u32 kAll = 0xffffffffu;
constexpr int kBlock = 256, kWarps = kBlock / 32;
constexpr int kSame = 0, kBf16 = 1, kF16 = 2;
constexpr int kGlm = 0, kGlmValue = 1, kSoftmax = 2, kSoftmaxValue = 3;
constexpr int kSquared = 0, kLogistic = 1, kPoisson = 2, kHuber = 3, kGamma = 4;

// ---------------------------------------------------------------------------------------------------- numbers

template <class C>
SECANT_DEVICE C widen(C x, int) {
  return x;
}
SECANT_DEVICE float widen(u16 x, int type) { return type == kBf16 ? __uint_as_float(u32(x) << 16) : half_to_float(x); }

template <class T>
struct Narrow {
  SECANT_DEVICE T from(T x, int) { return x; }
};
template <>
struct Narrow<u16> {
  SECANT_DEVICE u16 from(float x, int type) {
    if (type == kF16) return float_to_half(x);
    const u32 bits = __float_as_uint(x);
    return x != x ? u16(0x7fc0) : u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

template <class C>
SECANT_DEVICE C infinity() {
  return C(__uint_as_float(0x7f800000u));
}

template <class C>
SECANT_DEVICE C warp_sum(C x) {
  SECANT_UNROLL
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(kAll, x, o);
  return x;
}

// Sum over the block, for every thread. `board`: a number a warp.
template <class C>
SECANT_DEVICE C block_sum(C x, C* board) {
  const int warps = int(blockDim.x / 32u);
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32u == 0) board[threadIdx.x / 32u] = x;
  __syncthreads();
  C total = board[0];
  SECANT_LOOP
  for (int w = 1; w < warps; ++w) total += board[w];
  return total;
}

// ---------------------------------------------------------------------------------------------------- functions of
// rows

// t e^x, zero for t = 0 where the exponential overflows; NaN stays.
template <class C>
SECANT_DEVICE C times_exp(C t, C x) {
  return t == C(0) && x == x ? C(0) : t * exp(x);
}

// The loss of a prediction z for a target t, and its first two derivatives in z. `number`: delta of kHuber, the power
// of the Tweedie loss.
template <class C>
SECANT_DEVICE void loss_of(int loss, C z, C t, double number, C& value, C& slope, C& curvature) {
  if (loss == kSquared) {
    const C e = z - t;
    value = C(0.5) * e * e;
    slope = e;
    curvature = C(1);
  } else if (loss == kLogistic) {
    const C e = exp(-fabs(z)), q = e / (C(1) + e);  // q: of the less likely label
    // The difference of the two large terms is taken where it is exact.
    value = (z > C(0) ? (C(1) - t) * z : -t * z) + log1p(e);
    slope = z > C(0) ? (C(1) - t) - q : q - t;
    curvature = q / (C(1) + e);
  } else if (loss == kPoisson) {
    const C e = exp(z);
    value = e - t * z;
    slope = e - t;
    curvature = e;
  } else if (loss == kGamma) {
    curvature = times_exp(t, -z);
    value = curvature + z;
    slope = C(1) - curvature;
  } else if (loss != kHuber) {
    const C above = C(2.0 - number), below = C(1.0 - number), up = exp(above * z), down = times_exp(t, below * z);
    value = (below * up - above * down) / (above * below);  // both terms negative; one division
    slope = up - down;
    curvature = above * up - below * down;
  } else {
    const C e = z - t, size = fabs(e), delta = C(number);
    const bool inner = size <= delta;
    value = inner ? C(0.5) * e * e : delta * (size - C(0.5) * delta);
    slope = inner ? e : (e > C(0) ? delta : (e < C(0) ? -delta : e));  // NaN stays
    curvature = inner ? C(1) : (e != e ? e : C(0));
  }
}

// What a row of a linear model is given: its weight, or its target.
template <class C>
SECANT_DEVICE C given_of(const OfX& a, i64 row) {
  return reinterpret_cast<const C*>(a.op == kGlm ? a.weight : a.target)[row];
}

// z of one row becomes what multiplies the row of X in the sum; returns the row's part of the value.
template <class C>
SECANT_DEVICE double glm_row(const OfX& a, i64 row, C given, C* z, int count) {
  if (a.op == kGlm) {
    SECANT_LOOP
    for (int c = 0; c < count; ++c) z[c] *= given;
    return 0.0;
  }
  C value, slope, curvature;
  loss_of(a.loss, z[0], given, a.delta, value, slope, curvature);
  if (a.sample_weight) {
    const C s = reinterpret_cast<const C*>(a.sample_weight)[row];
    value *= s;
    slope *= s;
    curvature *= s;
  }
  z[0] = slope;
  reinterpret_cast<C*>(a.weight)[row] = curvature;
  return double(value);
}

// One thread, or the lanes of a warp, of a row of classes: `rank` of `size`.
template <class C>
SECANT_DEVICE C lanes_sum(C x, int size) {
  return size == 1 ? x : warp_sum(x);
}

template <class C>
SECANT_DEVICE C lanes_max(C x, int size) {
  if (size == 1) return x;
  SECANT_UNROLL
  for (int o = 16; o > 0; o >>= 1) {
    const C y = __shfl_xor_sync(kAll, x, o);
    x = y > x || y != y ? y : x;
  }
  return x;
}

template <class C>
SECANT_DEVICE double softmax_row(const OfX& a, i64 row, C* z, int rank, int size) {
  const C s = a.sample_weight ? reinterpret_cast<const C*>(a.sample_weight)[row] : C(1);
  C* p = reinterpret_cast<C*>(a.probs) + row * a.k;
  if (a.op == kSoftmax) {
    C mean = C(0);
    SECANT_LOOP
    for (int c = rank; c < a.k; c += size) mean += p[c] * z[c];
    mean = lanes_sum(mean, size);
    SECANT_LOOP
    for (int c = rank; c < a.k; c += size) z[c] = s * p[c] * (z[c] - mean);
    return 0.0;
  }
  const i64 target = reinterpret_cast<const i64*>(a.target)[row];
  C largest = -infinity<C>(), logit = C(0), own = C(0), others = C(0);
  SECANT_LOOP
  for (int c = rank; c < a.k; c += size) largest = z[c] > largest || z[c] != z[c] ? z[c] : largest;
  largest = lanes_max(largest, size);
  SECANT_LOOP
  for (int c = rank; c < a.k; c += size) {
    const C e = exp(z[c] - largest);
    if (c == target) {
      logit = z[c];
      own = e;
    } else {
      others += e;
    }
    z[c] = e;
  }
  logit = lanes_sum(logit, size);
  own = lanes_sum(own, size);
  others = lanes_sum(others, size);
  const C scale = C(1) / (own + others);
  // No class: the row is NaN, and so are value and gradient.
  const C factor = target >= 0 && target < a.k ? s : infinity<C>() - infinity<C>();
  SECANT_LOOP
  for (int c = rank; c < a.k; c += size) {
    const C e = z[c];
    p[c] = e * scale;
    // p - 1 of the target is minus the sum of the other probabilities, which does not cancel.
    z[c] = factor * (c == target ? -others * scale : e * scale);
  }
  // The logarithm of a sum that begins with one is that of the rest, in float64: small ones keep their digits.
  const double rest = double(others), log_sum = own == C(1) ? log1p(rest) : log(double(own) + rest);
  return double(factor) * (log_sum + double(largest - logit));
}

// ---------------------------------------------------------------------------------------------------- functions of X

// Rows of a tile, copied with 16-byte pieces. Shared memory keeps the place of an address within its 16 bytes: a row
// starts at `row(r)`, whatever the alignment of X is.
template <class T>
struct Tile {
  static constexpr int vec = 16 / int(sizeof(T));
  int pitch, step, shift;

  SECANT_DEVICE Tile of(const OfX& a, i64 row, i64 column) {
    const u64 start = a.x / sizeof(T) + u64(row * a.stride + column);
    return {a.pitch, a.flat ? 0 : int(u64(a.stride) % vec), int(start % vec)};
  }
  SECANT_DEVICE int row(const Tile& t, int r) { return r * t.pitch + ((t.shift + r * t.step) & (vec - 1)); }
};

// `count` elements; both ends have the same place within 16 bytes.
template <class T>
SECANT_DEVICE void copy_run(T* to, const T* from, i64 count, int rank, int size) {
  constexpr int vec = 16 / int(sizeof(T));
  i64 head = i64((vec - reinterpret_cast<u64>(from) / sizeof(T) % vec) % vec);
  head = head < count ? head : count;
  const i64 pieces = (count - head) / vec, end = head + pieces * vec;
  SECANT_LOOP
  for (i64 q = rank; q < pieces; q += size) copy_async16(to + head + q * vec, from + head + q * vec);
  if (rank < head) copy_async(to + rank, from + rank);
  if (end + rank < count) copy_async(to + end + rank, from + end + rank);
}

template <class T>
SECANT_DEVICE void copy_tile(const OfX& a, i64 row, i64 column, int rows, int width, T* to) {
  const Tile<T> tile = Tile<T>::of(a, row, column);
  const T* from = reinterpret_cast<const T*>(a.x) + row * a.stride + column;
  const int thread = int(threadIdx.x);
  if (a.flat) {
    copy_run(to + tile.shift, from, i64(rows) * a.d, thread, kBlock);
  } else {
    SECANT_LOOP
    for (int r = thread / 32; r < rows; r += kWarps) {
      copy_run(to + Tile<T>::row(tile, r), from + r * a.stride, width, thread % 32, 32);
    }
  }
}

// V in shared memory: `plane` neighbouring columns of it side by side, so that a lane reads 16 bytes and a warp 512.
template <class C, int K>
struct Vectors {
  static constexpr int most = 16 / int(sizeof(C)), plane = K < most ? K : most;
  SECANT_DEVICE int at(int width, int j, int c) { return ((c / plane) * width + j) * plane + c % plane; }
};

// Rows that lanes multiply at a time: as many sums in registers as the accumulators leave room for.
template <class C, int K, int E>
struct RowsOf {
  static constexpr int value = K == 1 ? 8 : (K == 4 ? 4 : 2);
};

// Sums N (a power of two) values over the warp with N - 1 + log2(32 / N) shuffles; lane l gets the sum of v[l % N].
template <int N, class C>
SECANT_DEVICE C warp_sums(C (&v)[N]) {
  const int lane = int(threadIdx.x % 32u);
  SECANT_UNROLL
  for (int half = N / 2; half > 0; half >>= 1) {
    const bool upper = lane & half;
    SECANT_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      if (i < half) {
        const C mine = upper ? v[i + half] : v[i], theirs = upper ? v[i] : v[i + half];
        v[i] = mine + __shfl_xor_sync(kAll, theirs, half);
      }
    }
  }
  C x = v[0];
  SECANT_UNROLL
  for (int o = N; o < 32; o <<= 1) x += __shfl_xor_sync(kAll, x, o);
  return x;
}

// z = tile V. `lanes` lanes take Rows rows at a time; where they are a warp, `shares` warps take a part of the columns
// each, and z (shares, rows, K) has their sums.
template <class C, class T, int K, int Rows>
SECANT_DEVICE void tile_dots(const OfX& a, const T* x, const Tile<T>& tile, const C* v, int rows, int width, C* z) {
  constexpr int plane = Vectors<C, K>::plane, sums = Rows * K;
  const int lane = int(threadIdx.x % 32u), warp = int(threadIdx.x / 32u), lanes = a.lanes;
  const int teams = 32 / lanes * (kWarps / a.shares), share = warp % a.shares, rank = lane % lanes;
  z += share * a.rows * K;
  SECANT_LOOP
  for (int first = warp / a.shares * (32 / lanes); first * Rows < rows; first += teams) {
    const int base = (first + lane / lanes) * Rows;
    C sum[sums];
    int at[Rows];
    SECANT_UNROLL
    for (int i = 0; i < sums; ++i) sum[i] = C(0);
    SECANT_UNROLL
    for (int i = 0; i < Rows; ++i) at[i] = Tile<T>::row(tile, base + i < rows ? base + i : rows - 1);
    SECANT_LOOP
    for (int j = share * 32 + rank; j < width; j += lanes * a.shares) {
      C w[K];
      SECANT_UNROLL
      for (int c = 0; c < K; c += plane) load_wide<plane>(v + Vectors<C, K>::at(a.width, j, c), w + c);
      SECANT_UNROLL
      for (int i = 0; i < Rows; ++i) {
        const C y = C(widen(x[at[i] + j], a.type));
        SECANT_UNROLL
        for (int c = 0; c < K; ++c) sum[i * K + c] += y * w[c];
      }
    }
    if (lanes == 32) {
      const C total = warp_sums<sums>(sum);
      if (lane < sums && base + lane / K < rows) z[base * K + lane] = total;
    } else {
      SECANT_LOOP
      for (int o = lanes / 2; o > 0; o /= 2) {
        SECANT_UNROLL
        for (int i = 0; i < sums; ++i) sum[i] += __shfl_xor_sync(kAll, sum[i], o);
      }
      SECANT_UNROLL
      for (int i = 0; i < sums; ++i) {
        if (i % lanes == rank && base + i / K < rows) z[base * K + i] = sum[i];
      }
    }
  }
}

// Shared memory: V (width K), the intercept's row of it (K), z (shares rows K, or the kBlock K sums of threads that
// share columns), a board of kWarps doubles, two tiles. The same layout is computed by plan.py.
template <class C, class T, int K, int E>
SECANT_DEVICE void tile(const OfX& a, unsigned char* memory) {
  constexpr int vec = 16 / int(sizeof(C));
  const int thread = int(threadIdx.x);
  const int group = int(blockIdx.x % u32(a.groups)), slab = int(blockIdx.x / u32(a.groups) % u32(a.slabs));
  const i64 split = i64(blockIdx.x / u32(a.groups) / u32(a.slabs));
  const i64 column = i64(slab) * a.width;
  const int width = a.d - column < a.width ? (a.d > column ? int(a.d - column) : 0) : a.width;
  const int owned = a.length - column < a.width ? int(a.length - column) : a.width;  // the column of ones is the last
  const i64 start = a.first + split * a.each, end = start + a.each < a.last ? start + a.each : a.last;
  C* v = reinterpret_cast<C*>(memory);
  C* ones = v + (a.width * K + vec - 1) / vec * vec;
  C* z = ones + (K + vec - 1) / vec * vec;
  const int sums_of_rows = a.shares * a.rows, entries = a.slices > 1 && sums_of_rows < kBlock ? kBlock : sums_of_rows;
  double* board = reinterpret_cast<double*>(z + (entries * K + vec - 1) / vec * vec);
  T* stages = reinterpret_cast<T*>(board + kWarps);
  const int c0 = group * K, used = a.k - c0 < K ? a.k - c0 : K;
  if (a.dots) {
    const C* given = reinterpret_cast<const C*>(a.v) + column * a.k + c0;
    SECANT_LOOP
    for (int i = thread; i < a.width * K; i += kBlock) {
      const int j = i / K, c = i % K;
      v[Vectors<C, K>::at(a.width, j, c)] = j < width && c < used ? given[i64(j) * a.k + c] : C(0);
    }
    if (thread < K) {
      const bool present = a.length > a.d && slab == 0 && thread < used;
      ones[thread] = present ? reinterpret_cast<const C*>(a.v)[a.d * a.k + c0 + thread] : C(0);
    }
  }
  const int padded = kBlock / a.slices, slice = thread / padded, lane = thread % padded;
  C acc[E * K];
  SECANT_UNROLL
  for (int i = 0; i < E * K; ++i) acc[i] = C(0);
  double value = 0.0;
  double* sums = reinterpret_cast<double*>(a.partial) + (split * a.k + c0) * a.length + column;
  bool again = a.carry != 0;
  int filled = 0;
  C* apart = reinterpret_cast<C*>(a.z);
  const i64 rows_apart = a.last - a.first;
  copy_tile(a, start, column, end - start < a.rows ? int(end - start) : a.rows, width, stages);
  SECANT_LOOP
  for (i64 base = start, stage = 0; base < end; base += a.rows, stage ^= 1) {
    const int rows = end - base < a.rows ? int(end - base) : a.rows;
    const i64 next = base + a.rows;
    // Asked for before the wait, so that nobody waits for it after the products.
    const bool early = a.dots && a.gather && a.op < kSoftmax && thread < rows;
    const C given = early ? given_of<C>(a, base + thread) : C(0);
    copy_async_wait();
    __syncthreads();  // the tile is here, and the other one has been used
    if (next < end) {
      copy_tile(a, next, column, end - next < a.rows ? int(end - next) : a.rows, width, stages + (stage ^ 1) * a.stage);
    }
    const T* x = stages + stage * a.stage;
    const Tile<T> place = Tile<T>::of(a, base, column);
    if (a.dots) {
      tile_dots<C, T, K, RowsOf<C, K, E>::value>(a, x, place, v, rows, width, z);
      __syncthreads();
    }
    if (thread < rows) {
      const i64 row = base + thread;
      C* mine = z + thread * K;
      C* there = apart + (row - a.first) * a.k + c0;
      if (!a.dots) {
        SECANT_UNROLL
        for (int c = 0; c < K; ++c) mine[c] = c < used ? there[c] : C(0);
      } else {
        SECANT_UNROLL
        for (int c = 0; c < K; ++c) {
          C total = mine[c] + ones[c];
          SECANT_LOOP
          for (int w = 1; w < a.shares; ++w) total += mine[w * a.rows * K + c];
          mine[c] = total;
        }
        if (!a.gather) {
          there += i64(slab) * rows_apart * a.k;
          SECANT_UNROLL
          for (int c = 0; c < K; ++c) {
            if (c < used) there[c] = mine[c];
          }
        } else {
          value += a.op < kSoftmax ? glm_row(a, row, given, mine, K) : softmax_row(a, row, mine, 0, 1);
        }
      }
    }
    if (!a.gather) continue;
    __syncthreads();
    const auto gather_row = [&](int r) {
      const T* from = x + Tile<T>::row(place, r);
      C y[K];
      load_wide<K>(z + r * K, y);
      SECANT_UNROLL
      for (int e = 0; e < E; ++e) {
        const int j = lane + e * kBlock;
        C w = C(1);  // of the column of ones
        if (j < width) w = C(widen(from[j], a.type));
        SECANT_UNROLL
        for (int c = 0; c < K; ++c) acc[e * K + c] += w * y[c];
      }
    };
    if (E * K <= 8) {
      SECANT_UNROLL_4
      for (int r = slice; r < rows; r += a.slices) gather_row(r);
    } else {
      SECANT_LOOP
      for (int r = slice; r < rows; r += a.slices) gather_row(r);
    }
    if (++filled < a.run && next < end) continue;
    filled = 0;
    if (a.slices > 1) {
      __syncthreads();  // z has been read
      SECANT_UNROLL
      for (int c = 0; c < K; ++c) z[thread * K + c] = acc[c];
      __syncthreads();
      if (slice == 0 && lane < owned) {
        SECANT_LOOP
        for (int c = 0; c < used; ++c) {
          double total = again ? sums[c * a.length + lane] : 0.0;
          SECANT_LOOP
          for (int s = 0; s < a.slices; ++s) total += double(z[(s * padded + lane) * K + c]);
          sums[c * a.length + lane] = total;
        }
      }
    } else {
      SECANT_UNROLL
      for (int e = 0; e < E; ++e) {
        const int j = lane + e * kBlock;
        SECANT_UNROLL
        for (int c = 0; c < K; ++c) {
          if (j < owned && c < used) {
            double* to = sums + c * a.length + j;
            *to = (again ? *to : 0.0) + double(acc[e * K + c]);
          }
        }
      }
    }
    SECANT_UNROLL
    for (int i = 0; i < E * K; ++i) acc[i] = C(0);
    again = true;
  }
  if (a.values && a.dots && a.gather) {
    value = block_sum(value, board);
    if (thread == 0) reinterpret_cast<double*>(a.values)[split] = value;
  }
}

// X V from its slabs, replaced by what multiplies the rows of X. A thread takes a row of one column, a warp a row of
// classes; with k columns and no classes, a thread an entry.
template <class C>
SECANT_DEVICE void between(const OfX& a, unsigned char* memory) {
  const i64 rows = a.last - a.first, size = rows * a.k, threads = i64(gridDim.x) * kBlock;
  const i64 index = i64(blockIdx.x) * kBlock + threadIdx.x;
  C* z = reinterpret_cast<C*>(a.z);
  double value = 0.0;
  if (a.op < kSoftmax) {
    SECANT_LOOP
    for (i64 i = index; i < size; i += threads) {
      C total = z[i];
      SECANT_LOOP
      for (int s = 1; s < a.slabs; ++s) total += z[s * size + i];
      value += glm_row(a, a.first + i / a.k, given_of<C>(a, a.first + i / a.k), &total, 1);
      z[i] = total;
    }
  } else {
    const int lane = int(threadIdx.x % 32u);
    SECANT_LOOP
    for (i64 row = index / 32; row < rows; row += threads / 32) {
      C* mine = z + row * a.k;
      SECANT_LOOP
      for (int c = lane; c < a.k; c += 32) {
        C total = mine[c];
        SECANT_LOOP
        for (int s = 1; s < a.slabs; ++s) total += mine[s * size + c];
        mine[c] = total;
      }
      const double part = softmax_row(a, a.first + row, mine, lane, 32);
      if (lane == 0) value += part;
    }
  }
  if (a.values) {
    value = block_sum(value, reinterpret_cast<double*>(memory));
    if (threadIdx.x == 0) reinterpret_cast<double*>(a.values)[blockIdx.x] = value;
  }
}

// 32 entries of the result a block; its warps share the splits. One block more adds up the value.
template <class C>
SECANT_DEVICE void finish(const OfX& a, unsigned char* memory) {
  double* board = reinterpret_cast<double*>(memory);
  const C* v = reinterpret_cast<const C*>(a.v);
  const int lane = int(threadIdx.x % 32u), warp = int(threadIdx.x / 32u);
  const i64 size = a.length * a.k;
  if (i64(blockIdx.x) * 32 >= size) {
    double total = 0.0;
    if (a.l2 != 0.0) {
      SECANT_LOOP
      for (i64 i = threadIdx.x; i < a.d * a.k; i += kBlock) total += double(v[i]) * double(v[i]);
    }
    total *= 0.5 * a.l2;
    SECANT_LOOP
    for (i64 i = threadIdx.x; i < a.parts; i += kBlock) total += reinterpret_cast<const double*>(a.values)[i];
    total = block_sum(total, board);
    if (threadIdx.x == 0) *reinterpret_cast<double*>(a.value) = total;
    return;
  }
  const i64 entry = i64(blockIdx.x) * 32 + lane;
  const double* from = reinterpret_cast<const double*>(a.partial) + (entry < size ? entry : size - 1);
  double total = 0.0;
  SECANT_UNROLL_4
  for (int s = warp; s < a.splits; s += kWarps) total += from[s * size];
  board[threadIdx.x] = total;
  __syncthreads();
  if (warp != 0 || entry >= size) return;
  SECANT_LOOP
  for (int w = 1; w < kWarps; ++w) total += board[w * 32 + lane];
  const i64 row = entry % a.length, at = row * a.k + entry / a.length;
  if (row < a.d && a.l2 != 0.0) total += a.l2 * double(v[at]);
  reinterpret_cast<C*>(a.out)[at] = C(total);
}

// ---------------------------------------------------------------------------------------------------- cross entropy

template <bool Wide, class T>
SECANT_DEVICE void load_piece(const T* p, T (&x)[16 / sizeof(T)]) {
  if (Wide) {
    load_wide<16 / int(sizeof(T))>(p, x);
  } else {
    x[0] = *p;
  }
}

template <bool Wide, class T>
SECANT_DEVICE void store_piece(T* p, const T (&x)[16 / sizeof(T)]) {
  if (Wide) {
    store_wide<16 / int(sizeof(T))>(p, x);
  } else {
    *p = x[0];
  }
}

// p (u - p.u), a block a row. A piece is 16 bytes of logits and of u where everything is aligned, else one element; the
// first `resident` pieces of each thread stay in shared memory. The others are read again, last ones first: the cache
// has them.
template <bool Wide, class C, class T>
SECANT_DEVICE void cross_entropy(const CrossEntropy& a, unsigned char* memory) {
  constexpr int vec = 16 / int(sizeof(T)), each = Wide ? vec : 1;
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  C* board = reinterpret_cast<C*>(memory);
  T* kept = reinterpret_cast<T*>(memory + 32 * sizeof(double));
  SECANT_LOOP
  for (i64 row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* logits = reinterpret_cast<const T*>(a.logits) + row * a.logits_stride;
    const T* u = reinterpret_cast<const T*>(a.u) + row * a.u_stride;
    T* out = reinterpret_cast<T*>(a.out) + row * a.vocabulary;
    const bool given = a.lse != 0;
    const i64 count = a.vocabulary / each;
    C shift = given ? reinterpret_cast<const C*>(a.lse)[row] : C(0);
    C largest = -infinity<C>(), total = C(0), dot = C(0);
    i64 turn = 0;
    SECANT_LOOP
    for (i64 q = thread; q < count; q += threads, ++turn) {
      T x[vec], y[vec];
      load_piece<Wide>(logits + q * each, x);
      load_piece<Wide>(u + q * each, y);
      if (turn < a.resident) {
        T* mine = kept + (2 * turn * threads + thread) * each;
        store_piece<Wide>(mine, x);
        store_piece<Wide>(mine + threads * each, y);
      }
      if (!given) {  // a thread's sums are relative to its largest logit so far
        C most = largest;
        SECANT_UNROLL
        for (int e = 0; e < each; ++e) {
          const C w = C(widen(x[e], a.type));
          most = w > most ? w : most;
        }
        if (most > largest) {
          const C rescale = exp(largest - most);
          total *= rescale;
          dot *= rescale;
          largest = most;
        }
        shift = largest > -infinity<C>() ? largest : C(0);
      }
      SECANT_UNROLL
      for (int e = 0; e < each; ++e) {
        const C p = exp(C(widen(x[e], a.type)) - shift);
        total += p;
        dot += p * C(widen(y[e], a.type));
      }
    }
    C scale = C(1);
    if (!given) {
      C most = lanes_max(largest, 32);
      __syncthreads();
      if (thread % 32 == 0) board[thread / 32] = most;
      __syncthreads();
      most = board[0];
      SECANT_LOOP
      for (int w = 1; w < threads / 32; ++w) most = board[w] > most ? board[w] : most;
      const C rescale = exp(largest - most);
      shift = most;
      scale = C(1) / block_sum(total * rescale, board);
      dot *= rescale;
    }
    const C mean = block_sum(dot, board) * scale;
    SECANT_LOOP
    while (turn-- > 0) {
      // Those in memory backwards, then those in shared memory.
      const i64 q = thread + turn * threads;
      T x[vec], y[vec];
      if (turn >= a.resident) {
        load_piece<Wide>(logits + q * each, x);
        load_piece<Wide>(u + q * each, y);
      } else {
        const T* mine = kept + (2 * turn * threads + thread) * each;
        load_piece<Wide>(mine, x);
        load_piece<Wide>(mine + threads * each, y);
      }
      SECANT_UNROLL
      for (int e = 0; e < each; ++e) {
        const C p = exp(C(widen(x[e], a.type)) - shift) * scale;
        x[e] = Narrow<T>::from(p * (C(widen(y[e], a.type)) - mean), a.type);
      }
      store_piece<Wide>(out + q * each, x);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- products

// A tile M x N of a product, 256 threads of TM x TN entries each, kTerms terms at a time.
template <class C>
struct Shape;
template <>
struct Shape<float> {
  static constexpr int M = 128, N = 64, TM = 8, TN = 4;
};
template <>
struct Shape<double> {
  static constexpr int M = 64, N = 64, TM = 4, TN = 4;
};
constexpr int kTerms = 8;

// `Side` lines and kTerms terms of a factor at a time: lines are rows of the left one or columns of the right one.
// Neighbouring threads take neighbouring addresses, whichever stride is 1.
template <class C, int Side>
struct Lines {
  static constexpr int count = Side * kTerms / kBlock;
  const C* at;
  i64 step, next, left;  // to the next element of a thread, and of the next terms; terms left
  int lines;
  bool along;

  SECANT_DEVICE Lines of(const C* p, i64 line_stride, i64 term_stride, i64 line, i64 lines, i64 first, i64 last) {
    const int thread = int(threadIdx.x);
    Lines x;
    x.along = line_stride == 1;
    const int l = x.along ? thread % Side : thread / kTerms, t = x.along ? thread / Side : thread % kTerms;
    x.at = p + (line + l) * line_stride + (first + t) * term_stride;
    x.step = x.along ? kBlock / Side * term_stride : kBlock / kTerms * line_stride;
    x.next = kTerms * term_stride;
    x.left = last - first - t;
    x.lines = lines - line < Side ? int(lines - line) - l : Side - l;
    return x;
  }

  SECANT_DEVICE void fetch(Lines& y, C (&x)[count]) {
    SECANT_UNROLL
    for (int i = 0; i < count; ++i) {
      const int t = y.along ? i * (kBlock / Side) : 0, l = y.along ? 0 : i * (kBlock / kTerms);
      x[i] = t < y.left && l < y.lines ? y.at[i * y.step] : C(0);
    }
    y.at += y.next;
    y.left -= kTerms;
  }
};

template <class C, int Side>
SECANT_DEVICE void put(C* memory, bool along, const C (&x)[Side * kTerms / kBlock]) {
  constexpr int ld = Side + 16 / int(sizeof(C));
  const int thread = int(threadIdx.x);
  SECANT_UNROLL
  for (int i = 0; i < Side * kTerms / kBlock; ++i) {
    const int at = thread + i * kBlock;
    memory[along ? at / Side * ld + at % Side : at % kTerms * ld + at / kTerms] = x[i];
  }
}

// Adds terms first..last of left @ right to the sums of a thread.
template <class C>
SECANT_DEVICE void multiply(const C* left, i64 l_row, i64 l_col, const C* right, i64 r_row, i64 r_col, i64 row, i64 m,
                            i64 col, i64 n, i64 first, i64 last, C* memory, C (&acc)[Shape<C>::TM][Shape<C>::TN]) {
  constexpr int M = Shape<C>::M, N = Shape<C>::N, TM = Shape<C>::TM, TN = Shape<C>::TN, pad = 16 / int(sizeof(C));
  C* x = memory;
  C* y = memory + kTerms * (M + pad);
  const int i = int(threadIdx.x) / (N / TN) * TM, j = int(threadIdx.x) % (N / TN) * TN;
  if (first >= last) return;
  Lines<C, M> from_left = Lines<C, M>::of(left, l_row, l_col, row, m, first, last);
  Lines<C, N> from_right = Lines<C, N>::of(right, r_col, r_row, col, n, first, last);
  C u[Lines<C, M>::count], w[Lines<C, N>::count];
  Lines<C, M>::fetch(from_left, u);
  Lines<C, N>::fetch(from_right, w);
  SECANT_LOOP
  for (i64 t = first; t < last; t += kTerms) {
    __syncthreads();  // the terms before have been used
    put<C, M>(x, from_left.along, u);
    put<C, N>(y, from_right.along, w);
    __syncthreads();
    if (t + kTerms < last) {
      Lines<C, M>::fetch(from_left, u);
      Lines<C, N>::fetch(from_right, w);
    }
    SECANT_LOOP
    for (int s = 0; s < kTerms; ++s) {
      C p[TM], q[TN];
      load_wide<TM>(x + s * (M + pad) + i, p);
      load_wide<TN>(y + s * (N + pad) + j, q);
      SECANT_UNROLL
      for (int e = 0; e < TM; ++e) {
        SECANT_UNROLL
        for (int f = 0; f < TN; ++f) acc[e][f] += p[e] * q[f];
      }
    }
  }
}

template <class C>
SECANT_DEVICE C epilogue(const Product& a, C x, i64 i, i64 j) {
  const i64 at = i * a.n + j;
  if (a.bias) x += reinterpret_cast<const C*>(a.bias)[j];
  if (a.scale) x *= reinterpret_cast<const C*>(a.scale)[at];
  if (a.p) x += reinterpret_cast<const C*>(a.p)[at] * reinterpret_cast<const C*>(a.q)[at];
  return x;
}

template <class C>
SECANT_DEVICE void product(const Product& a, unsigned char* memory) {
  constexpr int M = Shape<C>::M, N = Shape<C>::N, TM = Shape<C>::TM, TN = Shape<C>::TN;
  const i64 row = i64(blockIdx.x / u32(a.tiles_n)) * M, col = i64(blockIdx.x % u32(a.tiles_n)) * N, part = blockIdx.y;
  C* shared = reinterpret_cast<C*>(memory);
  C acc[TM][TN] = {};
  SECANT_LOOP
  for (int which = 0; which < 2; ++which) {
    const i64 terms = which ? a.k2 : a.k1, each = which ? a.each2 : a.each1, first = part * each;
    const i64 last = first + each < terms ? first + each : terms;
    multiply(reinterpret_cast<const C*>(which ? a.c : a.a), which ? a.c_row : a.a_row, which ? a.c_col : a.a_col,
             reinterpret_cast<const C*>(which ? a.e : a.b), which ? a.e_row : a.b_row, which ? a.e_col : a.b_col, row,
             a.m, col, a.n, first, last, shared, acc);
  }
  const i64 i0 = row + int(threadIdx.x) / (N / TN) * TM, j0 = col + int(threadIdx.x) % (N / TN) * TN;
  C* out = reinterpret_cast<C*>(a.out) + part * a.m * a.n;
  SECANT_UNROLL
  for (int e = 0; e < TM; ++e) {
    SECANT_UNROLL
    for (int f = 0; f < TN; ++f) {
      const i64 i = i0 + e, j = j0 + f;
      if (i < a.m && j < a.n) out[i * a.n + j] = a.parts > 1 ? acc[e][f] : epilogue(a, acc[e][f], i, j);
    }
  }
}

// The parts of a product (at `a`) in their order, in float64, and the rest of the formula.
template <class C>
SECANT_DEVICE void sum(const Product& a) {
  const C* parts = reinterpret_cast<const C*>(a.a);
  const i64 size = a.m * a.n;
  SECANT_LOOP
  for (i64 i = i64(blockIdx.x) * kBlock + threadIdx.x; i < size; i += i64(gridDim.x) * kBlock) {
    double total = 0.0;
    SECANT_UNROLL_4
    for (int part = 0; part < a.parts; ++part) total += double(parts[part * size + i]);
    reinterpret_cast<C*>(a.out)[i] = epilogue(a, C(total), i / a.n, i % a.n);
  }
}

// ---------------------------------------------------------------------------------------------------- Gram matrices

constexpr i64 kGramRun = 512;  // rows whose sum is added to the others as a whole

// Entry (i, j), i >= j, and its mirror image. What it may be added to is read here alone.
template <class C>
SECANT_DEVICE void write_both(const Gram& a, C x, i64 i, i64 j) {
  C* out = reinterpret_cast<C*>(a.out);
  if (a.accumulate) x += out[i * a.n + j];
  out[i * a.n + j] = x;
  out[j * a.n + i] = x;
}

// The tiles of the lower triangle, `tiles` squares along its side, each of them M / N tiles of a product. A line of
// tiles and the one as far from the other end make tiles + 1 squares.
template <class C>
SECANT_DEVICE void gram(const Gram& a, unsigned char* memory) {
  constexpr int M = Shape<C>::M, N = Shape<C>::N, TM = Shape<C>::TM, TN = Shape<C>::TN;
  const int square = int(blockIdx.x) / (M / N), line = square / (a.tiles + 1), place = square % (a.tiles + 1);
  const i64 row = i64(place <= line ? line : a.tiles - 1 - line) * M, part = blockIdx.y;
  const i64 col = i64(place <= line ? place : place - line - 1) * M + i64(int(blockIdx.x) % (M / N)) * N;
  const i64 first = part * a.each, last = first + a.each < a.m ? first + a.each : a.m;
  C total[TM][TN] = {};
  SECANT_LOOP
  for (i64 run = first; run < last; run += kGramRun) {
    C acc[TM][TN] = {};
    multiply(reinterpret_cast<const C*>(a.x), a.x_col, a.x_row, reinterpret_cast<const C*>(a.y), a.y_row, a.y_col, row,
             a.n, col, a.n, run, run + kGramRun < last ? run + kGramRun : last, reinterpret_cast<C*>(memory), acc);
    SECANT_UNROLL
    for (int e = 0; e < TM; ++e) {
      SECANT_UNROLL
      for (int f = 0; f < TN; ++f) total[e][f] += acc[e][f];
    }
  }
  const i64 i0 = row + int(threadIdx.x) / (N / TN) * TM, j0 = col + int(threadIdx.x) % (N / TN) * TN;
  SECANT_UNROLL
  for (int e = 0; e < TM; ++e) {
    SECANT_UNROLL
    for (int f = 0; f < TN; ++f) {
      const i64 i = i0 + e, j = j0 + f;
      if (i >= a.n || j > i) continue;
      if (a.parts > 1) {
        reinterpret_cast<C*>(a.out)[(part * a.n + i) * a.n + j] = total[e][f];
      } else {
        write_both(a, total[e][f], i, j);
      }
    }
  }
}

// The parts of a triangle in their order, in float64.
template <class C>
SECANT_DEVICE void gram_sum(const Gram& a) {
  const C* parts = reinterpret_cast<const C*>(a.x);
  const i64 size = a.n * a.n;
  SECANT_LOOP
  for (i64 at = i64(blockIdx.x) * kBlock + threadIdx.x; at < size; at += i64(gridDim.x) * kBlock) {
    const i64 i = at / a.n, j = at % a.n;
    if (j > i) continue;
    double total = 0.0;
    SECANT_UNROLL_4
    for (int part = 0; part < a.parts; ++part) total += double(parts[part * size + at]);
    write_both(a, C(total), i, j);
  }
}

// ---------------------------------------------------------------------------------------------------- entry points

}  // namespace secant_hvp

#define SECANT_HVP_TILE_NAME(K, E, TAG) hvp_tile_##K##x##E##_##TAG
#define SECANT_HVP_TILE_ENTRY(K, E, TAG, C, T)                                                 \
  extern "C" __global__ void __launch_bounds__(256, K* E <= (sizeof(C) == 4 ? 32 : 8) ? 2 : 1) \
      SECANT_HVP_TILE_NAME(K, E, TAG)(OfX a) {                                                 \
    SECANT_DYNAMIC_SHARED(memory);                                                             \
    secant_hvp::tile<C, T, K, E>(a, memory);                                                   \
  }
#define SECANT_HVP_OTHER_NAME(KIND, TAG) hvp_##KIND##_##TAG
#define SECANT_HVP_CROSS_ENTROPY_ENTRY(TAG, C, T)                              \
  extern "C" __global__ void __launch_bounds__(sizeof(C) == 8 ? 512 : 1024, 1) \
      hvp_cross_entropy_##TAG(CrossEntropy a) {                                \
    SECANT_DYNAMIC_SHARED(memory);                                             \
    if (a.wide) {                                                              \
      secant_hvp::cross_entropy<true, C, T>(a, memory);                        \
    } else {                                                                   \
      secant_hvp::cross_entropy<false, C, T>(a, memory);                       \
    }                                                                          \
  }
#define SECANT_HVP_REST_ENTRIES(TAG, C)                                                                 \
  extern "C" __global__ void __launch_bounds__(256, 4) hvp_between_##TAG(OfX a) {                       \
    SECANT_DYNAMIC_SHARED(memory);                                                                      \
    secant_hvp::between<C>(a, memory);                                                                  \
  }                                                                                                     \
  extern "C" __global__ void __launch_bounds__(256) hvp_finish_##TAG(OfX a) {                           \
    SECANT_DYNAMIC_SHARED(memory);                                                                      \
    secant_hvp::finish<C>(a, memory);                                                                   \
  }                                                                                                     \
  extern "C" __global__ void __launch_bounds__(256, 2) hvp_product_##TAG(Product a) {                   \
    SECANT_DYNAMIC_SHARED(memory);                                                                      \
    secant_hvp::product<C>(a, memory);                                                                  \
  }                                                                                                     \
  extern "C" __global__ void __launch_bounds__(256) hvp_sum_##TAG(Product a) { secant_hvp::sum<C>(a); } \
  extern "C" __global__ void __launch_bounds__(256, 2) hvp_gram_##TAG(Gram a) {                         \
    SECANT_DYNAMIC_SHARED(memory);                                                                      \
    secant_hvp::gram<C>(a, memory);                                                                     \
  }                                                                                                     \
  extern "C" __global__ void __launch_bounds__(256) hvp_gram_sum_##TAG(Gram a) { secant_hvp::gram_sum<C>(a); }

// The shapes of plan.py. A build may choose fewer kernels by defining the three lists before this file.
#define SECANT_HVP_SHAPES(X, TAG, C, T) \
  X(1, 1, TAG, C, T)                    \
  X(1, 4, TAG, C, T)                    \
  X(1, 16, TAG, C, T)                   \
  X(4, 1, TAG, C, T)                    \
  X(4, 4, TAG, C, T) X(8, 1, TAG, C, T) X(8, 4, TAG, C, T) X(16, 1, TAG, C, T)
#define SECANT_HVP_LARGE_SHAPES(X, TAG, C, T) X(1, 64, TAG, C, T) X(4, 16, TAG, C, T) X(16, 4, TAG, C, T)
#ifndef SECANT_HVP_TILES
#define SECANT_HVP_TILES(X)                 \
  SECANT_HVP_SHAPES(X, f32, float, float)   \
  SECANT_HVP_SHAPES(X, f64, double, double) \
  SECANT_HVP_SHAPES(X, f16, float, u16)     \
  SECANT_HVP_LARGE_SHAPES(X, f32, float, float) SECANT_HVP_LARGE_SHAPES(X, f16, float, u16)
#define SECANT_HVP_CROSS_ENTROPY(X) X(f32, float, float) X(f64, double, double) X(f16, float, u16)
#define SECANT_HVP_REST(X) X(f32, float) X(f64, double)
#endif
SECANT_HVP_TILES(SECANT_HVP_TILE_ENTRY)
SECANT_HVP_CROSS_ENTROPY(SECANT_HVP_CROSS_ENTROPY_ENTRY)
SECANT_HVP_REST(SECANT_HVP_REST_ENTRIES)
