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

from typing import Any

import torch
import triton
from torch import Tensor

from pyxlbert.launch.attention import lse_of, only_needed, ranks_of_mask

from ._attention import (
    broadcast_of,
    constants_of,
    grid_of,
    precision_of,
    rows_of,
    saved_of,
    sizes_of,
    statistics_of,
)
from ._attention_bwd import bwd_bias, bwd_keys, bwd_queries, bwd_rows
from ._attention_fwd import fwd
from ._attention_scores import BiasGradient, Call
from ._configurations import COMPILE_OPTIONS, configuration, refusal_of_heads
from ._launch import launch
from ._philox import dropout_of
from ._plan import kind_of, remember, run


def supports(*tensors: Tensor | None) -> str | None:
    """CUDA tensors in float32, bfloat16 and float16, with head sizes that fit into a tile."""
    return refusal_of_heads("attention_fwd", *tensors)


def attention_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """out, shaped as query, and lse `[B, H, Tq]` (packed: `[H, total]`) in float32."""
    query = call.query
    out, lse = torch.empty_like(query, memory_format=torch.contiguous_format), lse_of(query)
    if lse.numel() == 0:
        return out, lse
    device, precision = query.get_device(), precision_of(query.dtype)
    ranks = ranks_of_mask(call.attention_mask, call.key)
    tensors = (
        *(query, call.key, call.value, call.key_lengths, call.cu_seqlens, call.attention_mask, call.bias, call.seed),
        *(ranks, out, lse),
    )
    numbers = (call.max_seqlen, call.causal, call.scale, call.dropout_p, precision)
    kind = kind_of(device, tensors[:9], "attention", *numbers)
    if run(kind, device, tensors):
        return out, lse
    planes, given = _given(call, ranks)
    options = _options("attention_fwd", given, call.causal)
    grid = grid_of(given.sizes.queries, options["BLOCK_M"], planes)
    arguments = (given, rows_of(out), statistics_of(lse))
    compiled = launch(fwd, grid, query.device, *arguments, **options)
    remember(kind, tensors, fwd, compiled, grid, arguments, options)
    return out, lse


def attention_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dquery, dkey, dvalue shaped as their tensors, and dbias in bias's shape; each empty where its flag in
    `needs` is False, and dbias without a bias.
    """
    query = call.query
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, call.key, call.value))
    wanted = call.bias is not None and call.needs[3]
    dbias = torch.empty_like(call.bias, memory_format=torch.contiguous_format) if wanted else query.new_empty(0)
    if call.lse.numel() == 0 or call.key.numel() == 0:
        return only_needed((*(x.zero_() for x in gradients), dbias.zero_()), call.needs)
    planes, given = _given(call, ranks_of_mask(call.attention_mask, call.key))
    sizes, device = given.sizes, query.device
    saved = saved_of(call.lse.contiguous())
    dout = rows_of(call.dout)
    dquery, dkey, dvalue = (rows_of(x) for x in gradients)
    options = _options("attention_bwd_rows", given, call.causal)
    grid = grid_of(sizes.queries, options["BLOCK_M"], planes)
    launch(bwd_rows, grid, device, given, dout, rows_of(call.out), saved, **options)
    options = _options("attention_bwd_keys", given, call.causal)
    grid = grid_of(sizes.keys, options["BLOCK_N"], planes)
    launch(bwd_keys, grid, device, given, dout, saved, dkey, dvalue, **options)
    options = _options("attention_bwd_queries", given, call.causal)
    grid = grid_of(sizes.queries, options["BLOCK_M"], planes)
    launch(bwd_queries, grid, device, given, dout, saved, dquery, **options)
    if wanted:
        options = _options("attention_bwd_bias", given, call.causal)
        shape = dbias.shape
        across = triton.cdiv(shape[3], options["BLOCK_N"])
        grid = grid_of(shape[2], options["BLOCK_M"], shape[0] * shape[1] * across)
        gradient = BiasGradient(dbias, *shape, planes // sizes.heads)
        launch(bwd_bias, grid, device, given, dout, saved, gradient, **options)
    return only_needed((*gradients, dbias), call.needs)


def _given(call: Any, ranks: Tensor | None) -> tuple[int, Call]:
    """B * H, and a call, forward or backward, as the kernels take it."""
    batch, sizes = sizes_of(call, call.query)
    return batch * sizes.heads, Call(
        *(rows_of(x) for x in (call.query, call.key, call.value)),
        broadcast_of(call.attention_mask),
        ranks,
        broadcast_of(call.bias),
        sizes,
        call.scale,
        dropout_of(call.dropout_p, call.seed),
    )


def _options(kernel: str, given: Call, causal: bool) -> dict[str, Any]:
    """Compile-time constants, the tile, how it is compiled."""
    query = given.query.tensor
    extras = any(x is not None for x in (given.mask.tensor, given.bias.tensor, given.dropout.seed))
    return {
        "CAUSAL": causal,
        **constants_of(query.shape[-1], query.dtype),
        **COMPILE_OPTIONS,
        **configuration(kernel, query, extras).constants(),
    }
