"""What is special to two_stream_attention."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from pyxlbert import relative_attention, two_stream_attention
from pyxlbert.backends import OPS
from pyxlbert.reference import relative_attention as reference
from pyxlbert.reference.philox import Tag, keep_scores
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.direct import Direct

BACKENDS = list(OPS["two_stream_attention"].backends)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(
    batch: int,
    rows: int,
    targets: int,
    keys: int,
    heads: int = 2,
    head_size: int = 8,
    *,
    table: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Every tensor that gets a gradient."""
    shapes = {
        "content_query": (batch, rows, heads, head_size),
        "query_query": (batch, targets, heads, head_size),
        "key": (batch, keys, heads, head_size),
        "value": (batch, keys, heads, head_size),
        "position_key": (*((rows + keys,) if table is None else table), heads, head_size),
        "content_bias": (heads, head_size),
        "position_bias": (heads, head_size),
        "segment_bias": (heads, head_size),
        "segment_embedding": (2, heads, head_size),
    }
    draw = generator(1)
    return {name: torch.randn(shape, generator=draw).to(dtype).requires_grad_() for name, shape in shapes.items()}


def segments(batch: int, rows: int, keys: int) -> dict[str, torch.Tensor]:
    draw = generator(2)
    return {
        "query_segments": torch.randint(0, 2, (batch, rows), generator=draw),
        "key_segments": torch.randint(0, 2, (batch, keys), generator=draw),
    }


def order(batch: int, rows: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ranks of a permutation in which a third of the positions is predicted, and those positions as targets `[B, M]`.

    A target sees the visible positions and the targets before it; the keys before the last `rows` are a memory.
    """
    draw, count = generator(4), max(rows // 3, 1)
    places = torch.stack([torch.randperm(rows, generator=draw) for _ in range(batch)])
    targets = places[:, :count]
    key_rank = torch.full((batch, keys), -1)
    key_rank.scatter_(1, targets + keys - rows, torch.arange(count).expand(batch, -1))
    query_rank = torch.zeros(batch, rows, dtype=torch.int64)
    query_rank.scatter_(1, targets, torch.arange(count).expand(batch, -1))
    return query_rank.int(), key_rank.int(), targets.int()


def two_calls(a: dict[str, Any], targets: torch.Tensor | None, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by relative_attention for each stream."""
    shared = {n: x for n, x in a.items() if n not in ("content_query", "query_query")} | options
    rows = a["content_query"].shape[1]
    hidden = "query_rank" in shared or "attention_mask" in shared
    content = relative_attention(a["content_query"], **shared, offset=rows, see_self=hidden)
    own = dict(shared)
    if targets is not None:
        sequence, place = torch.arange(targets.shape[0])[:, None], targets.clamp(min=0).long()
        for name in ("query_rank", "query_segments"):
            if name in shared:
                own[name] = shared[name][sequence, place]
        if "attention_mask" in shared:
            mask = shared["attention_mask"].expand(targets.shape[0], -1, rows, -1)
            own["attention_mask"] = mask[sequence, :, place].transpose(1, 2)
        own["query_positions"] = targets
    return content, relative_attention(a["query_query"], **own, offset=rows)


@pytest.mark.parametrize("masked_rows", ["zero", "uniform"])
@pytest.mark.parametrize("how", ["ranks", "mask"])
def test_hand_written_gradient(how: str, masked_rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's backward against numerical differentiation in float64."""
    monkeypatch.setattr(reference, "UNIFORM_SCORE", -1e3)
    arguments: dict[str, Any] = tensors(2, 4, 3, 5, head_size=3, table=(2, 9), dtype=torch.float64)
    names = list(arguments)
    arguments |= segments(2, 4, 5)
    arguments["target_positions"] = torch.tensor([[3, -1, 0], [2, 2, 1]], dtype=torch.int32)
    if how == "ranks":
        arguments["query_rank"], arguments["key_rank"], _ = order(2, 4, 5)
    else:
        arguments["attention_mask"] = torch.rand(2, 1, 4, 5, generator=generator()) > 0.6

    def call(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return two_stream_attention(
            **{**arguments, **dict(zip(names, values, strict=True))},
            key_lengths=torch.tensor([5, 4]),
            masked_rows=masked_rows,
            dropout_p=0.2,
            seed=3,
            backend="torch",
        )

    assert torch.autograd.gradcheck(call, [arguments[n] for n in names], fast_mode=True)


def _ways() -> Iterator[Any]:
    """How streams are masked, what becomes of masked rows, and keys."""
    ways = ("ranks", "mask of each head", "mask of keys", "nothing", "a row a position")
    for how, masked_rows, keys, backend in product(ways, ("zero", "uniform"), (24, 37), BACKENDS):
        memory = "memory" if keys > 24 else "no memory"
        yield pytest.param(backend, how, masked_rows, keys, id=f"{how}-{masked_rows}-{memory}-{backend}")


@pytest.mark.parametrize(("backend", "how", "masked_rows", "keys"), list(_ways()))
def test_equals_two_calls_of_relative_attention(backend: str, how: str, masked_rows: str, keys: int) -> None:
    """Forward and every gradient."""
    batch, rows = 2, 24
    query_rank, key_rank, targets = order(batch, rows, keys)
    if how == "a row a position":
        targets = None
    else:
        targets[0, 1] = -1
    a = tensors(batch, rows, rows if targets is None else targets.shape[1], keys, table=(2, rows + keys))
    options: dict[str, Any] = {"key_lengths": torch.tensor([keys, keys - 5]), "masked_rows": masked_rows}
    if how in ("ranks", "a row a position"):
        options |= {"query_rank": query_rank, "key_rank": key_rank}
    elif how != "nothing":
        shape = (batch, 2, rows, keys) if how == "mask of each head" else (batch, 1, 1, keys)
        options["attention_mask"] = torch.rand(shape, generator=generator()) > 0.5
    options |= segments(batch, rows, keys) | {"backend": backend}
    ours, wanted = two_stream_attention(**a, target_positions=targets, **options), two_calls(a, targets, **options)
    draw = generator(9)
    cotangents = [torch.randn(x.shape, generator=draw) for x in ours]
    for x, y in zip(ours, wanted, strict=True):
        compare.close("out", x, y, tolerances.SUMMATION_ORDER)
    for name, x, y in zip(
        a,
        torch.autograd.grad(ours, list(a.values()), cotangents),
        torch.autograd.grad(wanted, list(a.values()), cotangents),
        strict=True,
    ):
        compare.close(name, x, y, tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1], ids=["content", "query"])
def test_one_output_alone(backend: str, used: int) -> None:
    """The last layer of a model in training needs the query stream only; what belongs to the other has no gradient."""
    query_rank, key_rank, targets = order(2, 12, 12)
    a = tensors(2, 12, 4, 12)
    options = {"query_rank": query_rank, "key_rank": key_rank, "backend": backend} | segments(2, 12, 12)
    ours = two_stream_attention(**a, target_positions=targets, **options)[used]
    wanted = two_calls(a, targets, **options)[used]
    other = ("query_query", "content_query")[used]
    names = [n for n in a if n != other]
    for name, x, y in zip(
        names,
        torch.autograd.grad(ours.square().sum(), [a[n] for n in names], retain_graph=True),
        torch.autograd.grad(wanted.square().sum(), [a[n] for n in names]),
        strict=True,
    ):
        compare.close(name, x, y, tolerances.SUMMATION_ORDER)
    assert not torch.autograd.grad(ours.square().sum(), a[other])[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_xlnet(backend: str) -> None:
    """transformers' two streams with a permutation mask and a one-hot target mapping; forward and gradients.

    The first target of an order sees nothing here, and both average over all keys.
    """
    from transformers import XLNetConfig
    from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

    batch, rows, heads = 2, 9, 2
    draw = generator(7)
    peer = XLNetRelativeAttention(XLNetConfig(d_model=16, n_head=heads, d_inner=4, dropout=0.0))
    a = tensors(batch, rows, 3, rows)
    names = {"content_bias": "r_w_bias", "position_bias": "r_r_bias", "segment_bias": "r_s_bias"}
    for ours, theirs in {**names, "segment_embedding": "seg_embed"}.items():
        setattr(peer, theirs, torch.nn.Parameter(a[ours].detach().clone()))
    places = torch.stack([torch.randperm(rows, generator=draw) for _ in range(batch)])
    rank = torch.empty_like(places).scatter_(1, places, torch.arange(rows).expand(batch, -1))
    hidden = rank[:, None] >= rank[:, :, None]
    targets = places[:, [0, 4, 7]]
    segment = segments(batch, rows, rows)
    other = segment["query_segments"][:, :, None] != segment["key_segments"][:, None]
    streams = {n: a[n].detach().transpose(0, 1).clone().requires_grad_() for n in list(a)[:4]}
    shared = {
        "seg_mat": torch.nn.functional.one_hot(other.long(), 2).permute(1, 2, 0, 3).float(),
    }
    table = a["position_key"].detach().requires_grad_()
    keys = (streams["key"], streams["value"], table[:, None].expand(-1, batch, -1, -1))
    itself = torch.eye(rows, dtype=torch.bool)
    content_mask, query_mask = (m.permute(1, 2, 0)[..., None].float() for m in (hidden & ~itself, hidden))
    content = peer.rel_attn_core(streams["content_query"], *keys, attn_mask=content_mask, **shared)
    mapping = torch.nn.functional.one_hot(targets, rows).permute(1, 2, 0).float()
    spread = torch.einsum("mbnd,mlb->lbnd", streams["query_query"], mapping)
    query = peer.rel_attn_core(spread, *keys, attn_mask=query_mask, **shared)
    wanted = (content.transpose(0, 1), torch.einsum("lbnd,mlb->bmnd", query, mapping))

    options = {"target_positions": targets.int(), "masked_rows": "uniform", "backend": backend} | segment
    cotangents = [torch.randn(x.shape, generator=draw) for x in wanted]
    parameters = [peer.r_w_bias, peer.r_r_bias, peer.r_s_bias, peer.seg_embed]
    gradients = torch.autograd.grad(wanted, [*streams.values(), table, *parameters], cotangents)
    for masks in (
        {"attention_mask": ~hidden[:, None]},
        {"query_rank": rank.int(), "key_rank": rank.int()},
    ):
        ours = two_stream_attention(**a, **options, **masks)
        for x, y in zip(ours, wanted, strict=True):
            compare.close("out", x, y, tolerances.SUMMATION_ORDER)
        found = torch.autograd.grad(ours, list(a.values()), cotangents)
        for name, x, y in zip(a, found, gradients, strict=True):
            compare.close(name, x, y.transpose(0, 1) if name in streams else y, tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [30, 41], ids=["no memory", "memory"])
def test_nothing_leaks(backend: str, keys: int) -> None:
    """No row changes when a token changes that it must not see: itself in the query stream, later ones in both."""
    batch, rows = 2, 30
    query_rank, key_rank, targets = order(batch, rows, keys)
    a = {n: x.detach() for n, x in tensors(batch, rows, targets.shape[1], keys).items()}
    options = {"query_rank": query_rank, "key_rank": key_rank, "target_positions": targets, "backend": backend}
    options |= segments(batch, rows, keys)
    before = two_stream_attention(**a, **options)
    for n in range(targets.shape[1]):
        changed = {**a, "key": a["key"].clone(), "value": a["value"].clone()}
        for b in range(batch):
            for name in ("key", "value"):
                changed[name][b, targets[b, n] + keys - rows] += 100.0
        content, query = two_stream_attention(**changed, **options)
        assert torch.equal(query[:, : n + 1], before[1][:, : n + 1])
        assert (query[:, n + 1 :] != before[1][:, n + 1 :]).any(-1).all()
        blind = torch.zeros(batch, rows, dtype=torch.bool)
        for b in range(batch):
            # Visible positions see no target, targets see those before them; the target itself sees itself.
            blind[b] = query_rank[b] <= n
            blind[b, targets[b, n]] = False
        assert torch.equal(content[blind], before[0][blind])


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_drop_by_their_own_counters(backend: str) -> None:
    """The gradient of value shows each stream's weights: exactly zero where its tag and its row drop."""
    rows, count, keys, seed = 6, 4, 50, -7
    a = {n: torch.zeros_like(x) for n, x in tensors(1, rows, count, keys, 1, 8).items()}
    a["value"].requires_grad_()
    targets = torch.tensor([[5, 0, 3, 2]], dtype=torch.int32)
    options = {"dropout_p": 0.5, "seed": seed, "backend": backend} | segments(1, rows, keys)
    outputs = two_stream_attention(**a, target_positions=targets, **options)
    for out, tag in zip(outputs, (Tag.RELATIVE_ATTENTION, Tag.QUERY_STREAM), strict=True):
        cotangent = torch.eye(out.shape[1], 8)[None, :, None]
        (weights,) = torch.autograd.grad(out, a["value"], cotangent, retain_graph=True)
        keep = keep_scores(torch.tensor([seed]), 0.5, 1, 1, out.shape[1], keys, tag)[0, 0]
        assert torch.equal(weights[0, :, 0, : out.shape[1]].T != 0, keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_nobody_wants_are_not_computed(backend: str) -> None:
    call: dict[str, Any] = {n: x.detach() for n, x in tensors(1, 5, 5, 5).items() if "segment" not in n}
    call |= {"offset": 5, "scale": 1.0}
    saved = Direct(backend).two_stream_attention_fwd(**call)
    found = Direct(backend).two_stream_attention_bwd(saved[0], None, *saved, **call, needs=[False] * 9)
    assert [x.numel() for x in found] == [0] * 9
