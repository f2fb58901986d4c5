"""linear_gelu: the activation as the product's epilogue, and as a pass of its own where a gradient will be asked."""

from __future__ import annotations

import pytest
import torch

import pyxlbert
from pyxlbert.cpu import _onednn
from pyxlbert.testing import compare
from pyxlbert.testing.specs import SPECS


def arguments(dtype: torch.dtype, m: int = 24, n: int = 96, k: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*size, generator=generator).to(dtype) for size in ((m, k), (n, k), (n,))]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("epilogue", [True, False])
def test_epilogue_and_separate_pass_are_both_right(monkeypatch, dtype, approximate: str, epilogue: bool) -> None:
    """Whichever the rule would choose for this processor."""
    monkeypatch.setattr(_onednn, "few_rows", lambda x: False)
    monkeypatch.setattr(_onednn, "torch_is_faster", lambda *_, **__: not epilogue)
    plain = SPECS["linear_gelu"].plain
    given = arguments(dtype)
    ours = pyxlbert.linear_gelu(*given, approximate=approximate, backend="cpu")
    truth = plain(*(t.double() for t in given), approximate=approximate)
    terms = SPECS["linear"].terms(
        "out 0", dict(zip(("x", "weight", "bias"), (t.double() for t in given), strict=True)), (ours,)
    )
    compare.within_budget("gelu", ours, plain(*given, approximate=approximate), truth, terms=terms)


def test_inference_in_low_precision_rounds_once(monkeypatch) -> None:
    """gelu's argument is not rounded on its way: the error is half of what two passes have, or less."""
    monkeypatch.setattr(_onednn, "torch_is_faster", lambda *_, **__: False)
    given = arguments(torch.bfloat16, m=200)
    truth = SPECS["linear_gelu"].plain(*(t.double() for t in given))
    fused = pyxlbert.linear_gelu(*given, backend="cpu")
    two = pyxlbert.linear_gelu(given[0].requires_grad_(), *given[1:], backend="cpu").detach()
    compare.within_budget("fused", fused, truth.bfloat16(), truth, factor=1.0)
    assert (fused.double() - truth).norm() < (two.double() - truth).norm()


@pytest.mark.parametrize("needed", range(1, 8))
def test_only_the_asked_gradients_are_computed_and_only_their_tensors_kept(needed: int) -> None:
    leaves = [t.requires_grad_(bool(needed & 1 << i)) for i, t in enumerate(arguments(torch.float32))]
    y = pyxlbert.linear_gelu(*leaves)
    preactivation, x_kept, weight_kept = y.grad_fn.saved_tensors
    assert preactivation.shape == y.shape
    assert (x_kept is not None) is bool(needed & 2) and (weight_kept is not None) is bool(needed & 1)
    y.sum().backward()
    assert [t.grad is not None for t in leaves] == [t.requires_grad for t in leaves]
