"""A model's forward pass as one CUDA graph: its kernels are launched together, at the cost of one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyxlbert.nn import fixed_sizes

# Before it is captured a model runs this often: kernels are compiled and libraries make their workspaces.
WARM_UP = 3


class Graphed:
    """What `graphed` returns: call it with the arguments of the example, in other values.

    Attributes:
        inputs: the tensors that the graph reads, by name.
        outputs: what it writes, as the model returned it.
    """

    def __init__(self, model: nn.Module, example: Mapping[str, Any]) -> None:
        self.model = model
        self.inputs = {name: x.detach().clone() for name, x in example.items() if isinstance(x, Tensor)}
        self._others = {name: x for name, x in example.items() if name not in self.inputs}
        self._graph = torch.cuda.CUDAGraph()
        device = next(iter(self.inputs.values())).device
        with torch.cuda.device(device), torch.inference_mode(), fixed_sizes():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._run()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self.outputs = self._run()

    def _run(self) -> Any:
        return self.model(**self.inputs, **self._others)

    def __call__(self, **arguments: Any) -> Any:
        """The model's output for these arguments; its tensors hold until the next call writes them anew.

        Raises:
            ValueError: an argument is missing, is not of the example, or has another shape, dtype, device or, where it
                is no tensor, value.
        """
        check_arguments(self.inputs, self._others, arguments)
        for name, x in self.inputs.items():
            x.copy_(arguments[name])
        self._graph.replay()
        return self.outputs


def graphed(model: nn.Module, example: Mapping[str, Any]) -> Graphed:
    """Captures `model(**example)` in eval mode, without gradients, as a CUDA graph.

    A small batch then costs the host one launch instead of one a kernel.  No size may depend on values in a graph, so
    padding is masked and not left out, as under `torch.compile`: give it batches of full, or of nearly one, length.

    Args:
        model: of `pyxlbert.models`, or any module that can be captured; in eval mode, on a CUDA device.  Its parameters
            are read where they are: what is written into them counts, tensors put in their place do not.
        example: keyword arguments of a call; tensors on the model's device may take other values later, of the same
            shape and dtype, all else stays as it is.

    Returns:
        a `Graphed`, to be called with the same keywords.

    Raises:
        TypeError: the model is no module, or the example no mapping.
        ValueError: the model is in training mode, or is not on a CUDA device, a tensor is not on the model's, or there
            is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"graphed: model: got {type(model).__name__}, wanted a torch.nn.Module")
    if not isinstance(example, Mapping):
        raise TypeError(f"graphed: example: got {type(example).__name__}, wanted a mapping of keyword arguments")
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"graphed: model: got {training[0]} in training mode, wanted model.eval()")
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if device.type != "cuda":
        raise ValueError(f"graphed: model: got one on {device}, wanted one on a CUDA device")
    tensors = {name: x for name, x in example.items() if isinstance(x, Tensor)}
    if not tensors:
        raise ValueError("graphed: example: got no tensor, wanted the arguments of a call")
    for name, x in tensors.items():
        if x.device != device:
            raise ValueError(f"graphed: {name}: got device {x.device}, wanted {device}")
    return Graphed(model, example)


def check_arguments(inputs: Mapping[str, Tensor], others: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raises ValueError unless `arguments` are those of the example: `inputs` in other values, and `others`."""
    wanted = {*inputs, *others}
    if set(arguments) != wanted:
        raise ValueError(f"graphed: arguments: got {sorted(arguments)}, wanted {sorted(wanted)}, as in the example")
    for name, x in inputs.items():
        given = arguments[name]
        if not isinstance(given, Tensor):
            raise ValueError(f"graphed: {name}: got {type(given).__name__}, wanted a tensor")
        for what in ("shape", "dtype", "device"):
            got, want = getattr(given, what), getattr(x, what)
            if got != want:
                shown = (list(got), list(want)) if what == "shape" else (got, want)
                raise ValueError(f"graphed: {name}: got {what} {shown[0]}, wanted {shown[1]}, as in the example")
    for name, value in others.items():
        if arguments[name] is not value and arguments[name] != value:
            raise ValueError(f"graphed: {name}: got {arguments[name]!r}, wanted {value!r}, as in the example")
