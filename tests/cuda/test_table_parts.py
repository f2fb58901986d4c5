"""The gradient of the position table, a sum over the batch, is made of sums over parts of it where rows are few."""

from __future__ import annotations

import importlib

import pytest
import torch

from pyxlbert import backends, relative_attention
from pyxlbert.testing import tolerances

pytestmark = pytest.mark.skipif(backends.unavailable("cuda") is not None, reason=str(backends.unavailable("cuda")))
DEVICE = "cpu" if backends.cuda_is_emulated else "cuda"
relative = importlib.import_module("pyxlbert.cuda._relative")


@pytest.mark.parametrize(
    ("rows", "heads", "batch", "parts"),
    [
        (1024, 12, 8, 3),
        (256, 12, 8, 8),
        (256, 12, 64, 11),
        (4096, 12, 8, 1),
        (64, 1, 3, 3),
        (64, 1, 0, 1),
        (0, 1, 4, 4),
    ],
)
def test_there_are_blocks_for_a_device(rows: int, heads: int, batch: int, parts: int) -> None:
    assert relative.parts_of_table(rows, heads, batch) == parts


def gradient(backend: str, device: str, dtype: torch.dtype, tables: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(5, 20, 2, 16, generator=generator).to(device, dtype) for _ in range(3))
    table = torch.randn(*tables, 40, 2, 16, generator=generator).to(device, dtype).requires_grad_()
    out = relative_attention(
        q, k, v, table, key_lengths=torch.tensor([20, 7, 0, 20, 13], device=device), backend=backend
    )
    return torch.autograd.grad(out.square().sum(), table)[0].cpu()


@pytest.mark.parametrize("tables", [(), (1,), (5,)], ids=str)
# One part, of five sequences; two, of three and two; three, the last of one; five.
@pytest.mark.parametrize("blocks", [1, 3, 5, 512])
def test_parts_of_any_size_make_the_same_sum(blocks: int, tables: tuple[int, ...], monkeypatch) -> None:
    monkeypatch.setattr(relative, "TABLE_BLOCKS", blocks)
    found = gradient("cuda", DEVICE, torch.float32, tables)
    truth = gradient("torch", "cpu", torch.float64, tables)
    assert float((found.double() - truth).abs().max() / truth.abs().max()) < tolerances.SUMMATION_ORDER
    assert torch.equal(found, gradient("cuda", DEVICE, torch.float32, tables))
