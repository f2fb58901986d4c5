// The second stage of sums over rows: see rows.cuh.
#include "cuda/rows.cuh"

namespace pyxlbert::cuda {
namespace {

constexpr int GROUPS = 8;  // of parts, each summed by a warp for 32 columns

template <class T>
__global__ void __launch_bounds__(32 * GROUPS)
    sum_parts(const float* __restrict__ partial, T* __restrict__ out, std::int64_t parts, int columns) {
    float* sums = reinterpret_cast<float*>(shared_memory());
    const int column = static_cast<int>(blockIdx.x) * 32 + lane_id();
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 4
        for (std::int64_t part = warp_id(); part < parts; part += GROUPS) sum += partial[part * columns + column];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp_id() == 0 && column < columns) {
        float total = 0.0f;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) total += sums[group * 32 + lane_id()];
        out[column] = from_float<T>(total);
    }
}

}  // namespace

void launch_sum_parts(const float* partial, std::int64_t parts, std::int64_t columns, const Sum& out,
                      CudaStream stream) {
    with_type(out.dtype, [&](auto kind) {
        using T = decltype(kind);
        launch<sum_parts<T>, 32 * GROUPS * sizeof(float)>(dim3(static_cast<unsigned>(ceil_div(columns, 32))),
                                                          32 * GROUPS, stream, partial, static_cast<T*>(out.data),
                                                          parts, static_cast<int>(columns));
    });
}

}  // namespace pyxlbert::cuda
