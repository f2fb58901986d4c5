"""An accelerated model in the hands of everything else that touches a model."""

from __future__ import annotations

import copy
import json
import socket
import threading

import pytest
import torch
import transformers
import two_processes
import zoo

import pyxlbert
from pyxlbert.integrations import probe
from pyxlbert.integrations.modules import Layer, tokens_of
from pyxlbert.testing import compare, tolerances

KINDS = sorted(zoo.ZOO)
# One of each structure; the others are these under another name.
STRUCTURES = ["albert", "bert", "distilbert", "mpnet", "roberta"]
REAL = zoo.MASK.bool()
FLOAT32 = tolerances.MODEL_FLOAT32


def pair(kind: str, **fields):
    """A model and an accelerated copy, in eval mode."""
    plain = zoo.build(kind, **fields).eval()
    return plain, pyxlbert.accelerate(copy.deepcopy(plain))


def call(model, **options):
    with torch.no_grad():
        return model(**zoo.batch(model) | options)


def last(model, **options):
    return call(model, **options)[0]


def is_packed(model, monkeypatch) -> bool:
    rows = []
    linear = pyxlbert.nn.linear.linear
    with monkeypatch.context() as patch:
        patch.setattr(pyxlbert.nn.linear, "linear", lambda x, *rest: (rows.append(x.dim()), linear(x, *rest))[1])
        last(model)
    return rows != [] and set(rows) == {2}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_module_can_be_watched(kind: str) -> None:
    """Each sees what it saw before, and nothing is computed otherwise for it."""
    plain, ours = pair(kind)
    wanted = call(plain)[0]
    for name, module in ours.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            continue
        seen = [[], []]
        hooks = [
            one.get_submodule(name).register_forward_hook(
                lambda _, inputs, output, to=to: to.append(output[0] if isinstance(output, tuple | dict) else output)
            )
            for one, to in zip((plain, ours), seen, strict=True)
        ]
        got = last(ours)
        last(plain)
        for hook in hooks:
            hook.remove()
        assert [value.shape for value in seen[1]] == [value.shape for value in seen[0]], name
        for before, after in zip(*seen, strict=True):
            if isinstance(before, torch.Tensor) and before.is_floating_point():
                real = REAL if before.shape[:2] == REAL.shape else slice(None)
                compare.close(name, after[real], before[real], FLOAT32)
        compare.close(name, got[REAL], wanted[REAL], FLOAT32)


def test_a_patched_forward_is_called() -> None:
    _, ours = pair("bert")
    norm, calls = ours.encoder.layer[0].output.LayerNorm, []
    old = norm.forward
    norm.forward = lambda x: (calls.append(x.shape), old(x))[1]
    last(ours)
    assert calls == [(3, 7, ours.config.hidden_size)]


def test_a_module_put_in_place_of_another_is_called() -> None:
    plain, ours = pair("bert")
    for model in (plain, ours):
        layer = model.encoder.layer[0]
        layer.output.LayerNorm = torch.nn.Identity()
        layer.attention.self.query = torch.nn.Sequential(layer.attention.self.query, torch.nn.Tanh())
    compare.close("output", last(ours)[REAL], last(plain)[REAL], FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_hidden_states_and_attentions(kind: str, asked: str, monkeypatch) -> None:
    plain, ours = pair(kind, **({} if kind == "mpnet" else {"attn_implementation": "eager"}))
    wanted, got = (call(model, **{asked: True}) for model in (plain, ours))
    name = asked.removeprefix("output_")
    assert len(got[name]) == len(wanted[name]) > 0
    for a, b in zip(got[name], wanted[name], strict=True):
        compare.close(name, a, b, FLOAT32)
    # What transformers leaves in place for the next time is nobody's.
    assert is_packed(ours, monkeypatch)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    """What dropout drew is drawn again."""
    head = "ForTokenClassification"
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    model = pyxlbert.accelerate(zoo.build(kind, head, **dropout))
    # Checkpointing sets a hook on the word embeddings, for which they are computed as they were.
    model.enable_input_require_grads()
    cotangents = zoo.results(model, head)[1]
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        found.append(zoo.results(model, head, cotangents=cotangents)[0])
    for name, value in found[0].items():
        compare.close(name, found[1][name], value, tolerances.MODEL_GRADIENT_FLOAT32, least=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    plain, ours = pair(kind)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = last(ours)[REAL], last(plain)[REAL]
    assert got.dtype is wanted.dtype
    exact = last(plain)[REAL]
    error, others = (got - exact).norm(), (wanted - exact).norm()
    assert error <= tolerances.FACTOR * others, (float(error), float(others))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind: str, dtype: torch.dtype) -> None:
    model = zoo.build(kind).eval()
    exact = last(model)[REAL]
    parameters = list(model.parameters())
    wanted = last(copy.deepcopy(model).to(dtype))[REAL]
    _, report = pyxlbert.accelerate(model, dtype=dtype, report=True)
    assert not report.left, str(report)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    got = last(model)[REAL]
    assert got.dtype is dtype
    assert (got - exact).norm() <= tolerances.FACTOR * (wanted - exact).norm()


@pytest.mark.parametrize("fields", [{"hidden_dropout_prob": 1.0}, {"attention_probs_dropout_prob": 1.0}])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_where_it_was(kind: str, fields: dict) -> None:
    """Of probability one it is no chance: in train() everything that it drops is gone, in eval() nothing."""
    plain, ours = pair(kind, **fields)
    for mode in (True, False):
        plain.train(mode), ours.train(mode)
        compare.close("output", last(ours)[REAL], last(plain)[REAL], FLOAT32)
    plain.train()
    assert not torch.equal(last(plain), last(plain.eval()))


def test_dropout_draws_anew() -> None:
    ours = pair("bert", hidden_dropout_prob=0.5)[1].train()
    assert not torch.equal(last(ours), last(ours))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_updated_after_acceleration_are_seen(kind: str) -> None:
    model = pyxlbert.accelerate(zoo.build(kind, "ForTokenClassification"))
    pyxlbert.pack(model.eval())
    call(model)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**zoo.batch(model, "ForTokenClassification")).loss.backward()
    optimizer.step()
    got = last(model.eval())[REAL]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    again = last(model)[REAL]
    plain = pyxlbert.restore(model)
    compare.close("scaled", again, last(plain)[REAL], FLOAT32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(1.1)
    compare.close("trained", got, last(plain)[REAL], tolerances.SUMMATION_ORDER * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_without_our_name(kind: str, tmp_path) -> None:
    model = pyxlbert.accelerate(zoo.build(kind, "ForSequenceClassification").eval())
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "pyxlbert" not in text
    assert json.loads(text)["architectures"] == [type(model).__name__]
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert not any(isinstance(module, Layer) for module in plain.modules())
    compare.close("logits", last(model), last(plain), FLOAT32)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_resized_embeddings(kind: str) -> None:
    plain, ours = pair(kind)
    for model in (plain, ours):
        torch.manual_seed(1)
        model.resize_token_embeddings(60, mean_resizing=False)
    compare.close("output", last(ours)[REAL], last(plain)[REAL], FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_ready_made_vectors_and_places(kind: str) -> None:
    plain, ours = pair(kind)
    ids = zoo.batch(plain)["input_ids"]
    places = torch.arange(2, 9).flip(0)[None].expand(3, -1)
    vectors = plain.get_input_embeddings()(ids).detach()
    for given in ({"input_ids": None, "inputs_embeds": vectors}, {"position_ids": places}):
        if kind in ("electra", "albert") and "inputs_embeds" in given:
            assert vectors.shape[-1] == 16
        compare.close("output", last(ours, **given)[REAL], last(plain, **given)[REAL], FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_four_dimensions_and_none(kind: str) -> None:
    plain, ours = pair(kind, **({} if kind == "mpnet" else {"attn_implementation": "sdpa"}))
    generator = torch.Generator().manual_seed(0)
    added = torch.randn(3, 1, 7, 7, generator=generator)
    for mask in (None, torch.ones(3, 7, dtype=torch.long), added):
        compare.close("output", last(ours, attention_mask=mask), last(plain, attention_mask=mask), FLOAT32)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_padding_is_found_in_the_models_own_mask(kind: str, attention: str, monkeypatch) -> None:
    """As where a version of transformers takes no mask of keys: [B, 1, T, T], boolean or added to the scores."""
    monkeypatch.setattr(probe, "takes_keys", lambda *_: False)
    plain, ours = pair(kind, **({} if kind == "mpnet" else {"attn_implementation": attention}))
    compare.close("output", last(ours)[REAL], last(plain)[REAL], FLOAT32)
    assert is_packed(ours, monkeypatch)


def test_only_padding_is_found_in_a_mask() -> None:
    x, lowest = torch.zeros(3, 7, 4), torch.finfo(torch.float32).min
    keys = REAL[:, None, None, :]
    added = torch.zeros(3, 1, 1, 7).masked_fill(~keys, lowest)
    for mask in (keys, added, added.expand(3, 1, 7, 7), keys.expand(3, 1, 7, 7), added.masked_fill(~keys, -torch.inf)):
        assert torch.equal(tokens_of(mask, x), REAL)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    slopes = torch.where(keys, -torch.arange(7.0), lowest)
    for mask in (None, keys & causal, added + torch.where(causal, 0, lowest / 4), slopes, added * 1e-36, keys.long()):
        assert tokens_of(mask, x) is None
    assert tokens_of(added.expand(3, 2, 7, 7), x) is None


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: str) -> None:
    torch.compiler.reset()
    plain, ours = pair(kind, num_hidden_layers=1, **({} if kind == "mpnet" else {"attn_implementation": "sdpa"}))
    # Tracing is ours, what a compiler makes of ops is tested for ops.
    compiled = torch.compile(ours, backend="eager", fullgraph=True, dynamic=True)
    for width in (7, 5):
        given = {name: value[:, :width] for name, value in zoo.batch(plain).items()}
        with torch.no_grad():
            got, wanted = compiled(**given)[0], plain(**given)[0]
        real = REAL[:, :width]
        compare.close("output", got[real], wanted[real], FLOAT32)


def test_export() -> None:
    plain, ours = pair("roberta", num_hidden_layers=1, attn_implementation="sdpa")
    given = zoo.batch(plain)
    length = torch.export.Dim("length", min=2, max=14)
    exported = torch.export.export(ours, (), given, dynamic_shapes={name: {1: length} for name in given}).module()
    given = {name: value[:, :5] for name, value in given.items()}
    with torch.no_grad():
        got, wanted = (model(**given)[0][REAL[:, :5]] for model in (exported, plain))
    compare.close("output", got, wanted, FLOAT32)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_remembers_no_padding() -> None:
    """Traced without padding, called with it."""
    plain, ours = pair("bert", attn_implementation="sdpa")
    ids = zoo.batch(plain)["input_ids"]
    with torch.no_grad():
        traced = torch.jit.trace(ours, (ids, torch.ones_like(zoo.MASK)), strict=False, check_trace=False)
        got, wanted = traced(ids, zoo.MASK)["last_hidden_state"], plain(ids, zoo.MASK)[0]
    compare.close("output", got[REAL], wanted[REAL], FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind: str) -> None:
    plain = zoo.build(kind).double().eval()
    ours, report = pyxlbert.accelerate(copy.deepcopy(plain), report=True)
    assert not report.left, str(report)
    compare.close("output", last(ours)[REAL], last(plain)[REAL], tolerances.FLOAT64)


def test_two_processes(tmp_path) -> None:
    """DDP and FSDP2, a Conformer and one with adapters too, and an Accelerator, against one plain process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_processes.run, (port, str(tmp_path / "found")), nprocs=2)
    found = torch.load(tmp_path / "found")
    for make, names in (
        (two_processes.bert, ("bert, DDP", "bert, FSDP2")),
        (two_processes.parakeet, ("parakeet, FSDP2",)),
        (two_processes.adapted, ("adapted, FSDP2",)),
    ):
        plain, given = make()
        for part in two_processes.PARTS:
            (plain(**{name: value[part] for name, value in given.items()}).loss / 2).backward()
        wanted = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
        for name in names:
            compare.close(name, found.pop(name), wanted, tolerances.MODEL_GRADIENT_FLOAT32)
    compare.close("Accelerator", found.pop("Accelerator"), _stepped(together=True), tolerances.MODEL_GRADIENT_FLOAT32)
    assert not found


def test_an_accelerator_of_one_process() -> None:
    pytest.importorskip("accelerate")
    compare.close("weights", two_processes.prepared(), _stepped(together=False), tolerances.MODEL_GRADIENT_FLOAT32)


def _stepped(together: bool) -> torch.Tensor:
    """The weights of a plain model after a step for each row, or after one for both."""
    plain, _ = two_processes.bert()
    optimizer = torch.optim.SGD(plain.parameters(), lr=two_processes.RATE)
    batches = [{name: value[None] for name, value in row.items()} for row in two_processes.rows()]
    if together:
        for batch in batches:
            (plain(**batch).loss / 2).backward()
        optimizer.step()
    else:
        two_processes.step(plain, optimizer, batches, torch.Tensor.backward)
    return torch.cat([one.detach().flatten() for one in plain.parameters()])


@pytest.mark.parametrize("kind", STRUCTURES)
def test_dropouts_alone_in_training_mode(kind: str) -> None:
    """Of a model in eval mode: what it drops is what its own code would, by modules of p = 1, which leave no chance."""
    plain, ours = pair(kind)
    for model in (plain, ours):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.train().p = 1.0
    compare.close("output", last(ours)[REAL], last(plain)[REAL], FLOAT32)
    for model in (plain, ours):
        model.eval()
        for name, module in model.named_modules():
            # The module of attention itself, and not its dropout.
            module.training = name.endswith(("attention.self", "attention.attn", "layer.0.attention", "s.0.attention"))
    compare.close("output", last(ours)[REAL], last(plain)[REAL], FLOAT32)


def test_threads() -> None:
    _, ours = pair("mpnet")
    wanted, got = last(ours), [None] * 8

    def run(place: int) -> None:
        got[place] = last(ours)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value in got:
        compare.same_bits("output", value, wanted)


def test_any_module_that_contains_models() -> None:
    """Two of different architectures, one of them frozen; each is found by its path."""

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleDict({"a": zoo.build("bert"), "b": zoo.build("mpnet").requires_grad_(False)})

        def forward(self, given):
            return [part(**given).last_hidden_state for part in self.parts.values()]

    both = Both().eval()
    given = zoo.batch(both.parts["b"])
    wanted = both(given)
    _, report = pyxlbert.accelerate(both, report=True)
    assert {entry.name for entry in report.replaced} >= {"parts.a", "parts.b", "parts.b.encoder.layer.0"}
    for got, old in zip(both(given), wanted, strict=True):
        compare.close("output", got[REAL], old[REAL], FLOAT32)


def test_the_named_backend_runs() -> None:
    plain = zoo.build("bert").eval()
    wanted = last(plain)
    ours = pyxlbert.accelerate(plain, backend="torch")
    resolved = []
    old = pyxlbert.backends.OPS["attention"].resolve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pyxlbert.backends.OPS["attention"],
            "resolve",
            lambda *given: (resolved.append(old(*given)), resolved[-1])[1],
        )
        got = last(ours)
    assert set(resolved) == {"torch"}
    compare.close("output", got[REAL], wanted[REAL], FLOAT32)


def test_signatures_stay() -> None:
    import inspect

    plain, ours = pair("bert")
    assert inspect.signature(ours.forward) == inspect.signature(plain.forward)
    assert isinstance(ours, type(plain)) and str(type(ours)) == str(type(plain))
