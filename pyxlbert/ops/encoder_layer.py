"""encoder_layer: a whole layer of BERT, attention and feed-forward network, each with its residual and LayerNorm.

Without a gradient to come a kernel keeps everything between x and y to itself; with one the layer is the ops that it is
made of, one after the other.

Source: Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762, section 3.1, as in BERT, with
LayerNorm after the residual sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyxlbert import checks
from pyxlbert.ops import _attention
from pyxlbert.ops._define import Op
from pyxlbert.ops.attention import attention
from pyxlbert.ops.dropout_add_layer_norm import dropout_add_layer_norm
from pyxlbert.ops.linear import linear
from pyxlbert.ops.linear_gelu import linear_gelu

OP = Op("encoder_layer", ("torch", "cpu"))

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def _check_values(call: Any) -> None:
    op, x = "encoder_layer", call.x
    if call.cu_seqlens is not None:
        _attention.check_offsets(op, call.cu_seqlens, x.shape[0], call.max_seqlen)
        return
    _attention.check_lengths(op, call.key_lengths, x.shape[1])
    for name in ("attention_mask", "bias"):
        if getattr(call, name) is not None:
            _attention.check_scores(
                op, name, getattr(call, name), x, (x.shape[0], call.num_heads, *x.shape[1:2] * 2), "x"
            )


_PARAMETERS = (
    "Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias, Tensor attention_norm_weight,"
    " Tensor attention_norm_bias, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias,"
    " Tensor norm_weight, Tensor norm_bias"
)

_WEIGHTS = {
    **{"qkv_weight": "=ME", "qkv_bias": "=M", "out_weight": "=EN", "out_bias": "=E"},
    **{"attention_norm_weight": "E", "attention_norm_bias": "E", "norm_weight": "E", "norm_bias": "E"},
    **{"up_weight": "=FE", "up_bias": "=F", "down_weight": "=EF", "down_bias": "=E"},
}
_PADDED = {"x": "=BTE", **_WEIGHTS, "key_lengths": "B", "attention_mask": "1?", "bias": "?"}
_PACKED = {"x": "=RE", **_WEIGHTS}

Forward, _fwd = OP.define(
    "fwd",
    f"(Tensor x, {_PARAMETERS}, int num_heads, str activation, float eps, Tensor? key_lengths, Tensor? cu_seqlens,"
    " int max_seqlen, Tensor? attention_mask, Tensor? bias, str backend) -> Tensor",
    lambda call: torch.empty_like(call.x, memory_format=torch.contiguous_format),
    _check_values,
    shapes=_PADDED,
    packed=_PACKED,
)


class Given(NamedTuple):
    """The public function's arguments, as a caller gives them."""

    x: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    num_heads: int
    activation: str
    eps: float
    key_lengths: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    attention_mask: Tensor | None
    bias: Tensor | None
    backend: str | None


def encoder_layer(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    attention_norm_weight: Tensor,
    attention_norm_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    num_heads: int,
    activation: str = "gelu",
    eps: float = 1e-12,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    attention_mask: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One encoder layer, without dropout.

    With q, k, v the thirds of x qkv_weightᵀ + qkv_bias, in heads of D = N / H:
    h = LayerNorm(x + softmax(q kᵀ / √D + bias) v out_weightᵀ + out_bias),
    y = LayerNorm(h + activation(h up_weightᵀ + up_bias) down_weightᵀ + down_bias).

    Backend "cpu" packs the weights at the first call with them, and again after one was written to; the copies, which
    are as large, live as long as qkv_weight.  A model runs all of its layers in one call: see `pyxlbert.pack`.  With a
    gradient to come the layer is made of `linear`, `attention`, `linear_gelu` and `dropout_add_layer_norm`, whose
    intermediates are rounded to x's dtype.

    Args:
        x: `[B, T, E]`, or packed `[total, E]`; float32, bfloat16 or float16 (float64 on backend "torch").
        qkv_weight: `[3 N, E]`: query, key and value one below the other; x's dtype, as all weights and biases.
        qkv_bias: `[3 N]`, or None, as the other biases of products.
        out_weight: `[E, N]`.
        out_bias: `[E]`.
        attention_norm_weight, attention_norm_bias: `[E]`; x's dtype or float32, as the next two.
        up_weight: `[F, E]`.
        up_bias: `[F]`.
        down_weight: `[E, F]`.
        down_bias: `[E]`.
        norm_weight, norm_bias: `[E]`.
        num_heads: H, which divides N.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        eps: added to the variances.
        key_lengths, cu_seqlens, max_seqlen, attention_mask, bias: as in `attention`.
        backend: one of `pyxlbert.backends.NAMES`; None takes the first that supports the inputs.

    Returns:
        `[..., E]` in x's dtype, contiguous.  The residual stream between the sums is float32.  Under autocast x and the
        products' weights and biases are cast to its dtype first.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device, a length or an offset is wrong.
        RuntimeError: the named backend cannot run here.
    """
    given = Given(
        *(x, qkv_weight, qkv_bias, out_weight, out_bias, attention_norm_weight, attention_norm_bias),
        *(up_weight, up_bias, down_weight, down_bias, norm_weight, norm_bias),
        *(num_heads, activation, eps, key_lengths, cu_seqlens, max_seqlen, attention_mask, bias, backend),
    )
    OP.refuse_transforms(*given)
    given = _lowered(_checked(given))
    backend = OP.resolve(backend, given.x)
    if torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in given):
        return _composed(given, backend)
    longest = 0
    if cu_seqlens is not None:
        longest = x.shape[0] if given.max_seqlen is None else _attention.within(given.max_seqlen, x.shape[0])
    return _fwd(Forward(*given[:-4], longest, *given[-3:-1], backend))


def _lowered(given: Given) -> Given:
    """Under autocast x and the products' weights and biases in its dtype; float64 is left alone."""
    device = given.x.device.type
    if not torch.is_autocast_enabled(device) or given.x.dtype is torch.float64:
        return given
    dtype = torch.get_autocast_dtype(device)
    names = ("x", *(f"{name}_{part}" for name in ("qkv", "out", "up", "down") for part in ("weight", "bias")))
    return given._replace(**{n: getattr(given, n).to(dtype) for n in names if getattr(given, n) is not None})


def _composed(given: Given, backend: str) -> Tensor:
    """The layer as the ops that it is made of."""
    x = given.x
    projected = linear(x, given.qkv_weight, given.qkv_bias, backend=backend)
    query, key, value = projected.unflatten(-1, (3, given.num_heads, -1)).unbind(-3)
    options = {name: getattr(given, name) for name in ("key_lengths", "cu_seqlens", "max_seqlen", "attention_mask")}
    mixed = attention(query, key, value, bias=given.bias, backend=backend, **options).flatten(-2)
    wide = torch.promote_types(x.dtype, torch.float32)
    copy = None if wide is x.dtype else x.dtype

    def add(y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        found = dropout_add_layer_norm(y, residual, weight, bias, eps=given.eps, copy_dtype=copy, backend=backend)
        return (found[0], found[1]) if copy is not None else (found, found)

    mixed = linear(mixed, given.out_weight, given.out_bias, backend=backend)
    residual, h = add(mixed, x.to(wide), given.attention_norm_weight, given.attention_norm_bias)
    if given.activation in ("gelu", "gelu_tanh"):
        approximate = "none" if given.activation == "gelu" else "tanh"
        inner = linear_gelu(h, given.up_weight, given.up_bias, approximate=approximate, backend=backend)
    else:
        inner = linear(h, given.up_weight, given.up_bias, backend=backend)
        inner = torch.relu(inner) if given.activation == "relu" else torch.nn.functional.silu(inner)
    inner = linear(inner, given.down_weight, given.down_bias, backend=backend)
    return add(inner, residual, given.norm_weight, given.norm_bias)[1]


def _checked(given: Given) -> Given:
    """The arguments, `num_heads` and `max_seqlen` as ints.

    Raises:
        TypeError, ValueError: see `encoder_layer`.
    """
    op, x = "encoder_layer", given.x
    checks.tensor(op, "x", x)
    checks.floating(op, "x", x)
    wanted = 2 if given.cu_seqlens is not None else 3
    if x.dim() != wanted:
        letters = "[total, E], packed" if wanted == 2 else "[B, T, E]"
        raise ValueError(f"{op}: x: got shape {list(x.shape)}, wanted {wanted} dimensions {letters}")
    heads = checks.integer(op, "num_heads", given.num_heads)
    for name in ("qkv_weight", "out_weight", "up_weight", "down_weight"):
        weight = getattr(given, name)
        checks.tensor(op, name, weight)
        checks.floating_like(op, name, weight, x)
        checks.same_device(op, name, weight, "x", x)
        if weight.dim() != 2:
            raise ValueError(f"{op}: {name}: got shape {list(weight.shape)}, wanted 2 dimensions")
    hidden, width = x.shape[-1], given.qkv_weight.shape[0] // 3
    if width * 3 != given.qkv_weight.shape[0] or heads < 1 or width % heads or width == 0:
        got = f"{list(given.qkv_weight.shape)} and num_heads {heads}"
        raise ValueError(f"{op}: qkv_weight: got shape {got}, wanted [3 N, E] with num_heads a divisor of N")
    inner = given.up_weight.shape[0]
    for name, size, letter in (("x", hidden, "E"), ("up_weight", inner, "F")):
        if size == 0:
            got = list(getattr(given, name).shape)
            raise ValueError(f"{op}: {name}: got shape {got}, wanted {letter} of at least 1")
    shapes = {
        "qkv": ((3 * width, hidden), "3 N, E"),
        "out": ((hidden, width), "E, N"),
        "up": ((inner, hidden), "F, E"),
        "down": ((hidden, inner), "E, F"),
    }
    for name, (shape, letters) in shapes.items():
        checks.shape(op, f"{name}_weight", getattr(given, f"{name}_weight"), shape, letters)
        one = getattr(given, f"{name}_bias")
        if one is not None:
            _vector(op, f"{name}_bias", one, x, shape[0], letters[: letters.index(",")], parameter=False)
    for name in ("attention_norm", "norm"):
        for part in ("weight", "bias"):
            _vector(op, f"{name}_{part}", getattr(given, f"{name}_{part}"), x, hidden, "E", parameter=True)
    if given.activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation: got {given.activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
    eps = checks.non_negative(op, "eps", given.eps)
    return given._replace(num_heads=heads, eps=eps, max_seqlen=_check_masks(op, given, heads))


def _vector(op: str, name: str, one: Any, x: Tensor, length: int, letter: str, parameter: bool) -> None:
    checks.tensor(op, name, one)
    checks.floating_like(op, name, one, x, parameter=parameter)
    checks.same_device(op, name, one, "x", x)
    checks.shape(op, name, one, (length,), letter)


def _check_masks(op: str, given: Given, heads: int) -> int | None:
    x = given.x
    # What the checks of attention look at of a query.
    query = x.new_empty(1).expand(*x.shape[:-1], heads, 1)
    if given.cu_seqlens is not None:
        others = {"key_lengths": given.key_lengths, "attention_mask": given.attention_mask, "bias": given.bias}
        return _attention.check_packed(op, given.cu_seqlens, given.max_seqlen, query, **others)
    if given.max_seqlen is not None:
        raise ValueError(f"{op}: max_seqlen: got {given.max_seqlen} without cu_seqlens, wanted None")
    _attention.check_masks(op, given.key_lengths, given.attention_mask, query, x.shape[1], "x")
    if given.bias is not None:
        checks.tensor(op, "bias", given.bias)
        checks.floating(op, "bias", given.bias)
        checks.floating_like(op, "bias", given.bias, x, parameter=True)
        _attention.check_scores(op, "bias", given.bias, query, (x.shape[0], heads, x.shape[1], x.shape[1]), "x")
    return None
