"""Dropout of activations by few random bits, where nothing can be fused with it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyxlbert.ops._few_bits import dropped
from pyxlbert.ops._torch import transformed

# Random bits an element: p is rounded to a multiple of 2⁻¹⁶, and the scale is that of the rounded one.
_LEVELS = 1 << 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dropout(x: Tensor, p: float) -> Tensor:
    """Zeros with probability `p`, and x / (1 - p) elsewhere.

    On the CPU torch draws a number of its generator for every element, one after the other, which takes longer than the
    layer norm and the activation around it. Here the generator gives a seed, 16 bits of Philox decide on an element,
    in the gradient once more, and p is a multiple of 2⁻¹⁶. In float64, and without the native module, a draw of 64 bits
    is for four elements. Neither depends on the number of threads. What is dropped is 0 whatever it was, as in every op
    with dropout here, and so is its gradient: torch multiplies by 0, which makes NaN of an infinity and keeps a NaN.
    Elsewhere, and where calls are traced or transformed, this is `torch.nn.functional.dropout`.

    Args:
        x: any shape and strides.
        p: from 0 to 1.

    Returns:
        A new tensor of x's shape and dtype.

    Source:
        Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014.
    """
    limit = round(p * _LEVELS)
    if not 0 < limit < _LEVELS or not _draws_few_bits(x):
        return F.dropout(x, p, True)
    y = dropped(x, limit)
    if y is not None:
        return y
    count = x.numel()
    with torch.no_grad():
        words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[:count].view(x.shape)
        kept = bits >= limit - _LEVELS // 2
    return torch.where(kept, x, 0.0).mul_(_LEVELS / (_LEVELS - limit))


def _draws_few_bits(x: Tensor) -> bool:
    return (
        x.is_cpu
        and x.dtype in _DTYPES
        and type(x) in (Tensor, torch.nn.Parameter)
        and not (torch.compiler.is_compiling() or transformed())
    )


class Dropout(torch.nn.Dropout):
    """`torch.nn.Dropout`, which on the CPU draws fewer random numbers: see `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and not self.inplace else super().forward(x)
