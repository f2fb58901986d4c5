"""Stacks of packed encoder layers as the modules use them: when they may be used, and the records of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.launch.rows import DTYPE
from pyxlbert.ops import _attention
from pyxlbert.ops._torch import is_zerotensor, transformed, watched

try:
    from pyxlbert import _C
    from pyxlbert.cpu._packed import ACTIVATIONS, dtype_of
    from pyxlbert.cpu.encoder_layer import Distances, Layer, Places, Stack

    _HERE = True
except ImportError:  # backend "cpu" is not here
    ACTIVATIONS = dtype_of = Distances = Layer = Places = Stack = None  # type: ignore[assignment,misc]
    _HERE = False

__all__ = [
    *("ACTIVATIONS", "Distances", "Layer", "Places", "Stack"),
    *("dtype_of", "level", "takes", "takes_masks", "takes_sizes"),
]


def level() -> str:
    """The active instruction-set level."""
    return _C.level()


def takes(x: Tensor, residual: Tensor) -> bool:
    """Whether these rows are read where they lie, and nobody asks for another backend or watches the ops."""
    return (
        _HERE
        and x.is_cpu
        and x.dtype in DTYPE
        and residual.dtype in (x.dtype, torch.float32)
        and residual.shape == x.shape
        and x.numel() > 0
        and x.is_contiguous()
        and residual.is_contiguous()
        and not (x.is_neg() or is_zerotensor(x) or residual.is_neg() or is_zerotensor(residual))
        and backends.default_backend() in (None, "cpu")
        and not torch.is_autocast_enabled("cpu")
        and not (watched() or transformed())
    )


def takes_sizes(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether rows of these sizes are whole units of 32 bits, in which bfloat16 is multiplied."""
    return dtype is not torch.bfloat16 or all(size % 2 == 0 for size in sizes)


def takes_masks(
    x: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    attention_mask: Tensor | None,
    bias: Tensor | None,
    heads: int,
) -> bool:
    """Whether the masks fit the rows `[B, T, E]` or packed `[total, E]`; if not, `attention` says what is wrong.

    Unlike there, packed rows may have a bias `[1, H or 1, T or 1, T or 1]`, of at least the longest sequence's places.

    Raises:
        ValueError: cu_seqlens or max_seqlen is wrong, in the words of `attention`.
    """
    if cu_seqlens is not None:
        if max_seqlen is not None and type(max_seqlen) is not int:
            return False
        longest = x.shape[0] if max_seqlen is None else max_seqlen
        _attention.check_offsets("attention", cu_seqlens, x.shape[0], longest)
        if attention_mask is not None or (bias is not None and (bias.dim() != 4 or bias.shape[0] != 1)):
            return False
        # By the places in each sequence, the same for all of them.
        scores = (1, heads, longest, longest)
        bias = None if bias is None else bias[..., :longest, :longest]
    else:
        scores = (x.shape[0], heads, x.shape[1], x.shape[1])
    for one in (attention_mask, bias):
        if one is None:
            continue
        if one.layout is not torch.strided or not one.is_cpu or one.dim() != 4 or is_zerotensor(one):
            return False
        if any(got not in (1, full) for got, full in zip(one.shape, scores, strict=True)):
            return False
    return (attention_mask is None or attention_mask.dtype is torch.bool) and (bias is None or bias.dtype in DTYPE)
