"""BertModel and every head against transformers: random small configurations, forward and all gradients."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import transformers
from family import POSITIONS, VOCAB, classification, for_transformers, random_arguments, run

from pyxlbert import models
from pyxlbert.testing.models import random_cotangents, randomize, within_budget
from pyxlbert.testing.pairwise import pairwise_cases, uncovered_pairs

OPTIONS = {
    "head": [
        "BertModel",
        "BertForPreTraining",
        "BertForMaskedLM",
        "BertForNextSentencePrediction",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForMultipleChoice",
    ],
    "mask": ["none", "right", "holes", "dense"],
    "heads": [(1, 8), (3, 8), (2, 17), (4, 16)],  # number, size
    "shape": [(1, 1), (2, 7), (3, 12), (1, 33)],  # B, T
    "hidden_act": ["gelu", "gelu_new", "relu", "silu"],
    "num_hidden_layers": [0, 1, 3],
    "intermediate_size": [1, 24, 65],
    "types": [1, 2, 5],  # 1: not given
    "pad_token_id": [0, None, 3],
    "output": ["last", "hidden_states", "attentions"],
    "position_ids": [False, True],
    "inputs_embeds": [False, True],
    "labels": [False, True],
    "tie_word_embeddings": [True, False],
    "layer_norm_eps": [1e-12, 1e-5],
    "checkpointing": [False, True],
    "sparse_prediction": [False, True],
}
VOCABULARY = ("BertForPreTraining", "BertForMaskedLM")


def excluded(pair: dict[str, Any]) -> bool:
    """What no call can have at once."""
    head = pair.get("head")
    return (
        (head == "BertModel" and pair.get("labels", False))
        or (head == "BertForMultipleChoice" and pair.get("mask") == "dense")
        or (head is not None and head not in VOCABULARY and pair.get("sparse_prediction", False))
    )


SEED = 52
COUNT = 400 if os.environ.get("PYXLBERT_TEST_ALL") == "1" else 40
QUICK = 5  # of them, in `make quick`
CASES = pairwise_cases(OPTIONS, seed=SEED, count=COUNT, excluded=excluded)


def test_the_cases_are_a_covering() -> None:
    assert uncovered_pairs(OPTIONS, CASES, excluded) == 0


def pair_of_models(case: dict[str, Any], index: int, g: torch.Generator):
    heads, size = case["heads"]
    fields = {
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
        "hidden_size": heads * size,
        "num_attention_heads": heads,
        "type_vocab_size": case["types"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **classification(case, index),
    }
    names = ("hidden_act", "num_hidden_layers", "intermediate_size", "pad_token_id", "tie_word_embeddings")
    fields |= {name: case[name] for name in (*names, "layer_norm_eps")}
    theirs = getattr(transformers, case["head"])(transformers.BertConfig(**fields, attn_implementation="eager"))
    randomize(theirs, g)
    ours = getattr(models, case["head"])(models.BertConfig(**fields, sparse_prediction=case["sparse_prediction"]))
    if not case["tie_word_embeddings"] and hasattr(theirs, "cls") and hasattr(theirs.cls, "predictions"):
        # Untied, transformers keeps a second bias that it never reads; ours is one.
        theirs.cls.predictions.bias = theirs.cls.predictions.decoder.bias
    ours.load_state_dict(theirs.state_dict())
    if case["checkpointing"]:
        ours.gradient_checkpointing_enable()
    return theirs.train(), ours.train()


@pytest.mark.parametrize("index", [pytest.param(i, marks=pytest.mark.quick if i < QUICK else ()) for i in range(COUNT)])
def test_against_transformers(index: int) -> None:
    case = CASES[index]
    g = torch.Generator().manual_seed(index)
    theirs, ours = pair_of_models(case, index, g)
    arguments = random_arguments(case, ours.config, g)
    mask = arguments.get("attention_mask")
    padded = mask is not None and mask.dim() == (3 if case["head"] == "BertForMultipleChoice" else 2)
    tokens = mask.bool().reshape(-1, mask.shape[-1]) if padded else None

    plain_arguments = for_transformers(arguments, torch.float32)
    probe = run(theirs, plain_arguments, case, tokens, {}, oracle=True)
    cotangents = random_cotangents(probe, g)
    plain = run(theirs, plain_arguments, case, tokens, cotangents, oracle=True)
    truth = run(theirs.double(), for_transformers(arguments, torch.float64), case, tokens, cotangents, oracle=True)
    ours_results = run(ours, arguments, case, tokens, cotangents, oracle=False)
    within_budget(case, ours_results, plain, truth)
