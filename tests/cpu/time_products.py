"""Times packed products and encoder layers of one level beside torch's: python tests/cpu/time_products.py [threads].

Not a benchmark of an op: it is for the choice of the constants of csrc/cpu/gemm.h and csrc/cpu/gemm_amx.h. Contestants
take turns, over copies of the weights that together fill more than the caches; medians.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from test_packed_products import Layers, pack, product, random
from torch.nn import functional as F

import pyxlbert

ROUNDS, COPIES = 15, 6
SHAPES = [(2304, 768), (768, 768), (3072, 768), (768, 3072), (1152, 384), (384, 384), (1536, 384), (384, 1536)]


def race(contestants: dict[str, Callable[[int], object]]) -> dict[str, float]:
    """Median seconds of each, called with the number of the copy whose turn it is."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(ROUNDS + 2):
        for name, call in contestants.items():
            start = time.perf_counter()
            call(turn % COPIES)
            times[name].append(time.perf_counter() - start)
    return {name: median(taken[2:]) for name, taken in times.items()}


def products(columns: int, inner: int, threads: int) -> None:
    weights = [random(columns, inner, dtype=torch.bfloat16, scale=inner**-0.5, seed=n) for n in range(COPIES)]
    bias = random(columns)
    short = bias.to(torch.bfloat16)
    packed = [pack(weight, bias) for weight in weights]
    integers = [pack(weight, bias, quantised=True) for weight in weights]

    def of(x: torch.Tensor) -> dict[str, Callable[[int], object]]:
        return {
            "bf16": lambda n: product(packed[n], x, threads=threads),
            "bf16+gelu": lambda n: product(packed[n], x, "gelu", threads),
            "int8": lambda n: product(integers[n], x, threads=threads),
            "F.linear": lambda n: F.linear(x, weights[n], short),
        }

    for rows in (1, 16, 32, 64, 128, 256, 512, 1024):
        taken = race(of(random(rows, inner, dtype=torch.bfloat16)))
        rates = {name: 2e-9 * rows * columns * inner / seconds for name, seconds in taken.items()}
        print(f"{rows:5} {columns:>5} x {inner:<4} ", *(f"{name} {rate:6.0f} " for name, rate in rates.items()))


def layers(name: str, hidden: int, count: int, threads: int) -> None:
    bf16 = Layers(torch.bfloat16, 4 * hidden, hidden=hidden, heads=12, count=count)
    int8 = Layers(torch.bfloat16, 4 * hidden, (True, True), hidden, 12, count)

    def of(x: torch.Tensor) -> dict[str, Callable[[int], object]]:
        return {
            "bf16": lambda n: bf16.run(x, threads),
            "int8 feed-forward": lambda n: int8.run(x, threads),
            "torch": lambda n: bf16.plain(x, torch.bfloat16),
        }

    for batch, length in ((8, 128), (2, 512), (1, 512), (1, 128), (1, 16), (32, 16)):
        taken = race(of(random(batch, length, hidden, dtype=torch.bfloat16)))
        print(f"{name} {batch} x {length}: ", *(f"{each} {1e3 * t:.1f} ms " for each, t in taken.items()))


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.set_num_threads(wanted)
    print(f"level {pyxlbert._C.level()}, {wanted} threads")
    print(" rows       N x K  GFLOP/s")
    for shape in SHAPES:
        products(*shape, wanted)
    layers("BERT-base", 768, 12, wanted)
    layers("MiniLM", 384, 6, wanted)
