"""attention in Triton: the running softmax forward, and backward from lse alone.

    forward, a program per (BLOCK_M queries, head):     keys  j0 --> BLOCK_N at a time
                                                 q [M, D]  s = q k^T  [M, N]  ->  p  ->  acc += p v  [M, D]
    dkey and dvalue, a program per (BLOCK_N keys, head), walk the queries; dquery, a program per (BLOCK_M queries,
    head), walks the keys again, so that nothing is added up by two programs.  dbias has a program per tile of the
    bias, which walks everything that the bias is broadcast over.

Tiles past a sequence's length or above the diagonal are not visited, those that a mask empties are left after a look at
the mask, and only those on an edge are masked.

Source: Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyxlbert.launch.rows import int32

from ._configurations import COMPILE_OPTIONS, configuration, refusal_of_heads
from ._launch import launch
from ._philox import ATTENTION, dropout_numbers
from ._plan import kind_of, remember, run
from ._scores import (
    INFINITY,
    LN2,
    Broadcast,
    Rows,
    block_and_plane,
    broadcast_of,
    exp,
    grid_of,
    kept,
    load_rows,
    load_scores,
    precision_of,
    rows_of,
    sequence,
    some_allowed,
    store_rows,
    strides_of_statistics,
)


def supports(*tensors: Tensor | None) -> str | None:
    """CUDA tensors in float32, bfloat16 and float16, with head sizes that fit into a tile."""
    return refusal_of_heads("attention_fwd", *tensors)


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
    """out, shaped as query, and lse `[B, H, Tq]` (packed: `[H, total]`) in float32."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    *first, rows, heads, _ = query.shape
    lse = torch.empty((*first, heads, rows), dtype=torch.float32, device=query.device)
    if lse.numel() == 0:
        return out, lse
    device, precision = query.get_device(), precision_of(query.dtype)
    tensors = (query, key, value, key_lengths, cu_seqlens, attention_mask, bias, seed, out, lse)
    kind = kind_of(device, tensors[:8], "attention", max_seqlen, causal, scale, dropout_p, precision)
    if run(kind, device, tensors):
        return out, lse
    call = _Call.of(
        query, key, value, key_lengths, cu_seqlens, max_seqlen, attention_mask, bias, causal, scale, dropout_p, seed
    )
    tile = configuration("attention_fwd", query, call.extras)
    grid = grid_of(call.queries, tile.BLOCK_M, call.planes)
    arguments = (*call.arguments(), *rows_of(out), lse, *strides_of_statistics(lse))
    options = call.options(tile)
    compiled = launch(_fwd, grid, query.device, *arguments, **options)
    remember(kind, tensors, _fwd, compiled, grid, arguments, options)
    return out, lse


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
    """dquery, dkey, dvalue shaped as their tensors, and dbias in bias's shape (empty unless `needs_bias`)."""
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    wanted = bias is not None and needs_bias
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if wanted else query.new_empty(0)
    if lse.numel() == 0 or key.numel() == 0:
        return *(x.zero_() for x in gradients), dbias.zero_()
    call = _Call.of(
        query, key, value, key_lengths, cu_seqlens, max_seqlen, attention_mask, bias, causal, scale, dropout_p, seed
    )
    lse = lse.contiguous()
    delta, rest = torch.empty_like(lse), torch.empty_like(lse)
    saved = (*call.arguments(), *rows_of(dout), lse, delta, rest, *strides_of_statistics(lse))
    tile = configuration("attention_bwd_rows", query, call.extras)
    launch(
        _bwd_rows,
        grid_of(call.queries, tile.BLOCK_M, call.planes),
        query.device,
        *(*saved, *rows_of(out)),
        **call.options(tile),
    )
    dquery, dkey, dvalue = (rows_of(x) for x in gradients)
    tile = configuration("attention_bwd_keys", query, call.extras)
    launch(
        _bwd_keys,
        grid_of(call.keys, tile.BLOCK_N, call.planes),
        query.device,
        *(*saved, *dkey, *dvalue),
        **call.options(tile),
    )
    tile = configuration("attention_bwd_queries", query, call.extras)
    launch(
        _bwd_queries,
        grid_of(call.queries, tile.BLOCK_M, call.planes),
        query.device,
        *(*saved, *dquery),
        **call.options(tile),
    )
    if wanted:
        tile = configuration("attention_bwd_bias", query, call.extras)
        shape = dbias.shape
        across = triton.cdiv(shape[3], tile.BLOCK_N)
        launch(
            _bwd_bias,
            (shape[0] * shape[1] * triton.cdiv(shape[2], tile.BLOCK_M) * across,),
            query.device,
            *(*saved, dbias, *shape, call.planes // heads_of(query), across),
            **call.options(tile),
        )
    return *gradients, dbias


def heads_of(query: Tensor) -> int:
    """H of `[B, T, H, D]` or `[total, H, D]`."""
    return query.shape[-2]


class _Call(NamedTuple):
    """One call, as the kernels take it."""

    query: Rows
    key: Rows
    value: Rows
    key_lengths: Tensor | None
    cu_seqlens: Tensor | None
    mask: Broadcast
    bias: Broadcast
    heads: int
    queries: int  # of a sequence; packed: at most
    keys: int
    total: int
    planes: int  # B·H
    causal: bool
    scale: float
    dropout_p: float
    seed: Tensor | None

    @classmethod
    def of(
        cls,
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
    ) -> _Call:
        heads = heads_of(query)
        if cu_seqlens is None:
            batch, queries, keys, total = query.shape[0], query.shape[1], key.shape[1], 0
        else:
            batch, queries, keys, total = cu_seqlens.shape[0] - 1, max_seqlen, max_seqlen, query.shape[0]
        return cls(
            *(rows_of(x) for x in (query, key, value)),
            int32(key_lengths),
            int32(cu_seqlens),
            broadcast_of(attention_mask),
            broadcast_of(bias),
            heads,
            queries,
            keys,
            total,
            batch * heads,
            causal,
            scale,
            dropout_p,
            None if dropout_p == 0.0 else seed,
        )

    def arguments(self) -> tuple[Any, ...]:
        """What every kernel begins with."""
        return (
            *(*self.query, *self.key, *self.value),
            *(self.key_lengths, self.cu_seqlens),
            *(self.mask.tensor, *self.mask.strides, self.bias.tensor, *self.bias.strides),
            *(self.heads, self.queries, self.keys, self.total, self.scale),
            *(self.seed, *dropout_numbers(self.dropout_p)),
        )

    @property
    def extras(self) -> bool:
        """Whether a tile of scores needs more than its products."""
        return self.mask.tensor is not None or self.bias.tensor is not None or self.seed is not None

    def options(self, tile: Any) -> dict[str, Any]:
        """Compile-time constants and how many threads share a tile."""
        head_size = self.query.tensor.shape[-1]
        return {
            "CAUSAL": self.causal,
            "PRECISION": precision_of(self.query.tensor.dtype),
            "D": head_size,
            "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
            **COMPILE_OPTIONS,
            **tile.constants(),
        }


@triton.jit
def _masked(
    s,
    i,
    j,
    queries,
    keys,
    shift,
    mask,
    mask_i,
    mask_j,
    bias,
    bias_i,
    bias_j,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Scores s with the bias, -inf where i may not attend j; without EDGE all keys of the tile are there."""
    if bias is not None:
        s += load_scores(bias, i, j, queries, keys, bias_i, bias_j).to(tl.float32)
    if mask is not None:
        s = tl.where(load_scores(mask, i, j, queries, keys, mask_i, mask_j) != 0, s, -INFINITY)
    if EDGE:
        s = tl.where(j < keys, s, -INFINITY)
        if CAUSAL:
            s = tl.where(j <= i + shift, s, -INFINITY)
    return s


@triton.jit
def _walk(
    acc,
    weight,
    top,
    q,
    key,
    key_t,
    value,
    value_t,
    first_i,
    low,
    high,
    queries,
    keys,
    shift,
    scale,
    mask,
    mask_i,
    mask_j,
    bias,
    bias_i,
    bias_j,
    seed,
    threshold,
    plane,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The running softmax over keys low .. high - 1: acc, the sum of weights and the largest score of each row."""
    i = first_i + tl.arange(0, BLOCK_M)[:, None]
    for first_j in range(low, high, BLOCK_N):
        j = first_j + tl.arange(0, BLOCK_N)[None, :]
        live = True
        if mask is not None:
            live = some_allowed(mask, i, j, queries, keys, mask_i, mask_j)
        if live:
            k = load_rows(key, first_j, keys, key_t, BLOCK_N, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            s = _masked(s, i, j, queries, keys, shift, mask, mask_i, mask_j, bias, bias_i, bias_j, CAUSAL, EDGE)
            above = tl.maximum(top, tl.max(s, 1))
            # A row that has seen nothing yet stays at -inf, from which nothing may be subtracted.
            level = tl.where(above == -INFINITY, 0.0, above)
            p = exp(s - level[:, None])
            less = exp(top - level)
            weight = weight * less + tl.sum(p, 1)
            if seed is not None:
                p = tl.where(kept(seed, first_i, first_j, plane, threshold, ATTENTION, BLOCK_M, BLOCK_N), p, 0.0)
            v = load_rows(value, first_j, keys, value_t, BLOCK_N, D, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc * less[:, None], input_precision=PRECISION)
            top = above
    return acc, weight, top


@triton.jit
def _fwd(
    query,
    query_b,
    query_t,
    query_h,
    key,
    key_b,
    key_t,
    key_h,
    value,
    value_b,
    value_t,
    value_h,
    key_lengths,
    cu_seqlens,
    mask,
    mask_b,
    mask_h,
    mask_i,
    mask_j,
    bias,
    bias_b,
    bias_h,
    bias_i,
    bias_j,
    heads,
    queries,
    keys,
    total,
    scale,
    seed,
    threshold,
    keep_scale,
    out,
    out_b,
    out_t,
    out_h,
    lse,
    lse_b,
    lse_h,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, plane = block_and_plane(queries, BLOCK_M)
    b = (plane // heads).to(tl.int64)
    h = (plane % heads).to(tl.int64)
    first_i = block * BLOCK_M
    shift = keys - queries
    start, queries, keys, wrong = sequence(cu_seqlens, key_lengths, b, queries, keys, total, queries)
    if first_i < queries:
        q = load_rows(
            query + b * query_b + start * query_t + h * query_h, first_i, queries, query_t, BLOCK_M, D, BLOCK_D
        )
        key += b * key_b + start * key_t + h * key_h
        value += b * value_b + start * value_t + h * value_h
        if mask is not None:
            mask += b * mask_b + h * mask_h
        if bias is not None:
            bias += b * bias_b + h * bias_h
        # Whole tiles first, then those on an edge: the end of the keys, or the diagonal.
        high = keys
        whole = keys // BLOCK_N * BLOCK_N
        if CAUSAL:
            high = tl.minimum(keys, tl.maximum(first_i + BLOCK_M + shift, 0))
            whole = tl.minimum(whole, tl.maximum(first_i + 1 + shift, 0) // BLOCK_N * BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        top = tl.full((BLOCK_M,), -INFINITY, tl.float32)
        acc, weight, top = _walk(
            acc, weight, top, q, key, key_t, value, value_t, first_i, 0, whole, queries, keys, shift, scale,
            mask, mask_i, mask_j, bias, bias_i, bias_j, seed, threshold, plane,
            CAUSAL, False, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        acc, weight, top = _walk(
            acc, weight, top, q, key, key_t, value, value_t, first_i, whole, high, queries, keys, shift, scale,
            mask, mask_i, mask_j, bias, bias_i, bias_j, seed, threshold, plane,
            CAUSAL, True, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        some = weight > 0
        result = tl.where(some[:, None], acc * (keep_scale / tl.where(some, weight, 1.0))[:, None], 0.0)
        statistic = tl.where(some, top + tl.log2(tl.where(some, weight, 1.0)) * LN2, INFINITY)
        if (key_lengths is not None) or (cu_seqlens is not None):
            result = tl.where(wrong, float("nan"), result)
        # A NaN among the scores is one in the weights.
        result = tl.where((weight != weight)[:, None], weight[:, None], result)
        statistic = tl.where(weight != weight, weight, statistic)
        store_rows(out + b * out_b + start * out_t + h * out_h, result, first_i, queries, out_t, BLOCK_M, D, BLOCK_D)
        i = first_i + tl.arange(0, BLOCK_M)
        tl.store(lse + b * lse_b + h * lse_h + start + i, statistic, mask=i < queries)


@triton.jit
def _bwd_rows(
    query,
    query_b,
    query_t,
    query_h,
    key,
    key_b,
    key_t,
    key_h,
    value,
    value_b,
    value_t,
    value_h,
    key_lengths,
    cu_seqlens,
    mask,
    mask_b,
    mask_h,
    mask_i,
    mask_j,
    bias,
    bias_b,
    bias_h,
    bias_i,
    bias_j,
    heads,
    queries,
    keys,
    total,
    scale,
    seed,
    threshold,
    keep_scale,
    dout,
    dout_b,
    dout_t,
    dout_h,
    lse,
    delta,
    rest,
    lse_b,
    lse_h,
    out,
    out_b,
    out_t,
    out_h,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What backward needs of every row first: delta, the sum of dout * out, and rest, how far lse is off.

    exp(s - lse) has the rounding of lse in it, which grows with |lse| and at the end swallows the number of keys (a row
    whose scores are finfo.min throughout): of such rows the weights are summed again, and the logarithm of their sum is
    what is left to subtract.  A row that sees nothing takes no dout, which may be anything there.
    """
    block, plane = block_and_plane(queries, BLOCK_M)
    b = (plane // heads).to(tl.int64)
    h = (plane % heads).to(tl.int64)
    first_i = block * BLOCK_M
    shift = keys - queries
    start, queries, keys, _wrong = sequence(cu_seqlens, key_lengths, b, queries, keys, total, queries)
    if first_i < queries:
        i = first_i + tl.arange(0, BLOCK_M)
        place = b * lse_b + h * lse_h + start + i
        statistic = tl.load(lse + place, mask=i < queries, other=INFINITY)
        seen = statistic != INFINITY
        dout += b * dout_b + start * dout_t + h * dout_h
        out += b * out_b + start * out_t + h * out_h
        do = load_rows(dout, first_i, queries, dout_t, BLOCK_M, D, BLOCK_D).to(tl.float32)
        result = load_rows(out, first_i, queries, out_t, BLOCK_M, D, BLOCK_D).to(tl.float32)
        tl.store(delta + place, tl.sum(tl.where(seen[:, None], do * result, 0.0), 1), mask=i < queries)
        sum = tl.full((BLOCK_M,), 1.0, tl.float32)
        inexact = seen & (tl.abs(statistic) >= 64.0)
        if tl.max(inexact.to(tl.int32), 0) > 0:
            sum = tl.zeros((BLOCK_M,), tl.float32)
            key += b * key_b + start * key_t + h * key_h
            if mask is not None:
                mask += b * mask_b + h * mask_h
            if bias is not None:
                bias += b * bias_b + h * bias_h
            query += b * query_b + start * query_t + h * query_h
            q = load_rows(query, first_i, queries, query_t, BLOCK_M, D, BLOCK_D)
            high = keys
            if CAUSAL:
                high = tl.minimum(keys, tl.maximum(first_i + BLOCK_M + shift, 0))
            for first_j in range(0, high, BLOCK_N):
                j = first_j + tl.arange(0, BLOCK_N)
                live = True
                if mask is not None:
                    live = some_allowed(mask, i[:, None], j[None, :], queries, keys, mask_i, mask_j)
                if live:
                    k = load_rows(key, first_j, keys, key_t, BLOCK_N, D, BLOCK_D)
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                    s = _masked(
                        s, i[:, None], j[None, :], queries, keys, shift,
                        mask, mask_i, mask_j, bias, bias_i, bias_j, CAUSAL, True,
                    )  # fmt: skip
                    sum += tl.sum(exp(s - statistic[:, None]), 1)
        tl.store(rest + place, tl.where(inexact, tl.log2(tl.where(inexact, sum, 1.0)) * LN2, 0.0), mask=i < queries)


@triton.jit
def _bwd_keys(
    query,
    query_b,
    query_t,
    query_h,
    key,
    key_b,
    key_t,
    key_h,
    value,
    value_b,
    value_t,
    value_h,
    key_lengths,
    cu_seqlens,
    mask,
    mask_b,
    mask_h,
    mask_i,
    mask_j,
    bias,
    bias_b,
    bias_h,
    bias_i,
    bias_j,
    heads,
    queries,
    keys,
    total,
    scale,
    seed,
    threshold,
    keep_scale,
    dout,
    dout_b,
    dout_t,
    dout_h,
    lse,
    delta,
    rest,
    lse_b,
    lse_h,
    dkey,
    dkey_b,
    dkey_t,
    dkey_h,
    dvalue,
    dvalue_b,
    dvalue_t,
    dvalue_h,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dkey and dvalue of BLOCK_N keys.  Tiles are transposed, `[BLOCK_N, BLOCK_M]`, so that both products take them."""
    block, plane = block_and_plane(keys, BLOCK_N)
    b = (plane // heads).to(tl.int64)
    h = (plane % heads).to(tl.int64)
    first_j = block * BLOCK_N
    shift = keys - queries
    extent = keys
    start, queries, keys, _wrong = sequence(cu_seqlens, key_lengths, b, queries, keys, total, queries)
    if cu_seqlens is not None:
        extent = keys
    if first_j < extent:
        query += b * query_b + start * query_t + h * query_h
        dout += b * dout_b + start * dout_t + h * dout_h
        lse += b * lse_b + h * lse_h + start
        delta += b * lse_b + h * lse_h + start
        rest += b * lse_b + h * lse_h + start
        if mask is not None:
            mask += b * mask_b + h * mask_h
        if bias is not None:
            bias += b * bias_b + h * bias_h
        k = load_rows(key + b * key_b + start * key_t + h * key_h, first_j, keys, key_t, BLOCK_N, D, BLOCK_D)
        v = load_rows(value + b * value_b + start * value_t + h * value_h, first_j, keys, value_t, BLOCK_N, D, BLOCK_D)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        j = first_j + tl.arange(0, BLOCK_N)[:, None]
        low = 0
        if CAUSAL:
            low = tl.maximum(first_j - shift, 0) // BLOCK_M * BLOCK_M
        high = tl.where(first_j < keys, queries, 0)
        for first_i in range(low, high, BLOCK_M):
            i = first_i + tl.arange(0, BLOCK_M)
            live = True
            if mask is not None:
                live = some_allowed(mask, i[None, :], j, queries, keys, mask_i, mask_j)
            if live:
                statistic = tl.load(lse + i, mask=i < queries, other=INFINITY)
                product = tl.load(delta + i, mask=i < queries, other=0.0)
                more = tl.load(rest + i, mask=i < queries, other=0.0)
                q = load_rows(query, first_i, queries, query_t, BLOCK_M, D, BLOCK_D)
                do = load_rows(dout, first_i, queries, dout_t, BLOCK_M, D, BLOCK_D)
                do = tl.where((statistic != INFINITY)[:, None], do, 0.0).to(q.dtype)
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
                s = _masked(
                    s, i[None, :], j, queries, keys, shift, mask, mask_i, mask_j, bias, bias_i, bias_j, CAUSAL, True
                )
                p = exp((s - statistic[None, :]) - more[None, :])
                dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                dropped = p
                if seed is not None:
                    keep = tl.trans(kept(seed, first_i, first_j, plane, threshold, ATTENTION, BLOCK_M, BLOCK_N))
                    dropped = tl.where(keep, p * keep_scale, 0.0)
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
                ds = p * (dp - product[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        dk *= scale
        dkey += b * dkey_b + start * dkey_t + h * dkey_h
        dvalue += b * dvalue_b + start * dvalue_t + h * dvalue_h
        store_rows(dkey, dk, first_j, extent, dkey_t, BLOCK_N, D, BLOCK_D)
        store_rows(dvalue, dv, first_j, extent, dvalue_t, BLOCK_N, D, BLOCK_D)


@triton.jit
def _bwd_queries(
    query,
    query_b,
    query_t,
    query_h,
    key,
    key_b,
    key_t,
    key_h,
    value,
    value_b,
    value_t,
    value_h,
    key_lengths,
    cu_seqlens,
    mask,
    mask_b,
    mask_h,
    mask_i,
    mask_j,
    bias,
    bias_b,
    bias_h,
    bias_i,
    bias_j,
    heads,
    queries,
    keys,
    total,
    scale,
    seed,
    threshold,
    keep_scale,
    dout,
    dout_b,
    dout_t,
    dout_h,
    lse,
    delta,
    rest,
    lse_b,
    lse_h,
    dquery,
    dquery_b,
    dquery_t,
    dquery_h,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dquery of BLOCK_M queries."""
    block, plane = block_and_plane(queries, BLOCK_M)
    b = (plane // heads).to(tl.int64)
    h = (plane % heads).to(tl.int64)
    first_i = block * BLOCK_M
    shift = keys - queries
    start, queries, keys, _wrong = sequence(cu_seqlens, key_lengths, b, queries, keys, total, queries)
    if first_i < queries:
        key += b * key_b + start * key_t + h * key_h
        value += b * value_b + start * value_t + h * value_h
        if mask is not None:
            mask += b * mask_b + h * mask_h
        if bias is not None:
            bias += b * bias_b + h * bias_h
        i = first_i + tl.arange(0, BLOCK_M)
        statistic = tl.load(lse + b * lse_b + h * lse_h + start + i, mask=i < queries, other=INFINITY)
        product = tl.load(delta + b * lse_b + h * lse_h + start + i, mask=i < queries, other=0.0)
        more = tl.load(rest + b * lse_b + h * lse_h + start + i, mask=i < queries, other=0.0)
        query += b * query_b + start * query_t + h * query_h
        dout += b * dout_b + start * dout_t + h * dout_h
        q = load_rows(query, first_i, queries, query_t, BLOCK_M, D, BLOCK_D)
        do = load_rows(dout, first_i, queries, dout_t, BLOCK_M, D, BLOCK_D)
        do = tl.where((statistic != INFINITY)[:, None], do, 0.0).to(q.dtype)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        high = keys
        if CAUSAL:
            high = tl.minimum(keys, tl.maximum(first_i + BLOCK_M + shift, 0))
        for first_j in range(0, high, BLOCK_N):
            j = first_j + tl.arange(0, BLOCK_N)
            live = True
            if mask is not None:
                live = some_allowed(mask, i[:, None], j[None, :], queries, keys, mask_i, mask_j)
            if live:
                k = load_rows(key, first_j, keys, key_t, BLOCK_N, D, BLOCK_D)
                v = load_rows(value, first_j, keys, value_t, BLOCK_N, D, BLOCK_D)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                s = _masked(
                    s, i[:, None], j[None, :], queries, keys, shift,
                    mask, mask_i, mask_j, bias, bias_i, bias_j, CAUSAL, True,
                )  # fmt: skip
                p = exp((s - statistic[:, None]) - more[:, None])
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                if seed is not None:
                    keep = kept(seed, first_i, first_j, plane, threshold, ATTENTION, BLOCK_M, BLOCK_N)
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                ds = p * (dp - product[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        dquery += b * dquery_b + start * dquery_t + h * dquery_h
        store_rows(dquery, dq * scale, first_i, queries, dquery_t, BLOCK_M, D, BLOCK_D)


@triton.jit
def _bwd_bias(
    query,
    query_b,
    query_t,
    query_h,
    key,
    key_b,
    key_t,
    key_h,
    value,
    value_b,
    value_t,
    value_h,
    key_lengths,
    cu_seqlens,
    mask,
    mask_b,
    mask_h,
    mask_i,
    mask_j,
    bias,
    bias_b,
    bias_h,
    bias_i,
    bias_j,
    heads,
    queries,
    keys,
    total,
    scale,
    seed,
    threshold,
    keep_scale,
    dout,
    dout_b,
    dout_t,
    dout_h,
    lse,
    delta,
    rest,
    lse_b,
    lse_h,
    dbias,
    size_b,
    size_h,
    size_i,
    size_j,
    batch,
    across,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of dbias: the tiles of ds that it was added to, over sequences, heads, queries and keys, one by one."""
    at_j = tl.program_id(0) % across * BLOCK_N
    down = tl.cdiv(size_i, BLOCK_M)
    at_i = tl.program_id(0) // across % down * BLOCK_M
    at_plane = tl.program_id(0) // (across * down)
    at_b = at_plane // size_h
    at_h = at_plane % size_h
    shift = keys - queries
    # How many of each there are to add up: 1 where the bias has that dimension.
    sequences = tl.where(size_b == batch, 1, batch)
    planes = tl.where(size_h == heads, 1, heads)
    tiles_i = tl.where(size_i == queries, 1, tl.cdiv(queries, BLOCK_M))
    tiles_j = tl.where(size_j == keys, 1, tl.cdiv(keys, BLOCK_N))
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, sequences * planes * tiles_i * tiles_j):
        first_j = at_j + step % tiles_j * BLOCK_N
        left = step // tiles_j
        first_i = at_i + left % tiles_i * BLOCK_M
        left = left // tiles_i
        head = at_h + left % planes
        number = at_b + left // planes
        plane = number * heads + head
        h = tl.cast(head, tl.int64)
        b = tl.cast(number, tl.int64)
        _start, rows, length, _wrong = sequence(cu_seqlens, key_lengths, b, queries, keys, total, queries)
        i = first_i + tl.arange(0, BLOCK_M)
        j = first_j + tl.arange(0, BLOCK_N)
        live = True
        mask_here = mask
        if mask is not None:
            mask_here = mask + (b * mask_b + h * mask_h)
            live = some_allowed(mask_here, i[:, None], j[None, :], rows, length, mask_i, mask_j)
        if live:
            statistic = tl.load(lse + b * lse_b + h * lse_h + i, mask=i < rows, other=INFINITY)
            product = tl.load(delta + b * lse_b + h * lse_h + i, mask=i < rows, other=0.0)
            more = tl.load(rest + b * lse_b + h * lse_h + i, mask=i < rows, other=0.0)
            q = load_rows(query + b * query_b + h * query_h, first_i, rows, query_t, BLOCK_M, D, BLOCK_D)
            do = load_rows(dout + b * dout_b + h * dout_h, first_i, rows, dout_t, BLOCK_M, D, BLOCK_D)
            do = tl.where((statistic != INFINITY)[:, None], do, 0.0).to(q.dtype)
            k = load_rows(key + b * key_b + h * key_h, first_j, length, key_t, BLOCK_N, D, BLOCK_D)
            v = load_rows(value + b * value_b + h * value_h, first_j, length, value_t, BLOCK_N, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            s = _masked(
                s, i[:, None], j[None, :], rows, length, shift,
                mask_here, mask_i, mask_j, bias + (b * bias_b + h * bias_h), bias_i, bias_j, CAUSAL, True,
            )  # fmt: skip
            p = exp((s - statistic[:, None]) - more[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if seed is not None:
                keep = kept(seed, first_i, first_j, plane, threshold, ATTENTION, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            sum += p * (dp - product[:, None])
    i = at_i + tl.arange(0, BLOCK_M)
    j = at_j + tl.arange(0, BLOCK_N)
    base = dbias + ((at_b * size_h + at_h).to(tl.int64) * size_i) * size_j
    # A dimension of one gets the sum of all tiles' rows or columns, and the other is stored as it is.
    one_row = tl.sum(sum, 0)[None, :]
    one_column = tl.sum(sum, 1)[:, None]
    both = tl.sum(one_row, 1)[:, None]
    if (size_i == queries) & (size_j == keys):
        place = base + i[:, None].to(tl.int64) * size_j + j[None, :]
        tl.store(place, sum.to(dbias.dtype.element_ty), mask=(i < size_i)[:, None] & (j < size_j)[None, :])
    elif size_j == keys:
        tl.store(base + j[None, :], one_row.to(dbias.dtype.element_ty), mask=(j < size_j)[None, :])
    elif size_i == queries:
        tl.store(base + i[:, None].to(tl.int64), one_column.to(dbias.dtype.element_ty), mask=(i < size_i)[:, None])
    else:
        one = tl.zeros((1, 1), tl.int32)
        tl.store(base + one, both.to(dbias.dtype.element_ty))
