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
// General blocks of at least one piece and up to kMostVectors vectors of rows, one by one.
#ifdef __AVX2__
constexpr int kMostVectors = 4;
#else
constexpr int kMostVectors = 0;
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
