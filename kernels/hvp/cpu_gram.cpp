// X^T diag(w) X: one triangle as a product of panels, mirrored. Each term of a sum is a row of X.
//
// The columns of X are cut into panels of W. A block of kRun rows of a panel is packed so that the W entries of a row
// are neighbours; a packed panel is both factors, W rows of the result read by registers and kColumns columns by
// broadcasts. A unit is the product of two panels, W x W doubles of which each column lies in one piece; there is one
// for each pair of panels in the triangle. The parts of the rows have units of their own, and a team of threads each.
#include <algorithm>
#include <memory>

#include "buffer.h"
#include "cpu.h"
#include "cpu_ops.h"
#include "parallel.h"
#include "simd.h"

namespace SECANT_ISA {
namespace hvp {

using secant::Barrier;
using secant::Buffer;
using secant::HvpGram;
using secant::Team;

namespace {

constexpr int64_t kRun = 256;         // rows that are summed in registers
constexpr int64_t kRowsOfPart = 512;  // the fewest
constexpr int64_t kGroupBytes =
    400 * 1024;                        // of packed panels that meet another group: two are in the second-level cache
constexpr int64_t kPad = 64;           // bytes between panels, which would else begin in the same set of a cache
constexpr double kWorkOfThread = 1e6;  // multiplications

template <class T>
struct Gram {
  using V = vec<T>;
  static constexpr int L = kLanes<T>;
#if defined(__aarch64__)
  static constexpr int kRows = 4;
#else
  static constexpr int kRows = kBytes == 16 ? 2 : 3;
#endif
  static constexpr int kColumns = kBytes == 64 ? 8 : 4;
  static constexpr int W = kRows * L;
  static constexpr int64_t kStride = W * kRun + kPad / static_cast<int64_t>(sizeof(T));  // of panels
  static constexpr int64_t kUnit = W * W;
  static_assert(W % kColumns == 0 && kColumns % 2 == 0);

  const HvpGram& c;
  const int64_t panels = (c.n + W - 1) / W, units = panels * (panels + 1) / 2;
  const int64_t block = panels * kStride * (c.weight != nullptr ? 2 : 1);  // entries of a packed block of rows

  // Columns of panel p, and the entries of one of its rows: whole registers.
  int64_t columns(int64_t p) const { return std::min<int64_t>(W, c.n - p * W); }
  int64_t width(int64_t p) const { return (columns(p) + L - 1) / L * L; }

  // ------------------------------------------------------------------------------------------------------- packing

  // A register of row `k` in panel memory, and weighted in that of the second factor.
  SECANT_INLINE void put(const V& x, int64_t row, T* to) const {
    store(to, x);
    if (c.weight != nullptr) store(to + panels * kStride, x * splat(static_cast<const T*>(c.weight)[row]));
  }

  // Rows first..first + count of panels begin..end.
  void pack(int64_t first, int64_t count, int64_t begin, int64_t end, T* to) const {
    if (c.x_column == 1 || c.n == 1) return pack_rows(first, count, begin, end, to);
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t j = 0; j < columns(p); j += L) pack_columns(first, count, p, j, to + p * kStride + j);
    }
  }

  // Several rows at a time, so that what is read and what is written are long pieces.
  void pack_rows(int64_t first, int64_t count, int64_t begin, int64_t end, T* to) const {
    constexpr int64_t together = 8;
    for (int64_t k = 0; k < count; k += together) {
      const int64_t stop = std::min(k + together, count);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t size = columns(p), step = width(p);
        for (int64_t i = k; i < stop; ++i) {
          const T* x = static_cast<const T*>(c.x) + (first + i) * c.x_row + p * W;
          T* at = to + p * kStride + i * step;
          if (size == W) {
            unroll<kRows>([&](auto r) SECANT_LAMBDA { put(load<V>(x + r * L), first + i, at + r * L); });
          } else {
            for (int64_t j = 0; j < size; j += L) put(load_some(x + j, size - j), first + i, at + j);
          }
        }
      }
    }
  }

  // A register's columns, from j in panel p: pieces of them are transposed where a column lies in one piece.
  void pack_columns(int64_t first, int64_t count, int64_t p, int64_t j, T* to) const {
    constexpr int64_t piece = kPiece<T>;
    const T* x = static_cast<const T*>(c.x) + first * c.x_row + (p * W + j) * c.x_column;
    const int64_t size = std::min<int64_t>(L, columns(p) - j), step = width(p);
    int64_t k = 0;
    if (c.x_row == 1 && size == L) {
      const T* from[L];
      for (int i = 0; i < L; ++i) from[i] = x + i * c.x_column;
      for (; k + piece <= count; k += piece) {
        V v[piece];
        unroll<piece>([&](auto r) SECANT_LAMBDA { v[r] = load_pieces<T>(from + r, piece, k); });
        transpose_pieces<T>(v);
        unroll<piece>([&](auto r) SECANT_LAMBDA { put(v[r], first + k + r, to + (k + r) * step); });
      }
    }
    for (; k < count; ++k) {
      T row[L] = {};
      for (int64_t i = 0; i < size; ++i) row[i] = x[k * c.x_row + i * c.x_column];
      put(load<V>(row), first + k, to + k * step);
    }
  }

  // ------------------------------------------------------------------------------------------------------ products

  // R registers of rows of the result and C columns of it, over `terms` rows of X; `next`: added to what is there.
  template <int R, int C>
  static SECANT_INLINE void tile(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t terms, double* sums,
                                 bool next) {
    V sum[R][C] = {};
    if (next) {
      for (int i = 0; i < C; ++i) {
        for (int j = 0; j < R * L; j += 8) __builtin_prefetch(sums + i * W + j, 1, 3);
      }
    }
    for (int64_t k = 0; k < terms; ++k, a += a_step, b += b_step) {
      V row[R];
      unroll<R>([&](auto r) SECANT_LAMBDA { row[r] = load<V>(a + r * L); });
      unroll<C>([&](auto j) SECANT_LAMBDA {
        const V entry = splat(b[j]);
        unroll<R>([&](auto r) SECANT_LAMBDA { sum[r][j] += row[r] * entry; });
      });
    }
    unroll<C>([&](auto j) SECANT_LAMBDA {
      unroll<R>([&](auto r) SECANT_LAMBDA {
        unroll<kHalves<T>>([&](auto h) SECANT_LAMBDA {
          double* const at = sums + j * W + r * L + h * kDoubles;
          const vd x = half<T>(sum[r][j], h);
          store(at, next ? load<vd>(at) + x : x);
        });
      });
    });
  }

  // The unit of panels p (rows) and q (columns of the result), q <= p. On the diagonal, registers that are above it are
  // left out.
  void unit(const T* packed, int64_t p, int64_t q, int64_t terms, double* sums, bool next) const {
    const T* a = packed + p * kStride;
    const T* b = packed + q * kStride + (c.weight != nullptr ? panels * kStride : 0);
    const int64_t a_step = width(p), b_step = width(q), size = columns(q);
    for (int64_t j = 0; j < size; j += kColumns) {
      const int64_t above = p == q ? j / L : 0, some = std::min<int64_t>(kColumns, size - j);
      with_constant<kRows>(a_step / L - above, [&](auto R) SECANT_LAMBDA {
        with_constant<kColumns / 2>((some + 1) / 2, [&](auto H) SECANT_LAMBDA {
          tile<R, 2 * H>(a + above * L, a_step, b + j, b_step, terms, sums + j * W + above * L, next);
        });
      });
    }
  }

  // A share of the units, for a packed block of rows: groups of panels meet, so that both stay in the cache.
  void products(const T* packed, int64_t terms, int64_t begin, int64_t end, double* sums, bool next) const {
    constexpr int64_t group = std::max<int64_t>(1, kGroupBytes / (kStride * static_cast<int64_t>(sizeof(T))));
    int64_t at = 0;
    for (int64_t p0 = 0; p0 < panels; p0 += group) {
      for (int64_t q0 = 0; q0 <= p0; q0 += group) {
        for (int64_t p = p0; p < std::min(p0 + group, panels); ++p) {
          for (int64_t q = q0; q < std::min(q0 + group, p + 1); ++q, ++at) {
            if (at >= begin && at < end) unit(packed, p, q, terms, sums + (p * (p + 1) / 2 + q) * kUnit, next);
          }
        }
      }
    }
  }

  // -------------------------------------------------------------------------------------------------------- result

  // Adds the parts of the units begin..end up, in their order, and writes both triangles. Of `out` one is read.
  void finish(int64_t begin, int64_t end, double* sums, int64_t parts) const {
    int64_t at = 0;
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t q = 0; q <= p; ++q, ++at) {
        if (at < begin || at >= end) continue;
        const int64_t rows = columns(p), cols = columns(q);
        double* const total = sums + at * kUnit;
        for (int64_t part = 1; part < parts; ++part) {
          const double* more = total + part * units * kUnit;
          for (int64_t j = 0; j < cols; ++j) {
            for (int64_t i = p == q ? j : 0; i < rows; ++i) total[j * W + i] += more[j * W + i];
          }
        }
        T* const out = static_cast<T*>(c.out);
        for (int64_t i = 0; i < rows; ++i) {
          T* row = out + (p * W + i) * c.n + q * W;
          const int64_t size = p == q ? i + 1 : cols;
          if (c.accumulate) {
            for (int64_t j = 0; j < size; ++j) total[j * W + i] += static_cast<double>(row[j]);
          }
          for (int64_t j = 0; j < size; ++j) row[j] = static_cast<T>(total[j * W + i]);
        }
        for (int64_t j = 0; j < cols; ++j) {
          T* row = out + (q * W + j) * c.n + p * W;
          for (int64_t i = p == q ? j + 1 : 0; i < rows; ++i) row[i] = static_cast<T>(total[j * W + i]);
        }
      }
    }
  }

  void run() const {
    int64_t threads = c.threads;
    if (threads < 1) {
      const double work = static_cast<double>(c.m) * static_cast<double>(c.n) * static_cast<double>(c.n) / 2;
      threads = std::clamp<int64_t>(static_cast<int64_t>(work / kWorkOfThread), 1, secant::max_threads());
    }
    // Parts of the rows need no more memory for their sums than X, and no barrier but one; threads beyond share units.
    const int64_t parts = std::clamp<int64_t>(c.m / std::max(c.n, kRowsOfPart), 1, threads);
    threads = threads / parts * parts;
    const int64_t buffers = threads > parts ? 2 : 1;
    const Buffer<T> packed(parts * buffers * block);
    const Buffer<double> sums(parts * units * kUnit);
    const std::unique_ptr<Barrier[]> meet(new Barrier[static_cast<size_t>(parts)]);
    secant::run_team(static_cast<int>(threads), [&](const Team& team) {
      // OpenMP may give fewer threads than it was asked for: what is computed does not depend on that.
      const int each = std::max<int>(1, team.size / static_cast<int>(parts)), teams = team.size / each;
      for (int64_t part = team.rank / each; part < parts && team.rank / each < teams; part += teams) {
        const Team mine{team.rank % each, each, &meet[static_cast<size_t>(part)]};
        const Team as_part{static_cast<int>(part), static_cast<int>(parts), nullptr};
        const auto [begin, end] = as_part.share(c.m, kRun);
        const auto [panel, last_panel] = mine.share(panels, 1);
        const auto [from, to] = mine.share(units, 1);
        double* const total = sums.get() + part * units * kUnit;
        for (int64_t k = begin; k < end; k += kRun) {
          const int64_t turn = (k - begin) / kRun, terms = std::min(kRun, end - k);
          T* const here = packed.get() + (part * buffers + turn % buffers) * block;
          pack(k, terms, panel, last_panel, here);
          mine.barrier();
          products(here, terms, from, to, total, turn > 0);
        }
      }
      team.barrier();
      const auto [from, to] = team.share(units, 1);
      finish(from, to, sums.get(), parts);
    });
  }
};

}  // namespace

void gram_f32(const HvpGram& c) { Gram<float>{c}.run(); }
void gram_f64(const HvpGram& c) { Gram<double>{c}.run(); }

}  // namespace hvp
}  // namespace SECANT_ISA
