"""Long sums of terms of one sign, whose error is not to grow with their number.

The common suite draws values of either sign, whose roundings cancel.  A float32 sum that stays in one accumulator loses
1e-5 of itself and more after some thousand terms of one sign; what is summed in blocks loses some roundings, as plain
PyTorch does.  tests/cuda/test_long_sums.py asks the same of tensor cores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from runners import CPU, SLOW, deciding, device_of, runners_of, running

from pyxlbert.backends import OPS
from pyxlbert.testing import compare
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, as_tuple, to_float64

LONG, FEW, ROWS, SIZE = 8192, 16, 100_000, 64
# More queries than those for which keys are split into parts, whose sums are short.
MANY = 80


def thirds(length: int, *, signs: bool = False) -> torch.Tensor:
    """[1, length, 1, SIZE]: 1/3, with either sign in turn."""
    x = torch.full((1, length, 1, SIZE), 1 / 3)
    if signs:
        x[:, ::2] *= -1
    return x


def constant(length: int) -> torch.Tensor:
    """[1, length, 1, SIZE]: the same number in every row, another in every column."""
    return torch.linspace(0.1, 0.9, SIZE).expand(1, length, 1, SIZE).contiguous()


def sequences(count: int, x: torch.Tensor) -> torch.Tensor:
    return x.expand(count, *x.shape[1:])


def some(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(dtype: torch.dtype = torch.float32) -> Arguments:
    """[ROWS, 35] of equal rows, and parameters."""
    x = torch.linspace(0.1, 0.9, 35).to(dtype).expand(ROWS, 35)
    return {"x": x, "weight": torch.ones(35), "bias": torch.full((35,), 0.1)}


def long_row(columns: int) -> Arguments:
    """Two rows whose deviations from the mean have few sizes."""
    x = torch.full((2, columns), 0.3)
    x[:, ::2] *= -1
    x[:, ::5] *= 2
    return {"x": x, "weight": torch.linspace(0.1, 0.3, columns), "bias": torch.zeros(columns)}


def embedding() -> Arguments:
    ids = torch.zeros(1, ROWS, dtype=torch.long)
    table, parameters = torch.linspace(0.1, 0.9, 35)[None].repeat(3, 1), rows()
    # A gradient of one sign reaches the tables only through a weight that differs from column to column.
    parameters["weight"] = some(35, seed=5)
    tables = {"word": table, "token_type": some(2, 35, seed=3), "position": None, "token_type_ids": ids}
    return {"input_ids": ids, **tables, "weight": parameters["weight"], "bias": parameters["bias"]}


# What is called, and the results that are long sums of one sign.
CASES: dict[str, tuple[str, Callable[[], Arguments], tuple[str, ...]]] = {
    "keys": (
        "attention",
        lambda: {"query": torch.zeros(1, FEW, 1, SIZE), "key": some(1, LONG, 1, SIZE, seed=0), "value": constant(LONG)},
        ("out 0",),
    ),
    "keys, for two queries": (
        "attention",
        lambda: {"query": torch.zeros(1, 2, 1, SIZE), "key": some(1, LONG, 1, SIZE, seed=0), "value": constant(LONG)},
        ("out 0",),
    ),
    "keys, for more queries than share them out": (
        "attention",
        lambda: {
            "query": torch.zeros(1, MANY, 1, SIZE),
            "key": some(1, LONG, 1, SIZE, seed=0),
            "value": constant(LONG),
        },
        ("out 0",),
    ),
    "keys of the sign of their weights' gradients": (
        "attention",
        lambda: {
            "query": torch.zeros(1, FEW, 1, SIZE),
            "key": thirds(LONG, signs=True),
            "value": 1.0 + thirds(LONG, signs=True),
        },
        ("out 0", "grad query"),
    ),
    "queries": (
        "attention",
        lambda: {
            "query": constant(LONG),
            "key": torch.zeros(1, FEW, 1, SIZE),
            "value": 1.0 + thirds(FEW, signs=True),
        },
        ("grad key", "grad value"),
    ),
    **{
        f"rows of a bias {shape}": (
            "attention",
            lambda shape=shape: {
                "query": torch.zeros(4, 2000, 2, SIZE),
                "key": torch.zeros(4, FEW, 2, SIZE),
                "value": (1.0 + thirds(FEW, signs=True)).expand(4, FEW, 2, SIZE),
                "bias": torch.zeros(shape),
            },
            ("grad bias",),
        )
        for shape in ((1, 1, 1, FEW), (1, 2, 1, FEW))
    },
    "planes of a bias": (
        "attention",
        lambda: {
            "query": torch.zeros(1500, 3, 2, SIZE),
            "key": torch.zeros(1500, FEW, 2, SIZE),
            "value": (1.0 + thirds(FEW, signs=True)).expand(1500, FEW, 2, SIZE),
            "bias": torch.zeros(1, 1, 3, FEW),
        },
        ("grad bias",),
    ),
    "keys and a table": (
        "relative_attention",
        lambda: {
            "query": torch.zeros(1, FEW, 1, SIZE),
            "key": thirds(LONG, signs=True),
            "value": 1.0 + thirds(LONG, signs=True),
            "position_key": torch.zeros(FEW + LONG, 1, SIZE),
            "content_bias": torch.zeros(1, SIZE),
        },
        ("out 0", "grad query", "grad content_bias"),
    ),
    "keys and a table, for more queries than share them out": (
        "relative_attention",
        lambda: {
            "query": torch.zeros(1, MANY, 1, SIZE),
            "key": some(1, LONG, 1, SIZE, seed=0),
            "value": constant(LONG),
            "position_key": torch.zeros(MANY + LONG, 1, SIZE),
        },
        ("out 0",),
    ),
    "keys of segments": (
        "relative_attention",
        lambda: {
            "query": torch.zeros(1, FEW, 1, SIZE),
            "key": thirds(LONG, signs=True),
            "value": 1.0 + thirds(LONG, signs=True),
            "position_key": torch.zeros(FEW + LONG, 1, SIZE),
            "segment_bias": torch.full((1, SIZE), 0.1),
            "segment_embedding": torch.tensor([0.01, -0.03])[:, None, None].repeat(1, 1, SIZE),
            "query_segments": torch.zeros(1, FEW, dtype=torch.int32),
            "key_segments": torch.arange(LONG, dtype=torch.int32).remainder(2)[None],
        },
        ("out 0", "grad segment_bias", "grad segment_embedding"),
    ),
    "queries that read a row of the table": (
        "relative_attention",
        lambda: {
            "query": thirds(LONG // 4, signs=True),
            "key": torch.zeros(1, LONG // 4, 1, SIZE),
            "value": 1.0 + thirds(LONG // 4, signs=True),
            "position_key": torch.zeros(LONG // 2, 1, SIZE),
        },
        ("grad position_key",),
    ),
    "queries at one position, which read the same rows of the table": (
        "relative_attention",
        lambda: {
            "query": constant(LONG),
            "key": torch.zeros(1, FEW, 1, SIZE),
            "value": 1.0 + thirds(FEW, signs=True),
            "position_key": torch.zeros(2 * FEW, 1, SIZE),
            "offset": FEW - 1,
            "query_positions": torch.full((1, LONG), 5, dtype=torch.int32),
        },
        ("grad position_key",),
    ),
    "queries and a table": (
        "relative_attention",
        lambda: {
            "query": constant(LONG),
            "key": torch.zeros(1, FEW, 1, SIZE),
            "value": 1.0 + thirds(FEW, signs=True),
            "position_key": torch.zeros(FEW + LONG, 1, SIZE),
            "content_bias": torch.zeros(1, SIZE),
        },
        ("grad key", "grad value"),
    ),
    "sequences that share a table": (
        "relative_attention",
        lambda: {
            "query": sequences(1000, constant(FEW)),
            "key": sequences(1000, some(1, FEW, 1, SIZE, seed=1)),
            "value": sequences(1000, some(1, FEW, 1, SIZE, seed=2)),
            "position_key": torch.zeros(2 * FEW, 1, SIZE),
            "content_bias": torch.zeros(1, SIZE),
            "segment_bias": torch.zeros(1, SIZE),
            "segment_embedding": torch.zeros(2, 1, SIZE),
            "query_segments": torch.arange(FEW, dtype=torch.int32).remainder(2).expand(1000, FEW),
            "key_segments": torch.arange(FEW, dtype=torch.int32).remainder(2).expand(1000, FEW),
        },
        ("grad position_key", "grad content_bias", "grad segment_bias", "grad segment_embedding"),
    ),
    "sequences that share a bias of the positions": (
        "relative_attention",
        lambda: {
            "query": sequences(1000, constant(FEW)),
            "key": sequences(1000, some(1, FEW, 1, SIZE, seed=1)),
            "value": sequences(1000, some(1, FEW, 1, SIZE, seed=2)),
            "position_key": some(2 * FEW, 1, SIZE, seed=6),
            "position_bias": torch.zeros(1, SIZE),
        },
        ("grad position_bias",),
    ),
    "keys of two streams": (
        "two_stream_attention",
        lambda: {
            "content_query": torch.zeros(1, FEW, 1, SIZE),
            "query_query": torch.zeros(1, FEW, 1, SIZE),
            "key": thirds(LONG, signs=True),
            "value": 1.0 + thirds(LONG, signs=True),
            "position_key": torch.zeros(FEW + LONG, 1, SIZE),
            "content_bias": torch.zeros(1, SIZE),
        },
        ("out 0", "out 1", "grad content_query", "grad query_query", "grad content_bias"),
    ),
    "queries of two streams": (
        "two_stream_attention",
        lambda: {
            "content_query": constant(LONG // 4),
            "query_query": 0.5 * constant(LONG // 4),
            "key": torch.zeros(1, FEW, 1, SIZE),
            "value": 1.0 + thirds(FEW, signs=True),
            "position_key": torch.zeros(FEW + LONG // 4, 1, SIZE),
        },
        ("grad key", "grad value"),
    ),
    "sequences of two streams that share a table": (
        "two_stream_attention",
        lambda: {
            "content_query": sequences(1000, constant(FEW)),
            "query_query": sequences(1000, 0.5 * constant(FEW)),
            "key": sequences(1000, some(1, FEW, 1, SIZE, seed=1)),
            "value": sequences(1000, some(1, FEW, 1, SIZE, seed=2)),
            "position_key": torch.zeros(2 * FEW, 1, SIZE),
            "content_bias": torch.zeros(1, SIZE),
        },
        ("grad position_key", "grad content_bias"),
    ),
    "rows of bias_gelu": ("bias_gelu", lambda: _without(rows(), "weight"), ("grad bias",)),
    "rows of bias_gelu, bfloat16": (
        "bias_gelu",
        lambda: _without(rows(torch.bfloat16), "weight"),
        ("grad bias",),
    ),
    "rows of layer_norm": ("layer_norm", rows, ("grad weight", "grad bias")),
    "rows of layer_norm, bfloat16": ("layer_norm", lambda: rows(torch.bfloat16), ("grad weight", "grad bias")),
    "rows of dropout_add_layer_norm": (
        "dropout_add_layer_norm",
        lambda: rows() | {"residual": rows()["x"], "x_bias": torch.zeros(35), "weight": some(35, seed=4)},
        ("grad weight", "grad bias", "grad x_bias"),
    ),
    "rows of a table": (
        "embedding_layer_norm",
        embedding,
        ("grad weight", "grad bias", "grad word", "grad token_type"),
    ),
    **{
        f"a row of {columns}": ("layer_norm", lambda columns=columns: long_row(columns), ("out 0", "grad x"))
        for columns in (5000, 300_007)
    },
    "a row that is added to": (
        "dropout_add_layer_norm",
        lambda: long_row(300_007) | {"residual": long_row(300_007)["x"]},
        ("out 0", "grad x", "grad residual"),
    ),
    "a row of a table": (
        "embedding_layer_norm",
        lambda: _of_a_table(long_row(300_007)),
        ("out 0", "grad word"),
    ),
    **{
        f"rows of {op}": (
            op,
            lambda: {
                "x": torch.linspace(0.1, 0.9, 35).expand(ROWS, 35),
                "weight": torch.full((20, 35), 0.7),
                "bias": torch.full((20,), 0.1),
            },
            ("grad weight", "grad bias"),
        )
        for op in ("linear", "linear_gelu")
    },
    "outputs of a product of few rows": (
        "linear",
        lambda: {"x": torch.full((4, 20), 0.3), "weight": torch.full((50_000, 20), 0.7)},
        ("grad x",),
    ),
    "a product of few rows": (
        "linear",
        lambda: {"x": torch.full((4, 50_000), 0.3), "weight": torch.full((20, 50_000), 0.7)},
        ("out 0",),
    ),
}


# Triton's interpreter and the emulation of CUDA take minutes for most sums of this length.
QUICK: dict[str, tuple[str, ...]] = {
    "triton": ("rows of a bias (1, 2, 1, 16)",),
    "cuda": (
        "keys",
        "keys, for two queries",
        "keys, for more queries than share them out",
        "keys of the sign of their weights' gradients",
        "keys and a table",
        "keys and a table, for more queries than share them out",
        "keys of two streams",
        "queries",
        "queries at one position, which read the same rows of the table",
        "queries and a table",
        "queries of two streams",
        "rows of a bias (1, 2, 1, 16)",
        "rows of bias_gelu",
    ),
}
GRID = [
    (case, runner)
    for case, (op, *_) in CASES.items()
    for runner in runners_of(SPECS[op])
    if runner not in SLOW or case in QUICK[runner]
]


def _of_a_table(row: Arguments) -> Arguments:
    """The first row of x as that of a table."""
    tables = {"word": row["x"][:1], "position": None, "token_type": None}
    return {"input_ids": torch.zeros(1, 1, dtype=torch.long), **tables, "weight": row["weight"], "bias": row["bias"]}


def _without(arguments: Arguments, name: str) -> Arguments:
    return {other: value for other, value in arguments.items() if other != name}


def results(
    function: Callable[..., object],
    arguments: Arguments,
    wanted: tuple[str, ...],
    device: torch.device = CPU,
    gradient: float = 1 / 3,
) -> dict[str, torch.Tensor]:
    """The wanted ones, on the CPU, where the gradient of every output is `gradient` throughout."""
    arguments = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    names = [name.removeprefix("grad ") for name in wanted if name.startswith("grad ")]
    arguments = arguments | {name: arguments[name].detach().requires_grad_() for name in names}
    outputs = as_tuple(function(**arguments))
    found = {f"out {i}": output.detach() for i, output in enumerate(outputs)}
    if names:
        gradients = [torch.full_like(output, gradient) for output in outputs]
        given = torch.autograd.grad(outputs, [arguments[name] for name in names], gradients)
        found |= dict(zip((f"grad {name}" for name in names), given, strict=True))
    return {name: found[name].cpu() for name in wanted}


@functools.cache
def expected(case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Plain PyTorch's results, and the truth."""
    op, make, wanted = CASES[case]
    plain = SPECS[op].plain
    return results(plain, make(), wanted), results(plain, to_float64(make()), wanted)


@pytest.mark.parametrize(("case", "runner"), GRID)
def test_long_sums_of_one_sign_are_as_exact_as_the_peers(case: str, runner: str) -> None:
    op, make, wanted = CASES[case]
    arguments, device = make(), device_of(runner)
    refusal = OPS[op].refusal(runner.partition("/")[0], deciding(arguments).to(device))
    if refusal is not None:
        # Rows that are longer than what a block holds.
        assert runner == "cuda" and "at most" in refusal
        return
    plain, truth = expected(case)
    with running(runner) as backend:
        ours = results(functools.partial(SPECS[op].function, backend=backend), arguments, wanted, device)
    for name in wanted:
        compare.within_budget(f"{op} {case} {name}", ours[name], plain[name], truth[name])


# What is called with terms whose sum is beyond the largest number, long before the last of them, and the gradient of
# its outputs.
OVERFLOWS: dict[str, tuple[str, Callable[[], Arguments], tuple[str, ...], float]] = {
    "rows of bias_gelu": ("bias_gelu", lambda: _first(rows(), 640, "bias"), ("grad bias",), 1e38),
    "rows of layer_norm": ("layer_norm", lambda: _first(rows(), 640), ("grad bias",), 1e38),
    "rows of dropout_add_layer_norm": (
        "dropout_add_layer_norm",
        lambda: _first(rows(), 640) | {"residual": rows()["x"][:640]},
        ("grad bias",),
        1e38,
    ),
    "rows of a table": (
        "embedding_layer_norm",
        lambda: {n: x[:, :640] if x is not None and n.endswith("ids") else x for n, x in embedding().items()},
        ("grad bias", "grad word"),
        1e37,
    ),
    "rows of a bias": (
        "attention",
        lambda: {
            "query": torch.zeros(4, 300, 2, SIZE),
            "key": torch.zeros(4, FEW, 2, SIZE),
            "value": (1.0 + thirds(FEW, signs=True)).expand(4, FEW, 2, SIZE),
            "bias": torch.zeros(1, 2, 1, FEW),
        },
        ("grad bias",),
        1e36,
    ),
    "sequences that share a bias": (
        "relative_attention",
        lambda: {
            n: x
            for n, x in CASES["sequences that share a table"][1]().items()
            if n in ("query", "key", "value", "position_key", "content_bias")
        },
        ("grad content_bias",),
        1e36,
    ),
    "a product of few rows": (
        "linear",
        lambda: {"x": torch.full((4, 5000), 1e20), "weight": torch.full((20, 5000), 1e17)},
        ("out 0",),
        1.0,
    ),
}


def _first(arguments: Arguments, count: int, *names: str) -> Arguments:
    """With the first rows of x, and of the parameters those that are named, or all."""
    return {n: x[:count] if n == "x" else x for n, x in arguments.items() if n == "x" or not names or n in names}


@pytest.mark.parametrize(
    ("case", "runner"),
    [
        (case, runner)
        for case, (op, *_) in OVERFLOWS.items()
        for runner in runners_of(SPECS[op])
        if runner not in SLOW or case in ("rows of bias_gelu", "rows of a bias")
    ],
)
def test_a_sum_that_overflows_is_infinite(case: str, runner: str) -> None:
    """What an addition rounds off is given back; of one that overflows that would make a NaN of the sum."""
    op, make, wanted, gradient = OVERFLOWS[case]
    plain = results(SPECS[op].plain, make(), wanted, gradient=gradient)
    with running(runner) as backend:
        function = functools.partial(SPECS[op].function, backend=backend)
        ours = results(function, make(), wanted, device_of(runner), gradient)
    for name in wanted:
        at = plain[name].isinf()
        assert at.any(), f"{name}: nothing overflows"
        assert torch.equal(ours[name][at], plain[name][at]), name
