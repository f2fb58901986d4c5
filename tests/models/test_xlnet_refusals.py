"""What XLNet refuses: each error names the argument, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_xlnet import IDS, MAPPING, MASK, PERM_MASK, POSITIONS, SMALL, Calls, build

from pyxlbert.models import (
    XLNetConfig,
    XLNetForMultipleChoice,
    XLNetForQuestionAnswering,
    XLNetForQuestionAnsweringSimple,
    XLNetForSequenceClassification,
    XLNetLMHeadModel,
)


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


_WHOLE = {
    **{"attention_mask": MASK, "perm_mask": PERM_MASK, "target_mapping": MAPPING, "token_type_ids": IDS * 0},
    **{"input_mask": 1 - MASK, "target_positions": POSITIONS, "query_rank": RANK, "key_rank": RANK},
    **{"mems_mask": torch.ones(4, 3), "cu_seqlens": CU, "mems": MEMS, "input_ids": IDS},
}


@pytest.mark.parametrize("name", _WHOLE)
def test_memory_that_is_gone_is_named(name: str, monkeypatch) -> None:
    whole, model, calls = _WHOLE[name], build(), Calls(monkeypatch)
    freed = [one.clone() for one in whole] if name == "mems" else whole.clone()
    (freed[-1] if name == "mems" else freed).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"^{name}: got .* whose storage holds 0 bytes, wanted at least"):
        model(**{"input_ids": IDS, name: freed})
    assert not calls.made


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
