"""XLNet's attention weights, checkpointing, dropout on distances, torch.compile."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from small_xlnet import (
    FLOAT32,
    GRADIENT,
    IDS,
    KEY_RANK,
    MAPPING,
    MASK,
    PERM_MASK,
    POSITIONS,
    QUERY_RANK,
    REAL,
    SMALL,
    Calls,
    build,
    gradients,
)

from pyxlbert.models import xlnet
from pyxlbert.testing import compare


def test_weights_agree_with_what_is_computed_without_them() -> None:
    model = build()
    given = {"attention_mask": MASK, "perm_mask": PERM_MASK, "target_mapping": MAPPING, "token_type_ids": IDS % 2}
    with_weights = model(IDS, **given, output_attentions=True)
    compare.close("states", with_weights[0], model(IDS, **given)[0], FLOAT32)
    assert [[tuple(w.shape) for w in layer] for layer in with_weights.attentions] == [[(4, 3, 7, 7)] * 2] * 2
    given |= {"target_positions": POSITIONS}
    del given["target_mapping"]
    by_position = model(IDS, **given, output_attentions=True)
    assert [[tuple(w.shape) for w in layer] for layer in by_position.attentions] == [[(4, 3, 7, 7), (4, 3, 2, 7)]] * 2
    compare.close("states", by_position[0], with_weights[0], FLOAT32)


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("masked_rows", ["zero", "uniform"])
def test_weights_of_a_training_step_are_those_that_it_used(two: bool, masked_rows: str) -> None:
    """With dropout and with queries that may attend nothing: the same seed drops the same weights, shown or not."""
    given = {"query_rank": QUERY_RANK, "key_rank": KEY_RANK} | ({"target_positions": POSITIONS} if two else {})
    found = []
    for weights in (False, True):
        model = build(dropout=0.4, masked_rows=masked_rows).train()
        torch.manual_seed(3)
        # With memories padding is computed too, and with all states every layer's both streams: the same draws.
        output = model(IDS, MASK, **given, use_mems=True, output_hidden_states=True, output_attentions=weights)
        output[0].square().sum().backward()
        states = output[0] if two else output[0] * REAL[..., None]
        found.append((states.detach(), gradients(model)))
    assert all(w.isfinite().all() for layer in output.attentions for w in (layer if two else (layer,)))
    compare.close("states", found[1][0], found[0][0], FLOAT32)
    compare.close("gradients", found[1][1], found[0][1], GRADIENT)


def test_checkpointing_changes_nothing() -> None:
    model = build(n_layer=3, dropout=0.3).train()
    given = {"perm_mask": PERM_MASK, "target_mapping": MAPPING, "token_type_ids": IDS % 2}

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        y = model(IDS, MASK, **given).last_hidden_state
        y.square().sum().backward()
        return y, gradients(model)

    y, dy = once()
    model.gradient_checkpointing_enable()
    z, dz = once()
    compare.same_bits("states", y, z)
    compare.same_bits("gradients", dy, dz)


@pytest.mark.parametrize(
    "targets", [{"target_positions": POSITIONS}, {"target_mapping": MAPPING}], ids=["places", "map"]
)
@pytest.mark.parametrize("residual", [False, True])
def test_streams_are_one_product_in_training_and_give_what_two_give(
    targets: dict, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation each stream is multiplied by itself; with dropout off, training computes the same."""
    found, made, usual = [], [], xlnet.rows_and_stream  # twice a layer, by no module that a hook could be on
    monkeypatch.setattr(xlnet, "rows_and_stream", lambda of: (made.append(of), usual(of))[1])
    for training in (False, True):
        model = build(n_layer=3, dropout=0.0).train(training)
        made.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=residual):
            y = model(IDS, MASK, query_rank=QUERY_RANK, key_rank=KEY_RANK, **targets)[0]
        y.float().square().sum().backward()
        found.append((y.detach(), gradients(model)))
        assert len(made) == 2 * (3 if training else 5)  # the last layer's content stream is nobody's
    bound = compare.tolerances.CONTESTANT[torch.bfloat16] if residual else FLOAT32
    compare.close("states", found[1][0], found[0][0], bound)
    compare.close("gradients", found[1][1], found[0][1], bound if residual else GRADIENT)


def test_dropout_on_distances_is_each_sequences_own(monkeypatch) -> None:
    calls = Calls(monkeypatch)
    build(dropout=0.2).train()(IDS)
    build(dropout=0.2, bi_data=True).train()(IDS)
    assert [tuple(tensors[3].shape) for _, tensors, _ in calls.made] == [(4, 14, 3, 8)] * 4


class _Halved(torch.nn.Module):
    """In place of dropout: every draw is the same."""

    p = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        return 0.5 * x


@pytest.mark.parametrize("fields", [{}, {"bi_data": True}, {"attn_type": "uni"}, {"clamp_len": 2}])
def test_packed_sequences_drop_and_project_the_distances_that_they_meet(fields: dict) -> None:
    """Their tables are shorter than those of padded rows, and nothing else differs."""
    lengths = MASK.sum(1).tolist()
    wanted = sum(n + 1 if "attn_type" in fields else 2 * n for n in lengths)
    weigh = torch.randn(4, 7, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for padded in (False, True):
        model = build(**fields).double().train()
        model.dropout = _Halved()
        y = model(IDS, MASK, token_type_ids=IDS % 2, use_mems=padded).last_hidden_state * REAL[..., None]
        (y * weigh).sum().backward()
        found.append((y.detach(), gradients(model)))
        assert ((wanted, 24) in model.dropout.shapes) is not padded
        assert all(one.grad.is_contiguous() for name, one in model.named_parameters() if one.grad is not None)
    compare.close("states", found[0][0], found[1][0], compare.tolerances.FLOAT64)
    compare.close("gradients", found[0][1], found[1][1], compare.tolerances.FLOAT64)


@pytest.mark.parametrize("two", [False, True])
def test_compiles_whole(two: bool) -> None:
    model = build()
    given = {"query_rank": QUERY_RANK, "key_rank": KEY_RANK, "target_positions": POSITIONS} if two else {}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compare.close("states", compiled(IDS, MASK, **given)[0], model(IDS, MASK, **given)[0], FLOAT32)


INSIDE = ("rel_attn.layer_norm", "ff", "ff.layer_1", "ff.layer_2", "ff.layer_norm", "ff.dropout")


def rows_seen(model: torch.nn.Module, path: str, way: str) -> list[torch.Tensor]:
    """What a hook on a module of the first layer sees of each call in training with two streams."""
    seen: list[torch.Tensor] = []
    module, undone = model.layer[0].get_submodule(path), contextlib.ExitStack()
    if way == "forward":
        undone.callback(module.register_forward_hook(lambda module, given, out: seen.append(given[0])).remove)
    elif way == "before":
        undone.callback(module.register_forward_pre_hook(lambda module, given: seen.append(given[0])).remove)
    elif way == "backward":
        handle = module.register_full_backward_hook(lambda module, given, out: seen.insert(0, out[0]))
        undone.callback(handle.remove)
    elif way == "everywhere":
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda one, given, out: seen.append(given[0]) if one is module else None
        )
        undone.callback(handle.remove)
    elif way == "patched":
        usual = module.forward
        module.forward = lambda x, *rest: (seen.append(x), usual(x, *rest))[1]
        undone.callback(vars(module).pop, "forward")
    else:  # another module in its place, as an adapter is
        parent, name = model.layer[0].get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]

        class Adapter(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = module

            def forward(self, x: torch.Tensor, *rest):
                seen.append(x)
                return self.inner(x, *rest)

        setattr(parent, name, Adapter())
        undone.callback(setattr, parent, name, module)
    with undone:
        step(model)
    return seen


def step(model: torch.nn.Module) -> torch.Tensor:
    model.zero_grad()
    output = model(IDS, use_mems=False, target_positions=POSITIONS, query_rank=QUERY_RANK, key_rank=KEY_RANK)
    (output.last_hidden_state * torch.arange(24)).sum().backward()
    return output.last_hidden_state.detach()


@pytest.mark.parametrize("way", ["forward", "before", "backward", "everywhere", "patched", "replaced"])
@pytest.mark.parametrize("path", INSIDE)
def test_whoever_looks_into_a_layer_sees_each_stream_for_itself(path: str, way: str) -> None:
    """As in transformers, which calls a layer's modules once for each; the rows of both are one call's otherwise."""
    model = build().train()
    wanted, gradient = step(model), gradients(model)
    seen = rows_seen(model, path, way)
    assert [one.shape[:-1] for one in seen] == [IDS.shape, POSITIONS.shape]
    compare.close("gradients", gradients(model), gradient, GRADIENT)
    compare.same_bits("and joined again", step(model), wanted)
    compare.same_bits("and joined again", gradients(model), gradient)


def test_transformers_calls_as_often() -> None:
    config = transformers.XLNetConfig(**SMALL)
    theirs, seen = transformers.XLNetModel(config).train(), []
    theirs.layer[0].ff.layer_1.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[:-1]))
    theirs(IDS, target_mapping=MAPPING, perm_mask=PERM_MASK, use_mems=False)
    assert sorted(seen) == sorted([IDS.T.shape, POSITIONS.T.shape])  # its batch is the second dimension


def test_without_a_look_both_streams_are_one_call(monkeypatch) -> None:
    seen, usual = [], xlnet.rows_and_stream
    monkeypatch.setattr(xlnet, "rows_and_stream", lambda found: (seen.append(found), usual(found))[1])
    model = build().train()
    step(model)
    assert len(seen) == 2 * model.config.n_layer
    model.layer[0].ff.register_forward_hook(lambda module, given, out: None)
    step(model)
    assert len(seen) == 2 * model.config.n_layer * 2 + 2
