"""attention: softmax(scale * q k^T + bias, masked) v, without a Tq x Tk tensor in forward or backward.

Source: Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762, equation 1; the running
softmax of Milakov and Gimelshein, https://arxiv.org/abs/1805.02867, and the backward from lse alone of Dao et
al., "FlashAttention", https://arxiv.org/abs/2205.14135, section B.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pyxlbert.ops import _check
from pyxlbert.ops._define import Op, OpFunction, apply, backward_backend, single_backward
from pyxlbert.ops._dropout import seed_tensor

OP = Op("attention", {"torch": "pyxlbert.reference.attention", "cpu": "pyxlbert.native.attention"})


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
    if key_lengths is not None and key_lengths.numel() > 0:
        low, high = (int(x) for x in key_lengths.aminmax())
        if low < 0 or high > key.shape[1]:
            wrong = low if low < 0 else high
            raise ValueError(f"attention: key_lengths: got {wrong}, wanted lengths in [0, {key.shape[1]}]")
    if cu_seqlens is None:
        return
    offsets, total = cu_seqlens.tolist(), query.shape[0]
    if offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(
            f"attention: cu_seqlens: got offsets from {offsets[0]} to {offsets[-1]}, wanted 0 to {total}, query's rows"
        )
    longest = 0
    for b in range(len(offsets) - 1):
        length = offsets[b + 1] - offsets[b]
        if length < 0:
            raise ValueError(
                f"attention: cu_seqlens: got {offsets[b]} before {offsets[b + 1]}, wanted offsets that do not decrease"
            )
        longest = max(longest, length)
    if longest > max_seqlen:
        raise ValueError(f"attention: max_seqlen: got {max_seqlen}, wanted at least {longest}, the longest sequence")


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
    _check_arguments(query, key, value, key_lengths, cu_seqlens, max_seqlen, attention_mask, bias, scale)
    seed = seed_tensor("attention", seed, dropout_p, query.device)
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
    if scale is None:
        scale = query.shape[-1] ** -0.5
    backend = OP.resolve(backend, query)
    arguments = (
        query,
        key,
        value,
        key_lengths,
        cu_seqlens,
        max_seqlen,
        attention_mask,
        bias,
        bool(causal),
        float(scale),
        float(dropout_p),
        seed,
        backend,
    )
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return apply(_Attention, *arguments, backward_backend(backend))[0]
    return _fwd(*arguments)[0]


def _check_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    attention_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float | None,
) -> None:
    op = "attention"
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{op}: scale: got {scale}, wanted a finite number")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check.tensor(op, name, tensor)
        _check.floating(op, name, tensor)
        _check.same_device(op, name, tensor, "query", query)
        if tensor.dtype is not query.dtype and not torch.is_autocast_enabled(query.device.type):
            _check.dtype(op, name, tensor, query.dtype)
        wanted, letters = (4, "[B, T, H, D]") if cu_seqlens is None else (3, "[total, H, D], packed")
        if tensor.dim() != wanted:
            raise ValueError(f"{op}: {name}: got shape {list(tensor.shape)}, wanted {wanted} dimensions {letters}")
    if query.shape[-1] == 0:
        raise ValueError(f"{op}: query: got shape {list(query.shape)}, wanted a head size of at least 1")
    if cu_seqlens is None:
        batch, _, heads, head_size = query.shape
        wanted = (batch, key.shape[1], heads, head_size)
        _check.shape(op, "key", key, wanted, "B, Tk, H, D with query's B, H and D")
        _check.shape(op, "value", value, wanted, "key's shape")
    else:
        _check.shape(op, "key", key, tuple(query.shape), "query's shape, packed")
        _check.shape(op, "value", value, tuple(query.shape), "query's shape, packed")
        _check_packed(cu_seqlens, max_seqlen, query, key_lengths, attention_mask, bias)
        return
    if max_seqlen is not None:
        raise ValueError(f"{op}: max_seqlen: got {max_seqlen} without cu_seqlens, wanted None")
    scores = (batch, heads, query.shape[1], key.shape[1])
    if key_lengths is not None:
        _check.tensor(op, "key_lengths", key_lengths)
        _check.dtype(op, "key_lengths", key_lengths, torch.int32, torch.int64)
        _check.same_device(op, "key_lengths", key_lengths, "query", query)
        _check.shape(op, "key_lengths", key_lengths, (batch,), "B")
    if attention_mask is not None:
        _check.tensor(op, "attention_mask", attention_mask)
        _check.dtype(op, "attention_mask", attention_mask, torch.bool)
        _check_scores("attention_mask", attention_mask, query, scores)
    if bias is not None:
        _check.tensor(op, "bias", bias)
        _check.floating(op, "bias", bias)
        if not torch.is_autocast_enabled(query.device.type):
            _check.parameter_dtype(op, "bias", bias, query)
        _check_scores("bias", bias, query, scores)


def _check_scores(name: str, tensor: torch.Tensor, query: torch.Tensor, scores: tuple[int, ...]) -> None:
    """`tensor` is 4-D and broadcasts to `[B, H, Tq, Tk]`."""
    _check.same_device("attention", name, tensor, "query", query)
    if tensor.dim() != 4:
        hint = "; give key_lengths for a mask of padding" if tensor.dim() == 2 else ""
        raise ValueError(
            f"attention: {name}: got shape {list(tensor.shape)}, wanted 4 dimensions that broadcast to "
            f"{list(scores)} (B, H, Tq, Tk){hint}"
        )
    if any(n not in (1, full) for n, full in zip(tensor.shape, scores, strict=True)):
        raise ValueError(
            f"attention: {name}: got shape {list(tensor.shape)}, wanted one that broadcasts to {list(scores)} "
            "(B, H, Tq, Tk)"
        )


def _check_packed(
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None,
    query: torch.Tensor,
    key_lengths: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    op = "attention"
    _check.tensor(op, "cu_seqlens", cu_seqlens)
    _check.dtype(op, "cu_seqlens", cu_seqlens, torch.int32)
    _check.same_device(op, "cu_seqlens", cu_seqlens, "query", query)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens: got shape {list(cu_seqlens.shape)}, wanted [B + 1]")
    for name, other in (("key_lengths", key_lengths), ("attention_mask", attention_mask), ("bias", bias)):
        if other is not None:
            raise ValueError(f"{op}: {name}: got {_check.describe(other)} beside cu_seqlens, wanted None")
    if max_seqlen is not None and max_seqlen < 0:
        raise ValueError(f"{op}: max_seqlen: got {max_seqlen}, wanted at least 0")
