"""Which devices the CUDA kernels run on, and with which tiles; what they do not take is refused with a sentence before
anything is started."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyxlbert import backends
from pyxlbert.testing import tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, Case, Draw, Use, as_tuple, to_float64

pytestmark = pytest.mark.skipif(backends.unavailable("cuda") is not None, reason=str(backends.unavailable("cuda")))
DEVICE = "cpu" if backends.cuda_is_emulated else "cuda"
NORM = {torch.float32: tolerances.SUMMATION_ORDER, torch.bfloat16: tolerances.MODEL_BFLOAT16}


@pytest.mark.parametrize(
    ("architectures", "capability", "wanted"),
    [
        (["80", "90a", "100", "100+PTX"], (7, 5), False),
        (["80", "90a", "100", "100+PTX"], (8, 0), True),
        (["80", "90a", "100", "100+PTX"], (8, 9), True),
        (["80", "90a", "100", "100+PTX"], (9, 0), True),
        (["80", "90a", "100", "100+PTX"], (10, 3), True),
        (["80", "90a", "100", "100+PTX"], (12, 0), True),
        (["80", "90a", "100"], (12, 0), False),
        (["86"], (8, 0), False),
        (["80+PTX"], (9, 0), True),
        (["90a"], (9, 0), True),
        (["90a"], (10, 0), False),
        (["90a+PTX"], (10, 0), False),
        (["100f"], (10, 3), True),
        (["100f+PTX"], (12, 0), False),
        ([], (8, 0), False),
    ],
)
def test_which_devices_code_runs_on(architectures: list[str], capability: tuple[int, int], wanted: bool) -> None:
    assert backends.cuda_kernels.covers(architectures, *capability) is wanted


def test_this_device_is_one_of_them() -> None:
    assert backends.cuda_kernels.probe(0) == ""
    assert backends.cuda_kernels.shared_memory(0) >= 99 * 1024
    if not backends.cuda_is_emulated:
        assert backends.cuda_kernels.covers(backends.cuda_kernels.built, *torch.cuda.get_device_capability())
        assert "there is no CUDA device 99" in backends.cuda_kernels.probe(99)


def results_of(op: str, arguments: Arguments, **options: str) -> list[torch.Tensor]:
    """The outputs, and the gradients of all that has one where those of the outputs are random."""
    spec = SPECS[op]
    leaves = {n: arguments[n].detach().requires_grad_() for n in spec.leaves(arguments)}
    outputs = as_tuple((spec.function if options else spec.plain)(**arguments | leaves, **options))
    generator = torch.Generator().manual_seed(4)
    cotangents = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents))]


@pytest.mark.skipif(not backends.cuda_is_emulated, reason="the shared memory of a device is what it is")
@pytest.mark.parametrize("dtype", list(NORM), ids=str)
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(
    ("op", "case"),
    [(op, case) for op in SPECS if "attention" in op for case in SPECS[op].used(Use.EMULATION)],
    ids=lambda value: value if isinstance(value, str) else value.id.replace(" ", "_"),
)
def test_little_shared_memory(
    op: str, case: Case, head_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles for the 99 KiB of capability 8.6, 8.9 and 12.0; the emulation ends on a launch that asks for more."""
    draw = Draw(torch.Generator().manual_seed(3), dtype, torch.device("cpu"))
    # Keys that are split are as many as they are.
    split = case.inputs.key_count >= backends.cuda_kernels.MANY_KEYS
    sized = replace(case.inputs, head_size=head_size) if split else case.inputs.sized(2, 75, head_size)
    if not split and sized.lengths is not None:
        sized = replace(sized, lengths=(75, 60))
    given = SPECS[op].make(sized, draw)
    monkeypatch.setenv("CUDA_EMULATION_SHARED", str(99 * 1024))
    # What nobody may see is NaN to ours alone: plain PyTorch would multiply it by zero.
    seen = {n: x.nan_to_num() if n == "value" else x for n, x in to_float64(given).items()}
    ours, truth = results_of(op, given, backend="cuda"), results_of(op, seen)
    for number, (x, wanted) in enumerate(zip(ours, truth, strict=True)):
        error = float((x.double() - wanted).norm() / wanted.norm())
        assert error <= NORM[dtype], f"result {number} is off by {error:.3g}"


@pytest.mark.skipif(not backends.cuda_is_emulated, reason="the shared memory of a device is what it is")
@pytest.mark.parametrize("head_size", [32, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_wider_tiles_give_the_same_bits(head_size: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward meets 64 keys at a time where a block has room for them, else 32; products come in the same order."""
    draw = torch.Generator().manual_seed(5)
    given = {
        n: torch.randn(2, k, 2, head_size, generator=draw) for n, k in (("query", 70), ("key", 201), ("value", 201))
    }
    given = {n: x.bfloat16() for n, x in given.items()} | {"key_lengths": torch.tensor([201, 90]), "causal": causal}
    wide = results_of("attention", given, backend="cuda")
    monkeypatch.setenv("CUDA_EMULATION_SHARED", str(99 * 1024))
    assert all(map(torch.equal, wide, results_of("attention", given, backend="cuda")))
