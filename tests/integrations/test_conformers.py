"""`accelerate` on Conformers: values and gradients beside every mask, what is left alone, memory."""

from __future__ import annotations

import copy
import pickle

import conformers
import pytest
import torch
import transformers

import pyxlbert
from pyxlbert.integrations import conformer
from pyxlbert.integrations.drop_in import architectures
from pyxlbert.integrations.swap import Replaced
from pyxlbert.testing import compare, models, tolerances

FLOAT32 = tolerances.MODEL_FLOAT32
KINDS = sorted(conformers.MODELS)
CROSSED = [(name, mask) for name, case in conformers.CASES.items() for mask in case.masks]


def values(name, model, mask="right", **options):
    with torch.no_grad():
        return model.eval()(**conformers.arguments(name, model, mask) | options)[0]


def results(name, model, mask, *rest):
    """In eval mode, but for FastSpeech2, whose loss is for training; its BatchNorm stays as in the others.

    A bias in front of BatchNorm in training mode has no gradient but for rounding.
    """
    model.train("fastspeech2" in name)
    for one in model.modules():
        if isinstance(one, torch.nn.BatchNorm1d):
            one.eval()
    return conformers.results(name, model, mask, *rest)


def check(case, name, model, mask) -> None:
    """`accelerate` replaces all of it, and outputs, loss and gradients stay within the budget."""
    if "fastspeech2" in name:
        # In float64 it fails, for it has a buffer in float32.
        plain, cotangents = results(name, model, mask)
    else:
        truth, cotangents = results(name, copy.deepcopy(model).double(), mask)
        plain, _ = results(name, model, mask, cotangents)
    _, report = pyxlbert.accelerate(model, report=True)
    assert not report.left and not any(entry.reason for entry in report.entries), str(report)
    ours, _ = results(name, model, mask, cotangents)
    if "fastspeech2" not in name:
        models.within_budget(case, ours, plain, truth)
        return
    assert set(ours) == set(plain)
    for key, value in plain.items():
        gradient = key.startswith("d ")
        relative = tolerances.MODEL_GRADIENT_FLOAT32 if gradient else tolerances.MODEL_FLOAT32
        compare.close(f"{key} of {case}", ours[key], value, relative, least=1.0 if gradient else 0.0)


@pytest.mark.parametrize(("name", "mask"), CROSSED)
def test_outputs_loss_and_gradients(name: str, mask: str) -> None:
    check((name, mask), name, conformers.build(name), mask)


@pytest.mark.parametrize(("name", "mask"), [(n, m) for n, m in CROSSED if n in conformers.MODELS.values()])
def test_plain_attention(name: str, mask: str) -> None:
    """Parakeet's own has no number beside padding; FastSpeech2 has no other than this."""
    if "fastspeech2" in name or ("parakeet" in name and mask != "none"):
        return
    check((name, mask), name, conformers.build(name, attn_implementation="eager"), mask)


def test_plain_attention_of_parakeet_has_numbers_beside_padding() -> None:
    model = conformers.build("parakeet", attn_implementation="eager").eval()
    other = conformers.build("parakeet", attn_implementation="sdpa").eval()
    assert not values("parakeet", model)[1].isfinite().any()
    compare.close("output", values("parakeet", pyxlbert.accelerate(model)), values("parakeet", other), FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode(kind: str) -> None:
    """With BatchNorm over the batch, padding included, and its running statistics."""
    name = conformers.MODELS[kind]
    plain = conformers.build(name)
    ours = pyxlbert.accelerate(copy.deepcopy(plain))
    got, wanted = (model(**conformers.arguments(name, model))[0] for model in (ours, plain))
    compare.close("output", got, wanted, FLOAT32)
    for (path, a), (_, b) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        if a.is_floating_point():
            compare.close(path, a, b, FLOAT32)


DROPOUT = {
    "parakeet": [{"attention_dropout": 1.0}, {"dropout_positions": 1.0}, {"activation_dropout": 1.0}],
    "wav2vec2-conformer": [{"attention_dropout": 1.0}, {"activation_dropout": 1.0}, {"hidden_dropout": 1.0}],
    "wav2vec2-bert": [{"attention_dropout": 1.0}, {"conformer_conv_dropout": 1.0}],
    "seamless": [{"speech_encoder_dropout": 1.0}],
    "fastspeech2": [{"attention_dropout_rate": 1.0}, {"positional_dropout_rate": 1.0}, {"dropout_rate": 1.0}],
}


@pytest.mark.parametrize(("name", "fields"), [(name, one) for name, several in DROPOUT.items() for one in several])
def test_dropout_is_where_it_was(name: str, fields: dict) -> None:
    """Of probability one it is no chance."""
    plain = conformers.build(name, **fields)
    ours = pyxlbert.accelerate(copy.deepcopy(plain))
    given = conformers.arguments(name, plain)
    with torch.no_grad():
        compare.close("train", ours(**given)[0], plain(**given)[0], FLOAT32)
        compare.close("eval", ours.eval()(**given)[0], plain.eval()(**given)[0], FLOAT32)


def test_dropout_of_weights_is_the_ops() -> None:
    """Of one key alone half of the outputs are nothing, and the others twice as large."""
    torch.manual_seed(0)
    model = pyxlbert.accelerate(conformers.build("parakeet", attention_dropout=0.5))
    attention = model.layers[0].self_attn
    torch.nn.init.eye_(attention.o_proj.weight)
    torch.nn.init.zeros_(attention.o_proj.bias)
    x = torch.randn(400, 1, 24)
    mixed = attention(hidden_states=x, position_embeddings=torch.randn(1, 1, 24))[0].unflatten(-1, (3, -1))
    value = attention.v_proj(x).unflatten(-1, (3, -1))
    kept = mixed.abs().sum(-1) > 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    compare.close("kept", mixed[kept], 2 * value[kept], FLOAT32)


def test_distances_of_each_sequence() -> None:
    """Dropout on them is drawn for each sequence, and all the tables have gradients."""
    plain = conformers.build("parakeet", dropout_positions=0.5)
    ours, report = pyxlbert.accelerate(copy.deepcopy(plain), report=True)
    assert not report.left, str(report)
    found = []
    for model in (plain, ours):
        torch.manual_seed(7)
        output = model(**conformers.arguments("parakeet", model))[0]
        gradient = torch.autograd.grad(output.square().sum(), model.layers[0].self_attn.relative_k_proj.weight)[0]
        found.append((output.detach(), gradient))
    compare.close("output", found[1][0], found[0][0], FLOAT32)
    compare.close("gradient", found[1][1], found[0][1], tolerances.MODEL_GRADIENT_FLOAT32)


@pytest.mark.parametrize("name", [name for name in conformers.MODELS.values() if name != "fastspeech2"])
@pytest.mark.parametrize("mask", ["none", "right"])
def test_no_mask_is_as_long_as_the_square(name: str, mask: str, monkeypatch) -> None:
    """Lengths say it all, and where no place is padding nothing does; without the proof as with it."""
    model = pyxlbert.accelerate(conformers.build(name), verify=False)
    seen = []
    op = conformer.relative_attention
    monkeypatch.setattr(
        conformer, "relative_attention", lambda *rows, **named: (seen.append((rows[3], named)), op(*rows, **named))[1]
    )
    values(name, model, mask)
    lengths = None if mask == "none" else conformers.RIGHT.sum(1)
    assert len(seen) == 2
    for table, named in seen:
        assert table.dim() == 3  # one for all sequences
        assert "attention_mask" not in named and ("key_lengths" in named) == (lengths is not None)
        if lengths is not None:
            assert torch.equal(named["key_lengths"].long(), lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_a_watched_part_runs_as_it_was(kind: str) -> None:
    """A hook on any module inside is called."""
    name = conformers.MODELS[kind]
    model = conformers.build(name)
    wanted = values(name, model)
    called = []
    watch = lambda path: lambda *_: called.append(path)  # noqa: E731
    hooks = [module.register_forward_hook(watch(path)) for path, module in model.named_modules()]
    values(name, model)
    for hook in hooks:
        hook.remove()
    before = {path for path in called if ".0." in path and "decoder" not in path}
    called.clear()
    pyxlbert.accelerate(model)
    for path, module in model.named_modules():
        if path not in before:
            continue
        hook = module.register_forward_hook(watch(path))
        got = values(name, model)
        hook.remove()
        compare.close(path, got, wanted, FLOAT32)
    assert set(called) == before


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_attentions(kind: str) -> None:
    name = conformers.MODELS[kind]
    model = conformers.build(name, **({} if name == "fastspeech2" else {"attn_implementation": "eager"})).eval()
    given = conformers.arguments(name, model, "none") | {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        wanted = model(**given)
        got = pyxlbert.accelerate(model)(**given)
    assert list(got) == list(wanted)
    for key in got:
        several = zip(got[key], wanted[key], strict=True) if isinstance(got[key], tuple) else [(got[key], wanted[key])]
        for a, b in several:
            compare.close(key, a, b, FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_restore_copies_and_pickles(kind: str) -> None:
    name = conformers.MODELS[kind]
    model = conformers.build(name).eval()
    was = [type(module) for module in model.modules()]
    states = [set(vars(module)) for module in model.modules()]
    parameters, text = list(model.parameters()), model.config.to_json_string()
    before, bits = values(name, model), {key: one.clone() for key, one in model.state_dict().items()}
    pyxlbert.accelerate(model)
    wanted = values(name, model)
    copies = [copy.deepcopy(model)]
    if name != "wav2vec2-conformer":  # which has a parametrization, and torch then refuses
        copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        compare.same_bits("copy", values(name, other), wanted)
        assert not any(isinstance(module, Replaced) for module in pyxlbert.restore(other).modules())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(bits) and model.config.to_json_string() == text
    pyxlbert.restore(model)
    assert [type(module) for module in model.modules()] == was
    assert [set(vars(module)) for module in model.modules()] == states
    compare.same_bits("restored", values(name, model), before)
    for key, one in model.state_dict().items():
        compare.same_bits(key, one, bits[key])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_and_low_precision(kind: str) -> None:
    name = conformers.MODELS[kind]
    plain = conformers.build(name).eval()
    exact = values(name, plain, "none")
    packed = pyxlbert.pack(pyxlbert.accelerate(copy.deepcopy(plain)))
    compare.close("packed", values(name, packed, "none"), exact, tolerances.PACKED[torch.float32])
    if name == "fastspeech2":
        return  # in other dtypes than float32 it fails
    wanted = values(name, copy.deepcopy(plain).bfloat16(), "none")
    got = values(name, pyxlbert.accelerate(copy.deepcopy(plain), dtype=torch.bfloat16), "none")
    assert got.dtype is torch.bfloat16
    assert (got - exact).norm() <= tolerances.FACTOR * (wanted - exact).norm()


@pytest.mark.parametrize("name", [name for name in conformers.MODELS.values() if name != "fastspeech2"])
def test_gradient_checkpointing(name: str) -> None:
    """What is computed once more sees the same mask."""
    found = []
    for checkpointing in (False, True):
        model = pyxlbert.accelerate(conformers.build(name))
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**conformers.arguments(name, model))[0].square().sum().backward()
        found.append({path: p.grad for path, p in model.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1])
    for path, gradient in found[0].items():
        compare.close(path, found[1][path], gradient, tolerances.MODEL_GRADIENT_FLOAT32, least=1e-3)


COMPILED = {
    "parakeet": ("layers.0", {"num_hidden_layers": 1}),
    "wav2vec2-conformer": ("encoder", {"num_hidden_layers": 1}),
    "wav2vec2-bert": ("encoder", {"num_hidden_layers": 1}),
    "seamless": ("encoder", {"speech_encoder_layers": 1}),
    "fastspeech2": ("encoder", {"layers": 1}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile(name: str) -> None:
    """Of one layer, or the model around it: what is in front of them is not ours."""
    torch.compiler.reset()
    part, fields = COMPILED[name]
    model = conformers.build(name, **fields).eval()
    mask = conformers.RIGHT
    x = torch.randn(*mask.shape, 24)
    given = {"attention_mask": mask.bool()}
    if name == "fastspeech2":
        given = {"input_tensor": mask * 2, "attention_mask": mask[:, None]}
    if name == "parakeet":
        given |= {"attention_mask": conformer.Keys(mask.bool()).square(), "position_embeddings": torch.randn(3, 13, 24)}

    def rows() -> dict:
        return {} if name == "fastspeech2" else {"hidden_states": x.clone()}  # one writes into them

    with torch.no_grad():
        wanted = model.get_submodule(part)(**given | rows())[0]
        pyxlbert.accelerate(model)
        compiled = torch.compile(model.get_submodule(part), backend="eager", fullgraph=True, dynamic=True)
        compare.close("output", compiled(**given | rows())[0], wanted, FLOAT32)


@pytest.mark.parametrize("name", ["wav2vec2-conformer", "wav2vec2-bert", "seamless"])
@pytest.mark.parametrize("positions", ["rotary"])
def test_other_positions_are_left_alone(name: str, positions: str | None) -> None:
    model = conformers.build(name, position_embeddings_type=positions)
    with pytest.raises(ValueError, match=f"position_embeddings_type: got {positions!r}, wanted 'relative'"):
        pyxlbert.accelerate(model)


def test_what_is_another_part_is_left_alone() -> None:
    """And the rest is not: the mask is then the model's own."""
    model = conformers.build("wav2vec2-bert").eval()
    layers = model.encoder.layers
    layers[0].self_attn.pos_bias_u = torch.nn.Parameter(torch.zeros(24))
    layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    layers[0].ffn1.intermediate_act_fn = torch.nn.Tanh()
    layers[1].ffn2.intermediate_dropout = None
    layers[1].conv_module.pointwise_conv1 = layers[1].conv_module.pointwise_conv2 = torch.nn.Identity()
    layers[1].conv_module.forward = lambda x, **_: x
    layers[1].ffn2.forward = lambda x: x
    wanted = values("wav2vec2-bert", model)
    _, report = pyxlbert.accelerate(model, report=True)
    reasons = {entry.name: entry.reason for entry in report.entries if entry.reason}
    assert reasons["encoder.layers.0.self_attn"] == "pos_bias_u: got [24], wanted a parameter [H, D]"
    assert reasons["encoder.layers.0.ffn1"].startswith("it computes something else")
    assert reasons["encoder.layers.1.ffn2"] == "intermediate_dropout: got nothing, wanted a Dropout or a number"
    assert reasons["encoder.layers.1.conv_module"] == "got no convolution of one place, wanted one"
    assert reasons["encoder"] == "its masks stay as they are: not all of its layers' parts are replaced"
    assert len(reasons) == 5
    compare.close("output", values("wav2vec2-bert", model), wanted, FLOAT32)


def test_backend_is_scoped() -> None:
    seen = []
    model = pyxlbert.accelerate(conformers.build("seamless"), backend="torch")
    model.encoder.layers[0].ffn1.register_forward_hook(lambda *_: seen.append(pyxlbert.backends.default_backend()))
    values("seamless", model)
    assert seen == ["torch"] and pyxlbert.backends.default_backend() is None


def test_memory_is_linear_in_the_length() -> None:
    """A product with the table of distances would take 130 MB, a mask 4 MB."""
    model = pyxlbert.accelerate(conformers.build("parakeet").eval())
    x = torch.randn(1, 2000 * conformers.FRAMES, 16)
    mask = torch.arange(x.shape[1])[None] < 1500 * conformers.FRAMES
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        model(x, attention_mask=mask)
    attention = [event for event in profile.events() if "relative_attention" in event.name]
    assert len(attention) == 2
    assert max(event.cpu_memory_usage for event in profile.events()) < 40e6


def test_windows() -> None:
    """No table is of a model with windows of attention; SeamlessM4T's second version has them, and other distances."""
    from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder

    small = {"hidden_size": 24, "speech_encoder_layers": 1, "speech_encoder_attention_heads": 3}
    small |= {"speech_encoder_intermediate_size": 20, "feature_projection_input_dim": 10}
    config = transformers.SeamlessM4Tv2Config(**small, speech_encoder_chunk_size=4)
    with pytest.raises(ValueError, match=r"contains no model of transformers of the types .*seamless_m4t, "):
        pyxlbert.accelerate(SeamlessM4Tv2SpeechEncoder(config))


@pytest.mark.parametrize("kind", ["wav2vec2-conformer", "parakeet_encoder"])
def test_a_window_in_the_mask(kind: str) -> None:
    """Of one's own, handed to the layers in the place of theirs."""
    name = conformers.MODELS[kind]
    plain = conformers.build(name).eval()
    ours = pyxlbert.accelerate(copy.deepcopy(plain))
    found = []
    for model in (plain, ours):
        attention = next(one for one in model.modules() if type(one).__name__.endswith("Attention"))
        width = model.config.hidden_size
        generator = torch.Generator().manual_seed(2)
        x, distances = (torch.randn(2, length, width, generator=generator) for length in (9, 17))
        far = (torch.arange(9)[:, None] - torch.arange(9)).abs() >= 3
        added = torch.zeros(9, 9).masked_fill(far, torch.finfo(torch.float32).min)
        parts = architectures()[kind].attention_parts
        given = {parts.mask: added.expand(2, 1, 9, 9), parts.positions: distances[:1].expand(2, -1, -1)}
        with torch.no_grad():
            found.append(attention(hidden_states=x, **given)[0])
    compare.close("rows", found[1], found[0], tolerances.MODEL_FLOAT32)
