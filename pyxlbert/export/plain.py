"""Our ops as operators that every runtime has, for inference: what a traced graph is made of in their place.

Each takes a call, the record of an op's forward arguments, as the definitions of `pyxlbert.reference` do. Those here
are for graphs that people look at and runtimes recognise: a LayerNorm is one node, not its formula. Statistics for a
backward pass are not computed. An op that is not listed is its definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyxlbert.backends import OPS
from pyxlbert.nn import UNSEEN_RANK
from pyxlbert.ops._define import Op
from pyxlbert.reference import relative_attention as relative_definition


def _norm(x: Tensor, call: Any) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], call.weight, call.bias, call.eps)


def layer_norm(call: Any) -> list[Tensor]:
    _inference("layer_norm", call.save)
    return [_norm(call.x, call)]


def dropout_add_layer_norm(call: Any) -> list[Tensor]:
    _inference("dropout_add_layer_norm", call.save or call.seed is not None or call.copy_dtype is not None)
    return [_norm(call.residual + (call.x if call.x_bias is None else call.x + call.x_bias), call)]


def embedding_layer_norm(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _inference("embedding_layer_norm", call.seed is not None or call.copy_dtype is not None)
    total = F.embedding(call.input_ids, call.word)  # [B, T, E]
    if call.token_type is not None:
        types = call.token_type[0] if call.token_type_ids is None else F.embedding(call.token_type_ids, call.token_type)
        total = total + types
    if call.position is not None:
        # The first rows of the table, as many as there are places; a look-up of given places otherwise.
        places = call.position_ids
        rows = call.position[: call.input_ids.shape[-1]] if places is None else F.embedding(places, call.position)
        total = total + rows
    nothing = total.new_empty(0)
    return _norm(total, call), nothing, nothing, nothing


def attention(call: Any) -> tuple[Tensor, Tensor]:
    """Softmax attention of ``[B, T, H, D]``; a row that may see nothing is zeros."""
    _inference("attention", call.seed is not None or call.cu_seqlens is not None or call.key_lengths is not None)
    _inference("attention", call.causal)
    query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))  # [B, H, T, D]
    scores = query @ key.transpose(2, 3) * call.scale  # [B, H, Tq, Tk]
    if call.bias is not None:
        scores = scores + call.bias
    return _mixed(scores, None if call.attention_mask is None else ~call.attention_mask, value)


def _mixed(scores: Tensor, hidden: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor]:
    """Values ``[B, H, Tk, D]`` by the softmax of scores ``[B, H, Tq, Tk]``, as ``[B, Tq, H, D]``."""
    if hidden is None:
        weights = scores.softmax(-1)
    else:
        # A row of -inf alone gives NaN, which the second fill makes zeros.
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
    return (weights @ value).transpose(1, 2).contiguous(), scores.new_empty(0)


def relative_attention(call: Any) -> tuple[Tensor, Tensor]:
    """XLNet's attention without memories, targets or windows; any other call is the op's definition."""
    _inference("relative_attention", call.seed is not None or call.cu_seqlens is not None)
    length = call.query.shape[1]
    beside = call.query_positions is not None or call.key_lengths is not None or call.causal or call.uniform_rows
    if beside or call.position_key.dim() == 4 or call.key.shape[1] != length or call.offset != length:
        return relative_definition.relative_attention_fwd(call)
    content, position, segment = (
        (call.query if bias is None else call.query + bias).transpose(1, 2)  # [B, H, T, D]
        for bias in (call.content_bias, call.position_bias, call.segment_bias)
    )
    key, value = call.key.transpose(1, 2), call.value.transpose(1, 2)  # [B, H, T, D]
    by_distance = position @ call.position_key.permute(1, 2, 0)  # [B, H, T, 2T], from distance T down
    batch, heads = by_distance.shape[:2]
    # Row i is to begin at distance i. Read in rows that are one shorter, the columns move by one from row to row.
    moved = by_distance.reshape(batch, heads, 2 * length, length)[:, :, 1:].reshape(batch, heads, length, -1)
    scores = content @ key.transpose(2, 3) + moved[..., :length]  # [B, H, T, T]
    if call.segment_embedding is not None and call.query_segments is not None:
        by_segment = segment @ call.segment_embedding.permute(1, 2, 0)  # [B, H, T, 2]
        differs = (call.query_segments[:, :, None] != call.key_segments[:, None, :])[:, None]  # [B, 1, T, T]
        scores = scores + torch.where(differs, by_segment[..., 1:], by_segment[..., :1])
    return _mixed(scores * call.scale, _hidden(call, length), value)


def _hidden(call: Any, length: int) -> Tensor | None:
    """Which keys a row may not see, ``[B, 1, T, T]``, or None where it sees all."""
    seen = call.attention_mask
    if call.query_rank is not None:
        ranked = call.query_rank[:, None, :, None] > call.key_rank[:, None, None, :]
        seen = ranked if seen is None else seen & ranked
    if seen is None:
        return None
    if call.see_self:
        places = torch.arange(length, device=call.query.device)
        seen = seen | (places[:, None] == places)
    if call.key_rank is not None:
        seen = seen & (call.key_rank != UNSEEN_RANK)[:, None, None]
    return ~seen


def _inference(op: str, trained: bool) -> None:
    """Refuses what a model in evaluation mode does not ask of an op."""
    if trained:
        raise ValueError(f"{op}: got a call for training or for packed rows in a graph for inference")


_PLAIN = {
    "layer_norm": layer_norm,
    "dropout_add_layer_norm": dropout_add_layer_norm,
    "embedding_layer_norm": embedding_layer_norm,
    "attention": attention,
    "relative_attention": relative_attention,
}


def decompositions() -> dict[Any, Callable[..., Any]]:
    """For `torch.export.ExportedProgram.run_decompositions`: what each of our ops is made of."""
    table = {}
    for name, op in OPS.items():
        if isinstance(op, Op) and "fwd" in op.records:
            function = _PLAIN.get(name) or getattr(op.module("torch"), f"{name}_fwd")
            table[getattr(torch.ops.pyxlbert, f"{name}_fwd").default] = _unpacked(function, op.records["fwd"])
    return table


def _unpacked(function: Callable[[Any], Any], record: Any) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        return function(record(*arguments))

    return run
