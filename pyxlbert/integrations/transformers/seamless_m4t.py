"""SeamlessM4T: the encoder of speech, where its positions are relative."""

from __future__ import annotations

from pyxlbert.integrations.architecture import ConformerArchitecture, FeedForwardParts

ARCHITECTURE = ConformerArchitecture(
    model_type="seamless_m4t",
    tested="5.17",
    prefix="SeamlessM4TConformer",
    feed_forward_parts=FeedForwardParts(activation_name="speech_encoder_hidden_act"),
)
