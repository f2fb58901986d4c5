// The gradient of the position table: a block per rows of the table and head walks the queries of all sequences that
// read it, and of both streams.
//
// Row x of the table is met by query i, at position p, where j = x - offset + p. So scores are laid out by rows of the
// table here, the position's product needs no skew, and keys and values are what is skewed: of 16 queries and BN rows
// it is BN + 15 keys, the products with which are read line by line from a column of its own on (attention_lines.cuh).
#pragma once
#include "cuda/attention_bwd.cuh"

namespace pyxlbert::cuda {

// c [16, BN]: line l / 4 or l / 4 + 8 times row column + n + its shift of a ring, through a warp's band.
template <class T, int D, int N, int BN, int SIZE>
DEVICE void skewed_products(float (&c)[N][4], Band<BN>& band, const T* left, const Ring<T, D, SIZE>& ring, int y,
                            int upper, int lower) {
    band_products<T, D, (BN + 16) / 8>(band, 0, left, ring, y);
    __syncwarp();
    const int g = lane_id() / 4, t2 = lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[n][e] += band.read(g + e / 2 * 8, n * 8 + t2 + (e & 1) + (e < 2 ? upper : lower));
    __syncwarp();
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) attention_bwd_table(const __grid_constant__ Attention a) {
    using T = typename C::T;
    constexpr int D = C::D, N = C::BN / 8;
    unsigned char* memory = shared_memory();
    Masks* masks = reinterpret_cast<Masks*>(memory);
    Place* all_places = reinterpret_cast<Place*>(memory + 2 * MASKS_SIZE);
    Band<C::BN> band;
    band.line0 = reinterpret_cast<float*>(memory + C::PLACES) + warp_id() * Band<C::BN>::FLOATS;
    T* rows = reinterpret_cast<T*>(memory + C::PLACES + C::BANDS);
    T* content = rows + C::KEYS;
    T* dout = content + C::QUERIES;
    T* positions = dout + C::QUERIES;  // two steps of them
    T* gradients = positions + 2 * C::QUERIES;
    Ring<T, D, C::RING> keys = {gradients + C::SCORES, 0}, values = {keys.rows + C::RING * LD<D>, 0};

    const int blocks = ceil_div(a.table_rows, C::BK);
    const int plane = static_cast<int>(blockIdx.x) / blocks, table_number = plane / a.heads, h = plane % a.heads;
    const int first_x = static_cast<int>(blockIdx.x) % blocks * C::BK;
    const int qw = warp_id() % C::QW, kw = warp_id() / C::QW, g = lane_id() / 4, t2 = lane_id() % 4 * 2;
    const std::int64_t stride = static_cast<std::int64_t>(a.heads) * a.head_size;
    const int each = max(1, a.batch / a.tables), first_b = table_number * each;
    const bool uniform = C::EXTRAS && a.uniform;
    load_rows<T, D, C::BK, C::THREADS>(
        rows, static_cast<const T*>(a.table.data) + table_number * a.table.batch + h * a.table.head, a.table.row,
        first_x, a.table_rows, a.head_size, nullptr);
    const int my_rows = summed_rows<C>(), my_column = summed_column<C>();
    float dtable[1][C::COLUMNS / 8][4];
    clear(dtable[0]);

    // The key that row 0 of the ring is, at window 0.
    const int origin = first_x - a.offset;
    auto readable_of = [&](const Sequence& s) { return uniform ? s.extent : s.keys; };
    // The windows in which any query meets any key at these rows.
    auto lowest = [&]() { return max(-origin - C::BK - C::BM + 2, 0) / C::BM; };
    auto last = [&](const Step& step) {
        const Sequence s = sequence_of(a, step.sequence);
        const QueryStream& stream = a.stream[step.stream];
        const int all = stream.positions == nullptr ? ceil_div(a.cu_seqlens == nullptr ? stream.rows : s.queries, C::BM)
                                                    : windows_of(a, stream, C::BM);
        return min(all, ceil_div(max(readable_of(s) - origin, 0), C::BM));
    };
    auto settle = [&](Step step) {
        while (step.sequence < first_b + each && step.sequence < a.batch) {
            if (step.window >= last(step)) {
                if (step.stream + 1 < a.streams)
                    step = {step.sequence, step.stream + 1, lowest(), 0, false};
                else
                    step = {step.sequence + 1, 0, lowest(), 0, false};
            } else if (is_empty<C::RELATIVE, C::BM>(a.stream[step.stream], sequence_of(a, step.sequence), step.sequence,
                                                    step.window * C::BM)) {
                ++step.window;
            } else {
                break;
            }
        }
        step.done = step.sequence >= first_b + each || step.sequence >= a.batch;
        return step;
    };
    auto find = [&](const Step& step, int buffer) {
        const QueryStream& stream = a.stream[step.stream];
        const Sequence s = sequence_of(a, step.sequence);
        Place* places = all_places + buffer * C::BM;
        const bool more = find_places<C::RELATIVE, C::BM, C::THREADS>(a, stream, s, step.sequence, step.window * C::BM,
                                                                      step.pass, places);
        find_statistics<C::BM, C::THREADS>(a, stream, s, step.sequence, h, places);
        return more;
    };
    // Asks for what a step needs, whose places are found; the rings as that step has them.
    auto fetch = [&](const Step& step, int buffer, bool whole) {
        const QueryStream& stream = a.stream[step.stream];
        const int b = step.sequence;
        const Sequence s = sequence_of(a, b);
        const Place* places = all_places + buffer * C::BM;
        load_places<T, D, C::BM, C::THREADS>(content, like_query<T>(a, stream, stream.content, b, h, s.start), stride,
                                             places, a.head_size, false);
        load_places<T, D, C::BM, C::THREADS>(positions + buffer * C::QUERIES,
                                             like_query<T>(a, stream, stream.position, b, h, s.start), stride, places,
                                             a.head_size, false);
        load_places<T, D, C::BM, C::THREADS>(dout, plane_of<T>(stream.dout, b, h, s.start), stream.dout.row, places,
                                             a.head_size, true);
        const std::int32_t* hidden = C::EXTRAS && !uniform ? numbers_of(a, a.key_rank, b, s.start, a.keys) : nullptr;
        const T *key = plane_of<T>(a.key, b, h, s.start), *value = plane_of<T>(a.value, b, h, s.start);
        const int first = origin + step.window * C::BM, readable = readable_of(s);
        if (whole) {
            load_ring<T, D, C::RING, C::THREADS>(keys, 0, key, a.key.row, first, readable, a.head_size, hidden);
            load_ring<T, D, C::RING, C::THREADS>(values, 0, value, a.value.row, first, readable, a.head_size, hidden);
        } else if (step.pass == 0) {
            load_ring<T, D, C::BM, C::THREADS>(keys, C::BK, key, a.key.row, first + C::BK, readable, a.head_size,
                                               hidden);
            load_ring<T, D, C::BM, C::THREADS>(values, C::BK, value, a.value.row, first + C::BK, readable, a.head_size,
                                               hidden);
        }
        cp_async_commit();
    };

    Step step = settle({first_b, 0, lowest(), 0, false});
    bool more = false;
    int buffer = 0;
    if (!step.done) {
        more = __syncthreads_or(find(step, 0));
        if (threadIdx.x == 0)
            *masks = masks_of(a, a.stream[step.stream], sequence_of(a, step.sequence), step.sequence, h);
        fetch(step, 0, true);
    }
    cp_async_commit();
    while (!step.done) {
        cp_async_wait<0>();
        __syncthreads();
        const QueryStream& stream = a.stream[step.stream];
        const int b = step.sequence;
        const Sequence s = sequence_of(a, b);
        Place* places = all_places + buffer * C::BM;
        const T* position = positions + buffer * C::QUERIES;
        if (C::EXTRAS && a.key_segments != nullptr) {
            segment_products<T, C::BM, C::WARPS>(a, plane_of<T>(stream.query, b, h, s.start), stream.query.row, places,
                                                 h);
            __syncthreads();
        }
        const Step next = settle(more ? Step{b, step.stream, step.window, step.pass + 1, false}
                                      : Step{b, step.stream, step.window + 1, 0, false});
        bool next_more = false;
        if (!next.done) next_more = find(next, 1 - buffer);

        float c[1][N][4], dp[1][N][4];
        clear(c[0]);
        clear(dp[0]);
        const int row = qw * 16, column = kw * C::BN;
        const Place &upper = places[row + g], &lower = places[row + g + 8];
        // The keys of this thread's first column.
        const int firsts[2] = {origin + column + t2 + upper.position, origin + column + t2 + lower.position};
        bool some = false;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int j = firsts[e / 2] + n * 8 + (e & 1);
                some = some || (C::EXTRAS && masks->uniform) ||
                       (j >= 0 && allowed<C::EXTRAS>(*masks, e < 2 ? upper : lower, j));
            }
        if (__any_sync(0xffffffffu, some)) {
            multiply_rows<T, D>(c, position + row * LD<D>, 0, rows + column * LD<D>);
            skewed_products<T, D, N>(c[0], band, content + row * LD<D>, keys, row + column, upper.position & 15,
                                     lower.position & 15);
            skewed_products<T, D, N>(dp[0], band, dout + row * LD<D>, values, row + column, upper.position & 15,
                                     lower.position & 15);
            std::uint32_t bits = ~0u;
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int j = firsts[e / 2] + n * 8 + (e & 1);
                    c[0][n][e] = score_of<C::EXTRAS>(*masks, e < 2 ? upper : lower, j, c[0][n][e]);
                    if (C::EXTRAS && masks->drops && !kept(*masks, (e < 2 ? upper : lower).number, j))
                        bits &= ~(1u << (4 * n + e));
                }
            gradients_of_scores<N, true>(c[0], dp[0], upper, lower, bits,
                                         C::EXTRAS && masks->drops ? a.dropout.scale : 1.0f);
            if constexpr (C::EXTRAS)
                clear_constants<N>(dp[0], *masks, upper.number, lower.number, firsts[0], firsts[1]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = (row + g + half * 8) * C::SCORES_LD + column + t2;
#pragma unroll
            for (int n = 0; n < N; ++n) store_pair(gradients + at + n * 8, dp[0][n][half * 2], dp[0][n][half * 2 + 1]);
        }
        // From here on nobody reads the rings, the masks, these places, contents or douts.
        next_more = __syncthreads_or(next_more);
        if (!next.done) {
            const bool other = next.sequence != step.sequence || next.stream != step.stream;
            const bool moves = !other && next.window == step.window + 1;
            const bool whole = !moves && (other || next.window != step.window);
            if (moves) {
                keys.move(C::BM);
                values.move(C::BM);
            }
            if (other && threadIdx.x == 0)
                *masks = masks_of(a, a.stream[next.stream], sequence_of(a, next.sequence), next.sequence, h);
            fetch(next, 1 - buffer, whole);
        }
        [[maybe_unused]] constexpr int AT_ONCE = STEPS_AT_ONCE<T, D>;
#pragma unroll AT_ONCE
        for (int k = 0; k < C::BM; k += Mma<T>::K) {
            typename Mma<T>::Left left[1];
            Mma<T>::load_left_transposed(left[0], gradients + my_rows, C::SCORES_LD, k);
            multiply_columns<T, D>(dtable, left, position + my_column + k * LD<D>);
        }
        step = next;
        more = next_more;
        buffer = 1 - buffer;
    }
    cp_async_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int x = first_x + my_rows + g + half * 8;
        if (x >= a.table_rows) continue;
        float* out = a.dtable +
                     ((static_cast<std::int64_t>(table_number) * a.table_rows + x) * a.heads + h) * a.head_size +
                     my_column + t2;
#pragma unroll
        for (int d = 0; d < C::COLUMNS / 8; ++d) {
            if (my_column + d * 8 >= a.head_size) break;
            store_pair(out + d * 8, dtable[0][d][half * 2] * a.scale, dtable[0][d][half * 2 + 1] * a.scale);
        }
    }
}

template <class C>
constexpr std::size_t shared_of_table() {
    return C::PLACES + C::BANDS + (C::KEYS + 4 * C::QUERIES + C::SCORES + 2 * C::RING * LD<C::D>)*sizeof(typename C::T);
}

template <class T, int D, bool EXTRAS, bool SMALL>
void launch_relative_bwd_of(const Attention& a, Stream stream) {
    launch_attention_bwd_of<T, D, true, EXTRAS, SMALL>(a, stream);
    using S = SumTile<T, D, EXTRAS, true, SMALL>;
    static_assert(shared_of_table<S>() <= (TILES_DIFFER<T, D, true> && !SMALL ? MOST_SHARED : LEAST_SHARED));
    const std::int64_t blocks = ceil_div(a.table_rows, S::BK);
    launch<attention_bwd_table<S>, shared_of_table<S>()>(grid_of(blocks * a.tables * a.heads), S::THREADS, stream, a);
}

}  // namespace pyxlbert::cuda
