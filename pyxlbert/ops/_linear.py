"""What `linear` and `linear_gelu` share: their checks and their dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert import checks
from pyxlbert.launch.rows import lies_transposed

__all__ = ["prepare", "requires_grad", "weight_gradient"]


def prepare(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The checked arguments, all in the dtype of the product: autocast's where it is on, else x's.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype that the contract does not list.
        ValueError: a shape or a device is wrong.
    """
    if _usual(x, weight, bias):
        return x, weight, bias
    parameters = (("weight", weight),) if bias is None else (("weight", weight), ("bias", bias))
    checks.tensor(op, "x", x)
    checks.floating(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x: got a scalar, wanted at least one dimension")
    for name, value in parameters:
        checks.tensor(op, name, value)
        checks.same_device(op, name, value, "x", x)
        checks.floating(op, name, value)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        wanted = f"wanted [N, {x.shape[-1]}] (K, the last dimension of x)"
        raise ValueError(f"{op}: weight: got shape {list(weight.shape)}, {wanted}")
    if bias is not None:
        checks.shape(op, "bias", bias, (weight.shape[0],), "N, the rows of weight")
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        # As torch's own linear: float64 is left alone.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = _lower(x, dtype), _lower(weight, dtype)
        bias = None if bias is None else _lower(bias, dtype)
        dtype = x.dtype
    if weight.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                checks.parameter_dtype(op, name, value, x)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return x, weight, bias


def requires_grad(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient will be asked of any of them."""
    return torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def weight_gradient(n: int, x: Tensor, weight: Tensor | None) -> Tensor:
    """An empty dweight `[N, K]`, which lies as `weight` does, if that is given."""
    k = x.shape[-1]
    return x.new_empty(k, n).t() if lies_transposed(weight) else x.new_empty(n, k)


def _usual(x: object, weight: object, bias: object) -> bool:
    """One cheap look at the usual call, which needs no cast; on False the named checks say what is wrong, if any."""
    if (
        not (isinstance(x, Tensor) and isinstance(weight, Tensor))
        or x.is_meta
        or x.layout is not torch.strided
        or weight.layout is not torch.strided
    ):
        return False
    try:
        dtype, device, last, shape = x.dtype, x.device, x.shape[-1:], weight.shape
        return (
            dtype in checks.FLOATING
            and weight.dtype is dtype
            and weight.device == device
            and len(shape) == 2
            and shape[1:] == last
            and (
                bias is None
                or (
                    isinstance(bias, Tensor)
                    and bias.layout is torch.strided
                    and bias.dtype is dtype
                    and bias.device == device
                    and bias.shape == shape[:1]
                )
            )
            and not torch.is_autocast_enabled(device.type)
        )
    except RuntimeError:
        return False  # a nested tensor has no shape


def _lower(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype is torch.float64 else value.to(dtype)
