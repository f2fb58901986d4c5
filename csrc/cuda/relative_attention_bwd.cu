// Backward of relative_attention and two_stream_attention: a file of its own, so that two compilers share the work.
#include "cuda/head_sizes.cuh"
#include "cuda/relative_attention.h"
#include "cuda/relative_bwd.cuh"

namespace pyxlbert::cuda {

void launch_relative_attention_bwd(const Attention& a, Stream stream) {
    with_head_size(a, [&](auto kind, auto size) {
        using T = decltype(kind);
        constexpr int D = decltype(size)::value;
        if (has_relative_extras(a))
            launch_relative_bwd_of<T, D, true>(a, stream);
        else
            launch_relative_bwd_of<T, D, false>(a, stream);
    });
}

std::int64_t windows_of_parts(const Attention& a, int stream) {
    std::int64_t windows = 0;
    with_head_size(a, [&](auto kind, auto size) {
        using C = WalkTile<decltype(kind), decltype(size)::value, true, true, 1, 1>;
        windows = windows_of(a, a.stream[stream], C::WINDOW);
    });
    return windows;
}

}  // namespace pyxlbert::cuda
