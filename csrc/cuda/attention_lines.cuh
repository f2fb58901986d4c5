// What kernels of attention share about rows: which queries a block has, tiles of theirs and of keys, the band of the
// position table.
//
// A block takes a window of positions, and of each stream the queries that stand there; a warp takes 16 neighbouring
// positions, and up to 16 queries.  Query i at position p meets key j at row offset + j - p of the table.  Of a warp's
// queries and BN keys that is a band of BN + 15 rows: the product of the 16 queries with them is 16 lines, each of
// which needs BN neighbours, from a column of its own on.  So the product is written to shared memory line by line and
// read with a shift:
//
//     band column   0 .................... 15 ................... BN + 15
//     position  0                           x x x x x x x x x x x x
//     position  1                         x x x x x x x x x x x x        x: the BN elements of a line
//     ...                             ...
//     position 15   x x x x x x x x x x x x
//
// A warp that walks the keys finds the first 16 columns of a tile's band in the last 16 of the one before: the band is
// a ring of BN + 16 columns, of which BN are computed for a tile, as many as of the content's product.  The rows of the
// table lie in a ring too, BN of which come with each tile of keys.
//
// Source: Dai et al., "Transformer-XL", https://arxiv.org/abs/1901.02860, appendix B (`rel_shift`); Yang et al.,
// "XLNet", https://arxiv.org/abs/1906.08237, section 2.
#pragma once
#include "cuda/scores.cuh"

namespace pyxlbert::cuda {

// The first place of sorted x [count] with at least `wanted`.
DEVICE int lower_bound(const std::int32_t* x, int count, int wanted) {
    int low = 0;
    while (low < count) {
        const int middle = (low + count) / 2;
        if (x[middle] < wanted)
            low = middle + 1;
        else
            count = middle;
    }
    return low;
}

// The queries at positions first .. first + WINDOW - 1, 16 of each 16 positions in each pass; whether this thread knows
// of more.  Without positions of their own there is one query at each.  RELATIVE: there may be positions, and F
// says whether ranks and segments.  ASKED: the statistics of queries that are there are asked for (ask_statistics), and
// left to that.
template <class F, bool RELATIVE, int WINDOW, int THREADS, bool ASKED = false>
DEVICE bool find_places(const AttentionCall& a, const Stream& stream, const Sequence& s, int b, int first, int pass,
                        Place* places) {
    [[maybe_unused]] const std::int32_t* rank = numbers_of(a, stream.rank, b, s.start, stream.rows);
    [[maybe_unused]] const std::int32_t* segments = numbers_of(a, stream.segments, b, s.start, stream.rows);
    bool more = false;
    for (int r = static_cast<int>(threadIdx.x); r < WINDOW; r += THREADS) {
        Place place = {-1, first + r, 0, 0, 0, 0.0f, 0.0f, INFINITY_, 0.0f, 0.0f};
        if (!RELATIVE || stream.positions == nullptr) {
            if (first + r < min(stream.rows, s.queries)) place.number = first + r;
        } else {
            const std::int32_t* positions = stream.positions + static_cast<std::int64_t>(b) * stream.rows;
            const int from = first + r / 16 * 16;
            const int low = lower_bound(positions, stream.rows, from),
                      high = lower_bound(positions, stream.rows, from + 16);
            const int at = low + pass * 16 + r % 16;
            place.position = at < high ? positions[at] : from;
            if (at < high) place.number = stream.numbers[static_cast<std::int64_t>(b) * stream.rows + at];
            more = more || low + (pass + 1) * 16 < high;
        }
        // Scores of what is no query are computed too, and without a table of positions a bias is read for them.
        if constexpr (RELATIVE)
            place.mask_row = stream.options.mask_by_position ? place.position : place.number;
        else
            place.mask_row = max(place.number, 0);
        if (RELATIVE && place.number >= 0) {
            if (F::RANKS && rank != nullptr) place.rank = rank[place.number];
            if (F::SEGMENTS && segments != nullptr) place.segment = segments[place.number];
        }
        if (!ASKED || place.number < 0) {
            places[r] = place;
        } else {
            Place& to = places[r];
            to.number = place.number;
            to.position = place.position;
            if (F::MASK || F::BIAS) to.mask_row = place.mask_row;
            if (F::RANKS) to.rank = place.rank;
            if (F::SEGMENTS) to.segment = place.segment;
        }
    }
    return more;
}

// Whether no query of a stream stands at positions first .. first + WINDOW - 1; the same for all threads of a block.
template <bool RELATIVE, int WINDOW>
DEVICE bool is_empty(const Stream& stream, const Sequence& s, int b, int first) {
    if (!RELATIVE || stream.positions == nullptr) return first >= min(stream.rows, s.queries);
    const std::int32_t* positions = stream.positions + static_cast<std::int64_t>(b) * stream.rows;
    const int at = lower_bound(positions, stream.rows, first);
    return at == stream.rows || positions[at] >= first + WINDOW;
}

// How many windows hold all queries of a stream.
HOST_DEVICE int windows_of(const AttentionCall& a, const Stream& stream, int window) {
    return ceil_div(stream.positions == nullptr ? stream.rows : a.offset + 1, window);
}

// Rows of queries, by their numbers, into a tile [ROWS, D]; zeros where there is none, or where `seen` asks for rows
// that have seen something and one has not.
template <class T, int D, int ROWS, int THREADS>
DEVICE void load_places(T* tile, const T* plane, std::int64_t stride, const Place* places, int head_size, bool seen) {
    constexpr int EACH = 16 / sizeof(T);
#pragma unroll 1
    for (int n = static_cast<int>(threadIdx.x); n < ROWS * (D / EACH); n += THREADS) {
        const int r = n / (D / EACH), c = n % (D / EACH) * EACH, number = places[r].number;
        const bool there = number >= 0 && c < head_size && !(seen && places[r].lse == INFINITY_);
        cp_async16(tile + r * LD<D> + c, plane + (there ? number : 0) * stride + (there ? c : 0), there);
    }
}

// Rows first .. first + ROWS - 1 of a matrix of `count` rows into a tile; zeros where there is none, and for keys whose
// rank hides them, of which nothing is read.
template <class T, int D, int ROWS, int THREADS>
DEVICE void load_rows(T* tile, const T* plane, std::int64_t stride, int first, int count, int head_size,
                      const std::int32_t* rank) {
    constexpr int EACH = 16 / sizeof(T);
#pragma unroll 1
    for (int n = static_cast<int>(threadIdx.x); n < ROWS * (D / EACH); n += THREADS) {
        const int r = n / (D / EACH), c = n % (D / EACH) * EACH, row = first + r;
        bool there = row >= 0 && row < count && c < head_size;
        if (rank != nullptr && there) there = rank[row] != UNSEEN_RANK;
        cp_async16(tile + r * LD<D> + c, plane + (there ? row : 0) * stride + (there ? c : 0), there);
    }
}

// The same into rows y .. y + ROWS - 1 of a ring; `first` is the matrix's row for y.
template <class T, int D, int ROWS, int THREADS, int SIZE>
DEVICE void load_ring(const Ring<T, D, SIZE>& ring, int y, const T* plane, std::int64_t stride, int first, int count,
                      int head_size, const std::int32_t* rank) {
    constexpr int EACH = 16 / sizeof(T);
#pragma unroll 1
    for (int n = static_cast<int>(threadIdx.x); n < ROWS * (D / EACH); n += THREADS) {
        const int r = n / (D / EACH), c = n % (D / EACH) * EACH, row = first + r;
        bool there = row >= 0 && row < count && c < head_size;
        if (rank != nullptr && there) there = rank[row] != UNSEEN_RANK;
        cp_async16(ring.at(y + r) + c, plane + (there ? row : 0) * stride + (there ? c : 0), there);
    }
}

// Adds the bias [H, D] of head h to neighbours of a row.
template <int VEC>
DEVICE void add_bias(const Parameter& bias, int h, int head_size, int c, float (&x)[VEC]) {
    if (bias.data == nullptr) return;
    float more[VEC];
    load_any<VEC>(bias.data, bias.dtype, static_cast<std::int64_t>(h) * head_size + c, more);
#pragma unroll
    for (int e = 0; e < VEC; ++e) x[e] += more[e];
}

// Queries of a window with the content bias and with the position bias; the second tile may be null.
template <class T, int D, int ROWS, int THREADS>
DEVICE void load_biased(T* content, T* position, const AttentionCall& a, const T* plane, std::int64_t stride,
                        const Place* places, int h) {
    constexpr int EACH = 16 / sizeof(T);
    for (int n = static_cast<int>(threadIdx.x); n < ROWS * (D / EACH); n += THREADS) {
        const int r = n / (D / EACH), c = n % (D / EACH) * EACH, number = places[r].number;
        float x[EACH], y[EACH];
#pragma unroll
        for (int e = 0; e < EACH; ++e) x[e] = 0.0f;
        const bool there = number >= 0 && c < a.head_size;
        if (there) load<EACH>(plane + number * stride + c, x);
#pragma unroll
        for (int e = 0; e < EACH; ++e) y[e] = x[e];
        if (there) {
            add_bias<EACH>(a.content_bias, h, a.head_size, c, x);
            add_bias<EACH>(a.position_bias, h, a.head_size, c, y);
        }
        store<EACH>(content + r * LD<D> + c, x);
        store<EACH>(position + r * LD<D> + c, y);
    }
}

// (q + s) e of each query and both segment embeddings, a warp for a query.
template <class T, int ROWS, int WARPS>
DEVICE void segment_products(const AttentionCall& a, const T* plane, std::int64_t stride, Place* places, int h) {
    for (int r = warp_id(); r < ROWS; r += WARPS) {
        const int number = places[r].number;
        float same = 0.0f, other = 0.0f;
        for (int c = lane_id(); c < a.head_size; c += 32) {
            float x[1] = {0.0f}, e0[1], e1[1];
            if (number >= 0) load<1>(plane + number * stride + c, x);
            add_bias<1>(a.segment_bias, h, a.head_size, c, x);
            load_any<1>(a.segment_embedding.data, a.segment_embedding.dtype,
                        static_cast<std::int64_t>(h) * a.head_size + c, e0);
            load_any<1>(a.segment_embedding.data, a.segment_embedding.dtype,
                        static_cast<std::int64_t>(a.heads + h) * a.head_size + c, e1);
            same += x[0] * e0[0];
            other += x[0] * e1[0];
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            same += __shfl_xor_sync(0xffffffffu, same, offset);
            other += __shfl_xor_sync(0xffffffffu, other, offset);
        }
        if (lane_id() == 0) {
            places[r].same = same;
            places[r].other = other;
        }
    }
}

// How many neighbouring sequences share a table.
DEVICE int sequences_of_table(const AttentionCall& a) { return max(1, ceil_div(a.batch, a.tables)); }

// The part of the table that sequence b reads, head h.
template <class T>
DEVICE const T* table_of(const AttentionCall& a, int b, int h) {
    return plane_of<T>(a.table, b / sequences_of_table(a), h, 0);
}

// A warp's band [16, BN + KEPT] in shared memory: of so many columns that a tile finds, and BN that it computes.
template <int BN, int KEPT = 16>
struct Band {
    static constexpr int COLUMNS = BN + KEPT;
    static constexpr int STRIDE = COLUMNS + 8;
    static constexpr int FLOATS = 16 * STRIDE;
    float* line0;   // FLOATS of them
    int first = 0;  // where column 0 lies in the ring

    // Writes 8 N columns from column u on, a multiple of 16: a product's result.
    template <int N>
    DEVICE void write(int u, const float (&c)[N][4]) {
        const int g = lane_id() / 4, t = lane_id() % 4 * 2;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float* at = line0 + g * STRIDE + wrapped(first + u + n * 8) + t;
            at[0] = c[n][0];
            at[1] = c[n][1];
            at[8 * STRIDE] = c[n][2];
            at[8 * STRIDE + 1] = c[n][3];
        }
    }
    DEVICE float read(int line, int column) const { return line0[line * STRIDE + wrapped(first + column)]; }
    // Column BN becomes column 0.
    DEVICE void advance() { first = wrapped(first + BN); }
    static DEVICE int wrapped(int column) { return column >= COLUMNS ? column - COLUMNS : column; }
};

// 8 N columns of a band, from u on: the products of 16 queries with rows y + u .. of a ring.
template <class T, int D, int N, int BN, int SIZE>
DEVICE void band_products(Band<BN>& band, int u, const T* left, const Ring<T, D, SIZE>& ring, int y) {
    float c[N][4];
    clear(c);
    [[maybe_unused]] constexpr int AT_ONCE = STEPS_AT_ONCE<T, D>;
#pragma unroll AT_ONCE
    for (int k = 0; k < D; k += Mma<T>::K) {
        typename Mma<T>::Left a;
        Mma<T>::load_left(a, left, LD<D>, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            typename Mma<T>::Right b;
            Mma<T>::load_rows(b, ring.at(y + u + n * 8), LD<D>, k);
            Mma<T>::multiply(c[n], c[n + 1], a, b);
        }
    }
    band.template write<N>(u, c);
}

}  // namespace pyxlbert::cuda
