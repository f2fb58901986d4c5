// Devices: what they are able to do, asked of the driver in each call.
#include "cuda/devices.h"

#include <sstream>

#include "cuda/device.cuh"

// -DPYXLBERT_ARCHITECTURES=80/90a/100+PTX, since nvcc would take commas for those of a list; the emulation has none.
#ifndef PYXLBERT_ARCHITECTURES
#define PYXLBERT_ARCHITECTURES
#endif
#define PYXLBERT_TEXT_OF(...) #__VA_ARGS__
#define PYXLBERT_TEXT(...) PYXLBERT_TEXT_OF(__VA_ARGS__)

namespace pyxlbert::cuda {

std::vector<std::string> built() {
    std::vector<std::string> found;
    std::istringstream names(PYXLBERT_TEXT(PYXLBERT_ARCHITECTURES));
    for (std::string name; std::getline(names, name, '/');) {
        name.erase(0, name.find_first_not_of(' '));
        found.push_back(name);
    }
    return found;
}

bool covers(const std::vector<std::string>& architectures, int major, int minor) {
    for (const std::string& name : architectures) {
        std::size_t digits = 0;
        const int number = std::stoi(name, &digits), its_major = number / 10, its_minor = number % 10;
        const char kind = digits < name.size() ? name[digits] : ' ';
        const bool intermediate = name.find("+PTX") != std::string::npos;
        const bool same = its_major == major && its_minor == minor, later = its_major == major && its_minor <= minor;
        if (kind == 'a' ? same : later || (intermediate && kind != 'f' && its_major < major)) return true;
    }
    return false;
}

#ifdef PYXLBERT_EMULATE

std::string probe(int) { return ""; }

std::size_t shared_memory(int) { return max_shared(); }

#else

namespace {

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "device");
    return value;
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

std::string probe(int device) {
    int driver = 0, runtime = 0, devices = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || cudaRuntimeGetVersion(&runtime) != cudaSuccess || driver == 0) {
        cudaGetLastError();
        return "no CUDA driver is here";
    }
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess) cudaGetLastError();
    if (error == cudaErrorInsufficientDriver)
        return "the driver is one for CUDA " + version(driver) + ", older than the CUDA " + version(runtime) +
               " that the module was built with";
    if (error != cudaSuccess) return std::string("the driver says ") + cudaGetErrorString(error);
    if (device < 0 || device >= devices) return "there is no CUDA device " + std::to_string(device);
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    if (!covers(built(), major, minor)) {
        std::string names;
        for (const std::string& name : built()) names += (names.empty() ? "" : ", ") + name;
        return "the module was built for " + names + " and not for this device of compute capability " +
               std::to_string(major) + "." + std::to_string(minor);
    }
    const std::size_t shared = shared_memory(device);
    if (shared < MIN_SHARED)
        return "a block has " + std::to_string(shared / 1024) + " KiB of shared memory on this device, and needs " +
               std::to_string(MIN_SHARED / 1024);
    return "";
}

std::size_t shared_memory(int device) {
    return static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

#endif

}  // namespace pyxlbert::cuda
