"""What is ours in XLNetModel: padding that is left out, packed input, what heads read of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from small_xlnet import FLOAT32, IDS, MASK, REAL, SMALL, Calls, build

from pyxlbert.models import (
    XLNetForMultipleChoice,
    XLNetForQuestionAnswering,
    XLNetForSequenceClassification,
)
from pyxlbert.testing import compare


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
    for at_padding in (False, True):
        model = build(XLNetForSequenceClassification, summary_type=kind, summary_at_padding=at_padding)
        calls = Calls(monkeypatch)
        model(IDS, MASK, use_mems=False)
        assert (calls.made[0][2]["cu_seqlens"] is not None) == (not at_padding or kind == "last")


def summarized(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
    """What a head makes of each row's summary, ``[B, ...]``; a row is the only choice where it takes choices."""
    if isinstance(model, XLNetForMultipleChoice | transformers.XLNetForMultipleChoice):
        ids, mask = (None if x is None else x.view(-1, 1, x.shape[-1]) for x in (ids, mask))
    output = model(ids, attention_mask=mask, **options)
    return output.cls_logits if "cls_logits" in output else output.logits


SUMMARIZING = (XLNetForSequenceClassification, XLNetForMultipleChoice, XLNetForQuestionAnswering)
SUMMARIES = [(head, kind) for head in SUMMARIZING[:2] for kind in ("last", "first", "mean", "cls_index")]
SUMMARIES += [(XLNetForQuestionAnswering, "last")]


@pytest.mark.parametrize("use_mems", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("head", "kind"), SUMMARIES)
def test_padding_is_in_no_summary(head: type, kind: str, side: str, use_mems: bool) -> None:
    """A row has the summary that it has alone, on whichever side the batch is padded."""
    model, mask = build(head, summary_type=kind), MASK if side == "left" else MASK.flip(1)
    found = summarized(model, IDS, mask, use_mems=use_mems)
    alone = [
        summarized(model, IDS[row : row + 1, tokens], None, use_mems=use_mems) for row, tokens in enumerate(mask.bool())
    ]
    compare.close("rows", found, torch.cat(alone), FLOAT32)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("head", "kind"), SUMMARIES)
def test_a_summary_at_padding_is_that_of_transformers(head: type, kind: str, side: str) -> None:
    mask = MASK if side == "left" else MASK.flip(1)
    config = transformers.XLNetConfig(**SMALL, summary_type=kind)
    theirs = getattr(transformers, head.__name__)(config).eval()
    read_by_both = (side, kind) in (("left", "last"), ("left", "cls_index"), ("right", "first"))
    told = {"p_mask": 1 - mask} if head is XLNetForQuestionAnswering else {}
    for at_padding in (True, False):
        ours = build(head, summary_type=kind, summary_at_padding=at_padding)
        theirs.load_state_dict(ours.state_dict())
        with torch.no_grad():
            found, wanted = summarized(ours, IDS, mask), summarized(theirs, IDS, mask, **told)
        if at_padding or read_by_both:
            compare.close("summary", found, wanted, FLOAT32)
        else:
            assert float((found - wanted).abs().max()) > 0.01 * float(wanted.abs().max())


def test_a_row_of_padding_alone_has_a_summary_of_zeros() -> None:
    mask = MASK.clone()
    mask[1] = 0
    for kind in ("last", "first", "mean"):
        model = build(XLNetForSequenceClassification, summary_type=kind)
        nothing = model.logits_proj(model.sequence_summary.activation(model.sequence_summary.summary(torch.zeros(24))))
        for use_mems in (False, True):
            compare.close(kind, model(IDS, mask, use_mems=use_mems).logits[1], nothing, FLOAT32)


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


def test_search_leaves_padding_out() -> None:
    model = build(XLNetForQuestionAnswering)
    output = model(IDS, MASK, use_mems=False)
    assert output.start_top_index.shape == (4, 2) and output.end_top_index.shape == (4, 4)
    for name in ("start_top_index", "end_top_index"):
        assert REAL.gather(1, output[name]).all()
    assert torch.equal(model(IDS, MASK, use_mems=True).end_top_index, output.end_top_index)
