// Kernels that take rows whole, in registers: how threads share a row, its statistics, sums over all rows.
//
//     row  [N]   thread t of THREADS has VEC neighbours from column (v * THREADS + t) * VEC on, v = 0 .. VECTORS - 1
//
// A row of up to 1024 columns belongs to a warp, and four of them to a block: a reduction is then five shuffles, and
// the loads of a row are all on their way before the first is waited for.  Longer rows take a block.
#pragma once
#include "cuda/device.cuh"

namespace pyxlbert::cuda {

template <int VEC>
DEVICE void load(const Parameter& parameter, int column, float (&x)[VEC]) {
    load_any<VEC>(parameter.data, parameter.dtype, column, x);
}

template <int THREADS_, int VECTORS_, int VEC_>
struct Shape {
    static constexpr int THREADS = THREADS_, VECTORS = VECTORS_, VEC = VEC_;
    static constexpr int ROWS = THREADS == 32 ? 4 : 1;  // of a block at a time
    static constexpr int BLOCK = THREADS * ROWS;
    // The block's partial sums, where a row takes more than a warp.
    static constexpr std::size_t SHARED = THREADS == 32 ? 0 : 2 * 32 * sizeof(float);
    // With what store_sum needs: a row, where several are added up.
    static constexpr std::size_t SHARED_FOR_SUMS = ROWS == 1 ? SHARED : THREADS * VECTORS * VEC * sizeof(float);
};

// Calls f(Shape) with the shape for rows of so many columns.  VEC neighbours are taken at a time if `vectors`: every
// row, and every parameter, then begins at a multiple of 16 bytes, and VEC divides the columns.
template <int VEC, class F>
void with_shape(bool vectors, std::int64_t columns, F f) {
    if (vectors && columns <= 1024)
        f(Shape<32, 32 / VEC, VEC>());
    else if (vectors)
        f(Shape<256, 16 / VEC, VEC>());
    else if (columns <= 256)
        f(Shape<32, 8, 1>());
    else
        f(Shape<256, 16, 1>());
}

// Whether every address, null included, is one of 16 bytes.
template <class... P>
bool aligned(P... p) {
    return ((reinterpret_cast<std::uintptr_t>(p) % 16 == 0) && ...);
}
// Whether every row can be taken in vectors of VEC.
template <int VEC>
bool rows_aligned(const Rows& rows) {
    return aligned(rows.data) && rows.stride % VEC == 0;
}

inline dim3 blocks_of(std::int64_t rows, std::int64_t each) { return grid_of(ceil_div(rows, each)); }

// f(v, column) for every vector of this thread that lies in the row.
template <class S, class F>
DEVICE void each_vector(int columns, F f) {
    const int thread = static_cast<int>(threadIdx.x) % S::THREADS;
#pragma unroll
    for (int v = 0; v < S::VECTORS; ++v) {
        const int column = (v * S::THREADS + thread) * S::VEC;
        if (column < columns) f(v, column);
    }
}

struct Pair {
    float first, second;
};

// The sums of both numbers over the threads of a row; every thread of the block calls it.
template <class S>
DEVICE Pair row_sum(Pair x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        x.first += __shfl_xor_sync(0xffffffffu, x.first, offset);
        x.second += __shfl_xor_sync(0xffffffffu, x.second, offset);
    }
    if constexpr (S::THREADS > 32) {
        constexpr int WARPS = S::THREADS / 32;
        Pair* parts = reinterpret_cast<Pair*>(shared_memory());
        __syncthreads();  // the previous sum has been read
        if (lane_id() == 0) parts[warp_id()] = x;
        __syncthreads();
        x = {0.0f, 0.0f};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            x.first += parts[w].first;
            x.second += parts[w].second;
        }
    }
    return x;
}

struct Statistics {
    float mean, rstd;
};

// mean and rstd of a row; x, zero outside of it, becomes x - mean inside.
//
// The sum divided by the columns is off by a rounding or two, whose square an eps of 1e-12 does not cover: the
// deviations are summed too, their mean is taken off them and its square off the variance.
template <class S>
DEVICE Statistics centre(float (&x)[S::VECTORS][S::VEC], int columns, float eps) {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < S::VECTORS; ++v)
#pragma unroll
        for (int e = 0; e < S::VEC; ++e) sum += x[v][e];
    const float mean = row_sum<S>({sum, 0.0f}).first / static_cast<float>(columns);
    Pair sums = {0.0f, 0.0f};  // of squares and of deviations
    each_vector<S>(columns, [&](int v, int) {
#pragma unroll
        for (int e = 0; e < S::VEC; ++e) {
            x[v][e] -= mean;
            sums.first += x[v][e] * x[v][e];
            sums.second += x[v][e];
        }
    });
    sums = row_sum<S>(sums);
    const float off = sums.second / static_cast<float>(columns), excess = sums.second * off;
    // Of single columns outside of the row too, where nothing reads: ten registers less than with their bounds.
#pragma unroll
    for (int v = 0; v < S::VECTORS; ++v)
        if (S::VEC == 1 || (v * S::THREADS + static_cast<int>(threadIdx.x) % S::THREADS) * S::VEC < columns)
#pragma unroll
            for (int e = 0; e < S::VEC; ++e) x[v][e] -= off;
    // Of huge elements both may be infinite; a NaN stays one.
    const float rest = !(sums.first <= excess) ? sums.first - excess : excess > 3e38f ? sums.first : 0.0f;
    return {mean + off, 1.0f / sqrtf(rest / static_cast<float>(columns) + eps)};
}

// Of a row's gradient dy and its xhat = (x - mean) * rstd: g = dy becomes dx = rstd * (g * w - mean(g * w) - xhat *
// mean(g * w * xhat)), w the weight.
template <class S>
DEVICE void input_gradient(float (&g)[S::VECTORS][S::VEC], const float (&xhat)[S::VECTORS][S::VEC],
                           const Parameter& weight, float rstd, int columns) {
    Pair sums = {0.0f, 0.0f};
    each_vector<S>(columns, [&](int v, int column) {
        float w[S::VEC];
        load<S::VEC>(weight, column, w);
#pragma unroll
        for (int e = 0; e < S::VEC; ++e) {
            g[v][e] *= w[e];
            sums.first += g[v][e];
            sums.second += g[v][e] * xhat[v][e];
        }
    });
    sums = row_sum<S>(sums);
    const float count = static_cast<float>(columns);
    sums.first /= count;
    sums.second /= count;
#pragma unroll
    for (int v = 0; v < S::VECTORS; ++v)
#pragma unroll
        for (int e = 0; e < S::VEC; ++e) g[v][e] = rstd * (g[v][e] - sums.first - xhat[v][e] * sums.second);
}

template <class S>
DEVICE void zero(float (&x)[S::VECTORS][S::VEC]) {
#pragma unroll
    for (int v = 0; v < S::VECTORS; ++v)
#pragma unroll
        for (int e = 0; e < S::VEC; ++e) x[v][e] = 0.0f;
}

// The rows of a block, `each` of them, a multiple of ROWS, one after the other for each group of threads: f(row,
// there). A row past the end is one that is not there; its threads go along, since a sum over a row may be one of the
// block.
template <class S, class F>
DEVICE void each_row(std::int64_t rows, std::int64_t each, F f) {
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * each;
    for (std::int64_t at = 0; at < each; at += S::ROWS) {
        const std::int64_t row = first + at + static_cast<int>(threadIdx.x) / S::THREADS;
        f(row, row < rows);
    }
}

// Sums over a block's rows: the row groups' shares x are added up, in their order, into row `blockIdx.x` of partial
// `[parts, N]`.
template <class S>
DEVICE void store_sum(float* partial, const float (&x)[S::VECTORS][S::VEC], int columns) {
    float* mine = partial + static_cast<std::int64_t>(blockIdx.x) * columns;
    if constexpr (S::ROWS == 1) {
        each_vector<S>(columns, [&](int v, int column) { store<S::VEC>(mine + column, x[v]); });
    } else {
        float* sums = reinterpret_cast<float*>(shared_memory());
        for (int group = 0; group < S::ROWS; ++group) {
            __syncthreads();
            if (warp_id() == group)
                each_vector<S>(columns, [&](int v, int column) {
#pragma unroll
                    for (int e = 0; e < S::VEC; ++e)
                        sums[column + e] = x[v][e] + (group == 0 ? 0.0f : sums[column + e]);
                });
        }
        __syncthreads();
        for (int column = static_cast<int>(threadIdx.x); column < columns; column += S::BLOCK)
            mine[column] = sums[column];
    }
}

// out [N] = the sum of partial [parts, N].
struct PartSum {
    const float* partial;
    Sum out;
};

// What one launch adds up.
struct PartSums {
    PartSum sums[3];
    int count = 0;

    // partial null: nobody needs the sum.
    void add(const float* partial, const Sum& out) {
        if (partial != nullptr) sums[count++] = {partial, out};
    }

    // dweight and dbias of partial [2, parts, N], or null.
    void add_both(const float* partial, std::int64_t size, const Sum& dweight, const Sum& dbias) {
        add(partial, dweight);
        add(partial == nullptr ? nullptr : partial + size, dbias);
    }
};

// All of a call's sums over rows, in an order that follows from the sizes; nothing where there is none.
void launch_sum_parts(const PartSums& sums, std::int64_t parts, std::int64_t columns, CudaStream stream);

}  // namespace pyxlbert::cuda
