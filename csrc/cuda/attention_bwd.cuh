// The backward kernels of attention, relative_attention and two_stream_attention, from lse alone.
//
//     rows      a block per (queries, head):   delta = sum of dout * out; what lse is short of; the queries with biases
//     keys      a block per (keys, head):      walks all queries, of both streams: dkey, dvalue
//     key_rows  the same without a table of positions, where the registers have room for it
//     queries   a block per (queries, head):   walks the keys: dquery, and the sums over queries that biases' gradients
//                                              are made of
//     table     a block per (rows of the table, head, part of the batch):   walks all queries of the part that read
//                                              these rows: the part's sum for dtable
//     bias      a block per tile of the bias:  walks whatever the bias is broadcast over
//
// Each computes the scores again.  Nothing is added up by two blocks, so that the same bits come out every time.
//
// Where the sum runs over queries a warp of `keys` or `table` has 16 of them as everywhere; its part of the weights and
// of the scores' gradients goes through shared memory, where the warp that has the keys reads it transposed.  A warp of
// `key_rows` has scores with a row for each key, and what it adds up never leaves its registers.
//
// Source: Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithm 2.
#pragma once
#include "cuda/attention_bwd_key_rows.cuh"
#include "cuda/attention_bwd_keys.cuh"
#include "cuda/attention_bwd_queries.cuh"
#include "cuda/attention_bwd_rows.cuh"

namespace pyxlbert::cuda {

// Tiles of the backward kernels that walk the keys.
template <class T, int D, class F, bool RELATIVE, bool SMALL>
struct BackwardTileOf {
    static constexpr bool WIDE = sizeof(T) == 4, LONG = D > 64;
    // Twice 16 queries to a warp where the registers have room for both: what it reads of keys and values serves twice.
    static constexpr int M = WIDE || LONG || RELATIVE ? 1 : 2;
    static constexpr int BN = SMALL || (LONG && (WIDE || RELATIVE)) ? 16 : 32;
    static constexpr int WARPS = (WIDE && LONG ? 2 : 4) / (SMALL ? 2 : 1);
    using Tile = WalkTile<T, D, F, RELATIVE, 1, M, BN, WARPS>;
    // What it reads of the queries serves twice as many keys where no masks take registers.  Of 99 KiB one block alone
    // would find room.
    static constexpr bool WIDENS = M == 2 && !ASKS_FIRST<F>;
    using Wide = WalkTile<T, D, F, RELATIVE, 1, M, WIDENS ? 64 : BN, WARPS>;
    // `rows` reads memory and rarely walks: it takes the least room, so that many of its blocks share a multiprocessor.
    using Rows = WalkTile<T, D, F, RELATIVE, 1, 1, 16, WARPS>;
};

// Shared memory of which two blocks have half of an A100's multiprocessor each, 1 KiB of it being the system's.
constexpr std::size_t HALF_OF_A100 = (164 / 2 - 1) * 1024;
// Of 16-bit elements and heads up to 64 two blocks run at a time.
template <class T, int D, bool SMALL, bool RELATIVE>
constexpr std::size_t BACKWARD_ROOM = sizeof(T) == 2 && D <= 64                ? HALF_OF_A100
                                      : TILES_DIFFER<T, D, RELATIVE> && !SMALL ? MAX_SHARED
                                                                               : MIN_SHARED;

template <class T, int D, class F, bool RELATIVE, bool SMALL>
void launch_attention_bwd_of(const AttentionCall& a, CudaStream stream) {
    using Tiles = BackwardTileOf<T, D, F, RELATIVE, SMALL>;
    using R = typename Tiles::Rows;
    constexpr std::size_t ROOM = BACKWARD_ROOM<T, D, SMALL, RELATIVE>;
    const std::int64_t planes = static_cast<std::int64_t>(a.batch) * a.heads;
    for_each_stream(a, [&](const AttentionCall& one) {
        const std::int64_t windows = windows_of(one, one.stream[0], R::WINDOW);
        launch<attention_bwd_rows<R>, R::SHARED>(grid_of(windows * planes), R::THREADS, stream, one);
    });
    // Gradients that nobody needs have no address.
    if (a.dkey != nullptr) {
        if constexpr (!FITS_KEY_ROWS<T, D, RELATIVE>) {
            using S = SumTile<T, D, F, RELATIVE, SMALL>;
            static_assert(shared_of_keys<S>() <= ROOM);
            launch<attention_bwd_keys<S>, shared_of_keys<S>()>(grid_of(ceil_div(a.keys, S::BK) * planes), S::THREADS,
                                                               stream, a);
        } else {
            using K = KeyTile<T, D, F>;
            static_assert(K::SHARED <= ROOM);
            launch<attention_bwd_key_rows<K>, K::SHARED>(grid_of(ceil_div(a.keys, K::BK) * planes), K::THREADS, stream,
                                                         a);
        }
    }
    with_tiles<Tiles::WIDENS>([&](auto small) {
        using W = std::conditional_t<decltype(small)::value, typename Tiles::Tile, typename Tiles::Wide>;
        using Q = QueriesTile<W>;
        static_assert(Q::SHARED <= ROOM);
        for_each_stream(a, [&](const AttentionCall& one) {
            if (one.stream[0].dquery == nullptr) return;
            const std::int64_t windows = windows_of(one, one.stream[0], W::WINDOW);
            launch<attention_bwd_queries<W>, Q::SHARED>(grid_of(windows * planes * Q::SPLIT), W::THREADS, stream, one);
        });
    });
}

}  // namespace pyxlbert::cuda
