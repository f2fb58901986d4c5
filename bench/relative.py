"""What relative attention races against: `transformers`' eager core, and SDPA with a materialised position bias.

SDPA comes twice: with the bias made by einsum and gather, and, forward only, with the bias given to it for nothing.
Ours without a position term, "pyxlbert attention", has two thirds of the FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from pyxlbert.bench.opponents import Call, Opponents, Peer, first_is_right, sdpa

import pyxlbert
from pyxlbert.testing.specs._spec import Arguments, Case

_NAMES = ("query", "key", "value", "position_key", "content_bias", "position_bias")


def _position_bias(q: torch.Tensor, table: torch.Tensor, position_bias: torch.Tensor) -> torch.Tensor:
    b, t, h, d = q.shape
    place = torch.arange(t, device=q.device)
    band = t + place[None] - place[:, None]
    return torch.einsum("bihd,rhd->bhir", q + position_bias, table).gather(3, band.expand(b, h, t, t)) * d**-0.5


def _einsum(a: Arguments) -> Call:
    q, k, v, table, content_bias, position_bias = (a[name] for name in _NAMES)

    def call() -> torch.Tensor:
        bias = _position_bias(q, table, position_bias)
        turned = (x.transpose(1, 2) for x in (q + content_bias, k, v))
        return F.scaled_dot_product_attention(*turned, bias).transpose(1, 2)

    return call


def _with_bias(a: Arguments) -> Arguments:
    bias = _position_bias(a["query"], a["position_key"], a["position_bias"])
    return a | {"query": a["query"] + a["content_bias"], "bias": bias}


@cache
def _eager_core(heads: int, head_size: int) -> Callable[..., torch.Tensor]:
    """`XLNetRelativeAttention.rel_attn_core` on our layout, through transposed views as its model makes them."""
    from transformers import XLNetConfig
    from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

    with torch.device("meta"):
        module = XLNetRelativeAttention(XLNetConfig(d_model=heads * head_size, n_head=heads, dropout=0.0))

    def core(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v, table, content_bias, position_bias = tensors
        del module._parameters["r_w_bias"], module._parameters["r_r_bias"]
        module.r_w_bias, module.r_r_bias = content_bias, position_bias
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        try:
            out = module.rel_attn_core(q, k, v, table[:, None].expand(-1, q.shape[1], -1, -1)).transpose(0, 1)
        finally:
            del module.r_w_bias, module.r_r_bias
            module._parameters["r_w_bias"] = module._parameters["r_r_bias"] = None
        return out

    return core


def _transformers(a: Arguments) -> Call:
    tensors = [a[name] for name in _NAMES]
    return lambda: _eager_core(*tensors[0].shape[2:])(*tensors)


def _attention(a: Arguments) -> Call:
    q, k, v = a["query"], a["key"], a["value"]
    return lambda: pyxlbert.attention(q, k, v)


def opponents(case: Case) -> Opponents:
    """See `Opponents`."""
    given = {} if case.gradients else {"SDPA, bias given": Peer(sdpa, _with_bias)}
    plain = {"einsum, gather, SDPA": Peer(_einsum), "transformers": Peer(_transformers)}
    return first_is_right({**plain, **given, "pyxlbert attention": Peer(_attention, own=sdpa)})
