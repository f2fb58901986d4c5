"""The emulation of CUDA: right in both orders of warps, clean under AddressSanitizer, and not blind: it catches planted
bugs, each of which a GPU may or may not show.

What is compiled for one run, and the slow ones, find the same for the same sources, see compiled.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import compiled
import emulated
import pytest

from pyxlbert.backends import OPS

HERE = Path(__file__).parent
# Planted bugs of this unit are always looked for, in seconds, so that every run plants some.
ALWAYS = "layer_norm"


def _file(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, HERE / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, runs = _file("build.py"), _file("runs.py")
pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs cases on a module in a process of their own, with more environment variables."""
    command = [sys.executable, str(HERE / "runs.py"), "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(module: Path, *wanted: str, **environment: str) -> subprocess.CompletedProcess[str]:
            asked = {"module": str(module), "wanted": wanted, "environment": environment}
            print(json.dumps(asked), file=server.stdin, flush=True)
            return subprocess.CompletedProcess(asked, *json.loads(server.stdout.readline()))

        yield run
        server.stdin.close()


def test_a_digest_is_of_all_that_runs(run: Run) -> None:
    known = {str(path) for path in emulated.files()}
    done = run(build.build(), runs.RUNS[0], "relative_attention: emulated, everything", CUDA_EMULATION_FILES="1")
    called = {line.removeprefix("calls ") for line in done.stdout.splitlines() if line.startswith("calls ")}
    assert str(compiled.ROOT / "pyxlbert" / "checks.py") in called, done.stderr[-2000:]
    assert called <= known
    included = {str(path) for path in build.included() if path.is_relative_to(compiled.ROOT)}
    assert str(compiled.ROOT / "csrc" / "cuda" / "rows.cuh") in included
    assert included <= known


def test_every_op_of_cuda_is_walked() -> None:
    walked = {one.partition(":")[0] for one in runs.RUNS}
    assert walked == {name for name, op in OPS.items() if "cuda" in op.backends}
    assert {one.partition(":")[0] for one in runs.HOPPER_RUNS} == {"attention", "relative_attention"}


@pytest.mark.parametrize("order", ["forwards", "reversed"])
def test_right_in_both_orders(run: Run, order: str) -> None:
    done = run(build.build(), *runs.RUNS, CUDA_EMULATION_ORDER=order)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{one}: right" for one in runs.RUNS]


@pytest.mark.parametrize("order", ["forwards", "reversed"])
@compiled.known(emulated.digest)
def test_hopper_is_right_in_both_orders(run: Run, order: str) -> None:
    done = run(build.build(), *runs.HOPPER_RUNS, CUDA_EMULATION_ORDER=order, CUDA_EMULATION_HOPPER="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{one}: right" for one in runs.HOPPER_RUNS]


class Bug(NamedTuple):
    """A line of the sources and what is wrong about another in its place."""

    name: str
    run: str  # of runs.py
    unit: str
    file: str
    old: str
    new: str
    says: str = "wrong"  # or what the emulation stops with


BUGS = (
    Bug("a sum overwritten before all have read it", "layer_norm: emulated, long rows", "layer_norm", "rows.cuh",
        "__syncthreads();  // the previous sum has been read\n", "\n"),
    Bug("a sum read before all have written it", "layer_norm: emulated, long rows", "layer_norm", "rows.cuh",
        "parts[warp_id()] = x;\n        __syncthreads();", "parts[warp_id()] = x;"),
    Bug("shares of rows added up without waiting", "layer_norm: emulated, short rows", "layer_norm", "rows.cuh",
        "for (int group = 0; group < S::ROWS; ++group) {\n            __syncthreads();",
        "for (int group = 0; group < S::ROWS; ++group) {"),
    Bug("a shuffle that half of a warp takes part in", "layer_norm: emulated, short rows", "layer_norm", "rows.cuh",
        "for (int offset = 16; offset > 0; offset /= 2) {\n        x.first",
        "for (int offset = lane_id() < 16 ? 16 : 0; offset > 0; offset /= 2) {\n        x.first", "deadlock"),
    Bug("a thread that leaves before a shuffle", "layer_norm: emulated, short rows", "layer_norm", "rows.cuh",
        "    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * each;\n    for (std::int64_t at",
        "    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * each;\n"
        "    if (threadIdx.x == 5) return;\n    for (std::int64_t at", "deadlock"),
    Bug("a copy that is waited for too little", "attention: emulated", "attention.bfloat16", "attention_fwd.cuh",
        "for (int t = from; t < to; ++t) {\n                cp_async_wait<0>();",
        "for (int t = from; t < to; ++t) {\n                cp_async_wait<1>();"),
    Bug("others' copies that are not waited for", "attention: emulated", "attention.bfloat16", "attention_fwd.cuh",
        "for (int t = from; t < to; ++t) {\n                cp_async_wait<0>();\n                __syncthreads();",
        "for (int t = from; t < to; ++t) {\n                cp_async_wait<0>();"),
    Bug("copies that no group has", "attention: emulated", "attention.bfloat16", "attention_fwd.cuh",
        "    cp_async_commit();\n}", "}", "nobody waited for"),
    Bug("rows of a tile that are not at multiples of 16 bytes", "attention: emulated", "attention.bfloat16",
        "tiles.cuh", "constexpr int LD = D + 8;", "constexpr int LD = D + 4;", "16"),
    Bug("too little shared memory", "relative_attention: emulated", "relative_attention.bfloat16", "attention_fwd.cuh",
        "PLACES + BANDS + (QUERIES", "PLACES + (QUERIES", "outside of shared memory"),
    Bug("a band read before the warp has written it", "relative_attention: emulated", "relative_attention.bfloat16",
        "attention_fwd.cuh", "bands.begun = true;\n        __syncwarp();", "bands.begun = true;"),
    Bug("a ring of one tile of table rows too few", "relative_attention: emulated", "relative_attention.bfloat16",
        "attention_fwd.cuh", "RING = WINDOW + 2 * BN;", "RING = WINDOW + BN;", "wrong|outside of shared memory"),
    Bug("weights read before other warps have written them", "relative_attention: emulated",
        "relative_attention_bwd.bfloat16", "attention_bwd_walk.cuh",
        "next_more = __syncthreads_or(next_more);", "next_more = next_more;"),
    Bug("queries overwritten by the next ones", "relative_attention: emulated", "relative_attention_bwd.bfloat16",
        "attention_bwd_walk.cuh", "side.fetch(next, places + (1 - buffer) * C::BM, 1 - buffer,",
        "side.fetch(next, places + (1 - buffer) * C::BM, buffer,"),
    Bug("rows of dout held before others have copied them", "attention: emulated", "attention_bwd.bfloat16",
        "attention_bwd_queries.cuh",
        "cp_async_wait<0>();\n            __syncthreads();\n#pragma unroll\n            for (int k = 0; k < D",
        "cp_async_wait<0>();\n#pragma unroll\n            for (int k = 0; k < D"),
    Bug("keys overwritten by queries before all hold theirs", "attention: emulated", "attention_bwd.bfloat16",
        "attention_bwd_key_rows.cuh", "if (C::HELD) __syncthreads();", ""),
    Bug("statistics overwritten by those of the step after next", "attention: emulated", "attention_bwd.bfloat16",
        "attention_bwd_key_rows.cuh", "(step + 2) * C::BM, (step + 2) % 3", "(step + 2) * C::BM, step % 3"),
    Bug("a skew written before the zeros beside it", "relative_attention: emulated", "relative_attention_bwd.bfloat16",
        "attention_bwd_queries.cuh",
        "make_uint4(0, 0, 0, 0);\n                        }\n                        __syncwarp();",
        "make_uint4(0, 0, 0, 0);\n                        }"),
    Bug("dropout for which a kernel without it is chosen", "attention: emulated, dropout", "attention.bfloat16",
        "features.h", "if (a.dropout.seed != nullptr) needed |= feature::DROPOUT;", ""),
    Bug("a mask for which a kernel without it is chosen", "attention: emulated, everything", "attention_bwd.bfloat16",
        "features.h", "if (a.mask.data != nullptr) needed |= feature::MASK;\n"
        "    if (a.bias.data != nullptr) needed |= feature::BIAS;", ""),
    Bug("segments for which a kernel without them is chosen", "relative_attention: emulated, segments",
        "relative_attention.bfloat16", "features.h", "if (a.key_segments != nullptr) needed |= feature::SEGMENTS;", ""),
    Bug("dropout that gradients do not know of", "relative_attention: emulated, dropout",
        "relative_attention_bwd.bfloat16", "features.h",
        "if (a.dropout.seed != nullptr) needed |= feature::DROPOUT;", ""),
    Bug("ranks for which a kernel without them is chosen", "relative_attention: emulated, everything",
        "relative_attention.bfloat16", "features.h", "if (a.key_rank != nullptr) needed |= feature::RANKS;", ""),
    Bug("a tile that is overwritten while it is read", "attention: Hopper, lengths", "attention_hopper.bfloat16",
        "attention_hopper.cuh", "mbarrier_wait(&shared.key_empty[stage], turn ^ 1);", "", "wrong|arrivals"),
    Bug("a wait for the wrong phase", "attention: Hopper, lengths", "attention_hopper.bfloat16", "attention_hopper.cuh",
        "mbarrier_wait(&shared.value_full[stage], turn);", "mbarrier_wait(&shared.value_full[stage], turn ^ 1);",
        "wrong|deadlock|arrivals"),
    Bug("too few bytes expected", "attention: Hopper, lengths", "attention_hopper.bfloat16", "attention_hopper.cuh",
        "mbarrier_expect(full, rows * D * 2);", "mbarrier_expect(full, rows * D);", "wrong|deadlock"),
    Bug("a step through a factor that is half as long", "attention: Hopper, lengths", "attention_hopper.bfloat16",
        "attention_hopper.cuh", "key.at(k / 64 * C::BN * 128 + k % 64 * 2)", "key.at(k / 64 * C::BN * 128 + k % 64)"),
    Bug("values behind the keys that are not zeroed", "attention: Hopper, lengths", "attention_hopper.bfloat16",
        "attention_hopper.cuh", "if (first_j + C::BN > s.keys) {", "if (false) {"),
    Bug("a block of the table that is overwritten while it is read", "relative_attention: Hopper, segments",
        "attention_hopper.bfloat16", "attention_hopper.cuh",
        "TABLE_STAGES = CONSUMERS + STAGES;", "TABLE_STAGES = CONSUMERS + STAGES - 1;", "wrong|arrivals"),
    Bug("a band of four warps read before it is written", "relative_attention: Hopper, segments",
        "attention_hopper.bfloat16", "attention_hopper.cuh",
        "band.template write<8>(64, d);\n            __syncwarp();", "band.template write<8>(64, d);"),
    Bug("scores read before their products are waited for", "attention: Hopper, lengths", "attention_hopper.bfloat16",
        "attention_hopper.cuh", "wgmma_wait<0>(c);", "", "wrong|does not name"),
    Bug("a sum that a wait does not name", "attention: Hopper, lengths", "attention_hopper.bfloat16",
        "attention_hopper.cuh", "wgmma_wait<0>(o);", "wgmma_wait<0>(c);", "does not name"),
    Bug("products that no group has", "attention: Hopper, lengths", "attention_hopper.bfloat16",
        "attention_hopper.cuh", "wgmma_commit();\n        wgmma_wait<0>(o);", "wgmma_wait<0>(o);",
        "nobody waited for|does not name"),
    Bug("a sum that no fence names", "attention: Hopper, lengths", "attention_hopper.bfloat16",
        "attention_hopper.cuh", "wgmma_fence(c);", "", "no wgmma_fence names"),
    Bug("weights written after the fence", "attention: Hopper, lengths", "attention_hopper.bfloat16",
        "attention_hopper.cuh", "wgmma_fence(o, p);", "wgmma_fence(o, p);\n        p[1][0] ^= 1;",
        "written after the wgmma_fence"),
    Bug("queries that threads have written and wgmma does not see", "relative_attention: Hopper, segments",
        "attention_hopper.bfloat16", "attention_hopper.cuh",
        "fence_shared_for_wgmma();\n        named_barrier(1 + group, 128);\n        key_segments",
        "named_barrier(1 + group, 128);\n        key_segments"),
    Bug("zeros that threads have written and wgmma does not see", "attention: Hopper, lengths",
        "attention_hopper.bfloat16", "attention_hopper.cuh",
        "make_uint4(0, 0, 0, 0);\n            fence_shared_for_wgmma();", "make_uint4(0, 0, 0, 0);"),
    Bug("an mbarrier that the copy engine does not know", "attention: Hopper, lengths", "attention_hopper.bfloat16",
        "attention_hopper.cuh", "mbarrier_init_done();", "", "does not know yet"),
    Bug("more registers taken than given", "attention: Hopper, lengths", "attention_hopper.bfloat16",
        "attention_hopper.cuh", "give_registers<C::PRODUCER_REGISTERS>();", "give_registers<32>();",
        "deadlock: .* waits for registers"),
)  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name.replace(" ", "_") for bug in BUGS])
def test_a_planted_bug_is_caught(run: Run, bug: Bug, tmp_path: Path) -> None:
    if bug.unit != ALWAYS and compiled.passed(f"planted bug {bug.name}", emulated.digest()):
        return
    # What is not compiled would be wrong without any bug.
    assert runs.head_size(bug.run) <= build.HEAD_SIZE
    module = build.variant(tmp_path, bug.unit, bug.file, bug.old, bug.new)
    said = ""
    for order in ("forwards", "reversed"):
        hopper = "1" if bug.run in runs.HOPPER_RUNS else "0"
        done = run(module, bug.run, CUDA_EMULATION_ORDER=order, CUDA_EMULATION_HOPPER=hopper)
        assert "Traceback" not in done.stderr, done.stderr[-2000:]
        said = done.stdout if done.returncode == 0 else done.stderr
        if re.search(bug.says, said):
            assert done.returncode == 0 or "emulation: " in said
            if bug.unit != ALWAYS:
                compiled.write(f"planted bug {bug.name}", emulated.digest())
            return
    pytest.fail(f"not caught; the last order said: {said[-500:]}")


@compiled.known(emulated.digest)
def test_clean_under_sanitizers() -> None:
    """Global and shared memory out of bounds, misaligned and overflowing numbers: bfloat16, one head size."""
    if build.sanitizer() is None:
        pytest.skip("no libasan is here (g++ brings it)")
    module = build.build(
        build.BUILD.with_name("emulation-sanitized"),
        options=f"{build.QUICKLY} -fsanitize=address,undefined -fno-sanitize=null,object-size "
        "-fno-sanitize-recover=all -fno-omit-frame-pointer -Wno-uninitialized -DPYXLBERT_ONE_SIZE -DPYXLBERT_FEW_TYPES",
        only=lambda unit: not unit.endswith((".float", ".float16")),
    )
    command = [sys.executable, str(HERE / "runs.py"), str(module), *runs.RUNS]
    environment = os.environ | {"LD_PRELOAD": build.sanitizer(), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [f"{one}: right" for one in runs.RUNS]
