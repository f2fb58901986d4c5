"""Which tests `make quick` runs: those that answer in a minute together."""

from __future__ import annotations

import pytest

import pyxlbert

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
