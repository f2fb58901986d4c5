"""`accelerate` on XLNet: one stream and two, memories, orders, heads that read padding."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as tr

import pyxlbert
from pyxlbert.integrations.swap import Replaced
from pyxlbert.testing import compare, models, tolerances

SMALL = {"vocab_size": 50, "d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 20, "dropout": 0.0}
SMALL |= {"summary_last_dropout": 0.0, "start_n_top": 2, "end_n_top": 2}
LEFT = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)
HOLES = torch.tensor([[1] * 7, [1, 0, 0, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1]])
IDS = torch.randint(6, 50, LEFT.shape, generator=torch.Generator().manual_seed(0))
TYPES = torch.arange(7).expand(4, -1) // 3
FLOAT32 = tolerances.MODEL_FLOAT32


def build(head: str = "Model", **fields):
    torch.manual_seed(0)
    model = getattr(tr, f"XLNet{head}")(tr.XLNetConfig(**SMALL | fields))
    models.randomize(model, torch.Generator().manual_seed(0))
    return model.train()


def given(mask=LEFT, **more):
    return {"input_ids": torch.where(mask.bool(), IDS, 5), "attention_mask": mask.float(), **more}


def targets():
    order = torch.rand(4, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    mapping = torch.eye(7)[torch.tensor([[6, 3], [5, 6], [6, 4], [1, 2]])]
    return {"perm_mask": order.float(), "target_mapping": mapping}


def tensors(output, real=None):
    """All outputs by name; at tokens alone where `real` is given."""
    found = {}
    for name, value in output.items():
        values = {name: value} if isinstance(value, torch.Tensor) else {}
        if isinstance(value, tuple | list):
            values = {f"{name} {place}": one for place, one in enumerate(value) if isinstance(one, torch.Tensor)}
        for place, one in values.items():
            if place != "loss":
                found[place] = one[real] if real is not None and one.shape[:2] == real.shape else one
    return found


def results(model, arguments, real, cotangents=None):
    if cotangents is None:
        with torch.no_grad():
            found = tensors(model(**arguments), real)
        found = {name: value for name, value in found.items() if not name.startswith("mems")}
        cotangents = models.random_cotangents(found, torch.Generator().manual_seed(4))
    loss = lambda output: output.get("loss")  # noqa: E731
    return models.results(model, arguments, cotangents, lambda output: tensors(output, real), loss), cotangents


def check(model, arguments, real=None) -> None:
    """Against transformers in float32: in float64 its two streams fail."""
    arguments = {name: value for name, value in arguments.items() if value is not None}
    plain, cotangents = results(model, arguments, real)
    model, report = pyxlbert.accelerate(model, report=True)
    assert not report.left, str(report)
    ours, _ = results(model, arguments, real, cotangents)
    assert set(ours) == set(plain)
    for name, value in plain.items():
        gradient = name.startswith("d ")
        relative = tolerances.MODEL_GRADIENT_FLOAT32 if gradient else FLOAT32
        compare.close(name, ours[name], value, relative, least=1.0 if gradient else 0.0)


CASES = {
    "left": given(),
    "right": given(RIGHT, token_type_ids=TYPES),
    "holes": given(HOLES),
    "two streams": {"input_ids": IDS, "token_type_ids": TYPES, **targets()},
    "order": {"input_ids": IDS, "perm_mask": targets()["perm_mask"]},
    "no padding": {"input_ids": IDS},
}
FIELDS = [{}, {"attn_type": "uni"}, {"bi_data": True}, {"clamp_len": 2}, {"ff_activation": "relu", "mem_len": 3}]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("use_mems", [False, True])
def test_outputs_and_gradients(case: str, use_mems: bool) -> None:
    """With memories padding is computed everywhere, without them it is zeros."""
    arguments = CASES[case] | {"use_mems": use_mems}
    real = arguments.get("attention_mask")
    check(build(), arguments, None if real is None or use_mems else real.bool())


@pytest.mark.parametrize("fields", FIELDS)
def test_configurations(fields: dict) -> None:
    if fields.get("attn_type") == "uni":
        # transformers fails on its masks.
        check(build(**fields), CASES["no padding"])
        return
    check(build(**fields), given(token_type_ids=TYPES, use_mems=False), LEFT.bool())
    check(build(**fields), CASES["two streams"])


def test_memories() -> None:
    model = build().eval()
    ours = pyxlbert.accelerate(copy.deepcopy(model))
    mems = [None, None]
    for _ in range(3):
        with torch.no_grad():
            outputs = [one(IDS, mems=kept) for one, kept in zip((model, ours), mems, strict=True)]
        mems = [output.mems for output in outputs]
        compare.close("output", outputs[1][0], outputs[0][0], FLOAT32)
        for a, b in zip(*mems, strict=True):
            compare.close("memory", b, a, FLOAT32)


LABELS = {
    "LMHeadModel": {"labels": IDS},
    "ForSequenceClassification": {"labels": torch.tensor([0, 1, 1, 0])},
    "ForTokenClassification": {"labels": torch.where(LEFT.bool(), IDS % 2, -100)},
    "ForQuestionAnsweringSimple": {"start_positions": torch.arange(4), "end_positions": torch.arange(3, 7)},
    "ForQuestionAnswering": {"start_positions": torch.arange(4), "end_positions": torch.arange(3, 7)},
}


@pytest.mark.parametrize("head", LABELS)
def test_heads(head: str) -> None:
    arguments = given(use_mems=False) | LABELS[head]
    if head == "LMHeadModel":
        arguments["labels"] = torch.where(LEFT.bool(), IDS, -100)
    everywhere = "Answering" in head
    check(build(head), arguments, None if everywhere else LEFT.bool())


@pytest.mark.parametrize("summary", ["last", "first", "mean"])
def test_a_summary_at_padding_is_what_it_was(summary: str) -> None:
    for mask in (LEFT, RIGHT):
        head = "ForSequenceClassification"
        check(build(head, summary_type=summary), given(mask, use_mems=False) | LABELS[head])


@pytest.mark.parametrize("case", ["left", "two streams"])
def test_hidden_states_and_attentions(case: str) -> None:
    model = build().eval()
    arguments = CASES[case] | {"output_hidden_states": True, "output_attentions": True, "use_mems": False}
    with torch.no_grad():
        wanted = model(**arguments)
        got = pyxlbert.accelerate(model)(**arguments)
    assert len(got.hidden_states) == len(wanted.hidden_states)
    assert len(got.attentions) == len(wanted.attentions)
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        real = LEFT.bool() if case == "left" else slice(None)
        compare.close("state", a[real], b[real], FLOAT32)
    for a, b in zip(got.attentions, wanted.attentions, strict=True):
        for one, other in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (a, b)), strict=True):
            real = LEFT.bool()[:, None, :, None] if case == "left" else torch.tensor(True)
            compare.close("weights", one * real, other * real, FLOAT32)


def test_padding_is_left_out(monkeypatch) -> None:
    rows = []
    model = pyxlbert.accelerate(build().eval())
    linear = pyxlbert.nn.relative_attention.linear
    monkeypatch.setattr(
        pyxlbert.nn.relative_attention, "linear", lambda x, *rest: (rows.append(x.shape[0]), linear(x, *rest))[1]
    )
    with torch.no_grad():
        output = model(**given(use_mems=False))[0]
    assert int(LEFT.sum()) in rows and not output[~LEFT.bool()].any()


def test_every_module_can_be_watched() -> None:
    model = build().eval()
    with torch.no_grad():
        wanted = model(**given(use_mems=False))[0]
        pyxlbert.accelerate(model)
        for name, module in model.named_modules():
            if not name or isinstance(module, torch.nn.ModuleList) or name.startswith(("layer.1", "layer.0.dropout")):
                continue
            seen = []
            hook = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            got = model(**given(use_mems=False))[0]
            hook.remove()
            assert seen, name
            compare.close(name, got, wanted, FLOAT32)


def test_restore_copies_and_pickles() -> None:
    model = build().eval()
    was = [type(module) for module in model.modules()]
    states = [set(vars(module)) for module in model.modules()]
    arguments = given()
    with torch.no_grad():
        before = model(**arguments)[0]
        pyxlbert.accelerate(model)
        wanted = model(**arguments)[0]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            compare.same_bits("copy", other(**arguments)[0], wanted)
        pyxlbert.restore(model)
        compare.same_bits("restored", model(**arguments)[0], before)
    assert [type(module) for module in model.modules()] == was
    assert [set(vars(module)) for module in model.modules()] == states


def test_dropout_is_where_it_was() -> None:
    """Of probability one it is no chance."""
    plain = build(dropout=1.0)
    ours = pyxlbert.accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        compare.close("train", ours(IDS)[0], plain(IDS)[0], FLOAT32)
        compare.close("eval", ours.eval()(IDS)[0], plain.eval()(IDS)[0], FLOAT32)


def test_weights_updated_and_tables_replaced_are_seen() -> None:
    plain = build("ForTokenClassification")
    ours = pyxlbert.accelerate(copy.deepcopy(plain))
    for model in (plain, ours):
        model(**given(use_mems=False), **LABELS["ForTokenClassification"]).loss.backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        torch.manual_seed(1)
        model.eval().resize_token_embeddings(60, mean_resizing=False)
    with torch.no_grad():
        got, wanted = (model(**given(use_mems=False))[0][LEFT.bool()] for model in (ours, plain))
    compare.close("output", got, wanted, tolerances.MODEL_GRADIENT_FLOAT32)


def test_low_precision() -> None:
    model = build().eval()
    with torch.no_grad():
        exact = model(**given())[0]
        wanted = copy.deepcopy(model).bfloat16()(**given())[0]
        got = pyxlbert.accelerate(model, dtype=torch.bfloat16)(**given())[0]
    real = LEFT.bool()
    assert got.dtype is torch.bfloat16
    assert (got - exact)[real].norm() <= tolerances.FACTOR * (wanted - exact)[real].norm()


def test_float64() -> None:
    model = build().double().eval()
    arguments = given(use_mems=False)
    with torch.no_grad():
        wanted, got = model(**arguments)[0], pyxlbert.accelerate(model)(**arguments)[0]
    compare.close("output", got[LEFT.bool()], wanted[LEFT.bool()], tolerances.FLOAT64)


def test_generation() -> None:
    model = build("LMHeadModel").eval()
    prompt = IDS[:2]
    wanted = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(pyxlbert.accelerate(model).generate(prompt, max_new_tokens=4, do_sample=False), wanted)


def test_what_is_not_xlnet_is_left_alone() -> None:
    model = build()
    model.layer[1].ff.layer_norm = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"ff.layer_norm: got LayerNorm, Identity, wanted LayerNorm"):
        pyxlbert.accelerate(model)
    model = build()
    model.layer[1].ff.activation_function = torch.nn.Tanh()
    with pytest.raises(ValueError, match=r"layer.1: it computes something else"):
        pyxlbert.accelerate(model)
    assert not any(isinstance(module, Replaced) for module in model.modules())


def test_compile() -> None:
    torch.compiler.reset()
    plain = build(n_layer=1).eval()
    ours = pyxlbert.accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        got = torch.compile(ours, backend="eager", fullgraph=True, dynamic=True)(**given(use_mems=False))[0]
        wanted = plain(**given(use_mems=False))[0]
    compare.close("output", got[LEFT.bool()], wanted[LEFT.bool()], FLOAT32)
