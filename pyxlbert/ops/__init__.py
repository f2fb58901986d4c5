"""The ops, one file each: contract, checks, registration, public function."""

from pyxlbert.ops.attention import attention
from pyxlbert.ops.bias_gelu import bias_gelu
from pyxlbert.ops.dropout_add_layer_norm import dropout_add_layer_norm
from pyxlbert.ops.embedding_layer_norm import embedding_layer_norm
from pyxlbert.ops.encoder_layer import encoder_layer
from pyxlbert.ops.layer_norm import layer_norm
from pyxlbert.ops.linear import linear
from pyxlbert.ops.linear_gelu import linear_gelu
from pyxlbert.ops.relative_attention import relative_attention
from pyxlbert.ops.two_stream_attention import two_stream_attention

__all__ = [
    "attention",
    "bias_gelu",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "encoder_layer",
    "layer_norm",
    "linear",
    "linear_gelu",
    "relative_attention",
    "two_stream_attention",
]
