"""NaN in keys that no query may see: whatever hides them, it reaches no result and no gradient, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pyxlbert
from pyxlbert.backends import OPS
from pyxlbert.testing import compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH, QUERIES, KEYS, HEADS, HEAD_SIZE = 2, 19, 37, 2, 24
# Of attention_mask: padding in any pattern as one row, as all rows, as all rows of all heads; one for all sequences.
SHAPES = [(BATCH, 1, 1, KEYS), (BATCH, 1, QUERIES, KEYS), (BATCH, HEADS, QUERIES, KEYS), (1, 1, QUERIES, KEYS)]


def draw(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments with a mask, and which keys it hides from all queries."""
    generator = torch.Generator().manual_seed(3)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    mask = torch.rand(shape, generator=generator) < 0.8
    mask[..., 3:9] = False
    mask[0, ..., KEYS - 6 :] = False
    rows, keys = (BATCH, QUERIES, HEADS, HEAD_SIZE), (BATCH, KEYS, HEADS, HEAD_SIZE)
    a: dict[str, Any] = {"key": normal(*keys), "value": normal(*keys), "attention_mask": mask}
    if op == "attention":
        a |= {"query": normal(*rows), "bias": normal(1, HEADS, QUERIES, KEYS)}
    else:
        a |= {"position_key": normal(QUERIES + KEYS, HEADS, HEAD_SIZE), "content_bias": normal(HEADS, HEAD_SIZE)}
        a |= {"segment_embedding": normal(2, HEADS, HEAD_SIZE)}
        a |= {f"{n}_segments": torch.arange(m).expand(BATCH, m) % 2 for n, m in (("query", QUERIES), ("key", KEYS))}
        if op == "relative_attention":
            a |= {"query": normal(*rows)}
        else:
            a |= {"content_query": normal(*rows), "query_query": normal(*rows)}
    hidden = ~mask.any(2).any(1).expand(BATCH, KEYS)
    if op == "two_stream_attention":  # the content stream sees itself
        hidden = hidden & (torch.arange(KEYS) < KEYS - QUERIES)
    assert hidden.any(1).all()
    return a, hidden


def run(op: str, arguments: dict[str, Any], backend: str, **options: Any) -> dict[str, torch.Tensor]:
    leaves = {n: x.clone().requires_grad_() for n, x in arguments.items() if x.is_floating_point()}
    found = getattr(pyxlbert, op)(**arguments | leaves, **options, backend=backend)
    outputs = found if isinstance(found, tuple) else (found,)
    gradients = torch.autograd.grad(sum(x.float().square().sum() for x in outputs), leaves.values())
    return {f"out {n}": x for n, x in enumerate(outputs)} | dict(zip(leaves, gradients, strict=True))


CASES = [
    (op, backend) for op in ("attention", "relative_attention", "two_stream_attention") for backend in OPS[op].backends
]


@pytest.mark.parametrize(("op", "backend"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=["padding", "all rows", "all heads", "shared"])
def test_nan_behind_a_mask(op: str, backend: str, shape: tuple[int, ...]) -> None:
    """The bits of a call with NaN are those of one without, and the gradients of what is hidden are zero."""
    for dtype in DTYPES if backend in ("torch", "cpu") else [DTYPES[SHAPES.index(shape) % 3]]:
        arguments, hidden = draw(op, dtype, shape)
        poisoned = {n: arguments[n].masked_fill(hidden[..., None, None], float("nan")) for n in ("key", "value")}
        wanted, found = (run(op, arguments | x, backend) for x in ({}, poisoned))
        for name, value in found.items():
            assert value.isfinite().all(), name
            compare.same_bits(f"{op} {dtype} {name}", value, wanted[name])
        assert not found["key"][hidden].any() and not found["value"][hidden].any()


@pytest.mark.parametrize("backend", OPS["relative_attention"].backends)
def test_beside_ranks_lengths_and_a_view_of_itself(backend: str) -> None:
    """Each hides keys of its own; what `see_self` shows is read, and what stands before the rows is not."""
    arguments, hidden = draw("relative_attention", torch.float32, SHAPES[1])
    hidden &= torch.arange(KEYS) < KEYS - QUERIES
    arguments |= {"query_rank": torch.full((BATCH, QUERIES), 5, dtype=torch.int32)}
    arguments |= {"key_rank": (torch.arange(KEYS) % 4).int().expand(BATCH, KEYS).contiguous()}
    arguments |= {"key_lengths": torch.tensor([KEYS, KEYS - 4])}
    hidden[1, KEYS - 4 :] = True
    poisoned = {n: arguments[n].masked_fill(hidden[..., None, None], float("nan")) for n in ("key", "value")}
    options = {"see_self": True, "dropout_p": 0.2, "seed": 4}
    wanted, found = (run("relative_attention", arguments | x, backend, **options) for x in ({}, poisoned))
    for name, value in found.items():
        compare.same_bits(name, value, wanted[name])


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_a_mask_that_hides_all(op: str, backend: str) -> None:
    """Zeros and no gradient, whatever keys and values hold."""
    arguments, _ = draw(op, torch.float32, SHAPES[0])
    arguments["attention_mask"] = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    if op == "two_stream_attention":
        arguments["key_lengths"] = torch.zeros(BATCH, dtype=torch.int32)
    for name in ("key", "value"):
        arguments[name] = torch.full_like(arguments[name], float("nan"))
    for name, value in run(op, arguments, backend).items():
        assert not value.any(), name


@pytest.mark.parametrize("backend", OPS["relative_attention"].backends)
def test_a_wide_table_is_rounded(backend: str) -> None:
    """A float32 `position_key` beside 16-bit queries: the bits of the rounded one, and a gradient in float32."""
    arguments, _ = draw("relative_attention", torch.bfloat16, SHAPES[0])
    table = torch.randn(arguments["position_key"].shape, generator=torch.Generator().manual_seed(1))
    wide, rounded = (
        run("relative_attention", arguments | {"position_key": x}, backend) for x in (table, table.bfloat16())
    )
    assert wide["position_key"].dtype is torch.float32
    compare.same_bits("position_key", wide.pop("position_key").bfloat16(), rounded.pop("position_key"))
    for name, value in wide.items():
        compare.same_bits(name, value, rounded[name])


TABLE_ROWS = QUERIES + 4 + KEYS + 9
PLACES = torch.full((BATCH, QUERIES), -1, dtype=torch.int32)
PLACES[:, 2:5] = torch.tensor([[3, 11, 22], [4, 9, 20]], dtype=torch.int32)
NO_PLACE_IN_ONE = PLACES.clone()
NO_PLACE_IN_ONE[0] = -1


def met_rows(options: dict[str, Any]) -> torch.Tensor:
    """bool `[TABLE_ROWS]`: those between some query's place and a key's that lengths and causality leave."""
    place = options.get("query_positions", torch.arange(QUERIES).expand(BATCH, QUERIES))[:, :, None]
    j = torch.arange(KEYS)
    seen = (place >= 0) & (j < options.get("key_lengths", torch.tensor([KEYS] * BATCH))[:, None, None])
    if options.get("causal"):
        seen = seen & (j <= place + KEYS - QUERIES)
    met = torch.zeros(TABLE_ROWS, dtype=torch.bool)
    met[(options["offset"] + j - place)[seen]] = True
    return met


# Triton's kernel of queries reads the whole band of a tile: docs/ops/relative_attention.md.
@pytest.mark.parametrize("backend", [name for name in OPS["relative_attention"].backends if name != "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {"offset": QUERIES + 4},
        {"offset": QUERIES + 4, "key_lengths": torch.tensor([20, 11])},
        {"offset": QUERIES + 4, "causal": True},
        {"offset": QUERIES + 4, "key_lengths": torch.tensor([0, 11])},
        {"offset": QUERIES + 8, "query_positions": PLACES},
        {"offset": QUERIES + 8, "query_positions": NO_PLACE_IN_ONE},
    ],
    ids=["all", "lengths", "causal", "no keys in one", "positions", "no positions in one"],
)
def test_nan_in_rows_of_the_table_that_no_query_meets(options: dict[str, Any], backend: str) -> None:
    """The bits of a call without, in whatever is not the gradient of such a row."""
    hidden = ~met_rows(options)[:, None, None]
    assert hidden.any() and not hidden.all()
    for dtype in (torch.float32, torch.bfloat16) if backend in ("torch", "cpu") else (torch.float32,):
        arguments, _ = draw("relative_attention", dtype, SHAPES[0])
        del arguments["attention_mask"], arguments["query_segments"], arguments["key_segments"]
        del arguments["segment_embedding"]
        table = torch.randn(TABLE_ROWS, HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
        arguments |= {"position_bias": torch.ones(HEADS, HEAD_SIZE, dtype=dtype), "position_key": table}
        poisoned = {"position_key": table.masked_fill(hidden, float("nan"))}
        wanted, found = (run("relative_attention", arguments | x, backend, **options) for x in ({}, poisoned))
        for name, value in found.items():
            compare.same_bits(f"{dtype} {name}", value, wanted[name])
        assert not found["position_key"][hidden.expand_as(table)].any()
