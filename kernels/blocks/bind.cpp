// The `blocks` kernels behind raw pointers, in secant._cpu.
#include <pybind11/pybind11.h>

#include "cpu.h"
#include "family.h"

namespace py = pybind11;

#define X(isa)                                 \
  namespace isa {                              \
  extern const secant::BlocksCpu blocks_table; \
  }
SECANT_ISAS
#undef X

namespace {

const secant::BlocksCpu& kernels() {
#define X(isa) &isa::blocks_table,
  static const secant::BlocksCpu* const built[] = {SECANT_ISAS};
#undef X
  return *built[secant::isa_index()];
}

using secant::ptr;

void blocks_inv(int arithmetic, int64_t batch, int n, uintptr_t a, int64_t a_batch, uintptr_t damping, double value,
                bool scaled, bool spd, uintptr_t out, uintptr_t info, int threads) {
  secant::Blocks c{};
  c.batch = batch, c.n = n, c.a = ptr(a), c.a_batch = a_batch;
  c.shift = ptr(damping), c.shift_value = value, c.scaled = scaled, c.spd = spd;
  c.out = ptr(out), c.info = ptr<int32_t>(info), c.threads = threads;
  py::gil_scoped_release release;
  kernels().inv[arithmetic](c);
}

void blocks_solve(int arithmetic, int64_t batch, int n, int64_t k, uintptr_t a, int64_t a_batch, uintptr_t b,
                  int64_t b_batch, uintptr_t damping, double value, bool scaled, bool spd, uintptr_t out,
                  uintptr_t info, int threads) {
  secant::Blocks c{};
  c.batch = batch, c.n = n, c.k = k, c.a = ptr(a), c.a_batch = a_batch, c.b = ptr(b), c.b_batch = b_batch;
  c.shift = ptr(damping), c.shift_value = value, c.scaled = scaled, c.spd = spd;
  c.out = ptr(out), c.info = ptr<int32_t>(info), c.threads = threads;
  py::gil_scoped_release release;
  kernels().solve[arithmetic](c);
}

void blocks_eigh(int arithmetic, int64_t batch, int n, uintptr_t a, int64_t a_batch, uintptr_t values,
                 uintptr_t vectors, uintptr_t info, uintptr_t basis, int64_t basis_batch, int threads) {
  secant::Blocks c{};
  c.batch = batch, c.n = n, c.a = ptr(a), c.a_batch = a_batch;
  c.values = ptr(values), c.out = ptr(vectors), c.info = ptr<int32_t>(info), c.threads = threads;
  c.b = ptr(basis), c.b_batch = basis_batch;
  py::gil_scoped_release release;
  kernels().eigh[arithmetic](c);
}

void blocks_function(int arithmetic, int root, int64_t batch, int n, uintptr_t a, int64_t a_batch, uintptr_t shift,
                     double value, bool scaled, bool clamped, uintptr_t out, uintptr_t info, uintptr_t basis,
                     int64_t basis_batch, int threads) {
  secant::Blocks c{};
  c.root = root, c.clamped = clamped, c.batch = batch, c.n = n, c.a = ptr(a), c.a_batch = a_batch;
  c.shift = ptr(shift), c.shift_value = value, c.scaled = scaled;
  c.out = ptr(out), c.info = ptr<int32_t>(info), c.threads = threads;
  c.b = ptr(basis), c.b_batch = basis_batch;
  py::gil_scoped_release release;
  kernels().function[arithmetic](c);
}

void define(py::module_& m) {
  m.def("blocks_inv", &blocks_inv);
  m.def("blocks_solve", &blocks_solve);
  m.def("blocks_eigh", &blocks_eigh);
  m.def("blocks_function", &blocks_function);
}

const secant::Family family(define);

}  // namespace
