"""bias_gelu in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

import math
from typing import Any

import torch

# Past it the gate is 0 or 1 and its slope 0; their products with an infinite z or z³ would be NaN.
_FAR = 50.0


def supports(*tensors: torch.Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def bias_gelu_fwd(call: Any) -> torch.Tensor:
    """y `[..., N]` in x's dtype.

    With z = x + bias: z Φ(z), or for "tanh" z s(2u), s the logistic function and u = √(2/π) (z + 0.044715 z³);
    (1 + tanh(u)) / 2 = s(2u).
    """
    z = _argument(call.x, call.bias)
    return (z * _gate(z, call.approximate)[0]).to(call.x.dtype).contiguous()


def bias_gelu_bwd(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """dx `[..., N]` in x's dtype and dbias `[N]` in bias's (empty unless `needs_bias`).

    dx = dy (g(z) + z g'(z)) with y = z g(z); dbias = sum of dx over the rows.
    """
    z = _argument(call.x, call.bias)
    gate, slope = _gate(z, call.approximate)
    dz = call.dy.to(z.dtype) * (gate + z.clamp(max=_FAR) * slope)
    like = call.x if call.bias is None else call.bias
    rows = dz.reshape(dz.shape[:-1].numel(), dz.shape[-1])  # -1 would be ambiguous without columns
    dbias = rows.sum(0).to(like.dtype) if call.needs_bias else like.new_empty(0)
    return dz.to(call.x.dtype).contiguous(), dbias


def _argument(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    z = wide if bias is None else wide + bias
    return z.clamp(min=-_FAR)


def _gate(z: torch.Tensor, approximate: str) -> tuple[torch.Tensor, torch.Tensor]:
    """g with gelu(z) = z g(z), and its derivative."""
    near = z.clamp(-_FAR, _FAR)
    if approximate == "none":
        gate = 0.5 * torch.special.erfc(near * -math.sqrt(0.5))
        return gate, (-0.5 * near.square()).exp() / math.sqrt(2 * math.pi)
    twice_u = math.sqrt(8 / math.pi) * (near + 0.044715 * near**3)
    gate = torch.sigmoid(twice_u)
    return gate, gate * torch.sigmoid(-twice_u) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * near.square())
