"""The products of training in bfloat16 by a kernel of ours: weights and their gradients stay in float32.

A vendor's product takes a weight that was rounded to bfloat16 before, packs it once more, and gives the weight's
gradient in bfloat16, to be widened again: two passes over memory and two tensors for every product.  Here the weight is
rounded while it is packed, and the gradient's sums are stored as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.launch.rows import DTYPE, address, lies_transposed, rows

# Fewer rows are multiplied faster than the weight is packed for them.
_FEWEST_ROWS = 64

# Columns of dy that meet the weight at a time: of a vocabulary the weight's rows would be packed in slices.
_DEEPEST = 8192


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes x `[..., K]` and a weight `[N, K]` that nobody has rounded."""
    return (
        x.dtype is torch.bfloat16
        and weight.dtype is torch.float32
        and _C.level() == "avx512_bf16"
        and x.shape[-1] > 0
        and x.numel() >= _FEWEST_ROWS * x.shape[-1]
        and weight.numel() > 0
        and (weight.is_contiguous() or lies_transposed(weight))
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, `[..., N]` in bfloat16.

    Args:
        x: bfloat16 `[..., K]`; any strides.
        weight: float32 `[N, K]`, as `multiplies` takes it.
        bias: `[N]` or None.
        y: where the result goes, contiguous; None takes fresh memory.
    """
    source, stride = rows(x)
    if y is None:
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
    n, k = weight.shape
    _product(source, stride, weight, (weight.stride(1), weight.stride(0)), y, n, (x.numel() // k, n, k), bias=bias)
    return y


def to_rows(dy: Tensor, weight: Tensor) -> Tensor:
    """dy weight, `[..., K]` in bfloat16: the gradient of x.

    Args:
        dy: bfloat16 `[..., N]`; any strides.
        weight: float32 `[N, K]`, as `multiplies` takes it.
    """
    source, stride = rows(dy)
    n, k = weight.shape
    many, shape = dy.numel() // n, (*dy.shape[:-1], k)
    strides = (weight.stride(0), weight.stride(1))
    if n <= _DEEPEST:
        dx = dy.new_empty(shape)
        _product(source, stride, weight, strides, dx, k, (many, k, n))
        return dx
    wide = dy.new_empty(shape, dtype=torch.float32)
    flat = source.view(-1, n)
    for start in range(0, n, _DEEPEST):
        part = slice(start, min(start + _DEEPEST, n))
        sizes = (many, k, part.stop - part.start)
        _product(flat[:, part], stride, weight[part], strides, wide, k, sizes, add=start > 0)
    return wide.to(dy.dtype)


def to_weight(dy: Tensor, x: Tensor, dweight: Tensor, add: bool = False) -> Tensor:
    """dyᵀ x, the gradient of the weight, put in place of what `dweight` holds or added to it.

    Args:
        dy: bfloat16 `[..., N]`; any strides.
        x: bfloat16 `[..., K]`; any strides.
        dweight: float32 `[N, K]`, contiguous or lying transposed.

    Returns:
        dweight.
    """
    first, second = (x, dy) if lies_transposed(dweight) else (dy, x)
    a, stride = rows(first)
    b, inner = rows(second)
    m, n = first.shape[-1], second.shape[-1]
    _product(a, stride, b, (inner, 1), dweight, n, (m, n, first.numel() // m), transposed=True, add=add)
    return dweight


def softmax_slope(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """The summed cross entropy of some rows, whose gradient times `scale` takes the place of their logits.

    Args:
        logits: bfloat16 `[C, V]`, contiguous.
        labels: int64 `[C]`, 0 to V - 1.
        scale: of the gradient.

    Returns:
        A scalar in float32.
    """
    found = torch.empty(logits.shape[0], 3)
    labels = labels.contiguous()
    where = (logits.data_ptr(), labels.data_ptr(), found.data_ptr())
    _C.cpu.softmax_slope(*where, *logits.shape, scale, torch.get_num_threads())
    highest, total, wanted = found.unbind(1)
    return (highest - wanted + total.log()).sum()


def _product(
    a: Tensor,
    a_stride: int,
    b: Tensor,
    b_strides: tuple[int, int],
    c: Tensor,
    c_stride: int,
    sizes: tuple[int, int, int],
    *,
    transposed: bool = False,
    add: bool = False,
    bias: Tensor | None = None,
) -> None:
    """c (+)= a b + bias; b_strides along K and along N, sizes M, N, K."""
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    strides = (a_stride, *b_strides, c_stride)
    where = (a.data_ptr(), transposed, b.data_ptr(), DTYPE[b.dtype], c.data_ptr(), DTYPE[c.dtype])
    _C.cpu.product(*where, add, address(bias), strides, sizes, torch.get_num_threads())
