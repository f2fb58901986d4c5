"""`check_op` passes what is right and fails each kind of wrong: a check that cannot fail proves nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pyxlbert
from pyxlbert.testing import check_op
from pyxlbert.testing.specs import SPECS


def layer_norm(x, weight, bias, *, eps=1e-5):
    """The op with what its contract says about bad input."""
    return pyxlbert.layer_norm(x, weight, bias, eps=eps, backend="torch")


def plain(name: str):
    return SPECS[name].plain


def test_the_ops_own_definition_passes() -> None:
    rows = check_op("layer_norm", layer_norm, quick=True)
    assert [(row.dtype, row.direction) for row in rows[:2]] == [("float32", "forward"), ("float32", "backward")]
    assert rows[-1].direction == "bad input" and rows[-1].compared > 5
    assert all(row.verdict == "ok" and row.runner == "layer_norm" for row in rows)


def test_every_case_of_plain_pytorch_passes() -> None:
    """What stands beside every kernel is itself within the budget, without the checks of the public function."""
    for name in ("layer_norm", "bias_gelu"):
        rows = check_op(name, plain(name), dtypes=[torch.float32], bad_input=False)
        assert sum(row.compared for row in rows) > 30


def corner(out: torch.Tensor) -> torch.Tensor:
    """One wrong element, the last."""
    wrong = torch.zeros_like(out).flatten()
    if wrong.numel():
        wrong[-1] = 0.05
    return out + wrong.view_as(out)


def broken(kind: str):
    """`attention` with a fault that a kernel may have."""
    right = plain("attention")

    def attention(query, key, value, **given):
        if kind == "a scale wrong by 0.1 %":
            query = query * 1.001
        elif kind == "a mask off by one" and given.get("key_lengths") is not None:
            given["key_lengths"] = (given["key_lengths"] - 1).clamp(min=0)
        out = right(query, key, value, **given)
        return corner(out) if kind == "one element" else out

    return attention


@pytest.mark.parametrize("kind", ["a scale wrong by 0.1 %", "a mask off by one", "one element"])
def test_a_broken_kernel_fails(kind: str) -> None:
    with pytest.raises(AssertionError, match="times the budget"):
        check_op("attention", broken(kind), dtypes=[torch.float32], bad_input=False)


def test_a_right_one_does_not() -> None:
    check_op("attention", broken("none"), dtypes=[torch.float32], bad_input=False, quick=True)


def test_memory_read_before_it_is_written_fails() -> None:
    def lazy(x, weight, bias, *, eps=1e-5):
        out = torch.empty_like(x)
        found = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return torch.where(torch.zeros_like(x).bool(), out, found) + 0 * out

    with pytest.raises(AssertionError, match="not finite"):
        check_op("layer_norm", lazy, dtypes=[torch.float32], bad_input=False, quick=True)


def test_other_bits_each_time_fail() -> None:
    def noisy(x, weight, bias, *, eps=1e-5):
        out = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return out * (1 + 1e-7 * torch.rand(()))

    with pytest.raises(AssertionError, match="a second run differs"):
        check_op("layer_norm", noisy, dtypes=[torch.float32], bad_input=False, quick=True)


def test_a_written_argument_fails() -> None:
    def careless(x, weight, bias, *, eps=1e-5):
        out = layer_norm(x, weight, bias, eps=eps)
        with torch.no_grad():
            x.mul_(2)
        return out

    with pytest.raises(AssertionError, match="it has written to x"):
        check_op("layer_norm", careless, gradients=False, dtypes=[torch.float32], bad_input=False, quick=True)


def test_silence_about_bad_input_fails() -> None:
    with pytest.raises(AssertionError, match=r"bad input: .*: (got \w+.*, wanted \w+Error|its \w+Error says)"):
        check_op("layer_norm", plain("layer_norm"), dtypes=[torch.float32], quick=True)


def test_without_gradients_none_is_asked_for() -> None:
    def forward_only(x, weight, bias, *, eps=1e-5):
        return layer_norm(x.detach(), weight, bias, eps=eps).detach()

    rows = check_op("layer_norm", forward_only, gradients=False, bad_input=False, quick=True)
    assert {row.direction for row in rows} == {"forward"}
    with pytest.raises(AssertionError, match="does not require grad"):
        check_op("layer_norm", forward_only, bad_input=False, quick=True)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"check_op: name: got 'softmax', wanted one of attention, "):
        check_op("softmax", layer_norm)
    with pytest.raises(ValueError, match=r"check_op: dtypes: got \[torch.float64\], wanted some of torch.float32"):
        check_op("layer_norm", layer_norm, dtypes=[torch.float64])
