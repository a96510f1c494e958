// The `precond` kernels behind raw pointers, in secant._cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cpu.h"
#include "family.h"

namespace py = pybind11;

#define X(isa)                                   \
  namespace isa {                                \
  extern const secant::PrecondCpu precond_table; \
  }
SECANT_ISAS
#undef X

namespace {

const secant::PrecondCpu& kernels() {
#define X(isa) &isa::precond_table,
  static const secant::PrecondCpu* const built[] = {SECANT_ISAS};
#undef X
  return *built[secant::isa_index()];
}

using secant::ptr;

// addresses: of all parameters, then of all gradients and so on, in the order of contract.Tensors; layout: of its rows;
// lr_ptr: 0 for `lr`.
void precond_step(int type, bool half_state, int64_t count, const std::vector<uintptr_t>& addresses, uintptr_t layout,
                  uintptr_t lr_ptr, bool wide_lr, double lr, double beta1, double beta2, double beta_gram, double eps,
                  double weight_decay, double rms, int graft, bool rotate, bool maximize, int phases, uintptr_t skipped,
                  int threads) {
  if (addresses.size() != static_cast<size_t>(count) * 9) throw py::value_error("precond_step: addresses");
  std::vector<secant::PrecondTensor> tensors(static_cast<size_t>(count));
  for (size_t k = 0; k < tensors.size(); ++k) {
    const auto at = [&](size_t i) { return addresses[i * tensors.size() + k]; };
    tensors[k] = {ptr(at(0)), ptr(at(1)), ptr(at(2)), ptr(at(3)),       ptr(at(4)),
                  ptr(at(5)), ptr(at(6)), ptr(at(7)), ptr<float>(at(8))};
  }
  secant::PrecondStep c{};
  c.count = count, c.tensors = tensors.data(), c.layout = ptr<secant::PrecondLayout>(layout);
  c.lr_ptr = ptr(lr_ptr), c.wide_lr = wide_lr, c.lr = lr, c.beta1 = beta1, c.beta2 = beta2, c.beta_gram = beta_gram;
  c.eps = eps, c.weight_decay = weight_decay, c.rms = rms, c.graft = graft, c.rotate = rotate, c.maximize = maximize;
  c.phases = phases, c.skipped = ptr<int64_t>(skipped), c.threads = threads;
  py::gil_scoped_release release;
  kernels().step[type][half_state ? 1 : 0](c);
}

void precond_newton_schulz(int type, int64_t batch, int64_t m, int64_t n, uintptr_t x, int steps, double a, double b,
                           double c, double eps, uintptr_t out, int threads) {
  const secant::NewtonSchulz call{batch, m, n, ptr(x), steps, a, b, c, eps, ptr(out), threads};
  py::gil_scoped_release release;
  kernels().newton_schulz[type](call);
}

void precond_newton_root(int type, int64_t batch, int64_t n, uintptr_t a, int p, int steps, int squarings,
                         double damping, double tolerance, double growth, uintptr_t out, uintptr_t info, int threads) {
  const secant::NewtonRoot call{
      batch, n, ptr(a), p, steps, squarings, damping, tolerance, growth, ptr(out), ptr<int32_t>(info), threads};
  py::gil_scoped_release release;
  kernels().newton_root[type](call);
}

void define(py::module_& m) {
  m.def("precond_step", &precond_step);
  m.def("precond_newton_schulz", &precond_newton_schulz);
  m.def("precond_newton_root", &precond_newton_root);
}

const secant::Family family(define);

}  // namespace
