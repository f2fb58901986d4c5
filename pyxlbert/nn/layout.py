"""Where the tokens of a batch lie: padded ``[B, T]``, or packed ``[total]`` with the padding removed.

Everything between the embeddings and the last layer works on rows and never asks which of the two it has, except
attention, which takes its masks from here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


def _check_zero_one(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"{name}: got other values than 0 and 1 in {mask.dim()} dimensions, wanted 1 for a token; "
            "a mask that is added to the scores has 4 dimensions"
        )


class _Fixed(threading.local):
    def __init__(self) -> None:
        self.blocks = 0


_fixed = _Fixed()


@contextmanager
def fixed_sizes() -> Iterator[None]:
    """Inside the block, in this thread, no size depends on a tensor's values, as under `torch.compile`.

    It is what a CUDA graph needs: its kernels are captured once, and nothing may wait for the device.
    """
    _fixed.blocks += 1
    try:
        yield
    finally:
        _fixed.blocks -= 1


def sizes_are_fixed() -> bool:
    """Whether a graph is made of what runs: traced by torch.compile, or inside `fixed_sizes`."""
    return torch.compiler.is_compiling() or _fixed.blocks > 0


def has_values(tensor: Tensor) -> bool:
    """Whether there are values to branch on: a traced or a meta tensor has none."""
    return not sizes_are_fixed() and tensor.device.type != "meta"


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The layout of one batch and the masks that attention needs for it.

    Exactly one of these holds: every token is there (all fields but the first two are None); the padding is removed
    (`cu_seqlens`), and a bias, where layers take one, is by the places in each sequence; a 2-D mask is kept as a mask,
    under `torch.compile`, where sizes must not depend on values (`token_mask`); a 3-D or 4-D mask was given
    (`attention_mask` or `bias`).

    Attributes:
        batch, length: B and T of the padded shape; length is None for input that came packed.
        indices: int64 ``[total]``, the places in ``[B * T]`` of the tokens that were kept.
        cu_seqlens: int32 ``[B + 1]``, where each sequence starts among the packed rows.
        max_seqlen: the longest sequence's length.
        token_mask: bool ``[B, T]``, True where a token is.
        attention_mask: bool, broadcastable to ``[B, H, T, T]``, True where attention is allowed.
        bias: added to the scores, broadcastable to ``[B, H, T, T]``.
    """

    batch: int
    length: int | None
    indices: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    token_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor | None, batch: int, length: int) -> TokenLayout:
        """The layout for a mask as models take it.

        Args:
            mask: None; ``[B, T]`` with 1 for a token and 0 for padding, in any pattern; ``[B, T, T]`` with 1 where a
                query (row) may attend a key; ``[B or 1, H or 1, T or 1, T]``, boolean or integer with the same
                meaning, or floating point and then added to the scores.
            batch, length: B and T.

        Raises:
            ValueError: the mask has another shape, or values other than 0 and 1 where those are wanted.
            TypeError: the mask is complex.
        """
        if mask is None:
            return cls(batch, length)
        if mask.is_complex():
            raise TypeError(f"attention_mask: got {mask.dtype}, wanted boolean, integer or floating point")
        shape = tuple(mask.shape)
        if mask.dim() == 2:
            if shape != (batch, length):
                raise ValueError(f"attention_mask: got shape {list(shape)}, wanted [{batch}, {length}]")
            if not has_values(mask):
                real = mask.to(torch.bool)
                return cls(batch, length, token_mask=real, attention_mask=real[:, None, None, :])
            _check_zero_one("attention_mask", mask)
            return cls._without_padding(mask.to(torch.bool))
        if mask.dim() == 3:
            if shape != (batch, length, length):
                raise ValueError(f"attention_mask: got shape {list(shape)}, wanted [{batch}, {length}, {length}]")
            if has_values(mask):
                _check_zero_one("attention_mask", mask)
            return cls(batch, length, attention_mask=mask.to(torch.bool)[:, None])
        if mask.dim() != 4:
            raise ValueError(f"attention_mask: got {mask.dim()} dimensions, wanted 2, 3 or 4")
        if shape[0] not in (1, batch) or shape[2] not in (1, length) or shape[3] != length:
            raise ValueError(
                f"attention_mask: got shape {list(shape)}, wanted [{batch} or 1, heads or 1, {length} or 1, {length}]"
            )
        if mask.is_floating_point():
            return cls(batch, length, bias=mask)
        if has_values(mask):
            _check_zero_one("attention_mask", mask)
        return cls(batch, length, attention_mask=mask.to(torch.bool))

    @classmethod
    def _without_padding(cls, real: Tensor) -> TokenLayout:
        batch, length = real.shape
        indices = real.reshape(-1).nonzero().squeeze(1)
        if indices.numel() == batch * length:
            return cls(batch, length)
        lengths = real.sum(dim=1, dtype=torch.int32)
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=real.device)
        torch.cumsum(lengths, dim=0, dtype=torch.int32, out=cu_seqlens[1:])
        return cls(batch, length, indices=indices, cu_seqlens=cu_seqlens, max_seqlen=int(lengths.max()))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, total: int, max_seqlen: int | None = None) -> TokenLayout:
        """The layout of rows that come packed.

        Args:
            cu_seqlens: int32 ``[B + 1]``, rising from 0 to `total`.
            total: the number of rows.
            max_seqlen: the longest sequence's length; found by looking when it is not given.

        Raises:
            TypeError: cu_seqlens is not int32.
            ValueError: cu_seqlens is not one-dimensional, is empty, decreases, or does not span the rows.
        """
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"cu_seqlens: got {cu_seqlens.dtype}, wanted torch.int32")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"cu_seqlens: got shape {list(cu_seqlens.shape)}, wanted [B + 1]")
        if has_values(cu_seqlens) and cu_seqlens.device.type == "cpu":
            if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total:
                ends = f"{int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
                raise ValueError(f"cu_seqlens: got {ends}, wanted 0 to the number of rows {total}")
            if bool((cu_seqlens.diff() < 0).any()):
                raise ValueError("cu_seqlens: got a decrease, wanted a rising sequence")
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
        return cls(cu_seqlens.numel() - 1, None, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)

    @property
    def packed(self) -> bool:
        """Whether rows are packed ``[total]`` rather than ``[B, T]``."""
        return self.cu_seqlens is not None

    def take(self, x: Tensor) -> Tensor:
        """Rows of padded ``[B, T, ...]``: the kept ones ``[total, ...]``, or x as it is."""
        return x if self.indices is None else x.flatten(0, 1).index_select(0, self.indices)

    def restore(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """Rows back in their places ``[B, T, ...]``, with `fill` where there is padding.

        Rows that came packed stay as they are.
        """
        if self.indices is not None:
            padded = rows.new_full((self.batch * self.length, *rows.shape[1:]), fill)
            return padded.index_copy(0, self.indices, rows).view(self.batch, self.length, *rows.shape[1:])
        if self.token_mask is not None:
            real = self.token_mask.view(self.batch, self.length, *[1] * (rows.dim() - 2))
            return torch.where(real, rows, fill)
        return rows

    def restore_weights(self, weights: Tensor) -> Tensor:
        """Attention weights in their places ``[B, H, T, T]``, with zeros where a query or, packed, a key is padding.

        Args:
            weights: ``[B, H, T, T]``, of packed rows ``[B, H, max_seqlen, max_seqlen]``.
        """
        real = self.tokens(weights.device)
        if real is None:
            return weights
        if self.packed and weights.numel():
            number = (real.cumsum(1) - 1).clamp(min=0)  # which of its sequence's tokens stands at a place
            batch, heads, longest, _ = weights.shape
            rows = number[:, None, :, None].expand(batch, heads, self.length, longest)
            columns = number[:, None, None, :].expand(batch, heads, self.length, self.length)
            weights = weights.gather(2, rows).gather(3, columns)
            weights = torch.where(real[:, None, None, :], weights, 0.0)
        elif self.packed:
            return weights.new_zeros(*weights.shape[:2], self.length, self.length)
        return torch.where(real[:, None, :, None], weights, 0.0)

    def tokens(self, device: torch.device | str) -> Tensor | None:
        """Bool ``[B, T]``, True where a token is; None when every place has one."""
        if self.indices is None:
            return self.token_mask
        real = torch.zeros(self.batch * self.length, dtype=torch.bool, device=device)
        return real.index_fill_(0, self.indices, True).view(self.batch, self.length)

    def positions(self, device: torch.device | str, total: int) -> Tensor:
        """Each row's place in its sequence: ``[total]`` (of padded input, in the padded row), or ``[1, T]``."""
        if self.indices is not None:
            return self.indices % self.length
        if self.cu_seqlens is not None:
            rows = torch.arange(total, device=device, dtype=torch.int32)
            return rows - self.cu_seqlens[torch.searchsorted(self.cu_seqlens, rows, right=True) - 1]
        return torch.arange(self.length, device=device)[None]

    def first(self, rows: Tensor) -> Tensor:
        """The first token's row of every sequence, ``[B, E]``; zeros for a sequence without tokens."""
        empty = rows.new_zeros(self.batch, rows.shape[-1])
        if self.packed:
            if rows.shape[0] == 0:
                return empty
            starts = self.cu_seqlens[:-1]
            found = rows.index_select(0, starts.clamp(max=rows.shape[0] - 1))
            return torch.where((self.cu_seqlens.diff() > 0)[:, None], found, empty)
        if self.length == 0:
            return empty
        if self.token_mask is not None:
            place = self.token_mask.to(torch.uint8).argmax(dim=1)
            found = rows[torch.arange(self.batch, device=rows.device), place]
            return torch.where(self.token_mask.any(dim=1)[:, None], found, empty)
        return rows[:, 0]

    def last(self, rows: Tensor) -> Tensor:
        """The last token's row of every sequence, ``[B, E]``; zeros for a sequence without tokens."""
        empty = rows.new_zeros(self.batch, rows.shape[-1])
        if self.packed:
            if rows.shape[0] == 0:
                return empty
            found = rows.index_select(0, (self.cu_seqlens[1:] - 1).clamp(min=0))
            return torch.where((self.cu_seqlens.diff() > 0)[:, None], found, empty)
        if self.length == 0:
            return empty
        if self.token_mask is not None:
            place = self.length - 1 - self.token_mask.flip(1).to(torch.uint8).argmax(dim=1)  # [B]
            found = rows[torch.arange(self.batch, device=rows.device), place]
            return torch.where(self.token_mask.any(dim=1)[:, None], found, empty)
        return rows[:, -1]

    def mean(self, rows: Tensor) -> Tensor:
        """The mean of every sequence's tokens, ``[B, E]``; zeros for a sequence without tokens.

        Raises:
            ValueError: the rows came packed, which have no padded shape to be put back in.
        """
        if self.length is None:
            raise ValueError("mean: got rows that came packed, wanted a padded batch")
        tokens = self.tokens(rows.device)  # [B, T]
        if tokens is None:
            return rows.mean(dim=1) if self.length else rows.new_zeros(self.batch, rows.shape[-1])
        total = self.restore(rows).sum(dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))  # [B, E]
        return (total / tokens.sum(dim=1, keepdim=True).clamp(min=1)).to(rows.dtype)

    def labels(self, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """Labels ``[B, T]`` in the order of the rows; those on padding are ignored."""
        if self.token_mask is not None:
            return torch.where(self.token_mask, labels, ignore_index)
        return self.take(labels)
