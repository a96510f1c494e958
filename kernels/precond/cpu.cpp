// The table of the `precond` kernels of one instruction set. The contract is in reference.py, the choices in README.md.
#include "cpu.h"

#include "cpu_ops.h"
#include "simd.h"

namespace SECANT_ISA {

extern const secant::PrecondCpu precond_table;
const secant::PrecondCpu precond_table = {
    {{precond::step_f32, precond::step_f32_bf16},
     {precond::step_f64, precond::step_f64_bf16},
     {precond::step_bf16, precond::step_bf16_bf16},
     {precond::step_f16, precond::step_f16_bf16}},
    {precond::newton_schulz_f32, precond::newton_schulz_f64, precond::newton_schulz_bf16, precond::newton_schulz_f16},
    {precond::newton_root_f32, precond::newton_root_f64, precond::newton_root_bf16, precond::newton_root_f16}};

}  // namespace SECANT_ISA
