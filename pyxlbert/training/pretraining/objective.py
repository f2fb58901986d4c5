"""The losses of a model that is pretrained, and XLNet's memories from one batch to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxlbert.models.albert import AlbertForPreTraining
from pyxlbert.models.bert_heads import BertForPreTraining
from pyxlbert.models.inputs import IGNORED
from pyxlbert.models.losses import loss_without_logits, widened
from pyxlbert.models.xlnet_heads import XLNetLMHeadModel
from pyxlbert.training.pretraining.batches import Batch

_ENCODER = ("input_ids", "attention_mask", "token_type_ids")
_XLNET = ("input_ids", "token_type_ids", "target_positions", "labels", "query_rank", "key_rank")

# What is learned of a row's two passages, of which a batch has one.
PAIR_LABELS = ("next_sentence_label", "sentence_order_label")

Memory = tuple[Tensor, ...]


def counts(batch: Batch) -> dict[str, int]:
    """How many labels each loss of a batch is a sum over."""
    found = {"tokens": int((batch["labels"] != IGNORED).sum())}
    for name in PAIR_LABELS:
        if name in batch:
            found["pairs"] = len(batch[name])
    return found


class PretrainingModel(nn.Module):
    """A model and its objective. Called with a batch of `SentencePairs` or `Segments`, it gives the sums of the losses.

    An XLNet remembers the rows that it has seen, in training and in evaluation apart, until a batch begins new streams.
    """

    def __init__(self, model: BertForPreTraining | AlbertForPreTraining | XLNetLMHeadModel) -> None:
        super().__init__()
        self.model = model
        # By the rows of a batch; neither parameters nor buffers, for each process has rows of its own.
        self._memories: dict[bool, dict[tuple[int, ...], Memory]] = {True: {}, False: {}}

    def forward(self, batch: Batch, remembers: bool = True) -> dict[str, Tensor]:
        """The sums over a batch's labels.

        Args:
            batch: on the model's device.
            remembers: whether an XLNet sees its memories, and keeps new ones.
        """
        if isinstance(self.model, XLNetLMHeadModel):
            return self._permuted(batch, remembers)
        return self._masked(batch)

    def _masked(self, batch: Batch) -> dict[str, Tensor]:
        model, labels = self.model, batch["labels"]
        encoded = model.base_model(**{name: batch[name] for name in _ENCODER}, keep_packed=True)
        rows, layout = encoded.last_hidden_state, encoded.layout  # [total, E]
        head = model.predictions
        mean = loss_without_logits(head.decoder, rows, layout.labels(labels), IGNORED, head.before_decoder)
        albert = isinstance(model, AlbertForPreTraining)
        follows = widened((model.sop_classifier if albert else model.cls.seq_relationship)(encoded.pooler_output))
        wrong = next(batch[name] for name in PAIR_LABELS if name in batch)  # [B]
        return {"tokens": _summed(mean, labels), "pairs": F.cross_entropy(follows, wrong, reduction="sum")}

    def _permuted(self, batch: Batch, remembers: bool) -> dict[str, Tensor]:
        remembers = remembers and bool(self.model.config.mem_len)
        kept, rows = self._memories[self.training], tuple(batch["rows"].tolist())
        mems = None if not remembers or bool(batch["begins"].any()) else self._memory(kept, rows)
        inputs = {name: batch[name] for name in _XLNET}
        output = self.model(**inputs, mems=mems, use_mems=remembers, output_logits=False)
        if remembers:
            for other in [key for key in kept if set(key) & set(rows)]:
                del kept[other]
            kept[rows] = output.mems
        return {"tokens": _summed(output.loss, batch["labels"])}

    def _memory(self, kept: dict[tuple[int, ...], Memory], rows: tuple[int, ...]) -> Memory | None:
        if rows in kept:
            return kept[rows]
        # The rows lay in other batches, as another number of processes had them.
        places = {row: (key, at) for key in kept for at, row in enumerate(key)}
        if not all(row in places for row in rows):
            return None
        found = [(kept[key], at) for key, at in (places[row] for row in rows)]
        return tuple(
            torch.stack([mems[layer][:, at] for mems, at in found], dim=1) for layer in range(len(found[0][0]))
        )

    def forget(self) -> None:
        """Drops what was remembered in evaluation."""
        self._memories[False] = {}

    def process_state(self) -> list[tuple[tuple[int, ...], list[Tensor]]]:
        """What this process remembers of its rows, on the CPU, for a checkpoint."""
        return [(rows, [one.cpu() for one in mems]) for rows, mems in self._memories[True].items()]

    def load_process_state(self, states: Sequence[Any]) -> None:
        """Remembers what all processes of the run that goes on did: rows may be shared out in another way now."""
        device = next(self.model.parameters()).device
        self._memories[True] = {
            tuple(rows): tuple(one.to(device) for one in mems) for state in states for rows, mems in state
        }


def _summed(mean: Tensor, labels: Tensor) -> Tensor:
    """The sum of which `mean` is the mean; without labels that is NaN, and the sum nothing."""
    count = (labels != IGNORED).sum()
    return torch.where(count > 0, mean, torch.zeros_like(mean)) * count
