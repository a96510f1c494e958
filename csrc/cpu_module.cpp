// The module secant._cpu: CPU detection, and the kernels of every family behind raw pointers.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/blocks/cpu.h"
#include "../kernels/hvp/cpu.h"
#include "../kernels/lbfgs/cpu.h"
#include "bandwidth.h"
#include "dlpack.h"
#include "parallel.h"

// One namespace per instruction set that the build compiled; SECANT_ISAS is X(name) for each, best last.
#define X(isa)                                 \
  namespace isa {                              \
  extern const secant::BlocksCpu blocks_table; \
  extern const secant::HvpCpu hvp_table;       \
  extern const secant::LbfgsCpu lbfgs;         \
  extern const secant::Bandwidth bandwidth;    \
  }
SECANT_ISAS
#undef X

namespace py = pybind11;

namespace {

struct Isa {
  const char* name;
  const secant::BlocksCpu* blocks;
  const secant::HvpCpu* hvp;
  const secant::LbfgsCpu* lbfgs;
  const secant::Bandwidth* bandwidth;
};

const Isa kBuilt[] = {
#define X(isa) {#isa, &isa::blocks_table, &isa::hvp_table, &isa::lbfgs, &isa::bandwidth},
    SECANT_ISAS
#undef X
};

bool cpu_has(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == "baseline" || isa == "neon";
}

const Isa& choose() {
  const char* wanted = std::getenv("SECANT_ISA");
  const Isa* best = nullptr;
  std::string names;
  for (const Isa& isa : kBuilt) {
    if (!cpu_has(isa.name)) continue;
    best = &isa;
    names += std::string(names.empty() ? "" : ", ") + isa.name;
    if (wanted != nullptr && std::string(wanted) == isa.name) return isa;
  }
  if (wanted != nullptr && *wanted != '\0')
    throw std::runtime_error("SECANT_ISA: expected one of " + names + " (what this CPU and this build have), got '" +
                             wanted + "'");
  if (best == nullptr) throw std::runtime_error("no instruction set of this build runs on this CPU");
  return *best;
}

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

template <class T = void>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void lbfgs_update(int vectors, int rings, int64_t batch, int64_t m, int64_t n, uintptr_t s_ring, uintptr_t y_ring,
                  uintptr_t sy, uintptr_t yy, uintptr_t head, uintptr_t count, uintptr_t stats, uintptr_t grad,
                  uintptr_t s, uintptr_t y, uintptr_t y_prev, uintptr_t t_ptr, int64_t t_stride, double t, double tol,
                  uintptr_t out, uintptr_t prev_out, int threads) {
  const secant::LbfgsUpdate args{batch,
                                 m,
                                 n,
                                 ptr(s_ring),
                                 ptr(y_ring),
                                 ptr<double>(sy),
                                 ptr<double>(yy),
                                 ptr<int32_t>(head),
                                 ptr<int32_t>(count),
                                 ptr<double>(stats),
                                 ptr(grad),
                                 ptr(s),
                                 ptr(y),
                                 ptr(y_prev),
                                 ptr<double>(t_ptr),
                                 t_stride,
                                 t,
                                 tol,
                                 ptr(out),
                                 ptr(prev_out),
                                 threads};
  py::gil_scoped_release release;
  isa().lbfgs->update[vectors][rings](args);
}

void lbfgs_two_loop(int vectors, int rings, int64_t batch, int64_t m, int64_t n, uintptr_t grad, uintptr_t s,
                    int64_t s_batch, int64_t s_row, uintptr_t y, int64_t y_batch, int64_t y_row, double gamma,
                    uintptr_t out, int panel, int threads) {
  const secant::LbfgsTwoLoop args{batch, m,       n,     ptr(grad), ptr(s),   ptr(y), s_batch,
                                  s_row, y_batch, y_row, gamma,     ptr(out), panel,  threads};
  py::gil_scoped_release release;
  isa().lbfgs->two_loop[vectors][rings](args);
}

void blocks_inv(int arithmetic, int64_t batch, int n, uintptr_t a, int64_t a_batch, uintptr_t damping, double value,
                bool scaled, bool spd, uintptr_t out, uintptr_t info, int threads) {
  secant::Blocks c{};
  c.batch = batch, c.n = n, c.a = ptr(a), c.a_batch = a_batch;
  c.shift = ptr(damping), c.shift_value = value, c.scaled = scaled, c.spd = spd;
  c.out = ptr(out), c.info = ptr<int32_t>(info), c.threads = threads;
  py::gil_scoped_release release;
  isa().blocks->inv[arithmetic](c);
}

void blocks_solve(int arithmetic, int64_t batch, int n, int64_t k, uintptr_t a, int64_t a_batch, uintptr_t b,
                  int64_t b_batch, uintptr_t damping, double value, bool scaled, bool spd, uintptr_t out,
                  uintptr_t info, int threads) {
  secant::Blocks c{};
  c.batch = batch, c.n = n, c.k = k, c.a = ptr(a), c.a_batch = a_batch, c.b = ptr(b), c.b_batch = b_batch;
  c.shift = ptr(damping), c.shift_value = value, c.scaled = scaled, c.spd = spd;
  c.out = ptr(out), c.info = ptr<int32_t>(info), c.threads = threads;
  py::gil_scoped_release release;
  isa().blocks->solve[arithmetic](c);
}

void blocks_eigh(int arithmetic, int64_t batch, int n, uintptr_t a, int64_t a_batch, uintptr_t values,
                 uintptr_t vectors, uintptr_t info, int threads) {
  secant::Blocks c{};
  c.batch = batch, c.n = n, c.a = ptr(a), c.a_batch = a_batch;
  c.values = ptr(values), c.out = ptr(vectors), c.info = ptr<int32_t>(info), c.threads = threads;
  py::gil_scoped_release release;
  isa().blocks->eigh[arithmetic](c);
}

void blocks_function(int arithmetic, int root, int64_t batch, int n, uintptr_t a, int64_t a_batch, uintptr_t shift,
                     double value, bool scaled, uintptr_t out, uintptr_t info, int threads) {
  secant::Blocks c{};
  c.root = root, c.batch = batch, c.n = n, c.a = ptr(a), c.a_batch = a_batch;
  c.shift = ptr(shift), c.shift_value = value, c.scaled = scaled;
  c.out = ptr(out), c.info = ptr<int32_t>(info), c.threads = threads;
  py::gil_scoped_release release;
  isa().blocks->function[arithmetic](c);
}

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
  if (c.crow != nullptr) return isa().hvp->sparse[type](c);
  isa().hvp->rows[type](c);
  return -1;
}

void hvp_cross_entropy(int type, int64_t rows, int64_t size, uintptr_t logits, int64_t logits_row, uintptr_t u,
                       int64_t u_row, uintptr_t lse, uintptr_t out, int threads) {
  const secant::HvpCrossEntropy c{rows, size, ptr(logits), logits_row, ptr(u), u_row, ptr(lse), ptr(out), threads};
  py::gil_scoped_release release;
  isa().hvp->cross_entropy[type](c);
}

const secant::dlpack::Exchange* exchange = nullptr;

// Takes the table of torch.Tensor; whether it is of a version that is understood here.
bool use_dlpack(const py::capsule& table) {
  const auto* found = table.get_pointer<const secant::dlpack::Exchange>();
  if (found->version.major != 1 || found->view == nullptr) return false;
  exchange = found;
  return true;
}

bool view(py::handle object, secant::dlpack::Tensor* out) {
  if (exchange->view(object.ptr(), out) == 0) return out->device.type == secant::dlpack::kCpu && out->dtype.lanes == 1;
  PyErr_Clear();
  return false;
}

// The number of a dtype in the tables of LbfgsCpu and HvpCpu, -1 for another.
int dtype_code(const secant::dlpack::Tensor& x) {
  if (x.dtype.code == secant::dlpack::kFloat && x.dtype.bits == 32) return 0;
  if (x.dtype.code == secant::dlpack::kFloat && x.dtype.bits == 64) return 1;
  return x.dtype.code == secant::dlpack::kBfloat && x.dtype.bits == 16 ? 2 : -1;
}

// The gate and the call in one, for tensors that the kernel takes as they are; false for all others, right or wrong.
bool lbfgs_two_loop_plain(py::handle grad, py::handle s, py::handle y, py::handle out) {
  secant::dlpack::Tensor g, a, b, d;
  if (exchange == nullptr || !view(grad, &g) || !view(s, &a) || !view(y, &b) || !view(out, &d)) return false;
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
                                  0,
                                  0};
  py::gil_scoped_release release;
  isa().lbfgs->two_loop[vectors][rings](args);
  return true;
}

// Whether x is a contiguous vector of this size and dtype.
bool is_vector(const secant::dlpack::Tensor& x, int64_t size, int type) {
  return x.ndim == 1 && x.size(1) == size && (size == 1 || x.stride(1) == 1) && dtype_code(x) == type;
}

// The same for a pass over dense rows with one vector; value, row_out and sample_weight may be None.
bool hvp_glm_plain(int op, py::handle x, py::handle v, py::handle row, py::handle sample_weight, double l2,
                   bool intercept, int loss, double delta, py::handle out, py::handle value, py::handle row_out) {
  secant::dlpack::Tensor a, b, r, d, w, s, ro;
  if (exchange == nullptr || !view(x, &a) || !view(v, &b) || !view(row, &r) || !view(out, &d)) return false;
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
    if (!view(sample_weight, &w) || !is_vector(w, c.n, arithmetic)) return false;
    c.sample_weight = w.address();
  }
  if (!value.is_none()) {
    if (!view(value, &s) || s.ndim != 0 || dtype_code(s) != 1 || !view(row_out, &ro) || !is_vector(ro, c.n, arithmetic))
      return false;
    c.value = s.address<double>(), c.row_out = ro.address();
  }
  py::gil_scoped_release release;
  isa().hvp->rows[type](c);
  return true;
}

double read_bandwidth(uintptr_t data, int64_t bytes, int repeats) {
  py::gil_scoped_release release;
  return isa().bandwidth->read(ptr<const void>(data), bytes, repeats);
}

py::dict build_config() {
  py::list sets, usable;
  for (const Isa& i : kBuilt) {
    sets.append(i.name);
    if (cpu_has(i.name)) usable.append(i.name);
  }
  py::dict d;
  d["compiler"] = SECANT_COMPILER;
  d["isas"] = sets;
  d["isas_usable"] = usable;
  d["isa"] = isa().name;
#ifdef _OPENMP
  d["openmp"] = _OPENMP;
#else
  d["openmp"] = py::none();
#endif
  d["threads"] = secant::max_threads();
  return d;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "SIMD kernels of secant; arguments are raw pointers that secant.ops has checked.";
  isa();  // a wrong SECANT_ISA is an import error, not a surprise later
  m.def("build_config", &build_config, "Compiler, instruction sets, OpenMP version and threads.");
  m.def("lbfgs_update", &lbfgs_update);
  m.def("lbfgs_two_loop", &lbfgs_two_loop);
  m.def("lbfgs_two_loop_plain", &lbfgs_two_loop_plain, "Takes four tensors; False when the gate has to look at them.");
  m.def("use_dlpack", &use_dlpack, "Takes torch.Tensor.__dlpack_c_exchange_api__; False when its version is unknown.");
  m.def("blocks_inv", &blocks_inv);
  m.def("blocks_solve", &blocks_solve);
  m.def("blocks_eigh", &blocks_eigh);
  m.def("blocks_function", &blocks_function);
  m.def("hvp_rows", &hvp_rows);
  m.def("hvp_glm_plain", &hvp_glm_plain, "Takes tensors; False when the gate has to look at them.");
  m.def("hvp_cross_entropy", &hvp_cross_entropy);
  m.def("read_bandwidth", &read_bandwidth, "Best bytes per second over `repeats` reads of a buffer by all threads.");
}
