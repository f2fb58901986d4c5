"""BERT."""

from __future__ import annotations

from pyxlbert.integrations.architecture import Architecture, LayerParts

#: The layer of BERT and of everything that was copied from it.
LAYER = LayerParts(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    heads="attention.self.num_attention_heads",
    attention_dropout="attention.self.dropout",
    out="attention.output.dense",
    out_dropout="attention.output.dropout",
    out_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    down_dropout="output.dropout",
    norm="output.LayerNorm",
)

ARCHITECTURE = Architecture(model_type="bert", tested="5.17", prefix="Bert", layer_parts=LAYER)
