"""Inputs of relative attention, which its tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyxlbert import relative_attention
from pyxlbert.backends import OPS

BACKENDS = list(OPS["relative_attention"].backends)
UNSEEN_RANK = 2**31 - 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(
    batch: int = 2,
    rows: int = 5,
    keys: int | None = None,
    heads: int = 2,
    head_size: int = 8,
    *,
    table: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """query, key, value, a table with c = Tq (its leading sizes are `table`), every bias; all require gradients."""
    keys = rows if keys is None else keys
    shapes = {
        "query": (batch, rows, heads, head_size),
        "key": (batch, keys, heads, head_size),
        "value": (batch, keys, heads, head_size),
        "position_key": (*((rows + keys,) if table is None else table), heads, head_size),
        "content_bias": (heads, head_size),
        "position_bias": (heads, head_size),
    }
    draw = generator(1)
    return {name: torch.randn(shape, generator=draw).to(dtype).requires_grad_() for name, shape in shapes.items()}


def segments(batch: int, rows: int, keys: int, heads: int, head_size: int, dtype: torch.dtype) -> dict[str, Any]:
    draw = generator(2)
    return {
        "segment_bias": torch.randn(heads, head_size, generator=draw).to(dtype).requires_grad_(),
        "segment_embedding": torch.randn(2, heads, head_size, generator=draw).to(dtype).requires_grad_(),
        "query_segments": torch.randint(0, 2, (batch, rows), generator=draw),
        "key_segments": torch.randint(0, 2, (batch, keys), generator=draw),
    }


def trained(arguments: dict[str, Any]) -> list[torch.Tensor]:
    return [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]


def lse_of(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **options: Any) -> torch.Tensor:
    """What the op saves beside its output."""
    module = __import__("pyxlbert.ops.relative_attention", fromlist=["_fwd"])
    kept, forward = [], module._fwd

    def keep(*values: Any) -> Any:
        kept.append(forward(*values))
        return kept[-1]

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "_fwd", keep)
        relative_attention(**arguments, **options)
    return kept[0][1]
