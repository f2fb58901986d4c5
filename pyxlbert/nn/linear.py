"""Linear layers over the ops `linear` and `linear_gelu`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyxlbert.nn.activations import activation_kind
from pyxlbert.nn.packing import Packable
from pyxlbert.ops.linear import linear
from pyxlbert.ops.linear_gelu import linear_gelu

_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


class Linear(Packable, torch.nn.Linear):
    """`torch.nn.Linear` computed by the op `linear`, or with packed weights where `pyxlbert.pack` has made them.

    Shape:
        x ``[..., in_features]`` to ``[..., out_features]``; any number of rows, none included.
    """

    def packed_layers(self, product: str = "") -> tuple[torch.nn.Linear, ...]:
        return (self,)

    def forward(self, x: Tensor) -> Tensor:
        y = self.packed_product(x)
        return linear(x, self.weight, self.bias) if y is None else y

    fuses = forward


def linear_activation(layer: Linear | LinearActivation, x: Tensor, activation: str) -> Tensor:
    """The activation of a layer's product, in one pass where it is GELU.

    Args:
        layer: whose weights multiply.
        x: ``[..., in_features]``.
        activation: what `activation_kind` returns.
    """
    y = layer.packed_product(x, activation)
    if y is not None:
        return y
    approximate = _GELU.get(activation)
    if approximate is not None:
        return linear_gelu(x, layer.weight, layer.bias, approximate=approximate)
    y = linear(x, layer.weight, layer.bias)
    # Of a product that nobody else has, and that backward does not need, no second copy is made.
    inplace = not y.requires_grad
    return F.relu(y, inplace) if activation == "relu" else F.silu(y, inplace)


class LinearActivation(Packable, torch.nn.Linear):
    """A linear layer and its activation, which for GELU is the epilogue of the matrix product.

    Args:
        in_features: length of an input row.
        out_features: length of an output row.
        activation: a name of `ACTIVATIONS`.

    Shape:
        x ``[..., in_features]`` to ``[..., out_features]``.

    Raises:
        ValueError: the activation is not known.
    """

    def __init__(self, in_features: int, out_features: int, activation: str = "gelu") -> None:
        super().__init__(in_features, out_features)
        self.activation = activation_kind(activation)

    def packed_layers(self, product: str = "") -> tuple[torch.nn.Linear, ...]:
        return (self,)

    def forward(self, x: Tensor) -> Tensor:
        return linear_activation(self, x, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
