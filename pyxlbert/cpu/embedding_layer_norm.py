"""embedding_layer_norm through the native module: tensors to addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.cpu._tensors import refusal, row_statistics
from pyxlbert.launch.rows import DTYPE, rows


def supports(*tensors: Tensor | None) -> str | None:
    """CPU tensors in float32, bfloat16 and float16."""
    return refusal(*tensors)


def embedding_layer_norm_fwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.embedding_layer_norm.embedding_layer_norm_fwd`."""
    n = call.word.shape[-1]
    shape = (*call.input_ids.shape, n)
    y = torch.empty(shape, dtype=call.out_dtype)
    copy = torch.empty(shape if call.copy_dtype is not None else (0,), dtype=call.copy_dtype or call.out_dtype)
    mean, rstd = row_statistics(y)
    if y.numel() == 0:
        return y, copy, mean.zero_(), rstd.zero_()
    tables = _Tables(call)
    weight, bias = call.weight.contiguous(), call.bias.contiguous()
    _C.cpu.embedding_layer_norm_fwd(
        *tables.addresses,
        weight.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        copy.data_ptr() if call.copy_dtype is not None else 0,
        mean.data_ptr(),
        rstd.data_ptr(),
        mean.numel(),
        n,
        call.eps,
        call.dropout_p,
        0 if call.seed is None else call.seed.item(),
        DTYPE[call.word.dtype],
        DTYPE[weight.dtype],
        DTYPE[bias.dtype],
        DTYPE[call.out_dtype],
        DTYPE[copy.dtype],
        torch.get_num_threads(),
    )
    return y, copy, mean, rstd


def embedding_layer_norm_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.embedding_layer_norm.embedding_layer_norm_bwd`."""
    n, threads = call.word.shape[-1], torch.get_num_threads()
    size = n if call.needs_parameters else 0
    dweight, dbias = call.weight.new_empty(size), call.bias.new_empty(size)
    dx = torch.empty(call.mean.numel(), n, dtype=torch.float32)
    tables = _Tables(call)
    if dx.numel() == 0:
        dweight.zero_()
        dbias.zero_()
    else:
        gradient, stride = rows(call.dy)
        weight = call.weight.contiguous()
        _C.cpu.embedding_layer_norm_bwd(
            gradient.data_ptr(),
            stride,
            *tables.addresses,
            weight.data_ptr(),
            call.mean.data_ptr(),
            call.rstd.data_ptr(),
            dx.data_ptr(),
            dweight.data_ptr() if call.needs_parameters else 0,
            dbias.data_ptr() if call.needs_parameters else 0,
            call.mean.numel(),
            n,
            call.dropout_p,
            0 if call.seed is None else call.seed.item(),
            DTYPE[call.word.dtype],
            DTYPE[weight.dtype],
            DTYPE[call.bias.dtype],
            DTYPE[call.dy.dtype],
            threads,
        )

    def scatter(table: Tensor | None, needed: bool, index: Tensor, skip: int = -1) -> Tensor:
        if table is None or not needed:
            return call.word.new_empty(0)
        dtable = torch.zeros(table.shape, dtype=table.dtype)
        if dx.numel() > 0:
            order = index.argsort(stable=True)
            addresses = (dx.data_ptr(), index.data_ptr(), order.data_ptr(), dtable.data_ptr())
            _C.cpu.embedding_scatter(*addresses, *dx.shape, skip, DTYPE[table.dtype], threads)
        return dtable

    return (
        scatter(call.word, call.needs_word, tables.word_index, call.padding_idx),
        scatter(call.token_type, call.needs_token_type, tables.token_type_index),
        scatter(call.position, call.needs_position, tables.position_index_given()),
        dweight,
        dbias,
    )


class _Tables:
    """The tables as `_C` takes them, each with its index as contiguous int64 [M]; keeps what it made alive."""

    def __init__(self, call: Any) -> None:
        self.input_ids = call.input_ids
        self.word, self.word_index = call.word.contiguous(), _flat(call.input_ids, call.input_ids)
        self.position = call.position.contiguous() if call.position is not None else None
        self.position_index = _flat(call.position_ids, call.input_ids) if call.position_ids is not None else None
        self.token_type = call.token_type.contiguous() if call.token_type is not None else None
        if call.token_type_ids is None:
            self.token_type_index = torch.zeros_like(self.word_index)
        else:
            self.token_type_index = _flat(call.token_type_ids, call.input_ids)

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
