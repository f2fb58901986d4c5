"""XLNet's heads that find an answer in a text: two logits a token, or a search for the best starts and their ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxlbert.models.inputs import check_device, check_integers, check_range, check_shape
from pyxlbert.models.losses import answer_loss, cross_entropy, widened
from pyxlbert.models.outputs import BeamQuestionAnsweringOutput, RecurrentQuestionAnsweringOutput
from pyxlbert.models.xlnet_config import XLNetConfig
from pyxlbert.models.xlnet_heads import XLNetHead
from pyxlbert.models.xlnet_inputs import XLNetInputs
from pyxlbert.nn import LayerNorm, Linear

# What is taken from the logits of places that cannot be an answer; float16 cannot hold the larger one.
MASKED_LOGIT = {torch.float16: 65500.0}
MASKED_LOGIT_ELSE = 1e30


class XLNetForQuestionAnsweringSimple(XLNetHead):
    """The encoder with a classifier for where an answer starts and ends.

    Raises:
        ValueError: ``config.num_labels`` is not 2.
    """

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels: got {config.num_labels}, wanted 2 (start and end) for question answering")
        self.num_labels = config.num_labels
        self._add_encoder()
        self.qa_outputs = Linear(config.d_model, config.num_labels)
        self.init_weights("qa_outputs.")

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
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_mems: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> RecurrentQuestionAnsweringOutput | tuple:
        """Arguments not listed are those of `XLNetModel.forward`.

        Args:
            start_positions, end_positions: ``[B]``, places in the row; one past its end, or on padding, is ignored.

        Returns:
            `start_logits` and `end_logits` ``[B, T]``, the dtype's lowest number at padding, `mems`, and with both
            kinds of position `loss`, the mean of the two.
        """
        rows = (input_ids, attention_mask, mems, perm_mask, target_mapping, token_type_ids, input_mask, inputs_embeds)
        given = XLNetInputs(*rows, use_mems, output_attentions, output_hidden_states)
        encoded = self._encode(given)
        layout = encoded.layout
        logits = self.qa_outputs(encoded.last_hidden_state)  # [B, T, 2], packed [total, 2]
        logits = layout.restore(logits, fill=torch.finfo(logits.dtype).min)  # [B, T, 2]
        start, end = logits[..., 0].contiguous(), logits[..., 1].contiguous()  # [B, T]
        loss = answer_loss(start, end, start_positions, end_positions, layout)
        output = RecurrentQuestionAnsweringOutput(loss, start, end, *encoded.passed_on())
        return self._returned(output, return_dict)


def _mask_logits(logits: Tensor, masked: Tensor | None) -> Tensor:
    """Logits with a large number taken off where `masked`, of 0 and 1, is 1."""
    if masked is None:
        return logits
    masked = masked.to(logits.dtype)
    return logits * (1 - masked) - MASKED_LOGIT.get(logits.dtype, MASKED_LOGIT_ELSE) * masked


class XLNetPoolerStartLogits(nn.Module):
    """Where an answer starts."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.dense = Linear(config.d_model, 1)

    def forward(self, hidden: Tensor, p_mask: Tensor | None = None) -> Tensor:
        """``[B, T, E]`` to ``[B, T]``; `p_mask` ``[B, T]`` is 1 where an answer cannot be."""
        return _mask_logits(self.dense(hidden).squeeze(-1), p_mask)


class XLNetPoolerEndLogits(nn.Module):
    """Where an answer that starts in a given state ends."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.dense_0 = Linear(2 * config.d_model, config.d_model)
        self.LayerNorm = LayerNorm(config.d_model, config.layer_norm_eps)
        self.dense_1 = Linear(config.d_model, 1)

    def forward(self, hidden: Tensor, start_states: Tensor, p_mask: Tensor | None = None) -> Tensor:
        """``[..., E]`` and the start's states of the same shape to ``[...]``."""
        x = torch.tanh(self.dense_0(torch.cat([hidden, start_states], dim=-1)))  # [..., E]
        return _mask_logits(self.dense_1(self.LayerNorm(x)).squeeze(-1), p_mask)


class XLNetPoolerAnswerClass(nn.Module):
    """Whether there is an answer at all."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.dense_0 = Linear(2 * config.d_model, config.d_model)
        self.dense_1 = Linear(config.d_model, 1, bias=False)

    def forward(self, start_states: Tensor, class_states: Tensor) -> Tensor:
        """Two times ``[B, E]`` to ``[B]``."""
        x = torch.tanh(self.dense_0(torch.cat([start_states, class_states], dim=-1)))  # [B, E]
        return self.dense_1(x).squeeze(-1)


class XLNetForQuestionAnswering(XLNetHead):
    """The encoder with a search for the best starts, the best end for each, and whether there is an answer."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self.start_n_top = config.start_n_top
        self.end_n_top = config.end_n_top
        self._add_encoder()
        self.start_logits = XLNetPoolerStartLogits(config)
        self.end_logits = XLNetPoolerEndLogits(config)
        self.answer_class = XLNetPoolerAnswerClass(config)
        for part in ("start_logits.", "end_logits.", "answer_class."):
            self.init_weights(part)

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
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        is_impossible: Tensor | None = None,
        cls_index: Tensor | None = None,
        p_mask: Tensor | None = None,
        use_mems: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BeamQuestionAnsweringOutput | tuple:
        """Arguments not listed are those of `XLNetModel.forward`.

        Args:
            start_positions, end_positions: ``[B]``, places in the row.
            is_impossible: ``[B]``, 1 where there is no answer.
            cls_index: ``[B]``, the place of the classification token; by default the last place.
            p_mask: ``[B, T]``, 1 where an answer cannot be. Padding is such a place always.

        Returns:
            With both kinds of position `loss`: the mean of theirs, plus half of the answer class's where
            `is_impossible` and `cls_index` are given. Without them `start_top_log_probs` and `start_top_index`
            ``[B, start_n_top]``, `end_top_log_probs` and `end_top_index` ``[B, end_n_top · start_n_top]``
            (probabilities, in spite of their names) and `cls_logits` ``[B]``.
        """
        rows = (input_ids, attention_mask, mems, perm_mask, target_mapping, token_type_ids, input_mask, inputs_embeds)
        given = XLNetInputs(
            *rows, use_mems, output_attentions, output_hidden_states, reads="last" if cls_index is None else None
        )
        encoded = self._encode(given)
        layout = encoded.layout
        batch, length = layout.batch, layout.length
        # Padding that was computed is kept: it may be the place of the classification token.
        hidden = encoded.last_hidden_state  # [B, T, E], packed [total, E]
        hidden = layout.restore(hidden) if layout.packed else hidden  # [B, T, E]
        if p_mask is not None:
            check_device("p_mask", p_mask, hidden.device)
            check_shape("p_mask", p_mask, (batch, length))
        tokens = layout.tokens(hidden.device)  # [B, T]
        if tokens is not None:
            p_mask = ~tokens if p_mask is None else torch.where(tokens, p_mask.to(hidden.dtype), 1.0)
        if cls_index is not None:
            cls_index = self._places("cls_index", cls_index, batch, length)
        start_logits = self.start_logits(hidden, p_mask)  # [B, T]
        rest = encoded.passed_on()
        if start_positions is not None and end_positions is not None:
            start = self._places("start_positions", start_positions, batch, length)
            end = self._places("end_positions", end_positions, batch, length)
            start_states = _states_at(hidden, start)  # [B, E]
            end_logits = self.end_logits(hidden, start_states[:, None].expand_as(hidden), p_mask)  # [B, T]
            loss = (cross_entropy(start_logits, start) + cross_entropy(end_logits, end)) / 2
            if cls_index is not None and is_impossible is not None:
                check_shape("is_impossible", is_impossible, (batch,), (batch, 1))
                class_logits = widened(self.answer_class(start_states, _states_at(hidden, cls_index)))
                wanted = is_impossible.reshape(-1).to(class_logits.dtype)
                loss = loss + F.binary_cross_entropy_with_logits(class_logits, wanted) / 2
            output = BeamQuestionAnsweringOutput(loss, None, None, None, None, None, *rest)
        else:
            output = BeamQuestionAnsweringOutput(None, *self._search(hidden, start_logits, cls_index, p_mask), *rest)
        return self._returned(output, return_dict)

    @staticmethod
    def _places(name: str, places: Tensor, batch: int, length: int) -> Tensor:
        check_integers(name, places)
        check_shape(name, places, (batch,), (batch, 1))
        check_range(name, places, 0, length - 1)
        return places.reshape(-1).long()

    def _search(
        self, hidden: Tensor, start_logits: Tensor, cls_index: Tensor | None, p_mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        batch, length, width = hidden.shape
        for name, count in (("start_n_top", self.start_n_top), ("end_n_top", self.end_n_top)):
            if count > length:
                raise ValueError(f"{name}: got {count}, wanted at most {length}, the length of the row")
        start_probabilities = torch.softmax(start_logits, dim=-1)  # [B, T]
        start_top, start_index = start_probabilities.topk(self.start_n_top, dim=-1)  # [B, S]
        start_states = hidden.gather(1, start_index[..., None].expand(-1, -1, width))  # [B, S, E]
        shape = (batch, length, self.start_n_top, width)
        end_logits = self.end_logits(
            hidden[:, :, None].expand(shape),
            start_states[:, None].expand(shape),
            None if p_mask is None else p_mask[..., None],
        )  # [B, T, S]
        end_top, end_index = torch.softmax(end_logits, dim=1).topk(self.end_n_top, dim=1)  # [B, N, S]
        expected_start = torch.einsum("bte,bt->be", hidden, start_probabilities)  # [B, E]
        class_states = hidden[:, -1] if cls_index is None else _states_at(hidden, cls_index)  # [B, E]
        return (
            start_top,
            start_index,
            end_top.reshape(batch, -1),
            end_index.reshape(batch, -1),
            self.answer_class(expected_start, class_states),
        )


def _states_at(hidden: Tensor, places: Tensor) -> Tensor:
    """Row `places` [B] of each sequence of [B, T, E]."""
    return hidden.gather(1, places[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)
