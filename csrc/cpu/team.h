// Threads of a call.
#pragma once
#include <omp.h>

#include <cstdint>

#include "../types.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// Calls work(thread, threads) in every thread of a team.  A team of one is the caller itself: a region of OpenMP takes
// 0.3 us, as long as a small kernel.  So `work` must not ask OpenMP which thread it is, and has no `omp for`.
template <class F>
PYXLBERT_INLINE void in_team(int threads, const F& work) {
    if (threads == 1) {
        work(0, 1);
        return;
    }
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
}

// A lambda that in_team calls, between its parameters and its body: one copy for both of the places above.
#define PYXLBERT_WORK __attribute__((noinline))

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
