"""What the attention references share: dtypes, packed rows, keys that nobody sees, softmax, dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert.reference.philox import Tag, keep_scores


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def hide(x: Tensor, present: Tensor | None) -> Tensor:
    """`[B, T, H, D]` with zeros where `present` `[B, T]` is False, so that a NaN there is gone."""
    return x if present is None else x.masked_fill(~present[..., None, None], 0.0)


def softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Weights along the last dimension and their log-sum-exp; a row of -inf has no weight and lse = +inf."""
    lse = s.logsumexp(-1)
    dead = lse == -torch.inf
    # Such a row is replaced before the softmax too: autograd would multiply its NaN by zero.
    weights = s.masked_fill(dead[..., None], 0.0).softmax(-1)
    return weights.masked_fill(dead[..., None], 0.0), lse.masked_fill(dead, torch.inf)


def of_seen_rows(dout: Tensor, lse: Tensor) -> Tensor:
    """`[B, Tq, H, D]` with zeros in rows that may see nothing (lse `[B, H, Tq]` is inf): they have no gradient."""
    return dout.masked_fill((lse == torch.inf).transpose(1, 2)[..., None], 0.0)


def drop(x: Tensor, dropout_p: float, seed: Tensor | None, tag: Tag) -> Tensor:
    """Dropout of `[B, H, Tq, Tk]`: kept elements times 1 / (1 - p), the others zero."""
    if dropout_p == 0.0 or seed is None:
        return x
    if dropout_p == 1.0:
        return torch.zeros_like(x)
    keep = keep_scores(seed, dropout_p, *x.shape, tag=tag)
    return torch.where(keep, x * (1.0 / (1.0 - dropout_p)), 0.0)


def pad(x: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """Packed `[total, ...]` to `[B, length, ...]`, zeros behind every sequence."""
    with_zero = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    place = torch.arange(length, device=x.device)
    rows = (cu_seqlens[:-1, None] + place).long()
    return with_zero[rows.masked_fill(place >= cu_seqlens.diff()[:, None], x.shape[0])]


def unpad(x: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Padded `[B, length, ...]` to `[total, ...]`."""
    inside = torch.arange(x.shape[1], device=x.device) < cu_seqlens.diff()[:, None]
    return x[inside].reshape(total, *x.shape[2:])


def gradients_in_order(
    gradients: tuple[Tensor, ...], tensors: tuple[Tensor | None, ...], needs: list[bool]
) -> tuple[Tensor, ...]:
    """Each gradient in its tensor's dtype, or an empty tensor where nobody needs it or its tensor is absent."""
    return tuple(
        gradient.to(tensor.dtype).contiguous() if need and tensor is not None else tensors[0].new_empty(0)
        for gradient, tensor, need in zip(gradients, tensors, needs, strict=True)
    )
