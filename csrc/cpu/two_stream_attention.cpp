// XLNet's two streams are relative attention with two sets of queries: a chunk of positions takes the content rows and
// the targets that stand there, against the same packed keys, values and table rows (attention_fwd.h), and a block
// of keys collects the gradients of both (relative_attention_bwd.cpp).
#include "two_stream_attention.h"

namespace pyxlbert::PYXLBERT_LEVEL {

void two_stream_attention_fwd(const RelativeAttentionFwd& a) { relative_attention_fwd(a); }

void two_stream_attention_bwd(const RelativeAttentionBwd& a) { relative_attention_bwd(a); }

}  // namespace pyxlbert::PYXLBERT_LEVEL
