"""How well a model does on text that is held out, beside what needs no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from pyxlbert.training.pretraining.batches import Batch
from pyxlbert.training.pretraining.objective import PretrainingModel, counts
from pyxlbert.training.pretraining.pairs import PairOptions, SentencePairs
from pyxlbert.training.pretraining.segments import SegmentOptions, Segments
from pyxlbert.training.pretraining.store import TokenStore
from pyxlbert.training.pretraining.vocabularies import Vocabulary

#: The score that decides; less is better.
METRIC = "loss"
# Of a text in streams each has so many rows at least, so that memories count.
_LEAST_ROWS = 4


class HeldOut:
    """A text that a model is not trained on. Its rows, masks and orders are the same at each evaluation.

    Args:
        store: the text.
        vocabulary: whose tokens they are.
        options: how rows are made, as in training; the seed is this class's own.
        batch_size: rows a pass at most.

    Raises:
        ValueError: the text is too short for one row.
    """

    def __init__(
        self, store: TokenStore, vocabulary: Vocabulary, options: PairOptions | SegmentOptions, batch_size: int
    ) -> None:
        self.entropy = store.unigram_entropy()
        self._remembers = isinstance(options, SegmentOptions)
        order = isinstance(options, PairOptions) and options.swapped
        self._named = {"tokens": "loss", "pairs": "sentence_order_loss" if order else "next_sentence_loss"}
        self._batches: Callable[[], Iterator[Batch]]
        if isinstance(options, SegmentOptions):
            rows = min(batch_size, max(1, len(store.tokens) // (_LEAST_ROWS * options.max_length)))
            rows = 2 * math.ceil(rows / 2) if options.bi_data else rows
            segments = Segments(store, vocabulary, options, rows)
            self._batches = lambda: (segments.batch(step) for step in range(segments.epoch_steps))
        else:
            pairs = SentencePairs(store, vocabulary, options, 1)
            self._batches = lambda: pairs.epoch_batches(batch_size)

    def scores(self, module: nn.Module, plain: PretrainingModel, device: torch.device) -> dict[str, float]:
        """Losses per predicted token, in nats.

        Args:
            module: a `PretrainingModel`, or what a process has of it.
            plain: the same, without what is around it.
            device: where it is.

        Returns:
            `loss`, and `unigram_entropy` of the same text; of a BERT `next_sentence_loss`, of an ALBERT
            `sentence_order_loss`, and of an XLNet with memories `loss_without_memories`.
        """
        was_training = module.training
        module.eval()
        try:
            with torch.no_grad():
                scores = self._losses(module, device, True)
                if self._remembers and plain.model.config.mem_len:
                    scores["loss_without_memories"] = self._losses(module, device, False)["loss"]
        finally:
            plain.forget()
            module.train(was_training)
        return scores | {"unigram_entropy": self.entropy}

    def _losses(self, module: nn.Module, device: torch.device, remembers: bool) -> dict[str, float]:
        sums: dict[str, float] = {}
        labels: dict[str, int] = {}
        for batch in self._batches():
            found = module({name: value.to(device) for name, value in batch.items()}, remembers)
            for name, count in counts(batch).items():
                sums[name] = sums.get(name, 0.0) + float(found[name])
                labels[name] = labels.get(name, 0) + count
        means = {name: sums[name] / max(1, labels[name]) for name in sums}
        return {self._named[name]: value for name, value in means.items()}
