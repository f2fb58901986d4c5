"""Sends the kinds of launches that the suite makes through Triton's front end, and prints a line of JSON per kernel.

    python tests/kernels/front_end.py OP .. [--all]

Triton compiles a kernel anew for an argument that is None, that is 1 (a constant from then on), or that is a multiple
of 16: source that holds for one kind need not hold for another.  The kinds are those of the suite's own cases
(`pyxlbert.testing.specs`): every case is called forward and backward on CPU tensors, and what its launchers launch is
recorded instead of run.  Nothing is generated beyond Triton's first representation, so that a kind takes half a second;
what passed is noted in the folder TRITON_CACHE_DIR, if that is set, and not tried again.

Of the kinds of a kernel so many are sent that any two things that one of them has together, as no mask and a boolean
constant, are together in one that is sent (`covering`): a third of them.  The front end only passes on which arguments
are multiples of 16, and sizes of tiles and the tag of dropout's bits are numbers like others to it: kinds that differ
in nothing else count as one, and every other case is of 16 bits.  With --all every kind of every case is sent.  A
process that interprets kernels has no front end: this is one of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


class Kind(NamedTuple):
    """A kind of launch of a kernel.

    Attributes:
        case: the op and its case that met the kind first.
        name: what no other kind is called.
        features: all that the front end can see of it, each a word.
    """

    case: str
    name: str
    features: frozenset[str]
    source: ASTSource
    options: Any


def features_of(kernel: Any, signature: dict[str, Any], constants: dict[tuple[int, ...], Any]) -> frozenset[str]:
    """What the front end can see of a launch; of the sizes of tiles what the kernels ask of them."""
    names = kernel.arg_names
    sizes = {names[path[0]]: n for path, n in constants.items() if names[path[0]] in SIZES}
    others = {path: value for path, value in constants.items() if names[path[0]] not in SIZES}
    others = {path: value._replace(tag=0) if hasattr(value, "tag") else value for path, value in others.items()}
    asked = {"whole": sizes.get("D") == sizes.get("BLOCK_D"), "long": sizes.get("D", 0) > 64}
    return frozenset(f"{path}: {value}" for given in (signature, others, asked) for path, value in leaves_of(given))


def leaves_of(x: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What stands in records of records, and where."""
    if not isinstance(x, (tuple, list, dict)):
        yield path, x
        return
    for place, value in x.items() if isinstance(x, dict) else enumerate(x):
        yield from leaves_of(value, (*path, place))


def covering(kinds: dict[str, frozenset[str]]) -> list[str]:
    """Some of the kinds, by their names: every two features that one kind has are together in one of these too.

    The next one is always that with the most pairs that are in none so far.
    """
    common = frozenset.intersection(*kinds.values())
    pairs = {
        name: set(itertools.combinations_with_replacement(sorted(features - common), 2))
        for name, features in kinds.items()
    }
    left, found = set().union(*pairs.values()), []
    while left:
        found.append(max(pairs, key=lambda name: len(pairs[name] & left)))
        left -= pairs[found[-1]]
    # Of a single kind all features are in common.
    return found or list(kinds)[:1]


class FrontEnd:
    """What stands behind `warmup` of a kernel: it notes the kinds of each, and sends some of them, or every one.

    Attributes:
        case: the op and the case that is called now.
        kinds: those of each kernel, by name.
    """

    def __init__(self, every: bool) -> None:
        self.every = every
        self.backend = make_backend(TARGET)
        self.case = ""
        self.kinds: dict[str, dict[str, Kind]] = {}
        kept = os.environ.get("TRITON_CACHE_DIR")
        self.passed = Path(kept) / "front_end" if kept else None

    def note(
        self, kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any, warmup: bool
    ) -> None:
        """In the place of `JITFunction._do_compile`."""
        source = ASTSource(kernel, signature, constants, attrs)
        features = features_of(kernel, signature, constants)
        name = source.hash() if self.every else f"{kernel.cache_key} {sorted(features)}"
        kinds = self.kinds.setdefault(f"{Path(kernel.fn.__code__.co_filename).stem}.{kernel.__name__}", {})
        kinds.setdefault(name, Kind(self.case, name, features, source, options))

    def send(self) -> Iterator[dict[str, Any]]:
        """Of each kernel how many kinds there are, how many are sent, and what was wrong with them."""
        for kernel, kinds in self.kinds.items():
            chosen = list(kinds) if self.every else covering({name: kind.features for name, kind in kinds.items()})
            wrong = [failure for name in chosen if (failure := self._wrong(kinds[name])) is not None]
            yield {"kernel": kernel, "kinds": len(kinds), "sent": len(chosen), "failures": wrong}

    def _wrong(self, kind: Kind) -> str | None:
        note = None
        if self.passed is not None:
            note = self.passed / hashlib.sha256(f"{triton.__version__} {kind.name}".encode()).hexdigest()
            if note.exists():
                return None
        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        functions, modules = self.backend.get_codegen_implementation(kind.options), self.backend.get_module_map()
        try:
            kind.source.make_ir(TARGET, kind.options, functions, modules, context)
        except Exception:
            return f"{kind.case}: {traceback.format_exc(limit=1)[-600:]}"
        if note is not None:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
        return None


def main(ops: list[str], every: bool) -> None:
    compile_for(ARCHITECTURE)
    front_end = FrontEnd(every)
    JITFunction._do_compile = lambda kernel, *arguments: front_end.note(kernel, *arguments)

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
        kernel.warmup(*arguments, grid=grid, **options)

    with launching(record, ARCHITECTURE):
        for op in ops:
            for case, call in calls(SPECS[op], every):
                front_end.case = f"{op}, {case}"
                call()
    for line in front_end.send():
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if word != "--all"], "--all" in sys.argv)
