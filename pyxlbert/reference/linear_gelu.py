"""linear_gelu in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.reference.linear import product_bwd


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def linear_gelu_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """y = gelu(x weightᵀ + bias), and gelu's argument in x's dtype (empty unless `needs_preactivation`)."""
    preactivation = torch.nn.functional.linear(call.x, call.weight, call.bias)
    y = torch.nn.functional.gelu(preactivation, approximate=call.approximate)
    return y, preactivation if call.needs_preactivation else y.new_empty(0)


def linear_gelu_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias as `product_bwd` has them, of dy · gelu'(preactivation)."""
    dpreactivation = gelu_bwd(call.dy, call.preactivation, call.approximate)
    return product_bwd(dpreactivation, call.x, call.weight, call.needs_bias)


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
