// The `search` kernels behind raw pointers, in secant._cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu.h"
#include "family.h"

namespace py = pybind11;

#define X(isa)                                 \
  namespace isa {                              \
  extern const secant::SearchCpu search_table; \
  }
SECANT_ISAS
#undef X

namespace {

const secant::SearchCpu& kernels() {
#define X(isa) &isa::search_table,
  static const secant::SearchCpu* const built[] = {SECANT_ISAS};
#undef X
  return *built[secant::isa_index()];
}

using secant::ptr;
using Addresses = std::array<uintptr_t, 8>;  // in the order of contract.Search

// c1, c2, tolerance, eps, gtol, ftol; max_trials, max_iter, max_nfev.
secant::SearchRule rule_of(const std::array<double, 6>& numbers, const std::array<int64_t, 3>& limits) {
  return {numbers[0], numbers[1], numbers[2], limits[0], numbers[3], numbers[4], numbers[5], limits[1], limits[2]};
}

// rows: 0 for all.
secant::SearchState state_of(int64_t batch, int64_t n, const Addresses& a, uintptr_t rows, int64_t count) {
  return {batch,
          n,
          ptr(a[0]),
          ptr(a[1]),
          ptr(a[2]),
          ptr(a[3]),
          ptr(a[4]),
          ptr<double>(a[5]),
          ptr<double>(a[6]),
          ptr<int32_t>(a[7]),
          ptr<int64_t>(rows),
          count};
}

void search_advance(int type, int64_t batch, int64_t n, const Addresses& state, uintptr_t rows, int64_t count,
                    uintptr_t value, uintptr_t grad, const std::array<double, 6>& numbers,
                    const std::array<int64_t, 3>& limits, int threads) {
  const secant::SearchAdvance call{state_of(batch, n, state, rows, count), ptr<double>(value), ptr(grad),
                                   rule_of(numbers, limits), threads};
  py::gil_scoped_release release;
  kernels().advance[type](call);
}

using Scalars = std::pair<uintptr_t, int64_t>;  // address and stride

void search_begin(int type, int64_t batch, int64_t n, const Addresses& state, uintptr_t rows, int64_t count,
                  const Scalars& slope, const Scalars& g_max, const Scalars& t, const std::array<double, 6>& numbers,
                  const std::array<int64_t, 3>& limits, int threads) {
  const auto scalars = [](const Scalars& x) { return secant::SearchScalars{ptr<double>(x.first), x.second}; };
  const secant::SearchBegin call{state_of(batch, n, state, rows, count),
                                 scalars(slope),
                                 scalars(g_max),
                                 scalars(t),
                                 rule_of(numbers, limits),
                                 threads};
  py::gil_scoped_release release;
  kernels().begin[type](call);
}

void define(py::module_& m) {
  m.def("search_advance", &search_advance);
  m.def("search_begin", &search_begin);
}

const secant::Family family(define);

}  // namespace
