// Few queries against long keys: the keys are split over blocks, and what each has found is joined in order.
//
//     forward   a block per (window of queries, head, part of the keys):   sums of weighted values [M, D], of each row
//                                                                          the largest score and the sum of its weights
//     join      a warp per (query, head):                                  out and lse, from its parts one after
//     another
//
// Every part has KEYS_OF_PART keys, and a sequence of fewer than MANY_KEYS is not split, whatever others there are: a
// row has the same bits in any batch and with any padding.  Packed sequences are never split: they have as many queries
// as keys.
//
// Source: Dao et al., "Flash-Decoding for long-context inference",
// https://crfm.stanford.edu/2023/10/12/flashdecoding.html
#pragma once
#include "cuda/softmax.cuh"

namespace pyxlbert::cuda {

// Warps of a block that joins parts.
constexpr int JOIN_WARPS = 4;

// Keys of a sequence that are read: where a row without any key averages over all of them, those that lengths leave out
// are too.
DEVICE int keys_read(const AttentionCall& a, const Sequence& s) { return a.relative.uniform_rows ? s.extent : s.keys; }

// Parts of a sequence that has all keys.
HOST_DEVICE int parts_of_call(const AttentionCall& a) {
    return a.partial == nullptr ? 1 : ceil_div(a.keys, KEYS_OF_PART);
}

DEVICE bool is_split(const AttentionCall& a, const Sequence& s) {
    return a.partial != nullptr && keys_read(a, s) >= MANY_KEYS;
}

DEVICE int parts_of(const AttentionCall& a, const Sequence& s) {
    return is_split(a, s) ? ceil_div(keys_read(a, s), KEYS_OF_PART) : 1;
}

// The parts of a row lie beside each other in [B * H, rows, parts]: sums [.., D], and behind all of them [.., 2] the
// largest score and the sum of the weights.  This is part 0 of a row.
DEVICE std::int64_t parts_of_row(const AttentionCall& a, int plane, int number) {
    return (static_cast<std::int64_t>(plane) * a.stream[0].rows + number) * parts_of_call(a);
}
DEVICE float* sums_of_part(const AttentionCall& a, std::int64_t at) { return a.partial + at * a.head_size; }
DEVICE float* statistics_of_part(const AttentionCall& a, std::int64_t at) {
    return sums_of_part(a, parts_of_row(a, a.batch * a.heads, 0)) + at * 2;
}

// Writes what a part has found for one of a thread's two rows, query `number`; below 0 there is none.  A whole warp
// calls it.
template <int K>
DEVICE void store_part(const AttentionCall& a, int plane, int part, int number, int half, const RunningRows& rows,
                       const float (&o)[K][4]) {
    float sum = rows.weight[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (number < 0) return;
    const std::int64_t at = parts_of_row(a, plane, number) + part;
    float* out = sums_of_part(a, at) + lane_id() % 4 * 2;
#pragma unroll
    for (int d = 0; d < K; ++d) {
        if (d * 8 >= a.head_size) break;
        store_pair(out + d * 8, o[d][half * 2], o[d][half * 2 + 1]);
    }
    if (lane_id() % 4 == 0) store_pair(statistics_of_part(a, at), rows.top[half], sum);
}

template <class T>
__global__ void __launch_bounds__(32 * JOIN_WARPS) join_parts(const __grid_constant__ AttentionCall a) {
    const Stream& stream = a.stream[0];
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * JOIN_WARPS + warp_id();
    if (row >= static_cast<std::int64_t>(a.batch) * a.heads * stream.rows) return;
    const int plane = static_cast<int>(row / stream.rows), b = plane / a.heads, h = plane % a.heads;
    int number = static_cast<int>(row % stream.rows);
    const Sequence s = sequence_of(a, b);
    if (!is_split(a, s)) return;
    if (stream.positions != nullptr) {
        const std::int64_t at = static_cast<std::int64_t>(b) * stream.rows + number;
        if (stream.positions[at] < 0) return;
        number = stream.numbers[at];
    }
    const int parts = parts_of(a, s);
    const std::int64_t first = parts_of_row(a, plane, number);
    const float* statistics = statistics_of_part(a, first);
    float top = -INFINITY_;
    for (int part = lane_id(); part < parts; part += 32) top = fmaxf(top, statistics[part * 2]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const float level = level_of(top);
    // A lane has two columns, and two more where there are more than 64.
    const int column[2] = {lane_id() * 2, 64 + lane_id() * 2};
    float sum = 0.0f, x[2][2] = {};
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
        const float less = exp_of_difference(statistics[part * 2], level);
        sum += statistics[part * 2 + 1] * less;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float more[2] = {};
            if (column[n] < a.head_size) load<2>(sums_of_part(a, first + part) + column[n], more);
            x[n][0] += more[0] * less;
            x[n][1] += more[1] * less;
        }
    }
    const RowEnd end = end_of_row(a, s, top, sum);
    T* out = static_cast<T*>(stream.out) + result_row(a, b, h, s.start, stream.rows, number) * a.head_size;
#pragma unroll
    for (int n = 0; n < 2; ++n)
        if (column[n] < a.head_size)
            store_pair(out + column[n], end.some ? x[n][0] * end.factor : 0.0f, end.some ? x[n][1] * end.factor : 0.0f);
    if (lane_id() == 0) stream.lse[statistics_at(a, b, h, s.start, stream.rows) + number] = end.lse;
}

}  // namespace pyxlbert::cuda
