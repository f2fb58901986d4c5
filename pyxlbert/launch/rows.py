"""Tensors as kernels take them, an address and a stride: what launchers of every backend of kernels need."""

from __future__ import annotations

import torch
from torch import Tensor

# csrc/types.h, enum DType.
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refusal(device: str, where: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why kernels of float32 arithmetic cannot take these tensors, or None.

    Args:
        device: the type of the device that they take tensors of.
        where: appended to it, " in the emulation" for example.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != device:
            return f"it takes {device.upper()} tensors{where}, not {tensor.device.type}"
        if tensor.dtype is torch.float64:
            return "it computes in float32; float64 runs on backend 'torch'"
    return None


def address(x: Tensor | None) -> int:
    """Of the first element; 0 for None."""
    return 0 if x is None else x.data_ptr()


def rows(x: Tensor) -> tuple[Tensor, int]:
    """x `[..., N]` as rows of N adjacent elements a fixed stride apart: x itself or a view, copied only if neither is.

    Returns:
        the tensor that owns the rows, and the stride in elements between them.
    """
    n = x.shape[-1]
    if x.is_contiguous():
        return x, n
    if x.stride(-1) == 1 or n == 1:
        try:
            flat = x.view(-1, n)
        except RuntimeError:
            return x.contiguous(), n
        # A broadcast row (stride 0) is read in place too; dimensions of size 1 have any stride.
        return flat, flat.stride(0) if flat.shape[0] > 1 else n
    return x.contiguous(), n


def lies_transposed(x: Tensor | None) -> bool:
    """Whether x `[N, K]` lies in memory as `[K, N]` does and not as `[N, K]`."""
    return x is not None and not x.is_contiguous() and x.t().is_contiguous()


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 tensors `[...]` for x `[..., N]`, not initialised: mean and rstd."""
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    return mean, torch.empty_like(mean)


def empty_statistics(saved: tuple[Tensor, ...], eps: float) -> tuple[Tensor, ...]:
    """mean and rstd, if there are any, filled with those of rows without a column."""
    if saved:
        saved[0].zero_()
        saved[1].fill_(eps**-0.5 if eps > 0 else float("inf"))
    return saved


def int32(x: Tensor | None) -> Tensor | None:
    """Numbers as kernels read them."""
    return None if x is None else x.to(torch.int32).contiguous()
