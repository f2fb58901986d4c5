"""Long sums of terms of one sign in float32, whose error is not to grow with their length.

Tensor cores cut off at every addition, where everything else rounds to nearest: a sum that stays in one accumulator of
theirs loses a share of itself that grows with the number of products (2e-5 after 2,048 keys).
"""

from __future__ import annotations

import pytest
import torch

import pyxlbert
from pyxlbert import backends
from pyxlbert.testing.tolerances import LONG_SUM_FLOAT32

pytestmark = pytest.mark.skipif(backends.unavailable("cuda") is not None, reason=str(backends.unavailable("cuda")))
DEVICE = "cpu" if backends.cuda_is_emulated else "cuda"
LONG, FEW, SIZE = 2048, 16, 64


def thirds(length: int, *, signs: bool = False) -> torch.Tensor:
    """[1, length, 1, SIZE]: 1/3, with either sign in turn."""
    x = torch.full((1, length, 1, SIZE), 1 / 3)
    if signs:
        x[:, ::2] *= -1
    return x


def gradients(op: str, given: dict[str, torch.Tensor], backend: str) -> dict[str, torch.Tensor]:
    """out and the gradients of everything, where that of out is 1/3."""
    device, dtype = (DEVICE, torch.float32) if backend == "cuda" else ("cpu", torch.float64)
    here = {name: x.to(device) for name, x in given.items()}
    leaves = {name: x.to(dtype).requires_grad_() for name, x in here.items() if x.dtype.is_floating_point}
    out = getattr(pyxlbert, op)(**(here | leaves), backend=backend)
    found = torch.autograd.grad(out, list(leaves.values()), torch.full_like(out, 1 / 3))
    return {"out": out.detach()} | dict(zip(leaves, found, strict=True))


def check(op: str, given: dict[str, torch.Tensor], *names: str) -> None:
    ours, truth = gradients(op, given, "cuda"), gradients(op, given, "torch")
    wrong = {n: float((ours[n].cpu().double() - truth[n]).abs().max() / truth[n].abs().max()) for n in names}
    assert all(error <= LONG_SUM_FLOAT32 for error in wrong.values()), f"{wrong}, wanted at most {LONG_SUM_FLOAT32}"


def test_sums_over_keys() -> None:
    """out, and the gradient of the query: all weights are equal, and a key has the sign of its weight's gradient."""
    given = {"query": torch.zeros(1, FEW, 1, SIZE), "key": thirds(LONG, signs=True)}
    check("attention", given | {"value": 1.0 + thirds(LONG, signs=True)}, "out", "query")


def test_sums_over_queries() -> None:
    """The gradients of keys and values."""
    given = {"query": thirds(LONG), "key": torch.zeros(1, FEW, 1, SIZE)}
    check("attention", given | {"value": 1.0 + thirds(FEW, signs=True)}, "key", "value")


def test_sums_over_the_queries_that_read_a_table() -> None:
    """The gradient of the position table: the same sequence as often as there are to be terms."""
    torch.manual_seed(0)
    key, value = (torch.randn(1, FEW, 1, SIZE).expand(LONG // FEW, -1, -1, -1) for _ in range(2))
    given = {"query": thirds(FEW).expand_as(key), "key": key, "value": value}
    check("relative_attention", given | {"position_key": torch.zeros(2 * FEW, 1, SIZE)}, "position_key")


def test_sums_over_the_keys_of_a_segment() -> None:
    """The gradients of segments, of which plain PyTorch is off by 5e-6 and 9e-6 here, and a chain by 8e-6."""
    many = 4 * LONG
    given = {
        "query": torch.zeros(1, FEW, 1, SIZE),
        "key": thirds(many, signs=True),
        "value": 1.0 + thirds(many, signs=True),
        "position_key": torch.zeros(FEW + many, 1, SIZE),
        "segment_bias": torch.full((1, SIZE), 0.1),
        "segment_embedding": torch.tensor([0.01, -0.03])[:, None, None].repeat(1, 1, SIZE),
        "query_segments": torch.zeros(1, FEW, dtype=torch.int32),
        "key_segments": torch.arange(many, dtype=torch.int32).remainder(2)[None],
    }
    check("relative_attention", given, "segment_bias", "segment_embedding")
