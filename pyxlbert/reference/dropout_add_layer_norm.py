"""dropout_add_layer_norm in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert.reference.philox import Tag, keep_rows


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    eps: float,
    copy_dtype: torch.dtype | None,
    save: bool,
) -> list[Tensor]:
    """y `[..., N]` in residual's dtype; unless `copy_dtype` is None its copy in that; where `save`, for backward, the
    sum s in residual's dtype, its mean and rstd `[...]` in float32 (float64 for float64 input).

    s = residual + dropout(x + x_bias) is rounded only when it is stored: y is made of what it was before, the saved
    mean and rstd of what is stored.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    branch = wide if x_bias is None else wide + x_bias
    s = residual + _drop(branch, dropout_p, seed)
    mean, rstd = _statistics(s, eps)
    y = (s - mean[..., None]) * rstd[..., None] * weight + bias
    outputs = [_rounded(y, residual.dtype)]
    if copy_dtype is not None:
        outputs.append(_rounded(y, copy_dtype))
    if save:
        stored = _rounded(s, residual.dtype)
        outputs += [stored, *_statistics(stored.to(s.dtype), eps)]
    return outputs


def dropout_add_layer_norm_bwd(
    dy: Tensor | None,
    dy_copy: Tensor | None,
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    x_dtype: torch.dtype,
    needs_x: bool,
    needs_residual: bool,
    needs_parameters: bool,
    needs_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx in `x_dtype`, dresidual, dweight, dbias, dx_bias; what is not needed is empty.

    With xhat = (s - mean) * rstd, dy the sum of both outputs' gradients and g = dy * weight:
    ds = rstd * (g - mean(g) - xhat * mean(g * xhat)), dresidual = ds, dx = dropout's mask on ds,
    dweight = sum of dy * xhat, dbias = sum of dy, dx_bias = sum of dx over the rows.
    """
    total = sum(one.to(mean.dtype) for one in (dy, dy_copy) if one is not None)
    n = s.shape[-1]
    xhat = (s.to(mean.dtype) - mean[..., None]) * rstd[..., None]
    g = total * weight
    ds = rstd[..., None] * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    dbranch = _drop(ds, dropout_p, seed)

    def columns(terms: Tensor, like: Tensor, needed: bool) -> Tensor:
        return terms.reshape(-1, n).sum(0).to(like.dtype) if needed else like.new_empty(0)

    return (
        _rounded(dbranch, x_dtype) if needs_x else s.new_empty(0, dtype=x_dtype),
        _rounded(ds, s.dtype) if needs_residual else s.new_empty(0),
        columns(total * xhat, weight, needs_parameters),
        columns(total, bias, needs_parameters),
        columns(dbranch, s if x_bias is None else x_bias, needs_x_bias),
    )


def _statistics(s: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    s = s.contiguous()  # so that both results are
    mean = s.mean(-1)
    return mean, ((s - mean[..., None]).square().mean(-1) + eps).rsqrt()


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of its own in `dtype`, contiguous."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _drop(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Dropout of `[..., N]`: kept elements times 1 / (1 - p), the others zero."""
    if seed is None or dropout_p == 0.0:
        return x
    if dropout_p == 1.0:
        return torch.zeros_like(x)
    n = x.shape[-1]
    keep = keep_rows(seed, dropout_p, x.numel() // n if n else 0, n, Tag.DROPOUT_ADD_LAYER_NORM)
    return torch.where(keep.view(x.shape), x * (1.0 / (1.0 - dropout_p)), 0.0)
