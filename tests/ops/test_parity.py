"""Every op on every runner: within the error budget, forward and backward, and the same bits each time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import permutations

import compiled
import emulated
import pytest
import torch
from runners import (
    ALL,
    FAST,
    RUNNERS,
    SLOW,
    SLOWEST,
    arguments_of,
    best,
    check_against_truth,
    cotangents_of,
    deciding,
    device_of,
    grid,
    ids_of,
    run,
    runners_of,
    running,
)

import pyxlbert
from pyxlbert.backends import OPS
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Case, Spec, to_float64


def _parity() -> Iterator[tuple[Spec, Case, torch.dtype, str]]:
    """Every dtype on the backends a user meets; each level below this machine's takes one dtype a case, in turn."""
    for number, (spec, case) in enumerate(grid()):
        for place, dtype in enumerate(spec.dtypes):
            for turn, runner in enumerate(runners_of(spec)):
                if runner in SLOW and not case.small:
                    continue
                usual = runner in FAST and runner not in SLOWEST
                if ALL or usual or (number + turn) % len(spec.dtypes) == place:
                    yield spec, case, dtype, runner


PARITY = list(_parity())


@pytest.mark.parametrize(("spec", "case", "dtype", "runner"), PARITY, ids=ids_of)
def test_parity(spec: Spec, case: Case, dtype: torch.dtype, runner: str, poisoned, ledger) -> None:
    """Forward and every gradient within the error budget, outputs poisoned with NaN before the run."""
    arguments = arguments_of(spec, case, dtype, device_of(runner))
    refusal = OPS[spec.name].refusal(runner.partition("/")[0], deciding(arguments))
    if refusal is not None:
        with pytest.raises(RuntimeError, match=re.escape(refusal)):
            spec.function(**arguments, backend=runner)
        assert runner == "cuda" and "at most" in refusal
        return
    with running(runner) as backend, poisoned():
        ours = run(lambda **a: spec.function(**a, backend=backend), spec, arguments, case.gradients)
    check_against_truth(spec, case, ours, dtype, backend)
    ledger(spec.name, runner)


@pytest.mark.parametrize(("spec", "case"), list(grid()), ids=ids_of)
def test_reference_in_float64(spec: Spec, case: Case) -> None:
    """The readable definition, in float64, is the truth itself."""
    arguments = to_float64(arguments_of(spec, case, torch.float32))
    ours = run(lambda **a: spec.function(**a, backend="torch"), spec, arguments, case.gradients)
    truth = run(spec.plain, spec, arguments, case.gradients)
    cotangents = cotangents_of(tuple(truth[name] for name in truth if name.startswith("out")))
    for name in ours:
        terms = spec.terms(name, arguments, cotangents) if spec.terms is not None else None
        largest = float(torch.as_tensor(terms).max()) if terms is not None and torch.as_tensor(terms).numel() else 0.0
        finite = truth[name].isfinite()
        scale = torch.cat([truth[name][finite].abs().flatten(), torch.tensor([largest], dtype=torch.float64)]).max()
        difference = (ours[name] - truth[name])[finite].abs()
        if difference.numel():
            assert float(difference.max()) <= tolerances.FLOAT64 * float(scale), (name, float(difference.max()))


@pytest.mark.parametrize(
    ("spec", "forward", "backward"),
    [
        (spec, forward, backward)
        for spec in SPECS.values()
        for forward, backward in permutations(FAST, 2)
        if all(runner.partition("/")[0] in OPS[spec.name].backends for runner in (forward, backward))
        and device_of(forward) == device_of(backward)
    ],
    ids=ids_of,
)
def test_any_backward_follows_any_forward(spec: Spec, forward: str, backward: str) -> None:
    """Every backend saves the same tensors, so one's backward may follow another's forward."""
    for case in [c for c in spec.suite if c.small and c.gradients][:4]:
        arguments = arguments_of(spec, case, torch.float32, device_of(forward))
        with running(forward) as f:
            other = backward.partition("/")[0]
            with pyxlbert.use_backend(f, backward=other):
                ours = run(spec.function, spec, arguments, True)
        check_against_truth(spec, case, ours, torch.float32, f)


@pytest.mark.parametrize(("spec", "case"), list(grid()), ids=ids_of)
def test_deterministic_for_any_number_of_threads(spec: Spec, case: Case) -> None:
    """The same bits twice, and with one thread, two and five (where a vendor multiplies: for each number of them)."""
    before = torch.get_num_threads()
    arguments = arguments_of(spec, case, torch.float32)
    try:
        results = []
        for threads in (2, 2) if spec.vendor or best(spec) == "torch" else (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(lambda **a: spec.function(**a, backend=best(spec)), spec, arguments, case.gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            compare.same_bits(f"{spec.name} {case.id} {name}", value, other[name])


@pytest.mark.parametrize("runner", [runner for runner in RUNNERS if runner in ("triton", "cuda")])
@pytest.mark.parametrize("spec", SPECS.values(), ids=ids_of)
def test_deterministic_on_a_gpu(spec: Spec, runner: str) -> None:
    """The same bits twice; in the interpreter, where programs run one after the other, for one case.

    The emulation finds the same for the same sources, see compiled.py.
    """
    if runner not in OPS[spec.name].backends:
        words = "every op but the vendors' products and what is made of others has a kernel on every backend"
        assert spec.vendor or spec.composed, words
        return
    check, is_emulated = f"same bits twice {spec.name}", runner == "cuda" and not torch.cuda.is_available()
    if is_emulated and compiled.passed(check, emulated.digest()):
        return
    for case in [case for case in spec.suite if case.small][: 1 if runner in SLOWEST else None]:
        arguments = arguments_of(spec, case, torch.float32, device_of(runner))
        if OPS[spec.name].refusal(runner, deciding(arguments)) is not None:
            continue
        results = [run(lambda **a: spec.function(**a, backend=runner), spec, arguments, case.gradients) for _ in "ab"]
        for name, value in results[0].items():
            compare.same_bits(f"{spec.name} {case.id} {name}", value, results[1][name])
    if is_emulated:
        compiled.write(check, emulated.digest())
