// Sums of many terms whose error does not grow with their number.  A float32 sum that stays in one accumulator loses a
// share of itself with every term of the same sign: 1e-5 after a few thousand.
//
// So RUN_LENGTH terms are added one after the other, which costs what it always did, and the sum of such a run is added
// to the total together with what earlier additions have rounded off.
//
// Source: Kahan, "Further remarks on reducing truncation errors", Communications of the ACM 8 (1965), page 40.
#pragma once
#include "simd.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

constexpr std::int64_t RUN_LENGTH = 32;

// total += x; `lost` is what the total is too large by.
PYXLBERT_INLINE void add_exactly(Vec& total, Vec& lost, Vec x) {
    const Vec wanted = x - lost, sum = total + wanted, excess = (sum - total) - wanted;
    // A sum that is infinite or becomes so has lost nothing that could be given back: only what is finite is 0 * x = 0.
    lost = excess * zero() == zero() ? excess : zero();
    total = sum;
}

PYXLBERT_INLINE void add_exactly(float& total, float& lost, float x) {
    const float wanted = x - lost, sum = total + wanted, excess = (sum - total) - wanted;
    lost = excess * 0.0f == 0.0f ? excess : 0.0f;
    total = sum;
}

// The same for n floats, rounded up to vectors, in memory.
PYXLBERT_INLINE void add_exactly(float* total, float* lost, const float* x, std::int64_t n) {
    for (std::int64_t j = 0; j < n; j += W) {
        Vec sum = load(total + j), rest = load(lost + j);
        add_exactly(sum, rest, load(x + j));
        store(total + j, sum);
        store(lost + j, rest);
    }
}

PYXLBERT_INLINE void clear(float* x, std::int64_t n) {
    for (std::int64_t j = 0; j < n; j += W) store(x + j, zero());
}

// Sums over rows: whoever uses it adds each row to `run`, and then calls next_row.
struct RowSums {
    float *run, *total, *lost;  // lost is null where the rows are so few that run is total
    std::int64_t width, rows;

    // Floats of scratch.
    static PYXLBERT_INLINE std::int64_t room(std::int64_t width) { return 2 * width; }

    // For `count` rows of `width` floats, a multiple of W, summed in `target`.
    PYXLBERT_INLINE RowSums(float* target, float* scratch, std::int64_t columns, std::int64_t count)
        : run(count > RUN_LENGTH ? scratch : target),
          total(target),
          lost(count > RUN_LENGTH ? scratch + columns : nullptr),
          width(columns),
          rows(0) {
        clear(total, width);
        if (lost != nullptr) clear(scratch, 2 * width);
    }

    PYXLBERT_INLINE void next_row() {
        if (lost != nullptr && ++rows % RUN_LENGTH == 0) finish();
    }

    // To be called after the last row.
    PYXLBERT_INLINE void finish() {
        if (lost == nullptr) return;
        add_exactly(total, lost, run, width);
        clear(run, width);
    }
};

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
