// The kernels of one instruction set, by the file that has them.
#pragma once

#include "cpu.h"
#include "simd.h"

namespace SECANT_ISA {
namespace precond {

void step_f32(const secant::PrecondStep& c);  // cpu_step.cpp
void step_f64(const secant::PrecondStep& c);
void step_bf16(const secant::PrecondStep& c);
void step_f16(const secant::PrecondStep& c);
void step_f32_bf16(const secant::PrecondStep& c);  // with states in bfloat16
void step_f64_bf16(const secant::PrecondStep& c);
void step_bf16_bf16(const secant::PrecondStep& c);
void step_f16_bf16(const secant::PrecondStep& c);
void newton_schulz_f32(const secant::NewtonSchulz& c);  // cpu_newton_schulz.cpp
void newton_schulz_f64(const secant::NewtonSchulz& c);
void newton_schulz_bf16(const secant::NewtonSchulz& c);
void newton_schulz_f16(const secant::NewtonSchulz& c);
void newton_root_f32(const secant::NewtonRoot& c);  // cpu_newton_root.cpp
void newton_root_f64(const secant::NewtonRoot& c);
void newton_root_bf16(const secant::NewtonRoot& c);
void newton_root_f16(const secant::NewtonRoot& c);

}  // namespace precond
}  // namespace SECANT_ISA
