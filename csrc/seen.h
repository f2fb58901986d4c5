// What tells whether something still is as it was found: weights of which there are copies, and what dictionaries hold.
//
// It is asked at every call of a model, of a hundred tensors and a thousand attributes, where Python itself would take
// longer than the layers of a short text.
#pragma once
#include <pybind11/pybind11.h>

namespace pyxlbert {

// Adds to the module:
//
// Seen(runs of (address, bytes, lines)): a digest of so many lines of each run, spread over it; 0: of the whole run.
//     `unchanged()` is whether it still is that `digest`; the memory must be there.
//
// layouts(list of tensors): a number of where each lies, with its shape and strides.
//
// held(dictionaries, keys, values): three lists; whether each dictionary has the very value under its key, or for None
//     none.
void bind_seen(pybind11::module_& cpu);

}  // namespace pyxlbert
