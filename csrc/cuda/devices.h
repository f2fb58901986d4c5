// What the kernels need of a device, and what the module was built for.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace pyxlbert::cuda {

// The architectures that the module has code for, as csrc/nvcc.py names them: "80", "90a", "100+PTX".
std::vector<std::string> built();

// Whether code for one of these runs on a device of this capability: machine code does on its own and on later minor
// numbers of the same major one ("90a" on its own alone, "100f" on its major number's), intermediate code on all later
// ones.
bool covers(const std::vector<std::string>& architectures, int major, int minor);

// Why the kernels cannot run on a device, or nothing.
std::string probe(int device);

// Bytes of shared memory that a block may have on a device.
std::size_t shared_memory(int device);

}  // namespace pyxlbert::cuda
