"""Who may see whom as ranks, and the embeddings of distances between places."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyxlbert.nn.layout import sizes_are_fixed

# Above every rank a query has, and never read.
UNSEEN_RANK = 2**31 - 1
# Above every rank a query has too, but a row of the content stream with it sees itself: padding whose own row is read.
PADDING_RANK = 2**31 - 2
# Below every rank a query has: memories are seen by all.
MEMORY_RANK = -(2**31)


def relative_positions(
    queries: int,
    keys: int,
    width: int,
    *,
    clamp: int = -1,
    backwards: bool = False,
    causal: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Sines and cosines of the distances from `keys` down to 1 - `queries`.

    Args:
        queries, keys: the numbers of places that look and that are seen.
        width: E, an even number.
        clamp: a distance counts as at most this many places; no limit where it is not positive.
        backwards: also the same for rows that are read from their end.
        causal: leave out the distances below 0, which belong to later keys.
        device: where the table is made.

    Returns:
        ``[R, E]``, or with `backwards` ``[2, R, E]``, the second for the half of the batch that reads backwards;
        float32.
    """
    # float32 all the way, as in the models that were trained.
    frequencies = 1 / torch.pow(10000, torch.arange(0, width, 2, device=device).float() / width)  # [E / 2]
    distances = torch.arange(keys, -1 if causal else -queries, -1, device=device).float()  # [R]
    if backwards:
        distances = torch.stack([distances, -distances])  # [2, R]
    if clamp > 0:
        distances = distances.clamp(-clamp, clamp)
    angles = distances[..., None] * frequencies  # [R, E / 2] or [2, R, E / 2]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)  # [R, E] or [2, R, E]


class LastTable:
    """The table of distances that was made last: calls of one shape need the same.

    Threads may share one, since what is kept is replaced as a whole. A copied or unpickled one is empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple, Tensor] | None = None

    def get(
        self,
        queries: int,
        keys: int,
        width: int,
        *,
        clamp: int,
        backwards: bool,
        causal: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """`relative_positions` in a dtype, to be read only."""

        def make() -> Tensor:
            shape = {"clamp": clamp, "backwards": backwards, "causal": causal}
            return relative_positions(queries, keys, width, **shape, device=device).to(dtype)

        if sizes_are_fixed():
            return make()
        key = (queries, keys, width, clamp, backwards, causal, device, dtype)
        kept = self._kept
        if kept is None or kept[0] != key:
            # A table made in inference mode could take no part in training later.
            with torch.inference_mode(False):
                kept = (key, make())
            self._kept = kept
        return kept[1]

    def __reduce__(self) -> tuple[type[LastTable], tuple[()]]:
        return LastTable, ()


class OwnRows(NamedTuple):
    """The rows that packed sequences meet, where each has a table of its own: n tokens are 2n distances, not 2T.

    Attributes:
        tables: B.
        rows: R, of a table.
        kept: int64 ``[N]``, the rows' places in ``[B * R]``.
    """

    tables: int
    rows: int
    kept: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, longest: int, rows: int) -> OwnRows:
        """Those of sequences that look at themselves.

        Args:
            cu_seqlens: int32 ``[B + 1]``.
            longest: the row of distance 0.
            rows: R.
        """
        lengths = cu_seqlens.diff().long().clamp(0, longest)  # [B]; attention refuses others
        first = longest - lengths
        counts = torch.minimum(2 * lengths, rows - first)  # without the later keys' half there is one more than n
        ends = counts.cumsum(0)
        # A table's first kept row stands at b * R + first, and is number ends - counts of the kept.
        moved = torch.arange(len(counts), device=counts.device) * rows + first - (ends - counts)
        moved = moved.repeat_interleave(counts)  # [N]
        return cls(len(counts), rows, moved + torch.arange(len(moved), device=moved.device))

    def take(self, table: Tensor) -> Tensor:
        """The kept rows ``[N, E]`` of one table ``[R, E]`` for all, or ``[2, R, E]`` for either half of them."""
        row = self.kept % self.rows
        if table.dim() == 3:
            row = row + self.kept // (self.rows * (self.tables // 2)) * self.rows
        return table.flatten(0, -2).index_select(0, row)

    def spread(self, rows: Tensor) -> Tensor:
        """The kept rows ``[N, H, D]`` in their tables ``[B, R, H, D]``, with zeros where no sequence looks."""
        width = rows.shape[1:]
        tables = rows.new_zeros(self.tables * self.rows, width.numel()).index_copy_(0, self.kept, rows.flatten(1))
        return tables.view(self.tables, self.rows, *width)
