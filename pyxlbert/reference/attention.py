"""attention in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert.reference._scores import drop, hide, of_seen_rows, pad, softmax, unpad, wide
from pyxlbert.reference.philox import Tag


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out, shaped as query, and lse `[B, H, Tq]` (packed: `[H, total]`) in float32, or float64 for float64 input.

    With s = scale * q k^T + bias, masked scores -inf: p = softmax(s), out = dropout(p) v, lse = log(sum(exp(s))).
    A row without a single allowed key has p = 0, out = 0 and lse = +inf.
    """
    if cu_seqlens is not None:
        q, k, v = (pad(x, cu_seqlens, max_seqlen) for x in (query, key, value))
        lengths = cu_seqlens.diff()
        out, lse = attention_fwd(q, k, v, lengths, None, 0, None, None, causal, scale, dropout_p, seed)
        return unpad(out, cu_seqlens, query.shape[0]), unpad(
            lse.transpose(1, 2), cu_seqlens, query.shape[0]
        ).t().contiguous()
    out, _, lse = _forward(query, key, value, key_lengths, attention_mask, bias, causal, scale, dropout_p, seed)
    return out, lse


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out as in `attention_fwd`, and dropout(p) `[B, H, Tq, Tk]` in query's dtype; autograd differentiates both.

    Of packed rows Tq and Tk are max_seqlen, with zeros behind every sequence.
    """
    if cu_seqlens is None:
        out, kept, _ = _forward(query, key, value, key_lengths, attention_mask, bias, causal, scale, dropout_p, seed)
        return out, kept.to(query.dtype)
    lengths = cu_seqlens.diff()
    q, k, v = (pad(x, cu_seqlens, max_seqlen) for x in (query, key, value))
    out, kept, _ = _forward(q, k, v, lengths, None, None, causal, scale, dropout_p, seed)
    inside = torch.arange(max_seqlen, device=query.device) < lengths[:, None]
    return unpad(out, cu_seqlens, query.shape[0]), (kept * inside[:, None, :, None]).to(query.dtype)


def attention_bwd(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dquery, dkey, dvalue shaped as their tensors, and dbias in bias's shape (empty unless `needs_bias`).

    With p and its dropped copy p' = keep * p / (1 - dropout_p) as in forward:
    dvalue = p'^T dout, dp = keep * (dout v^T) / (1 - dropout_p), ds = p * (dp - sum_j(p * dp)),
    dquery = scale * ds k, dkey = scale * ds^T q, dbias = ds summed over the dimensions that bias broadcasts.
    """
    if cu_seqlens is not None:
        do, q, k, v = (pad(x, cu_seqlens, max_seqlen) for x in (dout, query, key, value))
        lengths = cu_seqlens.diff()
        *gradients, dbias = attention_bwd(
            do, q, k, v, out, lse, lengths, None, 0, None, None, causal, scale, dropout_p, seed, False
        )
        dquery, dkey, dvalue = (unpad(x, cu_seqlens, query.shape[0]) for x in gradients)
        return dquery, dkey, dvalue, dbias
    q, k, v = wide(query), *_seen(key, value, key_lengths)
    p, lse = _weights(q, k, key_lengths, attention_mask, bias, causal, scale)
    do = of_seen_rows(wide(dout), lse)
    kept = drop(p, dropout_p, seed, Tag.ATTENTION)
    dvalue = torch.einsum("bhij,bihd->bjhd", kept, do)
    dp = drop(torch.einsum("bihd,bjhd->bhij", do, v), dropout_p, seed, Tag.ATTENTION)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dquery = scale * torch.einsum("bhij,bjhd->bihd", ds, k)
    dkey = scale * torch.einsum("bhij,bihd->bjhd", ds, q)
    wanted = bias is not None and needs_bias
    dbias = ds.sum_to_size(bias.shape).to(bias.dtype) if wanted else query.new_empty(0)
    return (
        dquery.to(query.dtype).contiguous(),
        dkey.to(key.dtype).contiguous(),
        dvalue.to(value.dtype).contiguous(),
        dbias.contiguous(),
    )


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    attention_mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, the weights after dropout in the wide dtype, and lse, of padded rows."""
    q, k, v = wide(query), *_seen(key, value, key_lengths)
    p, lse = _weights(q, k, key_lengths, attention_mask, bias, causal, scale)
    kept = drop(p, dropout_p, seed, Tag.ATTENTION)
    out = torch.einsum("bhij,bjhd->bihd", kept, v)
    return out.to(query.dtype).contiguous(), kept, lse


def _seen(key: Tensor, value: Tensor, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values in the wide dtype, those past their sequence's length zero."""
    present = None
    if key_lengths is not None:
        present = torch.arange(key.shape[1], device=key.device) < key_lengths[:, None]
    return hide(wide(key), present), hide(wide(value), present)


def _weights(
    q: Tensor,
    k: Tensor,
    key_lengths: Tensor | None,
    attention_mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax weights `[B, H, Tq, Tk]`, zero in rows that may see nothing, and lse `[B, H, Tq]`."""
    s = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if bias is not None:
        s = s + bias
    i = torch.arange(s.shape[2], device=s.device)[:, None]
    j = torch.arange(s.shape[3], device=s.device)
    if key_lengths is not None:
        s = s.masked_fill(j >= key_lengths[:, None, None, None], -torch.inf)
    if attention_mask is not None:
        s = s.masked_fill(~attention_mask, -torch.inf)
    if causal:
        s = s.masked_fill(j > i + (s.shape[3] - s.shape[2]), -torch.inf)
    return softmax(s)
