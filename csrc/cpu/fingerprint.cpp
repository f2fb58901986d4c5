// A digest of memory, as fast as the memory is: each of the 16 words of a line is mixed into a lane of its own.
//
// A step x -> mix(x ^ word) is a bijection in either, so that a change of a single word is always seen.  The shift
// carries high bits down: a product alone would keep changes of signs in the highest bit, where two cancel each other.
#include "fingerprint.h"

namespace pyxlbert::PYXLBERT_LEVEL {
namespace {

using Line = std::uint32_t __attribute__((vector_size(64)));
constexpr int CHAINS = 4;  // that do not wait for each other
// Lines that are asked for before they are read: each lies on a page of its own, and most are in no cache.
constexpr std::int64_t AHEAD = 32;

PYXLBERT_INLINE Line mix(Line x) {
    x *= 0x9e3779b1u;
    return x ^ (x >> 15);
}

PYXLBERT_INLINE std::uint64_t mix(std::uint64_t x) {
    x *= 0x9e3779b97f4a7c15u;
    return x ^ (x >> 32);
}

}  // namespace

void fingerprint(const Fingerprint& a) {
    Line chains[CHAINS] = {};
    for (int c = 0; c < CHAINS; ++c) chains[c] += static_cast<std::uint32_t>(c + 1);
    const auto take = [&](int chain, std::int64_t n) PYXLBERT_LAMBDA {
        __builtin_prefetch(a.lines[n + AHEAD < a.line_count ? n + AHEAD : n]);
        Line line;
        __builtin_memcpy(&line, a.lines[n], sizeof line);
        chains[chain] = mix(chains[chain] ^ line);
    };
    std::int64_t n = 0;
    for (; n + CHAINS <= a.line_count; n += CHAINS)
        for (int c = 0; c < CHAINS; ++c) take(c, n + c);
    for (; n < a.line_count; ++n) take(0, n);
    std::uint64_t digest = 1;
    for (const Line& chain : chains)
        for (int lane = 0; lane < 16; ++lane) digest = mix(digest ^ chain[lane]);
    for (n = 0; n < a.byte_count; ++n) digest = mix(digest ^ static_cast<unsigned char>(*a.bytes[n]));
    *a.digest = digest;
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
