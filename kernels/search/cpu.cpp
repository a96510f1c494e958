// Line searches of many problems, one problem after another; the contract is reference.py. This file is compiled
// without fused multiply-adds (see CMakeLists.txt), as every backend takes the same decisions to the last bit.
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "parallel.h"
#include "simd.h"

namespace SECANT_ISA {
namespace search {

using secant::SearchAdvance;
using secant::SearchBegin;
using secant::SearchRule;
using secant::SearchScalars;
using secant::SearchState;
using secant::Team;

namespace {

// Rows of numbers and counts, bits of flags, statuses: contract.py.
enum { kValue, kSlope, kT, kLast, kLow = 6, kHigh = 9, kFraction = 12, kSize, kNoise, kKeptT, kKeptValue };
enum { kUsed, kBlind, kFlags, kStatus, kNit, kNfev };
enum { kZooms = 1, kNearEnd = 2, kLowIsFirst = 4, kEnded = 8 };
enum { kRunning = -1, kConverged, kSmallChange, kMaxIter, kMaxEval, kStalled, kNoDescent };
constexpr int kMaxBlind = 5;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kWorkOfThread = 4e4;  // nanoseconds, roughly, below which a second thread is not woken

struct Point {
  double t, value, slope;
};

// As torch's minimum(maximum(t, low), high): what is not a number stays so.
double clamped(double t, double low, double high) {
  t = t < low ? low : t;
  return t > high ? high : t;
}

double cubic_minimizer(Point a, Point b, double low, double high) {
  if (!(a.t <= b.t)) std::swap(a, b);
  const double width = b.t - a.t;
  const double d1 = a.slope + b.slope + 3.0 * (a.value - b.value) / width;
  const double square = d1 * d1 - a.slope * b.slope;
  if (square >= 0.0 && width != 0.0) {
    const double d2 = std::sqrt(square);
    const double numerator = b.slope + d2 - d1, denominator = b.slope - a.slope + 2.0 * d2;
    const double t = denominator != 0.0 ? b.t - width * (numerator / denominator)
                     : numerator != 0.0 ? -std::copysign(kInfinity, numerator)
                                        : kNan;
    if (t == t) return clamped(t, low, high);
  }
  return 0.5 * (low + high);
}

double minimizer(const Point& a, const Point& b, double least, double most, double noise) {
  if (!(noise > 0.0 && std::fabs(a.value - b.value) <= noise)) return cubic_minimizer(a, b, least, most);
  // Equal values tell a cubic to turn back; the secant through the slopes knows better.
  if (a.slope == b.slope) return most;
  return clamped(b.t - b.slope * (b.t - a.t) / (b.slope - a.slope), least, most);
}

// The state of one problem: columns of numbers and counts.
struct Machine {
  double* numbers;
  int32_t* counts;
  int64_t step;  // from one row to the next
  const SearchRule& rule;

  double& number(int row) const { return numbers[row * step]; }
  int32_t& count(int row) const { return counts[row * step]; }
  Point point(int row) const { return {number(row), number(row + 1), number(row + 2)}; }
  void put(int row, const Point& p) const { number(row) = p.t, number(row + 1) = p.value, number(row + 2) = p.slope; }

  enum End { kGoesOn, kTakesNew, kTakesStart, kTakesKept };

  // Takes the value and slope at t and moves on; `keeps`: this trial is the one that may be chosen later.
  End advance(double value, double slope, bool* keeps) const {
    *keeps = false;
    const double noise = number(kNoise), start_value = number(kValue), start_slope = number(kSlope);
    const bool is_finite = std::isfinite(value) && std::isfinite(slope), noisy = noise > 0.0;
    const Point now{number(kT), is_finite ? value : kInfinity, is_finite ? slope : kNan};
    const int32_t used = count(kUsed) += 1;
    const bool spent = used >= rule.max_trials;
    const bool fine = now.value <= start_value + noise && now.slope <= (2.0 * rule.c1 - 1.0) * start_slope;
    const bool decreases = now.value <= start_value + rule.c1 * now.t * start_slope || (noisy && fine);
    const bool is_flat = std::fabs(now.slope) <= -rule.c2 * start_slope;
    int32_t flags = count(kFlags);
    Point low, high;
    if ((flags & kZooms) == 0) {
      // Algorithm 3.5: lengthen the step until a bracket or an acceptable point appears.
      if (spent) {
        const bool same = noisy && now.value == start_value && now.slope == start_slope;
        return now.value < start_value + noise && !same ? kTakesNew : kTakesStart;
      }
      const Point last = used == 1 ? Point{0.0, start_value, start_slope} : point(kLast);
      const bool rises = !decreases || (used > 2 && now.value >= last.value + noise);
      if (!rises && is_flat) return kTakesNew;
      if (!(rises || now.slope >= 0.0)) {
        const bool same = noisy && now.value == last.value && now.slope == last.slope;
        number(kT) = same ? 10.0 * now.t : minimizer(last, now, now.t + 0.01 * (now.t - last.t), 10.0 * now.t, noise);
        put(kLast, now);
        *keeps = true;
        return kGoesOn;
      }
      const bool first_lower = last.value <= now.value;
      low = first_lower ? last : now, high = first_lower ? now : last;
      flags = kZooms | (first_lower ? kLowIsFirst : 0);
      number(kFraction) = 1.0, count(kBlind) = 0;
      *keeps = !first_lower;
    } else {
      // Algorithm 3.6: shrink the bracket. Which end is low is a matter of values alone, but a tie goes to the first.
      low = point(kLow), high = point(kHigh);
      if (noisy && now.value == low.value && now.slope == low.slope) return chosen(low, noise);
      if (!decreases || now.value >= low.value + noise) {
        high = now;
        if ((flags & kLowIsFirst) != 0 ? now.value < low.value : now.value <= low.value) {
          std::swap(low, high);
          flags ^= kLowIsFirst;
          *keeps = true;
        }
      } else if (is_flat) {
        return kTakesNew;
      } else {
        if (now.slope * (high.t - low.t) >= 0.0) high = low;
        low = now;
        number(kFraction) = 1.0;
        *keeps = true;
      }
    }
    double t;
    const bool ends = !shrink(low, high, noise, start_slope, &flags, &t) || spent;
    if (ends) return chosen(low, noise);
    put(kLow, low), put(kHigh, high);
    count(kFlags) = flags;
    number(kT) = t;
    return kGoesOn;
  }

  // The low end of the bracket, or the start, than which it may not be better.
  End chosen(const Point& low, double noise) const {
    const bool gained = low.value < number(kValue) || std::fabs(low.slope) < -number(kSlope) || !(noise > 0.0);
    return gained ? kTakesKept : kTakesStart;
  }

  // Where to look in the bracket; false: there is no use in it.
  bool shrink(const Point& low, const Point& high, double noise, double start_slope, int32_t* flags, double* to) const {
    const double left = std::min(low.t, high.t), right = std::max(low.t, high.t);
    if ((right - left) * number(kSize) < rule.tolerance || right == left) return false;
    double t;
    if (high.value == kInfinity) {
      const double fraction = number(kFraction) *= 0.5;
      t = low.t + fraction * (high.t - low.t);
    } else {
      const bool in_order = (*flags & kLowIsFirst) != 0;
      t = minimizer(in_order ? low : high, in_order ? high : low, left, right, noise);
      // Trials may come within a tenth of the width of an end once, and are then put a tenth away from it.
      const double margin = 0.1 * (right - left);
      const bool inside = right - t >= margin && t - left >= margin;
      const bool once = !inside && (*flags & kNearEnd) == 0 && left < t && t < right;
      if (!inside && !once) t = right - t < t - left ? right - margin : left + margin;
      *flags = once ? *flags | kNearEnd : *flags & ~kNearEnd;
    }
    *to = t;
    count(kBlind) += -t * start_slope <= noise;
    return count(kBlind) <= kMaxBlind;
  }
};

template <class T>
double dot(const T* a, const T* b, int64_t n) {
  vd sum = {};
  int64_t k = 0;
  for (; k + kDoubles <= n; k += kDoubles) sum += load_d(a + k) * load_d(b + k);
  double rest = 0.0;
  for (; k < n; ++k) rest += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  return sum_lanes<double>(sum) + rest;
}

// to = x + t d; `to` may be x.
template <class T>
void move(const T* x, double t, const T* d, T* to, int64_t n) {
  const vec<T> length = splat(static_cast<T>(t));
  int64_t k = 0;
  for (; k + kLanes<T> <= n; k += kLanes<T>) store(to + k, load<vec<T>>(x + k) + length * load<vec<T>>(d + k));
  if (k < n) store_some(to + k, load_some(x + k, n - k) + length * load_some(d + k, n - k), n - k);
}

template <class T>
double largest(const T* d, int64_t n) {
  T most = 0;
  for (int64_t k = 0; k < n; ++k) most = std::max(most, std::fabs(d[k]));
  return static_cast<double>(most);
}

template <class T>
void copy(T* to, const T* from, int64_t n) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

// work(i, p) for the i-th row, which is problem p.
template <class F>
void for_rows(const SearchState& s, int threads, const F& work) {
  if (threads < 1) {
    const double all = static_cast<double>(s.count) * (50.0 + 2.0 * static_cast<double>(s.n));
    threads = static_cast<int>(std::clamp(all / kWorkOfThread, 1.0, static_cast<double>(secant::max_threads())));
  }
  secant::run_team(threads, [&](const Team& team) {
    const auto [begin, end] = team.share(s.count, 8);  // whose numbers share cache lines
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = s.rows == nullptr ? i : s.rows[i];
      if (p >= 0 && p < s.batch) work(i, p);
    }
  });
}

template <class T>
void advance(const SearchAdvance& a) {
  const SearchState& s = a.state;
  const SearchRule& rule = a.rule;
  const int64_t n = s.n;
  for_rows(s, a.threads, [&](int64_t i, int64_t p) {
    const Machine m{s.numbers + p, s.counts + p, s.batch, rule};
    if (m.count(kStatus) != kRunning || (m.count(kFlags) & kEnded) != 0) return;
    const T *grad = static_cast<const T*>(a.grad) + i * n, *d = static_cast<const T*>(s.d) + p * n;
    T *const x = static_cast<T*>(s.x) + p * n, *const kept = static_cast<T*>(s.kept) + p * n;
    const double t = m.number(kT), value = a.value[i], old = m.number(kValue);
    bool keeps;
    const bool first = m.count(kUsed) == 0;
    const auto end = m.advance(value, dot(grad, d, n), &keeps);
    if (first) m.number(kKeptT) = 0.0;
    if (keeps) {
      m.number(kKeptT) = t, m.number(kKeptValue) = value;
      copy(kept, grad, n);
    }
    const int64_t nfev = m.count(kNfev) += 1;
    if (end == Machine::kGoesOn) {
      s.step[p] = 0.0;
      move(x, m.number(kT), d, static_cast<T*>(s.trial) + p * n, n);
      return;
    }
    const bool is_new = end == Machine::kTakesNew;
    const double step = is_new ? t : end == Machine::kTakesStart ? 0.0 : m.number(kKeptT);
    const bool moved = step > 0.0;
    s.step[p] = step;
    int32_t status = kRunning;
    if (nfev >= rule.max_nfev) status = kMaxEval;
    if (moved) {
      move(x, step, d, x, n);
      copy(static_cast<T*>(s.g) + p * n, is_new ? grad : kept, n);
      const double now = is_new ? value : m.number(kKeptValue);
      m.number(kValue) = now;
      m.count(kNit) += 1;
      if (m.count(kNit) >= rule.max_iter) status = kMaxIter;
      const double size = std::max(std::max(std::fabs(now), std::fabs(old)), 1.0);
      if (rule.ftol > 0.0 && std::fabs(now - old) <= rule.ftol * size) status = kSmallChange;
    } else {
      status = kStalled;
    }
    m.count(kStatus) = status;
    m.count(kFlags) = kEnded;
  });
}

double at(const SearchScalars& x, int64_t p) { return x.data == nullptr ? 1.0 : x.data[p * x.stride]; }

template <class T>
void begin(const SearchBegin& a) {
  const SearchState& s = a.state;
  const SearchRule& rule = a.rule;
  const int64_t n = s.n;
  for_rows(s, a.threads, [&](int64_t, int64_t p) {
    const Machine m{s.numbers + p, s.counts + p, s.batch, rule};
    if ((m.count(kFlags) & kEnded) == 0) return;
    const double slope = at(a.slope, p);
    int32_t status = m.count(kStatus);
    // No descent tells more than a limit, and less than how the step went.
    if ((status == kRunning || status == kMaxEval || status == kMaxIter) && !(slope < 0.0)) status = kNoDescent;
    if (s.step[p] > 0.0 && at(a.g_max, p) <= rule.gtol) status = kConverged;
    m.count(kStatus) = status;
    m.count(kFlags) = 0;
    const T *x = static_cast<const T*>(s.x) + p * n, *d = static_cast<const T*>(s.d) + p * n;
    T* const trial = static_cast<T*>(s.trial) + p * n;
    if (status != kRunning) {
      s.step[p] = 0.0;
      copy(trial, x, n);
      return;
    }
    const double t = at(a.t, p);
    m.count(kUsed) = 0;
    m.number(kSlope) = slope, m.number(kT) = t, m.number(kSize) = largest(d, n);
    m.number(kNoise) = rule.eps * std::fabs(m.number(kValue));
    move(x, t, d, trial, n);
  });
}

}  // namespace

}  // namespace search

extern const secant::SearchCpu search_table;
const secant::SearchCpu search_table = {{search::advance<float>, search::advance<double>},
                                        {search::begin<float>, search::begin<double>}};

}  // namespace SECANT_ISA
