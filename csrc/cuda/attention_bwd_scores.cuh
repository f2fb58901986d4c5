// What the backward kernels of attention share: weights and their gradients from lse, tile by tile.
#pragma once
#include "cuda/attention_fwd.cuh"

namespace pyxlbert::cuda {

// exp(score - lse), and so the weight.  lse is the logarithm of a sum, rounded; `lse_correction` is what the rounding
// left.  No weight is above 1, even where another order of adding left a score of 1e10 a rounding above the largest.
DEVICE float weight_of(float score, float lse, float lse_correction) {
    const float exponent = __fsub_rn(__fsub_rn(score, lse), lse_correction);
    return exp2_approx(__fmul_rn(min_or_nan(exponent, 0.0f), LOG2E));
}

// The running softmax of a row as one thread sees it: the largest of its scores, and the sum of the others' weights.
struct Running {
    float top = -INFINITY_, sum = 0.0f;

    template <int N>
    DEVICE void add(const float (&scores)[N]) {
        float above = top;
        for (int n = 0; n < N; ++n) above = fmaxf(above, scores[n]);
        // Nothing may be subtracted from -inf.
        if (above == -INFINITY_) return;
        float more = 0.0f;
        for (int n = 0; n < N; ++n) more += exp_of_difference(scores[n], above);
        sum = sum * exp_of_difference(top, above) + more;
        top = above;
    }

    // Both halves of a row, in every lane that asks.
    DEVICE void join(int lanes_apart) {
        const float other_top = __shfl_xor_sync(0xffffffffu, top, lanes_apart);
        const float other_sum = __shfl_xor_sync(0xffffffffu, sum, lanes_apart);
        const float above = fmaxf(top, other_top);
        if (above != -INFINITY_)
            sum = sum * exp_of_difference(top, above) + other_sum * exp_of_difference(other_top, above);
        top = above;
    }
};

// What forward and `rows` have found out about the queries of some places.
template <int ROWS, int THREADS>
DEVICE void find_statistics(const AttentionCall& a, const Stream& stream, const Sequence& s, int b, int h,
                            Place* places) {
    const std::int64_t at = statistics_at(a, b, h, s.start, stream.rows);
    for (int r = static_cast<int>(threadIdx.x); r < ROWS; r += THREADS) {
        const int number = places[r].number;
        if (number < 0) continue;
        places[r].lse = stream.lse[at + number];
        places[r].delta = stream.delta[at + number];
        places[r].lse_correction = stream.lse_correction[at + number];
    }
}

// The same by cp.async: nobody waits here for what global memory has.
template <int ROWS, int THREADS>
DEVICE void ask_statistics(const AttentionCall& a, const Stream& stream, const Sequence& s, int b, int h,
                           Place* places) {
    const std::int64_t at = statistics_at(a, b, h, s.start, stream.rows);
    for (int r = static_cast<int>(threadIdx.x); r < ROWS; r += THREADS) {
        Place& place = places[r];
        if (place.number < 0) continue;
        cp_async4(&place.lse, stream.lse + at + place.number, true);
        cp_async4(&place.delta, stream.delta + at + place.number, true);
        cp_async4(&place.lse_correction, stream.lse_correction + at + place.number, true);
    }
    cp_async_commit();
}

// A contiguous tensor like the query, a plane of it.
template <class T>
DEVICE T* like_query(const AttentionCall& a, const Stream& stream, void* data, int b, int h, std::int64_t start) {
    return static_cast<T*>(data) + result_row(a, b, h, start, stream.rows, 0) * a.head_size;
}

// Weights p, with DROPPED what dropout leaves of them, and gradients of the scores from those of the weights dp, in
// place: c becomes p, dp becomes ds.  `kept` says by its bit 4 n + e what is left.
template <int N, bool DROPPED>
DEVICE void gradients_of_scores(float (&c)[N][4], float (&dp)[N][4], const Place& upper, const Place& lower,
                                std::uint32_t kept, float scale) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const Place& place = e < 2 ? upper : lower;
            const float p = weight_of(c[n][e], place.lse, place.lse_correction);
            const float factor = (kept >> (4 * n + e) & 1) != 0 ? scale : 0.0f;
            c[n][e] = DROPPED ? p * factor : p;
            dp[n][e] = p * (dp[n][e] * factor - place.delta);
        }
}

// What causality hides where rows are uniform is a constant: it has no gradient.  first0 and first1 are the keys of
// c[0][0] and c[0][2].
template <int N>
DEVICE void clear_constants(float (&ds)[N][4], const Masks& masks, int number0, int number1, int first0, int first1) {
    if (!(masks.causal && masks.uniform_rows)) return;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if ((e < 2 ? first0 : first1) + n * 8 + (e & 1) > (e < 2 ? number0 : number1) + masks.shift)
                ds[n][e] = 0.0f;
}

}  // namespace pyxlbert::cuda
