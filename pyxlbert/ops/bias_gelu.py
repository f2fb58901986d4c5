"""bias_gelu: y = gelu(x + bias), exact by the error function or by its approximation with tanh.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", https://arxiv.org/abs/1606.08415, section 2; `gelu`
of BERT and XLNet.
"""

from __future__ import annotations

from typing import Any

import torch

from pyxlbert import checks
from pyxlbert.ops._autograd import OpFunction, backward_backend, single_backward
from pyxlbert.ops._define import Op
from pyxlbert.ops._torch import apply

OP = Op("bias_gelu", ("torch", "cpu", "triton", "cuda"))


def _fwd_fake(call: Any) -> torch.Tensor:
    return torch.empty_like(call.x, memory_format=torch.contiguous_format)


def _bwd_fake(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    like = call.x if call.bias is None else call.bias
    dbias = like.new_empty(call.x.shape[-1] if call.needs_bias else 0)
    return torch.empty_like(call.x, memory_format=torch.contiguous_format), dbias


Forward, _fwd = OP.define(
    "fwd",
    "(Tensor x, Tensor? bias, str approximate, str backend) -> Tensor",
    _fwd_fake,
    shapes={"x": "=*N", "bias": "N"},
)
Backward, _bwd = OP.define(
    "bwd",
    "(Tensor dy, Tensor x, Tensor? bias, str approximate, bool needs_bias, str backend) -> (Tensor, Tensor)",
    _bwd_fake,
    shapes={"dy": "=*N", "x": "=*N", "bias": "N"},
)


_usual, _on_cpu = OP.usual("=*N", "/^N")
_APPROXIMATIONS = ("none", "tanh")


class _BiasGelu(OpFunction):
    op = "bias_gelu"

    @staticmethod
    def forward(*arguments: Any) -> torch.Tensor:
        return _fwd(Forward(*arguments[:-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, bias, ctx.approximate, _, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, bias)

    @staticmethod
    @single_backward("bias_gelu")
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None
        needs_x, needs_bias, *_ = ctx.needs_input_grad
        dx, dbias = _bwd(Backward(dy, *ctx.saved_tensors, ctx.approximate, needs_bias, ctx.backend))
        return dx if needs_x else None, dbias if needs_bias else None, None, None, None


def bias_gelu(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    approximate: str = "none",
    backend: str | None = None,
) -> torch.Tensor:
    """gelu(x + bias), computed in float32 (float64 for float64 input) and rounded once.

    Args:
        x: `[..., N]`, float32, bfloat16 or float16 (float64 on backend "torch"); any strides.
        bias: `[N]`, x's dtype or float32; None adds nothing.
        approximate: "none" for z Φ(z), "tanh" for z (1 + tanh(√(2/π) (z + 0.044715 z³))) / 2.
        backend: one of `pyxlbert.backends.NAMES`; None takes the first that supports the inputs.

    Returns:
        `[..., N]` in x's dtype, contiguous.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype that is not listed above.
        ValueError: a shape or a device is wrong, or `approximate` is neither of the two.
        RuntimeError: the named backend cannot run here.
    """
    if approximate in _APPROXIMATIONS and _usual(backend, x, bias):
        return _on_cpu(Forward(x, bias, approximate, "cpu"))
    OP.refuse_transforms(x, bias)
    usual = checks.usual_rows(x) if bias is None else checks.usual_rows(x, bias)
    if not (usual and approximate in _APPROXIMATIONS):
        _check_arguments(x, bias, approximate)
    backend = OP.resolve(backend, x)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return apply(_BiasGelu, x, bias, approximate, backend, backward_backend(backend))
    return _fwd(Forward(x, bias, approximate, backend))


def _check_arguments(x: torch.Tensor, bias: torch.Tensor | None, approximate: str) -> None:
    op = "bias_gelu"
    checks.rows(op, x, **({} if bias is None else {"bias": bias}))
    if approximate not in _APPROXIMATIONS:
        raise ValueError(f"{op}: approximate: got {approximate!r}, wanted 'none' or 'tanh'")
