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
    other = memory.empty((2, 2), torch.bfloat16)
    assert other.shape == (2, 2)  # of another size
    # All begin with a cache line.
    kept = [memory.empty((size,), torch.float32) for size in (1, 3, 1000, 1 << 20) for _ in range(3)]
    assert not any(one.data_ptr() % 64 for one in (third, other, *kept))


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


def test_numbers_that_are_many_parameters_have_one_memory() -> None:
    """A parameter goes and its storage stays: of the next one made of it no more is kept."""
    gc.collect()
    before, numbers, flat = len(_memory._kept), torch.randn(7, 5), torch.randn(70)
    alive = [torch.nn.Parameter(numbers) for _ in range(2)]
    for _ in range(20):
        for one in (*alive, torch.nn.Parameter(numbers), torch.nn.Parameter(numbers.t())):
            assert memory_of(one) is memory_of(one)
        assert memory_of(alive[0]) is not memory_of(alive[1])
    assert len(_memory._kept) == before + 1
    # Parameters that lie one behind the other are others.
    parts = [torch.nn.Parameter(part.view(7, 5)) for part in flat.split(35)]
    first = memory_of(parts[0])
    assert memory_of(parts[1]) is not first and memory_of(parts[0]) is first


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


@pytest.mark.parametrize("others", [0, 1])
def test_a_hook_keeps_the_decoders_gradient(others: int) -> None:
    """Autograd has then added another to it in a third tensor: rows must not go to the one that the hook keeps."""
    weight, labels, kept = torch.nn.Parameter(torch.randn(7, 5)), torch.arange(8) % 7, []

    def run(look_up, loss) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = look_up(IDS, weight).flatten(0, 1)
            for _ in range(others):
                x = x + F.linear(x, weight)[:, :5]
            mean = loss(x, weight, None, labels)
        mean.grad_fn.register_hook(lambda gradients, _: kept.append(gradients))
        return torch.autograd.grad(mean, weight)[0]

    found = run(words_of, linear_cross_entropy)
    wanted = run(F.embedding, lambda x, table, bias, labels: F.cross_entropy(F.linear(x, table).float(), labels))
    compare.close("gradient", found, wanted, compare.tolerances.CONTESTANT[torch.bfloat16])


def test_passes_at_the_same_time_know_their_own_gradients() -> None:
    """Whether rows are added to the decoder's gradient decides on bits, so no other pass may decide on it."""
    weight, labels = torch.nn.Parameter(torch.randn(7, 5)), torch.arange(8) % 7
    memory, seen = memory_of(weight), []
    find = memory.handed_over
    memory.handed_over = lambda *a: seen.append(find(*a)) or seen[-1]

    def loss(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(x, weight, None, labels)

    class Between(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, dy: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                torch.autograd.grad(loss(words_of(IDS, weight).flatten(0, 1)), weight)
            return dy

    torch.autograd.grad(loss(Between.apply(words_of(IDS, weight).flatten(0, 1))), weight)
    assert len(seen) == 2 and all(one is not None for one in seen)
    assert not len(memory._handed)


@pytest.mark.parametrize("which", ["table", "decoder"])
def test_a_view_has_a_gradient_of_its_own(which: str) -> None:
    """It is asked for beside the parameter's, or changed by a hook on its way, or belongs to no parameter."""
    labels = torch.arange(8) % 7

    def run(how: str, look_up, loss) -> list[torch.Tensor]:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 35).view(7, 5))
        with torch.set_grad_enabled(how != "apart"):
            view = weight.view(7, 5)
        if how == "apart":
            view.requires_grad_()
        table, decoder = (view, weight) if which == "table" else (weight, view)
        if how == "hook":
            view.register_hook(lambda gradient: None if gradient is None else 5 * gradient)
        with torch.autocast("cpu", torch.bfloat16):
            mean = loss(look_up(IDS, table).flatten(0, 1), decoder, None, labels)
        return [*torch.autograd.grad(mean, [weight] if how == "hook" else [weight, view], allow_unused=True)]

    def usual(x: torch.Tensor, table: torch.Tensor, bias: None, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, table).float(), labels)

    for how in ("asked", "hook", "apart"):
        found, wanted = run(how, words_of, linear_cross_entropy), run(how, F.embedding, usual)
        for one, other in zip(found, wanted, strict=True):
            assert one is not None and other is not None, how
            compare.close(how, one, other, compare.tolerances.CONTESTANT[torch.bfloat16])


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
