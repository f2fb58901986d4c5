"""What BERT refuses: each error names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from small_bert import IDS, MASK, build

from pyxlbert.models import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

BAD = [
    ({}, "input_ids"),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(5, 7, 24)}, "inputs_embeds"),
    ({"input_ids": IDS[0]}, "input_ids"),
    ({"input_ids": IDS.float()}, "input_ids"),
    ({"input_ids": torch.full((1, 3), 40)}, "input_ids"),
    ({"input_ids": torch.full((1, 3), -1)}, "input_ids"),
    ({"input_ids": torch.zeros(1, 17, dtype=torch.long)}, "input_ids.*max_position_embeddings"),
    ({"input_ids": torch.zeros(17).long(), "cu_seqlens": torch.tensor([0, 17]).int()}, "input_ids.*max_position"),
    ({"inputs_embeds": torch.zeros(1, 17, 24)}, "inputs_embeds.*max_position_embeddings"),
    ({"inputs_embeds": torch.zeros(1, 3, 23)}, "inputs_embeds"),
    ({"inputs_embeds": torch.zeros(1, 3, 24, dtype=torch.long)}, "inputs_embeds"),
    ({"input_ids": IDS.to("meta")}, "input_ids"),
    ({"input_ids": IDS, "attention_mask": MASK.to("meta")}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": MASK[:, :6]}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": MASK[0]}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": MASK * 2}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": (MASK - 1) * 1e4}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": torch.ones(5, 7, 6)}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": torch.ones(5, 2, 7, 7)}, "attention_mask|bias"),
    ({"input_ids": IDS, "attention_mask": torch.ones(4, 1, 7, 7)}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": torch.full((5, 1, 7, 7), 2)}, "attention_mask.*0 and 1"),
    ({"input_ids": IDS, "attention_mask": torch.full((5, 7, 7), -1)}, "attention_mask.*0 and 1"),
    ({"input_ids": IDS, "attention_mask": MASK * 1j}, "attention_mask.*complex"),
    *(
        ({"input_ids": IDS, name: value}, f"^{name}: got {type(value).__name__}, wanted a tensor$")
        for name in ("attention_mask", "token_type_ids", "position_ids", "cu_seqlens")
        for value in ([[0]], IDS.numpy())
    ),
    ({"input_ids": IDS.tolist()}, "input_ids.*list"),
    ({"inputs_embeds": IDS.numpy()}, "inputs_embeds.*ndarray"),
    ({"input_ids": IDS, "token_type_ids": IDS}, "token_type_ids"),
    ({"input_ids": IDS, "token_type_ids": IDS[:, :3] * 0}, "token_type_ids"),
    ({"input_ids": IDS, "token_type_ids": IDS * 0.0}, "token_type_ids"),
    ({"input_ids": IDS, "position_ids": IDS * 0 + 16}, "position_ids"),
    ({"input_ids": IDS, "position_ids": IDS * 0 - 1}, "position_ids"),
    ({"input_ids": IDS, "position_ids": IDS[:2] * 0}, "position_ids"),
    ({"input_ids": IDS, "cu_seqlens": torch.tensor([0, 7]).int()}, "input_ids"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 5, 3, 7]).int()}, "cu_seqlens"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 6]).int()}, "cu_seqlens"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 7]).int(), "attention_mask": MASK[:1]}, "attention_mask"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 7]).int(), "output_attentions": True}, "output_attentions"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 7]).int(), "max_seqlen": 6}, "max_seqlen"),
]


@pytest.mark.parametrize("arguments, name", BAD)
def test_bad_input_is_named(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        build()(**arguments)


@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"])
def test_memory_that_is_gone_is_named(name: str, left: int) -> None:
    given = {"input_ids": IDS.clone()}
    if name == "inputs_embeds":
        given = {name: torch.zeros(5, 7, 24)}
    elif name != "input_ids":
        given[name] = torch.ones_like(IDS)
    given[name].untyped_storage().resize_(left)
    with pytest.raises(ValueError, match=rf"^{name}: got .* whose storage holds {left} bytes, wanted at least \d+$"):
        build()(**given)


@pytest.mark.parametrize("head", [BertForMaskedLM, BertForTokenClassification, BertForSequenceClassification])
def test_labels_whose_memory_is_gone_are_named(head: type) -> None:
    labels = torch.zeros(5, dtype=torch.long) if head is BertForSequenceClassification else IDS * 0
    labels.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^labels: got .* whose storage holds 0 bytes"):
        build(head)(IDS, labels=labels)


@pytest.mark.parametrize(
    "head, fields, arguments, name",
    [
        (BertForMaskedLM, {}, {"labels": IDS[:, :3]}, "labels"),
        (BertForMaskedLM, {}, {"labels": IDS + 39}, "labels"),
        (BertForMaskedLM, {}, {"labels": IDS * 1.0}, "labels"),
        (BertForTokenClassification, {"num_labels": 3}, {"labels": IDS * 0 + 3}, "labels"),
        (BertForSequenceClassification, {"num_labels": 3}, {"labels": torch.full((5,), 3)}, "labels"),
        (BertForSequenceClassification, {"num_labels": 3}, {"labels": torch.ones(5)}, "labels"),
        (BertForSequenceClassification, {"num_labels": 1}, {"labels": torch.ones(4)}, "labels"),
        (BertForSequenceClassification, {"num_labels": 1}, {"labels": torch.ones(5) * 1j}, "labels.*complex"),
        (BertForSequenceClassification, {"num_labels": 3}, {"labels": [0] * 5}, "labels.*list"),
        *(
            (head, {}, {"labels": wrong}, message)
            for head in (BertForMaskedLM, BertForTokenClassification, BertForNextSentencePrediction)
            for wrong, message in ((IDS.to("meta"), "labels.*meta"), (IDS.tolist(), "labels.*list"))
        ),
        (BertForPreTraining, {}, {"next_sentence_label": 1}, "next_sentence_label.*int"),
        (BertForPreTraining, {}, {"labels": IDS, "next_sentence_label": torch.full((5,), 2)}, "next_sentence_label"),
        (
            BertForQuestionAnswering,
            {},
            {"start_positions": torch.zeros(4).long(), "end_positions": torch.zeros(5).long()},
            "start_positions",
        ),
    ],
)
def test_bad_labels_are_named(head: type, fields: dict, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        build(head, **fields)(IDS, **arguments)


CHOICES = IDS[:, None].repeat(1, 3, 1)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"input_ids": IDS}, r"input_ids.*\[5, 7\].*\[B, C, T\]"),
        ({"inputs_embeds": torch.zeros(5, 7, 24)}, r"inputs_embeds.*\[B, C, T, E\]"),
        ({}, "input_ids.*inputs_embeds"),
        ({"input_ids": CHOICES, "inputs_embeds": torch.zeros(5, 3, 7, 24)}, "input_ids.*inputs_embeds"),
        ({"input_ids": CHOICES, "attention_mask": MASK}, r"attention_mask.*\[B, C, T\]"),
        ({"input_ids": CHOICES, "attention_mask": CHOICES[:, :2]}, r"attention_mask.*\[5, 2, 7\].*\[5, 3, 7\]"),
        ({"input_ids": CHOICES, "token_type_ids": CHOICES[..., :2]}, "token_type_ids"),
        ({"input_ids": CHOICES, "labels": IDS[:, 0].tolist()}, "labels.*list"),
        ({"input_ids": CHOICES, "labels": IDS[:4, 0]}, "labels"),
        ({"input_ids": CHOICES.tolist()}, "input_ids.*list"),
    ],
)
def test_multiple_choice_wants_choices(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        build(BertForMultipleChoice)(**arguments)


@pytest.mark.parametrize(
    "value, error",
    [(torch.nn.Embedding(41, 24), ValueError), (torch.nn.Embedding(40, 23), ValueError), (torch.eye(40), TypeError)],
)
def test_embeddings_that_do_not_fit_are_refused(value: Any, error: type[Exception]) -> None:
    model = build(BertForMaskedLM)
    before = model.get_input_embeddings()
    with pytest.raises(error, match="value"):
        model.set_input_embeddings(value)
    assert model.get_input_embeddings() is before


def test_options_of_checkpointing_are_known_before_a_step() -> None:
    model = build()
    with pytest.raises(TypeError, match="use_reentrent"):
        model.gradient_checkpointing_enable({"use_reentrent": True})
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": True, "preserve_rng_state": False})
    assert model.is_gradient_checkpointing


def test_the_configuration_must_be_ours() -> None:
    with pytest.raises(TypeError, match="config"):
        BertModel(transformers.BertConfig())
