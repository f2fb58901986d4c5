// The forward kernel of attention and relative_attention on Hopper, for 16-bit elements and scores that need lengths,
// causality, dropout and, of relative_attention, segments at most.
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
// With a table of positions its rows come in blocks of 64 too, each read by one group after the other.  64 queries meet
// BN = 64 keys in a band of 128 rows of the table, of which the first 64 are the last ones of the tile before:
//
//     table block      0    1    2    3    4            tile 0:  group 0 has blocks 1 and 2, group 1 blocks 0 and 1
//     group 0               [....|....]                 tile 1:  group 0 has blocks 2 and 3, group 1 blocks 1 and 2
//     group 1          [....|....]
//
// Each warp keeps the 16 lines of its queries, of which every line is read with a shift: see attention_lines.cuh.
//
// Source: Shah et al., "FlashAttention-3", https://arxiv.org/abs/2407.08608, section 3.1, without its overlap of one
// tile's softmax with the next one's product.
#pragma once
#include <cstddef>

#include "cuda/attention_lines.cuh"
#include "cuda/hopper.cuh"
#include "cuda/softmax.cuh"

namespace pyxlbert::cuda {

template <class T_, int D_, class F_, bool RELATIVE_>
struct HopperTile {
    using T = T_;
    using F = F_;
    static constexpr int D = D_, CONSUMERS = 2, STAGES = 2;
    static constexpr bool RELATIVE = RELATIVE_;
    static constexpr int BN = RELATIVE ? 64 : 128;
    static constexpr int WINDOW = 64 * CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
    static constexpr int BLOCKS = D / 64;  // of 64 columns
    // Blocks of the table that are kept: those that the groups need for one tile, and one for each that is under way.
    static constexpr int TABLE_STAGES = CONSUMERS + STAGES;
    using GroupBand = Band<64, 64>;
    static constexpr int QUERIES = WINDOW * D * 2, KEYS = BN * D * 2, TABLE = 64 * D * 2;  // bytes
    static_assert(!RELATIVE || D == 64, "with more columns tiles and bands would not fit the shared memory");
    // Registers of a thread once the producer has given and the consumers have taken: a producer needs few.
    static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
    static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (CONSUMERS + 1) * STARTING_REGISTERS<THREADS>,
                  "a consumer would wait for ever for registers that the block does not have");
};

// What a table needs of shared memory, before all the rest.
template <class C>
struct HopperTable {
    unsigned char blocks[C::TABLE_STAGES][C::TABLE];
    float bands[C::CONSUMERS * 4][C::GroupBand::FLOATS];  // of each warp
    float2 segments[C::WINDOW];                           // products of each query with both segment embeddings
};

// The rest of it: tiles, and for each the barriers that say that it has come and that it has been read.
template <class C>
struct HopperShared {
    unsigned char queries[C::RELATIVE ? 2 : 1][C::QUERIES];  // with the content bias, and with the position bias
    unsigned char keys[C::STAGES][C::KEYS], values[C::STAGES][C::KEYS];
    std::uint64_t query_full, key_full[C::STAGES], key_empty[C::STAGES];
    std::uint64_t value_full[C::STAGES], value_empty[C::STAGES], table_full[C::TABLE_STAGES];

    // Where it begins, behind the table's.
    static constexpr std::size_t START = C::RELATIVE ? sizeof(HopperTable<C>) : 0;
    static DEVICE HopperShared& here() { return *reinterpret_cast<HopperShared*>(shared_memory() + START); }
};

template <class C>
constexpr std::size_t shared_of_hopper() {
    using S = HopperShared<C>;
    // Swizzled tiles begin at multiples of 1024 bytes, barriers at multiples of 8.
    static_assert(S::START % 1024 == 0 && C::TABLE % 1024 == 0);
    static_assert(offsetof(S, queries) == 0 && C::QUERIES % 1024 == 0);
    static_assert(offsetof(S, keys) % 1024 == 0 && offsetof(S, values) % 1024 == 0 && C::KEYS % 1024 == 0);
    static_assert(offsetof(S, query_full) % 8 == 0);
    static_assert(S::START + sizeof(S) <= 227 * 1024);
    return S::START + sizeof(S);
}

struct HopperMaps {
    TensorMap query, key, value, table;  // relative_attention: all but the query, which takes its biases first
};

// The queries of a group of 64 with either bias, as the copy engine would lay them out, and their products with both
// segment embeddings; zeros where there is no query.
template <class C>
DEVICE void load_biased_swizzled(unsigned char* content, unsigned char* position, float2* segments,
                                 const AttentionCall& a, int b, int h, const Sequence& s, int first) {
    using T = typename C::T;
    const Stream& stream = a.stream[0];
    const T* plane = plane_of<T>(stream.query, b, h, s.start);
    const int rows = min(stream.rows, s.queries);
    for (int n = static_cast<int>(threadIdx.x) % 128; n < 64 * 8; n += 128) {
        const int r = n / 8, c = n % 8 * 8;
        const bool there = first + r < rows && c < a.head_size;
        float x[8], y[8], same = 0.0f, other = 0.0f;
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = 0.0f;
        if (there) load<8>(plane + (first + r) * stream.query.row + c, x);
        if (C::F::SEGMENTS && there && a.key_segments != nullptr) {
            float e0[8], e1[8];
#pragma unroll
            for (int e = 0; e < 8; ++e) y[e] = x[e];
            add_bias<8>(a.segment_bias, h, a.head_size, c, y);
            const Parameter& embedding = a.segment_embedding;
            load_any<8>(embedding.data, embedding.dtype, static_cast<std::int64_t>(h) * a.head_size + c, e0);
            load_any<8>(embedding.data, embedding.dtype, static_cast<std::int64_t>(a.heads + h) * a.head_size + c, e1);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                same += y[e] * e0[e];
                other += y[e] * e1[e];
            }
        }
        // Eight neighbouring lanes have a query.
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) {
            same += __shfl_xor_sync(0xffffffffu, same, offset);
            other += __shfl_xor_sync(0xffffffffu, other, offset);
        }
        if (c == 0) segments[r] = make_float2(same, other);
#pragma unroll
        for (int e = 0; e < 8; ++e) y[e] = x[e];
        if (there) {
            add_bias<8>(a.content_bias, h, a.head_size, c, x);
            add_bias<8>(a.position_bias, h, a.head_size, c, y);
        }
        const int at = r * 128 + (c / 8 ^ r % 8) * 16;
        store<8>(reinterpret_cast<T*>(content + at), x);
        store<8>(reinterpret_cast<T*>(position + at), y);
    }
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1)
    attention_fwd_hopper(const __grid_constant__ AttentionCall a, const __grid_constant__ HopperMaps maps) {
#ifdef PYXLBERT_SM90A
    using T = typename C::T;
    constexpr int D = C::D, N = C::BN / 8;
    const Stream& stream = a.stream[0];
    HopperShared<C>& shared = HopperShared<C>::here();
    [[maybe_unused]] HopperTable<C>& table_of_block = *reinterpret_cast<HopperTable<C>*>(shared_memory());

    const int windows = ceil_div(stream.rows, C::WINDOW);
    const int plane = static_cast<int>(blockIdx.x) / windows, b = plane / a.heads, h = plane % a.heads;
    const int window = static_cast<int>(blockIdx.x) % windows;
    const int first = (a.options.causal ? windows - 1 - window : window) * C::WINDOW;
    const Sequence s = sequence_of(a, b);
    if (first >= min(stream.rows, s.queries)) return;
    const int high = a.options.causal ? min(s.keys, max(first + C::WINDOW + s.shift, 0)) : s.keys;
    const int tiles = ceil_div(high, C::BN);
    check_shared_memory();
    if (threadIdx.x == 0) {
        mbarrier_init(&shared.query_full, 1);
        for (int n = 0; n < C::STAGES; ++n) {
            mbarrier_init(&shared.key_full[n], 1);
            mbarrier_init(&shared.value_full[n], 1);
            // A warp arrives for itself: it knows of no other that has finished.
            mbarrier_init(&shared.key_empty[n], C::CONSUMERS * 4);
            mbarrier_init(&shared.value_empty[n], C::CONSUMERS * 4);
        }
        for (int n = 0; n < C::TABLE_STAGES; ++n) mbarrier_init(&shared.table_full[n], 1);
        mbarrier_init_done();
    }
    __syncthreads();

    const int group = static_cast<int>(threadIdx.x) / 128;
    if (group == C::CONSUMERS) {
        give_registers<C::PRODUCER_REGISTERS>();
        if (threadIdx.x % 128 != 0) return;
        // Packed rows are those of one long sequence.
        const int row = static_cast<int>(s.start), batch = a.cu_seqlens == nullptr ? b : 0;
        auto ask = [&](unsigned char* to, const TensorMap* map, std::uint64_t* full, int from, int rows, int batch) {
            mbarrier_expect(full, rows * D * 2);
#pragma unroll
            for (int n = 0; n < C::BLOCKS; ++n) tma_load(to + n * rows * 128, map, full, n * 64, from, h, batch);
        };
        // The block that had the place before is one that no group needs after the keys STAGES tiles before, which have
        // been waited for.  Rows before the table and behind it come as zeros, and belong to queries that are not
        // there.
        [[maybe_unused]] auto ask_table = [&](int block) {
            const int stage = block % C::TABLE_STAGES;
            ask(table_of_block.blocks[stage], &maps.table, &shared.table_full[stage],
                a.offset - first - C::WINDOW + 1 + block * 64, 64, b / sequences_of_table(a));
        };
        if constexpr (C::RELATIVE) {
            if (tiles > 0)
                for (int block = 0; block < C::CONSUMERS; ++block) ask_table(block);
        } else {
            ask(shared.queries[0], &maps.query, &shared.query_full, row + first, C::WINDOW, batch);
        }
        for (int t = 0; t < tiles; ++t) {
            const int stage = t % C::STAGES, turn = t / C::STAGES & 1;
            mbarrier_wait(&shared.key_empty[stage], turn ^ 1);
            ask(shared.keys[stage], &maps.key, &shared.key_full[stage], row + t * C::BN, C::BN, batch);
            if constexpr (C::RELATIVE) ask_table(t + C::CONSUMERS);
            mbarrier_wait(&shared.value_empty[stage], turn ^ 1);
            ask(shared.values[stage], &maps.value, &shared.value_full[stage], row + t * C::BN, C::BN, batch);
        }
        return;
    }

    take_registers<C::CONSUMER_REGISTERS>();
    const int t2 = lane_id() % 4 * 2, thread = static_cast<int>(threadIdx.x) % 128;
    // Of this thread: the first of its two rows, the other is 8 behind.
    const int number = first + group * 64 + thread / 32 * 16 + lane_id() / 4;
    const Draws draws = draws_of(a, stream, b, h);
    float o[D / 8][4];
    clear(o);
    RunningRows rows;
    [[maybe_unused]] typename C::GroupBand band;
    // d [64, 64]: products with a block of the table.  `meanwhile` issues those of which `others` are the sums.
    [[maybe_unused]] auto multiply_positions = [&](float (&d)[8][4], int block, auto meanwhile, auto&... others) {
        const int stage = block % C::TABLE_STAGES;
        const Factor position(shared.queries[1] + group * 64 * 128, 0), table(table_of_block.blocks[stage], 0);
        mbarrier_wait(&shared.table_full[stage], block / C::TABLE_STAGES & 1);
        wgmma_fence(d, others...);
#pragma unroll
        for (int k = 0; k < D; k += 16) wgmma_shared(d, position.at(k * 2), table.at(k * 2), k > 0, T());
        meanwhile();
        wgmma_commit();
        wgmma_wait<0>(d, others...);
    };
    // Of this thread's two rows.
    [[maybe_unused]] std::int32_t segment[2] = {0, 0};
    [[maybe_unused]] float2 of_segment[2];
    [[maybe_unused]] const std::int32_t* key_segments = nullptr;
    if constexpr (C::RELATIVE) {
        load_biased_swizzled<C>(shared.queries[0] + group * 64 * 128, shared.queries[1] + group * 64 * 128,
                                table_of_block.segments + group * 64, a, b, h, s, first + group * 64);
        fence_shared_for_wgmma();
        named_barrier(1 + group, 128);
        key_segments = numbers_of(a, a.key_segments, b, s.start, a.keys);
        if (C::F::SEGMENTS && key_segments != nullptr) {
            const std::int32_t* query_segments = numbers_of(a, stream.segments, b, s.start, stream.rows);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                segment[half] = query_segments[min(number + half * 8, min(stream.rows, s.queries) - 1)];
                of_segment[half] = table_of_block.segments[number + half * 8 - first];
            }
        }
        band.line0 = table_of_block.bands[group * 4 + thread / 32];
        if (tiles > 0) {
            float d[8][4];
            multiply_positions(d, C::CONSUMERS - 1 - group, [] {});
            band.template write<8>(0, d);
        }
    } else {
        mbarrier_wait(&shared.query_full, 0);
    }
    const Factor query(shared.queries[0] + group * 64 * 128, 0);
    for (int t = 0; t < tiles; ++t) {
        const int stage = t % C::STAGES, turn = t / C::STAGES & 1, first_j = t * C::BN;
        float c[N][4];
        mbarrier_wait(&shared.key_full[stage], turn);
        const Factor key(shared.keys[stage], 0);
        auto multiply_content = [&] {
#pragma unroll
            for (int k = 0; k < D; k += 16)
                wgmma_shared(c, query.at(k / 64 * C::WINDOW * 128 + k % 64 * 2),
                             key.at(k / 64 * C::BN * 128 + k % 64 * 2), k > 0, T());
        };
        if constexpr (C::RELATIVE) {
            float d[8][4];
            multiply_positions(d, t + C::CONSUMERS - group, multiply_content, c);
            band.template write<8>(64, d);
            __syncwarp();
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int line = lane_id() / 4 + e / 2 * 8, shift = 63 - thread / 32 * 16 - line + t2 + (e & 1);
#pragma unroll
                for (int n = 0; n < N; ++n) c[n][e] += band.read(line, n * 8 + shift);
            }
            __syncwarp();
            band.advance();
            if (C::F::SEGMENTS && key_segments != nullptr)
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int kind = key_segments[min(first_j + n * 8 + t2 + (e & 1), s.extent - 1)];
                        c[n][e] += kind != segment[e / 2] ? of_segment[e / 2].y : of_segment[e / 2].x;
                    }
        } else {
            wgmma_fence(c);
            multiply_content();
            wgmma_commit();
            wgmma_wait<0>(c);
        }
        if (lane_id() == 0) mbarrier_arrive(&shared.key_empty[stage]);

        const bool edge =
            first_j + C::BN > s.keys || (a.options.causal && first_j + C::BN - 1 > first + group * 64 + s.shift);
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) c[n][e] = __fmul_rn(c[n][e], a.options.scale);
        // A loop of its own: within the other the compiler would mask every tile under a predicate.
        if (edge) {
            const int ends[2] = {a.options.causal ? min(s.keys, number + s.shift + 1) : s.keys,
                                 a.options.causal ? min(s.keys, number + s.shift + 9) : s.keys};
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (first_j + n * 8 + t2 + (e & 1) >= ends[e / 2]) c[n][e] = -INFINITY_;
        }
        softmax_step(rows, c, o);
        if (C::F::DROPOUT && a.dropout.seed != nullptr)
        // Eight columns of eight at a time, as many as there are bits.
#pragma unroll
            for (int from = 0; from < N; from += 8) {
                const std::uint32_t kept = kept_bits<8>(draws, number, number + 8, first_j + from * 8);
#pragma unroll
                for (int n = 0; n < 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        if ((kept >> (4 * n + e) & 1) == 0) c[from + n][e] = 0.0f;
            }

        mbarrier_wait(&shared.value_full[stage], turn);
        unsigned char* tile = shared.values[stage];
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
        // All of them first: registers that are written between products would hold the products up.
        std::uint32_t p[C::BN / 16][4];
#pragma unroll
        for (int k = 0; k < C::BN / 16; ++k)
#pragma unroll
            for (int n = 0; n < 4; ++n)
                p[k][n] = Mma<T>::pack(c[2 * k + n / 2][n % 2 * 2], c[2 * k + n / 2][n % 2 * 2 + 1]);
        wgmma_fence(o, p);
#pragma unroll
        for (int k = 0; k < C::BN / 16; ++k) wgmma_registers(o, p[k], value.at(k * 16 * 128), T());
        wgmma_commit();
        wgmma_wait<0>(o);
        if (lane_id() == 0) mbarrier_arrive(&shared.value_empty[stage]);
    }
    const int count = min(stream.rows, s.queries);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = number + half * 8;
        store_row<T>(a, stream, s, b, h, row < count ? row : -1, half, rows, o);
    }
#else
    __trap();  // whoever starts this would take what memory held for a result
#endif
}

// Whether the copy engine takes a tensor as it lies: it knows no strides of 0, as an expanded one has.
inline bool can_be_mapped(const Heads& x, int batch, int rows, int heads) {
    return (x.row > 0 || rows == 1) && (x.head > 0 || heads == 1) && (x.batch > 0 || batch == 1);
}

// Whether the kernel is for this call's shapes.
template <bool RELATIVE>
bool hopper_takes(const AttentionCall& a) {
    const Stream& stream = a.stream[0];
    const int batch = a.cu_seqlens == nullptr ? a.batch : 1;
    // Keys are split where queries are few, of which most of a block of 128 would have nothing to do; and what is bound
    // by memory gains nothing from faster products.
    if (a.partial != nullptr) return false;
    // With few queries half of a block would have nothing to do.
    if (stream.rows < fewest_queries() || a.keys == 0 || !can_be_mapped(a.key, batch, a.keys, a.heads) ||
        !can_be_mapped(a.value, batch, a.keys, a.heads))
        return false;
    if (RELATIVE)
        return stream.positions == nullptr && a.head_size <= 64 &&
               can_be_mapped(a.table, a.tables, a.table_rows, a.heads);
    return can_be_mapped(stream.query, batch, stream.rows, a.heads);
}

template <class C>
void launch_attention_fwd_hopper(const AttentionCall& a, CudaStream stream) {
    using T = typename C::T;
    const std::int64_t batch = a.cu_seqlens == nullptr ? a.batch : 1;
    const std::int64_t queries = a.cu_seqlens == nullptr ? a.queries : a.total;
    const std::int64_t keys = a.cu_seqlens == nullptr ? a.keys : a.total;
    auto map = [&](const Heads& x, std::int64_t batch, std::int64_t rows, int tile) {
        const std::int64_t sizes[4] = {batch, rows, a.heads, a.head_size};
        // A stride that nobody walks along must be a proper one too: as if one dimension followed after the other.
        const std::int64_t row = rows == 1 ? a.head_size : x.row, head = a.heads == 1 ? rows * row : x.head;
        const std::int64_t strides[3] = {batch == 1 ? a.heads * head : x.batch, row, head};
        return make_tensor_map(x.data, sizes, strides, tile, std::is_same_v<T, bfloat16>);
    };
    HopperMaps maps{};
    maps.key = map(a.key, batch, keys, C::BN);
    maps.value = map(a.value, batch, keys, C::BN);
    if constexpr (C::RELATIVE)
        maps.table = map(a.table, a.tables, a.table_rows, 64);
    else
        maps.query = map(a.stream[0].query, batch, queries, C::WINDOW);
    const std::int64_t windows = ceil_div(a.stream[0].rows, C::WINDOW);
    launch<attention_fwd_hopper<C>, shared_of_hopper<C>()>(grid_of(windows * a.batch * a.heads), C::THREADS, stream, a,
                                                           maps);
}

}  // namespace pyxlbert::cuda
