"""Runs cases on an emulation, `python runs.py MODULE "OP: CASE" ..`, and says "right" or "wrong" of each;
with CUDA_EMULATION_FILES=1 it also names the project's files whose functions are called.

`python runs.py --serve` does so for every line of JSON that it reads, in a process forked from this one: a bug may end
it, and what all of them need is imported once.

Sizes (see `Use.EMULATION` in `pyxlbert.testing.specs`) are such that every pipeline turns more than three times, blocks
have several rows or tiles, and warps meet.  What is right is near plain PyTorch in float64.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from pyxlbert import backends
from pyxlbert.testing import tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, Case, Spec, Use, as_tuple, to_float64


def runs(use: Use) -> list[str]:
    """The op and the case of every run."""
    return [f"{spec.name}: {case.id}" for spec in SPECS.values() for case in spec.used(use)]


ROOT = Path(__file__).resolve().parents[2]
RUNS = runs(Use.EMULATION)
# With CUDA_EMULATION_HOPPER=1.
HOPPER_RUNS = runs(Use.HOPPER)


def results_of(spec: Spec, function, arguments: Arguments) -> list[torch.Tensor]:
    names = spec.leaves(arguments)
    arguments = arguments | {n: arguments[n].detach().requires_grad_() for n in names}
    outputs = as_tuple(function(**arguments))
    generator = torch.Generator().manual_seed(4)
    cotangents = [torch.randn(o.shape, generator=generator).to(torch.bfloat16).to(o.dtype) for o in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, [arguments[n] for n in names], cotangents)]
    return [x.detach() for x in found]


def case_of(run: str) -> tuple[Spec, Case]:
    op, _, id = run.partition(": ")
    spec = SPECS[op]
    return spec, next(case for case in spec.cases if case.id == id)


def head_size(run: str) -> int:
    """0 of kernels of rows."""
    return getattr(case_of(run)[1].inputs, "head_size", 0)


def wrong(run: str) -> str | None:
    """The first result that is not plain PyTorch's, or None."""
    spec, case = case_of(run)
    arguments = spec.arguments(case, torch.Generator().manual_seed(3), torch.bfloat16, torch.device("cpu"))
    ours = results_of(spec, lambda **a: spec.function(**a, backend="cuda"), arguments)
    # What nobody may see is NaN to ours alone: plain PyTorch would multiply it by zero.
    seen = {n: x.nan_to_num() if n == "value" else x for n, x in to_float64(arguments).items()}
    truth = results_of(spec, spec.plain, seen)
    for place, (x, wanted) in enumerate(zip(ours, truth, strict=True)):
        error = float((x.double() - wanted).norm() / wanted.norm())
        if not error <= tolerances.MODEL_BFLOAT16:
            return f"result {place} is off by {error:.3g}"
    return None


def main(module: str, *wanted: str) -> int:
    spec = importlib.util.spec_from_file_location("_emulated", Path(module))
    # A bug's build has but the functions that its op needs.
    sys.setdlopenflags(os.RTLD_LAZY)
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    backends.emulate_cuda(emulated)
    called: set[str] = set()
    if os.environ.get("CUDA_EMULATION_FILES") == "1":
        sys.setprofile(lambda frame, event, value: called.add(frame.f_code.co_filename))
    for run in wanted:
        found = wrong(run)
        print(f"{run}: {'right' if found is None else f'wrong, {found}'}", flush=True)
    sys.setprofile(None)
    for file in sorted(called):
        # Not those of packages, which may lie in a folder of this one.
        if Path(file).is_relative_to(ROOT) and "site-packages" not in file:
            print(f"calls {file}", flush=True)
    return 0


def serve() -> None:
    """The answer to a line: the process's exit code, negative for a signal, and what it said."""
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os.environ.update(asked["environment"])
                code = 1
                try:
                    code = main(asked["module"], *asked["wanted"])
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = [file.seek(0) or file.read().decode(errors="replace") for file in (out, err)]
        print(json.dumps([code, *said]), flush=True)


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1] == "--serve" else main(*sys.argv[1:]))
