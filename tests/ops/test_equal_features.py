"""LayerNorm of rows whose features are equal, or nearly: a mean that is a rounding off is no floor for eps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import pyxlbert
from pyxlbert import backends
from pyxlbert.backends import OPS, native
from pyxlbert.testing import compare, tolerances

LEVELS = [f"cpu/{level}" for level in native._C.levels()] if native._C is not None else []
RUNNERS = ["torch", *LEVELS, *(name for name in ("triton", "cuda") if backends.unavailable(name) is None)]
OF_ROWS = ("layer_norm", "dropout_add_layer_norm", "embedding_layer_norm")
EPS = 1e-12


@pytest.fixture(params=RUNNERS)
def backend(request) -> Iterator[str]:
    name, _, level = request.param.partition("/")
    if not level:
        yield name
        return
    before = native._C.level()
    native._C.set_level(level)
    yield name
    native._C.set_level(before)


def device_of(backend: str) -> str:
    on_gpu = torch.cuda.is_available() and backend in ("triton", "cuda")
    return "cuda" if on_gpu else "cpu"


def normalise(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, backend: str) -> torch.Tensor:
    """LayerNorm of the rows of x by one of the three ops that normalise."""
    if op == "layer_norm":
        return pyxlbert.layer_norm(x, weight, bias, eps=EPS, backend=backend)
    if op == "dropout_add_layer_norm":
        return pyxlbert.dropout_add_layer_norm(torch.zeros_like(x), x, weight, bias, eps=EPS, backend=backend)
    ids = torch.arange(len(x), device=x.device)[None]
    return pyxlbert.embedding_layer_norm(ids, x, None, None, weight, bias, eps=EPS, backend=backend)[0]


def test_the_three_ops_that_normalise() -> None:
    assert set(OF_ROWS) == {name for name in OPS if name.endswith("layer_norm")}


@pytest.mark.parametrize("columns", [1, 35, 384, 768, 1024])
@pytest.mark.parametrize("op", OF_ROWS)
def test_equal_features_give_the_bias(op: str, columns: int, backend: str) -> None:
    device = device_of(backend)
    values = torch.tensor([0.1, 0.7, 3.3, 7.7, 9.9, -123.4, 1e4, 1e30], device=device)
    x = values[:, None].repeat(1, columns).requires_grad_()
    weight = torch.randn(columns, generator=torch.Generator().manual_seed(0)).to(device)
    bias = torch.linspace(-1.0, 1.0, columns, device=device)
    y = normalise(op, x, weight, bias, backend)
    # A deviation is less than a rounding of the mean's own rounding.
    compare.close("y", y, bias.expand_as(y), tolerances.SUMMATION_ORDER, least=1.0)
    # What every feature has alike does not pass LayerNorm, so neither does a gradient along it.
    (y * (1.0 / weight)).sum().backward()
    finite = values.abs() < 1e4
    compare.close("dx", x.grad[finite] * EPS**0.5, torch.zeros_like(x[finite]), tolerances.SUMMATION_ORDER, least=1.0)


@pytest.mark.parametrize("op", OF_ROWS)
def test_nearly_equal_features_are_as_exact_as_the_peers(op: str, backend: str) -> None:
    """One feature that differs, noise of a few roundings, and tiny features beside a huge one."""
    draw = torch.Generator().manual_seed(1)
    one_place = torch.full((6, 768), 7.7)
    one_place[torch.arange(6), torch.arange(6) * 100] += torch.tensor([1e-6, 1e-5, 1e-3, 1.0, 1e3, -1e-4])
    noise = 3.3 + torch.randn(6, 768, generator=draw) * torch.logspace(-7, -2, 6)[:, None]
    huge = torch.randn(3, 768, generator=draw) * 1e-3
    huge[:, 5] = torch.tensor([1e4, -1e6, 1e10])
    x = torch.cat([one_place, noise, huge])
    weight, bias = torch.ones(768), torch.zeros(768)
    truth = torch.nn.functional.layer_norm(x.double(), (768,), weight.double(), bias.double(), EPS)
    peer = torch.nn.functional.layer_norm(x, (768,), weight, bias, EPS)
    device = device_of(backend)
    found = normalise(op, x.to(device), weight.to(device), bias.to(device), backend).cpu()
    # A row whose deviations are roundings of its mean carries them; the statistics are float32 for everyone.
    reach = truth.abs().amax(-1, keepdim=True)
    for row in range(len(x)):
        name = f"{op} row {row}"
        compare.within_budget(name, found[row], peer[row], truth[row], terms=reach[row])
