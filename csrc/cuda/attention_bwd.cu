// Backward of attention: attention_bwd.cuh without a table of positions, and the gradient of a bias.
#include "cuda/attention_bwd.cuh"

#include "cuda/attention.h"
#include "cuda/head_sizes.cuh"
#include "cuda/sums.cuh"

namespace pyxlbert::cuda {
namespace {

// A tile of the bias's gradient: the scores' gradients of all tiles that it was added to, over sequences, heads,
// queries and keys, one by one, a warp for 16 by BN of each.
template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) attention_bwd_bias(const __grid_constant__ AttentionCall a) {
    using T = typename C::T;
    using F = typename C::F;
    constexpr int D = C::D, N = C::BN / 8;
    const Stream& stream = a.stream[0];
    unsigned char* memory = shared_memory();
    Masks* masks = reinterpret_cast<Masks*>(memory);
    Place* places = reinterpret_cast<Place*>(memory + 2 * MASKS_SIZE);
    T* keys = reinterpret_cast<T*>(memory + C::PLACES);
    T* values = keys + C::KEYS;
    T* queries = values + C::KEYS;
    T* douts = queries + C::QUERIES;
    const int size_i = static_cast<int>(a.dbias_shape[2]), size_j = static_cast<int>(a.dbias_shape[3]);
    const int across = ceil_div(size_j, C::BK), down = ceil_div(size_i, C::BM);
    const int at_j = static_cast<int>(blockIdx.x) % across * C::BK;
    const int at_i = static_cast<int>(blockIdx.x) / across % down * C::BM;
    const int plane = static_cast<int>(blockIdx.x) / across / down;
    const int size_h = static_cast<int>(a.dbias_shape[1]), at_b = plane / size_h, at_h = plane % size_h;
    // How many of each there are to add up: 1 where the bias has that dimension.
    const int sequences = a.dbias_shape[0] == a.batch ? 1 : a.batch, heads = size_h == a.heads ? 1 : a.heads;
    const int tiles_i = size_i == a.queries ? 1 : ceil_div(a.queries, C::BM);
    const int tiles_j = size_j == a.keys ? 1 : ceil_div(a.keys, C::BK);
    const int row = warp_id() % C::QW * 16, column = warp_id() / C::QW * C::BN, g = lane_id() / 4,
              t2 = lane_id() % 4 * 2;
    float sum[N][4], lost[N][4];
    clear(sum);
    clear(lost);
    for (std::int64_t step = 0; step < static_cast<std::int64_t>(sequences) * heads * tiles_i * tiles_j; ++step) {
        const int first_j = at_j + static_cast<int>(step % tiles_j) * C::BK;
        std::int64_t left = step / tiles_j;
        const int first_i = at_i + static_cast<int>(left % tiles_i) * C::BM;
        left /= tiles_i;
        const int h = at_h + static_cast<int>(left % heads), b = at_b + static_cast<int>(left / heads);
        const Sequence s = sequence_of(a, b);
        if (threadIdx.x == 0) find_masks<F>(a, stream, s, b, h, *masks);
        find_places<F, C::RELATIVE, C::BM, C::THREADS>(a, stream, s, b, first_i, 0, places);
        find_statistics<C::BM, C::THREADS>(a, stream, s, b, h, places);
        __syncthreads();
        load_rows<T, D, C::BK, C::THREADS>(keys, plane_of<T>(a.key, b, h, 0), a.key.row, first_j, s.keys, a.head_size,
                                           masks->key_rank);
        load_rows<T, D, C::BK, C::THREADS>(values, plane_of<T>(a.value, b, h, 0), a.value.row, first_j, s.keys,
                                           a.head_size, masks->key_rank);
        load_places<T, D, C::BM, C::THREADS>(queries, plane_of<T>(stream.query, b, h, 0), stream.query.row, places,
                                             a.head_size, false);
        load_places<T, D, C::BM, C::THREADS>(douts, plane_of<T>(stream.dout, b, h, 0), stream.dout.row, places,
                                             a.head_size, true);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        const Place &upper = places[row + g], &lower = places[row + g + 8];
        const int from = first_j + column + t2, first[2] = {from, from};
        std::uint32_t seen;
        const Tile kind = tile_of<F, false, N>(seen, *masks, upper, lower, first);
        if (kind != Tile::EMPTY) {
            float c[1][N][4], dp[1][N][4];
            clear(c[0]);
            clear(dp[0]);
            multiply_rows<T, D>(c, queries + row * LD<D>, 0, keys + column * LD<D>);
            multiply_rows<T, D>(dp, douts + row * LD<D>, 0, values + column * LD<D>);
            scores_of<T, F, false, N>(c[0], kind, seen, *masks, upper, lower, first);
            const bool drops = masks->drops;
            const std::uint32_t kept =
                drops ? kept_bits<N>(masks->draws, upper.number, lower.number, first_j + column) : ~0u;
            gradients_of_scores<N, true>(c[0], dp[0], upper, lower, kept, drops ? a.dropout.scale : 1.0f);
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) add_exactly(sum[n][e], lost[n][e], dp[0][n][e]);
        }
        __syncthreads();
    }
    // A dimension of one gets the sum over it, in order.
    float* tile = reinterpret_cast<float*>(memory);
    constexpr int TILE_LD = C::BK + 1;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) tile[(row + g + e / 2 * 8) * TILE_LD + column + n * 8 + t2 + (e & 1)] = sum[n][e];
    __syncthreads();
    const int rows = size_i == 1 && a.queries != 1 ? 1 : C::BM, columns = size_j == 1 && a.keys != 1 ? 1 : C::BK;
    for (int n = static_cast<int>(threadIdx.x); n < rows * columns; n += C::THREADS) {
        const int i = n / columns, j = n % columns;
        if (at_i + i >= size_i || at_j + j >= size_j) continue;
        float total[1] = {0.0f}, rest = 0.0f;
        for (int k = i; k < (rows == 1 ? C::BM : i + 1); ++k)
            for (int l = j; l < (columns == 1 ? C::BK : j + 1); ++l) add_exactly(total[0], rest, tile[k * TILE_LD + l]);
        const std::int64_t at =
            ((static_cast<std::int64_t>(at_b) * size_h + at_h) * size_i + at_i + i) * size_j + at_j + j;
        store_any<1>(a.dbias, a.bias_dtype, at, total);
    }
}

template <class C>
constexpr std::size_t shared_of_bias() {
    constexpr std::size_t tiles = C::PLACES + (2 * C::KEYS + 2 * C::QUERIES) * sizeof(typename C::T);
    constexpr std::size_t sums = C::BM * (C::BK + 1) * sizeof(float);
    return tiles > sums ? tiles : sums;
}

}  // namespace

template <>
void Kernels<PYXLBERT_ELEMENT>::attention_bwd(const AttentionCall& a, CudaStream stream) {
    with_head_size<true>(a.head_size, [&](auto size) {
        using T = PYXLBERT_ELEMENT;
        constexpr int D = decltype(size)::value;
        SetsOfAttention::choose(
            a, [&](auto set) { launch_attention_bwd_of<T, D, decltype(set), false, false>(a, stream); });
        if (a.dbias != nullptr) {
            using C = SumTile<T, D, SetsOfAttention::Largest, false, false>;
            static_assert(shared_of_bias<C>() <= MIN_SHARED);
            const std::int64_t tiles = ceil_div(a.dbias_shape[2], C::BM) * ceil_div(a.dbias_shape[3], C::BK);
            launch<attention_bwd_bias<C>, shared_of_bias<C>()>(grid_of(tiles * a.dbias_shape[0] * a.dbias_shape[1]),
                                                               C::THREADS, stream, a);
        }
    });
}

}  // namespace pyxlbert::cuda
