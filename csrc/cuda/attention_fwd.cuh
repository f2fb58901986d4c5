// The forward kernel of attention, relative_attention and two_stream_attention: a running softmax over the keys.
//
//     a block per (window of queries, head)          keys  j0 --> BN at a time
//                                    q [M, D]   s = q k^T [M, N]  ->  p  ->  o += p v  [M, D]
//
// Few queries would be too few blocks for a device: if they meet many keys, a block has a part of these, and
// attention_parts.cuh joins what the parts have found.
//
// Keys and values come by cp.async, a tile ahead.  A warp has M times 16 queries: of one stream, so that what it reads
// of keys and values serves twice; or, of two streams, 16 of each at the same positions.
//
// Source: Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithm 1; attention_lines.cuh for positions.
#pragma once
#include "cuda/attention_lines.cuh"
#include "cuda/attention_parts.cuh"

namespace pyxlbert::cuda {

// One sequence and head, as a walk over its keys needs it; in shared memory like Masks.
struct Walk {
    const void *key, *value, *table;
    std::int64_t key_stride, value_stride, table_stride;
    int head_size, readable, table_rows, high;
    int table_first;  // the table's row for row 0 of the ring at the first key
    int begin;        // the first tile, where a block has a part of the keys
    const std::int32_t* hidden;
    Sequence sequence;  // and which it is, which head, and the first position of the window
    int b, h, first;
    std::int16_t column;  // from which on a block has columns of the result, where it has a share of them
    bool more;            // backward: further queries stand at the window's positions
};
constexpr std::size_t WALK_SIZE = (sizeof(Walk) + 15) / 16 * 16;

// Tile sizes of kernels that walk the keys.
//
// F: what scores need beyond lengths and causality; RELATIVE: there is a table of positions; M: how often a warp has
// 16 queries; BN: keys.
template <class T_, int D_, class F_, bool RELATIVE_, int STREAMS_, int M_, int BN_, int WARPS_>
struct WalkTile {
    using T = T_;
    using F = F_;
    static constexpr int D = D_, STREAMS = STREAMS_;
    static constexpr bool RELATIVE = RELATIVE_, SPLIT = false;
    static constexpr bool WIDE = sizeof(T) == 4;
    static constexpr int WARPS = WARPS_;
    static constexpr int M = M_;
    static constexpr int BN = BN_;
    static constexpr int THREADS = 32 * WARPS;
    static constexpr int ROWS = 16 * WARPS * M;              // queries of all streams
    static constexpr int WINDOW = ROWS / STREAMS;            // positions
    static constexpr int RING = WINDOW + 2 * BN;             // of table rows: those of a tile, and the next's
    static constexpr int STEP = STREAMS == 2 ? WINDOW : 16;  // rows between a warp's M tiles
    static constexpr int QUERIES = ROWS * LD<D> * (RELATIVE ? 2 : 1);
    static constexpr int KEYS = BN * LD<D>;
    static constexpr std::size_t PLACES = STREAMS * MASKS_SIZE + WALK_SIZE + ROWS * sizeof(Place);
    static constexpr std::size_t BANDS = RELATIVE ? WARPS * M * Band<BN>::FLOATS * sizeof(float) : 0;
    static constexpr std::size_t SHARED =
        PLACES + BANDS + (QUERIES + 4 * KEYS + (RELATIVE ? RING * LD<D> : 0)) * sizeof(T);
};

// The same where a block has a part of the keys.
template <class Tile>
struct SplitTile : Tile {
    static constexpr bool SPLIT = true;
    static_assert(KEYS_OF_PART % Tile::BN == 0 && Tile::M == 1);
    // A part is stored once.
    static_assert(KEYS_OF_PART <= TERMS_OF_A_SUM || !Tile::WIDE);
};

// Whether tiles of these are smaller where shared memory is MIN_SHARED.
template <class T, int D, bool RELATIVE>
constexpr bool TILES_DIFFER = RELATIVE && (sizeof(T) == 4 || D > 64);

// The first row of a warp's queries in the tiles.
template <class C>
DEVICE int first_row_of_warp() {
    return C::STREAMS == 2 ? warp_id() * 16 : warp_id() * 16 * C::M;
}

// Where a kernel's pieces of shared memory lie.
template <class C>
struct Pieces {
    using T = typename C::T;
    Masks* masks;  // of each stream
    Walk* walk;
    Place* places;
    float* bands;
    T *content, *position, *keys, *values;
    Ring<T, C::D, C::RING> ring;
    DEVICE Pieces() {
        unsigned char* at = shared_memory();
        masks = reinterpret_cast<Masks*>(at);
        walk = reinterpret_cast<Walk*>(at + C::STREAMS * MASKS_SIZE);
        places = reinterpret_cast<Place*>(at + C::STREAMS * MASKS_SIZE + WALK_SIZE);
        bands = reinterpret_cast<float*>(at + C::PLACES);
        content = reinterpret_cast<T*>(at + C::PLACES + C::BANDS);
        position = content + (C::RELATIVE ? C::ROWS * LD<C::D> : 0);
        keys = content + C::QUERIES;
        values = keys + 2 * C::KEYS;
        ring.rows = values + 2 * C::KEYS;
        ring.base = 0;
    }
};

template <class C>
DEVICE Walk walk_of(const AttentionCall& a, const Sequence& s, const Masks& masks, int b, int h, int first,
                    bool by_number) {
    using T = typename C::T;
    using F = typename C::F;
    Walk w;
    w.sequence = s;
    w.b = b;
    w.h = h;
    w.first = first;
    w.column = 0;
    w.more = false;
    w.key = plane_of<T>(a.key, b, h, s.start);
    w.value = plane_of<T>(a.value, b, h, s.start);
    w.key_stride = a.key.row;
    w.value_stride = a.value.row;
    w.head_size = a.head_size;
    w.readable = F::UNIFORM_ROWS ? keys_read(a, s) : s.keys;
    w.hidden = leaves_hidden_keys<F>(a) ? masks.key_rank : nullptr;
    w.high = w.readable;
    if (a.options.causal && by_number && !(F::UNIFORM_ROWS && a.relative.uniform_rows) &&
        !(F::SEE_SELF && masks.see_self))
        w.high = min(w.readable, max(first + C::WINDOW + s.shift, 0));
    if constexpr (C::RELATIVE) {
        w.table = table_of<T>(a, b, h);
        w.table_stride = a.table.row;
        w.table_rows = a.table_rows;
        w.table_first = a.offset - first - C::WINDOW + 1;
    }
    return w;
}

// Asks for the keys and values of tile t, and for the table's rows that it has beyond those of the tile before; `ring`
// is as tile t has it.
template <class C>
DEVICE void fetch(const Pieces<C>& p, const Ring<typename C::T, C::D, C::RING>& ring, int t, bool values = true) {
    using T = typename C::T;
    const Walk& w = *p.walk;
    const int first_j = t * C::BN;
    load_rows<T, C::D, C::BN, C::THREADS>(p.keys + t % 2 * C::KEYS, static_cast<const T*>(w.key), w.key_stride, first_j,
                                          w.readable, w.head_size, w.hidden);
    if (values)
        load_rows<T, C::D, C::BN, C::THREADS>(p.values + t % 2 * C::KEYS, static_cast<const T*>(w.value),
                                              w.value_stride, first_j, w.readable, w.head_size, w.hidden);
    if constexpr (C::RELATIVE) {
        const T* table = static_cast<const T*>(w.table);
        if (t == (C::SPLIT ? w.begin : 0))
            load_ring<T, C::D, C::WINDOW, C::THREADS>(ring, 0, table, w.table_stride, w.table_first + first_j,
                                                      w.table_rows, w.head_size, nullptr);
        load_ring<T, C::D, C::BN, C::THREADS>(ring, C::WINDOW, table, w.table_stride,
                                              w.table_first + first_j + C::WINDOW, w.table_rows, w.head_size, nullptr);
    }
    cp_async_commit();
}

// A warp's state from tile to tile.
template <class C>
struct Bands {
    Band<C::BN> band[C::M];
    bool begun = false;  // the first 16 columns of the bands are there
    DEVICE explicit Bands(float* bands) {
#pragma unroll
        for (int m = 0; m < C::M; ++m) band[m].line0 = bands + (warp_id() * C::M + m) * Band<C::BN>::FLOATS;
    }
    DEVICE void skip() {
        begun = false;
#pragma unroll
        for (int m = 0; m < C::M; ++m) band[m].advance();
    }
};

// s [M][16, BN]: content's and position's products of a warp's queries and tile t, not scaled.
template <class C>
DEVICE void products_of_tile(float (&s)[C::M][C::BN / 8][4], const Pieces<C>& p, int t, Bands<C>& bands) {
    using T = typename C::T;
    const int row = first_row_of_warp<C>();
#pragma unroll
    for (int m = 0; m < C::M; ++m) clear(s[m]);
    multiply_rows<T, C::D>(s, p.content + row * LD<C::D>, C::STEP * LD<C::D>, p.keys + t % 2 * C::KEYS);
    if constexpr (C::RELATIVE) {
        const int y = C::WINDOW - 16 - warp_id() * 16;
#pragma unroll
        for (int m = 0; m < C::M; ++m) {
            const T* left = p.position + (row + m * C::STEP) * LD<C::D>;
            if (!bands.begun) band_products<T, C::D, 2>(bands.band[m], 0, left, p.ring, y);
            band_products<T, C::D, C::BN / 8>(bands.band[m], 16, left, p.ring, y);
        }
        bands.begun = true;
        __syncwarp();
        const int g = lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll
        for (int m = 0; m < C::M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int line = g + half * 8;
                const int shift = 15 - (p.places[row + m * C::STEP + line].position & 15);
#pragma unroll
                for (int n = 0; n < C::BN / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        s[m][n][half * 2 + e] += bands.band[m].read(line, n * 8 + column + e + shift);
            }
            bands.band[m].advance();
        }
        __syncwarp();
    }
}

// What a thread knows of its queries: lines l / 4 and l / 4 + 8 of each tile.
template <class C>
struct Lines {
    const Place* first;  // of the thread's
    const Masks* masks;
    int lowest, highest;  // numbers of the warp's queries without positions: the first, and the last
    bool gaps = false;    // some of them are not there, and must have no weights: their scores may be NaN
    DEVICE const Place& line(int m, int half) const { return first[m * C::STEP + half * 8]; }
    DEVICE const Masks& of(int m) const { return masks[C::STREAMS == 2 ? m : 0]; }
};

template <class C>
DEVICE Lines<C> lines_of(const Pieces<C>& p) {
    Lines<C> lines;
    lines.masks = p.masks;
    const Place* first = p.places + first_row_of_warp<C>();
    lines.first = first + lane_id() / 4;
    lines.lowest = first->position;
    lines.highest = lines.lowest + 16 * (C::STREAMS == 2 ? 1 : C::M) - 1;
    return lines;
}

// What the keys from first_j on are to a warp, and with ASKS_FIRST which of them its queries may attend.
template <class C>
DEVICE Tile tile_at(std::uint32_t (&bits)[C::M], const Lines<C>& lines, int first_j, bool by_number) {
    using F = typename C::F;
    constexpr int N = C::BN / 8;
    const Masks& masks = lines.masks[0];
    const bool uniform = F::UNIFORM_ROWS && masks.uniform_rows;
    if (!uniform && masks.causal && by_number && first_j > lines.highest + masks.shift) return Tile::EMPTY;
#pragma unroll
    for (int m = 0; m < C::M; ++m) bits[m] = ALL_SCORES<N>;
    const bool edge = lines.gaps || first_j + C::BN > masks.keys ||
                      (masks.causal && (!by_number || first_j + C::BN - 1 > lines.lowest + masks.shift));
    if (!edge && !hides<F>(masks)) return Tile::WHOLE;
    if constexpr (!ASKS_FIRST<F>) return Tile::EDGE;
    const int from = first_j + lane_id() % 4 * 2, first[2] = {from, from};
    bool some = uniform;
#pragma unroll
    for (int m = 0; m < C::M; ++m) {
        bits[m] = attended<F, false, N>(lines.of(m), lines.line(m, 0), lines.line(m, 1), first);
        some = some || bits[m] != 0;
    }
    return __any_sync(0xffffffffu, some) ? Tile::EDGE : Tile::EMPTY;
}

// Products as scores.
template <class C>
DEVICE void finish(float (&s)[C::M][C::BN / 8][4], Tile tile, const std::uint32_t (&bits)[C::M], const Lines<C>& lines,
                   int first_j) {
    const int from = first_j + lane_id() % 4 * 2, first[2] = {from, from};
#pragma unroll
    for (int m = 0; m < C::M; ++m)
        scores_of<typename C::T, typename C::F, false, C::BN / 8>(s[m], tile, bits[m], lines.of(m), lines.line(m, 0),
                                                                  lines.line(m, 1), first);
}

// How many windows there are; split: where queries have positions of their own, as many as queries.
template <class C>
HOST_DEVICE int windows_of_block(const AttentionCall& a, const Stream& stream) {
    if (C::SPLIT && stream.positions != nullptr) return stream.rows;
    return windows_of(a, stream, C::WINDOW);
}

// The first position of the window of query n in the order of positions; below 0 where the query has none, or one
// before it has the same window.
template <class C>
DEVICE int window_of_query(const Stream& stream, int b, int n) {
    const std::int32_t* positions = stream.positions + static_cast<std::int64_t>(b) * stream.rows;
    if (positions[n] < 0) return -1;
    const int first = positions[n] / C::WINDOW * C::WINDOW;
    return n > 0 && positions[n - 1] >= first ? -1 : first;
}

// Blocks that a multiprocessor is to hold, where shared memory has room for them and the registers, a few too many
// unless the compiler is told, come down to it without spills.
template <class C>
constexpr int blocks_at_a_time() {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)
    if (C::WIDE && !C::RELATIVE && !C::SPLIT && C::D <= 32) return 4;
    if (C::WIDE && !C::RELATIVE && C::D <= 64 && __CUDA_ARCH__ == 900) return 3;
#endif
    return 1;
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, blocks_at_a_time<C>())
    attention_fwd(const __grid_constant__ AttentionCall a) {
    using T = typename C::T;
    constexpr int D = C::D, M = C::M, N = C::BN / 8;
    Pieces<C> p;
    int windows = 1;
#pragma unroll
    for (int n = 0; n < C::STREAMS; ++n) windows = max(windows, windows_of_block<C>(a, a.stream[n]));
    const int parts = C::SPLIT ? parts_of_call(a) : 1, part = static_cast<int>(blockIdx.x) % parts;
    const int block = static_cast<int>(blockIdx.x) / parts;
    const int plane = block / windows, b = plane / a.heads, h = plane % a.heads;
    // Causal: the windows with the most keys first.
    const int window = block % windows;
    int first = (a.options.causal ? windows - 1 - window : window) * C::WINDOW;
    const Sequence s = sequence_of(a, b);
    if constexpr (C::SPLIT) {
        if (part >= parts_of(a, s)) return;
        if (C::RELATIVE && a.stream[0].positions != nullptr) {
            first = window_of_query<C>(a.stream[0], b, window);
            if (first < 0) return;
        }
    }
    bool empty = true;
#pragma unroll
    for (int n = 0; n < C::STREAMS; ++n) empty = empty && is_empty<C::RELATIVE, C::WINDOW>(a.stream[n], s, b, first);
    if (empty) return;
    const bool by_number = a.stream[0].positions == nullptr;
    if (threadIdx.x < C::STREAMS) find_masks<typename C::F>(a, a.stream[threadIdx.x], s, b, h, p.masks[threadIdx.x]);
    if (threadIdx.x == 0) {
        *p.walk = walk_of<C>(a, s, p.masks[0], b, h, first, by_number);
        if constexpr (C::SPLIT) {
            p.walk->begin = part * (KEYS_OF_PART / C::BN);
            if (is_split(a, s)) p.walk->high = min(p.walk->high, (part + 1) * KEYS_OF_PART);
        }
    }
    for (int pass = 0;; ++pass) {
        bool more = false;
#pragma unroll
        for (int n = 0; n < C::STREAMS; ++n)
            more = find_places<typename C::F, C::RELATIVE, C::WINDOW, C::THREADS>(a, a.stream[n], s, b, first, pass,
                                                                                  p.places + n * C::WINDOW) ||
                   more;
        if constexpr (C::RELATIVE)
            more = __syncthreads_or(more);
        else
            __syncthreads();
#pragma unroll
        for (int n = 0; n < C::STREAMS; ++n) {
            const T* query = plane_of<T>(a.stream[n].query, b, h, s.start);
            Place* places = p.places + n * C::WINDOW;
            if constexpr (C::RELATIVE) {
                load_biased<T, D, C::WINDOW, C::THREADS>(p.content + n * C::WINDOW * LD<D>,
                                                         p.position + n * C::WINDOW * LD<D>, a, query,
                                                         a.stream[n].query.row, places, h);
                if (C::F::SEGMENTS && a.key_segments != nullptr)
                    segment_products<T, C::WINDOW, C::WARPS>(a, query, a.stream[n].query.row, places, h);
            } else {
                load_places<T, D, C::ROWS, C::THREADS>(p.content, query, a.stream[n].query.row, places, a.head_size,
                                                       false);
            }
        }
        __syncthreads();
        const Lines<C> lines = lines_of<C>(p);
        const int begin = C::SPLIT ? p.walk->begin : 0, tiles = ceil_div(p.walk->high, C::BN);
        // Few queries leave warps without any, which have but their share of the copies to do.
        const bool idle = C::SPLIT && p.places[first_row_of_warp<C>()].number < 0;
        float o[M][D / 8][4];
        RunningRows rows[M];
#pragma unroll
        for (int m = 0; m < M; ++m) clear(o[m]);
        Bands<C> bands(p.bands);
        p.ring.base = 0;
        fetch<C>(p, p.ring, begin);
        // float32 gives what it has to the result after so many keys, and begins anew.  A part of the keys has no more;
        // beside others that are split a short sequence keeps the bits that it has alone.
        constexpr bool GIVES = C::WIDE;
        for (int from = begin;; from += TERMS_OF_A_SUM / C::BN) {
            const int to = GIVES ? min(from + TERMS_OF_A_SUM / C::BN, tiles) : tiles;
            for (int t = from; t < to; ++t) {
                cp_async_wait<0>();
                __syncthreads();
                Ring<T, D, C::RING> next = p.ring;
                next.move(C::BN);
                if (t + 1 < tiles) fetch<C>(p, next, t + 1);
                const int first_j = t * C::BN;
                std::uint32_t seen[M];
                const Tile tile = idle ? Tile::EMPTY : tile_at<C>(seen, lines, first_j, by_number);
                if (tile != Tile::EMPTY) {
                    float c[M][N][4];
                    products_of_tile<C>(c, p, t, bands);
                    finish<C>(c, tile, seen, lines, first_j);
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        softmax_step(rows[m], c[m], o[m]);
                        if (C::F::DROPOUT && lines.of(m).drops) {
                            const std::uint32_t bits = kept_bits<N>(lines.of(m).draws, lines.line(m, 0).number,
                                                                    lines.line(m, 1).number, first_j);
#pragma unroll
                            for (int n = 0; n < N; ++n)
#pragma unroll
                                for (int e = 0; e < 4; ++e)
                                    if ((bits >> (4 * n + e) & 1) == 0) c[m][n][e] = 0.0f;
                        }
                    }
                    multiply_scores<T, D>(o, c, p.values + t % 2 * C::KEYS);
                } else {
                    bands.skip();
                }
                p.ring = next;
            }
            const bool last = !GIVES || to >= tiles;
            if (last) cp_async_wait<0>();
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const Stream& stream = a.stream[C::STREAMS == 2 ? m : 0];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Place& place = p.places[first_row_of_warp<C>() + m * C::STEP + lane_id() / 4 + half * 8];
                    if (C::SPLIT && is_split(a, p.walk->sequence))
                        store_part(a, p.walk->b * a.heads + p.walk->h, p.walk->begin * C::BN / KEYS_OF_PART,
                                   place.number, half, rows[m], o[m]);
                    else
                        store_row<T>(a, stream, p.walk->sequence, b, h, place.number, half, rows[m], o[m], &place,
                                     GIVES && from != begin, last);
                }
                if (!last) {
                    clear(o[m]);
                    rows[m].weight[0] = rows[m].weight[1] = 0.0f;
                }
            }
            if (last) break;
        }
        if (!C::RELATIVE || !more) return;
        __syncthreads();
    }
}

// Tiles of the forward kernel.
template <class T, int D, class F, bool RELATIVE, int STREAMS, bool SMALL>
struct ForwardTileOf {
    static constexpr bool WIDE = sizeof(T) == 4, LONG = D > 64;
    // Masks and a second tile of queries together would not fit the registers.
    static constexpr int M = RELATIVE ? STREAMS : WIDE || HIDES<F> || F::BIAS ? 1 : 2;
    static constexpr int BN = SMALL || STREAMS == 2 || (WIDE && LONG) ? 16 : RELATIVE || WIDE || LONG ? 32 : 64;
    static constexpr int WARPS = WIDE && LONG ? (SMALL ? 1 : 2) : 4;
    using Tile = WalkTile<T, D, F, RELATIVE, STREAMS, M, BN, WARPS>;
    static_assert(Tile::SHARED <= (TILES_DIFFER<T, D, RELATIVE> && !SMALL ? MAX_SHARED : MIN_SHARED));
};

// Starts the kernel for head sizes up to D, of one of the op's sets of features.
template <class Sets, class T, int D, bool RELATIVE, int STREAMS, bool SMALL>
void launch_attention_fwd_of(const AttentionCall& a, CudaStream stream) {
    auto run = [&](auto tile) {
        using C = decltype(tile);
        std::int64_t windows = 1;
        for (int n = 0; n < STREAMS; ++n) {
            const std::int64_t more = windows_of_block<C>(a, a.stream[n]);
            windows = more > windows ? more : windows;
        }
        const std::int64_t parts = C::SPLIT ? parts_of_call(a) : 1;
        launch<attention_fwd<C>, C::SHARED>(grid_of(windows * a.batch * a.heads * parts), C::THREADS, stream, a);
    };
    if constexpr (STREAMS == 1) {
        using Largest = typename ForwardTileOf<T, D, typename Sets::Largest, RELATIVE, STREAMS, SMALL>::Tile;
        // What is bound by memory has time for all features' questions.
        if (a.partial != nullptr) return run(SplitTile<Largest>());
    }
    Sets::choose(a,
                 [&](auto set) { run(typename ForwardTileOf<T, D, decltype(set), RELATIVE, STREAMS, SMALL>::Tile()); });
}

}  // namespace pyxlbert::cuda
