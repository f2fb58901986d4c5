// attention on Hopper: attention_hopper.cuh, which only 16-bit elements have.
#include "cuda/attention_hopper.cuh"

#include "cuda/attention.h"
#include "cuda/head_sizes.cuh"

namespace pyxlbert::cuda {

template <>
bool Kernels<PYXLBERT_ELEMENT>::attention_fwd_hopper(const Attention& a, Stream stream) {
    using T = PYXLBERT_ELEMENT;
    if constexpr (sizeof(T) == 2) {
        if (has_extras(a) || !is_hopper() || !hopper_takes(a)) return false;
        if (a.head_size <= 64)
            launch_attention_fwd_hopper<T, 64>(a, stream);
        else
            launch_attention_fwd_hopper<T, 128>(a, stream);
        return true;
    } else {
        return false;
    }
}

}  // namespace pyxlbert::cuda
