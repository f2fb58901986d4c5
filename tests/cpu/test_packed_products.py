"""Products with packed weights and encoder layers on every level: their errors, their bits, what they may touch."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

import pyxlbert
from pyxlbert.launch.attention import ScoreOptions
from pyxlbert.launch.rows import DTYPE
from pyxlbert.ops._integers import MOST_INPUTS, quantise
from pyxlbert.testing import compare, tolerances

cpu = pyxlbert._C.cpu
# The run on modelled tiles sets this to the level that it is about.
LEVELS = [level for level in os.environ.get("PYXLBERT_TEST_SMALL", "").split(",") if level] or pyxlbert._C.levels()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The order is csrc/cpu/linear.h's.
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
# Columns and K: below, at and beside the edges of vectors, tiles, panels and blocks of K.
SIZES = [(1, 1), (7, 5), (31, 33), (32, 384), (65, 385), (96, 768), (33, 1000), (33, 1700)]


@pytest.fixture(params=LEVELS)
def level(request) -> Iterator[str]:
    """The active level; scratch memory is handed out full of NaN."""
    before = pyxlbert._C.level()
    pyxlbert._C.set_level(request.param)
    pyxlbert._C.poison_workspaces(True)
    yield request.param
    pyxlbert._C.poison_workspaces(False)
    pyxlbert._C.set_level(before)


def random(*size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def pack(weight: torch.Tensor, bias: torch.Tensor | None, quantised: bool = False):
    """Weight `[N, K]` and a float32 bias `[N]` in the order of the active level."""
    source, scales = quantise(weight) if quantised else (weight, None)
    part = (source.data_ptr(), source.shape[0], source.stride(0), source.stride(1))
    bias_at, scales_at = (0 if one is None else one.data_ptr() for one in (bias, scales))
    return cpu.PackedLinear([part], bias_at, weight.shape[1], DTYPE[weight.dtype], scales_at)


def product(layer, x: torch.Tensor, activation: str = "none", threads: int = 1) -> torch.Tensor:
    """x `[M, K]`, rows any distance apart, times the packed weight; the result was NaN before."""
    y = torch.full((x.shape[0], layer.columns), float("nan"), dtype=x.dtype)
    number = list(ACTIVATIONS).index(activation)
    cpu.packed_linear_fwd(layer, x.data_ptr(), y.data_ptr(), x.shape[0], x.stride(0), DTYPE[x.dtype], number, threads)
    return y


def quantised_bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What rounding rows to 255 steps and columns to 127 on either side can move a product, `[M, N]` in float64."""
    x, weight = x.double(), weight.double()
    step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 255
    grain = weight.abs().amax(1, keepdim=True) / 127
    sizes = F.linear(step / 2 * torch.ones_like(x), weight.abs()) + F.linear(
        x.abs(), grain / 2 * torch.ones_like(weight)
    )
    return sizes + step * grain.T * x.shape[1] / 4 + tolerances.SUMMATION_ORDER * F.linear(x.abs(), weight.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "inner"), SIZES)
def test_a_product_is_within_the_budget(level: str, dtype: torch.dtype, columns: int, inner: int) -> None:
    weight = random(columns, inner, dtype=dtype, scale=inner**-0.5, seed=1)
    bias = random(columns, seed=2)
    layer, whole = pack(weight, bias), pack(weight, bias, quantised=True)
    for rows in (1, 6, 16, 17, 33, 70, 150, 1100 if inner < 10 else 129):
        x = random(rows, inner, dtype=dtype, seed=rows)
        truth = F.linear(x.double(), weight.double(), bias.double())
        plain = F.linear(x, weight, bias.to(dtype))
        terms = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
        name = f"{level} {dtype} {rows} x {columns} x {inner}"
        factor = tolerances.factor("linear", dtype, "cpu")
        compare.within_budget(name, product(layer, x), plain, truth, terms=terms, factor=factor)
        off = (product(whole, x).double() - truth).abs()
        output = torch.finfo(dtype).eps * truth.abs()
        assert bool((off <= quantised_bound(x, weight) + output).all()), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_of_one_sign(level: str, dtype: torch.dtype) -> None:
    """As exact as the peer's; of integers as long as those of 32 bits hold the sum of the largest products."""

    def constant(rows: int, inner: int) -> torch.Tensor:
        x = torch.full((rows, inner), 0.3).to(dtype)
        x[:, 0] = 0.0  # all others are 255 steps above it
        return x

    for quantised, inner in ((False, 16384), (True, MOST_INPUTS)):
        weight = torch.full((33, inner), 0.7).to(dtype)
        layer = pack(weight, None, quantised)
        for rows in (1, 20):
            x, name = constant(rows, inner), f"{level} {dtype} {rows} x {inner}"
            truth, ours = F.linear(x.double(), weight.double()), product(layer, x)
            if quantised:
                bound = quantised_bound(x, weight) + torch.finfo(dtype).eps * truth.abs()
                assert bool(((ours.double() - truth).abs() <= bound).all()), name
            else:
                compare.within_budget(name, ours, F.linear(x, weight), truth)


def test_integers_that_their_sums_would_not_fit_are_refused() -> None:
    words = rf"weight: got \[2, {MOST_INPUTS + 1}\], wanted at most {MOST_INPUTS} columns"
    with pytest.raises(ValueError, match=words):
        quantise(torch.ones(2, MOST_INPUTS + 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS)[1:])
def test_an_activation_is_within_the_budget(level: str, dtype: torch.dtype, activation: str) -> None:
    weight, bias = random(72, 40, dtype=dtype, scale=0.4, seed=1), random(72, seed=2)
    x = random(37, 40, dtype=dtype)
    before = F.linear(x.double(), weight.double(), bias.double())
    truth = ACTIVATIONS[activation](before)
    plain = ACTIVATIONS[activation](F.linear(x, weight, bias.to(dtype)))
    terms = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    ours = product(pack(weight, bias), x, activation)
    compare.within_budget(f"{level} {dtype} {activation}", ours, plain, truth, terms=terms)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_same_bits_in_any_company(level: str, dtype: torch.dtype, quantised: bool) -> None:
    """Alone, among any number of others, and with any number of threads; a row with a NaN spoils no other."""
    weight, bias = random(101, 409, dtype=dtype, scale=0.05, seed=1), random(101, seed=2)
    layer, x = pack(weight, bias, quantised), random(300, 409, dtype=dtype)
    whole = product(layer, x, "gelu")
    for rows in (1, 2, 5, 6, 7, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 97, 128, 191, 193, 299):
        compare.same_bits(f"first {rows}", product(layer, x[:rows], "gelu"), whole[:rows])
        compare.same_bits(f"row {rows}", product(layer, x[rows : rows + 1], "gelu"), whole[rows : rows + 1])
    for threads in (2, 3, 5):
        for rows in (100, 130, 300):
            compare.same_bits(f"{threads} threads", product(layer, x[:rows], "gelu", threads), whole[:rows])
    spoilt = x.clone()
    spoilt[7], spoilt[40, 3], spoilt[41, 3] = float("nan"), float("inf"), float("-inf")
    others = [row for row in range(300) if row not in (7, 40, 41)]
    found = product(layer, spoilt, "gelu")
    compare.same_bits("beside a NaN", found[others], whole[others])
    assert bool(found[7].isnan().all()) and not bool(found[[40, 41]].isfinite().all(1).any())


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_weights_may_lie_anywhere(level: str, dtype: torch.dtype, quantised: bool) -> None:
    """Rows at odd addresses and distances, with NaN around them; a weight that is a transposed slice."""
    buffer = torch.full((20, 75), float("nan"), dtype=dtype)
    x = buffer[:, 3:72]
    x.copy_(random(20, 69, dtype=dtype))
    weight, bias = random(69, 50, dtype=dtype, seed=1).t(), random(50, seed=2)
    wanted = product(pack(weight.contiguous(), bias, quantised), x.contiguous())
    compare.same_bits("views", product(pack(weight, bias, quantised), x), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_have_the_same_bits_on_every_level(dtype: torch.dtype) -> None:
    """Their sums are exact, and what follows is one formula; "portable" alone rounds within it, where others fuse."""
    levels = pyxlbert._C.levels()[1:]
    if len(levels) < 2:
        pytest.skip("this machine has one level of fused multiplications")
    weight, bias, x = random(101, 900, dtype=dtype, seed=1), random(101, seed=2), random(70, 900, dtype=dtype)
    before, results = pyxlbert._C.level(), {}
    for level in levels:
        pyxlbert._C.set_level(level)
        results[level] = product(pack(weight, bias, quantised=True), x)
    pyxlbert._C.set_level(before)
    for level in levels[1:]:
        compare.same_bits(level, results[level], results[levels[0]])


class Layers:
    """Encoder layers of random weights with F inner columns; either product of the feed-forward network may be of
    integers."""

    def __init__(
        self,
        dtype: torch.dtype,
        inner: int,
        quantised: tuple[bool, bool] = (False, False),
        hidden: int = 96,
        heads: int = 3,
        count: int = 2,
    ) -> None:
        self.dtype, self.heads = dtype, heads
        sizes = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        self.native, self.layers = cpu.EncoderLayers(hidden), []
        for number in range(count):
            seeds = iter(range(10 * number + 1, 10 * number + 11))
            linears = {}
            for name, (n, k) in sizes.items():
                weight = random(n, k, dtype=dtype, scale=1.5 * k**-0.5, seed=next(seeds))
                linears[name] = (weight, random(n, scale=0.2, seed=next(seeds)))
            norm = (1 + random(hidden, scale=0.1, seed=next(seeds)), random(hidden, scale=0.1, seed=next(seeds)))
            packed = [
                pack(*linears[name], quantised=(name == "up" and quantised[0]) or (name == "down" and quantised[1]))
                for name in sizes
            ]
            native_norm = (norm[0].data_ptr(), norm[1].data_ptr(), 1e-5)
            self.native.add([packed[0]], *packed[1:], native_norm, native_norm, 1, None, [(0, 0)] * 4)
            self.layers.append((linears, norm))

    def run(self, x: torch.Tensor, threads: int = 1) -> torch.Tensor:
        """x `[B, T, E]` through all."""
        batch, length, hidden = x.shape
        none, absent = (0, 0, 0), (0, 0, 0, 0)
        inputs = cpu.AttentionCall(
            *(0, none, 0, none, 0, none, 0, 0, 0, absent, 0, absent),
            *((batch, self.heads, length, length, hidden // self.heads), 0),
            ScoreOptions((hidden // self.heads) ** -0.5),
            *(0.0, 0, DTYPE[self.dtype], 0, threads),
        )
        y = torch.full_like(x, float("nan"))
        dtypes = (DTYPE[self.dtype], DTYPE[self.dtype])
        cpu.encoder_layers_fwd(
            *(
                self.native,
                0,
                len(self.layers),
                x.data_ptr(),
                x.data_ptr(),
                y.data_ptr(),
                0,
                batch * length,
                dtypes,
                inputs,
                0,
                None,
            ),
            None,
        )
        return y

    def plain(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same by torch, in dtype."""
        x = x.to(dtype)
        for linears, norm in self.layers:
            weights = {name: (weight.to(dtype), bias.to(dtype)) for name, (weight, bias) in linears.items()}
            scale = (norm[0].to(dtype), norm[1].to(dtype))
            q, k, v = (
                one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in F.linear(x, *weights["qkv"]).chunk(3, -1)
            )
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = F.layer_norm(x + F.linear(mixed, *weights["out"]), x.shape[-1:], *scale)
            x = F.layer_norm(x + F.linear(F.gelu(F.linear(x, *weights["up"])), *weights["down"]), x.shape[-1:], *scale)
        return x


@pytest.mark.parametrize("inner", [100, 800])
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoder_layers_are_within_the_budget(level: str, dtype: torch.dtype, inner: int) -> None:
    """Of 100 inner columns one chunk, of 800 three; and the bits are those of any division of the work."""
    layers, x = Layers(dtype, inner), random(5, 30, 96, dtype=dtype)
    ours = layers.run(x)
    plain, truth = layers.plain(x, dtype), layers.plain(x, torch.float64)
    compare.within_budget(f"{level} {dtype}", ours, plain, truth)
    for batch in range(5):
        compare.same_bits("alone", layers.run(x[batch : batch + 1]), ours[batch : batch + 1])
    for threads in (2, 5):  # panels of rows, and columns
        compare.same_bits(f"{threads} threads", layers.run(x, threads), ours)


@pytest.mark.parametrize("quantised", [(True, False), (False, True), (True, True)])
def test_quantised_layers_have_the_same_bits_in_any_company(level: str, quantised: tuple[bool, bool]) -> None:
    layers, x = Layers(torch.bfloat16, 500, quantised), random(4, 40, 96, dtype=torch.bfloat16)
    ours, truth = layers.run(x), layers.plain(x, torch.float64)
    assert float((ours.double() - truth).norm() / truth.norm()) < tolerances.PACKED[torch.bfloat16]
    for threads in (1, 2, 5):
        compare.same_bits(f"{threads} threads", layers.run(x, threads), ours)
        compare.same_bits("alone", layers.run(x[1:2], threads), ours[1:2])
