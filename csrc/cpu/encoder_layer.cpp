// Encoder layers in one call: products with packed weights, attention, and LayerNorm over rows that stay in the caches.
//
// The residual stream is float32.  Beside it lie the rows that the products read, in the element in which the level
// multiplies.  A thread takes a panel of rows through everything between two attentions: the projection back,
// LayerNorm, the feed-forward network, LayerNorm, and query, key and value of the next layer.  With few rows the
// columns of each product are divided instead.  All intermediates lie in one workspace, so after the first call no page
// is new.
#include "encoder_layer.h"

#include "epilogue.h"
#include "quantised.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// Cuts one allocation into arrays that begin at cache lines.
struct Arena {
    char* data;
    std::int64_t used;

    template <class T>
    PYXLBERT_INLINE T* take(std::int64_t count) {
        T* found = reinterpret_cast<T*>(data + used);
        used += round_up(count * static_cast<std::int64_t>(sizeof(T)), 64);
        return found;
    }
};

template <class T>
void multiply_distances(const DistanceTable& a) {
    using U = typename Packed<T>::Unit;
    using E = typename Packed<T>::Element;
    const PackedLinear& linear = a.layer->position;
    const std::int64_t width = linear.weight.columns;
    *a.row_bytes = width * static_cast<std::int64_t>(sizeof(E));
    if (a.table == nullptr) return;
    const int threads = product_team(a.threads, a.rows * a.hidden * width);
    const std::int64_t step = round_to((a.rows + threads - 1) / threads, STRIP);
    const std::int64_t stride = round_to(a.hidden, sizeof(E) == 2 ? 2 * W : W);
    const std::int64_t scratch_floats = ProductScratch::floats(step, a.hidden);
    E* rows = nullptr;
    float* scratch = nullptr;
    const auto take_memory = [&](Arena arena) {
        rows = arena.take<E>(a.rows * stride);
        scratch = arena.take<float>(threads * scratch_floats);
        return arena.used;
    };
    const std::int64_t size = take_memory({nullptr, 0});
    take_memory({static_cast<char*>(workspace(Slot::shared, static_cast<std::size_t>(size))), 0});
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (std::int64_t r = 0; r < a.rows; ++r)
            convert_row(static_cast<const T*>(a.embeddings) + r * a.hidden, rows + r * stride, a.hidden, stride);
#pragma omp for schedule(static)
        for (std::int64_t row = 0; row < a.rows; row += step) {
            const ProductScratch mine{scratch + omp_get_thread_num() * scratch_floats, step, a.hidden};
            multiply_rows<U>(
                rows + row * stride, stride, a.rows - row < step ? a.rows - row : step, linear.weight, 0,
                panels_of(linear.weight), mine,
                StoreRows<E>{static_cast<E*>(a.table) + row * width, width, linear.bias, Activation::none});
        }
    }
}

template <class T>
class Encoder {
    using U = typename Packed<T>::Unit;
    using E = typename Packed<T>::Element;
    static constexpr bool COPIED = sizeof(E) == 2;  // products read a copy of the stream and not the stream

    const EncoderLayersFwd& a;
    const std::int64_t width, inner, table_rows;  // H D, F, rows of all tables that are made here
    // Strides between rows, in elements.
    const std::int64_t stream_stride, row_stride, hidden_stride;
    const int threads;
    const Division cut;
    float* stream;
    E *rows, *qkv, *mixed, *hidden, *table;
    float *lse, *scratch, *chunk_sums;
    std::int32_t* offsets;

    static PYXLBERT_INLINE std::int64_t widest(const EncoderLayersFwd& a) {
        std::int64_t most = 0;
        for (int l = 0; l < a.count; ++l)
            if (a.layers[l].up.weight.columns > most) most = a.layers[l].up.weight.columns;
        return most;
    }
    PYXLBERT_INLINE std::int64_t hidden_rows() const { return cut.column_tasks > 1 ? a.rows : threads * cut.row_step; }
    PYXLBERT_INLINE std::int64_t scratch_floats() const { return ProductScratch::floats(cut.row_step, deepest()); }
    // Where the feed-forward network works in chunks its inner columns never come together.
    static PYXLBERT_INLINE const PackedMatrix& deepest_weight(const EncoderLayer& layer) {
        return layer.down.weight.quantised ? layer.down.weight : layer.projections[0].weight;
    }
    PYXLBERT_INLINE std::int64_t deepest() const {
        const std::int64_t most = inner > width ? inner : width;
        return most > a.hidden ? most : a.hidden;
    }

    // Of the sums of one thread's feed-forward network in chunks.
    PYXLBERT_INLINE std::int64_t chunk_floats() const {
        const bool in_chunks = COPIED && tiled(a.layers[0].down.weight) && cut.column_tasks == 1;
        return in_chunks ? cut.row_step * round_to(a.hidden, 32) : 0;
    }

    void take_memory(Arena arena) {
        stream = arena.take<float>(a.rows * stream_stride);
        rows = COPIED ? arena.take<E>(a.rows * row_stride) : reinterpret_cast<E*>(stream);
        qkv = arena.take<E>(a.rows * 3 * width);
        mixed = arena.take<E>(a.rows * width);
        hidden = arena.take<E>(hidden_rows() * hidden_stride);
        table = arena.take<E>(table_rows * width);
        lse = arena.take<float>(a.rows * a.attention.heads);
        scratch = arena.take<float>(threads * scratch_floats());
        chunk_sums = arena.take<float>(threads * chunk_floats());
        offsets = arena.take<std::int32_t>(a.attention.batch + 1);
        size = arena.used;
    }

    std::int64_t size;

    PYXLBERT_INLINE ProductScratch my_scratch() const {
        return {scratch + omp_get_thread_num() * scratch_floats(), cut.row_step, deepest()};
    }

    // Products of `count` rows from `row` on with panels first .. last - 1 of a layer's weights.
    void project(const EncoderLayer& layer, int which, std::int64_t row, std::int64_t count, std::int64_t first,
                 std::int64_t last) const {
        const PackedLinear& projection = layer.projections[which];
        const std::int64_t column = which == 0 ? 0 : layer.projections[0].weight.columns;
        multiply_rows<U>(rows + row * row_stride, row_stride, count, projection.weight, first, last, my_scratch(),
                         StoreRows<E>{qkv + row * 3 * width + column, 3 * width, projection.bias, Activation::none});
    }
    void project(const EncoderLayer& layer, std::int64_t row, std::int64_t count) const {
        for (int i = 0; i < layer.projection_count; ++i)
            project(layer, i, row, count, 0, panels_of(layer.projections[i].weight));
    }
    void project_back(const EncoderLayer& layer, std::int64_t row, std::int64_t count, std::int64_t first,
                      std::int64_t last) const {
        multiply_rows<U>(mixed + row * width, width, count, layer.out.weight, first, last, my_scratch(),
                         AddRows{stream + row * stream_stride, stream_stride, layer.out.bias});
    }
    void up(const EncoderLayer& layer, E* wide, std::int64_t row, std::int64_t count, std::int64_t first,
            std::int64_t last) const {
        multiply_rows<U>(rows + row * row_stride, row_stride, count, layer.up.weight, first, last, my_scratch(),
                         StoreRows<E>{wide, hidden_stride, layer.up.bias, layer.activation});
    }
    void down(const EncoderLayer& layer, const E* wide, std::int64_t row, std::int64_t count, std::int64_t first,
              std::int64_t last) const {
        multiply_rows<U>(wide, hidden_stride, count, layer.down.weight, first, last, my_scratch(),
                         AddRows{stream + row * stream_stride, stream_stride, layer.down.bias});
    }

#if defined(__AMX_BF16__)
    // The feed-forward network of a panel of rows whose inner columns come and go in chunks, one block of K of the
    // second product each: a chunk never leaves the second-level cache.  `wide` receives it in tile order.
    void in_chunks(const EncoderLayer& layer, E* wide, std::int64_t row, std::int64_t count) const {
        const ProductScratch mine = my_scratch();
        const E* x = rows + row * row_stride;
        float* sums = chunk_sums + omp_get_thread_num() * chunk_floats();
        const TileShape shape(layer.down.weight);
        arrange(x, row_stride, count, layer.up.weight, mine);
        for (std::int64_t k = 0; k < shape.steps; k += BLOCK_STEPS) {
            // A panel of 32 columns of the first product is a step of K of the second.
            const std::int64_t steps = shape.block_steps(k);
            multiply_arranged<U>(x, row_stride, count, layer.up.weight, k, k + steps, mine,
                                 StoreTiles{wide, steps, k * TILE_PANEL, layer.up.bias, layer.activation});
            tile_add_block(reinterpret_cast<const float*>(wide), count, layer.down.weight, k, sums, k > 0);
        }
        const AddRows epilogue{stream + row * stream_stride, stream_stride, layer.down.bias};
        epilogue.with_row([&](auto finish) PYXLBERT_LAMBDA { tile_over_sums(sums, count, layer.down.weight, finish); });
    }
#endif
    void feed_forward(const EncoderLayer& layer, E* wide, std::int64_t row, std::int64_t count) const {
#if defined(__AMX_BF16__)
        // Integers need the whole row first: its range.
        if constexpr (COPIED)
            if (!layer.down.weight.quantised) return in_chunks(layer, wide, row, count);
#endif
        up(layer, wide, row, count, 0, panels_of(layer.up.weight));
        down(layer, wide, row, count, 0, panels_of(layer.down.weight));
    }

    // LayerNorm of the stream in place, and the rows that the next product reads.
    void normalise(const NormParameters& norm, std::int64_t row, std::int64_t count) const {
        for (std::int64_t r = row; r < row + count; ++r) {
            float* x = stream + r * stream_stride;
            Vec sum = zero();
            for_vectors(a.hidden, [&](std::int64_t j, int n) PYXLBERT_LAMBDA { sum += load_some(x + j, n); });
            const Statistics found = statistics(x, a.hidden, sum, norm.eps);
            normalised(x, a.hidden, found.mean, found.rstd, norm.weight, norm.bias,
                       [&](std::int64_t j, int n, Vec y) PYXLBERT_LAMBDA {
                           store_some(x + j, y, n);
                           if constexpr (COPIED) store_some(rows + r * row_stride + j, y, n);
                       });
        }
    }

    // The whole of a layer after its attention, for one panel of rows, and the projections of the next.
    void finish(int l, std::int64_t row, std::int64_t count, E* wide) const {
        const EncoderLayer& layer = a.layers[l];
        project_back(layer, row, count, 0, panels_of(layer.out.weight));
        normalise(layer.attention_norm, row, count);
        feed_forward(layer, wide, row, count);
        normalise(layer.norm, row, count);
        if (l + 1 < a.count) project(a.layers[l + 1], row, count);
    }

    // step(row, count) for the panels of rows.
    template <class F>
    void over_rows(F step) const {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (std::int64_t task = 0; task < cut.row_tasks; ++task) {
            const std::int64_t row = task * cut.row_step;
            step(row, a.rows - row < cut.row_step ? a.rows - row : cut.row_step);
        }
    }
    // For a team that is at work: step(first, last) for as many runs of panels of a weight as there are threads.
    template <class F>
    void over_columns(const PackedMatrix& weight, F step) const {
        const std::int64_t panels = panels_of(weight);
#pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part)
            step(block_start(panels, threads, part), block_start(panels, threads, part + 1));
    }
    void normalise_all(const NormParameters& norm) const {
        const int blocks = team(threads, a.rows * a.hidden);
#pragma omp for schedule(static)
        for (int b = 0; b < blocks; ++b) {
            const std::int64_t row = block_start(a.rows, blocks, b);
            normalise(norm, row, block_start(a.rows, blocks, b + 1) - row);
        }
    }

    // One team for all of it: between two steps there is a barrier, and no other team is started.
    void finish_by_columns(int l) const {
        const EncoderLayer& layer = a.layers[l];
        using Panel = std::int64_t;
#pragma omp parallel num_threads(threads)
        {
            over_columns(layer.out.weight,
                         [&](Panel first, Panel last) { project_back(layer, 0, a.rows, first, last); });
            normalise_all(layer.attention_norm);
            over_columns(layer.up.weight, [&](Panel first, Panel last) { up(layer, hidden, 0, a.rows, first, last); });
            over_columns(layer.down.weight,
                         [&](Panel first, Panel last) { down(layer, hidden, 0, a.rows, first, last); });
            normalise_all(layer.norm);
            if (l + 1 < a.count) project_by_columns(l + 1);
        }
    }
    void project_by_columns(int l) const {
        const EncoderLayer& layer = a.layers[l];
        for (int i = 0; i < layer.projection_count; ++i)
            over_columns(layer.projections[i].weight,
                         [&](std::int64_t first, std::int64_t last) { project(layer, i, 0, a.rows, first, last); });
    }

    // A layer's product of the positions.
    const void* table_of(int l) const {
        if (a.tables != nullptr) return a.tables[l];
        std::int64_t row_bytes;
        multiply_distances<T>({&a.layers[l], a.positions, table_rows, a.hidden, a.dtype, threads, table, &row_bytes});
        return table;
    }

    void attend(int l) const {
        const EncoderLayer& layer = a.layers[l];
        AttentionCall in = a.attention;
        in.dtype = COPIED ? DType::bfloat16 : DType::float32;
        if (in.cu_seqlens == nullptr && offsets[0] == 0) {
            in.cu_seqlens = offsets;
            in.total = a.rows;
        }
        const std::int64_t stride = 3 * width, batch = in.queries * stride;
        AttentionTensor* const tensors[] = {&in.query, &in.key, &in.value};
        for (int i = 0; i < 3; ++i) *tensors[i] = {qkv + i * width, batch, stride, in.head_size};
        if (a.positions == nullptr) {
            attention_fwd({in, mixed, lse});
            return;
        }
        RelativeAttentionFwd relative{a.relative, {a.relative_stream, {}}};
        relative.in.in = in;
        relative.in.table = {table_of(l), a.relative.table_rows * width, width, in.head_size};
        relative.in.content_bias = layer.content_bias;
        relative.in.position_bias = layer.position_bias;
        if (relative.in.key_segments != nullptr) {
            relative.in.segment_bias = layer.segment_bias;
            relative.in.segment_embedding = layer.segment_embedding;
        }
        relative.streams[0].query = in.query;
        relative.streams[0].out = mixed;
        relative.streams[0].lse = lse;
        relative_attention_fwd(relative);
    }

    // Whether sequences of equal length can be described as packed rows, whose bits do not depend on the batch.
    PYXLBERT_INLINE bool plain() const {
        const AttentionCall& in = a.attention;
        return in.cu_seqlens == nullptr && in.key_lengths == nullptr && in.mask.data == nullptr &&
               in.bias.data == nullptr;
    }

    void read() const {
        const std::int64_t n = a.hidden;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (std::int64_t r = 0; r < a.rows; ++r) {
                with_type(a.stream_dtype, [&](auto type) {
                    const auto* from = static_cast<const decltype(type)*>(a.residual) + r * n;
                    convert_row(from, stream + r * stream_stride, n, stream_stride);
                });
                if constexpr (COPIED)
                    convert_row(static_cast<const T*>(a.x) + r * n, rows + r * row_stride, n, row_stride);
            }
        }
        offsets[0] = plain() ? 0 : -1;
        for (std::int64_t b = 1; b <= a.attention.batch; ++b)
            offsets[b] = static_cast<std::int32_t>(b * a.attention.queries);
    }
    void write() const {
        const std::int64_t n = a.hidden;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (std::int64_t r = 0; r < a.rows; ++r) {
            const float* x = stream + r * stream_stride;
            narrow_row(x, static_cast<T*>(a.y) + r * n, n);
            if (a.y_stream == nullptr) continue;
            with_type(a.stream_dtype,
                      [&](auto type) { narrow_row(x, static_cast<decltype(type)*>(a.y_stream) + r * n, n); });
        }
    }

  public:
    explicit Encoder(const EncoderLayersFwd& given)
        : a(given),
          width(given.attention.heads * given.attention.head_size),
          inner(widest(given)),
          table_rows(given.positions == nullptr || given.tables != nullptr
                         ? 0
                         : given.relative.tables * given.relative.table_rows),
          stream_stride(round_to(given.hidden, W)),
          row_stride(COPIED ? round_to(given.hidden, 2 * W) : stream_stride),
          hidden_stride(round_to(inner, 2 * W)),
          threads(product_team(given.attention.threads, given.rows * given.hidden * inner)),
          cut(divide(given.rows, threads, deepest_weight(given.layers[0]))) {
        take_memory({nullptr, 0});
        take_memory({static_cast<char*>(workspace(Slot::encoder, static_cast<std::size_t>(size))), 0});
    }

    void run() const {
        read();
        const bool by_columns = cut.column_tasks > 1;
        if (by_columns) {
#pragma omp parallel num_threads(threads)
            project_by_columns(0);
        } else {
            over_rows([&](std::int64_t row, std::int64_t count) { project(a.layers[0], row, count); });
        }
        for (int l = 0; l < a.count; ++l) {
            attend(l);
            if (by_columns)
                finish_by_columns(l);
            else
                over_rows([&](std::int64_t row, std::int64_t count) {
                    finish(l, row, count, hidden + omp_get_thread_num() * cut.row_step * hidden_stride);
                });
        }
        write();
    }
};

// Whole sequences of at most so many rows, or one that is longer, go through all layers before the next: the workspace
// then does not grow with the batch, and the weights, read again for each of them, still take a hundredth of the time.
constexpr std::int64_t SLICE_ROWS = 4096;

PYXLBERT_INLINE std::int64_t bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

template <class T>
PYXLBERT_INLINE void advance(T*& p, std::int64_t bytes) {
    if (p != nullptr)
        p = reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(bytes));
}

// The call for sequences first .. last - 1; of packed rows `offsets` receives where they start.
EncoderLayersFwd slice_of(const EncoderLayersFwd& whole, std::int64_t first, std::int64_t last, std::int32_t* offsets) {
    EncoderLayersFwd a = whole;
    AttentionCall& in = a.attention;
    std::int64_t row = first * in.queries, longest = in.queries;
    a.rows = (last - first) * in.queries;
    if (in.cu_seqlens != nullptr) {
        row = in.cu_seqlens[first];
        a.rows = in.cu_seqlens[last] - row;
        longest = 0;
        for (std::int64_t b = first; b <= last; ++b) {
            offsets[b - first] = static_cast<std::int32_t>(whole.attention.cu_seqlens[b] - row);
            if (b > first && offsets[b - first] - offsets[b - first - 1] > longest)
                longest = offsets[b - first] - offsets[b - first - 1];
        }
        in.cu_seqlens = offsets;
        in.total = a.rows;
        in.queries = in.keys = longest;
        a.relative_stream.count = longest;
    }
    in.batch = last - first;
    advance(a.x, row * a.hidden * bytes_of(a.dtype));
    advance(a.y, row * a.hidden * bytes_of(a.dtype));
    advance(a.residual, row * a.hidden * bytes_of(a.stream_dtype));
    advance(a.y_stream, row * a.hidden * bytes_of(a.stream_dtype));
    advance(in.key_lengths, first * 4);
    advance(in.mask.data, first * in.mask.batch);
    advance(in.bias.data, first * in.bias.batch * bytes_of(in.bias_dtype));
    advance(a.relative.key_rank, row * 4);
    advance(a.relative.key_segments, row * 4);
    advance(a.relative_stream.rank, row * 4);
    advance(a.relative_stream.segment, row * 4);
    return a;
}

void run(const EncoderLayersFwd& a) {
    with_type(a.dtype, [&](auto type) { Encoder<decltype(type)>(a).run(); });
}

}  // namespace

void distance_table(const DistanceTable& a) {
    with_type(a.dtype, [&](auto type) { multiply_distances<decltype(type)>(a); });
}

void encoder_layers_fwd(const EncoderLayersFwd& a) {
    const AttentionCall& in = a.attention;
    // Sequences with tables of their own are counted from the first.
    if (a.rows <= SLICE_ROWS || (a.positions != nullptr && a.relative.tables > 1)) return run(a);
    auto* offsets = static_cast<std::int32_t*>(
        workspace(Slot::slices, static_cast<std::size_t>(in.batch + 1) * sizeof(std::int32_t)));
    const auto start = [&](std::int64_t b) PYXLBERT_LAMBDA {
        return in.cu_seqlens != nullptr ? std::int64_t{in.cu_seqlens[b]} : b * in.queries;
    };
    for (std::int64_t first = 0; first < in.batch;) {
        std::int64_t last = first + 1;
        while (last < in.batch && start(last + 1) - start(first) <= SLICE_ROWS) ++last;
        if (start(last) > start(first)) run(slice_of(a, first, last, offsets));
        first = last;
    }
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
