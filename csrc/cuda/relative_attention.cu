// relative_attention: attention_fwd.cuh, attention_bwd.cuh and relative_bwd.cuh with a table of positions.
#include "cuda/relative_attention.h"

#include "cuda/attention_fwd.cuh"
#include "cuda/head_sizes.cuh"

namespace pyxlbert::cuda {

void launch_relative_attention_fwd(const Attention& a, Stream stream) {
    with_head_size(a, [&](auto kind, auto size) {
        launch_attention_fwd_of<decltype(kind), decltype(size)::value, true, 1>(a, has_relative_extras(a), stream);
    });
}

}  // namespace pyxlbert::cuda
