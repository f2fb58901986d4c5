"""Accelerated models whose weights are packed: all layers in one call, and by modules where that would be seen."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections import OrderedDict

import conformers
import numpy as np
import pytest
import torch
import transformers
import zoo
from torch.autograd import forward_ad

import pyxlbert
from pyxlbert.nn.encoder_layers import PackedLayers
from pyxlbert.nn.packing import Packable
from pyxlbert.testing import compare, models, tolerances

KINDS = sorted(zoo.ZOO)


@pytest.fixture
def together(monkeypatch) -> list[bool]:
    """Of every attempt to run the layers in one call, whether it was one."""
    attempts: list[bool] = []
    run = PackedLayers.run

    def counted(self, *args, **kwargs):
        done = run(self, *args, **kwargs)
        attempts.append(done is not None)
        return done

    ready = PackedLayers.ready

    def looked(self, x):
        found = ready(self, x)
        if not found:
            attempts.append(False)
        return found

    monkeypatch.setattr(PackedLayers, "run", counted)
    monkeypatch.setattr(PackedLayers, "ready", looked)
    return attempts


def packed(kind: str, head: str = "Model", dtype: str | None = None, **options):
    model = zoo.build(kind, head, **options).eval()
    return pyxlbert.pack(pyxlbert.accelerate(model), dtype)


def values(model, mask=zoo.MASK, **options):
    """The first output, at tokens."""
    with torch.no_grad():
        return model(**zoo.batch(model, mask=mask) | options)[0][mask.bool()]


@pytest.mark.parametrize("mask", [zoo.MASK, zoo.LEFT, torch.ones_like(zoo.MASK)], ids=["right", "left", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_is_what_the_modules_are(kind: str, mask, together) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = zoo.build(kind, intermediate_size=20).eval().to(dtype)  # of an odd number there are no pairs
        truth, plain = values(copy.deepcopy(model).double(), mask), values(model, mask)
        model = pyxlbert.pack(pyxlbert.accelerate(model))
        compare.within_budget(kind, values(model, mask), plain, truth)
        kept = pyxlbert.pack(pyxlbert.accelerate(pyxlbert.restore(model), pack=False))
        compare.within_budget(kind, values(kept, mask), plain, truth)
    assert together == [True] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mask_and_as_a_tuple(kind: str, together) -> None:
    model = zoo.build(kind).eval()
    given = zoo.batch(model) | {"attention_mask": None}
    with torch.no_grad():
        plain = model(**given)
        pyxlbert.pack(pyxlbert.accelerate(model))
        ours, row = (model(**given, return_dict=one) for one in (True, False))
    assert together == [True] * 2
    assert type(row) is tuple and type(ours) is type(plain) and list(ours) == list(plain) and len(row) == len(ours)
    for one in (ours[0], row[0]):
        compare.close("output", one, plain[0], tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_the_same_bits_in_any_company(kind: str, together) -> None:
    model = packed(kind)
    whole = values(model)
    for number, row in enumerate(zoo.MASK):
        given = {name: one[number : number + 1] for name, one in zoo.batch(model).items()}
        with torch.no_grad():
            alone = model(**given)[0][0, row.bool()]
        starts = zoo.MASK.sum(1).cumsum(0) - zoo.MASK.sum(1)
        if kind == "mpnet" and number == 2:
            continue  # its holes keep the padding of this batch, but it has the bits of none without
        assert torch.equal(alone, whole[starts[number] : starts[number] + int(row.sum())]), number
    assert all(together)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits(kind: str, together) -> None:
    model = zoo.build(kind, hidden_act="gelu").eval()
    plain = values(model)
    ours = values(pyxlbert.pack(pyxlbert.accelerate(model), "int8"))
    assert together == [True]
    assert not torch.equal(ours, plain)
    assert torch.nn.functional.cosine_similarity(ours, plain, dim=-1).min() > 0.97


def test_watched_parts_are_called(together) -> None:
    model = packed("bert")
    wanted = values(model)
    seen: list[str] = []
    for name in (
        "encoder.layer.1",
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.attention.output.LayerNorm",
    ):
        handle = model.get_submodule(name).register_forward_hook(lambda *_: seen.append("called"))
        compare.close(name, values(model), wanted, tolerances.SUMMATION_ORDER)
        assert seen.pop() == "called" and not seen and not together[-1]
        handle.remove()
        values(model)
        assert together[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_states_are_all_there_and_leave_nothing_behind(kind: str, together) -> None:
    """transformers leaves its recording hooks in place; they record nothing in the next call."""
    model = zoo.build(kind).eval()
    plain = {}
    for name in ("hidden_states", "attentions"):
        with torch.no_grad():
            plain[name] = model(**zoo.batch(model), **{f"output_{name}": True})[name]
    model = pyxlbert.pack(pyxlbert.accelerate(model))
    wanted = values(model)
    for name, all_of_them in plain.items():
        with torch.no_grad():
            ours = model(**zoo.batch(model), **{f"output_{name}": True})[name]
        assert ours is not None and len(ours) == len(all_of_them)
    assert together == [True]
    assert torch.equal(values(model), wanted)
    assert together == [True] * 2


def test_a_class_patched_later_is_seen(monkeypatch, together) -> None:
    model = packed("bert")
    values(model)
    attention = type(model.encoder.layer[0].attention.output)
    forward, seen = attention.forward, []
    monkeypatch.setattr(attention, "forward", lambda self, *args: seen.append(1) or forward(self, *args))
    values(model)
    assert not together[-1] and len(seen) == len(model.encoder.layer)


def test_an_exchanged_or_added_part_is_seen(together) -> None:
    model = packed("bert")
    values(model)
    layers = model.encoder.layer
    layers.append(copy.deepcopy(layers[0]))
    more = values(model)
    del layers[-1]
    fewer = values(model)
    assert together[-1] and not torch.equal(more, fewer)
    layers[0].output.dense = torch.nn.Linear(*reversed(layers[0].output.dense.weight.shape))
    assert not torch.equal(values(model), fewer)
    assert not together[-1]


def test_autocast_gradients_and_training_run_the_modules(together) -> None:
    model = packed("bert")
    with torch.autocast("cpu", torch.bfloat16):
        values(model)
    model(**zoo.batch(model))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert not any(together)
    assert all(one.packed is None for one in model.train().modules() if isinstance(one, Packable))


def test_another_backend_runs_the_modules(together) -> None:
    model = pyxlbert.pack(pyxlbert.accelerate(zoo.build("bert").eval(), backend="torch"))
    values(model)
    assert not any(together)


def attributes(model) -> list[list[str]]:
    return [sorted(vars(one)) for one in model.modules()]


@pytest.mark.parametrize("kind", KINDS)
def test_restored_it_is_what_it_was(kind: str) -> None:
    model = zoo.build(kind).eval()
    kinds, keys, wanted = [type(one) for one in model.modules()], attributes(model), values(model)
    pyxlbert.pack(pyxlbert.accelerate(model))
    values(model)
    pyxlbert.restore(model)
    assert [type(one) for one in model.modules()] == kinds
    assert attributes(model) == keys
    assert torch.equal(values(model), wanted)


@pytest.mark.parametrize(("kind", "dtype"), [*itertools.product(KINDS, [None, "int8"]), ("parakeet", None)])
def test_writes_past_autograd_are_followed(kind: str, dtype: str | None) -> None:
    """As adapters are merged, as optimizers write through `.data`, and as other libraries write."""
    if kind == "parakeet":
        model = conformers.build("parakeet").eval()
        given = conformers.arguments("parakeet", model)
    else:
        model, given = zoo.build(kind, hidden_act="gelu").eval(), None

    def output() -> torch.Tensor:
        with torch.no_grad():
            return values(model) if given is None else model(**given)[0]

    pyxlbert.pack(pyxlbert.accelerate(model), dtype)
    before = output()
    words = getattr(model.config, "vocab_size", 0)
    matrices = [one for one in model.parameters() if one.dim() == 2 and len(one) != words]
    writes = (
        lambda one: one.data.copy_(one.data * 1.5),
        lambda one: one.data.add_(0.05),
        lambda one: np.negative(one.detach().numpy(), out=one.detach().numpy()),
    )
    for write in writes:
        for one in matrices:
            write(one)
        after = output()
        assert not torch.equal(after, before)
        # The same bits as those of copies made now.
        before = after
        assert torch.equal(pyxlbert.pack(model, dtype) and output(), after)


def test_copies_pack_anew(together) -> None:
    model = packed("roberta")
    wanted = values(model)
    copied = copy.deepcopy(model)
    assert all(one.packed is None for one in copied.modules() if isinstance(one, Packable))
    assert not together[1:]
    compare.close("copy", values(copied), wanted, tolerances.SUMMATION_ORDER)
    assert torch.equal(values(pyxlbert.pack(copied)), wanted) and together[-1]


def test_a_first_place_of_padding_is_computed_together_too(together) -> None:
    model = zoo.build("bert", "ForSequenceClassification").eval()
    given = zoo.batch(model, "ForSequenceClassification", zoo.LEFT)
    with torch.no_grad():
        plain = model(**given).logits
        ours = pyxlbert.pack(pyxlbert.accelerate(model))(**given).logits
    # The last sequence begins with padding and is classified by what is computed there, tokens or none.
    compare.close("logits", ours, plain, tolerances.SUMMATION_ORDER * 2)
    assert together == [True]


def test_question_answering_reads_padding(together) -> None:
    model = zoo.build("bert", "ForQuestionAnswering").eval()
    given = zoo.batch(model, "ForQuestionAnswering")
    with torch.no_grad():
        plain = model(**given)
        ours = pyxlbert.pack(pyxlbert.accelerate(model))(**given)
    assert together == [True]
    for name in plain:
        compare.close(name, ours[name], plain[name], tolerances.SUMMATION_ORDER * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_another_shape_are_never_read_as_a_batch(kind: str) -> None:
    """Beside a batch `[B, T, E]` there is only what the modules themselves take."""
    model = packed(kind)
    values(model)
    encoder = model.get_submodule("transformer" if kind == "distilbert" else "encoder")
    width = 16 if kind in ("albert",) else model.config.hidden_size
    for shape in ((40, width), (1, 3, 7, width), (width,)):
        try:
            with torch.no_grad():
                rows = encoder(torch.ones(shape))[0]
        except Exception:
            continue  # as before
        assert rows.isfinite().all()
        pyxlbert.restore(model)
        with torch.no_grad():
            compare.close("rows", rows, encoder(torch.ones(shape))[0], tolerances.SUMMATION_ORDER)
        pyxlbert.pack(pyxlbert.accelerate(model))


@pytest.mark.parametrize("kind", ["bert", "albert", "mpnet", "xlnet"])
def test_memory_goes_with_the_last_reference(kind: str) -> None:
    if kind == "xlnet":
        model = transformers.XLNetModel(transformers.XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2)).eval()
        pyxlbert.pack(pyxlbert.accelerate(model))
        with torch.no_grad():
            model(torch.tensor([[7, 8]]))
    else:
        model = packed(kind)
        values(model)
    gc.collect()
    gc.disable()
    try:
        gone = [weakref.ref(one) for one in (model, *model.parameters())]
        del model
        assert not any(one() is not None for one in gone)
    finally:
        gc.enable()


def test_a_tangent_is_refused_as_before() -> None:
    model = packed("bert")
    embeds = torch.randn(1, 4, model.config.hidden_size)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        model(inputs_embeds=forward_ad.make_dual(embeds, torch.ones_like(embeds)))


@pytest.mark.parametrize("kind", KINDS)
def test_tuples_where_the_original_returns_them(kind: str) -> None:
    for configured in (True, False):
        model = zoo.build(kind).eval()
        model.config.return_dict = configured
        encoder = model.get_submodule("transformer" if kind == "distilbert" else "encoder")
        rows = torch.randn(2, 3, 16 if kind == "albert" else model.config.hidden_size)

        def kinds(model=model, encoder=encoder, rows=rows) -> list[type]:
            with torch.no_grad():
                found = [encoder(rows), encoder(rows, return_dict=True), encoder(rows, return_dict=False)]
                found += [model(**zoo.batch(model), return_dict=one) for one in (True, False)]
                found += [model(**zoo.batch(model))]
            return [type(one) for one in found]

        wanted = kinds()
        pyxlbert.pack(pyxlbert.accelerate(model))
        assert kinds() == wanted


def test_alberts_groups_and_configuration_are_looked_at(together) -> None:
    model = packed("albert", num_hidden_groups=2, num_hidden_layers=4)
    whole = values(model)
    encoder = model.encoder
    encoder.config = copy.copy(encoder.config)
    encoder.config.num_hidden_layers = 2
    assert together[-1] and not torch.equal(values(model), whole)
    encoder.config.num_hidden_layers = 4
    assert torch.equal(values(model), whole)

    class Mine(type(encoder.albert_layer_groups[1])):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states

    encoder.albert_layer_groups[1].__class__ = Mine
    assert not torch.equal(values(model), whole) and not together[-1]


@pytest.mark.parametrize(
    ("kind", "name"), [("albert", "embedding_hidden_mapping_in"), ("mpnet", "relative_attention_bias")]
)
def test_a_module_beside_the_layers_is_called_once(kind: str, name: str, together) -> None:
    model = packed(kind)
    seen: list[torch.Size] = []
    module = getattr(model.encoder, name)
    module.register_forward_hook(lambda _, given, output: seen.append(given[0].shape))
    values(model)
    assert len(seen) == 1 and not together[-1]
    assert kind != "albert" or seen[0][:2] == zoo.MASK.shape


def test_a_patched_encoder_or_layer_is_called(monkeypatch, together) -> None:
    model = packed("bert")
    values(model)
    for name, count in (("encoder", 1), ("encoder.layer.0", len(model.encoder.layer))):
        original = type(model.get_submodule(name)).pyxlbert_original
        forward, seen = original.forward, []
        with monkeypatch.context() as patch:
            patch.setattr(original, "forward", lambda self, *a, f=forward, s=seen, **k: s.append(1) or f(self, *a, **k))
            values(model)
        assert len(seen) == count, name
    values(model)
    assert together[-1]


def test_hooks_in_a_new_dictionary_are_called(together) -> None:
    model = packed("bert")
    values(model)
    seen = []
    for module in model.modules():
        module._forward_hooks = OrderedDict()
        module.register_forward_hook(lambda module, *_: seen.append(module))
    values(model)
    assert model.encoder.layer[0] in seen and model.encoder.layer[0].attention.self.query in seen


def test_hooks_on_every_module_are_called(together) -> None:
    plain = zoo.build("bert").eval()
    ours = packed("bert")

    def called(model) -> list[type]:
        seen = []
        everywhere = torch.nn.modules.module.register_module_forward_hook
        handle = everywhere(lambda module, *_: seen.append(type(module).__name__))
        try:
            values(model)
        finally:
            handle.remove()
        return sorted(seen)

    assert called(ours) == called(plain)


def test_a_layer_given_back_alone(together) -> None:
    """It reads the mask of its own kind, so padding stays."""
    for kind in ("bert", "albert", "mpnet", "distilbert"):
        model = zoo.build(kind).eval()
        plain = values(model)
        pyxlbert.pack(pyxlbert.accelerate(model))
        layer = next(one for one in model.modules() if getattr(one, "is_encoder_layer", False))
        pyxlbert.restore(layer)
        compare.close(kind, values(model), plain, tolerances.SUMMATION_ORDER)


def test_electra_reads_padding_where_it_sums_up(together) -> None:
    for summary in ("first", "last", "mean"):
        model = zoo.build("electra", "ForMultipleChoice", summary_type=summary).eval()
        given = zoo.batch(model, "ForMultipleChoice")
        with torch.no_grad():
            plain = model(**given).logits
            ours = pyxlbert.pack(pyxlbert.accelerate(model))(**given).logits
        compare.close(summary, ours, plain, tolerances.SUMMATION_ORDER * 2)


def test_another_attention_is_called(monkeypatch) -> None:
    model = packed("bert", attn_implementation="sdpa")
    wanted = values(model)
    interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    seen = []
    monkeypatch.setitem(interface._global_mapping, "mine", lambda *a, **k: seen.append(1) or interface["sdpa"](*a, **k))
    model.config._attn_implementation = "mine"
    compare.close("rows", values(model, torch.ones_like(zoo.MASK)), values(model, torch.ones_like(zoo.MASK)), 1e-6)
    assert seen and wanted.isfinite().all()


@pytest.mark.parametrize("reads", ["Model", "ForSequenceClassification"])
def test_xlnet(reads: str, together) -> None:
    fields = {"vocab_size": 50, "d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 20, "use_mems_eval": False}
    torch.manual_seed(0)
    model = getattr(transformers, f"XLNet{reads}")(transformers.XLNetConfig(**fields)).eval()
    models.randomize(model, torch.Generator().manual_seed(0))
    mask = zoo.MASK.flip(1)
    given = {"input_ids": torch.where(mask.bool(), 7, 5), "attention_mask": mask}

    def rows():
        with torch.no_grad():
            found = model(**given)[0]
        return found[mask.bool()] if found.shape[:2] == mask.shape else found

    plain, kinds = rows(), [type(one) for one in model.modules()]
    pyxlbert.pack(pyxlbert.accelerate(model))
    ours = rows()
    assert together == [True]
    compare.close("rows", ours, plain, tolerances.MODEL_FLOAT32)
    with torch.no_grad():
        model.base_model.layer[0].ff.layer_1.weight.mul_(1.5)
    moved = rows()
    assert together == [True] * 2 and not torch.equal(moved, ours)
    pyxlbert.pack(model, "int8")
    assert not torch.equal(rows(), moved) and together == [True] * 3
    pyxlbert.restore(model)
    compare.close("restored", moved, rows(), tolerances.MODEL_FLOAT32)
    assert together == [True] * 3 and [type(one) for one in model.modules()] == kinds
