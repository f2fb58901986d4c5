"""The short way of a plain call to backend "cpu": taken where nothing is unusual, and the same bits as the long one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from runners import arguments_of
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pyxlbert
from pyxlbert.backends.native import _C
from pyxlbert.ops import _torch
from pyxlbert.testing import compare
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import as_tuple

pytestmark = pytest.mark.skipif(_C is None, reason="the native module is not built")

OPS = ("layer_norm", "dropout_add_layer_norm", "bias_gelu", "linear", "linear_gelu", "attention")


def module(op: str) -> Any:
    return importlib.import_module(f"pyxlbert.ops.{op}")


@pytest.fixture(params=[False, True], ids=["lent", "by attributes"])
def reader(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors as torch lends them, and as a torch that lends none."""
    _C.read_by_attributes(request.param)
    yield
    _C.read_by_attributes(False)


def test_torch_lends_its_tensors() -> None:
    """Without it, and without the names behind `watched`, a small call takes half as long again."""
    assert hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert _torch._always not in _torch._watchers()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_both_ways_have_the_same_bits(op: str, dtype: torch.dtype, monkeypatch) -> None:
    spec, taken = SPECS[op], 0
    own = module(op)
    usual = own._usual

    def counting(*arguments: Any) -> bool:
        nonlocal taken
        found = usual(*arguments)
        taken += found
        return found

    with torch.no_grad():
        for case in [one for one in spec.cases if one.small][:8]:
            arguments = arguments_of(spec, case, dtype)
            monkeypatch.setattr(own, "_usual", counting)
            short = as_tuple(spec.function(**arguments))
            monkeypatch.setattr(own, "_usual", lambda *arguments: False)
            long = as_tuple(spec.function(**arguments))
            for a, b in zip(short, long, strict=True):
                compare.same_bits(case.id, a, b)
                assert a.is_contiguous() and a.stride() == b.stride()
    assert taken >= 2, "no case is usual"


class _Function(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


@contextmanager
def _transform() -> Iterator[None]:
    from torch._C._functorch import _vmap_decrement_nesting, _vmap_increment_nesting

    _vmap_increment_nesting(2, "error")
    try:
        yield
    finally:
        _vmap_decrement_nesting()


WATCHERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a dispatch mode": _Dispatch,
    "a function mode": _Function,
    "a default device": lambda: torch.device("cpu"),
    "a transform": _transform,
    "forward differentiation": forward_ad.dual_level,
    "a profiler": torch.profiler.profile,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another backend": lambda: pyxlbert.use_backend("torch"),
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_the_long_way_where_somebody_watches(watcher: str) -> None:
    x, weight = torch.randn(2, 8), torch.randn(8)
    usual = module("layer_norm")._usual
    assert usual(None, x, weight, weight)
    with WATCHERS[watcher]():
        assert not usual(None, x, weight, weight)
    assert usual(None, x, weight, weight)


def test_the_long_way_of_a_traced_call() -> None:
    seen = []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(module("layer_norm")._usual(None, x, x[0], x[0]))
        return x * 2

    torch.jit.trace(run, torch.randn(2, 8), check_trace=False)
    assert seen == [False]


def test_gradients_and_names_decide() -> None:
    usual = module("layer_norm")._usual
    x, weight = torch.randn(2, 8), torch.nn.Parameter(torch.randn(8))
    for backend, given, grad, wanted in (
        (None, weight, True, False),
        (None, weight, False, True),
        (None, weight.detach(), True, True),
        ("cpu", weight.detach(), True, True),
        ("torch", weight.detach(), True, False),
        ("mkl", weight.detach(), True, False),
        ("", weight.detach(), True, False),
    ):
        with nullcontext() if grad else torch.no_grad():
            assert usual(backend, x, given, given) is wanted, (backend, grad)
    with pyxlbert.use_backend("torch"):
        assert usual("cpu", x, weight.detach(), weight.detach())


class _Own(torch.Tensor):
    pass


def _freed(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(0)
    return x


def _shrunk(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 1)
    return x


# Of a shape; [2, 8] for x, [8] for a weight.
UNUSUAL: dict[str, Callable[..., Any]] = {
    "float64": lambda *shape: torch.randn(shape, dtype=torch.float64),
    "int64": lambda *shape: torch.ones(shape, dtype=torch.int64),
    "meta": lambda *shape: torch.empty(shape, device="meta"),
    "empty": lambda *shape: torch.empty(0, *shape),
    "scalar": lambda *shape: torch.tensor(1.0),
    "another shape": lambda *shape: torch.randn(*shape[:-1], 9),
    "negated": lambda *shape: torch._neg_view(torch.randn(shape)),
    "lazy zeros": lambda *shape: torch._efficientzerotensor(shape),
    "a subclass": lambda *shape: torch.randn(shape).as_subclass(_Own),
    "sparse": lambda *shape: torch.ones(shape).to_sparse(),
    "nested": lambda *shape: torch.nested.nested_tensor([torch.randn(shape)]),
    "freed": lambda *shape: _freed(torch.randn(shape)),
    "shrunk": lambda *shape: _shrunk(torch.randn(shape)),
    "a list": lambda *shape: [1.0] * 8,
    "None": lambda *shape: None,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_the_long_way_of_an_unusual_tensor(kind: str, reader: None) -> None:
    usual, x, weight = module("layer_norm")._usual, torch.randn(2, 8), torch.randn(8)
    assert usual(None, x, weight, weight)
    assert not usual(None, UNUSUAL[kind](2, 8), weight, weight)
    assert not usual(None, x, UNUSUAL[kind](8), weight)
    assert not usual(None, x, weight, UNUSUAL[kind](8))


def test_parameters_have_the_dtype_or_float32() -> None:
    usual = module("layer_norm")._usual
    for dtype, other, wanted in (
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.float16, False),
        (torch.float32, torch.bfloat16, False),
        (torch.float16, torch.float16, True),
    ):
        assert usual(None, torch.ones(2, 8, dtype=dtype), torch.ones(8, dtype=other), torch.ones(8)) is wanted


@pytest.mark.parametrize("lengths", [[3, 4], [-1, 3]])
def test_values_are_checked_on_the_short_way(lengths: list[int]) -> None:
    q = torch.randn(2, 3, 1, 8)
    assert module("attention")._usual(None, q, q, q, torch.tensor([3, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="attention: key_lengths: got"):
        pyxlbert.attention(q, q, q, key_lengths=torch.tensor(lengths, dtype=torch.int32))


def test_many_dimensions(reader: None) -> None:
    x, weight = torch.randn(*(1,) * 40, 2, 8), torch.randn(8)
    wanted = pyxlbert.layer_norm(x.view(2, 8), weight, weight)
    compare.same_bits("rows", pyxlbert.layer_norm(x, weight, weight).view(2, 8), wanted)
