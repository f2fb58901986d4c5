"""Levels amx and avx2_vnni on any machine with AVX-512 and its bfloat16: their kernels are built once more.

Tiles are a model in software (csrc/cpu/tile_model.h), and of products of bytes the encoding is another.  Where the
processor has them, every suite runs on them as well.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import compiled
import pytest
import variants

import pyxlbert

pytestmark = pytest.mark.skipif(
    "avx512_bf16" not in pyxlbert._C.levels(), reason="the model of tiles needs AVX-512 with bfloat16"
)
OPS = f"{variants.ROOT}/tests/ops"


@functools.cache
def _built() -> dict[str, str]:
    """Environment variables under which Python imports the build with modelled tiles."""
    return variants.build("emulated", {"PYXLBERT_EMULATE_LEVELS": "1"}) | {"PYXLBERT_TEST_SMALL": "amx"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=variants.ROOT)


def passed(done: subprocess.CompletedProcess) -> int:
    found = re.findall(r"(\d+) passed", done.stdout)
    return int(found[-1]) if found else 0


@compiled.known(variants.digest)
def test_the_build_has_a_model() -> None:
    code = "import pyxlbert; print(pyxlbert._C.levels()[-1])"
    done = subprocess.run([sys.executable, "-c", code], env=_built(), capture_output=True, text=True)
    assert done.stdout.strip() == "amx", done.stderr


def test_a_usual_build_has_no_model() -> None:
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        tiles = " amx_bf16 " in f"{file.read()} "
    assert ("amx" in pyxlbert._C.levels()) <= tiles


@compiled.known(variants.digest)
def test_the_level_between_multiplies_bytes() -> None:
    """Level avx2_vnni: every product of integers, and the same bits as on all other levels."""
    done = run(
        _built() | {"PYXLBERT_TEST_SMALL": "avx2_vnni"},
        *("--noconftest", f"{variants.ROOT}/tests/cpu/test_packed_products.py"),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert passed(done) > 50
    code = "import pyxlbert; print(pyxlbert._C.level(), *pyxlbert._C.levels())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=_built() | {"PYXLBERT_ISA": "avx2_vnni"}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["avx2_vnni", "portable", "avx2", "avx2_vnni", "avx512", "avx512_bf16", "amx"], (
        done.stderr
    )


def test_that_level_needs_no_avx512() -> None:
    """What the usual build has of it multiplies bytes in the encoding of AVX-VNNI, and touches no AVX-512."""
    objects = sorted((variants.ROOT / "build" / "in-place" / "cpu").glob("*.avx2_vnni.o"))
    if not objects or shutil.which("objdump") is None:
        pytest.skip("the objects of the in-place build are not here (run make build), or no objdump is")
    found = {}
    for path in objects:
        text = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b|\{evex\}", text), path.name
        found[path.name.split(".")[0]] = text.count("vpdpbusd")
        assert found[path.name.split(".")[0]] == len(re.findall(r"\{vex\}\s+vpdpbusd", text)), path.name
    assert set(found) == {"encoder_layer", "packed_linear", "packed_matrix"}
    assert found["encoder_layer"] > 10 and found["packed_linear"] > 10


# ldtilecfg and tileloadd as copies of what memory holds at that moment.
COPIES = {
    "ldtilecfg": (r"\bldtilecfg\s+(.+)", r"vmovdqu64 \1, %zmm31; vmovdqu64 %zmm31, configuration_seen(%rip)"),
    "tileloadd": (r"\btileloadd\s+\((%\w+),.*", r"vmovdqu64 (\1), %zmm31; vmovdqu64 %zmm31, row_seen(%rip)"),
    "tilerelease": (r"\btilerelease\b", ""),
}
GUARDED = """
#include "cpu/tiles.h"
#include <cstdio>
extern "C" { unsigned char configuration_seen[64]; float row_seen[16]; }
using namespace pyxlbert::PYXLBERT_LEVEL;
__attribute__((noinline)) void begin() { begin_tiles(); end_tiles(); }
__attribute__((noinline)) void load_what_was_stored(float x) {
    float row[256];
    for (float& one : row) one = x;
    load_tile<0>(row, 64);
}
int main() {
    begin();
    load_what_was_stored(3.0f);
    for (int n : configuration_seen) std::printf("%d ", n);
    for (float one : row_seen) std::printf("%g ", one);
}
"""


def test_a_tile_instruction_sees_what_was_stored_before_it(tmp_path: Path) -> None:
    """The compiler may not drop or delay a store that only ldtilecfg or tileloadd reads.

    The functions of tiles.h are compiled as they are; in the assembly each of the two becomes a copy of what it would
    have read.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ is here")
    source, assembly, program = tmp_path / "guard.cpp", tmp_path / "guard.s", tmp_path / "guard"
    source.write_text(GUARDED)
    flags = "-std=c++20 -O3 -march=x86-64-v4 -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16 -mamx-int8"
    flags += f" -DPYXLBERT_LEVEL=amx -I{variants.ROOT / 'csrc'}"
    subprocess.run([compiler, *flags.split(), "-S", source, "-o", assembly], check=True, capture_output=True)
    text = assembly.read_text()
    for name, (pattern, copy) in COPIES.items():
        text, count = re.subn(pattern, copy, text)
        assert count > 0, name
    assembly.write_text(text)
    subprocess.run([compiler, assembly, "-o", program], check=True, capture_output=True)
    seen = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    wanted = [1] + 15 * [0] + 8 * [64, 0] + 16 * [0] + 8 * [16] + 8 * [0]
    assert [int(one) for one in seen[:64]] == wanted
    assert seen[64:] == 16 * ["3"]


def test_one_file_names_the_instructions() -> None:
    """Their effects on memory are declared there; gcc 12's intrinsics declare next to nothing."""
    pattern = re.compile(r"_tile_(load|stream|store|zero|dp|release)|%%tmm|tilecfg|tilerelease")
    files = [path for path in (variants.ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cpp")]
    assert [path.name for path in files if pattern.search(path.read_text())] == ["tiles.h"]


@compiled.known(variants.digest)
def test_packed_products() -> None:
    done = run(_built(), "--noconftest", f"{variants.ROOT}/tests/cpu/test_packed_products.py")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert passed(done) > 50


@compiled.known(variants.digest)
def test_attention() -> None:
    """Forward and backward of every attention op in bfloat16."""
    done = run(_built(), f"--confcutdir={OPS}", f"{OPS}/test_parity.py", "-k", "test_parity and attention and bfloat16")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert passed(done) > 100


@pytest.mark.parametrize("fault", ["1", "2", "3"])
@compiled.known(variants.digest)
def test_a_planted_fault_is_seen(fault: str) -> None:
    """Of a tile that is not cleared, a product that is left out, and a row that is not loaded, by each kernel."""
    products = ("a_product_is_within_the_budget", "encoder_layers_are_within_the_budget", "integers_have_the_same_bits")
    ops = ("attention", "relative_attention", "two_stream_attention")
    # One case of each.
    chosen = "33-1000 and dtype1 or dtype1-800 or integers and dtype1 or bfloat16 and (attention-causal- or XLNet-)"
    files = (f"{variants.ROOT}/tests/cpu/test_packed_products.py", f"{OPS}/test_parity.py")
    done = run(_built() | {"PYXLBERT_TILE_FAULT": fault}, f"--confcutdir={OPS}", "--tb=no", *files, "-k", f"({chosen})")
    failed = set(re.findall(r"FAILED \S+::test_(\w+)\[(\w+?attention|attention|amx)?", done.stdout))
    for name in products:
        assert any(test.startswith(name) for test, _ in failed), f"{name}: {done.stdout[-2000:]}"
    for name in ops:
        assert ("parity", name) in failed, f"{name}: {done.stdout[-2000:]}"
