"""XLNet's orders and targets: ranks, positions, distances, and what is hidden."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from small_xlnet import (
    FLOAT32,
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

from pyxlbert.models import (
    XLNetConfig,
    XLNetLMHeadModel,
)
from pyxlbert.nn import distances
from pyxlbert.testing import compare


@pytest.mark.parametrize("memory", [False, True])
def test_ranks_and_positions_are_the_mask_and_the_mapping(memory: bool, monkeypatch) -> None:
    model = build(XLNetLMHeadModel)
    mems = model(IDS).mems if memory else None
    dense = model(IDS, MASK, mems, PERM_MASK, MAPPING, output_hidden_states=True)
    calls = Calls(monkeypatch)
    given = {"target_positions": POSITIONS, "query_rank": QUERY_RANK, "key_rank": KEY_RANK}
    ranked = model(IDS, MASK, mems, **given, output_hidden_states=True)
    assert calls.names() == ["two_stream_attention"] * 2
    compare.close("logits", ranked.logits, dense.logits, FLOAT32)
    for a, b in zip(ranked.hidden_states, dense.hidden_states, strict=True):
        compare.close("hidden state", a, b, FLOAT32)
    compare.close("logits", model(IDS, MASK, mems, **given).logits, dense.logits, FLOAT32)


def test_the_query_stream_has_as_many_rows_as_targets(monkeypatch) -> None:
    model, calls = build(n_layer=3), Calls(monkeypatch)
    output = model(IDS, perm_mask=PERM_MASK, target_mapping=MAPPING)
    assert output.last_hidden_state.shape == (4, 2, 24)
    # The content stream's last rows are for nobody.
    assert calls.names() == ["two_stream_attention"] * 2 + ["relative_attention"]
    assert all(tensors[1].shape[:2] == (4, 2) for _, tensors, _ in calls.made[:2])
    assert calls.made[2][1][0].shape[:2] == (4, 2)


@pytest.mark.parametrize("change", ["soft", "twice"])
def test_other_mappings_are_computed_at_every_place(change: str, monkeypatch) -> None:
    mapping = MAPPING * 0.5 if change == "soft" else MAPPING[:, :1].repeat(1, 2, 1)
    calls = Calls(monkeypatch)
    build()(IDS, perm_mask=PERM_MASK, target_mapping=mapping)
    assert calls.names() == ["relative_attention"] * 3
    assert calls.made[-1][1][0].shape[:2] == (4, 7)


def test_distances_are_projected_once_a_layer(monkeypatch) -> None:
    calls = Calls(monkeypatch)
    build()(IDS)
    build(bi_data=True)(IDS)
    assert [tuple(tensors[3].shape) for _, tensors, _ in calls.made] == [(14, 3, 8)] * 2 + [(2, 14, 3, 8)] * 2


def test_distances_are_computed_once_for_calls_of_one_shape(monkeypatch) -> None:
    model, made = build(), []
    real = distances.relative_positions
    monkeypatch.setattr(distances, "relative_positions", lambda *a, **b: made.append(a[:2]) or real(*a, **b))
    with torch.inference_mode():
        model(IDS)
    first = model(IDS)
    first[0].sum().backward()  # the table is none of inference mode's
    model(IDS, mems=first.mems)
    assert made == [(7, 7), (7, 14)]
    again = copy.deepcopy(model)
    compare.same_bits("states", again(IDS)[0], first[0])
    compare.same_bits("states", pickle.loads(pickle.dumps(model))(IDS)[0], first[0])
    assert made[2:] == [(7, 7)] * 2  # a copy starts without
    assert "distances" not in "".join(model.state_dict())
    for change in ({"clamp_len": 3}, {"bi_data": True}):
        fresh = build(**change)
        for name, value in change.items():
            setattr(model.config, name, value)
        compare.same_bits("states", model(IDS)[0], fresh(IDS)[0])
        for name in change:
            setattr(model.config, name, SMALL.get(name, getattr(XLNetConfig(), name)))
    assert model.double()(IDS)[0].dtype == torch.float64


def test_threads_share_the_distances() -> None:
    model = build()

    def one(index: int) -> torch.Tensor:
        with torch.no_grad():
            return model(IDS[:, : index % 7 + 1])[0]

    wanted = [one(index) for index in range(7)]
    with ThreadPoolExecutor(4) as pool:
        for index, got in enumerate(pool.map(one, range(100))):
            compare.same_bits("states", got, wanted[index % 7])


def test_a_target_that_sees_nothing() -> None:
    rank = torch.arange(7).expand(4, 7).int()
    given = {"query_rank": rank, "key_rank": rank, "target_positions": torch.zeros(4, 1, dtype=torch.long)}
    zero, uniform = build(), build(masked_rows="uniform")
    a, b = zero(IDS, **given)[0], uniform(IDS, **given)[0]
    assert a.isfinite().all() and not torch.equal(a, b)
    # Zeros: nothing of the sequence is in the result.
    compare.same_bits("zero", a[:1].expand(4, 1, 24), a)


@pytest.mark.parametrize("order", ["none", "ranks", "dense", "targets", "weights", "window"])
@pytest.mark.parametrize("use_mems", [False, True])
@pytest.mark.parametrize("mask", ["left", "right", "holes"])
def test_what_is_hidden_may_be_anything(order: str, use_mems: bool, mask: str) -> None:
    model = build(**({"attn_type": "uni", "same_length": True} if order == "window" else {})).train()
    real = {"left": REAL, "right": REAL.flip(1), "holes": REAL & (IDS % 3 > 0) | (torch.arange(7) == 6)}[mask]
    given: dict[str, Any] = {"attention_mask": real.int(), "use_mems": use_mems}
    if order in ("ranks", "targets"):
        given |= {"query_rank": QUERY_RANK, "key_rank": KEY_RANK}
    given |= {"perm_mask": PERM_MASK} if order == "dense" else {}
    given |= {"target_positions": POSITIONS} if order == "targets" else {}
    given |= {"output_attentions": True} if order == "weights" else {}
    g = torch.Generator().manual_seed(3)
    embeds, seen = torch.randn(4, 7, 24, generator=g), torch.rand(3, 4, generator=g) < 0.5
    memory = torch.randn(2, 3, 4, 24, generator=g)
    found = []
    for hidden in (0.0, torch.nan, torch.inf, 3e38):
        if hidden == 3e38 and (use_mems or order == "weights"):
            continue  # a memory and weights keep what is computed of padding, so that it is
        model.zero_grad()
        output = model(
            inputs_embeds=torch.where(real[..., None], embeds, hidden),
            mems=list(torch.where(seen[..., None], memory, hidden)),
            mems_mask=seen.t().int(),
            **given,
        )
        output.last_hidden_state.square().sum().backward()
        states = output.last_hidden_state if order == "targets" else output.last_hidden_state[real]
        found.append((states.detach(), gradients(model)))
    for states, gradient in found:
        assert states.isfinite().all() and gradient.isfinite().all()
        compare.same_bits("states", states, found[0][0])
        compare.same_bits("gradient", gradient, found[0][1])


@pytest.mark.parametrize("attn_type", ["bi", "uni"])
@pytest.mark.parametrize("fields", [{}, {"same_length": True}, {"masked_rows": "uniform"}], ids=str)
def test_an_order_without_targets_is_computed_without_padding(attn_type: str, fields: dict, monkeypatch) -> None:
    model = build(attn_type=attn_type, **fields)
    given = {"query_rank": QUERY_RANK, "key_rank": KEY_RANK, "token_type_ids": IDS % 2}
    calls = Calls(monkeypatch)
    output = model(IDS, MASK, **given, use_mems=False)[0]
    window = attn_type == "uni" and "same_length" in fields
    assert [options["cu_seqlens"] is None for _, _, options in calls.made] == [window] * 2
    wanted = model(IDS, MASK, **given, use_mems=True)[0]
    compare.close("states", output, torch.where(REAL[..., None], wanted, 0.0), FLOAT32)
