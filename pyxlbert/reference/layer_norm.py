"""layer_norm in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

from typing import Any

import torch


def supports(*tensors: torch.Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def layer_norm_fwd(call: Any) -> list[torch.Tensor]:
    """y `[..., N]` in x's dtype; with `save` also mean and rstd `[...]` in float32, or float64 for float64 input.

    All are contiguous, whatever x's strides.
    """
    y, mean, rstd = normalise(call.x, call.weight, call.bias, call.eps)
    return [y, mean, rstd] if call.save else [y]


def layer_norm_bwd(call: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx `[..., N]`, dweight and dbias `[N]` (empty unless `needs_parameters`): see `normalise_bwd`."""
    return normalise_bwd(call.dy, call.x, call.weight, call.bias, (call.mean, call.rstd), call.needs_parameters)


def normalise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y in x's dtype, mean and rstd in the wide dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, rstd = statistics(wide, eps)
    y = (wide - mean[..., None]) * rstd[..., None] * weight + bias
    return y.to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def statistics(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and rstd = 1 / sqrt(variance + eps) of the rows of x.

    A computed mean is off by a rounding, whose square an eps of 1e-12 does not cover: what is left of the deviations'
    mean is taken off both.
    """
    mean = x.mean(-1)
    mean = mean + (x - mean[..., None]).mean(-1)
    return mean, ((x - mean[..., None]).square().mean(-1) + eps).rsqrt()


def normalise_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    statistics: tuple[torch.Tensor, torch.Tensor],
    needs_parameters: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx `[..., N]`, dweight and dbias `[N]` (empty unless `needs_parameters`).

    With xhat = (x - mean) * rstd and g = dy * weight:
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), dweight = sum of dy * xhat, dbias = sum of dy.
    """
    mean, rstd = statistics
    dy_wide = dy.to(mean.dtype)
    xhat = (x.to(mean.dtype) - mean[..., None]) * rstd[..., None]
    g = dy_wide * weight
    dx = rstd[..., None] * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    if not needs_parameters:
        return dx.to(x.dtype).contiguous(), weight.new_empty(0), bias.new_empty(0)
    n = x.shape[-1]
    rows = x.shape[:-1].numel()  # -1 would be ambiguous without columns
    dweight = (dy_wide * xhat).reshape(rows, n).sum(0)
    dbias = dy_wide.reshape(rows, n).sum(0)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype), dbias.to(bias.dtype)
