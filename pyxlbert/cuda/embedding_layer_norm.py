"""embedding_layer_norm through the CUDA kernels: tensors to addresses, tokens sorted by the row they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.cuda._launch import dtype_of, launch, partial_sums, parts_of, refusal_of_rows
from pyxlbert.launch.rows import DTYPE, address, row_statistics, rows

supports = refusal_of_rows


def embedding_layer_norm_fwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.embedding_layer_norm.embedding_layer_norm_fwd`."""
    columns, device = call.word.shape[-1], call.word.device
    shape = (*call.input_ids.shape, columns)
    y = torch.empty(shape, dtype=call.out_dtype, device=device)
    copied = call.copy_dtype is not None
    copy = torch.empty(shape if copied else (0,), dtype=call.copy_dtype or call.out_dtype, device=device)
    mean, rstd = row_statistics(y)
    if y.numel() == 0:
        return y, copy, mean.zero_(), rstd.zero_()
    tables, _keep = _tables(call)
    weight, bias = call.weight.contiguous(), call.bias.contiguous()
    launch(
        "embedding_layer_norm_fwd",
        device,
        *(tables, weight.data_ptr(), DTYPE[weight.dtype], bias.data_ptr(), DTYPE[bias.dtype]),
        *(y.data_ptr(), address(copy if copied else None), mean.data_ptr(), rstd.data_ptr()),
        *(address(call.seed), call.dropout_p, call.eps, DTYPE[y.dtype], dtype_of(copy)),
    )
    return y, copy, mean, rstd


def embedding_layer_norm_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.embedding_layer_norm.embedding_layer_norm_bwd`."""
    columns, device = call.word.shape[-1], call.word.device
    dweight, dbias = (one.new_empty(columns if call.needs_parameters else 0) for one in (call.weight, call.bias))
    dx = torch.empty(call.mean.numel(), columns, dtype=torch.float32, device=device)
    if dx.numel() == 0:
        dweight.zero_()
        dbias.zero_()
    else:
        gradient, stride = rows(call.dy)
        weight = call.weight.contiguous()
        parts, each = parts_of(call.mean.numel())
        partial = partial_sums(2, parts, columns, device) if call.needs_parameters else None
        tables, _keep = _tables(call)
        launch(
            "embedding_layer_norm_bwd",
            device,
            *(tables, gradient.data_ptr(), stride, DTYPE[gradient.dtype], weight.data_ptr(), DTYPE[weight.dtype]),
            *(call.mean.data_ptr(), call.rstd.data_ptr(), dx.data_ptr(), address(partial)),
            *(
                dweight.data_ptr(),
                dbias.data_ptr(),
                DTYPE[call.bias.dtype],
                address(call.seed),
                call.dropout_p,
                parts,
                each,
            ),
        )

    def scatter(table: Tensor | None, needed: bool, index: Tensor | None, skip: int = -1) -> Tensor:
        if table is None or not needed:
            return call.word.new_empty(0)
        dtable = torch.zeros(table.shape, dtype=table.dtype, device=device)
        if dx.numel() > 0:
            if index is None:
                index = torch.zeros_like(call.input_ids)
            _scatter(dx, _flat(index, call.input_ids), dtable, skip)
        return dtable

    places = call.position_ids
    if places is None and call.needs_position:
        places = torch.arange(call.input_ids.shape[-1], device=device)
    return (
        scatter(call.word, call.needs_word, call.input_ids, call.padding_idx),
        scatter(call.token_type, call.needs_token_type, call.token_type_ids),
        scatter(call.position, call.needs_position, places),
        dweight,
        dbias,
    )


def _flat(ids: Tensor, like: Tensor) -> Tensor:
    return ids.expand(like.shape).reshape(-1).contiguous()


def _tables(call: Any) -> tuple[Any, list[Tensor]]:
    """The native description of the tables and their indices, and the tensors that must live as long as it does."""
    keep: list[Tensor] = []

    def one(table: Tensor | None, ids: Tensor | None) -> tuple[int, int, int, bool]:
        if table is None:
            return 0, 0, 0, False
        table = table.contiguous()
        index = None if ids is None else _flat(ids, call.input_ids)
        keep.extend(x for x in (table, index) if x is not None)
        return table.data_ptr(), table.shape[0], address(index), index is not None and index.dtype is torch.int64

    tables = backends.cuda_kernels.EmbeddingTables(
        *one(call.word, call.input_ids),
        *one(call.token_type, call.token_type_ids),
        *one(call.position, call.position_ids),
        *(call.input_ids.shape[-1], call.input_ids.numel(), call.word.shape[-1], DTYPE[call.word.dtype]),
    )
    return tables, keep


def _scatter(dx: Tensor, index: Tensor, dtable: Tensor, skip: int) -> None:
    """dtable[index[m]] += dx[m], rows of one index in their order; not for row `skip` or outside of the table."""
    count, columns = dx.shape
    order = index.argsort(stable=True)
    chunks = -(-count // backends.cuda_kernels.CHUNK)
    shares = partial_sums(2, chunks, columns, dx.device)
    launch(
        "scatter",
        dx.device,
        *(dx.data_ptr(), index.data_ptr(), index.dtype is torch.int64, order.data_ptr()),
        *(dtable.data_ptr(), shares.data_ptr(), count, columns, dtable.shape[0], skip, DTYPE[dtable.dtype]),
    )
