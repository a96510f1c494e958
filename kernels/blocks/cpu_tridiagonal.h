// Eigenproblems one by one (cpu_tridiagonal.cpp), for T float and double.
#pragma once

#include "cpu.h"

namespace SECANT_ISA {
namespace blocks {

constexpr int kLargest = 128;  // of the eigenvalues; EIGEN_N of cpu.py

// `info` of a clamped root that reached the cap on iterations: positive codes count eigenvalues there.
constexpr int kNotConverged = -3;

// The sizes that they are for: where they are as fast as Jacobi in lanes at full vectors. So the batch has no say in
// it, and a block has the same bits in all of them.
template <class T>
constexpr bool tridiagonal(int n) {
  return n >= (sizeof(T) == 8 ? 16 : 24);
}
template <class T>
void eigh_tridiagonal(const secant::Blocks&);
template <class T>
void function_tridiagonal(const secant::Blocks&);

}  // namespace blocks
}  // namespace SECANT_ISA
