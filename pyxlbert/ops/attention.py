"""attention: softmax(scale * q k^T + bias, masked) v, without a Tq x Tk tensor in forward or backward.

Source: Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762, equation 1; the running
softmax of Milakov and Gimelshein, https://arxiv.org/abs/1805.02867, and the backward from lse alone of Dao et
al., "FlashAttention", https://arxiv.org/abs/2205.14135, section B.2.
"""

from __future__ import annotations

from typing import Any

import torch

from pyxlbert import checks
from pyxlbert.ops import _scores
from pyxlbert.ops._define import Op, OpFunction, apply, backward_backend, single_backward
from pyxlbert.ops._dropout import dropout_of

OP = Op("attention", ("torch", "cpu", "triton", "cuda"))


def _fwd_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    attention_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    *first, rows, heads, _ = query.shape
    lse = query.new_empty((*first, heads, rows), dtype=torch.promote_types(query.dtype, torch.float32))
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse


def _bwd_fake(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    attention_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    needs_bias: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dbias = (
        torch.empty_like(bias, memory_format=torch.contiguous_format)
        if bias is not None and needs_bias
        else query.new_empty(0)
    )
    return (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        torch.empty_like(key, memory_format=torch.contiguous_format),
        torch.empty_like(value, memory_format=torch.contiguous_format),
        dbias,
    )


def check_values(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    *_: Any,
) -> None:
    """Lengths within the keys; offsets that rise from 0 to total by at most max_seqlen."""
    _scores.check_lengths("attention", key_lengths, key.shape[1])
    _scores.check_offsets("attention", cu_seqlens, query.shape[0], max_seqlen)


def _check_values_again(dout: torch.Tensor, *arguments: Any) -> None:
    # A saved tensor's values may have changed since forward, by a way that autograd does not see.
    query, key, value, _, _, *masks = arguments
    check_values(query, key, value, *masks)


_fwd = OP.define(
    "fwd",
    "(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? cu_seqlens, SymInt max_seqlen,"
    " Tensor? attention_mask, Tensor? bias, bool causal, float scale, float dropout_p, Tensor? seed, str backend)"
    " -> (Tensor, Tensor)",
    _fwd_fake,
    check_values,
)
_bwd = OP.define(
    "bwd",
    "(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? key_lengths,"
    " Tensor? cu_seqlens, SymInt max_seqlen, Tensor? attention_mask, Tensor? bias, bool causal, float scale,"
    " float dropout_p, Tensor? seed, bool needs_bias, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    _check_values_again,
)


class _Attention(OpFunction):
    op = "attention"

    @staticmethod
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_lengths: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int,
        attention_mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
        seed: torch.Tensor | None,
        backend: str,
        backward: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _fwd(
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

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        query, key, value, key_lengths, cu_seqlens, ctx.max_seqlen, attention_mask, bias, *rest = inputs
        ctx.causal, ctx.scale, ctx.dropout_p, seed, _, ctx.backend = rest
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse, key_lengths, cu_seqlens, attention_mask, bias, seed)

    @staticmethod
    @single_backward("attention")
    def backward(ctx: Any, dout: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if dout is None:
            return (None,) * 14
        query, key, value, out, lse, key_lengths, cu_seqlens, attention_mask, bias, seed = ctx.saved_tensors
        needs_query, needs_key, needs_value, *_, needs_bias = ctx.needs_input_grad[:8]
        dquery, dkey, dvalue, dbias = _bwd(
            dout,
            query,
            key,
            value,
            out,
            lse,
            key_lengths,
            cu_seqlens,
            ctx.max_seqlen,
            attention_mask,
            bias,
            ctx.causal,
            ctx.scale,
            ctx.dropout_p,
            seed,
            needs_bias,
            ctx.backend,
        )
        return (
            dquery if needs_query else None,
            dkey if needs_key else None,
            dvalue if needs_value else None,
            None,
            None,
            None,
            None,
            dbias if needs_bias else None,
            *(None,) * 6,
        )


@OP.public
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
    zero gradients.  Keys at or past their sequence's length are never read into a product.

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
    arguments = arguments_of(
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
    query, key, value, *_, bias = arguments[:8]
    backend = arguments[-1]
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return apply(_Attention, *arguments, backward_backend(backend))[0]
    return _fwd(*arguments)[0]


def arguments_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
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
) -> tuple[Any, ...]:
    """The schema's arguments for a call: checked, cast under autocast, with what was left out filled in."""
    scale = _scores.check_scale("attention", scale)
    checks.flag("attention", "causal", causal)
    max_seqlen = _check_arguments(query, key, value, key_lengths, cu_seqlens, max_seqlen, attention_mask, bias)
    dropout_p, seed = dropout_of("attention", dropout_p, seed, query.device)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if query.dtype is not torch.float64:
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if bias is not None and bias.dtype is not torch.float32:
                bias = bias.to(dtype)
    if cu_seqlens is None:
        max_seqlen = 0
    elif max_seqlen is None:
        # A graph cannot hold a value read from a tensor; no sequence is longer than all of them together.
        compiling = torch.compiler.is_compiling() or cu_seqlens.shape[0] < 2
        max_seqlen = query.shape[0] if compiling else max(0, int(cu_seqlens.diff().max()))
    else:
        max_seqlen = _scores.within(max_seqlen, query.shape[0])
    if scale is None:
        scale = query.shape[-1] ** -0.5
    backend = OP.resolve(backend, query)
    return (
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


def _check_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    attention_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> int | None:
    """max_seqlen as an int, if there is one."""
    op = "attention"
    _scores.check_query_key_value(op, query, key, value, packed=cu_seqlens is not None)
    if cu_seqlens is not None:
        return _scores.check_packed(
            op, cu_seqlens, max_seqlen, query, key_lengths=key_lengths, attention_mask=attention_mask, bias=bias
        )
    if max_seqlen is not None:
        raise ValueError(f"{op}: max_seqlen: got {max_seqlen} without cu_seqlens, wanted None")
    _scores.check_masks(op, key_lengths, attention_mask, query, key.shape[1])
    if bias is not None:
        checks.tensor(op, "bias", bias)
        checks.floating(op, "bias", bias)
        checks.floating_like(op, "bias", bias, query, parameter=True)
        _scores.check_scores(op, "bias", bias, query, (query.shape[0], query.shape[2], query.shape[1], key.shape[1]))
    return None
