// Threads: OpenMP when the build has it (the runtime is the one that torch loaded), else the calling thread alone.
#pragma once

#include <cstdint>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace secant {

inline int max_threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// A team runs one function on every thread: work(team, rank). Serial stands for the calling thread alone.
struct Team {
  int rank;
  int size;
  void barrier() const {
#ifdef _OPENMP
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
  // The share of [0, n) that this rank owns, in whole grains.
  std::pair<int64_t, int64_t> share(int64_t n, int64_t grain) const {
    const int64_t grains = (n + grain - 1) / grain;
    const int64_t a = grains * rank / size * grain, b = grains * (rank + 1) / size * grain;
    return {a < n ? a : n, b < n ? b : n};
  }
};

template <class F>
void run_team(int threads, const F& work) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  (void)threads;
  work(Team{0, 1});
}

}  // namespace secant
