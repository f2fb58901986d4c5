"""Compiles the kernels of ops for every architecture, without a GPU, and prints a line of JSON for each.

    python tests/kernels/compile_ahead.py OP .. [--all]

Without --all the architectures share out the op's usual cases (`Use.AHEAD` in `pyxlbert.testing.specs`), so that each
case is compiled, every kernel for several architectures, and every architecture is met (COVERING).  With it every
architecture takes all cases, those of `Use.AHEAD_ALL` too.

The op is called on CPU tensors, and each launch is compiled instead of run: with the arguments, constants and
alignments that the JIT would see.  A process that interprets kernels cannot compile them: this is one of its own.
Triton's cache is kept in the folder TRITON_CACHE_DIR.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from pyxlbert.bench.ahead import ARCHITECTURES, compile_for, instructions, launching, report
from pyxlbert.kernels._plan import tensors_in

from pyxlbert import backends
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Case, Spec, Use, as_tuple

# The architecture of the cases that are not named here, and those of the others.
USUAL = 90
COVERING: dict[str, dict[str, tuple[int, ...]]] = {
    "layer_norm": {"1024x768 forward+backward torch.bfloat16": (80, 90, 120)},
    "bias_gelu": {f"1024x3072 {form} torch.bfloat16": (86, 90, 100) for form in ("none", "tanh")},
    "dropout_add_layer_norm": {
        f"4096x768 stream{kind} torch.bfloat16": (89, 90, 100) for kind in ("", " with bias, dropout")
    },
    "embedding_layer_norm": {"8x512x768 torch.bfloat16": (80, 90, 120)},
    "attention": {
        "D=64 plain torch.float32": (89,),
        "D=64 everything torch.bfloat16": (80, 90),
        "D=64 everything torch.float32": (120,),
        "D=128 everything torch.bfloat16": (100,),
        # The largest tiles, where shared memory is smallest.
        "D=256 plain torch.bfloat16": (86,),
    },
    "relative_attention": {
        "D=64 XLNet torch.bfloat16": (80, 90),
        "D=64 XLNet torch.float32": (90,),
        "D=64 everything torch.bfloat16": (86, 120),
        "D=64 positions torch.bfloat16": (100,),
    },
    # Its kernels are those of relative_attention.
    "two_stream_attention": {},
}
# Of the ops of scores the case that is called in all ways: those kernels are many, and what differs between ways is the
# same for all cases.
MANY_WAYS = "XLNet"
# The op of which instructions are counted for each element: its arithmetic is the same for all.
BY_ELEMENT = "bias_gelu"


def calls(spec: Spec, every: bool) -> Iterator[tuple[str, partial[None]]]:
    """Every case, its name and what calls it in all ways that launch other kernels."""
    for use in (Use.AHEAD, Use.AHEAD_ALL) if every else (Use.AHEAD,):
        for case in spec.used(use):
            for dtype in case.uses[use]:
                many = "attention" not in spec.name or case.id.endswith(MANY_WAYS)
                # Arguments are drawn by those that are called: few of an architecture's, and none where names will do.
                yield f"{case.id} {dtype}", partial(call, spec, case, dtype, many)


def call(spec: Spec, case: Case, dtype: torch.dtype, many: bool) -> None:
    """Forward alone, and backward for all gradients; in `many` ways also for the first alone, and with atomics."""
    arguments = spec.arguments(case, torch.Generator().manual_seed(0), dtype, torch.device("cpu"))
    spec.function(**arguments, backend="triton")
    names = spec.leaves(arguments)
    ways = [(names, contextlib.nullcontext())]
    if many:
        ways += [(names[:1], contextlib.nullcontext()), (names, backends.allow_atomics())]
    for wanted, how in ways:
        leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
        outputs = as_tuple(spec.function(**arguments | leaves, backend="triton"))
        with how:
            torch.autograd.grad(outputs, list(leaves.values()), [torch.zeros_like(x) for x in outputs])


def main(op: str, every: bool) -> None:
    """One op."""
    architecture = 0
    seen: set[str] = set()
    case = ""

    def compile_it(kernel: Any, grid: Any, device: Any, *arguments: Any, **options: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        line = {
            "op": op,
            "architecture": architecture,
            "kernel": kernel.__name__,
            "case": case,
            "shared": compiled.metadata.shared,
            **report(compiled),
        }
        line |= {name: options[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages") if name in options}
        line["half"] = any(x.dtype in (torch.bfloat16, torch.float16) for x in tensors_in(arguments))
        # The test has a limit for elements of 16 bits alone.
        if op == BY_ELEMENT and line["half"]:
            each = options.get("BLOCK_M", 1) * options["BLOCK_N"] / (32 * options["num_warps"])
            line["instructions"] = instructions(compiled) / each
        print(json.dumps(line), flush=True)

    for architecture in ARCHITECTURES:
        compile_for(architecture)
        with launching(compile_it, architecture):
            for case, run in calls(SPECS[op], every):
                if every or architecture in COVERING[op].get(case, (USUAL,)):
                    run()


if __name__ == "__main__":
    for word in sys.argv[1:]:
        if word != "--all":
            main(word, "--all" in sys.argv)
