// Backward of relative_attention and two_stream_attention: attention_bwd.cuh and relative_bwd.cuh.
#include "cuda/head_sizes.cuh"
#include "cuda/relative_attention.h"
#include "cuda/relative_bwd.cuh"

namespace pyxlbert::cuda {

template <>
void Kernels<PYXLBERT_ELEMENT>::relative_attention_bwd(const AttentionCall& a, CudaStream stream) {
    with_head_size<false>(a.head_size, [&](auto size) {
        constexpr int D = decltype(size)::value;
        with_tiles<TILES_DIFFER<PYXLBERT_ELEMENT, D, true>>([&](auto small) {
            constexpr bool SMALL = decltype(small)::value;
            SetsOfRelativeAttention::choose(
                a, [&](auto set) { launch_relative_bwd_of<PYXLBERT_ELEMENT, D, decltype(set), SMALL>(a, stream); });
        });
    });
}

}  // namespace pyxlbert::cuda
