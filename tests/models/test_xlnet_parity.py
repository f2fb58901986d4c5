"""XLNetModel and every head against transformers: random small configurations, forward and all gradients."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from pyxlbert import models
from pyxlbert.testing.models import Results, random_cotangents, randomize, results, within_budget
from pyxlbert.testing.pairwise import pairwise_cases, uncovered_pairs

OPTIONS = {
    "head": [
        "XLNetModel",
        "XLNetLMHeadModel",
        "XLNetForSequenceClassification",
        "XLNetForTokenClassification",
        "XLNetForMultipleChoice",
        "XLNetForQuestionAnsweringSimple",
        "XLNetForQuestionAnswering",
    ],
    "mask": ["none", "left", "right", "holes"],
    "input_mask": [False, True],
    "order": ["none", "dense", "ranks"],
    "targets": ["none", "one-hot", "positions", "other"],  # other: soft, or two at one place
    "mems": [0, 2, 9],  # length of those given
    "use_mems": [False, True],
    "mem_len": [None, 0, 3, 30],
    "reuse_len": [None, 2],
    "attn_type": ["bi", "uni"],
    "same_length": [False, True],
    "bi_data": [False, True],
    "clamp_len": [-1, 3],
    "untie_r": [True, False],
    "types": [0, 2, 5],  # 0: not given
    "heads": [(1, 8), (3, 8), (2, 17), (4, 16)],  # number, size
    "shape": [(1, 1), (2, 7), (3, 12), (2, 33)],  # B, T
    "ff_activation": ["gelu", "gelu_new", "relu", "silu"],
    "n_layer": [0, 1, 3],
    "d_inner": [1, 24, 65],
    "masked_rows": ["zero", "uniform"],
    "summary_type": ["last", "first", "mean", "cls_index"],
    "summary_use_proj": [True, False],
    "output": ["last", "hidden_states", "attentions"],
    "inputs_embeds": [False, True],
    "labels": [False, True],
    "tie_word_embeddings": [True, False],
    "layer_norm_eps": [1e-12, 1e-5],
    "checkpointing": [False, True],
}
# Only the language model and the encoder take positions and ranks.
OWN_ORDER = ("XLNetModel", "XLNetLMHeadModel")


def excluded(pair: dict[str, Any]) -> bool:
    """What no call can have at once."""
    head, targets = pair.get("head"), pair.get("targets", "none")
    return (
        (head is not None and head not in OWN_ORDER and (pair.get("order") == "ranks" or targets == "positions"))
        or (head == "XLNetForQuestionAnswering" and targets != "none")
        or (head == "XLNetModel" and pair.get("labels", False))
        or (pair.get("output") == "attentions" and targets == "positions")
        or (pair.get("mask") == "none" and pair.get("input_mask", False))
        or (pair.get("bi_data", False) and pair.get("shape", (2, 1))[0] % 2 == 1)
    )


SEED = 50
COUNT = 400 if os.environ.get("PYXLBERT_TEST_ALL") == "1" else 40
QUICK = 5  # of them, in `make quick`
CASES = pairwise_cases(OPTIONS, seed=SEED, count=COUNT, excluded=excluded)
VOCAB, CHOICES = 53, 3


def test_the_cases_are_a_covering() -> None:
    assert uncovered_pairs(OPTIONS, CASES, excluded) == 0


class Columns:
    """A mask [T, Tk] which, indexed as transformers does it, has room for every sequence.

    Its own has room for one, and adding the padding of several to it raises an error.
    """

    def __init__(self, mask: torch.Tensor, batch: int) -> None:
        self.mask, self.batch = mask, batch

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.mask[index].repeat(1, 1, self.batch, 1)


def repaired(theirs: torch.nn.Module, batch: int) -> None:
    """Makes two of the oracle's paths run at all: one-directional with several sequences, float64 with two streams."""
    encoder = getattr(theirs, "transformer", theirs)
    create_mask, encode = encoder.create_mask, encoder.relative_positional_encoding
    encoder.create_mask = lambda *lengths: Columns(create_mask(*lengths), batch)
    encoder.relative_positional_encoding = lambda *a, **k: encode(*a, **k).to(encoder.dtype)


def pair_of_models(case: dict[str, Any], index: int, rows: int, g: torch.Generator):
    heads, size = case["heads"]
    names = (*("attn_type", "same_length", "clamp_len", "untie_r", "mem_len", "reuse_len", "ff_activation"),)
    names += ("n_layer", "d_inner", "summary_type", "summary_use_proj", "tie_word_embeddings", "layer_norm_eps")
    fields = {name: case[name] for name in names}
    fields |= {"vocab_size": VOCAB, "d_model": heads * size, "n_head": heads, "dropout": 0.0}
    fields |= {"bi_data": case["bi_data"], "summary_last_dropout": 0.0}
    fields |= {"summary_activation": ["tanh", ""][index % 2], "start_n_top": 1, "end_n_top": 1}
    if case["head"] == "XLNetForSequenceClassification":
        fields |= [
            {"num_labels": 1},
            {"num_labels": 3, "problem_type": "regression"},
            {"num_labels": 4},
            {"num_labels": 3, "problem_type": "multi_label_classification"},
        ][index % 4]
    elif case["head"] == "XLNetForTokenClassification":
        fields |= {"num_labels": 5}
    elif case["head"] == "XLNetForQuestionAnswering" and case["shape"][1] > 8:
        fields |= {"start_n_top": 3, "end_n_top": 2}
    theirs = getattr(transformers, case["head"])(transformers.XLNetConfig(**fields))
    randomize(theirs, g)
    if not case["untie_r"]:
        layers = getattr(theirs, "transformer", theirs).layer
        with torch.no_grad():
            for layer in layers[1:]:
                for name in ("r_r_bias", "r_s_bias", "r_w_bias"):
                    getattr(layer.rel_attn, name).copy_(getattr(layers[0].rel_attn, name))
    own = {"masked_rows": case["masked_rows"], "summary_at_padding": True}
    ours = getattr(models, case["head"])(models.XLNetConfig(**fields, **own))
    ours.load_state_dict(theirs.state_dict())
    if case["checkpointing"]:
        ours.gradient_checkpointing_enable()
    repaired(theirs, rows)
    return theirs.train(), ours.train()


def random_tokens(kind: str, batch: int, length: int, least: int, g: torch.Generator) -> torch.Tensor:
    """Bool [B, T], True where a token is."""
    if kind in ("left", "right"):
        lengths = torch.randint(least, length + 1, (batch, 1), generator=g)
        tokens = torch.arange(length) < lengths
        return tokens if kind == "right" else tokens.flip(1)
    if kind == "holes":
        tokens = torch.rand(batch, length, generator=g) < 0.6
        tokens[:, -least:] |= tokens.sum(1, keepdim=True) < least
        return tokens
    return torch.ones(batch, length, dtype=torch.bool)


def random_order(case, tokens: torch.Tensor, memory: int, g: torch.Generator) -> tuple[torch.Tensor, ...]:
    """query_rank, key_rank and the perm_mask that says the same; or a perm_mask that no ranks can say."""
    batch, length = tokens.shape
    query_rank, key_rank = (torch.randint(-1, length, (batch, length), generator=g).int() for _ in range(2))
    blocked = query_rank[:, :, None] <= key_rank[:, None, :]
    if case["order"] == "dense":
        blocked = torch.rand(batch, length, length, generator=g) < 0.5
    if case["masked_rows"] == "zero" or case["attn_type"] == "uni":
        # transformers averages where nothing may be seen; one-directional, its table ends before the later keys of such
        # a row, whose scores and gradients are then another row's. Every row of a token sees itself at least.
        numbers = torch.arange(memory + length)
        places = torch.arange(length)[:, None]
        visible = torch.nn.functional.pad(~blocked & tokens[:, None, :], (memory, 0), value=True)
        if case["attn_type"] == "uni":
            visible = visible & (numbers <= places + memory)
            if case["same_length"]:
                visible = visible & (numbers >= places)
        stuck = ~visible.any(2) & tokens
        blocked = blocked & ~torch.diag_embed(stuck)
        if case["order"] == "ranks":
            query_rank = torch.where(stuck, key_rank + 1, query_rank)
            blocked = query_rank[:, :, None] <= key_rank[:, None, :]
    return query_rank, key_rank, blocked.float()


def random_targets(kind: str, tokens: torch.Tensor, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A mapping [B, M, T] and, where it is one-hot, the positions that say the same."""
    batch, length = tokens.shape
    count = max(1, length // 2)
    positions = torch.full((batch, count), -1)
    for row, real in enumerate(tokens):
        places = real.nonzero().squeeze(1)
        chosen = places[torch.randperm(len(places), generator=g)][: max(1, count - row)]
        positions[row, : len(chosen)] = chosen
    mapping = F.one_hot(positions.clamp(min=0), length).float() * (positions >= 0)[..., None]
    if kind == "other" and torch.rand((), generator=g) < 0.5:
        mapping = torch.rand(mapping.shape, generator=g) * tokens[:, None, :]
    elif kind == "other":
        mapping = torch.cat([mapping, mapping[:, :1]], dim=1)
    return mapping, positions


def random_arguments(case, tokens: torch.Tensor, config, g: torch.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments for both; theirs say everything by masks and mappings."""
    rows, length = tokens.shape
    both: dict[str, Any] = {"use_mems": case["use_mems"]}
    if case["output"] != "last":
        both[f"output_{case['output']}"] = True
    if case["mems"]:
        memory = torch.randn(config.n_layer, case["mems"], rows, config.d_model, generator=g)
        both["mems"] = tuple(memory) if config.n_layer else None
    own: dict[str, Any] = {}
    per_row: dict[str, Any] = {}
    if case["types"]:
        per_row["token_type_ids"] = torch.randint(case["types"], (rows, length), generator=g)
    if case["inputs_embeds"]:
        per_row["inputs_embeds"] = torch.randn(rows, length, config.d_model, generator=g)
    else:
        # All different, so that no two answers are as good.
        per_row["input_ids"] = torch.stack([torch.randperm(VOCAB, generator=g)[:length] for _ in range(rows)])
    if case["mask"] != "none":
        per_row |= {"input_mask": (~tokens).float()} if case["input_mask"] else {"attention_mask": tokens.float()}
    if case["head"] == "XLNetForMultipleChoice":
        per_row = {name: value.unflatten(0, (rows // CHOICES, CHOICES)) for name, value in per_row.items()}
    theirs = both | per_row
    ours = dict(theirs)
    if case["order"] != "none":
        # Without layers transformers takes mems of any length to be none.
        memory = case["mems"] if config.n_layer else 0
        own["query_rank"], own["key_rank"], theirs["perm_mask"] = random_order(case, tokens, memory, g)
        ours |= own if case["order"] == "ranks" else {"perm_mask": theirs["perm_mask"]}
    if case["targets"] != "none":
        theirs["target_mapping"], positions = random_targets(case["targets"], tokens, g)
        by_position = case["targets"] == "positions"
        ours |= {"target_positions": positions} if by_position else {"target_mapping": theirs["target_mapping"]}
    if case["labels"]:
        labels = random_labels(case["head"], config, theirs, tokens, g)
        ours, theirs = ours | labels, theirs | labels
    if case["head"] == "XLNetForQuestionAnswering":
        masked = torch.rand(rows, length, generator=g) < 0.2
        masked &= tokens.sum(1, keepdim=True) - masked.sum(1, keepdim=True) >= 4
        ours["p_mask"] = masked.float()
        # Ours leaves padding out of the answers by itself.
        theirs["p_mask"] = (masked | ~tokens).float()
    return ours, theirs


def random_labels(head: str, config, given: dict[str, Any], tokens: torch.Tensor, g: torch.Generator) -> dict[str, Any]:
    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=g)

    rows, length = tokens.shape
    if head in ("XLNetLMHeadModel", "XLNetForTokenClassification"):
        classes = VOCAB if head == "XLNetLMHeadModel" else config.num_labels
        if "target_mapping" in given:
            return {"labels": integers(classes, *given["target_mapping"].shape[:2])}
        some = tokens & (torch.rand(rows, length, generator=g) < 0.7)
        some[0, tokens[0].long().argmax()] = True
        return {"labels": integers(classes, rows, length).masked_fill(~some, -100)}
    if head == "XLNetForMultipleChoice":
        return {"labels": integers(CHOICES, rows // CHOICES)}
    if head.startswith("XLNetForQuestionAnswering"):
        wide = tokens if "target_mapping" not in given else torch.ones(given["target_mapping"].shape[:2])
        spans = {
            "start_positions": wide.long().argmax(1),
            "end_positions": wide.shape[1] - 1 - wide.long().flip(1).argmax(1),
        }
        if head == "XLNetForQuestionAnswering" and rows > 1:
            spans |= {"cls_index": tokens.long().argmax(1), "is_impossible": integers(2, rows).float()}
        return spans
    if head == "XLNetForSequenceClassification":
        if config.num_labels == 1:
            return {"labels": torch.randn(rows, generator=g)}
        if config.problem_type == "regression":
            return {"labels": torch.randn(rows, config.num_labels, generator=g)}
        if config.problem_type == "multi_label_classification":
            return {"labels": integers(2, rows, config.num_labels).float()}
        return {"labels": integers(config.num_labels, rows)}
    return {}


def named_outputs(output: Any, tokens: torch.Tensor, targets: bool) -> Results:
    """Every output tensor but the loss; what stands at padding is set to zero, ours and theirs alike."""
    found: Results = {}
    for name, value in output.items():
        if name == "attentions":
            flat = [one for layer in value for one in (layer if isinstance(layer, tuple) else (layer,))]
            found |= {f"attentions.{i}": one * tokens[:, None, :, None] for i, one in enumerate(flat)}
        elif name in ("hidden_states", "mems"):
            found |= {f"{name}.{i}": one for i, one in enumerate(value)}
        elif name != "loss":
            found[name] = value
    for name, value in found.items():
        content = name.startswith("hidden_states") and (not targets or int(name.split(".")[1]) % 2 == 0)
        by_token = name in ("last_hidden_state", "start_logits", "end_logits") or (
            name == "logits" and value.dim() == 3
        )
        if content or (by_token and not targets):
            found[name] = torch.where(tokens if value.dim() == 2 else tokens[..., None], value, 0.0)
    return found


def loss_of(output: Any, arguments: dict[str, Any], tokens: torch.Tensor, case: dict[str, Any]) -> torch.Tensor | None:
    """The oracle's loss. Where there is padding, its span logits must not take part: ours have none there."""
    if "start_positions" not in arguments or case["head"] != "XLNetForQuestionAnsweringSimple":
        return output.get("loss")
    if "target_mapping" in arguments:
        return output.get("loss")
    losses = [
        F.cross_entropy(logits.masked_fill(~tokens, -math.inf), places)
        for logits, places in (
            (output.start_logits, arguments["start_positions"]),
            (output.end_logits, arguments["end_positions"]),
        )
    ]
    return sum(losses) / 2


def as_tied(found: Results, untie_r: bool) -> Results:
    """The gradients of what the layers share, added up as where it is one parameter."""
    if untie_r:
        return found
    shared = [name for name in found if name.startswith("d ") and name.endswith(("r_r_bias", "r_s_bias", "r_w_bias"))]
    kept = {name: value for name, value in found.items() if name not in shared}
    for name in shared:
        before, layer, after = name.partition("layer.")[0], "layer.0", name[name.index(".rel_attn") :]
        first = f"{before}{layer}{after}"
        kept[first] = kept[first] + found[name] if first in kept else found[name]
    return kept


def to_double(arguments: dict[str, Any]) -> dict[str, Any]:
    def double(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(double(one) for one in value)
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {name: double(value) for name, value in arguments.items()}


@pytest.mark.parametrize("index", [pytest.param(i, marks=pytest.mark.quick if i < QUICK else ()) for i in range(COUNT)])
def test_against_transformers(index: int) -> None:
    case = CASES[index]
    g = torch.Generator().manual_seed(index)
    batch, length = case["shape"]
    rows = batch * CHOICES if case["head"] == "XLNetForMultipleChoice" else batch
    theirs, ours = pair_of_models(case, index, rows, g)
    tokens = random_tokens(case["mask"], rows, length, min(4, length), g)
    own_arguments, arguments = random_arguments(case, tokens, ours.config, g)
    targets = "target_mapping" in arguments

    def run(model: torch.nn.Module, arguments: dict[str, Any], cotangents: Results) -> Results:
        found = results(
            model,
            arguments,
            cotangents,
            lambda output: named_outputs(output, tokens, targets),
            lambda output: output.get("loss") if model is ours else loss_of(output, arguments, tokens, case),
        )
        return found if model is ours else as_tied(found, case["untie_r"])

    cotangents = random_cotangents(run(theirs, arguments, {}), g)
    plain = run(theirs, arguments, cotangents)
    truth = run(theirs.double(), to_double(arguments), cotangents)
    within_budget(case, run(ours, own_arguments, cotangents), plain, truth)
