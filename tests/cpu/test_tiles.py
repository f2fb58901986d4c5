"""Level amx on any machine with AVX-512 and its bfloat16: the kernels are built once more on tiles in software.

See csrc/cpu/tile_model.h.  Where the processor has tiles, every suite runs on them as well.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import variants

import pyxlbert

pytestmark = pytest.mark.skipif(
    "avx512_bf16" not in pyxlbert._C.levels(), reason="the model of tiles needs AVX-512 with bfloat16"
)
OPS = f"{variants.ROOT}/tests/ops"


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Environment variables under which Python imports the build with modelled tiles."""
    return variants.build("emulated", {"PYXLBERT_EMULATE_TILES": "1"}) | {"PYXLBERT_TEST_SMALL": "amx"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=variants.ROOT)


def passed(done: subprocess.CompletedProcess) -> int:
    found = re.findall(r"(\d+) passed", done.stdout)
    return int(found[-1]) if found else 0


def test_a_usual_build_has_no_model(environment) -> None:
    code = "import pyxlbert; print(pyxlbert._C.levels()[-1])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "amx", done.stderr
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        tiles = " amx_bf16 " in f"{file.read()} "
    assert ("amx" in pyxlbert._C.levels()) <= tiles


def test_one_file_names_the_instructions() -> None:
    """Their effects on memory are declared there; gcc 12's intrinsics declare next to nothing."""
    pattern = re.compile(r"_tile_(load|stream|store|zero|dp|release)|%%tmm|tilecfg|tilerelease")
    files = [path for path in (variants.ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cpp")]
    assert [path.name for path in files if pattern.search(path.read_text())] == ["tiles.h"]


def test_packed_products(environment) -> None:
    done = run(environment, "--noconftest", f"{variants.ROOT}/tests/cpu/test_packed_products.py")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert passed(done) > 50


def test_attention(environment) -> None:
    """Forward and backward of every attention op in bfloat16."""
    done = run(
        environment, f"--confcutdir={OPS}", f"{OPS}/test_parity.py", "-k", "test_parity and attention and bfloat16"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert passed(done) > 100


@pytest.mark.parametrize("fault", ["1", "2", "3"])
def test_a_planted_fault_is_seen(environment, fault: str) -> None:
    """Of a tile that is not cleared, a product that is left out, and a row that is not loaded, by each kernel."""
    products = ("a_product_is_within_the_budget", "encoder_layers_are_within_the_budget", "integers_have_the_same_bits")
    ops = ("attention", "relative_attention", "two_stream_attention")
    # One case of each.
    chosen = "33-1000 and dtype1 or dtype1-800 or integers and dtype1 or bfloat16 and (attention-causal- or XLNet-)"
    files = (f"{variants.ROOT}/tests/cpu/test_packed_products.py", f"{OPS}/test_parity.py")
    done = run(
        environment | {"PYXLBERT_TILE_FAULT": fault}, f"--confcutdir={OPS}", "--tb=no", *files, "-k", f"({chosen})"
    )
    failed = set(re.findall(r"FAILED \S+::test_(\w+)\[(\w+?attention|attention|amx)?", done.stdout))
    for name in products:
        assert any(test.startswith(name) for test, _ in failed), f"{name}: {done.stdout[-2000:]}"
    for name in ops:
        assert ("parity", name) in failed, f"{name}: {done.stdout[-2000:]}"
