"""Races of `accelerate` on a Conformer of transformers: with it and without, and their peak memory."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pyxlbert.bench import limits, peers
from pyxlbert.bench.contest import Settings, contest
from pyxlbert.bench.memory import MOST
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import race
from torch import Tensor, nn

import pyxlbert
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.memory import peak_memory

# Parakeet's own sizes, but for its number of layers; eight frames of sound make one of the layers'.
LAYERS, HIDDEN, INNER, HEADS, FRAMES = 4, 1024, 4096, 8, 8
NAMES = ("pyxlbert", "pyxlbert, not packed", "transformers")


class _Rows(nn.Module):
    """In the place of the subsampling: what the layers get is given."""

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        return rows


def contestant(name: str, length: int, dtype: torch.dtype, fill: float = 1.0) -> peers.Call:
    """One sequence of `length` places through the layers of a Parakeet encoder.

    Args:
        name: one of NAMES.
        length: T, padding included.
        dtype: of the parameters.
        fill: share of the places that hold a token; below 1 there is a mask.
    """
    from transformers import ParakeetEncoder, ParakeetEncoderConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS}
    config = ParakeetEncoderConfig(num_hidden_layers=LAYERS, num_key_value_heads=HEADS, **sizes)
    model = ParakeetEncoder(config).to(dtype).eval()
    x = torch.randn(1, length, HIDDEN).to(dtype)
    if name != "transformers":
        pyxlbert.accelerate(model)
        if name == "pyxlbert":
            pyxlbert.pack(model)
    model.subsampling = _Rows()
    mask = None if fill == 1 else torch.arange(length * FRAMES)[None] < round(length * fill) * FRAMES

    def call() -> Tensor:
        with torch.inference_mode():
            return model(x, attention_mask=mask).last_hidden_state

    return call


@dataclass(frozen=True)
class ConformerRace:
    """The layers of a Parakeet encoder, accelerated and untouched."""

    length: int
    dtype: torch.dtype
    rounds: int = 5

    def __str__(self) -> str:
        return f"{self.subject} {self.case} {self.dtype}"

    @property
    def subject(self) -> str:
        return f"drop-in Parakeet {LAYERS} layers"

    @property
    def case(self) -> str:
        return f"1x{self.length}"

    def run(self, settings: Settings = Settings()) -> Row:  # noqa: B008, it is frozen
        """Compares outputs, then times."""
        calls = {name: contestant(name, self.length, self.dtype) for name in NAMES}
        truth = calls["transformers"]().clone()

        def check(name: str, output: Tensor) -> None:
            compare.close(name, output, truth, tolerances.CONTESTANT[self.dtype])

        rest = peers.REST if settings.rest is None else settings.rest
        wanted = {name: call for name, call in calls.items() if settings.wants(name)}
        timings, failed = contest(
            [wanted], check, lambda copies: race(copies[0], rounds=settings.rounds or self.rounds, rest=rest)
        )
        # Four projections, two networks of two, three 1x1 convolutions' worth, the table, and the attention.
        rows = self.length * (4 * HIDDEN * HIDDEN + 4 * HIDDEN * INNER + 3 * HIDDEN * HIDDEN)
        products = rows + (2 * self.length - 1) * HIDDEN * HIDDEN + 3 * self.length**2 * HIDDEN
        limit = 2 * LAYERS * products / limits.gemm_rate(self.dtype)
        return Row(self.subject, self.case, str(self.dtype).removeprefix("torch."), timings, limit, "", failed)


@dataclass(frozen=True)
class ConformerMemory(ConformerRace):
    """The same beside a mask: one call of each in a process of its own, and its peak; nothing is timed."""

    fill: float = 0.9

    @property
    def case(self) -> str:
        return f"memory 1x{self.length} {self.fill:.0%} full"

    def run(self, settings: Settings = Settings()) -> Row:  # noqa: B008, it is frozen
        """Measures the peaks."""
        dtype = str(self.dtype).removeprefix("torch.")
        memory, resident, failed = {}, {}, {}
        for name in NAMES:
            command = [sys.executable, "-m", __spec__.name, name, str(self.length), dtype, str(self.fill)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
                failed[name] = last[:160]
                continue
            memory[name], resident[name] = map(int, done.stdout.split())
        note = "peak of the process in MB: "
        note += ", ".join(f"{name} {resident[name] / 1e6:.0f} (call {memory[name] / 1e6:.0f})" for name in memory)
        return Row(self.subject, self.case, dtype, {}, note=note, failed=failed, memory=memory)


def races() -> Iterator[ConformerRace]:
    """Every race of this file; they belong to the suite `models`."""
    for dtype in (torch.float32, torch.bfloat16):
        for length in (375, 1500):
            yield ConformerRace(length, dtype)
    yield ConformerMemory(10000, torch.float32)


def main() -> None:
    """Prints the bytes of a call above inputs and results, and of the whole process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("length", type=int)
    parser.add_argument("dtype")
    parser.add_argument("fill", type=float)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
    peak = peak_memory(contestant(options.name, options.length, getattr(torch, options.dtype), options.fill))
    print(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
