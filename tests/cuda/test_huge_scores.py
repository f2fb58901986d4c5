"""Backward finds forward's scores to the last bit, though it has the keys on the left of their product.

Around 1e10 the next float is 1,024 away: of a score that is one below its lse nothing would be left.
"""

from __future__ import annotations

import pytest
import torch

import pyxlbert
from pyxlbert import backends

pytestmark = pytest.mark.skipif(backends.unavailable("cuda") is not None, reason=str(backends.unavailable("cuda")))
DEVICE = "cpu" if backends.cuda_is_emulated else "cuda"
# One score in some hundred would be another if the products came in another order.
QUERIES, KEYS = 6000, 16


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_query_has_its_whole_weight_in_one_key(size: int) -> None:
    draw = torch.Generator().manual_seed(3)
    query, key = (torch.randn(1, n, 1, size, generator=draw).to(DEVICE) * 1e5 for n in (QUERIES, KEYS))
    value = torch.arange(KEYS, dtype=torch.float32, device=DEVICE).view(1, KEYS, 1, 1).repeat(1, 1, 1, size)
    out = pyxlbert.attention(query, key, value.requires_grad_(), backend="cuda")
    chosen = out.detach()[0, :, 0, 0]
    assert torch.equal(chosen, chosen.round())
    (dvalue,) = torch.autograd.grad(out, value, torch.ones_like(out))
    wanted = torch.bincount(chosen.long(), minlength=KEYS).float()
    assert torch.equal(dvalue[0, :, 0, 0], wanted)
