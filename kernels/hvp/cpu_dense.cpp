// Passes over dense rows.
#include "cpu_ops.h"
#include "cpu_rows.h"

namespace SECANT_ISA {
namespace hvp {

void dense_f32(const HvpRows& c) { rows<float, float>(c); }
void dense_f64(const HvpRows& c) { rows<double, double>(c); }
void dense_bf16(const HvpRows& c) { rows<bf16, float>(c); }
void dense_f16(const HvpRows& c) { rows<f16, float>(c); }

}  // namespace hvp
}  // namespace SECANT_ISA
