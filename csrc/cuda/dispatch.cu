// The launchers of the attention ops: which element type's kernels run.
#include "cuda/attention.h"
#include "cuda/attention_bwd.cuh"
#include "cuda/head_sizes.cuh"
#include "cuda/relative_attention.h"
#include "cuda/two_stream_attention.h"

namespace pyxlbert::cuda {

void launch_attention_fwd(const AttentionCall& a, CudaStream stream) {
    with_type(a.dtype, [&](auto kind) { Kernels<decltype(kind)>::attention_fwd(a, stream); });
}
void launch_attention_bwd(const AttentionCall& a, CudaStream stream) {
    with_type(a.dtype, [&](auto kind) { Kernels<decltype(kind)>::attention_bwd(a, stream); });
}
void launch_relative_attention_fwd(const AttentionCall& a, CudaStream stream) {
    with_type(a.dtype, [&](auto kind) { Kernels<decltype(kind)>::relative_attention_fwd(a, stream); });
}
void launch_relative_attention_bwd(const AttentionCall& a, CudaStream stream) {
    with_type(a.dtype, [&](auto kind) { Kernels<decltype(kind)>::relative_attention_bwd(a, stream); });
}
void launch_two_stream_attention_fwd(const AttentionCall& a, CudaStream stream) {
    with_type(a.dtype, [&](auto kind) { Kernels<decltype(kind)>::two_stream_attention_fwd(a, stream); });
}

std::int64_t windows_of_parts(DType dtype, int head_size, std::int64_t positions, std::size_t shared) {
    std::int64_t windows = 0;
    with_type(dtype, [&](auto kind) {
        with_head_size<false>(head_size, [&](auto size) {
            using T = decltype(kind);
            constexpr int D = decltype(size)::value;
            const int large = BackwardTileOf<T, D, Plain, true, false>::Tile::WINDOW;
            const int small = BackwardTileOf<T, D, Plain, true, TILES_DIFFER<T, D, true>>::Tile::WINDOW;
            windows = ceil_div(positions, shared < MAX_SHARED ? small : large);
        });
    });
    return windows;
}

}  // namespace pyxlbert::cuda
