// Passes over sparse rows: each entry is read once, its value and column kept for both products. Sums are of double.
//
// Row pointers and columns are input that nobody has looked at. The pointers are checked before rows are shared out,
// the columns of a block of rows just before its entries are used for the first time, which reads them ahead of the
// products; a row that is wrong ends the pass before anything of it is used.
#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>

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

// Whether all columns are in 0..limit: no sign bit in c, nor in limit - c. Without a branch, so that it takes
// registers.
template <class I>
bool columns_fit(const I* col, int64_t count, I limit) {
  using U = std::make_unsigned_t<I>;
  U wrong = 0;
  for (int64_t e = 0; e < count; ++e) {
    const U c = static_cast<U>(col[e]);
    wrong |= c | (static_cast<U>(limit) - c);
  }
  return static_cast<I>(wrong) >= 0;
}

// Row pointers of either width.
struct Pointers {
  const void* at;
  bool wide;
  template <class F>
  auto with(const F& f) const {
    return wide ? f(static_cast<const int64_t*>(at)) : f(static_cast<const int32_t*>(at));
  }
  // The first of rows begin..end - 1 that does not lie in 0..entries, or starts or ends where it must not; n if none.
  int64_t first_wrong(int64_t begin, int64_t end, int64_t n, int64_t entries) const {
    return with([=](const auto* crow) -> int64_t {
      bool falls = false;
      for (int64_t i = begin; i < end; ++i) falls |= crow[i + 1] < crow[i];
      if (!falls && (begin == end || (crow[begin] >= 0 && crow[end] <= entries)) && crow[0] == 0 && crow[n] == entries)
        return n;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t low = crow[i], high = crow[i + 1];
        if (low < 0 || high < low || high > entries || (i == 0 && low != 0) || (i == n - 1 && high != entries))
          return i;
      }
      return n;
    });
  }
  // The first row that starts at or behind an entry.
  int64_t row_from(int64_t entry, int64_t n) const {
    return with([=](const auto* crow) -> int64_t {
      return std::lower_bound(crow, crow + n, entry, [](auto x, int64_t y) { return static_cast<int64_t>(x) < y; }) -
             crow;
    });
  }
  void copy(int64_t first, int64_t count, int64_t* to) const {
    with([=](const auto* crow) { std::copy_n(crow + first, count, to); });
  }
};

void lower(std::atomic<int64_t>& least, int64_t value) {
  int64_t seen = least.load();
  while (value < seen && !least.compare_exchange_weak(seen, value)) {
  }
}

template <class T, class I>
int64_t sparse_rows(const HvpRows& c) {
  const Layout layout{c.d, c.k, c.k, 1};  // vectors interleaved: an entry meets all of its own at once
  const T* const v = static_cast<const T*>(c.v);
  const T* const values = static_cast<const T*>(c.x);
  const I* const col = static_cast<const I*>(c.col);
  const Pointers crow{c.crow, c.wide_crow};
  const I limit = static_cast<I>(std::min<int64_t>(c.d - 1, std::numeric_limits<I>::max()));
  const double work = static_cast<double>(c.entries + c.n) * static_cast<double>(c.k);
  int threads = c.threads > 0 ? c.threads : work < 32768 ? 1 : secant::max_threads();
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, c.n)));
  const RowFunction<T> function{c, static_cast<const T*>(c.sample_weight), layout,
                                c.intercept ? v + c.d * c.k : nullptr};
  const int64_t stride = layout.size() + c.k + 1;
  Buffer<double> sums(threads * stride);
  // The first row whose pointers are wrong; the first with a wrong column, where no pointer is.
  std::atomic<int64_t> misplaced{c.n}, wrong{c.n};

  secant::run_team(threads, [&](const secant::Team& team) {
    double* const total = sums.get() + team.rank * stride;
    double* const of_bias = total + layout.size();
    std::fill_n(total, stride, 0.0);
    constexpr int64_t block = 64;
    Buffer<T> z(block * c.k + kLanes<T>);
    const auto [begin, end] = team.share(c.n, 1);
    lower(misplaced, crow.first_wrong(begin, end, c.n, c.entries));
    team.barrier();
    if (misplaced.load() < c.n) return;
    // Rows of equal numbers of entries for each thread.
    const auto start = [&](int rank) {
      return rank == team.size ? c.n : crow.row_from(c.entries * rank / team.size, c.n);
    };
    const int64_t first = team.rank == 0 ? 0 : start(team.rank), last = start(team.rank + 1);
    int64_t at[block + 1];
    const auto entries_of = [&](int64_t r) { return Entries<T, I>{values + at[r], col + at[r], at[r + 1] - at[r]}; };
    for (int64_t i = first; i < last; i += block) {
      const int64_t count = std::min(block, last - i);
      crow.copy(i, count + 1, at);
      if (!columns_fit(col + at[0], at[count] - at[0], limit)) {
        int64_t r = 0;
        while (columns_fit(col + at[r], at[r + 1] - at[r], limit)) ++r;
        lower(wrong, i + r);
        break;
      }
      for (int64_t r = 0; r < count; ++r) {
        T* const row = z.get() + r * c.k;
        if (c.k == 1) {
          *row = dot(entries_of(r), v);
        } else {
          dots(entries_of(r), v, c.k, row);
        }
      }
      of_bias[c.k] += function(i, count, z.get());
      for (int64_t r = 0; r < count; ++r) {
        const T* const row = z.get() + r * c.k;
        if (c.k == 1) {
          const auto x = entries_of(r);
          for (int64_t e = 0; e < x.count; ++e) total[x.col[e]] += static_cast<double>(x.values[e]) * *row;
        } else {
          add_outer(entries_of(r), row, c.k, total);
        }
        for (int64_t k = 0; c.intercept && k < c.k; ++k) of_bias[k] += static_cast<double>(row[k]);
      }
    }
    team.barrier();
    if (wrong.load() == c.n) add_up<T>(c, layout, sums.get(), stride, team);
  });
  const int64_t row = std::min(misplaced.load(), wrong.load());
  return row < c.n ? row : -1;
}

template <class T>
int64_t sparse(const HvpRows& c) {
  return c.wide_col ? sparse_rows<T, int64_t>(c) : sparse_rows<T, int32_t>(c);
}

}  // namespace

int64_t sparse_f32(const HvpRows& c) { return sparse<float>(c); }
int64_t sparse_f64(const HvpRows& c) { return sparse<double>(c); }

}  // namespace hvp
}  // namespace SECANT_ISA
