// Line searches of many problems on CUDA; the contract is reference.py. Include-free: kernels/cuda_portable.cuh (or the
// CPU stand-in of the tests) goes in front.
//
//   search_advance_S, search_begin_S    `lanes` threads a problem, 4, 8 or 32, which share the vectors
//
// S is the type of the points. The first of a problem's threads runs the machine and alone reads and writes its
// numbers; the others get the decision by shuffles, in which all threads of a warp take part. Every entry of a vector
// belongs to one thread. Products and sums of the machine are named, so that no compiler fuses them.

struct SearchCall {
  u64 x, g, d, kept, trial, step, numbers, counts, rows;  // pointers; rows 0: all
  u64 value, grad;                                        // of `advance`
  u64 slope, g_max, first;                                // of `begin`; first 0: 1
  i64 batch, n, count, slope_stride, g_max_stride, first_stride, max_trials, max_iter, max_nfev;
  double c1, c2, tolerance, eps, gtol, ftol;
  int lanes, apart;  // apart: fills the last word
};

namespace {

constexpr u32 kAll = 0xffffffffu;
constexpr int kBlock = 128;

// Rows of numbers and counts, bits of flags, statuses: contract.py.
enum { kValue, kSlope, kT, kLast, kLow = 6, kHigh = 9, kFraction = 12, kSize, kNoise, kKeptT, kKeptValue };
enum { kUsed, kBlind, kFlags, kStatus, kNit, kNfev };
enum { kZooms = 1, kNearEnd = 2, kLowIsFirst = 4, kEnded = 8 };
enum { kRunning = -1, kConverged, kSmallChange, kMaxIter, kMaxEval, kStalled, kNoDescent };
enum { kNothing, kGoesOn, kTakesNew, kTakesStart, kTakesKept, kBegins, kStops };
constexpr int kMaxBlind = 5;

SECANT_DEVICE double plus(double x, double y) { return __dadd_rn(x, y); }
SECANT_DEVICE double minus(double x, double y) { return __dadd_rn(x, -y); }
SECANT_DEVICE double times(double x, double y) { return __dmul_rn(x, y); }
SECANT_DEVICE double over(double x, double y) { return __ddiv_rn(x, y); }
SECANT_DEVICE float moved(float x, double t, float d) { return __fadd_rn(x, __fmul_rn(float(t), d)); }
SECANT_DEVICE double moved(double x, double t, double d) { return plus(x, times(t, d)); }

SECANT_DEVICE double infinity() { return __longlong_as_double(0x7ff0000000000000ll); }
SECANT_DEVICE double not_a_number() { return __longlong_as_double(0x7ff8000000000000ll); }
SECANT_DEVICE bool finite(double x) { return x - x == 0.0; }
SECANT_DEVICE double largest(double x, double y) { return x < y ? y : x; }

struct Point {
  double t, value, slope;
};

// Member by member: a choice between two structs would put both into local memory.
SECANT_DEVICE Point either(bool first, const Point& a, const Point& b) {
  return {first ? a.t : b.t, first ? a.value : b.value, first ? a.slope : b.slope};
}

// As torch's minimum(maximum(t, low), high): what is not a number stays so.
SECANT_DEVICE double clamped(double t, double low, double high) {
  t = t < low ? low : t;
  return t > high ? high : t;
}

SECANT_DEVICE double cubic_minimizer(const Point& p, const Point& q, double low, double high) {
  const bool ordered = p.t <= q.t;
  const Point a = either(ordered, p, q), b = either(ordered, q, p);
  const double width = minus(b.t, a.t);
  const double d1 = plus(plus(a.slope, b.slope), over(times(3.0, minus(a.value, b.value)), width));
  const double square = minus(times(d1, d1), times(a.slope, b.slope));
  if (square >= 0.0 && width != 0.0) {
    const double d2 = __dsqrt_rn(square);
    const double numerator = minus(plus(b.slope, d2), d1);
    const double denominator = plus(minus(b.slope, a.slope), times(2.0, d2));
    const double t = denominator != 0.0 ? minus(b.t, times(width, over(numerator, denominator)))
                     : numerator > 0.0  ? -infinity()
                     : numerator < 0.0  ? infinity()
                                        : not_a_number();
    if (t == t) return clamped(t, low, high);
  }
  return times(0.5, plus(low, high));
}

SECANT_DEVICE double minimizer(const Point& a, const Point& b, double least, double most, double noise) {
  if (!(noise > 0.0 && fabs(minus(a.value, b.value)) <= noise)) return cubic_minimizer(a, b, least, most);
  // Equal values tell a cubic to turn back; the secant through the slopes knows better.
  if (a.slope == b.slope) return most;
  const double step = over(times(b.slope, minus(b.t, a.t)), minus(b.slope, a.slope));
  return clamped(minus(b.t, step), least, most);
}

// The state of one problem: columns of numbers and counts.
struct Machine {
  double* numbers;
  int* counts;
  i64 apart;  // one row from the next
};

SECANT_DEVICE double& number(const Machine& m, int row) { return m.numbers[row * m.apart]; }
SECANT_DEVICE int& count(const Machine& m, int row) { return m.counts[row * m.apart]; }
SECANT_DEVICE Point point(const Machine& m, int row) {
  return {number(m, row), number(m, row + 1), number(m, row + 2)};
}
SECANT_DEVICE void put(const Machine& m, int row, const Point& p) {
  number(m, row) = p.t, number(m, row + 1) = p.value, number(m, row + 2) = p.slope;
}

// The low end of the bracket, or the start, than which it may not be better.
SECANT_DEVICE int chosen(const Machine& m, const Point& low, double noise) {
  const bool gained = low.value < number(m, kValue) || fabs(low.slope) < -number(m, kSlope) || !(noise > 0.0);
  return gained ? kTakesKept : kTakesStart;
}

// Where to look in the bracket; false: there is no use in it.
SECANT_DEVICE bool shrink(const SearchCall& a, const Machine& m, const Point& low, const Point& high, double noise,
                          double start_slope, int& flags, double& to) {
  const bool turned = high.t < low.t;
  const double left = turned ? high.t : low.t, right = turned ? low.t : high.t, width = minus(right, left);
  if (times(width, number(m, kSize)) < a.tolerance || right == left) return false;
  double t;
  if (high.value == infinity()) {
    const double fraction = times(0.5, number(m, kFraction));
    number(m, kFraction) = fraction;
    t = plus(low.t, times(fraction, minus(high.t, low.t)));
  } else {
    const bool in_order = (flags & kLowIsFirst) != 0;
    t = minimizer(either(in_order, low, high), either(in_order, high, low), left, right, noise);
    // Trials may come within a tenth of the width of an end once, and are then put a tenth away from it.
    const double margin = times(0.1, width);
    const bool inside = minus(right, t) >= margin && minus(t, left) >= margin;
    const bool once = !inside && (flags & kNearEnd) == 0 && left < t && t < right;
    if (!inside && !once) t = minus(right, t) < minus(t, left) ? minus(right, margin) : plus(left, margin);
    flags = once ? flags | kNearEnd : flags & ~kNearEnd;
  }
  to = t;
  const int blind = count(m, kBlind) + (times(-t, start_slope) <= noise ? 1 : 0);
  count(m, kBlind) = blind;
  return blind <= kMaxBlind;
}

// Takes the value and slope at t and moves on; `keeps`: this trial is the one that may be chosen later.
SECANT_DEVICE int advanced(const SearchCall& a, const Machine& m, double value, double slope, bool& keeps) {
  const double noise = number(m, kNoise), start_value = number(m, kValue), start_slope = number(m, kSlope);
  const bool is_finite = finite(value) && finite(slope), noisy = noise > 0.0;
  const Point now{number(m, kT), is_finite ? value : infinity(), is_finite ? slope : not_a_number()};
  const int used = count(m, kUsed) + 1;
  count(m, kUsed) = used;
  const bool spent = used >= a.max_trials;
  const bool fine =
      now.value <= plus(start_value, noise) && now.slope <= times(minus(times(2.0, a.c1), 1.0), start_slope);
  const bool decreases = now.value <= plus(start_value, times(times(a.c1, now.t), start_slope)) || (noisy && fine);
  const bool is_flat = fabs(now.slope) <= times(-a.c2, start_slope);
  int flags = count(m, kFlags);
  Point low, high;
  if ((flags & kZooms) == 0) {
    // Algorithm 3.5: lengthen the step until a bracket or an acceptable point appears.
    if (spent) {
      const bool same = noisy && now.value == start_value && now.slope == start_slope;
      return now.value < plus(start_value, noise) && !same ? kTakesNew : kTakesStart;
    }
    const Point last = either(used == 1, {0.0, start_value, start_slope}, point(m, kLast));
    const bool rises = !decreases || (used > 2 && now.value >= plus(last.value, noise));
    if (!rises && is_flat) return kTakesNew;
    if (!(rises || now.slope >= 0.0)) {
      const bool same = noisy && now.value == last.value && now.slope == last.slope;
      const double most = times(10.0, now.t), least = plus(now.t, times(0.01, minus(now.t, last.t)));
      number(m, kT) = same ? most : minimizer(last, now, least, most, noise);
      put(m, kLast, now);
      keeps = true;
      return kGoesOn;
    }
    const bool first_lower = last.value <= now.value;
    low = either(first_lower, last, now), high = either(first_lower, now, last);
    flags = kZooms | (first_lower ? kLowIsFirst : 0);
    number(m, kFraction) = 1.0, count(m, kBlind) = 0;
    keeps = !first_lower;
  } else {
    // Algorithm 3.6: shrink the bracket. Which end is low is a matter of values alone, but a tie goes to the first.
    low = point(m, kLow), high = point(m, kHigh);
    if (noisy && now.value == low.value && now.slope == low.slope) return chosen(m, low, noise);
    if (!decreases || now.value >= plus(low.value, noise)) {
      const bool swaps = (flags & kLowIsFirst) != 0 ? now.value < low.value : now.value <= low.value;
      high = either(swaps, low, now);
      low = either(swaps, now, low);
      if (swaps) flags ^= kLowIsFirst;
      keeps = swaps;
    } else if (is_flat) {
      return kTakesNew;
    } else {
      if (times(now.slope, minus(high.t, low.t)) >= 0.0) high = low;
      low = now;
      number(m, kFraction) = 1.0;
      keeps = true;
    }
  }
  double t;
  if (!shrink(a, m, low, high, noise, start_slope, flags, t) || spent) return chosen(m, low, noise);
  put(m, kLow, low), put(m, kHigh, high);
  count(m, kFlags) = flags;
  number(m, kT) = t;
  return kGoesOn;
}

// What ends with the search: number, status and counts.
SECANT_DEVICE void ended(const SearchCall& a, const Machine& m, double step, double now, double old, i64 nfev) {
  int status = kRunning;
  if (nfev >= a.max_nfev) status = kMaxEval;
  if (step > 0.0) {
    const int nit = count(m, kNit) + 1;
    count(m, kNit) = nit;
    number(m, kValue) = now;
    if (nit >= a.max_iter) status = kMaxIter;
    const double size = largest(largest(fabs(now), fabs(old)), 1.0);
    if (a.ftol > 0.0 && fabs(minus(now, old)) <= times(a.ftol, size)) status = kSmallChange;
  } else {
    status = kStalled;
  }
  count(m, kStatus) = status;
  count(m, kFlags) = kEnded;
}

// The problem of this thread, its place among the rows, and its place among the problem's threads; -1: none.
struct Seat {
  i64 row, problem;
  int lane, leader;  // leader: lane of the warp that runs the machine
};

SECANT_DEVICE Seat seat(const SearchCall& a) {
  const i64 thread = i64(blockIdx.x) * kBlock + threadIdx.x, row = thread / a.lanes;
  const int lane = int(threadIdx.x) & (a.lanes - 1), in_warp = int(threadIdx.x & 31u);
  i64 p = -1;
  if (row < a.count) {
    p = a.rows == 0 ? row : reinterpret_cast<const i64*>(a.rows)[row];
    if (p >= a.batch) p = -1;
  }
  return {row, p < 0 ? -1 : p, lane, in_warp - lane};
}

template <class S>
SECANT_DEVICE void search_advance(const SearchCall& a) {
  const Seat s = seat(a);
  const Machine m{reinterpret_cast<double*>(a.numbers) + s.problem, reinterpret_cast<int*>(a.counts) + s.problem,
                  a.batch};
  bool active = s.problem >= 0;
  if (active) active = count(m, kStatus) == kRunning && (count(m, kFlags) & kEnded) == 0;
  const i64 n = a.n;
  const S* const grad = reinterpret_cast<const S*>(a.grad) + s.row * n;
  const S* const d = reinterpret_cast<const S*>(a.d) + s.problem * n;
  double slope = 0.0;
  if (active) {
    for (i64 k = s.lane; k < n; k += a.lanes) slope += double(grad[k]) * double(d[k]);
  }
  for (int o = a.lanes / 2; o > 0; o >>= 1) slope += __shfl_xor_sync(kAll, slope, o);

  int code = kNothing, keep = 0;
  double t = 0.0;
  if (active && s.lane == 0) {
    const double value = reinterpret_cast<const double*>(a.value)[s.row], now = number(m, kT), old = number(m, kValue);
    const bool first = count(m, kUsed) == 0;
    const int nfev = count(m, kNfev) + 1;
    count(m, kNfev) = nfev;
    bool keeps = false;
    code = advanced(a, m, value, slope, keeps);
    if (keeps) {
      number(m, kKeptT) = now, number(m, kKeptValue) = value;
    } else if (first) {
      number(m, kKeptT) = 0.0;
    }
    keep = keeps;
    double step = 0.0;
    if (code == kGoesOn) {
      t = number(m, kT);
    } else {
      step = t = code == kTakesNew ? now : code == kTakesKept ? number(m, kKeptT) : 0.0;
      ended(a, m, step, code == kTakesNew ? value : number(m, kKeptValue), old, nfev);
    }
    reinterpret_cast<double*>(a.step)[s.problem] = step;
  }
  code = __shfl_sync(kAll, code, s.leader);
  keep = __shfl_sync(kAll, keep, s.leader);
  t = __shfl_sync(kAll, t, s.leader);

  if (code == kNothing) return;
  S* const x = reinterpret_cast<S*>(a.x) + s.problem * n;
  S* const kept = reinterpret_cast<S*>(a.kept) + s.problem * n;
  if (code == kGoesOn) {
    S* const trial = reinterpret_cast<S*>(a.trial) + s.problem * n;
    for (i64 k = s.lane; k < n; k += a.lanes) {
      if (keep) kept[k] = grad[k];
      trial[k] = moved(x[k], t, d[k]);
    }
  } else if (t > 0.0) {
    S* const g = reinterpret_cast<S*>(a.g) + s.problem * n;
    const bool from_grad = code == kTakesNew || keep;
    for (i64 k = s.lane; k < n; k += a.lanes) {
      g[k] = from_grad ? grad[k] : kept[k];
      x[k] = moved(x[k], t, d[k]);
    }
  }
}

SECANT_DEVICE double scalar(u64 data, i64 stride, i64 p) { return reinterpret_cast<const double*>(data)[p * stride]; }

template <class S>
SECANT_DEVICE void search_begin(const SearchCall& a) {
  const Seat s = seat(a);
  const Machine m{reinterpret_cast<double*>(a.numbers) + s.problem, reinterpret_cast<int*>(a.counts) + s.problem,
                  a.batch};
  bool active = s.problem >= 0;
  if (active) active = (count(m, kFlags) & kEnded) != 0;
  const i64 n = a.n;
  const S* const d = reinterpret_cast<const S*>(a.d) + s.problem * n;
  double size = 0.0;
  if (active) {
    for (i64 k = s.lane; k < n; k += a.lanes) size = largest(size, fabs(double(d[k])));
  }
  for (int o = a.lanes / 2; o > 0; o >>= 1) size = largest(size, __shfl_xor_sync(kAll, size, o));

  int code = kNothing;
  double t = 1.0;
  if (active && s.lane == 0) {
    const double slope = scalar(a.slope, a.slope_stride, s.problem);
    double* const step = reinterpret_cast<double*>(a.step) + s.problem;
    int status = count(m, kStatus);
    // No descent tells more than a limit, and less than how the step went.
    if ((status == kRunning || status == kMaxEval || status == kMaxIter) && !(slope < 0.0)) status = kNoDescent;
    if (*step > 0.0 && scalar(a.g_max, a.g_max_stride, s.problem) <= a.gtol) status = kConverged;
    count(m, kStatus) = status;
    count(m, kFlags) = 0;
    code = kStops;
    if (status == kRunning) {
      code = kBegins;
      if (a.first != 0) t = scalar(a.first, a.first_stride, s.problem);
      count(m, kUsed) = 0;
      number(m, kSlope) = slope, number(m, kT) = t, number(m, kSize) = size;
      number(m, kNoise) = times(a.eps, fabs(number(m, kValue)));
    } else {
      *step = 0.0;
    }
  }
  code = __shfl_sync(kAll, code, s.leader);
  t = __shfl_sync(kAll, t, s.leader);

  if (code == kNothing) return;
  const S* const x = reinterpret_cast<const S*>(a.x) + s.problem * n;
  S* const trial = reinterpret_cast<S*>(a.trial) + s.problem * n;
  for (i64 k = s.lane; k < n; k += a.lanes) trial[k] = code == kBegins ? moved(x[k], t, d[k]) : x[k];
}

}  // namespace

// The types of the points; NVRTC compiles one at a time.
#ifndef SECANT_SEARCH_TYPES
#define SECANT_SEARCH_TYPES(X) X(f32, float) X(f64, double)
#endif

#define SECANT_SEARCH_ENTRIES(TAG, S)                                                             \
  extern "C" __global__ void __launch_bounds__(128, 4) search_advance_##TAG(const SearchCall a) { \
    search_advance<S>(a);                                                                         \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(128, 4) search_begin_##TAG(const SearchCall a) { search_begin<S>(a); }

// Every kernel by name, for the tables of the host: X(kernel, parameter struct).
#define SECANT_SEARCH_TABLE(X, TAG) X(search_advance_##TAG, SearchCall) X(search_begin_##TAG, SearchCall)

SECANT_SEARCH_TYPES(SECANT_SEARCH_ENTRIES)
