"""XLNet's attention weights, checkpointing, dropout on distances, torch.compile."""

from __future__ import annotations

import pytest
import torch
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
    Calls,
    build,
    gradients,
)

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
def test_streams_are_one_product_in_training_and_give_what_two_give(targets: dict, residual: bool) -> None:
    """In evaluation each stream is multiplied by itself; with dropout off, training computes the same."""
    found = []
    for training in (False, True):
        model = build(n_layer=3, dropout=0.0).train(training)
        rows: list[int] = []
        for layer in model.layer:
            layer.ff.register_forward_pre_hook(
                lambda module, given, rows=rows: rows.append(given[0].shape[:-1].numel())
            )
        with torch.autocast("cpu", torch.bfloat16, enabled=residual):
            y = model(IDS, MASK, query_rank=QUERY_RANK, key_rank=KEY_RANK, **targets)[0]
        y.float().square().sum().backward()
        found.append((y.detach(), gradients(model)))
        assert len(rows) == (3 if training else 5)  # the last layer's content stream is nobody's
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
