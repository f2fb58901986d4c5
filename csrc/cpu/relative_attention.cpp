// Relative attention, forward, one stream or two: the loops of attention_fwd.h with the relative term.
#include "attention_fwd.h"

namespace pyxlbert::PYXLBERT_LEVEL {

void relative_attention_fwd(const RelativeAttentionFwd& a) {
    with_element(a.in.in.dtype, [&](auto element, auto unit) {
        run_forward<decltype(element), decltype(unit), true>(a.in.in, &a.in, a.streams);
    });
}

}  // namespace pyxlbert::PYXLBERT_LEVEL
