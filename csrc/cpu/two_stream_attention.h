// Parameters of two_stream_attention on the CPU: those of relative attention with rows in both streams.
#pragma once
#include "relative_attention.h"

namespace pyxlbert {

PYXLBERT_DECLARE_LEVELS(two_stream_attention_fwd, RelativeAttentionFwd)
PYXLBERT_DECLARE_AMX(two_stream_attention_fwd, RelativeAttentionFwd)
PYXLBERT_DECLARE_LEVELS(two_stream_attention_bwd, RelativeAttentionBwd)
PYXLBERT_DECLARE_AMX(two_stream_attention_bwd, RelativeAttentionBwd)

}  // namespace pyxlbert
