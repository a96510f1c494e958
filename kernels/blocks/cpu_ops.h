// The kernels behind the table of cpu.cpp, for T float and double.
#pragma once

#include "cpu.h"

namespace SECANT_ISA {
namespace blocks {

using secant::Blocks;

template <class T>
void inv_spd(const Blocks&);
template <class T>
void solve_spd(const Blocks&);
template <class T>
void inv_general(const Blocks&);
template <class T>
void solve_general(const Blocks&);
// General blocks one by one. That pays where the columns are long, and needs them to be of four vectors at most.
#ifdef __AVX2__
template <class T>
constexpr bool one_by_one(int n) {
  constexpr int lanes = SECANT_VECTOR_BYTES / static_cast<int>(sizeof(T));
  return n >= (lanes > 8 ? 2 * lanes : 16) && n <= 4 * lanes;
}
#endif
template <class T>
void inv_pivot(const Blocks&);
template <class T>
void solve_pivot(const Blocks&);
template <class T>
void eigh(const Blocks&);
template <class T>
void function(const Blocks&);

}  // namespace blocks
}  // namespace SECANT_ISA
