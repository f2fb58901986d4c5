"""What is special to relative_attention."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from pyxlbert import relative_attention
from pyxlbert.backends import OPS
from pyxlbert.reference import relative_attention as reference
from pyxlbert.reference.philox import Tag, keep_scores
from pyxlbert.testing import compare, tolerances

BACKENDS = list(OPS["relative_attention"].backends)
UNSEEN = 2**31 - 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(
    batch: int = 2,
    rows: int = 5,
    keys: int | None = None,
    heads: int = 2,
    head_size: int = 8,
    *,
    table: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """query, key, value, a table with c = Tq (its leading sizes are `table`), every bias; all require gradients."""
    keys = rows if keys is None else keys
    shapes = {
        "query": (batch, rows, heads, head_size),
        "key": (batch, keys, heads, head_size),
        "value": (batch, keys, heads, head_size),
        "position_key": (*((rows + keys,) if table is None else table), heads, head_size),
        "content_bias": (heads, head_size),
        "position_bias": (heads, head_size),
    }
    draw = generator(1)
    return {name: torch.randn(shape, generator=draw).to(dtype).requires_grad_() for name, shape in shapes.items()}


def segments(batch: int, rows: int, keys: int, heads: int, head_size: int, dtype: torch.dtype) -> dict[str, Any]:
    draw = generator(2)
    return {
        "segment_bias": torch.randn(heads, head_size, generator=draw).to(dtype).requires_grad_(),
        "segment_embedding": torch.randn(2, heads, head_size, generator=draw).to(dtype).requires_grad_(),
        "query_segments": torch.randint(0, 2, (batch, rows), generator=draw),
        "key_segments": torch.randint(0, 2, (batch, keys), generator=draw),
    }


def trained(arguments: dict[str, Any]) -> list[torch.Tensor]:
    return [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]


def lse_of(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **options: Any) -> torch.Tensor:
    """What the op saves beside its output."""
    module = __import__("pyxlbert.ops.relative_attention", fromlist=["_fwd"])
    kept, forward = [], module._fwd

    def keep(*values: Any) -> Any:
        kept.append(forward(*values))
        return kept[-1]

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "_fwd", keep)
        relative_attention(**arguments, **options)
    return kept[0][1]


RANKS = {
    "query_rank": torch.tensor([[0, 2, 1, 4], [3, 0, 0, 2]], dtype=torch.int32),
    "key_rank": torch.tensor([[-1, 1, 2, 0, UNSEEN], [-1, -1, 2, 1, 0]], dtype=torch.int32),
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


def shift_of_xlnet(x: torch.Tensor, keys: int) -> torch.Tensor:
    """`[B, H, Tq, R]` to `[B, H, Tq, Tk]`: read the rows as columns, drop the first, and read them as rows again."""
    batch, heads, queries, rows = x.shape
    x = x.reshape(batch, heads, rows, queries)[:, :, 1:]
    return x.reshape(batch, heads, queries, rows - 1)[..., :keys]


def shift_of_transformer_xl(x: torch.Tensor, keys: int) -> torch.Tensor:
    """The same with a column of zeros in front, so that the table may lack what only later keys would need."""
    batch, heads, queries, rows = x.shape
    x = torch.nn.functional.pad(x, (1, 0)).view(batch, heads, rows + 1, queries)
    return x[:, :, 1:].reshape(batch, heads, queries, rows)[..., :keys]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shift", "offset", "rows", "causal"),
    [
        (shift_of_xlnet, 7, 7 + 11, False),
        (shift_of_transformer_xl, 6, 7 + 11 - 1, False),
        (shift_of_transformer_xl, 6, 11, True),
    ],
    ids=["XLNet", "Conformer", "Transformer-XL"],
)
def test_original_shift(backend: str, shift: Any, offset: int, rows: int, causal: bool) -> None:
    """The index c + j - i is the shift of a matrix as the papers' code does it."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    a = tensors(rows=7, keys=11, table=(rows,), dtype=dtype)

    def original() -> torch.Tensor:
        content = torch.einsum("bihd,bjhd->bhij", a["query"] + a["content_bias"], a["key"])
        position = torch.einsum("bihd,rhd->bhir", a["query"] + a["position_bias"], a["position_key"])
        s = (content + shift(position, 11)) * 8**-0.5
        if causal:
            s = s.masked_fill(~torch.ones(7, 11, dtype=torch.bool).tril(4), -torch.inf)
        return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), a["value"])

    ours, theirs = relative_attention(**a, offset=offset, causal=causal, backend=backend), original()
    dout = torch.randn(ours.shape, generator=generator(3)).to(dtype)
    compare.close("ours", ours, theirs, tolerances.SUMMATION_ORDER)
    for name, x, y in zip(
        a,
        torch.autograd.grad(ours, trained(a), dout),
        torch.autograd.grad(theirs, trained(a), dout),
        strict=True,
    ):
        compare.close(name, x, y, tolerances.SUMMATION_ORDER)


def xlnet_attention(batch: int, rows: int, keys: int) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """transformers' XLNet attention with random parameters, our arguments, and a mask `[B, Tq, Tk]`, True: hidden."""
    from transformers import XLNetConfig
    from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

    heads, head_size = 2, 8
    peer = XLNetRelativeAttention(XLNetConfig(d_model=heads * head_size, n_head=heads, d_inner=4, dropout=0.0))
    a = tensors(batch, rows, keys, heads, head_size) | segments(batch, rows, keys, heads, head_size, torch.float32)
    names = {"content_bias": "r_w_bias", "position_bias": "r_r_bias", "segment_bias": "r_s_bias"}
    for ours, theirs in {**names, "segment_embedding": "seg_embed"}.items():
        setattr(peer, theirs, torch.nn.Parameter(a[ours].detach().clone()))
    return peer, a, torch.rand(batch, rows, keys, generator=generator(6)) < 0.6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [6, 10], ids=["no memory", "memory"])
def test_equals_xlnet(backend: str, keys: int) -> None:
    """transformers' own core with segments and a mask, rows that see nothing included; forward and gradients."""
    peer, a, hidden = xlnet_attention(3, 6, keys)
    hidden[0, 2] = True
    time_first = {n: a[n].detach().transpose(0, 1).clone().requires_grad_() for n in ("query", "key", "value")}
    table = a["position_key"].detach().requires_grad_()
    other = (a["query_segments"][:, :, None] != a["key_segments"][:, None]).permute(1, 2, 0)
    theirs = peer.rel_attn_core(
        *time_first.values(),
        table[:, None].expand(-1, 3, -1, -1),
        seg_mat=torch.nn.functional.one_hot(other.long(), 2).float(),
        attn_mask=hidden.permute(1, 2, 0)[..., None].float(),
    )
    ours = relative_attention(**a, attention_mask=~hidden[:, None], masked_rows="uniform", backend=backend)
    compare.close("ours", ours, theirs.transpose(0, 1), tolerances.SUMMATION_ORDER)
    dout = torch.randn(ours.shape, generator=generator(3))
    found = dict(
        zip([n for n, x in a.items() if x.requires_grad], torch.autograd.grad(ours, trained(a), dout), strict=True)
    )
    wanted = torch.autograd.grad(
        theirs,
        [*time_first.values(), table, peer.r_w_bias, peer.r_r_bias, peer.r_s_bias, peer.seg_embed],
        dout.transpose(0, 1),
    )
    for name, gradient in zip(found, wanted, strict=True):
        gradient = gradient.transpose(0, 1) if name in time_first else gradient
        compare.close(name, found[name], gradient, tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_parakeet(backend: str) -> None:
    """transformers' ParakeetEncoderAttention: c = Tq - 1, a mask, no position after the last."""
    from transformers import ParakeetEncoderConfig
    from transformers.models.parakeet.modeling_parakeet import (
        ParakeetEncoderAttention,
        ParakeetEncoderRelPositionalEncoding,
    )

    config = ParakeetEncoderConfig(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=3, attention_dropout=0.0, attention_bias=False
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    peer = ParakeetEncoderAttention(config, 0)
    torch.nn.init.normal_(peer.bias_u)
    torch.nn.init.normal_(peer.bias_v)
    x = torch.randn(2, 9, 24)
    positions = ParakeetEncoderRelPositionalEncoding(config)(x)
    lengths = torch.tensor([9, 6])
    mask = (torch.arange(9) < lengths[:, None])[:, None, None]
    theirs, _ = peer(x, positions, mask.expand(-1, -1, 9, -1))

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.view(*y.shape[:-1], 3, 8)

    attended = relative_attention(
        heads(peer.q_proj(x)),
        heads(peer.k_proj(x)),
        heads(peer.v_proj(x)),
        heads(peer.relative_k_proj(positions[0])),
        content_bias=peer.bias_u,
        position_bias=peer.bias_v,
        offset=8,
        key_lengths=lengths,
        backend=backend,
    )
    ours = peer.o_proj(attended.flatten(-2))
    compare.close("ours", ours, theirs, tolerances.SUMMATION_ORDER)
    parameters = list(peer.parameters())
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), parameters),
        torch.autograd.grad(theirs.square().sum(), parameters),
        strict=True,
    ):
        compare.close("gradient", a, b, tolerances.MODEL_GRADIENT_FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[9, 9], [9, 6], [1, 8]], ids=str)
def test_equals_conformer(backend: str, lengths: list[int]) -> None:
    """transformers' Wav2Vec2ConformerSelfAttention: c = Tq - 1, with padding and all gradients."""
    from transformers import Wav2Vec2ConformerConfig
    from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import (
        Wav2Vec2ConformerRelPositionalEmbedding,
        Wav2Vec2ConformerSelfAttention,
    )

    config = Wav2Vec2ConformerConfig(
        hidden_size=24, num_attention_heads=3, position_embeddings_type="relative", attention_dropout=0.0
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    peer = Wav2Vec2ConformerSelfAttention(config).eval()
    torch.nn.init.normal_(peer.pos_bias_u)
    torch.nn.init.normal_(peer.pos_bias_v)
    x = torch.randn(2, 9, 24)
    positions = Wav2Vec2ConformerRelPositionalEmbedding(config)(x)
    x.requires_grad_()
    tokens = torch.arange(9) < torch.tensor(lengths)[:, None]
    added = torch.where(tokens, 0.0, torch.finfo(x.dtype).min)[:, None, None].expand(-1, -1, 9, -1)
    theirs, _ = peer(x, added, relative_position_embeddings=positions)

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.view(*y.shape[:-1], 3, 8)

    attended = relative_attention(
        heads(peer.linear_q(x)),
        heads(peer.linear_k(x)),
        heads(peer.linear_v(x)),
        heads(peer.linear_pos(positions[0])),
        content_bias=peer.pos_bias_u,
        position_bias=peer.pos_bias_v,
        offset=8,
        key_lengths=torch.tensor(lengths),
        backend=backend,
    )
    ours = peer.linear_out(attended.flatten(-2))
    compare.close("result", ours, theirs, tolerances.SUMMATION_ORDER)
    inputs = {"x": x} | dict(peer.named_parameters())
    found, wanted = (
        dict(zip(inputs, torch.autograd.grad(y.square().sum(), list(inputs.values())), strict=True))
        for y in (ours, theirs)
    )
    # One number for every key of a row changes no weight: in exact arithmetic this gradient is zero.
    rounding = max(float(gradients.pop("linear_k.bias").abs().max()) for gradients in (found, wanted))
    assert rounding <= tolerances.MODEL_GRADIENT_FLOAT32 * float(wanted["linear_k.weight"].abs().max())
    for name, gradient in found.items():
        compare.close(f"gradient of {name}", gradient, wanted[name], tolerances.MODEL_GRADIENT_FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("see_self", [False, True], ids=["others", "and itself"])
def test_ranks_equal_the_dense_mask(backend: str, see_self: bool) -> None:
    """Same bits, forward and backward, for an order with visible, hidden and unseen keys and a memory."""
    a = tensors(3, 20, 26, head_size=16)
    draw = generator(4)
    key_rank = torch.stack([torch.randperm(26, generator=draw) for _ in range(3)]).int()
    key_rank[torch.rand(3, 26, generator=draw) < 0.3] = -1
    key_rank[:, 24] = UNSEEN
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
        "key_rank": torch.tensor([[-1, 0, 1, 2, UNSEEN, 0]], dtype=torch.int32),
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
    key_rank[2, 7:20] = UNSEEN
    unseen = (torch.arange(40) >= lengths[:, None]) | (key_rank == UNSEEN)
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
    values = [a[n].detach() for n in ("query", "key", "value", "position_key", "content_bias", "position_bias")]
    call = (*values, 5, *[None] * 7, 0, None, None, False, None, False, False, 1.0, 0.0, None)
    out, lse = torch.ops.pyxlbert.relative_attention_fwd(*call, backend)
    found = torch.ops.pyxlbert.relative_attention_bwd(out, out, lse, *call, [False] * 8, backend)
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
