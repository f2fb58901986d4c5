// two_stream_attention: one launch for both streams where a block has room for them.  It takes a window of positions,
// and of each stream the queries that stand there: they meet the same tiles of keys and values, and the same band of
// the table.
#include "cuda/two_stream_attention.h"

#include "cuda/attention_fwd.cuh"
#include "cuda/head_sizes.cuh"
#include "cuda/relative_attention.h"

namespace pyxlbert::cuda {

template <>
void Kernels<PYXLBERT_ELEMENT>::two_stream_attention_fwd(const AttentionCall& a, CudaStream stream) {
    using T = PYXLBERT_ELEMENT;
    with_head_size<false>(a.head_size, [&](auto size) {
        constexpr int D = decltype(size)::value;
        with_tiles<TILES_DIFFER<T, D, true>>([&](auto small) {
            // Sums of two streams' long rows of float32 would not fit the registers.
            if constexpr (decltype(small)::value || (sizeof(T) == 4 && D > 64))
                for_each_stream(a, [&](const AttentionCall& one) { relative_attention_fwd(one, stream); });
            else
                launch_attention_fwd_of<SetsOfTwoStreamAttention, T, D, true, 2, false>(a, stream);
        });
    });
}

}  // namespace pyxlbert::cuda
