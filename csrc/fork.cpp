#include "fork.h"

#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>

namespace pyxlbert {
namespace {

using PauseAll = int (*)(omp_pause_resource_t);

// omp_pause_resource_all of the runtime in use, or null: it is younger than the runtime of older builds of torch, which
// could not load this module if it were linked.
PauseAll pause_all() {
    Dl_info runtime;
    if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &runtime) == 0) return nullptr;
    void* library = dlopen(runtime.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<PauseAll>(dlsym(library, "omp_pause_resource_all"));
}

PauseAll pause = nullptr;

// A fork copies the thread that asks for it and no other.  OpenMP's runtime is not told, so in the child the first
// parallel region, ours or torch's, would wait for workers that are not there.  Without workers at the moment of the
// fork, parent and child each start their own with their next region.  The answer is not looked at: it says no only
// inside a parallel region, where nothing can be done for a fork.
void end_workers() { pause(omp_pause_hard); }

}  // namespace

bool survive_forks() {
    if (pause != nullptr) return true;
    pause = pause_all();
    return pause != nullptr && pthread_atfork(&end_workers, nullptr, nullptr) == 0;
}

}  // namespace pyxlbert
