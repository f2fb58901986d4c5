"""What the native glue shares: dtypes as numbers, rows as an address and a stride."""

from __future__ import annotations

import torch

# csrc/types.h, enum DType.
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refusal(*tensors: torch.Tensor | None) -> str | None:
    """Why the native CPU kernels cannot take these tensors, or None: the `supports` of most ops."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return f"it takes CPU tensors, not {tensor.device.type}"
        if tensor.dtype is torch.float64:
            return "it computes in float32; float64 runs on backend 'torch'"
    return None


def row_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 tensors `[...]` for x `[..., N]`, not initialised: mean and rstd."""
    shape = x.shape[:-1]
    # Sizes as single arguments: torch.empty takes twice as long to read a tuple.
    mean = torch.empty(*shape, dtype=torch.float32) if shape else torch.empty((), dtype=torch.float32)
    return mean, torch.empty_like(mean)


def empty_statistics(saved: tuple[torch.Tensor, ...], eps: float) -> tuple[torch.Tensor, ...]:
    """mean and rstd, if there are any, filled with those of rows without a column."""
    if saved:
        saved[0].zero_()
        saved[1].fill_(eps**-0.5 if eps > 0 else float("inf"))
    return saved


def rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
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
