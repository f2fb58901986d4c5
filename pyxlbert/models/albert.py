"""ALBERT: BERT's layers, which share their weights, over embeddings that are narrower than they.

Names of parameters, arguments and outputs are those of `transformers`; padding is removed as `bert` says.

Source:
    Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", 2020.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyxlbert.models.bert import (
    BertConfig,
    BertEncoder,
    BertInputs,
    BertModel,
    BertPreTrainedModel,
    Stream,
)
from pyxlbert.models.bert_heads import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertVocabularyModel,
)
from pyxlbert.models.config import MOST_LAYERS, MOST_WIDTH
from pyxlbert.models.losses import class_loss, require_labels
from pyxlbert.models.outputs import SentenceOrderOutput
from pyxlbert.nn import (
    DropoutAddLayerNorm,
    LayerNorm,
    Linear,
    LinearActivation,
    SelfAttention,
    TokenLayout,
    rows_and_stream,
)
from pyxlbert.nn.encoder_layers import LayerParts, watched_linear
from pyxlbert.nn.watch import Watch


@dataclass(kw_only=True)
class AlbertConfig(BertConfig):
    """ALBERT's configuration, with the defaults of `transformers`, and further fields as `BertConfig` has them.

    Raises:
        ValueError: a field cannot be honoured; the message names it.
    """

    model_type: ClassVar[str] = "albert"

    vocab_size: int = 30000
    embedding_size: int = 128
    hidden_size: int = 4096
    num_hidden_groups: int = 1
    inner_group_num: int = 1
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout_prob: float | None = 0.1

    def validate(self) -> None:
        super().validate()
        self._integer("embedding_size", 1, MOST_WIDTH)
        for name in ("num_hidden_groups", "inner_group_num"):
            self._integer(name, 1, MOST_LAYERS)
        if self.num_hidden_layers * self.inner_group_num > MOST_LAYERS:
            raise ValueError(
                f"inner_group_num: got {self.inner_group_num} with num_hidden_layers {self.num_hidden_layers}, wanted "
                f"at most {MOST_LAYERS} layers in all"
            )
        if self.classifier_dropout_prob is not None:
            self._number("classifier_dropout_prob", 0, 1)

    @property
    def embedding_width(self) -> int:
        return self.embedding_size

    @property
    def depth(self) -> int:
        return self.num_hidden_layers * self.inner_group_num

    @property
    def head_dropout_prob(self) -> float:
        given = self.classifier_dropout_prob
        return self.hidden_dropout_prob if given is None else given

    def group(self, layer: int) -> int:
        """Which group of weights a layer has."""
        return int(layer / (self.num_hidden_layers / self.num_hidden_groups))

    def last_layer(self, group: int) -> int:
        """The last layer that has a group's weights."""
        return math.ceil((group + 1) * self.num_hidden_layers / self.num_hidden_groups) - 1


class AlbertAttention(SelfAttention):
    """Self-attention, with its output's product and residual under the same name."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config.hidden_size, config.num_attention_heads, config.attention_probs_dropout_prob)
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = DropoutAddLayerNorm(config.hidden_size, config.layer_norm_eps, config.hidden_dropout_prob)


class AlbertLayer(nn.Module):
    """One layer's weights; what the feed-forward network adds is not dropped."""

    is_encoder_layer = True

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.full_layer_layer_norm = DropoutAddLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = AlbertAttention(config)
        self.ffn = LinearActivation(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.ffn_output = Linear(config.intermediate_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        layout: TokenLayout,
        copy_dtype: torch.dtype | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `BertLayer.forward`."""
        own = self.attention
        mixed, weights = own(x, layout, output_attentions)  # as x, and [B, H, T, T]
        x, residual = rows_and_stream(own.LayerNorm(own.dense(mixed), residual, copy_dtype))  # [B, T, E] or [total, E]
        inner = self.ffn_output(self.ffn(x))  # [B, T, E], packed [total, E]
        x, residual = rows_and_stream(self.full_layer_layer_norm(inner, residual, copy_dtype))
        return x, residual, weights

    def parts(self, watch: Watch) -> LayerParts:
        """See `PackedLayers`."""
        own, up = watch.child(self, "attention", AlbertAttention), watched_linear(watch, self, "ffn", LinearActivation)
        for name in ("query", "key", "value"):
            watched_linear(watch, own, name, Linear)
        return LayerParts(
            *(own, ("",)),
            (watched_linear(watch, own, "dense", Linear), ""),
            (up, ""),
            (watched_linear(watch, self, "ffn_output", Linear), ""),
            watch.child(own, "LayerNorm", DropoutAddLayerNorm),
            watch.child(self, "full_layer_layer_norm", DropoutAddLayerNorm),
            *(watch.attribute(own, "num_attention_heads"), watch.attribute(own, "head_size")),
            watch.attribute(up, "activation"),
        )


class AlbertGroup(nn.Module):
    """The weights of one or more layers in a row, which come back as often as the group is used."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.albert_layers = nn.ModuleList([AlbertLayer(config) for _ in range(config.inner_group_num)])


class AlbertEncoder(BertEncoder):
    """The embeddings' way to the layers' width, and the groups of weights."""

    def __init__(self, config: AlbertConfig) -> None:
        nn.Module.__init__(self)
        self.embedding_hidden_mapping_in = Linear(config.embedding_size, config.hidden_size)
        self.albert_layer_groups = nn.ModuleList([AlbertGroup(config) for _ in range(config.num_hidden_groups)])
        #: Which group each layer has.
        self.order = tuple(config.group(layer) for layer in range(config.num_hidden_layers))

    @property
    def layer(self) -> list[AlbertLayer]:
        """The layers as they follow each other; the same module as often as its weights are used."""
        groups = [list(group.albert_layers) for group in self.albert_layer_groups]
        return [layer for group in self.order for layer in groups[group]]

    def _parts(self, watch: Watch) -> list[LayerParts]:
        watch.owner(self, "order")
        groups = watch.child(self, "albert_layer_groups", nn.ModuleList)
        found = []
        for name in watch.children(groups):
            layers = watch.child(watch.child(groups, name, AlbertGroup), "albert_layers", nn.ModuleList)
            found.append([watch.child(layers, one, AlbertLayer).parts(watch) for one in watch.children(layers)])
        return [parts for group in self.order for parts in found[group]]


class AlbertPooler(Linear):
    """``tanh(dense(first token))``; checkpoints have the pooler's own weight and bias."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class AlbertPreTrainedModel(BertPreTrainedModel):
    """What `AlbertModel` and the heads share."""

    config_class = AlbertConfig
    base_model_prefix = "albert"
    config: AlbertConfig

    @classmethod
    def _check_depth(cls, config: AlbertConfig, names: Iterable[str]) -> None:
        found = [re.search(r"albert_layer_groups\.(\d{1,9})\.albert_layers\.(\d{1,9})\.", name) for name in names]
        for place, name in enumerate(("num_hidden_groups", "inner_group_num"), start=1):
            most = max((int(one[place]) + 1 for one in found if one is not None), default=0)
            if getattr(config, name) > most:
                raise ValueError(f"lacks weights of the encoder: {most}, {name} is {getattr(config, name)}")


class AlbertModel(AlbertPreTrainedModel, BertModel):
    """The encoder: `BertModel` with shared layers; `inputs_embeds` are ``[B, T, embedding_size]``."""

    layers_class = AlbertEncoder
    pooler_class = AlbertPooler

    def _embed(self, given: BertInputs, layout: TokenLayout) -> Stream:
        narrow, _ = super()._embed(given, layout)  # [B, T, embedding_size], packed [total, embedding_size]
        x = self.encoder.embedding_hidden_mapping_in(narrow)  # [B, T, E], packed [total, E]
        stream_dtype, _ = self._dtypes()
        return x, x.to(stream_dtype)


class AlbertHead(AlbertPreTrainedModel):
    """A head of BERT's on ALBERT's encoder."""

    encoder_class: ClassVar[type[BertPreTrainedModel]] = AlbertModel


class AlbertMLMHead(nn.Module):
    """Back to the embeddings' width, activation, LayerNorm and the logits. The decoder's bias is also `bias`."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.LayerNorm = LayerNorm(config.embedding_size, config.layer_norm_eps)
        self.dense = LinearActivation(config.hidden_size, config.embedding_size, config.hidden_act)
        self.decoder = Linear(config.embedding_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder.bias = self.bias

    def before_decoder(self, x: Tensor) -> Tensor:
        """What the decoder is given."""
        return self.LayerNorm(self.dense(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.before_decoder(x))


class AlbertVocabularyModel(AlbertHead, BertVocabularyModel):
    """What the models with a masked-LM head share."""

    predictions_name = "predictions"

    @property
    def predictions(self) -> nn.Module:
        """The masked-LM head."""
        return nn.Module.__getattr__(self, "predictions")  # which the property hides

    def _add_predictions(self, config: AlbertConfig) -> None:
        self.predictions = AlbertMLMHead(config)


class AlbertForMaskedLM(AlbertVocabularyModel, BertForMaskedLM):
    """The encoder with the masked-LM head; see `BertForMaskedLM`."""


class AlbertSOPHead(nn.Module):
    """Dropout and the two classes, on the pooled output."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.head_dropout_prob)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.classifier(self.dropout(pooled))


class AlbertForPreTraining(AlbertVocabularyModel):
    """The encoder with the two heads it was pretrained with: masked LM and the order of two passages.

    Raises:
        ValueError: ``config.num_labels`` is not 2.
    """

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels: got {config.num_labels}, wanted 2: two passages are in order or not")
        self._add_encoder()
        self._add_predictions(config)
        self.sop_classifier = AlbertSOPHead(config)
        self.tie_weights()
        self.init_weights("predictions.")
        self.init_weights("sop_classifier.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        sentence_order_label: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        output_logits: bool = True,
    ) -> SentenceOrderOutput | tuple:
        """Arguments not listed are those of `BertModel.forward`.

        Args:
            labels: ``[B, T]``, the masked tokens' ids, -100 elsewhere; those on padding are ignored.
            sentence_order_label: ``[B]``, 0 where the passages are in their order, 1 where they were swapped.
            output_logits: see `BertForPreTraining.forward`.

        Returns:
            `prediction_logits` ``[B, T, V]`` (zeros at padding; ``[labelled, V]`` with ``sparse_prediction`` and
            labels), `sop_logits` ``[B, 2]``, and with both kinds of label `loss`, the sum of the two.
        """
        require_labels(labels, output_logits)
        rows = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self._encode(BertInputs(*rows, output_attentions, output_hidden_states))
        logits, loss = self._predict(encoded, labels, output_logits)
        order = self.sop_classifier(encoded.pooler_output)  # [B, 2]
        if sentence_order_label is not None:
            order_loss = class_loss("sentence_order_label", order, sentence_order_label)
        both = loss is not None and sentence_order_label is not None
        output = SentenceOrderOutput(loss + order_loss if both else None, logits, order, *encoded.passed_on())
        return self._returned(output, return_dict)


class AlbertForSequenceClassification(AlbertHead, BertForSequenceClassification):
    """The encoder with a classifier or regressor on the pooled output; see `BertForSequenceClassification`."""


class AlbertForTokenClassification(AlbertHead, BertForTokenClassification):
    """The encoder with a classifier on every token; see `BertForTokenClassification`."""


class AlbertForQuestionAnswering(AlbertHead, BertForQuestionAnswering):
    """The encoder with a classifier for where an answer starts and ends; see `BertForQuestionAnswering`."""


class AlbertForMultipleChoice(AlbertHead, BertForMultipleChoice):
    """The encoder with one score for each choice; see `BertForMultipleChoice`."""
