"""What this machine is: its processor, and the OpenMP runtimes of this process."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# The processor flags that some kernel of ours or of oneDNN asks for, as Linux spells them.
_FEATURES = (
    *("sse4_2", "avx", "f16c", "fma", "bmi2", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "sve"),
)


def processor() -> tuple[str, list[str]]:
    """The processor's name and those of its features that matter here, from /proc/cpuinfo (Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine(), []
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return fields.get("model name", platform.machine()), [name for name in _FEATURES if name in flags]


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes loaded into this process, as file names (Linux; elsewhere empty)."""
    try:
        text = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    paths = {columns[5] for line in text.splitlines() if len(columns := line.split(maxsplit=5)) == 6}
    names = ("libgomp", "libiomp", "libomp")
    return sorted(name for path in paths if (name := os.path.basename(path)).startswith(names) and ".so" in name)
