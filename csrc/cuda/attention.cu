// attention: attention_fwd.cuh without a table of positions; attention_bwd.cu is its other half.
#include "cuda/attention.h"

#include "cuda/attention_fwd.cuh"
#include "cuda/head_sizes.cuh"

namespace pyxlbert::cuda {

template <>
void Kernels<PYXLBERT_ELEMENT>::attention_fwd_join(const AttentionCall& a, CudaStream stream) {
    const std::int64_t rows = static_cast<std::int64_t>(a.batch) * a.heads * a.stream[0].rows;
    launch<join_parts<PYXLBERT_ELEMENT>, 0>(grid_of(ceil_div<std::int64_t>(rows, JOIN_WARPS)), 32 * JOIN_WARPS, stream,
                                            a);
}

template <>
void Kernels<PYXLBERT_ELEMENT>::attention_fwd(const AttentionCall& a, CudaStream stream) {
    if (attention_fwd_hopper(a, stream)) return;
    with_head_size<true>(a.head_size, [&](auto size) {
        launch_attention_fwd_of<SetsOfAttention, PYXLBERT_ELEMENT, decltype(size)::value, false, 1, false>(a, stream);
    });
    if (a.partial != nullptr) attention_fwd_join(a, stream);
}

}  // namespace pyxlbert::cuda
