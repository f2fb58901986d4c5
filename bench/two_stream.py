"""Races of two-stream attention against the calls of `relative_attention` that it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyxlbert.bench import limits
from pyxlbert.bench.ops import Built, Call, Race

import pyxlbert


def two_stream_attention(batch: int, length: int, targets: int, dtype: torch.dtype, *, backward: bool = False) -> Race:
    """A random permutation by ranks, M targets at the end of it, 12 heads of 64, content and position bias.

    The peers: two calls of ours, the second with the M rows of the query stream; and with T rows, to which
    `transformers` spreads the M.
    """
    b, t, m, h, d = batch, length, targets, 12, 64

    def build() -> Built:
        ranks = torch.stack([torch.randperm(t) for _ in range(b)]).int()
        positions = ranks.argsort(1)[:, t - m :].sort(1).values.int()
        target_ranks = ranks.gather(1, positions.long())
        kinds = [torch.randn(b, t, 3, h, d), torch.randn(b, m, h, d), 0.5 * torch.randn(2 * t, h, d)]
        leaves = [x.to(dtype).requires_grad_(backward) for x in (*kinds, *(torch.randn(2, h, d) * 0.3))]
        qkv, g, table, content_bias, position_bias = leaves
        every = torch.zeros(b, t, h, d, dtype=dtype).requires_grad_(backward)
        cotangents = torch.randn(b, t, h, d).to(dtype), torch.randn(b, m, h, d).to(dtype)
        biases: dict[str, Any] = {"content_bias": content_bias, "position_bias": position_bias, "offset": t}

        def together() -> tuple[torch.Tensor, torch.Tensor]:
            return pyxlbert.two_stream_attention(
                qkv.select(2, 0),
                g,
                *qkv.unbind(2)[1:],
                table,
                **biases,
                query_rank=ranks,
                key_rank=ranks,
                target_positions=positions,
            )

        def content() -> torch.Tensor:
            q, k, v = qkv.unbind(2)
            return pyxlbert.relative_attention(
                q, k, v, table, **biases, query_rank=ranks, key_rank=ranks, see_self=True
            )

        def query() -> torch.Tensor:
            return pyxlbert.relative_attention(
                g,
                *qkv.unbind(2)[1:],
                table,
                **biases,
                query_rank=target_ranks,
                key_rank=ranks,
                see_self=False,
                query_positions=positions,
            )

        def whole() -> torch.Tensor:
            k, v = qkv.unbind(2)[1:]
            return pyxlbert.relative_attention(
                every, k, v, table, **biases, query_rank=ranks, key_rank=ranks, see_self=False
            )

        def call(function: Any, outputs: tuple[torch.Tensor, ...], inputs: list[torch.Tensor]) -> Call:
            def run() -> Any:
                out = function()
                if not backward:
                    return out
                return (*(x.detach() for x in out), *torch.autograd.grad(out, inputs, outputs))

            return run

        peers = {
            "pyxlbert, two calls": call(lambda: (content(), query()), cotangents, leaves),
            "pyxlbert, T rows": call(
                lambda: (content(), whole()), (cotangents[0],) * 2, [qkv, every, table, content_bias, position_bias]
            ),
        }
        return Built(call(together, cotangents, leaves), peers, None)

    kind = " forward+backward" if backward else ""
    # A random permutation hides half of the pairs, but hardly ever a whole tile.
    products = (11 if backward else 3) * 2 * b * h * (t + m) * t * d
    return Race(
        "two_stream_attention",
        f"{b}x{t}x{h}x{d} M={m}{kind}",
        dtype,
        build,
        3 * b * t * h * d * dtype.itemsize,
        lambda: products / limits.gemm_rate(dtype),
        rounds=9,
    )


def races() -> Iterator[Race]:
    """Every race of `python -m pyxlbert.bench two_stream`."""
    for dtype in (torch.float32, torch.bfloat16):
        for batch, length in ((8, 128), (4, 512), (1, 2048)):
            for backward in (False, True):
                yield two_stream_attention(batch, length, length // 6, dtype, backward=backward)
