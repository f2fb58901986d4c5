// Tiles of matrices in shared memory, and products of them on tensor cores, a warp for 16 rows.
//
// A product's result [16, 8 * N] lies in registers as c[N][4]: lane l has, of each 8 columns, columns 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4 in c[n][0] and c[n][1], and of row l / 4 + 8 in c[n][2] and c[n][3].
//
// 16-bit elements go through ldmatrix and m16n8k16.  float32 is multiplied as three tf32 products, whose sum is exact
// to some 2^-22: x = high + low, both tf32, and high * high + high * low + low * high.  There the 8 columns of a step
// are taken in the order 0 2 4 6 1 3 5 7 by both factors, so that a lane's two are neighbours, and scores in registers
// are a left factor as they are.
#pragma once
#include "cuda/device.cuh"

namespace pyxlbert::cuda {

// Elements from row to row of a tile of D columns: 8 more, so that eight rows begin in different banks.
template <int D>
constexpr int LD = D + 8;

template <class T>
struct Mma {
    static constexpr int K = 16;  // columns of a step
    struct Left {
        std::uint32_t r[4];
    };
    static DEVICE void load_left(Left& a, const T* tile, int ld, int k) {
        const int lane = lane_id();
        ldmatrix(a.r, tile + (lane % 16) * ld + k + lane / 16 * 8);
    }
    // The left factor transposed: `tile` is [K, 16].
    static DEVICE void load_left_transposed(Left& a, const T* tile, int ld, int k) {
        const int lane = lane_id();
        ldmatrix_transposed(a.r, tile + (k + lane % 8 + lane / 16 * 8) * ld + (lane / 8 & 1) * 8);
    }
    // Scores of columns step * K on.
    template <int N>
    static DEVICE void from_scores(Left& a, const float (&c)[N][4], int step) {
        a.r[0] = pack(c[2 * step][0], c[2 * step][1]);
        a.r[1] = pack(c[2 * step][2], c[2 * step][3]);
        a.r[2] = pack(c[2 * step + 1][0], c[2 * step + 1][1]);
        a.r[3] = pack(c[2 * step + 1][2], c[2 * step + 1][3]);
    }
    // The right factor of two products: rows 0 .. 7 and 8 .. 15 of `tile` [16, K], transposed, from column k on.
    struct Right {
        std::uint32_t r[4];
    };
    static DEVICE void load_rows(Right& b, const T* tile, int ld, int k) {
        const int lane = lane_id();
        ldmatrix(b.r, tile + (lane % 8 + lane / 16 * 8) * ld + k + (lane / 8 & 1) * 8);
    }
    // Columns 0 .. 7 and 8 .. 15 of `tile` [K, 16].
    static DEVICE void load_columns(Right& b, const T* tile, int ld) {
        const int lane = lane_id();
        ldmatrix_transposed(b.r, tile + (lane % 16) * ld + lane / 16 * 8);
    }
    // c, d [16, 8] += a b.  TRANSPOSED: with the same bits as the product of the transposed factors, b by a.
    template <bool TRANSPOSED = false>
    static DEVICE void multiply(float (&c)[4], float (&d)[4], const Left& a, const Right& b) {
        mma16(c, a.r, b.r[0], b.r[1], T());
        mma16(d, a.r, b.r[2], b.r[3], T());
    }
    static DEVICE std::uint32_t pack(float low, float high) {
        T pair[2] = {from_float<T>(low), from_float<T>(high)};
        std::uint32_t bits;
        memcpy(&bits, pair, 4);
        return bits;
    }
};

template <>
struct Mma<float> {
    static constexpr int K = 8;
    struct Left {
        std::uint32_t high[4], low[4];
    };
    static DEVICE void split(float x, std::uint32_t& high, std::uint32_t& low) {
        high = to_tf32(x);
        // What is not finite has no rest.
        const float rest = x - bits_as<float>(high);
        low = to_tf32(rest == rest ? rest : 0.0f);
    }
    static DEVICE void load_left(Left& a, const float* tile, int ld, int k) {
        const float* row = tile + lane_id() / 4 * ld + k + lane_id() % 4 * 2;
        split(row[0], a.high[0], a.low[0]);
        split(row[8 * ld], a.high[1], a.low[1]);
        split(row[1], a.high[2], a.low[2]);
        split(row[8 * ld + 1], a.high[3], a.low[3]);
    }
    static DEVICE void load_left_transposed(Left& a, const float* tile, int ld, int k) {
        const float* column = tile + (k + lane_id() % 4 * 2) * ld + lane_id() / 4;
        split(column[0], a.high[0], a.low[0]);
        split(column[8], a.high[1], a.low[1]);
        split(column[ld], a.high[2], a.low[2]);
        split(column[ld + 8], a.high[3], a.low[3]);
    }
    template <int N>
    static DEVICE void from_scores(Left& a, const float (&c)[N][4], int step) {
        split(c[step][0], a.high[0], a.low[0]);
        split(c[step][2], a.high[1], a.low[1]);
        split(c[step][1], a.high[2], a.low[2]);
        split(c[step][3], a.high[3], a.low[3]);
    }
    struct Right {
        std::uint32_t high[4], low[4];
    };
    static DEVICE void load_rows(Right& b, const float* tile, int ld, int k) {
        const float* row = tile + lane_id() / 4 * ld + k + lane_id() % 4 * 2;
        split(row[0], b.high[0], b.low[0]);
        split(row[1], b.high[1], b.low[1]);
        split(row[8 * ld], b.high[2], b.low[2]);
        split(row[8 * ld + 1], b.high[3], b.low[3]);
    }
    static DEVICE void load_columns(Right& b, const float* tile, int ld) {
        const float* column = tile + lane_id() % 4 * 2 * ld + lane_id() / 4;
        split(column[0], b.high[0], b.low[0]);
        split(column[ld], b.high[1], b.low[1]);
        split(column[8], b.high[2], b.low[2]);
        split(column[ld + 8], b.high[3], b.low[3]);
    }
    template <bool TRANSPOSED = false>
    static DEVICE void multiply(float (&c)[4], float (&d)[4], const Left& a, const Right& b) {
        add_product<TRANSPOSED>(c, a, b.high[0], b.high[1], b.low[0], b.low[1]);
        add_product<TRANSPOSED>(d, a, b.high[2], b.high[3], b.low[2], b.low[3]);
    }
    // Tensor cores cut off what an addition leaves behind a float's last bit: a long sum in one accumulator would be
    // too small by its length.  So each step's products start from zero, and are added where additions round to
    // nearest.  The small ones of either factor's rest come in one order, whichever side the factor is on.
    template <bool TRANSPOSED>
    static DEVICE void add_product(float (&c)[4], const Left& a, std::uint32_t high0, std::uint32_t high1,
                                   std::uint32_t low0, std::uint32_t low1) {
        float x[4] = {};
        if constexpr (TRANSPOSED) mma8(x, a.high, low0, low1);
        mma8(x, a.low, high0, high1);
        if constexpr (!TRANSPOSED) mma8(x, a.high, low0, low1);
        mma8(x, a.high, high0, high1);
#pragma unroll
        for (int e = 0; e < 4; ++e) c[e] += x[e];
    }
};

// Rows of a tile that may be the rows of a ring: row y lies at (base + y) mod SIZE; 16 rows from a multiple of 16 on
// are neighbours.
template <class T, int D, int SIZE>
struct Ring {
    T* rows;
    int base;
    DEVICE T* at(int y) const {
        const int slot = base + y;
        return rows + (slot >= SIZE ? slot - SIZE : slot) * LD<D>;
    }
    // As the ring is when its window has moved by `rows`, which may be negative.
    DEVICE void move(int by) { base = (base + by + SIZE) % SIZE; }
};

// How many steps of a product are unrolled: the more, the more is loaded ahead, which takes registers; most of them of
// float32, whose factors are split.
template <class T, int D>
constexpr int STEPS_AT_ONCE = sizeof(T) == 4 ? 1
                              : D > 64       ? 2
                                             : 4;

// Queries or keys whose products float32 adds one after the other: after so many a kernel gives what it has to the
// result and begins anew, or a long sum of terms of one sign would lose a share that grows with its length.  What is
// rounded to 16 bits does not show it.
constexpr int TERMS_OF_A_SUM = 512;

// to[0], to[1] = x, y, to which what is there is added if there is `more` in it.
template <class T>
DEVICE void give_pair(T* to, float x, float y, bool more) {
    if constexpr (sizeof(T) == sizeof(float))
        if (more) {
            x = __fadd_rn(to[0], x);
            y = __fadd_rn(to[1], y);
        }
    store_pair(to, x, y);
}

template <int N>
DEVICE void clear(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[n][e] = 0.0f;
}

// c [M][16, 8 N] += M left factors times K rows of `tile` [K, 8 N].
template <class T, int D, int M, int N>
DEVICE void multiply_columns(float (&c)[M][N][4], const typename Mma<T>::Left (&a)[M], const T* tile) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        typename Mma<T>::Right b;
        Mma<T>::load_columns(b, tile + n * 8, LD<D>);
#pragma unroll
        for (int m = 0; m < M; ++m) Mma<T>::multiply(c[m][n], c[m][n + 1], a[m], b);
    }
}

// c [M][16, 8 N] += M times 16 rows of `left` [.., D], `step` elements apart, times the 8 N rows of `right`,
// transposed.  TRANSPOSED: with the same bits as where left and right change places.
template <class T, int D, bool TRANSPOSED = false, int M, int N>
DEVICE void multiply_rows(float (&c)[M][N][4], const T* left, int step, const T* right) {
    [[maybe_unused]] constexpr int AT_ONCE = STEPS_AT_ONCE<T, D>;
#pragma unroll AT_ONCE
    for (int k = 0; k < D; k += Mma<T>::K) {
        typename Mma<T>::Left a[M];
#pragma unroll
        for (int m = 0; m < M; ++m) Mma<T>::load_left(a[m], left + m * step, LD<D>, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            typename Mma<T>::Right b;
            Mma<T>::load_rows(b, right + n * 8 * LD<D>, LD<D>, k);
#pragma unroll
            for (int m = 0; m < M; ++m) Mma<T>::template multiply<TRANSPOSED>(c[m][n], c[m][n + 1], a[m], b);
        }
    }
}

// The same where the left factor lies in registers, all its steps.
template <class T, int D, int M, int N>
DEVICE void multiply_held_rows(float (&c)[M][N][4], const typename Mma<T>::Left (&left)[D / Mma<T>::K][M],
                               const T* right) {
#pragma unroll
    for (int k = 0; k < D; k += Mma<T>::K)
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            typename Mma<T>::Right b;
            Mma<T>::load_rows(b, right + n * 8 * LD<D>, LD<D>, k);
#pragma unroll
            for (int m = 0; m < M; ++m) Mma<T>::multiply(c[m][n], c[m][n + 1], left[k / Mma<T>::K][m], b);
        }
}

// out [M][16, 8 K] += c [M][16, 8 N], rounded to T, times the 8 N rows of `tile` [8 N, 8 K].
template <class T, int D, int M, int K, int N>
DEVICE void multiply_scores(float (&out)[M][K][4], const float (&c)[M][N][4], const T* tile) {
#pragma unroll
    for (int step = 0; step < N * 8 / Mma<T>::K; ++step) {
        typename Mma<T>::Left a[M];
#pragma unroll
        for (int m = 0; m < M; ++m) Mma<T>::from_scores(a[m], c[m], step);
        multiply_columns<T, D>(out, a, tile + step * Mma<T>::K * LD<D>);
    }
}

}  // namespace pyxlbert::cuda
