"""attention in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.reference._attention import drop, gradients_in_order, hide, of_seen_rows, pad, softmax, unpad, wide
from pyxlbert.reference.philox import Tag


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def attention_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """out, shaped as query, and lse `[B, H, Tq]` (packed: `[H, total]`) in float32, or float64 for float64 input.

    With s = scale * q k^T + bias, masked scores -inf: p = softmax(s), out = dropout(p) v, lse = log(sum(exp(s))).
    A row without a single allowed key has p = 0, out = 0 and lse = +inf.
    """
    out, _, lse = _forward(_padded(call))
    if call.cu_seqlens is None:
        return out, lse
    total = call.query.shape[0]
    return unpad(out, call.cu_seqlens, total), unpad(lse.transpose(1, 2), call.cu_seqlens, total).t().contiguous()


def attention_with_weights(call: Any) -> tuple[Tensor, Tensor]:
    """out as in `attention_fwd`, and dropout(p) `[B, H, Tq, Tk]` in query's dtype; autograd differentiates both.

    Of packed rows Tq and Tk are max_seqlen, with zeros behind every sequence.
    """
    out, kept, _ = _forward(_padded(call))
    if call.cu_seqlens is None:
        return out, kept.to(call.query.dtype)
    inside = torch.arange(call.max_seqlen, device=call.query.device) < call.cu_seqlens.diff()[:, None]
    kept = (kept * inside[:, None, :, None]).to(call.query.dtype)
    return unpad(out, call.cu_seqlens, call.query.shape[0]), kept


def attention_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dquery, dkey, dvalue shaped as their tensors, and dbias in bias's shape; each empty where its flag in
    `needs` is False, and dbias without a bias.

    With p and its dropped copy p' = keep * p / (1 - dropout_p) as in forward:
    dvalue = p'^T dout, dp = keep * (dout v^T) / (1 - dropout_p), ds = p * (dp - sum_j(p * dp)),
    dquery = scale * ds k, dkey = scale * ds^T q, dbias = ds summed over the dimensions that bias broadcasts.
    """
    padded = _padded(call)
    q, k, v = wide(padded.query), *_seen(padded)  # [B, T, H, D]
    p, lse = _weights(q, k, padded)  # [B, H, Tq, Tk], [B, H, Tq]
    do = of_seen_rows(wide(padded.dout), lse)  # [B, Tq, H, D]
    kept = drop(p, call.dropout_p, call.seed, Tag.ATTENTION)
    dvalue = torch.einsum("bhij,bihd->bjhd", kept, do)
    dp = drop(torch.einsum("bihd,bjhd->bhij", do, v), call.dropout_p, call.seed, Tag.ATTENTION)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dquery = call.scale * torch.einsum("bhij,bjhd->bihd", ds, k)
    dkey = call.scale * torch.einsum("bhij,bihd->bjhd", ds, q)
    dbias = ds if call.bias is None else ds.sum_to_size(call.bias.shape)
    gradients = (dquery, dkey, dvalue, dbias)
    if call.cu_seqlens is not None:
        gradients = (*(unpad(x, call.cu_seqlens, call.query.shape[0]) for x in gradients[:3]), dbias)
    return gradients_in_order(gradients, (call.query, call.key, call.value, call.bias), call.needs)


def _padded(call: Any) -> Any:
    """A packed call as one of `[B, T, H, D]` with lengths; any other as it is."""
    if call.cu_seqlens is None:
        return call
    rows = ("query", "key", "value", *(("dout",) if hasattr(call, "dout") else ()))
    tensors = {name: pad(getattr(call, name), call.cu_seqlens, call.max_seqlen) for name in rows}
    return call._replace(**tensors, key_lengths=call.cu_seqlens.diff(), cu_seqlens=None, max_seqlen=0)


def _forward(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out, the weights after dropout in the wide dtype, and lse, of padded rows."""
    q, k, v = wide(call.query), *_seen(call)  # [B, T, H, D]
    p, lse = _weights(q, k, call)  # [B, H, Tq, Tk], [B, H, Tq]
    kept = drop(p, call.dropout_p, call.seed, Tag.ATTENTION)
    out = torch.einsum("bhij,bjhd->bihd", kept, v)
    return out.to(call.query.dtype).contiguous(), kept, lse


def _seen(call: Any) -> tuple[Tensor, Tensor]:
    """Keys and values in the wide dtype, zero where past their sequence's length or hidden from all by the mask."""
    present = None
    if call.key_lengths is not None:
        present = torch.arange(call.key.shape[1], device=call.key.device) < call.key_lengths[:, None]
    if call.attention_mask is not None:
        seen = call.attention_mask.any(2).any(1)  # [B or 1, Tk or 1]
        present = seen if present is None else present & seen
    return hide(wide(call.key), present), hide(wide(call.value), present)


def _weights(q: Tensor, k: Tensor, call: Any) -> tuple[Tensor, Tensor]:
    """Softmax weights `[B, H, Tq, Tk]`, zero in rows that may see nothing, and lse `[B, H, Tq]`."""
    s = torch.einsum("bihd,bjhd->bhij", q, k) * call.scale
    if call.bias is not None:
        s = s + call.bias
    i = torch.arange(s.shape[2], device=s.device)[:, None]
    j = torch.arange(s.shape[3], device=s.device)
    if call.key_lengths is not None:
        s = s.masked_fill(j >= call.key_lengths[:, None, None, None], -torch.inf)
    if call.attention_mask is not None:
        s = s.masked_fill(~call.attention_mask, -torch.inf)
    if call.causal:
        s = s.masked_fill(j > i + (s.shape[3] - s.shape[2]), -torch.inf)
    return softmax(s)
