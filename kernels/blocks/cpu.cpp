// The table of the `blocks` kernels of one instruction set. The contract is in reference.py, the choice of algorithm by
// size in README.md.
#include "cpu.h"

#include "cpu_ops.h"
#include "cpu_tridiagonal.h"
#include "simd.h"

namespace SECANT_ISA {
namespace {

template <class T>
void inv(const secant::Blocks& c) {
#ifdef __AVX2__
  if (!c.spd && blocks::one_by_one<T>(c.n)) return blocks::inv_pivot<T>(c);
#endif
  c.spd ? blocks::inv_spd<T>(c) : blocks::inv_general<T>(c);
}

template <class T>
void solve(const secant::Blocks& c) {
#ifdef __AVX2__
  if (!c.spd && blocks::one_by_one<T>(c.n)) return blocks::solve_pivot<T>(c);
#endif
  c.spd ? blocks::solve_spd<T>(c) : blocks::solve_general<T>(c);
}

template <class T>
void eigh(const secant::Blocks& c) {
  blocks::tridiagonal<T>(c.n) ? blocks::eigh_tridiagonal<T>(c) : blocks::eigh<T>(c);
}

template <class T>
void function(const secant::Blocks& c) {
  blocks::tridiagonal<T>(c.n) ? blocks::function_tridiagonal<T>(c) : blocks::function<T>(c);
}

}  // namespace

extern const secant::BlocksCpu blocks_table;
const secant::BlocksCpu blocks_table = {{inv<float>, inv<double>},
                                        {solve<float>, solve<double>},
                                        {eigh<float>, eigh<double>},
                                        {function<float>, function<double>}};

}  // namespace SECANT_ISA
