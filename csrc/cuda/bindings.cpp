#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <array>

#include "cuda/attention.h"
#include "cuda/bias_gelu.h"
#include "cuda/devices.h"
#include "cuda/dropout_add_layer_norm.h"
#include "cuda/embedding_layer_norm.h"
#include "cuda/layer_norm.h"
#include "cuda/relative_attention.h"
#include "cuda/two_stream_attention.h"
#include "records.h"

namespace py = pybind11;

namespace pyxlbert::cuda {
namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}
Rows rows(Address data, Size stride) { return {pointer(data), stride}; }
Parameter parameter(Address data, int dtype) { return {pointer(data), DType(dtype)}; }
Sum sum(Address data, int dtype) { return {pointer(data), DType(dtype)}; }

void layer_norm_fwd(Address x, Size stride, Address weight, int weight_dtype, Address bias, int bias_dtype, Address y,
                    Address mean, Address rstd, Size count, Size columns, float eps, int dtype, Address stream) {
    const LayerNormFwd a{rows(x, stride),
                         parameter(weight, weight_dtype),
                         parameter(bias, bias_dtype),
                         pointer(y),
                         pointer<float>(mean),
                         pointer<float>(rstd),
                         count,
                         columns,
                         eps,
                         DType(dtype)};
    py::gil_scoped_release release;
    launch_layer_norm_fwd(a, pointer(stream));
}

void layer_norm_bwd(Address dy, Size dy_stride, Address x, Size x_stride, Address weight, int weight_dtype,
                    Address mean, Address rstd, Address dx, Address partial, Address dweight, Address dbias,
                    int bias_dtype, Size count, Size columns, Size parts, Size each, int dtype, Address stream) {
    const LayerNormBwd a{rows(dy, dy_stride),
                         rows(x, x_stride),
                         parameter(weight, weight_dtype),
                         pointer<const float>(mean),
                         pointer<const float>(rstd),
                         pointer(dx),
                         pointer<float>(partial),
                         sum(dweight, weight_dtype),
                         sum(dbias, bias_dtype),
                         count,
                         columns,
                         parts,
                         each,
                         DType(dtype)};
    py::gil_scoped_release release;
    launch_layer_norm_bwd(a, pointer(stream));
}

void dropout_add_layer_norm_fwd(Address x, Size x_stride, Address residual, Size residual_stride, Address x_bias,
                                int x_bias_dtype, Address weight, int weight_dtype, Address bias, int bias_dtype,
                                Address y, Address copy, Address s, Address mean, Address rstd, Address seed,
                                double dropout_p, Size count, Size columns, float eps, int dtype, int residual_dtype,
                                int copy_dtype, Address stream) {
    const DropoutAddLayerNormFwd a{rows(x, x_stride),
                                   rows(residual, residual_stride),
                                   parameter(x_bias, x_bias_dtype),
                                   parameter(weight, weight_dtype),
                                   parameter(bias, bias_dtype),
                                   pointer(y),
                                   pointer(copy),
                                   pointer(s),
                                   pointer<float>(mean),
                                   pointer<float>(rstd),
                                   pointer<const std::int64_t>(seed),
                                   dropout_p,
                                   count,
                                   columns,
                                   eps,
                                   DType(dtype),
                                   DType(residual_dtype),
                                   DType(copy_dtype)};
    py::gil_scoped_release release;
    launch_dropout_add_layer_norm_fwd(a, pointer(stream));
}

void dropout_add_layer_norm_bwd(Address dy, Size dy_stride, Address dy_copy, Size dy_copy_stride, Address s,
                                Address weight, int weight_dtype, Address mean, Address rstd, Address dx,
                                Address dresidual, Address partial, Address partial_bias, Address dweight,
                                Address dbias, int bias_dtype, Address dx_bias, int x_bias_dtype, Address seed,
                                double dropout_p, Size count, Size columns, Size parts, Size each, int dtype,
                                int residual_dtype, int copy_dtype, Address stream) {
    const DropoutAddLayerNormBwd a{rows(dy, dy_stride),
                                   rows(dy_copy, dy_copy_stride),
                                   pointer(s),
                                   parameter(weight, weight_dtype),
                                   pointer<const float>(mean),
                                   pointer<const float>(rstd),
                                   pointer(dx),
                                   pointer(dresidual),
                                   pointer<float>(partial),
                                   pointer<float>(partial_bias),
                                   sum(dweight, weight_dtype),
                                   sum(dbias, bias_dtype),
                                   sum(dx_bias, x_bias_dtype),
                                   pointer<const std::int64_t>(seed),
                                   dropout_p,
                                   count,
                                   columns,
                                   parts,
                                   each,
                                   DType(dtype),
                                   DType(residual_dtype),
                                   DType(copy_dtype)};
    py::gil_scoped_release release;
    launch_dropout_add_layer_norm_bwd(a, pointer(stream));
}

void bias_gelu_fwd(Address x, Size stride, Address bias, int bias_dtype, Address y, Size count, Size columns, bool tanh,
                   int dtype, Address stream) {
    const BiasGeluFwd a{rows(x, stride), parameter(bias, bias_dtype), pointer(y), count, columns, tanh, DType(dtype)};
    py::gil_scoped_release release;
    launch_bias_gelu_fwd(a, pointer(stream));
}

void bias_gelu_bwd(Address dy, Size dy_stride, Address x, Size x_stride, Address bias, int bias_dtype, Address dx,
                   Address partial, Address dbias, Size count, Size columns, Size parts, Size each, bool tanh,
                   int dtype, Address stream) {
    const BiasGeluBwd a{rows(dy, dy_stride),
                        rows(x, x_stride),
                        parameter(bias, bias_dtype),
                        pointer(dx),
                        pointer<float>(partial),
                        sum(dbias, bias_dtype),
                        count,
                        columns,
                        parts,
                        each,
                        tanh,
                        DType(dtype)};
    py::gil_scoped_release release;
    launch_bias_gelu_bwd(a, pointer(stream));
}

Table table(Address data, Size size, Address index, bool wide) { return {pointer(data), size, pointer(index), wide}; }

EmbeddingTables embedding_tables(Address word, Size words, Address word_index, bool word_wide, Address token_type,
                                 Size types, Address type_index, bool type_wide, Address position, Size positions,
                                 Address position_index, bool position_wide, Size length, Size tokens, Size columns,
                                 int dtype) {
    return {table(word, words, word_index, word_wide),
            table(token_type, types, type_index, type_wide),
            table(position, positions, position_index, position_wide),
            length,
            tokens,
            columns,
            DType(dtype)};
}

void embedding_layer_norm_fwd(const EmbeddingTables& tables, Address weight, int weight_dtype, Address bias,
                              int bias_dtype, Address y, Address copy, Address mean, Address rstd, Address seed,
                              double dropout_p, float eps, int out_dtype, int copy_dtype, Address stream) {
    const EmbeddingLayerNormFwd a{tables,
                                  parameter(weight, weight_dtype),
                                  parameter(bias, bias_dtype),
                                  pointer(y),
                                  pointer(copy),
                                  pointer<float>(mean),
                                  pointer<float>(rstd),
                                  pointer<const std::int64_t>(seed),
                                  dropout_p,
                                  eps,
                                  DType(out_dtype),
                                  DType(copy_dtype)};
    py::gil_scoped_release release;
    launch_embedding_layer_norm_fwd(a, pointer(stream));
}

void embedding_layer_norm_bwd(const EmbeddingTables& tables, Address dy, Size dy_stride, int dy_dtype, Address weight,
                              int weight_dtype, Address mean, Address rstd, Address dx, Address partial,
                              Address dweight, Address dbias, int bias_dtype, Address seed, double dropout_p,
                              Size parts, Size each, Address stream) {
    const EmbeddingLayerNormBwd a{tables,
                                  rows(dy, dy_stride),
                                  parameter(weight, weight_dtype),
                                  pointer<const float>(mean),
                                  pointer<const float>(rstd),
                                  pointer<float>(dx),
                                  pointer<float>(partial),
                                  sum(dweight, weight_dtype),
                                  sum(dbias, bias_dtype),
                                  pointer<const std::int64_t>(seed),
                                  dropout_p,
                                  parts,
                                  each,
                                  DType(dy_dtype)};
    py::gil_scoped_release release;
    launch_embedding_layer_norm_bwd(a, pointer(stream));
}

void scatter(Address dx, Address index, bool wide, Address order, Address dtable, Address shares, Size tokens,
             Size columns, Size size, Size skip, int dtype, Address stream) {
    const Scatter a{pointer<const float>(dx),
                    pointer(index),
                    wide,
                    pointer<const std::int64_t>(order),
                    pointer(dtable),
                    pointer<float>(shares),
                    tokens,
                    columns,
                    size,
                    skip,
                    DType(dtype)};
    py::gil_scoped_release release;
    launch_scatter(a, pointer(stream));
}

using Strides3 = std::array<std::int64_t, 3>;  // batch, row, head
using Strides4 = std::array<std::int64_t, 4>;  // batch, head, query, key

Heads heads(Address data, const Strides3& s) { return {pointer(data), s[0], s[1], s[2]}; }
Scores scores(Address data, const Strides4& s) { return {pointer(data), s[0], s[1], s[2], s[3]}; }

Stream query_stream(Address query, const Strides3& strides, int rows, Address positions, Address numbers, Address rank,
                    Address segments, const StreamOptions& options, Address out, Address lse) {
    Stream s{};
    s.query = heads(query, strides);
    s.rows = rows;
    s.positions = pointer<const std::int32_t>(positions);
    s.numbers = pointer<const std::int32_t>(numbers);
    s.rank = pointer<const std::int32_t>(rank);
    s.segments = pointer<const std::int32_t>(segments);
    s.options = options;
    s.out = pointer(out);
    s.lse = pointer<float>(lse);
    return s;
}

void stream_gradients(Stream& s, Address dout, const Strides3& strides, Address delta, Address lse_correction,
                      Address dquery, Address content, Address position, Address parts) {
    s.dout = heads(dout, strides);
    s.delta = pointer<float>(delta);
    s.lse_correction = pointer<float>(lse_correction);
    s.dquery = pointer(dquery);
    s.content = pointer(content);
    s.position = pointer(position);
    s.parts = pointer<float>(parts);
}

AttentionCall attention_call(const std::vector<Stream>& streams, Address key, const Strides3& key_strides,
                             Address value, const Strides3& value_strides, Address key_lengths, Address cu_seqlens,
                             Address mask, const Strides4& mask_strides, Address bias, const Strides4& bias_strides,
                             int bias_dtype, const std::array<int, 5>& sizes, Size total, const ScoreOptions& options,
                             Address seed, double dropout_p, int dtype) {
    AttentionCall a{};
    a.streams = static_cast<int>(streams.size());
    for (int n = 0; n < a.streams; ++n) a.stream[n] = streams[n];
    a.key = heads(key, key_strides);
    a.value = heads(value, value_strides);
    a.key_lengths = pointer<const std::int32_t>(key_lengths);
    a.cu_seqlens = pointer<const std::int32_t>(cu_seqlens);
    a.mask = scores(mask, mask_strides);
    a.bias = scores(bias, bias_strides);
    a.bias_dtype = DType(bias_dtype);
    a.batch = sizes[0];
    a.heads = sizes[1];
    a.queries = sizes[2];
    a.keys = sizes[3];
    a.head_size = sizes[4];
    a.total = total;
    a.options = options;
    a.dropout = make_dropout(dropout_p, pointer<const std::int64_t>(seed));
    a.dtype = DType(dtype);
    a.tables = 1;
    return a;
}

// table, offset: rows of a table, tables, offset.
void attention_table(AttentionCall& a, Address table, const Strides3& strides, int tables, int rows, int offset,
                     Address content_bias, int content_dtype, Address position_bias, int position_dtype,
                     Address segment_bias, int segment_dtype, Address segment_embedding, int embedding_dtype,
                     Address key_rank, Address key_segments, const RelativeOptions& options) {
    a.table = heads(table, strides);
    a.tables = tables;
    a.table_rows = rows;
    a.offset = offset;
    a.content_bias = parameter(content_bias, content_dtype);
    a.position_bias = parameter(position_bias, position_dtype);
    a.segment_bias = parameter(segment_bias, segment_dtype);
    a.segment_embedding = parameter(segment_embedding, embedding_dtype);
    a.key_rank = pointer<const std::int32_t>(key_rank);
    a.key_segments = pointer<const std::int32_t>(key_segments);
    a.relative = options;
}

// Of attention itself, whose queries have the rank 0: keys of UNSEEN_RANK are not read.
void attention_ranks(AttentionCall& a, Address key_rank) { a.key_rank = pointer<const std::int32_t>(key_rank); }

// Forward with the keys split: room for what the parts find.
void attention_parts(AttentionCall& a, Address partial) { a.partial = pointer<float>(partial); }

void attention_gradients(AttentionCall& a, Address dkey, Address dvalue, Address dtable, Address dbias,
                         const Strides4& dbias_shape) {
    a.dkey = pointer(dkey);
    a.dvalue = pointer(dvalue);
    a.dtable = pointer<float>(dtable);
    a.dbias = pointer(dbias);
    for (int n = 0; n < 4; ++n) a.dbias_shape[n] = dbias_shape[n];
}

template <void (*LAUNCH)(const AttentionCall&, CudaStream)>
void launch_attention(const AttentionCall& a, Address stream) {
    py::gil_scoped_release release;
    LAUNCH(a, pointer(stream));
}

}  // namespace

void bind(py::module_& m) {
    m.attr("built") = py::tuple(py::cast(built()));
    m.def("covers", &covers);
    m.def("probe", &probe);
    m.def("shared_memory", &shared_memory);
    m.attr("MAX_COLUMNS") = MAX_COLUMNS;
    m.attr("CHUNK") = CHUNK;
    m.def("layer_norm_fwd", &layer_norm_fwd);
    m.def("layer_norm_bwd", &layer_norm_bwd);
    m.def("dropout_add_layer_norm_fwd", &dropout_add_layer_norm_fwd);
    m.def("dropout_add_layer_norm_bwd", &dropout_add_layer_norm_bwd);
    m.def("bias_gelu_fwd", &bias_gelu_fwd);
    m.def("bias_gelu_bwd", &bias_gelu_bwd);
    // Types of this module alone: where tests emulate the kernels there is a second one with the same.
    py::class_<EmbeddingTables>(m, "EmbeddingTables", py::module_local()).def(py::init(&embedding_tables));
    m.def("embedding_layer_norm_fwd", &embedding_layer_norm_fwd);
    m.def("embedding_layer_norm_bwd", &embedding_layer_norm_bwd);
    m.def("scatter", &scatter);
    m.attr("MAX_HEAD_SIZE") = MAX_HEAD_SIZE;
    m.attr("FEW_QUERIES") = FEW_QUERIES;
    m.attr("MANY_KEYS") = MANY_KEYS;
    m.attr("KEYS_OF_PART") = KEYS_OF_PART;
    py::class_<Stream>(m, "Stream", py::module_local())
        .def(py::init(&query_stream))
        .def("gradients", &stream_gradients);
    py::class_<AttentionCall>(m, "AttentionCall", py::module_local())
        .def(py::init(&attention_call))
        .def("table", &attention_table)
        .def("ranks", &attention_ranks)
        .def("parts", &attention_parts)
        .def("gradients", &attention_gradients);
    m.def("attention_fwd", &launch_attention<launch_attention_fwd>);
    m.def("attention_bwd", &launch_attention<launch_attention_bwd>);
    m.def("relative_attention_fwd", &launch_attention<launch_relative_attention_fwd>);
    m.def("two_stream_attention_fwd", &launch_attention<launch_two_stream_attention_fwd>);
    m.def("relative_attention_bwd", &launch_attention<launch_relative_attention_bwd>);
    m.def("windows_of_parts", [](int dtype, int head_size, Size positions, std::size_t shared) {
        return windows_of_parts(DType(dtype), head_size, positions, shared);
    });
}

}  // namespace pyxlbert::cuda
