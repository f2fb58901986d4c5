"""BERT: the encoder and its heads.

Names of parameters, arguments and outputs are those of `transformers`. What differs is how rows travel: a 2-D mask
removes the padding before the embeddings, every layer works on the remaining rows ``[total, E]``, and the outputs are
put back in their places at the end, zeros where there is padding.

Source:
    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyxlbert.models.config import ModelConfig
from pyxlbert.models.few_rows import EncoderAddresses, Unusual
from pyxlbert.models.inputs import (
    IGNORED,
    check_choices,
    check_classes,
    check_device,
    check_ids,
    check_labels,
    check_tensors,
    check_tokens,
)
from pyxlbert.models.losses import LOW_PRECISION, classification_loss, cross_entropy, span_loss
from pyxlbert.models.outputs import (
    BaseModelOutputWithPooling,
    HeadOutput,
    ModelOutput,
    PackedModelOutput,
    PreTrainingOutput,
    QuestionAnsweringOutput,
)
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.nn import (
    DropoutAddLayerNorm,
    Embeddings,
    LayerNorm,
    Linear,
    LinearActivation,
    SelfAttention,
    TokenLayout,
    activation_kind,
    rows_and_stream,
    sizes_are_fixed,
)
from pyxlbert.ops._encoder_layers import encoder_layers_fwd, takes


@dataclass(kw_only=True)
class BertConfig(ModelConfig):
    """BERT's configuration, with the defaults of `transformers`.

    Fields beyond those of `transformers`:
        residual_in_fp32: in bfloat16 and float16 models, keep the residual stream between the layers in float32, which
            halves the model's error for a few percent of its time.
        sparse_prediction: with labels, compute the vocabulary's logits only where a label is; `logits` is then
            ``[labelled, V]``.
        sparse_pred_ignore_index: the label that means "none".

    Raises:
        ValueError: a field cannot be honoured; the message names it.
    """

    model_type: ClassVar[str] = "bert"
    unsupported: ClassVar[dict[str, tuple]] = {
        **ModelConfig.unsupported,
        "is_decoder": (False, None),
        "add_cross_attention": (False, None),
        "position_embedding_type": ("absolute", None),
    }

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    is_decoder: bool = False
    add_cross_attention: bool = False
    position_embedding_type: str = "absolute"
    residual_in_fp32: bool = True
    sparse_prediction: bool = False
    sparse_pred_ignore_index: int = IGNORED

    def validate(self) -> None:
        super().validate()
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"):
            self._integer(name, 1)
        for name in ("max_position_embeddings", "type_vocab_size"):
            self._integer(name, 1)
        self._integer("num_hidden_layers", 0)
        if self.hidden_size % self.num_attention_heads:
            heads, hidden = self.num_attention_heads, self.hidden_size
            raise ValueError(f"num_attention_heads: got {heads}, wanted a divisor of hidden_size {hidden}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            self._number(name, 0, 1)
        if self.classifier_dropout is not None:
            self._number("classifier_dropout", 0, 1)
        self._number("layer_norm_eps", 0)
        self._number("initializer_range", 0)
        activation_kind(self.hidden_act, "hidden_act")
        if self.pad_token_id is not None:
            self._integer("pad_token_id", 0)
            if self.pad_token_id >= self.vocab_size:
                raise ValueError(
                    f"pad_token_id: got {self.pad_token_id}, wanted less than vocab_size {self.vocab_size}"
                )

    @property
    def head_dropout_prob(self) -> float:
        """The dropout before a classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


class BertResidual(nn.Module):
    """A projection back to the residual stream, then ``LayerNorm(residual + dropout(x))``."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size)
        self.LayerNorm = DropoutAddLayerNorm(config.hidden_size, config.layer_norm_eps, config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor, copy_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Returns the rows for the next product and the residual stream."""
        return rows_and_stream(self.LayerNorm(self.dense(x), residual, copy_dtype))


class BertAttention(nn.Module):
    """Self-attention (under Hugging Face's name ``self``) and its residual."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config.hidden_size, config.num_attention_heads, config.attention_probs_dropout_prob)
        self.output = BertResidual(config.hidden_size, config)


class BertIntermediate(nn.Module):
    """The feed-forward network's first half."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = LinearActivation(config.hidden_size, config.intermediate_size, config.hidden_act)


class BertLayer(nn.Module):
    """One layer: attention and feed-forward network, each with its residual and LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertResidual(config.intermediate_size, config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        layout: TokenLayout,
        copy_dtype: torch.dtype | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One layer.

        Args:
            x: rows ``[B, T, E]`` or ``[total, E]``, in the dtype of the products.
            residual: the same rows in the dtype of the residual stream; may be x itself.
            layout: where the rows lie, with the masks.
            copy_dtype: the products' dtype where it is not the stream's.
            output_attentions: also return the attention weights.

        Returns:
            The next x, the next residual, and the weights or None.
        """
        mixed, weights = self.attention.self(x, layout, output_attentions)
        x, residual = self.attention.output(mixed, residual, copy_dtype)
        x, residual = self.output(self.intermediate.dense(x), residual, copy_dtype)
        return x, residual, weights


class BertEncoder(nn.Module):
    """The stack of layers."""

    # The layers as the kernels take them, found at the first use.
    addresses: EncoderAddresses | None = None

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])

    def few_rows(self, x: Tensor, residual: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor] | None:
        """All layers in one go, with the same bits; None where they are to be called one by one."""
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or self.training
            or layout.attention_mask is not None
            or layout.bias is not None
            or not takes(x)
        ):
            return None
        addresses = self.addresses
        if addresses is None or not addresses.unchanged():
            try:
                self.addresses = addresses = EncoderAddresses(self, BertLayer, BertResidual)
            except Unusual:
                self.addresses = None
                return None
        if x.dtype is not addresses.dtype or x.shape[-1] != addresses.hidden:
            return None
        return encoder_layers_fwd(x, residual, addresses.layers, layout.cu_seqlens, layout.max_seqlen)


class BertPooler(nn.Module):
    """``tanh(dense(first token))``."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        return torch.tanh(self.dense(first))


class BertPreTrainedModel(PretrainedModel):
    """What `BertModel` and the heads share."""

    config_class = BertConfig
    base_model_prefix = "bert"
    base_parts = ("embeddings", "encoder", "pooler")
    required_parts = ("embeddings", "encoder")
    config: BertConfig

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings."""
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings, and with them a tied decoder.

        Raises:
            TypeError: `value` is no embedding.
            ValueError: the table has another size than the configuration's.
        """
        self._check_embeddings(value, self.config.hidden_size)
        self.base_model.embeddings.word_embeddings = value
        self.tie_weights()

    def _returns_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict


class BertModel(BertPreTrainedModel):
    """The encoder.

    Args:
        config: the configuration.
        add_pooling_layer: whether to have the pooler.

    Raises:
        ValueError: a field of the configuration cannot be honoured.
    """

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(
            config.vocab_size,
            config.hidden_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            padding_idx=config.pad_token_id,
            eps=config.layer_norm_eps,
            dropout_p=config.hidden_dropout_prob,
        )
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.checkpointing: dict[str, Any] | None = None
        self.init_weights()

    @classmethod
    def _constructor_options(cls) -> tuple[str, ...]:
        return ("add_pooling_layer",)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        keep_packed: bool = False,
    ) -> ModelOutput | tuple:
        """Encode a batch.

        Args:
            input_ids: ``[B, T]``, integers.
            attention_mask: ``[B, T]`` of 1 (token) and 0 (padding) in any pattern: padding takes no time.
                ``[B, T, T]`` of 1 (query may attend key) and 0, or ``[B or 1, H or 1, T or 1, T]``, boolean or integer
                with the same meaning or floating point and then added to the scores: every place is computed.
            token_type_ids: ``[B, T]``; zeros by default.
            position_ids: ``[B, T]`` or ``[1, T]``; by default the place in the padded row.
            inputs_embeds: ``[B, T, E]``, in place of `input_ids` and their table.
            output_attentions: also return each layer's attention weights ``[B, H, T, T]``.
            output_hidden_states: also return the embeddings' and each layer's output.
            return_dict: False returns a plain tuple.
            cu_seqlens: int32 ``[B + 1]``; the input is packed: `input_ids`, `token_type_ids` and `position_ids` are
                ``[total]``, `inputs_embeds` is ``[total, E]``, and so are the outputs.
            max_seqlen: the longest sequence's length, where it is known.
            keep_packed: return rows and their layout as a `PackedModelOutput`, nothing put back in place.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` and each of `hidden_states` ``[B, T, E]`` in the
            parameters' dtype, zeros at padding; `pooler_output` ``[B, E]`` of each sequence's first token.

        Raises:
            ValueError: an argument has a wrong shape or value; the message names it.
            TypeError: an argument has a wrong dtype.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        device = self.embeddings.word_embeddings.weight.device
        check_tensors(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
        )
        given, tokens = check_tokens(
            input_ids, inputs_embeds, config.hidden_size, device, packed=cu_seqlens is not None
        )
        if cu_seqlens is not None:
            self._check_packed(attention_mask, output_attentions)
            check_device("cu_seqlens", cu_seqlens, tokens.device)
            layout = TokenLayout.from_cu_seqlens(cu_seqlens, tokens.shape[0], max_seqlen)
        else:
            check_device("attention_mask", attention_mask, tokens.device)
            layout = TokenLayout.from_mask(attention_mask, *tokens.shape[:2])
        longest = layout.max_seqlen if layout.length is None else layout.length
        if position_ids is None and longest > config.max_position_embeddings:
            most = config.max_position_embeddings
            raise ValueError(f"{given}: got {longest} tokens a row, wanted at most max_position_embeddings {most}")

        weight_dtype = self.embeddings.word_embeddings.weight.dtype
        stream_dtype = torch.float32 if weight_dtype in LOW_PRECISION and config.residual_in_fp32 else weight_dtype
        if layout.bias is not None:
            layout = replace(layout, bias=layout.bias.to(torch.promote_types(weight_dtype, torch.float32)))
        device_type = tokens.device.type
        autocast = torch.is_autocast_enabled(device_type)
        product_dtype = torch.get_autocast_dtype(device_type) if autocast else weight_dtype
        copy_dtype = None if product_dtype == stream_dtype else product_dtype

        ids = (input_ids, inputs_embeds, token_type_ids, position_ids)
        x, residual = self._embed(*ids, layout, stream_dtype, copy_dtype)

        def public(x: Tensor, residual: Tensor) -> Tensor:
            return x if x.dtype == weight_dtype else residual.to(weight_dtype)

        hidden_states = [public(x, residual)] if output_hidden_states else None
        attentions = [] if output_attentions else None
        recompute = self.checkpointing is not None and self.training and torch.is_grad_enabled()
        done = None
        if not (output_attentions or output_hidden_states):
            done = self.encoder.few_rows(x, residual, layout)
        if done is not None:
            x, residual = done
        for layer in self.encoder.layer if done is None else ():
            inputs = (x, residual, layout, copy_dtype, output_attentions)
            x, residual, weights = checkpoint(layer, *inputs, **self.checkpointing) if recompute else layer(*inputs)
            if output_hidden_states:
                hidden_states.append(public(x, residual))
            if output_attentions:
                attentions.append(weights)

        last = hidden_states[-1] if output_hidden_states else public(x, residual)
        pooled = self.pooler(layout.first(last)) if self.pooler is not None else None
        attentions = tuple(attentions) if output_attentions else None
        if keep_packed:
            states = tuple(hidden_states) if output_hidden_states else None
            return PackedModelOutput(last, pooled, states, attentions, layout)
        states = tuple(layout.restore(state) for state in hidden_states) if output_hidden_states else None
        last = states[-1] if output_hidden_states else layout.restore(last)
        output = BaseModelOutputWithPooling(last, pooled, states, attentions)
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        layout: TokenLayout,
        stream_dtype: torch.dtype,
        copy_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        tokens = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        shape, device = tokens.shape, tokens.device
        token_type_ids = check_ids("token_type_ids", token_type_ids, shape, device)
        position_ids = check_ids("position_ids", position_ids, shape, device)
        if position_ids is None and layout.packed:
            rows = tokens.numel() if layout.indices is None else layout.indices.numel()
            position_ids = layout.positions(device, rows)
        elif position_ids is not None:
            position_ids = layout.take(position_ids)
        table = None
        if inputs_embeds is None:
            rows = layout.take(input_ids)
        else:
            # The vectors are a table of their own, and each row looks itself up: one op serves both inputs, and
            # leaving out the padding costs no extra pass.
            table = inputs_embeds.reshape(-1, self.config.hidden_size).to(self.embeddings.word_embeddings.weight.dtype)
            rows = torch.arange(tokens.numel(), device=device).view(shape) if layout.indices is None else layout.indices
        embedded = self.embeddings(
            rows,
            token_type_ids if token_type_ids is None else layout.take(token_type_ids),
            position_ids,
            word_table=table,
            out_dtype=stream_dtype,
            copy_dtype=copy_dtype,
        )
        return rows_and_stream(embedded)

    @staticmethod
    def _check_packed(attention_mask: Tensor | None, output_attentions: bool) -> None:
        if attention_mask is not None:
            raise ValueError("attention_mask: given together with cu_seqlens, wanted one of them")
        if output_attentions:
            raise ValueError("output_attentions: got True for packed input, wanted a padded batch")


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

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class BertHeads(nn.Module):
    """The module that checkpoints call ``cls``: masked LM, next sentence, or both."""

    def __init__(self, config: BertConfig, masked_lm: bool, next_sentence: bool) -> None:
        super().__init__()
        if masked_lm:
            self.predictions = BertLMPredictionHead(config)
        if next_sentence:
            self.seq_relationship = Linear(config.hidden_size, 2)


class BertVocabularyModel(BertPreTrainedModel):
    """What the models with a masked-LM head share."""

    def tied_names(self) -> dict[str, str]:
        tied = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
        if self.config.tie_word_embeddings:
            tied["cls.predictions.decoder.weight"] = "bert.embeddings.word_embeddings.weight"
        return tied

    def tie_weights(self) -> None:
        predictions = self.cls.predictions
        predictions.decoder.bias = predictions.bias
        if self.config.tie_word_embeddings:
            predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the decoder."""
        self.cls.predictions.decoder = value
        self.cls.predictions.bias = value.bias

    def _tensors_to_save(self) -> dict[str, Tensor]:
        tensors = super()._tensors_to_save()
        if not self.config.tie_word_embeddings:
            # transformers ties both or neither, so it looks for the bias under both names.
            tensors["cls.predictions.decoder.bias"] = self.cls.predictions.bias.detach().clone()
        return tensors

    def _predict(self, encoded: PackedModelOutput, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The vocabulary's logits and, with labels, the loss."""
        rows, layout = encoded.last_hidden_state, encoded.layout
        config = self.config
        if labels is None:
            return layout.restore(self.cls.predictions(rows)), None
        ignored = config.sparse_pred_ignore_index if config.sparse_prediction else IGNORED
        check_labels("labels", labels, rows.device, (layout.batch, layout.length))
        check_classes("labels", labels, config.vocab_size, ignored)
        labels = layout.labels(labels, ignored)
        # A traced graph must not have sizes that depend on the labels.
        if config.sparse_prediction and not sizes_are_fixed():
            labels = labels.reshape(-1)
            labelled = (labels != ignored).nonzero().squeeze(1)
            logits = self.cls.predictions(rows.reshape(-1, rows.shape[-1]).index_select(0, labelled))
            return logits, cross_entropy(logits, labels.index_select(0, labelled), ignored)
        logits = self.cls.predictions(rows)
        return layout.restore(logits), cross_entropy(logits, labels, ignored)


class BertForPreTraining(BertVocabularyModel):
    """The encoder with the two heads it was pretrained with: masked LM and next sentence."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
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
    ) -> PreTrainingOutput | tuple:
        """Arguments not listed are those of `BertModel.forward`.

        Args:
            labels: ``[B, T]``, the masked tokens' ids, -100 elsewhere; those on padding are ignored.
            next_sentence_label: ``[B]``, 0 where the second sentence follows the first, 1 where it is a random one.

        Returns:
            `prediction_logits` ``[B, T, V]`` (zeros at padding; ``[labelled, V]`` with ``sparse_prediction`` and
            labels), `seq_relationship_logits` ``[B, 2]``, and with both kinds of label `loss`, the sum of the two.
        """
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.bert(*given, output_attentions, output_hidden_states, keep_packed=True)
        logits, loss = self._predict(encoded, labels)
        relationship = self.cls.seq_relationship(encoded.pooler_output)
        if next_sentence_label is not None:
            batch = relationship.shape[0]
            check_labels("next_sentence_label", next_sentence_label, relationship.device, (batch,), (batch, 1))
            check_classes("next_sentence_label", next_sentence_label, 2)
            next_sentence_loss = cross_entropy(relationship, next_sentence_label)
        both = loss is not None and next_sentence_label is not None
        output = PreTrainingOutput(
            loss + next_sentence_loss if both else None,
            logits,
            relationship,
            encoded.restored_states(),
            encoded.attentions,
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()


class BertForMaskedLM(BertVocabularyModel):
    """The encoder with the masked-LM head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertHeads(config, masked_lm=True, next_sentence=False)
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """Arguments not listed are those of `BertModel.forward`.

        Args:
            labels: ``[B, T]``, the masked tokens' ids, -100 elsewhere; those on padding are ignored.

        Returns:
            `logits` ``[B, T, V]`` (zeros at padding; ``[labelled, V]`` with ``sparse_prediction`` and labels) and
            with labels `loss`.
        """
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.bert(*given, output_attentions, output_hidden_states, keep_packed=True)
        logits, loss = self._predict(encoded, labels)
        output = HeadOutput(loss, logits, encoded.restored_states(), encoded.attentions)
        return output if self._returns_dict(return_dict) else output.to_tuple()


class BertForNextSentencePrediction(BertPreTrainedModel):
    """The encoder with the next-sentence head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
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
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.bert(*given, output_attentions, output_hidden_states, keep_packed=True)
        logits = self.cls.seq_relationship(encoded.pooler_output)
        loss = None
        if labels is not None:
            check_labels("labels", labels, logits.device, (logits.shape[0],), (logits.shape[0], 1))
            check_classes("labels", labels, 2)
            loss = cross_entropy(logits, labels)
        output = HeadOutput(loss, logits, encoded.restored_states(), encoded.attentions)
        return output if self._returns_dict(return_dict) else output.to_tuple()


class BertForSequenceClassification(BertPreTrainedModel):
    """The encoder with a classifier or regressor on the pooled output."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config)
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
            labels: by ``config.problem_type``: ``"regression"`` numbers ``[B]`` or ``[B, num_labels]``,
                ``"single_label_classification"`` classes ``[B]``, ``"multi_label_classification"`` 0 or 1
                ``[B, num_labels]``. Without a problem type: regression for one label, else the second for integer
                labels and the third for others.

        Returns:
            `logits` ``[B, num_labels]`` and with labels `loss`.
        """
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.bert(*given, output_attentions, output_hidden_states, keep_packed=True)
        logits = self.classifier(self.dropout(encoded.pooler_output))
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        output = HeadOutput(loss, logits, encoded.restored_states(), encoded.attentions)
        return output if self._returns_dict(return_dict) else output.to_tuple()


class BertForTokenClassification(BertPreTrainedModel):
    """The encoder with a classifier on every token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
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
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.bert(*given, output_attentions, output_hidden_states, keep_packed=True)
        layout = encoded.layout
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels("labels", labels, logits.device, (layout.batch, layout.length))
            check_classes("labels", labels, self.num_labels)
            loss = cross_entropy(logits, layout.labels(labels))
        output = HeadOutput(loss, layout.restore(logits), encoded.restored_states(), encoded.attentions)
        return output if self._returns_dict(return_dict) else output.to_tuple()


class BertForQuestionAnswering(BertPreTrainedModel):
    """The encoder with a classifier for where an answer starts and ends.

    Raises:
        ValueError: ``config.num_labels`` is not 2.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels: got {config.num_labels}, wanted 2 (start and end) for question answering")
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
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
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.bert(*given, output_attentions, output_hidden_states, keep_packed=True)
        layout = encoded.layout
        logits = self.qa_outputs(encoded.last_hidden_state)
        logits = layout.restore(logits, fill=torch.finfo(logits.dtype).min)
        start, end = logits[..., 0].contiguous(), logits[..., 1].contiguous()
        loss = None
        if start_positions is not None and end_positions is not None:
            tokens = layout.tokens(logits.device)
            start_loss = span_loss("start_positions", start, start_positions, tokens)
            end_loss = span_loss("end_positions", end, end_positions, tokens)
            loss = (start_loss + end_loss) / 2
        output = QuestionAnsweringOutput(loss, start, end, encoded.restored_states(), encoded.attentions)
        return output if self._returns_dict(return_dict) else output.to_tuple()


class BertForMultipleChoice(BertPreTrainedModel):
    """The encoder with one score for each choice."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
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
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        batch, choices = check_choices(**given)
        flat = {name: None if x is None else x.flatten(0, 1) for name, x in given.items()}
        options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        encoded = self.bert(**flat, **options, keep_packed=True)
        logits = self.classifier(self.dropout(encoded.pooler_output)).view(batch, choices)
        loss = None
        if labels is not None:
            check_labels("labels", labels, logits.device, (batch,), (batch, 1))
            check_classes("labels", labels, choices)
            loss = cross_entropy(logits, labels)
        output = HeadOutput(loss, logits, encoded.restored_states(), encoded.attentions)
        return output if self._returns_dict(return_dict) else output.to_tuple()
