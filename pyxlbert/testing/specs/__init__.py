"""The description of every op's inputs, by name."""

from pyxlbert.testing.specs import (
    attention,
    bias_gelu,
    dropout_add_layer_norm,
    embedding_layer_norm,
    encoder_layer,
    layer_norm,
    linear,
    linear_gelu,
    relative_attention,
    two_stream_attention,
)

_MODULES = (
    attention,
    bias_gelu,
    dropout_add_layer_norm,
    embedding_layer_norm,
    encoder_layer,
    layer_norm,
    linear,
    linear_gelu,
    relative_attention,
    two_stream_attention,
)

SPECS = {module.SPEC.name: module.SPEC for module in _MODULES}

__all__ = ["SPECS"]
