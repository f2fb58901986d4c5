"""FastSpeech2-Conformer: encoder and decoder of one kind; their feed-forward networks are convolutions."""

from __future__ import annotations

from pyxlbert.integrations.architecture import ConformerArchitecture, DistanceParts

ARCHITECTURE = ConformerArchitecture(
    model_type="fastspeech2_conformer",
    tested="5.17",
    prefix="FastSpeech2Conformer",
    attention_parts=DistanceParts(
        arguments=("hidden_states", "attention_mask", "pos_emb", "output_attentions"),
        positions="pos_emb",
        masks="keys",
    ),
    model="{}Model",
    attention="{}Attention",
    feed_forward=None,
    holds={},
)
