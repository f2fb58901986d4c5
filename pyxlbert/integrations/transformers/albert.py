"""ALBERT: one layer, called many times; its embeddings are narrower than it."""

from __future__ import annotations

from pyxlbert.integrations.architecture import Architecture, LayerParts, Stack

LAYER = LayerParts(
    query="attention.query",
    key="attention.key",
    value="attention.value",
    heads="attention.num_attention_heads",
    attention_dropout="attention.attention_dropout",
    out="attention.dense",
    out_dropout="attention.output_dropout",
    out_norm="attention.LayerNorm",
    up="ffn",
    activation="activation",
    down="ffn_output",
    down_dropout=None,
    norm="full_layer_layer_norm",
)

ARCHITECTURE = Architecture(
    model_type="albert",
    tested="5.17",
    prefix="Albert",
    layer_parts=LAYER,
    stack=Stack(("albert_layer_groups",), inside=("albert_layers",), before="embedding_hidden_mapping_in"),
    encoder="{}Transformer",
)
