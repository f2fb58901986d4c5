"""BERT and XLNet at kernel speed, provably right."""

from __future__ import annotations

import torch  # noqa: F401  (first: the native module binds to torch's OpenMP runtime)

from pyxlbert import backends
from pyxlbert.backends import allow_atomics, debug_checks, use_backend
from pyxlbert.integrations import accelerate, register_attention, register_kernels, restore
from pyxlbert.models.graphed import graphed
from pyxlbert.nn.packing import pack, repack, unpack
from pyxlbert.ops import (
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
from pyxlbert.text import CrossEncoder, SentenceEncoder

__version__ = "0.1.0"

__all__ = [
    "CrossEncoder",
    "SentenceEncoder",
    "accelerate",
    "allow_atomics",
    "attention",
    "backends",
    "bias_gelu",
    "debug_checks",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "encoder_layer",
    "graphed",
    "layer_norm",
    "linear",
    "linear_gelu",
    "pack",
    "register_attention",
    "register_kernels",
    "relative_attention",
    "repack",
    "restore",
    "two_stream_attention",
    "unpack",
    "use_backend",
]

backends.choose_level()
backends.native.survive_forks()
