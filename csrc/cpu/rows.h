// What the row kernels share: dispatch on element types, parameters widened to float once a call, LayerNorm's walks
// over a row, and column sums that do not depend on the number of threads.
#pragma once
#include <omp.h>

#include "../workspace.h"
#include "simd.h"
#include "sums.h"
#include "team.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// Calls function(T{}) with the element type that dtype names.
template <class F>
PYXLBERT_INLINE void with_type(DType dtype, F function) {
    switch (dtype) {
        case DType::float32:
            function(float{});
            break;
        case DType::bfloat16:
            function(bf16{});
            break;
        case DType::float16:
            function(f16{});
            break;
    }
}

template <class T>
PYXLBERT_INLINE void widen_row(const T* source, float* target, std::int64_t n) {
    std::int64_t j = 0;
    for (; j + W <= n; j += W) store(target + j, load(source + j));
    if (j < n) store(target + j, load(source + j, static_cast<int>(n - j)), static_cast<int>(n - j));
}

template <class T>
PYXLBERT_INLINE void narrow_row(const float* source, T* target, std::int64_t n) {
    std::int64_t j = 0;
    for (; j + W <= n; j += W) store(target + j, load(source + j));
    if (j < n) store(target + j, load(source + j, static_cast<int>(n - j)), static_cast<int>(n - j));
}

// A parameter vector as floats: in place when it is float32 already, else copied to scratch.
PYXLBERT_INLINE const float* as_float(const void* source, DType dtype, std::int64_t n, float* scratch) {
    if (dtype == DType::float32) return static_cast<const float*>(source);
    with_type(dtype, [&](auto type) { widen_row(static_cast<const decltype(type)*>(source), scratch, n); });
    return scratch;
}

PYXLBERT_INLINE void from_float(const float* source, void* target, DType dtype, std::int64_t n) {
    with_type(dtype, [&](auto type) { narrow_row(source, static_cast<decltype(type)*>(target), n); });
}

// count elements, W of them where that is a constant of the caller.
template <class T>
PYXLBERT_INLINE Vec load_some(const T* p, int count) {
    return count == W ? load(p) : load(p, count);
}
template <class T>
PYXLBERT_INLINE void store_some(T* p, Vec v, int count) {
    count == W ? store(p, v) : store(p, v, count);
}

// Columns of a row that are summed in one chain, or in four: 64 vectors.
constexpr std::int64_t COLUMN_RUN = 64 * W;

// Calls step(j, count) for the vectors of a row in order; count is W for all but the last.
template <class F>
PYXLBERT_INLINE void for_vectors(std::int64_t n, F step) {
    std::int64_t j = 0;
    for (; j + W <= n; j += W) step(j, W);
    if (j < n) step(j, static_cast<int>(n - j));
}

// The same, and fold() after every run of columns.
template <class F, class Fold>
PYXLBERT_INLINE void for_vector_runs(std::int64_t n, F step, Fold fold) {
    for (std::int64_t j = 0; j < n;) {
        const std::int64_t end = n - j < COLUMN_RUN ? n : j + COLUMN_RUN;
        for (; j + W <= end; j += W) step(j, W);
        if (j < end) {
            step(j, static_cast<int>(end - j));
            j = end;
        }
        fold();
    }
}

struct Statistics {
    float mean, rstd;  // rstd = 1 / sqrt(variance + eps)
};

// The sum of a long row.
template <class T>
PYXLBERT_INLINE float sum_of(const T* row, std::int64_t n) {
    Vec total = zero(), lost = zero(), sum = zero();
    for_vector_runs(
        n, [&](std::int64_t j, int count) PYXLBERT_LAMBDA { sum += load_some(row + j, count); },
        [&]() PYXLBERT_LAMBDA {
            add_exactly(total, lost, sum);
            sum = zero();
        });
    return reduce_add(total);
}

// Mean and rstd of a row with this sum, which of a long row is taken again.
//
// The sum divided by n is off by a rounding or two: in a row of equal elements they would all deviate from it by the
// same d, and an eps of 1e-12 is no floor for d^2.  So the deviations are summed too, the mean moves by their mean, and
// the variance loses its square.
//
// Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American Statistician 37 (1983),
// equation 1.7.
template <class T>
PYXLBERT_INLINE Statistics statistics(const T* row, std::int64_t n, Vec sum, float eps) {
    const float inverse_n = 1.0f / static_cast<float>(n);
    const float mean = (n <= COLUMN_RUN ? reduce_add(sum) : sum_of(row, n)) * inverse_n;
    Vec all_deviations = zero(), all_squares = zero(), lost_deviations = zero(), lost_squares = zero();
    for (std::int64_t first = 0; first < n; first += COLUMN_RUN) {
        const std::int64_t end = n - first < COLUMN_RUN ? n : first + COLUMN_RUN;
        // Four sums of each: one huge deviation then swallows the roundings of a quarter of the others.
        Vec deviations[4] = {zero(), zero(), zero(), zero()}, squares[4] = {zero(), zero(), zero(), zero()};
        const auto add = [&](int k, Vec d) PYXLBERT_LAMBDA {
            deviations[k] += d;
            squares[k] = fma(d, d, squares[k]);
        };
        std::int64_t j = first;
        for (; j + 4 * W <= end; j += 4 * W)
            for (int k = 0; k < 4; ++k) add(k, load(row + j + k * W) - set1(mean));
        for (int k = 0; j < end; j += W, ++k) {
            const int count = end - j < W ? static_cast<int>(end - j) : W;
            const Vec d = load_some(row + j, count) - set1(mean);
            // The lanes past the row hold zero, whose deviation must not count.
            add(k, count == W ? d : keep_first(d, count));
        }
        add_exactly(all_deviations, lost_deviations, (deviations[0] + deviations[1]) + (deviations[2] + deviations[3]));
        add_exactly(all_squares, lost_squares, (squares[0] + squares[1]) + (squares[2] + squares[3]));
    }
    const float off = reduce_add(all_deviations), total = reduce_add(all_squares);
    const float excess = off * (off * inverse_n);
    // Of huge elements both may be infinite; a NaN stays one.
    const float rest = !(total <= excess) ? total - excess : excess > 3e38f ? total : 0.0f;
    return {mean + off * inverse_n, 1.0f / sqrt(rest * inverse_n + eps)};
}

// Calls step(j, count, y) with the vectors of (row - mean) * rstd * weight + bias.
template <class F>
PYXLBERT_INLINE void normalised(const float* row, std::int64_t n, float mean, float rstd, const float* weight,
                                const float* bias, F step) {
    for_vectors(n, [&](std::int64_t j, int count) PYXLBERT_LAMBDA {
        step(j, count,
             fma((load_some(row + j, count) - set1(mean)) * set1(rstd), load_some(weight + j, count),
                 load_some(bias + j, count)));
    });
}

// Backward of LayerNorm for one row, in two walks: xhat = (x - mean) * rstd and g = dy * weight stay in two buffers
// with room for whole vectors.
struct RowGradient {
    Vec mean, rstd;
    float *xhat, *gradient;
    Vec mean_g, mean_gh;

    // x(j, count) and dy(j, count) give vectors.  dy is zero in the lanes past the row, so those lanes add nothing to
    // any sum.  With `sums`, dy * xhat and dy are added to dweight and dbias.
    template <class X, class Dy>
    PYXLBERT_INLINE void walk(std::int64_t n, const float* weight, X x, Dy dy, bool sums, float* dweight,
                              float* dbias) {
        Vec sum = zero(), dot = zero(), all = zero(), all_dots = zero(), lost = zero(), lost_dots = zero();
        const auto step = [&](std::int64_t j, int count) PYXLBERT_LAMBDA {
            const Vec dyj = dy(j, count);
            const Vec h = (x(j, count) - mean) * rstd;
            const Vec g = dyj * load_some(weight + j, count);
            store(xhat + j, h);
            store(gradient + j, g);
            sum += g;
            dot = fma(g, h, dot);
            if (sums) {
                store(dweight + j, fma(dyj, h, load(dweight + j)));
                store(dbias + j, load(dbias + j) + dyj);
            }
        };
        for_vector_runs(n, step, [&]() PYXLBERT_LAMBDA {
            add_exactly(all, lost, sum);
            add_exactly(all_dots, lost_dots, dot);
            sum = dot = zero();
        });
        const float inverse_n = 1.0f / static_cast<float>(n);
        mean_g = set1(reduce_add(all) * inverse_n);
        mean_gh = set1(reduce_add(all_dots) * inverse_n);
    }

    // rstd * (g - mean_j(g) - xhat * mean_j(g * xhat))
    PYXLBERT_INLINE Vec dx(std::int64_t j) const {
        return rstd * (load(gradient + j) - mean_g - load(xhat + j) * mean_gh);
    }
};

PYXLBERT_INLINE std::int64_t round_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

// Column sums over M rows are cut into this many blocks of rows, by M alone: a block is summed by one
// thread in row order and the blocks are added in order, so the bits do not depend on the threads.
PYXLBERT_INLINE int row_blocks(std::int64_t rows) {
    constexpr std::int64_t smallest = 16, most = 64;
    const std::int64_t blocks = (rows + smallest - 1) / smallest;
    return static_cast<int>(blocks < most ? blocks : most);
}

// First row of block b of `blocks`.
PYXLBERT_INLINE std::int64_t block_start(std::int64_t rows, int blocks, int b) {
    return rows / blocks * b + (rows % blocks < b ? rows % blocks : b);
}

// partial [blocks, stride] summed over blocks into total [n], eight of them at a time; partial[0] receives the sum.
PYXLBERT_INLINE void add_blocks(float* partial, int blocks, std::int64_t stride, std::int64_t n) {
    if (blocks == 0) return;
    for (std::int64_t j = 0; j < n; j += W) {
        Vec total = zero();
        for (int first = 0; first < blocks; first += 8) {
            Vec sum = load(partial + first * stride + j);
            for (int b = first + 1; b < blocks && b < first + 8; ++b) sum += load(partial + b * stride + j);
            total += sum;
        }
        store(partial + j, total);
    }
}

// A team is worth waking only for enough elements; below, waking costs more than the work.
PYXLBERT_INLINE int team(int threads, std::int64_t elements) {
    constexpr std::int64_t worth_a_thread = 16384;
    const std::int64_t wanted = elements / worth_a_thread;
    return wanted < 1 ? 1 : wanted < threads ? static_cast<int>(wanted) : threads;
}

// `each` floats for every thread of a team, taken before the team starts: an exception inside a parallel region would
// end the process.
struct TeamScratch {
    int threads;
    std::int64_t each;
    float* data;

    PYXLBERT_INLINE float* mine() const { return of(omp_get_thread_num()); }
    PYXLBERT_INLINE float* of(int thread) const { return data + thread * each; }
};

PYXLBERT_INLINE TeamScratch team_scratch(int threads, std::int64_t floats) {
    const std::int64_t each = round_up(floats, 16);
    return {threads, each, static_cast<float*>(workspace(Slot::row, threads * each * sizeof(float)))};
}

}  // namespace
}  // namespace pyxlbert::PYXLBERT_LEVEL
