"""Whole models on every device that is here: as near to float64 on backend "torch" as `transformers` in float32 is.

On a GPU the ops take the backends that a user gets there; tests/models has the options, on the CPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import pyxlbert
from pyxlbert import models
from pyxlbert.testing import tolerances
from pyxlbert.testing.models import random_cotangents, randomize, results, within_budget

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SIZES = {
    "bert": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
}


def pair(name: str, folder) -> tuple[torch.nn.Module, torch.nn.Module]:
    """`transformers`' model with random weights and without dropout, and ours with the same."""
    kinds = {
        "bert": (transformers.BertConfig, transformers.BertForMaskedLM, models.BertForMaskedLM),
        "xlnet": (transformers.XLNetConfig, transformers.XLNetLMHeadModel, models.XLNetLMHeadModel),
    }
    config, original, ours = kinds[name]
    quiet = {"dropout": 0.0} if name == "xlnet" else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    hf = original(config(vocab_size=120, **SIZES[name], **quiet))
    randomize(hf, torch.Generator().manual_seed(0))
    hf.save_pretrained(folder)
    return hf.train(), ours.from_pretrained(folder).train()


def inputs(name: str, padded: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = {
        "input_ids": torch.randint(5, 120, (3, 45), generator=generator),
        "token_type_ids": (torch.arange(45) > 20).long().expand(3, 45),
    }
    if padded:
        lengths = torch.tensor([45, 20, 33])
        given["attention_mask"] = (torch.arange(45)[None] < lengths[:, None]).long()
    if name == "xlnet":
        rank = torch.stack([torch.randperm(45, generator=generator) for _ in range(3)])
        given["perm_mask"] = (rank[:, :, None] <= rank[:, None, :]).float()
        positions = torch.randint(0, 20, (3, 7), generator=generator)
        given["target_mapping"] = torch.nn.functional.one_hot(positions, 45).float()
    return given


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", ["bert", "xlnet"])
@pytest.mark.parametrize("device", DEVICES)
def test_outputs_and_gradients(device: str, name: str, padded: bool, tmp_path) -> None:
    hf, ours = pair(name, tmp_path)
    given = inputs(name, padded)
    real = given.get("attention_mask", torch.ones(3, 45)).bool()

    def outputs(output) -> dict[str, torch.Tensor]:
        # What stands at padding is nobody's; XLNet's outputs are those of the targets.
        return {"logits": output.logits if name == "xlnet" else output.logits[real.to(output.logits.device)]}

    options = {"use_mems": False} if name == "xlnet" else {}
    with torch.no_grad():
        probe = outputs(hf(**given, **options))
    cotangents = random_cotangents(probe, torch.Generator().manual_seed(2))
    plain = results(hf, given | options, cotangents, outputs, lambda output: None)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
    with pyxlbert.use_backend("torch"):
        truth = results(copy.deepcopy(ours).double(), wide | options, cotangents, outputs, lambda output: None)
    ours = ours.to(device)
    moved = {n: x.to(device) for n, x in given.items()}
    found = results(ours, moved | options, {n: x.to(device) for n, x in cotangents.items()}, outputs, lambda _: None)
    found = {n: x.cpu() for n, x in found.items()}
    plain = {n: plain[n] for n in truth}
    within_budget(f"{name} on {device}", found, plain, truth)


@pytest.mark.parametrize("name", ["bert", "xlnet"])
@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_as_near_as_bfloat16_allows(device: str, name: str, tmp_path) -> None:
    hf, ours = pair(name, tmp_path)
    given = inputs(name, True)
    options = {"use_mems": False} if name == "xlnet" else {}
    real = given["attention_mask"].bool()
    with torch.no_grad():
        truth = hf(**given, **options).logits
        moved = {n: x.to(device) for n, x in given.items()}
        low = ours.to(device).bfloat16()(**moved, **options).logits.float().cpu()
    if name == "bert":
        truth, low = truth[real], low[real]
    assert float((low - truth).norm() / truth.norm()) < tolerances.MODEL_BFLOAT16
