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
template <class T>
void eigh(const Blocks&);
template <class T>
void function(const Blocks&);

}  // namespace blocks
}  // namespace SECANT_ISA
