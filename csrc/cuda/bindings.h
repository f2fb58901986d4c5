// What the module shows of the CUDA kernels.
#pragma once
#include <pybind11/pybind11.h>

namespace pyxlbert::cuda {

// Adds the launchers: addresses of device memory, sizes and strides in elements, the stream last.  They release the
// GIL, do not wait for the device, and raise RuntimeError where a launch fails.
void bind(pybind11::module_& module);

}  // namespace pyxlbert::cuda
