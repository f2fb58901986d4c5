"""What is special to the Triton kernels of scores: tiles left out, tiles of other sizes, far offsets, atomics."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pyxlbert
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.memory import far

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
configurations = importlib.import_module("pyxlbert.kernels._configurations")
relative = importlib.import_module("pyxlbert.kernels._relative")
attention = importlib.import_module("pyxlbert.kernels.attention")
INTERPRETED = importlib.import_module("pyxlbert.kernels._launch").INTERPRETED
# Keys of whole tiles that no query sees: tiles are at most 32 wide in the interpreter, and 64 on a GPU.
LENGTH, HIDDEN = (96, slice(32, 64)) if INTERPRETED else (192, slice(64, 128))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], **options) -> list[Tensor]:
    """The output and the gradients of the tensors, on backend "triton" unless told otherwise."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, **{"backend": "triton"} | options)
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def agree(found: list[Tensor], wanted: list[Tensor]) -> None:
    for place, (ours, other) in enumerate(zip(found, wanted, strict=True)):
        compare.close(f"result {place}", ours, other, tolerances.SUMMATION_ORDER, least=1.0)


def test_attention_leaves_out_what_a_mask_empties() -> None:
    """What is not read cannot be wrong: keys and values of tiles that no query sees are NaN."""
    q, k, v = (randn(1, LENGTH, 1, 16, seed=i) for i in range(3))
    mask = torch.ones(1, 1, 1, LENGTH, dtype=torch.bool, device=DEVICE)
    mask[..., HIDDEN] = False
    bias = randn(1, 1, 1, LENGTH, seed=4)
    wanted = gradients(
        lambda *x, **o: pyxlbert.attention(*x[:3], bias=x[3], attention_mask=mask, **o),
        [q, k, v, bias],
        backend="torch",
    )
    k, v = k.clone(), v.clone()
    k[:, HIDDEN] = v[:, HIDDEN] = torch.nan
    found = gradients(lambda *x, **o: pyxlbert.attention(*x[:3], bias=x[3], attention_mask=mask, **o), [q, k, v, bias])
    agree(found, wanted)


@pytest.mark.parametrize(
    ("by", "see_self", "masked_rows"),
    [("ranks", False, "uniform"), ("mask", False, "zero"), ("ranks", True, "zero"), ("mask", True, "uniform")],
)
def test_relative_attention_leaves_out_what_is_not_seen(by: str, see_self: bool, masked_rows: str) -> None:
    """By ranks or a mask, and with rows that see themselves: those of the hidden keys are then seen by one row each."""
    q, k, v = (randn(2, LENGTH, 1, 16, seed=i) for i in range(3))
    table = randn(2 * LENGTH, 1, 16, seed=3)
    hidden = torch.zeros(2, LENGTH, dtype=torch.bool, device=DEVICE)
    hidden[0, HIDDEN] = True
    given = {"see_self": see_self, "masked_rows": masked_rows}
    if by == "ranks":
        given |= {"query_rank": torch.zeros(2, LENGTH, dtype=torch.int32, device=DEVICE), "key_rank": hidden.int() - 1}
    else:
        given |= {"attention_mask": ~hidden[:, None, None]}

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **options) -> Tensor:
        return pyxlbert.relative_attention(q, k, v, table, **given, **options)

    wanted = gradients(call, [q, k, v, table], backend="torch")
    agree(gradients(call, [q, k, v, table]), wanted)
    if see_self:
        return
    k, v = k.clone(), v.clone()
    k[0, HIDDEN] = v[0, HIDDEN] = torch.nan
    # The table's gradient takes keys by their distance, so that its tiles hold seen keys beside hidden ones.
    agree(gradients(call, [q, k, v, table])[:4], wanted[:4])


def test_a_sequence_of_which_nothing_is_seen_is_left_out() -> None:
    """By the kernel of the table's gradient too, which walks all sequences."""
    q, k, v = (randn(2, 64, 2, 16, seed=i) for i in range(3))
    table = randn(128, 2, 16, seed=3)
    ranks = torch.tensor([[0], [1]], dtype=torch.int32, device=DEVICE).expand(2, 64)
    given = {"query_rank": torch.ones_like(ranks), "key_rank": ranks.contiguous()}

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **options) -> Tensor:
        return pyxlbert.relative_attention(q, k, v, table, **given, **options)

    wanted = gradients(call, [q, k, v, table], backend="torch")
    k, v = k.clone(), v.clone()
    k[1] = v[1] = torch.nan
    agree(gradients(call, [q, k, v, table]), wanted)


TILES = {
    "16x16": configurations.Tile(16, 16, 4, 1),
    "16x64": configurations.Tile(16, 64, 4, 1),
    "64x64": configurations.Tile(64, 64, 4, 1),
    "128x64": configurations.Tile(128, 64, 4, 1),
    "64x16": configurations.Tile(64, 16, 4, 1),
}


def use_tile(monkeypatch: pytest.MonkeyPatch, tile: configurations.Tile, carry: bool, **choices: int) -> None:
    """This tile for every kernel; of the other choices each where a kernel has it."""
    having = {"CARRY": configurations.CARRYING, "FRESH": configurations.RENEWING, "PIECES": configurations.CUTTING}

    def configuration(kernel: str, query: Tensor, extras: bool, segments: bool = False) -> configurations.Tile:
        given = {"CARRY": carry} | choices
        return tile._replace(**{name: value for name, value in given.items() if kernel in having[name]})

    for module in (relative, attention):
        monkeypatch.setattr(module, "configuration", configuration)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_attention_in_tiles_of_other_sizes(tile: configurations.Tile, monkeypatch) -> None:
    """Results do not depend on the table of tiles, beyond the order of summation."""
    use_tile(monkeypatch, tile, False)
    t = max(tile.BLOCK_M, tile.BLOCK_N) + 11
    q, k, v = (randn(2, t, 1, 16, seed=i) for i in range(3))
    bias = randn(1, 1, t, t, seed=3)
    given = {"key_lengths": torch.tensor([t, t // 2], device=DEVICE), "causal": True, "dropout_p": 0.2, "seed": 5}

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, **options) -> Tensor:
        return pyxlbert.attention(q, k, v, bias=bias, **given, **options)

    agree(gradients(call, [q, k, v, bias]), gradients(call, [q, k, v, bias], backend="torch"))


@pytest.mark.parametrize(
    ("tile", "kind", "head_size", "dropout_p"),
    [
        ("16x16", "plain, carried", 16, 0.2),
        ("16x16", "ranks", 16, 0.2),
        ("16x64", "ranks, carried", 16, 0.2),
        ("16x64", "positions", 16, 0.2),
        ("64x64", "plain", 16, 0.2),
        ("64x64", "ranks, carried", 16, 0.2),
        # Long rows of float32, which are multiplied in pieces.
        ("16x16", "plain", 80, 0.0),
        ("16x16", "plain, carried", 128, 0.2),
        ("16x16", "ranks", 96, 0.0),
        ("16x16", "positions", 96, 0.2),
        ("16x16", "places", 72, 0.0),
    ],
)
def test_relative_attention_in_tiles_of_other_sizes(
    tile: str, kind: str, head_size: int, dropout_p: float, monkeypatch
) -> None:
    use_tile(monkeypatch, TILES[tile], "carried" in kind)
    t = TILES[tile].BLOCK_N + 11
    q, k, v, table, given = problem(kind, t, head_size)
    biases = {name: randn(1, head_size, seed=4 + i) for i, name in enumerate(("content_bias", "position_bias"))}
    given |= biases | {"dropout_p": dropout_p, "seed": 5}

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **options) -> Tensor:
        return pyxlbert.relative_attention(q, k, v, table, **given, **options)

    agree(gradients(call, [q, k, v, table]), gradients(call, [q, k, v, table], backend="torch"))


@pytest.mark.parametrize(
    ("tile", "kind", "head_size"),
    [
        ("16x16", "plain", 16),
        ("16x16", "ranks, carried", 16),
        ("16x64", "places", 16),
        ("16x16", "plain", 96),
        ("16x16", "positions", 96),
    ],
)
def test_relative_attention_with_addresses_computed_anew(tile: str, kind: str, head_size: int, monkeypatch) -> None:
    """The bits stay: an address is another only if what no compiler knows to be zero were none."""
    usual = TILES[tile]
    q, k, v, table, given = problem(kind, 2 * usual.BLOCK_N + 11, head_size)
    # The term of segments, and sequences that end inside of tiles.
    t = q.shape[1]
    segments = (torch.arange(t, device=DEVICE) // 20 % 2).int().expand(2, t)
    given |= {"query_segments": segments, "key_segments": segments, "segment_embedding": randn(2, 1, head_size, seed=6)}
    given |= {"segment_bias": randn(1, head_size, seed=7), "dropout_p": 0.2, "seed": 5}
    given |= {"key_lengths": torch.tensor([t, t // 2], device=DEVICE, dtype=torch.int32)}
    launched = []
    launch = relative.launch

    def watched(kernel, *arguments, **options) -> None:
        launched.append((kernel, options.get("FRESH"), options.get("PIECES")))
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(relative, "launch", watched)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **options) -> Tensor:
        return pyxlbert.relative_attention(q, k, v, table, **given, **options)

    def found(**choices) -> list[list[Tensor]]:
        use_tile(monkeypatch, usual, "carried" in kind, **choices)
        launched.clear()
        results = [gradients(call, [q, k, v, table])]
        if head_size <= 64:
            with pyxlbert.allow_atomics():
                results.append(gradients(call, [q, k, v, table]))
        return results

    before = found()
    assert {(fresh, pieces) for _, fresh, pieces in launched} == {(None, None)}
    same = found(FRESH=True)
    assert {kernel for kernel, fresh, _ in launched if fresh} == {relative.bwd_keys, relative.bwd_queries}
    for one, other in zip(before, same, strict=True):
        assert all(map(torch.equal, one, other))
    # Sums over columns in another order are near.
    halved = found(FRESH=True, PIECES=2)
    assert {kernel for kernel, _, pieces in launched if pieces} == {relative.bwd_queries}
    for one, other in zip(before, halved, strict=True):
        agree(one, other)


def problem(kind: str, t: int, head_size: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
    """Query, key, value, table and options: ranks, places of the queries, both ("positions") or a table a sequence, as
    `kind` says.
    """
    q, k, v = (randn(2, t, 1, head_size, seed=i) for i in range(3))
    table = randn(*((2,) if kind == "tables" else ()), 2 * t, 1, head_size, seed=3)
    given = {}
    order = torch.stack([torch.randperm(t, generator=torch.Generator().manual_seed(i)) for i in range(2)]).int()
    if "ranks" in kind or kind == "positions":
        given |= {"query_rank": order.to(DEVICE), "key_rank": order.to(DEVICE)}
    if kind in ("positions", "places"):
        given |= {"query_positions": order.to(DEVICE), "offset": t}
    return q, k, v, table, given


@pytest.mark.parametrize("kind", ["plain", "ranks", "positions", "tables"])
def test_the_tables_gradient_by_atomics(kind: str, monkeypatch) -> None:
    """The same gradients, without the kernel of the table; not where torch is to be deterministic."""
    q, k, v, table, given = problem(kind, 43)
    launched = []
    launch = relative.launch

    def watched(kernel, *arguments, **options) -> None:
        launched.append(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(relative, "launch", watched)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **options) -> Tensor:
        return pyxlbert.relative_attention(q, k, v, table, **given, **options)

    usual = gradients(call, [q, k, v, table])
    assert relative.bwd_table in launched
    launched.clear()
    with pyxlbert.allow_atomics():
        found = gradients(call, [q, k, v, table])
        assert relative.bwd_table not in launched
        launched.clear()
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            same = gradients(call, [q, k, v, table])
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    assert relative.bwd_table in launched
    agree(found, usual)
    for place, (one, other) in enumerate(zip(same, usual, strict=True)):
        compare.same_bits(f"result {place}", one, other)


@pytest.mark.parametrize(
    ("frozen", "left_out"),
    [
        (("table",), {"bwd_table"}),
        (("q", "content", "position"), {"bwd_queries"}),
        (("q", "table", "position"), {"bwd_table"}),
        (("k", "v", "table"), {"bwd_keys", "bwd_table"}),
    ],
    ids=["table", "query and biases", "all but a bias", "keys, values and table"],
)
@pytest.mark.parametrize("atomics", [False, True])
def test_kernels_of_gradients_that_nobody_wants_are_not_launched(
    frozen: tuple[str, ...], left_out: set[str], atomics: bool, monkeypatch
) -> None:
    """What is wanted has the same bits."""
    q, k, v, table, given = problem("plain", 20)
    leaves = {"q": q, "k": k, "v": v, "table": table}
    leaves |= {name: randn(*q.shape[-2:], seed=8) for name in ("content", "position")}
    launched, launch = [], relative.launch

    def watched(kernel, *arguments, **options) -> None:
        launched.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    def run(names: list[str]) -> dict[str, Tensor]:
        a = {name: x.detach().clone().requires_grad_(name in names) for name, x in leaves.items()}
        out = pyxlbert.relative_attention(
            *(a[name] for name in ("q", "k", "v", "table")),
            content_bias=a["content"],
            position_bias=a["position"],
            **given,
            backend="triton",
        )
        launched.clear()
        return dict(zip(names, torch.autograd.grad(out.square().sum(), [a[name] for name in names]), strict=True))

    monkeypatch.setattr(relative, "launch", watched)
    with pyxlbert.allow_atomics() if atomics else contextlib.nullcontext():
        usual = run(list(leaves))
        kernels = set(launched)
        assert kernels == {"bwd_rows", "bwd_keys", "bwd_queries"} | (set() if atomics else {"bwd_table"})
        found = run([name for name in leaves if name not in frozen])
        if atomics and "table" not in frozen:
            # It is what adds to the table.
            left_out = left_out - {"bwd_queries"}
        assert set(launched) == kernels - left_out
    for name, gradient in found.items():
        if not (atomics and name == "table"):
            compare.same_bits(name, gradient, usual[name])


@pytest.mark.parametrize(("dtype", "by_atomics"), [(torch.float32, False), (torch.bfloat16, True)])
def test_long_rows_of_float32_leave_the_table_to_its_kernel(dtype: torch.dtype, by_atomics: bool, monkeypatch) -> None:
    launched = []
    monkeypatch.setattr(relative, "launch", lambda kernel, *arguments, **options: launched.append(kernel))
    q, k, v, table, given = problem("plain", 24, 72)
    q, k, v, table = (x.to(dtype).requires_grad_() for x in (q, k, v, table))
    with pyxlbert.allow_atomics():
        pyxlbert.relative_attention(q, k, v, table, **given, backend="triton").sum().backward()
    assert (relative.bwd_table in launched) == (not by_atomics)


def test_atomics_of_two_stream_attention() -> None:
    g, h, k, v = (randn(2, rows, 1, 16, seed=seed) for seed, rows in enumerate((40, 7, 40, 40)))
    table = randn(80, 1, 16, seed=4)
    rank = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(2)]).int()
    rank = rank.to(DEVICE)
    targets = rank.argsort(1)[:, 33:].int()

    def call(g: Tensor, h: Tensor, k: Tensor, v: Tensor, table: Tensor, **options) -> Tensor:
        streams = pyxlbert.two_stream_attention(
            g, h, k, v, table, query_rank=rank, key_rank=rank, target_positions=targets, **options
        )
        return torch.cat(streams, 1)

    usual = gradients(call, [g, h, k, v, table])
    with pyxlbert.allow_atomics():
        agree(gradients(call, [g, h, k, v, table]), usual)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["sequences", "rows", "heads"])
def test_scores_of_far_tensors(axis: int) -> None:
    """Sequences, rows and heads more than 2³¹ elements apart are read where they are."""
    shape = (2, 3, 2, 16)
    q, k, v, dout = (far(randn(*shape, seed=i, dtype=torch.float16), axis) for i in range(4))
    table = far(randn(6, 2, 16, seed=5, dtype=torch.float16), max(0, axis - 1))
    near = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v, table, dout)]
    for function, count in ((pyxlbert.attention, 3), (pyxlbert.relative_attention, 4)):
        results = []
        for *tensors, cotangent in ((q, k, v, table, dout), near):
            leaves = [x.detach().requires_grad_() for x in tensors[:count]]
            out = function(*leaves, backend="triton")
            results.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent)])
        for place, (ours, wanted) in enumerate(zip(*results, strict=True)):
            compare.same_bits(f"{function.__name__} {place}", ours, wanted)


@pytest.mark.parametrize("axis", range(4), ids=["sequences", "heads", "queries", "keys"])
def test_masks_and_biases_of_far_tensors(axis: int) -> None:
    q, k, v = (randn(2, 3, 2, 16, seed=i, dtype=torch.float16) for i in range(3))
    bias, mask = randn(2, 2, 3, 3, seed=7, dtype=torch.float16), randn(2, 2, 3, 3, seed=8) > -0.5
    wanted = pyxlbert.attention(q, k, v, bias=bias, attention_mask=mask, backend="triton")
    found = pyxlbert.attention(q, k, v, bias=far(bias, axis), attention_mask=far(mask, axis), backend="triton")
    compare.same_bits("attention", found, wanted)
    table = randn(6, 2, 16, seed=5, dtype=torch.float16)
    wanted = pyxlbert.relative_attention(q, k, v, table, attention_mask=mask, backend="triton")
    found = pyxlbert.relative_attention(q, k, v, table, attention_mask=far(mask, axis), backend="triton")
    compare.same_bits("relative_attention", found, wanted)


# The older and the newer name for what may round float32 do not mix: each chain is set in a process of its own.
PRECISIONS = {
    "older": (("matmul.allow_tf32 = True", "tf32"), ("matmul.allow_tf32 = False", "ieee")),
    "newer": (
        ("matmul.fp32_precision = 'tf32'", "tf32"),
        ("matmul.fp32_precision = 'ieee'", "ieee"),
        ("matmul.fp32_precision = 'none'; torch.backends.fp32_precision = 'tf32'", "tf32"),
    ),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision_by_either_name(name: str) -> None:
    if name == "newer" and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return
    program = (
        "import sys, torch; from pyxlbert.kernels._attention import precision_of; matmul = torch.backends.cuda.matmul"
    )
    program += "\nfor setting in sys.argv[1:]: exec(setting); print(*map(precision_of, (torch.float32, torch.float16)))"
    settings, wanted = zip(*PRECISIONS[name], strict=True)
    done = subprocess.run([sys.executable, "-c", program, *settings], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{one} ieee" for one in wanted], done.stderr[-2000:]
