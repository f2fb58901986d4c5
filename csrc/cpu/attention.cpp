// Attention, forward: the loops of attention_fwd.h without a relative term.
#include "attention_fwd.h"

namespace pyxlbert::PYXLBERT_LEVEL {

void attention_fwd(const AttentionFwd& a) {
    QueryRows rows{};
    rows.query = a.in.query;
    rows.count = a.in.queries;
    rows.out = a.out;
    rows.lse = a.lse;
    rows.options.tag = Tag::attention;
    with_element(a.in.dtype, [&](auto element, auto unit) {
        run_forward<decltype(element), decltype(unit), false>(a.in, nullptr, &rows);
    });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
