"""Funnel, with attention by a shifted product; the factorised one drops its factors, which no distance has."""

from __future__ import annotations

from pyxlbert.integrations.architecture import FunnelArchitecture

ARCHITECTURE = FunnelArchitecture(
    model_type="funnel",
    tested="5.17",
    prefix="Funnel",
    parts={
        "attention": "FunnelRelMultiheadAttention",
        "attention.q_head": "Linear",
        "attention.k_head": "Linear",
        "attention.v_head": "Linear",
        "attention.post_proj": "Linear",
        "attention.hidden_dropout": "Dropout",
        "attention.attention_dropout": "Dropout",
        "attention.layer_norm": "LayerNorm",
        "ffn": "FunnelPositionwiseFFN",
        "ffn.linear_1": "Linear",
        "ffn.linear_2": "Linear",
        "ffn.dropout": "Dropout",
        "ffn.layer_norm": "LayerNorm",
    },
    holds={"attention_type": ("relative_shift",)},
)
