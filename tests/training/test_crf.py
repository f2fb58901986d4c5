"""The chain of tags against all paths that there are."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyxlbert.testing import compare, tolerances
from pyxlbert.training.crf import CRF

TAGS, LENGTH = 3, 5
MASK = torch.tensor(
    [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
).bool()


def made() -> tuple[CRF, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    crf = CRF(TAGS)
    with torch.no_grad():
        for parameter in crf.parameters():
            parameter.normal_(generator=g)
    emissions = torch.randn(len(MASK), LENGTH, TAGS, generator=g, requires_grad=True)
    return crf, emissions, torch.randint(TAGS, (len(MASK), LENGTH), generator=g)


def path_score(crf: CRF, emissions: torch.Tensor, places: list[int], path: tuple[int, ...]) -> torch.Tensor:
    score = crf.start[path[0]] + crf.end[path[-1]]
    score = score + sum(emissions[place, tag] for place, tag in zip(places, path, strict=True))
    return score + sum((crf.transitions[a, b] for a, b in itertools.pairwise(path)), torch.zeros(()))


@pytest.mark.parametrize("row", range(len(MASK)))
def test_loss_gradients_and_best_path_are_those_of_brute_force(row: int) -> None:
    crf, emissions, tags = made()
    places = MASK[row].nonzero().flatten().tolist()
    loss = crf(emissions, torch.where(MASK, tags, -100), MASK)[row]
    found = crf.decode(emissions, MASK)[row]
    assert (found == -1).tolist() == (~MASK[row]).tolist()
    if not places:
        assert float(loss.detach()) == 0
        return
    paths = list(itertools.product(range(TAGS), repeat=len(places)))
    scores = torch.stack([path_score(crf, emissions[row], places, path) for path in paths])
    wanted = torch.logsumexp(scores, 0) - scores[paths.index(tuple(tags[row, places].tolist()))]
    inputs = [emissions, *crf.parameters()]
    ours = torch.autograd.grad(loss, inputs)
    theirs = torch.autograd.grad(wanted, inputs, allow_unused=True)  # one place has no transition
    compare.close("loss", loss, wanted, tolerances.MODEL_FLOAT32, least=1.0)
    for a, b in zip(ours, theirs, strict=True):
        compare.close("gradient", a, torch.zeros_like(a) if b is None else b, tolerances.MODEL_FLOAT32, least=1.0)
    assert tuple(found[places].tolist()) == paths[int(scores.argmax())]


def test_what_is_forbidden_is_not_found() -> None:
    crf, emissions, _ = made()
    emissions = emissions.detach().clone()
    emissions[:, 2, :2] = -torch.inf
    found = crf.decode(emissions, MASK)
    assert (found[:, 2][MASK[:, 2]] == 2).all()
