"""Relative attention beside what others compute with it: Transformer-XL, XLNet, Parakeet, Conformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from relative_inputs import BACKENDS, generator, segments, tensors, trained

from pyxlbert import relative_attention
from pyxlbert.testing import compare, tolerances


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
