"""`accelerate` on Funnel: pooled queries, the first place without distances, token types, heads."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch
import transformers as tr

import pyxlbert
from pyxlbert.integrations import funnel
from pyxlbert.integrations.swap import Replaced
from pyxlbert.testing import compare, models, tolerances

SMALL = {"vocab_size": 50, "block_sizes": [1, 2, 1], "num_decoder_layers": 1, "d_model": 24, "n_head": 3, "d_head": 8}
SMALL |= {"d_inner": 20, "hidden_dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 0}
FLOAT32 = tolerances.MODEL_FLOAT32
LENGTH = 13
RIGHT = torch.arange(LENGTH) < torch.tensor([LENGTH, 7, 2])[:, None]
HOLES = torch.tensor([[1] * 13, [1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]])
TYPES = (torch.arange(LENGTH) // 6).clamp(max=1).expand(3, -1)


def build(head: str = "Model", **fields):
    torch.manual_seed(0)
    model = getattr(tr, f"Funnel{head}")(tr.FunnelConfig(**SMALL | fields))
    models.randomize(model, torch.Generator().manual_seed(0))
    return model.train()


def given(mask=RIGHT, length: int = LENGTH, first: int = 2, **more):
    """`first`: the type of the first place, by which Funnel's tokenizer marks it."""
    ids = torch.randint(5, 50, (3, length), generator=torch.Generator().manual_seed(0))
    types = TYPES[:, :length].clone()
    types[:, 0] = first
    mask = mask[:, :length].long()
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types, **more}


def tensors(output):
    return {name: one for name, one in output.items() if isinstance(one, torch.Tensor) and name != "loss"}


def results(model, arguments, cotangents=None):
    if cotangents is None:
        with torch.no_grad():
            cotangents = models.random_cotangents(tensors(model(**arguments)), torch.Generator().manual_seed(4))
    return models.results(model, arguments, cotangents, tensors, lambda output: output.get("loss")), cotangents


def check(model, arguments) -> None:
    truth, cotangents = results(copy.deepcopy(model).double(), arguments)
    plain, _ = results(model, arguments, cotangents)
    _, report = pyxlbert.accelerate(model, report=True)
    assert not report.left, str(report)
    ours, _ = results(model, arguments, cotangents)
    models.within_budget("funnel", ours, plain, truth)


@pytest.fixture
def calls(monkeypatch):
    """What the op was called with."""
    seen = []
    op = funnel.relative_attention
    monkeypatch.setattr(
        funnel, "relative_attention", lambda *rows, **named: (seen.append(named), op(*rows, **named))[1]
    )
    return seen


FIELDS = [{}, {"separate_cls": False}, {"truncate_seq": False}, {"pool_q_only": False}, {"pooling_type": "max"}]


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("length", [5, 12, 13])
def test_outputs_and_gradients(fields: dict, length: int, calls) -> None:
    """The layers are four and one more, of which two have pooled queries, and all of them run on the op."""
    model = build(**fields)
    check(model, given(length=length, first=0 if fields.get("separate_cls") is False else 2))
    calls.clear()
    model(**given(length=length, first=0 if fields.get("separate_cls") is False else 2))
    assert len(calls) == 5
    assert sum("query_positions" in named for named in calls) == (0 if fields.get("pool_q_only") is False else 2)


@pytest.mark.parametrize("mask", [HOLES, torch.ones_like(HOLES)])
def test_any_pattern_of_padding(mask, calls) -> None:
    model = build()
    check(model, given(mask))
    calls.clear()
    model(**given(mask))
    assert all(("attention_mask" in named) == (mask is HOLES) and "key_lengths" not in named for named in calls)


HEADS = {
    "BaseModel": {},
    "ForPreTraining": {"labels": TYPES},
    "ForMaskedLM": {"labels": TYPES * 3},
    "ForSequenceClassification": {"labels": torch.tensor([0, 1, 1])},
    "ForTokenClassification": {"labels": TYPES % 2},
    "ForQuestionAnswering": {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([6, 3, 4])},
}


@pytest.mark.parametrize("head", HEADS)
def test_heads(head: str) -> None:
    check(build(head), given() | HEADS[head])


@pytest.mark.parametrize("fields", [{}, {"separate_cls": False}])
def test_types_that_are_part_of_every_segment(fields: dict, calls) -> None:
    """Elsewhere than at the first place, where it has no term, attention is as it was."""
    arguments = given()
    arguments["token_type_ids"][:, 4] = 2
    model = build(**fields)
    check(model, arguments)
    calls.clear()
    model(**arguments)
    assert not calls


def test_a_table_of_the_square_is_never_made(calls) -> None:
    """A matrix of token types, or a mask of the first place, would take a million elements."""
    model = pyxlbert.accelerate(build(block_sizes=[1, 1])).eval()
    ids = torch.randint(5, 50, (1, 1000))
    calls.clear()
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        model(ids, attention_mask=torch.ones_like(ids))
    assert len(calls) == 3
    assert max(event.cpu_memory_usage for event in profile.events()) < 1000 * 1000


def test_hidden_states_attentions_and_watched_parts() -> None:
    model = build().eval()
    arguments = given() | {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        wanted = model(**arguments)
        got = pyxlbert.accelerate(model)(**arguments)
        for key in ("hidden_states", "attentions"):
            assert len(got[key]) == len(wanted[key])
            for a, b in zip(got[key], wanted[key], strict=True):
                compare.close(key, a, b, FLOAT32)
        for name, module in model.encoder.blocks[1][0].named_modules():
            called = []
            hook = module.register_forward_hook(lambda *_, called=called: called.append(1))
            compare.close(name, model(**given())[0], wanted[0], FLOAT32)
            hook.remove()
            assert called, name


def test_restore_copies_and_pickles() -> None:
    model = build().eval()
    was = [type(module) for module in model.modules()]
    with torch.no_grad():
        before = model(**given())[0]
        # `pooling_mult` and `seq_len` are left in the module by a call.
        states = [set(vars(module)) for module in model.modules()]
        pyxlbert.accelerate(model)
        wanted = model(**given())[0]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            compare.same_bits("copy", other(**given())[0], wanted)
            assert not any(isinstance(module, Replaced) for module in pyxlbert.restore(other).modules())
        pyxlbert.restore(model)
        compare.same_bits("restored", model(**given())[0], before)
    assert [type(module) for module in model.modules()] == was
    assert [set(vars(module)) for module in model.modules()] == states


@pytest.mark.parametrize("field", ["hidden_dropout", "attention_dropout", "activation_dropout"])
def test_dropout_is_where_it_was(field: str) -> None:
    """Of probability one it is no chance."""
    plain = build(**{field: 1.0})
    ours = pyxlbert.accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        compare.close("train", ours(**given())[0], plain(**given())[0], FLOAT32)
        compare.close("eval", ours.eval()(**given())[0], plain.eval()(**given())[0], FLOAT32)


def test_low_precision_and_packed_weights() -> None:
    plain = build().eval()
    with torch.no_grad():
        exact = plain(**given())[0]
        packed = pyxlbert.pack(pyxlbert.accelerate(copy.deepcopy(plain)))
        compare.close("packed", packed(**given())[0], exact, tolerances.PACKED[torch.float32])
        wanted = copy.deepcopy(plain).bfloat16()(**given())[0]
        got = pyxlbert.accelerate(copy.deepcopy(plain), dtype=torch.bfloat16)(**given())[0]
    assert got.dtype is torch.bfloat16
    assert (got - exact).norm() <= tolerances.FACTOR * (wanted - exact).norm()


def test_compile() -> None:
    """As it was: whether a type is part of every segment is not known then."""
    torch.compiler.reset()
    model = build("BaseModel", block_sizes=[1]).eval()
    with torch.no_grad():
        wanted = model(**given())[0]
        compiled = torch.compile(pyxlbert.accelerate(model), backend="eager", dynamic=True)
        compare.close("output", compiled(**given())[0], wanted, FLOAT32)


def test_what_is_not_funnel_is_left_alone() -> None:
    with pytest.raises(ValueError, match=r"attention_type: got 'factorized', wanted 'relative_shift'"):
        pyxlbert.accelerate(build(attention_type="factorized"))
    model = build()
    model.encoder.blocks[1][0].ffn.layer_norm = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"blocks.1.0.ffn.layer_norm: got Identity, wanted LayerNorm"):
        pyxlbert.accelerate(model)
    model = build()
    feed = model.encoder.blocks[1][1].ffn
    # Bound to this module for ever: a copy of the layer, in float64, cannot run it.
    feed.forward = lambda hidden: type(feed).forward(feed, hidden) * 1.1
    with pytest.raises(ValueError, match=r"blocks.1.1: it cannot be tried: RuntimeError"):
        pyxlbert.accelerate(model)
    assert not any(isinstance(module, Replaced) for module in model.modules())


def test_a_patched_forward_of_one_layer_is_called() -> None:
    model = build("BaseModel").eval()
    feed = model.encoder.blocks[1][1].ffn
    feed.forward = types.MethodType(lambda self, hidden: type(self).forward(self, hidden) * 1.1, feed)
    with torch.no_grad():
        wanted = model(**given())[0]
        compare.close("output", pyxlbert.accelerate(model)(**given())[0], wanted, FLOAT32)


def test_an_activation_of_one_layer_is_called() -> None:
    model = build("BaseModel").eval()
    model.encoder.blocks[1][1].ffn.activation_function = torch.nn.Tanh()
    with torch.no_grad():
        wanted = model(**given())[0]
        compare.close("output", pyxlbert.accelerate(model)(**given())[0], wanted, FLOAT32)
