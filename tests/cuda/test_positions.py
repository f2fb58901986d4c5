"""Positions of queries that the table does not reach, which nobody looks at before a kernel on a GPU does."""

from __future__ import annotations

import pytest
import torch

from pyxlbert import backends
from pyxlbert.testing import compare
from pyxlbert.testing.direct import Direct

pytestmark = pytest.mark.skipif(backends.unavailable("cuda") is not None, reason=str(backends.unavailable("cuda")))
DEVICE = "cpu" if backends.cuda_is_emulated else "cuda"


# Of the last the keys are split.
@pytest.mark.parametrize("keys", [40, 1100])
def test_a_row_past_the_table_is_nan(keys: int) -> None:
    """Right past it too, where other rows of the same block are; those keep their bits."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, table = (
        torch.randn(*shape, 1, 16, generator=generator).to(DEVICE)
        for shape in ((1, 4), (1, keys), (1, keys), (100 + keys,))
    )
    forward = Direct("cuda").relative_attention_fwd
    results = []
    for positions in ([70, 101, -1, 500], [70, -1, -1, -1]):
        at = torch.tensor([positions], dtype=torch.int32, device=DEVICE)
        results.append(forward(q, k, v, table, offset=100, scale=0.3, query_positions=at))
    (out, lse), (wanted, wanted_lse) = results
    assert out.isnan().all(-1).flatten().tolist() == lse.isnan().flatten().tolist() == [False, True, False, True]
    compare.same_bits("out", out[:, [0, 2]], wanted[:, [0, 2]])
    compare.same_bits("lse", lse[..., [0, 2]], wanted_lse[..., [0, 2]])
