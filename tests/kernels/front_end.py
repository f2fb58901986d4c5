"""Sends every kind of launch that the suite makes through Triton's front end, and prints a line of JSON for each op.

    python tests/kernels/front_end.py OP .. [--all]

Triton compiles a kernel anew for an argument that is None, that is 1 (a constant from then on), or that is a multiple
of 16: source that holds for one kind need not hold for another.  The kinds are those of the suite's own cases
(`pyxlbert.testing.specs`): every case is called forward and backward on CPU tensors, and what its launchers launch is
recorded instead of run.  Nothing is generated beyond Triton's first representation, so that a kind takes a tenth of a
second; what passed is noted in the folder TRITON_CACHE_DIR, if that is set, and not tried again.

The front end only passes on which arguments are multiples of 16, and sizes of tiles and the tag of dropout's bits are
numbers like others to it: kinds that differ in nothing else count as one, and every other case is of 16 bits, unless
--all is asked for.  A kind that one op has met is not tried again for the next.  A
process that interprets kernels has no front end: this is one of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from pyxlbert.bench.ahead import compile_for, launching
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from pyxlbert import backends
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Case, Spec, as_tuple

ARCHITECTURE = 90
TARGET = GPUTarget("cuda", ARCHITECTURE, 32)
SIZES = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "D")
DTYPES = (torch.bfloat16, torch.float32)


def calls(spec: Spec, every: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every case, its name and what calls it forward and backward."""
    for place, case in enumerate(spec.suite):
        for dtype in DTYPES if every else (DTYPES[place % 2],):

            def call(case: Case = case, dtype: torch.dtype = dtype) -> None:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.name}/{case.id}".encode()))
                arguments = spec.arguments(case, generator, dtype, torch.device("cpu"))
                names = spec.leaves(arguments)
                arguments |= {name: arguments[name].detach().requires_grad_() for name in names}
                for atomics in (contextlib.nullcontext(), backends.allow_atomics()):
                    outputs = as_tuple(spec.function(**arguments, backend="triton"))
                    if not case.gradients or not names:
                        continue
                    leaves, cotangents = [arguments[name] for name in names], [torch.zeros_like(x) for x in outputs]
                    with atomics:
                        torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)

            yield f"{case.id}, {str(dtype).removeprefix('torch.')}", call


def _kind(kernel: Any, signature: dict[str, Any], constants: dict[tuple[int, ...], Any]) -> str:
    """What the front end can see of a launch; of the sizes of tiles what the kernels ask of them."""
    names = kernel.arg_names
    sizes = {names[path[0]]: n for path, n in constants.items() if names[path[0]] in SIZES}
    others = {path: value for path, value in constants.items() if names[path[0]] not in SIZES}
    others = {path: value._replace(tag=0) if hasattr(value, "tag") else value for path, value in others.items()}
    head_size = sizes.get("D", 0)
    return f"{kernel.cache_key} {signature} {others} {head_size == sizes.get('BLOCK_D')} {head_size > 64}"


class FrontEnd:
    """What stands behind `warmup` of a kernel: the first representation of each kind, once.

    Attributes:
        kinds: how many there are of each kernel, of the op that `begin` has named last.
        failures: the kernel, the case that met the kind first, and what was wrong with it.
    """

    def __init__(self, every: bool) -> None:
        self.every = every
        self.backend = make_backend(TARGET)
        self.case = ""
        self.right: set[str] = set()
        self.begin()
        kept = os.environ.get("TRITON_CACHE_DIR")
        self.passed = Path(kept) / "front_end" if kept else None

    def begin(self) -> None:
        """Forgets what the op before has met, but not what was right."""
        self.seen: set[str] = set()
        self.kinds: dict[str, int] = {}
        self.failures: list[str] = []

    def compile(
        self, kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any, warmup: bool
    ) -> None:
        """In the place of `JITFunction._do_compile`."""
        source = ASTSource(kernel, signature, constants, attrs)
        kind = source.hash() if self.every else _kind(kernel, signature, constants)
        if kind in self.seen:
            return
        self.seen.add(kind)
        name = f"{Path(kernel.fn.__code__.co_filename).stem}.{kernel.__name__}"
        self.kinds[name] = self.kinds.get(name, 0) + 1
        if kind in self.right:
            return
        note = None
        if self.passed is not None:
            note = self.passed / hashlib.sha256(f"{triton.__version__} {kind}".encode()).hexdigest()
            if note.exists():
                return
        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        functions, modules = self.backend.get_codegen_implementation(options), self.backend.get_module_map()
        try:
            source.make_ir(TARGET, options, functions, modules, context)
        except Exception:
            self.failures.append(f"{name} in {self.case}: {traceback.format_exc(limit=1)[-600:]}")
            return
        self.right.add(kind)
        if note is not None:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()


def main(ops: list[str], every: bool) -> None:
    compile_for(ARCHITECTURE)
    front_end = FrontEnd(every)
    JITFunction._do_compile = lambda kernel, *arguments: front_end.compile(kernel, *arguments)

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
        kernel.warmup(*arguments, grid=grid, **options)

    with launching(record, ARCHITECTURE):
        for op in ops:
            front_end.begin()
            for front_end.case, call in calls(SPECS[op], every):
                call()
            print(json.dumps({"op": op, "kinds": front_end.kinds, "failures": front_end.failures}), flush=True)


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if word != "--all"], "--all" in sys.argv)
