// The cross entropy of rows of logits and its gradient, in place: three walks over a row, which stays in the
// second-level cache, where separate passes over all rows would write five tensors of their size.
#include "softmax_slope.h"

#if defined(__AVX512BF16__)
#include "math.h"
#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {

void softmax_slope(const SoftmaxSlope& a) {
    const std::int64_t n = a.columns;
    const auto row = [&](std::int64_t i) PYXLBERT_LAMBDA {
        bf16* x = a.logits + i * n;
        Vec most = set1(-__builtin_inff());
        for_vectors(n, [&](std::int64_t j, int count) PYXLBERT_LAMBDA {
            const Vec v = load_some(x + j, count);
            most = max(most, count == W ? v : _mm512_mask_mov_ps(most, first_lanes(count), v));
        });
        const float highest = reduce_max(most);
        const float wanted = reduce_add(load(x + a.labels[i], 1));
        Vec total = zero(), lost = zero(), sum = zero();
        for_vector_runs(
            n,
            [&](std::int64_t j, int count) PYXLBERT_LAMBDA {
                const Vec e = exp(clamp(load_some(x + j, count) - set1(highest), -87.0f, 0.0f));
                sum += count == W ? e : keep_first(e, count);
            },
            [&]() PYXLBERT_LAMBDA {
                add_exactly(total, lost, sum);
                sum = zero();
            });
        const float all = reduce_add(total);
        a.found[3 * i] = highest;
        a.found[3 * i + 1] = all;
        a.found[3 * i + 2] = wanted;
        const Vec share = set1(a.scale / all);
        for_vectors(n, [&](std::int64_t j, int count) PYXLBERT_LAMBDA {
            store_some(x + j, exp(clamp(load_some(x + j, count) - set1(highest), -87.0f, 0.0f)) * share, count);
        });
        // The probability is taken from the logit again, for it has been rounded.
        const float at = reduce_add(keep_first(exp(clamp(set1(wanted - highest), -87.0f, 0.0f)), 1)) / all;
        store(x + a.labels[i], set1((at - 1.0f) * a.scale), 1);
    };
    in_team(team(a.threads, a.rows * n * 4), [&](int thread, int threads) PYXLBERT_WORK {
        const std::int64_t last = block_start(a.rows, threads, thread + 1);
        for (std::int64_t i = block_start(a.rows, threads, thread); i < last; ++i) row(i);
    });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL

#endif
