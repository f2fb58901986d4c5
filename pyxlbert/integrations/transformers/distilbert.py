"""DistilBERT: no token types; attention holds its projection back."""

from __future__ import annotations

from pyxlbert.integrations.architecture import Architecture, EmbeddingParts, LayerParts

LAYER = LayerParts(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    heads="attention.n_heads",
    attention_dropout="attention.dropout",
    out="attention.out_lin",
    out_dropout=None,
    out_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    down_dropout="ffn.dropout",
    norm="output_layer_norm",
    activation_name="activation",
)

ARCHITECTURE = Architecture(
    model_type="distilbert",
    tested="5.17",
    prefix="DistilBert",
    layer_parts=LAYER,
    embedding_parts=EmbeddingParts(arguments=("input_ids", "inputs_embeds", "position_ids"), token_type=None),
    embeddings="Embeddings",
    encoder="Transformer",
    layer="TransformerBlock",
)
