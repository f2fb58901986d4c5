// relative_attention: attention_fwd.cuh with a table of positions; relative_attention_bwd.cu is its other half.
#include "cuda/relative_attention.h"

#include "cuda/attention_fwd.cuh"
#include "cuda/head_sizes.cuh"

namespace pyxlbert::cuda {

template <>
void Kernels<PYXLBERT_ELEMENT>::relative_attention_fwd(const AttentionCall& a, CudaStream stream) {
    if (relative_attention_fwd_hopper(a, stream)) return;
    with_head_size<false>(a.head_size, [&](auto size) {
        using T = PYXLBERT_ELEMENT;
        constexpr int D = decltype(size)::value;
        with_tiles<TILES_DIFFER<T, D, true>>([&](auto small) {
            launch_attention_fwd_of<SetsOfRelativeAttention, T, D, true, 1, decltype(small)::value>(a, stream);
        });
    });
    if (a.partial != nullptr) attention_fwd_join(a, stream);
}

}  // namespace pyxlbert::cuda
