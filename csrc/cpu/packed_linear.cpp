// linear and linear_gelu with a packed weight: the product of gemm.h for rows of any dtype.
#include "epilogue.h"
#include "quantised.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

template <class T>
void forward(const PackedLinearFwd& a) {
    using U = typename Packed<T>::Unit;
    using E = typename Packed<T>::Element;
    const PackedMatrix& w = a.layer->weight;
    const int threads = product_team(a.threads, a.rows * w.columns * w.inner);
    const Division cut = divide(a.rows, threads, w);
    const std::int64_t panels = panels_of(w), tasks = cut.row_tasks * cut.column_tasks;
    // Rows that are read in whole units as they lie need no copy.
    const bool in_units = w.inner % U::PAIR == 0 && a.x_stride % U::PAIR == 0 &&
                          reinterpret_cast<std::uintptr_t>(a.x) % sizeof(float) == 0;
    const bool in_place = sizeof(T) == sizeof(E) && (in_units || tiled(w));
    const std::int64_t stride = in_place ? a.x_stride : round_to(w.inner, 2 * W);
    const E* x = static_cast<const E*>(a.x);
    E* copy = nullptr;
    if (!in_place) x = copy = static_cast<E*>(workspace(Slot::shared, a.rows * stride * sizeof(E)));
    const TeamScratch scratch = team_scratch(threads, ProductScratch::floats(cut.row_step, w.inner));

#pragma omp parallel num_threads(threads)
    {
        if (copy != nullptr) {
#pragma omp for schedule(static)
            for (std::int64_t i = 0; i < a.rows; ++i)
                convert_row(static_cast<const T*>(a.x) + i * a.x_stride, copy + i * stride, w.inner, stride);
        }
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::int64_t row = task / cut.column_tasks * cut.row_step;
            const int part = static_cast<int>(task % cut.column_tasks), parts = static_cast<int>(cut.column_tasks);
            const std::int64_t rows = a.rows - row < cut.row_step ? a.rows - row : cut.row_step;
            multiply_rows<U>(
                x + row * stride, stride, rows, w, block_start(panels, parts, part),
                block_start(panels, parts, part + 1), ProductScratch(scratch.mine(), cut.row_step, w.inner),
                StoreRows<T>{static_cast<T*>(a.y) + row * w.columns, w.columns, a.layer->bias, a.activation});
        }
    }
}

}  // namespace

void packed_linear_fwd(const PackedLinearFwd& arguments) {
    with_type(arguments.dtype, [&](auto type) { forward<decltype(type)>(arguments); });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
