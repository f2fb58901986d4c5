// How the Python module calls a kernel: addresses as numbers, and the version of the active instruction-set level.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "levels.h"

namespace pyxlbert {

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace pyxlbert

// Runs the active level's version of a kernel with the GIL released; `last` is the level whose version runs at amx.
#if defined(__x86_64__)
#define PYXLBERT_RUN_AMX(function, arguments, last)                                                       \
    do {                                                                                                  \
        using Function = void (*)(const decltype(arguments)&);                                            \
        static constexpr Function table[] = {pyxlbert::portable::function, pyxlbert::avx2::function,      \
                                             pyxlbert::avx512::function, pyxlbert::avx512_bf16::function, \
                                             pyxlbert::last::function};                                   \
        const Function run = table[static_cast<int>(pyxlbert::active_level())];                           \
        pybind11::gil_scoped_release release;                                                             \
        run(arguments);                                                                                   \
    } while (false)
#else
#define PYXLBERT_RUN_AMX(function, arguments, last) \
    do {                                            \
        pybind11::gil_scoped_release release;       \
        pyxlbert::portable::function(arguments);    \
    } while (false)
#endif
#define PYXLBERT_RUN(function, arguments) PYXLBERT_RUN_AMX(function, arguments, avx512_bf16)
