"""RoBERTa, and by configuration XLM-RoBERTa and CamemBERT: BERT's layers, positions that count tokens, other heads.

Names of parameters, arguments and outputs are those of `transformers`; padding is removed as `bert` says.

Source:
    Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyxlbert.models.bert import BertConfig, BertInputs, BertModel, BertPreTrainedModel
from pyxlbert.models.bert_heads import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from pyxlbert.models.config import ModelConfig
from pyxlbert.models.inputs import can_read_values
from pyxlbert.models.outputs import HeadOutput, PackedModelOutput
from pyxlbert.nn import LayerNorm, Linear, LinearActivation, TokenLayout


@dataclass(kw_only=True)
class RobertaConfig(BertConfig):
    """RoBERTa's configuration, with the defaults of `transformers`, and further fields as `BertConfig` has them.

    Raises:
        ValueError: a field cannot be honoured; the message names it.
    """

    model_type: ClassVar[str] = "roberta"

    vocab_size: int = 50265
    pad_token_id: int | None = 1

    @classmethod
    def kinds(cls) -> dict[str, type[ModelConfig]]:
        family = (RobertaConfig, XLMRobertaConfig, CamembertConfig) if cls is RobertaConfig else (cls,)
        return {kind.model_type: kind for kind in family}

    def validate(self) -> None:
        super().validate()
        if self.pad_token_id is None:
            raise ValueError("pad_token_id: got None, wanted the padding's id: positions are counted from it")
        if self.max_position_embeddings < self.pad_token_id + 2:
            most, least = self.max_position_embeddings, self.pad_token_id + 2
            raise ValueError(
                f"max_position_embeddings: got {most}, wanted at least {least}: positions begin at pad_token_id + 1"
            )


@dataclass(kw_only=True)
class XLMRobertaConfig(RobertaConfig):
    """XLM-RoBERTa's: RoBERTa's under another name. A `RobertaModel` takes it."""

    model_type: ClassVar[str] = "xlm-roberta"
    prefix: ClassVar[tuple[str, str]] = ("Roberta", "XLMRoberta")
    vocab_size: int = 30522


@dataclass(kw_only=True)
class CamembertConfig(RobertaConfig):
    """CamemBERT's: RoBERTa's under another name. A `RobertaModel` takes it."""

    model_type: ClassVar[str] = "camembert"
    prefix: ClassVar[tuple[str, str]] = ("Roberta", "Camembert")
    vocab_size: int = 30522


class RobertaPreTrainedModel(BertPreTrainedModel):
    """What `RobertaModel` and the heads share."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"


class RobertaModel(RobertaPreTrainedModel, BertModel):
    """The encoder: `BertModel`, but positions are pad_token_id + 1 + n, counted over ids that are not pad_token_id.

    So they do not depend on `attention_mask`, nor on where a row's padding is. A token with the padding's id stands at
    position pad_token_id, and `inputs_embeds` are all counted.
    """

    @staticmethod
    def _position_padding(config: BertConfig) -> int | None:
        return config.pad_token_id

    @classmethod
    def max_tokens_of(cls, config: BertConfig) -> int:
        return config.max_position_embeddings - config.pad_token_id - 1

    def _check_length(self, name: str, given: BertInputs, layout: TokenLayout) -> None:
        longest, most = layout.max_seqlen if layout.length is None else layout.length, self.max_tokens
        if longest > most and layout.length is not None and name == "input_ids" and can_read_values(given.input_ids):
            longest = int(given.input_ids.ne(self.config.pad_token_id).sum(1).max())
        if longest > most:
            raise ValueError(
                f"{name}: got {longest} tokens a row, wanted at most {most}, which is max_position_embeddings "
                f"{self.config.max_position_embeddings} less pad_token_id + 1"
            )

    def _positions(self, given: BertInputs, layout: TokenLayout) -> Tensor:
        padding = self.config.pad_token_id
        if given.input_ids is None:
            vectors = given.inputs_embeds  # [B, T, E], packed [total, E]
            total = vectors.shape[0] if layout.indices is None else layout.indices.numel()
            places = layout.positions(vectors.device, total) + padding + 1  # [1, T], packed [total]
            return places if layout.packed else places.expand(vectors.shape[:2])
        ids = given.input_ids  # [B, T], packed [total]
        real = ids.ne(padding).int()
        counted = real.cumsum(-1, dtype=torch.int32)
        if layout.length is None:
            # Counted over all rows: less what was counted before each one's sequence.
            before = torch.cat([counted.new_zeros(1), counted])[layout.cu_seqlens[:-1].long()]  # [B]
            counted = counted - before.repeat_interleave(layout.cu_seqlens.diff(), output_size=ids.numel())
        return layout.take((counted * real).long() + padding)


class RobertaHead(RobertaPreTrainedModel):
    """A head of BERT's on RoBERTa's encoder."""

    encoder_class: ClassVar[type[BertPreTrainedModel]] = RobertaModel


class RobertaLMHead(nn.Module):
    """Dense, GELU, LayerNorm and the logits over the vocabulary. The decoder's bias is also known as `bias`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = LinearActivation(config.hidden_size, config.hidden_size, "gelu")
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder.bias = self.bias

    def before_decoder(self, x: Tensor) -> Tensor:
        """What the decoder is given."""
        return self.layer_norm(self.dense(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.before_decoder(x))


class RobertaForMaskedLM(RobertaHead, BertForMaskedLM):
    """The encoder with the masked-LM head; see `BertForMaskedLM`."""

    predictions_name = "lm_head"

    def _add_predictions(self, config: BertConfig) -> None:
        self.lm_head = RobertaLMHead(config)


class RobertaClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout and the classes, on each sequence's first token ``[B, E]``."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.head_dropout_prob)
        self.out_proj = Linear(config.hidden_size, config.num_labels)

    def forward(self, first: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(first)))))


class RobertaForSequenceClassification(RobertaHead, BertForSequenceClassification):
    """The encoder with a classifier or regressor on the first token; see `BertForSequenceClassification`."""

    def _add_classifier(self, config: BertConfig) -> None:
        self._add_encoder(add_pooling_layer=False)
        self.classifier = RobertaClassificationHead(config)

    def _classify(self, encoded: PackedModelOutput) -> Tensor:
        return self.classifier(encoded.layout.first(encoded.last_hidden_state))


class RobertaForTokenClassification(RobertaHead, BertForTokenClassification):
    """The encoder with a classifier on every token; see `BertForTokenClassification`."""


class RobertaForQuestionAnswering(RobertaHead, BertForQuestionAnswering):
    """The encoder with a classifier for where an answer starts and ends; see `BertForQuestionAnswering`."""


class RobertaForMultipleChoice(RobertaHead, BertForMultipleChoice):
    """The encoder with one score for each choice; see `BertForMultipleChoice`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)  # whatever classifier_dropout is, as in transformers

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """As `BertForMultipleChoice.forward`, in the order that `transformers` has here."""
        rows = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, labels)
        return super().forward(*rows, output_attentions, output_hidden_states, return_dict)
