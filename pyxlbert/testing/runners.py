"""What runs an op here: every backend, and every instruction-set level of backend "cpu"; and one run of a case."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pyxlbert import backends
from pyxlbert.backends import OPS, native
from pyxlbert.backends.presence import device_type
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, Case, Spec, as_tuple

CPU = torch.device("cpu")
GPU = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None

Results = dict[str, torch.Tensor]


def levels() -> list[str]:
    """The instruction-set levels that this processor has, worst first; none without the native module."""
    return [] if native._C is None else native._C.levels()


def runners() -> list[str]:
    """Backends that are here, "cpu" once per level as "cpu/avx2", and on a GPU plain PyTorch as "torch/cuda"."""
    names = []
    for name in backends.available():
        names += [f"cpu/{level}" for level in levels()] if name == "cpu" else [name]
    return names if GPU is None else [*names, "torch/cuda"]


def slow() -> tuple[str, ...]:
    """Without a GPU Triton's interpreter takes a second for what a kernel does in microseconds, and the emulation of
    CUDA some milliseconds; the slowest first."""
    return () if torch.cuda.is_available() else ("triton", "cuda")


def best_level(runner: str) -> bool:
    """Whether a runner is what a user meets: no level of backend "cpu" but the active one."""
    backend, _, level = runner.partition("/")
    return backend != "cpu" or not level or level == native._C.level()


def of(spec: Spec, names: list[str]) -> list[str]:
    """Those that differ for this op: a vendor's library has no levels of ours, few ops use tiles or bytes."""
    candidates = [name for name in names if best_level(name)] if spec.vendor else names
    for level, before in (("amx", "avx512_bf16"), ("avx2_vnni", "avx2")):
        if f"cpu/{level}" in candidates and not spec.tiles:
            candidates = [runner for runner in candidates if runner != f"cpu/{before}"]
    return [runner for runner in candidates if runner.partition("/")[0] in OPS[spec.name].backends]


def device_of(runner: str) -> torch.device:
    """Where the runner's tensors live."""
    on_gpu = runner == "torch/cuda" or device_type(runner.partition("/")[0]) == "cuda"
    return GPU if GPU is not None and on_gpu else CPU


@contextlib.contextmanager
def running(runner: str) -> Iterator[str]:
    """Selects the runner's instruction-set level; gives the backend's name."""
    backend, _, level = runner.partition("/")
    if backend != "cpu" or not level:
        yield backend
        return
    before = native._C.level()
    native._C.set_level(level)
    try:
        yield backend
    finally:
        native._C.set_level(before)


def arguments_of(spec: Spec, case: Case, dtype: torch.dtype, device: torch.device = CPU) -> Arguments:
    """What a case calls the op with: the same numbers in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.name}/{case.id}".encode()))
    return spec.arguments(case, generator, dtype, device)


def with_gradients(spec: Spec, arguments: Arguments) -> Arguments:
    """Arguments whose differentiable tensors are leaves (strides kept) that require a gradient."""
    result = dict(arguments)
    for name in spec.leaves(arguments):
        result[name] = arguments[name].detach().requires_grad_()
    return result


def cotangents_of(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Of every output, the same numbers in every process."""
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs)


def run(
    function: Callable[..., Any],
    spec: Spec,
    arguments: Arguments,
    gradients: bool,
    cotangents: tuple[torch.Tensor, ...] | None = None,
) -> Results:
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
def expected(op: str, case_id: str, dtype: torch.dtype) -> tuple[Results, Results, dict[str, Any]]:
    """Plain PyTorch's results, the truth and the sums of absolute terms: one set for all runners."""
    spec = SPECS[op]
    case = next(case for case in spec.suite if case.id == case_id)
    arguments = arguments_of(spec, case, dtype)
    wide = spec.in_float64(arguments)
    plain = run(spec.plain, spec, arguments, case.gradients)
    cotangents = cotangents_of(tuple(plain[k] for k in plain if k.startswith("out")))
    truth = run(spec.plain, spec, wide, case.gradients, cotangents)
    terms = {name: spec.terms(name, wide, cotangents) if spec.terms is not None else None for name in truth}
    return plain, truth, terms


def errors_of(spec: Spec, case: Case, ours: Results, dtype: torch.dtype, backend: str) -> dict[str, compare.Errors]:
    """How far every result is from float64, beside plain PyTorch and the budget.

    Raises:
        AssertionError: a shape or dtype differs, or a value is not finite.
    """
    plain, truth, terms = expected(spec.name, case.id, dtype)
    found = {}
    for name, value in ours.items():
        wanted = plain[name].to(value.dtype) if name.startswith("out") else plain[name]
        found[name] = compare.errors(
            f"{spec.name} {case.id} {name}",
            value,
            wanted,
            truth[name],
            terms=terms[name],
            factor=tolerances.factor(spec.name, dtype, backend),
        )
    return found


def check_against_truth(spec: Spec, case: Case, ours: Results, dtype: torch.dtype, backend: str) -> None:
    """Every result is within its budget.

    Raises:
        AssertionError: one is not.
    """
    for name, found in errors_of(spec, case, ours, dtype, backend).items():
        found.require(f"{spec.name} {case.id} {name}")


def deciding(arguments: Arguments) -> torch.Tensor:
    """The tensor that decides the backend: the first of a floating dtype."""
    return next(x for x in arguments.values() if isinstance(x, torch.Tensor) and x.is_floating_point())
