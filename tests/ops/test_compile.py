"""Every op inside torch: schema and fake, torch.compile, torch.export, checkpointing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import pytest
import torch
from runners import (
    ALL,
    SLOW,
    arguments_of,
    best,
    device_of,
    grid,
    ids_of,
    run,
)
from torch.utils.checkpoint import checkpoint

import pyxlbert
from pyxlbert.backends import OPS
from pyxlbert.testing import compare
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Case, Spec, as_tuple


def _opchecks() -> Iterator[tuple[Spec, Case, torch.dtype, str]]:
    """Every small case on every backend, in one dtype each, in turn."""
    cases = [(spec, case) for spec, case in grid() if case.small and not (spec.composed and case.gradients)]
    for number, (spec, case) in enumerate(cases):
        for place, backend in enumerate(OPS[spec.name].backends):
            if backend in SLOW and number % 8 and not ALL:
                continue
            yield spec, case, spec.dtypes[(number + place) % len(spec.dtypes)], backend


@pytest.mark.parametrize(("spec", "case", "dtype", "backend"), list(_opchecks()), ids=ids_of)
def test_opcheck(spec: Spec, case: Case, dtype: torch.dtype, backend: str) -> None:
    """Schema, fake (strides and dtypes too) and the absence of hidden aliasing, for both directions."""
    with recorded_calls(spec.name) as calls:
        arguments = arguments_of(spec, case, dtype, device_of(backend))
        run(lambda **a: spec.function(**a, backend=backend), spec, arguments, case.gradients)
    assert {direction for direction, _ in calls} == ({"fwd", "bwd"} if case.gradients else {"fwd"})
    for direction, values in calls:
        detached = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in values)
        overload = getattr(torch.ops.pyxlbert, f"{spec.name}_{direction}").default
        tensors = [v for v in detached if isinstance(v, torch.Tensor)]
        # opcheck can copy neither a view without elements nor a tensor with two dimensions of 0.
        if any(list(v.shape).count(0) > 1 for v in tensors):
            continue
        detached = tuple(
            v.new_empty(v.shape) if isinstance(v, torch.Tensor) and v.numel() == 0 else v for v in detached
        )
        torch.library.opcheck(overload, detached, test_utils=("test_schema", "test_faketensor"))


@contextlib.contextmanager
def recorded_calls(op: str) -> Iterator[list]:
    """The arguments of every raw call of `op` inside the block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name()
            if name.startswith(f"pyxlbert::{op}_") and name.rpartition("_")[2] in ("fwd", "bwd"):
                calls.append((name.rpartition("_")[2], args))
            return func(*args, **(kwargs or {}))

    with Record():
        yield calls


@pytest.mark.parametrize("spec", SPECS.values(), ids=ids_of)
def test_compiles_as_one_graph(spec: Spec) -> None:
    """torch.compile, full graph, dynamic shapes, forward and backward: equal to eager, for every shape it is given."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **a: spec.function(**a, backend=best(spec)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    small = [case for case in spec.suite if case.small and case.gradients]
    for case in (small[0], small[1], small[2], small[-3]):
        arguments = arguments_of(spec, case, torch.float32)
        ours = run(compiled, spec, arguments, True)
        eager = run(lambda **a: spec.function(**a, backend=best(spec)), spec, arguments, True)
        for name, value in eager.items():
            compare.same_bits(f"{spec.name} {case.id} compiled {name}", ours[name], value)
        with torch.no_grad():
            eager = run(lambda **a: spec.function(**a, backend=best(spec)), spec, arguments, False)
            compare.same_bits("no grad", as_tuple(compiled(**arguments))[0], eager["out 0"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_inductor_gets_the_strides_it_was_promised(backend: str, tmp_path, monkeypatch) -> None:
    """The generated code asserts them: of an input whose rows are not in order, y is in order."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    x, ids = torch.randn(5, 3, 8).transpose(0, 1), torch.randint(0, 8, (4, 3)).t()
    weight, bias = torch.randn(8), torch.randn(8)

    def call(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = pyxlbert.embedding_layer_norm(ids, weight.expand(8, 8), None, None, weight, bias, backend=backend)
        return pyxlbert.layer_norm(x, weight, bias, backend=backend), embedded

    for name, ours, eager in zip(("norm", "embedding"), torch.compile(call)(x, ids), call(x, ids), strict=True):
        compare.same_bits(name, ours, eager)


@pytest.mark.parametrize("spec", SPECS.values(), ids=ids_of)
def test_exports(spec: Spec) -> None:
    """torch.export keeps the op as one node and the exported program computes the same."""
    arguments = arguments_of(spec, spec.suite[0], torch.float32)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    others = {name: value for name, value in arguments.items() if name not in tensors}

    class Module(torch.nn.Module):
        def forward(self, **tensors):
            return as_tuple(spec.function(**tensors, **others, backend=best(spec)))

    with torch.no_grad():
        program = torch.export.export(Module(), (), tensors)
        nodes = [str(n.target) for n in program.graph.nodes if "pyxlbert" in str(n.target)]
        assert nodes == [f"pyxlbert.{spec.name}_fwd.default"]
        for ours, eager in zip(program.module()(**tensors), Module()(**tensors), strict=True):
            compare.same_bits(f"{spec.name} exported", ours, eager)


@pytest.mark.parametrize("spec", SPECS.values(), ids=ids_of)
def test_checkpointed(spec: Spec) -> None:
    """torch.utils.checkpoint recomputes to the same gradients."""
    arguments = arguments_of(spec, spec.suite[0], torch.float32)
    names = list(arguments)

    def checkpointed(**a):
        return checkpoint(
            lambda *v: spec.function(**dict(zip(names, v, strict=True))), *a.values(), use_reentrant=False
        )

    ours = run(checkpointed, spec, arguments, True)
    for name, value in run(spec.function, spec, arguments, True).items():
        compare.same_bits(f"{spec.name} checkpointed {name}", ours[name], value)
