"""use_backend and torch.compile: compiled code follows the block that it is called in."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

import pyxlbert

WEIGHT, BIAS = torch.ones(8), torch.zeros(8)


@pytest.fixture
def compiled() -> tuple[Callable[[Callable], Callable], list[list[str]]]:
    """A compiler whose graphs tell, each time they run, which backends they call."""
    ran: list[list[str]] = []

    def collect(graph: torch.fx.GraphModule, _: list) -> Callable:
        nodes = [node for node in graph.graph.nodes if "layer_norm_fwd" in str(node.target)]

        def run(*arguments):
            ran.append([node.args[-1] for node in nodes])
            return graph(*arguments)

        return run

    torch._dynamo.reset()
    return lambda function: torch.compile(function, fullgraph=True, backend=collect), ran


def norm(x: torch.Tensor) -> torch.Tensor:
    return pyxlbert.layer_norm(x, WEIGHT, BIAS)


def test_compiled_code_follows_the_block(compiled) -> None:
    compiler, ran = compiled
    function, x = compiler(norm), torch.randn(3, 8)
    function(x)
    with pyxlbert.use_backend("torch"):
        function(x)
        with pyxlbert.use_backend("cpu"):
            function(x)
    function(x)
    assert ran == [["cpu"], ["torch"], ["cpu"], ["cpu"]]


def test_the_block_may_be_inside_compiled_code(compiled) -> None:
    compiler, ran = compiled

    def both(x: torch.Tensor) -> torch.Tensor:
        with pyxlbert.use_backend("torch"):
            y = norm(x)
        return norm(y)

    compiler(both)(torch.randn(3, 8))
    assert ran == [["torch", "cpu"]]


def test_another_thread_has_its_own_block(compiled) -> None:
    compiler, ran = compiled
    function, x = compiler(norm), torch.randn(3, 8)
    with pyxlbert.use_backend("torch"):
        function(x)
        thread = threading.Thread(target=function, args=(x,))
        thread.start()
        thread.join()
        function(x)
    assert ran == [["torch"], ["cpu"], ["torch"]]


def test_the_backward_default_is_followed_too() -> None:
    """The backward backend is chosen where forward runs."""
    torch._dynamo.reset()
    seen: list[str] = []

    def collect(graph: torch.fx.GraphModule, _: list) -> Callable:
        seen.extend(node.args[-1] for node in graph.graph.nodes if "layer_norm_bwd" in str(node.target))
        return make_boxed_func(graph.forward)

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    function = torch.compile(norm, fullgraph=True, backend=aot_autograd(fw_compiler=collect))
    x = torch.randn(3, 8, requires_grad=True)
    function(x).sum().backward()
    with pyxlbert.use_backend(None, backward="torch"):
        y = function(x)
    y.sum().backward()
    assert seen == ["cpu", "torch"]
