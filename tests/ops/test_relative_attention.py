"""Relative attention: its gradient by hand, packed rows, rows at given positions, dropout, memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from relative_inputs import BACKENDS, UNSEEN_RANK, generator, lse_of, segments, tensors, trained

from pyxlbert import relative_attention
from pyxlbert.reference import relative_attention as reference
from pyxlbert.reference.philox import Tag, keep_scores
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.direct import Direct

RANKS = {
    "query_rank": torch.tensor([[0, 2, 1, 4], [3, 0, 0, 2]], dtype=torch.int32),
    "key_rank": torch.tensor([[-1, 1, 2, 0, UNSEEN_RANK], [-1, -1, 2, 1, 0]], dtype=torch.int32),
}
GRADCHECK = {
    "every option": {**RANKS, "see_self": True, "key_lengths": torch.tensor([5, 3]), "dropout_p": 0.3, "seed": 5},
    "uniform rows": {**RANKS, "key_lengths": torch.tensor([5, 0]), "masked_rows": "uniform"},
    "uniform rows, causal": {"key_lengths": torch.tensor([5, 0]), "causal": True, "masked_rows": "uniform"},
    "causal, mask": {"causal": True, "attention_mask": torch.rand(2, 2, 4, 5, generator=generator()) > 0.3},
    "positions": {"query_positions": torch.tensor([[2, -1, 0, 4], [3, 3, 1, 0]], dtype=torch.int32), "offset": 4},
}


@pytest.mark.parametrize("name", GRADCHECK)
@pytest.mark.parametrize("tables", [(), (2,)], ids=["one table", "two tables"])
def test_hand_written_gradient(name: str, tables: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's backward against numerical differentiation in float64."""
    # A difference of scores would vanish beside -1e30; -1e3 hides as well and leaves it.
    monkeypatch.setattr(reference, "UNIFORM_SCORE", -1e3)
    arguments = tensors(rows=4, keys=5, head_size=3, table=(*tables, 9), dtype=torch.float64)
    arguments |= segments(2, 4, 5, 2, 3, torch.float64) | GRADCHECK[name]
    names = [n for n, x in arguments.items() if isinstance(x, torch.Tensor) and x.requires_grad]

    def call(*values: torch.Tensor) -> torch.Tensor:
        return relative_attention(**{**arguments, **dict(zip(names, values, strict=True))}, backend="torch")

    assert torch.autograd.gradcheck(call, trained(arguments), fast_mode=True)


def test_hand_written_gradient_of_packed_rows() -> None:
    q = tensors(batch=1, rows=6, head_size=3, table=(2, 8), dtype=torch.float64)
    arguments = {n: x.detach()[0] if n in ("query", "key", "value") else x.detach() for n, x in q.items()}
    options = {"cu_seqlens": torch.tensor([0, 4, 6], dtype=torch.int32), "max_seqlen": 4, "dropout_p": 0.2, "seed": 1}
    names = list(arguments)

    def call(*values: torch.Tensor) -> torch.Tensor:
        return relative_attention(**dict(zip(names, values, strict=True)), **options, backend="torch")

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in arguments.values()], fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_padded(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout bits, ranks, segments, a table for each half of the batch; forward, lse and every gradient."""
    lengths, longest = torch.tensor([7, 0, 31, 20]), 31
    a = tensors(4, longest, head_size=16, table=(2, 2 * longest))
    a |= segments(4, longest, longest, 2, 16, torch.float32)
    draw = generator(5)
    a["query_rank"] = torch.randint(0, 9, (4, longest), generator=draw).int()
    a["key_rank"] = torch.randint(-1, 9, (4, longest), generator=draw).int()
    inside = torch.arange(longest) < lengths[:, None]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    by_token = {n for n, x in a.items() if x.shape[:2] == (4, longest)}
    packed = {
        n: (x.detach()[inside] if n in by_token else x.detach()).requires_grad_(x.requires_grad) for n, x in a.items()
    }
    options = {"see_self": True, "dropout_p": 0.4, "seed": 11, "backend": backend}
    wanted = relative_attention(**a, key_lengths=lengths, **options)
    ours = relative_attention(**packed, cu_seqlens=offsets, max_seqlen=longest, **options)
    compare.close("ours", ours, wanted[inside], tolerances.SUMMATION_ORDER)
    cotangent = torch.randn(ours.shape, generator=draw)
    wide = torch.zeros_like(wanted).masked_scatter(inside[..., None, None], cotangent)
    names = [n for n, x in a.items() if x.requires_grad]
    for name, x, y in zip(
        names,
        torch.autograd.grad(ours, trained(packed), cotangent),
        torch.autograd.grad(wanted, trained(a), wide),
        strict=True,
    ):
        compare.close(name, x, y[inside] if name in by_token else y, tolerances.SUMMATION_ORDER)
    without = relative_attention(**packed, cu_seqlens=offsets, **options)
    compare.close("without", without, ours, tolerances.SUMMATION_ORDER)
    lse = lse_of(packed, monkeypatch, cu_seqlens=offsets, **options)
    theirs = lse_of(a, monkeypatch, key_lengths=lengths, **options)
    assert lse.shape == (2, int(lengths.sum()))
    compare.close("lse", lse, theirs.transpose(1, 2)[inside].t(), tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_at_given_positions(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that stand at positions equal those rows of the full call, forward and backward; -1 is a row of zeros."""
    a = tensors(2, 12, 15, head_size=16) | segments(2, 12, 15, 2, 16, torch.float32)
    draw = generator(5)
    a["query_rank"] = torch.randint(0, 9, (2, 12), generator=draw).int()
    a["key_rank"] = torch.randint(-1, 9, (2, 15), generator=draw).int()
    positions = torch.tensor([[7, 0, -1, 11], [2, -1, 3, 10]], dtype=torch.int32)
    real, place = positions >= 0, positions.clamp(min=0).long()
    sequence = torch.arange(2)[:, None]
    few = dict(a)
    for name in ("query", "query_rank", "query_segments"):
        few[name] = a[name].detach()[sequence, place].requires_grad_(a[name].requires_grad)
    few |= {"query_positions": positions, "offset": 12}
    ours, full = relative_attention(**few, backend=backend), relative_attention(**a, backend=backend)
    wanted = full[sequence, place].masked_fill(~real[..., None, None], 0.0)
    compare.close("ours", ours, wanted, tolerances.SUMMATION_ORDER)
    assert not ours[~real].any()
    cotangent = torch.randn(ours.shape, generator=draw)
    names = [n for n, x in a.items() if x.requires_grad]
    for name, x, y in zip(
        names,
        torch.autograd.grad(ours, trained(few), cotangent),
        torch.autograd.grad(wanted, trained(a), cotangent),
        strict=True,
    ):
        if name == "query":
            x, y = x[real], y[sequence, place][real]
        compare.close(name, x, y, tolerances.SUMMATION_ORDER)
    lse = lse_of(few, monkeypatch, backend=backend).transpose(1, 2)
    assert (lse[~real] == torch.inf).all() and lse[real].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_few_rows_far_apart(backend: str) -> None:
    """Three rows that meet more of the table than as many neighbours would."""
    a = tensors(1, 400, head_size=16)
    positions = torch.tensor([[0, 180, 370]], dtype=torch.int32)
    few = a | {"query": a["query"][:, positions[0].long()], "query_positions": positions, "offset": 400}
    ours, full = relative_attention(**few, backend=backend), relative_attention(**a, backend="torch")
    compare.close("ours", ours, full[:, positions[0].long()], tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_part_of_the_batch_has_its_table(backend: str) -> None:
    """Sequence b meets table b * G // B; a table's gradient is the sum over its sequences."""
    a = tensors(6, 9, table=(3, 18))
    out = relative_attention(**a, backend=backend)
    (whole,) = torch.autograd.grad(out.square().sum(), a["position_key"])
    for table in range(3):
        own = slice(2 * table, 2 * table + 2)
        part = {n: x[own] if x.dim() == 4 and n != "position_key" else x for n, x in a.items()}
        part["position_key"] = a["position_key"][table]
        alone = relative_attention(**part, backend=backend)
        compare.close("alone", alone, out[own], tolerances.SUMMATION_ORDER)
        (gradient,) = torch.autograd.grad(alone.square().sum(), a["position_key"])
        compare.close("result", gradient[table], whole[table], tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_bits(backend: str) -> None:
    """The gradient of value shows the weights: exactly zero where the op's own counter drops."""
    rows, keys = 6, 50
    a = {n: torch.zeros_like(x) for n, x in tensors(1, rows, keys, 1, rows).items()}
    a["value"] = a["value"].requires_grad_()
    cotangent = torch.eye(rows)[None, :, None]
    out = relative_attention(**a, dropout_p=0.5, seed=2**40 + 3, backend=backend)
    (weights,) = torch.autograd.grad(out, a["value"], cotangent)
    keep = keep_scores(torch.tensor([2**40 + 3]), 0.5, 1, 1, rows, keys, Tag.RELATIVE_ATTENTION)[0, 0]
    assert torch.equal(weights[0, :, 0].T != 0, keep)
    # The same weights in forward.
    b = {n: torch.zeros_like(x) for n, x in tensors(1, rows, keys, 1, keys).items()}
    b["value"] = torch.eye(keys)[None, :, None]
    out = relative_attention(**b, dropout_p=0.5, seed=2**40 + 3, backend=backend)
    assert torch.equal(out[0, :, 0] != 0, keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_nobody_wants_are_not_computed(backend: str) -> None:
    a = tensors() | segments(2, 5, 5, 2, 8, torch.float32)
    names = [n for n, x in a.items() if x.requires_grad]
    wanted = dict(
        zip(names, torch.autograd.grad(relative_attention(**a, backend=backend).sum(), trained(a)), strict=True)
    )
    for name in names:
        alone = {n: x.detach() for n, x in a.items()} | {name: a[name]}
        out = relative_attention(**alone, backend=backend)
        compare.same_bits(name, torch.autograd.grad(out.sum(), a[name])[0], wanted[name])
    names = ("query", "key", "value", "position_key", "content_bias", "position_bias")
    call: dict[str, Any] = {n: a[n].detach() for n in names} | {"offset": 5, "scale": 1.0}
    out, lse = Direct(backend).relative_attention_fwd(**call)
    found = Direct(backend).relative_attention_bwd(out, out, lse, **call, needs=[False] * 8)
    assert [x.numel() for x in found] == [0] * 8


def test_a_bound_on_the_lengths_may_be_any_number() -> None:
    """Memory and bits follow the sequences and the offset, not max_seqlen."""
    a = {n: x.detach() for n, x in tensors(1, 7, table=(80,)).items()}
    packed = {n: x[0] if x.dim() == 4 else x for n, x in a.items()}
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    found = []
    for longest in (4, 7, 30):
        packed["query"] = packed["query"].detach().requires_grad_()
        out = relative_attention(**packed, cu_seqlens=offsets, max_seqlen=longest, offset=40, backend="cpu")
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), packed["query"])))
    for other in found[1:]:
        for name, x, y in zip(("out", "dquery"), found[0], other, strict=True):
            compare.same_bits(name, x, y)
    # The default offset is the bound, and the table must hold it.
    with pytest.raises(ValueError, match=f"position_key: got 80 rows .*wanted at least {2**63}"):
        relative_attention(**packed, cu_seqlens=offsets, max_seqlen=2**62)


def test_compiled_packed_rows_need_their_longest_length() -> None:
    a = tensors(1, 7, table=(14,))
    packed = {n: x.detach()[0] if x.dim() == 4 else x.detach() for n, x in a.items()}
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    wanted = relative_attention(**packed, cu_seqlens=offsets, max_seqlen=7)
    compiled = torch.compile(relative_attention, fullgraph=True, backend="eager")
    compare.close("result", compiled(**packed, cu_seqlens=offsets, max_seqlen=7), wanted, tolerances.SUMMATION_ORDER)
    with pytest.raises(Exception, match="max_seqlen"):
        compiled(**packed, cu_seqlens=offsets)


MEMORY = """
import torch
import pyxlbert
from pyxlbert.testing.memory import peak_memory

torch.set_num_threads({threads})
rows, heads, head_size, backward = 8192, 12, 64, {backward}
inputs = [torch.randn(1, rows, heads, head_size) for _ in range(3)]
inputs += [torch.randn(2 * rows, heads, head_size), *torch.randn(2, heads, head_size)]
inputs = [x.requires_grad_(backward) for x in inputs]
small = [torch.randn(1, 64, heads, head_size) for _ in range(3)]
pyxlbert.relative_attention(*small, torch.randn(128, heads, head_size), backend="cpu")


def forward():
    query, key, value, table, content_bias, position_bias = inputs
    biases = dict(content_bias=content_bias, position_bias=position_bias)
    return pyxlbert.relative_attention(query, key, value, table, **biases, backend="cpu")


if backward:
    out = forward()
    cotangent = torch.randn_like(out)
    print(peak_memory(lambda: torch.autograd.grad(out, inputs, cotangent)))
else:
    print(peak_memory(forward))
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="there is no native module")
@pytest.mark.parametrize(
    ("backward", "threads", "most"), [(False, 2, 64), (False, 32, 64), (True, 2, 256), (True, 32, 256)]
)
def test_memory_beyond_inputs_and_results(backward: bool, threads: int, most: int) -> None:
    """MB at 8192 positions and 12 heads of 64, where one plane's scores alone are 256: a fresh process's high-water
    mark, for any number of threads."""
    code = MEMORY.format(threads=threads, backward=backward)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < most * 1e6
