"""Steps of the training loop from the sources of pretraining."""

from __future__ import annotations

import math

from pyxlbert.training.pretraining.pairs import SentencePairs
from pyxlbert.training.pretraining.segments import Segments
from pyxlbert.training.steps import Passes


class PairSteps:
    """Steps of `SentencePairs`.

    Args:
        source: makes the rows.
        micro_batch_size: rows a pass; None: a process's whole share.
    """

    def __init__(self, source: SentencePairs, micro_batch_size: int | None) -> None:
        self._source, self._micro, self.epoch_steps = source, micro_batch_size, source.epoch_steps

    def passes(self, step: int, rank: int, processes: int) -> Passes:
        """See `pyxlbert.training.steps.StepSource`."""
        rows = self._source.rows(step)
        share = math.ceil(len(rows) / processes)
        size = self._micro or share
        own = rows[rank * share : (rank + 1) * share]
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        real = len(parts)
        # All processes meet in each pass; who has nothing left takes a row that does not count.
        parts += [rows[:1]] * (math.ceil(share / size) - real)
        return Passes([self._source.collate(part) for part in parts], real, len(rows))


def passes_of(batch_size: int, micro_batch_size: int | None, processes: int) -> int:
    """How many passes a process needs for its rows of a batch of segments."""
    return 1 if micro_batch_size is None else max(1, math.ceil(batch_size // processes / micro_batch_size))


class SegmentSteps:
    """Steps of `Segments`; each pass has the same rows in every step, for memories belong to them.

    Args:
        source: makes the rows.
        micro_batch_size: rows a pass; None: a process's whole share.
        processes: how many share the rows.

    Raises:
        ValueError: the rows cannot be shared out equally.
    """

    def __init__(self, source: Segments, micro_batch_size: int | None, processes: int) -> None:
        self._parts = passes_of(source.batch_size, micro_batch_size, processes)
        source.rows(0, processes, 0, self._parts)
        self._source, self.epoch_steps = source, source.epoch_steps

    def passes(self, step: int, rank: int, processes: int) -> Passes:
        """See `pyxlbert.training.steps.StepSource`."""
        batches = [self._source.batch(step, rank, processes, part, self._parts) for part in range(self._parts)]
        return Passes(batches, self._parts, self._source.batch_size)
