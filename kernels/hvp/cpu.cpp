// The table of the `hvp` kernels of one instruction set. The contract is in reference.py, the choices in README.md.
#include "cpu.h"

#include "cpu_ops.h"
#include "simd.h"

namespace SECANT_ISA {

extern const secant::HvpCpu hvp_table;
const secant::HvpCpu hvp_table = {
    {hvp::dense_f32, hvp::dense_f64, hvp::dense_bf16, hvp::dense_f16},
    {hvp::sparse_f32, hvp::sparse_f64},
    {hvp::cross_entropy_f32, hvp::cross_entropy_f64, hvp::cross_entropy_bf16, hvp::cross_entropy_f16},
    {hvp::gram_f32, hvp::gram_f64}};

}  // namespace SECANT_ISA
