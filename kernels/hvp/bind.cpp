// The `hvp` kernels behind raw pointers, in secant._cpu.
#include <pybind11/pybind11.h>

#include "cpu.h"
#include "dlpack.h"
#include "family.h"

namespace py = pybind11;

#define X(isa)                           \
  namespace isa {                        \
  extern const secant::HvpCpu hvp_table; \
  }
SECANT_ISAS
#undef X

namespace {

const secant::HvpCpu& kernels() {
#define X(isa) &isa::hvp_table,
  static const secant::HvpCpu* const built[] = {SECANT_ISAS};
#undef X
  return *built[secant::isa_index()];
}

using secant::ptr;

using secant::dlpack::Tensor;

// x: rows x_row apart or, where there is crow, the values of sparse ones: then it returns the first row that is wrong,
// -1 if there is none.
int64_t hvp_rows(int type, int op, int64_t n, int64_t d, uintptr_t x, int64_t x_row, uintptr_t crow, uintptr_t col,
                 bool wide_crow, bool wide_col, int64_t entries, int64_t k, bool intercept, uintptr_t v, uintptr_t row,
                 uintptr_t sample_weight, double l2, int loss, double delta, uintptr_t out, uintptr_t value,
                 uintptr_t row_out, int threads) {
  secant::HvpRows c{};
  c.op = op, c.n = n, c.d = d, c.x = ptr(x), c.x_row = x_row;
  c.crow = ptr(crow), c.col = ptr(col), c.wide_crow = wide_crow, c.wide_col = wide_col, c.entries = entries;
  c.k = k, c.intercept = intercept, c.v = ptr(v), c.row = ptr(row), c.sample_weight = ptr(sample_weight);
  c.l2 = l2, c.loss = loss, c.delta = delta;
  c.out = ptr(out), c.value = ptr<double>(value), c.row_out = ptr(row_out), c.threads = threads;
  py::gil_scoped_release release;
  if (c.crow != nullptr) return kernels().sparse[type](c);
  kernels().rows[type](c);
  return -1;
}

void hvp_cross_entropy(int type, int64_t rows, int64_t size, uintptr_t logits, int64_t logits_row, uintptr_t u,
                       int64_t u_row, uintptr_t lse, uintptr_t out, int threads) {
  const secant::HvpCrossEntropy c{rows, size, ptr(logits), logits_row, ptr(u), u_row, ptr(lse), ptr(out), threads};
  py::gil_scoped_release release;
  kernels().cross_entropy[type](c);
}

void hvp_gram(int type, int64_t m, int64_t n, uintptr_t x, int64_t x_row, int64_t x_column, uintptr_t weight,
              bool accumulate, uintptr_t out, int threads) {
  const secant::HvpGram c{m, n, ptr(x), x_row, x_column, ptr(weight), accumulate, ptr(out), threads};
  py::gil_scoped_release release;
  kernels().gram[type](c);
}

// Whether x is a contiguous vector of this size and dtype.
bool is_vector(const Tensor& x, int64_t size, int type) {
  return x.ndim == 1 && x.size(1) == size && (size == 1 || x.stride(1) == 1) && dtype_code(x) == type;
}

// The gate and the call in one, for dense rows and one vector; value, row_out and sample_weight may be None. False for
// all others, right or wrong.
bool hvp_glm_plain(int op, py::handle x, py::handle v, py::handle row, py::handle sample_weight, double l2,
                   bool intercept, int loss, double delta, py::handle out, py::handle value, py::handle row_out) {
  Tensor a, b, r, d, w, s, ro;
  if (!view(x.ptr(), &a) || !view(v.ptr(), &b) || !view(row.ptr(), &r) || !view(out.ptr(), &d)) return false;
  const int type = dtype_code(a), arithmetic = type == 1 ? 1 : 0;
  if (type < 0 || a.ndim != 2) return false;
  secant::HvpRows c{};
  c.op = op, c.n = a.size(2), c.d = a.size(1), c.k = 1, c.intercept = intercept;
  c.l2 = l2, c.loss = loss, c.delta = delta;
  if (c.n < 1 || c.d < 1 || (c.d > 1 && a.stride(1) != 1)) return false;
  const int64_t size = c.d + (intercept ? 1 : 0);
  if (!is_vector(b, size, arithmetic) || !is_vector(r, c.n, arithmetic) || !is_vector(d, size, arithmetic))
    return false;
  if (overlap(d, a) || overlap(d, b) || overlap(d, r)) return false;
  c.x = a.address(), c.x_row = a.stride(2), c.v = b.address(), c.row = r.address(), c.out = d.address();
  if (!sample_weight.is_none()) {
    if (!view(sample_weight.ptr(), &w) || !is_vector(w, c.n, arithmetic)) return false;
    c.sample_weight = w.address();
  }
  if (!value.is_none()) {
    if (!view(value.ptr(), &s) || s.ndim != 0 || dtype_code(s) != 1 || !view(row_out.ptr(), &ro) ||
        !is_vector(ro, c.n, arithmetic))
      return false;
    c.value = s.address<double>(), c.row_out = ro.address();
  }
  py::gil_scoped_release release;
  kernels().rows[type](c);
  return true;
}

void define(py::module_& m) {
  m.def("hvp_rows", &hvp_rows);
  m.def("hvp_glm_plain", &hvp_glm_plain, "Takes tensors; False when the gate has to look at them.");
  m.def("hvp_cross_entropy", &hvp_cross_entropy);
  m.def("hvp_gram", &hvp_gram);
}

const secant::Family family(define);

}  // namespace
