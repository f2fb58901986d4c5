"""AlbertModel and its heads against transformers, forward and all gradients; and what is ALBERT's own."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family import POSITIONS, VOCAB, classification, for_transformers, random_arguments, run
from small_bert import FLOAT32, GRADIENT, IDS, MASK, REAL, SMALL

import pyxlbert
from pyxlbert import models
from pyxlbert.backends import native
from pyxlbert.models import AlbertConfig, AlbertForPreTraining, AlbertModel
from pyxlbert.nn.encoder_layers import PackedLayers
from pyxlbert.testing import compare
from pyxlbert.testing.models import random_cotangents, randomize, within_budget
from pyxlbert.testing.pairwise import pairwise_cases, uncovered_pairs

HEADS = ["AlbertModel", *sorted(name for name in models.__all__ if name.startswith("AlbertFor"))]
OPTIONS = {
    "head": HEADS,
    "mask": ["none", "right", "holes", "dense"],
    "heads": [(1, 8), (3, 8), (2, 17)],  # number, size
    "shape": [(1, 1), (2, 7), (3, 12)],  # B, T
    "embedding_size": [8, 24],
    "layers": [(1, 1, 1), (3, 2, 1), (4, 2, 2)],  # layers, groups, of a group
    "hidden_act": ["gelu_new", "relu"],
    "types": [1, 2],  # 1: not given
    "output": ["last", "hidden_states", "attentions"],
    "position_ids": [False, True],
    "inputs_embeds": [False, True],
    "labels": [False, True],
    "tie_word_embeddings": [True, False],
    "checkpointing": [False, True],
    "sparse_prediction": [False, True],
}
SHARED = {**SMALL, "embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}


def excluded(pair: dict[str, Any]) -> bool:
    """What no call can have at once."""
    head = pair.get("head")
    return (
        (head == "AlbertModel" and pair.get("labels", False))
        or (head == "AlbertForMultipleChoice" and pair.get("mask") == "dense")
        or (head not in (None, "AlbertForMaskedLM", "AlbertForPreTraining") and pair.get("sparse_prediction", False))
    )


COUNT = 200 if os.environ.get("PYXLBERT_TEST_ALL") == "1" else 30
CASES = pairwise_cases(OPTIONS, seed=4, count=COUNT, excluded=excluded)


def test_the_cases_are_a_covering() -> None:
    assert uncovered_pairs(OPTIONS, CASES, excluded) == 0


def pair_of_models(case: dict[str, Any], index: int, g: torch.Generator):
    heads, size = case["heads"]
    layers, groups, inner = case["layers"]
    fields = {
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
        "hidden_size": heads * size,
        "embedding_size": case["embedding_size"],
        "num_attention_heads": heads,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_hidden_groups": groups,
        "inner_group_num": inner,
        "classifier_dropout_prob": 0.0,
        **{name: case[name] for name in ("hidden_act", "tie_word_embeddings")},
        **classification(case, index),
    }
    theirs = getattr(transformers, case["head"])(transformers.AlbertConfig(**fields, attn_implementation="eager"))
    randomize(theirs, g)
    ours = getattr(models, case["head"])(AlbertConfig(**fields, sparse_prediction=case["sparse_prediction"]))
    if not case["tie_word_embeddings"] and hasattr(theirs, "predictions"):
        # Untied, transformers keeps a second bias that it never reads; ours is one.
        theirs.predictions.bias = theirs.predictions.decoder.bias
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
    mask = arguments.get("attention_mask")
    padded = mask is not None and mask.dim() == (3 if case["head"] == "AlbertForMultipleChoice" else 2)
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


def build(head: type = AlbertModel, **fields: Any) -> torch.nn.Module:
    torch.manual_seed(5)
    return head(AlbertConfig(**SHARED | fields)).eval()


def test_a_shared_weight_has_the_sum_of_its_layers_gradients() -> None:
    """A model that uses a layer four times, beside a BERT with four copies of it."""
    narrow = {"num_hidden_groups": 1, "inner_group_num": 1, "hidden_act": "gelu"}
    model = build(**narrow)
    apart = copy.deepcopy(model)
    layer = apart.encoder.albert_layer_groups[0].albert_layers[0]
    copies = [copy.deepcopy(layer) for _ in range(4)]
    apart.encoder.__class__ = type("Apart", (type(apart.encoder),), {"layer": property(lambda self: copies)})
    direction = torch.randn(*IDS.shape, 24, generator=torch.Generator().manual_seed(1)) * REAL[..., None]
    for one in (model, apart):
        (one(IDS, MASK)[0] * direction).sum().backward()
    shared = model.encoder.albert_layer_groups[0].albert_layers[0]
    for name, parameter in shared.named_parameters():
        summed = sum(dict(one.named_parameters())[name].grad for one in copies)
        compare.close(name, parameter.grad, summed, GRADIENT)


@pytest.mark.parametrize("head", HEADS)
def test_files_go_both_ways(head: str, tmp_path: Path) -> None:
    ours = getattr(models, head)(AlbertConfig(**SHARED))
    ours.save_pretrained(tmp_path / "ours")
    theirs, info = getattr(transformers, head).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs")
    again, info = getattr(models, head).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": [], "removed_prefixes": []}
    for name, value in ours.state_dict().items():
        compare.same_bits(name, again.state_dict()[name], value)


def test_an_encoder_goes_into_a_head_and_out(tmp_path: Path) -> None:
    build(AlbertForPreTraining).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"predictions"):
        encoder = AlbertModel.from_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"classifier.weight"):
        head = models.AlbertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    compare.same_bits("pooler", head.albert.pooler.weight, encoder.pooler.weight)


def test_a_checkpoint_with_too_few_groups_is_refused(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights of the encoder: 2, num_hidden_groups is 3"):
        AlbertModel.from_pretrained(tmp_path, num_hidden_groups=3)
    with pytest.raises(ValueError, match=r"lacks weights of the encoder: 2, inner_group_num is 200"):
        AlbertModel.from_pretrained(tmp_path, inner_group_num=200)


@pytest.mark.skipif(native._C is None or native._C.level() == "portable", reason="nothing is packed without AVX2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_run_in_one_call(dtype: torch.dtype, monkeypatch) -> None:
    ran = []
    right = PackedLayers.run
    monkeypatch.setattr(PackedLayers, "run", lambda *given: (ran.append(right(*given)), ran[-1])[1])
    model = build(hidden_size=48, intermediate_size=96, initializer_range=0.1)
    truth = copy.deepcopy(model).double()
    model = pyxlbert.pack(model.to(dtype))
    with torch.no_grad():
        packed = model(IDS, MASK)[0][REAL]
        assert len(ran) == 1 and ran[0] is not None
        exact = truth(IDS, MASK)[0][REAL]
        model.encoder.order = tuple(reversed(model.encoder.order))
        other = model(IDS, MASK)[0][REAL]
        model.encoder.order = tuple(reversed(model.encoder.order))
        pyxlbert.unpack(model)
        plain = model(IDS, MASK)[0][REAL]
    compare.within_budget("states", packed, plain, exact)
    assert not torch.equal(other, packed), "the layers' order is part of what was found"


def test_packed_rows_and_vectors() -> None:
    model = build()
    wanted = model(IDS, MASK)[0]
    rows = [IDS[row][real] for row, real in enumerate(REAL)]
    places = torch.cat([torch.arange(7)[real] for real in REAL])
    cu_seqlens = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0)], dtype=torch.int32)
    packed = model(torch.cat(rows), cu_seqlens=cu_seqlens, position_ids=places)
    compare.close("rows", packed[0], wanted[REAL], FLOAT32)
    vectors = model.get_input_embeddings()(IDS)  # [B, T, embedding_size]
    compare.same_bits("vectors", model(inputs_embeds=vectors, attention_mask=MASK)[0], wanted)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_low_precision_errs_no_more_than_transformers(how: str) -> None:
    torch.manual_seed(0)
    fields = SHARED | {"hidden_size": 48}
    theirs = transformers.AlbertModel(transformers.AlbertConfig(**fields, attn_implementation="eager")).eval()
    ours = AlbertModel(AlbertConfig(**fields)).eval()
    ours.load_state_dict(theirs.state_dict())
    truth, direction = copy.deepcopy(theirs).double(), torch.randn(4, 7, 48)
    if how == "bfloat16":
        ours, theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    results = []
    for model in (ours, theirs, truth):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and model is not truth):
            state = model(IDS[:4], MASK[:4]).last_hidden_state
        (state * direction.to(state.dtype))[REAL[:4]].sum().backward()
        named = sorted((name, p.grad.flatten()) for name, p in model.named_parameters() if p.grad is not None)
        results.append((state.detach()[REAL[:4]], torch.cat([gradient for _, gradient in named])))
    (mine, dmine), (plain, dplain), (exact, dexact) = results
    # Under autocast transformers' states are bfloat16 all the way; ours are in the parameters' dtype.
    compare.within_budget("states", mine, plain.to(mine.dtype), exact)
    compare.within_budget("gradients", dmine, dplain, dexact)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"embedding_size": 0}, "embedding_size: got 0"),
        ({"num_hidden_groups": 0}, "num_hidden_groups: got 0"),
        (
            {"inner_group_num": 600},
            "inner_group_num: got 600 with num_hidden_layers 4, wanted at most 1024 layers in all",
        ),
        ({"classifier_dropout_prob": 2}, "classifier_dropout_prob: got 2"),
    ],
)
def test_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlbertConfig(**SHARED | fields)


def test_depth_counts_the_layers_of_a_group() -> None:
    model = build()
    states = model(IDS, MASK, output_hidden_states=True).hidden_states
    assert len(states) == model.config.depth + 1 == 9
    compare.same_bits("last", states[-1], model(IDS, MASK)[0])


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"num_labels: got 3, wanted 2: two passages are in order or not"):
        build(AlbertForPreTraining, num_labels=3)
    with pytest.raises(ValueError, match=r"inputs_embeds: .*24.*16"):
        build()(inputs_embeds=torch.zeros(1, 3, 24))
