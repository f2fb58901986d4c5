"""Every Triton kernel compiles for every architecture: no spills, shared memory that fits, the right instructions.

See compiled.py for what need not be compiled again.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import compiled
import pytest
import triton_kernels
from pyxlbert.bench.ahead import SAME_PTX, SHARED

from pyxlbert.backends import OPS
from pyxlbert.testing.specs import SPECS

ROOT = Path(__file__).resolve().parents[2]
ALL = os.environ.get("PYXLBERT_TEST_ALL") == "1"
_spec = importlib.util.spec_from_file_location("compile_ahead", Path(__file__).with_name("compile_ahead.py"))
compile_ahead = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compile_ahead)
configurations = importlib.import_module("pyxlbert.kernels._configurations")
TRITON_OPS = sorted(name for name, op in OPS.items() if "triton" in op.backends)
# Compiled by every run, in seconds, so that it meets the compiler and what reads its results.
ALWAYS = "layer_norm"
# The other ops of rows are quick, and share a process.
ROWS = [op for op in TRITON_OPS if "attention" not in op and op != ALWAYS]
GROUPS = [*([op] for op in TRITON_OPS if "attention" in op), ROWS, [ALWAYS]]
# What a complaint says of a kernel.
NAMED = ("op", "architecture", "kernel", "case", "BLOCK_M", "BLOCK_N", "num_warps")
# Of calls without segments, mask and dropout, with heads of 64, whose products on Hopper are all of a whole warp group.
WARP_GROUPS = {
    "attention": {"fwd", "bwd_keys", "bwd_queries"},
    "relative_attention": {"fwd", "bwd_keys", "bwd_table"},
}
# Of an element of 16 bits, for which memory leaves an H100 the time: see docs/ops/bias_gelu.md.
MOST_INSTRUCTIONS = {"_fwd": 35, "_bwd": 53}
ROW_OPS = {"layer_norm", "bias_gelu", "dropout_add_layer_norm", "embedding_layer_norm"}


def test_every_op_of_triton_is_compiled() -> None:
    spec = importlib.util.find_spec("triton")
    assert spec is not None, "triton is a part of the development environment: pip install -r requirements-dev.txt"
    for op in TRITON_OPS:
        cases = {case for case, _ in compile_ahead.calls(SPECS[op], every=False)}
        assert cases and set(compile_ahead.COVERING[op]) <= cases, op
        assert all(compile_ahead.COVERING[op].values()), op


def architectures(op: str) -> set[int]:
    """Those that a run without --all compiles the op for."""
    cases = {case for case, _ in compile_ahead.calls(SPECS[op], every=False)}
    return {n for case in cases for n in compile_ahead.COVERING[op].get(case, (compile_ahead.USUAL,))}


def test_the_covering_set_meets_every_architecture() -> None:
    """Those of kernels of rows together, and both ops of scores the small cards and the large ones."""
    assert set().union(*(architectures(op) for op in ROW_OPS)) == set(SHARED)
    for op in ("attention", "relative_attention"):
        assert {80, 90, 100, 120} <= architectures(op) and architectures(op) & {86, 89}
    assert set(compile_ahead.COVERING) == set(TRITON_OPS)


def test_a_digest_is_of_all_that_kernels_import() -> None:
    known = set(triton_kernels.files())
    # The scripts beside this file import of bench these two, and of testing the specs, whose own imports are looked at.
    scripts = {ROOT / "bench" / name for name in ("ahead.py", "tiles.py")}
    others = {path for path in known if path.parent in (ROOT / "bench", ROOT / "pyxlbert" / "testing")} - scripts
    sources = {path for path in known if path.suffix == ".py"} - others
    missing = {str(path.relative_to(ROOT)) for source in sources for path in imported(source) if path not in known}
    # Beside the point: the package itself, processors' own kernels, and the definitions that results are held to.
    folders = ("pyxlbert/cpu/", "pyxlbert/reference/")
    assert not {name for name in missing if name != "pyxlbert/__init__.py" and not name.startswith(folders)}


def imported(source: Path) -> set[Path]:
    """The project's files that a file imports by name."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    found = set()
    for name in names:
        package, *rest = name.split(".")
        if package != "pyxlbert":
            continue
        top = ROOT if rest[:1] in (["bench"], ["kernels"]) else ROOT / "pyxlbert"
        path = top.joinpath(*rest)
        found |= {one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()}
    return found


def test_a_digest_is_of_what_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = triton_kernels.digest()
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    assert triton_kernels.digest() != before


def lines_of(script: str, *arguments: str) -> list[dict[str, Any]]:
    """What a script beside this file prints, in a process that compiles kernels and does not interpret them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton")
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    done = subprocess.run([*command, "--all"] if ALL else command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_architectures_of_the_same_ptx_differ_in_its_target_alone() -> None:
    """Of every kernel of scores: what the search for tiles takes from one of them holds for the others."""
    if compiled.passed("triton same PTX", triton_kernels.digest()):
        return
    lines = lines_of("same_ptx.py")
    met = {(line["architecture"], line["kernel"]) for line in lines}
    assert met == set(itertools.product(SAME_PTX, {key.kernel for key in configurations.TABLE}))
    wrong = [line for line in lines if not (line["ptx"] and line["shared"] and line["code"])]
    assert not wrong, "\n".join(map(str, wrong))
    compiled.write("triton same PTX", triton_kernels.digest())


@pytest.mark.parametrize("ops", GROUPS, ids=[ops[0] for ops in GROUPS])
def test_kernels_compile(ops: list[str]) -> None:
    if ops != [ALWAYS] and compiled.passed(f"triton {ops[0]}", triton_kernels.digest()):
        return
    lines = lines_of("compile_ahead.py", *ops)
    for op in ops:
        own = [line for line in lines if line["op"] == op]
        assert {line["architecture"] for line in own} == (set(SHARED) if ALL else architectures(op)), op
        assert any(line["half"] for line in own), op
    wrong, grouped = [], set()
    for line in lines:
        op, architecture = line["op"], line["architecture"]
        named = {name: line.get(name) for name in NAMED}
        if line["stack"] or line["local"]:
            wrong.append(f"spills: {line['stack']} bytes in {named}")
        if line["shared"] > SHARED[architecture]:
            wrong.append(f"shared memory: {line['shared']} bytes in {named}")
        # On sums of rows and on segments alone nothing is multiplied.
        if op not in ROW_OPS and line["half"] and "float32" not in line["case"] and not line["matrix"]:
            wrong.append(f"no matrix instructions in {named}")
        if architecture == 90 and line["case"] == "D=64 plain torch.bfloat16" and line["kernel"] in WARP_GROUPS[op]:
            grouped.add((op, line["kernel"]))
            if set(line["matrix"]) != {"wgmma"}:
                wrong.append(f"{line['matrix']} and not wgmma alone in {named}")
        most = MOST_INSTRUCTIONS.get(line["kernel"]) if op == compile_ahead.BY_ELEMENT and line["half"] else None
        if most is not None and line["instructions"] > most:
            wrong.append(f"{line['instructions']:.1f} instructions an element, wanted {most} at most, in {named}")
        if op in ROW_OPS and line["kernel"] in ("_fwd", "_bwd") and not line["wide_loads"]:
            wrong.append(f"no loads of 16 bytes in {named}")
    assert not wrong, "\n".join(wrong)
    assert grouped == {(op, kernel) for op in ops for kernel in WARP_GROUPS.get(op, ())}
    if ops != [ALWAYS]:
        compiled.write(f"triton {ops[0]}", triton_kernels.digest())
