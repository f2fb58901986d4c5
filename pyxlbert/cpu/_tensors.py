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
