"""Linear layers over the ops `linear` and `linear_gelu`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyxlbert.nn.activations import activation_kind
from pyxlbert.ops.linear import linear
from pyxlbert.ops.linear_gelu import linear_gelu


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` computed by the op `linear`.

    Shape:
        x ``[..., in_features]`` to ``[..., out_features]``; any number of rows, none included.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LinearActivation(torch.nn.Linear):
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

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "gelu":
            return linear_gelu(x, self.weight, self.bias)
        if self.activation == "gelu_tanh":
            return linear_gelu(x, self.weight, self.bias, approximate="tanh")
        y = linear(x, self.weight, self.bias)
        return F.relu(y) if self.activation == "relu" else F.silu(y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
