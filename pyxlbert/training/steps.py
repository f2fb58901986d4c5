"""Which examples each step is made of: a function of the step alone, whoever asks and however often."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from pyxlbert.training.tasks.base import Batch


class Passes(NamedTuple):
    """What one process does in a step: a batch a pass.

    Attributes:
        batches: as many in every process.
        real: how many of them count; the rest are there because others have more to do.
        examples: how many examples the whole step has, in all processes.
    """

    batches: list[Batch]
    real: int
    examples: int


class StepSource(Protocol):
    """Where steps come from."""

    #: Steps of an epoch.
    epoch_steps: int

    def passes(self, step: int, rank: int, processes: int) -> Passes:
        """What process `rank` of `processes` does in step number `step`, from 0 on and beyond the first epoch."""
        ...


class ShuffledSteps:
    """Examples in a new order in each epoch, cut into steps; an epoch's last step may have fewer.

    Args:
        features: the rows to choose from.
        collate: makes a batch of some.
        batch_size: rows a step, all processes together.
        micro_batch_size: rows a pass; None: a process's whole share.
        seed: decides the order.

    Raises:
        ValueError: there are no rows.
    """

    def __init__(
        self,
        features: Sequence[Any],
        collate: Callable[[Sequence[Any]], Batch],
        batch_size: int,
        micro_batch_size: int | None,
        seed: int,
    ) -> None:
        if not features:
            raise ValueError("features: got none, wanted at least one row to train on")
        self._features, self._collate, self._seed = features, collate, seed
        self._batch_size, self._micro = batch_size, micro_batch_size
        self.epoch_steps = math.ceil(len(features) / batch_size)
        self._order: tuple[int, list[int]] = (-1, [])

    def rows(self, step: int) -> list[int]:
        """The rows of a step."""
        epoch, place = divmod(step, self.epoch_steps)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self._features), generator=generator).tolist())
        return self._order[1][place * self._batch_size : (place + 1) * self._batch_size]

    def passes(self, step: int, rank: int, processes: int) -> Passes:
        rows = self.rows(step)
        share = math.ceil(len(rows) / processes)
        size = self._micro or share
        own = rows[rank * share : (rank + 1) * share]
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        real = len(parts)
        # All processes meet in each pass; who has nothing left takes a row that does not count.
        parts += [rows[:1]] * (math.ceil(share / size) - real)
        return Passes([self._collate([self._features[row] for row in part]) for part in parts], real, len(rows))


class _Numbered(Dataset):
    def __init__(self, source: StepSource, start: int, stop: int, rank: int, processes: int) -> None:
        self._source, self._start, self._stop = source, start, stop
        self._rank, self._processes = rank, processes

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Passes:
        if index >= len(self):
            raise IndexError(index)
        return self._source.passes(self._start + index, self._rank, self._processes)


def _as_it_is(item: Passes) -> Passes:
    return item


def load(source: StepSource, start: int, stop: int, rank: int, processes: int, workers: int) -> Iterator[Passes]:
    """The steps from `start` to before `stop`, made by so many worker processes, which changes nothing but the time."""
    return iter(
        DataLoader(
            _Numbered(source, start, stop, rank, processes),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            # Of its own, so that the loader takes nothing from the training's source of chance.
            generator=torch.Generator().manual_seed(0),
        )
    )
