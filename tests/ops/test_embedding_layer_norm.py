"""What is special to embedding_layer_norm."""

from __future__ import annotations

import pytest
import torch

import pyxlbert
from pyxlbert.testing import compare


def tables(dtype: torch.dtype = torch.float32, columns: int = 12) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((9, columns), (2, columns), (8, columns), (columns,), (columns,))
    return tuple(torch.randn(*s, generator=generator).to(dtype).requires_grad_() for s in shapes)


def test_hand_written_gradient() -> None:
    """The reference's backward against numerical differentiation in float64, with dropout."""
    ids = torch.tensor([[1, 2, 1], [0, 8, 1]])

    def function(*t: torch.Tensor) -> torch.Tensor:
        types = torch.tensor([[0, 1, 1], [1, 0, 1]])
        options = {"token_type_ids": types, "eps": 0.1, "dropout_p": 0.25, "seed": 5, "backend": "torch"}
        return pyxlbert.embedding_layer_norm(ids, *t, **options)

    assert torch.autograd.gradcheck(function, tables(torch.float64, 5))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_padding_row_gets_no_gradient(backend: str) -> None:
    word, *others = tables()
    ids = torch.tensor([[1, 0, 0], [0, 3, 0]])
    pyxlbert.embedding_layer_norm(ids, word, *others, padding_idx=0, backend=backend).square().sum().backward()
    assert not word.grad[0].any()
    assert word.grad[1].any() and word.grad[3].any()
    assert not word.grad[2].any()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_table_without_gradient_gets_none(backend: str) -> None:
    word, kind, position, weight, bias = tables()
    for frozen in (word, weight, bias):
        frozen.requires_grad_(False)
    ids = torch.tensor([[1, 2], [3, 4]])
    pyxlbert.embedding_layer_norm(ids, word, kind, position, weight, bias, backend=backend).sum().backward()
    assert word.grad is None and weight.grad is None
    assert kind.grad is not None and position.grad is not None


def test_both_outputs_carry_gradients() -> None:
    """The gradient of y and of its copy are summed, whichever are there."""
    ids = torch.tensor([[1, 2], [3, 4]])

    def gradient(use: str) -> torch.Tensor:
        word, *others = tables()
        y, copy = pyxlbert.embedding_layer_norm(ids, word, *others, copy_dtype=torch.float32)
        total = {"y": y.square().sum(), "copy": copy.square().sum(), "both": y.square().sum() + copy.square().sum()}
        total[use].backward()
        return word.grad

    compare.same_bits("either", gradient("y"), gradient("copy"))
    compare.same_bits("sum", gradient("both"), 2 * gradient("y"))


def test_the_same_seed_drops_the_same_on_both_backends() -> None:
    ids = torch.arange(9).repeat(4)[None]
    word, kind, _, weight, bias = (t.detach() for t in tables(columns=70))
    outputs = [
        pyxlbert.embedding_layer_norm(
            ids, word, kind, None, weight, bias, dropout_p=0.4, seed=torch.tensor([1 << 40]), backend=backend
        )
        for backend in ("torch", "cpu")
    ]
    assert torch.equal(outputs[0] == 0, outputs[1] == 0)
    dropped = float((outputs[0] == 0).float().mean())
    assert 0.35 < dropped < 0.45


def test_manual_seed_reproduces() -> None:
    ids = torch.arange(9)[None]
    word, kind, _, weight, bias = (t.detach() for t in tables())

    def call() -> torch.Tensor:
        return pyxlbert.embedding_layer_norm(ids, word, kind, None, weight, bias, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    compare.same_bits("again", call(), first)
    assert not torch.equal(first, second)


def test_nothing_is_written_when_an_id_is_outside() -> None:
    word, *others = (t.detach() for t in tables())
    with pytest.raises(ValueError, match=r"input_ids: got 9 at \[0, 1\]"):
        pyxlbert.embedding_layer_norm(torch.tensor([[1, 9, 10]]), word, *others)
