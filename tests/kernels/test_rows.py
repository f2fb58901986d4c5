"""What is special to the Triton kernels on rows: long runs of one id, many parts and rows, ids out of range."""

from __future__ import annotations

import importlib

import pytest
import torch

import pyxlbert
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.direct import Direct
from pyxlbert.testing.memory import far

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
bias_gelu = importlib.import_module("pyxlbert.kernels.bias_gelu")
rows = importlib.import_module("pyxlbert.kernels._rows")
INTERPRETED = importlib.import_module("pyxlbert.kernels._launch").INTERPRETED
TRITON = Direct("triton")


def tables(tokens: int, words: int, columns: int = 12) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE)

    return {
        "input_ids": torch.randint(words, (1, tokens), generator=g).to(DEVICE),
        "word": randn(words, columns),
        "token_type": randn(2, columns),
        "position": randn(tokens, columns),
        "weight": randn(columns),
        "bias": randn(columns),
    }


@pytest.mark.parametrize("words", [1, 2, 3, 400])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300])
def test_runs_longer_than_a_chunk(words: int, tokens: int) -> None:
    """One id may stand anywhere in the order: at a chunk's edge, over several chunks, in all of them."""
    given = tables(tokens, words)
    found = {}
    for backend in ("triton", "torch"):
        arguments = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in given.items()}
        y = pyxlbert.embedding_layer_norm(*arguments.values(), padding_idx=0 if words > 1 else None, backend=backend)
        weights = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape)
        names = ("word", "token_type", "position", "weight", "bias")
        found[backend] = torch.autograd.grad((y * weights).sum(), [arguments[n] for n in names])
    for name, ours, wanted in zip(("word", "token_type", "position"), *found.values(), strict=False):
        # The gradient of a normalised sum cancels: its terms scale it.
        compare.close(name, ours, wanted, tolerances.SUMMATION_ORDER, least=0.1 * tokens)


def test_ids_out_of_range_are_not_read() -> None:
    """On a GPU values are not checked: such a row is NaN, and adds to nothing."""
    given = tables(5, 7)
    guarded = torch.full((9, 12), torch.nan, device=DEVICE)
    guarded[1:8] = given["word"]
    word = guarded[1:8]
    bad = given["input_ids"].clone()
    bad[0, 1], bad[0, 3] = -1, 7
    rest = (given["token_type"], given["position"], given["weight"], given["bias"], None, None)
    y, _, mean, rstd = TRITON.embedding_layer_norm_fwd(bad, word, *rest, 0.0, None, 1e-5, torch.float32, None)
    good = torch.tensor([True, False, True, False, True], device=DEVICE)
    assert y[0, ~good].isnan().all()
    wanted = TRITON.embedding_layer_norm_fwd(bad.clamp(0, 6), word, *rest, 0.0, None, 1e-5, torch.float32, None)[0]
    compare.same_bits("rows", y[0, good], wanted[0, good])
    dy = torch.ones_like(y)
    dword, dtype, _, dweight, dbias = TRITON.embedding_layer_norm_bwd(
        dy, bad, word, *rest, mean, rstd, 0.0, None, -1, True, True, True, True
    )
    assert all(x.isfinite().all() for x in (dword, dtype, dweight, dbias))
    unused = torch.ones(7, dtype=torch.bool, device=DEVICE)
    unused[bad[0, good]] = False
    assert not dword[unused].any()
    compare.close("dbias", dbias, torch.full_like(dbias, 3.0), tolerances.SUMMATION_ORDER)


def test_sums_over_more_rows_than_programs() -> None:
    tile = rows.tile_of(4)
    for count in (1, 15, 16, 17, 16 * 512, 16 * 512 + 1, 10**6):
        parts, each = rows.parts_of(count, tile)
        assert each % tile.rows == 0 and (parts - 1) * each < count <= parts * each and parts <= 512
        parts, each = rows.parts_of(count, tile, blocks=16)
        assert each % tile.rows == 0 and (parts - 1) * each < count <= parts * each and parts <= 64
    x = torch.randn(16 * 512 + 5, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    partial = torch.stack([x[:300].sum(0), x[300:].sum(0)])
    out = torch.empty(4, device=DEVICE)
    rows.sum_parts(partial[None], out)
    compare.close("sum", out, partial.sum(0), tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("columns", [1536, 3072, 4096])
def test_no_thread_of_bias_gelu_has_columns_behind_the_last(columns: int, monkeypatch) -> None:
    """Every program has 4,096 elements: of a row as a whole, 3072 columns would be padded to 4096."""
    grids, launch = {}, bias_gelu.launch

    def watched(kernel, grid, *arguments, **options) -> None:
        grids[kernel.__name__] = (*grid, options["BLOCK_M"] * options["BLOCK_N"])
        launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(bias_gelu, "launch", watched)
    x = torch.zeros(16, columns, device=DEVICE).requires_grad_()
    pyxlbert.bias_gelu(x, backend="triton").sum().backward()
    assert grids == dict.fromkeys(("_fwd", "_bwd"), (16 * columns // 4096, 4096))


@pytest.mark.parametrize("sums", [1, 2, 3])
def test_all_sums_of_a_call_are_one_launch(sums: int, monkeypatch) -> None:
    """Over more columns and parts than a program takes, each rounded to its own dtype."""
    partial = torch.randn(sums, 300, 100, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)[:sums]
    outs = [torch.empty(100, dtype=dtype, device=DEVICE) for dtype in dtypes]
    grids, launch = [], rows.launch

    def watched(kernel, grid, *arguments, **options) -> None:
        grids.append(grid)
        launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(rows, "launch", watched)
    rows.sum_parts(partial, *outs)
    assert grids == [(7 * sums,)]
    for out, wanted in zip(outs, partial.double().sum(1), strict=True):
        compare.close("sum", out, wanted, max(torch.finfo(out.dtype).eps, tolerances.SUMMATION_ORDER))


def test_rows_that_are_too_long_are_refused() -> None:
    x = torch.zeros(1, 2**16 + 1, device=DEVICE)
    with pytest.raises(RuntimeError, match="rows of at most 65536 elements, not 65537"):
        pyxlbert.layer_norm(x, x[0], x[0], backend="triton")


def test_rows_that_are_far_apart() -> None:
    """Rows more than 2³¹ elements apart, forward and backward."""
    x, residual, dy = (
        torch.randn(3, 12, generator=torch.Generator().manual_seed(i)).to(DEVICE).half() for i in range(3)
    )
    w, b = x[0].clone(), x[1].clone()
    calls = {
        "layer_norm": lambda x, _: pyxlbert.layer_norm(x, w, b, backend="triton"),
        "bias_gelu": lambda x, _: pyxlbert.bias_gelu(x, b, backend="triton"),
        "dropout_add_layer_norm": lambda x, r: pyxlbert.dropout_add_layer_norm(x, r, w, b, backend="triton"),
    }
    for name, call in calls.items():
        results = []
        for place in (far, lambda x, _: x):
            leaves = [place(x.clone(), 0).requires_grad_() for x in (x, residual)]
            y = call(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, place(dy, 0), allow_unused=True)])
        for ours, wanted in zip(*results, strict=True):
            assert (ours is None) == (wanted is None)
            if ours is not None:
                compare.same_bits(name, ours, wanted)
    given = tables(2, 3)
    given["word"] = far(given["word"].half(), 0)
    for name in ("token_type", "position", "weight", "bias"):
        given[name] = given[name].half()
    near = given | {"word": given["word"].contiguous()}
    found, wanted = (pyxlbert.embedding_layer_norm(*x.values(), backend="triton") for x in (given, near))
    compare.same_bits("embedding_layer_norm", found, wanted)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs every program, on memory that it has to have")
@pytest.mark.parametrize("op", ["layer_norm", "bias_gelu", "dropout_add_layer_norm", "embedding_layer_norm"])
def test_more_rows_than_32_bits_count(op: str, monkeypatch) -> None:
    """Of 2³¹ rows and some more those of the last program, forward and backward.

    The interpreter raises where a number overflows.  Memory that nobody touches costs nothing.
    """
    module = importlib.import_module(f"pyxlbert.kernels.{op}")
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    number, launched = builder.create_get_program_id, []

    def last(kernel, grid, device, *arguments, **options) -> None:
        def shifted(self, axis):
            handle = number(self, axis)
            handle.data = handle.data + handle.data.dtype.type(grid[axis] - 1)
            return handle

        launched.append(kernel.__name__)
        with monkeypatch.context() as patch:
            patch.setattr(builder, "create_get_program_id", shifted)
            kernel[(1,) * len(grid)](*arguments, **options)

    monkeypatch.setattr(module, "launch", last)
    # A program of backward has one tile.
    monkeypatch.setattr(module, "parts_of", lambda count, tile, blocks=1: (-(-count // tile.rows), tile.rows))
    count, half = 2**31 + 3, torch.float16
    one, w, b = (torch.tensor([x], dtype=half) for x in (1.5, 2.0, 0.25))
    x = one.expand(count, 1)
    mean, rstd, s = torch.empty(count), torch.empty(count), torch.empty(count, 1, dtype=half)
    mean[-3:], rstd[-3:], s[-3:] = 1.5, 1.0, 1.5
    if op == "bias_gelu":
        y = TRITON.bias_gelu_fwd(x, b, "none")
        dx, _ = TRITON.bias_gelu_bwd(x, x, b, "none", False)
    elif op == "layer_norm":
        (y,) = TRITON.layer_norm_fwd(x, w, b, 1e-5, False)
        dx, _, _ = TRITON.layer_norm_bwd(x, x, w, b, mean, rstd, False)
    elif op == "dropout_add_layer_norm":
        y, *_ = TRITON.dropout_add_layer_norm_fwd(x, x, w, b, eps=1e-5)
        dx, *_ = TRITON.dropout_add_layer_norm_bwd(x, None, s, w, b, mean=mean, rstd=rstd, x_dtype=half, needs_x=True)
    else:
        ids, tables = torch.empty(count, 1, dtype=torch.int32), (one[None], None, None, w, b)
        ids[-3:] = 0
        y = TRITON.embedding_layer_norm_fwd(ids, *tables, eps=1e-5, out_dtype=half)[0].view(count, 1)
        dx = torch.zeros(3, 1)
        TRITON.embedding_layer_norm_bwd(x[:, None], ids, *tables, mean=mean, rstd=rstd, padding_idx=-1)
    assert launched == ["_fwd", "_bwd"]
    # Of one column nothing is left but the bias, and no gradient.
    z = torch.tensor(1.75, dtype=torch.float64, requires_grad=True)
    gelu = torch.nn.functional.gelu(z)
    gelu.backward()
    wanted = (gelu.item(), 1.5 * z.grad.item()) if op == "bias_gelu" else (0.25, 0.0)
    for name, found, number in (("y", y, wanted[0]), ("dx", dx, wanted[1])):
        compare.close(name, found[-3:].double(), torch.full((3, 1), number).double(), torch.finfo(half).eps, least=1.0)
