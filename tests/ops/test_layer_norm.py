"""What is special to layer_norm."""

from __future__ import annotations

import torch

import pyxlbert
from pyxlbert.testing.direct import Direct

REFERENCE = Direct("torch")


def test_hand_written_gradient() -> None:
    """The reference's backward against numerical differentiation in float64."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 7), (7,), (7,))
    )
    assert torch.autograd.gradcheck(lambda *a: pyxlbert.layer_norm(*a, eps=0.1, backend="torch"), (x, weight, bias))


def test_saved_statistics_are_what_the_contract_names() -> None:
    x = torch.randn(4, 9)
    _, mean, rstd = REFERENCE.layer_norm_fwd(x, torch.ones(9), torch.zeros(9), 0.5, True)
    assert mean.shape == rstd.shape == (4,)
    assert mean.dtype == rstd.dtype == torch.float32
    again = torch.ops.pyxlbert.layer_norm_fwd(x, torch.ones(9), torch.zeros(9), 0.5, True, "cpu")
    assert [t.shape for t in again] == [x.shape, mean.shape, rstd.shape]


def test_nothing_is_saved_without_a_gradient() -> None:
    x = torch.randn(4, 9)
    arguments = (x, torch.ones(9), torch.zeros(9), 0.5)
    with_statistics = torch.ops.pyxlbert.layer_norm_fwd(*arguments, True, "cpu")[0]
    for backend in ("torch", "cpu"):
        assert len(torch.ops.pyxlbert.layer_norm_fwd(*arguments, False, backend)) == 1
    assert torch.equal(torch.ops.pyxlbert.layer_norm_fwd(*arguments, False, "cpu")[0], with_statistics)


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    x = torch.randn(4, 9)
    _, mean, rstd = REFERENCE.layer_norm_fwd(x, torch.ones(9), torch.zeros(9), 0.5, True)
    arguments = (torch.ones_like(x), x, torch.ones(9), torch.zeros(9), mean, rstd, False)
    for dx, dweight, dbias in (
        REFERENCE.layer_norm_bwd(*arguments),
        torch.ops.pyxlbert.layer_norm_bwd(*arguments, "cpu"),
    ):
        assert dx.shape == x.shape
        assert dweight.numel() == dbias.numel() == 0
    weight = torch.ones(9, requires_grad=True)
    pyxlbert.layer_norm(x, weight, torch.zeros(9)).sum().backward()
    assert weight.grad.shape == (9,)


def test_no_rows_give_zero_parameter_gradients() -> None:
    x = torch.randn(0, 9, requires_grad=True)
    weight, bias = torch.ones(9, requires_grad=True), torch.zeros(9, requires_grad=True)
    pyxlbert.layer_norm(x, weight, bias).sum().backward()
    assert x.grad.shape == (0, 9)
    assert not weight.grad.any() and not bias.grad.any()


def test_eps_zero_on_a_constant_row_is_what_pytorch_gives() -> None:
    x = torch.full((1, 8), 3.0)
    ours = pyxlbert.layer_norm(x, torch.ones(8), torch.zeros(8), eps=0.0)
    plain = torch.nn.functional.layer_norm(x, (8,), torch.ones(8), torch.zeros(8), 0.0)
    assert torch.equal(ours.isnan(), plain.isnan())
