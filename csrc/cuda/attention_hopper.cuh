// The forward kernel of attention on Hopper, for 16-bit elements and scores that need lengths and causality at most.
//
//     producer, one thread:        asks the copy engine for tiles of keys and values, STAGES ahead
//     consumers, two of 4 warps:   64 queries each;  s = q k^T [64, BN],  running softmax,  o += p v [64, D]
//
// Tiles lie in shared memory in blocks of 64 columns, swizzled as wgmma reads them.  A tile's barrier `full` is passed
// when all of its bytes have come, and `empty` when the consumers have read it.  While four warps compute weights the
// other four multiply: nothing but the barriers keeps them together.
//
// What lies behind a sequence's keys comes with the copies too: it is masked among the scores, and zeroed among the
// values, where zero times NaN would be NaN.
//
// Source: Shah et al., "FlashAttention-3", https://arxiv.org/abs/2407.08608, section 3.1, without its overlap of one
// tile's softmax with the next one's product.
#pragma once
#include "cuda/hopper.cuh"
#include "cuda/scores.cuh"
#include "cuda/tiles.cuh"

namespace pyxlbert::cuda {

template <class T_, int D_>
struct HopperTile {
    using T = T_;
    static constexpr int D = D_, BN = 128, CONSUMERS = 2, STAGES = 2;
    static constexpr int WINDOW = 64 * CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
    static constexpr int BLOCKS = D / 64;                              // of 64 columns
    static constexpr int QUERIES = WINDOW * D * 2, KEYS = BN * D * 2;  // bytes
    static constexpr std::size_t SHARED = QUERIES + 2 * STAGES * KEYS + (1 + 4 * STAGES) * sizeof(std::uint64_t);
};

struct HopperMaps {
    TensorMap query, key, value;
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1)
    attention_fwd_hopper(const __grid_constant__ Attention a, const __grid_constant__ HopperMaps maps) {
#ifdef PYXLBERT_SM90A
    using T = typename C::T;
    constexpr int D = C::D, N = C::BN / 8;
    const QueryStream& stream = a.stream[0];
    unsigned char* queries = shared_memory();
    unsigned char* keys = queries + C::QUERIES;
    unsigned char* values = keys + C::STAGES * C::KEYS;
    std::uint64_t* query_full = reinterpret_cast<std::uint64_t*>(values + C::STAGES * C::KEYS);
    std::uint64_t *key_full = query_full + 1, *key_empty = key_full + C::STAGES;
    std::uint64_t *value_full = key_empty + C::STAGES, *value_empty = value_full + C::STAGES;

    const int windows = ceil_div(stream.rows, C::WINDOW);
    const int plane = static_cast<int>(blockIdx.x) / windows, b = plane / a.heads, h = plane % a.heads;
    const int window = static_cast<int>(blockIdx.x) % windows;
    const int first = (a.causal ? windows - 1 - window : window) * C::WINDOW;
    const Sequence s = sequence_of(a, b);
    if (first >= min(stream.rows, s.queries)) return;
    const int high = a.causal ? min(s.keys, max(first + C::WINDOW + s.shift, 0)) : s.keys;
    const int tiles = ceil_div(high, C::BN);
    check_shared_memory();
    if (threadIdx.x == 0) {
        mbarrier_init(query_full, 1);
        for (int n = 0; n < C::STAGES; ++n) {
            mbarrier_init(key_full + n, 1);
            mbarrier_init(value_full + n, 1);
            // A warp arrives for itself: it knows of no other that has finished.
            mbarrier_init(key_empty + n, C::CONSUMERS * 4);
            mbarrier_init(value_empty + n, C::CONSUMERS * 4);
        }
        mbarrier_init_done();
    }
    __syncthreads();

    const int group = static_cast<int>(threadIdx.x) / 128;
    if (group == C::CONSUMERS) {
        give_registers<32>();
        if (threadIdx.x % 128 != 0) return;
        // Packed rows are those of one long sequence.
        const int row = static_cast<int>(s.start), batch = a.cu_seqlens == nullptr ? b : 0;
        auto ask = [&](unsigned char* to, const TensorMap* map, std::uint64_t* full, int from, int rows) {
            mbarrier_expect(full, rows * D * 2);
#pragma unroll
            for (int n = 0; n < C::BLOCKS; ++n) tma_load(to + n * rows * 128, map, full, n * 64, row + from, h, batch);
        };
        ask(queries, &maps.query, query_full, first, C::WINDOW);
        for (int t = 0; t < tiles; ++t) {
            const int stage = t % C::STAGES, turn = t / C::STAGES & 1;
            mbarrier_wait(key_empty + stage, turn ^ 1);
            ask(keys + stage * C::KEYS, &maps.key, key_full + stage, t * C::BN, C::BN);
            mbarrier_wait(value_empty + stage, turn ^ 1);
            ask(values + stage * C::KEYS, &maps.value, value_full + stage, t * C::BN, C::BN);
        }
        return;
    }

    take_registers<240>();
    const int t2 = lane_id() % 4 * 2, thread = static_cast<int>(threadIdx.x) % 128;
    // Of this thread: the first of its two rows, the other is 8 behind.
    const int number = first + group * 64 + thread / 32 * 16 + lane_id() / 4;
    float o[D / 8][4], top[2] = {-INFINITY_, -INFINITY_}, weight[2] = {0.0f, 0.0f};
    clear(o);
    mbarrier_wait(query_full, 0);
    const Factor query(queries + group * 64 * 128, 0);
    for (int t = 0; t < tiles; ++t) {
        const int stage = t % C::STAGES, turn = t / C::STAGES & 1, first_j = t * C::BN;
        float c[N][4];
        mbarrier_wait(key_full + stage, turn);
        const Factor key(keys + stage * C::KEYS, 0);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < D; k += 16)
            wgmma_shared(c, query.at(k / 64 * C::WINDOW * 128 + k % 64 * 2), key.at(k / 64 * C::BN * 128 + k % 64 * 2),
                         k > 0, T());
        wgmma_commit();
        wgmma_wait<0>();
        if (lane_id() == 0) mbarrier_arrive(key_empty + stage);

        const bool edge = first_j + C::BN > s.keys || (a.causal && first_j + C::BN - 1 > first + group * 64 + s.shift);
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                c[n][e] = __fmul_rn(c[n][e], a.scale);
                if (edge) {
                    const int j = first_j + n * 8 + t2 + (e & 1);
                    if (j >= s.keys || (a.causal && j > number + e / 2 * 8 + s.shift)) c[n][e] = -INFINITY_;
                }
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float above = top[half];
#pragma unroll
            for (int n = 0; n < N; ++n) above = fmaxf(above, fmaxf(c[n][half * 2], c[n][half * 2 + 1]));
            above = fmaxf(above, __shfl_xor_sync(0xffffffffu, above, 1));
            above = fmaxf(above, __shfl_xor_sync(0xffffffffu, above, 2));
            const float level = above == -INFINITY_ ? 0.0f : above;
            const float less = exp_of_difference(top[half], level);
            top[half] = above;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& x = c[n][half * 2 + e];
                    x = exp_of_difference(x, level);
                    sum += x;
                }
            weight[half] = weight[half] * less + sum;
#pragma unroll
            for (int d = 0; d < D / 8; ++d) {
                o[d][half * 2] *= less;
                o[d][half * 2 + 1] *= less;
            }
        }

        mbarrier_wait(value_full + stage, turn);
        unsigned char* tile = values + stage * C::KEYS;
        if (first_j + C::BN > s.keys) {
            // Both groups write the same zeros, each before it reads.
            const int real = s.keys - first_j, pieces = (C::BN - real) * 8;
            for (int n = thread; n < pieces * C::BLOCKS; n += 128)
                reinterpret_cast<uint4*>(tile + n / pieces * C::BN * 128 + real * 128)[n % pieces] =
                    make_uint4(0, 0, 0, 0);
            fence_shared_for_wgmma();
            named_barrier(1 + group, 128);
        }
        const Factor value(tile, C::BN * 128);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < C::BN / 16; ++k) {
            const std::uint32_t p[4] = {Mma<T>::pack(c[2 * k][0], c[2 * k][1]), Mma<T>::pack(c[2 * k][2], c[2 * k][3]),
                                        Mma<T>::pack(c[2 * k + 1][0], c[2 * k + 1][1]),
                                        Mma<T>::pack(c[2 * k + 1][2], c[2 * k + 1][3])};
            wgmma_registers(o, p, value.at(k * 16 * 128), T());
        }
        wgmma_commit();
        wgmma_wait<0>();
        if (lane_id() == 0) mbarrier_arrive(value_empty + stage);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = number + half * 8;
        float sum = weight[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (row >= min(stream.rows, s.queries)) continue;
        // A NaN among the scores is one in the weights.
        const bool bad = s.wrong || sum != sum, some = sum > 0.0f;
        const float factor = bad ? NAN_ : some ? 1.0f / sum : 0.0f;
        T* out = static_cast<T*>(stream.out) + result_row(a, b, h, s.start, stream.rows, row) * a.head_size + t2;
#pragma unroll
        for (int d = 0; d < D / 8; ++d) {
            if (d * 8 >= a.head_size) break;
            store_pair(out + d * 8, bad || some ? o[d][half * 2] * factor : 0.0f,
                       bad || some ? o[d][half * 2 + 1] * factor : 0.0f);
        }
        if (lane_id() % 4 == 0)
            stream.lse[statistics_at(a, b, h, s.start, stream.rows) + row] = sum != sum ? sum
                                                                             : some     ? top[half] + logf(sum)
                                                                                        : INFINITY_;
    }
#endif
}

// Whether the copy engine takes a tensor as it lies: it knows no strides of 0, as an expanded one has.
inline bool can_be_mapped(const Attention& a, const Heads& x, int rows) {
    return (x.row > 0 || rows == 1) && (x.head > 0 || a.heads == 1) &&
           (x.batch > 0 || a.batch == 1 || a.cu_seqlens != nullptr);
}

// Whether the kernel is for this call, on a device that has it.
inline bool hopper_takes(const Attention& a) {
    const QueryStream& stream = a.stream[0];
    // With few queries half of a block would have nothing to do.
    return stream.rows >= fewest_queries() && a.keys > 0 && can_be_mapped(a, stream.query, stream.rows) &&
           can_be_mapped(a, a.key, a.keys) && can_be_mapped(a, a.value, a.keys);
}

template <class T, int D>
void launch_attention_fwd_hopper(const Attention& a, Stream stream) {
    using C = HopperTile<T, D>;
    const std::int64_t queries = a.cu_seqlens == nullptr ? a.queries : a.total;
    const std::int64_t keys = a.cu_seqlens == nullptr ? a.keys : a.total;
    auto map = [&](const Heads& x, std::int64_t rows, int tile) {
        const std::int64_t sizes[4] = {a.cu_seqlens == nullptr ? a.batch : 1, rows, a.heads, a.head_size};
        // A stride that nobody walks along must be a proper one too.
        const std::int64_t strides[3] = {sizes[0] == 1 ? 8 : x.batch, rows == 1 ? 8 : x.row, a.heads == 1 ? 8 : x.head};
        return make_tensor_map(x.data, sizes, strides, tile, sizeof(T) == 2 && std::is_same_v<T, bfloat16>);
    };
    const HopperMaps maps = {map(a.stream[0].query, queries, C::WINDOW), map(a.key, keys, C::BN),
                             map(a.value, keys, C::BN)};
    const std::int64_t windows = ceil_div(a.stream[0].rows, C::WINDOW);
    launch(attention_fwd_hopper<C>, grid_of(windows * a.batch * a.heads), C::THREADS, C::SHARED, stream, a, maps);
}

}  // namespace pyxlbert::cuda
