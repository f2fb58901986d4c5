"""Few queries against long keys: the keys are split over blocks, and what they find is joined in order."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import pyxlbert
from pyxlbert import backends
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.direct import Direct

pytestmark = pytest.mark.skipif(backends.unavailable("cuda") is not None, reason=str(backends.unavailable("cuda")))
DEVICE = "cpu" if backends.cuda_is_emulated else "cuda"
glue = importlib.import_module("pyxlbert.cuda._attention")
# Three parts, of which the last ends within a tile; one sequence that ends in its second part, one that is not split.
KEYS, LENGTHS = 1100, (1100, 700)


def native() -> Any:
    return backends.cuda_kernels


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(queries: int, *, keys: int = KEYS, batch: int = 2, heads: int = 1, size: int = 16) -> dict[str, Tensor]:
    rows = {"query": queries, "key": keys, "value": keys}
    return {name: randn(batch, rows[name], heads, size, seed=n) for n, name in enumerate(rows)}


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """What the parts of every forward call from here on find; None where its keys are not split."""
    split: list[Tensor | None] = []
    for name in ("attention", "_relative"):
        module = importlib.import_module(f"pyxlbert.cuda.{name}")

        def watched(*arguments: Any, real: Any = module.split_keys) -> Tensor | None:
            found = real(*arguments)
            split.append(found)
            if found is not None:
                found.fill_(float("nan"))  # what nobody writes nobody may read
            return found

        monkeypatch.setattr(module, "split_keys", watched)
    return split


def was_split(split: list[Tensor | None]) -> bool:
    """Whether there was one call, whose kernels have left something for each other."""
    return len(split) == 1 and split[0] is not None and bool(split[0].isfinite().any())


def check(op: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """out and all gradients, which take lse, are those of plain PyTorch in float64."""
    split = watch(monkeypatch)

    def results(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
        here = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in given.items()}
        leaves = {
            n: x.to(dtype).requires_grad_()
            for n, x in here.items()
            if isinstance(x, Tensor) and x.dtype.is_floating_point
        }
        out = getattr(pyxlbert, op)(**(here | leaves), backend=backend)
        cotangent = randn(*out.shape, seed=4).to(device, dtype)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), cotangent)]

    truth = results("torch", "cpu", torch.float64)
    for n, (ours, wanted) in enumerate(zip(results("cuda", DEVICE, torch.float32), truth, strict=True)):
        compare.close(f"result {n}", ours.cpu(), wanted, tolerances.SUMMATION_ORDER, least=1.0)
    assert was_split(split)


ATTENTION = {
    "one query": (1, {}),
    "as many as may be": (64, {"key_lengths": torch.tensor(LENGTHS)}),
    # The diagonal ends in the last part but one for the first query: the last part is empty for it.
    "causal, dropout": (5, {"causal": True, "key_lengths": torch.tensor([KEYS, 0]), "dropout_p": 0.25, "seed": 9}),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention(kind: str, monkeypatch) -> None:
    queries, more = ATTENTION[kind]
    check("attention", tensors(queries, heads=2 if queries == 1 else 1) | more, monkeypatch)


def test_masks_and_bias(monkeypatch) -> None:
    """A row that sees nothing in its first part, one that sees nothing in the others, one that sees nothing at all."""
    given: dict[str, Any] = tensors(4)
    mask = randn(2, 1, 4, KEYS, seed=8) > 0
    mask[0, :, 0, : native().KEYS_OF_PART] = False
    mask[1, :, 1, native().KEYS_OF_PART :] = False
    mask[1, :, 2] = False
    given |= {"attention_mask": mask, "bias": randn(1, 1, 4, KEYS, seed=9), "dropout_p": 0.25, "seed": 9}
    check("attention", given, monkeypatch)


RANKS = torch.stack([torch.randperm(KEYS, generator=torch.Generator().manual_seed(i)) for i in range(2)]).int()
RELATIVE: dict[str, dict[str, Any]] = {
    "causal": {"causal": True, "key_lengths": torch.tensor(LENGTHS)},
    "ranks": {"query_rank": RANKS[:, :5], "key_rank": RANKS, "see_self": True},
    # The first query of all sees nothing, and averages over padding too.
    "uniform": {
        "query_rank": RANKS[:, :5].index_fill(1, torch.tensor([0]), -1),
        "key_rank": RANKS,
        "masked_rows": "uniform",
        "key_lengths": torch.tensor(LENGTHS),
    },
    # Two at one position, which a block takes one after the other; two in a window farther on; one without.
    "positions": {
        "query_positions": torch.tensor([[3, 900, 3, -1, 905], [KEYS, 0, 64, 128, 63]]).int(),
        "offset": KEYS,
        "dropout_p": 0.25,
        "seed": 9,
    },
}


@pytest.mark.parametrize("kind", RELATIVE)
def test_relative_attention(kind: str, monkeypatch) -> None:
    offset = {"offset": 7} if kind != "positions" else {}
    table = randn((7 if kind != "positions" else KEYS) + KEYS, 1, 16, seed=3)
    check("relative_attention", tensors(5) | {"position_key": table} | offset | RELATIVE[kind], monkeypatch)


def test_a_row_keeps_its_bits() -> None:
    """Beside a sequence of another length, and with more padding behind its keys."""
    given = {n: x.to(DEVICE) for n, x in tensors(4, batch=4).items()}
    lengths = torch.tensor([KEYS, 700, native().MANY_KEYS, native().MANY_KEYS - 1], device=DEVICE)
    out, lse = Direct("cuda").attention_fwd(**given, key_lengths=lengths, scale=0.3)
    longer = {n: x if n == "query" else torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 600)) for n, x in given.items()}
    again, lse_again = Direct("cuda").attention_fwd(**longer, key_lengths=lengths, scale=0.3)
    compare.same_bits("more padding", again, out)
    compare.same_bits("lse with more padding", lse_again, lse)
    for n, length in enumerate(lengths.tolist()):
        alone = {name: x[n : n + 1, : None if name == "query" else length] for name, x in given.items()}
        found, _ = Direct("cuda").attention_fwd(**alone, scale=0.3)
        compare.same_bits(f"sequence {n} alone", found, out[n : n + 1])


def test_nan_stays_in_its_row() -> None:
    given = {n: x.to(DEVICE) for n, x in tensors(3).items()}
    given["query"][0, 1, 0, 5] = float("nan")
    out, lse = Direct("cuda").attention_fwd(**given, scale=0.3)
    assert out.isnan().all(-1)[:, :, 0].tolist() == lse.isnan()[:, 0].tolist() == [[False, True, False], [False] * 3]
    # A length that is out of range makes all rows of its sequence NaN.
    lengths = torch.tensor([KEYS, KEYS + 1], device=DEVICE)
    given["query"][0, 1, 0, 5] = 0.0
    out, _ = Direct("cuda").attention_fwd(**given, key_lengths=lengths, scale=0.3)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True]


@pytest.mark.skipif(not backends.cuda_is_emulated, reason="the path for Hopper begins at 128 queries, here at one")
def test_hopper_splits_too(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_EMULATION_HOPPER", "1")
    split = watch(monkeypatch)
    given = {n: x.bfloat16() for n, x in tensors(3, size=64).items()}
    out = pyxlbert.attention(**given, backend="cuda")
    truth = pyxlbert.attention(**{n: x.double() for n, x in given.items()}, backend="torch")
    assert was_split(split)
    compare.close("out", out, truth, tolerances.MODEL_BFLOAT16)


def test_which_calls_are_split() -> None:
    few, many, part = native().FEW_QUERIES, native().MANY_KEYS, native().KEYS_OF_PART
    assert (few, many, part) == (64, 1024, 512)
    for queries in (1, few, few + 1):
        for keys in (0, many - 1, many, many + 1, 10 * part):
            parts = glue.parts_of_keys(queries, keys)
            assert parts == (-(-keys // part) if queries <= few and keys >= many else 1)
