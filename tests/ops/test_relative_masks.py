"""Who relative attention lets see whom: ranks, masks together, keys that nobody sees, rows that see nothing."""

from __future__ import annotations

import pytest
import torch
from relative_inputs import BACKENDS, UNSEEN_RANK, generator, lse_of, tensors, trained

from pyxlbert import relative_attention
from pyxlbert.testing import compare, tolerances


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("see_self", [False, True], ids=["others", "and itself"])
def test_ranks_equal_the_dense_mask(backend: str, see_self: bool) -> None:
    """Same bits, forward and backward, for an order with visible, hidden and unseen keys and a memory."""
    a = tensors(3, 20, 26, head_size=16)
    draw = generator(4)
    key_rank = torch.stack([torch.randperm(26, generator=draw) for _ in range(3)]).int()
    key_rank[torch.rand(3, 26, generator=draw) < 0.3] = -1
    key_rank[:, 24] = UNSEEN_RANK
    query_rank = key_rank[:, 6:].clamp(max=20) + torch.randint(0, 2, (3, 20), generator=draw).int()
    dense = query_rank[:, :, None] > key_rank[:, None]
    if see_self:
        dense |= torch.eye(26, dtype=torch.bool)[6:]
    dense[:, :, 24] = False
    results = []
    for options in (
        {"query_rank": query_rank, "key_rank": key_rank, "see_self": see_self},
        {"attention_mask": dense[:, None]},
    ):
        out = relative_attention(**a, **options, dropout_p=0.1, seed=1, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), trained(a))))
    for name, x, y in zip(("out", *a), *results, strict=True):
        compare.close(name, x, y, tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_masks_hold_together_and_see_self_stands_above(backend: str) -> None:
    """A row's weights are read off one-hot values: who sees whom under every mask at once."""
    rows, keys = 4, 6
    a = {n: torch.zeros_like(x) for n, x in tensors(1, rows, keys, 1, keys).items()}
    a["value"] = torch.eye(keys)[None, :, None]
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    options = {
        "attention_mask": mask[None, None],
        "query_rank": torch.tensor([[1, 3, 2, 2]], dtype=torch.int32),
        "key_rank": torch.tensor([[-1, 0, 1, 2, UNSEEN_RANK, 0]], dtype=torch.int32),
        "causal": True,
        "key_lengths": torch.tensor([5]),
    }
    seen = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]]).bool()
    itself = torch.zeros(rows, keys, dtype=torch.bool)
    # Row 0 is key 2, hidden by the mask; row 2 is key 4, of no rank; row 3 is key 5, past the length.
    itself[0, 2] = itself[1, 3] = True
    for see_self, wanted in ((False, seen), (True, seen | itself)):
        out = relative_attention(**a, **options, see_self=see_self, backend=backend)[0, :, 0]
        assert torch.equal(out > 0, wanted)
        compare.close("out", out, wanted / wanted.sum(-1, keepdim=True), tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_in_unseen_keys_does_not_leak(backend: str, dtype: torch.dtype) -> None:
    """Keys past their length, and keys of the rank that nobody sees, their own row included."""
    a = tensors(3, 40, head_size=24, dtype=dtype)
    lengths = torch.tensor([0, 13, 40])
    key_rank = torch.full((3, 40), -1, dtype=torch.int32)
    key_rank[2, 7:20] = UNSEEN_RANK
    unseen = (torch.arange(40) >= lengths[:, None]) | (key_rank == UNSEEN_RANK)
    with torch.no_grad():
        for name in ("key", "value"):
            a[name][unseen] = float("nan")
    options = {"query_rank": torch.zeros(3, 40, dtype=torch.int32), "key_rank": key_rank, "see_self": True}
    out = relative_attention(**a, **options, key_lengths=lengths, backend=backend)
    gradients = dict(zip(a, torch.autograd.grad(out.float().sum(), trained(a)), strict=True))
    for x in (out, *gradients.values()):
        assert x.isfinite().all()
    assert not out[0].any() and not gradients["query"][0].any()
    assert not gradients["key"][unseen].any() and not gradients["value"][unseen].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_rows_of_the_table_that_nobody_meets_does_not_leak(backend: str, dtype: torch.dtype) -> None:
    """The table begins with more rows than 20 queries reach, but the rest of a block would reach them.  The gradients
    of query and position bias multiply whole tiles of the table, and are not asked."""
    a = tensors(2, 20, 80, head_size=16, table=(110,), dtype=dtype)
    with torch.no_grad():
        a["position_key"][:11] = float("nan")
    out = relative_attention(**a, offset=30, backend=backend)
    gradients = dict(zip(a, torch.autograd.grad(out.float().square().sum(), trained(a)), strict=True))
    for name in ("key", "value", "position_key", "content_bias"):
        assert gradients[name].isfinite().all(), name
    assert out.isfinite().all() and not gradients["position_key"][:11].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fully_masked_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros, no gradient and lse = +inf; or, asked for, the average over all keys, padding included, with XLNet's
    gradient, that of s - 1e30."""
    a = tensors(2, 9, 12, head_size=16)
    ranks = {
        "query_rank": torch.zeros(2, 9, dtype=torch.int32).index_fill(1, torch.tensor([4]), -1),
        "key_rank": torch.full((2, 12), -1, dtype=torch.int32),
        "key_lengths": torch.tensor([12, 7]),
    }
    out = relative_attention(**a, **ranks, backend=backend)
    gradients = dict(zip(a, torch.autograd.grad(out.square().sum(), trained(a)), strict=True))
    assert not out[:, 4].any() and not gradients["query"][:, 4].any() and out[:, 3].any()
    assert all(x.isfinite().all() for x in gradients.values())
    lse = lse_of(a, monkeypatch, **ranks, backend=backend)
    assert lse.shape == (2, 2, 9) and lse.dtype is torch.float32
    assert (lse[:, :, 4] == torch.inf).all() and lse[:, :, 5].isfinite().all()

    uniform = relative_attention(**a, **ranks, masked_rows="uniform", backend=backend)
    compare.close("result", uniform[:, 4], a["value"].mean(1), tolerances.SUMMATION_ORDER)
    others = torch.arange(9) != 4
    compare.close("result", uniform[:, others], out[:, others], tolerances.SUMMATION_ORDER)
    cotangent = torch.randn(2, 2, 16, generator=generator(9))
    dquery, dvalue = torch.autograd.grad(uniform[:, 4], (a["query"], a["value"]), cotangent)
    compare.close("dvalue", dvalue, cotangent[:, None].expand_as(dvalue) / 12, tolerances.SUMMATION_ORDER)
    dp = torch.einsum("bhd,bjhd->bhj", cotangent, a["value"])
    g = (dp - dp.mean(-1, keepdim=True)) / 12 * 16**-0.5
    band = a["position_key"][9 - 4 : 9 - 4 + 12]
    wanted = torch.einsum("bhj,bjhd->bhd", g, a["key"]) + torch.einsum("bhj,jhd->bhd", g, band)
    compare.close("result", dquery[:, 4], wanted, tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_rows_of_packed_sequences(backend: str) -> None:
    """The average is over the row's own sequence."""
    a = tensors(1, 7, head_size=16, table=(8,))
    packed = {n: x.detach()[0] if x.dim() == 4 else x.detach() for n, x in a.items()}
    out = relative_attention(
        **packed,
        cu_seqlens=torch.tensor([0, 3, 7], dtype=torch.int32),
        query_rank=torch.zeros(7, dtype=torch.int32),
        key_rank=torch.zeros(7, dtype=torch.int32),
        masked_rows="uniform",
        backend=backend,
    )
    compare.close("result", out[:3], packed["value"][:3].mean(0).expand(3, -1, -1), tolerances.SUMMATION_ORDER)
    compare.close("result", out[3:], packed["value"][3:].mean(0).expand(4, -1, -1), tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tile_ends_with_the_last_key_in_its_sight(backend: str, dtype: torch.dtype) -> None:
    """Rows in blocks of which each sees another number of keys, in any order of rows and keys, some only themselves."""
    rows, keys = (900, 600) if backend == "cpu" else (90, 140)
    a = tensors(1, rows, keys, 1, 8, dtype=dtype)
    draw = generator(6)
    sight = torch.randint(0, keys, (rows // 30,), generator=draw).repeat_interleave(30)
    sight[sight < keys // 3] = 0
    # The CPU gathers the sums of sixteen tiles of 48 rows; here the last one of them sees few keys.
    sight[720:768] = 4
    query_rank = (sight + torch.randint(0, 3, (rows,), generator=draw)).int()[None]
    key_rank = torch.arange(keys).int()[None]
    key_rank[torch.rand(1, keys, generator=draw) < 0.1] = UNSEEN_RANK - 1
    places = torch.randperm(rows, generator=draw).int()[None]
    for options in ({}, {"see_self": True}, {"query_positions": places, "offset": rows}):
        options = options | {"query_rank": query_rank, "key_rank": key_rank}
        out = relative_attention(**a, **options, dropout_p=0.1, seed=1, backend=backend)
        cotangent = torch.randn(out.shape, generator=draw)
        found = (out, *torch.autograd.grad(out, trained(a), cotangent.to(dtype)))
        exact = {name: x.detach().double().requires_grad_() for name, x in a.items()}
        plain = {name: x.detach().requires_grad_() for name, x in a.items()}
        both = []
        for one in (exact, plain):
            y = relative_attention(**one, **options, dropout_p=0.1, seed=1, backend="torch")
            both.append((y, *torch.autograd.grad(y, trained(one), cotangent.to(y.dtype))))
        for name, x, truth, other in zip(("out", *a), found, *both, strict=True):
            # By the norm no further from the truth than plain torch in the same dtype is, but for rounding: a sum's
            # is that of its terms, which may be as large as the largest element.
            error, allowed = ((z.double() - truth).norm() for z in (x, other))
            rounding = torch.finfo(dtype).eps * truth.norm()
            rounding += tolerances.TERMS * torch.finfo(torch.float32).eps * truth.abs().max() * truth.numel() ** 0.5
            assert error <= 2 * allowed + rounding, (options.keys(), name, error, allowed)
