"""Cross entropy over a vocabulary in chunks: against float64, in every kind of decoder, and what it takes of memory."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pyxlbert.nn import Linear, linear_cross_entropy, vocabulary_loss
from pyxlbert.nn import vocabulary_loss as _function
from pyxlbert.testing import compare
from pyxlbert.testing.tolerances import FLOAT64

MODULE = sys.modules[_function.__module__]
N, E, V = 150, 24, 97  # three chunks of at most 64 rows


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(MODULE, "_LOGITS_AT_ONCE", 1)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((N, E), (V, E), (V,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype), torch.randint(V, (N,), generator=g)


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def with_gradients(loss, tensors: tuple[torch.Tensor, ...], labels: torch.Tensor) -> list[torch.Tensor]:
    leaves = [one.detach().clone().requires_grad_() for one in tensors]
    value = loss(*leaves, labels)
    (3 * value).backward()
    return [value.detach(), *(one.grad for one in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_loss_and_gradients_against_float64(dtype: torch.dtype) -> None:
    *tensors, labels = inputs(dtype)
    ours = with_gradients(linear_cross_entropy, tensors, labels)
    truth = with_gradients(plain, [one.double() for one in tensors], labels)
    if dtype is torch.float64:
        for a, b in zip(ours, truth, strict=True):
            compare.close("float64", a, b, FLOAT64)
        return
    usual = with_gradients(plain, tensors, labels)
    assert ours[0].dtype == torch.float32
    # The loss is one number, which plain PyTorch may have exact by luck: its terms are the losses of the rows.
    terms = [float(truth[0]) * 4, None, None, None]
    for name, a, b, t, scale in zip(("loss", "dx", "dweight", "dbias"), ours, usual, truth, terms, strict=True):
        compare.within_budget(name, a, b, t, terms=scale)


def test_half_precision_gradients_are_not_lost() -> None:
    """In float16 the mean's gradient of a logit, 1 / (N V) and less, would be nothing."""
    *tensors, labels = inputs(torch.float16)
    x, weight, bias = (one.requires_grad_() for one in tensors)
    (1024 * linear_cross_entropy(x, weight * 0, bias * 0, labels)).backward()
    wanted = torch.full((V,), 1024 / V) - labels.bincount(minlength=V) * 1024 / N
    compare.close("dbias", bias.grad, torch.zeros(V), 0.0)
    leaf = torch.zeros(V, dtype=torch.float16, requires_grad=True)
    (1024 * linear_cross_entropy(x.detach(), torch.zeros_like(weight), leaf, labels)).backward()
    compare.close("dbias", leaf.grad, wanted, compare.tolerances.MODEL_BFLOAT16)


def test_what_is_frozen_gets_no_gradient() -> None:
    x, weight, bias, labels = inputs(torch.float32)
    full = with_gradients(linear_cross_entropy, (x, weight, bias), labels)
    for index in range(3):
        leaves = [one.clone().requires_grad_(place == index) for place, one in enumerate((x, weight, bias))]
        (3 * linear_cross_entropy(*leaves, labels)).backward()
        compare.same_bits("gradient", leaves[index].grad, full[index + 1])
        assert all(one.grad is None for place, one in enumerate(leaves) if place != index)
    assert not linear_cross_entropy(x, weight, None, labels).requires_grad


def test_no_rows() -> None:
    decoder = Linear(E, V)
    rows = torch.zeros(0, E, requires_grad=True)
    loss = vocabulary_loss(decoder, rows, torch.zeros(0, dtype=torch.int64))
    assert math.isnan(loss.item()) and loss.dtype == torch.float32
    loss.backward()
    assert rows.grad.shape == rows.shape and not decoder.weight.grad.any()
    with torch.no_grad():
        assert math.isnan(vocabulary_loss(decoder, rows, torch.zeros(0, dtype=torch.int64)))


def test_autocast_computes_in_its_dtype() -> None:
    *tensors, labels = inputs(torch.float32)

    def cast(loss):
        def run(*arguments):
            with torch.autocast("cpu", torch.bfloat16):
                return loss(*arguments)

        return run

    ours = with_gradients(cast(linear_cross_entropy), tensors, labels)
    usual = with_gradients(cast(plain), tensors, labels)
    truth = with_gradients(plain, [one.double() for one in tensors], labels)
    for name, a, b, t in zip(("dx", "dweight", "dbias"), ours[1:], usual[1:], truth[1:], strict=True):
        assert a.dtype == torch.float32
        # The terms are those of bfloat16, in which the products are.
        compare.within_budget(name, a, b, t)
    compare.close("loss", ours[0], truth[0], compare.tolerances.MODEL_BFLOAT16)


class Doubled(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["subclass", "hook"])
def test_a_decoder_of_another_kind_is_called(kind: str) -> None:
    x, weight, bias, labels = inputs(torch.float32)
    decoder, calls = (Doubled if kind == "subclass" else Linear)(E, V), []
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.copy_(bias)
    if kind == "hook":
        decoder.register_forward_hook(lambda module, arguments, y: 2 * y)
    decoder.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    rows = x.clone().requires_grad_()
    (3 * vocabulary_loss(decoder, rows, labels)).backward()
    assert calls == [64, 64, 22, 22, 64, 64]  # and once more going back
    truth = with_gradients(lambda x, w, b, y: plain(2 * x, w, 2 * b, y), (x, weight, bias), labels)
    for a, b in zip((rows.grad, decoder.weight.grad, decoder.bias.grad), truth[1:], strict=True):
        compare.close(kind, a, b, compare.tolerances.MODEL_GRADIENT_FLOAT32)
    with torch.no_grad():
        compare.close(kind, vocabulary_loss(decoder, x, labels), truth[0], compare.tolerances.MODEL_FLOAT32)


def test_differentiating_twice_is_an_error() -> None:
    *tensors, labels = inputs(torch.float32)
    x, weight, bias = (one.requires_grad_() for one in tensors)
    loss = linear_cross_entropy(x, weight, bias, labels)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: double backward"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("x", torch.zeros(3), ValueError, r"x: got shape \[3\], wanted \[N, E\]"),
        ("x", None, TypeError, "x: got NoneType, wanted a tensor"),
        ("weight", torch.zeros(V, E + 1), ValueError, r"weight: got shape \[97, 25\], wanted \[V, 24\]"),
        ("weight", torch.zeros(V, E).double(), TypeError, "weight: got torch.float64, wanted x's, torch.float32"),
        ("bias", torch.zeros(V + 1), ValueError, r"bias: got shape \[98\], wanted \[97\]"),
        ("labels", torch.zeros(N), TypeError, "labels: got torch.float32, wanted torch.int64"),
        ("labels", torch.zeros(N, 1).long(), ValueError, r"labels: got shape \[150, 1\], wanted \[150\]"),
        ("labels", torch.full((N,), V), ValueError, "labels: got 97, wanted 0 to 96"),
        ("labels", torch.full((N,), -100), ValueError, "labels: got -100, wanted 0 to 96"),
    ],
)
def test_what_is_refused(name: str, value, error, words: str) -> None:
    arguments = dict(zip(("x", "weight", "bias", "labels"), inputs(torch.float32), strict=True))
    with pytest.raises(error, match=f"linear_cross_entropy: {words}"):
        linear_cross_entropy(**arguments | {name: value})


MEMORY = """
import sys
import torch
from torch.nn import functional as F
from pyxlbert.nn import linear_cross_entropy
from pyxlbert.testing.memory import peak_memory
sys.modules[linear_cross_entropy.__module__]._LOGITS_AT_ONCE = 1 << 21
torch.set_num_threads(1)
x, weight, bias = torch.randn(2048, 32), torch.randn(16384, 32), torch.randn(16384)
labels = torch.randint(16384, (2048,))
leaves = [one.requires_grad_() for one in (x, weight, bias)]
def run(loss):
    return torch.autograd.grad(loss(*leaves, labels), leaves)
linear_cross_entropy(*(one[:64].detach() for one in (x, weight, bias)), labels[:64] % 64)
print(peak_memory(lambda: run(linear_cross_entropy)))
print(peak_memory(lambda: run(lambda x, w, b, y: F.cross_entropy(F.linear(x, w, b), y))))
"""


def test_the_logits_of_all_rows_never_exist() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    ours, usual = (int(line) for line in done.stdout.split())
    logits = 2048 * 16384 * 4
    assert usual > 2 * logits
    # A few tensors of a chunk, which has a sixteenth of the rows, and what libraries keep.
    assert ours < logits / 2, (ours, logits)
