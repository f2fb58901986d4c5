"""BERT in bfloat16, float16, under autocast and in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from small_bert import IDS, SMALL, build, gradients

from pyxlbert import models
from pyxlbert.models import (
    BertConfig,
)
from pyxlbert.testing import compare


def peer(head: str = "BertModel") -> tuple[torch.nn.Module, torch.nn.Module]:
    fields = SMALL | {"num_hidden_layers": 4, "hidden_size": 48}
    theirs = getattr(transformers, head)(transformers.BertConfig(**fields, attn_implementation="eager")).eval()
    ours = getattr(models, head)(BertConfig(**fields)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_low_precision_errs_no_more_than_transformers(how: str) -> None:
    torch.manual_seed(0)
    ours, theirs = peer()
    truth = copy.deepcopy(theirs).double()
    ids = torch.randint(1, 40, (4, 11))
    if how != "autocast":
        ours, theirs = ours.to(getattr(torch, how)), theirs.to(getattr(torch, how))
    direction = torch.randn(4, 11, 48)
    results = []
    for model in (ours, theirs, truth):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and model is not truth):
            output = model(ids, output_hidden_states=True)
        (output.last_hidden_state * direction.to(output.last_hidden_state.dtype)).sum().backward()
        results.append((output, gradients(model)))
    (mine, dmine), (plain, dplain), (exact, dexact) = results
    for name in ("last_hidden_state", "pooler_output"):
        assert mine[name].dtype == plain[name].dtype
        compare.within_budget(name, mine[name].detach(), plain[name].detach(), exact[name].detach())
    assert all(a.dtype == b.dtype for a, b in zip(mine.hidden_states, plain.hidden_states, strict=True))
    compare.within_budget("gradients", dmine, dplain, dexact)


def test_residual_in_float32_halves_the_error() -> None:
    """Of a model with weights of an ordinary size, where the stream's roundings are what adds up."""
    model = build(num_hidden_layers=12, hidden_size=48, intermediate_size=192, initializer_range=0.02)
    ids = torch.randint(1, 40, (8, 11), generator=torch.Generator().manual_seed(0))
    errors = {}
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(ids)[0]
        model.to(torch.bfloat16)
        for stream in (True, False):
            model.config.residual_in_fp32 = stream
            errors[stream] = float((model(ids)[0].double() - truth).norm())
    assert errors[True] < 0.5 * errors[False]


def test_float64() -> None:
    ours, theirs = peer()
    compare.close("states", ours.double()(IDS)[0], theirs.double()(IDS)[0], compare.tolerances.FLOAT64)
