"""BERT's heads.

Each `forward` lists its arguments, which editors and training loops read, and passes them on as one `BertInputs`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from pyxlbert.models.bert import BertConfig, BertInputs, BertModel, BertPreTrainedModel
from pyxlbert.models.inputs import IGNORED, check_choices, check_classes, check_labels
from pyxlbert.models.losses import (
    answer_loss,
    class_loss,
    classification_loss,
    cross_entropy,
    labelled_rows,
    loss_without_logits,
    require_labels,
    token_loss,
)
from pyxlbert.models.outputs import HeadOutput, PackedModelOutput, PreTrainingOutput, QuestionAnsweringOutput
from pyxlbert.nn import LayerNorm, Linear, LinearActivation, sizes_are_fixed


class BertHead(BertPreTrainedModel):
    """An encoder, which is `base_model` whatever its name and class, and something on top of it."""

    encoder_class: ClassVar[type[BertPreTrainedModel]] = BertModel

    def _encode(self, given: BertInputs) -> PackedModelOutput:
        return self.base_model(*given, keep_packed=True)


class BertPredictionHeadTransform(nn.Module):
    """Dense, activation, LayerNorm: what the masked-LM head does before the vocabulary."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = LinearActivation(config.hidden_size, config.hidden_size, config.hidden_act)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x))


class BertLMPredictionHead(nn.Module):
    """Logits over the vocabulary. The decoder's bias is also known as `bias`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder.bias = self.bias

    def before_decoder(self, x: Tensor) -> Tensor:
        """What the decoder is given."""
        return self.transform(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.before_decoder(x))


class BertHeads(nn.Module):
    """The module that checkpoints call ``cls``: masked LM, next sentence, or both."""

    def __init__(self, config: BertConfig, masked_lm: bool, next_sentence: bool) -> None:
        super().__init__()
        if masked_lm:
            self.predictions = BertLMPredictionHead(config)
        if next_sentence:
            self.seq_relationship = Linear(config.hidden_size, 2)


class BertVocabularyModel(BertHead):
    """What the models with a masked-LM head share."""

    #: Where the head is whose `decoder` gives the logits.
    predictions_name: ClassVar[str] = "cls.predictions"

    @property
    def predictions(self) -> nn.Module:
        """The masked-LM head."""
        return self.get_submodule(self.predictions_name)

    def tied_names(self) -> dict[str, str]:
        name = self.predictions_name
        tied = {f"{name}.decoder.bias": f"{name}.bias"}
        if self.config.tie_word_embeddings:
            tied[f"{name}.decoder.weight"] = f"{self.base_model_prefix}.embeddings.word_embeddings.weight"
        return tied

    def tie_weights(self) -> None:
        predictions = self.predictions
        predictions.decoder.bias = predictions.bias
        if self.config.tie_word_embeddings:
            predictions.decoder.weight = self.base_model.embeddings.word_embeddings.weight

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder."""
        return self.predictions.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the decoder."""
        self.predictions.decoder = value
        self.predictions.bias = value.bias

    def _tensors_to_save(self) -> dict[str, Tensor]:
        tensors = super()._tensors_to_save()
        if not self.config.tie_word_embeddings:
            # transformers ties both or neither, so it looks for the bias under both names.
            tensors[f"{self.predictions_name}.decoder.bias"] = self.predictions.bias.detach().clone()
        return tensors

    def _predict(
        self, encoded: PackedModelOutput, labels: Tensor | None, output_logits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The vocabulary's logits where they are asked for and, with labels, the loss."""
        rows, layout = encoded.last_hidden_state, encoded.layout  # [B, T, E], packed [total, E]
        config = self.config
        if labels is None:
            return layout.restore(self.predictions(rows)), None
        ignored = config.sparse_pred_ignore_index if config.sparse_prediction else IGNORED
        check_labels("labels", labels, rows.device, (layout.batch, layout.length))
        check_classes("labels", labels, config.vocab_size, ignored)
        labels = layout.labels(labels, ignored)
        if not output_logits:
            head = self.predictions
            return None, loss_without_logits(head.decoder, rows, labels, ignored, head.before_decoder)
        # A traced graph must not have sizes that depend on the labels.
        if config.sparse_prediction and not sizes_are_fixed():
            rows, labels = labelled_rows(rows, labels, ignored)
            logits = self.predictions(rows)  # [labelled, V]
            return logits, cross_entropy(logits, labels, ignored)
        logits = self.predictions(rows)  # [B, T, V], packed [total, V]
        return layout.restore(logits), cross_entropy(logits, labels, ignored)


class BertForPreTraining(BertVocabularyModel):
    """The encoder with the two heads it was pretrained with: masked LM and next sentence."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add_encoder()
        self.cls = BertHeads(config, masked_lm=True, next_sentence=True)
        self.tie_weights()
        self.init_weights("cls.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        output_logits: bool = True,
    ) -> PreTrainingOutput | tuple:
        """Arguments not listed are those of `BertModel.forward`.

        Args:
            labels: ``[B, T]``, the masked tokens' ids, -100 elsewhere; those on padding are ignored.
            next_sentence_label: ``[B]``, 0 where the second sentence follows the first, 1 where it is a random one.
            output_logits: False, with labels, leaves `prediction_logits` out: the vocabulary's are then computed only
                for labels that count, and never all at once.

        Returns:
            `prediction_logits` ``[B, T, V]`` (zeros at padding; ``[labelled, V]`` with ``sparse_prediction`` and
            labels), `seq_relationship_logits` ``[B, 2]``, and with both kinds of label `loss`, the sum of the two.
        """
        require_labels(labels, output_logits)
        rows = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self._encode(BertInputs(*rows, output_attentions, output_hidden_states))
        logits, loss = self._predict(encoded, labels, output_logits)
        relationship = self.cls.seq_relationship(encoded.pooler_output)  # [B, 2]
        if next_sentence_label is not None:
            next_sentence_loss = class_loss("next_sentence_label", relationship, next_sentence_label)
        both = loss is not None and next_sentence_label is not None
        output = PreTrainingOutput(
            loss + next_sentence_loss if both else None,
            logits,
            relationship,
            *encoded.passed_on(),
        )
        return self._returned(output, return_dict)


class BertForMaskedLM(BertVocabularyModel):
    """The encoder with the masked-LM head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add_encoder(add_pooling_layer=False)
        self._add_predictions(config)
        self.tie_weights()
        self.init_weights(f"{self.predictions_name}.")

    def _add_predictions(self, config: BertConfig) -> None:
        self.cls = BertHeads(config, masked_lm=True, next_sentence=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        output_logits: bool = True,
    ) -> HeadOutput | tuple:
        """Arguments not listed are those of `BertModel.forward`.

        Args:
            labels: ``[B, T]``, the masked tokens' ids, -100 elsewhere; those on padding are ignored.
            output_logits: False, with labels, leaves `logits` out: they are then computed only for labels that count,
                and never all at once.

        Returns:
            `logits` ``[B, T, V]`` (zeros at padding; ``[labelled, V]`` with ``sparse_prediction`` and labels) and
            with labels `loss`.
        """
        require_labels(labels, output_logits)
        rows = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self._encode(BertInputs(*rows, output_attentions, output_hidden_states))
        logits, loss = self._predict(encoded, labels, output_logits)
        output = HeadOutput(loss, logits, *encoded.passed_on())
        return self._returned(output, return_dict)


class BertForNextSentencePrediction(BertHead):
    """The encoder with the next-sentence head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add_encoder()
        self.cls = BertHeads(config, masked_lm=False, next_sentence=True)
        self.init_weights("cls.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """Arguments not listed are those of `BertModel.forward`.

        Args:
            labels: ``[B]``, 0 where the second sentence follows the first, 1 where it is a random one.

        Returns:
            `logits` ``[B, 2]`` and with labels `loss`.
        """
        rows = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self._encode(BertInputs(*rows, output_attentions, output_hidden_states))
        logits = self.cls.seq_relationship(encoded.pooler_output)  # [B, 2]
        loss = None if labels is None else class_loss("labels", logits, labels)
        output = HeadOutput(loss, logits, *encoded.passed_on())
        return self._returned(output, return_dict)


class BertForSequenceClassification(BertHead):
    """The encoder with a classifier or regressor on the pooled output."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self._add_classifier(config)
        self.init_weights("classifier.")

    def _add_classifier(self, config: BertConfig) -> None:
        self._add_encoder()
        self.dropout = nn.Dropout(config.head_dropout_prob)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def _classify(self, encoded: PackedModelOutput) -> Tensor:
        return self.classifier(self.dropout(encoded.pooler_output))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """Arguments not listed are those of `BertModel.forward`.

        Args:
            labels: by ``config.problem_type``: ``"regression"`` numbers ``[B]`` or ``[B, num_labels]``,
                ``"single_label_classification"`` classes ``[B]``, ``"multi_label_classification"`` 0 or 1
                ``[B, num_labels]``. Without a problem type: regression for one label, else the second for integer
                labels and the third for others.

        Returns:
            `logits` ``[B, num_labels]`` and with labels `loss`.
        """
        rows = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self._encode(BertInputs(*rows, output_attentions, output_hidden_states))
        logits = self._classify(encoded)  # [B, num_labels]
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        output = HeadOutput(loss, logits, *encoded.passed_on())
        return self._returned(output, return_dict)


class BertForTokenClassification(BertHead):
    """The encoder with a classifier on every token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self._add_encoder(add_pooling_layer=False)
        self.dropout = nn.Dropout(config.head_dropout_prob)
        self.classifier = Linear(config.hidden_size, config.num_labels)
        self.init_weights("classifier.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """Arguments not listed are those of `BertModel.forward`.

        Args:
            labels: ``[B, T]``, classes, -100 for none; those on padding are ignored.

        Returns:
            `logits` ``[B, T, num_labels]``, zeros at padding, and with labels `loss`.
        """
        rows = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self._encode(BertInputs(*rows, output_attentions, output_hidden_states))
        layout = encoded.layout
        logits = self.classifier(
            self.dropout(encoded.last_hidden_state)
        )  # [B, T, num_labels], packed [total, num_labels]
        loss = None if labels is None else token_loss(logits, labels, layout)
        output = HeadOutput(loss, layout.restore(logits), *encoded.passed_on())
        return self._returned(output, return_dict)


class BertForQuestionAnswering(BertHead):
    """The encoder with a classifier for where an answer starts and ends.

    Raises:
        ValueError: ``config.num_labels`` is not 2.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels: got {config.num_labels}, wanted 2 (start and end) for question answering")
        self.num_labels = config.num_labels
        self._add_encoder(add_pooling_layer=False)
        self.qa_outputs = Linear(config.hidden_size, config.num_labels)
        self.init_weights("qa_outputs.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringOutput | tuple:
        """Arguments not listed are those of `BertModel.forward`.

        Args:
            start_positions, end_positions: ``[B]``, places in the padded row; one past its end, or on padding, is
                ignored.

        Returns:
            `start_logits` and `end_logits` ``[B, T]``, the dtype's lowest number at padding, so that a softmax gives
            padding no probability; with both kinds of position also `loss`, the mean of the two.
        """
        rows = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self._encode(BertInputs(*rows, output_attentions, output_hidden_states))
        layout = encoded.layout
        logits = self.qa_outputs(encoded.last_hidden_state)  # [B, T, 2], packed [total, 2]
        logits = layout.restore(logits, fill=torch.finfo(logits.dtype).min)  # [B, T, 2]
        start, end = logits[..., 0].contiguous(), logits[..., 1].contiguous()  # [B, T]
        loss = answer_loss(start, end, start_positions, end_positions, layout)
        output = QuestionAnsweringOutput(loss, start, end, *encoded.passed_on())
        return self._returned(output, return_dict)


class BertForMultipleChoice(BertHead):
    """The encoder with one score for each choice."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add_encoder()
        self.dropout = nn.Dropout(config.head_dropout_prob)
        self.classifier = Linear(config.hidden_size, 1)
        self.init_weights("classifier.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """Arguments not listed are those of `BertModel.forward`, with a dimension of choices after the batch's.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: ``[B, C, T]``.
            inputs_embeds: ``[B, C, T, E]``.
            labels: ``[B]``, the right choice.

        Returns:
            `logits` ``[B, C]`` and with labels `loss`.
        """
        several = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        batch, choices = check_choices(**several)
        given = BertInputs(
            **{name: None if x is None else x.flatten(0, 1) for name, x in several.items()},
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        encoded = self._encode(given)
        logits = self.classifier(self.dropout(encoded.pooler_output)).view(batch, choices)  # [B, C]
        loss = None if labels is None else class_loss("labels", logits, labels)
        output = HeadOutput(loss, logits, *encoded.passed_on())
        return self._returned(output, return_dict)
