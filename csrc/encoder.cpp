#include "encoder.h"

#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/encoder_layer.h"
#include "distance_tables.h"
#include "memory.h"
#include "run.h"

namespace py = pybind11;

namespace pyxlbert {
namespace {

// A copy of n floats with zeros behind them; of none if the address is 0.
std::unique_ptr<Memory> floats(Address source, std::int64_t n, std::int64_t padded) {
    auto memory = std::make_unique<Memory>(static_cast<std::size_t>(padded) * sizeof(float));
    auto* target = static_cast<float*>(memory->data());
    const std::int64_t given = source == 0 ? 0 : n;
    if (given > 0) std::memcpy(target, pointer(source), static_cast<std::size_t>(given) * sizeof(float));
    std::memset(target + given, 0, static_cast<std::size_t>(padded - given) * sizeof(float));
    return memory;
}

using Part = std::array<std::int64_t, 4>;  // address, rows, row stride, inner stride

// The weights of one or more linear layers of K inputs, one below the other, packed for the active level; where there
// are scales, they are integers.
class OwnedLinear {
  public:
    OwnedLinear(const std::vector<Part>& given, Address bias, std::int64_t inner, int dtype, Address scales)
        : level_(active_level()) {
        std::vector<WeightRows> parts;
        PackedMatrix& w = linear.weight;
        w = {nullptr, 0, inner, DType(dtype), scales != 0, nullptr, nullptr, 0};
        for (const Part& part : given) {
            parts.push_back({pointer<const void>(static_cast<Address>(part[0])), part[1], part[2], part[3]});
            w.columns += part[1];
        }
        const PackMatrix pack{&w, parts.data(), static_cast<int>(parts.size())};
        run(pack);
        weight_ = std::make_unique<Memory>(static_cast<std::size_t>(w.bytes));
        w.data = weight_->data();
        constexpr std::int64_t widest_panel = 64;
        if (w.quantised) {
            scales_ = floats(scales, w.columns, w.columns + widest_panel);
            sums_ = floats(0, 0, w.columns + widest_panel);
            w.scales = static_cast<const float*>(scales_->data());
            w.sums = static_cast<float*>(sums_->data());
        }
        run(pack);
        bias_ = floats(bias, w.columns, w.columns + widest_panel);
        linear.bias = static_cast<const float*>(bias_->data());
    }

    PackedLinear linear{};
    // The level whose order this is; another one cannot read it.
    std::string level() const { return level_name(level_); }
    bool readable() const { return level_ == active_level(); }

  private:
    static void run(const PackMatrix& pack) { PYXLBERT_RUN_PACKED(pack_matrix, pack); }

    Level level_;
    std::unique_ptr<Memory> weight_, bias_, scales_, sums_;
};

void packed_linear_fwd(const OwnedLinear& layer, Address x, Address y, std::int64_t rows, std::int64_t x_stride,
                       int dtype, int activation, int threads) {
    if (!layer.readable()) throw std::invalid_argument("a weight packed for level " + layer.level());
    const PackedLinearFwd arguments{&layer.linear,          pointer(x), pointer(y), rows, x_stride, DType(dtype),
                                    Activation(activation), threads};
    PYXLBERT_RUN_PACKED(packed_linear_fwd, arguments);
}

using Norm = std::tuple<Address, Address, float>;  // weight and bias in float32, eps

// Layers of one width, in order.
class EncoderLayers {
  public:
    explicit EncoderLayers(std::int64_t hidden) : hidden_(hidden) {}

    // terms: of relative attention, the biases and embeddings of RelativeCall in float32 with their sizes.
    // projections: one or two, see EncoderLayer.
    void add(const std::vector<std::shared_ptr<OwnedLinear>>& projections, std::shared_ptr<OwnedLinear> out,
             std::shared_ptr<OwnedLinear> up, std::shared_ptr<OwnedLinear> down, const Norm& attention_norm,
             const Norm& norm, int activation, std::shared_ptr<OwnedLinear> position,
             const std::array<std::pair<Address, std::int64_t>, 4>& terms) {
        EncoderLayer layer{};
        for (const auto& one : projections) {
            layer.projections[layer.projection_count++] = one->linear;
            linears_.push_back(one);
        }
        layer.out = out->linear;
        layer.up = up->linear;
        layer.down = down->linear;
        layer.attention_norm = keep(attention_norm);
        layer.norm = keep(norm);
        layer.activation = Activation(activation);
        if (position != nullptr) layer.position = position->linear;
        const float** const targets[] = {&layer.content_bias, &layer.position_bias, &layer.segment_bias,
                                         &layer.segment_embedding};
        for (std::size_t i = 0; i < terms.size(); ++i)
            if (terms[i].first != 0) *targets[i] = keep(terms[i].first, terms[i].second);
        for (const auto& one : {out, up, down, position})
            if (one != nullptr) linears_.push_back(one);
        layers_.push_back(layer);
    }

    std::int64_t count() const { return static_cast<std::int64_t>(layers_.size()); }
    std::int64_t hidden() const { return hidden_; }
    const EncoderLayer* layers() const { return layers_.data(); }
    bool readable() const {
        for (const auto& one : linears_)
            if (!one->readable()) return false;
        return true;
    }

    // Calls whose distances were multiplied, the others' being at hand.
    std::int64_t multiplied() const { return multiplied_; }

    // The products of a call's embeddings of distances with the layers, made at the first call that is longer than
    // those before; null where the layers make them themselves.  The caller holds the GIL, which is given up for the
    // products alone, and keeps what it receives as long as the layers run.
    std::shared_ptr<const DistanceTables> tables_of(const RelativeCall& relative, DType dtype, const void* positions) {
        const std::int64_t bytes = hidden_ * (dtype == DType::float32 ? 4 : 2);
        std::shared_ptr<const DistanceTables> found = tables_;
        if (found != nullptr && found->holds(relative, dtype, positions)) return found;
        ++multiplied_;
        if (!DistanceTables::worth(relative) || (found != nullptr && !found->shorter(relative))) return nullptr;
        auto made = std::make_shared<DistanceTables>(relative, dtype, positions, bytes);
        for (const EncoderLayer& layer : layers_) {
            // Another thread may have changed the level while the last product was made.
            if (!readable()) return nullptr;
            std::int64_t row_bytes = 0;
            DistanceTable product{&layer,  positions, relative.table_rows, hidden_, dtype, relative.in.threads,
                                  nullptr, &row_bytes};
            PYXLBERT_RUN_LEVELS(distance_table, product, avx2_vnni, amx, false);
            product.table = made->add(row_bytes);
            PYXLBERT_RUN_PACKED(distance_table, product);
        }
        // Another thread may have met longer sequences meanwhile.
        if (tables_ == nullptr || tables_->shorter(relative)) tables_ = made;
        return made;
    }

  private:
    const float* keep(Address source, std::int64_t n) {
        memory_.push_back(floats(source, n, n));
        return static_cast<const float*>(memory_.back()->data());
    }
    NormParameters keep(const Norm& norm) {
        return {keep(std::get<0>(norm), hidden_), keep(std::get<1>(norm), hidden_), std::get<2>(norm)};
    }

    std::int64_t hidden_;
    std::vector<EncoderLayer> layers_;
    std::vector<std::shared_ptr<OwnedLinear>> linears_;
    std::vector<std::unique_ptr<Memory>> memory_;
    std::shared_ptr<const DistanceTables> tables_;
    std::int64_t multiplied_ = 0;
};

// Layers first .. first + count - 1.
void encoder_layers_fwd(EncoderLayers& layers, std::int64_t first, std::int64_t count, Address x, Address residual,
                        Address y, Address y_stream, std::int64_t rows, const std::array<int, 2>& dtypes,
                        const AttentionCall& attention, Address positions, const RelativeCall* relative,
                        const Stream* relative_stream) {
    if (!layers.readable()) throw std::invalid_argument("layers packed for another instruction-set level");
    std::shared_ptr<const DistanceTables> kept;
    std::vector<const void*> tables;
    if (relative != nullptr) kept = layers.tables_of(*relative, DType(dtypes[0]), pointer(positions));
    if (!layers.readable()) throw std::invalid_argument("layers packed for another instruction-set level");
    if (kept != nullptr) tables = kept->of(*relative, first, count);
    const EncoderLayersFwd arguments{layers.layers() + first,
                                     static_cast<int>(count),
                                     pointer(x),
                                     pointer(residual),
                                     pointer(y),
                                     pointer(y_stream),
                                     rows,
                                     layers.hidden(),
                                     DType(dtypes[0]),
                                     DType(dtypes[1]),
                                     attention,
                                     pointer(positions),
                                     relative == nullptr ? RelativeCall{} : *relative,
                                     relative_stream == nullptr ? Stream{} : *relative_stream,
                                     kept == nullptr ? nullptr : tables.data()};
    PYXLBERT_RUN_PACKED(encoder_layers_fwd, arguments);
}

}  // namespace

void bind_encoder(py::module_& cpu) {
    py::class_<OwnedLinear, std::shared_ptr<OwnedLinear>>(cpu, "PackedLinear")
        .def(py::init<const std::vector<Part>&, Address, std::int64_t, int, Address>())
        .def_property_readonly("columns", [](const OwnedLinear& one) { return one.linear.weight.columns; })
        .def_property_readonly("inner", [](const OwnedLinear& one) { return one.linear.weight.inner; })
        .def_property_readonly("dtype",
                               [](const OwnedLinear& one) { return static_cast<int>(one.linear.weight.dtype); })
        .def_property_readonly("bytes", [](const OwnedLinear& one) { return one.linear.weight.bytes; })
        .def_property_readonly("level", &OwnedLinear::level);
    cpu.def("packed_linear_fwd", &packed_linear_fwd);
    py::class_<EncoderLayers>(cpu, "EncoderLayers")
        .def(py::init<std::int64_t>())
        .def("add", &EncoderLayers::add)
        .def_property_readonly("multiplied", &EncoderLayers::multiplied)
        .def("__len__", &EncoderLayers::count);
    cpu.def("encoder_layers_fwd", &encoder_layers_fwd);
}

}  // namespace pyxlbert
