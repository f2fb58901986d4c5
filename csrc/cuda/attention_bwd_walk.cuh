// A walk over queries, which the backward kernels whose sums run over queries share: attention_bwd.cuh's `keys` and
// `table`.
//
// A step is up to BM queries of a stream at BM neighbouring positions.  While one is multiplied the next one's places
// are found and their statistics come; what else it needs is asked for once nobody reads the buffers any more, and
// comes under the sums.
#pragma once
#include "cuda/attention_bwd_scores.cuh"

namespace pyxlbert::cuda {

// Tiles of the kernels whose sums run over queries: QW times 16 queries by KW times BN keys, or rows of the table; each
// warp computes 16 by BN of them, and then adds up the rows of 16 keys, SPLIT warps a share of the columns each.
template <class T_, int D_, class F_, bool RELATIVE_, bool SMALL>
struct SumTile {
    using T = T_;
    using F = F_;
    static constexpr int D = D_;
    static constexpr bool RELATIVE = RELATIVE_;
    static constexpr bool WIDE = sizeof(T) == 4, LONG = D > 64;
    static constexpr int QW = WIDE && (LONG || SMALL) ? 1 : 2;
    static constexpr int KW = (RELATIVE && LONG && !WIDE ? 4 : 2) / (SMALL && LONG ? 2 : 1);
    static constexpr int BN = SMALL || (LONG && (WIDE || RELATIVE)) ? 16 : 32;
    static constexpr int WARPS = QW * KW, THREADS = 32 * WARPS;
    static constexpr int BM = 16 * QW, BK = BN * KW;
    static constexpr int SPLIT = WARPS / (BK / 16), COLUMNS = D / SPLIT;
    static_assert(SPLIT * BK / 16 == WARPS && COLUMNS % 16 == 0);
    static constexpr int RING = BM + BK;
    static constexpr int SCORES_LD = BK + 8;
    static constexpr int QUERIES = BM * LD<D>, KEYS = BK * LD<D>, SCORES = BM * SCORES_LD;
    static constexpr std::size_t PLACES = MASKS_SIZE * 2 + 2 * BM * sizeof(Place);
    static constexpr std::size_t BANDS = RELATIVE ? WARPS * Band<BN>::FLOATS * sizeof(float) : 0;
};

// Where a warp's scores lie in a step's [BM, BK]: 16 rows from here on, and BN columns.
template <class C>
DEVICE int scores_row() {
    return warp_id() % C::QW * 16;
}
template <class C>
DEVICE int scores_column() {
    return warp_id() / C::QW * C::BN;
}

// The rows of keys that a warp adds up, and from which column on.
template <class C>
DEVICE int summed_rows() {
    return warp_id() % (C::BK / 16) * 16;
}
template <class C>
DEVICE int summed_column() {
    return warp_id() / (C::BK / 16) * C::COLUMNS;
}

// A warp's part of a step's weights or their gradients, for the warps that have the keys.
template <class C>
DEVICE void store_scores(typename C::T* scores, const float (&c)[C::BN / 8][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = scores_row<C>() + lane_id() / 4 + half * 8, column = scores_column<C>() + lane_id() % 4 * 2;
#pragma unroll
        for (int n = 0; n < C::BN / 8; ++n)
            store_pair(scores + row * C::SCORES_LD + column + n * 8, c[n][half * 2], c[n][half * 2 + 1]);
    }
}

// The place of a walk over queries.
struct Step {
    int sequence, stream, window, pass;
    bool done;
};

// Walks the queries of sequences `sequence` to `last_sequence` - 1, of both streams.  Side is what meets them:
//
//     sequence(step)          a step's sequence
//     lowest(step)            the first window of a step's stream that may meet it
//     last(step)              the one behind the last
//     enter(step)             a stream begins
//     move()                  the window is the next one
//     fetch(step, places, buffer, whole)   asks for what a step needs; `whole`: nothing of the step before is of use
//     multiply(step, places, buffer)       weights and gradients, for all warps
//     add(buffer)             the sums
//     give(begun)             gives the sums to the results, which have some already if they are begun
//     clear_sums()            begins anew
template <class C, class Side>
struct QueryWalk {
    const AttentionCall& a;
    Side& side;
    Place* places;  // of two steps
    int h, first_sequence, last_sequence;
    Step step = {};
    bool more = false;  // queries stand at the step's positions

    // The next step that has queries, from this one on.
    DEVICE Step settle(Step step) const {
        while (step.sequence < last_sequence) {
            if (step.window >= side.last(step)) {
                const bool other = step.stream + 1 < a.streams;
                step = {other ? step.sequence : step.sequence + 1, other ? step.stream + 1 : 0, 0, 0, false};
                step.window = side.lowest(step);
            } else if (is_empty<C::RELATIVE, C::BM>(a.stream[step.stream], side.sequence(step), step.sequence,
                                                    step.window * C::BM)) {
                ++step.window;
            } else {
                break;
            }
        }
        step.done = step.sequence >= last_sequence;
        return step;
    }

    // Finds a step's queries, and asks for their statistics; whether more stand at its positions.
    DEVICE bool find(const Step& step, int buffer) const {
        const Stream& stream = a.stream[step.stream];
        const Sequence s = side.sequence(step);
        Place* found = places + buffer * C::BM;
        const bool more = find_places<typename C::F, C::RELATIVE, C::BM, C::THREADS, true>(
            a, stream, s, step.sequence, step.window * C::BM, step.pass, found);
        ask_statistics<C::BM, C::THREADS>(a, stream, s, step.sequence, h, found);
        return more;
    }

    // Finds the first step.
    DEVICE void begin() {
        step = {first_sequence, 0, 0, 0, false};
        step.window = side.lowest(step);
        step = settle(step);
        if (!step.done) {
            more = find(step, 0);
            cp_async_wait<0>();
            more = __syncthreads_or(more);
            side.enter(step);
            side.fetch(step, places, 0, true);
        }
        cp_async_commit();
    }

    // Takes all steps that are left, or MOST of them; whether that were the last.
    template <int MOST = 0>
    DEVICE bool run() {
        using T = typename C::T;
        static_assert(MOST % 2 == 0, "the next run begins with the first buffer");
        for (int taken = 0; !step.done && (MOST == 0 || taken < MOST); ++taken) {
            const int buffer = taken % 2;
            cp_async_wait<0>();
            __syncthreads();
            Place* here = places + buffer * C::BM;
            if (C::F::SEGMENTS && C::RELATIVE && a.key_segments != nullptr) {
                const Heads& query = a.stream[step.stream].query;
                segment_products<T, C::BM, C::WARPS>(a, plane_of<T>(query, step.sequence, h, side.sequence(step).start),
                                                     query.row, here, h);
                __syncthreads();
            }
            Step next = step;
            if (C::RELATIVE && more) {
                ++next.pass;
            } else {
                ++next.window;
                next.pass = 0;
            }
            next = settle(next);
            bool next_more = false;
            if (!next.done) next_more = find(next, 1 - buffer);
            side.multiply(step, here, buffer);
            // The next step's statistics, which have had the time of the products to come.
            cp_async_wait<0>();
            // From here on nobody reads rings, masks, these places, or tiles of which there is one.
            next_more = __syncthreads_or(next_more);
            if (!next.done) {
                const bool other = next.sequence != step.sequence || next.stream != step.stream;
                const bool moves = !other && next.window == step.window + 1;
                if (moves) side.move();
                if (other) side.enter(next);
                side.fetch(next, places + (1 - buffer) * C::BM, 1 - buffer,
                           other || (!moves && next.window != step.window));
            }
            side.add(buffer);
            step = next;
            more = next_more;
        }
        const bool last = MOST == 0 || step.done;
        if (last) cp_async_wait<0>();
        return last;
    }

    // The whole walk: float32 gives what it has to the result after so many queries, and begins anew.
    DEVICE void run_and_give() {
        begin();
        for (bool begun = false;; begun = true) {
            const bool last = run<C::WIDE ? TERMS_OF_A_SUM / C::BM : 0>();
            side.give(begun);
            if (last) return;
            side.clear_sums();
        }
    }
};

// sum [16, COLUMNS] += 16 columns of a step's scores [BM, BK], transposed, times `tile` [BM, D] from summed_column on.
template <class C>
DEVICE void add_step(float (&sum)[1][C::COLUMNS / 8][4], const typename C::T* scores, const typename C::T* tile,
                     int k) {
    using T = typename C::T;
    typename Mma<T>::Left left[1];
    Mma<T>::load_left_transposed(left[0], scores + summed_rows<C>(), C::SCORES_LD, k);
    multiply_columns<T, C::D>(sum, left, tile + summed_column<C>() + k * LD<C::D>);
}

}  // namespace pyxlbert::cuda
