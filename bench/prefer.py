"""Times backends "cuda" and "triton" on the GPU that is here, for the table of `pyxlbert.backends.measured`.

    python -m pyxlbert.bench.prefer [--write pyxlbert/backends/measured.json] [--seconds 60]

Rows of other compute capabilities stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pyxlbert.bench.timer import race_on_gpu

import pyxlbert
from pyxlbert import backends
from pyxlbert.backends import OPS, measured

DTYPES = (torch.bfloat16, torch.float32)
# Rows of ops on rows, and tokens of attention, in sequences of up to 2048.
SIZES = (128, 2048, 16384)
WIDTH = 768
HEADS = 12


def _rows(rows: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, Callable[[], torch.Tensor]]]:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()

    x, residual, w, b, wide = leaf(rows, WIDTH), leaf(rows, WIDTH), leaf(WIDTH), leaf(WIDTH), leaf(rows, 4 * WIDTH)
    bias, words, places = leaf(4 * WIDTH), leaf(30000, WIDTH), leaf(512, WIDTH)
    ids = torch.randint(0, 30000, (max(1, rows // 128), min(rows, 128)), device="cuda")
    yield "layer_norm", x, lambda: pyxlbert.layer_norm(x, w, b)
    yield "dropout_add_layer_norm", x, lambda: pyxlbert.dropout_add_layer_norm(x, residual, w, b, dropout_p=0.1, seed=1)
    yield "bias_gelu", wide, lambda: pyxlbert.bias_gelu(wide, bias)
    yield "embedding_layer_norm", words, lambda: pyxlbert.embedding_layer_norm(ids, words, None, places, w, b)


def _scores(
    tokens: int, size: int, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, Callable[[], torch.Tensor]]]:
    length = min(tokens, 2048)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()

    q, k, v, g = (leaf(tokens // length, length, HEADS, size) for _ in range(4))
    table, bias = leaf(2 * length, HEADS, size), leaf(HEADS, size)
    relative = {"content_bias": bias, "position_bias": bias}
    yield "attention", q, lambda: pyxlbert.attention(q, k, v)
    yield "relative_attention", q, lambda: pyxlbert.relative_attention(q, k, v, table, **relative)
    yield "two_stream_attention", q, lambda: torch.cat(pyxlbert.two_stream_attention(q, g, k, v, table, **relative))


def _timed(call: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Seconds of forward and backward, by backend, interleaved."""

    def on(name: str) -> Callable[[], Any]:
        def run() -> None:
            with pyxlbert.use_backend(name):
                out = call()
            out.float().sum().backward()

        return run

    timings = race_on_gpu({name: on(name) for name in measured.USUAL}, rounds=11)
    return {name: timing.median for name, timing in timings.items()}


def measure(seconds: float) -> list[dict[str, Any]]:
    """Rows of measured.json for this device, as many as there is time for; a key is measured at every size."""
    capability = ".".join(str(number) for number in torch.cuda.get_device_capability())
    end = time.monotonic() + seconds
    rows = []
    for dtype in DTYPES:
        for make in (lambda n: _rows(n, dtype), lambda n: _scores(n, 64, dtype), lambda n: _scores(n, 128, dtype)):  # noqa: B023
            found: dict[measured.Key, list[tuple[int, float, float]]] = {}
            for n in SIZES:
                for op, tensor, call in make(n):
                    if any(OPS[op].refusal(name, tensor) for name in measured.USUAL):
                        continue
                    times = _timed(call)
                    key = measured.key_of(op, tensor, capability)
                    found.setdefault(key, []).append((tensor.numel(), times["cuda"], times["triton"]))
                    print(f"{tuple(key)} {tensor.numel()}: {times}", flush=True)
                if time.monotonic() > end:
                    return rows
            rows += [{"key": key._asdict(), "times": times} for key, times in found.items()]
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the rows of the same keys and leaves the others, whole or not at all."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    table = {tuple(row["key"].values()): row for row in (*before, *rows)}
    part = path.with_suffix(".part")
    part.write_text(json.dumps([table[key] for key in sorted(table)], indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyxlbert.bench.prefer", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the JSON file whose rows are replaced")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no further group of ops after so long")
    options = parser.parse_args(arguments)
    for name in measured.USUAL:
        reason = backends.unavailable(name)
        if reason is not None or backends.cuda_is_emulated or not torch.cuda.is_available():
            print(f"prefer: nothing was timed: backend {name!r} has no GPU here ({reason})", file=sys.stderr)
            return 2
    rows = measure(options.seconds)
    if options.write is not None:
        write(options.write, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
