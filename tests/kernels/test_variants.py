"""How many kernels Triton makes of many ragged batches: sizes are not to be among what it compiles for."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

KERNELS = {
    "attention": {"fwd", "bwd_rows", "bwd_keys", "bwd_queries"},
    "relative_attention": {"fwd", "bwd_rows", "bwd_keys", "bwd_queries", "bwd_table"},
    "layer_norm": {"_fwd", "_bwd", "_sum_parts"},
}
LAYOUTS = ("packed", "padded")
DRAWN = 300


def test_ragged_batches_make_no_kernels_of_their_own() -> None:
    """Packed or padded, of one sequence or many, of lengths that 16 divides or not: one of each name."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found) == {f"{op}, {layout}" for op in KERNELS for layout in LAYOUTS}
    for kind, made in found.items():
        assert KERNELS[kind.split(",")[0]] <= set(made), kind
        assert set(made.values()) == {1}, (kind, made)


def batches(drawn: int) -> Iterator[list[int]]:
    """Lengths of sequences: of one and of one token, of those that 16 divides, and as many drawn ones."""
    draw = random.Random(0)
    yield from ([1], [16], [17], [1, 1], [32, 16], [16] * 16)
    for _ in range(drawn):
        most = draw.choice((1, 16, 64, 200))
        yield [draw.randint(1, most) for _ in range(draw.choice((1, 2, 5, 16, 33)))]


def main() -> None:
    """Prints, of each op and layout, how many kernels of each name Triton would have compiled."""
    import torch
    from pyxlbert.bench.ahead import compile_for, launching
    from triton.runtime.jit import JITFunction

    import pyxlbert

    variants: dict[str, dict[str, set[str]]] = {}
    kind = ""

    def compile(kernel: Any, key: Any, *rest: Any) -> None:
        variants.setdefault(kind, {}).setdefault(kernel.__name__, set()).add(str(key))

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
        kernel.warmup(*arguments, grid=grid, **options)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)

    def run(op: str, packed: bool, lengths: list[int]) -> None:
        longest, total = max(lengths), sum(lengths)
        rows = (total,) if packed else (len(lengths), longest)
        if packed:
            where = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(), "max_seqlen": longest}
        else:
            where = {"key_lengths": torch.tensor(lengths, dtype=torch.int32)}
        if op == "layer_norm":
            arguments, where = [tensor(*rows, 96), tensor(96), tensor(96)], {}
        else:
            arguments = [tensor(*rows, 2, 64) for _ in range(3)]
        if op == "relative_attention":
            arguments.append(tensor(2 * longest, 2, 64))
        out = getattr(pyxlbert, op)(*arguments, **where, backend="triton")
        out.backward(torch.empty_like(out))

    compile_for(90)
    JITFunction._do_compile = compile
    with launching(record, 90):
        for op in KERNELS:
            for layout in LAYOUTS:
                kind = f"{op}, {layout}"
                for lengths in batches(DRAWN // (len(KERNELS) * len(LAYOUTS))):
                    run(op, layout == "packed", lengths)
    print(json.dumps({kind: {name: len(keys) for name, keys in made.items()} for kind, made in variants.items()}))


if __name__ == "__main__":
    main()
