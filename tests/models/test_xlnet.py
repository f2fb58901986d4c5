"""What is ours in XLNetModel: padding, memories, targets, precision, directories, refusals."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pyxlbert.nn.relative_attention as relative
from pyxlbert import models
from pyxlbert.models import (
    XLNetConfig,
    XLNetForMultipleChoice,
    XLNetForQuestionAnswering,
    XLNetForQuestionAnsweringSimple,
    XLNetForSequenceClassification,
    XLNetLMHeadModel,
    XLNetModel,
)
from pyxlbert.nn import distances
from pyxlbert.testing import compare
from pyxlbert.testing.models import randomize

FLOAT32, GRADIENT = compare.tolerances.MODEL_FLOAT32, compare.tolerances.MODEL_GRADIENT_FLOAT32
SMALL = {
    "vocab_size": 40,
    "d_model": 24,
    "n_layer": 2,
    "n_head": 3,
    "d_inner": 20,
    "initializer_range": 0.3,
    "dropout": 0.0,
    "summary_last_dropout": 0.0,
    "num_labels": 2,
    "start_n_top": 2,
    "end_n_top": 2,
}
HEADS = [name for name in models.__all__ if name.startswith("XLNet") and name != "XLNetConfig"]
IDS = torch.randint(1, 40, (4, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
REAL = MASK.bool()
POSITIONS = torch.tensor([[3, 6], [6, 5], [1, -1], [4, 3]])
MAPPING = torch.nn.functional.one_hot(POSITIONS.clamp(min=0), 7).float() * (POSITIONS >= 0)[..., None]
QUERY_RANK = torch.tensor([[2, 0, 5, 3, 1, 4, 6]]).expand(4, 7).int()
KEY_RANK = torch.tensor([[2, -1, 5, 3, -1, 4, 6]]).expand(4, 7).int()
PERM_MASK = (QUERY_RANK[:, :, None] <= KEY_RANK[:, None, :]).float()


def build(head: type = XLNetModel, **fields: Any) -> torch.nn.Module:
    torch.manual_seed(5)
    return head(XLNetConfig(**SMALL | fields)).eval()


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Calls:
    """The arguments of every call of the two ops."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, tuple, dict]] = []
        for name in ("relative_attention", "two_stream_attention"):
            monkeypatch.setattr(relative, name, self._counting(name, getattr(relative, name)))

    def _counting(self, name: str, real):
        def counting(*tensors, **options):
            self.made.append((name, tensors, options))
            return real(*tensors, **options)

        return counting

    def names(self) -> list[str]:
        return [name for name, _, _ in self.made]


# Padding


def test_each_row_is_as_if_it_were_alone() -> None:
    model = build()
    together = model(IDS, MASK, use_mems=False, output_hidden_states=True)
    for row, real in enumerate(REAL):
        alone = model(IDS[row][real][None], output_hidden_states=True)
        for a, b in zip(together.hidden_states, alone.hidden_states, strict=True):
            compare.close("hidden state", a[row][real], b[0], FLOAT32)
            assert not a[row][~real].any()


@pytest.mark.parametrize("mask", [None, MASK, MASK.flip(1)])
def test_only_real_tokens_are_computed(mask: torch.Tensor | None, monkeypatch) -> None:
    model, calls = build(), Calls(monkeypatch)
    rows = []
    for name, module in model.named_modules():
        if name.endswith("layer_1"):
            module.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].numel() // 24))
    model(IDS, mask, use_mems=False)
    total = 28 if mask is None else int(mask.sum())
    assert rows == [total] * 2
    assert calls.names() == ["relative_attention"] * 2
    assert all(tensors[0].shape[:-2].numel() == total for _, tensors, _ in calls.made)


def test_padding_is_computed_where_a_memory_needs_it() -> None:
    model = build()
    output = model(IDS, MASK, use_mems=True)
    assert all(memory.shape == (7, 4, 24) for memory in output.mems)
    compare.close("states", output[0], model(IDS, MASK, use_mems=False)[0], FLOAT32)


def test_holes_keep_their_distances(monkeypatch) -> None:
    model, calls = build(), Calls(monkeypatch)
    mask = MASK.clone()
    mask[0, 3] = 0
    output = model(IDS, mask, use_mems=False)
    assert all(options["cu_seqlens"] is None for _, _, options in calls.made)
    assert not output[0][mask == 0].any()
    compare.close("whole rows", output[0][1:], model(IDS[1:], MASK[1:], use_mems=False)[0], FLOAT32)


def test_packed_input_is_the_padded_one_without_the_padding() -> None:
    model = build()
    segments = IDS % 2
    padded = model(IDS, MASK, token_type_ids=segments, use_mems=False, output_hidden_states=True)
    cu_seqlens = torch.cat([torch.zeros(1), MASK.sum(1).cumsum(0)]).int()
    packed = model(
        IDS[REAL], token_type_ids=segments[REAL], cu_seqlens=cu_seqlens, max_seqlen=7, output_hidden_states=True
    )
    for a, b in zip(packed.hidden_states, padded.hidden_states, strict=True):
        compare.same_bits("hidden state", a, b[REAL])


@pytest.mark.parametrize("kind", ["last", "first", "mean"])
def test_a_summary_of_tokens_needs_no_padding(kind: str, monkeypatch) -> None:
    model, calls = build(XLNetForSequenceClassification, summary_type=kind), Calls(monkeypatch)
    model(IDS, MASK, use_mems=False)
    assert (calls.made[0][2]["cu_seqlens"] is not None) == (kind == "last")


def test_a_search_for_answers_leaves_padding_out_as_p_mask_does() -> None:
    """The default call, padded on the left; transformers has to be told."""
    ours = build(XLNetForQuestionAnswering)
    theirs = transformers.XLNetForQuestionAnswering(transformers.XLNetConfig(**SMALL)).eval()
    theirs.load_state_dict(ours.state_dict())
    found, told = ours(IDS, MASK), theirs(IDS, MASK, p_mask=1 - MASK)
    untold = theirs(IDS, MASK)
    for name in ("start_top_log_probs", "end_top_log_probs", "cls_logits", "start_top_index"):
        compare.close(name, found[name], told[name], FLOAT32)
    assert REAL.gather(1, found.start_top_index).all()
    assert not torch.equal(untold.start_top_log_probs, told.start_top_log_probs)
    for a, b in zip(found.mems, untold.mems, strict=True):
        compare.close("memory", a, b, FLOAT32)


# Order, targets and memories


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


def test_two_halves_with_a_memory_are_the_whole() -> None:
    model = build(attn_type="uni", mem_len=None)
    whole = model(IDS)
    first = model(IDS[:, :4])
    second = model(IDS[:, 4:], mems=first.mems)
    compare.close("states", torch.cat([first[0], second[0]], dim=1), whole[0], FLOAT32)
    for a, b in zip(second.mems, whole.mems, strict=True):
        compare.close("memory", a, b, FLOAT32)


def test_memories_are_cut_and_carry_no_gradient() -> None:
    model = build(mem_len=5, reuse_len=3).train()
    first = model(IDS, use_mems=True)
    second = model(IDS, mems=first.mems, use_mems=True)
    assert [m.shape[0] for m in (*first.mems, *second.mems)] == [3, 3, 5, 5]
    assert not any(m.requires_grad for m in second.mems)
    assert model(IDS).mems is None and model.eval()(IDS).mems is not None


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


def test_types_that_int32_cannot_hold() -> None:
    for far in (2**32, -(2**31) - 1):
        types = torch.zeros_like(IDS)
        types[:, 3:] = far
        with pytest.raises(ValueError, match=rf"token_type_ids.*{far}"):
            build()(IDS, token_type_ids=types)
    types[:, 3:] = 2**31 - 1
    compare.same_bits(
        "states", build()(IDS, token_type_ids=types)[0], build()(IDS, token_type_ids=types.clamp(max=1))[0]
    )


# Attention weights, precision, training


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


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("two", [False, True])
def test_low_precision_errs_no_more_than_transformers(how: str, two: bool) -> None:
    g = torch.Generator().manual_seed(0)
    fields = SMALL | {"n_layer": 4, "d_model": 48, "n_head": 4}
    theirs = transformers.XLNetModel(transformers.XLNetConfig(**fields)).eval()
    randomize(theirs, g)
    ours = build(**fields)
    ours.load_state_dict(theirs.state_dict())
    truth, encode = copy.deepcopy(theirs).double(), theirs.relative_positional_encoding
    for model in (theirs, truth):
        # Its two streams mix dtypes otherwise, and raise.
        model.relative_positional_encoding = lambda *a, m=model, **k: encode(*a, **k).to(m.dtype)
    if how != "autocast":
        ours, theirs = ours.to(getattr(torch, how)), theirs.to(getattr(torch, how))
    direction = torch.randn(4, 2 if two else 7, 48, generator=g)
    results = []
    for model in (ours, theirs, truth):
        own = {"perm_mask": PERM_MASK.to(model.dtype), "target_mapping": MAPPING.to(model.dtype)} if two else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and model is not truth):
            output = model(IDS, **own)
        (output.last_hidden_state * direction.to(output.last_hidden_state.dtype)).sum().backward()
        results.append((output, gradients(model)))
    (mine, dmine), (plain, dplain), (exact, dexact) = results
    assert mine[0].dtype == (torch.float32 if how == "autocast" else getattr(torch, how))
    compare.within_budget("states", mine[0].detach(), plain[0].detach().to(mine[0].dtype), exact[0].detach())
    compare.within_budget("gradients", dmine, dplain, dexact)
    assert all(m.dtype == mine[0].dtype for m in mine.mems)


def test_float64() -> None:
    model = build()
    truth = copy.deepcopy(model).double()
    theirs = transformers.XLNetModel(transformers.XLNetConfig(**SMALL)).double().eval()
    theirs.load_state_dict(truth.state_dict())
    compare.close("states", truth(IDS)[0], theirs(IDS)[0], compare.tolerances.FLOAT64)


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


def test_dropout_on_distances_is_each_sequences_own(monkeypatch) -> None:
    calls = Calls(monkeypatch)
    build(dropout=0.2).train()(IDS)
    build(dropout=0.2, bi_data=True).train()(IDS)
    assert [tuple(tensors[3].shape) for _, tensors, _ in calls.made] == [(4, 14, 3, 8)] * 4


@pytest.mark.parametrize("two", [False, True])
def test_compiles_whole(two: bool) -> None:
    model = build()
    given = {"query_rank": QUERY_RANK, "key_rank": KEY_RANK, "target_positions": POSITIONS} if two else {}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compare.close("states", compiled(IDS, MASK, **given)[0], model(IDS, MASK, **given)[0], FLOAT32)


# Heads


def test_search_leaves_padding_out() -> None:
    model = build(XLNetForQuestionAnswering)
    output = model(IDS, MASK, use_mems=False)
    assert output.start_top_index.shape == (4, 2) and output.end_top_index.shape == (4, 4)
    for name in ("start_top_index", "end_top_index"):
        assert REAL.gather(1, output[name]).all()
    assert torch.equal(model(IDS, MASK, use_mems=True).end_top_index, output.end_top_index)


def test_float16_masks_logits_with_what_it_can_hold() -> None:
    model = build(XLNetForQuestionAnswering).half()
    output = model(IDS, MASK, p_mask=1 - MASK)
    assert output.start_top_log_probs.isfinite().all() and output.cls_logits.isfinite().all()


# Directories


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}, {"untie_r": False}])
def test_directories_both_ways(head: str, fields: dict[str, Any], tmp_path: Path) -> None:
    ours = build(getattr(models, head), **fields)
    ours.save_pretrained(tmp_path / "a")
    theirs, info = getattr(transformers, head).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info["missing_keys"]
    theirs.eval().save_pretrained(tmp_path / "b")
    again, info = getattr(models, head).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": []}
    assert again.config.untie_r == fields.get("untie_r", True)
    ids = IDS[:, None] if head == "XLNetForMultipleChoice" else IDS
    a, b, c = ours(ids), theirs(ids), again(ids)
    for name in a:
        if isinstance(a[name], torch.Tensor) and a[name].is_floating_point():
            compare.close(name, a[name], b[name], FLOAT32)
            compare.same_bits(name, a[name], c[name])
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in again.named_parameters()}


def test_biases_that_differ_are_left_untied(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"untie_r": False}))
    with pytest.warns(UserWarning, match="left untied"):
        again = XLNetModel.from_pretrained(tmp_path)
    assert again.config.untie_r
    compare.same_bits("states", again(IDS)[0], model(IDS)[0])


def test_an_encoder_loads_into_a_head_and_back(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "encoder")
    with pytest.warns(UserWarning, match="fresh values"):
        head = XLNetForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    compare.same_bits("states", head.transformer(IDS)[0], build()(IDS)[0])
    head.save_pretrained(tmp_path / "head")
    with pytest.warns(UserWarning, match="without a place"):
        compare.same_bits("states", XLNetModel.from_pretrained(tmp_path / "head")(IDS)[0], build()(IDS)[0])


def test_configuration_has_the_other_names_too(tmp_path: Path) -> None:
    theirs = transformers.XLNetConfig(vocab_size=40, d_model=24, n_layer=2, n_head=3, d_inner=20)
    theirs.save_pretrained(tmp_path)
    ours = XLNetConfig.from_pretrained(tmp_path, num_hidden_layers=5)
    assert (ours.n_layer, ours.num_hidden_layers, ours.hidden_size, ours.num_attention_heads) == (5, 5, 24, 3)
    for name in ("d_head", "mem_len", "clamp_len", "summary_activation", "pad_token_id", "start_n_top", "dropout"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize(
    "name, value",
    [
        ("attn_type", "both"),
        ("summary_type", "attn"),
        ("masked_rows", "nan"),
        ("d_model", 25),
        ("n_head", 5),
        ("d_head", 7),
        ("mem_len", -1),
        ("dropout", 1.5),
        ("ff_activation", "sine"),
        ("summary_proj_to_labels", True),
        ("clamp_len", None),
    ],
)
def test_a_bad_field_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        XLNetConfig.from_dict(SMALL | {name: value})


# Bad input


MEMS = [torch.zeros(3, 4, 24)] * 2
RANK = torch.zeros(4, 7, dtype=torch.int32)
CU = torch.tensor([0, 7]).int()
BAD = [
    ({}, "input_ids"),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(4, 7, 24)}, "input_ids"),
    ({"input_ids": IDS * 1.0}, "input_ids"),
    ({"input_ids": IDS + 39}, "input_ids"),
    ({"input_ids": IDS[0]}, "input_ids"),
    ({"inputs_embeds": torch.zeros(4, 7, 23)}, "inputs_embeds"),
    ({"input_ids": IDS, "attention_mask": MASK, "input_mask": 1 - MASK}, "input_mask"),
    ({"input_ids": IDS, "attention_mask": MASK[:, :6]}, "attention_mask"),
    ({"input_ids": IDS, "input_mask": MASK * 2}, "input_mask"),
    ({"input_ids": IDS, "attention_mask": torch.ones(4, 7, 7)}, "attention_mask"),
    ({"input_ids": IDS, "token_type_ids": IDS[:, :3]}, "token_type_ids"),
    ({"input_ids": IDS, "token_type_ids": IDS * 1.0}, "token_type_ids"),
    ({"input_ids": IDS, "mems": MEMS[:1]}, "mems.*1.*2 layers"),
    ({"input_ids": IDS, "mems": [torch.zeros(3, 3, 24)] * 2}, r"mems.*\[3, 3, 24\].*\[mem_len, 4, 24\]"),
    ({"input_ids": IDS, "mems": [torch.zeros(3, 4, 24), torch.zeros(2, 4, 24)]}, "mems"),
    ({"input_ids": IDS, "mems": [torch.zeros(3, 4, 24, dtype=torch.int32)] * 2}, "mems"),
    ({"input_ids": IDS, "mems": [torch.zeros(3, 4, 24), None]}, "mems"),
    ({"input_ids": IDS, "perm_mask": torch.zeros(4, 7, 6)}, "perm_mask"),
    ({"input_ids": IDS, "perm_mask": PERM_MASK, "query_rank": RANK, "key_rank": RANK}, "perm_mask.*query_rank"),
    ({"input_ids": IDS, "query_rank": RANK}, "key_rank"),
    ({"input_ids": IDS, "key_rank": RANK}, "query_rank"),
    ({"input_ids": IDS, "query_rank": RANK[:, :6], "key_rank": RANK}, "query_rank"),
    ({"input_ids": IDS, "query_rank": RANK, "key_rank": RANK.long()}, "key_rank.*int64.*int32"),
    ({"input_ids": IDS, "target_mapping": torch.zeros(4, 2, 6)}, "target_mapping"),
    ({"input_ids": IDS, "target_mapping": MAPPING, "target_positions": POSITIONS}, "target_positions"),
    ({"input_ids": IDS, "target_positions": POSITIONS + 1}, "target_positions.*7.*-1 to 6"),
    ({"input_ids": IDS, "target_positions": POSITIONS - 1}, "target_positions.*-2"),
    ({"input_ids": IDS, "target_positions": POSITIONS * 1.0}, "target_positions"),
    ({"input_ids": IDS, "target_positions": POSITIONS[:3]}, "target_positions"),
    ({"input_ids": IDS, "mems": 3}, "mems.*int"),
    ({"input_ids": IDS, "mems": MEMS[0]}, "mems.*Tensor"),
    ({"input_ids": IDS, "mems": MEMS, "mems_mask": torch.full((4, 3), 2)}, "mems_mask.*0 and 1"),
    ({"input_ids": IDS.tolist()}, "input_ids.*list"),
    ({"input_ids": IDS[0], "cu_seqlens": CU, "mems": MEMS}, "mems.*cu_seqlens"),
    ({"input_ids": IDS[0], "cu_seqlens": CU, "use_mems": True}, "use_mems.*cu_seqlens"),
    ({"input_ids": IDS[0], "cu_seqlens": CU, "perm_mask": PERM_MASK}, "perm_mask.*cu_seqlens"),
    ({"input_ids": IDS[0], "cu_seqlens": CU, "attention_mask": MASK[:1]}, "attention_mask.*cu_seqlens"),
    ({"input_ids": IDS[0], "cu_seqlens": CU, "target_positions": POSITIONS}, "target_positions.*cu_seqlens"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 6]).int()}, "cu_seqlens"),
]


TENSORS = ("attention_mask", "perm_mask", "target_mapping", "token_type_ids", "input_mask", "target_positions")
TENSORS += ("query_rank", "key_rank", "mems_mask", "cu_seqlens")
BAD += [
    ({"input_ids": IDS, name: value}, f"^{name}: got {type(value).__name__}, wanted a tensor$")
    for name in TENSORS
    for value in ([[0]], "mask", IDS.numpy())
]


@pytest.mark.parametrize("arguments, name", BAD)
def test_bad_input_is_named_before_anything_runs(arguments: dict[str, Any], name: str, monkeypatch) -> None:
    model, calls = build(), Calls(monkeypatch)
    with pytest.raises((ValueError, TypeError), match=name):
        model(**arguments)
    assert not calls.made


def test_half_of_an_odd_batch_cannot_read_backwards() -> None:
    with pytest.raises(ValueError, match=r"bi_data.*3"):
        build(bi_data=True)(IDS[:3])


@pytest.mark.parametrize(
    "head, arguments, name",
    [
        (XLNetLMHeadModel, {"labels": IDS[:, :3]}, "labels"),
        (XLNetLMHeadModel, {"labels": IDS + 39}, "labels"),
        (XLNetLMHeadModel, {"labels": IDS, "target_mapping": MAPPING}, "labels"),
        (XLNetForSequenceClassification, {"labels": torch.full((4,), 2)}, "labels"),
        (
            XLNetForQuestionAnsweringSimple,
            {"start_positions": IDS[:, 0] * 0, "end_positions": IDS[:3, 0]},
            "end_positions",
        ),
        (
            XLNetForQuestionAnswering,
            {"start_positions": IDS[:, 0] * 0, "end_positions": IDS[:, 0] * 0 + 7},
            "end_positions.*7.*0 to 6",
        ),
        (XLNetForQuestionAnswering, {"p_mask": MASK[:, :3]}, "p_mask"),
        (XLNetForQuestionAnswering, {"cls_index": IDS[:, 0] * 0 - 1}, "cls_index"),
        (XLNetForMultipleChoice, {}, r"input_ids.*\[B, C, T\]"),
        (XLNetLMHeadModel, {"labels": IDS.tolist()}, "labels.*list"),
        (XLNetLMHeadModel, {"labels": IDS.to("meta")}, "labels.*meta"),
        (XLNetForSequenceClassification, {"labels": 3}, "labels.*int"),
        (XLNetForQuestionAnsweringSimple, {"start_positions": [0], "end_positions": IDS[:, 0]}, "start_positions"),
    ],
)
def test_bad_arguments_of_heads_are_named(head: type, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        build(head)(IDS, **arguments)


def test_a_search_wider_than_the_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start_n_top.*9.*7"):
        build(XLNetForQuestionAnswering, start_n_top=9)(IDS)
