"""Checks and casts that relative_attention and two_stream_attention share."""

from __future__ import annotations

from typing import Any

import torch

from pyxlbert import checks

MASKED_ROWS = ("zero", "uniform")


def uniform_rows(op: str, masked_rows: str) -> bool:
    """Whether a fully masked row averages over all keys."""
    if masked_rows not in MASKED_ROWS:
        raise ValueError(f"{op}: masked_rows: got {masked_rows!r}, wanted 'zero' or 'uniform'")
    return masked_rows == "uniform"


def check_offset(op: str, offset: int, least: int, letters: str) -> int:
    """`offset` as an int of at least `least`, so that no row lies before the table."""
    offset = checks.integer(op, "offset", offset)
    if offset < max(least, 0):
        raise ValueError(f"{op}: offset: got {offset}, wanted at least {max(least, 0)} ({letters})")
    return offset


def check_table(
    op: str, position_key: torch.Tensor, query: torch.Tensor, batch: int, needed: int, letters: str, first: str
) -> None:
    """The table is `[R, H, D]` or `[G, R, H, D]`, R at least `needed`, G dividing the batch."""
    name = "position_key"
    checks.tensor(op, name, position_key)
    checks.floating(op, name, position_key)
    checks.same_device(op, name, position_key, first, query)
    checks.floating_like(op, name, position_key, query, parameter=True)
    shape = list(position_key.shape)
    if len(shape) not in (3, 4):
        raise ValueError(f"{op}: {name}: got shape {shape}, wanted [R, H, D] or [G, R, H, D]")
    if shape[-2:] != list(query.shape[-2:]):
        raise ValueError(
            f"{op}: {name}: got shape {shape}, wanted {list(query.shape[-2:])} in the end ({first}'s H and D)"
        )
    if shape[-3] < needed:
        raise ValueError(f"{op}: {name}: got {shape[-3]} rows in shape {shape}, wanted at least {needed} ({letters})")
    if len(shape) == 4 and (shape[0] == 0 or batch % shape[0] != 0):
        raise ValueError(
            f"{op}: {name}: got {shape[0]} tables in shape {shape}, wanted a number that divides B, {batch}"
        )


def check_biases(op: str, query: torch.Tensor, first: str, given: Any) -> None:
    """Biases are `[H, D]`, the segment embedding `[2, H, D]`, in query's dtype or float32."""
    heads, head_size = query.shape[-2:]
    for name, tensor, wanted, letters in (
        ("content_bias", given.content_bias, (heads, head_size), "H, D"),
        ("position_bias", given.position_bias, (heads, head_size), "H, D"),
        ("segment_bias", given.segment_bias, (heads, head_size), "H, D"),
        ("segment_embedding", given.segment_embedding, (2, heads, head_size), "same and other segment, H, D"),
    ):
        if tensor is None:
            continue
        checks.tensor(op, name, tensor)
        checks.floating(op, name, tensor)
        checks.same_device(op, name, tensor, first, query)
        checks.floating_like(op, name, tensor, query, parameter=True)
        checks.shape(op, name, tensor, wanted, letters)
    if given.segment_bias is not None and given.segment_embedding is None:
        raise ValueError(f"{op}: segment_bias: got it without segment_embedding, wanted both or neither")


def check_segments(
    op: str,
    query: torch.Tensor,
    first: str,
    given: Any,
    rows: tuple[int, ...],
    keys: tuple[int, ...],
    letters: tuple[str, str],
) -> None:
    """Segments are integers, one a row and one a key, and stand beside a segment embedding."""
    names = ("segment_embedding", "query_segments", "key_segments")
    missing = [name for name in names if getattr(given, name) is None]
    if 0 < len(missing) < len(names):
        raise ValueError(f"{op}: {missing[0]}: got None, wanted it beside {', '.join(set(names) - set(missing))}")
    integers = (torch.int32, torch.int64)
    check_numbers(op, "query_segments", given.query_segments, query, first, rows, letters[0], *integers)
    check_numbers(op, "key_segments", given.key_segments, query, first, keys, letters[1], *integers)


def check_ranks(
    op: str,
    query: torch.Tensor,
    first: str,
    given: Any,
    rows: tuple[int, ...],
    keys: tuple[int, ...],
    letters: tuple[str, str],
) -> None:
    """Ranks are int32, one a row and one a key, both or neither."""
    for name, other in (("query_rank", "key_rank"), ("key_rank", "query_rank")):
        if getattr(given, name) is None and getattr(given, other) is not None:
            raise ValueError(f"{op}: {name}: got None, wanted it beside {other}")
    check_numbers(op, "query_rank", given.query_rank, query, first, rows, letters[0], torch.int32)
    check_numbers(op, "key_rank", given.key_rank, query, first, keys, letters[1], torch.int32)


def check_numbers(
    op: str,
    name: str,
    tensor: torch.Tensor | None,
    query: torch.Tensor,
    first: str,
    shape: tuple[int, ...],
    letters: str,
    *dtypes: torch.dtype,
) -> None:
    """`tensor`, if there is one, holds integers in exactly this shape."""
    if tensor is None:
        return
    checks.tensor(op, name, tensor)
    checks.dtype(op, name, tensor, *dtypes)
    checks.same_device(op, name, tensor, first, query)
    checks.shape(op, name, tensor, shape, letters)


def check_positions(op: str, name: str, positions: torch.Tensor | None, most: int, letters: str) -> None:
    """The values of positions lie in [-1, most]."""
    if positions is None or positions.numel() == 0:
        return
    low, high = (int(x) for x in positions.aminmax())
    if low < -1 or high > most:
        wrong = low if low < -1 else high
        raise ValueError(f"{op}: {name}: got {wrong}, wanted positions in [-1, {most}] ({letters})")


def check_segment_values(op: str, **segments: torch.Tensor | None) -> None:
    """Segments of int64 fit 32 bits, which is what kernels compare."""
    for name, values in segments.items():
        if values is None or values.dtype is not torch.int64 or values.numel() == 0:
            continue
        low, high = (int(x) for x in values.aminmax())
        if low < -(2**31) or high >= 2**31:
            wrong = low if low < -(2**31) else high
            raise ValueError(f"{op}: {name}: got {wrong}, wanted a number of 32 bits, -2**31 to 2**31 - 1")


def lower(activations: tuple[torch.Tensor, ...], given: Any) -> tuple[torch.Tensor | None, ...]:
    """The activations, then content, position and segment bias and the segment embedding: under autocast activations
    in its dtype, and parameters that are not float32; float64 queries stay.
    """
    parameters = (given.content_bias, given.position_bias, given.segment_bias, given.segment_embedding)
    device = activations[0].device.type
    if not torch.is_autocast_enabled(device) or activations[0].dtype is torch.float64:
        return *activations, *parameters
    dtype = torch.get_autocast_dtype(device)
    return (
        *(x.to(dtype) for x in activations),
        *(x if x is None or x.dtype is torch.float32 else x.to(dtype) for x in parameters),
    )
