// Hopper's own instructions: barriers in shared memory that count bytes, copies of tiles by the tensor memory
// accelerator, and products of four warps whose factors lie in shared memory.  They exist for sm_90a alone; compiled
// for anything else a kernel that uses them does nothing but stop.
//
// Source: PTX ISA 8.5, sections 9.7.13 (mbarrier), 9.7.9 (cp.async.bulk.tensor) and 9.7.15 (wgmma).
#pragma once
#include "cuda/device.cuh"

#if defined(PYXLBERT_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYXLBERT_SM90A 1
#endif

namespace pyxlbert::cuda {

// Registers that a thread starts with where a block of so many threads has a multiprocessor to itself, of 65,536 in
// portions of 8.  They are all that the block ever has: its groups of four warps may pass them on, by give_registers
// and take_registers.
template <int THREADS>
constexpr int STARTING_REGISTERS = 65536 / THREADS / 8 * 8;

}  // namespace pyxlbert::cuda

#ifdef PYXLBERT_EMULATE
#include "emulated_hopper.h"
#else
#include <cuda.h>

namespace pyxlbert::cuda {

// Whether the current device has these instructions, and the module machine code for it: PYXLBERT_HOPPER says that
// sm_90a was among the architectures.
inline bool is_hopper() {
#ifdef PYXLBERT_HOPPER
    int device = 0, major = 0, minor = 0;
    check(cudaGetDevice(&device), "device");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
    return major == 9 && minor == 0;
#else
    return false;
#endif
}
constexpr int fewest_queries() { return 128; }

using TensorMap = CUtensorMap;

// A map of [B, T, H, D] (strides in elements; 16-bit elements): tiles are `rows` rows by 64 columns of one head, laid
// out with the swizzle of 128 bytes that wgmma expects, zeros where the tensor ends.
//
// Throws where the driver has no such function or refuses the strides.
inline TensorMap make_tensor_map(const void* data, const std::int64_t (&sizes)[4], const std::int64_t (&strides)[3],
                                 int rows, bool is_bfloat16) {
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    // Asked of the driver, so that the module does not depend on its library.
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
          "tensor map");
#else  // older toolkits have the function that asks for their own version alone
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result), "tensor map");
#endif
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("tensor map: the driver cannot make one");
    // Innermost first: D, T, H, B.
    const cuuint64_t size[4] = {static_cast<cuuint64_t>(sizes[3]), static_cast<cuuint64_t>(sizes[1]),
                                static_cast<cuuint64_t>(sizes[2]), static_cast<cuuint64_t>(sizes[0])};
    const cuuint64_t bytes[3] = {static_cast<cuuint64_t>(strides[1] * 2), static_cast<cuuint64_t>(strides[2] * 2),
                                 static_cast<cuuint64_t>(strides[0] * 2)};
    const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(rows), 1, 1}, step[4] = {1, 1, 1, 1};
    TensorMap map;
    const CUresult error = reinterpret_cast<Encode>(found)(
        &map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
        const_cast<void*>(data), size, bytes, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) throw std::runtime_error("tensor map: the driver refused the sizes or strides");
    return map;
}

// Tiles are swizzled by their addresses, which are to be multiples of 1024 bytes from the first on.
DEVICE void check_shared_memory() {
    if (shared_address(shared_memory()) % 1024 != 0) __trap();
}

// A barrier of `arrivals` threads, and of the bytes that copies bring.
DEVICE void mbarrier_init(std::uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
DEVICE void mbarrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void mbarrier_arrive(std::uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and says how many bytes are to come.
DEVICE void mbarrier_expect(std::uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Waits until the phase of this parity, 0 for the first, is over.
DEVICE void mbarrier_wait(std::uint64_t* barrier, int parity) {
    asm volatile(
        "{\n.reg .pred p;\nWAIT%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra WAIT%=;\n}" ::"r"(
            shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Starts the copy of a tile to `to`, 1024 bytes aligned; the barrier is told of its bytes.
DEVICE void tma_load(void* to, const TensorMap* map, std::uint64_t* barrier, int column, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

// Makes what this thread has written to shared memory visible to wgmma.
DEVICE void fence_shared_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of `threads` threads of the block, number 1 and up.
DEVICE void named_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Executed by a group of four warps: afterwards each of its threads has N registers, a multiple of 8.  take_registers
// waits until others have given enough.
template <int N>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// A factor in shared memory: rows of 64 columns, swizzled, eight rows of 128 bytes after each other.  `next` is how far
// apart blocks of 64 columns are, where the 64 are the product's columns and not what is summed over.
struct Factor {
    std::uint64_t descriptor;
    DEVICE Factor(const void* tile, int next) {
        descriptor = (shared_address(tile) & 0x3ffff) >> 4 | static_cast<std::uint64_t>(next >> 4) << 16 |
                     static_cast<std::uint64_t>(1024 >> 4) << 32 | static_cast<std::uint64_t>(1) << 62;
    }
    DEVICE std::uint64_t at(int bytes) const { return descriptor + (bytes >> 4); }
};

// Registers of products lie where the compiler would move what it may: a sum is there, as far as it knows, as soon as
// its product is issued.  So nothing that reads or writes them passes this place.
template <int M>
DEVICE void keep_in_place(float (&d)[M][4]) {
#pragma unroll
    for (int n = 0; n < M; ++n) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}
template <int M>
DEVICE void keep_in_place(std::uint32_t (&a)[M][4]) {
#pragma unroll
    for (int n = 0; n < M; ++n) asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
}

// Before products: `registers` are all that they read and write, and have been written.
template <class... R>
DEVICE void wgmma_fence(R&... registers) {
    (keep_in_place(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N committed groups of products are under way; `sums` are those of the others.
template <int N, class... R>
DEVICE void wgmma_wait(R&... sums) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
    (keep_in_place(sums), ...);
}

#define PYXLBERT_F4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define PYXLBERT_F32(d, n)                                                                                         \
    PYXLBERT_F4(d, n), PYXLBERT_F4(d, n + 1), PYXLBERT_F4(d, n + 2), PYXLBERT_F4(d, n + 3), PYXLBERT_F4(d, n + 4), \
        PYXLBERT_F4(d, n + 5), PYXLBERT_F4(d, n + 6), PYXLBERT_F4(d, n + 7)
#define PYXLBERT_NAMES32                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PYXLBERT_NAMES64                                                                                \
    PYXLBERT_NAMES32                                                                                    \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
    "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Both factors in shared memory, the sum over neighbours of both; d = a b, or d += a b where `add`.
#define PYXLBERT_WGMMA_SHARED(N, NAMES, A, B, P, OUTPUTS, KIND, TYPE)                                   \
    DEVICE void wgmma_shared(float (&d)[N / 8][4], std::uint64_t a, std::uint64_t b, bool add, TYPE) {  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                     "k16.f32." KIND "." KIND " {" NAMES "}, " A ", " B ", p, 1, 1, 0, 0;\n}"           \
                     : OUTPUTS                                                                          \
                     : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                     \
    }
PYXLBERT_WGMMA_SHARED(64, PYXLBERT_NAMES32, "%32", "%33", "%34", PYXLBERT_F32(d, 0), "bf16", bfloat16)
PYXLBERT_WGMMA_SHARED(64, PYXLBERT_NAMES32, "%32", "%33", "%34", PYXLBERT_F32(d, 0), "f16", float16)
#define PYXLBERT_COMMA ,
PYXLBERT_WGMMA_SHARED(128, PYXLBERT_NAMES64, "%64", "%65", "%66", PYXLBERT_F32(d, 0) PYXLBERT_COMMA PYXLBERT_F32(d, 8),
                      "bf16", bfloat16)
PYXLBERT_WGMMA_SHARED(128, PYXLBERT_NAMES64, "%64", "%65", "%66", PYXLBERT_F32(d, 0) PYXLBERT_COMMA PYXLBERT_F32(d, 8),
                      "f16", float16)

// The left factor in registers; of the right one columns are neighbours, and the sum runs over rows.
#define PYXLBERT_WGMMA_REGISTERS(N, NAMES, A, B, OUTPUTS, KIND, TYPE)                                          \
    DEVICE void wgmma_registers(float (&d)[N / 8][4], const std::uint32_t (&a)[4], std::uint64_t b, TYPE) {    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." KIND "." KIND " {" NAMES "}, " A ", " B \
                     ", 1, 1, 1, 1;"                                                                           \
                     : OUTPUTS                                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                    \
    }
PYXLBERT_WGMMA_REGISTERS(64, PYXLBERT_NAMES32, "{%32, %33, %34, %35}", "%36", PYXLBERT_F32(d, 0), "bf16", bfloat16)
PYXLBERT_WGMMA_REGISTERS(64, PYXLBERT_NAMES32, "{%32, %33, %34, %35}", "%36", PYXLBERT_F32(d, 0), "f16", float16)
PYXLBERT_WGMMA_REGISTERS(128, PYXLBERT_NAMES64, "{%64, %65, %66, %67}", "%68",
                         PYXLBERT_F32(d, 0) PYXLBERT_COMMA PYXLBERT_F32(d, 8), "bf16", bfloat16)
PYXLBERT_WGMMA_REGISTERS(128, PYXLBERT_NAMES64, "{%64, %65, %66, %67}", "%68",
                         PYXLBERT_F32(d, 0) PYXLBERT_COMMA PYXLBERT_F32(d, 8), "f16", float16)

#undef PYXLBERT_F4
#undef PYXLBERT_F32
#undef PYXLBERT_NAMES32
#undef PYXLBERT_NAMES64
#undef PYXLBERT_WGMMA_SHARED
#undef PYXLBERT_WGMMA_REGISTERS
#undef PYXLBERT_COMMA

}  // namespace pyxlbert::cuda
#endif
