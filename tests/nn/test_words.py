"""Rows of a word table and their gradient, whose memory is lent again."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch.nn import functional as F

from pyxlbert.nn import linear_cross_entropy, words_of
from pyxlbert.ops import _memory
from pyxlbert.ops._memory import KeptMemory, memory_of
from pyxlbert.testing import compare

IDS = torch.tensor([[3, 1, 3, 0], [6, 3, 3, 5]])


def gradient(weight: torch.nn.Parameter, look_up=words_of, scale: float = 1.0) -> torch.Tensor:
    weight.grad = None
    words = look_up(IDS, weight)
    (words * torch.arange(words.numel()).view(words.shape) * scale).sum().backward()
    return weight.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_values_and_gradient(dtype: torch.dtype, index: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.randn(7, 5, dtype=dtype))
    compare.same_bits("words", words_of(IDS.to(index), weight), F.embedding(IDS, weight))
    wanted = gradient(weight, F.embedding).clone()
    for _ in range(3):
        compare.close("gradient", gradient(weight), wanted, compare.tolerances.FLOAT64)
        weight.grad.fill_(7.0)  # whoever has it may write to it


def test_memory_is_lent_again_only_if_nobody_refers_to_it() -> None:
    memory = KeptMemory()
    first = memory.empty((3, 4), torch.float32).zero_()
    address = first.data_ptr()
    view = first[1].view(2, 2)
    del first
    gc.collect()
    second = memory.empty((3, 4), torch.float32).zero_()
    assert second.data_ptr() != address  # the view still refers to it
    view.fill_(5.0)
    assert not second.any()
    other = second.data_ptr()
    del view, second
    gc.collect()
    third = memory.empty((3, 4), torch.float32).zero_()
    assert third.data_ptr() in (address, other) and not third.any()
    assert memory.empty((2, 2), torch.bfloat16).shape == (2, 2)  # of another size


def test_gradients_that_are_kept_stay_as_they_are() -> None:
    weight = torch.nn.Parameter(torch.randn(7, 5))
    one = gradient(weight)
    kept = one.clone()
    other = gradient(weight, scale=3.0)
    compare.same_bits("the older gradient", one, kept)
    assert other.data_ptr() != one.data_ptr() and not torch.equal(one, other)
    # A second passage is added to the first.
    words_of(IDS, weight).sum().backward()
    compare.close("sum", weight.grad, other, compare.tolerances.FLOAT64)


def test_steps_use_the_same_memory_again() -> None:
    weight = torch.nn.Parameter(torch.randn(7, 5))
    places = set()
    for _ in range(4):
        places.add(gradient(weight).data_ptr())
        weight.grad = None
    assert len(places) == 1


def test_memory_goes_with_the_parameter() -> None:
    gc.collect()
    before = len(_memory._kept)
    weight = torch.nn.Parameter(torch.randn(7, 5))
    gradient(weight)
    weight.grad = None
    assert len(_memory._kept) == before + 1
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert memory_of(other) is not memory_of(weight)
    del weight, other
    gc.collect()
    assert len(_memory._kept) == before


@pytest.mark.parametrize("autocast", [False, True])
def test_a_table_that_is_the_decoder_too(autocast: bool) -> None:
    """Its gradient is the sum of both; of several steps each is what one step alone gives."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(7, 5))
    labels = torch.tensor([1, 0, 6, 6, 2, 3, 3, 1])

    def step(table: torch.nn.Parameter, look_up, loss) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (1.5 * loss(look_up(IDS, table).flatten(0, 1), table, None, labels)).backward()
        return table.grad

    plain = copy.deepcopy(weight)
    wanted = step(
        plain, F.embedding, lambda x, table, bias, labels: F.cross_entropy(F.linear(x, table).float(), labels)
    )
    for _ in range(3):
        found = step(weight, words_of, linear_cross_entropy)
        compare.close(
            "gradient", found, wanted, compare.tolerances.CONTESTANT[torch.bfloat16 if autocast else torch.float32]
        )
        found.fill_(9.0)
        weight.grad = None


def test_a_graph_that_is_kept_gives_the_same_gradient_again() -> None:
    weight = torch.nn.Parameter(torch.randn(7, 5))
    loss = linear_cross_entropy(torch.randn(4, 5), weight, None, torch.tensor([0, 1, 5, 5]))
    (one,) = torch.autograd.grad(loss, weight, retain_graph=True)
    kept = one.clone()
    one.zero_()
    (other,) = torch.autograd.grad(loss, weight)
    compare.same_bits("gradient", other, kept)


def test_other_calls_are_torchs_own() -> None:
    weight = torch.nn.Parameter(torch.randn(7, 5))
    with torch.no_grad():
        assert not words_of(IDS, weight).requires_grad
    frozen = torch.nn.Parameter(torch.randn(7, 5), requires_grad=False)
    assert not words_of(IDS, frozen).requires_grad
    with pytest.raises(IndexError):
        words_of(IDS + 3, weight)
    jacobian = torch.func.jacrev(lambda table: words_of(IDS[0, :2], table).sum(1))(weight.detach())
    assert jacobian.shape == (2, 7, 5) and jacobian.sum() == 10
    with pytest.raises(RuntimeError, match="embedding: double backward is not supported"):
        torch.autograd.grad(words_of(IDS, weight).square().sum(), weight, create_graph=True)
