"""Products of rows of which the first are given: the same numbers, and less work."""

from __future__ import annotations

import pytest
import torch

from pyxlbert.nn import RelativeAttention, given_rows
from pyxlbert.ops.linear import linear
from pyxlbert.testing import compare, tolerances

GIVEN, ROWS, WIDTH = 40, 50, 32


def drawn(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Rows of both kinds, a weight that lies transposed and one that does not."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, GIVEN, WIDTH, generator=generator).to(dtype)
    rows = torch.randn(2, ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weights = [torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator)) for _ in range(2)]
    return given, rows, *weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_and_gradients_are_those_of_all_rows(dtype: torch.dtype, monkeypatch) -> None:
    given, rows, first, second = drawn(dtype)
    weights = (first.t(), second)
    assert given_rows.leaves_out_gradient(given, rows, *weights)
    sizes, made = [], given_rows._to_rows

    def to_rows(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(dy.shape))
        return made(dy, weight)

    monkeypatch.setattr(given_rows, "_to_rows", to_rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        found = given_rows.products_behind(given, rows, *weights)
        wanted = [linear(torch.cat([given, rows], dim=1), one) for one in weights]
    assert all(torch.equal(x, y) and x.dtype is dtype for x, y in zip(found, wanted, strict=True))
    cotangents = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for x in found]
    ours = torch.autograd.grad(found, (rows, first, second), cotangents)
    assert sizes == [(2, ROWS, WIDTH)] * 2
    theirs = torch.autograd.grad(wanted, (rows, first, second), cotangents)
    for name, x, y in zip(("rows", "first", "second"), ours, theirs, strict=True):
        assert x.dtype is y.dtype
        compare.close(name, x, y, tolerances.CONTESTANT[dtype])
    exact = [one.detach().double().requires_grad_() for one in (rows, first, second)]
    seen = torch.cat([given.double(), exact[0]], dim=1)
    products = (seen @ exact[1], seen @ exact[2].t())
    truths = torch.autograd.grad(products, exact, [one.double() for one in cotangents])
    for name, x, truth in zip(("rows", "first", "second"), ours, truths, strict=True):
        compare.close(name, x, truth.float(), tolerances.CONTESTANT[dtype])


def test_what_is_frozen_has_no_gradient() -> None:
    given, rows, first, second = drawn(torch.float32)
    second.requires_grad_(False)
    x, y = given_rows.products_behind(given, rows, first, second)
    (x.sum() + y.sum()).backward()
    assert first.grad is not None and second.grad is None and rows.grad is not None
    # A product that nobody uses has none either.
    x, _ = given_rows.products_behind(given, rows, first, second)
    assert torch.autograd.grad(x.sum(), rows)[0].isfinite().all()


def test_who_asks_for_more_goes_the_usual_way() -> None:
    given, rows, first, _ = drawn(torch.float32)
    assert not given_rows.leaves_out_gradient(given.requires_grad_(), rows, first)
    given = given.detach()
    assert not given_rows.leaves_out_gradient(given, rows.detach(), first)
    assert not given_rows.leaves_out_gradient(given[:, :0], rows, first)
    assert not given_rows.leaves_out_gradient(given.double(), rows, first)
    with torch.no_grad():
        assert not given_rows.leaves_out_gradient(given, rows, first)
    with pytest.raises(RuntimeError, match="linear: double backward is not supported"):
        products = given_rows.products_behind(given, rows, first)
        torch.autograd.grad(products[0].sum(), rows, create_graph=True)


def attention(kind: type[RelativeAttention] = RelativeAttention) -> RelativeAttention:
    made = kind(WIDTH, 2, 16)
    for one in made.parameters():
        torch.nn.init.normal_(one, generator=torch.Generator().manual_seed(2))
    return made.train()


def test_autocast_decides_on_the_dtype_of_keys_and_values() -> None:
    """Rows in float32 are multiplied in bfloat16, with a memory as without."""
    given, rows, _, _ = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not given_rows.leaves_out_gradient(given, rows)
        products = attention()._keys_and_values(rows, given.transpose(0, 1))
    assert {one.dtype for one in products} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert given_rows.leaves_out_gradient(given.bfloat16(), rows.bfloat16())


@pytest.mark.parametrize("way", ["patched", "subclass"])
def test_a_projection_of_ones_own_makes_keys_and_values_of_memories(way: str) -> None:
    given, rows, _, _ = drawn(torch.float32)
    memory = given.transpose(0, 1)

    class Doubled(RelativeAttention):
        def project(self, x: torch.Tensor, names: str) -> tuple[torch.Tensor, ...]:
            return tuple(2 * one for one in super().project(x, names))

    wanted, other = attention(), attention(Doubled if way == "subclass" else RelativeAttention)
    if way == "patched":
        usual = other.project
        other.project = lambda x, names: tuple(2 * one for one in usual(x, names))
    for found, single in zip(other._keys_and_values(rows, memory), wanted._keys_and_values(rows, memory), strict=True):
        compare.same_bits("product", found, 2 * single)
