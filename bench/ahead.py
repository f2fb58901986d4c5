"""Triton kernels compiled for an architecture that need not be here, and what came out: registers, stack, instructions.

In a process of its own: a process that interprets kernels (TRITON_INTERPRET=1) cannot compile them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from pyxlbert.backends.presence import BACKENDS

# Bytes of shared memory that a block can have, by architecture.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
ARCHITECTURES = tuple(SHARED)
# Whose PTX an architecture's is, but for the name of the target: only ptxas tells them apart, in an eighth of the time.
SAME_PTX = {86: 80, 89: 80}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Instructions of PTX, by what is counted of them: products of tiles, and loads of 16 bytes and more.
MATRIX = {"mma": r"\bmma\.sync\b", "wgmma": r"\bwgmma\.mma_async\b", "tcgen05": r"\btcgen05\.mma\b"}
WIDE_LOADS = (
    r"\bld\.global[\w.:]*\.v[48]\.b32\b|\bld\.global[\w.:]*\.v[24]\.b64\b|\bcp\.async\.c[ag]\.[^;]*, (?:16|0x10)\b"
)

# A line of what the disassembler prints; NOP fills up the end of a kernel.
INSTRUCTION = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(?!NOP)[A-Z]"


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
    # A function's source is parsed once, and not for every kernel that calls it.
    if not hasattr(JITFunction.parse, "cache_info"):
        JITFunction.parse = functools.cache(JITFunction.parse)


@contextlib.contextmanager
def launching(launch: Callable[..., Any], architecture: int) -> Iterator[None]:
    """Inside of it backend "triton" takes CPU tensors, as if they were on the usual card of this architecture.

    Args:
        launch: takes every launch in the device's place: (kernel, grid, device, *arguments, **options).
        architecture: compute capability times ten.
    """
    folder = Path(importlib.import_module("pyxlbert.kernels").__path__[0])
    modules = [importlib.import_module(f"pyxlbert.kernels.{path.stem}") for path in sorted(folder.glob("*.py"))]
    cards, configurations = (importlib.import_module(f"pyxlbert.kernels.{x}") for x in ("_cards", "_configurations"))
    patches = [(module, "launch", launch) for module in modules if hasattr(module, "launch")]
    patches += [(module, "supports", lambda *tensors: None) for module in modules if hasattr(module, "supports")]
    card = cards.Card(architecture, SHARED.get(architecture, cards.LARGE_SHARED))
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
    """Registers and stack of a compiled kernel, and what its PTX multiplies and loads with.

    A kernel without stack and local memory spills nothing.
    """
    usage, code = _asked("cuobjdump", "-res-usage", kernel.asm["cubin"]), kernel.asm["ptx"]
    words = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}
    return {name: int(re.search(rf"{word}:(\d+)", usage)[1]) for name, word in words.items()} | {
        "matrix": {name: n for name, instruction in MATRIX.items() if (n := len(re.findall(instruction, code)))},
        "wide_loads": len(re.findall(WIDE_LOADS, code)),
    }


def assembled(kernel: Any, architecture: int) -> bytes:
    """The machine code of a compiled kernel for an architecture that has the same PTX (`SAME_PTX`)."""
    if kernel.metadata.target.arch == architecture:
        return kernel.asm["cubin"]
    code, count = re.subn(r"^\.target sm_\d+$", f".target sm_{architecture}", kernel.asm["ptx"], flags=re.MULTILINE)
    if count != 1:
        raise RuntimeError(f"PTX of {kernel.name}: got {count} lines '.target sm_..', wanted one")
    # The options that ptxas is started with are among those that the kernel was compiled with.
    return make_backend(GPUTarget("cuda", architecture, 32)).make_cubin(code, {}, kernel.metadata, architecture)


def stack(code: bytes) -> int:
    """Bytes of stack of a kernel's machine code: the quick part of `report`."""
    return int(re.search(r"STACK:(\d+)", _asked("cuobjdump", "-res-usage", code))[1])


def instructions(kernel: Any) -> int:
    """How many a compiled kernel has, but for what fills up its end."""
    return len(re.findall(INSTRUCTION, _asked("nvdisasm", "-c", kernel.asm["cubin"]), re.MULTILINE))


def _asked(tool: str, option: str, code: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
