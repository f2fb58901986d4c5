"""What cannot be replaced is said, and nothing is guessed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import zoo
from transformers import BertModel

import pyxlbert
from pyxlbert.integrations import drop_in
from pyxlbert.integrations.swap import Replaced
from pyxlbert.testing import compare


def reasons(model, **options) -> dict[str, str]:
    _, report = pyxlbert.accelerate(model, report=True, **options)
    return {entry.name: entry.reason for entry in report.left}


def refused(model, error: type = ValueError, **options) -> str:
    before = [type(module) for module in model.modules()] if isinstance(model, torch.nn.Module) else None
    with pytest.raises(error) as caught:
        pyxlbert.accelerate(model, **options)
    if before is not None:
        assert [type(module) for module in model.modules()] == before
    return str(caught.value)


def test_arguments() -> None:
    assert "model: got int, wanted a torch.nn.Module" in refused(3, TypeError)
    model = zoo.build("bert")
    for name in ("pack", "verify", "report"):
        assert f"{name}: got" in refused(model, TypeError, **{name: "no"})
    assert "dtype: got torch.int8, wanted torch.float32" in refused(model, TypeError, dtype=torch.int8)
    assert "backend: got 'fast', wanted one of torch, cpu" in refused(model, backend="fast")
    missing = [name for name in pyxlbert.backends.NAMES if pyxlbert.backends.unavailable(name)]
    for name in missing:
        assert f"backend {name!r} is unavailable" in refused(model, RuntimeError, backend=name)


def test_nothing_to_replace() -> None:
    linear = torch.nn.Linear(2, 2)
    text = refused(linear, dtype=torch.bfloat16)
    assert linear.weight.dtype is torch.float32
    assert "got Linear, in which nothing could be replaced" in text and "bert" in text and "mpnet" in text


def test_twice_and_never() -> None:
    model = zoo.build("bert")
    with pytest.raises(ValueError, match="restore: model: got BertModel, in which nothing is accelerated"):
        pyxlbert.restore(model)
    with pytest.raises(TypeError, match="restore: model: got str, wanted"):
        pyxlbert.restore("model")
    pyxlbert.accelerate(model)
    assert "accelerated already, wanted restore(model) first" in refused(model)
    pyxlbert.restore(model)
    pyxlbert.accelerate(model)


def test_restore_does_not_undo_the_work_of_others() -> None:
    plain = zoo.build("bert").eval()
    ours = pyxlbert.accelerate(copy.deepcopy(plain))
    for model in (plain, ours):
        torch.nn.utils.parametrizations.orthogonal(model.encoder.layer[0].intermediate.dense)
    real = zoo.MASK.bool()
    with torch.no_grad():
        got, wanted = (model(**zoo.batch(model))[0][real] for model in (ours, plain))
    compare.close("output", got, wanted, compare.tolerances.MODEL_FLOAT32)
    with pytest.raises(ValueError, match=r"encoder.layer.0.intermediate.dense, the class of which is now Parametrized"):
        pyxlbert.restore(ours)
    torch.nn.utils.parametrize.remove_parametrizations(ours.encoder.layer[0].intermediate.dense, "weight")
    assert not any(isinstance(module, Replaced) for module in pyxlbert.restore(ours).modules())


def test_compiled_and_meta() -> None:
    assert "compiled, wanted it before torch.compile" in refused(torch.compile(zoo.build("bert")))
    model = zoo.build("bert")
    model.compile()
    assert "compiled, wanted it before torch.compile" in refused(model)
    with torch.device("meta"):
        model = BertModel(zoo.configuration("bert"))
    assert "embeddings.word_embeddings.weight on device meta, wanted cpu or cuda" in refused(model)


def test_quantised_linears() -> None:
    model = zoo.build("bert")
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    words = refused(quantised)
    assert "layer.0: BertLayer -> left alone: attention.self.query: got Linear of torch.ao.nn.quantized" in words
    assert "quantised, wanted floating-point weights" in words


def test_what_has_nothing_of_ours_is_not_packed() -> None:
    with pytest.raises(ValueError, match="pack: model: got BertModel, which holds no layer of pyxlbert: call"):
        pyxlbert.pack(zoo.build("bert").eval())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"is_decoder": True}, "is_decoder: got True, wanted False"),
        ({"is_decoder": True, "add_cross_attention": True}, "is_decoder: got True, wanted False"),
        ({"chunk_size_feed_forward": 3}, "chunk_size_feed_forward: got 3, wanted 0"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: got 'relative_key', wanted 'absolute'"),
    ],
)
def test_configurations(fields: dict, reason: str) -> None:
    assert reason in refused(zoo.build("bert", **fields))


def test_a_layer_of_another_layout_is_left_alone() -> None:
    """Alone: the others are replaced, padding stays, and the answer is the same."""
    changes = {
        "attention.output.LayerNorm": (torch.nn.Identity(), "got Identity, wanted LayerNorm"),
        "output.dropout": (torch.nn.AlphaDropout(0.5), "got AlphaDropout, wanted Dropout"),
        "intermediate.intermediate_act_fn": (torch.nn.Tanh(), "it computes something else"),
        "output.LayerNorm": (torch.nn.LayerNorm(16, elementwise_affine=False), "wanted a weight and a bias"),
    }
    for path, (module, reason) in changes.items():
        model = zoo.build("bert", num_attention_heads=2, hidden_size=16).eval()
        layer = model.encoder.layer[1]
        owner, _, name = path.rpartition(".")
        setattr(layer.get_submodule(owner), name, module)
        given = zoo.batch(model.eval())
        with torch.no_grad():
            wanted = model(**given)[0]
            found = reasons(model, backend="torch")
            got = model(**given)[0]
        assert list(found) == ["encoder.layer.1", ""]
        assert reason in found["encoder.layer.1"], found
        assert found[""] == "not all of its layers are replaced, so padding stays"
        assert isinstance(model.encoder.layer[0], Replaced) and not isinstance(layer, Replaced)
        compare.close(path, got, wanted, compare.tolerances.MODEL_FLOAT32)


def test_integer_weights_are_left_alone() -> None:
    model = zoo.build("bert", num_hidden_layers=1)
    dense = model.encoder.layer[0].output.dense
    dense.weight = torch.nn.Parameter(dense.weight.to(torch.int8), requires_grad=False)
    for options in ({}, {"backend": "torch"}, {"verify": False}):
        text = refused(model, **options)
        assert "output.dense.weight: got torch.int8, wanted floating-point weights" in text


def test_whole_or_not_at_all(monkeypatch) -> None:
    """What fails on the way leaves nothing replaced."""

    def fails(self) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drop_in._Base, "_around", fails)
    refused(zoo.build("bert"), KeyboardInterrupt)


def test_a_class_of_somebody_else_is_left_alone() -> None:
    class Mine(BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    assert "wanted transformers' BertModel" in refused(Mine(zoo.configuration("bert")))


def test_heads_that_read_padding_keep_it() -> None:
    _, report = pyxlbert.accelerate(zoo.build("bert", "ForQuestionAnswering"), report=True)
    (entry,) = [entry for entry in report.entries if entry.reason]
    assert entry.now == "pyxlbert Model" and "padding stays, for BertForQuestionAnswering reads it" in entry.reason


TABLES = drop_in.architectures()
WRONG = {
    "query and key": ("bert", lambda t: {"layer_parts": replace(t.layer_parts, query=t.layer_parts.value)}),
    "residuals": ("bert", lambda t: {"layer_parts": replace(t.layer_parts, norm=t.layer_parts.out_norm)}),
    "activation": ("bert", lambda t: {"layer_parts": replace(t.layer_parts, activation_name="other_act")}),
    "positions": ("roberta", lambda t: {"embedding_parts": replace(t.embedding_parts, positions="place")}),
    "arguments": ("bert", lambda t: {"embedding_parts": replace(t.embedding_parts, token_type="position_embeddings")}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_table_is_found_out(what: str, monkeypatch) -> None:
    """Each replacement proves itself: what a table has wrong changes no answer, and without the proof it would."""
    kind, change = WRONG[what]
    table = TABLES[kind]
    monkeypatch.setattr(drop_in, "architectures", lambda: {kind: replace(table, **change(table))})
    model = zoo.build(kind, other_act="relu").eval()
    given = zoo.batch(model)
    real = zoo.MASK.bool()
    with torch.no_grad():
        wanted = model(**given)[0][real]
        trusting = pyxlbert.accelerate(copy.deepcopy(model), verify=False)(**given)[0][real]
        try:
            found = reasons(model)
        except ValueError as error:
            found = {"": str(error)}
        got = model(**given)[0][real]
    assert "it computes something else" in "".join(found.values())
    compare.close("output", got, wanted, compare.tolerances.MODEL_FLOAT32)
    with pytest.raises(AssertionError):
        compare.close("output", trusting, wanted, compare.tolerances.CONTESTANT[torch.float32])


def test_the_log_says_what_was_left(caplog) -> None:
    model = zoo.build("bert")
    model.encoder.layer[1].output.LayerNorm = torch.nn.Identity()
    with caplog.at_level("INFO", logger="pyxlbert"):
        pyxlbert.accelerate(model)
    assert "encoder.layer.1: BertLayer -> left alone: output.LayerNorm: got Identity, wanted LayerNorm" in caplog.text


def test_verification_leaves_no_trace() -> None:
    """No hook is called, no random number drawn, no mode changed, no gradient made."""
    model = zoo.build("bert", hidden_dropout_prob=0.5)
    model.encoder.layer[0].eval()
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    pyxlbert.accelerate(model)
    assert not calls and modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_that_return_tuples(monkeypatch) -> None:
    """As in versions of transformers whose encoder takes the first of what a layer returns."""
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from transformers.models.bert import modeling_bert

    old = modeling_bert.BertLayer.forward

    def run(self, hidden_states, attention_mask=None, **_):
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, None, None, False)[0]
        return BaseModelOutputWithPast(last_hidden_state=hidden_states)

    monkeypatch.setattr(modeling_bert.BertLayer, "forward", lambda self, x, mask=None, *_: (old(self, x, mask),))
    monkeypatch.setattr(modeling_bert.BertEncoder, "forward", run)
    model = zoo.build("bert").eval()
    real = zoo.MASK.bool()
    for verify in (True, False):
        with torch.no_grad():
            wanted = model(**zoo.batch(model))[0]
            got = pyxlbert.accelerate(model, verify=verify)(**zoo.batch(model))[0]
        compare.close("output", got[real], wanted[real], compare.tolerances.MODEL_FLOAT32)
        pyxlbert.restore(model)
