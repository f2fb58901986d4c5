"""attention: softmax(scale * q k^T + bias, masked) v, without a Tq x Tk tensor in forward or backward.

Source: Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762, equation 1; the running
softmax of Milakov and Gimelshein, https://arxiv.org/abs/1805.02867, and the backward from lse alone of Dao et
al., "FlashAttention", https://arxiv.org/abs/2205.14135, section B.2.
"""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import torch

from pyxlbert import checks
from pyxlbert.ops import _attention
from pyxlbert.ops._autograd import OpFunction, backward_backend, keep, kept, single_backward
from pyxlbert.ops._define import Op
from pyxlbert.ops._dropout import dropout_of
from pyxlbert.ops._torch import apply

OP = Op("attention", ("torch", "cpu", "triton", "cuda"))


# Forward's arguments, and backward's after dout, out and lse.
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? cu_seqlens, SymInt max_seqlen,"
    " Tensor? attention_mask, Tensor? bias, bool causal, float scale, float dropout_p, Tensor? seed"
)


def _fwd_fake(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(call.query, memory_format=torch.contiguous_format), _attention.lse_like(call.query)


def _bwd_fake(call: Any) -> tuple[torch.Tensor, ...]:
    return _attention.gradients(call.needs, call.query, call.key, call.value, call.bias)


def check_values(call: Any) -> None:
    """Lengths within the keys; offsets that rise from 0 to total by at most max_seqlen."""
    _attention.check_lengths("attention", call.key_lengths, call.key.shape[1])
    _attention.check_offsets("attention", call.cu_seqlens, call.query.shape[0], call.max_seqlen)


_PADDED = {
    **{"query": "=BTHD", "key": "=BSHD", "value": "=BSHD", "key_lengths": "B"},
    **{"attention_mask": "1bhts", "bias": "bhts", "seed": "8?"},
}
_PACKED = {"query": "=NHD", "key": "=NHD", "value": "=NHD", "seed": "8?"}

Forward, _fwd = OP.define(
    "fwd",
    f"({_ARGUMENTS}, str backend) -> (Tensor, Tensor)",
    _fwd_fake,
    check_values,
    shapes=_PADDED,
    packed=_PACKED,
)
# Backward checks values again: a saved tensor's may have changed since forward, by a way that autograd does not see.
Backward, _bwd = OP.define(
    "bwd",
    f"(Tensor dout, Tensor out, Tensor lse, {_ARGUMENTS}, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    check_values,
    shapes=_PADDED | {"dout": "=BTHD", "out": "=BTHD", "lse": "~4BHT"},
    packed=_PACKED | {"dout": "=NHD", "out": "=NHD", "lse": "~4HN"},
)


_usual, _on_cpu = OP.usual("=BTHD", "=BSHD", "=BSHD", "/:B", run="attention_out")


class _Attention(OpFunction):
    op = "attention"

    @staticmethod
    def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return _fwd(Forward(*arguments[:-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        out, lse = output
        ctx.backend = inputs[-1]
        ctx.mark_non_differentiable(lse)
        keep(ctx, inputs[:-1], out, lse)

    @staticmethod
    @single_backward("attention")
    def backward(ctx: Any, dout: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if dout is None:
            return (None,) * 14
        results, call = kept(ctx, Forward)
        needs = [*ctx.needs_input_grad[:3], ctx.needs_input_grad[7]]
        found = _bwd(Backward(dout, *results, *tuple(call)[:-1], needs, ctx.backend))
        wanted = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
        return (*wanted[:3], *(None,) * 4, *wanted[3:], *(None,) * 6)


class Given(NamedTuple):
    """The public function's arguments, as a caller gives them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_lengths: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int | None = None
    attention_mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | int | None = None
    backend: str | None = None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    attention_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention, forward and backward in memory linear in the lengths.

    Everything that masks is combined by "and".  A query that may attend to no key gives a row of zeros and
    zero gradients.  Keys at or past their sequence's length, and those that attention_mask hides from every query in
    every head, are never read into a product: a NaN there stays there.  A bias is added, -inf too.

    Args:
        query: `[B, Tq, H, D]`, or packed `[total, H, D]`; float32, bfloat16 or float16 (float64 on backend
            "torch").  Views with a contiguous last dimension are read in place.
        key: `[B, Tk, H, D]`, or packed as query; query's dtype.
        value: as key.
        key_lengths: int32 or int64 `[B]`: sequence b has the keys 0 .. key_lengths[b] - 1; None: all.
        cu_seqlens: int32 `[B + 1]`, rising from 0 to total: sequence b is rows cu_seqlens[b] ..
            cu_seqlens[b + 1] - 1 of packed tensors; excludes key_lengths, attention_mask and bias.
        max_seqlen: packed: at least the longest sequence; None reads it from cu_seqlens, which on a GPU waits
            for the device (compiled code takes total instead).
        attention_mask: boolean, 4-D, broadcastable to `[B, H, Tq, Tk]`; True: may attend.
        bias: floating, 4-D, broadcastable to `[B, H, Tq, Tk]`, query's dtype or float32; added to the scaled
            scores; -inf masks.  Its gradient has its shape.
        causal: query i sees keys j <= i + Tk - Tq (packed: of its own sequence).
        scale: factor of q k^T; None: D ** -0.5.
        dropout_p: probability in [0, 1] of dropping a weight; kept ones are scaled by 1 / (1 - dropout_p).
        seed: int64 tensor of one element or an int; the same seed drops the same weights on every backend.
            None draws one from the device's default generator.
        backend: one of `pyxlbert.backends.NAMES`; None takes the first that supports the inputs.

    Returns:
        query's shape and dtype, contiguous.  Under autocast query, key and value are cast to its dtype first.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device, a length, an offset or a probability is wrong.
        RuntimeError: the named backend cannot run here.
    """
    if (
        cu_seqlens is max_seqlen is attention_mask is bias is seed is None
        and (causal is False or causal is True)
        and (scale is None or (type(scale) is float and -inf < scale < inf))
        and type(dropout_p) is float
        and dropout_p == 0.0
        and _usual(backend, query, key, value, key_lengths)
    ):
        if scale is None:
            scale = query.shape[-1] ** -0.5
        call = Forward(query, key, value, key_lengths, None, 0, None, None, causal, scale, 0.0, None, "cpu")
        if key_lengths is not None:
            check_values(call)
        return _on_cpu(call)
    given = Given(
        query,
        key,
        value,
        key_lengths,
        cu_seqlens,
        max_seqlen,
        attention_mask,
        bias,
        causal,
        scale,
        dropout_p,
        seed,
        backend,
    )
    OP.refuse_transforms(*given)
    call = call_of(given)
    if torch.is_grad_enabled() and (
        call.query.requires_grad
        or call.key.requires_grad
        or call.value.requires_grad
        or (call.bias is not None and call.bias.requires_grad)
    ):
        return apply(_Attention, *call, backward_backend(call.backend))[0]
    return _fwd(call)[0]


def call_of(given: Given) -> Any:
    """The record of a call: checked, cast under autocast, with what was left out filled in."""
    query, key, value, bias = given.query, given.key, given.value, given.bias
    scale = _attention.check_scale("attention", given.scale)
    checks.flag("attention", "causal", given.causal)
    max_seqlen = _check_arguments(given)
    dropout_p, seed = dropout_of("attention", given.dropout_p, given.seed, query.device)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if query.dtype is not torch.float64:
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if bias is not None and bias.dtype is not torch.float32:
                bias = bias.to(dtype)
    if given.cu_seqlens is None:
        max_seqlen = 0
    elif max_seqlen is None:
        # A graph cannot hold a value read from a tensor; no sequence is longer than all of them together.
        compiling = torch.compiler.is_compiling() or given.cu_seqlens.shape[0] < 2
        max_seqlen = query.shape[0] if compiling else max(0, int(given.cu_seqlens.diff().max()))
    else:
        max_seqlen = _attention.within(max_seqlen, query.shape[0])
    if scale is None:
        scale = query.shape[-1] ** -0.5
    backend = OP.resolve(given.backend, query)
    # By place: a record made of names takes longer than all of the checks.
    return Forward(
        query,
        key,
        value,
        given.key_lengths,
        given.cu_seqlens,
        max_seqlen,
        given.attention_mask,
        bias,
        given.causal,
        scale,
        dropout_p,
        seed,
        backend,
    )


def _check_arguments(given: Given) -> int | None:
    """max_seqlen as an int, if there is one."""
    op, query, max_seqlen = "attention", given.query, given.max_seqlen
    _attention.check_query_key_value(op, query, given.key, given.value, packed=given.cu_seqlens is not None)
    if given.cu_seqlens is not None:
        others = {"key_lengths": given.key_lengths, "attention_mask": given.attention_mask, "bias": given.bias}
        return _attention.check_packed(op, given.cu_seqlens, max_seqlen, query, **others)
    if max_seqlen is not None:
        raise ValueError(f"{op}: max_seqlen: got {max_seqlen} without cu_seqlens, wanted None")
    keys = given.key.shape[1]
    _attention.check_masks(op, given.key_lengths, given.attention_mask, query, keys)
    if given.bias is not None:
        checks.tensor(op, "bias", given.bias)
        checks.floating(op, "bias", given.bias)
        checks.floating_like(op, "bias", given.bias, query, parameter=True)
        scores = (query.shape[0], query.shape[2], query.shape[1], keys)
        _attention.check_scores(op, "bias", given.bias, query, scores)
    return None
