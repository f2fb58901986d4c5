"""linear_gelu in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert.reference.linear import linear_bwd, linear_fwd


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def linear_gelu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, needs_preactivation: bool
) -> tuple[Tensor, Tensor]:
    """y = gelu(x weightᵀ + bias), and gelu's argument in x's dtype (empty unless `needs_preactivation`)."""
    preactivation = linear_fwd(x, weight, bias)
    y = torch.nn.functional.gelu(preactivation, approximate=approximate)
    return y, preactivation if needs_preactivation else y.new_empty(0)


def linear_gelu_bwd(
    dy: Tensor, preactivation: Tensor, x: Tensor | None, weight: Tensor | None, needs_bias: bool, approximate: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias as `linear_bwd` has them, of dy · gelu'(preactivation)."""
    return linear_bwd(gelu_bwd(dy, preactivation, approximate), x, weight, needs_bias)


def gelu_bwd(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dy · gelu'(x), computed in float32 (float64 for float64 input), in dy's dtype.

    erf: gelu(x) = x Φ(x), so gelu'(x) = Φ(x) + x φ(x).
    tanh: gelu(x) = x/2 (1 + t) with t = tanh(u), u = √(2/π)(x + 0.044715 x³),
    so gelu'(x) = (1 + t)/2 + x/2 (1 − t²) u'.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide)
    if approximate == "none":
        slope = 0.5 * torch.erfc(z * -(0.5**0.5)) + z * torch.exp(-0.5 * z * z) * (2 * torch.pi) ** -0.5
    else:
        c = (2 / torch.pi) ** 0.5
        t = torch.tanh(c * (z + 0.044715 * z * z * z))
        slope = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)
    return (dy.to(wide) * slope).to(dy.dtype)
