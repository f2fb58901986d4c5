"""Scores so large that a rounding of one of them is larger than any exponent: backward stays finite and right.

Forward's log of a sum is such a score, and backward adds its products in another order.  One key outweighs all others
then, so the weights are a one and zeros: out is its value, dvalue the sum of the rows that look at it, and the other
gradients are 0 but for the rounding of dout . out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from relative_inputs import BACKENDS

from pyxlbert import attention, relative_attention, two_stream_attention

Call = Callable[[dict[str, torch.Tensor], str], torch.Tensor]


def relative(t: dict[str, torch.Tensor], backend: str, **options: Any) -> torch.Tensor:
    biases = {name: t[name] for name in ("content_bias", "position_bias")}
    return relative_attention(t["query"], t["key"], t["value"], t["table"], **biases, backend=backend, **options)


def two_stream(t: dict[str, torch.Tensor], backend: str) -> torch.Tensor:
    biases = {name: t[name] for name in ("content_bias", "position_bias")}
    both = two_stream_attention(t["query"], t["query"], t["key"], t["value"], t["table"], **biases, backend=backend)
    return torch.stack(both[:2])


CALLS: dict[str, Call] = {
    "attention": lambda t, backend: attention(t["query"], t["key"], t["value"], backend=backend),
    "causal": lambda t, backend: attention(t["query"], t["key"], t["value"], causal=True, backend=backend),
    "negative scale": lambda t, backend: attention(t["query"], t["key"], t["value"], scale=-0.5, backend=backend),
    "bias": lambda t, backend: attention(t["query"], t["key"], t["value"], bias=t["bias"], backend=backend),
    "relative": relative,
    "two streams": two_stream,
}


def tensors(rows: int, magnitude: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`magnitude` is about the size of a score before its scale."""
    draw = torch.Generator().manual_seed(rows)
    shape, size = (1, rows, 2, 32), (magnitude / 32**0.5) ** 0.5
    large = {name: shape for name in ("query", "key")} | {"table": (2 * rows, 2, 32)}
    large |= {"content_bias": (2, 32), "position_bias": (2, 32)}
    found = {name: torch.randn(one, generator=draw) * size for name, one in large.items()}
    found["value"] = torch.randn(shape, generator=draw)
    found = {name: x.to(dtype) for name, x in found.items()}
    return found | {"bias": torch.randn(1, 1, rows, rows, generator=draw) * magnitude}


def gradients(call: Call, given: dict[str, torch.Tensor], backend: str) -> dict[str, torch.Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    out = call(leaves, backend)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)
    return {"out": out.detach()} | {name: x for name, x in zip(leaves, found, strict=True) if x is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_finite_and_right(backend: str, name: str, dtype: torch.dtype) -> None:
    for rows in (40, 300) if backend == "cpu" else (40,):
        for magnitude in (1e10, 1e30):
            given = tensors(rows, magnitude, dtype)
            found = gradients(CALLS[name], given, backend)
            truth = gradients(CALLS[name], {key: x.double() for key, x in given.items()}, "torch")
            assert found.keys() == truth.keys()
            for key, x in found.items():
                where = f"{rows} rows, scores of {magnitude:g}: {key}"
                assert x.isfinite().all(), where
                if key in ("out", "value"):
                    if dtype is not torch.float32 and "content_bias" in found:
                        # The rounding of query + bias may make another key the largest.
                        continue
                    worst = (x.double() - truth[key]).abs().max().item()
                    assert worst <= (1e-5 if dtype is torch.float32 else 0.05), f"{where}: off by {worst}"
                else:
                    # Of a difference of two equal products: what rounding leaves of it, times the other factor.
                    most = 1e-4 * max(1.0, magnitude**0.5) * (1 if dtype is torch.float32 else 1e3)
                    assert x.abs().max().item() <= most, f"{where}: {x.abs().max().item()} where 0 is right"
