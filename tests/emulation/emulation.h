// CUDA C++ on the CPU: what csrc/cuda/device.cuh takes its words from when g++ compiles it with PYXLBERT_EMULATE.
//
// Every CUDA thread is a fiber and every block runs on one thread of the CPU, blocks side by side by OpenMP.  A fiber
// runs until it waits: at a barrier, or at an instruction that a warp executes together.  Warps are run one after the
// other, each as far as it gets, so that they are as far apart as the program allows; CUDA_EMULATION_ORDER=reversed
// turns the order of warps and lanes around.  Shared memory starts as NaN in every block, and what is copied
// asynchronously is NaN from the moment the copy is issued until it is waited for.  A program that lacks a barrier or
// waits for too little then computes NaN or something else, and one that cannot go on says which threads wait where.
//
// The README beside this file lists what this cannot see.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#undef __global__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the emulation switches stacks on x86-64 only"
#endif

// Saves the callee's registers and the stack pointer to *from, and goes on from the stack `to`.
extern "C" void emulation_switch(void** from, void* to);

namespace emulation {

// Matrix products since the module was loaded, each of 16 x 8 sums: what kernels skip is not counted.
inline std::atomic<std::uint64_t> matrix_products{0};

// Threads that wait for one another: a barrier, or the lanes of an instruction of a warp.  Two turns may overlap, when
// the first lanes have gone on to the next instruction before the last have read, so there are two sets of slots.
struct Meeting {
    std::uint32_t mask = 0;
    int arrived = 0;
    std::uint32_t turn = 0;
    const char* what = "";
    int line = 0;
    alignas(16) unsigned char slot[2][32][48] = {};
    float result[2][16][8] = {};
};

// A cp.async that has not landed: 16 bytes, zeros without a source.
struct Copy {
    unsigned char* to;
    const unsigned char* from;
    std::uint32_t bytes;
};

// Registers that a thread has named to a wgmma_fence, and what was in them.
struct Registers {
    const unsigned char* at;
    std::vector<unsigned char> held;
};

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    unsigned thread = 0;
    bool done = false;
    Meeting* waits_for = nullptr;
    std::uint32_t turn = 0;
    // An mbarrier whose phase is still `phase`, where it waits for one: see emulated_hopper.h.
    const std::uint8_t* phase_of = nullptr;
    std::uint8_t phase = 0;
    // So many registers for its group of four warps, where it waits for the block to have them to spare.
    int registers = 0;
    const char* at = "the start";
    int line = 0;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
    std::vector<Registers> fenced;
};

struct Product;

// Four warps: what they bring to a product that they execute together, the products under way, group by group, and how
// many registers each thread has.
struct Warpgroup {
    Meeting meeting;
    const void* brought[128] = {};
    std::vector<std::shared_ptr<Product>> open;
    std::vector<std::vector<std::shared_ptr<Product>>> groups;
    int registers = 0;
};

struct Warp {
    std::vector<std::unique_ptr<Meeting>> meetings;  // one for each set of lanes
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Meeting barrier, named[16];
    Warpgroup warpgroups[8];
    int spare_registers = 0;  // a thread of a group, that groups have given and none has taken
    int live = 0;
    dim3 grid;
    uint3 index{};
    uint3 thread{};  // of the fiber that runs
    void* scheduler = nullptr;
    Fiber* current = nullptr;
    std::vector<unsigned char> memory;
    unsigned char* shared = nullptr;
    std::size_t shared_bytes = 0;
    // Shared memory as copy engine and wgmma see it, from the first mbarrier on; and mbarriers that the former does not
    // know yet.  See emulated_hopper.h.
    std::vector<unsigned char> asynchronous;
    std::vector<std::uint64_t*> fresh_barriers;
    const std::function<void()>* body = nullptr;
    // What else can happen when every fiber waits: returns whether something did.  Bulk copies of emulated_hopper.h.
    std::vector<std::function<void()>> pending;
};

// A plain pointer, which needs no initialisation at every use.
inline constinit thread_local Block* block = nullptr;

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t STACK = 512 << 10;
#else
constexpr std::size_t STACK = 128 << 10;
#endif

inline int warp_of(const Fiber& fiber) { return static_cast<int>(fiber.thread / 32); }
inline int lane_of(const Fiber& fiber) { return static_cast<int>(fiber.thread % 32); }

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulation: %s (block %u, %u, %u)\n", what, block->index.x, block->index.y, block->index.z);
    int named = 0;
    for (const Fiber& fiber : block->fibers)
        if (!fiber.done && fiber.stack_pointer != nullptr && named++ < 8)
            std::fprintf(stderr, "  thread %u is at %s, line %d\n", fiber.thread, fiber.at, fiber.line);
    std::abort();
}

inline void leave() {
    Fiber& fiber = *block->current;
#if defined(__SANITIZE_ADDRESS__)
    void* fake;
    __sanitizer_start_switch_fiber(&fake, block->scheduler, STACK);
    emulation_switch(&fiber.stack_pointer, block->scheduler);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    emulation_switch(&fiber.stack_pointer, block->scheduler);
#endif
}

inline void arrive(Meeting& meeting, int expected, const char* what, int line) {
    Fiber& fiber = *block->current;
    fiber.at = what;
    fiber.line = line;
    if (meeting.arrived == 0) {
        meeting.what = what;
        meeting.line = line;
    } else if (std::strcmp(meeting.what, what) != 0 || meeting.line != line) {
        fail("threads that belong together are at different instructions");
    }
    if (++meeting.arrived >= expected) {
        meeting.arrived = 0;
        ++meeting.turn;
        return;
    }
    fiber.waits_for = &meeting;
    fiber.turn = meeting.turn;
    leave();
    fiber.waits_for = nullptr;
}

// Where the lanes of `mask` meet; the calling lane is one of them.
inline Meeting& meeting(std::uint32_t mask) {
    Fiber& fiber = *block->current;
    if ((mask >> lane_of(fiber) & 1) == 0) fail("a lane that is not in its own mask");
    auto& all = block->warps[warp_of(fiber)].meetings;
    for (auto& one : all)
        if (one->mask == mask) return *one;
    all.push_back(std::make_unique<Meeting>());
    all.back()->mask = mask;
    return *all.back();
}

// Every lane gives x and takes the one of lane source(lane), its own where that lane is not there.
template <class T, class F>
T exchange(std::uint32_t mask, T x, const char* what, int line, F source) {
    static_assert(sizeof(T) <= 32);
    Meeting& m = meeting(mask);
    const std::uint32_t turn = m.turn & 1;
    const int lane = lane_of(*block->current);
    std::memcpy(m.slot[turn][lane], &x, sizeof(T));
    arrive(m, __builtin_popcount(mask), what, line);
    const int from = source(lane);
    if ((mask >> from & 1) == 0) return x;
    T result;
    std::memcpy(&result, m.slot[turn][from], sizeof(T));
    return result;
}

inline bool any(std::uint32_t mask, bool x, int line) {
    Meeting& m = meeting(mask);
    const std::uint32_t turn = m.turn & 1;
    m.slot[turn][lane_of(*block->current)][0] = x;
    arrive(m, __builtin_popcount(mask), "__any_sync", line);
    bool result = false;
    for (int lane = 0; lane < 32; ++lane) result |= (mask >> lane & 1) != 0 && m.slot[turn][lane][0] != 0;
    return result;
}

inline bool any_of_block(bool x, int line) {
    // The slots of a meeting are a warp's: the block's answer is gathered in the results of two turns.
    Meeting& m = block->barrier;
    const std::uint32_t turn = m.turn & 1;
    float& answer = m.result[turn][0][0];
    if (m.arrived == 0) answer = 0.0f;
    if (x) answer = 1.0f;
    arrive(m, block->live, "__syncthreads_or", line);
    return answer != 0.0f;
}

inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    (*block->body)();
    Fiber& fiber = *block->current;
    if (!fiber.open.empty() || !fiber.groups.empty()) fail("a thread ended with a cp.async that nobody waited for");
    const Warpgroup& group = block->warpgroups[fiber.thread / 128];
    if (!group.open.empty() || !group.groups.empty()) fail("a thread ended with a wgmma that nobody waited for");
    fiber.done = true;
    --block->live;
    // Threads that have ended no longer hold up a barrier.
    Meeting& barrier = block->barrier;
    if (barrier.arrived > 0 && barrier.arrived >= block->live) {
        barrier.arrived = 0;
        ++barrier.turn;
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, block->scheduler, STACK);
#endif
    emulation_switch(&fiber.stack_pointer, block->scheduler);
    std::abort();
}

inline void prepare(Block& b, int threads, std::size_t shared) {
    b.live = threads;
    b.barrier = Meeting();
    for (Meeting& one : b.named) one.arrived = 0;
    // Of a kernel that passes registers on, a block has a multiprocessor to itself.
    for (Warpgroup& one : b.warpgroups) {
        one.meeting.arrived = 0;
        one.open.clear();
        one.groups.clear();
        one.registers = 65536 / threads / 8 * 8;
    }
    b.spare_registers = 0;
    b.warps.resize((threads + 31) / 32);
    for (Warp& warp : b.warps)
        for (auto& one : warp.meetings) one->arrived = 0;
    b.pending.clear();
    b.asynchronous.clear();
    b.fresh_barriers.clear();
    while (static_cast<int>(b.fibers.size()) < threads) {
        b.fibers.emplace_back();
        b.fibers.back().stack = static_cast<char*>(std::aligned_alloc(64, STACK));
    }
    // 0xff.. is NaN in every floating format, and an index far outside.
    b.memory.assign(shared + 2048, 0xff);
    b.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(b.memory.data()) + 1023) & ~1023ull);
    b.shared_bytes = shared;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(b.memory.data(), b.memory.size());
    __asan_poison_memory_region(b.shared + (shared + 7) / 8 * 8, 512);
#endif
    for (int n = 0; n < threads; ++n) {
        Fiber& fiber = b.fibers[n];
        fiber.thread = n;
        fiber.done = false;
        fiber.waits_for = nullptr;
        fiber.phase_of = nullptr;
        fiber.registers = 0;
        fiber.at = "the start";
        fiber.open.clear();
        fiber.groups.clear();
        fiber.fenced.clear();
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(fiber.stack, STACK);
#endif
        // As emulation_switch leaves a stack: six registers, and the address to return to.
        void** top = reinterpret_cast<void**>(fiber.stack + STACK) - 2;
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(&entry);
        for (int k = 0; k < 6; ++k) *--top = nullptr;
        fiber.stack_pointer = top;
    }
    for (std::size_t n = threads; n < b.fibers.size(); ++n) b.fibers[n].done = true;
}

// Whether a group of four warps may have so many registers a thread: it has them, or the block has enough to spare.
inline bool has_registers(int group, int wanted) {
    return wanted <= block->warpgroups[group].registers + block->spare_registers;
}

inline bool can_run(const Fiber& fiber) {
    if (fiber.done) return false;
    if (fiber.waits_for != nullptr && fiber.waits_for->turn == fiber.turn) return false;
    if (fiber.registers != 0 && !has_registers(static_cast<int>(fiber.thread / 128), fiber.registers)) return false;
    return fiber.phase_of == nullptr || *fiber.phase_of != fiber.phase;
}

// Runs the lanes of a warp until all of them wait; whether any did something.
inline bool run_warp(Block& b, int warp, int threads, bool reversed) {
    const int lanes = std::min(32, threads - warp * 32);
    bool any = false, again = true;
    while (again) {
        again = false;
        for (int n = 0; n < lanes; ++n) {
            Fiber& fiber = b.fibers[warp * 32 + (reversed ? lanes - 1 - n : n)];
            if (!can_run(fiber)) continue;
            b.current = &fiber;
            b.thread = {fiber.thread, 0, 0};
#if defined(__SANITIZE_ADDRESS__)
            void* fake;
            __sanitizer_start_switch_fiber(&fake, fiber.stack, STACK);
            emulation_switch(&b.scheduler, fiber.stack_pointer);
            __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
            emulation_switch(&b.scheduler, fiber.stack_pointer);
#endif
            again = any = true;
        }
    }
    return any;
}

inline void run_block(dim3 grid, int threads, std::size_t shared, uint3 index, const std::function<void()>& body,
                      bool reversed) {
    static thread_local Block mine;
    block = &mine;
    mine.grid = grid;
    mine.index = index;
    mine.body = &body;
    prepare(mine, threads, shared);
    const int warps = static_cast<int>(mine.warps.size());
    while (mine.live > 0) {
        bool any = false;
        for (int w = 0; w < warps; ++w) any |= run_warp(mine, reversed ? warps - 1 - w : w, threads, reversed);
        if (any || mine.live == 0) continue;
        if (mine.pending.empty()) {
            for (const Fiber& fiber : mine.fibers)
                if (!fiber.done && fiber.registers != 0)
                    fail("deadlock: a group of four warps waits for registers that no other gives");
            fail("deadlock: not all threads get to a barrier or an instruction of a warp");
        }
        const std::function<void()> oldest = std::move(mine.pending.front());
        mine.pending.erase(mine.pending.begin());
        oldest();
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(mine.memory.data(), mine.memory.size());
#endif
}

// Bytes of shared memory that a block may have: a Hopper's, or CUDA_EMULATION_SHARED.
inline std::size_t max_shared() {
    const char* wanted = std::getenv("CUDA_EMULATION_SHARED");
    return wanted == nullptr ? 227 * 1024 : std::strtoull(wanted, nullptr, 10);
}

inline void launch(dim3 grid, int threads, std::size_t shared, const std::function<void()>& body) {
    const char* order = std::getenv("CUDA_EMULATION_ORDER");
    const bool reversed = order != nullptr && std::strcmp(order, "reversed") == 0;
    if (threads < 1 || threads > 1024 || shared > max_shared() || grid.x == 0 || grid.y == 0 || grid.y > 65535) {
        std::fprintf(stderr, "emulation: a launch of %d threads, %zu bytes, grid %u, %u, %u\n", threads, shared, grid.x,
                     grid.y, grid.z);
        std::abort();
    }
#pragma omp parallel for collapse(3) schedule(dynamic) if (grid.x * grid.y * grid.z > 1)
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) run_block(grid, threads, shared, {x, y, z}, body, reversed);
}

}  // namespace emulation

#define threadIdx (emulation::block->thread)
#define blockIdx (emulation::block->index)
#define gridDim (emulation::block->grid)
#define __syncthreads() emulation::arrive(emulation::block->barrier, emulation::block->live, "__syncthreads", __LINE__)
#define __syncthreads_or(x) emulation::any_of_block((x), __LINE__)
#define __syncwarp() emulation::arrive(emulation::meeting(~0u), 32, "__syncwarp", __LINE__)
#define __shfl_xor_sync(mask, x, offset) \
    emulation::exchange((mask), (x), "__shfl_xor_sync", __LINE__, [&](int lane) { return lane ^ (offset); })
#define __shfl_sync(mask, x, from) \
    emulation::exchange((mask), (x), "__shfl_sync", __LINE__, [&](int) { return (from) & 31; })
#define __any_sync(mask, x) emulation::any((mask), (x), __LINE__)

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }

#include "emulated_instructions.h"
