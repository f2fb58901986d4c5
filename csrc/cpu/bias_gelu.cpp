// gelu(x + bias), forward and backward, one pass over memory.
//
// With Phi the normal distribution, phi its density and Q(a) = Phi(-a) for a >= 0:
//     none: gelu(z) = z Phi(z) = max(z, 0) - |z| Q(|z|),  gelu'(z) = Phi(z) + z phi(z);
//     tanh: gelu(z) = z s, s = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3),  gelu'(z) = s + z s (1 - s) 2u'.
// Neither form subtracts nearly equal numbers, so the negative tail keeps its digits.
#include "bias_gelu.h"

#include "math.h"
#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

// Columns of one task of the forward pass: long single rows are shared out too.
constexpr std::int64_t column_block = 4096;

struct Erf {
    // From here on Q is below the smallest normal number; an infinite z must not meet it in a product.
    static constexpr float far = 13.2f;
    static PYXLBERT_INLINE Vec value(Vec z) {
        const Vec a = min(set1(far), absolute(z));
        Vec density;
        return max(zero(), z) - a * normal_tail(a, density);
    }
    static PYXLBERT_INLINE Vec slope(Vec z) {
        const Vec a = min(set1(far), absolute(z));
        Vec density;
        const Vec tail = normal_tail(a, density);
        // Phi + z phi on the positive side; the negative side is one less that.
        const Vec positive = fma(a * density, set1(0.398942280f), set1(1.0f) - tail);
        const Vec negative = fma(a * density, set1(-0.398942280f), tail);
        return z < zero() ? negative : positive;
    }
};

struct Tanh {
    // The same for s and 1 - s.
    static constexpr float far = 10.0f;
    // e^(-2u) and s = 1 / (1 + e^(-2u)) of a bounded z.
    static PYXLBERT_INLINE Vec gate(Vec z, Vec& e) {
        const Vec cube = fma(z * z * set1(0.044715f), z, z);
        e = exp(cube * set1(-1.59576912f));
        return set1(1.0f) / (set1(1.0f) + e);
    }
    static PYXLBERT_INLINE Vec value(Vec z) {
        Vec e;
        const Vec s = gate(clamp(z, -far, far), e);
        return max(set1(-far), z) * s;
    }
    static PYXLBERT_INLINE Vec slope(Vec z) {
        const Vec bounded = clamp(z, -far, far);
        Vec e;
        const Vec s = gate(bounded, e);
        const Vec twice_du = fma(bounded * bounded, set1(0.214064126f), set1(1.59576912f));
        return fma(bounded * twice_du * s, e * s, s);
    }
};

template <class T, class Gelu>
void forward(const BiasGeluFwd& a) {
    const std::int64_t n = a.columns, padded = round_up(n, W);
    const float* bias = nullptr;
    if (a.bias != nullptr)
        bias = as_float(a.bias, a.bias_dtype, n, static_cast<float*>(workspace(Slot::shared, padded * sizeof(float))));
    const std::int64_t blocks = (n + column_block - 1) / column_block;

#pragma omp parallel for collapse(2) schedule(static) num_threads(team(a.threads, a.rows * n * 4))
    for (std::int64_t i = 0; i < a.rows; ++i) {
        for (std::int64_t block = 0; block < blocks; ++block) {
            const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
            T* y = static_cast<T*>(a.y) + i * n;
            std::int64_t j = block * column_block;
            const std::int64_t end = j + column_block < n ? j + column_block : n;
            for (; j + W <= end; j += W) {
                const Vec z = load(x + j);
                store(y + j, Gelu::value(bias != nullptr ? z + load(bias + j) : z));
            }
            const int tail = static_cast<int>(end - j);
            if (tail) {
                const Vec z = load(x + j, tail);
                store(y + j, Gelu::value(bias != nullptr ? z + load(bias + j, tail) : z), tail);
            }
        }
    }
}

template <class T, class Gelu>
void backward(const BiasGeluBwd& a) {
    const std::int64_t n = a.columns, padded = round_up(n, W);
    const int blocks = row_blocks(a.rows);
    const bool sums = a.dbias != nullptr;
    // bias as floats, then dbias of every block of rows.
    float* shared = static_cast<float*>(workspace(Slot::shared, padded * (1 + (sums ? blocks : 0)) * sizeof(float)));
    const float* bias = a.bias != nullptr ? as_float(a.bias, a.bias_dtype, n, shared) : nullptr;
    float* partial = shared + padded;

#pragma omp parallel for schedule(static) num_threads(team(a.threads, a.rows * n * 4))
    for (int b = 0; b < blocks; ++b) {
        float* dbias = partial + b * padded;
        if (sums)
            for (std::int64_t j = 0; j < padded; j += W) store(dbias + j, zero());
        for (std::int64_t i = block_start(a.rows, blocks, b); i < block_start(a.rows, blocks, b + 1); ++i) {
            const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
            const T* dy = static_cast<const T*>(a.dy) + i * a.dy_stride;
            T* dx = static_cast<T*>(a.dx) + i * n;
            // dy is zero in the lanes past the row, so those lanes add nothing to the sum.
            const auto step = [&](std::int64_t j, Vec z, Vec dyj) PYXLBERT_LAMBDA {
                const Vec d = dyj * Gelu::slope(z);
                if (sums) store(dbias + j, load(dbias + j) + d);
                return d;
            };
            std::int64_t j = 0;
            for (; j + W <= n; j += W) {
                const Vec z = load(x + j);
                store(dx + j, step(j, bias != nullptr ? z + load(bias + j) : z, load(dy + j)));
            }
            const int tail = static_cast<int>(n - j);
            if (tail) {
                const Vec z = load(x + j, tail);
                store(dx + j, step(j, bias != nullptr ? z + load(bias + j, tail) : z, load(dy + j, tail)), tail);
            }
        }
    }
    if (!sums) return;
    add_blocks(partial, blocks, padded, padded);
    from_float(partial, a.dbias, a.bias_dtype, n);
}

}  // namespace

void bias_gelu_fwd(const BiasGeluFwd& arguments) {
    with_type(arguments.dtype, [&](auto type) {
        arguments.tanh ? forward<decltype(type), Tanh>(arguments) : forward<decltype(type), Erf>(arguments);
    });
}

void bias_gelu_bwd(const BiasGeluBwd& arguments) {
    with_type(arguments.dtype, [&](auto type) {
        arguments.tanh ? backward<decltype(type), Tanh>(arguments) : backward<decltype(type), Erf>(arguments);
    });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
