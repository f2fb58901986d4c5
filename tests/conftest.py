"""Which tests `make quick` runs, those that answer in a minute together; and the summary of what ran where."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

# What is imported and collected stays to the end: the garbage collector is never to walk through it.
gc.disable()


def _file(name: str) -> ModuleType:
    """A module of this folder by its path: nothing here is importable by name."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, Path(__file__).parent / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    # Before anything imports triton: its kernels then run in the interpreter, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"
    _file("interpreter.py").apply()

import pyxlbert  # noqa: E402
from pyxlbert import backends  # noqa: E402
from pyxlbert.backends import OPS  # noqa: E402

# The CUDA kernels run in their emulation, on CPU tensors too; this says why where they do not.
NO_EMULATION: str | None = None
if not torch.cuda.is_available():
    _emulation = _file("emulation/build.py")
    NO_EMULATION = _emulation.missing()
    if NO_EMULATION is None:
        backends.emulate_cuda(_emulation.load())

# Whole files that are quick, and tests of the common suite that are.
QUICK_FILES = ("test_architecture.py", "test_compare.py")
QUICK_TESTS = ("test_bad_input", "test_reference_in_float64", "test_explain_names_every_backend")


def _quick(item: pytest.Item) -> bool:
    name = getattr(item, "originalname", item.name)
    if item.path.name in QUICK_FILES or name in QUICK_TESTS:
        return True
    if name != "test_parity":
        return False
    # Parity: one dtype, the readable definition and the level that this machine takes.
    parameters = item.callspec.params  # type: ignore[attr-defined]
    fast = ("torch", f"cpu/{pyxlbert._C.levels()[-1]}")
    return parameters["runner"] in fast and str(parameters["dtype"]) == "torch.float32"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _quick(item):
            item.add_marker(pytest.mark.quick)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter) -> None:
    """The parity checks that reports carry as properties, whichever process ran them (see the fixture `ledger`)."""
    reports = terminalreporter.getreports("passed")
    counts = Counter(tuple(value) for report in reports for key, value in report.user_properties if key == "parity")
    if not counts:
        return
    terminalreporter.section("op x backend: parity checks that ran, or why none did")
    for op in sorted(OPS):
        for backend in backends.NAMES:
            ran = {runner: n for (name, runner), n in counts.items() if name == op and runner.split("/")[0] == backend}
            if ran:
                text = ", ".join(f"{runner} {n}" for runner, n in sorted(ran.items()))
            elif backend not in OPS[op].backends:
                text = backends.unavailable(backend) or "no kernel"
            else:
                text = backends.unavailable(backend) or "deselected"
                if backend == "cuda" and NO_EMULATION is not None:
                    text += f"; {NO_EMULATION}"
            terminalreporter.write_line(f"{op:28} {backend:7} {text}")
