"""What is special to dropout_add_layer_norm."""

from __future__ import annotations

import pytest
import torch

import pyxlbert
from pyxlbert.reference.philox import Tag, keep_rows
from pyxlbert.testing import compare, tolerances


def _tensors(dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    n = shape[-1]
    return tuple(torch.randn(*s, generator=generator).to(dtype) for s in (shape, shape, (n,), (n,), (n,)))


def test_hand_written_gradient() -> None:
    """The reference's backward, both outputs, against numerical differentiation in float64."""
    tensors = [t.requires_grad_() for t in _tensors(torch.float64, 3, 7)]

    def function(x, residual, weight, bias, x_bias):
        return pyxlbert.dropout_add_layer_norm(
            x,
            residual,
            weight,
            bias,
            x_bias=x_bias,
            dropout_p=0.4,
            seed=3,
            eps=0.1,
            copy_dtype=torch.float64,
            backend="torch",
        )

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_bits_are_the_contracts(backend: str) -> None:
    """x's gradient is zero exactly where the public dropout bits say so, rows counted across leading dimensions."""
    x, residual, weight, bias, _ = _tensors(torch.float32, 3, 5, 37)
    x.requires_grad_()
    y = pyxlbert.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.4, seed=11, backend=backend)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    keep = keep_rows(torch.tensor([11]), 0.4, 15, 37, Tag.DROPOUT_ADD_LAYER_NORM).view(3, 5, 37)
    assert torch.equal(x.grad != 0, keep)


def test_manual_seed_reproduces_and_calls_differ() -> None:
    x, residual, weight, bias, _ = _tensors(torch.float32, 4, 50)
    torch.manual_seed(5)
    first, second = (pyxlbert.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, pyxlbert.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_no_seed_is_drawn_without_dropout() -> None:
    before = torch.get_rng_state()
    pyxlbert.dropout_add_layer_norm(*_tensors(torch.float32, 4, 50)[:4])
    assert torch.equal(before, torch.get_rng_state())


def test_a_dropped_infinity_or_nan_is_gone() -> None:
    x, residual, weight, bias, _ = _tensors(torch.float32, 6, 40)
    x[::2] = float("inf")
    x[1::2] = float("nan")
    for backend in ("torch", "cpu"):
        y = pyxlbert.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=1.0, seed=0, backend=backend)
        compare.close("result", y, pyxlbert.layer_norm(residual, weight, bias), tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("wanted", range(5))
def test_each_gradient_alone(wanted: int, dropout_p: float) -> None:
    """A gradient does not depend on which others are asked for."""
    every = [t.requires_grad_() for t in _tensors(torch.float32, 5, 24)]
    alone = [t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate(every)]
    for tensors in (every, alone):
        *first, x_bias = tensors
        y, copy = pyxlbert.dropout_add_layer_norm(
            *first, x_bias=x_bias, dropout_p=dropout_p, seed=1, copy_dtype=torch.bfloat16
        )
        (y.square().sum() + copy.float().sum()).backward()
    assert torch.equal(every[wanted].grad, alone[wanted].grad)
    assert all(t.grad is None for i, t in enumerate(alone) if i != wanted)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_gradient_of_one_output_only(backend: str) -> None:
    """The copy may be the only one that is used, or y."""
    x, residual, weight, bias, _ = _tensors(torch.bfloat16, 5, 24)
    gradients = []
    for use in (lambda y, copy: y, lambda y, copy: copy):
        leaf = x.clone().requires_grad_()
        pair = pyxlbert.dropout_add_layer_norm(
            leaf, residual.float(), weight, bias, copy_dtype=torch.float32, backend=backend
        )
        assert pair[0].dtype is pair[1].dtype is torch.float32 and torch.equal(*pair)
        use(*pair).square().sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].dtype is torch.bfloat16 and torch.equal(*gradients)


def test_inference_and_training_give_the_same_bits() -> None:
    x, residual, weight, bias, x_bias = _tensors(torch.bfloat16, 5, 72)
    with torch.no_grad():
        without = pyxlbert.dropout_add_layer_norm(x, residual, weight, bias, x_bias=x_bias)
    assert torch.equal(
        without, pyxlbert.dropout_add_layer_norm(x.requires_grad_(), residual, weight, bias, x_bias=x_bias)
    )


def test_a_random_seed_does_not_recompile() -> None:
    x, residual, weight, bias, _ = _tensors(torch.float32, 4, 50)
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda: pyxlbert.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.5),
        fullgraph=True,
        backend=counting,
    )
    assert len({compiled().sum().item() for _ in range(3)}) == 3
    assert len(graphs) == 1
