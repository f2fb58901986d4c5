"""What the glue of the native CPU kernels shares: which tensors it takes, statistics of rows."""

from __future__ import annotations

import torch

from pyxlbert.launch import rows


def refusal(*tensors: torch.Tensor | None) -> str | None:
    """Why the native CPU kernels cannot take these tensors, or None: the `supports` of most ops."""
    return rows.refusal("cpu", "", tensors)


def row_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 tensors `[...]` for x `[..., N]`, not initialised: mean and rstd."""
    shape = x.shape[:-1]
    # Sizes as single arguments: torch.empty takes twice as long to read a tuple.
    mean = torch.empty(*shape, dtype=torch.float32) if shape else torch.empty((), dtype=torch.float32)
    return mean, torch.empty_like(mean)
