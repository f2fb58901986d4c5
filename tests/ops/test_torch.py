"""What the registration of ops leans on in torch."""

from __future__ import annotations

import torch
import torch.utils._python_dispatch

import pyxlbert
from pyxlbert.backends.native import _C
from pyxlbert.ops import _define, _encoder_stack, _torch
from pyxlbert.testing import compare

SCALE = 3.0


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, scale: float) -> torch.Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.scale, None


def test_the_short_way_into_an_autograd_function_is_here() -> None:
    """The one private name behind `apply`: without it every call with a gradient costs 50 us more."""
    assert _torch.transforming is not None, "torch._C._are_functorch_transforms_active has moved"
    assert _torch.transforming() is False


def test_what_tells_of_the_backward_pass_is_here() -> None:
    """Without it a tied table's gradient takes one more tensor of its size, and one more pass."""
    assert _torch.backward_pass is not _torch._no_pass, "torch._C._current_graph_task_id has moved"
    assert _torch.backward_pass() == -1
    assert hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    x = torch.ones(3)
    assert not _torch.held_by_autograd(x)


def test_apply_is_the_functions_own_apply() -> None:
    for call in (lambda x: _torch.apply(_Scale, x, SCALE), lambda x: _Scale.apply(x, SCALE)):
        x = torch.ones(2, requires_grad=True)
        y = call(x)
        y.sum().backward()
        assert type(y.grad_fn).__name__ == "_ScaleBackward"
        assert y.tolist() == x.grad.tolist() == [SCALE] * 2


class _Seen(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


def test_the_short_way_to_an_implementation_is_here() -> None:
    """The private names behind it: without them every small call takes three times as long."""
    assert _torch.watched is _torch._watched
    assert _torch.watched() is False
    assert _torch.transformed is _torch._transformed
    assert _torch.transformed() is False


def test_whoever_watches_sees_the_op() -> None:
    """The short way past the dispatcher is for calls that nobody wants to see."""
    x, weight = torch.randn(3, 8), torch.ones(8)
    name = "pyxlbert.layer_norm_fwd.default"
    with _Seen() as seen:
        pyxlbert.layer_norm(x, weight, weight)
    assert name in seen.names
    with torch.profiler.profile() as profile:
        pyxlbert.layer_norm(x, weight, weight)
    assert "pyxlbert::layer_norm_fwd" in {event.key for event in profile.key_averages()}
    with torch._subclasses.FakeTensorMode():
        assert type(pyxlbert.layer_norm(torch.empty(3, 8), torch.empty(8), torch.empty(8))) is not torch.Tensor
    # Fake tensors outside of their mode.
    mode = torch._subclasses.FakeTensorMode()
    y = pyxlbert.layer_norm(*(mode.from_tensor(t) for t in (x, weight, weight)))
    assert type(y) is not torch.Tensor and y.shape == x.shape


def test_the_short_way_has_the_same_bits(monkeypatch) -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    short = pyxlbert.layer_norm(x, weight, weight)
    monkeypatch.setattr(_define, "watched", lambda: True)
    compare.same_bits("dispatched", pyxlbert.layer_norm(x, weight, weight), short)


def test_layers_in_one_call_are_rows_in_memory() -> None:
    """All layers at once read addresses: a view that negates what lies there goes the ordinary way."""
    x = torch.randn(2, 8)
    for odd in (torch._neg_view(x), torch._efficientzerotensor((2, 8)), x.t(), x.double(), x[:0]):
        assert not _encoder_stack.takes(odd, odd)
        assert not _encoder_stack.takes(x, odd)
    assert _encoder_stack.takes(x, x) == (_C is not None)
