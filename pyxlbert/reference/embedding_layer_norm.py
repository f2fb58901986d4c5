"""embedding_layer_norm in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.reference.layer_norm import normalise, normalise_bwd
from pyxlbert.reference.philox import Tag, keep_rows


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def embedding_layer_norm_fwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y `[..., N]`; its copy in `copy_dtype` (empty without one); mean and rstd `[...]`."""
    total = _sum(call)
    y, mean, rstd = normalise(total, call.weight, call.bias, call.eps)
    if call.seed is not None:
        y = _drop(y, call.dropout_p, call.seed)
    copy = y.new_empty(0, dtype=call.out_dtype) if call.copy_dtype is None else y.to(call.copy_dtype)
    # A copy of y's own dtype would otherwise be y itself.
    y = y.to(call.out_dtype)
    return y, copy.clone() if copy is y else copy, mean, rstd


def embedding_layer_norm_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dword, dtoken_type, dposition, dweight, dbias; empty where one is not needed.

    With dx the gradient of the sum, each table's row receives the sum of dx over the tokens that took it; row
    `padding_idx` of the word table receives nothing (-1: no such row).
    """
    total = _sum(call)
    dy = call.dy.to(total.dtype)
    if call.seed is not None:
        dy = _drop(dy, call.dropout_p, call.seed)
    dx, dweight, dbias = normalise_bwd(dy, total, call.weight, call.bias, (call.mean, call.rstd), call.needs_parameters)
    n = call.word.shape[-1]
    flat = dx.reshape(dx.shape[:-1].numel(), n)

    def scatter(table: Tensor | None, needed: bool, index: Tensor | None, skip: int = -1) -> Tensor:
        if table is None or not needed:
            return call.word.new_empty(0)
        if index is None:
            index = torch.zeros_like(call.input_ids)
        index = index.expand(call.input_ids.shape).reshape(-1).long()
        dtable = torch.zeros(table.shape, dtype=flat.dtype, device=flat.device)
        keep = index != skip
        return dtable.index_add(0, index[keep], flat[keep]).to(table.dtype)

    places = _positions(call.input_ids, call.position_ids)
    return (
        scatter(call.word, call.needs_word, call.input_ids, call.padding_idx),
        scatter(call.token_type, call.needs_token_type, call.token_type_ids),
        scatter(call.position, call.needs_position, places),
        dweight,
        dbias,
    )


def _positions(input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device)
    return position_ids.expand(input_ids.shape)


def _sum(call: Any) -> Tensor:
    """word + position + token type, added in float32 (float64 for float64 tables)."""
    wide = torch.promote_types(call.word.dtype, torch.float32)
    total = call.word[call.input_ids.long()].to(wide)
    if call.position is not None:
        total = total + call.position[_positions(call.input_ids, call.position_ids).long()].to(wide)
    if call.token_type is not None:
        kind = torch.zeros_like(call.input_ids) if call.token_type_ids is None else call.token_type_ids
        total = total + call.token_type[kind.expand(call.input_ids.shape).long()].to(wide)
    return total


def _drop(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    n = x.shape[-1]
    keep = keep_rows(seed, dropout_p, x.numel() // n if n else 0, n, Tag.EMBEDDING_LAYER_NORM).view(x.shape)
    return torch.where(keep, x / (1 - dropout_p), 0.0) if dropout_p < 1 else torch.zeros_like(x)
