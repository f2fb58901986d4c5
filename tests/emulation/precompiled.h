// What build.py compiles once for all planted bugs: the headers of CUDA and C++ take longer than a kernel.
#include "emulation.h"
