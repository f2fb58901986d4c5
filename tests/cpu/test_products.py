"""Products of training whose weight stays in float32: their errors, bits, gradients, and who goes the usual way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

import pyxlbert
from pyxlbert.cpu import _products
from pyxlbert.ops import _memory, _wide
from pyxlbert.testing import compare, tolerances

pytestmark = pytest.mark.skipif(
    "avx512_bf16" not in pyxlbert._C.levels(), reason="the kernel needs AVX-512 with bfloat16"
)
# M, K and N: below, at and beside the edges of vectors, pairs, strips, panels and blocks of K.
SIZES = [(64, 1, 1), (65, 33, 77), (70, 64, 64), (193, 770, 130), (301, 7, 40), (2050, 32, 65), (4500, 96, 80)]


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    """The kernel's level; scratch memory is handed out full of NaN."""
    before = pyxlbert._C.level()
    pyxlbert._C.set_level("avx512_bf16")
    pyxlbert._C.poison_workspaces(True)
    yield
    pyxlbert._C.poison_workspaces(False)
    pyxlbert._C.set_level(before)


def random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(n: int, k: int, transposed: bool, seed: int = 1) -> torch.Tensor:
    return random(k, n, seed=seed).t() if transposed else random(n, k, seed=seed)


def close_sums(name: str, got: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor) -> None:
    """Sums in float32, rounded once if they are in bfloat16."""
    rounding = torch.finfo(got.dtype).eps if got.dtype is torch.bfloat16 else 0.0
    bound = exact.abs() * rounding + terms * tolerances.SUMMATION_ORDER + torch.finfo(torch.float32).tiny
    worst = float(((got.double() - exact).abs() / bound).max())
    assert worst <= 1.0, f"{name}: {worst:.2f} of what is allowed"


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(size: tuple[int, int, int], transposed: bool) -> None:
    m, k, n = size
    # Rows further apart than they are long, and at an odd distance.
    x = random(m, k + 3, dtype=torch.bfloat16)[:, :k]
    dy, bias = random(m, n, dtype=torch.bfloat16, seed=2), random(n, seed=3)
    weight = weight_of(n, k, transposed)
    rounded, wide_x, wide_dy = weight.bfloat16().double(), x.double(), dy.double()
    exact = wide_x @ rounded.t() + bias.double()
    close_sums("y", _products.forward(x, weight, bias), exact, wide_x.abs() @ rounded.abs().t() + bias.abs().double())
    close_sums("dx", _products.to_rows(dy, weight), wide_dy @ rounded, wide_dy.abs() @ rounded.abs())
    terms = wide_dy.abs().t() @ wide_x.abs()
    dweight = _products.to_weight(dy, x, torch.full_like(weight, float("nan")))
    assert dweight.stride() == weight.stride()
    close_sums("dweight", dweight, wide_dy.t() @ wide_x, terms)
    close_sums("sum", _products.to_weight(dy, x, dweight, add=True), 2 * (wide_dy.t() @ wide_x), 2 * terms)


def test_a_wide_gradient_meets_the_weight_in_slices(monkeypatch) -> None:
    dy, weight = random(70, 300, dtype=torch.bfloat16), random(300, 50)
    whole = _products.to_rows(dy, weight)
    monkeypatch.setattr(_products, "_DEEPEST", 64)
    exact = dy.double() @ weight.bfloat16().double()
    close_sums("dx", _products.to_rows(dy, weight), exact, dy.double().abs() @ weight.double().abs())
    compare.close("slices", whole, exact, tolerances.CONTESTANT[torch.bfloat16])


def test_a_sum_of_many_rows_of_one_sign() -> None:
    x, dy = torch.full((100_000, 32), 1 / 3).bfloat16(), torch.full((100_000, 16), 0.7).bfloat16()
    dweight = _products.to_weight(dy, x, torch.empty(16, 32))
    exact = 100_000 * float(x[0, 0].double()) * float(dy[0, 0].double())
    # Chains of 384 terms drift by less than half of their roundings; one chain would lose a hundred times as much.
    assert float((dweight.double() / exact - 1).abs().max()) < tolerances.SUMMATION_ORDER


def test_threads_change_no_bit() -> None:
    x, dy, weight = random(1000, 130, dtype=torch.bfloat16), random(1000, 700, dtype=torch.bfloat16), random(700, 130)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            logits = random(9, 5000, dtype=torch.bfloat16)
            loss = _products.softmax_slope(logits, torch.arange(9), 0.5)
            dweight = _products.to_weight(dy, x, torch.empty_like(weight))
            few = _products.forward(x[:70], weight, None)
            found.append(
                (_products.forward(x, weight, None), _products.to_rows(dy, weight), dweight, few, loss, logits)
            )
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, a, b in zip(("y", "dx", "dweight", "few rows", "loss", "slope"), found[0], other, strict=True):
            compare.same_bits(name, a, b)


def test_a_large_gradient_is_the_same_wherever_it_lies() -> None:
    """It is written past the caches where its lines are whole: not at any address, nor where a row ends."""
    m, n, k = 520, 530, 70
    x, dy = random(k, n, dtype=torch.bfloat16), random(k, m, dtype=torch.bfloat16, seed=2)
    wide_x, wide_dy = x.double(), dy.double()
    room = torch.full((m * n + 32,), float("nan"))
    start, found = -(room.data_ptr() // 4) % 16, []
    for shift in (0, 4, 15):
        dweight = room[start + shift :][: m * n].view(m, n)
        found.append(_products.to_weight(dy, x, dweight).clone())
        rest = room.clone()
        rest[start + shift :][: m * n] = float("nan")
        assert rest.isnan().all()
        room.fill_(float("nan"))
        compare.same_bits("dweight", found[0], found[-1])
    close_sums("dweight", found[0], wide_dy.t() @ wide_x, wide_dy.abs().t() @ wide_x.abs())


@pytest.mark.parametrize("words", [1, 15, 16, 3001])
def test_slope_of_the_cross_entropy(words: int) -> None:
    logits, labels = 4 * random(6, words, dtype=torch.bfloat16), torch.arange(6) % words
    wide = logits.double().requires_grad_()
    exact = F.cross_entropy(wide, labels, reduction="sum")
    (0.25 * exact).backward()
    loss = _products.softmax_slope(logits, labels, 0.25)
    compare.close("loss", loss, exact.detach(), tolerances.SUMMATION_ORDER)
    error = (logits.double() - wide.grad).abs()
    assert (error <= wide.grad.abs() * torch.finfo(torch.bfloat16).eps + torch.finfo(torch.float32).eps).all()


def test_slope_of_logits_that_are_no_numbers() -> None:
    logits = torch.zeros(3, 40, dtype=torch.bfloat16)
    logits[1, 7] = float("nan")
    logits[2, 3] = float("-inf")
    assert torch.isnan(_products.softmax_slope(logits, torch.zeros(3, dtype=torch.int64), 1.0))
    assert (
        torch.isnan(logits[1, 0])
        and torch.isfinite(logits[0]).all()
        and abs(float(logits[2, 3])) <= torch.finfo(torch.float32).tiny
    )


def step(function, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **options) -> list[torch.Tensor]:
    """The result and the gradients under autocast, or in float64."""
    leaves = [None if one is None else one.detach().clone().requires_grad_() for one in (x, weight, bias)]
    leaves[1] = torch.nn.Parameter(leaves[1].detach())
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype is not torch.float64):
        y = function(*leaves, **options)
    (y * torch.linspace(-1, 1, y.shape[-1]).to(y.dtype)).sum().backward()
    return [y.detach(), *(one.grad for one in leaves if one is not None)]


def plain_gelu(x, weight, bias, approximate):
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", ["linear", "none", "tanh"])
def test_ops_take_the_weight_as_it_is_under_autocast(kind: str, with_bias: bool, monkeypatch) -> None:
    x, weight, bias = random(3, 40, 50), random(70, 50, seed=1) / 7, random(70, seed=2) if with_bias else None
    ours, plain = (pyxlbert.linear, F.linear) if kind == "linear" else (pyxlbert.linear_gelu, plain_gelu)
    options = {} if kind == "linear" else {"approximate": kind}
    calls = []
    monkeypatch.setattr(
        _products, "_product", lambda *a, _run=_products._product, **b: (calls.append(1), _run(*a, **b))
    )
    found = step(ours, x, weight, bias, **options)
    assert len(calls) == 3  # y, dx and dweight
    usual = step(plain, x, weight, bias, **options)
    doubles = (None if one is None else one.double() for one in (x, weight, bias))
    truth = step(plain, *doubles, **options)
    for name, a, b, exact in zip(("y", "dx", "dweight", "dbias"), found, usual, truth, strict=False):
        assert a.dtype is b.dtype
        compare.within_budget(name, a, b, exact)


def test_a_frozen_side_is_not_computed(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        _products, "_product", lambda *a, _run=_products._product, **b: (calls.append(1), _run(*a, **b))
    )
    x, weight = random(80, 48, dtype=torch.bfloat16), torch.nn.Parameter(random(32, 48))
    pyxlbert.linear(x, weight).sum().backward()
    assert len(calls) == 2 and weight.grad.dtype is torch.float32
    leaf = x.clone().requires_grad_()
    pyxlbert.linear(leaf, weight.detach()).sum().backward()
    assert len(calls) == 4 and leaf.grad.dtype is torch.bfloat16


def test_other_calls_go_the_usual_way(monkeypatch) -> None:
    monkeypatch.setattr(_products, "_product", lambda *a, **b: pytest.fail("the kernel was called"))
    x, weight = random(80, 48), torch.nn.Parameter(random(32, 48))
    pyxlbert.linear(x, weight).sum().backward()  # float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pyxlbert.linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        pyxlbert.linear(x[:9], weight).sum().backward()  # few rows
        pyxlbert.linear(x, weight, backend="torch").sum().backward()
        with pyxlbert.use_backend("torch"):
            pyxlbert.linear(x, weight).sum().backward()
        pyxlbert._C.set_level("avx512")
        pyxlbert.linear(x, weight).sum().backward()
        pyxlbert._C.set_level("avx512_bf16")
        with pytest.raises(ValueError, match=r"linear: weight: got shape \[32, 47\]"):
            pyxlbert.linear(x, weight[:, :-1])
    with torch.autocast("cpu", torch.float16):
        pyxlbert.linear(x, weight).sum().backward()


def test_the_loss_of_another_backend_goes_the_usual_way(monkeypatch) -> None:
    from pyxlbert.nn import linear_cross_entropy

    calls, run = [], _products._product
    monkeypatch.setattr(_products, "_product", lambda *a, **b: calls.append(1) or run(*a, **b))
    x, weight, labels = random(80, 48), torch.nn.Parameter(random(100, 48)), torch.arange(80)
    with torch.autocast("cpu", torch.bfloat16):
        for names in (("torch", None), ("cpu", "torch")):
            with pyxlbert.use_backend(names[0], backward=names[1]):
                linear_cross_entropy(x, weight, None, labels).backward()
        assert not calls
        linear_cross_entropy(x, weight, None, labels).backward()
    assert calls


def test_labels_that_lie_negated_or_not_at_all() -> None:
    """Words that lie in memory as numbers below 0 would be written far before their row."""
    from pyxlbert.nn import linear_cross_entropy

    x, weight, labels = random(80, 48), torch.nn.Parameter(random(100, 48)), torch.arange(80)
    nowhere = torch._efficientzerotensor((80,), dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        for pair in ((torch._neg_view(-labels), labels), (nowhere, torch.zeros_like(labels))):
            losses = [linear_cross_entropy(x, weight, None, one) for one in pair]
            compare.same_bits("dweight", *(torch.autograd.grad(loss, weight)[0] for loss in losses))


@pytest.mark.parametrize("op", [pyxlbert.linear, pyxlbert.linear_gelu])
def test_a_gradient_that_lies_negated(op) -> None:
    x, dy = random(80, 48, dtype=torch.bfloat16), random(80, 32, dtype=torch.bfloat16, seed=2)
    found = []
    for gradient in (torch._neg_view(dy), -dy):
        leaves = [x.clone().requires_grad_(), random(32, 48).requires_grad_(), random(32).requires_grad_()]
        op(*leaves).backward(gradient)
        found.append([one.grad for one in leaves])
    for name, one, other in zip(("x", "weight", "bias"), *found, strict=True):
        compare.same_bits(name, one, other)


@pytest.mark.parametrize("op", [pyxlbert.linear, pyxlbert.linear_gelu])
def test_a_weight_may_change_before_a_gradient_that_does_not_need_it(op) -> None:
    x, weight, found = random(80, 48, dtype=torch.bfloat16), torch.nn.Parameter(random(32, 48)), []
    for change in (0.0, 1.0):
        y = op(x, weight).float().sum()
        with torch.no_grad():
            weight.add_(change)
        found.append(torch.autograd.grad(y, weight)[0])
    compare.same_bits("gradient", *found)
    leaf = x.clone().requires_grad_()
    y = op(leaf, weight).float().sum()
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_double_backward_is_refused() -> None:
    x, weight = random(80, 48, dtype=torch.bfloat16), torch.nn.Parameter(random(32, 48))
    for op in (pyxlbert.linear, pyxlbert.linear_gelu):
        with pytest.raises(RuntimeError, match=f"{op.__name__}: double backward is not supported"):
            torch.autograd.grad(op(x, weight).float().square().sum(), weight, create_graph=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_steps_lay_the_gradient_into_the_same_memory(transposed: bool) -> None:
    parameter = torch.nn.Parameter(random(48, 4, 8) if transposed else random(32, 48))
    x, places = random(80, 48, dtype=torch.bfloat16), set()
    for _ in range(3):
        weight = parameter.flatten(1).t() if transposed else parameter
        pyxlbert.linear(x, weight).float().sum().backward()
        places.add(parameter.grad.data_ptr())
        parameter.grad = None
    assert len(places) == 1


def test_a_decoder_that_is_the_table_has_one_gradient() -> None:
    """The table's rows are added to the decoder's gradient, which autograd would do in memory of its own."""
    from pyxlbert.nn import linear_cross_entropy, words_of

    weight = torch.nn.Parameter(random(500, 40))
    ids = torch.arange(70) % 50
    seen: list[torch.Tensor | None] = []
    memory = _memory.memory_of(weight)
    found = memory.handed_over
    memory.handed_over = lambda *a: seen.append(found(*a)) or seen[-1]

    def step(times: int) -> torch.Tensor:
        weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(linear_cross_entropy(words_of(ids, weight), weight, None, ids) for _ in range(times))
        loss.backward()
        return weight.grad

    once = step(1).clone()
    assert seen[0] is not None and seen.pop(0).data_ptr() == weight.grad.data_ptr()
    # Two losses: of their gradients autograd makes a sum, to which nothing may be added unseen.
    compare.close("twice", step(2), 2 * once, tolerances.SUMMATION_ORDER)
    plain = torch.nn.Parameter(weight.detach().clone())
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(F.linear(F.embedding(ids, plain), plain).float(), ids).backward()
    compare.close("gradient", once, plain.grad, tolerances.CONTESTANT[torch.bfloat16])
    assert _memory.memory_of(weight).handed_over(weight.shape, torch.float32) is None  # outside of a backward pass


def test_losses_of_any_number_of_rows_keep_memory_for_one() -> None:
    """Masked words are another number in every step; memory of each number would never go."""
    from pyxlbert.nn import linear_cross_entropy

    weight, kept = torch.nn.Parameter(random(500, 40)), []
    for count in (64, 65, 100, 2048, 2048 + 17):
        with torch.autocast("cpu", torch.bfloat16):
            linear_cross_entropy(random(count, 40), weight, None, torch.arange(count) % 500).backward()
        weight.grad = None
        kept.append({size: len(free) for size, free in _memory.memory_of(weight)._free.items() if free})
    assert kept[0] and all(one == kept[0] for one in kept)


def test_what_is_no_plain_tensor_is_not_taken() -> None:
    x, weight = random(80, 48, dtype=torch.bfloat16), random(32, 48)
    assert _wide.multiplies(x, weight)
    assert not _wide.multiplies(x, weight.double()) and not _wide.multiplies(x.float(), weight)
    assert not _wide.multiplies(x, weight[:, ::2]) and not _wide.multiplies(x[:, :24], random(32, 48)[:, ::2])
    weight.untyped_storage().resize_(0)
    assert not _wide.multiplies(x, weight)
