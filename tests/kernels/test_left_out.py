"""What the Triton kernels leave out: gradients that nobody needs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import pyxlbert
from pyxlbert.testing import compare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
attention = importlib.import_module("pyxlbert.kernels.attention")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(
    ("needed", "launched"),
    [
        ("q", ["bwd_rows", "bwd_queries"]),
        ("k", ["bwd_rows", "bwd_keys"]),
        ("v", ["bwd_rows", "bwd_keys"]),
        ("b", ["bwd_rows", "bwd_bias"]),
        ("qkv", ["bwd_rows", "bwd_keys", "bwd_queries"]),
    ],
)
def test_attention_leaves_out_gradients_that_nobody_needs(needed: str, launched: list[str], monkeypatch) -> None:
    """What is needed has the same bits."""
    given = {name: randn(1, 20, 1, 16, seed=i) for i, name in enumerate("qkv")} | {"b": randn(1, 1, 20, 20, seed=4)}

    def gradients(wanted: str) -> dict[str, Tensor]:
        leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in given.items()}
        out = pyxlbert.attention(*(leaves[name] for name in "qkv"), bias=leaves["b"], backend="triton")
        found = torch.autograd.grad(out.square().sum(), [leaves[name] for name in wanted])
        return dict(zip(wanted, found, strict=True))

    everything = gradients("qkvb")
    seen, launch = [], attention.launch

    def watched(kernel: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(kernel.__name__)
        return launch(kernel, *arguments, **options)

    monkeypatch.setattr(attention, "launch", watched)
    found = gradients(needed)
    assert seen == ["fwd", *launched]
    for name, gradient in found.items():
        compare.same_bits(name, gradient, everything[name])
