// The second stage of sums over rows: see rows.cuh.
#include "cuda/rows.cuh"

namespace pyxlbert::cuda {
namespace {

// A block adds up 16 columns, which are 64 bytes of a part: its half warps take every so manieth part each, and their
// sums are added up in order.
constexpr int COLUMNS = 16, GROUPS = 16;

__global__ void __launch_bounds__(COLUMNS* GROUPS)
    sum_parts(const __grid_constant__ PartSums sums, std::int64_t parts, int columns) {
    float* shares = reinterpret_cast<float*>(shared_memory());
    const int blocks = ceil_div(columns, COLUMNS);
    const PartSum& sum = sums.sums[static_cast<int>(blockIdx.x) / blocks];
    const int place = static_cast<int>(threadIdx.x) % COLUMNS, group = static_cast<int>(threadIdx.x) / COLUMNS;
    const int column = static_cast<int>(blockIdx.x) % blocks * COLUMNS + place;
    float share = 0.0f;
    if (column < columns) {
#pragma unroll 4
        for (std::int64_t part = group; part < parts; part += GROUPS) share += sum.partial[part * columns + column];
    }
    shares[threadIdx.x] = share;
    __syncthreads();
    if (group == 0 && column < columns) {
        float total[1] = {0.0f};
#pragma unroll
        for (int other = 0; other < GROUPS; ++other) total[0] += shares[other * COLUMNS + place];
        store_any<1>(sum.out.data, sum.out.dtype, column, total);
    }
}

}  // namespace

void launch_sum_parts(const PartSums& sums, std::int64_t parts, std::int64_t columns, CudaStream stream) {
    if (sums.count == 0) return;
    launch<sum_parts, COLUMNS * GROUPS * sizeof(float)>(grid_of(ceil_div(columns, COLUMNS) * sums.count),
                                                        COLUMNS * GROUPS, stream, sums, parts,
                                                        static_cast<int>(columns));
}

}  // namespace pyxlbert::cuda
