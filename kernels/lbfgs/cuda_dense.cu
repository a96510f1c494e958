// The dense update on CUDA: one pass over the lower triangle of H makes the update that is due and multiplies by the
// gradient and by the change of it. The contract is reference.dense_update. This text goes behind cuda.cu, whose sums
// and meetings of blocks it uses.
//
//   kFirst   The pass. The triangle is cut into tiles of 64 x 64, numbered row of tiles behind row of tiles, and every
//            block gets a run of them, as many as any other. A warp has 8 rows of a tile and reads along them. The sums
//            along its rows stay in registers as long as a block stays in a row of tiles; those along its columns are
//            left for each tile. Every place has one writer: no atomic additions, results repeat bit for bit.
//   kSolve   Adds what the pass has left, takes the dot products; the last block to finish decides.
//   kSecond  The direction, and an accepted pair.
//
// One launch each, or all in one launch of one block where there are few tiles.

struct DenseUpdate {
  u64 h, pair, coefs, count, stats;                // pointers: the state
  u64 grad, s, y, y_prev, out, prev_out, t, work;  // pointers, 0 where absent
  double step, tol;                                // step: the value of t where it is no tensor
  int rule, unused;
  i64 n, tiles;
  i64 vectors, rows, columns, rows_apart;  // places in the workspace, in doubles: see `hg` and what follows it
  int blocks, phases;                      // blocks: of the pass
};

namespace {

constexpr int kSide = 64;                  // rows and columns of a tile
constexpr int kWarps = kBlock / 32;        // of a block
constexpr int kTileRows = kSide / kWarps;  // of a warp in a tile
constexpr int kTileColumns = kSide / 32;   // of a lane
constexpr int kDecisions = 8;              // accepted, spoilt, scale of H g, along s, along H y, the two units
constexpr int kDenseSums = 11;             // in this order:
enum { kSY, kSS, kYY, kYW, kWW, kSP, kSG, kWG, kPG, kGG, kTop };
enum { kBfgs, kScaledBfgs, kScaledBroyden };

template <class T>
struct Largest {
  static constexpr double value = 3.4028234663852886e38;
};
template <>
struct Largest<double> {
  static constexpr double value = 1.7976931348623157e308;
};

SECANT_DEVICE Meeting dense_meeting(const DenseUpdate& a) { return meeting(a.work, 0, 0, kDecisions); }
SECANT_DEVICE i64 triangle(i64 n) { return n * (n + 1) / 2; }

// Behind the counters, the decisions and the sums of blocks: H g and H y; what blocks leave of sums along rows, 64 for
// each row of tiles that a block has been in; and the sums along columns, 64 a tile. Two of each: v = 0 of g, 1 of y.
SECANT_DEVICE double* product(const DenseUpdate& a, int v) {
  return reinterpret_cast<double*>(a.work) + a.vectors + v * a.n;
}
SECANT_DEVICE double* sums_of_rows(const DenseUpdate& a, int v, i64 panel, i64 block) {
  return reinterpret_cast<double*>(a.work) + a.rows + v * a.rows_apart + (panel + block) * kSide;
}
template <class T>
SECANT_DEVICE T* sums_of_columns(const DenseUpdate& a, int v, i64 tile) {
  return reinterpret_cast<T*>(reinterpret_cast<double*>(a.work) + a.columns) + (v * a.tiles + tile) * kSide;
}

// The run of tiles of a block begins at first_tile; owner is the block whose run has a tile. Panel and block only grow
// along the tiles, so that no two pairs of them have one sum: `panel + block` is a place for what a block leaves there.
SECANT_DEVICE i64 first_tile(const DenseUpdate& a, i64 block) { return block * a.tiles / a.blocks; }
SECANT_DEVICE i64 owner(const DenseUpdate& a, i64 tile) { return ((tile + 1) * a.blocks - 1) / a.tiles; }

SECANT_DEVICE i64 row_of_tiles(i64 tile) {
  i64 p = i64((sqrt(8.0 * double(tile) + 1.0) - 1.0) * 0.5);
  if (triangle(p) > tile) --p;
  if (triangle(p + 1) <= tile) ++p;
  return p;
}

template <class T>
SECANT_DEVICE const T* vector(u64 p) {
  return reinterpret_cast<const T*>(p);
}

template <class T>
SECANT_DEVICE T change(const DenseUpdate& a, i64 i) {
  const T y = vector<T>(a.y)[i];
  return a.y_prev ? y - vector<T>(a.y_prev)[i] : y;
}

SECANT_DEVICE double dense_step(const DenseUpdate& a) { return a.t ? *vector<double>(a.t) : a.step; }

template <class T>
SECANT_DEVICE void dense_pass(const DenseUpdate& a, unsigned char* memory) {
  const int rank = int(threadIdx.x), lane = rank % 32, warp = rank / 32;
  const double* coefs = vector<double>(a.coefs);
  const double scale = coefs[0], c_ss = coefs[1], c_sw = coefs[2], c_ww = coefs[3], delta = coefs[4];
  const bool moved = c_ss != 0.0 || c_sw != 0.0 || c_ww != 0.0;  // else the pair may hold anything
  const bool due = moved || scale != 1.0 || delta != 0.0, read = scale != 0.0;
  const T ts = T(scale);
  T* h = reinterpret_cast<T*>(a.h);
  const T *s = vector<T>(a.pair), *w = s + a.n;
  T* of_rows = reinterpret_cast<T*>(memory);  // 64 x (c, e, g, y): factors of s, w, and entries of the vectors
  T* board = of_rows + 4 * kSide;             // two for turns x two vectors x warps x 64: sums along columns

  const i64 block = i64(blockIdx.x), end = first_tile(a, block + 1);
  i64 tile = first_tile(a, block);
  int panel = int(row_of_tiles(tile)), column = int(tile - triangle(panel));
  bool fresh = true;   // a row of tiles begins
  double along = 0.0;  // lane v 8 + r: of row r of the warp and vector v, over the tiles so far
  SECANT_LOOP
  for (; tile < end; ++tile) {
    if (fresh) {
      if (rank < kSide) {
        const i64 i = i64(panel) * kSide + rank;
        const bool inside = i < a.n;
        const double si = moved && inside ? double(s[i]) : 0.0, wi = moved && inside ? double(w[i]) : 0.0;
        T* to = of_rows + 4 * rank;
        to[0] = T(c_ss * si + c_sw * wi);
        to[1] = T(c_sw * si + c_ww * wi);
        to[2] = a.out && inside ? vector<T>(a.grad)[i] : T(0);
        to[3] = a.s && inside ? change<T>(a, i) : T(0);
      }
      along = 0.0;
      __syncthreads();
      fresh = false;
    }
    const bool diagonal = column == panel;
    const i64 first = i64(panel) * kSide + warp * kTileRows;
    T* corner = h + triangle(first) + i64(column) * kSide + lane;  // of what this lane has of the tile
    const int gap = int(first) + 1;  // row r begins r gap + r (r - 1) / 2 behind the first
    const i64 left = a.n - first;
    const int rows = left > kTileRows ? kTileRows : left > 0 ? int(left) : 0;
    const int apart = (panel - column) * kSide + warp * kTileRows -
                      lane;  // row less column, of the first of each: below kSide it matters
    T sc[kTileColumns], wc[kTileColumns], gc[kTileColumns], yc[kTileColumns], down[2][kTileColumns];
    SECANT_UNROLL
    for (int k = 0; k < kTileColumns; ++k) {
      const i64 j = i64(column) * kSide + 32 * k + lane;
      const bool inside = j < a.n;
      sc[k] = moved && inside ? s[j] : T(0);
      wc[k] = moved && inside ? w[j] : T(0);
      gc[k] = a.out && inside ? vector<T>(a.grad)[j] : T(0);
      yc[k] = a.s && inside ? change<T>(a, j) : T(0);
      down[0][k] = down[1][k] = T(0);
    }
    T x[kTileRows][kTileColumns];
    SECANT_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      SECANT_UNROLL
      for (int k = 0; k < kTileColumns; ++k) {
        const bool inside = r < rows && apart + r >= 32 * k;
        x[r][k] = read && inside ? corner[r * gap + r * (r - 1) / 2 + 32 * k] : T(0);
      }
    }
    double sum[2 * kTileRows];
    SECANT_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      T(&mine)[kTileColumns] = x[r];
      T of[4];
      load_wide<4>(of_rows + 4 * (warp * kTileRows + r), of);
      T part[2] = {T(0), T(0)};
      SECANT_UNROLL
      for (int k = 0; k < kTileColumns; ++k) {
        if (due && r < rows && apart + r >= 32 * k) {
          mine[k] = ts * mine[k] + (of[0] * sc[k] + of[1] * wc[k]);
          if (apart + r == 32 * k) mine[k] += T(delta);
          corner[r * gap + r * (r - 1) / 2 + 32 * k] = mine[k];
        }
        part[0] += mine[k] * gc[k];
        part[1] += mine[k] * yc[k];
        const T below = apart + r > 32 * k ? mine[k] : T(0);
        down[0][k] += below * of[2];
        down[1][k] += below * of[3];
      }
      sum[r] = double(part[0]);
      sum[kTileRows + r] = double(part[1]);
    }
    along += warp_sums<2 * kTileRows>(sum);
    T* sums = board + int(tile & 1) * (2 * kWarps * kSide);
    SECANT_UNROLL
    for (int v = 0; v < 2; ++v) {
      SECANT_UNROLL
      for (int k = 0; k < kTileColumns; ++k) sums[(v * kWarps + warp) * kSide + 32 * k + lane] = down[v][k];
    }
    __syncthreads();  // one a tile: the next tile writes the other half of the board
    if (rank < 2 * kSide) {
      const int v = rank / kSide, at = rank % kSide;
      double sum = 0.0;
      SECANT_UNROLL
      for (int k = 0; k < kWarps; ++k) sum += double(sums[(v * kWarps + k) * kSide + at]);
      if (v ? a.s : a.out) sums_of_columns<T>(a, v, tile)[at] = T(sum);
    }
    if (diagonal || tile + 1 == end) {
      const int v = lane / kTileRows, r = lane % kTileRows;
      if (lane < 2 * kTileRows && (v ? a.s : a.out)) sums_of_rows(a, v, panel, block)[warp * kTileRows + r] = along;
    }
    ++column;
    if (diagonal) {
      ++panel;
      column = 0;
      fresh = true;
    }
  }
}

// tau and phi: reference.scaling.
SECANT_DEVICE void dense_scaling(double sy, double sbs, double yhy, bool first, i64 n, int rule, double* tau,
                                 double* phi) {
  *tau = *phi = 1.0;
  const double b = sbs / sy, h = yhy / sy;
  if (rule == kBfgs || first || !(b > 0.0 && finite(b))) return;
  const double shrink = b > 1.0 ? 1.0 / b : 1.0;
  *tau = shrink;
  if (rule == kScaledBfgs) return;
  const double excess = b * h - 1.0, a = excess > 2.220446049250313e-16 ? excess : 2.220446049250313e-16;
  const double ratio = h / ((1.0 + a) * (1.0 + sqrt(a / (1.0 + a)))), rho = ratio < 1.0 ? ratio : 1.0;
  const double upper = 1.0 / rho < (1.0 - b) / b ? 1.0 / rho : (1.0 - b) / b, lower = (rho - 1.0) / a;
  const double theta = lower > upper ? lower : upper;
  const double sigma = 1.0 + a * theta;
  const double power = n > 1 ? exp(-log(sigma) / double(n - 1)) : 1.0;
  if (theta > 0.0) {
    *tau = shrink * (power < 1.0 / theta ? power : 1.0 / theta);
  } else {
    *tau = shrink * power < sigma ? shrink * power : sigma;
  }
  *phi = (1.0 - theta) / sigma;
}

// reference.power_of_two: half the exponent.
SECANT_DEVICE double power_of_two(double square) {
  const i64 exponent = (__double_as_longlong(square) >> 52 & 0x7ff) - 1023;
  return __longlong_as_double(((exponent >> 1) + 1023) << 52);
}

// The gate, the next update and the coefficients of the direction, from the sums; by one thread.
template <class T>
SECANT_DEVICE void dense_decide(const DenseUpdate& a, const double* r, double* decision) {
  double* stats = reinterpret_cast<double*>(a.stats);
  int* count = reinterpret_cast<int*>(a.count);
  SECANT_LOOP
  for (int k = 0; k < 10; ++k) stats[k] = 0.0;
  double scale = 1.0, c_ss = 0.0, c_sw = 0.0, c_ww = 0.0, delta = 0.0, gamma = 1.0, s_unit = 1.0, w_unit = 1.0;
  bool accepted = false, spoilt = false;
  int held = *count;
  if (a.s) {
    const double sy = r[kSY], ss = r[kSS], yy = r[kYY], yhy = r[kYW], ww = r[kWW];
    const bool first = held == 0;
    double tau, phi;
    dense_scaling(sy, a.y_prev ? -dense_step(a) * r[kSP] : 0.0, yhy, first, a.n, a.rule, &tau, &phi);
    const double n_a = (first ? sy / yhy : 1.0) / tau, n_ss = n_a * phi * yhy / sy / sy + 1.0 / sy;
    const double n_sw = -n_a * phi / sy, n_ww = -n_a * (1.0 - phi) / yhy;
    const double size = fabs(n_ss) * ss + 2.0 * fabs(n_sw) * (sqrt(ss) * sqrt(ww)) + fabs(n_ww) * ww + n_a;
    constexpr double tiny = 2.2250738585072014e-308;
    accepted = sy > a.tol * (sqrt(ss) * sqrt(yy)) && yhy > 0.0 && finite(yy) && finite(ss) && ss >= tiny &&
               ww >= tiny && size < 0.25 * Largest<T>::value;
    stats[3] = sy;
    stats[4] = sqrt(ss);
    stats[5] = sqrt(yy);
    stats[7] = yhy;
    if (accepted) {
      scale = n_a;
      c_ss = n_ss;
      c_sw = n_sw;
      c_ww = n_ww;
      gamma = sy / yy;
      s_unit = power_of_two(ss);
      w_unit = power_of_two(ww);
      stats[6] = 1.0;
      stats[8] = tau;
      stats[9] = phi;
      ++held;
    }
  }
  const double gs = accepted ? r[kSG] : 0.0, gw = accepted ? r[kWG] : 0.0;
  decision[3] = c_ss * gs + c_sw * gw;
  decision[4] = c_sw * gs + c_ww * gw;
  decision[2] = scale;
  if (a.out) {
    const double gg = r[kGG];
    double gd = -(scale * r[kPG] + decision[3] * gs + decision[4] * gw);
    spoilt = !(gd < 0.0) && gg > 0.0 && finite(gg);
    if (spoilt) {
      scale = c_ss = c_sw = c_ww = 0.0;
      delta = decision[2] = gamma;
      gd = -gamma * gg;
      held = 0;
    }
    stats[0] = gd;
    stats[1] = sqrt(gg);
    stats[2] = gg != gg ? gg : r[kTop];
  }
  double* coefs = reinterpret_cast<double*>(a.coefs);
  coefs[0] = scale;
  coefs[1] = c_ss * (s_unit * s_unit);
  coefs[2] = c_sw * (s_unit * w_unit);
  coefs[3] = c_ww * (w_unit * w_unit);
  coefs[4] = delta;
  *count = held;
  decision[0] = accepted;
  decision[1] = spoilt;
  decision[5] = s_unit;
  decision[6] = w_unit;
}

template <class T>
SECANT_DEVICE void dense_solve(const DenseUpdate& a, unsigned char* memory) {
  const int rank = int(threadIdx.x), lane = rank % 32, warp = rank / 32;
  const Meeting meet = dense_meeting(a);
  double* part = reinterpret_cast<double*>(memory);  // two vectors x warps x 32
  double* sums = part + 2 * kBlock;                  // 16
  const i64 panels = (a.n + kSide - 1) / kSide;
  const bool taken[2] = {a.out != 0, a.s != 0};
  const T step = T(dense_step(a));
  double v[16] = {};
  double top = 0.0;
  SECANT_LOOP
  for (i64 group = blockIdx.x; group * 32 < a.n; group += gridDim.x) {
    const i64 i = group * 32 + lane, panel = i / kSide, at = i % kSide;
    const i64 last = owner(a, triangle(panel) + panel);
    SECANT_UNROLL
    for (int k = 0; k < 2; ++k) {
      double sum = 0.0;
      if (taken[k]) {
        SECANT_LOOP
        for (i64 b = owner(a, triangle(panel)) + warp; b <= last; b += kWarps) sum += sums_of_rows(a, k, panel, b)[at];
        SECANT_UNROLL_4
        for (i64 q = panel + warp; q < panels; q += kWarps) {
          sum += double(sums_of_columns<T>(a, k, triangle(q) + panel)[at]);
        }
      }
      part[(k * kWarps + warp) * 32 + lane] = sum;
    }
    __syncthreads();
    if (warp == 0 && i < a.n) {
      double total[2] = {0.0, 0.0};
      SECANT_UNROLL
      for (int k = 0; k < 2 * kWarps; ++k) total[k / kWarps] += part[k * 32 + lane];
      double g = 0.0;
      if (taken[0]) {
        g = double(vector<T>(a.grad)[i]);
        product(a, 0)[i] = total[0];
        v[kPG] += total[0] * g;
        v[kGG] += g * g;
        top = nan_max(top, fabs(g));
      }
      if (taken[1]) {
        const double w = double(T(total[1])), s = double(vector<T>(a.s)[i] * step), y = double(change<T>(a, i));
        product(a, 1)[i] = w;
        v[kSY] += s * y;
        v[kSS] += s * s;
        v[kYY] += y * y;
        v[kYW] += y * w;
        v[kWW] += w * w;
        if (a.y_prev) v[kSP] += s * double(vector<T>(a.y_prev)[i]);
        v[kSG] += s * g;
        v[kWG] += w * g;
      }
    }
    __syncthreads();  // the next group reuses `part`
  }
  if (warp == 0) {
    const double total = warp_sums<16>(v);
    SECANT_UNROLL
    for (int o = 16; o > 0; o >>= 1) top = nan_max(top, __shfl_xor_sync(kAll, top, o));
    if (lane < kTop) sums[lane] = total;
    if (lane == 0) sums[kTop] = top;
  }
  __syncthreads();
  bool last = true;
  if (gridDim.x > 1u) {
    last = arrive(meet, sums, kDenseSums, reinterpret_cast<u32*>(sums + 16));
    if (last) gather(meet, sums, kDenseSums, kTop);
  }
  if (last && rank == 0) dense_decide<T>(a, sums, meet.coef);
}

template <class T>
SECANT_DEVICE void dense_finish(const DenseUpdate& a) {
  const double* decision = dense_meeting(a).coef;
  const bool accepted = decision[0] != 0.0, spoilt = decision[1] != 0.0;
  const double scale = decision[2], along_s = decision[3], along_w = decision[4];
  const double s_unit = decision[5], w_unit = decision[6];
  const T step = T(dense_step(a));
  T* pair = reinterpret_cast<T*>(a.pair);
  SECANT_LOOP
  for (i64 i = i64(blockIdx.x) * kBlock + threadIdx.x; i < a.n; i += i64(gridDim.x) * kBlock) {
    double s = 0.0, w = 0.0;
    if (accepted) {
      s = double(vector<T>(a.s)[i] * step);
      w = product(a, 1)[i];
      pair[i] = T(s / s_unit);
      pair[a.n + i] = T(w / w_unit);
    }
    if (a.out) {
      const T raw = vector<T>(a.grad)[i];
      const double g = double(raw);
      // Of a spoilt H the products are of no meaning, NaN perhaps.
      const double d = spoilt ? -scale * g : -(scale * product(a, 0)[i] + along_s * s + along_w * w);
      if (a.prev_out) reinterpret_cast<T*>(a.prev_out)[i] = raw;
      reinterpret_cast<T*>(a.out)[i] = T(d);
    }
  }
}

template <class T>
SECANT_DEVICE void dense_update(const DenseUpdate& a, unsigned char* memory) {
  if (a.phases & kFirst) dense_pass<T>(a, memory);
  if (a.phases & kSolve) {
    __syncthreads();
    dense_solve<T>(a, memory);
  }
  if (a.phases & kSecond) {
    __syncthreads();
    dense_finish<T>(a);
  }
}

}  // namespace

#define SECANT_LBFGS_DENSE_ENTRIES(TAG, T)                                                \
  extern "C" __global__ void __launch_bounds__(256, 2) lbfgs_dense_##TAG(DenseUpdate a) { \
    SECANT_DYNAMIC_SHARED(memory);                                                        \
    dense_update<T>(a, memory);                                                           \
  }

// As SECANT_LBFGS_TABLE.
#define SECANT_LBFGS_DENSE_TABLE(X, TAG) X(lbfgs_dense_##TAG, DenseUpdate)

// One name a type of the vectors; a build may choose fewer by defining SECANT_LBFGS_DENSE before this file.
#ifndef SECANT_LBFGS_DENSE
#define SECANT_LBFGS_DENSE(X) X(f32, float) X(f64, double)
#endif
SECANT_LBFGS_DENSE(SECANT_LBFGS_DENSE_ENTRIES)
