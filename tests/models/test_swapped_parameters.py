"""Models in the hands of torch's other ways to move a module: parameters that are swapped, or replaced."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import pytest
import torch
import transformers

import pyxlbert
from pyxlbert import models
from pyxlbert.testing import compare

BERT = {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
XLNET = {"vocab_size": 53, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}
IDS = torch.arange(24).view(2, 12) % 53


def of_transformers() -> torch.nn.Module:
    config = transformers.BertConfig(**BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return pyxlbert.accelerate(transformers.BertForMaskedLM(config))


MADE = {
    "bert": lambda: models.BertForMaskedLM(models.BertConfig(**BERT)),
    "albert": lambda: models.AlbertForMaskedLM(models.AlbertConfig(**BERT, embedding_size=16)),
    "roberta": lambda: models.RobertaForMaskedLM(models.RobertaConfig(**BERT)),
    "xlnet": lambda: models.XLNetLMHeadModel(models.XLNetConfig(**XLNET)),
    "transformers": of_transformers,
}
WAYS = {"swap": torch.__future__.set_swap_module_params_on_conversion}
WAYS["overwrite"] = torch.__future__.set_overwrite_module_params_on_conversion


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    WAYS[request.param](True)
    yield request.param
    WAYS[request.param](False)


def step(model: torch.nn.Module) -> torch.Tensor:
    # Without logits the loss and the table of words have memory that is kept from step to step.
    less = {} if isinstance(model, transformers.PreTrainedModel) else {"output_logits": False}
    loss = model(input_ids=IDS, labels=IDS, **less).loss
    loss.backward()
    return loss.detach()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without"])
def test_a_model_that_has_trained_is_cast_and_goes_on(kind: str, gradients: bool, way: str) -> None:
    torch.manual_seed(0)
    model = MADE[kind]().train()
    for _ in range(2):
        step(model)
    logits(model)  # packs, where that is to gain something
    model.train()
    step(model)
    if not gradients:
        model.zero_grad()
    for one in model.parameters():
        assert not weakref.getweakrefs(one) and (one.grad is None or not weakref.getweakrefs(one.grad))
    plain = copy.deepcopy(model)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        assert {one.dtype for one in model.parameters()} == {dtype}
    rounded = {name: value.bfloat16().float() for name, value in plain.state_dict().items()}
    plain.load_state_dict(rounded)
    compare.same_bits("logits", logits(model), logits(plain))
    for one in (model, plain):
        one.train()
        one.zero_grad()
    torch.manual_seed(1)
    found = step(model)
    torch.manual_seed(1)
    compare.same_bits("loss", found, step(plain))
    if way == "overwrite":
        return  # of tied weights torch makes two parameters
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            compare.same_bits(name, one.grad, other.grad)
