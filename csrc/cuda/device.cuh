// The words that device code is written in: CUDA's own, and one function for each PTX instruction that CUDA C++ has no
// word for.  Compiled by g++ with PYXLBERT_EMULATE, the same words come from tests/emulation, which runs the kernels on
// the CPU; see its README for what it can tell.
//
// Kernels keep to a few rules that make both possible: all shared memory is dynamic (shared_memory()), a kernel is
// started by launch(), and PTX stands nowhere but here and in hopper.cuh.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "cuda/arguments.h"

#ifdef PYXLBERT_EMULATE
#include "emulation.h"
#define DEVICE inline
#define HOST_DEVICE inline
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#endif

namespace pyxlbert::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

#ifndef PYXLBERT_EMULATE

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // else it would be the next call's
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Bytes of shared memory that a block may have on the current device.
inline std::size_t max_shared() {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), "device");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
    return static_cast<std::size_t>(bytes);
}

// Starts a kernel with SHARED bytes of shared memory on the current device; only what has to be said is asked of the
// driver, nothing is remembered.  Both are arguments of the template, and no copy of it is inlined, so that an object
// file names every kernel that it starts and what it takes: tests/cuda/check.py reads it there.
template <auto KERNEL, std::size_t SHARED, class... Arguments>
__attribute__((noinline)) void launch(dim3 grid, int threads, CudaStream stream, const Arguments&... arguments) {
    if constexpr (SHARED > 48 * 1024)
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(KERNEL), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(SHARED)),
              "shared memory");
    KERNEL<<<grid, threads, SHARED, static_cast<cudaStream_t>(stream)>>>(arguments...);
    check(cudaGetLastError(), "launch");
}

DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char bytes[];
    return bytes;
}

DEVICE std::uint32_t shared_address(const void* p) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, not there before cp_async_wait; zeros, and nothing read, unless `there`.
DEVICE void cp_async16(void* shared, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(there ? 16 : 0)
                 : "memory");
}
// The same of 4 bytes.
DEVICE void cp_async4(void* shared, const void* global, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(there ? 4 : 0)
                 : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's committed groups are under way.
template <int N>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void ldmatrix(std::uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void ldmatrix_transposed(std::uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8].
DEVICE void mma16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, float16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c [16, 8] += a [16, 8] b [8, 8] in tf32.
DEVICE void mma8(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE std::uint32_t to_tf32(float x) {
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x.
DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The smaller one; NaN where either is.
DEVICE float min_or_nan(float a, float b) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

#endif

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
DEVICE float to_float(float16 x) { return __half2float(x); }
template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
    return x;
}
template <>
DEVICE bfloat16 from_float<bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
DEVICE float16 from_float<float16>(float x) {
    return __float2half_rn(x);
}

template <class To, class From>
DEVICE To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof(To));
    return y;
}

// A grid of so many blocks in one dimension, of which a device takes 2^31 - 1.
inline dim3 grid_of(std::int64_t blocks) {
    if (blocks > 0x7fffffff) throw std::runtime_error("launch: more than 2^31 - 1 blocks");
    return dim3(static_cast<unsigned>(blocks));
}

// Bytes of shared memory that a block may have on every device of capability 8.0, 9.0 or 10.0, and those that it may
// have on every other one from 8.0 on, for which kernels come with small tiles too.
constexpr std::size_t MAX_SHARED = 163 * 1024, MIN_SHARED = 99 * 1024;

// Calls f(true_type) where small tiles are wanted on the current device, else f(false_type); unless DIFFER, all tiles
// are small.  Checks compile what a device needs, by PYXLBERT_SMALL_TILES or PYXLBERT_LARGE_TILES.
template <bool DIFFER, class F>
void with_tiles(F f) {
#ifdef PYXLBERT_SMALL_TILES
    f(std::bool_constant<DIFFER>());
#else
#ifndef PYXLBERT_LARGE_TILES
    if constexpr (DIFFER)
        if (max_shared() < MAX_SHARED) return f(std::true_type());
#endif
    f(std::false_type());
#endif
}

constexpr float INFINITY_ = __builtin_huge_valf();
constexpr float NAN_ = __builtin_nanf("");

DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / 32; }

template <class A, class B>
HOST_DEVICE constexpr A ceil_div(A a, B b) {
    return (a + b - 1) / b;
}

// VEC neighbours as float, in pieces of 16 bytes or of what there is; unless VEC is 1, `p` is aligned to a piece.
template <int VEC, class T>
DEVICE void load(const T* p, float (&x)[VEC]) {
    if constexpr (VEC == 1) {
        x[0] = to_float(*p);
    } else {
        using Piece = std::conditional_t<VEC * sizeof(T) == 8, uint2, uint4>;
        constexpr int EACH = sizeof(Piece) / sizeof(T);
        static_assert(VEC % EACH == 0);
#pragma unroll
        for (int v = 0; v < VEC / EACH; ++v) {
            const Piece piece = reinterpret_cast<const Piece*>(p)[v];
            T part[EACH];
            memcpy(part, &piece, sizeof(Piece));
#pragma unroll
            for (int e = 0; e < EACH; ++e) x[v * EACH + e] = to_float(part[e]);
        }
    }
}

template <int VEC, class T>
DEVICE void store(T* p, const float (&x)[VEC]) {
    if constexpr (VEC == 1) {
        *p = from_float<T>(x[0]);
    } else {
        using Piece = std::conditional_t<VEC * sizeof(T) == 8, uint2, uint4>;
        constexpr int EACH = sizeof(Piece) / sizeof(T);
#pragma unroll
        for (int v = 0; v < VEC / EACH; ++v) {
            T part[EACH];
#pragma unroll
            for (int e = 0; e < EACH; ++e) part[e] = from_float<T>(x[v * EACH + e]);
            Piece piece;
            memcpy(&piece, part, sizeof(Piece));
            reinterpret_cast<Piece*>(p)[v] = piece;
        }
    }
}

// Calls f(T()) with the element type.
template <class F>
void with_type([[maybe_unused]] DType dtype, F f) {
    // Where time to compile counts, one type or two stand for all: the code is the same.
#ifndef PYXLBERT_ONE_TYPE
    if (dtype == DType::float32) return f(float());
#ifndef PYXLBERT_FEW_TYPES
    if (dtype == DType::float16) return f(float16());
#endif
#endif
    f(bfloat16());
}

// Two neighbours, at a place for two.
template <class T>
DEVICE void store_pair(T* p, float x, float y) {
    const T pair[2] = {from_float<T>(x), from_float<T>(y)};
    using Piece = std::conditional_t<sizeof(T) == 4, uint2, unsigned>;
    Piece piece;
    memcpy(&piece, pair, sizeof(Piece));
    *reinterpret_cast<Piece*>(p) = piece;
}

// The same where the element type is asked at run time.
template <int VEC>
DEVICE void load_any(const void* p, DType dtype, std::int64_t at, float (&x)[VEC]) {
    if (dtype == DType::float32)
        load<VEC>(static_cast<const float*>(p) + at, x);
    else if (dtype == DType::bfloat16)
        load<VEC>(static_cast<const bfloat16*>(p) + at, x);
    else
        load<VEC>(static_cast<const float16*>(p) + at, x);
}

template <int VEC>
DEVICE void store_any(void* p, DType dtype, std::int64_t at, const float (&x)[VEC]) {
    if (dtype == DType::float32)
        store<VEC>(static_cast<float*>(p) + at, x);
    else if (dtype == DType::bfloat16)
        store<VEC>(static_cast<bfloat16*>(p) + at, x);
    else
        store<VEC>(static_cast<float16*>(p) + at, x);
}

}  // namespace pyxlbert::cuda
