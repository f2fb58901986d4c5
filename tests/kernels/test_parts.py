"""Work of the Triton kernels that is shared out among programs by sizes alone, and added up in order."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyxlbert
from pyxlbert.testing import compare, tolerances

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = importlib.import_module("pyxlbert.kernels._launch").INTERPRETED
attention = importlib.import_module("pyxlbert.kernels.attention")
parts = importlib.import_module("pyxlbert.kernels._parts")
relative = importlib.import_module("pyxlbert.kernels._relative")
# Tiles of the interpreter have at most 32 keys, those of a GPU 128.
PART = 32 if INTERPRETED else 128


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def split_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MANY_KEYS", 2 * PART), ("KEYS_OF_PART", PART), ("WIDEST_TILE", PART)):
        monkeypatch.setattr(parts, name, value)
    # Launches that were remembered with other numbers.
    monkeypatch.setattr(importlib.import_module("pyxlbert.kernels._plan"), "_plans", {})


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched from here on."""
    launched: list[str] = []
    for module in (attention, relative, parts):
        launch = module.launch

        def watched(kernel: Any, *arguments: Any, launch: Any = launch, **options: Any) -> Any:
            launched.append(kernel.__name__)
            return launch(kernel, *arguments, **options)

        monkeypatch.setattr(module, "launch", watched)
    return launched


KEYS = 4 * PART + 5
LENGTHS = torch.tensor([KEYS, PART - 3], device=DEVICE)
ATTENTION = {
    "plain": {},
    # The second sequence ends in the first part, and the others are empty.
    "lengths, causal, dropout": {"key_lengths": LENGTHS, "causal": True, "dropout_p": 0.2, "seed": 5},
    "mask and bias": {
        "attention_mask": randn(2, 1, 5, KEYS, seed=8) > 0,
        "bias": randn(1, 2, 5, KEYS, seed=9),
    },
    "a row that sees nothing": {"attention_mask": torch.arange(5, device=DEVICE)[:, None] > 1},
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_few_queries_share_out_long_keys(kind: str, monkeypatch) -> None:
    """The same results as from one program, but for the order of summation, and the same bits twice."""
    q, k, v = (randn(2, rows, 2, 16, seed=i) for i, rows in enumerate((5, KEYS, KEYS)))
    given = dict(ATTENTION[kind])
    if kind == "a row that sees nothing":
        given["attention_mask"] = given["attention_mask"].expand(1, 1, 5, KEYS)
    launched = watch(monkeypatch)
    check(lambda **options: pyxlbert.attention(q, k, v, **given, **options), launched, monkeypatch)


@pytest.mark.parametrize("kind", ["plain", "ranks", "uniform", "targets"])
def test_few_relative_queries_share_out_long_keys(kind: str, monkeypatch) -> None:
    q, k, v = (randn(2, rows, 2, 16, seed=i) for i, rows in enumerate((5, KEYS, KEYS)))
    table = randn(2 * KEYS, 2, 16, seed=3)
    given: dict[str, Any] = {"dropout_p": 0.2, "seed": 5}
    ranks = torch.stack([torch.randperm(KEYS, generator=torch.Generator().manual_seed(i)) for i in range(2)]).int()
    if kind == "plain":
        given |= {"key_lengths": LENGTHS, "causal": True}
    else:
        given |= {"query_rank": ranks[:, :5].to(DEVICE), "key_rank": ranks.to(DEVICE), "see_self": kind == "ranks"}
    if kind == "uniform":
        # The first query of all sees nothing.
        given["query_rank"] = given["query_rank"].index_fill(1, torch.tensor([0], device=DEVICE), -1)
        given["masked_rows"] = "uniform"
    if kind == "targets":
        given |= {"query_positions": ranks[:, 7:12].to(DEVICE), "offset": KEYS}
    launched = watch(monkeypatch)
    check(lambda **options: pyxlbert.relative_attention(q, k, v, table, **given, **options), launched, monkeypatch)


def check(call: Callable[..., Tensor], launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = call(backend="triton")
    assert launched == ["fwd"]
    split_keys(monkeypatch)
    launched.clear()
    found = call(backend="triton")
    assert launched == ["fwd", "join"]
    compare.close("out", found, whole, tolerances.SUMMATION_ORDER, least=1.0)
    compare.close("out", found, call(backend="torch"), tolerances.SUMMATION_ORDER, least=1.0)
    compare.same_bits("again", call(backend="triton"), found)


def test_backward_of_keys_that_were_shared_out(monkeypatch) -> None:
    """By the lse that the parts were joined to."""
    split_keys(monkeypatch)
    tensors = [randn(1, rows, 1, 16, seed=i) for i, rows in enumerate((5, KEYS, KEYS))]
    found = {}
    for backend in ("triton", "torch"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = pyxlbert.attention(*leaves, dropout_p=0.2, seed=5, backend=backend)
        found[backend] = torch.autograd.grad(out, leaves, randn(*out.shape, seed=4))
    for name, ours, wanted in zip(("dquery", "dkey", "dvalue"), *found.values(), strict=True):
        compare.close(name, ours, wanted, tolerances.SUMMATION_ORDER, least=1.0)


def test_parts_follow_from_sizes() -> None:
    """All keys are in one part each, parts begin where tiles do, and there are no more than make programs enough."""
    for queries in (1, 64, 128, 129):
        for keys in (1, 1023, 1024, 1025, 5000, 8192, 100_000):
            for planes in (1, 12, 100, 1000):
                count, each = parts.parts_of_keys(queries, keys, planes)
                assert (count - 1) * each < keys <= count * each
                if queries > 128 or keys < 1024 or planes >= 256:
                    assert count == 1
                if count > 1:
                    assert each % 128 == 0 and each >= 512
                    assert count * planes * -(-queries // 64) <= parts.PROGRAMS
    assert parts.parts_of_keys(1, 8192, 12) == (16, 512)


@pytest.mark.parametrize(("length", "dropout_p"), [(33, 0.0), (33, 0.3), (34, 0.3), (35, 0.3), (36, 0.3)])
def test_the_tables_gradient_in_shares(length: int, dropout_p: float, monkeypatch) -> None:
    """Sequences shared out among programs; with dropout blocks begin up to three rows before the table."""
    tensors = [randn(5, length, 1, 16, seed=i) for i in range(3)] + [randn(2 * length, 1, 16, seed=3)]
    given = {"key_lengths": torch.tensor([length, 0, 3, length, 20], device=DEVICE), "dropout_p": dropout_p, "seed": 7}
    results = []
    for backend, programs, at_least in (("torch", 1, 1), ("triton", 1, 1), ("triton", 12, 2), ("triton", 12, 2)):
        monkeypatch.setattr(relative, "PROGRAMS", programs)
        monkeypatch.setattr(relative, "QUERIES_OF_PART", at_least)
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = pyxlbert.relative_attention(*leaves, **given, backend=backend)
        results.append(torch.autograd.grad(out, leaves[-1:], randn(*out.shape, seed=4))[0])
    wanted, whole, shared, again = results
    compare.close("in one", whole, wanted, tolerances.SUMMATION_ORDER, least=1.0)
    compare.close("shared", shared, wanted, tolerances.SUMMATION_ORDER, least=1.0)
    compare.same_bits("again", again, shared)
    assert not torch.equal(whole, shared)
