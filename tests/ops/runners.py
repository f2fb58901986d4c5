"""What the common suite shares: runners, which are every backend and level that is here, and inputs of every op.

The suite itself is `test_parity.py`, `test_contract.py`, `test_compile.py` and `test_choice.py`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import zlib
from collections.abc import Iterator

import torch

import pyxlbert
from pyxlbert import backends
from pyxlbert.backends import OPS
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, Bad, Case, Spec, as_tuple, to_float64

ALL = os.environ.get("PYXLBERT_TEST_ALL") == "1"
# The sanitizer run sets this to the levels it watches: small cases on those, backend cpu alone.
SMALL = [level for level in os.environ.get("PYXLBERT_TEST_SMALL", "").split(",") if level]
CPU = torch.device("cpu")
GPU = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _runners() -> list[str]:
    """Backend names, the cpu backend once per instruction-set level, "cpu/avx2", and torch on the GPU, "torch/cuda"."""
    names = []
    for name in backends.available():
        if name == "cpu":
            names += [f"cpu/{level}" for level in pyxlbert._C.levels() if not SMALL or level in SMALL]
        elif not SMALL:
            names.append(name)
    return names if GPU is None or SMALL else [*names, "torch/cuda"]


RUNNERS = _runners()
# Without a GPU Triton's interpreter takes a second for what a kernel does in microseconds, and the emulation of CUDA
# some milliseconds: small cases, in the interpreter of one dtype each.
SLOW = () if torch.cuda.is_available() else ("triton", "cuda")
SLOWEST = SLOW[:1]
FAST = [runner for runner in RUNNERS if "/" not in runner or runner in (f"cpu/{pyxlbert._C.level()}", "torch/cuda")]


def runners_of(spec: Spec) -> list[str]:
    """The runners that differ for this op: a vendor's library has no levels of ours, few ops use tiles."""
    candidates = FAST if spec.vendor else RUNNERS
    if "cpu/amx" in candidates and not spec.tiles:
        candidates = [runner for runner in candidates if runner != "cpu/avx512_bf16"]
    return [runner for runner in candidates if runner.partition("/")[0] in OPS[spec.name].backends]


def device_of(runner: str) -> torch.device:
    """Where the runner's tensors live."""
    return GPU if GPU is not None and runner in ("triton", "cuda", "torch/cuda") else CPU


def best(spec: Spec) -> str:
    """The backend that a caller on the CPU gets."""
    return "cpu" if "cpu" in OPS[spec.name].backends else "torch"


@contextlib.contextmanager
def running(runner: str) -> Iterator[str]:
    """Selects the runner's instruction-set level; gives the backend's name."""
    backend, _, level = runner.partition("/")
    before = pyxlbert._C.level()
    if backend == "cpu" and level:
        pyxlbert._C.set_level(level)
    try:
        yield backend
    finally:
        pyxlbert._C.set_level(before)


def arguments_of(spec: Spec, case: Case, dtype: torch.dtype, device: torch.device = CPU) -> Arguments:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.name}/{case.id}".encode()))
    return spec.arguments(case, generator, dtype, device)


def with_gradients(spec: Spec, arguments: Arguments) -> Arguments:
    """Arguments whose differentiable tensors are leaves (strides kept) that require a gradient."""
    result = dict(arguments)
    for name in spec.leaves(arguments):
        result[name] = arguments[name].detach().requires_grad_()
    return result


def cotangents_of(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs)


def run(function, spec: Spec, arguments: Arguments, gradients: bool, cotangents=None) -> dict[str, torch.Tensor]:
    """Outputs as "out 0", ... and gradients as "grad x", ..., on the CPU."""
    if gradients:
        arguments = with_gradients(spec, arguments)
    outputs = as_tuple(function(**arguments))
    results = {f"out {i}": output.detach() for i, output in enumerate(outputs)}
    if gradients:
        names = spec.leaves(arguments)
        if cotangents is None:
            cotangents = cotangents_of(outputs)
        cotangents = tuple(c.to(o) for c, o in zip(cotangents, outputs, strict=True))
        found = torch.autograd.grad(outputs, [arguments[n] for n in names], cotangents, allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            results[f"grad {name}"] = torch.zeros_like(arguments[name]) if gradient is None else gradient
    return {name: value.cpu() for name, value in results.items()}


@functools.lru_cache(maxsize=4)
def _expected(op: str, case_id: str, dtype: torch.dtype) -> tuple[dict, dict, dict]:
    """Plain PyTorch's results, the truth and the sums of absolute terms: one set for all runners."""
    spec = SPECS[op]
    case = next(case for case in spec.suite if case.id == case_id)
    arguments = arguments_of(spec, case, dtype)
    wide = to_float64(arguments)
    plain = run(spec.plain, spec, arguments, case.gradients)
    cotangents = cotangents_of(tuple(plain[k] for k in plain if k.startswith("out")))
    truth = run(spec.plain, spec, wide, case.gradients, cotangents)
    terms = {name: spec.terms(name, wide, cotangents) if spec.terms is not None else None for name in truth}
    return plain, truth, terms


def check_against_truth(spec: Spec, case: Case, ours: dict, dtype: torch.dtype, backend: str) -> None:
    plain, truth, terms = _expected(spec.name, case.id, dtype)
    for name, value in ours.items():
        compare.within_budget(
            f"{spec.name} {case.id} {name}",
            value,
            plain[name].to(value.dtype) if name.startswith("out") else plain[name],
            truth[name],
            terms=terms[name],
            factor=tolerances.factor(spec.name, dtype, backend),
        )


def grid() -> Iterator[tuple[Spec, Case]]:
    for spec in SPECS.values():
        for case in spec.suite:
            if (ALL or not case.full_only) and (case.small or not SMALL):
                yield spec, case


def ids_of(value) -> str | None:
    if isinstance(value, Spec):
        return value.name
    if isinstance(value, Case | Bad):
        return value.id.replace(" ", "_")
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return None


def deciding(arguments: Arguments) -> torch.Tensor:
    """The tensor that decides the backend: the first of a floating dtype."""
    return next(x for x in arguments.values() if isinstance(x, torch.Tensor) and x.is_floating_point())


def first_tensors(spec: Spec) -> list[tuple[str, torch.Tensor]]:
    arguments = arguments_of(spec, spec.suite[0], torch.float32)
    return [(name, value) for name, value in arguments.items() if isinstance(value, torch.Tensor)]
