// Dropout by 16 bits an element, which forward and backward draw anew: no mask is kept.
#include "dropout.h"

#include "philox.h"
#include "rows.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

constexpr int WORDS = 64, ELEMENTS = 2 * WORDS, LEVELS = 1 << 16;

// x * scale where the bits of a lane are not below the limit, else zero.
PYXLBERT_INLINE Vec keep(Vec x, const std::uint16_t* bits, std::uint32_t limit, Vec scale) {
#if defined(__AVX512F__)
    const __m256i drawn = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits));
    return _mm512_maskz_mul_ps(_mm256_cmpge_epu16_mask(drawn, _mm256_set1_epi16(static_cast<short>(limit))), x, scale);
#else
    Vec drawn;
    for (int i = 0; i < W; ++i) drawn[i] = static_cast<float>(bits[i]);
    return drawn >= set1(static_cast<float>(limit)) ? x * scale : zero();
#endif
}

template <class T>
void run(const DropoutFlat& a) {
    const Dropout words = make_dropout(0.0, a.seed, Tag::dropout);
    const Vec scale = set1(static_cast<float>(LEVELS) / static_cast<float>(LEVELS - a.limit));
    const std::int64_t blocks = (a.n + ELEMENTS - 1) / ELEMENTS;
    in_team(team(a.threads, a.n * 4), [&](int thread, int threads) PYXLBERT_WORK {
        const std::int64_t last = block_start(blocks, threads, thread + 1);
        for (std::int64_t block = block_start(blocks, threads, thread); block < last; ++block) {
            std::uint16_t bits[ELEMENTS];
            for (int c = 0; c < WORDS; c += 4 * W) {
                VecU drawn[4];
                dropout_words(words, static_cast<std::uint32_t>(c), static_cast<std::uint32_t>(block),
                              static_cast<std::uint32_t>(block >> 32), drawn);
                __builtin_memcpy(bits + 2 * c, drawn, sizeof drawn);
            }
            const std::int64_t first = block * ELEMENTS, left = a.n - first;
            const T* x = static_cast<const T*>(a.x) + first;
            T* y = static_cast<T*>(a.y) + first;
            for_vectors(left < ELEMENTS ? left : ELEMENTS, [&](std::int64_t j, int count) PYXLBERT_LAMBDA {
                store_some(y + j, keep(load_some(x + j, count), bits + j, a.limit, scale), count);
            });
        }
    });
}

}  // namespace

void dropout(const DropoutFlat& arguments) {
    with_type(arguments.dtype, [&](auto type) { run<decltype(type)>(arguments); });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
