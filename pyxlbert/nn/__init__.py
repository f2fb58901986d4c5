"""Modules: they hold parameters, under the names Hugging Face gives them, and call one op each."""

from __future__ import annotations

from pyxlbert.nn.activations import ACTIVATIONS, activation_kind
from pyxlbert.nn.distances import MEMORY_RANK, PADDING_RANK, UNSEEN_RANK, LastTable, OwnRows, relative_positions
from pyxlbert.nn.dropout import Dropout
from pyxlbert.nn.embeddings import Embeddings
from pyxlbert.nn.layer_norm import DropoutAddLayerNorm, LayerNorm, rows_and_stream
from pyxlbert.nn.layout import TokenLayout, fixed_sizes, has_values, sizes_are_fixed
from pyxlbert.nn.linear import Linear, LinearActivation, linear_activation
from pyxlbert.nn.relative_attention import RelativeAttention, RelativeLayout
from pyxlbert.nn.self_attention import SelfAttention, attend
from pyxlbert.nn.vocabulary_loss import linear_cross_entropy, vocabulary_loss
from pyxlbert.nn.words import words_of

__all__ = [
    "ACTIVATIONS",
    "MEMORY_RANK",
    "PADDING_RANK",
    "UNSEEN_RANK",
    "Dropout",
    "DropoutAddLayerNorm",
    "Embeddings",
    "LastTable",
    "LayerNorm",
    "Linear",
    "LinearActivation",
    "OwnRows",
    "RelativeAttention",
    "RelativeLayout",
    "SelfAttention",
    "TokenLayout",
    "activation_kind",
    "attend",
    "fixed_sizes",
    "has_values",
    "linear_activation",
    "linear_cross_entropy",
    "relative_positions",
    "rows_and_stream",
    "sizes_are_fixed",
    "vocabulary_loss",
    "words_of",
]
