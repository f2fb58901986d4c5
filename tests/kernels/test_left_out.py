"""What the Triton kernels leave out: gradients that nobody needs, and a look at rows where none can see nothing."""

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


# Of whose rows some see nothing: a mask, a bias of -inf, fewer keys than queries before the diagonal, no keys at all.
EMPTY_ROWS: dict[str, tuple[int, dict[str, Any]]] = {
    "mask": (20, {"attention_mask": (torch.arange(20, device=DEVICE) > 3)[:, None].expand(1, 1, 20, 20)}),
    "bias": (20, {"bias": torch.where(torch.arange(20, device=DEVICE) > 3, 0.0, -torch.inf)[None, None, :, None]}),
    "causal": (12, {"causal": True}),
    "lengths": (20, {"key_lengths": torch.tensor([20, 0], device=DEVICE)}),
    "lengths, causal": (20, {"key_lengths": torch.tensor([20, 0], device=DEVICE), "causal": True}),
    "ranks": (20, {"query_rank": torch.arange(20, device=DEVICE).int().expand(2, 20) - 4}),
    "places": (
        20,
        {"query_positions": (torch.arange(20, device=DEVICE).int() - 4).clamp(min=-1).repeat(2, 1), "offset": 20},
    ),
}


@pytest.mark.parametrize("kind", EMPTY_ROWS)
def test_gradients_of_rows_that_see_nothing_may_be_anything(kind: str) -> None:
    """NaN there is nowhere in the results: kernels that take dout as it is must know that there is no such row."""
    keys, given = EMPTY_ROWS[kind]
    given = dict(given)
    if kind == "ranks":
        given["key_rank"] = torch.zeros(2, keys, dtype=torch.int32, device=DEVICE)
    functions = [pyxlbert.attention] if kind not in ("ranks", "places") else []
    if kind != "bias":
        functions.append(pyxlbert.relative_attention)
    for function in functions:
        leaves = [randn(2, rows, 1, 16, seed=i).requires_grad_() for i, rows in enumerate((20, keys, keys))]
        if function is pyxlbert.relative_attention:
            leaves.append(randn(60, 1, 16, seed=3).requires_grad_())
            given.setdefault("offset", 20)
        out = function(*leaves, **given, backend="triton")
        empty = (out == 0).all(-1, keepdim=True)
        assert 0 < empty.sum() < empty.numel()
        zeros = randn(*out.shape, seed=4).masked_fill(empty, 0.0)
        wanted = torch.autograd.grad(out, leaves, zeros, retain_graph=True)
        found = torch.autograd.grad(out, leaves, zeros.masked_fill(empty, torch.nan))
        for name, ours, other in zip(("query", "key", "value", "table"), found, wanted, strict=False):
            compare.same_bits(f"{function.__name__} {name}", ours, other)
