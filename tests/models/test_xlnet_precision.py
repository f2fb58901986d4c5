"""XLNet in bfloat16, float16, under autocast and in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from small_xlnet import IDS, MAPPING, MASK, PERM_MASK, SMALL, build, gradients

from pyxlbert.models import (
    XLNetForQuestionAnswering,
)
from pyxlbert.testing import compare
from pyxlbert.testing.models import randomize


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("two", [False, True])
def test_low_precision_errs_no_more_than_transformers(how: str, two: bool) -> None:
    g = torch.Generator().manual_seed(0)
    fields = SMALL | {"n_layer": 4, "d_model": 48, "n_head": 4}
    theirs = transformers.XLNetModel(transformers.XLNetConfig(**fields)).eval()
    randomize(theirs, g)
    ours = build(**fields)
    ours.load_state_dict(theirs.state_dict())
    truth, encode = copy.deepcopy(theirs).double(), theirs.relative_positional_encoding
    for model in (theirs, truth):
        # Its two streams mix dtypes otherwise, and raise.
        model.relative_positional_encoding = lambda *a, m=model, **k: encode(*a, **k).to(m.dtype)
    if how != "autocast":
        ours, theirs = ours.to(getattr(torch, how)), theirs.to(getattr(torch, how))
    direction = torch.randn(4, 2 if two else 7, 48, generator=g)
    results = []
    for model in (ours, theirs, truth):
        own = {"perm_mask": PERM_MASK.to(model.dtype), "target_mapping": MAPPING.to(model.dtype)} if two else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and model is not truth):
            output = model(IDS, **own)
        (output.last_hidden_state * direction.to(output.last_hidden_state.dtype)).sum().backward()
        results.append((output, gradients(model)))
    (mine, dmine), (plain, dplain), (exact, dexact) = results
    assert mine[0].dtype == (torch.float32 if how == "autocast" else getattr(torch, how))
    compare.within_budget("states", mine[0].detach(), plain[0].detach().to(mine[0].dtype), exact[0].detach())
    compare.within_budget("gradients", dmine, dplain, dexact)
    assert all(m.dtype == mine[0].dtype for m in mine.mems)


def test_float64() -> None:
    model = build()
    truth = copy.deepcopy(model).double()
    theirs = transformers.XLNetModel(transformers.XLNetConfig(**SMALL)).double().eval()
    theirs.load_state_dict(truth.state_dict())
    compare.close("states", truth(IDS)[0], theirs(IDS)[0], compare.tolerances.FLOAT64)


def test_float16_masks_logits_with_what_it_can_hold() -> None:
    model = build(XLNetForQuestionAnswering).half()
    output = model(IDS, MASK, p_mask=1 - MASK)
    assert output.start_top_log_probs.isfinite().all() and output.cls_logits.isfinite().all()
