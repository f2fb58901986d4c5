// Attention, forward: the loops of attention_fwd.h without a relative term.
#include "attention_fwd.h"

namespace pyxlbert::PYXLBERT_LEVEL {

void attention_fwd(const AttentionFwd& a) {
    Stream stream{};
    stream.query = a.in.query;
    stream.count = a.in.queries;
    stream.out = a.out;
    stream.lse = a.lse;
    stream.options.tag = Tag::attention;
    with_element(a.in.dtype, [&](auto element, auto unit) {
        run_forward<decltype(element), decltype(unit), false>(a.in, nullptr, &stream);
    });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
