// Threads: OpenMP when the build has it (the runtime is the one that torch loaded), else the calling thread alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
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

// Leaves a thread whose team has lost a member: what that one threw is what the caller gets.
struct Abandoned {};

// Meets `size` threads. It spins for about as long as a pass over a small history takes and then yields: the barrier of
// libgomp spins for some 20 ms before it sleeps, which a machine with other work to do pays in full at every pass.
class Barrier {
 public:
  void wait(int size) {
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (broken_.load(std::memory_order_acquire)) throw Abandoned{};
      if (spins < 2000) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }
  // A thread will not come: those that wait, now or later, are let go.
  void abandon() { broken_.store(true, std::memory_order_release); }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::atomic<int> arrived_{0}, turn_{0};
  std::atomic<bool> broken_{false};
};

// A team runs one function on every thread, work(team); a team of one is the calling thread alone.
struct Team {
  int rank;
  int size;
  Barrier* meet;
  void barrier() const {
    if (size > 1) meet->wait(size);
  }
  // The share of [0, n) that this rank owns, in whole grains.
  std::pair<int64_t, int64_t> share(int64_t n, int64_t grain) const {
    const int64_t grains = (n + grain - 1) / grain;
    const int64_t a = grains * rank / size * grain, b = grains * (rank + 1) / size * grain;
    return {a < n ? a : n, b < n ? b : n};
  }
};

// What a thread throws (out of memory, say) ends the work of the team and is thrown to the caller: an exception that
// left an OpenMP region would end the process.
template <class F>
void run_team(int threads, const F& work) {
#ifdef _OPENMP
  if (threads > 1) {
    Barrier meet;
    std::atomic_flag taken = ATOMIC_FLAG_INIT;
    std::exception_ptr thrown;
#pragma omp parallel num_threads(threads)
    {
      try {
        work(Team{omp_get_thread_num(), omp_get_num_threads(), &meet});
      } catch (const Abandoned&) {
      } catch (...) {
        if (!taken.test_and_set()) thrown = std::current_exception();
        meet.abandon();
      }
    }
    if (thrown) std::rethrow_exception(thrown);
    return;
  }
#endif
  (void)threads;
  work(Team{0, 1, nullptr});
}

}  // namespace secant
