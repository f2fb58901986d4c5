"""XLNet."""

from __future__ import annotations

from pyxlbert.integrations.architecture import RelativeArchitecture

ARCHITECTURE = RelativeArchitecture(
    model_type="xlnet",
    tested="5.17",
    prefix="XLNet",
    parts={
        "word_embedding": "Embedding",
        "dropout": "Dropout",
        "rel_attn": "XLNetRelativeAttention",
        "rel_attn.layer_norm": "LayerNorm",
        "rel_attn.dropout": "Dropout",
        "ff": "XLNetFeedForward",
        "ff.layer_1": "Linear",
        "ff.layer_2": "Linear",
        "ff.layer_norm": "LayerNorm",
        "ff.dropout": "Dropout",
    },
    reads={
        "ForSequenceClassification": "summary",
        "ForMultipleChoice": "summary",
        "ForQuestionAnswering": "mean",
        "ForQuestionAnsweringSimple": "mean",
    },
)
