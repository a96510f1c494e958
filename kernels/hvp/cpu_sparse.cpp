// Passes over sparse rows: each entry is read once, its value and column kept for both products. Sums are of double.
#include <algorithm>

#include "cpu_ops.h"
#include "cpu_rows.h"

namespace SECANT_ISA {
namespace hvp {
namespace {

// The entries of a row.
template <class T, class I>
struct Entries {
  const T* values;
  const I* col;
  int64_t count;
};

// z = sum of values[e] v[col[e]] for one vector, in four partial sums.
template <class T, class I>
T dot(const Entries<T, I>& x, const T* v) {
  T s[4] = {};
  int64_t e = 0;
  for (; e + 4 <= x.count; e += 4) {
    for (int l = 0; l < 4; ++l) s[l] += x.values[e + l] * v[x.col[e + l]];
  }
  for (; e < x.count; ++e) s[0] += x.values[e] * v[x.col[e]];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// The same for k vectors side by side, a register of them at a time, in two partial sums.
template <class T, class I>
void dots(const Entries<T, I>& x, const T* v, int64_t k, T* z) {
  for (int64_t j = 0; j < k; j += kLanes<T>) {
    const int64_t lanes = k - j;
    vec<T> even = {}, odd = {};
    int64_t e = 0;
    for (; e + 2 <= x.count; e += 2) {
      even += x.values[e] * load_some(v + x.col[e] * k + j, lanes);
      odd += x.values[e + 1] * load_some(v + x.col[e + 1] * k + j, lanes);
    }
    if (e < x.count) even += x.values[e] * load_some(v + x.col[e] * k + j, lanes);
    store_some(z + j, even + odd, lanes);
  }
}

// g[col[e]] += values[e] z for k vectors side by side; z may be read a register beyond its end.
template <class T, class I>
void add_outer(const Entries<T, I>& x, const T* z, int64_t k, double* g) {
  for (int64_t j = 0; j < k; j += kDoubles) {
    const int64_t lanes = k - j;
    const vd factor = load_d(z + j);
    for (int64_t e = 0; e < x.count; ++e) {
      double* const to = g + x.col[e] * k + j;
      store_some<double>(to, load_some<double>(to, lanes) + static_cast<double>(x.values[e]) * factor, lanes);
    }
  }
}

template <class T, class I>
void sparse_rows(const HvpRows& c) {
  const Layout layout{c.d, c.k, c.k, 1};  // vectors interleaved: an entry meets all of its own at once
  const T* const v = static_cast<const T*>(c.v);
  const T* const values = static_cast<const T*>(c.x);
  const I* const crow = static_cast<const I*>(c.crow);
  const I* const col = static_cast<const I*>(c.col);
  const auto entries_of = [=](int64_t i) {
    return Entries<T, I>{values + crow[i], col + crow[i], static_cast<int64_t>(crow[i + 1]) - crow[i]};
  };
  const int64_t entries = static_cast<int64_t>(crow[c.n]) - crow[0];
  const double work = static_cast<double>(entries + c.n) * static_cast<double>(c.k);
  int threads = c.threads > 0 ? c.threads : work < 32768 ? 1 : secant::max_threads();
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, c.n)));
  const RowFunction<T> function{c, static_cast<const T*>(c.sample_weight), layout,
                                c.intercept ? v + c.d * c.k : nullptr};
  const int64_t stride = layout.size() + c.k + 1;
  Buffer<double> sums(threads * stride);

  secant::run_team(threads, [&](const secant::Team& team) {
    double* const total = sums.get() + team.rank * stride;
    double* const of_bias = total + layout.size();
    std::fill_n(total, stride, 0.0);
    constexpr int64_t block = 64;
    Buffer<T> z(block * c.k + kLanes<T>);
    // Rows of equal numbers of entries for each thread.
    const auto start = [&](int rank) {
      const int64_t before = static_cast<int64_t>(crow[0]) + entries * rank / team.size;
      return rank == team.size ? c.n : std::lower_bound(crow, crow + c.n, static_cast<I>(before)) - crow;
    };
    const int64_t first = team.rank == 0 ? 0 : start(team.rank), last = start(team.rank + 1);
    for (int64_t i = first; i < last; i += block) {
      const int64_t count = std::min(block, last - i);
      for (int64_t r = 0; r < count; ++r) {
        T* const row = z.get() + r * c.k;
        if (c.k == 1) {
          *row = dot(entries_of(i + r), v);
        } else {
          dots(entries_of(i + r), v, c.k, row);
        }
      }
      of_bias[c.k] += function(i, count, z.get());
      for (int64_t r = 0; r < count; ++r) {
        const T* const row = z.get() + r * c.k;
        if (c.k == 1) {
          const auto x = entries_of(i + r);
          for (int64_t e = 0; e < x.count; ++e) total[x.col[e]] += static_cast<double>(x.values[e]) * *row;
        } else {
          add_outer(entries_of(i + r), row, c.k, total);
        }
        for (int64_t k = 0; c.intercept && k < c.k; ++k) of_bias[k] += static_cast<double>(row[k]);
      }
    }
    team.barrier();
    add_up<T>(c, layout, sums.get(), stride, team);
  });
}

template <class T>
void sparse(const HvpRows& c) {
  c.wide_index ? sparse_rows<T, int64_t>(c) : sparse_rows<T, int32_t>(c);
}

}  // namespace

void sparse_f32(const HvpRows& c) { sparse<float>(c); }
void sparse_f64(const HvpRows& c) { sparse<double>(c); }

}  // namespace hvp
}  // namespace SECANT_ISA
