// The instructions of device.cuh, as PTX ISA defines them: matrix products of a warp, ldmatrix, cp.async.
#pragma once
#include "emulation.h"

namespace pyxlbert::cuda {

using Stream = void*;

template <auto KERNEL, std::size_t SHARED, class... Arguments>
void launch(dim3 grid, int threads, Stream, const Arguments&... arguments) {
    emulation::launch(grid, threads, SHARED, [&] { KERNEL(arguments...); });
}

inline unsigned char* shared_memory() { return emulation::block->shared; }

inline void in_shared_memory(const void* p, std::size_t bytes, const char* what) {
    const auto* at = static_cast<const unsigned char*>(p);
    if (at < emulation::block->shared || at + bytes > emulation::block->shared + emulation::block->shared_bytes)
        emulation::fail(what);
}

inline void cp_async16(void* shared, const void* global, bool there) {
    in_shared_memory(shared, 16, "cp.async outside of shared memory");
    if ((reinterpret_cast<std::uintptr_t>(shared) | (there ? reinterpret_cast<std::uintptr_t>(global) : 0)) % 16 != 0)
        emulation::fail("cp.async at an address that is no multiple of 16");
    std::memset(shared, 0xff, 16);
    emulation::block->current->open.push_back(
        {static_cast<unsigned char*>(shared), there ? static_cast<const unsigned char*>(global) : nullptr});
}
inline void cp_async_commit() {
    emulation::Fiber& fiber = *emulation::block->current;
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int N>
void cp_async_wait() {
    auto& groups = emulation::block->current->groups;
    while (static_cast<int>(groups.size()) > N) {
        for (const emulation::Copy& copy : groups.front()) {
            if (copy.from != nullptr)
                std::memcpy(copy.to, copy.from, 16);
            else
                std::memset(copy.to, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

inline void ldmatrix_of(std::uint32_t (&r)[4], const void* row, bool transposed) {
    in_shared_memory(row, 16, "ldmatrix outside of shared memory");
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix of a row that is not at 16 bytes");
    emulation::Meeting& m = emulation::meeting(~0u);
    const std::uint32_t turn = m.turn & 1;
    const int lane = emulation::lane_of(*emulation::block->current);
    std::memcpy(m.slot[turn][lane], &row, sizeof row);
    emulation::arrive(m, 32, transposed ? "ldmatrix.trans" : "ldmatrix", 0);
    for (int matrix = 0; matrix < 4; ++matrix) {
        std::uint16_t pair[2];
        for (int k = 0; k < 2; ++k) {
            const int line = transposed ? lane % 4 * 2 + k : lane / 4,
                      column = transposed ? lane / 4 : lane % 4 * 2 + k;
            const std::uint16_t* source;
            std::memcpy(&source, m.slot[turn][matrix * 8 + line], sizeof source);
            pair[k] = source[column];
        }
        std::memcpy(&r[matrix], pair, 4);
    }
    // Nobody may overwrite what another lane is still to read.
    emulation::arrive(m, 32, "the end of ldmatrix", 0);
}
inline void ldmatrix(std::uint32_t (&r)[4], const void* row) { ldmatrix_of(r, row, false); }
inline void ldmatrix_transposed(std::uint32_t (&r)[4], const void* row) { ldmatrix_of(r, row, true); }

inline float half_of(std::uint32_t pair, int which, __nv_bfloat16) {
    const std::uint32_t bits = which != 0 ? pair & 0xffff0000u : pair << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float half_of(std::uint32_t pair, int which, __half) {
    const __half_raw bits{static_cast<std::uint16_t>(which != 0 ? pair >> 16 : pair)};
    return __half2float(__half(bits));
}

// The last lane to arrive multiplies for all: a [16, K] in c's rows g and g + 8, b [K, 8], unpacked by `unpack`.
template <int K, class F>
void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, const char* what, F unpack) {
    emulation::Meeting& m = emulation::meeting(~0u);
    const std::uint32_t turn = m.turn & 1;
    const int lane = emulation::lane_of(*emulation::block->current);
    const std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(m.slot[turn][lane], mine, sizeof mine);
    if (m.arrived == 31) {
        float left[16][K], right[K][8];
        for (int l = 0; l < 32; ++l) {
            std::uint32_t words[6];
            std::memcpy(words, m.slot[turn][l], sizeof words);
            unpack(words, l / 4, l % 4, left, right);
        }
        for (int i = 0; i < 16; ++i) {
            float sum[8] = {};
            for (int k = 0; k < K; ++k)
                for (int j = 0; j < 8; ++j) sum[j] += left[i][k] * right[k][j];
            std::memcpy(m.result[turn][i], sum, sizeof sum);
        }
    }
    emulation::arrive(m, 32, what, 0);
    const int g = lane / 4, t = lane % 4 * 2;
    c[0] += m.result[turn][g][t];
    c[1] += m.result[turn][g][t + 1];
    c[2] += m.result[turn][g + 8][t];
    c[3] += m.result[turn][g + 8][t + 1];
}

template <class T>
void mma16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, T kind) {
    mma<16>(c, a, b0, b1, "mma.m16n8k16", [&](const std::uint32_t* w, int g, int t, auto& left, auto& right) {
        for (int k = 0; k < 2; ++k) {
            left[g][2 * t + k] = half_of(w[0], k, kind);
            left[g + 8][2 * t + k] = half_of(w[1], k, kind);
            left[g][2 * t + 8 + k] = half_of(w[2], k, kind);
            left[g + 8][2 * t + 8 + k] = half_of(w[3], k, kind);
            right[2 * t + k][g] = half_of(w[4], k, kind);
            right[2 * t + 8 + k][g] = half_of(w[5], k, kind);
        }
    });
}

// tf32 has 10 bits of mantissa: the product ignores the 13 below.
inline float of_tf32(std::uint32_t bits) {
    bits &= 0xffffe000u;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline void mma8(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    mma<8>(c, a, b0, b1, "mma.m16n8k8", [&](const std::uint32_t* w, int g, int t, auto& left, auto& right) {
        left[g][t] = of_tf32(w[0]);
        left[g + 8][t] = of_tf32(w[1]);
        left[g][t + 4] = of_tf32(w[2]);
        left[g + 8][t + 4] = of_tf32(w[3]);
        right[t][g] = of_tf32(w[4]);
        right[t + 4][g] = of_tf32(w[5]);
    });
}
// To nearest, ties away from zero.
inline std::uint32_t to_tf32(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

inline float exp2_approx(float x) { return exp2f(x); }

}  // namespace pyxlbert::cuda
