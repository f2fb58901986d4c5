"""XLNet's heads: language model, summary and its classifiers, tokens, choices. Answers stand in `xlnet_answers`.

Each `forward` lists its arguments, which editors and training loops read, and passes them on as one `XLNetInputs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxlbert.models.generation import Generates
from pyxlbert.models.inputs import check_choices, check_classes, check_labels
from pyxlbert.models.losses import class_loss, classification_loss, loss_without_logits, require_labels, token_loss
from pyxlbert.models.outputs import PackedRecurrentOutput, RecurrentHeadOutput
from pyxlbert.models.xlnet import XLNetModel, XLNetPreTrainedModel
from pyxlbert.models.xlnet_config import XLNetConfig
from pyxlbert.models.xlnet_inputs import SHARED, XLNetInputs
from pyxlbert.nn import Linear, activation_kind


class XLNetHead(XLNetPreTrainedModel):
    """An encoder, which is `base_model` whatever its name and class, and something on top of it."""

    encoder_class: ClassVar[type[XLNetPreTrainedModel]] = XLNetModel

    def _encode(self, given: XLNetInputs) -> PackedRecurrentOutput:
        return self.base_model(
            *given[:SHARED],
            target_positions=given.target_positions,
            query_rank=given.query_rank,
            key_rank=given.key_rank,
            mems_mask=given.mems_mask,
            keep_packed=True,
            reads=given.reads,
        )


class XLNetLMHeadModel(XLNetHead, Generates):
    """The encoder with logits over the vocabulary; the decoder's weight is the word embeddings'."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self._add_encoder()
        self.lm_loss = Linear(config.d_model, config.vocab_size)
        self.tie_weights()
        self.init_weights("lm_loss.")

    def tied_names(self) -> dict[str, str]:
        tied = super().tied_names()
        if self.config.tie_word_embeddings:
            tied["lm_loss.weight"] = f"{self.base_model_prefix}.word_embedding.weight"
        return tied

    def tie_weights(self) -> None:
        super().tie_weights()
        if self.config.tie_word_embeddings:
            self.lm_loss.weight = self.base_model.word_embedding.weight

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder."""
        return self.lm_loss

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the decoder."""
        self.lm_loss = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mems: Sequence[Tensor] | None = None,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        input_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_mems: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        target_positions: Tensor | None = None,
        query_rank: Tensor | None = None,
        key_rank: Tensor | None = None,
        mems_mask: Tensor | None = None,
        output_logits: bool = True,
    ) -> RecurrentHeadOutput | tuple:
        """Arguments not listed are those of `XLNetModel.forward`.

        Args:
            labels: ``[B, M]``, with no targets ``[B, T]``: token ids, -100 for none; those on padding are ignored.
            output_logits: False, with labels, leaves `logits` out: they are then computed only for labels that count,
                and never all at once.

        Returns:
            `logits` ``[B, M, V]`` or ``[B, T, V]`` (zeros at padding), `mems`, and with labels `loss`.
        """
        rows = (input_ids, attention_mask, mems, perm_mask, target_mapping, token_type_ids, input_mask, inputs_embeds)
        given = XLNetInputs(
            *rows,
            use_mems,
            output_attentions,
            output_hidden_states,
            target_positions=target_positions,
            query_rank=query_rank,
            key_rank=key_rank,
            mems_mask=mems_mask,
        )
        require_labels(labels, output_logits)
        encoded = self._encode(given)
        layout = encoded.layout
        if not output_logits:
            rows = encoded.last_hidden_state  # [B, M or T, E], packed [total, E]
            check_labels("labels", labels, rows.device, (layout.batch, layout.length))
            check_classes("labels", labels, self.config.vocab_size)
            loss = loss_without_logits(self.lm_loss, rows, layout.labels(labels))
            return self._returned(RecurrentHeadOutput(loss, None, *encoded.passed_on()), return_dict)
        logits = self.lm_loss(encoded.last_hidden_state)  # [B, M or T, V], packed [total, V]
        loss = None if labels is None else token_loss(logits, labels, layout)
        output = RecurrentHeadOutput(loss, layout.restore(logits), *encoded.passed_on())
        return self._returned(output, return_dict)


_SUMMARY_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class XLNetSequenceSummary(nn.Module):
    """One vector a sequence: a place of it or the mean of all, a projection and an activation.

    The places are the last token of the row, its first, or all. With ``config.summary_at_padding`` they are those that
    `transformers` takes, padding or not.
    """

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        # Without a place of its own, the classification token is the last.
        self.place = "last" if config.summary_type == "cls_index" else config.summary_type
        # What is read beside the tokens.
        self.reads = self.place if config.summary_at_padding else None
        self.summary = Linear(config.d_model, config.d_model) if config.summary_use_proj else nn.Identity()
        name = config.summary_activation
        self.activation = (
            torch.tanh if name == "tanh" else _SUMMARY_ACTIVATIONS[activation_kind(name)] if name else None
        )
        self.first_dropout = nn.Dropout(config.summary_first_dropout)
        self.last_dropout = nn.Dropout(config.summary_last_dropout)

    def forward(self, encoded: PackedRecurrentOutput) -> Tensor:
        """Returns ``[B, E]``."""
        rows, layout = encoded.last_hidden_state, encoded.layout  # [B, T, E], packed [total, E]
        if self.reads is None or layout.packed:
            # With `reads`, padding was left out because it is not at the place that is read.
            chosen = getattr(layout, self.place)(rows)  # [B, E]
        else:
            chosen = rows.mean(dim=1) if self.place == "mean" else rows[:, -1 if self.place == "last" else 0]  # [B, E]
        x = self.summary(self.first_dropout(chosen))  # [B, E]
        return self.last_dropout(x if self.activation is None else self.activation(x))


class XLNetForSequenceClassification(XLNetHead):
    """The encoder with a classifier or regressor on the summary."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self._add_encoder()
        self.sequence_summary = XLNetSequenceSummary(config)
        self.logits_proj = Linear(config.d_model, config.num_labels)
        self.init_weights("sequence_summary.")
        self.init_weights("logits_proj.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mems: Sequence[Tensor] | None = None,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        input_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_mems: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> RecurrentHeadOutput | tuple:
        """Arguments not listed are those of `XLNetModel.forward`.

        Args:
            labels: see `pyxlbert.models.losses.classification_loss`, with ``config.problem_type``.

        Returns:
            `logits` ``[B, num_labels]``, `mems`, and with labels `loss`.
        """
        rows = (input_ids, attention_mask, mems, perm_mask, target_mapping, token_type_ids, input_mask, inputs_embeds)
        given = XLNetInputs(*rows, use_mems, output_attentions, output_hidden_states, reads=self.sequence_summary.reads)
        encoded = self._encode(given)
        logits = self.logits_proj(self.sequence_summary(encoded))  # [B, num_labels]
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        output = RecurrentHeadOutput(loss, logits, *encoded.passed_on())
        return self._returned(output, return_dict)


class XLNetForTokenClassification(XLNetHead):
    """The encoder with a classifier on every token."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self._add_encoder()
        self.classifier = Linear(config.d_model, config.num_labels)
        self.init_weights("classifier.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mems: Sequence[Tensor] | None = None,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        input_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_mems: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> RecurrentHeadOutput | tuple:
        """Arguments not listed are those of `XLNetModel.forward`.

        Args:
            labels: ``[B, T]``, with targets ``[B, M]``: classes, -100 for none; those on padding are ignored.

        Returns:
            `logits` ``[B, T, num_labels]``, zeros at padding, `mems`, and with labels `loss`.
        """
        rows = (input_ids, attention_mask, mems, perm_mask, target_mapping, token_type_ids, input_mask, inputs_embeds)
        given = XLNetInputs(*rows, use_mems, output_attentions, output_hidden_states)
        encoded = self._encode(given)
        layout = encoded.layout
        logits = self.classifier(encoded.last_hidden_state)  # [B, M or T, num_labels], packed [total, num_labels]
        loss = None if labels is None else token_loss(logits, labels, layout)
        output = RecurrentHeadOutput(loss, layout.restore(logits), *encoded.passed_on())
        return self._returned(output, return_dict)


class XLNetForMultipleChoice(XLNetHead):
    """The encoder with one score for each choice."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self._add_encoder()
        self.sequence_summary = XLNetSequenceSummary(config)
        self.logits_proj = Linear(config.d_model, 1)
        self.init_weights("sequence_summary.")
        self.init_weights("logits_proj.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        input_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mems: Sequence[Tensor] | None = None,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_mems: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> RecurrentHeadOutput | tuple:
        """Arguments not listed are those of `XLNetModel.forward`; the order is that of `transformers`.

        Args:
            input_ids, token_type_ids, input_mask, attention_mask: ``[B, C, T]``.
            inputs_embeds: ``[B, C, T, E]``.
            mems, perm_mask, target_mapping: of the batch of all choices, B·C sequences.
            labels: ``[B]``, the right choice.

        Returns:
            `logits` ``[B, C]``, `mems`, and with labels `loss`.
        """
        several = {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "input_mask": input_mask,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
        }
        batch, choices = check_choices(**several)
        given = XLNetInputs(
            **{name: None if x is None else x.flatten(0, 1) for name, x in several.items()},
            mems=mems,
            perm_mask=perm_mask,
            target_mapping=target_mapping,
            use_mems=use_mems,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            reads=self.sequence_summary.reads,
        )
        encoded = self._encode(given)
        logits = self.logits_proj(self.sequence_summary(encoded)).view(batch, choices)  # [B, C]
        loss = None if labels is None else class_loss("labels", logits, labels)
        output = RecurrentHeadOutput(loss, logits, *encoded.passed_on())
        return self._returned(output, return_dict)
