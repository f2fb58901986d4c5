"""Compiles the kernels of one op for every architecture, without a GPU, and prints a line of JSON for each.

    python tests/kernels/compile_ahead.py OP [--all]

Without --all one architecture takes all of the op's cases, and the others share out the usual ones, so that every
kernel is compiled for several of them and every architecture is met (COVERING).

The op's launchers are called on CPU tensors, and each launch is compiled instead of run: with the arguments, constants
and alignments that the JIT would see.  A process that interprets kernels cannot compile them: this is one of its own.
Triton's cache, and beside it what the disassembler said, are kept in the folder TRITON_CACHE_DIR.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pyxlbert.bench.ahead import ARCHITECTURES, SHARED, compile_for, report
from torch import Tensor

from pyxlbert import backends
from pyxlbert.testing.direct import Direct

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Calls = Iterator[tuple[str, Callable[[Any], None]]]


def parameters(n: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, dtype=dtype)


def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# The architecture that takes all cases, and which others a case is compiled for.
FULL = 90
COVERING: dict[str, dict[str, tuple[int, ...]]] = {
    "layer_norm": {"768 torch.bfloat16": (80, 120)},
    "bias_gelu": {"768 torch.bfloat16": (86, 100)},
    "dropout_add_layer_norm": {"768 torch.bfloat16": (89, 100)},
    "embedding_layer_norm": {"768 torch.bfloat16": (80, 120)},
    "attention": {
        "D=64 torch.bfloat16 plain": (86, 100),
        "D=64 torch.bfloat16 everything": (80, 120),
        # The largest tiles, where shared memory is smallest.
        "D=256 torch.bfloat16 plain": (86,),
    },
    "relative_attention": {
        "D=64 torch.bfloat16 XLNet": (80, 120),
        "D=64 torch.bfloat16 positions": (89, 100),
    },
    # Its kernels are those of relative_attention.
    "two_stream_attention": {},
}
SEED = torch.zeros(1, dtype=torch.int64)
ROWS = 4096


def layer_norm(every: bool) -> Calls:
    def call(columns: int, dtype: torch.dtype) -> Callable[[Any], None]:
        def run(op: Any) -> None:
            x, w = torch.empty(ROWS, columns, dtype=dtype), parameters(columns, dtype)
            _, mean, rstd = op.layer_norm_fwd(x, w, w, 1e-5, True)
            op.layer_norm_fwd(x, w, w, 1e-5, False)
            op.layer_norm_bwd(x, x, w, w, mean, rstd, True)
            op.layer_norm_bwd(x, x, w, w, mean, rstd, False)

        return run

    yield from _widths(call, every)


def _widths(call: Callable[[int, torch.dtype], Callable[[Any], None]], every: bool) -> Calls:
    for columns in (384, 768, 1024) if every else (768,):
        for dtype in (BF16, F32):
            yield f"{columns} {dtype}", call(columns, dtype)


def bias_gelu(every: bool) -> Calls:
    def call(columns: int, dtype: torch.dtype) -> Callable[[Any], None]:
        def run(op: Any) -> None:
            x, bias = torch.empty(ROWS, 4 * columns, dtype=dtype), parameters(4 * columns, dtype)
            for approximate in ("none", "tanh"):
                op.bias_gelu_fwd(x, bias, approximate)
                op.bias_gelu_bwd(x, x, bias, approximate, True)

        return run

    yield from _widths(call, every)


def dropout_add_layer_norm(every: bool) -> Calls:
    def call(columns: int, dtype: torch.dtype) -> Callable[[Any], None]:
        def run(op: Any) -> None:
            x, w, stream = (
                torch.empty(ROWS, columns, dtype=dtype),
                parameters(columns, dtype),
                torch.empty(ROWS, columns),
            )
            mean = torch.empty(ROWS)
            for p, bias in ((0.1, w), (0.0, None)):
                op.dropout_add_layer_norm_fwd(x, stream, w, w, bias, p, SEED, 1e-5, dtype, True)
                given = (stream, x, stream, w, w, bias, mean, mean, p, SEED, dtype)
                op.dropout_add_layer_norm_bwd(*given, True, True, True, bias is not None)

        return run

    yield from _widths(call, every)


def embedding_layer_norm(every: bool) -> Calls:
    def call(columns: int, dtype: torch.dtype) -> Callable[[Any], None]:
        def run(op: Any) -> None:
            ids, mean = numbers(8, 512, dtype=torch.int64), torch.empty(8, 512)
            word, kinds, places = (torch.empty(n, columns, dtype=dtype) for n in (3000, 2, 512))
            w = parameters(columns, dtype)
            tables = (ids, word, kinds, places, w, w, ids, None)
            op.embedding_layer_norm_fwd(*tables, 0.1, SEED, 1e-5, F32, dtype)
            dy = torch.empty(8, 512, columns)
            op.embedding_layer_norm_bwd(dy, *tables, mean, mean, 0.1, SEED, 0, True, True, True, True)

        return run

    yield from _widths(call, every)


BATCH, LENGTH, HEADS = 2, 512, 12


def _query_key_value(head_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.empty(BATCH, LENGTH, HEADS, 3 * head_size, dtype=dtype).split(head_size, -1)


def _heads(every: bool) -> Iterator[tuple[int, torch.dtype]]:
    yield from ((64, BF16), (64, F32), (128, BF16))
    if every:
        yield from ((32, BF16), (80, BF16), (96, F16), (128, F32), (64, F16), (256, BF16), (256, F32))


def attention(every: bool) -> Calls:
    def call(head_size: int, dtype: torch.dtype, kind: str) -> Callable[[Any], None]:
        def run(op: Any) -> None:
            q, k, v = _query_key_value(head_size, dtype)
            mask, bias, p, causal, lengths, cu_seqlens = None, None, 0.0, False, None, None
            if kind == "everything":
                mask = torch.empty(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
                bias = torch.empty(1, HEADS, LENGTH, LENGTH, dtype=dtype)
                p, causal, lengths = 0.1, True, numbers(BATCH)
            if kind == "packed":
                q, k, v = (x.flatten(0, 1) for x in (q, k, v))
                cu_seqlens = numbers(BATCH + 1)
            given = (lengths, cu_seqlens, LENGTH, mask, bias, causal, head_size**-0.5, p, SEED)
            out, lse = op.attention_fwd(q, k, v, *given)
            op.attention_bwd(out, out, lse, q, k, v, *given, bias is not None)

        return run

    for head_size, dtype in _heads(every):
        for kind in ("plain", "everything", "packed") if every else ("plain", "everything"):
            yield f"D={head_size} {dtype} {kind}", call(head_size, dtype, kind)
    if not every:
        yield f"D=256 {BF16} plain", call(256, BF16, "plain")


def _relative(head_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Table, content and position bias."""
    bias = torch.empty(HEADS, head_size, dtype=dtype)
    return torch.empty(2 * LENGTH, HEADS, head_size, dtype=dtype), bias, bias


def relative_attention(every: bool) -> Calls:
    def call(head_size: int, dtype: torch.dtype, kind: str) -> Callable[[Any], None]:
        def run(op: Any) -> None:
            q, k, v = _query_key_value(head_size, dtype)
            table, u, w = _relative(head_size, dtype)
            of = numbers(BATCH, LENGTH)
            segments = (None, None, None, None)
            mask, p, ranks, positions = None, 0.0, (None, None), None
            if kind != "plain":
                segments = (u, torch.empty(2, HEADS, head_size, dtype=dtype), of, of)
                ranks = (of, of)
            if kind == "everything":
                mask, p = torch.empty(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool), 0.1
            if kind == "positions":
                positions = of
            given = (q, k, v, table, u, w, LENGTH, *segments, positions, numbers(BATCH), None, 0, *ranks)
            given += (kind != "plain", mask, False, False, head_size**-0.5, p, SEED)
            out, lse = op.relative_attention_fwd(*given)
            with backends.allow_atomics() if kind == "atomics" else contextlib.nullcontext():
                op.relative_attention_bwd(out, out, lse, *given, [True] * 8)

        return run

    for head_size, dtype in _heads(every):
        if head_size > 128:
            continue
        kinds = ("plain", "XLNet", "everything", "positions", "atomics")
        for kind in kinds if every or (head_size, dtype) == (64, BF16) else ("XLNet",):
            yield f"D={head_size} {dtype} {kind}", call(head_size, dtype, kind)


def two_stream_attention(every: bool) -> Calls:
    def call(head_size: int, dtype: torch.dtype) -> Callable[[Any], None]:
        def run(op: Any) -> None:
            q, k, v = _query_key_value(head_size, dtype)
            table, u, w = _relative(head_size, dtype)
            of, targets = numbers(BATCH, LENGTH), numbers(BATCH, 85)
            embedding = torch.empty(2, HEADS, head_size, dtype=dtype)
            given = (q, q[:, :85], k, v, table, u, w, LENGTH, u, embedding, of, of, targets, None, of, of, None)
            given += (False, head_size**-0.5, 0.1, SEED)
            content, lse, query, query_lse = op.two_stream_attention_fwd(*given)
            op.two_stream_attention_bwd(content, query, content, lse, query, query_lse, *given, [True] * 9)

        return run

    for head_size, dtype in _heads(every) if every else ((64, BF16),):
        yield f"D={head_size} {dtype}", call(head_size, dtype)


def main(op: str, every: bool) -> None:
    packages = Path(importlib.import_module("pyxlbert.kernels").__path__[0])
    modules = [importlib.import_module(f"pyxlbert.kernels.{path.stem}") for path in sorted(packages.glob("*.py"))]
    configurations = importlib.import_module("pyxlbert.kernels._configurations")
    architecture = 0
    seen: set[str] = set()
    case = ""

    def compile_it(kernel: Any, grid: Any, device: Any, *arguments: Any, **options: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        line = {
            "architecture": architecture,
            "kernel": kernel.__name__,
            "case": case,
            "shared": compiled.metadata.shared,
            **report(compiled),
        }
        line |= {name: options[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages") if name in options}
        line["half"] = any(isinstance(x, Tensor) and x.dtype in (BF16, F16) for x in arguments)
        print(json.dumps(line), flush=True)

    for module in modules:
        if hasattr(module, "launch"):
            module.launch = compile_it
    kernels = Direct("triton")
    configurations.card = lambda device: configurations.Card(architecture, SHARED[architecture])
    for architecture in ARCHITECTURES:
        compile_for(architecture)
        for case, run in globals()[op](every):
            if every or architecture == FULL or architecture in COVERING[op].get(case, ()):
                run(kernels)


if __name__ == "__main__":
    main(sys.argv[1], "--all" in sys.argv)
