// Memory that lives as long as its owner.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdlib>
#include <new>

namespace pyxlbert {

// A large one lies on huge pages if the system has them: a product reads a weight from end to end, and every 4 KiB
// would cost a look at the page table.
class Memory {
  public:
    explicit Memory(std::size_t bytes) {
        constexpr std::size_t huge = 2 << 20, line = 64;
        const std::size_t alignment = bytes >= huge ? huge : line;
        const std::size_t size = (bytes + alignment - 1) / alignment * alignment;
        data_ = std::aligned_alloc(alignment, size < line ? line : size);
        if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
        if (alignment == huge) madvise(data_, size, MADV_HUGEPAGE);
#endif
    }
    ~Memory() { std::free(data_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void* data() const { return data_; }

  private:
    void* data_;
};

}  // namespace pyxlbert
