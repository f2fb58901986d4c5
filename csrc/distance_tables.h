// Products of the embeddings of distances with the layers of a stack, kept from call to call.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/relative_attention.h"
#include "memory.h"

namespace pyxlbert {

// The embeddings that the longest sequences so far met, and of each layer their product.  Shorter sequences meet some
// of these rows, one after the other, and a row of a product has the same bits in any company.
class DistanceTables {
  public:
    // Whether a call's are kept: one table for all sequences, of up to a thousand tokens.  Longer ones would take much
    // memory, and save a small part of what their attention takes.
    static bool worth(const RelativeCall& call) {
        return call.tables == 1 && call.table_rows > 0 && call.table_rows <= 2048;
    }

    // embeddings: [R, E] in dtype, rows of so many bytes.
    DistanceTables(const RelativeCall& call, DType dtype, const void* embeddings, std::int64_t row_bytes)
        : offset_(call.offset),
          rows_(call.table_rows),
          row_bytes_(row_bytes),
          dtype_(dtype),
          embeddings_(static_cast<std::size_t>(rows_ * row_bytes)) {
        std::memcpy(embeddings_.data(), embeddings, static_cast<std::size_t>(rows_ * row_bytes));
    }

    // Room for the table of the next layer.
    void* add(std::int64_t row_bytes) {
        tables_.push_back({std::make_unique<Memory>(static_cast<std::size_t>(rows_ * row_bytes)), row_bytes});
        return tables_.back().data->data();
    }

    bool shorter(const RelativeCall& call) const { return rows_ < call.table_rows; }

    bool holds(const RelativeCall& call, DType dtype, const void* embeddings) const {
        const std::int64_t skipped = offset_ - call.offset;
        if (call.tables != 1 || dtype != dtype_ || skipped < 0 || skipped + call.table_rows > rows_) return false;
        const char* kept = static_cast<const char*>(embeddings_.data()) + skipped * row_bytes_;
        return std::memcmp(kept, embeddings, static_cast<std::size_t>(call.table_rows * row_bytes_)) == 0;
    }

    // Where the products of a call that it holds begin, for layers first .. first + count - 1.
    std::vector<const void*> of(const RelativeCall& call, std::int64_t first, std::int64_t count) const {
        std::vector<const void*> found;
        for (std::int64_t l = first; l < first + count; ++l) {
            const Table& table = tables_[static_cast<std::size_t>(l)];
            found.push_back(static_cast<const char*>(table.data->data()) + (offset_ - call.offset) * table.row_bytes);
        }
        return found;
    }

  private:
    struct Table {
        std::unique_ptr<Memory> data;
        std::int64_t row_bytes;
    };

    std::int64_t offset_, rows_, row_bytes_;
    DType dtype_;
    Memory embeddings_;
    std::vector<Table> tables_;
};

}  // namespace pyxlbert
