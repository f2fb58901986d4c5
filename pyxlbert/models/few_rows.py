"""A BERT encoder's layers as numbers for the kernels, for inference on few rows: `pyxlbert.ops._encoder_layers`.

Modules can be changed at any time: a hook set, an adapter put in place of a layer, a parameter replaced.  Everything
that would change what a call computes is looked at before each use, and whatever is unusual is left to the modules.
Values of parameters are read where they lie and may change.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pyxlbert.nn import DropoutAddLayerNorm, Linear, LinearActivation, SelfAttention
from pyxlbert.ops._encoder_layers import LayerParameters, LinearParameters, NormParameters

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}

_TRAINING, _PATCHED = operator.itemgetter("training"), operator.methodcaller("get", "forward")
_DTYPE, _SHAPE = operator.attrgetter("dtype"), operator.attrgetter("shape")

# Hooks on every module of the process; torch may move them, and has then no such hooks under these names.
_GLOBAL_HOOKS = [getattr(torch_module, name, {}) for name in ("_global_forward_pre_hooks", "_global_forward_hooks")]


class Unusual(Exception):
    """A layer that only its own modules can compute."""


class EncoderAddresses:
    """The layers of an encoder in eval mode as they were found, and what tells whether they still are so.

    Args:
        encoder: BERT's, with at least one layer.
        layer_type, residual_type: the classes of a layer and of its two residual parts.

    Raises:
        Unusual: a module is not what BERT has there, watches calls, or has parameters that the kernels do not read.
    """

    def __init__(self, encoder: nn.Module, layer_type: type[nn.Module], residual_type: type[nn.Module]) -> None:
        # What was found where: an attribute, a parameter or a child by its name in the dictionary that holds it.
        self._where: list[dict[str, Any]] = []
        self._name: list[str] = []
        self._what: list[Any] = []
        self._parameters: list[nn.Parameter] = []
        self._states: list[dict[str, Any]] = []
        self._hooks: list[dict[int, Any]] = list(_GLOBAL_HOOKS)
        self._residual_type = residual_type
        layers = self._child(encoder, "layer", nn.ModuleList)
        self._children, self._names = vars(layers)["_modules"], list(layers._modules)
        if not self._names:
            raise Unusual
        first = layers[0]
        self.hidden = self._child(first, "output", residual_type).LayerNorm.weight.numel()
        self.layers = [self._layer(self._child(layers, name, layer_type)) for name in self._names]
        self.dtype = self._parameters[0].dtype
        self._addresses, self._shapes = self._look()
        if not self.unchanged() or len({layer.heads for layer in self.layers}) > 1:
            raise Unusual

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # Addresses mean nothing in a copy.
        return type(None), ()

    def unchanged(self) -> bool:
        """Whether every module and parameter is still the one that was found, in eval mode and without hooks."""
        # Maps and not loops: this is run for every call, and a loop would take longer than all layers' Python.
        return (
            list(self._children) == self._names
            and all(map(operator.is_, map(dict.get, self._where, self._name), self._what))
            and not any(self._hooks)
            and not any(map(_TRAINING, self._states))
            and not any(map(_PATCHED, self._states))
            and {*map(_DTYPE, self._parameters)} == {self.dtype}
            and all(map(Tensor.is_contiguous, self._parameters))
            and self._look() == (self._addresses, self._shapes)
        )

    def _look(self) -> tuple[list[int], list[torch.Size]]:
        return list(map(Tensor.data_ptr, self._parameters)), list(map(_SHAPE, self._parameters))

    def _layer(self, layer: nn.Module) -> LayerParameters:
        hidden = self.hidden
        attention, intermediate = self._child(layer, "attention"), self._child(layer, "intermediate")
        own = self._child(attention, "self", SelfAttention)
        mixed = self._child(attention, "output", self._residual_type)
        output = self._child(layer, "output", self._residual_type)
        up = self._child(intermediate, "dense", LinearActivation)
        approximate = _APPROXIMATE.get(self._attribute(up, "activation"))
        heads, head_size = self._attribute(own, "num_attention_heads"), self._attribute(own, "head_size")
        if approximate is None or heads * head_size != hidden:
            raise Unusual
        wide = up.weight.shape[0]
        return LayerParameters(
            *(self._linear(self._child(own, name, Linear), hidden, hidden) for name in ("query", "key", "value")),
            self._linear(self._child(mixed, "dense", Linear), hidden, hidden),
            self._norm(self._child(mixed, "LayerNorm", DropoutAddLayerNorm)),
            self._linear(up, wide, hidden),
            self._linear(self._child(output, "dense", Linear), hidden, wide),
            self._norm(self._child(output, "LayerNorm", DropoutAddLayerNorm)),
            heads,
            approximate,
        )

    def _child(self, parent: nn.Module, name: str, kind: type[nn.Module] | None = None) -> nn.Module:
        children = vars(parent)["_modules"]
        child = children.get(name)
        if child is None or (kind is not None and type(child) is not kind):
            raise Unusual
        self._remember(children, name, child)
        state = vars(child)
        self._states.append(state)
        self._hooks += (state["_forward_hooks"], state["_forward_pre_hooks"])
        return child

    def _attribute(self, module: nn.Module, name: str) -> Any:
        value = vars(module).get(name)
        self._remember(vars(module), name, value)
        return value

    def _remember(self, where: dict[str, Any], name: str, what: Any) -> None:
        self._where.append(where)
        self._name.append(name)
        self._what.append(what)

    def _parameter(self, module: nn.Module, name: str, *shape: int) -> int:
        parameters = vars(module)["_parameters"]
        one = parameters.get(name)
        if type(one) is not nn.Parameter or not one.is_cpu or tuple(one.shape) != shape:
            raise Unusual
        self._remember(parameters, name, one)
        self._parameters.append(one)
        return one.data_ptr()

    def _linear(self, module: nn.Module, columns: int, inner: int) -> LinearParameters:
        weight, bias = self._parameter(module, "weight", columns, inner), self._parameter(module, "bias", columns)
        return LinearParameters(weight, bias, columns, inner)

    def _norm(self, module: nn.Module) -> NormParameters:
        weight, bias = (self._parameter(module, name, self.hidden) for name in ("weight", "bias"))
        return NormParameters(weight, bias, self._attribute(module, "eps"))
