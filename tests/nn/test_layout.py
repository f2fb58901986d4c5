"""TokenLayout: any mask, both ways."""

from __future__ import annotations

import pytest
import torch

from pyxlbert.nn import TokenLayout
from pyxlbert.testing import compare, tolerances

pytestmark = pytest.mark.quick

MASKS = [
    torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]]),
    torch.tensor([[1, 1, 1], [1, 1, 1]]),
    torch.zeros(2, 4, dtype=torch.long),
    torch.zeros(0, 4, dtype=torch.long),
    torch.zeros(2, 0, dtype=torch.long),
]


@pytest.mark.parametrize("mask", MASKS)
def test_take_and_restore(mask: torch.Tensor) -> None:
    batch, length = mask.shape
    layout = TokenLayout.from_mask(mask, batch, length)
    x = torch.randn(batch, length, 5, requires_grad=True)
    rows = layout.take(x)
    assert rows.reshape(-1, 5).shape[0] == int(mask.sum())
    back = layout.restore(rows)
    assert torch.equal(back, x * mask[..., None])
    (back * 3).sum().backward()
    assert torch.equal(x.grad, 3.0 * mask[..., None].expand_as(x))
    filled = layout.restore(rows, fill=-7.0)
    assert torch.equal(filled == -7.0, (mask == 0)[..., None].expand_as(filled))
    tokens = layout.tokens("cpu")
    assert torch.equal(mask.bool(), torch.ones_like(mask).bool() if tokens is None else tokens)


def test_first_and_positions() -> None:
    mask = MASKS[0]
    layout = TokenLayout.from_mask(mask, 4, 3)
    assert layout.cu_seqlens.tolist() == [0, 2, 4, 6, 6] and layout.max_seqlen == 2
    x = torch.randn(4, 3, 2)
    first = layout.first(layout.take(x))
    assert torch.equal(first, torch.stack([x[0, 0], x[1, 1], x[2, 0], torch.zeros(2)]))
    assert layout.positions("cpu", 6).tolist() == [0, 1, 1, 2, 0, 2]
    packed = TokenLayout.from_cu_seqlens(layout.cu_seqlens, 6)
    assert packed.max_seqlen == 2 and packed.positions("cpu", 6).tolist() == [0, 1, 0, 1, 0, 1]
    gap = TokenLayout.from_cu_seqlens(torch.tensor([0, 0, 2, 2, 3]).int(), 3)
    assert gap.positions("cpu", 3).tolist() == [0, 1, 0]
    assert torch.equal(gap.first(x[0])[[0, 2]], torch.zeros(2, 2))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kept", ["left out", "masked"])
def test_one_row_of_every_sequence(mask: torch.Tensor, kept: str) -> None:
    """Its first, its last and the mean of its tokens, whatever stands at padding; zeros where it has none."""
    batch, length = mask.shape
    layout = TokenLayout.from_mask(mask, batch, length)
    x = torch.randn(batch, length, 5)
    rows = layout.take(x)
    if kept == "masked":
        layout = TokenLayout(batch, length, token_mask=mask.bool())
        rows = torch.where(mask[..., None] == 1, x, torch.nan)
    for name in ("first", "last", "mean"):
        found = getattr(layout, name)(rows)
        assert found.shape == (batch, 5)
        for row, one in enumerate(found):
            tokens = x[row, mask[row].bool()]
            there = {"first": tokens[:1], "last": tokens[-1:], "mean": tokens}[name]
            wanted = there.double().mean(0) if len(tokens) else torch.zeros(5)
            compare.close(name, one, wanted.float(), tolerances.SUMMATION_ORDER)


def test_rows_that_came_packed_have_ends_and_no_mean() -> None:
    layout = TokenLayout.from_cu_seqlens(torch.tensor([0, 0, 2, 2, 3]).int(), 3)
    x = torch.randn(3, 5)
    assert torch.equal(layout.last(x), torch.stack([torch.zeros(5), x[1], torch.zeros(5), x[2]]))
    with pytest.raises(ValueError, match="mean: got rows that came packed"):
        layout.mean(x)


def test_labels_on_padding_are_ignored() -> None:
    layout = TokenLayout.from_mask(MASKS[0], 4, 3)
    assert layout.labels(torch.arange(12).view(4, 3)).tolist() == [0, 1, 4, 5, 6, 8]


@pytest.mark.parametrize(
    "cu_seqlens",
    [torch.tensor([0, 3]), torch.tensor([]).int(), torch.tensor([[0, 3]]).int(), torch.tensor([1, 3]).int()],
)
def test_bad_cu_seqlens(cu_seqlens: torch.Tensor) -> None:
    with pytest.raises((ValueError, TypeError), match="cu_seqlens"):
        TokenLayout.from_cu_seqlens(cu_seqlens, 3)
