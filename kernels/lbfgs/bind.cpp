// The `lbfgs` kernels behind raw pointers, in secant._cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu.h"
#include "dlpack.h"
#include "family.h"

namespace py = pybind11;

#define X(isa)                                    \
  namespace isa {                                 \
  extern const secant::LbfgsCpu lbfgs;            \
  extern const secant::LbfgsDenseCpu lbfgs_dense; \
  }
SECANT_ISAS
#undef X

namespace {

const secant::LbfgsCpu& kernels() {
#define X(isa) &isa::lbfgs,
  static const secant::LbfgsCpu* const built[] = {SECANT_ISAS};
#undef X
  return *built[secant::isa_index()];
}

const secant::LbfgsDenseCpu& dense_kernels() {
#define X(isa) &isa::lbfgs_dense,
  static const secant::LbfgsDenseCpu* const built[] = {SECANT_ISAS};
#undef X
  return *built[secant::isa_index()];
}

using secant::ptr;

using secant::dlpack::Tensor;

// Choices for the processor, which `secant.defaults` makes: histories of more bytes go by panels of many pairs;
// elements of a row that are read at a time.
int64_t panel_bytes = int64_t(8) << 20;
int block = 1024;

// Asks for huge pages where there are some to ask for: a history is read in many places at once, each with pages of its
// own. Memory that was written before stays as it is.
void lbfgs_use_huge_pages(uintptr_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(ptr(begin), end - begin, MADV_HUGEPAGE);  // advice: that it is not taken is no error
#else
  (void)address, (void)bytes;
#endif
}

void lbfgs_tune(int64_t bytes, int elements) { panel_bytes = bytes, block = elements; }

// history: s, y, sy, yy, head, count, stats; vectors: grad, s, y, y_prev, out, prev_out; sums: dots, coefs. Addresses,
// 0 where there is none.
void lbfgs_update(int vectors, int rings, int64_t batch, int64_t m, int64_t n, const std::array<uintptr_t, 7>& history,
                  const std::array<uintptr_t, 6>& operands, const std::array<uintptr_t, 2>& sums, uintptr_t t_ptr,
                  int64_t t_stride, double t, double tol, bool pair, bool direction, int phases, int threads) {
  secant::LbfgsUpdate a{};
  a.batch = batch, a.m = m, a.n = n;
  a.s_ring = ptr(history[0]), a.y_ring = ptr(history[1]), a.sy = ptr<double>(history[2]);
  a.yy = ptr<double>(history[3]), a.head = ptr<int32_t>(history[4]), a.count = ptr<int32_t>(history[5]);
  a.stats = ptr<double>(history[6]);
  a.grad = ptr(operands[0]), a.s = ptr(operands[1]), a.y = ptr(operands[2]), a.y_prev = ptr(operands[3]);
  a.out = ptr(operands[4]), a.prev_out = ptr(operands[5]);
  a.dots = ptr<double>(sums[0]), a.coefs = ptr<double>(sums[1]);
  a.t_ptr = ptr<double>(t_ptr), a.t_stride = t_stride, a.t = t, a.tol = tol;
  a.pair = pair, a.direction = direction, a.phases = phases, a.block = block, a.threads = threads;
  py::gil_scoped_release release;
  kernels().update[vectors][rings](a);
}

void lbfgs_two_loop(int vectors, int rings, int64_t batch, int64_t m, int64_t n, uintptr_t grad, uintptr_t s,
                    int64_t s_batch, int64_t s_row, uintptr_t y, int64_t y_batch, int64_t y_row, double gamma,
                    uintptr_t out, int panel, int threads) {
  const secant::LbfgsTwoLoop args{batch,   m,     n,     ptr(grad), ptr(s),      ptr(y), s_batch, s_row,
                                  y_batch, y_row, gamma, ptr(out),  panel_bytes, panel,  threads};
  py::gil_scoped_release release;
  kernels().two_loop[vectors][rings](args);
}

// state: h, pair, coefs, count, stats; operands: grad, s, y, y_prev, out, prev_out. Addresses, 0 where there is none.
void lbfgs_dense_update(int dtype, int64_t n, const std::array<uintptr_t, 5>& state,
                        const std::array<uintptr_t, 6>& operands, uintptr_t t_ptr, double t, double tol, int rule,
                        int threads) {
  secant::LbfgsDense a{};
  a.n = n, a.h = ptr(state[0]), a.steps = ptr(state[1]), a.coefs = ptr<double>(state[2]);
  a.count = ptr<int32_t>(state[3]), a.stats = ptr<double>(state[4]);
  a.grad = ptr(operands[0]), a.s = ptr(operands[1]), a.y = ptr(operands[2]), a.y_prev = ptr(operands[3]);
  a.out = ptr(operands[4]), a.prev_out = ptr(operands[5]);
  a.t_ptr = ptr<double>(t_ptr), a.t = t, a.tol = tol, a.rule = rule, a.threads = threads;
  py::gil_scoped_release release;
  dense_kernels().update[dtype](a);
}

// The gate and the call in one, for tensors that the kernel takes as they are; false for all others, right or wrong.
bool lbfgs_two_loop_plain(py::handle grad, py::handle s, py::handle y, py::handle out) {
  Tensor g, a, b, d;
  if (!view(grad.ptr(), &g) || !view(s.ptr(), &a) || !view(y.ptr(), &b) || !view(out.ptr(), &d)) return false;
  const int vectors = dtype_code(g), rings = dtype_code(a);
  if (vectors < 0 || vectors > 1 || dtype_code(d) != vectors || rings < 0 || dtype_code(b) != rings) return false;
  const int dims = g.ndim;
  if (dims < 1 || dims > 2 || d.ndim != dims || a.ndim != dims + 1 || b.ndim != dims + 1) return false;
  const int64_t n = g.size(1), m = a.size(2), batch = dims == 2 ? g.size(2) : 1;
  if (n < 1 || batch < 1 || m < 1 || m > 256 || d.size(1) != n || (dims == 2 && d.size(2) != batch)) return false;
  for (const auto* x : {&a, &b}) {
    if (x->size(1) != n || x->size(2) != m || (dims == 2 && x->size(3) != batch)) return false;
    if (n > 1 && x->stride(1) != 1) return false;
    if (overlap(d, *x)) return false;
  }
  for (const auto* x : {&g, &d}) {
    if ((n > 1 && x->stride(1) != 1) || (batch > 1 && x->stride(2) != n)) return false;
  }
  if (d.address() != g.address() && overlap(d, g)) return false;
  const secant::LbfgsTwoLoop args{batch,
                                  m,
                                  n,
                                  g.address(),
                                  a.address(),
                                  b.address(),
                                  batch > 1 ? a.stride(3) : 0,
                                  a.stride(2),
                                  batch > 1 ? b.stride(3) : 0,
                                  b.stride(2),
                                  std::numeric_limits<double>::quiet_NaN(),
                                  d.address(),
                                  panel_bytes,
                                  0,
                                  0};
  py::gil_scoped_release release;
  kernels().two_loop[vectors][rings](args);
  return true;
}

void define(py::module_& m) {
  m.def("lbfgs_update", &lbfgs_update);
  m.def("lbfgs_two_loop", &lbfgs_two_loop);
  m.def("lbfgs_dense_update", &lbfgs_dense_update);
  m.def("lbfgs_two_loop_plain", &lbfgs_two_loop_plain, "Takes four tensors; False when the gate has to look at them.");
  m.def("lbfgs_use_huge_pages", &lbfgs_use_huge_pages, "For memory that nobody has written yet.");
  m.def("lbfgs_tune", &lbfgs_tune, "Bytes from which on histories go by panels of pairs; elements of a row at a time.");
}

const secant::Family family(define);

}  // namespace
