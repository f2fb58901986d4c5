#include "workspace.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace pyxlbert {
namespace {

struct Buffers {
    struct Buffer {
        void* data = nullptr;
        std::size_t size = 0;
    };
    Buffer slots[static_cast<int>(Slot::count)];

    void release() {
        for (Buffer& buffer : slots) {
            std::free(buffer.data);
            buffer = {};
        }
    }
    ~Buffers() { release(); }
};

thread_local Buffers buffers;
std::atomic<bool> poisoned{false};

}  // namespace

void* workspace(Slot slot, std::size_t bytes) {
    Buffers::Buffer& buffer = buffers.slots[static_cast<int>(slot)];
    if (buffer.size < bytes) {
        // The old contents are not kept, so free first: the peak stays at the larger of the two.
        std::free(buffer.data);
        buffer = {};
        const std::size_t size = (bytes + 4095) / 4096 * 4096;
        buffer.data = std::aligned_alloc(4096, size);
        if (buffer.data == nullptr) throw std::bad_alloc();
        buffer.size = size;
    }
    if (poisoned.load(std::memory_order_relaxed)) std::memset(buffer.data, 0xff, bytes);
    return buffer.data;
}

void poison_workspaces(bool on) { poisoned.store(on, std::memory_order_relaxed); }

std::size_t workspace_bytes() {
    std::size_t total = 0;
    for (const Buffers::Buffer& buffer : buffers.slots) total += buffer.size;
    return total;
}

void release_workspace() { buffers.release(); }

}  // namespace pyxlbert
