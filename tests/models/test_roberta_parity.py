"""RobertaModel and its heads against transformers, XLM-RoBERTa and CamemBERT among them: forward and all gradients."""

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

HEADS = ["RobertaModel", *sorted(name for name in models.__all__ if name.startswith("RobertaFor"))]
PREFIXES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
OPTIONS = {
    "head": HEADS,
    "model_type": list(PREFIXES),
    "mask": ["none", "right", "holes", "dense"],
    "heads": [(1, 8), (3, 8), (2, 17)],  # number, size
    "shape": [(1, 1), (2, 7), (3, 12)],  # B, T
    "hidden_act": ["gelu", "relu"],
    "num_hidden_layers": [0, 2],
    "types": [1, 2],  # 1: not given
    "pad_token_id": [0, 1, 7],
    "padding_among_tokens": [False, True],  # ids that are the padding's, whatever the mask says
    "output": ["last", "hidden_states", "attentions"],
    "position_ids": [False, True],
    "inputs_embeds": [False, True],
    "labels": [False, True],
    "tie_word_embeddings": [True, False],
    "checkpointing": [False, True],
    "sparse_prediction": [False, True],
}


def excluded(pair: dict[str, Any]) -> bool:
    """What no call can have at once."""
    head = pair.get("head")
    return (
        (head == "RobertaModel" and pair.get("labels", False))
        or (head == "RobertaForMultipleChoice" and pair.get("mask") == "dense")
        or (head is not None and head != "RobertaForMaskedLM" and pair.get("sparse_prediction", False))
    )


COUNT = 200 if os.environ.get("PYXLBERT_TEST_ALL") == "1" else 30
CASES = pairwise_cases(OPTIONS, seed=9, count=COUNT, excluded=excluded)


def test_the_cases_are_a_covering() -> None:
    assert uncovered_pairs(OPTIONS, CASES, excluded) == 0


def pair_of_models(case: dict[str, Any], index: int, g: torch.Generator):
    heads, size = case["heads"]
    fields = {
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
        "hidden_size": heads * size,
        "num_attention_heads": heads,
        "intermediate_size": 24,
        "type_vocab_size": case["types"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **classification(case, index),
    }
    names = ("hidden_act", "num_hidden_layers", "pad_token_id", "tie_word_embeddings")
    fields |= {name: case[name] for name in names}
    prefix = PREFIXES[case["model_type"]]
    oracle = getattr(transformers, case["head"].replace("Roberta", prefix))
    theirs = oracle(getattr(transformers, f"{prefix}Config")(**fields, attn_implementation="eager"))
    randomize(theirs, g)
    config = models.RobertaConfig.from_dict(
        {"model_type": case["model_type"]}, **fields, sparse_prediction=case["sparse_prediction"]
    )
    ours = getattr(models, case["head"])(config)
    if not case["tie_word_embeddings"] and hasattr(theirs, "lm_head"):
        # Untied, transformers keeps a second bias that it never reads; ours is one.
        theirs.lm_head.bias = theirs.lm_head.decoder.bias
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    if case["checkpointing"]:
        ours.gradient_checkpointing_enable()
    return theirs.train(), ours.train()


@pytest.mark.parametrize("index", range(COUNT))
def test_against_transformers(index: int) -> None:
    case = CASES[index]
    g = torch.Generator().manual_seed(index)
    theirs, ours = pair_of_models(case, index, g)
    arguments = random_arguments(case, ours.config, g)
    if case["padding_among_tokens"] and "input_ids" in arguments:
        ids = arguments["input_ids"]
        arguments["input_ids"] = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.3, case["pad_token_id"])
    mask = arguments.get("attention_mask")
    padded = mask is not None and mask.dim() == (3 if case["head"] == "RobertaForMultipleChoice" else 2)
    tokens = mask.bool().reshape(-1, mask.shape[-1]) if padded else None

    def found(model, given, cotangents) -> dict[str, torch.Tensor]:
        # Of a parameter with two names, which one is listed differs from class to class.
        same = {f"d {name}": f"d {other}" for name, other in ours.tied_names().items()}
        results = run(model, given, case, tokens, cotangents, oracle=model is theirs)
        return {same.get(name, name): value for name, value in results.items()}

    plain_arguments = for_transformers(arguments, torch.float32)
    cotangents = random_cotangents(found(theirs, plain_arguments, {}), g)
    plain = found(theirs, plain_arguments, cotangents)
    truth = found(theirs.double(), for_transformers(arguments, torch.float64), cotangents)
    within_budget(case, found(ours, arguments, cotangents), plain, truth)
