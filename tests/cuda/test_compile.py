"""The CUDA kernels compile for every architecture: no spills, no stack, registers, shared memory, the number of
instructions and of accesses to shared memory within budget.json, the instructions that they are written for.  See
check.py for what is compiled, and compiled.py for what need not be compiled again."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import compiled
import pytest

_spec = importlib.util.spec_from_file_location("check", Path(__file__).with_name("check.py"))
check = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check)

needs_nvcc = pytest.mark.skipif(check.nvcc.find() is None, reason="no nvcc is here, so nothing compiles")
BUDGET = json.loads(check.BUDGET.read_text())
# A unit that is always compiled, in seconds, so that every run meets the compiler and what reads its results.
ALWAYS = "layer_norm"
# Units whose kernels multiply matrices.
PRODUCTS = tuple(check.nvcc.BY_ELEMENT)
# What a block may have on sm_80, on sm_90, and on check.SMALL.
MAX_SHARED, MAX_SHARED_OF_HOPPER, MIN_SHARED = 163 * 1024, 227 * 1024, 99 * 1024
# Of a thread of Hopper's kernels, which share out three times as many by `setmaxnreg`.
STARTING_REGISTERS = 65536 // 384 // 8 * 8
# Kernels of theirs that multiply none, or seldom.
WITHOUT_PRODUCTS = ("attention_bwd_rows", "join_parts")
# Kernels that read rows of memory and do little else.
ROWS = ("layer_norm", "dropout_add_layer_norm", "bias_gelu", "embedding_layer_norm")


def test_every_file_has_its_budget() -> None:
    assert set(check.units()) >= set(BUDGET)
    without = {"devices", "dispatch", "attention_hopper.float"}
    assert set(BUDGET) == {name for name in check.units() if not name.endswith(".float16")} - without


def digest(name: str) -> str:
    """Of all that decides whether the test below passes for a unit."""
    limits = json.dumps(BUDGET.get(name), sort_keys=True)
    return compiled.digest([*check.sources_of(name), Path(__file__)], *check.called_with(name), limits)


@needs_nvcc
@pytest.mark.parametrize("variable", check.VARIABLES)
def test_a_digest_is_of_the_environment_too(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvcc reads options there: -Xptxas=-O1 makes other code of the same command."""
    monkeypatch.delenv(variable, raising=False)
    before = digest("rows")
    monkeypatch.setenv(variable, "-Xptxas=-O1")
    assert digest("rows") != before


@needs_nvcc
def test_what_is_kept_is_of_the_environment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "BUILD", tmp_path)
    monkeypatch.setattr(check, "architectures_of", lambda name: (check.FULL,))
    monkeypatch.delenv("NVCC_APPEND_FLAGS", raising=False)
    before = check.compiled("rows")
    assert check.compiled("rows") == before
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Xptxas=-O1")
    assert check.compiled("rows") != before


@needs_nvcc
@pytest.mark.parametrize("name", check.units())
def test_kernels_compile(name: str) -> None:
    if name != ALWAYS and compiled.passed(f"cuda {name}", digest(name)):
        return
    wrong = []
    for architecture, kernels in check.compiled(name).items():
        budget = {kernel: found for kernel, found in BUDGET.get(name, {}).items() if architecture in found["registers"]}
        if not check.ALL:
            assert set(kernels) == set(budget), "kernels and budget.json differ: python tests/cuda/check.py --write"
        for kernel, found in kernels.items():
            where = f"{kernel} on sm_{architecture}"
            counts = found["instructions"]
            if found["stack"] or found["spills"] or counts.get("LDL") or counts.get("STL"):
                wrong.append(f"{where}: {found['stack']} bytes of stack, {found['spills']} of spills, {counts}")
            if found["static"]:
                wrong.append(f"{where}: {found['static']} bytes of static shared memory, wanted all of it dynamic")
            most = MIN_SHARED if architecture in check.SMALL else MAX_SHARED
            if found["shared"] > (MAX_SHARED_OF_HOPPER if "hopper" in kernel else most):
                wrong.append(f"{where}: {found['shared']} bytes of shared memory, more than a block may have")
            if kernel in budget:
                registers, shared = budget[kernel]["registers"][architecture], budget[kernel]["shared"]
                instructions = budget[kernel]["instructions"][architecture]
                if found["registers"] > registers:
                    wrong.append(f"{where}: {found['registers']} registers, more than the {registers} of budget.json")
                # Most of a kernel is what it does for each score, unrolled: what it asks there too often shows here.
                if counts["all"] > instructions:
                    wrong.append(f"{where}: {counts['all']} instructions, more than the {instructions} of budget.json")
                accesses, most = check.shared_accesses(found), budget[kernel]["shared_accesses"][architecture]
                if accesses > most:
                    wrong.append(f"{where}: {accesses} accesses to shared memory, more than the {most} of budget.json")
                if found["shared"] > shared:
                    wrong.append(f"{where}: {found['shared']} bytes of shared memory, budget.json has {shared}")
            if "hopper" in kernel:
                if not counts.get("HGMMA") or not counts.get("UTMALDG"):
                    wrong.append(f"{where}: no products of four warps, or no tensor copies, in {counts}")
                if found["registers"] != STARTING_REGISTERS:
                    wrong.append(f"{where}: starts with {found['registers']} registers, wanted {STARTING_REGISTERS}")
            elif (
                name.partition(".")[0] in PRODUCTS
                and not kernel.startswith(WITHOUT_PRODUCTS)
                and not counts.get("HMMA")
            ):
                wrong.append(f"{where}: no products on tensor cores in {counts}")
            scalar = re.search(r", 1(, (true|false))?>", kernel)
            rows = (name in ROWS and not scalar) or kernel.startswith("attention_bwd_rows")
            if rows and not counts.get("LDG.E.128"):
                wrong.append(f"{where}: no loads of 16 bytes in {counts}")
    assert not wrong, "\n".join(wrong)
    if name != ALWAYS:
        compiled.write(f"cuda {name}", digest(name))


# A sum of products, and a factor in registers.
UNDER_WAY = """
    wgmma.fence.sync.aligned;
    {
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, %rd1, 1, 1, 1, 1;
    }
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
"""


@pytest.mark.parametrize(
    ("line", "before"),
    [
        ("mul.f32 %f9, %f2, %f8;", "wgmma.wait_group"),
        ("mul.f32 %f4, %f7, %f8;", "    {\n"),
        ("cvt.rn.bf16x2.f32 %r3, %f7, %f8;", "    {\n"),
    ],
    ids=["a sum that is read too early", "a sum that is written too late", "a factor that is written too late"],
)
def test_registers_of_products_under_way_are_looked_at(line: str, before: str) -> None:
    assert check.touched(UNDER_WAY) == []
    assert check.touched(UNDER_WAY.replace(before, f"{line}\n{before}", 1)) == [line]
    beside = line.replace("%f2", "%f22").replace("%f4", "%f44").replace("%r3", "%r33")
    assert check.touched(UNDER_WAY.replace(before, f"{beside}\n{before}", 1)) == []
    assert check.touched(f"{line}\n{UNDER_WAY}\n{line}") == []
