// L-BFGS directions on CUDA. Include-free: kernels/cuda_portable.cuh (or the CPU stand-in of the tests) goes in front.
//
// T is the type of vectors, H the type of stored pairs (unsigned short holds the bits of a bfloat16). Dot products and
// coefficients are float64, vectors are combined in T. A problem is worked on by a "group" (a warp or a block), or by
// several blocks that meet in global memory. Every sum has a fixed order, so results repeat bit for bit.
//
//   lbfgs_update_block     many blocks a problem: either two plain launches, one a pass, and the last block of the
//                          first solves; or one cooperative launch of both passes with a grid barrier and part of the
//                          history kept in shared memory. Or one block a problem. It also does a part of an update by
//                          itself: the sums, the solve, or the combination.
//   lbfgs_update_warp      one warp a problem
//   lbfgs_panel_dots, lbfgs_panel_line            the two-loop recursion, 16 pairs a launch, many blocks a problem
//   lbfgs_two_loop_block, lbfgs_two_loop_warp     the two-loop recursion, one group a problem
//
// plan.py chooses kernel, grid and shared memory, and packs the two structs below: first what differs from call to
// call, then what a plan knows.

struct Update {
  u64 s_ring, y_ring, sy, yy, head, count, stats;  // pointers; (B, m, n) x 2, (B, m, m) x 2, (B,) x 2, (B, 8)
  u64 grad, s, y, y_prev, out, prev_out, t, work;  // pointers, 0 where absent
  u64 dots, coefs;                                 // (B, 4 m + 8), (B, 2 m + 2): for the parts, 0 in a whole update
  double step, tol;                                // step: the value of t where it is no tensor
  int wide, t_stride, pair, direction;             // wide: 16-byte accesses; pair, direction: there is one to do
  i64 batch, n, work_stride;                       // work_stride: doubles of workspace a problem
  int phases, m, resident;                         // phases: kFirst ...; resident: chunks kept in shared memory
  int spread, group_bytes, unused;                 // spread: blocks share a problem; bytes: a warp's shared memory
};

struct TwoLoop {
  u64 grad, s, y, out, work;
  i64 s_row, s_batch, y_row, y_batch;
  double gamma;  // NaN: s.y / y.y of the newest valid pair
  int wide, unused;
  i64 batch, n, work_stride;
  int m, resident, group_bytes, step;
};

namespace {

constexpr u32 kAll = 0xffffffffu;
constexpr int kBlock = 256;     // threads of every block
constexpr int kStaged = 32;     // up to this m the Gram matrices are solved from shared memory
constexpr int kExtras = 8;      // sums that concern no row: s'y' s's' y'y' s'g y'g gg, max|g|, unused
constexpr int kMeetings = 256;  // problems that many blocks work on, in one launch
constexpr int kPanel = 16;      // pairs of a panel
constexpr int kTile = 24;       // sums of a 4 x 4 tile: s_i.y_j (16), s_i.q (4), y_i.y_i (4)
constexpr int kTiles = 10;      // tiles of the upper triangle of a panel

// What of an update this launch does. kFirst: the sums, then the solve, or with `dots` the sums written there; kSolve:
// the solve, from `dots` into `coefs`; kSecond: the combination, with the coefficients of `coefs` where given.
constexpr int kFirst = 1, kSecond = 2, kSolve = 4;

// ---------------------------------------------------------------------------------------------------- numbers

SECANT_DEVICE float widen(float x) { return x; }
SECANT_DEVICE double widen(double x) { return x; }
SECANT_DEVICE float widen(u16 x) { return __uint_as_float(u32(x) << 16); }

template <class H>
struct Narrow {
  template <class T>
  SECANT_DEVICE H from(T x) {
    return H(x);
  }
};

template <>
struct Narrow<u16> {  // float32 to bfloat16, to nearest even
  template <class T>
  SECANT_DEVICE u16 from(T x) {
    const float f = float(x);
    const u32 bits = __float_as_uint(f);
    if (f != f) return u16(0x7fc0);
    return u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

SECANT_DEVICE bool finite(double x) { return x - x == 0.0; }
SECANT_DEVICE bool valid_pair(double sy, double yy) { return finite(sy) && finite(yy) && sy > 0.0; }

// The larger one; a NaN, once met, stays.
template <class T>
SECANT_DEVICE T nan_max(T a, T b) {
  return (b > a || b != b) ? b : a;
}

// ---------------------------------------------------------------------------------------------------- groups

struct Block {
  static constexpr int size = kBlock, warps = kBlock / 32;
  SECANT_DEVICE int rank() { return int(threadIdx.x); }
  SECANT_DEVICE void sync() { __syncthreads(); }
};

struct Warp {
  static constexpr int size = 32, warps = 1;
  SECANT_DEVICE int rank() { return int(threadIdx.x % 32u); }
  SECANT_DEVICE void sync() { __syncwarp(); }
};

SECANT_DEVICE double warp_sum(double x) {
  SECANT_UNROLL
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(kAll, x, o);
  return x;
}

// Sums N (a power of two) values over the warp with N - 1 + log2(32 / N) shuffles; lane l gets the sum of v[l % N].
template <int N>
SECANT_DEVICE double warp_sums(double (&v)[N]) {
  const int lane = int(threadIdx.x % 32u);
  SECANT_UNROLL
  for (int half = N / 2; half > 0; half >>= 1) {
    const bool upper = lane & half;
    SECANT_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      if (i < half) {
        const double mine = upper ? v[i + half] : v[i], theirs = upper ? v[i] : v[i + half];
        v[i] = mine + __shfl_xor_sync(kAll, theirs, half);
      }
    }
  }
  double x = v[0];
  SECANT_UNROLL
  for (int o = N; o < 32; o <<= 1) x += __shfl_xor_sync(kAll, x, o);
  return x;
}

// ---------------------------------------------------------------------------------------------------- chunks

// A chunk is what a group handles at a time: kEach elements a thread, in 16-byte pieces of H where everything is
// aligned (Wide), else one by one with the group's stride, so that a warp's access is contiguous either way.
template <class H>
struct Each {
  static constexpr int vec = 16 / int(sizeof(H)), value = vec > 4 ? vec : 4;
};

template <class H, int Size>
struct ChunkOf {
  static constexpr int value = Each<H>::value * Size;
};

template <bool Wide, class H, int Size, class X>
SECANT_DEVICE void load(const X* p, int rank, int length, X (&x)[Each<H>::value]) {
  constexpr int vec = Each<H>::vec, each = Each<H>::value;
  if (Wide) {
    SECANT_UNROLL
    for (int k = 0; k < each; k += vec) {
      const int at = k * Size + rank * vec;
      if (at < length) {
        load_wide<vec>(p + at, x + k);
      } else {
        SECANT_UNROLL
        for (int e = 0; e < vec; ++e) x[k + e] = X(0);
      }
    }
  } else {
    SECANT_UNROLL
    for (int k = 0; k < each; ++k) {
      const int at = k * Size + rank;
      x[k] = at < length ? p[at] : X(0);
    }
  }
}

template <bool Wide, class H, int Size, class X>
SECANT_DEVICE void store(X* p, int rank, int length, const X (&x)[Each<H>::value]) {
  constexpr int vec = Each<H>::vec, each = Each<H>::value;
  SECANT_UNROLL
  for (int k = 0; k < each; k += Wide ? vec : 1) {
    const int at = k * Size + rank * (Wide ? vec : 1);
    if (at < length) {
      if (Wide) {
        store_wide<vec>(p + at, x + k);
      } else {
        p[at] = x[k];
      }
    }
  }
}

// Global to shared memory; each thread copies what it will read itself, so that its own wait is enough.
template <bool Wide, class H, int Size>
SECANT_DEVICE void stage(H* to, const H* from, int rank, int length) {
  constexpr int vec = Each<H>::vec, each = Each<H>::value;
  SECANT_UNROLL
  for (int k = 0; k < each; k += Wide ? vec : 1) {
    const int at = k * Size + rank * (Wide ? vec : 1);
    if (at < length) {
      if (Wide) {
        copy_async16(to + at, from + at);
      } else {
        copy_async(to + at, from + at);
      }
    }
  }
}

// The chunks of one group: first, first + stride, ... below total; `resident` of them, the last ones, live in shared
// memory.
struct Walk {
  i64 first, stride, count, plain;  // count: chunks of this group; plain: those of them read from global memory
};

SECANT_DEVICE Walk walk(i64 n, int chunk, i64 first, i64 stride, int resident) {
  const i64 total = (n + chunk - 1) / chunk;
  Walk w;
  w.first = first;
  w.stride = stride;
  w.count = first < total ? (total - first + stride - 1) / stride : 0;
  w.plain = w.count > resident ? w.count - resident : 0;
  return w;
}

// ---------------------------------------------------------------------------------------------------- update

// Shared memory of a group. The same layout is computed by plan.py.
struct Scratch {
  double* sums;   // warps x (4 m + kExtras): row sums (s.g, y.g, s.y', y.y') by position, then the extras
  double* solve;  // 6 m: by slot (five arrays; the sixth keeps what follows on 16 bytes)
  double* coef;   // 2 m + 2: -gamma, accepted slot or -1, then coefficients of S and of Y by slot
  double* gram;   // 2 m m where m <= kStaged
  u16* rows;      // m: slots that take part, ascending
  u16* place;     // m: slot -> position, 0xffff where it takes no part
  unsigned char* history;
};

SECANT_DEVICE Scratch scratch(unsigned char* memory, int m, int warps) {
  Scratch x;
  x.sums = reinterpret_cast<double*>(memory);
  x.solve = x.sums + warps * (4 * m + kExtras);
  x.coef = x.solve + 6 * m;
  x.gram = x.coef + 2 * m + 2;
  x.rows = reinterpret_cast<u16*>(x.gram + (m <= kStaged ? 2 * m * m : 0));
  x.place = x.rows + m;
  x.history = reinterpret_cast<unsigned char*>(x.gram) + ((m <= kStaged ? 16 * m * m : 0) + 4 * m + 15) / 16 * 16;
  return x;
}

// The new pair as it will be stored. The second pass computes it again from the same operands, bit for bit.
template <bool Wide, class T, class H, int Size>
SECANT_DEVICE void new_pair(const Update& a, i64 b, i64 base, int rank, int length, T t, H (&sn)[Each<H>::value],
                            H (&yn)[Each<H>::value]) {
  constexpr int each = Each<H>::value;
  T x[each], z[each];
  load<Wide, H, Size>(reinterpret_cast<const T*>(a.s) + b * a.n + base, rank, length, x);
  SECANT_UNROLL
  for (int k = 0; k < each; ++k) sn[k] = Narrow<H>::from(x[k] * t);
  load<Wide, H, Size>(reinterpret_cast<const T*>(a.y) + b * a.n + base, rank, length, x);
  if (a.y_prev) {
    load<Wide, H, Size>(reinterpret_cast<const T*>(a.y_prev) + b * a.n + base, rank, length, z);
    SECANT_UNROLL
    for (int k = 0; k < each; ++k) x[k] -= z[k];
  }
  SECANT_UNROLL
  for (int k = 0; k < each; ++k) yn[k] = Narrow<H>::from(x[k]);
}

template <class T>
SECANT_DEVICE T step_length(const Update& a, i64 b) {
  return a.t ? T(reinterpret_cast<const double*>(a.t)[b * a.t_stride]) : T(a.step);
}

// Lists the slots that hold a pair; returns their number.
template <class G>
SECANT_DEVICE int list_rows(const Update& a, i64 b, const Scratch& x) {
  const double* sy = reinterpret_cast<const double*>(a.sy) + b * a.m * a.m;
  const double* yy = reinterpret_cast<const double*>(a.yy) + b * a.m * a.m;
  const int lane = G::rank();
  if (lane < 32) {
    int total = 0;
    SECANT_LOOP
    for (int first = 0; first < a.m; first += 32) {
      const int i = first + lane;
      const bool take = i < a.m && valid_pair(sy[i * (a.m + 1)], yy[i * (a.m + 1)]);
      const u32 mask = __ballot_sync(kAll, take);
      const int at = total + __popc(mask & ((1u << lane) - 1u));
      if (take) x.rows[at] = u16(i);
      if (i < a.m) x.place[i] = take ? u16(at) : u16(0xffff);
      total += __popc(mask);
    }
    if (lane == 0) x.coef[0] = double(total);
  }
  G::sync();
  return int(x.coef[0]);
}

// First pass: the sums of this group's chunks, per warp, into x.sums.
template <bool Wide, class T, class H, class G>
SECANT_DEVICE void dots(const Update& a, i64 b, const Scratch& x, const Walk& w, int rows) {
  constexpr int each = Each<H>::value, chunk = ChunkOf<H, G::size>::value;
  const int rank = G::rank(), lane = rank % 32;
  double* mine = x.sums + (rank / 32) * (4 * a.m + kExtras);
  SECANT_LOOP
  for (int v = lane; v < 4 * rows + kExtras; v += 32) mine[v] = 0.0;
  __syncwarp();
  const H* s_ring = reinterpret_cast<const H*>(a.s_ring) + b * a.m * a.n;
  const H* y_ring = reinterpret_cast<const H*>(a.y_ring) + b * a.m * a.n;
  H* history = reinterpret_cast<H*>(x.history);
  SECANT_LOOP
  for (i64 c = w.plain; c < w.count; ++c) {  // start the copies of what stays, then work on the rest meanwhile
    const i64 base = (w.first + c * w.stride) * chunk;
    const int length = a.n - base < chunk ? int(a.n - base) : chunk;
    H* to = history + (c - w.plain) * (2 * a.m) * chunk;
    SECANT_LOOP
    for (int r = 0; r < rows; ++r) {
      const i64 at = x.rows[r] * a.n + base;
      stage<Wide, H, G::size>(to + 2 * r * chunk, s_ring + at, rank, length);
      stage<Wide, H, G::size>(to + (2 * r + 1) * chunk, y_ring + at, rank, length);
    }
  }
  const T t = a.s ? step_length<T>(a, b) : T(0);
  T largest = T(0);
  SECANT_LOOP
  for (i64 c = 0; c < w.count; ++c) {
    const bool resident = c >= w.plain;
    if (c == w.plain) copy_async_wait();
    const i64 base = (w.first + c * w.stride) * chunk;
    const int length = a.n - base < chunk ? int(a.n - base) : chunk;
    double g[each], yn[each];
    double extra[8] = {};
    SECANT_UNROLL
    for (int k = 0; k < each; ++k) g[k] = yn[k] = 0.0;
    if (a.grad) {
      T raw[each];
      load<Wide, H, G::size>(reinterpret_cast<const T*>(a.grad) + b * a.n + base, rank, length, raw);
      SECANT_UNROLL
      for (int k = 0; k < each; ++k) {
        g[k] = double(raw[k]);
        extra[5] += g[k] * g[k];
        largest = nan_max(largest, raw[k] < T(0) ? -raw[k] : raw[k]);
      }
    }
    if (a.s) {
      H rs[each], ry[each];
      new_pair<Wide, T, H, G::size>(a, b, base, rank, length, t, rs, ry);
      SECANT_UNROLL
      for (int k = 0; k < each; ++k) {
        const double sn = double(widen(rs[k]));
        yn[k] = double(widen(ry[k]));
        extra[0] += sn * yn[k];
        extra[1] += sn * sn;
        extra[2] += yn[k] * yn[k];
        extra[3] += sn * g[k];
        extra[4] += yn[k] * g[k];
      }
    }
    const double total = warp_sums<8>(extra);
    if (lane < 6) mine[4 * rows + lane] += total;
    const H* here = history + (c - w.plain) * (2 * a.m) * chunk;
    SECANT_LOOP
    for (int r = 0; r < rows; r += 2) {
      const bool pair = r + 1 < rows;
      const i64 row0 = x.rows[r] * a.n + base, row1 = x.rows[pair ? r + 1 : r] * a.n + base;
      const H* near = here + 2 * r * chunk;
      H s0[each], y0[each], s1[each], y1[each];
      load<Wide, H, G::size>(resident ? near : s_ring + row0, rank, length, s0);
      load<Wide, H, G::size>(resident ? near + chunk : y_ring + row0, rank, length, y0);
      load<Wide, H, G::size>(resident ? near + 2 * chunk : s_ring + row1, rank, pair ? length : 0, s1);
      load<Wide, H, G::size>(resident ? near + 3 * chunk : y_ring + row1, rank, pair ? length : 0, y1);
      double sum[8] = {};
      SECANT_UNROLL
      for (int k = 0; k < each; ++k) {
        const double u0 = double(widen(s0[k])), v0 = double(widen(y0[k]));
        const double u1 = double(widen(s1[k])), v1 = double(widen(y1[k]));
        sum[0] += u0 * g[k];
        sum[1] += v0 * g[k];
        sum[2] += u0 * yn[k];
        sum[3] += v0 * yn[k];
        sum[4] += u1 * g[k];
        sum[5] += v1 * g[k];
        sum[6] += u1 * yn[k];
        sum[7] += v1 * yn[k];
      }
      const double part = warp_sums<8>(sum);
      if (lane < (pair ? 8 : 4)) mine[4 * r + lane] += part;
    }
  }
  double top = double(largest);
  SECANT_UNROLL
  for (int o = 16; o > 0; o >>= 1) top = nan_max(top, __shfl_xor_sync(kAll, top, o));
  if (lane == 0) mine[4 * rows + 6] = top;
  __syncwarp();
}

// Adds the warps of a group; the totals end in x.sums[0 ...].
template <class G>
SECANT_DEVICE void add_warps(const Scratch& x, int m, int rows) {
  if (G::warps == 1) return;
  const int width = 4 * m + kExtras;
  G::sync();
  SECANT_LOOP
  for (int v = G::rank(); v < 4 * rows + kExtras; v += G::size) {
    double total = x.sums[v];
    SECANT_LOOP
    for (int k = 1; k < G::warps; ++k) {
      const double other = x.sums[k * width + v];
      total = v == 4 * rows + 6 ? nan_max(total, other) : total + other;
    }
    x.sums[v] = total;
  }
  G::sync();
}

// The recursion on coefficients. In: sy, yy (m x m, by slot), sg, yg (by slot), `oldest` slot. Out: coef as in Scratch
// (all but coef[1]), and g.d without the term of g itself. solve holds sg, yg and has room for alpha, z, rho.
template <class G>
SECANT_DEVICE void recursion(const double* sy, const double* yy, double* solve, double* coef, int m, int oldest) {
  const int rank = G::rank(), lane = rank % 32;
  double *sg = solve, *yg = solve + m, *alpha = solve + 2 * m, *z = solve + 3 * m, *rho = solve + 4 * m;
  const auto slot = [=](int age) { return oldest + age < m ? oldest + age : oldest + age - m; };
  SECANT_LOOP
  for (int i = rank; i < m; i += G::size) {
    const double d = sy[i * (m + 1)];
    rho[i] = valid_pair(d, yy[i * (m + 1)]) ? 1.0 / d : 0.0;
  }
  G::sync();
  double gamma = 1.0;
  SECANT_LOOP
  for (int k = m - 1; k >= 0; --k) {
    const int i = slot(k);
    if (rho[i] != 0.0) {
      gamma = sy[i * (m + 1)] / yy[i * (m + 1)];
      break;
    }
  }
  if (rank < 32) {
    if (m <= kStaged) {  // subtract each alpha from all older rows at once: a short chain, column access
      SECANT_LOOP
      for (int k = lane; k < m; k += 32) alpha[k] = -sg[k];
      __syncwarp();
      SECANT_LOOP
      for (int k = m - 1; k >= 0; --k) {
        const int j = slot(k);
        const double r = rho[j], value = r != 0.0 ? r * alpha[j] : 0.0;
        __syncwarp();
        if (lane < k && r != 0.0) alpha[slot(lane)] -= value * sy[slot(lane) * m + j];
        if (lane == 0) alpha[j] = value;
        __syncwarp();
      }
    } else {  // one dot product a row: row access, contiguous in global memory
      SECANT_LOOP
      for (int k = m - 1; k >= 0; --k) {
        const int i = slot(k);
        double sum = 0.0;
        SECANT_LOOP
        for (int newer = k + 1 + lane; newer < m; newer += 32) {
          const int j = slot(newer);
          if (alpha[j] != 0.0) sum += alpha[j] * sy[i * m + j];
        }
        sum = warp_sum(sum);
        const double r = rho[i];
        if (lane == 0) alpha[i] = r != 0.0 ? r * (-sg[i] - sum) : 0.0;
        __syncwarp();
      }
    }
  }
  G::sync();
  SECANT_LOOP
  for (int i = rank; i < m; i += G::size) {
    double sum = yg[i];
    SECANT_LOOP
    for (int j = 0; j < m; ++j) {
      if (alpha[j] != 0.0) sum += alpha[j] * yy[j * m + i];
    }
    z[i] = -gamma * sum;
  }
  G::sync();
  if (rank < 32) {
    SECANT_LOOP
    for (int k = 0; k < m; ++k) {
      const int i = slot(k);
      const double r = rho[i], delta = r != 0.0 ? alpha[i] - r * z[i] : 0.0;
      SECANT_LOOP
      for (int newer = k + 1 + lane; newer < m && r != 0.0; newer += 32) {
        const int j = slot(newer);
        z[j] += delta * sy[i * m + j];
      }
      if (lane == 0) coef[2 + i] = delta;
      __syncwarp();
    }
    SECANT_LOOP
    for (int i = lane; i < m; i += 32) coef[2 + m + i] = -gamma * alpha[i];
    if (lane == 0) coef[0] = -gamma;
  }
  G::sync();
}

// Gate, Gram matrices, counters, coefficients and stats of one problem, from its sums. `coef` is where the second pass
// will look for the coefficients.
template <class G>
SECANT_DEVICE void finish(const Update& a, i64 b, const Scratch& x, int rows, double* coef) {
  const int m = a.m, rank = G::rank();
  double* sy = reinterpret_cast<double*>(a.sy) + b * m * m;
  double* yy = reinterpret_cast<double*>(a.yy) + b * m * m;
  double *sg = x.solve, *yg = x.solve + m;
  const double* extra = x.sums + 4 * rows;
  int* head = reinterpret_cast<int*>(a.head) + b;
  const int p = *head;
  const double norms = sqrt(extra[1]) * sqrt(extra[2]);
  const bool accepted = a.pair && finite(extra[0]) && finite(extra[1]) && finite(extra[2]) && extra[0] > a.tol * norms;
  const bool staged = m <= kStaged;
  double *tsy = sy, *tyy = yy;
  if (staged) {
    tsy = x.gram;
    tyy = x.gram + m * m;
    SECANT_LOOP
    for (int v = rank; v < m * m; v += G::size) {
      tsy[v] = sy[v];
      tyy[v] = yy[v];
    }
  }
  G::sync();  // every thread has read head, and the matrices are staged
  SECANT_LOOP
  for (int i = rank; i < m; i += G::size) {
    const int at = x.place[i];
    const bool held = at != 0xffff;
    double row[4];
    SECANT_UNROLL
    for (int k = 0; k < 4; ++k) row[k] = held ? x.sums[4 * at + k] : 0.0;
    if (accepted) {
      if (i == p) {
        row[0] = extra[3];
        row[1] = extra[4];
        row[2] = extra[0];
        row[3] = extra[2];
      }
      sy[p * m + i] = i == p ? row[2] : 0.0;
      sy[i * m + p] = row[2];
      yy[p * m + i] = row[3];
      yy[i * m + p] = row[3];
      if (staged) {
        tsy[p * m + i] = i == p ? row[2] : 0.0;
        tsy[i * m + p] = row[2];
        tyy[p * m + i] = row[3];
        tyy[i * m + p] = row[3];
      }
    }
    sg[i] = row[0];
    yg[i] = row[1];
  }
  const int oldest = accepted ? (p + 1 == m ? 0 : p + 1) : p;
  if (rank == 0) {
    if (accepted) {
      int* count = reinterpret_cast<int*>(a.count) + b;
      *head = oldest;
      if (*count < m) *count += 1;
    }
    coef[1] = accepted ? double(p) : -1.0;
  }
  G::sync();
  if (a.direction) recursion<G>(tsy, tyy, x.solve, coef, m, oldest);
  if (rank < 32) {
    double gd = 0.0;
    if (a.direction) {  // g.d = -gamma g.g + sum of coefficients times dots
      SECANT_LOOP
      for (int i = rank; i < m; i += 32) {
        const double cs = coef[2 + i], cy = coef[2 + m + i];
        if (cs != 0.0) gd += cs * sg[i];
        if (cy != 0.0) gd += cy * yg[i];
      }
      gd = warp_sum(gd) + coef[0] * extra[5];
    }
    if (rank == 0) {
      double* stats = reinterpret_cast<double*>(a.stats) + 8 * b;
      stats[0] = gd;
      stats[1] = a.direction ? sqrt(extra[5]) : 0.0;
      stats[2] = a.direction ? extra[6] : 0.0;
      stats[3] = a.pair ? extra[0] : 0.0;
      stats[4] = a.pair ? sqrt(extra[1]) : 0.0;
      stats[5] = a.pair ? sqrt(extra[2]) : 0.0;
      stats[6] = accepted ? 1.0 : 0.0;
      stats[7] = a.direction ? -coef[0] : 0.0;
    }
  }
  G::sync();
}

// Second pass, in reverse order so that what caches still hold is used: d = coefficients times rows, the accepted pair
// into its slot, and the copy of the gradient. `place` maps a slot to its place in shared memory.
template <bool Wide, class T, class H, class G>
SECANT_DEVICE void combine(const Update& a, i64 b, const Scratch& x, const Walk& w, const double* coef) {
  constexpr int each = Each<H>::value, chunk = ChunkOf<H, G::size>::value;
  const int rank = G::rank(), m = a.m;
  const int put = int(coef[1]);
  H* s_ring = reinterpret_cast<H*>(a.s_ring) + b * m * a.n;
  H* y_ring = reinterpret_cast<H*>(a.y_ring) + b * m * a.n;
  const H* history = reinterpret_cast<const H*>(x.history);
  if (rank < 32) {  // rows with a coefficient, ascending; the new pair comes from registers
    int total = 0;
    SECANT_LOOP
    for (int first = 0; first < m && a.out; first += 32) {
      const int i = first + rank;
      const bool take = i < m && i != put && (coef[2 + i] != 0.0 || coef[2 + m + i] != 0.0);
      const u32 mask = __ballot_sync(kAll, take);
      if (take) x.rows[total + __popc(mask & ((1u << rank) - 1u))] = u16(i);
      total += __popc(mask);
    }
    if (rank == 0) x.solve[0] = double(total);
  }
  G::sync();
  const int rows = int(x.solve[0]);
  const T t = put >= 0 ? step_length<T>(a, b) : T(0);
  const T cg = a.out ? T(coef[0]) : T(0);
  SECANT_LOOP
  for (i64 c = w.count - 1; c >= 0; --c) {
    const bool resident = c >= w.plain;
    const i64 base = (w.first + c * w.stride) * chunk;
    const int length = a.n - base < chunk ? int(a.n - base) : chunk;
    const H* here = history + (c - w.plain) * (2 * m) * chunk;
    T d[each];
    SECANT_UNROLL
    for (int k = 0; k < each; ++k) d[k] = T(0);
    if (a.out) {
      load<Wide, H, G::size>(reinterpret_cast<const T*>(a.grad) + b * a.n + base, rank, length, d);
    }
    H sn[each], yn[each];  // y_prev is read here, before prev_out, which may be the same memory, is written
    if (put >= 0) new_pair<Wide, T, H, G::size>(a, b, base, rank, length, t, sn, yn);
    if (a.prev_out) store<Wide, H, G::size>(reinterpret_cast<T*>(a.prev_out) + b * a.n + base, rank, length, d);
    if (put >= 0) {
      store<Wide, H, G::size>(s_ring + put * a.n + base, rank, length, sn);
      store<Wide, H, G::size>(y_ring + put * a.n + base, rank, length, yn);
      const T cs = a.out ? T(coef[2 + put]) : T(0), cy = a.out ? T(coef[2 + m + put]) : T(0);
      SECANT_UNROLL
      for (int k = 0; k < each; ++k) d[k] = cg * d[k] + cs * T(widen(sn[k])) + cy * T(widen(yn[k]));
    } else {
      SECANT_UNROLL
      for (int k = 0; k < each; ++k) d[k] *= cg;
    }
    SECANT_LOOP
    for (int r = rows - 1; r >= 0; r -= 2) {
      const bool pair = r > 0;
      const int i0 = x.rows[r], i1 = x.rows[pair ? r - 1 : r];
      const i64 row0 = i0 * a.n + base, row1 = i1 * a.n + base;
      const H *near0 = here + 2 * x.place[i0] * chunk, *near1 = here + 2 * x.place[i1] * chunk;
      H s0[each], y0[each], s1[each], y1[each];
      load<Wide, H, G::size>(resident ? near0 : s_ring + row0, rank, length, s0);
      load<Wide, H, G::size>(resident ? near0 + chunk : y_ring + row0, rank, length, y0);
      load<Wide, H, G::size>(resident ? near1 : s_ring + row1, rank, pair ? length : 0, s1);
      load<Wide, H, G::size>(resident ? near1 + chunk : y_ring + row1, rank, pair ? length : 0, y1);
      const T cs0 = T(coef[2 + i0]), cy0 = T(coef[2 + m + i0]);
      const T cs1 = pair ? T(coef[2 + i1]) : T(0), cy1 = pair ? T(coef[2 + m + i1]) : T(0);
      SECANT_UNROLL
      for (int k = 0; k < each; ++k) {
        d[k] += cs0 * T(widen(s0[k]));
        d[k] += cy0 * T(widen(y0[k]));
        d[k] += cs1 * T(widen(s1[k]));
        d[k] += cy1 * T(widen(y1[k]));
      }
    }
    if (a.out) store<Wide, H, G::size>(reinterpret_cast<T*>(a.out) + b * a.n + base, rank, length, d);
  }
}

// --------------------------------------------------------------------------------------------- meeting of blocks

// Workspace: 16 bytes of counters for each of at most kMeetings problems, zero between launches; then for each problem
// its coefficients and the sums of its blocks, [value][block].
struct Meeting {
  u32 *ticket, *turn;
  double *coef, *partial;
};

SECANT_DEVICE Meeting meeting(u64 work, i64 b, i64 work_stride, int coefs) {
  double* base = reinterpret_cast<double*>(work);
  Meeting x;
  x.ticket = reinterpret_cast<u32*>(base + 2 * b);
  x.turn = x.ticket + 1;
  x.coef = base + 2 * kMeetings + b * work_stride;
  x.partial = x.coef + coefs;
  return x;
}

// Publishes `width` sums of this block and tells whether it is the last one to do so.
SECANT_DEVICE bool arrive(const Meeting& x, const double* sums, int width, u32* flag) {
  const int rank = int(threadIdx.x), blocks = int(gridDim.x);
  SECANT_LOOP
  for (int v = rank; v < width; v += kBlock) x.partial[i64(v) * blocks + blockIdx.x] = sums[v];
  __threadfence();
  __syncthreads();
  if (rank == 0) {
    *flag = atomicAdd(x.ticket, 1u) == u32(blocks - 1);
    if (*flag) *x.ticket = 0u;
    __threadfence();
  }
  __syncthreads();
  return *flag;
}

// The last block adds the sums of all, in the order of the blocks. `top` is the index of a maximum among them, or -1.
SECANT_DEVICE void gather(const Meeting& x, double* sums, int width, int top) {
  const int lane = int(threadIdx.x % 32u), warp = int(threadIdx.x / 32u), blocks = int(gridDim.x);
  SECANT_LOOP
  for (int v = warp * 4; v < width; v += kBlock / 32 * 4) {
    double sum[4] = {};
    SECANT_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (v + k >= width) continue;
      const double* from = x.partial + i64(v + k) * blocks;
      if (v + k == top) {
        SECANT_LOOP
        for (int j = lane; j < blocks; j += 32) sum[k] = nan_max(sum[k], from[j]);
      } else {
        SECANT_UNROLL_4
        for (int j = lane; j < blocks; j += 32) sum[k] += from[j];
      }
      if (v + k == top) {
        SECANT_UNROLL
        for (int o = 16; o > 0; o >>= 1) sum[k] = nan_max(sum[k], __shfl_xor_sync(kAll, sum[k], o));
        if (lane == 0) sums[v + k] = sum[k];
        sum[k] = 0.0;
      }
    }
    const double total = warp_sums<4>(sum);
    if (lane < 4 && v + lane < width && v + lane != top) sums[v + lane] = total;
  }
  __syncthreads();
}

// The sums of a problem from the order of the contract, by slot, into x.sums; and from there, with zeros for slots that
// were not read.
template <class G>
SECANT_DEVICE void take_dots(const Update& a, i64 b, const Scratch& x, int rows) {
  const double* from = reinterpret_cast<const double*>(a.dots) + b * (4 * a.m + kExtras);
  SECANT_LOOP
  for (int v = G::rank(); v < 4 * rows + kExtras; v += G::size) {
    x.sums[v] = from[v < 4 * rows ? 4 * x.rows[v / 4] + v % 4 : 4 * a.m + v - 4 * rows];
  }
  G::sync();
}

template <class G>
SECANT_DEVICE void give_dots(const Update& a, i64 b, const Scratch& x, int rows) {
  double* to = reinterpret_cast<double*>(a.dots) + b * (4 * a.m + kExtras);
  SECANT_LOOP
  for (int v = G::rank(); v < 4 * a.m + kExtras; v += G::size) {
    const int at = v < 4 * a.m ? x.place[v / 4] : rows;
    to[v] = at != 0xffff ? x.sums[4 * at + (v < 4 * a.m ? v % 4 : v - 4 * a.m)] : 0.0;
  }
}

SECANT_DEVICE double* given_coefs(const Update& a, i64 b) {
  return reinterpret_cast<double*>(a.coefs) + b * (2 * a.m + 2);
}

// The passes of one problem by one group, or (meet) by the gridDim.x blocks of a grid row. Between the passes of a
// fused launch the blocks wait for the last one to solve; without kSecond the launch ends there, and one of kSecond
// alone goes on. kSolve is for one block a problem.
template <class T, class H, class G>
SECANT_DEVICE void update_problem(const Update& a, i64 b, const Scratch& x, bool meet_blocks) {
  const Meeting meet = meeting(a.work, meet_blocks ? b : 0, a.work_stride, 2 * a.m + 2);
  const i64 first = meet_blocks ? i64(blockIdx.x) : 0, stride = meet_blocks ? i64(gridDim.x) : 1;
  const Walk w = walk(a.n, ChunkOf<H, G::size>::value, first, stride, a.resident);
  const bool second = a.phases & kSecond;
  constexpr bool parts = G::warps > 1;  // a warp does nothing but whole updates: it has no registers to spare
  if (a.phases & (parts ? kFirst | kSolve : kFirst)) {
    u32 turn = 0;  // read before the arrival: it cannot change until then
    if (meet_blocks) turn = *reinterpret_cast<volatile u32*>(meet.turn);
    const int rows = list_rows<G>(a, b, x);
    bool last = true;
    if (parts && (a.phases & kSolve)) {
      take_dots<G>(a, b, x, rows);
    } else {
      if (G::warps > 1 && a.wide) {
        dots<G::warps != 1, T, H, G>(a, b, x, w, rows);
      } else {
        dots<false, T, H, G>(a, b, x, w, rows);
      }
      add_warps<G>(x, a.m, rows);
      const int width = 4 * rows + kExtras;
      if (meet_blocks) {
        last = arrive(meet, x.sums, width, reinterpret_cast<u32*>(x.solve));
        if (last) gather(meet, x.sums, width, 4 * rows + 6);
      }
      if (parts && a.dots) {
        if (last) give_dots<G>(a, b, x, rows);
        return;
      }
    }
    if (last) finish<G>(a, b, x, rows, parts && a.coefs ? given_coefs(a, b) : meet_blocks ? meet.coef : x.coef);
    if (meet_blocks && second) {
      if (last) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) atomicAdd(meet.turn, 1u);
      } else {
        if (threadIdx.x == 0) {
          wait_while_equal(meet.turn, turn);
          __threadfence();
        }
        __syncthreads();
      }
    }
  }
  if (!second) return;
  if (meet_blocks || (parts && a.coefs)) {
    const double* from = parts && a.coefs ? given_coefs(a, b) : meet.coef;
    SECANT_LOOP
    for (int v = G::rank(); v < 2 * a.m + 2; v += G::size) x.coef[v] = from[v];
  }
  G::sync();
  if (G::warps > 1 && a.wide) {
    combine<G::warps != 1, T, H, G>(a, b, x, w, x.coef);
  } else {
    combine<false, T, H, G>(a, b, x, w, x.coef);
  }
}

template <class T, class H>
SECANT_DEVICE void update_block(const Update& a, unsigned char* memory) {
  const Scratch x = scratch(memory, a.m, Block::warps);
  const bool meet_blocks = a.spread;
  const i64 first = meet_blocks ? i64(blockIdx.y) : i64(blockIdx.x), stride = meet_blocks ? a.batch : i64(gridDim.x);
  SECANT_LOOP
  for (i64 b = first; b < a.batch; b += stride) {
    update_problem<T, H, Block>(a, b, x, meet_blocks);
    __syncthreads();  // the next problem reuses the shared memory
  }
}

template <class T, class H>
SECANT_DEVICE void update_warp(const Update& a, unsigned char* memory) {
  const i64 warps = blockDim.x / 32u, warp = threadIdx.x / 32u;
  const Scratch x = scratch(memory + warp * a.group_bytes, a.m, 1);
  SECANT_LOOP
  for (i64 b = blockIdx.x * warps + warp; b < a.batch; b += gridDim.x * warps) {
    update_problem<T, H, Warp>(a, b, x, false);
    __syncwarp();
  }
}

// ---------------------------------------------------------------------------------------------------- two_loop, panels

// Coefficients of a problem in the workspace: gamma, whether it is known, then alpha, delta, rho by age (m each) and
// the kPanel x kPanel matrix s_i.y_j of every panel.
struct Panels {
  double *gamma, *alpha, *delta, *rho, *gram;
};

SECANT_DEVICE int panel_coefs(int m) { return 2 + 3 * m + (m + kPanel - 1) / kPanel * kPanel * kPanel; }

SECANT_DEVICE Panels panels(double* coef, int m) {
  Panels x;
  x.gamma = coef;
  x.alpha = coef + 2;
  x.delta = x.alpha + m;
  x.rho = x.delta + m;
  x.gram = x.rho + m;
  return x;
}

// Panel 0 holds the newest pairs; panel p the ages low <= i < high.
SECANT_DEVICE int panel_high(int m, int p) { return m - kPanel * p; }
SECANT_DEVICE int panel_low(int m, int p) { return m > kPanel * (p + 1) ? m - kPanel * (p + 1) : 0; }

// q += sum of c_i x_i over the rows low <= i < high of `ring`, in float64.
template <bool Wide, class H>
SECANT_DEVICE void add_rows(double (&q)[Each<H>::value], const H* ring, i64 row, const double* c, double sign, int low,
                            int high, int length) {
  constexpr int each = Each<H>::value;
  const int rank = int(threadIdx.x);
  SECANT_LOOP
  for (int i = high - 1; i >= low; i -= 2) {
    const bool pair = i > low;
    const double c0 = sign * c[i], c1 = pair ? sign * c[i - 1] : 0.0;
    H x0[each], x1[each];  // a row without a coefficient may hold anything: it is not read
    load<Wide, H, kBlock>(ring + i * row, rank, c0 != 0.0 ? length : 0, x0);
    load<Wide, H, kBlock>(ring + (pair ? i - 1 : i) * row, rank, c1 != 0.0 ? length : 0, x1);
    SECANT_UNROLL
    for (int k = 0; k < each; ++k) q[k] += c0 * double(widen(x0[k])) + c1 * double(widen(x1[k]));
  }
}

// Four rows of a warp's piece of a chunk; rows at or above `limit` are zero.
template <bool Wide, class H>
SECANT_DEVICE void load_rows(const H* ring, i64 row, int first, int limit, int length, H (&x)[4][Each<H>::value]) {
  SECANT_UNROLL
  for (int i = 0; i < 4; ++i) {
    const bool in = first + i < limit;
    load<Wide, H, 32>(ring + (in ? first + i : first) * row, int(threadIdx.x % 32u), in ? length : 0, x[i]);
  }
}

// Newest to oldest: q -= previous panel; then s_i.q, s_i.y_j (i not newer than j) and y_i.y_i of this panel, and alpha.
template <bool Wide, class T, class H>
SECANT_DEVICE void panel_dots(const TwoLoop& a, unsigned char* memory) {
  constexpr int each = Each<H>::value, chunk = ChunkOf<H, kBlock>::value, piece = ChunkOf<H, 32>::value;
  double* sums = reinterpret_cast<double*>(memory);  // kTiles x kTile
  double* gram = sums + kTiles * kTile;              // kPanel x (kPanel + 2): s_i.y_j, then s_i.q, then y_i.y_i
  u32* flag = reinterpret_cast<u32*>(gram + kPanel * (kPanel + 2));
  T* buffer = reinterpret_cast<T*>(flag + 4);  // 2 x chunk: q of this chunk and of the last one
  const i64 b = blockIdx.y;
  const int rank = int(threadIdx.x), lane = rank % 32, warp = rank / 32, m = a.m;
  const Meeting meet = meeting(a.work, b, a.work_stride, panel_coefs(m));
  const Panels x = panels(meet.coef, m);
  const int low = panel_low(m, a.step), high = panel_high(m, a.step), k = high - low, side = (k + 3) / 4;
  const int tiles = side * (side + 1) / 2;
  const H* s = reinterpret_cast<const H*>(a.s) + b * a.s_batch;
  const H* y = reinterpret_cast<const H*>(a.y) + b * a.y_batch;
  const T* source = reinterpret_cast<const T*>(a.step < 2 ? a.grad : a.out) + b * a.n;
  T* out = reinterpret_cast<T*>(a.out) + b * a.n;
  SECANT_LOOP
  for (int v = rank; v < kTiles * kTile; v += kBlock) sums[v] = 0.0;
  const Walk w = walk(a.n, chunk, blockIdx.x, gridDim.x, 0);
  SECANT_LOOP
  for (i64 c = 0; c < w.count; ++c) {
    const i64 base = (w.first + c * w.stride) * chunk;
    const int length = a.n - base < chunk ? int(a.n - base) : chunk;
    T* shared = buffer + (c % 2) * chunk;
    T raw[each];
    load<Wide, H, kBlock>(source + base, rank, length, raw);
    if (a.step == 0) {
      SECANT_UNROLL
      for (int e = 0; e < each; ++e) raw[e] = -raw[e];
    } else {
      double q[each];
      SECANT_UNROLL
      for (int e = 0; e < each; ++e) q[e] = a.step == 1 ? -double(raw[e]) : double(raw[e]);
      add_rows<Wide, H>(q, y + base, a.y_row, x.alpha, -1.0, high, panel_high(m, a.step - 1), length);
      SECANT_UNROLL
      for (int e = 0; e < each; ++e) raw[e] = T(q[e]);
      store<Wide, H, kBlock>(out + base, rank, length, raw);
    }
    store<Wide, H, kBlock>(shared, rank, length, raw);
    __syncthreads();  // one is enough: the buffer of chunk c is written again only after the barrier of chunk c + 1
    SECANT_LOOP
    for (int tile = warp; tile < tiles; tile += kBlock / 32) {
      int i = 0, j = tile;
      while (j >= side - i) {
        j -= side - i;
        ++i;
      }
      j += i;
      double sum[16] = {}, edge[8] = {};
      SECANT_LOOP
      for (int at = 0; at < length; at += piece) {
        const int left = length - at < piece ? length - at : piece;
        H xs[4][each], xy[4][each];
        load_rows<Wide, H>(s + base + at + low * a.s_row, a.s_row, 4 * i, k, left, xs);
        load_rows<Wide, H>(y + base + at + low * a.y_row, a.y_row, 4 * j, k, left, xy);
        T xq[each];
        load<Wide, H, 32>(shared + at, lane, i == j ? left : 0, xq);
        SECANT_UNROLL
        for (int e = 0; e < each; ++e) {
          double us[4], uy[4];
          SECANT_UNROLL
          for (int r = 0; r < 4; ++r) {
            us[r] = double(widen(xs[r][e]));
            uy[r] = double(widen(xy[r][e]));
          }
          SECANT_UNROLL
          for (int r = 0; r < 16; ++r) sum[r] += us[r / 4] * uy[r % 4];
          if (i == j) {
            SECANT_UNROLL
            for (int r = 0; r < 4; ++r) {
              edge[r] += us[r] * double(xq[e]);
              edge[4 + r] += uy[r] * uy[r];
            }
          }
        }
      }
      const double total = warp_sums<16>(sum);
      if (lane < 16) sums[tile * kTile + lane] += total;
      if (i == j) {
        const double more = warp_sums<8>(edge);
        if (lane < 8) sums[tile * kTile + 16 + lane] += more;
      }
    }
  }
  __syncthreads();
  if (!arrive(meet, sums, tiles * kTile, flag)) return;
  gather(meet, sums, tiles * kTile, -1);
  SECANT_LOOP
  for (int v = rank; v < kPanel * (kPanel + 2); v += kBlock) {
    const int i = v / (kPanel + 2), j = v % (kPanel + 2), column = j < kPanel ? j : i;
    double value = 0.0;
    if (i < k && column < k && i / 4 <= column / 4) {
      const int before = (i / 4) * side - (i / 4) * (i / 4 - 1) / 2;  // tiles of the rows above
      const double* tile = sums + (before + column / 4 - i / 4) * kTile;
      value = j < kPanel ? tile[(i % 4) * 4 + j % 4] : tile[16 + (j - kPanel) * 4 + i % 4];
    }
    gram[v] = value;
    if (j < kPanel) x.gram[a.step * kPanel * kPanel + i * kPanel + j] = value;
  }
  __syncthreads();
  if (warp != 0) return;
  const int i = lane < kPanel ? lane : 0;
  const double sy = gram[i * (kPanel + 2) + i], yy = gram[i * (kPanel + 2) + kPanel + 1];
  const bool valid = lane < k && valid_pair(sy, yy);
  const double rho = valid ? 1.0 / sy : 0.0;
  double rest = gram[i * (kPanel + 2) + kPanel], alpha = 0.0;
  SECANT_LOOP
  for (int j = k - 1; j >= 0; --j) {
    const double value = __shfl_sync(kAll, valid ? rho * rest : 0.0, j);
    if (lane == j) alpha = value;
    if (lane < j && valid && value != 0.0) rest -= value * gram[i * (kPanel + 2) + j];
  }
  if (lane < k) {
    x.alpha[low + lane] = alpha;
    x.rho[low + lane] = rho;
  }
  const u32 found = __ballot_sync(kAll, valid);
  const bool known = a.step > 0 && x.gamma[1] != 0.0;
  __syncwarp();
  const int newest = found ? 31 - __clz(int(found)) : 0;
  if (a.gamma == a.gamma) {
    if (lane == 0) x.gamma[0] = a.gamma;
  } else if (!known) {
    if (lane == newest) {
      x.gamma[0] = found ? sy / yy : 1.0;
      x.gamma[1] = found ? 1.0 : 0.0;
    }
  }
}

// Oldest to newest. Step 0: q -= oldest panel, r = gamma q; step t: r += panel last - t + 1; then y_i.r of panel last -
// t, and delta = alpha - beta. The step after the last panel has no dots: it completes the direction.
template <bool Wide, class T, class H>
SECANT_DEVICE void panel_line(const TwoLoop& a, unsigned char* memory) {
  constexpr int each = Each<H>::value, chunk = ChunkOf<H, kBlock>::value;
  double* sums = reinterpret_cast<double*>(memory);  // warps x kPanel
  u32* flag = reinterpret_cast<u32*>(sums + kBlock / 32 * kPanel);
  const i64 b = blockIdx.y;
  const int rank = int(threadIdx.x), lane = rank % 32, warp = rank / 32, m = a.m;
  const Meeting meet = meeting(a.work, b, a.work_stride, panel_coefs(m));
  const Panels x = panels(meet.coef, m);
  const int last = (m + kPanel - 1) / kPanel - 1, panel = last - a.step;
  const int low = panel < 0 ? m : panel_low(m, panel), high = panel < 0 ? m : panel_high(m, panel), k = high - low;
  const H* s = reinterpret_cast<const H*>(a.s) + b * a.s_batch;
  const H* y = reinterpret_cast<const H*>(a.y) + b * a.y_batch;
  const bool fresh = a.step == 0 && last == 0;
  const T* source = reinterpret_cast<const T*>(fresh ? a.grad : a.out) + b * a.n;
  T* out = reinterpret_cast<T*>(a.out) + b * a.n;
  const double gamma = a.step == 0 ? x.gamma[0] : 1.0;
  double* mine = sums + warp * kPanel;
  if (lane < kPanel) mine[lane] = 0.0;
  __syncwarp();
  const Walk w = walk(a.n, chunk, blockIdx.x, gridDim.x, 0);
  SECANT_LOOP
  for (i64 c = w.count - 1; c >= 0; --c) {
    const i64 base = (w.first + c * w.stride) * chunk;
    const int length = a.n - base < chunk ? int(a.n - base) : chunk;
    T raw[each];
    load<Wide, H, kBlock>(source + base, rank, length, raw);
    double q[each];
    SECANT_UNROLL
    for (int e = 0; e < each; ++e) q[e] = fresh ? -double(raw[e]) : double(raw[e]);
    if (a.step == 0) {
      add_rows<Wide, H>(q, y + base, a.y_row, x.alpha, -1.0, low, high, length);
    } else {
      add_rows<Wide, H>(q, s + base, a.s_row, x.delta, 1.0, panel_low(m, panel + 1), panel_high(m, panel + 1), length);
    }
    SECANT_UNROLL
    for (int e = 0; e < each; ++e) {
      raw[e] = T(gamma * q[e]);
      q[e] = double(raw[e]);
    }
    store<Wide, H, kBlock>(out + base, rank, length, raw);
    SECANT_LOOP
    for (int r = 0; r < k; r += 4) {
      double sum[4] = {};
      H xy[4][each];
      SECANT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const bool in = r + i < k;
        load<Wide, H, kBlock>(y + (in ? low + r + i : low) * a.y_row + base, rank, in ? length : 0, xy[i]);
      }
      SECANT_UNROLL
      for (int i = 0; i < 4; ++i) {
        SECANT_UNROLL
        for (int e = 0; e < each; ++e) sum[i] += double(widen(xy[i][e])) * q[e];
      }
      const double total = warp_sums<4>(sum);
      if (lane < 4) mine[r + lane] += total;
    }
  }
  if (panel < 0) return;
  __syncthreads();
  if (rank < kPanel) {
    double total = sums[rank];
    SECANT_LOOP
    for (int v = 1; v < kBlock / 32; ++v) total += sums[v * kPanel + rank];
    sums[rank] = total;
  }
  __syncthreads();
  if (!arrive(meet, sums, k, flag)) return;
  gather(meet, sums, k, -1);
  if (warp != 0) return;
  const double* gram = x.gram + panel * kPanel * kPanel;
  const int i = lane < k ? lane : 0;
  const double rho = lane < k ? x.rho[low + i] : 0.0, alpha = lane < k ? x.alpha[low + i] : 0.0;
  double rest = sums[i], delta = 0.0;
  SECANT_LOOP
  for (int j = 0; j < k; ++j) {
    const double value = __shfl_sync(kAll, rho != 0.0 ? alpha - rho * rest : 0.0, j);
    if (lane == j) delta = value;
    if (lane > j && lane < k && value != 0.0) rest += value * gram[j * kPanel + i];
  }
  if (lane < k) x.delta[low + lane] = delta;
}

// ---------------------------------------------------------------------------------------------------- two_loop, groups

// Sum over the group of four values; every thread gets all of them. `board` holds warps x 4 doubles.
template <class G>
SECANT_DEVICE void group_sums(double (&v)[4], double* board) {
  const double mine = warp_sums<4>(v);
  const int rank = G::rank();
  G::sync();  // the last values have been read
  if (rank % 32 < 4) board[rank / 32 * 4 + rank % 32] = mine;
  G::sync();
  SECANT_UNROLL
  for (int k = 0; k < 4; ++k) {
    double total = board[k];
    SECANT_LOOP
    for (int j = 1; j < G::warps; ++j) total += board[4 * j + k];
    v[k] = total;
  }
}

// Shared memory: board (4 warps), alpha and rho (2 m), q in float64 where `resident`, then the pairs where `resident`
// is 2. Otherwise q lives in `out`, rounded to T.
template <bool Wide, class T, class H, class G>
SECANT_DEVICE void two_loop_group(const TwoLoop& a, i64 first, i64 stride, unsigned char* memory) {
  constexpr int each = Each<H>::value, chunk = ChunkOf<H, G::size>::value;
  const int rank = G::rank(), m = a.m;
  double* board = reinterpret_cast<double*>(memory);
  double *alpha = board + 4 * G::warps, *rho = alpha + m;
  const i64 chunks = (a.n + chunk - 1) / chunk;
  double* q_shared = rho + m;
  H* history = reinterpret_cast<H*>(q_shared + chunks * chunk);
  SECANT_LOOP
  for (i64 b = first; b < a.batch; b += stride) {
    const T* g = reinterpret_cast<const T*>(a.grad) + b * a.n;
    T* out = reinterpret_cast<T*>(a.out) + b * a.n;
    const H* s = reinterpret_cast<const H*>(a.s) + b * a.s_batch;
    const H* y = reinterpret_cast<const H*>(a.y) + b * a.y_batch;
    i64 s_row = a.s_row, y_row = a.y_row;
    if (a.resident == 2) {
      SECANT_LOOP
      for (int i = 0; i < m; ++i) {
        SECANT_LOOP
        for (i64 c = 0; c < chunks; ++c) {
          const int length = a.n - c * chunk < chunk ? int(a.n - c * chunk) : chunk;
          stage<Wide, H, G::size>(history + (2 * i * chunks + c) * chunk, s + i * s_row + c * chunk, rank, length);
          stage<Wide, H, G::size>(history + ((2 * i + 1) * chunks + c) * chunk, y + i * y_row + c * chunk, rank,
                                  length);
        }
      }
      copy_async_wait();
      s = history;
      y = history + chunks * chunk;
      s_row = y_row = 2 * chunks * chunk;
    }
    // One sweep: q = scale q (scale grad where scale < 0) + c x (x a row, or none), written back; then the dots asked
    // for, of q and the row `next`. Rows: 2 i for s_i, 2 i + 1 for y_i, -1 for none. Dots: next.q, and for an s row
    // s_i.y_i and y_i.y_i too.
    const auto sweep = [&](double scale, double c, int add, int next, double (&sum)[4]) {
      SECANT_UNROLL
      for (int v = 0; v < 4; ++v) sum[v] = 0.0;
      SECANT_LOOP
      for (i64 at = 0; at < chunks; ++at) {
        const i64 base = at * chunk;
        const int length = a.n - base < chunk ? int(a.n - base) : chunk;
        double q[each];
        T raw[each];
        if (scale < 0.0) {
          load<Wide, H, G::size>(g + base, rank, length, raw);
          SECANT_UNROLL
          for (int e = 0; e < each; ++e) q[e] = scale * double(raw[e]);
        } else if (a.resident) {
          SECANT_UNROLL
          for (int e = 0; e < each; ++e) q[e] = scale * q_shared[base + e * G::size + rank];
        } else {
          load<Wide, H, G::size>(out + base, rank, length, raw);
          SECANT_UNROLL
          for (int e = 0; e < each; ++e) q[e] = scale * double(raw[e]);
        }
        if (add >= 0) {
          H row[each];
          load<Wide, H, G::size>((add % 2 ? y + (add / 2) * y_row : s + (add / 2) * s_row) + base, rank, length, row);
          SECANT_UNROLL
          for (int e = 0; e < each; ++e) q[e] += c * double(widen(row[e]));
        }
        if (a.resident && next >= 0) {
          SECANT_UNROLL
          for (int e = 0; e < each; ++e) q_shared[base + e * G::size + rank] = q[e];
        } else {
          SECANT_UNROLL
          for (int e = 0; e < each; ++e) {
            raw[e] = T(q[e]);
            q[e] = double(raw[e]);
          }
          store<Wide, H, G::size>(out + base, rank, length, raw);
        }
        if (next < 0) continue;
        H yi[each], si[each];
        load<Wide, H, G::size>(y + (next / 2) * y_row + base, rank, length, yi);
        if (next % 2) {
          SECANT_UNROLL
          for (int e = 0; e < each; ++e) sum[0] += double(widen(yi[e])) * q[e];
        } else {
          load<Wide, H, G::size>(s + (next / 2) * s_row + base, rank, length, si);
          SECANT_UNROLL
          for (int e = 0; e < each; ++e) {
            const double u = double(widen(si[e])), v = double(widen(yi[e]));
            sum[0] += u * q[e];
            sum[1] += u * v;
            sum[2] += v * v;
          }
        }
      }
      if (next >= 0) group_sums<G>(sum, board);
    };
    // Loop 1 takes the rows newest to oldest, loop 2 oldest to newest. Each step first adds what the step before
    // decided: `add` with coefficient c, and the scale gamma between the loops (q lacks it in the first dot of loop 2).
    double sum[4], gamma = a.gamma == a.gamma ? a.gamma : 1.0, scale = -1.0, c = 0.0;
    bool known = a.gamma == a.gamma, turned = false;
    int add = -1;
    SECANT_LOOP
    for (int step = 0; step <= 2 * m; ++step) {
      const bool down = step < m;
      const int i = down ? m - 1 - step : step - m;
      const bool end = step == 2 * m;
      if (!down && !end && rho[i] == 0.0) continue;
      if (end && !turned) {  // no valid pair at all: d = -gamma grad
        scale = -gamma;
        add = -1;
      }
      sweep(scale, c, add, end ? -1 : (down ? 2 * i : 2 * i + 1), sum);
      scale = 1.0;
      if (down) {
        const bool valid = valid_pair(sum[1], sum[2]);
        const double inverse = valid ? 1.0 / sum[1] : 0.0, value = valid ? sum[0] * inverse : 0.0;
        c = -value;
        add = valid ? 2 * i + 1 : -1;
        if (valid && !known) {
          gamma = sum[1] / sum[2];
          known = true;
        }
        if (rank == 0) {
          alpha[i] = value;
          rho[i] = inverse;
        }
        if (step == m - 1) G::sync();
      } else if (!end) {
        if (!turned) scale = gamma;
        c = alpha[i] - rho[i] * scale * sum[0];
        add = 2 * i;
        turned = true;
      }
    }
    G::sync();  // the next problem reuses the shared memory
  }
}

template <bool Wide, class T, class H>
SECANT_DEVICE void two_loop_block(const TwoLoop& a, unsigned char* memory) {
  two_loop_group<Wide, T, H, Block>(a, blockIdx.x, gridDim.x, memory);
}

template <class T, class H>
SECANT_DEVICE void two_loop_warp(const TwoLoop& a, unsigned char* memory) {
  const i64 warps = blockDim.x / 32u, warp = threadIdx.x / 32u;
  two_loop_group<false, T, H, Warp>(a, blockIdx.x * warps + warp, gridDim.x * warps, memory + warp * a.group_bytes);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------- entry points

#define SECANT_LBFGS_ENTRIES(TAG, T, H)                                                        \
  extern "C" __global__ void __launch_bounds__(256, 2) lbfgs_update_block_##TAG(Update a) {    \
    SECANT_DYNAMIC_SHARED(memory);                                                             \
    update_block<T, H>(a, memory);                                                             \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 2) lbfgs_update_warp_##TAG(Update a) {     \
    SECANT_DYNAMIC_SHARED(memory);                                                             \
    update_warp<T, H>(a, memory);                                                              \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 1) lbfgs_panel_dots_##TAG(TwoLoop a) {     \
    SECANT_DYNAMIC_SHARED(memory);                                                             \
    if (a.wide) {                                                                              \
      panel_dots<true, T, H>(a, memory);                                                       \
    } else {                                                                                   \
      panel_dots<false, T, H>(a, memory);                                                      \
    }                                                                                          \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 2) lbfgs_panel_line_##TAG(TwoLoop a) {     \
    SECANT_DYNAMIC_SHARED(memory);                                                             \
    if (a.wide) {                                                                              \
      panel_line<true, T, H>(a, memory);                                                       \
    } else {                                                                                   \
      panel_line<false, T, H>(a, memory);                                                      \
    }                                                                                          \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 2) lbfgs_two_loop_block_##TAG(TwoLoop a) { \
    SECANT_DYNAMIC_SHARED(memory);                                                             \
    if (a.wide) {                                                                              \
      two_loop_block<true, T, H>(a, memory);                                                   \
    } else {                                                                                   \
      two_loop_block<false, T, H>(a, memory);                                                  \
    }                                                                                          \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 2) lbfgs_two_loop_warp_##TAG(TwoLoop a) {  \
    SECANT_DYNAMIC_SHARED(memory);                                                             \
    two_loop_warp<T, H>(a, memory);                                                            \
  }

// Every kernel by name, for the tables of the host: X(kernel, parameter struct).
#define SECANT_LBFGS_TABLE(X, TAG)       \
  X(lbfgs_update_block_##TAG, Update)    \
  X(lbfgs_update_warp_##TAG, Update)     \
  X(lbfgs_panel_dots_##TAG, TwoLoop)     \
  X(lbfgs_panel_line_##TAG, TwoLoop)     \
  X(lbfgs_two_loop_block_##TAG, TwoLoop) \
  X(lbfgs_two_loop_warp_##TAG, TwoLoop)

// One name a (T, H) pair; a build may choose fewer by defining SECANT_LBFGS_PAIRS before this file.
#ifndef SECANT_LBFGS_PAIRS
#define SECANT_LBFGS_PAIRS(X) \
  X(f32_f32, float, float)    \
  X(f32_f64, float, double)   \
  X(f32_bf16, float, u16) X(f64_f32, double, float) X(f64_f64, double, double) X(f64_bf16, double, u16)
#endif
SECANT_LBFGS_PAIRS(SECANT_LBFGS_ENTRIES)
