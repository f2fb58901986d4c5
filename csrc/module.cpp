// The one Python module: addresses, sizes and strides in, nothing out.  Shapes and types have been
// checked in Python before a function of this file is called.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "cpu/bias_gelu.h"
#include "cpu/layer_norm.h"
#include "levels.h"
#include "workspace.h"

namespace py = pybind11;
using pyxlbert::DType;
using Address = std::uintptr_t;

namespace {

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Runs the active level's version of a kernel with the GIL released.
#if defined(__x86_64__)
#define PYXLBERT_RUN(function, arguments)                                                                  \
    do {                                                                                                   \
        using Function = void (*)(const decltype(arguments)&);                                             \
        static constexpr Function table[] = {pyxlbert::portable::function, pyxlbert::avx2::function,       \
                                             pyxlbert::avx512::function, pyxlbert::avx512_bf16::function}; \
        const Function run = table[static_cast<int>(pyxlbert::active_level())];                            \
        py::gil_scoped_release release;                                                                    \
        run(arguments);                                                                                    \
    } while (false)
#else
#define PYXLBERT_RUN(function, arguments)        \
    do {                                         \
        py::gil_scoped_release release;          \
        pyxlbert::portable::function(arguments); \
    } while (false)
#endif

void layer_norm_fwd(Address x, Address weight, Address bias, Address y, Address mean, Address rstd, std::int64_t rows,
                    std::int64_t columns, std::int64_t x_stride, float eps, int dtype, int weight_dtype, int bias_dtype,
                    int threads) {
    pyxlbert::LayerNormFwd arguments{
        pointer(x), pointer(weight), pointer(bias), pointer(y),   pointer<float>(mean), pointer<float>(rstd), rows,
        columns,    x_stride,        eps,           DType(dtype), DType(weight_dtype),  DType(bias_dtype),    threads};
    PYXLBERT_RUN(layer_norm_fwd, arguments);
}

void layer_norm_bwd(Address dy, Address x, Address weight, Address mean, Address rstd, Address dx, Address dweight,
                    Address dbias, std::int64_t rows, std::int64_t columns, std::int64_t dy_stride,
                    std::int64_t x_stride, int dtype, int weight_dtype, int bias_dtype, int threads) {
    pyxlbert::LayerNormBwd arguments{pointer(dy),
                                     pointer(x),
                                     pointer(weight),
                                     pointer<const float>(mean),
                                     pointer<const float>(rstd),
                                     pointer(dx),
                                     pointer(dweight),
                                     pointer(dbias),
                                     rows,
                                     columns,
                                     dy_stride,
                                     x_stride,
                                     DType(dtype),
                                     DType(weight_dtype),
                                     DType(bias_dtype),
                                     threads};
    PYXLBERT_RUN(layer_norm_bwd, arguments);
}

void bias_gelu_fwd(Address x, Address bias, Address y, std::int64_t rows, std::int64_t columns, std::int64_t x_stride,
                   int dtype, int bias_dtype, bool tanh, int threads) {
    pyxlbert::BiasGeluFwd arguments{pointer(x), pointer(bias), pointer(y),        rows, columns,
                                    x_stride,   DType(dtype),  DType(bias_dtype), tanh, threads};
    PYXLBERT_RUN(bias_gelu_fwd, arguments);
}

void bias_gelu_bwd(Address dy, Address x, Address bias, Address dx, Address dbias, std::int64_t rows,
                   std::int64_t columns, std::int64_t dy_stride, std::int64_t x_stride, int dtype, int bias_dtype,
                   bool tanh, int threads) {
    pyxlbert::BiasGeluBwd arguments{pointer(dy), pointer(x), pointer(bias), pointer(dx),  pointer(dbias),    rows,
                                    columns,     dy_stride,  x_stride,      DType(dtype), DType(bias_dtype), tanh,
                                    threads};
    PYXLBERT_RUN(bias_gelu_bwd, arguments);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of pyxlbert; private: use pyxlbert.ops.";

    m.def("level", [] { return pyxlbert::level_name(pyxlbert::active_level()); });
    m.def("levels", [] {
        std::vector<std::string> names;
        for (pyxlbert::Level level : pyxlbert::supported_levels()) names.emplace_back(pyxlbert::level_name(level));
        return names;
    });
    m.def("set_level", &pyxlbert::set_level);
    m.def("workspace_bytes", &pyxlbert::workspace_bytes);
    m.def("release_workspace", &pyxlbert::release_workspace);

    py::module_ cpu = m.def_submodule("cpu");
    cpu.def("bias_gelu_fwd", &bias_gelu_fwd);
    cpu.def("bias_gelu_bwd", &bias_gelu_bwd);
    cpu.def("layer_norm_fwd", &layer_norm_fwd);
    cpu.def("layer_norm_bwd", &layer_norm_bwd);
}
