// The kernels of one instruction set, by the file that has them.
#pragma once

#include "cpu.h"
#include "simd.h"

namespace SECANT_ISA {
namespace hvp {

void dense_f32(const secant::HvpRows& c);  // cpu_dense.cpp
void dense_f64(const secant::HvpRows& c);
void dense_bf16(const secant::HvpRows& c);
void dense_f16(const secant::HvpRows& c);
int64_t sparse_f32(const secant::HvpRows& c);  // cpu_sparse.cpp
int64_t sparse_f64(const secant::HvpRows& c);
void cross_entropy_f32(const secant::HvpCrossEntropy& c);  // cpu_cross_entropy.cpp
void cross_entropy_f64(const secant::HvpCrossEntropy& c);
void cross_entropy_bf16(const secant::HvpCrossEntropy& c);
void cross_entropy_f16(const secant::HvpCrossEntropy& c);
void gram_f32(const secant::HvpGram& c);  // cpu_gram.cpp
void gram_f64(const secant::HvpGram& c);

}  // namespace hvp
}  // namespace SECANT_ISA
