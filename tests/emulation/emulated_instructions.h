// The instructions of device.cuh, as PTX ISA defines them: matrix products of a warp, ldmatrix, cp.async.
#pragma once
#include "emulation.h"

namespace pyxlbert::cuda {

using CudaStream = void*;
using emulation::max_shared;

template <auto KERNEL, std::size_t SHARED, class... Arguments>
void launch(dim3 grid, int threads, CudaStream, const Arguments&... arguments) {
    emulation::launch(grid, threads, SHARED, [&] { KERNEL(arguments...); });
}

inline unsigned char* shared_memory() { return emulation::block->shared; }

inline void in_shared_memory(const void* p, std::size_t bytes, const char* what) {
    const auto* at = static_cast<const unsigned char*>(p);
    if (at < emulation::block->shared || at + bytes > emulation::block->shared + emulation::block->shared_bytes)
        emulation::fail(what);
}

inline void cp_async_of(void* shared, const void* global, bool there, std::uint32_t bytes) {
    in_shared_memory(shared, bytes, "cp.async outside of shared memory");
    if ((reinterpret_cast<std::uintptr_t>(shared) | (there ? reinterpret_cast<std::uintptr_t>(global) : 0)) % bytes !=
        0)
        emulation::fail("cp.async at an address that is no multiple of its bytes, 16 or 4");
    std::memset(shared, 0xff, bytes);
    emulation::block->current->open.push_back(
        {static_cast<unsigned char*>(shared), there ? static_cast<const unsigned char*>(global) : nullptr, bytes});
}
inline void cp_async16(void* shared, const void* global, bool there) { cp_async_of(shared, global, there, 16); }
inline void cp_async4(void* shared, const void* global, bool there) { cp_async_of(shared, global, there, 4); }
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
                std::memcpy(copy.to, copy.from, copy.bytes);
            else
                std::memset(copy.to, 0, copy.bytes);
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

using Eight = float __attribute__((vector_size(32)));
using EightBits = std::int32_t __attribute__((vector_size(32)));
using EightWords = std::uint32_t __attribute__((vector_size(32)));

// c [8] + left [K] right [K, 8] as a tensor core adds BLOCK products at a time to what it has: products are exact; they
// and the sum so far are aligned with the largest among them, and lose what lies more than two bits behind its last
// bit of 24; their sum, which is exact, is cut off to 24 bits.  Nothing is rounded to nearest, so that a long sum of
// terms of one sign is too small, and the more so the longer it is.
//
// Source: Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores",
// https://doi.org/10.7717/peerj-cs.330, whose A100 adds 8 products of 16-bit elements or 4 of tf32 at a time.
template <int K, int BLOCK>
inline Eight tensor_core_sum(Eight c, const float* left, const Eight* right) {
    auto bits = [](Eight x) { return reinterpret_cast<EightBits>(x); };
    auto most = [](EightBits x, EightBits y) { return x > y ? x : y; };
    const EightBits zero = {};
    for (int first = 0; first < K; first += BLOCK) {
        Eight terms[BLOCK], plain = c;
        EightBits largest = bits(c) & 0x7fffffff;
        for (int k = 0; k < BLOCK; ++k) {
            terms[k] = left[first + k] * right[first + k];
            plain += terms[k];
            largest = most(largest, bits(terms[k]) & 0x7fffffff);
        }
        // The largest's power of two, 2^-101 at least, in the place of a float's exponent.
        const EightBits exponent = most(largest & 0x7f800000, zero + (26 << 23));
        const EightBits finite = exponent != 0x7f800000;
        // Unsigned, since what is not finite may overflow.
        auto words = [](EightBits x) { return reinterpret_cast<EightWords>(x); };
        const Eight up = reinterpret_cast<Eight>((279u << 23) - words(exponent));  // its reciprocal times 2^25
        const Eight down = reinterpret_cast<Eight>(exponent - (25 << 23));
        // A conversion to integers cuts off.
        EightWords sum = words(__builtin_convertvector(c * up, EightBits));
        for (int k = 0; k < BLOCK; ++k) sum += words(__builtin_convertvector(terms[k] * up, EightBits));
        const EightBits negative = reinterpret_cast<EightBits>(sum) < 0;  // -1 where it is
        const EightBits magnitude = reinterpret_cast<EightBits>((sum ^ words(negative)) - words(negative));
        Eight rounded = __builtin_convertvector(magnitude, Eight);
        const EightBits above = __builtin_convertvector(rounded, EightBits) > magnitude;
        rounded = reinterpret_cast<Eight>(bits(rounded) + above) * down;
        c = finite ? (negative ? -rounded : rounded) : plain;
    }
    return c;
}

// The last lane to arrive multiplies for all: a [16, K] in c's rows g and g + 8, b [K, 8], unpacked by `unpack`.
template <int K, int BLOCK, class F>
void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, const char* what, F unpack) {
    emulation::Meeting& m = emulation::meeting(~0u);
    const std::uint32_t turn = m.turn & 1;
    const int lane = emulation::lane_of(*emulation::block->current);
    const std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(m.slot[turn][lane], mine, sizeof mine);
    std::memcpy(m.slot[turn][lane] + sizeof mine, c, sizeof c);
    if (m.arrived == 31) {
        emulation::matrix_products.fetch_add(1, std::memory_order_relaxed);
        float left[16][K];
        Eight right[K], sum[16];
        for (int l = 0; l < 32; ++l) {
            std::uint32_t words[6];
            float before[4];
            std::memcpy(words, m.slot[turn][l], sizeof words);
            std::memcpy(before, m.slot[turn][l] + sizeof words, sizeof before);
            unpack(words, l / 4, l % 4, left, right);
            for (int e = 0; e < 4; ++e) sum[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2] = before[e];
        }
        for (int i = 0; i < 16; ++i) {
            sum[i] = tensor_core_sum<K, BLOCK>(sum[i], left[i], right);
            std::memcpy(m.result[turn][i], &sum[i], sizeof sum[i]);
        }
    }
    emulation::arrive(m, 32, what, 0);
    const int g = lane / 4, t = lane % 4 * 2;
    c[0] = m.result[turn][g][t];
    c[1] = m.result[turn][g][t + 1];
    c[2] = m.result[turn][g + 8][t];
    c[3] = m.result[turn][g + 8][t + 1];
}

template <class T>
void mma16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, T kind) {
    mma<16, 8>(c, a, b0, b1, "mma.m16n8k16", [&](const std::uint32_t* w, int g, int t, auto& left, auto& right) {
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
    mma<8, 4>(c, a, b0, b1, "mma.m16n8k8", [&](const std::uint32_t* w, int g, int t, auto& left, auto& right) {
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
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float min_or_nan(float a, float b) { return a != a || b != b ? NAN : a < b ? a : b; }

}  // namespace pyxlbert::cuda
