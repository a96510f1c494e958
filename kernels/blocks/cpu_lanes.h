// Groups of as many matrices as a vector has lanes: which matrices a lane holds, how they get in and out, their
// damping.
//
// Every step of every algorithm works lane by lane and no lane looks at another, so that the bits of a block do not
// depend on its neighbours. The last group of a batch fills its idle lanes with copies of the last matrix: it runs the
// same instructions, and its surplus results are the same bits stored to the same place.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "buffer.h"
#include "cpu.h"
#include "parallel.h"
#include "simd.h"

namespace SECANT_ISA {
namespace blocks {

using secant::Blocks;
using secant::Team;

// Below this many estimated nanoseconds of work one thread is faster than waking two.
constexpr double kSerial = 20e3;

// Up to here the matrix of every lane stays in registers and on the stack, with all loops unrolled.
#ifdef SECANT_BLOCKS_SMALL  // less to compile, for the sanitizers
constexpr int kSmall = SECANT_BLOCKS_SMALL;
#else
constexpr int kSmall = 8;
#endif

constexpr int triangle(int i) { return i * (i + 1) / 2; }
constexpr int lower(int i, int j) { return i > j ? triangle(i) + j : triangle(j) + i; }

template <class T>
struct Group {
  static constexpr int L = kLanes<T>;
  int64_t first;
  int count;

  Group(int64_t group, int64_t batch)
      : first(group * L), count(static_cast<int>(std::min<int64_t>(L, batch - first))) {}

  // The matrix of each lane.
  template <class P>
  SECANT_INLINE void pointers(P* base, int64_t stride, P* (&p)[L]) const {
    base += first * stride;
    if (count == L) {
      for (int l = 0; l < L; ++l) p[l] = base + l * stride;
    } else {
      for (int l = 0; l < L; ++l) p[l] = base + std::min(l, count - 1) * stride;
    }
  }

  SECANT_INLINE vec<T> lanes(const T* x) const {
    if (count == L) return load<vec<T>>(x + first);
    vec<T> v{};
    for (int l = 0; l < L; ++l) v[l] = x[first + std::min(l, count - 1)];
    return v;
  }

  SECANT_INLINE void store_info(const vec<T>& code, int32_t* info) const {
    if (!any<T>(less<T>(vec<T>{}, absolute<T>(code)))) {  // as most often: without 16 conversions
      std::memset(info + first, 0, static_cast<size_t>(count) * sizeof(int32_t));
      return;
    }
    for (int l = 0; l < count; ++l) info[first + l] = static_cast<int32_t>(code[l]);
  }
};

// The matrices of a whole group that lie side by side, N * N elements each: places that are constants, not an array.
template <class T, int kStride>
struct Even {
  T* base;
  SECANT_INLINE T* operator[](int l) const { return base + l * kStride; }
  SECANT_INLINE Even operator+(int l) const { return {base + l * kStride}; }
};

// The diagonal under damping, a_ii * times + plus: one rounding whether it is A + lambda I or A + lambda diag(A).
template <class T>
struct Damping {
  vec<T> times = splat(T(1)), plus = splat(T(0));

  SECANT_INLINE Damping(const Blocks& c, const Group<T>& group) {
    if (c.shift != nullptr) {
      const vec<T> v = group.lanes(static_cast<const T*>(c.shift));
      c.scaled ? times += v : plus = v;
    } else if (c.scaled) {
      times = splat(static_cast<T>(1 + c.shift_value));
    } else {
      plus = splat(static_cast<T>(c.shift_value));
    }
  }
  SECANT_INLINE vec<T> operator()(const vec<T>& d) const { return d * times + plus; }
};

// Code of the first pivot that fails: neither NaN nor infinite, and positive or (general) different from zero.
template <class T>
struct Pivots {
  vec<T> code{};

  SECANT_INLINE void check(const vec<T>& pivot, int index) {
    const vec<T> zero{}, infinity = splat(std::numeric_limits<T>::infinity());
    const vec<T> index1 = splat(static_cast<T>(index + 1));
    // 0 where the pivot is good, else the index; the first one stays.
    const vec<T> fault = select<T>(less<T>(zero, pivot), select<T>(less<T>(pivot, infinity), zero, index1), index1);
    code = select<T>(equal<T>(code, zero), fault, code);
  }
  SECANT_INLINE bool bad() const { return any<T>(less<T>(vec<T>{}, absolute<T>(code))); }
  SECANT_INLINE mask<T> lanes() const { return less<T>(vec<T>{}, absolute<T>(code)); }
};

template <class T>
SECANT_INLINE void poison(vec<T>& x, mask<T> bad) {
  x = select<T>(bad, splat(std::numeric_limits<T>::quiet_NaN()), x);
}

// ---------------------------------------------------------------------------------------------- in and out of lanes

// kPiece<T> consecutive elements of a matrix, and where each goes in a buffer of vectors.
template <class T>
struct Unit {
  int64_t offset;
  int slot[kPiece<T>];
};

// How `rows` rows of `columns` elements, `pitch` apart in memory, map to slots. Rows of fewer elements than a piece are
// taken together when they lie side by side; the last unit of a run steps back over its neighbour instead of beyond the
// end. What is shorter than a piece altogether moves element by element.
template <class T>
struct Plan {
  std::vector<Unit<T>> units;
  int dummy;

  // slot(row, column) < 0: the element is not read, and is not there to be written.
  template <class F>
  Plan(int rows, int columns, int64_t pitch, int dummy_slot, const F& slot) : dummy(dummy_slot) {
    constexpr int Q = kPiece<T>;
    const bool flat = columns == pitch || rows == 1;
    const int runs = flat ? 1 : rows, length = flat ? rows * columns : columns;
    for (int r = 0; r < runs; ++r) {
      for (int f = 0; f < length; f += Q) {
        const int start = std::max(0, std::min(f, length - Q));
        Unit<T> u{r * pitch + start, {}};
        bool wanted = false;
        for (int t = 0; t < Q; ++t) {
          const int row = flat ? (start + t) / columns : r, column = flat ? (start + t) % columns : start + t;
          const int s = start + t < length ? slot(row, column) : -1;
          wanted |= s >= 0;
          u.slot[t] = s >= 0 ? s : dummy;
        }
        if (wanted) units.push_back(u);
      }
    }
    if (length < Q) short_length = length;
  }
  int short_length = 0;  // elements of each run, where that is less than a piece
};

template <class T>
SECANT_INLINE void interleave(const Plan<T>& plan, const T* const* matrices, vec<T>* buffer, int64_t offset = 0) {
  constexpr int Q = kPiece<T>;
  if (plan.short_length) {
    for (const Unit<T>& u : plan.units) {
      for (int t = 0; t < plan.short_length; ++t) {
        vec<T> v{};
        for (int l = 0; l < kLanes<T>; ++l) v[l] = matrices[l][offset + u.offset + t];
        buffer[u.slot[t]] = v;
      }
    }
    return;
  }
  for (const Unit<T>& u : plan.units) {
    vec<T> v[Q];
    for (int t = 0; t < Q; ++t) v[t] = load_pieces<T>(matrices + t, Q, offset + u.offset);
    transpose_pieces<T>(v);
    for (int t = 0; t < Q; ++t) buffer[u.slot[t]] = v[t];
  }
}

template <class T>
SECANT_INLINE void deinterleave(const Plan<T>& plan, const vec<T>* buffer, T* const* matrices, int64_t offset = 0) {
  constexpr int Q = kPiece<T>;
  if (plan.short_length) {
    for (const Unit<T>& u : plan.units) {
      for (int t = 0; t < plan.short_length; ++t) {
        for (int l = 0; l < kLanes<T>; ++l) matrices[l][offset + u.offset + t] = buffer[u.slot[t]][l];
      }
    }
    return;
  }
  for (const Unit<T>& u : plan.units) {
    vec<T> v[Q];
    for (int t = 0; t < Q; ++t) v[t] = buffer[u.slot[t]];
    transpose_pieces<T>(v);
    for (int t = 0; t < Q; ++t) store_pieces<T>(matrices + t, Q, offset + u.offset, v[t]);
  }
}

// n x n matrices, lower triangle only, to a packed triangle with one vector behind it that nobody reads.
template <class T>
Plan<T> lower_plan(int n) {
  return Plan<T>(n, n, n, triangle(n), [](int i, int j) { return j <= i ? triangle(i) + j : -1; });
}

// The same for N x N matrices with every index a constant. Slot(i, j) maps to a register, < 0 to nowhere.
struct LowerTriangle {
  static constexpr int in(int i, int j) { return j <= i ? triangle(i) + j : -1; }
  static constexpr int out(int i, int j) { return lower(i, j); }
};
template <int N>
struct Square {
  static constexpr int in(int i, int j) { return i * N + j; }
  static constexpr int out(int i, int j) { return i * N + j; }
};

template <class Slots, class T, int N, class P>
SECANT_INLINE void load_unrolled(const P& matrices, vec<T>* x) {
  constexpr int Q = kPiece<T>, total = N * N;
  if constexpr (total == 1 && __is_same(P, Even<const T, 1>)) {
    x[0] = load<vec<T>>(matrices.base);
  } else if constexpr (total < Q) {
    vec<T> v{};
    for (int l = 0; l < kLanes<T>; ++l) v[l] = matrices[l][0];
    x[0] = v;
  } else {
    unroll<(total + Q - 1) / Q>([&](auto unit) SECANT_LAMBDA {
      constexpr int start = unit * Q + Q <= total ? unit * Q : total - Q;
      vec<T> v[Q];
      unroll<Q>([&](auto t) SECANT_LAMBDA { v[t] = load_pieces<T>(matrices + t, Q, start); });
      transpose_pieces<T>(v);
      unroll<Q>([&](auto t) SECANT_LAMBDA {
        constexpr int i = (start + t) / N, j = (start + t) % N;
        if constexpr (Slots::in(i, j) >= 0) x[Slots::in(i, j)] = v[t];
      });
    });
  }
}

template <class Slots, class T, int N, class P>
SECANT_INLINE void store_unrolled(const vec<T>* x, const P& matrices) {
  constexpr int Q = kPiece<T>, total = N * N;
  if constexpr (total == 1 && __is_same(P, Even<T, 1>)) {
    store(matrices.base, x[0]);
  } else if constexpr (total < Q) {
    for (int l = 0; l < kLanes<T>; ++l) matrices[l][0] = x[0][l];
  } else {
    unroll<(total + Q - 1) / Q>([&](auto unit) SECANT_LAMBDA {
      constexpr int start = unit * Q + Q <= total ? unit * Q : total - Q;
      vec<T> v[Q];
      unroll<Q>([&](auto t) SECANT_LAMBDA { v[t] = x[Slots::out((start + t) / N, (start + t) % N)]; });
      transpose_pieces<T>(v);
      unroll<Q>([&](auto t) SECANT_LAMBDA { store_pieces<T>(matrices + t, Q, start, v[t]); });
    });
  }
}

// ------------------------------------------------------------------------------------------------ memory and threads

// Brings the input and the output of the next group to the second level of cache while this one is computed, a few
// lines at a time: without it, arithmetic and memory take turns, and many at once wait for each other.
class Ahead {
 public:
  template <class T>
  Ahead(const Blocks& c, const Group<T>& group, int64_t out_size) {
    constexpr int L = kLanes<T>;
    if (group.first + 2 * L > c.batch) return;
    if (c.a_batch == c.n * c.n) in_ = of<T>(c.a, group.first + L, c.a_batch);
    out_ = of<T>(c.out, group.first + L, out_size);
  }

  SECANT_INLINE void fetch(int lines) {
    in_.fetch(lines);
    out_.fetch(lines);
  }
  SECANT_INLINE void fetch_all() { fetch(1 << 20); }

 private:
  struct Range {
    const char *at = nullptr, *end = nullptr;
    SECANT_INLINE void fetch(int lines) {
      for (; lines > 0 && at < end; --lines, at += 64) __builtin_prefetch(at, 0, 2);
    }
  };
  template <class T>
  static Range of(const void* base, int64_t first, int64_t size) {
    const char* const begin = static_cast<const char*>(base) + first * size * static_cast<int64_t>(sizeof(T));
    return {begin, begin + kLanes<T> * size * static_cast<int64_t>(sizeof(T))};
  }
  Range in_, out_;
};

// Vectors of every thread, made by the caller so that running out of memory is an exception there.
template <class T>
class Scratch {
 public:
  Scratch(int threads, int64_t vectors) : each_(vectors), data_(threads * vectors) {}
  vec<T>* of(int rank) const { return data_.get() + rank * each_; }

 private:
  int64_t each_;
  secant::Buffer<vec<T>> data_;
};

// work(group, scratch, ahead) for all groups, whose outputs have `out_size` elements a block. `nanoseconds` is an
// estimate for one group.
template <class T, class F>
void for_groups(const Blocks& c, double nanoseconds, int64_t vectors, int64_t out_size, const F& work) {
  const int64_t groups = (c.batch + kLanes<T> - 1) / kLanes<T>;
  const int wanted = c.threads > 0                                         ? c.threads
                     : static_cast<double>(groups) * nanoseconds < kSerial ? 1
                                                                           : secant::max_threads();
  const int threads = static_cast<int>(std::min<int64_t>(wanted, groups));
  const Scratch<T> scratch(threads, vectors);
  secant::run_team(threads, [&](const Team& team) {
    const auto [begin, end] = team.share(groups, 1);
    for (int64_t g = begin; g < end; ++g) {
      const Group<T> group(g, c.batch);
      Ahead ahead(c, group, out_size);
      work(group, scratch.of(team.rank), ahead);
    }
  });
}

}  // namespace blocks
}  // namespace SECANT_ISA
