"""Parakeet: the encoder of its heads for CTC, RNN-T and TDT."""

from __future__ import annotations

from pyxlbert.integrations.architecture import ConformerArchitecture, DistanceParts, FeedForwardParts

ATTENTION = DistanceParts(
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="o_proj",
    position="relative_k_proj",
    content_bias="bias_u",
    position_bias="bias_v",
    dropout="attention_dropout",
    arguments=("hidden_states", "position_embeddings", "attention_mask"),
    positions="position_embeddings",
    masks="square",
)

FEED_FORWARD = FeedForwardParts(
    up="linear1", activation="activation", inner_dropout="activation_dropout", down="linear2", dropout=None
)

ARCHITECTURE = ConformerArchitecture(
    model_type="parakeet_encoder",
    tested="5.17",
    prefix="ParakeetEncoder",
    attention_parts=ATTENTION,
    feed_forward_parts=FEED_FORWARD,
    model="{}",
    layer="{}Block",
    attention="{}Attention",
    distances="{}RelPositionalEncoding",
    inputs=("num_mel_bins", "subsampling_factor"),
    holds={},
)
