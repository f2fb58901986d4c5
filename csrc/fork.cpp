#include "fork.h"

#include <omp.h>
#include <pthread.h>

namespace pyxlbert {
namespace {

// A fork copies the thread that asks for it and no other.  OpenMP's runtime is not told, so in the child the first
// parallel region, ours or torch's, would wait for workers that are not there.  Without workers at the moment of the
// fork, parent and child each start their own with their next region.  The answer is not looked at: it says no only
// inside of a parallel region, where a fork can not be helped.
void end_workers() { omp_pause_resource_all(omp_pause_hard); }

}  // namespace

void survive_forks() {
    static const int registered = pthread_atfork(&end_workers, nullptr, nullptr);
    static_cast<void>(registered);
}

}  // namespace pyxlbert
