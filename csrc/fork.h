// Forks of a process whose threads have worked.
#pragma once

namespace pyxlbert {

// From now on a forked child can run parallel regions of OpenMP, with as many threads as its parent; false where the
// runtime cannot end its workers.
bool survive_forks();

}  // namespace pyxlbert
