"""Triton kernels compiled for an architecture that need not be here, and what came out: registers, stack, instructions.

In a process of its own: a process that interprets kernels (TRITON_INTERPRET=1) cannot compile them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from pyxlbert.backends.presence import BACKENDS

# Bytes of shared memory that a block can have, by architecture.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
ARCHITECTURES = tuple(SHARED)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")


class Driver:
    """What the JIT asks of a device before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        # The JIT keeps what it has compiled by device.
        return self.architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_for(architecture: int) -> None:
    """From here on `warmup` of a kernel compiles for this architecture (compute capability times ten)."""
    triton.runtime.driver.set_active(Driver(architecture))


@contextlib.contextmanager
def launching(launch: Callable[..., Any], architecture: int) -> Iterator[None]:
    """Inside of it backend "triton" takes CPU tensors, as if they were on the usual card of this architecture.

    Args:
        launch: takes every launch in the device's place: (kernel, grid, device, *arguments, **options).
        architecture: compute capability times ten.
    """
    folder = Path(importlib.import_module("pyxlbert.kernels").__path__[0])
    modules = [importlib.import_module(f"pyxlbert.kernels.{path.stem}") for path in sorted(folder.glob("*.py"))]
    configurations = importlib.import_module("pyxlbert.kernels._configurations")
    patches = [(module, "launch", launch) for module in modules if hasattr(module, "launch")]
    patches += [(module, "supports", lambda *tensors: None) for module in modules if hasattr(module, "supports")]
    card = configurations.Card(architecture, SHARED.get(architecture, configurations.LARGE_SHARED))
    patches.append((configurations, "card", lambda device: card))
    here = BACKENDS["triton"]
    with contextlib.ExitStack() as undo:
        for owner, name, value in patches:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        undo.callback(BACKENDS.__setitem__, "triton", here)
        BACKENDS["triton"] = here._replace(missing=lambda: None)
        yield


def report(kernel: Any) -> dict[str, Any]:
    """Registers, stack and instructions of a compiled kernel; kept in the folder TRITON_CACHE_DIR, if that is set."""
    cubin = kernel.asm["cubin"]
    kept = os.environ.get("TRITON_CACHE_DIR")
    path = Path(kept) / "reports" / f"{hashlib.sha256(cubin).hexdigest()}.json" if kept else None
    if path is not None and path.exists():
        return json.loads(path.read_text())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", "-ndf", file.name)
    found = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "matrix": {name: n for name in MATRIX if (n := len(re.findall(rf"\b{name}\b", code)))},
        "wide_loads": len(re.findall(r"\bLDG\.E\.128\b|\bLDG\.E\.ENL2\.256\b|\bLDGSTS\.E\.[\w.]*128\b", code)),
    }
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found))
        part.replace(path)
    return found


def stack(kernel: Any) -> int:
    """Bytes of stack of a compiled kernel: the quick part of `report`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return int(re.search(r"STACK:(\d+)", _tool("cuobjdump", "-res-usage", file.name))[1])


def _tool(name: str, *options: str) -> str:
    return subprocess.run([TOOLS / name, *options], capture_output=True, text=True, check=True).stdout
