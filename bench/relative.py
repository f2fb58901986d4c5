"""Races of relative attention against `transformers`' eager core and SDPA with a materialised position bias.

SDPA comes twice: with the bias made by einsum and gather, and, forward only, with the bias given to it for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pyxlbert.bench import limits
from pyxlbert.bench.ops import Built, Call, Race, lazily, some_heads

import pyxlbert


@dataclass(frozen=True)
class Problem:
    """XLNet's term of content and position, no mask; q, k, v are views of one projection.

    Attributes:
        batch, length, heads, head_size: B, T, H, D; the table has 2 T rows.
        dtype: of the tensors.
        backward: a call is forward and backward, else forward without gradients.
    """

    batch: int
    length: int
    dtype: torch.dtype
    backward: bool = False
    heads: int = 12
    head_size: int = 64

    @property
    def case(self) -> str:
        shape = f"{self.batch}x{self.length}x{self.heads}x{self.head_size}"
        return shape + (" forward+backward" if self.backward else "")

    def limit(self) -> float:
        """Seconds at the machine's GEMM rate: three products forward; backward repeats two and makes six more."""
        product = 2 * self.batch * self.heads * self.length**2 * self.head_size
        return (11 if self.backward else 3) * product / limits.gemm_rate(self.dtype)

    @property
    def bytes(self) -> int:
        """Of q, k and v."""
        return 3 * self.batch * self.length * self.heads * self.head_size * self.dtype.itemsize

    def contestants(self) -> tuple[str, ...]:
        """Ours first.  "pyxlbert attention" is ours without a position term, whose FLOPs are two thirds."""
        given = () if self.backward else ("SDPA, bias given",)
        return ("pyxlbert", "einsum, gather, SDPA", "transformers", *given, "pyxlbert attention")

    def inputs(self) -> list[torch.Tensor]:
        """float32: qkv `[B, T, 3, H, D]`, the table `[2 T, H, D]`, the biases `[H, D]` of content and position and the
        cotangent `[B, T, H, D]`."""
        b, t, h, d = self.batch, self.length, self.heads, self.head_size
        table, biases = 0.5 * torch.randn(2 * t, h, d), torch.randn(2, h, d) * 0.3
        return [torch.randn(b, t, 3, h, d), table, *biases, torch.randn(b, t, h, d)]

    def call(self, name: str, inputs: list[torch.Tensor], dtype: torch.dtype | None = None) -> Call:
        """The contestant `name` on `inputs`, in `dtype` instead of the problem's."""
        *leaves, cotangent = (x.detach().to(dtype or self.dtype) for x in inputs)
        if name == "SDPA, bias given":
            qkv, table, content, position = leaves
            bias = _position_bias(qkv.select(2, 0), table, position)
            q, k, v = (x.transpose(1, 2) for x in (qkv.select(2, 0) + content, *qkv.unbind(2)[1:]))
            return lambda: F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2)
        function = {
            "pyxlbert": _ours,
            "einsum, gather, SDPA": _sdpa,
            "transformers": _eager_core(self.heads, self.head_size),
            "pyxlbert attention": lambda qkv, *_: pyxlbert.attention(*qkv.unbind(2)),
        }[name]
        leaves = [x.requires_grad_(self.backward) for x in leaves]

        def run() -> Any:
            out = function(*leaves)
            if not self.backward:
                return out
            return (out.detach(), *torch.autograd.grad(out, leaves, cotangent, allow_unused=True))

        return run

    def build(self) -> Built:
        """See `Race`."""
        inputs = self.inputs()
        ours, *peers = self.contestants()
        part = some_heads(self.length, self.heads)

        def exact() -> list[torch.Tensor]:
            return [part(x).to(self.dtype).double() for x in inputs]

        def truth() -> Any:
            return self.call("einsum, gather, SDPA", exact(), torch.float64)()

        def alone() -> Any:
            qkv, *_, cotangent = exact()
            qkv.requires_grad_(self.backward)
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv.unbind(2))).transpose(1, 2)
            return (out.detach(), *torch.autograd.grad(out, qkv, cotangent)) if self.backward else out

        def later(name: str) -> Call:
            return lazily(lambda: self.call(name, inputs))

        return Built(
            later(ours),
            {name: later(name) for name in peers},
            truth,
            {"pyxlbert attention": alone},
            part,
        )

    def race(self) -> Race:
        rounds = 5 if self.length >= 2048 else 9
        return Race("relative_attention", self.case, self.dtype, self.build, self.bytes, self.limit, rounds)


def _ours(qkv: torch.Tensor, r: torch.Tensor, u: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return pyxlbert.relative_attention(*qkv.unbind(2), r, content_bias=u, position_bias=w)


def _sdpa(qkv: torch.Tensor, r: torch.Tensor, u: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv.unbind(2)
    q, k, v, bias = (q + u).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), _position_bias(q, r, w)
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2)


def _position_bias(q: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    b, t, h, d = q.shape
    place = torch.arange(t, device=q.device)
    band = t + place[None] - place[:, None]
    return torch.einsum("bihd,rhd->bhir", q + w, r).gather(3, band.expand(b, h, t, t)) * d**-0.5


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
            yield Problem(batch, length, dtype).race()
            yield Problem(batch, length, dtype, backward=True).race()
