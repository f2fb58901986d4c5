"""What the common suite shares: which runners and cases it has here.

A run of a case is in `pyxlbert.testing.runners`.  The suite itself is `test_parity.py`, `test_contract.py`,
`test_compile.py` and `test_choice.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from pyxlbert.backends import OPS
from pyxlbert.testing import runners
from pyxlbert.testing.runners import (
    CPU,
    GPU,
    arguments_of,
    check_against_truth,
    cotangents_of,
    deciding,
    device_of,
    run,
    running,
    with_gradients,
)
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Bad, Case, Spec

__all__ = [
    "ALL",
    "CPU",
    "FAST",
    "GPU",
    "RUNNERS",
    "SLOW",
    "SLOWEST",
    "SMALL",
    "arguments_of",
    "best",
    "check_against_truth",
    "cotangents_of",
    "deciding",
    "device_of",
    "first_tensors",
    "grid",
    "ids_of",
    "run",
    "runners_of",
    "running",
    "with_gradients",
]

ALL = os.environ.get("PYXLBERT_TEST_ALL") == "1"
# The sanitizer run sets this to the levels it watches: small cases on those, backend cpu alone.
SMALL = [level for level in os.environ.get("PYXLBERT_TEST_SMALL", "").split(",") if level]

RUNNERS = [name for name in runners.runners() if not SMALL or name in [f"cpu/{level}" for level in SMALL]]
# Small cases; in the interpreter of one dtype each.
SLOW = runners.slow()
SLOWEST = SLOW[:1]
FAST = [runner for runner in RUNNERS if runners.best_level(runner)]


def runners_of(spec: Spec) -> list[str]:
    """The runners that differ for this op."""
    return runners.of(spec, RUNNERS)


def best(spec: Spec) -> str:
    """The backend that a caller on the CPU gets."""
    return "cpu" if "cpu" in OPS[spec.name].backends else "torch"


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


def first_tensors(spec: Spec) -> list[tuple[str, torch.Tensor]]:
    arguments = arguments_of(spec, spec.suite[0], torch.float32)
    return [(name, value) for name, value in arguments.items() if isinstance(value, torch.Tensor)]
