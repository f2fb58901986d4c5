"""Each comparison helper fails on a wrong answer; a helper that cannot fail proves nothing."""

from __future__ import annotations

import pytest
import torch

from pyxlbert.testing import compare, tolerances


@pytest.fixture
def triple():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    plain = truth.float() * (1 + torch.finfo(torch.float32).eps)
    return plain.clone(), plain, truth


def test_within_budget_accepts_an_equal_answer(triple) -> None:
    compare.within_budget("same", *triple)


@pytest.mark.parametrize("spoil", ["one element", "all a little", "nan", "shape", "dtype", "swap"])
def test_within_budget_rejects(triple, spoil: str) -> None:
    ours, plain, truth = triple
    eps = torch.finfo(torch.float32).eps
    if spoil == "one element":
        ours[3, 5] += 40 * eps
    elif spoil == "all a little":
        ours = (truth * (1 + 12 * eps)).float()
    elif spoil == "nan":
        ours[0, 0] = float("nan")
    elif spoil == "shape":
        ours = ours[:-1]
    elif spoil == "dtype":
        ours = ours.double()
    else:
        ours[[0, 1]] = ours[[1, 0]]
    with pytest.raises(AssertionError):
        compare.within_budget(spoil, ours, plain, truth)


def test_what_is_clearly_within_budget_is(triple) -> None:
    """The quick question never says yes where the whole one says no, and says it of most answers."""
    _, plain, truth = triple
    peer, yes = compare.Peer.of(plain, truth), 0
    generator = torch.Generator().manual_seed(1)
    for size in (0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 10.0):
        ours = (truth + size * (plain - truth) * torch.randn(truth.shape, generator=generator).sign()).float()
        if peer.clearly(ours, tolerances.FACTOR):
            yes += 1
            compare.within_budget(str(size), ours, plain, truth, terms=0.0)
    assert 4 <= yes < 9
    assert not peer.clearly(plain.double(), 2.0) and not peer.clearly(plain[:-1], 2.0)
    for value in (float("nan"), float("inf")):
        spoilt = plain.clone()
        spoilt[0, 0] = value
        assert not peer.clearly(spoilt, 2.0)
        assert not compare.Peer.of(spoilt, truth).clearly(plain, 2.0)
        assert not compare.Peer.of(spoilt, truth).clearly(spoilt, 2.0)


def test_within_budget_where_plain_overflows(triple) -> None:
    ours, plain, truth = triple
    plain[0, 0] = float("inf")
    compare.within_budget("finite is fine", ours, plain, truth)
    ours[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="not finite"):
        compare.within_budget("nan is not", ours, plain, truth)


def test_close_rejects(triple) -> None:
    ours, plain, _ = triple
    compare.close("same", ours, plain, tolerances.MODEL_FLOAT32)
    ours[1, 1] += 8 * tolerances.MODEL_FLOAT32
    with pytest.raises(AssertionError, match="largest difference"):
        compare.close("off", ours, plain, tolerances.MODEL_FLOAT32)
    with pytest.raises(AssertionError, match="shape"):
        compare.close("short", ours[1:], plain, tolerances.MODEL_FLOAT32)
    ours[1, 1] = float("inf")
    with pytest.raises(AssertionError, match="finite"):
        compare.close("inf", ours, plain, tolerances.MODEL_FLOAT32)


def test_same_bits_rejects() -> None:
    a = torch.tensor([0.0, 1.0, float("nan")])
    compare.same_bits("same", a, a.clone())
    with pytest.raises(AssertionError, match="1 of 3"):
        compare.same_bits("sign of zero", a, torch.tensor([-0.0, 1.0, float("nan")]))
    with pytest.raises(AssertionError):
        compare.same_bits("dtype", a, a.double())


def test_cosine_distance_rejects() -> None:
    a = torch.eye(4)
    assert compare.cosine_distance("same", a, 2 * a, tolerances.COSINE[torch.float32]) == 0
    with pytest.raises(AssertionError, match="cosine"):
        compare.cosine_distance("turned", a, a.roll(1, 0), tolerances.COSINE[torch.float32])
    with pytest.raises(AssertionError, match="finite"):
        compare.cosine_distance("nan", a * float("nan"), a, tolerances.COSINE[torch.float32])


def test_poison_reaches_the_native_glue(poisoned) -> None:
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2)).isnan().all()
    assert not torch.zeros(3).isnan().any()
