"""Positions of queries past the last, which nobody looks at before a kernel on a GPU does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.testing import compare
from pyxlbert.testing.direct import Direct

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.parametrize("backend", [one for one in ("cuda", "triton") if backends.unavailable(one) is None])


def randn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, 1, 16, generator=generator).to(DEVICE) for shape in shapes]


def positions(*numbers: int) -> Tensor:
    return torch.tensor([numbers], dtype=torch.int32, device=DEVICE)


# Of the last the keys are split.
@pytest.mark.parametrize("keys", [40, 1100])
@on_gpu
def test_a_row_past_the_table_is_nan(backend: str, keys: int) -> None:
    """Right past it too, where other rows of the same block are; those keep their bits.  No gradient comes of it."""
    q, k, v, table, dout = randn((1, 4), (1, keys), (1, keys), (100 + keys,), (1, 4))
    direct = Direct(backend)
    results, gradients = [], []
    for wrong in ((101, 500), (-1, -1)):
        given = {"offset": 100, "scale": 0.3, "query_positions": positions(70, wrong[0], -1, wrong[1])}
        out, lse = direct.relative_attention_fwd(q, k, v, table, **given)
        results.append((out, lse))
        needs = [True] * 4 + [False] * 4
        gradients.append(direct.relative_attention_bwd(dout, out, lse, q, k, v, table, **given, needs=needs)[:4])
    (out, lse), (wanted, wanted_lse) = results
    assert out.isnan().all(-1).flatten().tolist() == lse.isnan().flatten().tolist() == [False, True, False, True]
    compare.same_bits("out", out[:, [0, 2]], wanted[:, [0, 2]])
    compare.same_bits("lse", lse[..., [0, 2]], wanted_lse[..., [0, 2]])
    for name, ours, other in zip(("query", "key", "value", "table"), *gradients, strict=True):
        compare.same_bits(name, ours, other)


@on_gpu
def test_a_target_past_the_last_token_is_nan(backend: str) -> None:
    """The table may reach it where the mask has no row and tokens no rank and segment."""
    length = 20
    g, h, k, v, table = randn((1, length), (1, 4), (1, length), (1, length), (2 * length + 9,))
    (embedding,) = randn((2,))
    numbers = torch.arange(length, dtype=torch.int32, device=DEVICE)[None]
    given = {"segment_embedding": embedding, "query_segments": numbers % 2, "key_segments": numbers % 2}
    given |= {"query_rank": numbers, "key_rank": numbers, "offset": length + 5, "scale": 0.3}
    # A row of the mask that is past the last would be one of these.
    masks = torch.zeros(2 * length, length, dtype=torch.bool, device=DEVICE)
    masks[:length] = True
    given["attention_mask"] = masks[None, None, :length]
    results = []
    for wrong in ((length, 500), (-1, -1)):
        at = positions(7, wrong[0], -1, wrong[1])
        results.append(Direct(backend).two_stream_attention_fwd(g, h, k, v, table, target_positions=at, **given))
    for name, ours, wanted in zip(("content", "content lse"), results[0], results[1], strict=False):
        compare.same_bits(name, ours, wanted)
    (_, _, out, lse), (_, _, wanted, wanted_lse) = results
    assert out.isnan().all(-1).flatten().tolist() == lse.isnan().flatten().tolist() == [False, True, False, True]
    compare.same_bits("query", out[:, [0, 2]], wanted[:, [0, 2]])
    compare.same_bits("query lse", lse[..., [0, 2]], wanted_lse[..., [0, 2]])
