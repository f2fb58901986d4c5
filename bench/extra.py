"""Peers of ops that may be missing: compiled PyTorch, FlexAttention, and kernels of other packages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyxlbert.bench.families import family_of, why_not
from pyxlbert.bench.opponents import Call, Opponents, Peer

from pyxlbert.testing.specs._spec import Arguments, Case


def _compiled(peer: Peer) -> Peer:
    return peer._replace(bind=lambda a: torch.compile(peer.bind(a)))


def _flex(a: Arguments) -> Call:
    """FlexAttention with key_lengths, or a bias, as a change of its scores."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (a[name].transpose(1, 2) for name in ("query", "key", "value"))
    lengths, bias, run = a.get("key_lengths"), a.get("bias"), torch.compile(flex_attention)

    def scored(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        if bias is not None:
            score = score + bias[0, h, i, j]
        return score if lengths is None else torch.where(j < lengths[b], score, -float("inf"))

    return lambda: run(q, k, v, score_mod=scored).transpose(1, 2)


def _relative_flex(a: Arguments) -> Call:
    """FlexAttention that looks the position's term up in the products of every query with the whole table."""
    from torch.nn.attention.flex_attention import flex_attention

    q, table, position_bias = a["query"], a["position_key"], a["position_bias"]
    k, v = (a[name].transpose(1, 2) for name in ("key", "value"))
    t, scale, run = q.shape[1], q.shape[-1] ** -0.5, torch.compile(flex_attention)

    def call() -> torch.Tensor:
        position = torch.einsum("bihd,rhd->bhir", q + position_bias, table) * scale

        def scored(
            score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
        ) -> torch.Tensor:
            return score + position[b, h, i, t + j - i]

        return run((q + a["content_bias"]).transpose(1, 2), k, v, score_mod=scored).transpose(1, 2)

    return call


def _flash(a: Arguments) -> Call:
    from flash_attn import flash_attn_func

    if "real_keys" in a or "bias" in a:
        raise NotImplementedError("it takes no padding mask and no bias in this layout")
    q, k, v, dropout_p = a["query"], a["key"], a["value"], a.get("dropout_p", 0.0)
    return lambda: flash_attn_func(q, k, v, dropout_p=dropout_p)


def _liger_norm(a: Arguments) -> Call:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    x, weight, bias, eps = a["x"], a["weight"], a["bias"], a["eps"]
    return lambda: LigerLayerNormFunction.apply(x, weight, bias, eps)


# All of them.
EXTRAS = ("torch.compile", "FlexAttention", "flash-attn", "Liger")


def with_extras(name: str, case: Case, against: Opponents, device: str, wanted: Sequence[str] = EXTRAS) -> Opponents:
    """The opponents of a case with those that are here beside them.

    Args:
        name: of the op.
        case: that is raced.
        against: what every machine has.
        device: "cpu" or "cuda".
        wanted: of EXTRAS.
    """
    first = next((peer for other, peer in against.peers.items() if not other.startswith("pyxlbert")), None)
    more: dict[str, Peer] = {}
    if first is not None:
        more["torch.compile"] = _compiled(first)
    dropout, packed = getattr(case.inputs, "dropout_p", None), getattr(case.inputs, "packed", False)
    if name == "attention" and not dropout and not packed:
        more["FlexAttention"] = Peer(_flex)
        more["flash-attn"] = Peer(_flash, first.change)
    if name == "relative_attention":
        more["FlexAttention"] = Peer(_relative_flex)
    if name == "layer_norm":
        more["Liger"] = Peer(_liger_norm)
    here = {other for other in more if other in wanted and why_not(family_of(other), device) is None}
    more = {other: peer for other, peer in more.items() if other in here}
    return against._replace(peers=against.peers | more)
