"""`accelerate` and `restore` on every architecture that has a table: values, gradients, classes, bits."""

from __future__ import annotations

import copy
import io
import pickle

import conformers
import pytest
import torch
import zoo

import pyxlbert
from pyxlbert.integrations.drop_in import architectures
from pyxlbert.integrations.swap import Replaced
from pyxlbert.testing import compare, models, tolerances

KINDS = sorted(zoo.ZOO)


def classes(model) -> list[type]:
    return [type(module) for module in model.modules()]


def values(model, **options):
    with torch.no_grad():
        return model.eval()(**zoo.batch(model) | options)[0]


def test_every_table_is_in_the_zoo() -> None:
    assert set(architectures()) == {*zoo.ZOO, *conformers.MODELS, "xlnet", "funnel"}  # which have suites of their own


@pytest.mark.parametrize("head", zoo.HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_loss_and_gradients(kind: str, head: str) -> None:
    for seed in (0, 1):
        model = zoo.build(kind, head, seed)
        truth, cotangents = zoo.results(copy.deepcopy(model).double(), head)
        plain, _ = zoo.results(model, head, cotangents=cotangents)
        _, report = pyxlbert.accelerate(model, report=True)
        assert not report.left, str(report)
        ours, _ = zoo.results(model, head, cotangents=cotangents)
        models.within_budget((kind, head, seed), ours, plain, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_any_pattern_of_padding(kind: str) -> None:
    """A first place that is padding is computed as it was."""
    model = zoo.build(kind)
    truth, cotangents = zoo.results(copy.deepcopy(model).double(), mask=zoo.LEFT)
    plain, _ = zoo.results(model, mask=zoo.LEFT, cotangents=cotangents)
    ours, _ = zoo.results(pyxlbert.accelerate(model), mask=zoo.LEFT, cotangents=cotangents)
    models.within_budget(kind, ours, plain, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_removed_or_stays(kind: str) -> None:
    padding = ~zoo.MASK.bool()
    model = zoo.build(kind)
    before = values(model)
    rows = []
    pyxlbert.accelerate(model)
    # A hook below a layer's linears would be seen; the op's own function is not.
    linear = pyxlbert.nn.linear.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyxlbert.nn.linear, "linear", lambda x, *rest: (rows.append(x.shape[:-1]), linear(x, *rest))[1])
        after = values(model)
    assert {tuple(shape) for shape in rows} == {(int(zoo.MASK.sum()),)}
    assert not after[padding].any()
    pyxlbert.restore(model)
    kept = values(pyxlbert.accelerate(model, pack=False))
    compare.close("everywhere", kept, before, tolerances.MODEL_FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_restore_gives_back_classes_and_bits(kind: str) -> None:
    model = zoo.build(kind, "ForTokenClassification")
    parameters, was, before = list(model.parameters()), classes(model), values(model)
    states = [set(vars(module)) for module in model.modules()]
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    pyxlbert.accelerate(model)
    assert classes(model) != was
    assert all(issubclass(now, old) for now, old in zip(classes(model), was, strict=True))
    assert list(model.state_dict()) == list(bits)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    pyxlbert.restore(model)
    assert classes(model) == was
    assert [set(vars(module)) for module in model.modules()] == states
    compare.same_bits("output", values(model), before)
    for name, value in model.state_dict().items():
        compare.same_bits(name, value, bits[name])


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind: str) -> None:
    model = pyxlbert.accelerate(zoo.build(kind))
    wanted = values(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert classes(other) == classes(model)
        compare.same_bits("copy", values(other), wanted)
        assert not set(map(id, other.parameters())) & set(map(id, model.parameters()))
        assert not any(isinstance(module, Replaced) for module in pyxlbert.restore(other).modules())
    compare.same_bits("the first", values(model), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_model_is_touched(kind: str) -> None:
    other = zoo.build(kind)
    before, bits = classes(other), values(other)
    pyxlbert.accelerate(zoo.build(kind))
    assert classes(other) == before
    compare.same_bits("other", values(other), bits)
