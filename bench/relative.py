"""Races of relative attention against `transformers`' eager core and SDPA with a materialised position bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pyxlbert.bench import limits
from pyxlbert.bench.ops import Call, Race

import pyxlbert


def relative_attention(
    batch: int, length: int, dtype: torch.dtype, *, backward: bool = False, heads: int = 12, head_size: int = 64
) -> Race:
    """XLNet's term of content and position, no mask; q, k, v are views of one projection.

    The peers: the eager core of `transformers`; SDPA given the position bias for nothing (forward only); the bias by
    einsum and gather, then SDPA.  "pyxlbert attention" is our attention without a position term, whose FLOPs are
    two thirds of it.
    """
    b, t, h, d = batch, length, heads, head_size

    def build() -> tuple[Call, dict[str, Call], Call | None]:
        leaves = [torch.randn(b, t, 3, h, d), 0.5 * torch.randn(2 * t, h, d), *(torch.randn(2, h, d) * 0.3)]
        dy = torch.randn(b, t, h, d)
        band = t + torch.arange(t)[None] - torch.arange(t)[:, None]

        def ours(qkv: torch.Tensor, r: torch.Tensor, u: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return pyxlbert.relative_attention(*qkv.unbind(2), r, content_bias=u, position_bias=w)

        def bias_of(q: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            s = torch.einsum("bihd,rhd->bhir", q + w, r)
            return s.gather(3, band.expand(b, h, t, t)) * d**-0.5

        def sdpa(qkv: torch.Tensor, r: torch.Tensor, u: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            q, k, v = qkv.unbind(2)
            bias = bias_of(q, r, w)
            return F.scaled_dot_product_attention(
                (q + u).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias
            ).transpose(1, 2)

        def plain(qkv: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return pyxlbert.attention(*qkv.unbind(2))

        def call(function: Any, to: torch.dtype) -> Call:
            tensors = [x.detach().to(to).requires_grad_(backward) for x in leaves]
            cotangent = dy.to(to)

            def run() -> Any:
                if not backward:
                    return function(*tensors)
                out = function(*tensors)
                return (out.detach(), *torch.autograd.grad(out, tensors, cotangent, allow_unused=True))

            return run

        peers = {"einsum, gather, SDPA": call(sdpa, dtype), "transformers": call(_eager_core(h, d), dtype)}
        if not backward:
            with torch.no_grad():
                given = bias_of(leaves[0].select(2, 0), leaves[1], leaves[3]).to(dtype)
            qkv, u = leaves[0].to(dtype), leaves[2].to(dtype)
            q, k, v = (x.transpose(1, 2) for x in ((qkv.select(2, 0) + u), *qkv.unbind(2)[1:]))
            peers["SDPA, bias given"] = lambda: F.scaled_dot_product_attention(q, k, v, given).transpose(1, 2)
        peers["pyxlbert attention"] = call(plain, dtype)
        truth = call(sdpa, torch.float64) if t <= 512 else None
        return call(ours, dtype), peers, truth

    flops = 6 * b * h * t * t * d * (8 / 3 if backward else 1)
    return Race(
        "relative_attention",
        f"{b}x{t}x{h}x{d}" + (" forward+backward" if backward else ""),
        dtype,
        build,
        lambda: flops / limits.gemm_rate(dtype),
        rounds=5 if t >= 2048 else 9,
    )


def _eager_core(heads: int, head_size: int) -> Any:
    """`XLNetRelativeAttention.rel_attn_core` on our layout, through transposed views as its model makes them."""
    from transformers import XLNetConfig
    from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

    with torch.device("meta"):
        module = XLNetRelativeAttention(XLNetConfig(d_model=heads * head_size, n_head=heads, dropout=0.0))

    def core(qkv: torch.Tensor, r: torch.Tensor, u: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        del module._parameters["r_w_bias"], module._parameters["r_r_bias"]
        module.r_w_bias, module.r_r_bias = u, w
        q, k, v = (x.transpose(0, 1) for x in qkv.unbind(2))
        try:
            out = module.rel_attn_core(q, k, v, r[:, None].expand(-1, q.shape[1], -1, -1)).transpose(0, 1)
        finally:
            del module.r_w_bias, module.r_r_bias
            module._parameters["r_w_bias"] = module._parameters["r_r_bias"] = None
        return out

    return core


def races() -> Iterator[Race]:
    """Every race of `python -m pyxlbert.bench relative`."""
    for dtype in (torch.float32, torch.bfloat16):
        for batch, length in ((8, 128), (2, 512), (1, 2048)):
            yield relative_attention(batch, length, dtype)
            yield relative_attention(batch, length, dtype, backward=True)
