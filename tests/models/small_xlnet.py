"""A small XLNet, a batch with padding and its orders and targets, which the tests of the model share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pyxlbert.nn.relative_attention as relative
from pyxlbert import models
from pyxlbert.models import (
    XLNetConfig,
    XLNetModel,
)
from pyxlbert.testing import compare

FLOAT32 = compare.tolerances.MODEL_FLOAT32
GRADIENT = compare.tolerances.MODEL_GRADIENT_FLOAT32
SMALL = {
    "vocab_size": 40,
    "d_model": 24,
    "n_layer": 2,
    "n_head": 3,
    "d_inner": 20,
    "initializer_range": 0.3,
    "dropout": 0.0,
    "summary_last_dropout": 0.0,
    "num_labels": 2,
    "start_n_top": 2,
    "end_n_top": 2,
}
HEADS = [name for name in models.__all__ if name.startswith("XLNet") and name != "XLNetConfig"]
IDS = torch.randint(1, 40, (4, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
REAL = MASK.bool()
POSITIONS = torch.tensor([[3, 6], [6, 5], [1, -1], [4, 3]])
MAPPING = torch.nn.functional.one_hot(POSITIONS.clamp(min=0), 7).float() * (POSITIONS >= 0)[..., None]
QUERY_RANK = torch.tensor([[2, 0, 5, 3, 1, 4, 6]]).expand(4, 7).int()
KEY_RANK = torch.tensor([[2, -1, 5, 3, -1, 4, 6]]).expand(4, 7).int()
PERM_MASK = (QUERY_RANK[:, :, None] <= KEY_RANK[:, None, :]).float()


def build(head: type = XLNetModel, **fields: Any) -> torch.nn.Module:
    torch.manual_seed(5)
    return head(XLNetConfig(**SMALL | fields)).eval()


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Calls:
    """The arguments of every call of the two ops."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, tuple, dict]] = []
        for name in ("relative_attention", "two_stream_attention"):
            monkeypatch.setattr(relative, name, self._counting(name, getattr(relative, name)))

    def _counting(self, name: str, real):
        def counting(*tensors, **options):
            self.made.append((name, tensors, options))
            return real(*tensors, **options)

        return counting

    def names(self) -> list[str]:
        return [name for name, _, _ in self.made]
