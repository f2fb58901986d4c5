"""dropout_add_layer_norm in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.reference.layer_norm import statistics
from pyxlbert.reference.philox import Tag, keep_rows


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def dropout_add_layer_norm_fwd(call: Any) -> list[Tensor]:
    """y `[..., N]` in residual's dtype; unless `copy_dtype` is None its copy in that; where `save`, for backward, the
    sum s in residual's dtype, its mean and rstd `[...]` in float32 (float64 for float64 input).

    s = residual + dropout(x + x_bias) is rounded only when it is stored: y is made of what it was before, the saved
    mean and rstd of what is stored.
    """
    wide = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
    branch = wide if call.x_bias is None else wide + call.x_bias
    s = call.residual + _drop(branch, call.dropout_p, call.seed)
    mean, rstd = statistics(s.contiguous(), call.eps)
    y = (s - mean[..., None]) * rstd[..., None] * call.weight + call.bias
    outputs = [_rounded(y, call.residual.dtype)]
    if call.copy_dtype is not None:
        outputs.append(_rounded(y, call.copy_dtype))
    if call.save:
        stored = _rounded(s, call.residual.dtype)
        outputs += [stored, *statistics(stored.to(s.dtype), call.eps)]
    return outputs


def dropout_add_layer_norm_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx in `x_dtype`, dresidual, dweight, dbias, dx_bias; what is not needed is empty.

    With xhat = (s - mean) * rstd, dy the sum of both outputs' gradients and g = dy * weight:
    ds = rstd * (g - mean(g) - xhat * mean(g * xhat)), dresidual = ds, dx = dropout's mask on ds,
    dweight = sum of dy * xhat, dbias = sum of dy, dx_bias = sum of dx over the rows.
    """
    total = sum(one.to(call.mean.dtype) for one in (call.dy, call.dy_copy) if one is not None)
    n = call.s.shape[-1]
    xhat = (call.s.to(call.mean.dtype) - call.mean[..., None]) * call.rstd[..., None]
    g = total * call.weight
    ds = call.rstd[..., None] * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    dbranch = _drop(ds, call.dropout_p, call.seed)

    def columns(terms: Tensor, like: Tensor, needed: bool) -> Tensor:
        return terms.reshape(terms.shape[:-1].numel(), n).sum(0).to(like.dtype) if needed else like.new_empty(0)

    return (
        _rounded(dbranch, call.x_dtype) if call.needs_x else call.s.new_empty(0, dtype=call.x_dtype),
        _rounded(ds, call.s.dtype) if call.needs_residual else call.s.new_empty(0),
        columns(total * xhat, call.weight, call.needs_parameters),
        columns(total, call.bias, call.needs_parameters),
        columns(dbranch, call.s if call.x_bias is None else call.x_bias, call.needs_x_bias),
    )


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
