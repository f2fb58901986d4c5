// The backward kernel of attention that walks the queries for a block of keys, attention_bwd.cuh's `keys`, where there
// is no table of positions.
//
// Scores are transposed here, a row for each key: s = k q^T.  So weights and their gradients are left factors of
// dvalue = p dout and dkey = ds q as they lie in registers, and never go through shared memory.  A warp has M times 16
// keys, which all meet the queries that it reads; short keys stay in registers as the left factor that they are.
//
// A step is BM queries.  While it is multiplied the queries and dout of the next one come, and what forward and `rows`
// have found out about the queries of the one after, which says of which of them dout may be read.
#pragma once
#include "cuda/attention_bwd_scores.cuh"

namespace pyxlbert::cuda {

// Whether the sums of 16 keys and what multiplies them fit the registers, and there is no table.
template <class T, int D, bool RELATIVE>
constexpr bool FITS_KEY_ROWS = !RELATIVE && D * sizeof(T) <= 256;

// The queries that a block walks; in shared memory like Masks.
struct QueriesOfHead {
    const void *query, *dout;
    const float* statistics[3];  // lse, delta, lse_correction
    std::int64_t query_stride, dout_stride;
    int rows, head_size;
};
constexpr std::size_t QUERIES_SIZE = (sizeof(QueriesOfHead) + 15) / 16 * 16;

template <class T>
DEVICE QueriesOfHead queries_of(const AttentionCall& a, const Sequence& s, int b, int h) {
    const Stream& stream = a.stream[0];
    const std::int64_t at = statistics_at(a, b, h, s.start, stream.rows);
    return {plane_of<T>(stream.query, b, h, s.start),
            plane_of<T>(stream.dout, b, h, s.start),
            {stream.lse + at, stream.delta + at, stream.lse_correction + at},
            stream.query.row,
            stream.dout.row,
            min(stream.rows, s.queries),
            a.head_size};
}

// Tiles of that kernel.
template <class T_, int D_, class F_>
struct KeyTile {
    using T = T_;
    using F = F_;
    static constexpr int D = D_;
    static constexpr bool WIDE = sizeof(T) == 4, LONG = D > 64;
    static constexpr int M = WIDE || LONG ? 1 : 2, WARPS = 4, THREADS = 32 * WARPS;
    static constexpr int ROWS = 16 * M, BK = ROWS * WARPS;                            // keys of a warp and of a block
    static constexpr int BM = WIDE || LONG ? 16 : 32, AT_ONCE = 16, N = AT_ONCE / 8;  // queries of a step, of a product
    static constexpr bool HELD = !WIDE;                                               // keys are in registers
    static constexpr int QUERIES = BM * LD<D>, KEYS = BK * LD<D>;
    // Where keys are on their way to the registers, queries and dout of two steps are later.
    static constexpr int STEPS = HELD && KEYS > 4 * QUERIES ? KEYS : 4 * QUERIES;
    static constexpr int STATISTICS = 3 * BM;  // of a step: lse, delta, lse_correction
    static constexpr std::size_t SHARED =
        MASKS_SIZE + QUERIES_SIZE + 3 * STATISTICS * sizeof(float) + ((HELD ? 1 : 2) * KEYS + STEPS) * sizeof(T);
};

// What a warp's keys from first_j on, ROWS of them, are to N times 8 queries from first_i on, of `rows`; with
// ASKS_FIRST as far as lengths and the diagonal say.
template <class C>
DEVICE Tile tile_of_keys(const Masks& m, int rows, int first_i, int first_j) {
    if (first_j >= m.keys || first_i >= rows || (m.causal && first_j > first_i + C::AT_ONCE - 1 + m.shift))
        return Tile::EMPTY;
    const bool whole = first_j + C::ROWS <= m.keys && first_i + C::AT_ONCE <= rows &&
                       (!m.causal || first_j + C::ROWS - 1 <= first_i + m.shift);
    return whole ? Tile::WHOLE : Tile::EDGE;
}

// Which of a thread's scores c[n][e] are of keys that their queries may attend, bit 4 n + e: of key j or, for e >= 2,
// j + 8, and query i + 8 n + e % 2.
template <class F, int N>
DEVICE std::uint32_t attended_by_key(const Masks& m, int rows, int i, int j) {
    std::uint32_t bits = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int key = j + half * 8;
        bool there = key < m.keys;
        // Here all queries are of rank 0.
        if (F::RANKS && there && m.key_rank != nullptr) there = m.key_rank[key] < 0;
        const int begin = m.causal ? key - m.shift : 0;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int query = i + n * 8 + e;
                bool may = there && query >= begin && query < rows;
                if (F::MASK && may && m.mask != nullptr) may = m.mask[query * m.mask_query + key * m.mask_key] != 0;
                if (may) bits |= 1u << (4 * n + 2 * half + e);
            }
    }
    return bits;
}

template <class B, int N>
DEVICE void add_bias_by_key(float (&c)[N][4], std::uint32_t bits, const Masks& m, int i, int j) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if ((bits >> (4 * n + e) & 1) != 0) {
                const std::int64_t at = m.bias_at + (i + n * 8 + (e & 1)) * m.bias_query + (j + e / 2 * 8) * m.bias_key;
                c[n][e] = __fadd_rn(c[n][e], to_float(static_cast<const B*>(m.bias)[at]));
            }
}

// Bit (m N + n) 4 + e: whether weight c[m][n][e] survives dropout; queries from first_i on, keys from first_j on.  Of
// the eight lanes that have keys of the same queries each draws for one of these, or for a share of its keys.
template <int M, int N>
DEVICE std::uint32_t kept_by_key(const Draws& d, int first_i, int first_j) {
    constexpr int QUERIES = 2 * N, LANES = 8 / QUERIES, BLOCKS = 4 * M / LANES;
    static_assert(LANES * QUERIES == 8 && LANES * BLOCKS == 4 * M);
    const int g = lane_id() / 4, t = lane_id() % 4, mine = g % QUERIES;
    const int number = first_i + mine / 2 * 8 + t * 2 + mine % 2;
    std::uint32_t drawn = 0;  // bit k of key first_j + k
#pragma unroll
    for (int k = 0; k < BLOCKS; ++k) {
        const int block = g / QUERIES * BLOCKS + k;
        const Words w = philox(d.seed, static_cast<std::uint32_t>(first_j / 4 + block),
                               static_cast<std::uint32_t>(number), d.plane, d.tag);
        std::uint32_t four = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (w.word[e] >= d.threshold) four |= 1u << e;
        drawn |= four << 4 * block;
    }
    std::uint32_t bits = 0;
#pragma unroll
    for (int q = 0; q < QUERIES; ++q) {
        std::uint32_t all = 0;
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) all |= __shfl_sync(0xffffffffu, drawn, (lane * QUERIES + q) * 4 + t);
        all >>= g;
#pragma unroll
        for (int k = 0; k < 2 * M; ++k) bits |= (all >> 8 * k & 1) << ((k / 2 * N + q / 2) * 4 + k % 2 * 2 + q % 2);
    }
    return bits;
}

// The keys of a block, and the sums of a warp's.
template <class C>
struct KeyRows {
    using T = typename C::T;
    using F = typename C::F;
    static constexpr int D = C::D, M = C::M, N = C::N;
    T *keys, *values, *contents, *douts;  // contents and douts: of two steps
    float* statistics;                    // of three
    int first_j;                          // the warp's first key
    float scale;                          // of what dropout leaves
    typename Mma<T>::Left held[C::HELD ? D / Mma<T>::K : 1][M];
    float dkey[M][D / 8][4], dvalue[M][D / 8][4];

    DEVICE void begin() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            clear(dkey[m]);
            clear(dvalue[m]);
        }
    }

    DEVICE KeyRows(int first_j, float scale) : first_j(first_j), scale(scale) {
        statistics = reinterpret_cast<float*>(shared_memory() + MASKS_SIZE + QUERIES_SIZE);
        values = reinterpret_cast<T*>(statistics + 3 * C::STATISTICS);
        contents = values + C::KEYS;
        douts = contents + 2 * C::QUERIES;
        keys = C::HELD ? contents : contents + C::STEPS;
        begin();
    }

    DEVICE const Masks& masks() const { return *reinterpret_cast<const Masks*>(shared_memory()); }
    DEVICE const QueriesOfHead& head() const {
        return *reinterpret_cast<const QueriesOfHead*>(shared_memory() + MASKS_SIZE);
    }
    // A step's, of which one after the other takes the next of three buffers.
    DEVICE float* statistics_of(int buffer) const { return statistics + buffer * C::STATISTICS; }

    // Asks for what forward and `rows` have found out about a step's queries.
    DEVICE void ask(int first_i, int buffer) const {
        static_assert(C::STATISTICS <= C::THREADS);
        const int n = static_cast<int>(threadIdx.x), i = first_i + n % C::BM;
        if (n >= C::STATISTICS) return;
        const QueriesOfHead& from = head();
        cp_async4(statistics_of(buffer) + n, from.statistics[n / C::BM] + (i < from.rows ? i : 0), i < from.rows);
    }

    // Asks for a step's queries and dout, zeros where a query has seen nothing.
    DEVICE void fetch(int first_i, int buffer, const float* lse) const {
        constexpr int EACH = 16 / sizeof(T);
        const QueriesOfHead& from = head();
#pragma unroll 1
        for (int n = static_cast<int>(threadIdx.x); n < C::BM * (D / EACH); n += C::THREADS) {
            const int r = n / (D / EACH), c = n % (D / EACH) * EACH, i = first_i + r;
            const bool there = i < from.rows && c < from.head_size, seen = there && lse[r] != INFINITY_;
            const std::int64_t row = there ? i : 0;
            const int to = buffer * C::QUERIES + r * LD<D> + c, column = there ? c : 0;
            cp_async16(contents + to, static_cast<const T*>(from.query) + row * from.query_stride + column, there);
            cp_async16(douts + to, static_cast<const T*>(from.dout) + row * from.dout_stride + column, seen);
        }
    }

    DEVICE void hold() {
        if constexpr (C::HELD)
#pragma unroll
            for (int k = 0; k < D; k += Mma<T>::K)
#pragma unroll
                for (int m = 0; m < M; ++m)
                    Mma<T>::load_left(held[k / Mma<T>::K][m], keys + (warp_id() * C::ROWS + m * 16) * LD<D>, LD<D>, k);
    }

    // AT_ONCE queries from first_i on, which are rows of `content` and `dout`; `found`: their statistics.
    DEVICE void multiply(int first_i, const T* content, const T* dout, const float* found) {
        const Masks& mask = masks();
        const int rows = head().rows;
        Tile tile = tile_of_keys<C>(mask, rows, first_i, first_j);
        if (tile == Tile::EMPTY) return;
        const int i = first_i + lane_id() % 4 * 2, j = first_j + lane_id() / 4;
        std::uint32_t seen[M];
        if constexpr (ASKS_FIRST<F>) {
            if (hides<F>(mask)) tile = Tile::EDGE;
            bool some = tile == Tile::WHOLE;
#pragma unroll
            for (int m = 0; m < M; ++m) {
                seen[m] = ALL_SCORES<N>;
                if (tile == Tile::EDGE) seen[m] = attended_by_key<F, N>(mask, rows, i, j + m * 16);
                some = some || seen[m] != 0;
            }
            if (!__any_sync(0xffffffffu, some)) return;
        }
        float c[M][N][4], dp[M][N][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            clear(c[m]);
            clear(dp[m]);
        }
        if constexpr (C::HELD)
            multiply_held_rows<T, D>(c, held, content);
        else
            // Forward had the queries on the left, and where a score is lse its weight is to be 1 to the last bit.
            multiply_rows<T, D, true>(c, keys + warp_id() * C::ROWS * LD<D>, 16 * LD<D>, content);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) c[m][n][e] = __fmul_rn(c[m][n][e], mask.scale);
            if constexpr (F::BIAS) {
                if (mask.bias != nullptr) {
                    if (mask.bias_dtype == DType::float32)
                        add_bias_by_key<float, N>(c[m], seen[m], mask, i, j + m * 16);
                    else
                        add_bias_by_key<T, N>(c[m], seen[m], mask, i, j + m * 16);
                }
            }
            if (tile == Tile::WHOLE) continue;
            const std::uint32_t bits = ASKS_FIRST<F> ? seen[m] : attended_by_key<F, N>(mask, rows, i, j + m * 16);
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if ((bits >> (4 * n + e) & 1) == 0) c[m][n][e] = -INFINITY_;
        }
        multiply_rows<T, D>(dp, values + warp_id() * C::ROWS * LD<D>, 16 * LD<D>, dout);
        const bool drops = F::DROPOUT && mask.drops;
        const std::uint32_t kept = drops ? kept_by_key<M, N>(mask.draws, first_i, first_j) : ~0u;
        const float left = drops ? scale : 1.0f;
        found += lane_id() % 4 * 2;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float lse[2], delta[2], correction[2];
            load<2>(found + n * 8, lse);
            load<2>(found + C::BM + n * 8, delta);
            load<2>(found + 2 * C::BM + n * 8, correction);
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float p = weight_of(c[m][n][e], lse[e & 1], correction[e & 1]);
                    const float factor = (kept >> ((m * N + n) * 4 + e) & 1) != 0 ? left : 0.0f;
                    c[m][n][e] = p * factor;
                    dp[m][n][e] = p * (dp[m][n][e] * factor - delta[e & 1]);
                }
        }
        multiply_scores<T, D>(dvalue, c, dout);
        multiply_scores<T, D>(dkey, dp, content);
    }

    // Gives the sums to the results, which have `more` already or not.
    DEVICE void give(const AttentionCall& a, int b, int h, std::int64_t start, bool more) const {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int j = first_j + m * 16 + lane_id() / 4 + half * 8;
                if (j >= masks().extent) continue;  // not the sequence's: registers are short
                const std::int64_t to = result_row(a, b, h, start, a.keys, j) * a.head_size + lane_id() % 4 * 2;
#pragma unroll
                for (int d = 0; d < D / 8; ++d) {
                    if (d * 8 >= a.head_size) break;
                    give_pair(static_cast<T*>(a.dkey) + to + d * 8, dkey[m][d][half * 2] * a.options.scale,
                              dkey[m][d][half * 2 + 1] * a.options.scale, more);
                    give_pair(static_cast<T*>(a.dvalue) + to + d * 8, dvalue[m][d][half * 2],
                              dvalue[m][d][half * 2 + 1], more);
                }
            }
    }
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, 2) attention_bwd_key_rows(const __grid_constant__ AttentionCall a) {
    using T = typename C::T;
    constexpr int D = C::D;
    const int blocks = ceil_div(a.keys, C::BK);
    const int plane = static_cast<int>(blockIdx.x) / blocks, b = plane / a.heads, h = plane % a.heads;
    const int block_j = static_cast<int>(blockIdx.x) % blocks * C::BK;
    const Sequence s = sequence_of(a, b);
    if (block_j >= s.extent) return;
    if (threadIdx.x == 0) {
        find_masks<typename C::F>(a, a.stream[0], s, b, h, *reinterpret_cast<Masks*>(shared_memory()));
        *reinterpret_cast<QueriesOfHead*>(shared_memory() + MASKS_SIZE) = queries_of<T>(a, s, b, h);
    }
    __syncthreads();
    KeyRows<C> side(block_j + warp_id() * C::ROWS, a.dropout.scale);
    // Keys past the length meet nobody.
    const int steps = block_j < s.keys ? ceil_div(side.head().rows, C::BM) : 0;
    const int first = a.options.causal ? max(block_j - s.shift, 0) / C::BM : 0;
    if (first < steps) {
        const std::int32_t* hidden = C::F::RANKS ? side.masks().key_rank : nullptr;
        load_rows<T, D, C::BK, C::THREADS>(side.keys, plane_of<T>(a.key, b, h, s.start), a.key.row, block_j, s.keys,
                                           a.head_size, hidden);
        load_rows<T, D, C::BK, C::THREADS>(side.values, plane_of<T>(a.value, b, h, s.start), a.value.row, block_j,
                                           s.keys, a.head_size, hidden);
        side.ask(first * C::BM, first % 3);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        side.hold();
        if (C::HELD) __syncthreads();
        side.fetch(first * C::BM, first % 2, side.statistics_of(first % 3));
        side.ask((first + 1) * C::BM, (first + 1) % 3);
        cp_async_commit();
    }
    bool more = false;
#pragma unroll 1
    for (int step = first; step < steps; ++step) {
        cp_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) {
            side.fetch((step + 1) * C::BM, (step + 1) % 2, side.statistics_of((step + 1) % 3));
            side.ask((step + 2) * C::BM, (step + 2) % 3);
            cp_async_commit();
        }
#pragma unroll 1
        for (int k = 0; k < C::BM; k += C::AT_ONCE) {
            const int row = step % 2 * C::QUERIES + k * LD<D>;
            side.multiply(step * C::BM + k, side.contents + row, side.douts + row, side.statistics_of(step % 3) + k);
        }
        if constexpr (C::WIDE)
            if ((step + 1 - first) % (TERMS_OF_A_SUM / C::BM) == 0) {
                side.give(a, b, h, s.start, more);
                side.begin();
                more = true;
            }
    }
    side.give(a, b, h, s.start, more);
}

}  // namespace pyxlbert::cuda
