// attention and relative_attention on Hopper: attention_hopper.cuh, which only 16-bit elements have.
#include "cuda/attention_hopper.cuh"

#include "cuda/attention.h"
#include "cuda/head_sizes.cuh"
#include "cuda/relative_attention.h"

namespace pyxlbert::cuda {

template <>
bool Kernels<PYXLBERT_ELEMENT>::attention_fwd_hopper(const AttentionCall& a, CudaStream stream) {
    using T = PYXLBERT_ELEMENT;
    if constexpr (sizeof(T) == 2) {
        using F = Dropped;
        if (!covers<F>(features_of(a)) || !is_hopper() || !hopper_takes<false>(a)) return false;
        if (a.head_size <= 64)
            launch_attention_fwd_hopper<HopperTile<T, 64, F, false>>(a, stream);
        else
            launch_attention_fwd_hopper<HopperTile<T, 128, F, false>>(a, stream);
        return true;
    } else {
        return false;
    }
}

template <>
bool Kernels<PYXLBERT_ELEMENT>::relative_attention_fwd_hopper(const AttentionCall& a, CudaStream stream) {
    using T = PYXLBERT_ELEMENT;
    if constexpr (sizeof(T) == 2) {
        using F = Segmented;
        if (!covers<F>(features_of(a)) || !is_hopper() || !hopper_takes<true>(a)) return false;
        launch_attention_fwd_hopper<HopperTile<T, 64, F, true>>(a, stream);
        return true;
    } else {
        return false;
    }
}

}  // namespace pyxlbert::cuda
