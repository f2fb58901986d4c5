"""Sets of features: no call gets a kernel that lacks what it needs, and what each set computes is right.

The choice is C++ that holds no CUDA, so g++ alone compiles it here; kernels run on a GPU or in the emulation.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pyxlbert import backends
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._attention import WHOLE
from pyxlbert.testing.specs._spec import Case, as_tuple, to_float64
from pyxlbert.testing.specs.attention import Inputs as Attention
from pyxlbert.testing.specs.relative_attention import Inputs as Relative
from pyxlbert.testing.specs.two_stream_attention import Inputs as TwoStreams

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is here")
needs_cuda = pytest.mark.skipif(
    backends.unavailable("cuda") is not None, reason=f"no CUDA kernels run here: {backends.unavailable('cuda')}"
)
DEVICE = "cpu" if backends.cuda_is_emulated else "cuda"

# Bits in features.h's order.
MASK, BIAS, RANKS, SEE_SELF, UNIFORM_ROWS, SEGMENTS, DROPOUT = (1 << n for n in range(7))
ALL = 127
FULL_ATTENTION, FULL_RELATIVE = MASK | BIAS | RANKS | DROPOUT, ALL & ~BIAS
# By op: its sets, and what they have.
SETS = {
    "Attention": {"Plain": 0, "Dropped": DROPOUT, "FullAttention": FULL_ATTENTION},
    "RelativeAttention": {"Plain": 0, "Segmented": SEGMENTS | DROPOUT, "FullRelative": FULL_RELATIVE},
    "TwoStreamAttention": {"FullRelative": FULL_RELATIVE},
}

# Says what each op's launcher chooses for a call of every combination; "none": it refuses.
PROGRAM = """
#include "cuda/features.h"
#include <cstdio>
#include <type_traits>
using namespace pyxlbert::cuda;

AttentionCall call_of(unsigned needed) {
    static const int somewhere = 0;
    static const std::int64_t seed = 0;
    AttentionCall a = {};
    a.streams = 2;
    if (needed & 1) a.mask.data = &somewhere;
    if (needed & 2) a.bias.data = &somewhere;
    if (needed & 4) a.key_rank = &somewhere;
    if (needed & 8) a.stream[1].options.see_self = true;
    if (needed & 16) a.relative.uniform_rows = true;
    if (needed & 32) a.key_segments = &somewhere;
    if (needed & 64) a.dropout.seed = &seed;
    return a;
}

template <class Set>
const char* name() {
    return std::is_same_v<Set, Plain> ? "Plain" : std::is_same_v<Set, Dropped> ? "Dropped" :
           std::is_same_v<Set, Segmented> ? "Segmented" : std::is_same_v<Set, FullAttention> ? "FullAttention" :
           std::is_same_v<Set, FullRelative> ? "FullRelative" : "?";
}

template <class Sets>
void say(const char* op) {
    for (unsigned needed = 0; needed < 128; ++needed) {
        const char* found = "none";
        unsigned has = 0;
        try {
            Sets::choose(call_of(needed), [&](auto set) {
                using F = decltype(set);
                found = name<F>();
                has = F::MASK | F::BIAS << 1 | F::RANKS << 2 | F::SEE_SELF << 3 | F::UNIFORM_ROWS << 4 |
                      F::SEGMENTS << 5 | F::DROPOUT << 6;
            });
        } catch (const std::logic_error&) {
        }
        std::printf("%s %u %s %u\\n", op, needed, found, has);
    }
}

int main() {
    say<SetsOfAttention>("Attention");
    say<SetsOfRelativeAttention>("RelativeAttention");
    say<SetsOfTwoStreamAttention>("TwoStreamAttention");
}
"""


def compiled(folder: Path, old: str = "", new: str = "") -> subprocess.CompletedProcess[str]:
    """PROGRAM, compiled to folder / "choice" with a copy of features.h in which `old` is replaced by `new`."""
    header = folder / "cuda" / "features.h"
    header.parent.mkdir()
    text = (CSRC / "cuda" / "features.h").read_text()
    assert old == "" or text.count(old) == 1
    header.write_text(text.replace(old, new) if old else text)
    source = folder / "choice.cpp"
    source.write_text(PROGRAM)
    command = [COMPILER, "-std=c++20", "-O0", f"-I{folder}", f"-I{CSRC}", str(source), "-o", str(folder / "choice")]
    return subprocess.run(command, capture_output=True, text=True)


@needs_compiler
def test_the_smallest_set_that_has_all_is_chosen(tmp_path: Path) -> None:
    done = compiled(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = subprocess.run([tmp_path / "choice"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == len(SETS) * (ALL + 1)
    for line in said:
        op, number, found, has = line.split()
        needed = int(number)
        # Where nothing hides keys but lengths and the diagonal, a row sees its own anyway.
        if not needed & (MASK | RANKS):
            needed &= ~SEE_SELF
        wanted = [name for name, features in SETS[op].items() if needed & ~features == 0]
        assert found == (wanted[0] if wanted else "none"), line
        assert int(has) == SETS[op].get(found, 0), line


@needs_compiler
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return (needed & ~F::BITS) == 0;", "return true;"),
        ("return (needed & ~F::BITS) == 0;", "return (needed & F::BITS) == needed || F::SEGMENTS;"),
        ("while (n < COUNT && !does[n]) ++n;", "while (n + 2 < COUNT && !does[n]) ++n;"),
        ("SetsOfOp<Plain, Dropped, FullAttention>", "SetsOfOp<Plain, Dropped>"),
        ("SetsOfOp<FullRelative>", "SetsOfOp<Segmented>"),
    ],
    ids=["every set covers", "segments cover all", "the last but one at most", "no full set", "too small a set"],
)
def test_a_choice_that_lacks_a_feature_does_not_compile(old: str, new: str, tmp_path: Path) -> None:
    done = compiled(tmp_path, old, new)
    assert done.returncode != 0
    assert "static assertion failed" in done.stderr


def _subsets(*names: str) -> list[tuple[str, ...]]:
    return [chosen for n in range(len(names) + 1) for chosen in itertools.combinations(names, n)]


def _case(op: str, features: tuple[str, ...]) -> Case:
    """A call that has these features, with tiles of which all, some and none may be attended."""
    hidden = {"mask": (1, 1, WHOLE, WHOLE), "hidden": 0.2} if "mask" in features else {}
    options = {**hidden, "dropout_p": 0.2, "seed": 7} if "dropout" in features else hidden
    biases = "uvse" if "segments" in features else "uv"
    ranks = {"ranks": "random"} if "ranks" in features else {}
    rows = {"masked_rows": "uniform"} if "uniform" in features else {}
    if op == "attention":
        bias = {"bias": (1, 1, WHOLE, WHOLE)} if "bias" in features else {}
        inputs = Attention(
            150, 140, batch=2, heads=1, layout="apart", causal=True, lengths=(140, 70), **options, **bias
        )
    elif op == "relative_attention":
        # see_self is nothing where there is neither a mask nor ranks.
        own = {"see_self": True} if {"mask", "ranks"} & set(features) else {}
        inputs = Relative(
            70, 75, batch=2, heads=1, layout="apart", biases=biases, lengths=(75, 40), **options, **ranks, **rows, **own
        )
    else:
        inputs = TwoStreams(40, batch=2, heads=1, biases=biases, lengths=(40, 19), **options, **ranks, **rows)
    return Case(", ".join(features) or "plain", inputs)


CASES = [
    *(("attention", chosen) for chosen in _subsets("mask", "bias", "dropout")),
    *(("relative_attention", chosen) for chosen in _subsets("mask", "ranks", "uniform", "segments", "dropout")),
    *(("two_stream_attention", chosen) for chosen in _subsets("mask", "ranks", "segments", "dropout")),
]


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "features"), CASES, ids=[f"{op}, {', '.join(f) or 'plain'}" for op, f in CASES])
def test_every_combination(op: str, features: tuple[str, ...], dtype: torch.dtype) -> None:
    _check(op, features, dtype)


@pytest.mark.skipif(not backends.cuda_is_emulated, reason="Hopper's path begins at 128 queries, here at one")
@pytest.mark.parametrize(("op", "features"), CASES, ids=[f"{op}, {', '.join(f) or 'plain'}" for op, f in CASES])
def test_hopper_leaves_what_its_kernel_lacks(
    op: str, features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel is compiled for one set of features: other calls take the kernels of every device."""
    monkeypatch.setenv("CUDA_EMULATION_HOPPER", "1")
    _check(op, features, torch.bfloat16)


def _check(op: str, features: tuple[str, ...], dtype: torch.dtype) -> None:
    """out and all gradients are those of plain PyTorch in float64."""
    spec, case = SPECS[op], _case(op, features)
    arguments = spec.arguments(case, torch.Generator().manual_seed(3), dtype, torch.device("cpu"))
    names = spec.leaves(arguments)

    def results(given: dict, device: str, **more: str) -> list[torch.Tensor]:
        here = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        here |= {n: here[n].detach().requires_grad_() for n in names}
        outputs = as_tuple((spec.function if more else spec.plain)(**here, **more))
        generator = torch.Generator().manual_seed(4)
        cotangents = [torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in outputs]
        return [*outputs, *torch.autograd.grad(outputs, [here[n] for n in names], cotangents)]

    ours = results(arguments, DEVICE, backend="cuda")
    truth = results(to_float64(arguments), "cpu")
    limit = tolerances.SUMMATION_ORDER if dtype == torch.float32 else tolerances.MODEL_BFLOAT16
    for n, (x, wanted) in enumerate(zip(ours, truth, strict=True)):
        # A bias's gradient, a sum over all rows, may come to little.
        compare.close(f"result {n}", x.detach().cpu(), wanted.detach(), limit, least=2.0)
