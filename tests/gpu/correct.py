"""A part of the common suite on one backend, for `make gpu`: every result is appended to a file as it comes.

    python tests/gpu/correct.py triton OUT.jsonl --part 0/8 --dtypes float32 bfloat16

A line {"begin": case} stands before every case, {"case": ..., "result": "passed" or why not} behind it, and cases with
a result in the file, or in one of --done, are not run again: whoever watches can end a process that hangs, say so in
the file, and start another.  A "CUDA error" leaves a process without a device, so that ends it with status 3.  Outputs
are compared with float64 on the CPU; of every op one case is run many times, and has to give the same bits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyxlbert import backends
from pyxlbert.backends import OPS
from pyxlbert.testing import runners
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Case, Spec

DTYPES = ("float32", "bfloat16", "float16")
REPEATS = 200


def one(spec: Spec, case: Case, dtype: torch.dtype, backend: str) -> None:
    """Forward and every gradient within the error budget."""
    arguments = runners.arguments_of(spec, case, dtype, runners.device_of(backend))
    refusal = OPS[spec.name].refusal(backend, runners.deciding(arguments))
    if refusal is not None:
        # A head size or a row that the backend has no kernel for; the op suite asks for the words.
        return
    ours = runners.run(lambda **a: spec.function(**a, backend=backend), spec, arguments, case.gradients)
    runners.check_against_truth(spec, case, ours, dtype, backend)


def same_bits(spec: Spec, case: Case, dtype: torch.dtype, backend: str) -> None:
    """A call gives the same bits every time."""
    arguments = runners.arguments_of(spec, case, dtype, runners.device_of(backend))
    given = runners.with_gradients(spec, arguments)
    first: list[torch.Tensor] = []
    for number in range(REPEATS):
        outputs = spec.function(**given, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [given[name] for name in spec.leaves(arguments)]
        found = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], allow_unused=True)
        results = [x.detach() for x in (*outputs, *found) if x is not None]
        first = first or results
        for place, (a, b) in enumerate(zip(first, results, strict=True)):
            if not torch.equal(a.nan_to_num(), b.nan_to_num()):
                raise AssertionError(f"result {place} of call {number} has other bits than the first")


def cases(backend: str, dtypes: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], None]]]:
    """All of a backend, each with its name."""
    for spec in SPECS.values():
        if backend not in OPS[spec.name].backends:
            continue
        for dtype in (getattr(torch, name) for name in dtypes):
            if dtype not in spec.dtypes:
                continue
            suite = [case for case in spec.suite if not case.full_only]
            for case in suite:
                yield f"{spec.name}, {case.id}, {dtype}", partial(one, spec, case, dtype, backend)
            repeated = next((case for case in suite if case.small and case.gradients), None)
            if repeated is not None:
                yield f"{spec.name}, same bits, {dtype}", partial(same_bits, spec, repeated, dtype, backend)


def known(files: list[Path]) -> set[str]:
    """The cases that have a result; the last line of a file that is still written may be half of one."""
    found = set()
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                found.add(json.loads(line).get("case"))
            except ValueError:
                continue
    return found


def main(arguments: list[str] | None = None) -> int:
    """0 where every case has run, whatever came of it; 2 without the backend, 3 after an error of the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=backends.NAMES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", default="0/1", help="the first of every so many cases")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="files whose cases are not run again")
    options = parser.parse_args(arguments)
    part, parts = (int(number) for number in options.part.split("/"))
    reason = backends.unavailable(options.backend)
    if reason is not None:
        print(f"backend {options.backend!r}: {reason}", file=sys.stderr)
        return 2
    done = known([options.out, *options.done])
    chosen = [one for place, one in enumerate(cases(options.backend, tuple(options.dtypes))) if place % parts == part]
    chosen = [(name, run) for name, run in chosen if name not in done]
    with options.out.open("a", encoding="utf-8") as file:

        def say(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=file, flush=True)

        for place, (name, run) in enumerate(chosen):
            say({"begin": name})
            try:
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            except KeyboardInterrupt:
                say({"left": len(chosen) - place})
                return 130
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                say({"case": name, "result": f"{type(error).__name__}: {first}"[:400]})
                if "CUDA error" in str(error):
                    return 3
            else:
                say({"case": name, "result": "passed"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
