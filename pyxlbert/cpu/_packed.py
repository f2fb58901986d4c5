"""Packed weights of linear layers through the native module, and their product with any number of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.launch.rows import DTYPE, address, rows

# csrc/cpu/linear.h, enum Activation.
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}

PackedLinear = _C.cpu.PackedLinear


def gains(weights: Sequence[Tensor], quantised: bool) -> bool:
    """Whether a product with these weights, packed, is faster than one with them as they are, or asked for."""
    return (quantised or _C.level() != "portable") and all(one.numel() and one.dtype in DTYPE for one in weights)


def dtype_of(packed: PackedLinear) -> torch.dtype:
    """Of the weight before it was packed."""
    return next(dtype for dtype, number in DTYPE.items() if number == packed.dtype)


def pack(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    integers: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> PackedLinear:
    """The weights `[N, K]` of some layers, one below the other, in the order of the active instruction-set level.

    Args:
        weights: CPU tensors of one dtype and K; any strides, no dimension 0.
        biases: one for each, or None.
        integers: of each weight, to be multiplied by instead: int8 `[N, K]` and float32 `[N]`, a scale an output.
    """
    first = weights[0]
    bias = None if biases is None else torch.cat([one.detach().reshape(-1).float() for one in biases])
    sources = list(weights) if integers is None else [one.contiguous() for one, _ in integers]
    scales = None if integers is None else torch.cat([one for _, one in integers])
    parts = [(one.data_ptr(), one.shape[0], *one.stride()) for one in sources]
    return PackedLinear(parts, address(bias), first.shape[1], DTYPE[first.dtype], address(scales))


def readable(packed: PackedLinear) -> bool:
    """Whether the active instruction-set level is the one that it was packed for."""
    return packed.level == _C.level()


def product(x: Tensor, packed: PackedLinear, activation: str) -> Tensor:
    """activation(x weightᵀ + bias), `[..., N]` in x's dtype.

    Args:
        x: `[..., K]`, of the dtype that the weight had; any strides.
        packed: for the active level.
        activation: a name of `ACTIVATIONS`.
    """
    y = x.new_empty(*x.shape[:-1], packed.columns)
    if y.numel():
        source, stride = rows(x)
        _C.cpu.packed_linear_fwd(
            packed,
            source.data_ptr(),
            y.data_ptr(),
            x.numel() // packed.inner,
            stride,
            DTYPE[x.dtype],
            ACTIVATIONS[activation],
            torch.get_num_threads(),
        )
    return y
