// The running softmax of the forward kernels, and what becomes of a row in the end.
//
// Source: Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithm 1.
#pragma once
#include "cuda/scores.cuh"

namespace pyxlbert::cuda {

// Of a thread's two rows of a tile: the largest score so far, and the thread's share of the sum of the weights.
struct RunningRows {
    float top[2] = {-INFINITY_, -INFINITY_}, weight[2] = {0.0f, 0.0f};
};

// Scores c [16, 8 N] become weights against the largest so far, by which the sums o [16, 8 K] of the tiles before are
// scaled down.
template <int N, int K>
DEVICE void softmax_step(RunningRows& rows, float (&c)[N][4], float (&o)[K][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float above = rows.top[half];
#pragma unroll
        for (int n = 0; n < N; ++n) above = fmaxf(above, fmaxf(c[n][half * 2], c[n][half * 2 + 1]));
        above = fmaxf(above, __shfl_xor_sync(0xffffffffu, above, 1));
        above = fmaxf(above, __shfl_xor_sync(0xffffffffu, above, 2));
        // A row that has seen nothing yet stays at -inf, from which nothing may be subtracted.
        const float level = above == -INFINITY_ ? 0.0f : above;
        const float less = exp_of_difference(rows.top[half], level);
        rows.top[half] = above;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& x = c[n][half * 2 + e];
                x = exp_of_difference(x, level);
                sum += x;
            }
        rows.weight[half] = rows.weight[half] * less + sum;
#pragma unroll
        for (int d = 0; d < K; ++d) {
            o[d][half * 2] *= less;
            o[d][half * 2 + 1] *= less;
        }
    }
}

// What becomes of a row whose weights, against the largest score, have this sum.
struct RowEnd {
    float factor;  // of the sums of weighted values
    bool some;     // else zeros, and not what a masked row's zeros times infinity would be
    float lse;
};

DEVICE RowEnd end_of_row(const AttentionCall& a, const Sequence& s, float top, float sum) {
    // A NaN among the scores is one in the weights.
    const bool bad = s.wrong || sum != sum, some = sum > 0.0f;
    return {bad    ? NAN_
            : some ? a.dropout.scale / sum
                   : 0.0f,
            bad || some,
            sum != sum ? sum
            : some     ? top + logf(sum)
                       : INFINITY_};
}

// Writes out and lse of one of a thread's two rows, query `number`; below 0 there is none.  A whole warp calls it.
template <class T, int K>
DEVICE void store_row(const AttentionCall& a, const Stream& stream, const Sequence& s, int b, int h, int number,
                      int half, const RunningRows& rows, const float (&o)[K][4]) {
    float sum = rows.weight[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (number < 0) return;
    const RowEnd end = end_of_row(a, s, rows.top[half], sum);
    T* out = static_cast<T*>(stream.out) + result_row(a, b, h, s.start, stream.rows, number) * a.head_size +
             lane_id() % 4 * 2;
#pragma unroll
    for (int d = 0; d < K; ++d) {
        if (d * 8 >= a.head_size) break;
        store_pair(out + d * 8, end.some ? o[d][half * 2] * end.factor : 0.0f,
                   end.some ? o[d][half * 2 + 1] * end.factor : 0.0f);
    }
    if (lane_id() % 4 == 0) stream.lse[statistics_at(a, b, h, s.start, stream.rows) + number] = end.lse;
}

}  // namespace pyxlbert::cuda
