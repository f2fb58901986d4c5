// two_stream_attention: one launch for both streams.  A block takes a window of positions, and of each stream the
// queries that stand there: they meet the same tiles of keys and values, and the same band of the table.
#include "cuda/two_stream_attention.h"

#include "cuda/attention_fwd.cuh"
#include "cuda/head_sizes.cuh"
#include "cuda/relative_attention.h"

namespace pyxlbert::cuda {

template <>
void Kernels<PYXLBERT_ELEMENT>::two_stream_attention_fwd(const Attention& a, Stream stream) {
    with_head_size<false>(a.head_size, [&](auto size) {
        launch_attention_fwd_of<PYXLBERT_ELEMENT, decltype(size)::value, true, 2>(a, has_relative_extras(a), stream);
    });
}

}  // namespace pyxlbert::cuda
