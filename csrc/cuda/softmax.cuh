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

// What is subtracted from scores of which this is the largest: a row that has seen nothing yet stays at -inf, from
// which nothing may be subtracted.
DEVICE float level_of(float top) { return top == -INFINITY_ ? 0.0f : top; }

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
        const float level = level_of(above);
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
//
// Where keys come in runs of TERMS_OF_A_SUM, out and the row's place take what all runs so far have found, if there is
// `more` in them already and until this is the `last` one.
template <class T, int K>
DEVICE void store_row(const AttentionCall& a, const Stream& stream, const Sequence& s, int b, int h, int number,
                      int half, const RunningRows& rows, const float (&o)[K][4], Place* place = nullptr,
                      bool more = false, bool last = true) {
    const float top = rows.top[half];
    float sum = rows.weight[half], less = 0.0f;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (more) {
        less = exp_of_difference(place->lse, level_of(top));
        sum += place->delta * less;
    }
    if (!last) {
        __syncwarp();
        if (lane_id() % 4 == 0) {
            place->lse = top;
            place->delta = sum;
        }
    }
    if (number < 0) return;
    const RowEnd end = last ? end_of_row(a, s, top, sum) : RowEnd{1.0f, true, 0.0f};
    T* out = static_cast<T*>(stream.out) + result_row(a, b, h, s.start, stream.rows, number) * a.head_size +
             lane_id() % 4 * 2;
#pragma unroll
    for (int d = 0; d < K; ++d) {
        if (d * 8 >= a.head_size) break;
        float pair[2] = {o[d][half * 2], o[d][half * 2 + 1]};
        if (more) {
            pair[0] += to_float(out[d * 8]) * less;
            pair[1] += to_float(out[d * 8 + 1]) * less;
        }
        store_pair(out + d * 8, end.some ? pair[0] * end.factor : 0.0f, end.some ? pair[1] * end.factor : 0.0f);
    }
    if (last && lane_id() % 4 == 0) stream.lse[statistics_at(a, b, h, s.start, stream.rows) + number] = end.lse;
}

}  // namespace pyxlbert::cuda
