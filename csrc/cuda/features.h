// What scores may need beyond lengths and the diagonal, and the sets of it that kernels are compiled for.
//
// A set is a type, and a template argument of its kernels.  Each place of theirs asks for the one feature that it is
// about, `if constexpr (F::DROPOUT)`, so that a kernel has no code for what its set lacks.
#pragma once
#include <cstddef>
#include <stdexcept>
#include <tuple>

#include "cuda/attention_arguments.h"

namespace pyxlbert::cuda {

// Single features, as bits.
namespace feature {
constexpr unsigned MASK = 1;           // a byte for every score
constexpr unsigned BIAS = 2;           // a number that is added to every score
constexpr unsigned RANKS = 4;          // ranks of keys; those of attention say which ones its mask hides from all
constexpr unsigned SEE_SELF = 8;       // a row sees its own key whatever masks and ranks say
constexpr unsigned UNIFORM_ROWS = 16;  // a row without any key averages over all of them
constexpr unsigned SEGMENTS = 32;      // a term for keys of the row's own segment, and another for the rest
constexpr unsigned DROPOUT = 64;
constexpr unsigned ALL = 127;
// Those that calls of an op may need.
constexpr unsigned OF_ATTENTION = MASK | BIAS | RANKS | DROPOUT, OF_RELATIVE_ATTENTION = ALL & ~BIAS;
}  // namespace feature

template <unsigned FEATURES>
struct FeatureSet {
    static constexpr unsigned BITS = FEATURES;
    static constexpr bool MASK = (BITS & feature::MASK) != 0, BIAS = (BITS & feature::BIAS) != 0,
                          RANKS = (BITS & feature::RANKS) != 0, SEE_SELF = (BITS & feature::SEE_SELF) != 0,
                          UNIFORM_ROWS = (BITS & feature::UNIFORM_ROWS) != 0,
                          SEGMENTS = (BITS & feature::SEGMENTS) != 0, DROPOUT = (BITS & feature::DROPOUT) != 0;
};

// Types of their own: their names are part of those of the kernels.
struct Plain : FeatureSet<0> {};
struct Dropped : FeatureSet<feature::DROPOUT> {};
struct Segmented : FeatureSet<feature::SEGMENTS | feature::DROPOUT> {};
// Whatever the op's calls may need.
struct FullAttention : FeatureSet<feature::OF_ATTENTION> {};
struct FullRelative : FeatureSet<feature::OF_RELATIVE_ATTENTION> {};

// Whether more than lengths and the diagonal may hide keys.
template <class F>
constexpr bool HIDES = F::MASK || F::RANKS;

// Whether a kernel asks before a tile's products which of its scores may be attended.  Elsewhere it asks after them,
// since registers are short.
template <class F>
constexpr bool ASKS_FIRST = HIDES<F> || F::BIAS || F::UNIFORM_ROWS;

// The features that a call needs.
inline unsigned features_of(const AttentionCall& a) {
    unsigned needed = 0;
    if (a.mask.data != nullptr) needed |= feature::MASK;
    if (a.bias.data != nullptr) needed |= feature::BIAS;
    if (a.key_rank != nullptr) needed |= feature::RANKS;
    if (a.relative.uniform_rows) needed |= feature::UNIFORM_ROWS;
    if (a.key_segments != nullptr) needed |= feature::SEGMENTS;
    if (a.dropout.seed != nullptr) needed |= feature::DROPOUT;
    // Lengths and the diagonal hide no row's own key that it could see.
    if ((needed & (feature::MASK | feature::RANKS)) != 0)
        for (int n = 0; n < a.streams; ++n)
            if (a.stream[n].options.see_self) needed |= feature::SEE_SELF;
    return needed;
}

// Whether kernels of a set do for a call that needs these features.
template <class F>
constexpr bool covers(unsigned needed) {
    return (needed & ~F::BITS) == 0;
}

// The sets that an op's kernels are compiled for, smaller ones first.
template <class... Sets>
struct SetsOfOp {
    // The place of the first set that covers these features; how many there are if none does.
    static constexpr std::size_t first(unsigned needed) {
        constexpr std::size_t COUNT = sizeof...(Sets);
        const bool does[COUNT] = {covers<Sets>(needed)...};
        std::size_t n = 0;
        while (n < COUNT && !does[n]) ++n;
        return n;
    }

    // Whether each combination of these features gets a set that has all of them.
    static constexpr bool suffice(unsigned features) {
        constexpr unsigned HAD[] = {Sets::BITS..., 0};
        for (unsigned needed = 0; needed <= feature::ALL; ++needed)
            if ((needed | features) == features && (HAD[first(needed)] | needed) != HAD[first(needed)]) return false;
        return true;
    }

    // What covers all that any of the op's calls needs.
    using Largest = std::tuple_element_t<sizeof...(Sets) - 1, std::tuple<Sets...>>;

    // Calls f with the first set that covers what the call needs.
    template <class Launch>
    static void choose(const AttentionCall& a, Launch f) {
        const std::size_t wanted = first(features_of(a));
        if (wanted == sizeof...(Sets)) throw std::logic_error("attention: no kernel has all features of this call");
        std::size_t n = 0;
        (void)((n++ == wanted && (f(Sets()), true)) || ...);
    }
};

// BERT's inference needs none of them, its training dropout; XLNet needs segments beside.
using SetsOfAttention = SetsOfOp<Plain, Dropped, FullAttention>;
using SetsOfRelativeAttention = SetsOfOp<Plain, Segmented, FullRelative>;
// Without ranks or a mask the query stream would see what it is to predict.
using SetsOfTwoStreamAttention = SetsOfOp<FullRelative>;
static_assert(SetsOfAttention::suffice(feature::OF_ATTENTION));
static_assert(SetsOfRelativeAttention::suffice(feature::OF_RELATIVE_ATTENTION));
static_assert(SetsOfTwoStreamAttention::suffice(feature::OF_RELATIVE_ATTENTION));

}  // namespace pyxlbert::cuda
