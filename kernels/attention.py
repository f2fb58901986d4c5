"""attention in Triton: the running softmax forward, and backward from lse alone.

    forward, a program per (BLOCK_M queries, head):     keys  j0 --> BLOCK_N at a time
                                                 q [M, D]  s = q k^T  [M, N]  ->  p  ->  acc += p v  [M, D]
    dkey and dvalue, a program per (BLOCK_N keys, head), walk the queries; dquery, a program per (BLOCK_M queries,
    head), walks the keys again, so that nothing is added up by two programs.  dbias has a program per tile of the
    bias, which walks everything that the bias is broadcast over.  Few queries share out long keys, see _parts.py.

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
    coded,
    constants_of,
    decoded,
    grid_of,
    padded,
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
from ._parts import join_parts, partial_of
from ._philox import dropout_of
from ._plan import Launch, kind_of, remember, run


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
    partial = partial_of(given.sizes, planes, query)
    parts = 1 if partial is None else decoded(partial.parts)
    grid = grid_of(decoded(given.sizes.queries), options["BLOCK_M"], planes * parts)
    results = rows_of(out), statistics_of(lse)
    arguments = (given, *results, partial)
    compiled = launch(fwd, grid, query.device, *arguments, **options)
    launched = Launch(fwd, compiled, grid, arguments, options)
    if partial is None:
        remember(kind, tensors, launched)
    else:
        joined = join_parts(partial, given.sizes, *results, given.dropout.keep_scale)
        remember(kind, tensors, launched, joined, scratch=(partial.acc, partial.weight, partial.top))
    return out, lse


def attention_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dquery, dkey, dvalue shaped as their tensors, and dbias in bias's shape; each empty where its flag in
    `needs` is False, and dbias without a bias.
    """
    query = call.query
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, call.key, call.value))
    for_query, for_keys = call.needs[0], call.needs[1] or call.needs[2]
    wanted = call.bias is not None and call.needs[3]
    dbias = torch.empty_like(call.bias, memory_format=torch.contiguous_format) if wanted else query.new_empty(0)
    if not (for_query or for_keys or wanted):
        return only_needed((*gradients, dbias), call.needs)
    if call.lse.numel() == 0 or call.key.numel() == 0:
        return only_needed((*(x.zero_() for x in gradients), dbias.zero_()), call.needs)
    planes, given = _given(call, ranks_of_mask(call.attention_mask, call.key))
    sizes, device = given.sizes, query.device
    lse = call.lse.contiguous()
    saved = saved_of(lse, sizes)
    dout = rows_of(call.dout)
    dquery, dkey, dvalue = (rows_of(x) for x in gradients)
    options = _options("attention_bwd_rows", given, call.causal)
    grid = grid_of(padded(decoded(sizes.queries)), options["BLOCK_M"], planes)
    launch(bwd_rows, grid, device, given, dout, rows_of(call.out), statistics_of(lse), saved, **options)
    # Rows that see nothing; one of a sequence without keys is in no tile.
    empty = given.mask.tensor is not None or given.bias.tensor is not None
    empty = empty or (call.causal and decoded(sizes.queries) > decoded(sizes.keys))
    if for_keys:
        options = _options("attention_bwd_keys", given, call.causal, EMPTY=empty)
        grid = grid_of(decoded(sizes.keys), options["BLOCK_N"], planes)
        launch(bwd_keys, grid, device, given, dout, saved, dkey, dvalue, **options)
    if for_query:
        options = _options("attention_bwd_queries", given, call.causal, EMPTY=empty)
        grid = grid_of(decoded(sizes.queries), options["BLOCK_M"], planes)
        launch(bwd_queries, grid, device, given, dout, saved, dquery, **options)
    if wanted:
        options = _options("attention_bwd_bias", given, call.causal, EMPTY=empty)
        shape = dbias.shape
        across = triton.cdiv(shape[3], options["BLOCK_N"])
        grid = grid_of(shape[2], options["BLOCK_M"], shape[0] * shape[1] * across)
        gradient = BiasGradient(dbias, *map(coded, shape[:3]), shape[3], coded(planes // sizes.heads))
        launch(bwd_bias, grid, device, given, dout, saved, gradient, **options)
    return only_needed((*gradients, dbias), call.needs)


def _given(call: Any, ranks: Tensor | None) -> tuple[int, Call]:
    """B * H, and a call, forward or backward, as the kernels take it."""
    masked = call.attention_mask is not None or call.bias is not None
    batch, sizes = sizes_of(call, call.query, call.key.shape[-3] if masked else None)
    return batch * sizes.heads, Call(
        *(rows_of(x) for x in (call.query, call.key, call.value)),
        broadcast_of(call.attention_mask),
        ranks,
        broadcast_of(call.bias),
        sizes,
        call.scale,
        dropout_of(call.dropout_p, call.seed),
    )


def _options(kernel: str, given: Call, causal: bool, **constants: bool) -> dict[str, Any]:
    """Compile-time constants, those of this kernel alone too, the tile, how it is compiled."""
    query = given.query.tensor
    extras = any(x is not None for x in (given.mask.tensor, given.bias.tensor, given.dropout.seed))
    return {
        "CAUSAL": causal,
        **constants,
        **constants_of(query.shape[-1], query.dtype),
        **COMPILE_OPTIONS,
        **configuration(kernel, query, extras).constants(),
    }
