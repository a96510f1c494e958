// Right-hand sides, a few columns at a time.
#pragma once

#include "cpu_lanes.h"

namespace SECANT_ISA {
namespace blocks {

// Columns whose n x kColumns vectors stay in the first two levels of cache beside the factor.
constexpr int kColumns = 16;

// k columns in chunks of at most kColumns, whose widths differ by one at most: none is shorter than a piece of a vector
// unless all of k is.
template <class T>
class Columns {
 public:
  Columns(int n, int64_t k)
      : k_(k),
        count_((k + kColumns - 1) / kColumns),
        wide_(plan(n, static_cast<int>((k + count_ - 1) / count_))),
        narrow_(plan(n, static_cast<int>(k / count_))) {}

  int widest() const { return static_cast<int>((k_ + count_ - 1) / count_); }

  // f(plan, first column, width) for every chunk; element (i, j) of a chunk is vector i * width + j of its buffer.
  template <class F>
  SECANT_INLINE void each(const F& f) const {
    const int narrow = static_cast<int>(k_ / count_);
    int64_t begin = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const bool wide = i < k_ % count_;
      f(wide ? wide_ : narrow_, begin, narrow + wide);
      begin += narrow + wide;
    }
  }

 private:
  Plan<T> plan(int n, int width) const {
    return Plan<T>(n, width, k_, 0, [width](int i, int j) { return i * width + j; });
  }
  int64_t k_, count_;
  Plan<T> wide_, narrow_;
};

// out = solve(b) for one group: solve(x, width) replaces n x width vectors.
template <class T, class F>
SECANT_INLINE void solve_columns(const Blocks& c, const Columns<T>& columns, const Group<T>& group, vec<T>* x,
                                 const Pivots<T>& pivots, const F& solve) {
  const T* in[kLanes<T>];
  T* out[kLanes<T>];
  group.pointers(static_cast<const T*>(c.b), c.b_batch, in);
  group.pointers(static_cast<T*>(c.out), c.n * c.k, out);
  columns.each([&](const Plan<T>& plan, int64_t begin, int width) SECANT_LAMBDA {
    interleave<T>(plan, in, x, begin);
    solve(x, width);
    if (pivots.bad()) {
      for (int i = 0; i < c.n * width; ++i) poison<T>(x[i], pivots.lanes());
    }
    deinterleave<T>(plan, x, out, begin);
  });
}

}  // namespace blocks
}  // namespace SECANT_ISA
