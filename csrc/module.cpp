// The one Python module: tensors, or addresses, sizes and strides in, nothing out.  Shapes and types have been checked
// before a function of this file is called.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>

#include "cpu/attention.h"
#include "cpu/bias_gelu.h"
#include "cpu/dropout.h"
#include "cpu/dropout_add_layer_norm.h"
#include "cpu/embedding_layer_norm.h"
#include "cpu/layer_norm.h"
#include "cpu/linear.h"
#include "cpu/product.h"
#include "cpu/relative_attention.h"
#include "cpu/softmax_slope.h"
#include "cpu/two_stream_attention.h"
#ifdef PYXLBERT_WITH_CUDA
#include "cuda/bindings.h"
#endif
#include "encoder.h"
#include "fork.h"
#include "records.h"
#include "run.h"
#include "seen.h"
#include "tensors.h"
#include "workspace.h"

namespace py = pybind11;
using pyxlbert::Address;
using pyxlbert::DType;
using pyxlbert::pointer;
using pyxlbert::View;

namespace {

using Strides3 = std::array<std::int64_t, 3>;  // batch, row, head
using Strides4 = std::array<std::int64_t, 4>;  // batch, head, query, key

pyxlbert::AttentionTensor attention_tensor(Address data, const Strides3& s) {
    return {pointer(data), s[0], s[1], s[2]};
}
pyxlbert::ScoreTensor score_tensor(Address data, const Strides4& s) { return {pointer(data), s[0], s[1], s[2], s[3]}; }

pyxlbert::AttentionCall attention_call(Address query, const Strides3& query_strides, Address key,
                                       const Strides3& key_strides, Address value, const Strides3& value_strides,
                                       Address key_lengths, Address cu_seqlens, Address mask,
                                       const Strides4& mask_strides, Address bias, const Strides4& bias_strides,
                                       const std::array<std::int64_t, 5>& sizes, std::int64_t total,
                                       const pyxlbert::ScoreOptions& options, double dropout_p, std::int64_t seed,
                                       int dtype, int bias_dtype, int threads) {
    return {attention_tensor(query, query_strides),
            attention_tensor(key, key_strides),
            attention_tensor(value, value_strides),
            pointer<const std::int32_t>(key_lengths),
            pointer<const std::int32_t>(cu_seqlens),
            score_tensor(mask, mask_strides),
            score_tensor(bias, bias_strides),
            sizes[0],
            sizes[1],
            sizes[2],
            sizes[3],
            sizes[4],
            total,
            options,
            dropout_p,
            seed,
            DType(dtype),
            DType(bias_dtype),
            threads};
}

pyxlbert::AttentionTensor attention_tensor(const View& x) {
    const bool packed = x.dimensions == 3;
    return {x.data, packed ? 0 : x.strides[0], x.strides[packed ? 0 : 1], x.strides[packed ? 1 : 2]};
}
// Broadcast dimensions have a stride of 0.
pyxlbert::ScoreTensor score_tensor(const View& x) {
    if (x.data == nullptr) return {};
    const auto stride = [&](int d) { return x.shape[d] == 1 ? 0 : x.strides[d]; };
    return {x.data, stride(0), stride(1), stride(2), stride(3)};
}

// The same of tensors; `longest` is that of packed sequences.  None if elements of a row are not adjacent.
std::optional<pyxlbert::AttentionCall> attention_call_of(const View& query, const View& key, const View& value,
                                                         const View& key_lengths, const View& cu_seqlens,
                                                         const View& mask, const View& bias, std::int64_t longest,
                                                         const pyxlbert::ScoreOptions& options, double dropout_p,
                                                         std::int64_t seed, int threads) {
    // Of one element, or of none, a stride may be any number.
    for (const View* one : {&query, &key, &value})
        if (one->data != nullptr && one->shape[one->dimensions - 1] > 1 && one->strides[one->dimensions - 1] != 1)
            return std::nullopt;
    const bool packed = cu_seqlens.data != nullptr;
    const std::int64_t* shape = query.shape + query.dimensions - 2;
    return pyxlbert::AttentionCall{attention_tensor(query),
                                   attention_tensor(key),
                                   attention_tensor(value),
                                   static_cast<const std::int32_t*>(key_lengths.data),
                                   static_cast<const std::int32_t*>(cu_seqlens.data),
                                   score_tensor(mask),
                                   score_tensor(bias),
                                   packed ? cu_seqlens.shape[0] - 1 : query.shape[0],
                                   shape[0],
                                   packed ? longest : query.shape[1],
                                   packed ? longest : key.shape[1],
                                   shape[1],
                                   packed ? query.shape[0] : 0,
                                   options,
                                   dropout_p,
                                   seed,
                                   query.dtype,
                                   bias.dtype,
                                   threads};
}

void attention_fwd(const pyxlbert::AttentionCall& inputs, const View& out, const View& lse) {
    const pyxlbert::AttentionFwd arguments{inputs, out.data, static_cast<float*>(lse.data)};
    // 131,072 multiplications take a microsecond or two.
    const std::int64_t products = inputs.batch * inputs.heads * inputs.queries * (inputs.keys + 1) * inputs.head_size;
    PYXLBERT_RUN_WHERE(attention_fwd, arguments, amx, products > (1 << 17));
}

void attention_bwd(const pyxlbert::AttentionCall& inputs, Address dout, const Strides3& dout_strides, Address out,
                   Address lse, Address dquery, Address dkey, Address dvalue, Address dbias,
                   const Strides4& bias_shape) {
    pyxlbert::AttentionBwd arguments{inputs,
                                     attention_tensor(dout, dout_strides),
                                     pointer(out),
                                     pointer<const float>(lse),
                                     pointer(dquery),
                                     pointer(dkey),
                                     pointer(dvalue),
                                     pointer(dbias),
                                     {bias_shape[0], bias_shape[1], bias_shape[2], bias_shape[3]}};
    PYXLBERT_RUN_AMX(attention_bwd, arguments, amx);
}

// tables, rows of a table, offset
using TableSizes = std::array<std::int64_t, 3>;

pyxlbert::RelativeCall relative_call(const pyxlbert::AttentionCall& inputs, Address table,
                                     const Strides3& table_strides, const TableSizes& sizes, Address content_bias,
                                     Address position_bias, Address segment_bias, Address segment_embedding,
                                     Address key_rank, Address key_segments, const pyxlbert::RelativeOptions& options) {
    return {inputs,
            attention_tensor(table, table_strides),
            sizes[0],
            sizes[1],
            sizes[2],
            pointer<const float>(content_bias),
            pointer<const float>(position_bias),
            pointer<const float>(segment_bias),
            pointer<const float>(segment_embedding),
            pointer<const std::int32_t>(key_rank),
            pointer<const std::int32_t>(key_segments),
            options};
}

pyxlbert::Stream stream_of(Address query, const Strides3& strides, std::int64_t count, Address out, Address lse,
                           Address positions, Address order, Address rank, Address segment,
                           const pyxlbert::StreamOptions& options) {
    return {attention_tensor(query, strides),
            count,
            pointer(out),
            pointer<float>(lse),
            options,
            pointer<const std::int32_t>(positions),
            pointer<const std::int32_t>(order),
            pointer<const std::int32_t>(rank),
            pointer<const std::int32_t>(segment)};
}

void relative_attention_fwd(const pyxlbert::RelativeCall& inputs, const pyxlbert::Stream& content,
                            const pyxlbert::Stream& query) {
    pyxlbert::RelativeAttentionFwd arguments{inputs, {content, query}};
    PYXLBERT_RUN_AMX(relative_attention_fwd, arguments, amx);
}

void two_stream_attention_fwd(const pyxlbert::RelativeCall& inputs, const pyxlbert::Stream& content,
                              const pyxlbert::Stream& query) {
    pyxlbert::RelativeAttentionFwd arguments{inputs, {content, query}};
    PYXLBERT_RUN_AMX(two_stream_attention_fwd, arguments, amx);
}

// dparameters, in float: of table, content bias, position bias, segment bias and segment embedding.
pyxlbert::RelativeAttentionBwd relative_gradients(const pyxlbert::RelativeCall& inputs, const pyxlbert::Stream& content,
                                                  const pyxlbert::Stream& query, const std::array<Address, 2>& dout,
                                                  const std::array<Strides3, 2>& dout_strides,
                                                  const std::array<Address, 2>& dquery, Address dkey, Address dvalue,
                                                  const std::array<Address, 5>& dparameters) {
    return {inputs,
            {content, query},
            {attention_tensor(dout[0], dout_strides[0]), attention_tensor(dout[1], dout_strides[1])},
            {pointer(dquery[0]), pointer(dquery[1])},
            pointer(dkey),
            pointer(dvalue),
            pointer<float>(dparameters[0]),
            pointer<float>(dparameters[1]),
            pointer<float>(dparameters[2]),
            pointer<float>(dparameters[3]),
            pointer<float>(dparameters[4])};
}

void relative_attention_bwd(const pyxlbert::RelativeAttentionBwd& arguments) {
    PYXLBERT_RUN_AMX(relative_attention_bwd, arguments, amx);
}
void two_stream_attention_bwd(const pyxlbert::RelativeAttentionBwd& arguments) {
    PYXLBERT_RUN_AMX(two_stream_attention_bwd, arguments, amx);
}

void layer_norm_fwd(const View& x, const View& weight, const View& bias, const View& y, const View& mean,
                    const View& rstd, float eps, int threads) {
    const pyxlbert::LayerNormFwd arguments{x.data,
                                           weight.data,
                                           bias.data,
                                           y.data,
                                           static_cast<float*>(mean.data),
                                           static_cast<float*>(rstd.data),
                                           y.elements() / y.columns(),
                                           y.columns(),
                                           x.row_stride(),
                                           eps,
                                           x.dtype,
                                           weight.dtype,
                                           bias.dtype,
                                           threads};
    PYXLBERT_RUN_ROWS(layer_norm_fwd, arguments, y.elements());
}

void layer_norm_bwd(Address dy, Address x, Address weight, Address mean, Address rstd, Address dx, Address dweight,
                    Address dbias, std::int64_t rows, std::int64_t columns, std::int64_t dy_stride,
                    std::int64_t x_stride, int dtype, int weight_dtype, int bias_dtype, int threads) {
    pyxlbert::LayerNormBwd arguments{pointer(dy),
                                     pointer(x),
                                     pointer(weight),
                                     pointer<const float>(mean),
                                     pointer<const float>(rstd),
                                     pointer(dx),
                                     pointer(dweight),
                                     pointer(dbias),
                                     rows,
                                     columns,
                                     dy_stride,
                                     x_stride,
                                     DType(dtype),
                                     DType(weight_dtype),
                                     DType(bias_dtype),
                                     threads};
    PYXLBERT_RUN(layer_norm_bwd, arguments);
}

void bias_gelu_fwd(const View& x, const View& bias, const View& y, bool tanh, int threads) {
    const pyxlbert::BiasGeluFwd arguments{x.data,      bias.data,      y.data,  y.elements() / y.columns(),
                                          y.columns(), x.row_stride(), x.dtype, bias.dtype,
                                          tanh,        threads};
    PYXLBERT_RUN_ROWS(bias_gelu_fwd, arguments, y.elements());
}

void bias_gelu_bwd(Address dy, Address x, Address bias, Address dx, Address dbias, std::int64_t rows,
                   std::int64_t columns, std::int64_t dy_stride, std::int64_t x_stride, int dtype, int bias_dtype,
                   bool tanh, int threads) {
    pyxlbert::BiasGeluBwd arguments{pointer(dy), pointer(x), pointer(bias), pointer(dx),  pointer(dbias),    rows,
                                    columns,     dy_stride,  x_stride,      DType(dtype), DType(bias_dtype), tanh,
                                    threads};
    PYXLBERT_RUN(bias_gelu_bwd, arguments);
}

void linear_fwd(const View& x, const View& weight, const View& bias, const View& y, bool gelu, bool tanh, int threads) {
    const pyxlbert::LinearFwd arguments{x.data,      weight.data, bias.data,      y.data,  y.elements() / y.columns(),
                                        y.columns(), x.columns(), x.row_stride(), x.dtype, gelu,
                                        tanh,        threads};
    PYXLBERT_RUN(linear_fwd, arguments);
}

void dropout(Address x, Address y, std::int64_t n, std::int64_t seed, std::uint32_t limit, int dtype, int threads) {
    const pyxlbert::DropoutFlat arguments{pointer(x), pointer(y), n, seed, limit, DType(dtype), threads};
    PYXLBERT_RUN_ROWS(dropout, arguments, n);
}

#if defined(__x86_64__)
// strides: of a between rows, of b along K and along N, of c between rows.  sizes: M, N, K.
void product(Address a, bool transposed, Address b, int b_dtype, Address c, int c_dtype, bool add, Address bias,
             const Strides4& strides, const Strides3& sizes, int threads) {
    if (pyxlbert::active_level() != pyxlbert::Level::avx512_bf16)
        throw std::invalid_argument("product: runs at level avx512_bf16 alone");
    const pyxlbert::Product arguments{pointer<const pyxlbert::bf16>(a),
                                      strides[0],
                                      transposed,
                                      pointer(b),
                                      strides[1],
                                      strides[2],
                                      DType(b_dtype),
                                      pointer(c),
                                      strides[3],
                                      DType(c_dtype),
                                      add,
                                      pointer<const float>(bias),
                                      sizes[0],
                                      sizes[1],
                                      sizes[2],
                                      threads};
    const py::gil_scoped_release release;
    pyxlbert::avx512_bf16::product(arguments);
}

void softmax_slope(Address logits, Address labels, Address found, std::int64_t rows, std::int64_t columns, float scale,
                   int threads) {
    if (pyxlbert::active_level() != pyxlbert::Level::avx512_bf16)
        throw std::invalid_argument("softmax_slope: runs at level avx512_bf16 alone");
    const pyxlbert::SoftmaxSlope arguments{pointer<pyxlbert::bf16>(logits),
                                           pointer<const std::int64_t>(labels),
                                           pointer<float>(found),
                                           rows,
                                           columns,
                                           scale,
                                           threads};
    const py::gil_scoped_release release;
    pyxlbert::avx512_bf16::softmax_slope(arguments);
}
#endif

// One table of an embedding: where its rows are, which row each token takes, and the period where none is given.
struct Table {
    Address rows, index;
    std::int64_t period;

    pyxlbert::EmbeddingTable arguments() const { return {pointer(rows), pointer<const std::int64_t>(index), period}; }
};

void embedding_layer_norm_fwd(Address word, Address word_index, Address position, Address position_index,
                              std::int64_t length, Address token_type, Address token_type_index, Address weight,
                              Address bias, Address y, Address y_copy, Address mean, Address rstd, std::int64_t rows,
                              std::int64_t columns, float eps, double dropout_p, std::int64_t seed, int table_dtype,
                              int weight_dtype, int bias_dtype, int out_dtype, int copy_dtype, int threads) {
    pyxlbert::EmbeddingLayerNormFwd arguments{Table{word, word_index, 1}.arguments(),
                                              Table{position, position_index, length}.arguments(),
                                              Table{token_type, token_type_index, 1}.arguments(),
                                              pointer(weight),
                                              pointer(bias),
                                              pointer(y),
                                              pointer(y_copy),
                                              pointer<float>(mean),
                                              pointer<float>(rstd),
                                              rows,
                                              columns,
                                              eps,
                                              dropout_p,
                                              seed,
                                              DType(table_dtype),
                                              DType(weight_dtype),
                                              DType(bias_dtype),
                                              DType(out_dtype),
                                              DType(copy_dtype),
                                              threads};
    PYXLBERT_RUN(embedding_layer_norm_fwd, arguments);
}

void embedding_layer_norm_bwd(Address dy, std::int64_t dy_stride, Address word, Address word_index, Address position,
                              Address position_index, std::int64_t length, Address token_type, Address token_type_index,
                              Address weight, Address mean, Address rstd, Address dx, Address dweight, Address dbias,
                              std::int64_t rows, std::int64_t columns, double dropout_p, std::int64_t seed,
                              int table_dtype, int weight_dtype, int bias_dtype, int dy_dtype, int threads) {
    pyxlbert::EmbeddingLayerNormBwd arguments{pointer(dy),
                                              dy_stride,
                                              Table{word, word_index, 1}.arguments(),
                                              Table{position, position_index, length}.arguments(),
                                              Table{token_type, token_type_index, 1}.arguments(),
                                              pointer(weight),
                                              pointer<const float>(mean),
                                              pointer<const float>(rstd),
                                              pointer<float>(dx),
                                              pointer(dweight),
                                              pointer(dbias),
                                              rows,
                                              columns,
                                              dropout_p,
                                              seed,
                                              DType(table_dtype),
                                              DType(weight_dtype),
                                              DType(bias_dtype),
                                              DType(dy_dtype),
                                              threads};
    PYXLBERT_RUN(embedding_layer_norm_bwd, arguments);
}

void embedding_scatter(Address dx, Address index, Address order, Address dtable, std::int64_t rows,
                       std::int64_t columns, std::int64_t skip, int table_dtype, int threads) {
    pyxlbert::EmbeddingScatter arguments{pointer<const float>(dx),
                                         pointer<const std::int64_t>(index),
                                         pointer<const std::int64_t>(order),
                                         pointer(dtable),
                                         rows,
                                         columns,
                                         skip,
                                         DType(table_dtype),
                                         threads};
    PYXLBERT_RUN(embedding_scatter, arguments);
}

void dropout_add_layer_norm_fwd(const View& x, const View& x_bias, const View& residual, const View& weight,
                                const View& bias, const View& seed, const View& y, const View& y_copy, const View& sum,
                                const View& mean, const View& rstd, float eps, double dropout_p, int threads) {
    const pyxlbert::DropoutAddLayerNormFwd arguments{x.data,
                                                     x_bias.data,
                                                     residual.data,
                                                     weight.data,
                                                     bias.data,
                                                     static_cast<const std::int64_t*>(seed.data),
                                                     y.data,
                                                     y_copy.data,
                                                     sum.data,
                                                     static_cast<float*>(mean.data),
                                                     static_cast<float*>(rstd.data),
                                                     y.elements() / y.columns(),
                                                     y.columns(),
                                                     x.row_stride(),
                                                     residual.row_stride(),
                                                     eps,
                                                     dropout_p,
                                                     x.dtype,
                                                     residual.dtype,
                                                     x_bias.dtype,
                                                     weight.dtype,
                                                     bias.dtype,
                                                     y_copy.dtype,
                                                     threads};
    PYXLBERT_RUN_ROWS(dropout_add_layer_norm_fwd, arguments, y.elements());
}

void dropout_add_layer_norm_bwd(Address dy, Address dy_copy, Address sum, Address weight, Address mean, Address rstd,
                                Address seed, Address dx, Address dresidual, Address dx_bias, Address dweight,
                                Address dbias, std::int64_t rows, std::int64_t columns, std::int64_t dy_stride,
                                std::int64_t dy_copy_stride, double dropout_p, int dtype, int residual_dtype,
                                int x_bias_dtype, int weight_dtype, int bias_dtype, int copy_dtype, int threads) {
    pyxlbert::DropoutAddLayerNormBwd arguments{pointer(dy),
                                               pointer(dy_copy),
                                               pointer(sum),
                                               pointer(weight),
                                               pointer<const float>(mean),
                                               pointer<const float>(rstd),
                                               pointer<const std::int64_t>(seed),
                                               pointer(dx),
                                               pointer(dresidual),
                                               pointer(dx_bias),
                                               pointer(dweight),
                                               pointer(dbias),
                                               rows,
                                               columns,
                                               dy_stride,
                                               dy_copy_stride,
                                               dropout_p,
                                               DType(dtype),
                                               DType(residual_dtype),
                                               DType(x_bias_dtype),
                                               DType(weight_dtype),
                                               DType(bias_dtype),
                                               DType(copy_dtype),
                                               threads};
    PYXLBERT_RUN(dropout_add_layer_norm_bwd, arguments);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of pyxlbert; private: use pyxlbert.ops.";

    m.def("level", [] { return pyxlbert::level_name(pyxlbert::active_level()); });
    m.def("levels", [] {
        std::vector<std::string> names;
        for (pyxlbert::Level level : pyxlbert::supported_levels()) names.emplace_back(pyxlbert::level_name(level));
        return names;
    });
    m.def("set_level", &pyxlbert::set_level);
    m.def("workspace_bytes", &pyxlbert::workspace_bytes);
    m.def("survive_forks", &pyxlbert::survive_forks);
    if (pyxlbert::add_tensor_checks(m.ptr()) < 0) throw py::error_already_set();
    m.def("release_workspace", &pyxlbert::release_workspace);
    m.def("poison_workspaces", &pyxlbert::poison_workspaces);

    py::module_ cpu = m.def_submodule("cpu");
    py::class_<pyxlbert::AttentionCall>(cpu, "AttentionCall").def(py::init(&attention_call));
    cpu.def("attention_call", &attention_call_of);
    cpu.def("attention_fwd", &attention_fwd);
    cpu.def("attention_bwd", &attention_bwd);
    py::class_<pyxlbert::RelativeCall>(cpu, "RelativeCall").def(py::init(&relative_call));
    py::class_<pyxlbert::Stream>(cpu, "Stream").def(py::init<>()).def(py::init(&stream_of));
    cpu.def("relative_attention_fwd", &relative_attention_fwd);
    cpu.def("two_stream_attention_fwd", &two_stream_attention_fwd);
    py::class_<pyxlbert::RelativeAttentionBwd>(cpu, "RelativeAttentionBwd").def(py::init(&relative_gradients));
    cpu.def("relative_attention_bwd", &relative_attention_bwd);
    cpu.def("two_stream_attention_bwd", &two_stream_attention_bwd);
    cpu.def("bias_gelu_fwd", &bias_gelu_fwd);
    cpu.def("bias_gelu_bwd", &bias_gelu_bwd);
    cpu.def("dropout_add_layer_norm_fwd", &dropout_add_layer_norm_fwd);
    cpu.def("dropout_add_layer_norm_bwd", &dropout_add_layer_norm_bwd);
    cpu.def("embedding_layer_norm_fwd", &embedding_layer_norm_fwd);
    cpu.def("embedding_layer_norm_bwd", &embedding_layer_norm_bwd);
    cpu.def("embedding_scatter", &embedding_scatter);
    cpu.def("layer_norm_fwd", &layer_norm_fwd);
    cpu.def("layer_norm_bwd", &layer_norm_bwd);
    cpu.def("dropout", &dropout);
    cpu.def("linear_fwd", &linear_fwd);
#if defined(__x86_64__)
    cpu.def("product", &product);
    cpu.def("softmax_slope", &softmax_slope);
#endif
    pyxlbert::bind_encoder(cpu);
    pyxlbert::bind_seen(cpu);

#ifdef PYXLBERT_WITH_CUDA
    py::module_ cuda = m.def_submodule("cuda");
    pyxlbert::cuda::bind(cuda);
#endif
}
