// The table of the `blocks` kernels of one instruction set. The contract is in reference.py, the choice of algorithm by
// size in README.md.
#include "cpu.h"

#include "cpu_ops.h"
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

}  // namespace

extern const secant::BlocksCpu blocks_table;
const secant::BlocksCpu blocks_table = {{inv<float>, inv<double>},
                                        {solve<float>, solve<double>},
                                        {blocks::eigh<float>, blocks::eigh<double>},
                                        {blocks::function<float>, blocks::function<double>}};

}  // namespace SECANT_ISA
