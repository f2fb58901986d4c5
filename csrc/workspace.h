// Scratch memory that outlives a call.  Fresh large allocations cost a page fault every 4 KiB, which on
// these kernels is a tenth of the time, so each thread keeps one growing buffer per slot.
#pragma once
#include <cstddef>

namespace pyxlbert {

enum class Slot : int { row, column, pack, tile, shared, encoder, slices, count };

// At least `bytes` bytes aligned to 64, private to the calling thread and the slot; the contents are
// whatever the last user left.  Valid until the same thread asks for the same slot again.
// Throws std::bad_alloc when memory is out.
void* workspace(Slot slot, std::size_t bytes);

// For tests: from now on every buffer is handed out full of NaN, so that a kernel that reads what it has not written
// gives a wrong answer.
void poison_workspaces(bool on);

// Bytes held by the calling thread, all slots together.
std::size_t workspace_bytes();

// Frees what the calling thread holds.
void release_workspace();

}  // namespace pyxlbert
