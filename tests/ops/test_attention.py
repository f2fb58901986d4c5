"""What is special to attention."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import pyxlbert
from pyxlbert import attention, relative_attention
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.direct import Direct
from pyxlbert.testing.specs import SPECS

BACKENDS = ["torch", "cpu"]
PLAIN = SPECS["attention"].plain


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fused(batch: int, rows: int, heads: int, head_size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """query, key and value as slices of one projection, each requiring a gradient."""
    qkv = torch.randn(batch, rows, 3, heads, head_size, generator=generator(1)).to(dtype)
    return [x.detach().requires_grad_() for x in qkv.unbind(2)]


@pytest.mark.parametrize("shape", [(2, 2, 4, 5), (1, 2, 4, 5), (2, 1, 1, 5), (1, 1, 4, 1)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_hand_written_gradient(shape: tuple[int, ...], causal: bool) -> None:
    """The reference's backward against numerical differentiation in float64, every option at once."""
    draw = generator()
    q, k, v, bias = (
        torch.randn(*s, generator=draw, dtype=torch.float64, requires_grad=True)
        for s in ((2, 4, 2, 3), (2, 5, 2, 3), (2, 5, 2, 3), shape)
    )
    mask = torch.rand(2, 1, 4, 5, generator=draw) > 0.2

    def call(q, k, v, bias):
        return attention(
            q,
            k,
            v,
            bias=bias,
            attention_mask=mask,
            key_lengths=torch.tensor([5, 3]),
            causal=causal,
            dropout_p=0.3,
            seed=5,
            backend="torch",
        )

    assert torch.autograd.gradcheck(call, (q, k, v, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_in_unseen_keys_does_not_leak(backend: str, dtype: torch.dtype) -> None:
    q, k, v = fused(3, 40, 2, 24, dtype)
    lengths = torch.tensor([0, 13, 40])
    with torch.no_grad():
        for b, n in enumerate(lengths):
            k[b, n:], v[b, n:] = float("nan"), float("nan")
    out = attention(q, k, v, key_lengths=lengths, backend=backend)
    gradients = torch.autograd.grad(out.float().sum(), (q, k, v))
    for x in (out, *gradients):
        assert x.isfinite().all()
    assert not out[0].any() and not gradients[0][0].any()
    assert not any(g[b, n:].any() for g in gradients[1:] for b, n in enumerate(lengths))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["mask", "bias", "causal"])
def test_fully_masked_rows_are_zero(backend: str, how: str) -> None:
    """Zero output, zero gradients and lse = +inf, whatever masks the row; its neighbours are as they were."""
    q, k, v = fused(2, 9, 2, 16)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    mask[:, :, 4] = False
    options = {
        "mask": {"attention_mask": mask},
        "bias": {"bias": torch.zeros(1, 1, 9, 9).masked_fill(~mask, -torch.inf)},
        "causal": {"causal": True},
    }[how]
    if how == "causal":
        k, v = (x[:, :5].detach().requires_grad_() for x in (k, v))
    dead = slice(0, 4) if how == "causal" else slice(4, 5)
    out = attention(q, k, v, **options, backend=backend)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert not out[:, dead].any() and not gradients[0][:, dead].any()
    assert out[:, 8].any()
    _, lse = Direct(backend).attention_fwd(*(x.detach() for x in (q, k, v)), **options, scale=0.25)
    assert lse.shape == (2, 2, 9) and lse.dtype is torch.float32
    assert (lse[:, :, dead] == torch.inf).all() and lse[:, :, 8].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_padded(backend: str) -> None:
    """Dropout bits included: rows and keys are counted within their sequence."""
    lengths = torch.tensor([7, 0, 31, 20])
    q, k, v = fused(4, 31, 2, 32)
    inside = torch.arange(31) < lengths[:, None]
    options = {"causal": True, "dropout_p": 0.4, "seed": 11, "backend": backend}
    padded = attention(q, k, v, key_lengths=lengths, **options)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    p = [x.detach()[inside].requires_grad_() for x in (q, k, v)]
    packed = attention(*p, cu_seqlens=offsets, max_seqlen=31, **options)
    if backend == "cpu":
        compare.same_bits("packed", packed, padded[inside])
    cotangent = torch.randn(packed.shape, generator=generator(3))
    wide = torch.zeros_like(padded).masked_scatter(inside[..., None, None], cotangent)
    ours = torch.autograd.grad(packed, p, cotangent)
    theirs = [g[inside] for g in torch.autograd.grad(padded, (q, k, v), wide)]
    for name, a, b in zip("qkv", ours, theirs, strict=True):
        compare.close(name, a, b, tolerances.SUMMATION_ORDER)
    compare.close("packed", packed, padded[inside], tolerances.SUMMATION_ORDER)
    without = attention(*p, cu_seqlens=offsets, **options)
    compare.close("without", without, packed, tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bound_on_the_lengths_may_be_any_number(backend: str) -> None:
    """Neither memory nor bits depend on max_seqlen, and it may be another integer type's."""
    qkv = torch.randn(40, 3, 2, 24, generator=generator(5))
    offsets = torch.tensor([0, 3, 20, 40], dtype=torch.int32)
    found = []
    for longest in (20, np.int64(20), 41, 2**40, 2**62, 2**70):
        x = qkv.clone().requires_grad_()
        out = attention(*x.unbind(1), cu_seqlens=offsets, max_seqlen=longest, causal=True, backend=backend)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), x)))
    for other in found[1:]:
        for name, a, b in zip(("out", "dqkv"), found[0], other, strict=True):
            if backend == "cpu":
                compare.same_bits(name, a, b)
            else:
                compare.close(name, a, b, tolerances.SUMMATION_ORDER)


def test_dropout_bits_are_the_same_on_every_backend_and_level() -> None:
    q, k, v = (torch.zeros(2, t, 2, 8) for t in (5, 70, 70))
    v[:] = torch.randn(2, 70, 2, 8, generator=generator())
    wanted = attention(q, k, v, dropout_p=0.5, seed=2**40 + 3, backend="torch")
    before = pyxlbert._C.level()
    try:
        for level in pyxlbert._C.levels():
            pyxlbert._C.set_level(level)
            ours = attention(q, k, v, dropout_p=0.5, seed=2**40 + 3, backend="cpu")
            compare.close(level, ours, wanted, tolerances.SUMMATION_ORDER)
    finally:
        pyxlbert._C.set_level(before)


def test_no_seed_draws_from_the_default_generator() -> None:
    q, k, v = (torch.randn(1, 20, 1, 8) for _ in range(3))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append((attention(q, k, v, dropout_p=0.5), attention(q, k, v, dropout_p=0.5)))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0]) and not torch.equal(runs[0][0], runs[0][1])


def test_backward_drops_what_forward_dropped() -> None:
    """The gradient of value shows the weights: a dropped one is exactly zero."""
    q, k = torch.zeros(1, 6, 1, 4), torch.zeros(1, 50, 1, 4)
    v = torch.zeros(1, 50, 1, 6, requires_grad=True)
    q, k = (torch.nn.functional.pad(x, (0, 2)) for x in (q, k))
    rows = torch.eye(6)[None, :, None]
    out = attention(q, k, v, dropout_p=0.5, seed=9)
    (weights,) = torch.autograd.grad(out, v, rows)
    from pyxlbert.reference.philox import keep_scores

    keep = keep_scores(torch.tensor([9]), 0.5, 1, 1, 6, 50)[0, 0]
    assert torch.equal(weights[0, :, 0].T != 0, keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_whose_bias_is_the_lowest_number(backend: str) -> None:
    """finfo.min everywhere in a row is no mask: the row averages its keys, and its gradient is that of an average."""
    for keys in (10, 700):
        q, k, v = (torch.randn(1, t, 1, 16, generator=generator(t), requires_grad=True) for t in (3, keys, keys))
        bias = torch.zeros(1, 1, 3, keys)
        bias[:, :, 1] = torch.finfo(torch.float32).min
        dout = torch.randn(q.shape, generator=generator(2))

        def run(function, *tensors, bias=bias, dout=dout, **options):
            out = function(*tensors, bias=bias, **options)
            return out, *torch.autograd.grad(out, tensors, dout.to(out.dtype))

        ours, plain = run(attention, q, k, v, backend=backend), run(PLAIN, q, k, v)
        truth = run(PLAIN, *(x.detach().double().requires_grad_() for x in (q, k, v)), bias=bias.double())
        for name, a, b, t in zip(("out", "dq", "dk", "dv"), ours, plain, truth, strict=True):
            compare.within_budget(f"{keys} keys {name}", a, b, t)


def test_bias_gradient_does_not_depend_on_threads() -> None:
    """Broadcast over everything, long enough for several runs of key blocks."""
    q, k, v = fused(3, 1100, 2, 8)
    before = torch.get_num_threads()
    for shape in ((1, 1, 1100, 1100), (1, 2, 1, 1100), (3, 1, 1100, 1)):
        bias = torch.randn(shape, generator=generator()).requires_grad_()
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                out = attention(q, k, v, bias=bias, backend="cpu")
                found.append(torch.autograd.grad(out.square().sum(), (q, k, v, bias)))
        finally:
            torch.set_num_threads(before)
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                compare.same_bits(f"bias {shape}", a, b)


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    q, k, v = (torch.randn(1, 5, 1, 8, generator=generator()) for _ in range(3))
    bias = torch.randn(1, 1, 5, 5, generator=generator())
    for backend in BACKENDS:
        out, lse = Direct(backend).attention_fwd(q, k, v, bias=bias, scale=1.0)
        given = (out, out, lse, q, k, v)
        all_four = Direct(backend).attention_bwd(*given, bias=bias, scale=1.0, needs=[True] * 4)
        for needs in itertools.product([True, False], repeat=4):
            found = Direct(backend).attention_bwd(*given, bias=bias, scale=1.0, needs=list(needs))
            for one, other, need in zip(found, all_four, needs, strict=True):
                compare.same_bits(f"{backend} {needs}", one, other if need else other.new_empty(0))
        assert [x.numel() for x in Direct(backend).attention_bwd(*given, scale=1.0, needs=[True] * 4)][3] == 0


def test_views_of_one_projection_are_not_copied() -> None:
    """Slices of a fused projection, and an output gradient with strides, are read where they are."""
    from pyxlbert.cpu._attention import in_place

    qkv = torch.randn(2, 7, 3, 2, 16)
    for x in (*qkv.unbind(2), qkv[:, :, 0].transpose(0, 1), qkv[:, :1, 0].expand(2, 7, 2, 16)):
        assert in_place(x) is x


MEMORY = """
    import torch, pyxlbert
    from pyxlbert.testing.memory import peak_memory
    torch.set_num_threads(2)
    q, k, v = (torch.randn(1, {rows}, 1, 32, requires_grad=True) for _ in range(3))
    def run():
        out = pyxlbert.attention(q, k, v, key_lengths=torch.tensor([{rows} - 5]), dropout_p=0.1, backend="cpu")
        return out, *torch.autograd.grad(out.sum(), (q, k, v))
    print(peak_memory(run))
"""


def test_memory_is_linear_in_the_length() -> None:
    """A fresh process's high-water mark rises by far less than one Tq x Tk tensor, forward and backward."""
    rows = 8192
    code = textwrap.dedent(MEMORY).format(rows=rows)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < rows * rows * 4 / 4


@pytest.mark.parametrize("op", [attention, relative_attention])
def test_strides_of_one_element_or_of_none(op) -> None:
    """They may be any number, and a copy leaves them as they are."""
    query = torch.randn(1, 3, 2, 2)[..., ::2]
    assert query.stride(-1) == 2
    nothing = torch.empty(1, 0, 2, 1).as_strided((1, 0, 2, 1), (0, 1, 0, 0))
    table = {} if op is attention else {"position_key": torch.randn(7, 2, 1), "offset": 3}
    wanted = op(query.clone(), query.clone(), query.clone(), **table, backend="torch")
    leaves = [x.requires_grad_() for x in (query, query.clone(), query.clone())]
    found = op(*leaves, **table, backend="cpu")
    compare.close("out", found, wanted, tolerances.SUMMATION_ORDER)
    torch.autograd.grad(found.sum(), leaves)
    assert not op(query.detach(), nothing, nothing, **table, backend="cpu").any()
