"""embedding_layer_norm through the native module: tensors to addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._tensors import DTYPE, refusal, row_statistics
from pyxlbert.launch.rows import rows


def supports(*tensors: Tensor | None) -> str | None:
    """CPU tensors in float32, bfloat16 and float16."""
    return refusal(*tensors)


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
    """See `pyxlbert.reference.embedding_layer_norm.embedding_layer_norm_fwd`."""
    n = word.shape[-1]
    shape = (*input_ids.shape, n)
    y = torch.empty(shape, dtype=out_dtype)
    copy = torch.empty(shape if copy_dtype is not None else (0,), dtype=copy_dtype or out_dtype)
    mean, rstd = row_statistics(y)
    if y.numel() == 0:
        return y, copy, mean.zero_(), rstd.zero_()
    tables = _Tables(input_ids, word, token_type, position, token_type_ids, position_ids)
    weight, bias = weight.contiguous(), bias.contiguous()
    _C.cpu.embedding_layer_norm_fwd(
        *tables.addresses,
        weight.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        copy.data_ptr() if copy_dtype is not None else 0,
        mean.data_ptr(),
        rstd.data_ptr(),
        mean.numel(),
        n,
        eps,
        dropout_p,
        0 if seed is None else seed.item(),
        DTYPE[word.dtype],
        DTYPE[weight.dtype],
        DTYPE[bias.dtype],
        DTYPE[out_dtype],
        DTYPE[copy.dtype],
        torch.get_num_threads(),
    )
    return y, copy, mean, rstd


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
    """See `pyxlbert.reference.embedding_layer_norm.embedding_layer_norm_bwd`."""
    n, threads = word.shape[-1], torch.get_num_threads()
    size = n if needs_parameters else 0
    dweight, dbias = weight.new_empty(size), bias.new_empty(size)
    dx = torch.empty(mean.numel(), n, dtype=torch.float32)
    tables = _Tables(input_ids, word, token_type, position, token_type_ids, position_ids)
    if dx.numel() == 0:
        dweight.zero_()
        dbias.zero_()
    else:
        gradient, stride = rows(dy)
        weight = weight.contiguous()
        _C.cpu.embedding_layer_norm_bwd(
            gradient.data_ptr(),
            stride,
            *tables.addresses,
            weight.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            dx.data_ptr(),
            dweight.data_ptr() if needs_parameters else 0,
            dbias.data_ptr() if needs_parameters else 0,
            mean.numel(),
            n,
            dropout_p,
            0 if seed is None else seed.item(),
            DTYPE[word.dtype],
            DTYPE[weight.dtype],
            DTYPE[bias.dtype],
            DTYPE[dy.dtype],
            threads,
        )

    def scatter(table: Tensor | None, needed: bool, index: Tensor, skip: int = -1) -> Tensor:
        if table is None or not needed:
            return word.new_empty(0)
        dtable = torch.zeros(table.shape, dtype=table.dtype)
        if dx.numel() > 0:
            order = index.argsort(stable=True)
            addresses = (dx.data_ptr(), index.data_ptr(), order.data_ptr(), dtable.data_ptr())
            _C.cpu.embedding_scatter(*addresses, *dx.shape, skip, DTYPE[table.dtype], threads)
        return dtable

    return (
        scatter(word, needs_word, tables.word_index, padding_idx),
        scatter(token_type, needs_token_type, tables.token_type_index),
        scatter(position, needs_position, tables.position_index_given()),
        dweight,
        dbias,
    )


class _Tables:
    """The tables as `_C` takes them, each with its index as contiguous int64 [M]; keeps what it made alive."""

    def __init__(
        self,
        input_ids: Tensor,
        word: Tensor,
        token_type: Tensor | None,
        position: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
    ) -> None:
        self.input_ids = input_ids
        self.word, self.word_index = word.contiguous(), _flat(input_ids, input_ids)
        self.position = position.contiguous() if position is not None else None
        self.position_index = _flat(position_ids, input_ids) if position_ids is not None else None
        self.token_type = token_type.contiguous() if token_type is not None else None
        if token_type_ids is None:
            self.token_type_index = torch.zeros_like(self.word_index)
        else:
            self.token_type_index = _flat(token_type_ids, input_ids)

    @property
    def addresses(self) -> tuple[int, ...]:
        return (
            self.word.data_ptr(),
            self.word_index.data_ptr(),
            0 if self.position is None else self.position.data_ptr(),
            0 if self.position_index is None else self.position_index.data_ptr(),
            self.input_ids.shape[-1],
            0 if self.token_type is None else self.token_type.data_ptr(),
            self.token_type_index.data_ptr(),
        )

    def position_index_given(self) -> Tensor:
        """The positions as numbers, also where the kernel counts them itself."""
        if self.position_index is None:
            return _flat(torch.arange(self.input_ids.shape[-1]), self.input_ids)
        return self.position_index


def _flat(ids: Tensor, like: Tensor) -> Tensor:
    return ids.to(torch.int64).expand(like.shape).reshape(-1).contiguous()
