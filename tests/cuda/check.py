"""Compiles the CUDA kernels without a GPU and says what became of them: registers, stack, spills, shared memory,
instructions.

    python tests/cuda/check.py --write              compiles everything again and rewrites budget.json
    python tests/cuda/check.py --write NAME ...     only these units, such as attention_bwd.float

What is compiled is a choice that has every kernel once and leaves out twins, the head sizes and the element type that
differ from others in a number only; PYXLBERT_TEST_ALL=1 compiles all.  Results are kept in build/cuda-check by what
they depend on: sources, options, compiler.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda-check"
BUDGET = Path(__file__).with_name("budget.json")
ALL = os.environ.get("PYXLBERT_TEST_ALL") == "1"
# One architecture takes both head sizes, the others the usual one, and both of float32, whose registers are short.
FULL = "90a"
ARCHITECTURES = ("80", FULL, "100")
# Devices whose blocks have 99 KiB of shared memory, with what runs on them: 8.6 and 8.9 take the machine code of sm_80.
SMALL = {"86": "80", "120": "120"}
# By their first letters, the longest first; those of SHARED wait for shared memory.
SHARED = ("LDSM", "LDS", "STSM", "STS")
# Of the environment: options that nvcc takes beside those of its command, and where headers are looked for.
VARIABLES = (
    *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"),
    *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"),
)
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", *SHARED, "LDG.E.128", "STG.E.128", "LDL", "STL")


def _file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc = _file(ROOT / "csrc" / "nvcc.py")
# -O3 is for the host's code, of which nothing is asked but names.
FLAGS = nvcc.FLAGS.replace("-O3 ", "")


def units() -> dict[str, tuple[Path, str]]:
    """What is compiled, by name: the file and its options."""
    found = {}
    for source, name, options in nvcc.units(ROOT / "csrc" / "cuda"):
        if ALL or not name.endswith(".float16"):
            found[name] = (source, options)
    return found


def architectures_of(name: str) -> tuple[str, ...]:
    """Those that a unit is compiled for."""
    if "hopper" in name or name in ("devices", "dispatch"):
        # A kernel that stops anywhere else, or none at all.
        return (FULL,)
    small: tuple[str, ...] = ()
    if name.startswith("relative_attention") or name == "attention_bwd.bfloat16":
        small = tuple(SMALL)
    elif name.endswith((".bfloat16", ".float")):
        small = ("120",)
    return ARCHITECTURES + small


def compiled(name: str) -> dict[str, dict[str, Any]]:
    """By architecture and kernel: registers, stack, spills, shared memory (`static`, and `shared`, what its launch asks
    for) and how many instructions there are, `all` and of each of INSTRUCTIONS; PTX comes with sm_100 and sm_90a.

    Architectures that take the same options are compiled by one call, whose host code is the same.

    Raises:
        RuntimeError: it does not compile, or has a kernel that it does not launch with one number of bytes.
    """
    together: dict[str, list[str]] = {}
    for architecture in architectures_of(name):
        together.setdefault(_options(name, architecture), []).append(architecture)
    found: dict[str, dict[str, Any]] = {}
    for options, architectures in together.items():
        found |= _compiled(name, options, architectures)
    return {architecture: found[architecture] for architecture in architectures_of(name)}


def _options(name: str, architecture: str) -> str:
    source, options = units()[name]
    both = architecture == FULL or name.endswith(".float")
    both = both or (architecture in SMALL and name.startswith("relative_attention"))
    words = [f"PYXLBERT_{'SMALL' if architecture in SMALL else 'LARGE'}_TILES"]
    if architecture == FULL:
        words.append("PYXLBERT_HOPPER")
    if not ALL:
        words += ["PYXLBERT_FEW_TYPES", "PYXLBERT_FEW_SIZES", *(() if both else ("PYXLBERT_ONE_SIZE",))]
    # A word that no file of the unit asks for would only keep architectures apart that take the same options.
    return " ".join([options, *(f"-D{word}" for word in words if word in _words(source))])


@functools.cache
def _words(path: Path) -> frozenset[str]:
    """The words PYXLBERT_.. in a file of csrc and in those that it includes."""
    text = path.read_text()
    included = (ROOT / "csrc" / name for name in re.findall(r'#include "(.+)"', text))
    return frozenset(re.findall(r"PYXLBERT_\w+", text)).union(*(_words(one) for one in included if one.exists()))


def sources_of(name: str) -> list[Path]:
    """The files that `compiled` reads, and those that say how: all headers, since most files include most of them."""
    return [units()[name][0], *_header_files(), Path(nvcc.__file__), Path(__file__)]


def called_with(name: str) -> list[str]:
    """What else the compiler is told, and which one it is."""
    options = {architecture: _options(name, architecture) for architecture in architectures_of(name)}
    return [FLAGS, *(f"{one}: {_code(one)} {words}" for one, words in options.items()), _version(), *_told()]


def _compiled(name: str, options: str, architectures: list[str]) -> dict[str, dict[str, Any]]:
    source, where = units()[name][0], f"{name} for {', '.join(architectures)}"
    command = [
        *(nvcc.find().nvcc, *FLAGS.split(), *options.split(), f"-I{ROOT / 'csrc'}"),
        *(*map(_code, architectures), "-c", str(source)),
    ]
    key = hashlib.sha256(
        json.dumps([command, INSTRUCTIONS, _version(), _told(), _headers(), source.read_text()]).encode()
    ).hexdigest()
    kept = BUILD / f"{name}.{architectures[0]}.json"
    if kept.exists():
        before = json.loads(kept.read_text())
        if before["key"] == key:
            return before["kernels"]
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / f"{name}.{architectures[0]}.o"
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{where}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    if re.search("wgmma|warpgroup", done.stderr + done.stdout):
        # ptxas says so where it cannot leave products under way, or makes them wait for registers.
        raise RuntimeError(f"{where}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    for architecture in architectures:
        if wrong := touched(_ptx(target)) if "hopper" in name and architecture == FULL else []:
            raise RuntimeError(f"{where}: registers of products under way are read or written:\n" + "\n".join(wrong))
    resources, launches = _resources(done.stderr + done.stdout), _launches(target)
    kernels = {}
    for architecture in architectures:
        own = resources.get(_machine(architecture), {})
        for kernel, counts in _instructions(target, architecture).items():
            own[kernel]["instructions"] = counts
        own = dict(zip(_readable(list(own)), own.values(), strict=True))
        for kernel, found in own.items():
            if len(launches.get(kernel, ())) != 1:
                raise RuntimeError(f"{where}: {kernel} is launched with {launches.get(kernel, 'nothing')}")
            (found["shared"],) = launches[kernel]
        kernels[architecture] = own
    target.unlink()
    kept.write_text(json.dumps({"key": key, "kernels": kernels}))
    return kernels


def shared_accesses(kernel: dict[str, Any]) -> int:
    """Loads from shared memory and stores to it, of one kernel of `compiled`."""
    return sum(kernel["instructions"].get(name, 0) for name in SHARED)


def _machine(architecture: str) -> str:
    """Whose machine code an architecture runs."""
    return SMALL.get(architecture, architecture)


def _code(architecture: str) -> str:
    number = _machine(architecture)
    codes = f"[sm_{number},compute_{number}]" if number in ("100", FULL) else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={codes}"


@functools.cache
def _version() -> str:
    """Of nvcc, of the ptxas beside it, which may be another's, and of the headers."""
    toolkit = nvcc.find()
    said = [
        subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
        for tool in (toolkit.nvcc, str(toolkit.programs / "ptxas"))
    ]
    return "".join([*said, nvcc.named(toolkit.version)])


def _told() -> list[str]:
    """What decides beside the command: variables that nvcc and its preprocessor read, and who counts instructions."""
    return [*(f"{name}={os.environ.get(name, '')}" for name in VARIABLES), importlib.metadata.version("triton")]


def _header_files() -> list[Path]:
    return sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h")])


@functools.cache
def _headers() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in _header_files())).hexdigest()


def _resources(log: str) -> dict[str, dict[str, Any]]:
    """What -Xptxas -v says, by machine code and kernel."""
    found: dict[str, dict[str, Any]] = {}
    kernel = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            kernel = found.setdefault(match[2], {})[match[1]] = {}
        elif kernel is None:
            continue
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel |= {"stack": int(match[1]), "spills": int(match[2]) + int(match[3])}
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernel |= {"registers": int(match[1]), "static": int(shared[1]) if shared else 0}
    return found


def disassembler() -> str:
    """The cuobjdump that the triton wheel carries, which needs the nvdisasm beside it."""
    spec = importlib.util.find_spec("triton")
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _instructions(target: Path, architecture: str) -> dict[str, dict[str, int]]:
    tool = disassembler()
    environment = dict(os.environ, PATH=f"{Path(tool).parent}:{os.environ['PATH']}")
    command = [tool, "--dump-sass", "-arch", f"sm_{_machine(architecture)}", str(target)]
    text = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    found: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            counts = found.setdefault(match[1], Counter())
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", line):
            # What fills up the end of a kernel is no work.
            counts["all"] += match[1] != "NOP"
            for name in INSTRUCTIONS:
                if match[1].startswith(name):
                    counts[name] += 1
                    break
    return {name: dict(counts) for name, counts in found.items()}


def _ptx(target: Path) -> str:
    command = [disassembler(), "--dump-ptx", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def touched(ptx: str) -> list[str]:
    """Lines between a `wgmma.fence` and the wait for its products that name a register of theirs: what the compiler
    has moved there would read a sum too early, or write a factor too late.
    """
    found = []
    for part in re.findall(r"wgmma\.fence\.sync.*?wgmma\.wait_group\.sync\.aligned 0", ptx, re.DOTALL):
        lines = [line.strip() for line in part.splitlines() if not line.strip().startswith("//")]
        braced = [x for line in lines if "wgmma.mma_async" in line for x in re.findall(r"\{([^{}]*)\}", line)]
        registers = {name for names in braced for name in re.findall(r"%\w+", names)}
        rest = [line for line in lines if "wgmma" not in line]
        found += [line for line in rest if not registers.isdisjoint(re.findall(r"%\w+", line))]
    return found


def _readable(names: list[str]) -> list[str]:
    """`attention_fwd<WalkTile<__nv_bfloat16, 64, false, false, 1, 2>>` of mangled names."""
    done = subprocess.run([_binutils("c++filt")], input="\n".join(names), capture_output=True, text=True, check=True)
    return [_short(line) for line in done.stdout.splitlines()]


def _short(name: str) -> str:
    name = re.sub(r"pyxlbert::cuda::|\(anonymous namespace\)::|^void | (?=>)", "", name)
    return re.sub(r"\(pyxlbert.*|\((const )?[A-Z]\w+.*\)$|\(float const\*.*", "", name)


def _launches(target: Path) -> dict[str, set[int]]:
    """By kernel: the bytes of shared memory that it is started with, which the names of device.cuh's launch() hold."""
    command = [_binutils("nm"), "--demangle", "--defined-only", str(target)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, set[int]] = {}
    # A kernel that is no template has no parentheses.
    pattern = r" void pyxlbert::cuda::launch<&(?:\((.*)\)|([\w:]+\(anonymous namespace\)::\w+)), (\d+)ul, "
    for template, kernel, shared in re.findall(pattern, text):
        found.setdefault(_short(template or kernel), set()).add(int(shared))
    return found


def _binutils(name: str) -> str:
    tool = shutil.which(name)
    if tool is None:
        raise RuntimeError(f"{name}, a part of binutils, is missing")
    return tool


def main() -> None:
    named = [name for name in sys.argv[1:] if name != "--write"]
    if unknown := set(named) - set(units()):
        sys.exit(f"got {', '.join(sorted(unknown))}, wanted some of {', '.join(units())}")
    budget: dict[str, dict[str, dict[str, Any]]] = json.loads(BUDGET.read_text()) if named else {}
    for name in named or units():
        budget.pop(name, None)
        for architecture, kernels in compiled(name).items():
            for kernel, found in kernels.items():
                entry = budget.setdefault(name, {}).setdefault(
                    kernel, {"shared": 0, "registers": {}, "instructions": {}, "shared_accesses": {}}
                )
                entry["shared"] = max(entry["shared"], found["shared"])
                entry["registers"][architecture] = found["registers"]
                entry["instructions"][architecture] = found["instructions"]["all"]
                entry["shared_accesses"][architecture] = shared_accesses(found)
                print(name, architecture, kernel, found, flush=True)
    if "--write" in sys.argv:
        ordered = {name: budget[name] for name in units() if name in budget}
        BUDGET.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
