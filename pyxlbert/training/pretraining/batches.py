"""Batches one after the other, made by worker processes or not, from any one on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyxlbert.training.pretraining.rules import require_integer

Batch = dict[str, Tensor]


class Source(Protocol):
    """Where batches come from: `SentencePairs` or `Segments`."""

    def batch(self, step: int, rank: int = 0, processes: int = 1) -> Batch:
        """A function of its arguments alone."""
        ...

    def identity(self) -> dict[str, Any]:
        """What another source must have in common for its batches to be the same."""
        ...


class PretrainingBatches:
    """Iterates over the batches of one process, without end unless told, and remembers how many were taken.

    Iterating again goes on where it was left. The number of workers changes nothing but the time.

    Args:
        source: where they come from.
        rank, processes: which share of each step is taken.
        workers: processes that make batches; 0: this one does.
        steps: how many steps there are; None: no end.

    Raises:
        ValueError: a number is out of range.
        TypeError: a number is no integer.
    """

    def __init__(
        self, source: Source, *, rank: int = 0, processes: int = 1, workers: int = 0, steps: int | None = None
    ) -> None:
        require_integer("processes", processes, 1)
        require_integer("rank", rank, 0)
        require_integer("workers", workers, 0)
        if rank >= processes:
            raise ValueError(f"rank: got {rank}, wanted less than processes, {processes}")
        if steps is not None:
            require_integer("steps", steps, 0)
        self._source, self._share, self._workers = source, (rank, processes), workers
        self._step, self._steps = 0, steps

    def __iter__(self) -> Iterator[Batch]:
        left = itertools.count(self._step) if self._steps is None else range(self._step, self._steps)
        loader = DataLoader(
            _Numbered(self._source, *self._share),
            batch_size=None,
            sampler=left,  # type: ignore[arg-type]
            num_workers=self._workers,
            collate_fn=_as_it_is,
            # Of its own, so that the loader takes nothing from the training's source of chance.
            generator=torch.Generator().manual_seed(0),
        )
        for batch in loader:
            self._step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The number of batches that were taken, and what they are batches of, as plain values: for all processes."""
        return {"step": self._step, **self._source.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the batches that were taken then, with any number of workers, and of processes that fits.

        Raises:
            ValueError: the state is of other batches; the message names what differs.
        """
        for name, wanted in self._source.identity().items():
            if name not in state or state[name] != wanted:
                raise ValueError(f"{name}: got {wanted!r}, but the saved state is of {state.get(name)!r}")
        require_integer("step", state.get("step"), 0)
        self._step = state["step"]


class _Numbered(Dataset):
    def __init__(self, source: Source, rank: int, processes: int) -> None:
        self._source, self._share = source, (rank, processes)

    def __getitem__(self, step: int) -> Batch:
        return self._source.batch(step, *self._share)


def _as_it_is(batch: Batch) -> Batch:
    return batch
