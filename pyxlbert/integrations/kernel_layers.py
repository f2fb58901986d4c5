"""GELU of transformers on our op, through the package `kernels`: what ``use_kernels=True`` then finds for it.

transformers lets others replace its activations and RMSNorm; `torch.nn.LayerNorm` is not among them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyxlbert.ops.bias_gelu import bias_gelu


class Gelu(nn.Module):
    """GELU by the error function; without state of its own, as `kernels` wants it."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return bias_gelu(input)


class GeluTanh(nn.Module):
    """GELU by its approximation with tanh."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return bias_gelu(input, approximate="tanh")


class _Repository:
    """Where `kernels` gets a layer from: from here, and never from the network."""

    def __init__(self, layer: type[nn.Module]) -> None:
        self._layer = layer

    def load(self) -> type[nn.Module]:
        return self._layer

    def __str__(self) -> str:
        return f"`pyxlbert` (layer `{self._layer.__name__}`)"


# By the names that transformers has given to its activations.
LAYERS = {"GeLU": Gelu, "GeluTanh": GeluTanh, "NewGELU": GeluTanh, "FastGELU": GeluTanh}
DEVICES = ("cpu", "cuda")


def register_kernels() -> None:
    """Makes our GELU known to the package `kernels`, for models that ``set_use_kernels(True)`` switches after it.

    Raises:
        ImportError: `kernels` is not installed.
    """
    try:
        from kernels import register_kernel_mapping
    except ImportError as error:
        raise ImportError(f"register_kernels: needs the package kernels ({error}): pip install kernels") from None
    devices = [one for one in DEVICES if one == "cpu" or torch.version.cuda is not None]
    register_kernel_mapping(
        {name: {device: _Repository(layer) for device in devices} for name, layer in LAYERS.items()}
    )
