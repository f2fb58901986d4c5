"""Who may see whom as ranks, and the embeddings of distances between places."""

from __future__ import annotations

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
