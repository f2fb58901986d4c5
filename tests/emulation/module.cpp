// The CUDA kernels compiled for the CPU, as a Python module with the functions of pyxlbert._C.cuda.
#include "cuda/bindings.h"
#include "emulation.h"

PYBIND11_MODULE(_emulated, m) {
    pyxlbert::cuda::bind(m);
    m.def("matrix_products", [] { return emulation::matrix_products.load(); });
}
