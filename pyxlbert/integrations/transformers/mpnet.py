"""MPNet: no token types; all layers share a bias by the distance of two places, in buckets."""

from __future__ import annotations

from pyxlbert.integrations.architecture import Architecture, EmbeddingParts, LayerParts, Stack

LAYER = LayerParts(
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    heads="attention.attn.num_attention_heads",
    attention_dropout="attention.attn.dropout",
    out="attention.attn.o",
    out_dropout="attention.dropout",
    out_norm="attention.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    down_dropout="output.dropout",
    norm="output.LayerNorm",
    biased=True,
)

ARCHITECTURE = Architecture(
    model_type="mpnet",
    tested="5.17",
    prefix="MPNet",
    layer_parts=LAYER,
    stack=Stack(beside=("relative_attention_bias",)),
    embedding_parts=EmbeddingParts(
        arguments=("input_ids", "position_ids", "inputs_embeds"), token_type=None, positions="token"
    ),
)
