"""Float32 walks over more keys or queries than a sum takes before it begins anew (TERMS_OF_A_SUM of csrc/cuda).

test_long_sums.py has terms of one size, whose scores are all 0: what a later run scales down or forgets does not show
there.  Here each run of keys outweighs the one before, or the other way round, and masks empty whole runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyxlbert
from pyxlbert import backends
from pyxlbert.testing import compare, tolerances

pytestmark = pytest.mark.skipif(backends.unavailable("cuda") is not None, reason=str(backends.unavailable("cuda")))
DEVICE = "cpu" if backends.cuda_is_emulated else "cuda"
# Of a sum, and what no row may see.
TERMS, UNSEEN = 512, 2**31 - 1
SIZE = 16


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planes(queries: int, keys: int) -> dict[str, Tensor]:
    """Of two sequences: the keys of the first count for more from run to run, those of the second for less."""
    found = {
        name: randn(2, rows, 1, SIZE, seed=n) for n, (name, rows) in enumerate((("query", queries), ("key", keys)))
    }
    size = 0.2 + torch.arange(keys) // TERMS
    return found | {
        "key": found["key"] * torch.stack([size, size.flip(0)])[:, :, None, None],
        "value": randn(2, keys, 1, SIZE, seed=2),
    }


def biases() -> dict[str, Tensor]:
    names = ("content_bias", "position_bias", "segment_bias")
    return {name: 0.3 * randn(1, SIZE, seed=n) for n, name in enumerate(names, 3)} | {
        "segment_embedding": 0.3 * randn(2, 1, SIZE, seed=6)
    }


def relative(queries: int, keys: int) -> dict[str, Any]:
    """With segments and ranks: of the first sequence no row sees the first run, of the second any behind it."""
    rank = torch.zeros(2, keys, dtype=torch.int32)
    rank[0, :TERMS] = UNSEEN
    rank[1, TERMS - 3 :] = 9
    numbers = torch.arange(2 * (queries + keys), dtype=torch.int32)
    return {
        **planes(queries, keys),
        **biases(),
        "position_key": 0.5 * randn(queries + keys, 1, SIZE, seed=7),
        "key_rank": rank,
        "query_rank": 1 + numbers[: 2 * queries].remainder(5).view(2, queries),
        "key_segments": numbers[: 2 * keys].remainder(3).clamp(max=1).view(2, keys),
        "query_segments": numbers[: 2 * queries].remainder(2).view(2, queries),
    }


def of_two_streams(queries: int, keys: int) -> dict[str, Any]:
    given = relative(queries, keys)
    query = given.pop("query")
    return given | {"content_query": query, "query_query": randn(*query.shape, seed=8)}


def at_one_position(queries: int) -> dict[str, Any]:
    """Queries that all read the same rows of the table: 16 in each step of the walk over them."""
    return {
        **planes(queries, 20),
        **biases(),
        "position_key": 0.5 * randn(30, 1, SIZE, seed=7),
        "offset": 9,
        "query_positions": torch.full((2, queries), 4, dtype=torch.int32),
        "key_segments": torch.arange(40, dtype=torch.int32).remainder(2).view(2, 20),
        "query_segments": torch.zeros(2, queries, dtype=torch.int32),
    }


LENGTHS = torch.tensor([2 * TERMS + 6, TERMS + 1])
CASES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "keys": ("attention", lambda: planes(65, 2 * TERMS + 6) | {"key_lengths": LENGTHS}),
    "keys, as many as runs hold, of which a sequence sees none of the last": (
        "attention",
        lambda: (
            planes(65, 2 * TERMS)
            | {"attention_mask": (torch.arange(2 * TERMS) < torch.tensor([[2 * TERMS], [TERMS - 3]]))[:, None, None]}
        ),
    ),
    "keys, a run and one, causal, dropout": (
        "attention",
        lambda: planes(65, TERMS + 1) | {"causal": True, "dropout_p": 0.25, "seed": 9},
    ),
    "queries": ("attention", lambda: planes(2 * TERMS + 6, 17)),
    "keys and a table": ("relative_attention", lambda: relative(65, 2 * TERMS + 6)),
    "keys and a table, rows that average": (
        "relative_attention",
        lambda: relative(17, TERMS + 40) | {"masked_rows": "uniform", "key_lengths": torch.tensor([TERMS + 40, 0])},
    ),
    "queries and a table": ("relative_attention", lambda: at_one_position(TERMS + 40)),
    "keys of two streams": ("two_stream_attention", lambda: of_two_streams(20, 2 * TERMS + 6)),
}
# The emulation runs warps and lanes in both orders, and has smaller tiles where a block has less shared memory.
DEVICES = {"": {}, "reversed, 99 KiB": {"CUDA_EMULATION_ORDER": "reversed", "CUDA_EMULATION_SHARED": str(99 * 1024)}}


def results(op: str, given: dict[str, Any], backend: str, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    here = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in given.items()}
    leaves = {
        n: x.to(dtype).requires_grad_() for n, x in here.items() if isinstance(x, Tensor) and x.dtype.is_floating_point
    }
    outs = getattr(pyxlbert, op)(**(here | leaves), backend=backend)
    outs = outs if isinstance(outs, tuple) else (outs,)
    cotangents = [randn(*out.shape, seed=10 + n).to(device, dtype) for n, out in enumerate(outs)]
    gradients = torch.autograd.grad(outs, list(leaves.values()), cotangents)
    found = {f"out {n}": out.detach() for n, out in enumerate(outs)}
    return found | {f"grad {n}": x for n, x in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize("device", DEVICES if backends.cuda_is_emulated else [""])
@pytest.mark.parametrize("case", CASES)
def test_sums_that_begin_anew(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in DEVICES[device].items():
        monkeypatch.setenv(name, value)
    op, make = CASES[case]
    ours = results(op, make(), "cuda", DEVICE, torch.float32)
    for name, truth in results(op, make(), "torch", "cpu", torch.float64).items():
        compare.close(f"{case}: {name}", ours[name].cpu(), truth, tolerances.SUMMATION_ORDER, least=1.0)
