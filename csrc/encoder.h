// Packed weights and stacks of encoder layers as Python objects.
#pragma once
#include <pybind11/pybind11.h>

namespace pyxlbert {

// After AttentionCall, RelativeCall and Stream.
void bind_encoder(pybind11::module_& cpu);

}  // namespace pyxlbert
