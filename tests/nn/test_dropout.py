"""Dropout by few random bits: whose chance it is, what is dropped how often, and who is left to torch."""

from __future__ import annotations

import pytest
import torch

import pyxlbert
from pyxlbert.nn.dropout import Dropout, dropout
from pyxlbert.ops import _few_bits
from pyxlbert.reference.philox import Tag, philox4x32
from pyxlbert.testing import compare

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_shares_and_scale(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(1)
    x = torch.full((203, 517), 3.0, dtype=dtype, requires_grad=True)  # its elements are no multiple of four
    y = dropout(x, p)
    kept = y != 0
    expected = torch.full((), 3.0 / (1 - round(p * 2**16) / 2**16), dtype=torch.float64)
    assert ((y[kept].double() - expected).abs() <= torch.finfo(dtype).eps * expected).all()
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - p)) < 4 * deviation + 2**-16
    # No row, column or residue modulo four, which share a draw, is dropped more often than others.
    for of in (kept.double().mean(0), kept.double().mean(1)):
        assert float((of - (1 - p)).abs().max()) < 5 * (p * (1 - p) / (x.numel() // len(of))) ** 0.5
    flat = kept.flatten()
    for lane in range(4):
        assert abs(float(flat[lane::4].double().mean()) - (1 - p)) < 8 * deviation + 2**-16
    # Neighbours are independent.
    both = float((flat[1:] & flat[:-1]).double().mean())
    assert abs(both - (1 - p) ** 2) < 8 * ((1 - p) ** 2 / x.numel()) ** 0.5
    y.sum().backward()
    compare.same_bits("gradient", x.grad, y / 3.0 if dtype is torch.float64 else torch.where(kept, x.grad, 0.0))
    assert ((x.grad != 0) == kept).all() and x.grad.dtype is y.dtype is dtype


def test_the_seed_decides_and_threads_do_not() -> None:
    x = torch.randn(300, 1000)
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(5)
            found.append((dropout(x, 0.3), dropout(x.to(torch.bfloat16), 0.3)))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        compare.same_bits("dropout", one, other)
    assert ((found[0][0] == 0) != (found[0][1] == 0)).any()  # the second draw is another


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_dropped_is_zero_whatever_it_was(dtype: torch.dtype, odd: float, native: bool, monkeypatch) -> None:
    if not native:
        monkeypatch.setattr("pyxlbert.nn.dropout.dropped", lambda x, limit: None)
    torch.manual_seed(3)
    x = torch.full((64, 50), odd, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.4)
    zeros = y == 0
    assert 0.3 < float(zeros.double().mean()) < 0.5 and not torch.isfinite(y[~zeros]).any()
    y.backward(torch.full_like(y, odd))
    assert torch.equal(x.grad == 0, zeros) and not torch.isfinite(x.grad[~zeros]).any()


def test_strides_empty_tensors_and_limits() -> None:
    torch.manual_seed(2)
    row = torch.ones(1, 64)
    y = dropout(row.expand(50, -1), 0.5)
    assert y.shape == (50, 64) and (y != y[0]).any()  # every row is drawn by itself
    assert dropout(torch.ones(0, 4), 0.5).shape == (0, 4)
    assert dropout(torch.tensor(1.0), 0.5).shape == ()
    x = torch.randn(40)
    assert torch.equal(dropout(x, 0.0), x) and not dropout(x, 1.0).any()
    assert torch.isfinite(dropout(x, 1 - 1e-9)).all() and torch.equal(dropout(x, 1e-9) != 0, x != 0)
    with pytest.raises(ValueError, match="dropout probability"):
        dropout(x, 1.5)


def test_numbers_that_do_not_lie_in_memory() -> None:
    """Autograd negates what is imaginary, and makes zeros, without writing them."""
    negated = torch.complex(torch.zeros(64), torch.ones(64)).conj().imag
    assert negated.is_neg() and set(dropout(negated, 0.5).tolist()) == {0.0, -2.0}
    assert not dropout(torch._efficientzerotensor((64,)), 0.5).any()
    x = torch.ones(64, requires_grad=True)
    y = dropout(x, 0.5)
    torch.complex(torch.zeros(64), y).conj().imag.sum().backward()
    assert torch.equal(x.grad, -y.detach())
    x.grad = None
    y = dropout(x, 0.5)
    y.backward(negated)
    assert torch.equal(x.grad, -y.detach())


def test_the_module() -> None:
    module, x = Dropout(0.5), torch.randn(64)
    assert isinstance(module, torch.nn.Dropout)
    assert (module(x) == 0).any()
    assert module.eval()(x) is x
    inplace = Dropout(0.5, inplace=True)
    y = x.clone()
    assert inplace(y) is y and (y == 0).any()


def test_gradients_of_gradients_and_transforms() -> None:
    x = torch.randn(12, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x, 0.4)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    scale = (y / x).detach()
    compare.close("second derivative", second, 2 * scale.square(), compare.tolerances.FLOAT64)
    rows = torch.func.vmap(lambda one: dropout(one, 0.5), randomness="different")(torch.ones(9, 64))
    assert (rows != rows[0]).any() and set(rows.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("level", pyxlbert._C.levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bits_are_those_of_philox(level: str, dtype: torch.dtype) -> None:
    """Element e takes half e % 2 of word e / 2 % 64 of row e / 128; the same on every level and in the gradient."""
    seed, limit, count = -(2**40) + 5, 20_000, 1000
    row = torch.arange((count + 127) // 128)[:, None]
    counter = (torch.arange(16), row, torch.zeros_like(row), torch.tensor(int(Tag.DROPOUT)))
    words = torch.stack(philox4x32(counter, torch.tensor([seed])), dim=-1).flatten(-2)  # [rows, 64]
    bits = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], dim=-1).flatten()[:count]
    kept = bits >= limit
    before = pyxlbert._C.level()
    pyxlbert._C.set_level(level)
    try:
        x = torch.linspace(-3, 3, count).to(dtype).requires_grad_()
        y = _few_bits.apply(_few_bits._Dropped, x, limit, seed)
        y.sum().backward()
    finally:
        pyxlbert._C.set_level(before)
    scale = 2**16 / (2**16 - limit)
    compare.same_bits("dropout", y, torch.where(kept, (x.float() * torch.tensor(scale)).to(dtype), 0.0))
    compare.same_bits("gradient", x.grad, torch.where(kept, torch.tensor(scale).to(dtype), 0.0).to(dtype))
