// A weight into panels: see gemm.h.
#include "packed_matrix.h"

#include "gemm.h"
#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// One column of a panel: units of row `row` of a part, PANEL apart.
template <class T>
PYXLBERT_INLINE void pack_column(const WeightRows& part, std::int64_t row, std::int64_t inner, float* target) {
    using U = typename Packed<T>::Unit;
    const T* source = static_cast<const T*>(part.data) + row * part.row_stride;
    if constexpr (U::PAIR == 2) {
        auto* pairs = reinterpret_cast<std::uint32_t*>(target);
        for (std::int64_t k = 0; k < inner; k += 2) {
            const std::uint32_t low = source[k * part.inner_stride].bits;
            const std::uint32_t high = k + 1 < inner ? source[(k + 1) * part.inner_stride].bits : 0;
            pairs[k / 2 * PANEL] = low | high << 16;
        }
    } else if constexpr (sizeof(T) == 4) {
        for (std::int64_t k = 0; k < inner; ++k) target[k * PANEL] = source[k * part.inner_stride];
    } else {
        for (std::int64_t k = 0; k < inner; ++k) {
            float one[W];
            store(one, load(source + k * part.inner_stride, 1));
            target[k * PANEL] = one[0];
        }
    }
}

// The same in integers.  The scale of a column without a number but zero is zero; one with an infinity or a NaN has a
// NaN.
template <class T>
PYXLBERT_INLINE void quantise_column(const WeightRows& part, std::int64_t row, std::int64_t inner, float* target,
                                     float* scale, float* sum) {
    using U = IntegerUnit;
    const T* source = static_cast<const T*>(part.data) + row * part.row_stride;
    const auto at = [&](std::int64_t k) PYXLBERT_LAMBDA {
        float one[W];
        store(one, load(source + k * part.inner_stride, 1));
        return one[0];
    };
    float most = 0.0f, poison = 0.0f;
    for (std::int64_t k = 0; k < inner; ++k) {
        const float x = at(k), size = x < 0.0f ? -x : x;
        poison += x * 0.0f;
        if (size > most) most = size;
    }
    const bool finite = poison == 0.0f;
    const float inverse = most > 0.0f && finite ? 127.0f / most : 0.0f;
    std::int64_t total = 0;
    auto* bytes = reinterpret_cast<unsigned char*>(target);
    for (std::int64_t k = 0; k < round_to(inner, U::PAIR); ++k) {
        const float x = k < inner && finite ? at(k) * inverse : 0.0f;
        const auto w = static_cast<U::Weight>(x < 0.0f ? static_cast<int>(x - 0.5f) : static_cast<int>(x + 0.5f));
        total += w;
        __builtin_memcpy(bytes + k / U::PAIR * PANEL * 4 + k % U::PAIR * static_cast<int>(sizeof w), &w, sizeof w);
    }
    *scale = most * (1.0f / 127.0f) + poison;
    *sum = *scale * static_cast<float>(total);
}

template <class T>
void pack(const PackMatrix& a) {
    using U = typename Packed<T>::Unit;
    PackedMatrix& w = *a.matrix;
    const std::int64_t units = w.quantised ? units_of<IntegerUnit>(w.inner) : units_of<U>(w.inner);
    const std::int64_t panels = panels_of(w);
    w.bytes = panels * units * PANEL * static_cast<std::int64_t>(sizeof(float));
    if (w.data == nullptr) return;
    float* target = static_cast<float*>(w.data);
    std::int64_t column = 0;
    for (int p = 0; p < a.count; ++p)
        for (std::int64_t row = 0; row < a.parts[p].rows; ++row, ++column) {
            float* to = target + column / PANEL * units * PANEL + column % PANEL;
            if (w.quantised)
                quantise_column<T>(a.parts[p], row, w.inner, to, w.scales + column, w.sums + column);
            else
                pack_column<T>(a.parts[p], row, w.inner, to);
        }
    for (; column < panels * PANEL; ++column)
        for (std::int64_t k = 0; k < units; ++k)
            target[column / PANEL * units * PANEL + k * PANEL + column % PANEL] = 0.0f;
}

}  // namespace

void pack_matrix(const PackMatrix& arguments) {
    with_type(arguments.matrix->dtype, [&](auto type) { pack<decltype(type)>(arguments); });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
