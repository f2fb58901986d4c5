"""Models that tag words, with a BiLSTM before the classifier, a CRF behind it, or both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyxlbert.models import (
    AlbertForTokenClassification,
    BertForTokenClassification,
    RobertaForTokenClassification,
    XLNetForTokenClassification,
)
from pyxlbert.nn import TokenLayout
from pyxlbert.training.crf import CRF

#: Keys of ``config.json`` beside those of the encoder: how wide the BiLSTM is, 0 for none; whether there is a CRF.
LSTM, CHAIN = "tagger_lstm", "tagger_crf"


class _Tagger:
    """What the taggers add to the model with a classifier on every token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.extra.get(LSTM) or 0
        self.lstm: nn.LSTM | None = None
        self.crf: CRF | None = None
        if width:
            # Back to the encoder's width, for the classifier: half for each direction.
            hidden = config.hidden_size
            self.lstm = nn.LSTM(hidden, width, batch_first=True, bidirectional=True)
            self.narrow = nn.Linear(2 * width, hidden)
        if config.extra.get(CHAIN):
            self.crf = CRF(config.num_labels)
        for part in ("lstm.", "narrow.", "crf."):
            self.init_weights(part)

    @torch.no_grad()
    def _init_parameter(self, name: str) -> None:
        owner, _, leaf = name.rpartition(".")
        if owner in ("lstm", "narrow"):
            # As torch has it: the encoder's small numbers would keep two layers in a row from learning.
            bound = (self.lstm.hidden_size if owner == "lstm" else self.narrow.in_features) ** -0.5
            getattr(getattr(self, owner), leaf).uniform_(-bound, bound)
        else:
            super()._init_parameter(name)

    def _encode(self, given: Any) -> Any:
        encoded = super()._encode(given)
        if self.lstm is not None:
            encoded.last_hidden_state = self._read_both_ways(encoded.last_hidden_state, encoded.layout)
        return encoded

    def _read_both_ways(self, rows: Tensor, layout: TokenLayout) -> Tensor:
        padded = layout.restore(rows)  # [B, T, E]
        real = layout.tokens(rows.device)  # [B, T]
        if real is None:
            real = torch.ones(padded.shape[:2], dtype=torch.bool, device=rows.device)
        order = torch.argsort(~real, dim=1, stable=True)  # tokens in front, wherever the padding is
        lengths = real.sum(1).clamp(min=1)
        with torch.autocast(rows.device.type, enabled=False):
            front = padded.float().gather(1, order[..., None].expand_as(padded))
            packed = nn.utils.rnn.pack_padded_sequence(front, lengths.cpu(), batch_first=True, enforce_sorted=False)
            out, _ = nn.utils.rnn.pad_packed_sequence(
                self.lstm(packed)[0], batch_first=True, total_length=padded.shape[1]
            )
            out = self.narrow(out)  # [B, T, E]
        back = torch.zeros_like(out).scatter(1, order[..., None].expand_as(out), out)
        return layout.take(back).to(rows.dtype)


class BertTagger(_Tagger, BertForTokenClassification):
    """BERT's."""


class RobertaTagger(_Tagger, RobertaForTokenClassification):
    """RoBERTa's."""


class AlbertTagger(_Tagger, AlbertForTokenClassification):
    """ALBERT's."""


class XLNetTagger(_Tagger, XLNetForTokenClassification):
    """XLNet's."""


TAGGERS = {"Bert": BertTagger, "Roberta": RobertaTagger, "Albert": AlbertTagger, "XLNet": XLNetTagger}
