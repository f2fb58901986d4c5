"""encoder_layer in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def encoder_layer_fwd(call: Any) -> Tensor:
    """y `[..., E]` in x's dtype, rounded once: everything before is float32 (float64 for float64 input).

    h = LayerNorm(x + attention(x) outᵀ + out_bias), y = LayerNorm(h + activation(h upᵀ + up_bias) downᵀ + down_bias).
    """
    dtype = torch.promote_types(call.x.dtype, torch.float32)

    def linear(x: Tensor, name: str) -> Tensor:
        bias = getattr(call, f"{name}_bias")
        return F.linear(x, getattr(call, f"{name}_weight").to(dtype), None if bias is None else bias.to(dtype))

    def normalise(x: Tensor, name: str) -> Tensor:
        parameters = (getattr(call, f"{name}_{part}").to(dtype) for part in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], *parameters, call.eps)

    x = call.x.to(dtype)
    projected = linear(x, "qkv").unflatten(-1, (3, call.num_heads, -1))  # [..., 3, H, D]
    h = normalise(x + linear(_mix(projected, call).flatten(-2), "out"), "attention_norm")
    y = normalise(h + linear(ACTIVATIONS[call.activation](linear(h, "up")), "down"), "norm")
    return y.to(call.x.dtype)


def _mix(projected: Tensor, call: Any) -> Tensor:
    """Attention of `[B, T, 3, H, D]`, or of packed `[total, 3, H, D]` sequence by sequence."""
    if call.cu_seqlens is None:
        return _attend(projected, call)
    offsets = call.cu_seqlens.tolist()
    parts = [_attend(projected[first:last][None], call)[0] for first, last in pairwise(offsets)]
    return torch.cat(parts) if parts else projected[..., 0, :, :]


def _attend(projected: Tensor, call: Any) -> Tensor:
    query, key, value = projected.transpose(1, 3).unbind(2)  # [B, H, T, D]
    s = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if call.bias is not None:
        s = s + call.bias
    allowed = torch.ones(s.shape[0], 1, 1, s.shape[-1], dtype=torch.bool, device=s.device)
    if call.key_lengths is not None:
        allowed = torch.arange(s.shape[-1], device=s.device) < call.key_lengths[:, None, None, None]
    if call.attention_mask is not None:
        allowed = allowed & call.attention_mask
    s = s.masked_fill(~allowed, -torch.inf)
    # A row that may see nothing is zero.
    seen = (s > -torch.inf).any(-1, keepdim=True)
    weights = torch.softmax(s.masked_fill(~seen, 0.0), -1).masked_fill(~(seen & allowed), 0.0)
    return (weights @ value.masked_fill(~_read(allowed)[..., None], 0.0)).transpose(1, 2)


def _read(allowed: Tensor) -> Tensor:
    """`[B, 1 or H, T]`: which keys some row may see; the others do not enter a product."""
    return allowed.any(-2)
