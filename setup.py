"""Builds pyxlbert._C with ninja: files of csrc/cpu once per instruction-set level, csrc/cuda by nvcc, the rest once.

PYXLBERT_CUDA=0 or 1 leaves the CUDA kernels out or insists on them; auto, the default, builds them where nvcc is found
and the installed torch is one for CUDA.  PYXLBERT_CUDA_ARCHS names architectures, "90a" for an H100 alone.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

_spec = importlib.util.spec_from_file_location("nvcc", ROOT / "csrc" / "nvcc.py")
nvcc = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(nvcc)

# By AVX-VNNI Intel's processors without AVX-512 multiply bytes.  The AVX-512 of level avx512 is x86-64-v4's; Ice Lake
# has it without the bfloat16 dot product of the level behind it.
# -O3 is worth 5 to 9 % to short attentions.  x86-64 without AVX2 is for old processors only, and compiles in half the
# time at -O2.
X86_LEVELS = {
    "portable": "-march=x86-64 -O2",
    "avx2": "-march=x86-64-v3",
    "avx2_vnni": "-march=x86-64-v3 -mavxvnni",
    "avx512": "-march=x86-64-v4",
    "avx512_bf16": "-march=x86-64-v4 -mavx512bf16 -mavx512vnni",
    "amx": "-march=x86-64-v4 -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16 -mamx-int8",
}
# The files that differ where bytes are multiplied, and where there are tiles; of the others avx2_vnni and amx run the
# version of a level before.
VNNI_SOURCES = ("packed_matrix", "packed_linear", "encoder_layer")
AMX_SOURCES = (
    *("attention", "attention_bwd", "relative_attention", "relative_attention_bwd", "two_stream_attention"),
    *VNNI_SOURCES,
)
ONLY = {"avx2_vnni": VNNI_SOURCES, "amx": AMX_SOURCES}
OTHER_LEVELS = {"portable": ""}
# For the tests: PYXLBERT_SANITIZE=address,undefined or =thread builds the kernels of the levels in
# PYXLBERT_SANITIZE_LEVELS, or of all, under these sanitizers; "module" among them is what is no kernel.
SANITIZE = os.environ.get("PYXLBERT_SANITIZE", "")
WATCHED = ".raced" if SANITIZE == "thread" else ".sanitized"
# The same for PYXLBERT_EMULATE_LEVELS=1: levels avx2_vnni and amx run wherever avx512_bf16 does.  Products of bytes are
# AVX-512's, of 256 bits too, and tiles are a model in software (csrc/cpu/tile_model.h).
EMULATE = os.environ.get("PYXLBERT_EMULATE_LEVELS") == "1"


def levels() -> dict[str, str]:
    return X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else OTHER_LEVELS


def sanitized_levels() -> list[str]:
    if not SANITIZE:
        return []
    return os.environ.get("PYXLBERT_SANITIZE_LEVELS", ",".join((*levels(), "module"))).split(",")


def pybind11_headers() -> str:
    """Its own package's, or those that torch brings along."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")
    brought = None if torch is None else Path(torch.origin).parent / "include"
    if brought is None or not (brought / "pybind11").is_dir():
        raise SystemExit("pyxlbert: pybind11 is missing: pip install pybind11")
    return str(brought)


def ninja_file(output: Path) -> str:
    # A relative path would be looked up from the build folder.
    include = (
        f"-I{ROOT / 'csrc'} -isystem {pybind11_headers()} -isystem {sysconfig.get_path('include')} "
        f"-isystem {sysconfig.get_path('platinclude')}"
    )
    common = "-std=c++20 -O3 -g1 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -fopenmp -Wall -Wextra"
    # gcc 12 warns of its own intrinsics' undefined operands in every AVX-512 file.
    kernels = f"{common} -Wno-uninitialized -Wno-maybe-uninitialized -Wno-ignored-attributes -Wno-psabi"
    sanitize = f" -fsanitize={SANITIZE}" if SANITIZE else ""
    # Checks are calls, and -Og leaves them where they are: each compiles in half the time and runs as fast.  Null
    # pointers and the ends of objects are what AddressSanitizer sees anyway.
    watch = (
        f" -Og{sanitize} -fno-sanitize=null,object-size -fno-sanitize-recover=all -fno-omit-frame-pointer "
        "--param asan-instrumentation-with-call-threshold=0"
    )
    cuda = nvcc.find() if why_no_cuda() is None else None
    with_cuda = "" if cuda is None else " -DPYXLBERT_WITH_CUDA"
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx $in -o $out $flags",
        "  description = link $out",
    ]
    objects = []
    models = {"avx2_vnni": " -DPYXLBERT_EMULATE_VNNI", "amx": " -DPYXLBERT_EMULATE_TILES"}
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        watched, emulated = "module" in sanitized_levels(), EMULATE and source.stem == "levels"
        objects.append(f"{source.stem}{'.emulated' if emulated else ''}{WATCHED if watched else ''}.o")
        # -O3 takes half as long again and makes no call from Python faster.
        more = f"{''.join(models.values()) if emulated else ''}{watch if watched else ''}"
        flags = f"{common}{with_cuda} {include} -O1{more}"
        lines += [f"build {objects[-1]}: compile {source}", f"  flags = {flags}"]
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        for level, flags in levels().items():
            if source.stem not in ONLY.get(level, (source.stem,)):
                continue
            watched, emulated = level in sanitized_levels(), EMULATE and level in models
            kind = f"{'.emulated' if emulated else ''}{WATCHED if watched else ''}"
            more = f"{models[level] if emulated else ''}{watch if watched else ''}"
            objects.append(f"cpu/{source.stem}.{level}{kind}.o")
            lines += [
                f"build {objects[-1]}: compile {source}",
                f"  flags = {kernels} {flags}{more} -DPYXLBERT_LEVEL={level} -I{ROOT / 'csrc'}",
            ]
    runtime = " -ldl" if sys.platform == "linux" else ""
    if cuda is not None:
        lines += [
            f"nvcc = {cuda.nvcc}",
            "rule nvcc",
            "  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $out",
        ]
        for source, name, more in nvcc.units(ROOT / "csrc" / "cuda"):
            objects.append(f"cuda/{name}.o")
            # Kernels of Hopper are started only where there is machine code for it.
            hopper = "-DPYXLBERT_HOPPER" if "90a" in nvcc.wanted() else ""
            built = f"-DPYXLBERT_ARCHITECTURES={'/'.join(nvcc.wanted())}"
            options = f"{nvcc.FLAGS} {hopper} {built} {more} -I{ROOT / 'csrc'} {nvcc.gencode(nvcc.wanted())}"
            lines += [f"build {objects[-1]}: nvcc {source}", f"  flags = {options}"]
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cpp")):
            objects.append(f"cuda/{source.stem}.o")
            lines += [f"build {objects[-1]}: compile {source}", f"  flags = {common} {include} -O1"]
        # Static, so that the module is imported on machines without a driver too.
        runtime += f" {cuda.cudart} -lrt -lpthread -ldl"
    link = f"-shared -fopenmp -Wl,--as-needed -Wl,--exclude-libs,ALL{sanitize}"
    lines += [f"build {output}: link {' '.join(objects)}", f"  flags = {link}{runtime}", f"default {output}", ""]
    return "\n".join(lines)


def cuda_choice() -> str:
    """PYXLBERT_CUDA: 0, 1 or auto.

    Raises:
        SystemExit: it is another word, or asks for what is not here.
    """
    choice = os.environ.get("PYXLBERT_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"pyxlbert: PYXLBERT_CUDA: got {choice!r}, wanted 0, 1 or auto")
    if choice == "1" and nvcc.find() is None:
        raise SystemExit("pyxlbert: PYXLBERT_CUDA=1: no nvcc with its headers is found; set CUDA_HOME or NVCC")
    old = nvcc.too_old(nvcc.find().version) if choice == "1" else None
    if old is not None:
        raise SystemExit(f"pyxlbert: PYXLBERT_CUDA=1: {old}")
    return choice


def torch_for_cuda() -> bool:
    """Whether the installed torch is a build for CUDA; it is not imported, which would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return version.exists() and re.search(r"^cuda\b[^=]*= *['\"]", version.read_text(), re.MULTILINE) is not None


def why_no_cuda() -> str | None:
    """Why the CUDA kernels are not built, or None."""
    choice = cuda_choice()
    if choice == "0":
        return "PYXLBERT_CUDA=0"
    if SANITIZE or EMULATE:
        return "a build for tests is one of the CPU's kernels"
    if nvcc.find() is None:
        return "no nvcc with its headers is found"
    old = nvcc.too_old(nvcc.find().version)
    if old is not None:
        return old
    if choice == "auto" and not torch_for_cuda():
        return "the installed torch is not one for CUDA (PYXLBERT_CUDA=1 builds nevertheless)"
    return None


def report() -> list[str]:
    """One line per backend: built, or why not."""
    why = why_no_cuda()
    cuda = f"built ({', '.join(nvcc.wanted())})" if why is None else f"not built: {why}"
    if why is None:
        for one in nvcc.left_out():
            cuda += f"; not for {one}, which needs nvcc of CUDA {nvcc.named(nvcc.needs(one))}"
    return [
        "pyxlbert: backend torch needs no build",
        f"pyxlbert: backend cpu built ({', '.join(levels())})",
        "pyxlbert: backend triton needs no build; it takes CUDA tensors where triton is installed",
        f"pyxlbert: backend cuda {cuda}",
    ]


class NinjaBuild(build_ext):
    """One ninja run: parallel, incremental, flags per file."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # run() of the base class clears `inplace` while it builds.
        self.in_tree = bool(self.inplace) or self.editable_mode

    def build_extension(self, extension: Extension) -> None:
        cuda_choice()
        if sys.platform != "linux":
            raise SystemExit(f"pyxlbert: the native module builds on Linux only, and this is {sys.platform}")
        # pip builds an editable install in a temporary folder; here it shares objects with the build in place, and so
        # does a build for tests, which compiles again only what differs.
        shared = self.in_tree or SANITIZE or EMULATE
        build = ROOT / "build" / "in-place" if shared else Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        path = build / f"{'emulated-' if EMULATE else ''}{WATCHED[1:] if SANITIZE else 'build'}.ninja"
        text = ninja_file(output)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        beside_python = Path(sys.executable).parent / "ninja"
        ninja = shutil.which("ninja") or (str(beside_python) if beside_python.exists() else None)
        if ninja is None:
            raise SystemExit("pyxlbert: ninja is missing: pip install ninja")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.check_call([ninja, "-C", str(build), "-f", path.name, f"-j{jobs}", "--quiet"])
        print("\n".join(report()))


setup(ext_modules=[Extension("pyxlbert._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
