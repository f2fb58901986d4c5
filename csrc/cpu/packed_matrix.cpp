// A weight into panels: see gemm.h and gemm_amx.h.
#include "packed_matrix.h"

#include "gemm.h"
#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// One column: units of row `row` of a part, unit u to at(u).
template <class T, class Place>
PYXLBERT_INLINE void pack_column(const WeightRows& part, std::int64_t row, std::int64_t inner, Place at) {
    using U = typename Packed<T>::Unit;
    const T* source = static_cast<const T*>(part.data) + row * part.row_stride;
    if constexpr (U::PAIR == 2) {
        for (std::int64_t k = 0; k < inner; k += 2) {
            const std::uint32_t low = source[k * part.inner_stride].bits;
            const std::uint32_t high = k + 1 < inner ? source[(k + 1) * part.inner_stride].bits : 0;
            const std::uint32_t pair = low | high << 16;
            __builtin_memcpy(at(k / 2), &pair, sizeof pair);
        }
    } else if constexpr (sizeof(T) == 4) {
        for (std::int64_t k = 0; k < inner; ++k) *at(k) = source[k * part.inner_stride];
    } else {
        for (std::int64_t k = 0; k < inner; ++k) {
            float one[W];
            store(one, load(source + k * part.inner_stride, 1));
            *at(k) = one[0];
        }
    }
}

// The same of integers; *sum becomes that of the column they stand for.
template <class Place>
PYXLBERT_INLINE void pack_integers(const WeightRows& part, std::int64_t row, std::int64_t inner, Place at, float scale,
                                   float* sum) {
    using U = IntegerUnit;
    const auto* source = static_cast<const std::int8_t*>(part.data) + row * part.row_stride;
    std::int64_t total = 0;
    for (std::int64_t k = 0; k < round_to(inner, U::PAIR); ++k) {
        const auto w = static_cast<U::Weight>(k < inner ? source[k * part.inner_stride] : 0);
        total += w;
        auto* unit = reinterpret_cast<unsigned char*>(at(k / U::PAIR));
        __builtin_memcpy(unit + k % U::PAIR * static_cast<int>(sizeof w), &w, sizeof w);
    }
    *sum = scale * static_cast<float>(total);
}

// at(column, unit) is where a unit of a column lies, in floats.
template <class T, class Place>
PYXLBERT_INLINE void pack_columns(const PackMatrix& a, Place at) {
    const PackedMatrix& w = *a.matrix;
    float* target = static_cast<float*>(w.data);
    // Columns past the last one, and of tiles K past its end.
    __builtin_memset(target, 0, static_cast<std::size_t>(w.bytes));
    std::int64_t column = 0;
    for (int p = 0; p < a.count; ++p)
        for (std::int64_t row = 0; row < a.parts[p].rows; ++row, ++column) {
            const auto place = [&](std::int64_t unit) PYXLBERT_LAMBDA { return target + at(column, unit); };
            if (w.quantised)
                pack_integers(a.parts[p], row, w.inner, place, w.scales[column], w.sums + column);
            else
                pack_column<T>(a.parts[p], row, w.inner, place);
        }
}

template <class T>
void pack(const PackMatrix& a) {
    PackedMatrix& w = *a.matrix;
#if defined(__AMX_BF16__)
    if (tiled(w)) {
        const TileShape shape(w);
        w.bytes = shape.floats() * static_cast<std::int64_t>(sizeof(float));
        if (w.data == nullptr) return;
        pack_columns<T>(a,
                        [=](std::int64_t column, std::int64_t unit) PYXLBERT_LAMBDA { return shape.at(column, unit); });
        return;
    }
#endif
    using U = typename Packed<T>::Unit;
    const std::int64_t units = w.quantised ? units_of<IntegerUnit>(w.inner) : units_of<U>(w.inner);
    w.bytes = panels_of(w) * units * PANEL * static_cast<std::int64_t>(sizeof(float));
    if (w.data == nullptr) return;
    pack_columns<T>(a, [=](std::int64_t column, std::int64_t unit)
                           PYXLBERT_LAMBDA { return (column / PANEL * units + unit) * PANEL + column % PANEL; });
}

}  // namespace

void pack_matrix(const PackMatrix& arguments) {
    with_type(arguments.matrix->dtype, [&](auto type) { pack<decltype(type)>(arguments); });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
