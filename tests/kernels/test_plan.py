"""Remembered launches give the kernel what Triton would have given it; in a process that compiles but runs nothing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_remembered_launches_are_tritons_own() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


class AnyDevice:
    """Equal to every device: CPU tensors stand for those of a GPU here."""

    def __eq__(self, other: object) -> bool:
        return True


def main() -> None:
    from pyxlbert.bench.ahead import SHARED, compile_for
    from triton.compiler.compiler import CompiledKernel

    from pyxlbert.testing.direct import Direct

    compile_for(90)
    launched: list[tuple] = []
    CompiledKernel._init_handles = lambda self: None
    CompiledKernel.launch_metadata = lambda self, *arguments: None
    CompiledKernel.run = property(lambda self: lambda *arguments: launched.append((self.hash, *arguments)))
    CompiledKernel.function = None
    torch.cuda.current_device = lambda: AnyDevice()
    plan = importlib.import_module("pyxlbert.kernels._plan")
    configurations = importlib.import_module("pyxlbert.kernels._configurations")
    configurations.card = lambda device: configurations.Card(90, SHARED[90])
    triton = Direct("triton")
    assert plan.POSSIBLE

    def same(one: tuple, other: tuple) -> None:
        """The same kernel, grid, stream, hooks, numbers and constants; tensors of the same kind in the same places."""
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            if isinstance(a, torch.Tensor):
                assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            elif isinstance(a, tuple):
                # A record comes back as a plain tuple, which is all that a launch asks of it.
                assert isinstance(b, tuple)
                same(a, b)
            else:
                assert type(a) is type(b) and a == b, (a, b)

    def tensors_in(arguments: tuple) -> list[torch.Tensor]:
        found = [x for x in arguments if isinstance(x, torch.Tensor)]
        return found + [x for record in arguments if isinstance(record, tuple) for x in tensors_in(record)]

    def twice(call, *tensors: torch.Tensor, launches: int = 1) -> list[torch.Tensor]:
        """Triton's launches, then remembered ones on other tensors of the same kind."""
        launched.clear()
        before = len(plan._plans)
        call(*tensors)
        assert len(plan._plans) == before + 1
        others = [x.clone(memory_format=torch.preserve_format) for x in tensors]
        results = call(*others)
        assert len(launched) == 2 * launches and len(plan._plans) == before + 1
        first, again = launched[:launches], launched[launches:]
        for one, other in zip(first, again, strict=True):
            same(one, other)
        given = {id(x) for launch in again for x in tensors_in(launch)}
        assert {id(x) for x in others} <= given and {id(x) for x in results} <= given
        # What a launch leaves to the next is new, and the same for both.
        assert not {id(x) for launch in first for x in tensors_in(launch)} & given
        return others

    def attend(q, k, v, lengths, *rest):
        bias, seed = rest or (None, None)
        given = {"key_lengths": lengths, "bias": bias, "causal": True, "dropout_p": 0.1 if rest else 0.0, "seed": seed}
        return triton.attention_fwd(q, k, v, **given, scale=0.5)

    q, k, v = (torch.randn(2, 20, 3, 64).bfloat16() for _ in range(3))
    lengths, bias = torch.tensor([3, 20], dtype=torch.int32), torch.randn(1, 3, 20, 20).bfloat16()
    twice(attend, q, k, v, lengths)
    twice(attend, q, k, v, lengths, bias, torch.tensor([7]))
    # Few queries against long keys: the keys are split, and what the parts have found is joined.
    few, keys, values = (torch.randn(2, rows, 3, 64).bfloat16() for rows in (2, 1088, 1088))
    twice(attend, few, keys, values, torch.tensor([1000, 1088], dtype=torch.int32), launches=2)
    for left, found in zip(tensors_in(launched[2])[-3:], tensors_in(launched[3])[:3], strict=True):
        assert left is found and left.dtype is torch.float32
    x, w, b = torch.randn(5, 7, 96), torch.randn(96), torch.randn(96)
    for save in (False, True):
        twice(lambda x, w, b, save=save: triton.layer_norm_fwd(x, w, b, 1e-5, save), x, w, b)
    # Another shape, another stride, another alignment, another option: each is a kind of its own.
    before = len(plan._plans)
    triton.layer_norm_fwd(x[:4].clone(), w, b, 1e-5, True)
    triton.layer_norm_fwd(torch.randn(5 * 7 * 96 + 1)[1:].view(5, 7, 96), w, b, 1e-5, True)
    triton.layer_norm_fwd(x, w, b, 1e-6, True)
    assert len(plan._plans) == before + 3
    # What was copied before the launch, or stands in two places, is not remembered.
    triton.layer_norm_fwd(x.transpose(0, 1), w, b, 1e-5, True)
    triton.layer_norm_fwd(x.half(), w.half(), *[b.half()[:]] * 1, 1e-5, True)
    count = len(plan._plans)
    triton.layer_norm_fwd(x.bfloat16(), w, w, 1e-5, True)
    attend(q, k, v, lengths.long())
    assert len(plan._plans) == count == before + 4


if __name__ == "__main__":
    main()
