"""Checks that the attention ops share: query, key and value, masks, lengths, packed rows."""

from __future__ import annotations

import math

import torch

from pyxlbert import checks


def check_scale(op: str, scale: float | None) -> float | None:
    """`scale` as a finite float, or None."""
    if scale is None:
        return None
    found = checks.number(op, "scale", scale, "a finite number")
    if not -math.inf < found < math.inf:  # a compiler has no isfinite for a number that it does not know
        raise ValueError(f"{op}: scale: got {scale}, wanted a finite number")
    return found


def check_query_key_value(
    op: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: bool = False,
    name: str = "query",
) -> None:
    """Three tensors of one dtype and device, `[B, T, H, D]` or packed `[total, H, D]`, with the query's B, H and D."""
    for label, tensor in ((name, query), ("key", key), ("value", value)):
        check_rows(op, label, tensor, query, packed, name)
    if query.shape[-1] == 0:
        raise ValueError(f"{op}: {name}: got shape {list(query.shape)}, wanted a head size of at least 1")
    if packed:
        checks.shape(op, "key", key, tuple(query.shape), f"{name}'s shape, packed")
        checks.shape(op, "value", value, tuple(query.shape), f"{name}'s shape, packed")
        return
    batch, _, heads, head_size = query.shape
    wanted = (batch, key.shape[1], heads, head_size)
    checks.shape(op, "key", key, wanted, f"B, Tk, H, D with {name}'s B, H and D")
    checks.shape(op, "value", value, wanted, "key's shape")


def check_rows(op: str, label: str, tensor: torch.Tensor, query: torch.Tensor, packed: bool, name: str) -> None:
    """`tensor` is a floating `[B, T, H, D]` (packed: `[total, H, D]`) of the dtype and on the device of the query."""
    checks.tensor(op, label, tensor)
    checks.floating(op, label, tensor)
    checks.same_device(op, label, tensor, name, query)
    checks.floating_like(op, label, tensor, query)
    wanted, letters = (3, "[total, H, D], packed") if packed else (4, "[B, T, H, D]")
    if tensor.dim() != wanted:
        raise ValueError(f"{op}: {label}: got shape {list(tensor.shape)}, wanted {wanted} dimensions {letters}")


def check_scores(
    op: str, name: str, tensor: torch.Tensor, query: torch.Tensor, scores: tuple[int, ...], first: str = "query"
) -> None:
    """`tensor` is 4-D and broadcasts to `[B, H, Tq, Tk]`."""
    checks.same_device(op, name, tensor, first, query)
    if tensor.dim() != 4:
        hint = "; give key_lengths for a mask of padding" if tensor.dim() == 2 else ""
        raise ValueError(
            f"{op}: {name}: got shape {list(tensor.shape)}, wanted 4 dimensions that broadcast to "
            f"{list(scores)} (B, H, Tq, Tk){hint}"
        )
    if any(n not in (1, full) for n, full in zip(tensor.shape, scores, strict=True)):
        raise ValueError(
            f"{op}: {name}: got shape {list(tensor.shape)}, wanted one that broadcasts to {list(scores)} (B, H, Tq, Tk)"
        )


def check_masks(
    op: str,
    key_lengths: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    query: torch.Tensor,
    keys: int,
    first: str = "query",
) -> None:
    """key_lengths is integer `[B]`, attention_mask boolean and 4-D."""
    if key_lengths is not None:
        checks.tensor(op, "key_lengths", key_lengths)
        checks.dtype(op, "key_lengths", key_lengths, torch.int32, torch.int64)
        checks.same_device(op, "key_lengths", key_lengths, first, query)
        checks.shape(op, "key_lengths", key_lengths, (query.shape[0],), "B")
    if attention_mask is not None:
        checks.tensor(op, "attention_mask", attention_mask)
        checks.dtype(op, "attention_mask", attention_mask, torch.bool)
        scores = (query.shape[0], query.shape[2], query.shape[1], keys)
        check_scores(op, "attention_mask", attention_mask, query, scores, first)


def check_packed(
    op: str,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None,
    query: torch.Tensor,
    **others: torch.Tensor | None,
) -> int | None:
    """Offsets of packed rows, int32 `[B + 1]`; none of the `others` may stand beside them.

    Returns:
        max_seqlen as an int, if there is one.
    """
    checks.tensor(op, "cu_seqlens", cu_seqlens)
    checks.dtype(op, "cu_seqlens", cu_seqlens, torch.int32)
    checks.same_device(op, "cu_seqlens", cu_seqlens, "query", query)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens: got shape {list(cu_seqlens.shape)}, wanted [B + 1]")
    for name, other in others.items():
        if other is not None:
            raise ValueError(f"{op}: {name}: got {checks.describe(other)} beside cu_seqlens, wanted None")
    if max_seqlen is None:
        return None
    max_seqlen = checks.integer(op, "max_seqlen", max_seqlen)
    if max_seqlen < 0:
        raise ValueError(f"{op}: max_seqlen: got {max_seqlen}, wanted at least 0")
    return max_seqlen


def within(max_seqlen: int, total: int) -> int:
    """max_seqlen, or the number of packed rows where that is smaller: no sequence is longer than all together."""
    # Dynamo makes sym_min of min where a size is symbolic, and before torch 2.13 takes no sym_min where none is; other
    # tracers (torch.export) would tie the graph to the smaller one.
    traced = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    return torch.sym_min(max_seqlen, total) if traced else min(max_seqlen, total)


def check_lengths(op: str, key_lengths: torch.Tensor | None, keys: int) -> None:
    """The values of key_lengths lie within the keys."""
    if key_lengths is not None and key_lengths.numel() > 0:
        low, high = (int(x) for x in key_lengths.aminmax())
        if low < 0 or high > keys:
            wrong = low if low < 0 else high
            raise ValueError(f"{op}: key_lengths: got {wrong}, wanted lengths in [0, {keys}]")


def check_offsets(op: str, cu_seqlens: torch.Tensor | None, total: int, max_seqlen: int) -> None:
    """The values of cu_seqlens rise from 0 to total by at most max_seqlen."""
    if cu_seqlens is None:
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(
            f"{op}: cu_seqlens: got offsets from {offsets[0]} to {offsets[-1]}, wanted 0 to {total}, query's rows"
        )
    longest = 0
    for b in range(len(offsets) - 1):
        length = offsets[b + 1] - offsets[b]
        if length < 0:
            raise ValueError(
                f"{op}: cu_seqlens: got {offsets[b]} before {offsets[b + 1]}, wanted offsets that do not decrease"
            )
        longest = max(longest, length)
    if longest > max_seqlen:
        raise ValueError(f"{op}: max_seqlen: got {max_seqlen}, wanted at least {longest}, the longest sequence")


def gradients(needs: list[bool], *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """A fake backward's results: shaped as their tensors where needed, else empty."""
    first = next(tensor for tensor in tensors if tensor is not None)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if need and tensor is not None
        else first.new_empty(0)
        for need, tensor in zip(needs, tensors, strict=True)
    )


def lse_like(query: torch.Tensor) -> torch.Tensor:
    """A fake lse: `[B, H, T]`, packed `[H, total]`, float32 or float64."""
    *first, rows, heads, _ = query.shape
    return query.new_empty((*first, heads, rows), dtype=torch.promote_types(query.dtype, torch.float32))
