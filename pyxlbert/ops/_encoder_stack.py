"""Stacks of packed encoder layers as the modules use them: when they may be used, and the records of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.launch.rows import DTYPE
from pyxlbert.ops import _scores
from pyxlbert.ops._torch import is_zerotensor, watched

try:
    from pyxlbert.cpu.encoder_layer import Distances, Layer, Places, Stack

    _HERE = True
except ImportError:  # backend "cpu" is not here
    Distances = Layer = Places = Stack = None  # type: ignore[assignment,misc]
    _HERE = False

__all__ = ["DTYPES", "Distances", "Layer", "Places", "Stack", "check_offsets", "takes", "takes_sizes"]

DTYPES = tuple(DTYPE)


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
        and not watched()
    )


def takes_sizes(dtype: torch.dtype, hidden: int, width: int) -> bool:
    """Whether rows of these sizes are whole units of 32 bits, in which bfloat16 is multiplied."""
    return dtype is not torch.bfloat16 or (hidden % 2 == 0 and width % 2 == 0)


def check_offsets(cu_seqlens: Tensor, total: int, max_seqlen: int | None) -> None:
    """See `pyxlbert.ops._scores.check_offsets`; in the words of `attention`, which the modules would call.

    Raises:
        ValueError: cu_seqlens or max_seqlen is wrong.
    """
    _scores.check_offsets("attention", cu_seqlens, total, total if max_seqlen is None else max_seqlen)
