// attention: attention_fwd.cuh without a table of positions; attention_bwd.cu is its other half.
#include "cuda/attention.h"

#include "cuda/attention_fwd.cuh"
#include "cuda/head_sizes.cuh"

namespace pyxlbert::cuda {

template <>
void Kernels<PYXLBERT_ELEMENT>::attention_fwd(const AttentionCall& a, CudaStream stream) {
    if (attention_fwd_hopper(a, stream)) return;
    with_head_size<true>(a.head_size, [&](auto size) {
        launch_attention_fwd_of<PYXLBERT_ELEMENT, decltype(size)::value, false, 1, false>(a, has_extras(a), stream);
    });
}

}  // namespace pyxlbert::cuda
