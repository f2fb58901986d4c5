// Tiles of matrices in shared memory, and products of them on tensor cores, a warp for 16 rows.
//
// A product's result [16, 8 * N] lies in registers as c[N][4]: lane l has, of each 8 columns, columns 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4 in c[n][0] and c[n][1], and of row l / 4 + 8 in c[n][2] and c[n][3].
//
// 16-bit elements go through ldmatrix and m16n8k16.  float32 is multiplied as three tf32 products, which are exact in
// the accumulator to some 2^-22: x = high + low, both tf32, and high * high + high * low + low * high.  There the 8
// columns of a step are taken in the order 0 2 4 6 1 3 5 7 by both factors, so that a lane's two are neighbours, and
// scores in registers are a left factor as they are.
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
    // c, d [16, 8] += a times rows 0 .. 7 and 8 .. 15 of `tile` [16, K], transposed, from column k on.
    static DEVICE void by_rows(float (&c)[4], float (&d)[4], const Left& a, const T* tile, int ld, int k) {
        const int lane = lane_id();
        std::uint32_t b[4];
        ldmatrix(b, tile + (lane % 8 + lane / 16 * 8) * ld + k + (lane / 8 & 1) * 8);
        mma16(c, a.r, b[0], b[1], T());
        mma16(d, a.r, b[2], b[3], T());
    }
    // c, d [16, 8] += a times columns 0 .. 7 and 8 .. 15 of `tile` [K, 16].
    static DEVICE void by_columns(float (&c)[4], float (&d)[4], const Left& a, const T* tile, int ld) {
        const int lane = lane_id();
        std::uint32_t b[4];
        ldmatrix_transposed(b, tile + (lane % 16) * ld + lane / 16 * 8);
        mma16(c, a.r, b[0], b[1], T());
        mma16(d, a.r, b[2], b[3], T());
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
    static DEVICE void multiply(float (&c)[4], const Left& a, float first, float second) {
        std::uint32_t h0, l0, h1, l1;
        split(first, h0, l0);
        split(second, h1, l1);
        mma8(c, a.low, h0, h1);
        mma8(c, a.high, l0, l1);
        mma8(c, a.high, h0, h1);
    }
    static DEVICE void by_rows(float (&c)[4], float (&d)[4], const Left& a, const float* tile, int ld, int k) {
        const float* row = tile + lane_id() / 4 * ld + k + lane_id() % 4 * 2;
        multiply(c, a, row[0], row[1]);
        multiply(d, a, row[8 * ld], row[8 * ld + 1]);
    }
    static DEVICE void by_columns(float (&c)[4], float (&d)[4], const Left& a, const float* tile, int ld) {
        const float* column = tile + lane_id() % 4 * 2 * ld + lane_id() / 4;
        multiply(c, a, column[0], column[ld]);
        multiply(d, a, column[8], column[ld + 8]);
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

// How many steps of a product are unrolled: of float32, whose factors are split, more would be loaded than registers
// hold.
template <class T>
constexpr int STEPS_AT_ONCE = sizeof(T) == 4 ? 1 : 16;

template <int N>
DEVICE void clear(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[n][e] = 0.0f;
}

// c [M][16, 8 N] += M times 16 rows of `left` [.., D], `step` elements apart, times the 8 N rows of `right`,
// transposed.
template <class T, int D, int M, int N>
DEVICE void multiply_rows(float (&c)[M][N][4], const T* left, int step, const T* right) {
#pragma unroll STEPS_AT_ONCE < T>
    for (int k = 0; k < D; k += Mma<T>::K) {
        typename Mma<T>::Left a[M];
#pragma unroll
        for (int m = 0; m < M; ++m) Mma<T>::load_left(a[m], left + m * step, LD<D>, k);
#pragma unroll
        for (int n = 0; n < N; n += 2)
#pragma unroll
            for (int m = 0; m < M; ++m) Mma<T>::by_rows(c[m][n], c[m][n + 1], a[m], right + n * 8 * LD<D>, LD<D>, k);
    }
}

// out [16, D] += c [16, 8 N], rounded to T, times the 8 N rows of `tile` [8 N, D].
template <class T, int D, int N>
DEVICE void multiply_scores(float (&out)[D / 8][4], const float (&c)[N][4], const T* tile) {
#pragma unroll
    for (int step = 0; step < N * 8 / Mma<T>::K; ++step) {
        typename Mma<T>::Left a;
        Mma<T>::from_scores(a, c, step);
#pragma unroll
        for (int d = 0; d < D / 8; d += 2)
            Mma<T>::by_columns(out[d], out[d + 1], a, tile + step * Mma<T>::K * LD<D> + d * 8, LD<D>);
    }
}

}  // namespace pyxlbert::cuda
