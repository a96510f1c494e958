// The module secant._cpu: CPU detection, and what the families define (see family.h).
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "bandwidth.h"
#include "dlpack.h"
#include "family.h"
#include "parallel.h"

// One namespace per instruction set that the build compiled; SECANT_ISAS is X(name) for each, best last.
#define X(isa)                              \
  namespace isa {                           \
  extern const secant::Bandwidth bandwidth; \
  }
SECANT_ISAS
#undef X

namespace py = pybind11;

namespace {

struct Isa {
  const char* name;
  const secant::Bandwidth* bandwidth;
};

const Isa kBuilt[] = {
#define X(isa) {#isa, &isa::bandwidth},
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

// Who made the processor, as far as it matters here.
const char* vendor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#elif defined(__aarch64__)
  return "arm";
#endif
  return "other";
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

// Takes the table of torch.Tensor; whether it is of a version that is understood here.
bool use_dlpack(const py::capsule& table) {
  const auto* found = table.get_pointer<const secant::dlpack::Exchange>();
  if (found->version.major != 1 || found->view == nullptr) return false;
  secant::dlpack::exchange = found;
  return true;
}

double read_bandwidth(uintptr_t data, int64_t bytes, int repeats) {
  py::gil_scoped_release release;
  return isa().bandwidth->read(secant::ptr<const void>(data), bytes, repeats);
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
  d["vendor"] = vendor();
#ifdef _OPENMP
  d["openmp"] = _OPENMP;
#else
  d["openmp"] = py::none();
#endif
  d["threads"] = secant::max_threads();
  return d;
}

}  // namespace

int secant::isa_index() { return static_cast<int>(&isa() - kBuilt); }

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "SIMD kernels of secant; arguments are raw pointers that secant.ops has checked.";
  isa();  // a wrong SECANT_ISA is an import error, not a surprise later
  m.def("build_config", &build_config, "Compiler, instruction sets, OpenMP version and threads.");
  m.def("use_dlpack", &use_dlpack, "Takes torch.Tensor.__dlpack_c_exchange_api__; False when its version is unknown.");
  secant::Family::define_all(m);
  m.def("read_bandwidth", &read_bandwidth, "Best bytes per second over `repeats` reads of a buffer by all threads.");
}
