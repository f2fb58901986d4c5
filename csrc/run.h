// How the Python module calls a kernel: tensors, or addresses as numbers, and the version of the active instruction-set
// level.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "levels.h"
#include "tensors.h"

namespace pyxlbert {

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace pyxlbert

namespace pybind11::detail {

// A tensor or None.
template <>
class type_caster<pyxlbert::View> {
  public:
    static constexpr auto name = const_name("torch.Tensor | None");
    template <class>
    using cast_op_type = const pyxlbert::View&;

    type_caster() {}
    operator const pyxlbert::View&() const { return view_; }
    bool load(handle source, bool) {
        if (pyxlbert::view_of(source.ptr(), view_) < 0) throw error_already_set();
        return true;
    }

  private:
    pyxlbert::View view_;
};

}  // namespace pybind11::detail

// Runs the active level's version of a kernel; `vnni` and `last` are the levels whose versions run at avx2_vnni and
// amx. The GIL is released if the kernel takes `long` enough for other threads to want it: giving it up and taking it
// again costs 0.3 us.
#if defined(__x86_64__)
#define PYXLBERT_RUN_LEVELS(function, arguments, vnni, last, is_long)                                     \
    do {                                                                                                  \
        using Function = void (*)(const decltype(arguments)&);                                            \
        static constexpr Function table[] = {pyxlbert::portable::function,    pyxlbert::avx2::function,   \
                                             pyxlbert::vnni::function,        pyxlbert::avx512::function, \
                                             pyxlbert::avx512_bf16::function, pyxlbert::last::function};  \
        const Function run = table[static_cast<int>(pyxlbert::active_level())];                           \
        std::optional<pybind11::gil_scoped_release> release;                                              \
        if (is_long) release.emplace();                                                                   \
        run(arguments);                                                                                   \
    } while (false)
#else
#define PYXLBERT_RUN_LEVELS(function, arguments, vnni, last, is_long) \
    do {                                                              \
        std::optional<pybind11::gil_scoped_release> release;          \
        if (is_long) release.emplace();                               \
        pyxlbert::portable::function(arguments);                      \
    } while (false)
#endif
#define PYXLBERT_RUN_WHERE(function, arguments, last, is_long) \
    PYXLBERT_RUN_LEVELS(function, arguments, avx2, last, is_long)
#define PYXLBERT_RUN_AMX(function, arguments, last) PYXLBERT_RUN_WHERE(function, arguments, last, true)
#define PYXLBERT_RUN(function, arguments) PYXLBERT_RUN_AMX(function, arguments, avx512_bf16)
// Of kernels of packed products, the only ones whose version at avx2_vnni is not that of avx2.
#define PYXLBERT_RUN_PACKED(function, arguments) PYXLBERT_RUN_LEVELS(function, arguments, avx2_vnni, amx, true)
// Of kernels that walk over rows: 16,384 elements take a microsecond or two.
#define PYXLBERT_RUN_ROWS(function, arguments, elements) \
    PYXLBERT_RUN_WHERE(function, arguments, avx512_bf16, (elements) > 16384)
