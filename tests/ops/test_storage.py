"""Memory that is gone or another when kernels come to read it: an error that names the argument, and never a crash.

FSDP frees parameters by `untyped_storage().resize_(0)`, `x.data = ` puts other memory behind a tensor that autograd has
saved, and `torch.ops.pyxlbert` has none of the public functions' checks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from runners import arguments_of, best, cotangents_of, with_gradients
from torch.utils._python_dispatch import TorchDispatchMode

import pyxlbert
from pyxlbert import backends
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, Case, Spec, as_tuple

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu")))


def _calls() -> Iterator[tuple[Spec, Case]]:
    """Of every op cases that, taken together, give each of its tensors."""
    for spec in SPECS.values():
        seen: set[str] = set()
        for case in (case for case in spec.suite if case.small):
            tensors = _tensors(arguments_of(spec, case, torch.float32))
            if tensors.keys() - seen and all(x.numel() for x in tensors.values()):
                seen |= tensors.keys()
                yield spec, case


def _tensors(arguments: Arguments) -> dict[str, torch.Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}


def _apart(arguments: Arguments) -> Arguments:
    """The same with memory of its own for every tensor."""
    return {name: x.detach().clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def _call(spec: Spec, arguments: Arguments) -> tuple[torch.Tensor, ...]:
    return as_tuple(spec.function(**arguments, backend=best(spec)))


def _free(x: torch.Tensor) -> None:
    x.untyped_storage().resize_(0)


def _shrink(x: torch.Tensor) -> None:
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 1)


CALLS = [pytest.param(spec, case, id=f"{spec.name}-{case.id}") for spec, case in _calls()]


@pytest.mark.parametrize("change", [_free, _shrink])
@pytest.mark.parametrize(("spec", "case"), CALLS)
def test_forward_needs_the_storage_of_every_argument(
    spec: Spec, case: Case, change: Callable[[torch.Tensor], None]
) -> None:
    for name in _tensors(arguments_of(spec, case, torch.float32)):
        arguments = _apart(arguments_of(spec, case, torch.float32))
        change(arguments[name])
        with pytest.raises(ValueError, match=rf"{spec.name}_fwd: {name}: .*storage holds \d+ bytes, wanted at least"):
            _call(spec, arguments)


@pytest.mark.parametrize("change", [_free, _shrink])
@pytest.mark.parametrize(("spec", "case"), CALLS)
def test_backward_needs_the_storage_of_every_argument(
    spec: Spec, case: Case, change: Callable[[torch.Tensor], None]
) -> None:
    for name, refused in _backward(spec, case, change):
        assert refused is None or "storage holds" in refused, f"{name}: {refused}"


@pytest.mark.parametrize(("spec", "case"), CALLS)
def test_backward_needs_the_shape_of_every_argument(spec: Spec, case: Case) -> None:
    def shorten(x: torch.Tensor) -> None:
        x.data = x.data.narrow(0, 0, x.shape[0] - 1).clone()

    # The rows of a table are nobody else's number: autograd finds that the gradient has fewer.
    words = re.compile("wanted|expected shape|expanded size")
    for name, refused in _backward(spec, case, shorten):
        assert refused is None or words.search(refused), f"{name}: {refused}"


def _backward(spec: Spec, case: Case, change: Callable[[torch.Tensor], None]) -> Iterator[tuple[str, str | None]]:
    """For every tensor the error of a backward pass before which it has changed, or None if nobody reads it."""
    names = _tensors(arguments_of(spec, case, torch.float32))
    refused = 0
    for name in names:
        arguments = with_gradients(spec, _apart(arguments_of(spec, case, torch.float32)))
        outputs = _call(spec, arguments)
        if not any(x.requires_grad for x in outputs):
            return
        with torch.no_grad():
            change(arguments[name])
        inputs = [x for x in _tensors(arguments).values() if x.requires_grad]
        try:
            torch.autograd.grad(outputs, inputs, cotangents_of(outputs), allow_unused=True)
        except (ValueError, RuntimeError) as error:
            refused += 1
            yield name, str(error)
        else:
            yield name, None
    assert refused, "no tensor is read by backward?"


class _Recorder(TorchDispatchMode):
    """The arguments of our ops that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, list[Any]]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "pyxlbert":
            self.calls[function._schema.name.removeprefix("pyxlbert::")] = (function, list(arguments))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(("spec", "case"), CALLS)
def test_raw_ops_refuse_shapes_that_contradict_each_other(spec: Spec, case: Case) -> None:
    """Every tensor of a call, shortened along every dimension: refused, or of a size that nobody else knows."""
    with _Recorder() as recorder:
        arguments = _apart(arguments_of(spec, case, torch.float32))
        outputs = _call(spec, arguments if spec.composed else with_gradients(spec, arguments))
        if any(x.requires_grad for x in outputs):
            torch.autograd.backward(outputs, cotangents_of(outputs))
    assert f"{spec.name}_fwd" in recorder.calls
    for name, (function, arguments) in recorder.calls.items():
        refused = {}
        for place, x in enumerate(arguments):
            if not isinstance(x, torch.Tensor):
                continue
            argument = function._schema.arguments[place].name
            refused[argument] = []
            for dim in range(x.dim()):
                changed = x.detach().narrow(dim, 0, x.shape[dim] - 1).clone() if x.shape[dim] > 1 else x.detach()[None]
                try:
                    function(*arguments[:place], changed, *arguments[place + 1 :])
                except (ValueError, RuntimeError, IndexError) as error:
                    refused[argument].append(str(error))
        assert sum(map(len, refused.values())) >= len(refused), f"{name}: {refused}"


def test_raw_ops_refuse_numbers_and_dtypes_that_reach_outside() -> None:
    """What no shape tells: a table that begins behind the first row, and elements of another size."""
    x = torch.randn(1, 5, 1, 8)
    table = torch.randn(10, 1, 8)
    relative = [x, x, x, table, *(None,) * 2, 2, *(None,) * 7, 0, None, None, True, None, False, False, 1.0, 0.0, None]
    with pytest.raises(ValueError, match="offset: got 2, wanted at least 4"):
        torch.ops.pyxlbert.relative_attention_fwd(*relative, "cpu")
    attention = [x, x.half(), x, None, None, 0, None, None, False, 1.0, 0.0, None, "cpu"]
    with pytest.raises(
        ValueError, match=r"key: got float16 \[1, 5, 1, 8\], wanted \[B, S, H, D\] beside query float32"
    ):
        torch.ops.pyxlbert.attention_fwd(*attention)
    row = torch.randn(3, 8)
    statistics = torch.ones(3)
    with pytest.raises(ValueError, match=r"mean: got float32 \[3\], wanted float32 contiguous \[...\] beside dy"):
        torch.ops.pyxlbert.layer_norm_bwd(row, row, row[0], row[0], statistics[:1].expand(3), statistics, True, "cpu")
    with pytest.raises(ValueError, match="position: got 4 rows, wanted at least 5"):
        ids = torch.zeros(2, 5, dtype=torch.long)
        options = [None, None, 0.0, None, 1e-5, torch.float32, None, "cpu"]
        torch.ops.pyxlbert.embedding_layer_norm_fwd(ids, row, None, torch.randn(4, 8), row[0], row[0], *options)


def test_other_views_of_one_storage_are_no_fault() -> None:
    """Strides, offsets and broadcast rows within their storage, and tensors without elements, whose storage is none."""
    whole = torch.randn(40, 24)
    weight = torch.ones(8)
    for x in (whole[3:7, 8:16], whole[:, ::3], whole[:1, :8].expand(5, 8), whole.t()[:16].t()[:, :8], whole[:0, :8]):
        pyxlbert.layer_norm(x, weight, weight, backend="cpu")
    last = whole[-1, -8:]
    pyxlbert.layer_norm(last, last, last, backend="cpu")


def test_raw_ops_refuse_what_a_backend_does_not_take() -> None:
    """Kernels take dtypes by their size: float64 would be read as something else."""
    raw, x = torch.ops.pyxlbert, torch.ones(2, 4)
    for dtype, backend, error, words in (
        (torch.float64, "cpu", RuntimeError, "layer_norm_fwd: backend 'cpu' is unavailable: .*float64"),
        (torch.float32, "mkl", ValueError, "layer_norm_fwd: backend: got 'mkl', wanted one of torch, cpu"),
    ):
        one = x.to(dtype)
        with pytest.raises(error, match=words):
            raw.layer_norm_fwd(one, one[0], one[0], 1e-12, False, backend)
    wide = x.double()
    with pytest.raises(RuntimeError, match=r"bias_gelu_bwd: backend 'cpu' is unavailable: .*float64"):
        raw.bias_gelu_bwd(wide, wide, wide[0], "none", True, "cpu")
    assert raw.layer_norm_fwd(wide, wide[0], wide[0], 1e-12, False, "torch")[0].dtype is torch.float64


ROWS_WITHOUT_COLUMNS = {
    "layer_norm": ((3, 0), (0,), (0,)),
    "bias_gelu": ((3, 0), (0,)),
    "dropout_add_layer_norm": ((3, 0), (3, 0), (0,), (0,)),
    "linear": ((3, 0), (5, 0), (5,)),
    "linear_gelu": ((3, 0), (5, 0), (5,)),
}


@pytest.mark.parametrize("name", ROWS_WITHOUT_COLUMNS)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_rows_without_columns_have_gradients_without_columns(name: str, backend: str) -> None:
    leaves = [torch.ones(shape, requires_grad=True) for shape in ROWS_WITHOUT_COLUMNS[name]]
    getattr(pyxlbert, name)(*leaves, backend=backend).sum().backward()
    assert [one.grad.shape for one in leaves] == [one.shape for one in leaves]
