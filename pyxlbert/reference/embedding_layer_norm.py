"""embedding_layer_norm in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert.reference.layer_norm import layer_norm_bwd, layer_norm_fwd
from pyxlbert.reference.philox import Tag, keep_rows


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def embedding_layer_norm_fwd(
    input_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y `[..., N]`; its copy in `copy_dtype` (empty without one); mean and rstd `[...]`."""
    total = _sum(input_ids, word, token_type, position, token_type_ids, position_ids)
    y, mean, rstd = layer_norm_fwd(total, weight, bias, eps, True)
    if seed is not None:
        y = _drop(y, dropout_p, seed)
    copy = y.new_empty(0, dtype=out_dtype) if copy_dtype is None else y.to(copy_dtype)
    # A copy of y's own dtype would otherwise be y itself.
    y = y.to(out_dtype)
    return y, copy.clone() if copy is y else copy, mean, rstd


def embedding_layer_norm_bwd(
    dy: Tensor,
    input_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    padding_idx: int,
    needs_word: bool,
    needs_token_type: bool,
    needs_position: bool,
    needs_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dword, dtoken_type, dposition, dweight, dbias; empty where one is not needed.

    With dx the gradient of the sum, each table's row receives the sum of dx over the tokens that took it; row
    `padding_idx` of the word table receives nothing (-1: no such row).
    """
    total = _sum(input_ids, word, token_type, position, token_type_ids, position_ids)
    dy = dy.to(total.dtype)
    if seed is not None:
        dy = _drop(dy, dropout_p, seed)
    dx, dweight, dbias = layer_norm_bwd(dy, total, weight, bias, mean, rstd, needs_parameters)
    n = word.shape[-1]
    flat = dx.reshape(-1, n)

    def scatter(table: Tensor | None, needed: bool, index: Tensor | None, skip: int = -1) -> Tensor:
        if table is None or not needed:
            return word.new_empty(0)
        if index is None:
            index = torch.zeros_like(input_ids)
        index = index.expand(input_ids.shape).reshape(-1).long()
        dtable = torch.zeros(table.shape, dtype=flat.dtype, device=flat.device)
        keep = index != skip
        return dtable.index_add(0, index[keep], flat[keep]).to(table.dtype)

    places = _positions(input_ids, position_ids)
    return (
        scatter(word, needs_word, input_ids, padding_idx),
        scatter(token_type, needs_token_type, token_type_ids),
        scatter(position, needs_position, places),
        dweight,
        dbias,
    )


def _positions(input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device)
    return position_ids.expand(input_ids.shape)


def _sum(
    input_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """word + position + token type, added in float32 (float64 for float64 tables)."""
    wide = torch.promote_types(word.dtype, torch.float32)
    total = word[input_ids.long()].to(wide)
    if position is not None:
        total = total + position[_positions(input_ids, position_ids).long()].to(wide)
    if token_type is not None:
        kind = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        total = total + token_type[kind.expand(input_ids.shape).long()].to(wide)
    return total


def _drop(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    n = x.shape[-1]
    keep = keep_rows(seed, dropout_p, x.numel() // n if n else 0, n, Tag.EMBEDDING_LAYER_NORM).view(x.shape)
    return torch.where(keep, x / (1 - dropout_p), 0.0) if dropout_p < 1 else torch.zeros_like(x)
