"""The grids of launches of extreme shapes, on tensors without memory: within what the hardware takes on each axis."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.testing.direct import Direct

LIMITS = (2**31 - 1, 65535, 65535)
F16, F32, I64 = torch.float16, torch.float32, torch.int64
configurations = importlib.import_module("pyxlbert.kernels._configurations")
KERNELS = Path(configurations.__file__).parent
MODULES = [importlib.import_module(f"pyxlbert.kernels.{path.stem}") for path in sorted(KERNELS.glob("*.py"))]


def meta(*shape: int, dtype: torch.dtype = F16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(op: Any, batch: int, queries: int, keys: int, heads: int, bias: tuple[int, ...] | None = None) -> None:
    q, k = meta(batch, queries, heads, 8), meta(batch, keys, heads, 8)
    given = {"query": q, "key": k, "value": k, "bias": None if bias is None else meta(*bias), "scale": 1.0}
    out, lse = op.attention_fwd(**given)
    op.attention_bwd(out, out, lse, **given, needs=[True] * 4)


def packed_attention(op: Any, batch: int, longest: int, heads: int) -> None:
    q, offsets = meta(batch * 2, heads, 8), meta(batch + 1, dtype=torch.int32)
    given = {"query": q, "key": q, "value": q, "cu_seqlens": offsets, "max_seqlen": longest, "scale": 1.0}
    out, lse = op.attention_fwd(**given)
    op.attention_bwd(out, out, lse, **given, needs=[True] * 4)


def relative_attention(op: Any, batch: int, length: int, heads: int, tables: int, positions: bool = False) -> None:
    q, table = meta(batch, length, heads, 8), meta(tables, 2 * length, heads, 8)
    given = {"query": q, "key": q, "value": q, "position_key": table, "offset": length, "scale": 1.0}
    if positions:
        given["query_positions"] = meta(batch, length, dtype=torch.int32)
    out, lse = op.relative_attention_fwd(**given)
    for atomics in (contextlib.nullcontext(), backends.allow_atomics()):
        with atomics:
            op.relative_attention_bwd(out, out, lse, **given, needs=[True] * 8)


def two_stream_attention(op: Any, batch: int, length: int, heads: int) -> None:
    q, table = meta(batch, length, heads, 8), meta(2 * length, heads, 8)
    rank, targets = meta(batch, length, dtype=torch.int32), meta(batch, 1, dtype=torch.int32)
    given = {"content_query": q, "query_query": q[:, :1], "key": q, "value": q, "position_key": table}
    given |= {"offset": length, "target_positions": targets, "query_rank": rank, "key_rank": rank, "scale": 1.0}
    content, lse, query, query_lse = op.two_stream_attention_fwd(**given)
    op.two_stream_attention_bwd(content, query, content, lse, query, query_lse, **given, needs=[True] * 9)


def layer_norm(op: Any, rows: int, columns: int) -> None:
    x, w = meta(rows, columns), meta(columns)
    _, mean, rstd = op.layer_norm_fwd(x, w, w, 1e-5, True)
    op.layer_norm_bwd(x, x, w, w, mean, rstd, True)


def bias_gelu(op: Any, rows: int, columns: int) -> None:
    x, bias = meta(rows, columns), meta(columns)
    op.bias_gelu_fwd(x, bias, "none")
    op.bias_gelu_bwd(x, x, bias, "none", True)


def dropout_add_layer_norm(op: Any, rows: int, columns: int) -> None:
    x, w, mean = meta(rows, columns), meta(columns), meta(rows, dtype=F32)
    op.dropout_add_layer_norm_fwd(x, x, w, w, w, 0.0, None, 1e-5, F16, True)
    op.dropout_add_layer_norm_bwd(x, x, x, w, w, w, mean, mean, 0.0, None, F16, True, True, True, True)


def embedding_layer_norm(op: Any, tokens: int, columns: int) -> None:
    ids, mean = meta(1, tokens, dtype=I64), meta(1, tokens, dtype=F32)
    word, w = meta(30000, columns), meta(columns)
    tables = (ids, word, word[:2], meta(tokens, columns), w, w, ids, None)
    op.embedding_layer_norm_fwd(*tables, 0.0, None, 1e-5, F16, None)
    op.embedding_layer_norm_bwd(meta(1, tokens, columns), *tables, mean, mean, 0.0, None, 0, True, True, True, True)


ROWS = ((2**30, 4), (2**24, 768), (1, 2**16), (2**20, 2**16))
CASES: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
    (attention, (5462, 128, 128, 12)),
    (attention, (5462, 1, 128, 12)),
    (attention, (2**20, 32, 32, 16)),
    (attention, (1, 2**24, 2**24, 16)),
    (attention, (5462, 16, 16, 12, (5462, 12, 16, 16))),
    (attention, (2, 2**15, 2**15, 16, (2, 16, 2**15, 2**15))),
    (packed_attention, (2**20, 512, 16)),
    (relative_attention, (5462, 128, 12, 1)),
    (relative_attention, (5462, 32, 12, 5462)),
    (relative_attention, (5462, 32, 12, 1, True)),
    (relative_attention, (1, 2**22, 16, 1)),
    (two_stream_attention, (5462, 128, 12)),
    *((op, shape) for op in (layer_norm, bias_gelu, dropout_add_layer_norm, embedding_layer_norm) for shape in ROWS),
]


@pytest.mark.parametrize(("call", "shape"), CASES, ids=[f"{call.__name__} {shape}" for call, shape in CASES])
def test_grids_of_extreme_shapes(call: Callable[..., None], shape: tuple[Any, ...], monkeypatch) -> None:
    """With the smallest tiles, which take the largest grids."""
    grids: dict[str, tuple[int, ...]] = {}

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
        name = kernel.__name__
        grids[name] = tuple(
            max(one, other) for one, other in zip((*grid, 1, 1), grids.get(name, (1, 1, 1)), strict=False)
        )

    def smallest(kernel: str, *_: Any) -> configurations.Tile:
        return configurations.Tile(16, 16, 4, 1, CARRY=True if kernel in configurations.CARRYING else None)

    for module in MODULES:
        for name, stand_in in (("launch", record), ("configuration", smallest)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    call(Direct("triton"), *shape)
    assert len(grids) >= 3
    for kernel, grid in grids.items():
        assert all(1 <= size <= most for size, most in zip(grid, LIMITS, strict=True)), (kernel, grid)
