// The instructions of hopper.cuh: mbarriers, tensor memory copies, wgmma.
//
// A copy lands as late as it may: when nobody can go on without it.  A product is computed as late as it may: when it
// is waited for.  Until then its sum is NaN.
//
// Copy engine and wgmma have a view of shared memory of their own: what threads write is not in it until one of them
// has executed a fence.proxy.async.  Which of them has written is not known, so that one fence serves for all that was
// written before.
#pragma once
#include "emulation.h"

namespace pyxlbert::cuda {

// CUDA_EMULATION_HOPPER=1 makes the device one of sm_90a, whose kernels then take the smallest calls too.
inline bool is_hopper() {
    const char* wanted = std::getenv("CUDA_EMULATION_HOPPER");
    return wanted != nullptr && std::strcmp(wanted, "1") == 0;
}
inline int fewest_queries() { return 1; }

// [B, T, H, D] of 16-bit elements.
struct TensorMap {
    const unsigned char* data;
    std::int64_t sizes[4], strides[3];
    int rows;
};

inline TensorMap make_tensor_map(const void* data, const std::int64_t (&sizes)[4], const std::int64_t (&strides)[3],
                                 int rows, bool) {
    TensorMap map{static_cast<const unsigned char*>(data), {}, {}, rows};
    std::copy(sizes, sizes + 4, map.sizes);
    std::copy(strides, strides + 3, map.strides);
    bool good = reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && rows >= 1 && rows <= 256;
    for (const std::int64_t stride : strides) good = good && stride > 0 && stride * 2 % 16 == 0 && stride < (1ll << 39);
    for (const std::int64_t size : sizes) good = good && size > 0 && size <= (1ll << 32);
    if (!good) throw std::runtime_error("tensor map: the driver would refuse the sizes or strides");
    return map;
}

inline void check_shared_memory() {}

// The byte of the asynchronous view that lies where p lies in shared memory.
inline unsigned char* asynchronous(const void* p) {
    emulation::Block& block = *emulation::block;
    if (block.asynchronous.empty()) block.asynchronous.assign(block.shared_bytes, 0xff);
    return block.asynchronous.data() + (static_cast<const unsigned char*>(p) - block.shared);
}
inline void fence_shared_for_wgmma() {
    emulation::Block& block = *emulation::block;
    std::memcpy(asynchronous(block.shared), block.shared, block.shared_bytes);
}

// As it lies in 64 bits of shared memory.
struct Mbarrier {
    std::uint8_t phase, expected, pending, initialised;
    std::int32_t bytes;
};
static_assert(sizeof(Mbarrier) == 8);
constexpr std::uint8_t INITIALISED = 0x5a;

inline Mbarrier& mbarrier(std::uint64_t* barrier) {
    in_shared_memory(barrier, 8, "an mbarrier outside of shared memory");
    Mbarrier& b = *reinterpret_cast<Mbarrier*>(barrier);
    if (b.initialised != INITIALISED) emulation::fail("an mbarrier that nobody has initialised");
    return b;
}
inline void complete(Mbarrier& b) {
    if (b.pending == 0 && b.bytes == 0) {
        b.phase ^= 1;
        b.pending = b.expected;
    }
}
inline void mbarrier_init(std::uint64_t* barrier, int arrivals) {
    in_shared_memory(barrier, 8, "an mbarrier outside of shared memory");
    const auto count = static_cast<std::uint8_t>(arrivals);
    *reinterpret_cast<Mbarrier*>(barrier) = {0, count, count, INITIALISED, 0};
    emulation::block->fresh_barriers.push_back(barrier);
}
inline void mbarrier_init_done() { emulation::block->fresh_barriers.clear(); }
inline void mbarrier_expect(std::uint64_t* barrier, int bytes) {
    Mbarrier& b = mbarrier(barrier);
    if (b.pending == 0) emulation::fail("more arrivals at an mbarrier than it was made for");
    b.bytes += bytes;
    --b.pending;
    complete(b);
}
inline void mbarrier_arrive(std::uint64_t* barrier) { mbarrier_expect(barrier, 0); }
inline void mbarrier_wait(std::uint64_t* barrier, int parity) {
    Mbarrier& b = mbarrier(barrier);
    emulation::Fiber& fiber = *emulation::block->current;
    fiber.at = "mbarrier_wait";
    while (b.phase == parity) {
        fiber.phase_of = &b.phase;
        fiber.phase = b.phase;
        emulation::leave();
        fiber.phase_of = nullptr;
    }
}

// 16-byte pieces of a row of 128 bytes change places by the row's number: bits 4 to 6 of an address by bits 7 to 9.
inline std::uintptr_t swizzled(std::uintptr_t address) { return address ^ (address >> 3 & 0x70); }

inline void tma_load(void* to, const TensorMap* map, std::uint64_t* barrier, int column, int row, int head, int batch) {
    const std::size_t bytes = static_cast<std::size_t>(map->rows) * 128;
    in_shared_memory(to, bytes, "a tensor copy outside of shared memory");
    if (reinterpret_cast<std::uintptr_t>(to) % 1024 != 0) emulation::fail("a tensor copy to no multiple of 1024 bytes");
    std::memset(to, 0xff, bytes);
    std::memset(asynchronous(to), 0xff, bytes);
    Mbarrier* b = &mbarrier(barrier);
    for (const std::uint64_t* fresh : emulation::block->fresh_barriers)
        if (fresh == barrier) emulation::fail("a tensor copy with an mbarrier that the copy engine does not know yet");
    // The map by value: the thread that asks may have ended.
    emulation::block->pending.push_back([=, map = *map] {
        for (int r = 0; r < map.rows; ++r)
            for (int c = 0; c < 64; ++c) {
                const std::int64_t t = row + r, d = column + c;
                std::uint16_t x = 0;
                if (t >= 0 && t < map.sizes[1] && d < map.sizes[3])
                    std::memcpy(
                        &x, map.data + (batch * map.strides[0] + t * map.strides[1] + head * map.strides[2] + d) * 2,
                        2);
                const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(to) + r * 128 + c * 2;
                void* place = reinterpret_cast<void*>(swizzled(at));
                std::memcpy(place, &x, 2);
                std::memcpy(asynchronous(place), &x, 2);
            }
        b->bytes -= static_cast<std::int32_t>(bytes);
        complete(*b);
    });
}

inline void named_barrier(int number, int threads) {
    emulation::arrive(emulation::block->named[number], threads, "bar.sync", number);
}
// `setmaxnreg`: registers pass from group to group through what the block has to spare.
template <int N>
void give_registers() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256);
    emulation::Block& block = *emulation::block;
    emulation::Warpgroup& group = block.warpgroups[block.current->thread / 128];
    emulation::arrive(group.meeting, 128, "setmaxnreg.dec", N);
    // The first that goes on does it for all, here and below.
    if (group.registers <= N) return;
    block.spare_registers += group.registers - N;
    group.registers = N;
}
template <int N>
void take_registers() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256);
    emulation::Block& block = *emulation::block;
    emulation::Fiber& fiber = *block.current;
    const int number = static_cast<int>(fiber.thread / 128);
    emulation::Warpgroup& group = block.warpgroups[number];
    emulation::arrive(group.meeting, 128, "setmaxnreg.inc", N);
    while (!emulation::has_registers(number, N)) {
        fiber.registers = N;
        emulation::leave();
        fiber.registers = 0;
    }
    if (group.registers >= N) return;
    block.spare_registers -= N - group.registers;
    group.registers = N;
}

struct Factor {
    std::uint64_t address;
    std::uint64_t next;
    Factor(const void* tile, int between) : address(reinterpret_cast<std::uint64_t>(tile)), next(between) {
        if (address % 1024 != 0) emulation::fail("a factor of wgmma at no multiple of 1024 bytes");
    }
    Factor at(int bytes) const {
        Factor moved = *this;
        moved.address += bytes;
        return moved;
    }
};

// Threads name the registers that products read and write.  What is in them then is to be in them when the products are
// issued, and sums that a wait does not name are not to be read after it: the compiler may have moved either.
template <class... R>
void wgmma_fence(R&... registers) {
    auto held = [](const auto& x) {
        const auto* at = reinterpret_cast<const unsigned char*>(&x);
        return emulation::Registers{at, {at, at + sizeof x}};
    };
    emulation::block->current->fenced = {held(registers)...};
}
// Fails unless this thread has named `bytes` at p to its last fence and, if they are to be `unchanged`, they still are
// what they were.
inline void in_fence(const void* p, std::size_t bytes, bool unchanged) {
    const auto* at = static_cast<const unsigned char*>(p);
    for (const emulation::Registers& one : emulation::block->current->fenced) {
        if (at < one.at || at + bytes > one.at + one.held.size()) continue;
        if (unchanged && std::memcmp(at, one.held.data() + (at - one.at), bytes) != 0)
            emulation::fail("a register of wgmma that was written after the wgmma_fence");
        return;
    }
    emulation::fail("a register of wgmma that no wgmma_fence names");
}

// The sum of products under way: d of 128 threads, [64, 8 blocks].
struct SumUnderWay {
    float (*d[128])[4];
    int blocks, under_way = 0;
    std::vector<float> value;
};
}  // namespace pyxlbert::cuda

struct emulation::Product {
    std::shared_ptr<pyxlbert::cuda::SumUnderWay> sum;
    std::function<void()> multiply;
};

namespace pyxlbert::cuda {

// Four threads have the eight neighbours of a row.
inline float& of_sum(float (*const* d)[4], int i, int j) {
    return d[i / 16 * 32 + i % 8 * 4 + j % 8 / 2][j / 8][i % 16 / 8 * 2 + j % 2];
}

inline void wgmma_commit() {
    emulation::Warpgroup& group = emulation::block->warpgroups[emulation::block->current->thread / 128];
    if (group.meeting.arrived == 127) {
        group.groups.push_back(std::move(group.open));
        group.open.clear();
    }
    emulation::arrive(group.meeting, 128, "wgmma_commit", 0);
}
// The last of 128 threads multiplies for all.
template <int N, class... R>
void wgmma_wait(R&... sums) {
    emulation::Fiber& fiber = *emulation::block->current;
    emulation::Warpgroup& group = emulation::block->warpgroups[fiber.thread / 128];
    if (group.meeting.arrived == 127)
        while (group.groups.size() > N) {
            for (const auto& product : group.groups.front()) {
                product->multiply();
                SumUnderWay& sum = *product->sum;
                if (--sum.under_way > 0) continue;
                const float* mine = &sum.d[fiber.thread % 128][0][0];
                if (((mine != reinterpret_cast<const float*>(&sums)) && ...))
                    emulation::fail("a sum of wgmma that the wait for it does not name");
                for (int i = 0; i < 64; ++i)
                    for (int j = 0; j < sum.blocks * 8; ++j) of_sum(sum.d, i, j) = sum.value[i * sum.blocks * 8 + j];
            }
            group.groups.erase(group.groups.begin());
        }
    emulation::arrive(group.meeting, 128, "wgmma_wait", 0);
    fiber.fenced.clear();
}

inline std::uint16_t bits_at(std::uint64_t tile, int row, int column) {
    const std::uintptr_t at = swizzled(tile + row * 128 + column * 2);
    in_shared_memory(reinterpret_cast<void*>(at), 2, "a factor of wgmma outside of shared memory");
    std::uint16_t bits;
    std::memcpy(&bits, asynchronous(reinterpret_cast<void*>(at)), 2);
    return bits;
}

// The last of 128 threads issues for all: left(i, k) and right(k, j) give bits, d of thread t has rows of its warp.
template <int N, class T, class Left, class Right>
void wgmma(float (&d)[N / 8][4], const std::uint32_t* a, bool add, T kind, const char* what, Left left, Right right) {
    struct Brought {
        float (*d)[4];
        const std::uint32_t* a;
    };
    const Brought mine{d, a};
    const unsigned thread = emulation::block->current->thread;
    emulation::Warpgroup& group = emulation::block->warpgroups[thread / 128];
    group.brought[thread % 128] = &mine;
    auto under_way = [&]() -> std::shared_ptr<SumUnderWay> {
        for (const auto& one : group.open)
            if (one->sum->d[thread % 128] == d) return one->sum;
        for (const auto& products : group.groups)
            for (const auto& one : products)
                if (one->sum->d[thread % 128] == d) return one->sum;
        return nullptr;
    };
    in_fence(d, sizeof d, under_way() == nullptr);
    if (a != nullptr) in_fence(a, 4 * sizeof *a, true);
    if (group.meeting.arrived == 127) {
        emulation::matrix_products.fetch_add(4 * (N / 8), std::memory_order_relaxed);
        auto brought = [&](int t) { return static_cast<const Brought*>(group.brought[t]); };
        std::shared_ptr<SumUnderWay> sum = under_way();
        if (sum == nullptr) {
            sum = std::make_shared<SumUnderWay>();
            sum->blocks = N / 8;
            sum->value.resize(64 * N);
            for (int t = 0; t < 128; ++t) sum->d[t] = brought(t)->d;
            for (int i = 0; i < 64; ++i)
                for (int j = 0; j < N; ++j) {
                    sum->value[i * N + j] = of_sum(sum->d, i, j);
                    of_sum(sum->d, i, j) = __builtin_nanf("");
                }
        }
        ++sum->under_way;
        // Registers of the lane that has row i % 8 and columns k % 8.
        std::vector<std::uint16_t> registers;
        if (a != nullptr)
            for (int i = 0; i < 64; ++i)
                for (int k = 0; k < 16; ++k) {
                    const int lane = i % 8 * 4 + k % 8 / 2, place = (i % 16 >= 8) + (k >= 8) * 2;
                    registers.push_back(brought(i / 16 * 32 + lane)->a[place] >> (k % 2 * 16) & 0xffff);
                }
        auto multiply = [=, sum = sum.get()] {
            static thread_local float l[64][16];
            static thread_local Eight r[N / 8][16];
            for (int i = 0; i < 64; ++i)
                for (int k = 0; k < 16; ++k)
                    l[i][k] = half_of(registers.empty() ? left(i, k) : registers[i * 16 + k], 0, kind);
            for (int k = 0; k < 16; ++k)
                for (int j = 0; j < N; ++j) r[j / 8][k][j % 8] = half_of(right(k, j), 0, kind);
            for (int i = 0; i < 64; ++i)
                for (int n = 0; n < N / 8; ++n) {
                    float* at = sum->value.data() + i * N + n * 8;
                    Eight eight = {};
                    if (add) std::memcpy(&eight, at, sizeof eight);
                    eight = tensor_core_sum<16, 16>(eight, l[i], r[n]);
                    std::memcpy(at, &eight, sizeof eight);
                }
        };
        group.open.push_back(std::make_shared<emulation::Product>(std::move(sum), multiply));
    }
    emulation::arrive(group.meeting, 128, what, 0);
}

template <int BLOCKS, class T>
void wgmma_shared(float (&d)[BLOCKS][4], Factor a, Factor b, bool add, T kind) {
    wgmma<BLOCKS * 8>(
        d, nullptr, add, kind, "wgmma", [=](int i, int k) { return bits_at(a.address, i, k); },
        [=](int k, int j) { return bits_at(b.address, j, k); });
}
template <int BLOCKS, class T>
void wgmma_registers(float (&d)[BLOCKS][4], const std::uint32_t (&a)[4], Factor b, T kind) {
    wgmma<BLOCKS * 8>(
        d, a, true, kind, "wgmma with registers", [](int, int) { return std::uint16_t{0}; },
        [=](int k, int j) { return bits_at(b.address + j / 64 * b.next, k, j % 64); });
}

}  // namespace pyxlbert::cuda
