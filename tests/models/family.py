"""BERT's family against transformers: random arguments and labels, and what of the outputs is compared."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from pyxlbert import models
from pyxlbert.testing.models import results

VOCABULARY = ("ForPreTraining", "ForMaskedLM")
POOLED = (
    "Model",
    "ForPreTraining",
    "ForNextSentencePrediction",
    "ForSequenceClassification",
    "ForMultipleChoice",
)
VOCAB, POSITIONS = 53, 40


def head_of(case: dict[str, Any]) -> str:
    """The class without its family: "ForMaskedLM"."""
    return case["head"].removeprefix("Bert").removeprefix("Roberta").removeprefix("Albert")


def classification(case: dict[str, Any], index: int) -> dict[str, Any]:
    if head_of(case) == "ForSequenceClassification":
        return [
            {"num_labels": 1},
            {"num_labels": 3, "problem_type": "regression"},
            {"num_labels": 4},
            {"num_labels": 3, "problem_type": "multi_label_classification"},
        ][index % 4]
    return {"num_labels": 5} if head_of(case) == "ForTokenClassification" else {}


def random_mask(
    kind: str, batch: int, length: int, heads: int, pooled: bool, g: torch.Generator
) -> torch.Tensor | None:
    if kind == "none":
        return None
    if kind == "right":
        lengths = torch.randint(1, length + 1, (batch, 1), generator=g)
        return (torch.arange(length) < lengths).long()
    if kind == "holes":
        mask = torch.rand(batch, length, generator=g) < 0.6
        if pooled:
            mask[:, 0] = True  # transformers pools the first place even when it is padding
        mask[:, -1] |= ~mask.any(1)
        return mask if torch.rand((), generator=g) < 0.5 else mask.float()
    allowed = torch.rand(batch, length, length, generator=g) < 0.6
    allowed |= torch.eye(length, dtype=torch.bool)
    form = int(torch.randint(3, (), generator=g))
    if form == 0:
        return allowed.long()
    if form == 1:
        return allowed[:, None]
    return torch.randn(batch, heads, length, length, generator=g).masked_fill(~allowed[:, None], -math.inf)


def random_arguments(case: dict[str, Any], config: models.BertConfig, g: torch.Generator) -> dict[str, torch.Tensor]:
    batch, length = case["shape"]
    head, heads = head_of(case), case["heads"][0]
    choices = 3 if head == "ForMultipleChoice" else 1
    mask = case["mask"]
    rows = batch * choices

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=g)

    arguments: dict[str, torch.Tensor | None] = {
        "attention_mask": random_mask(mask, rows, length, heads, head in POOLED, g),
        "token_type_ids": integers(case["types"], rows, length) if case["types"] > 1 else None,
        "position_ids": integers(POSITIONS, rows, length) if case["position_ids"] else None,
    }
    if case["inputs_embeds"]:
        arguments["inputs_embeds"] = torch.randn(rows, length, config.embedding_width, generator=g)
    else:
        arguments["input_ids"] = integers(VOCAB, rows, length)
    given = {name: value for name, value in arguments.items() if value is not None}
    if head == "ForMultipleChoice":
        given = {name: value.unflatten(0, (batch, choices)) for name, value in given.items()}
    if case["labels"]:
        given |= random_labels(head, config, given, batch, length, choices, g)
    return given


def random_labels(head, config, given, batch, length, choices, g) -> dict[str, torch.Tensor]:
    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=g)

    mask = given.get("attention_mask")
    tokens = mask.bool() if mask is not None and mask.dim() == 2 else torch.ones(batch, length, dtype=torch.bool)
    some = tokens & (torch.rand(batch, length, generator=g) < 0.7)
    some[0, tokens[0].long().argmax()] = True
    if head in VOCABULARY:
        labels = {"labels": integers(VOCAB, batch, length).masked_fill(~some, -100)}
        pairs = "sentence_order_label" if hasattr(config, "embedding_size") else "next_sentence_label"
        return labels | ({pairs: integers(2, batch)} if head == "ForPreTraining" else {})
    if head == "ForTokenClassification":
        return {"labels": integers(config.num_labels, batch, length).masked_fill(~some, -100)}
    if head == "ForNextSentencePrediction":
        return {"labels": integers(2, batch)}
    if head == "ForMultipleChoice":
        return {"labels": integers(choices, batch)}
    if head == "ForQuestionAnswering":
        return {
            "start_positions": tokens.long().argmax(1),
            "end_positions": length - 1 - tokens.long().flip(1).argmax(1),
        }
    if head == "ForSequenceClassification":
        if config.num_labels == 1:
            return {"labels": torch.randn(batch, generator=g)}
        if config.problem_type == "regression":
            return {"labels": torch.randn(batch, config.num_labels, generator=g)}
        if config.problem_type == "multi_label_classification":
            return {"labels": integers(2, batch, config.num_labels).float()}
        return {"labels": integers(config.num_labels, batch)}
    return {}


def for_transformers(arguments: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating-point arguments in the oracle's dtype, masks of 3 and 4 dimensions as it adds them."""
    given = dict(arguments)
    mask = given.get("attention_mask")
    batched = given.get("inputs_embeds", given.get("input_ids"))
    choices = batched is not None and batched.dim() == (4 if "inputs_embeds" in given else 3)
    if mask is not None and not choices and mask.dim() > 2 and not mask.is_floating_point():
        allowed = mask.bool() if mask.dim() == 4 else mask.bool()[:, None]
        given["attention_mask"] = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}


def named_outputs(output: Any, tokens: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Every output tensor but the loss; what stands at padding is set to zero, ours and theirs alike."""
    found: dict[str, torch.Tensor] = {}
    for name, value in output.items():
        if name in ("hidden_states", "attentions"):
            found |= {f"{name}.{i}": one for i, one in enumerate(value)}
        elif name not in ("loss", "cross_attentions"):
            found[name] = value
    if tokens is None:
        return found
    for name, value in found.items():
        real = tokens
        if name.startswith("attentions"):
            real = tokens[:, None, :, None]
        elif value.dim() == 3:
            real = tokens[..., None]
        elif value.shape != tokens.shape or ("start" not in name and "end" not in name):
            continue
        found[name] = torch.where(real, value, 0.0)
    return found


def loss_of(output: Any, arguments: dict[str, torch.Tensor], tokens: torch.Tensor | None) -> torch.Tensor | None:
    """The oracle's loss. Where there is padding, its span logits must not take part: ours have none there."""
    if tokens is None or "start_positions" not in arguments:
        return output.get("loss")
    losses = [
        F.cross_entropy(logits.masked_fill(~tokens, -math.inf), places)
        for logits, places in (
            (output.start_logits, arguments["start_positions"]),
            (output.end_logits, arguments["end_positions"]),
        )
    ]
    return sum(losses) / 2


def run(model, arguments, case, tokens, cotangents, oracle: bool) -> dict[str, torch.Tensor]:
    """Outputs, loss and gradients of one of the two."""
    options = {f"output_{case['output']}": True} if case["output"] != "last" else {}

    labelled = None
    if oracle and case["sparse_prediction"] and "labels" in arguments:
        labelled = arguments["labels"] != -100

    def loss(output: Any) -> torch.Tensor | None:
        return loss_of(output, arguments, tokens) if oracle else output.get("loss")

    def named(output: Any) -> dict[str, torch.Tensor]:
        found = named_outputs(output, tokens)
        if labelled is not None:
            name = "logits" if "logits" in found else "prediction_logits"
            found[name] = found[name][labelled]
        return found

    return results(model, arguments | options, cotangents, named, loss)
