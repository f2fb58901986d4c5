"""BERT: the encoder. Its heads stand in `bert_heads`.

Names of parameters, arguments and outputs are those of `transformers`. What differs is how rows travel: a 2-D mask
removes the padding before the embeddings, every layer works on the remaining rows ``[total, E]``, and the outputs are
put back in their places at the end, zeros where there is padding.

Source:
    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyxlbert.models.config import MOST_ANYTHING, MOST_LAYERS, MOST_WIDTH, ModelConfig
from pyxlbert.models.inputs import IGNORED, check_device, check_ids, check_tensors, check_tokens
from pyxlbert.models.losses import LOW_PRECISION
from pyxlbert.models.outputs import BaseModelOutputWithPooling, ModelOutput, PackedModelOutput
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.nn import (
    DropoutAddLayerNorm,
    Embeddings,
    Linear,
    LinearActivation,
    SelfAttention,
    TokenLayout,
    activation_kind,
    rows_and_stream,
)
from pyxlbert.nn.encoder_layers import LayerParts, PackedLayers, watched_linear
from pyxlbert.nn.watch import Watch


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
        for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
            self._integer(name, 1, MOST_WIDTH)
        for name in ("vocab_size", "max_position_embeddings", "type_vocab_size"):
            self._integer(name, 1)
        self._integer("num_hidden_layers", 0, MOST_LAYERS)
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
        self._integer("sparse_pred_ignore_index", -MOST_ANYTHING)
        if self.pad_token_id is not None:
            self._integer("pad_token_id", 0)
            if self.pad_token_id >= self.vocab_size:
                raise ValueError(
                    f"pad_token_id: got {self.pad_token_id}, wanted less than vocab_size {self.vocab_size}"
                )

    @property
    def embedding_width(self) -> int:
        """The numbers of an embedding."""
        return self.hidden_size

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


Stream = tuple[Tensor, Tensor]  # the rows for the next product and the residual stream, which may be one tensor


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

    is_encoder_layer = True

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
        mixed, weights = self.attention.self(x, layout, output_attentions)  # as x, and [B, H, T, T]
        x, residual = self.attention.output(mixed, residual, copy_dtype)  # [B, T, E], packed [total, E]
        inner = self.intermediate.dense(x)  # [B, T, F], packed [total, F]
        x, residual = self.output(inner, residual, copy_dtype)  # [B, T, E], packed [total, E]
        return x, residual, weights

    def parts(self, watch: Watch) -> LayerParts:
        """See `PackedLayers`."""
        attention, intermediate = watch.child(self, "attention", BertAttention), watch.child(self, "intermediate")
        own = watch.child(attention, "self", SelfAttention)
        mixed, output = watch.child(attention, "output", BertResidual), watch.child(self, "output", BertResidual)
        for name in ("query", "key", "value"):
            watched_linear(watch, own, name, Linear)
        up = watched_linear(watch, intermediate, "dense", LinearActivation)
        return LayerParts(
            *(own, ("",)),
            (watched_linear(watch, mixed, "dense", Linear), ""),
            (up, ""),
            (watched_linear(watch, output, "dense", Linear), ""),
            watch.child(mixed, "LayerNorm", DropoutAddLayerNorm),
            watch.child(output, "LayerNorm", DropoutAddLayerNorm),
            *(watch.attribute(own, "num_attention_heads"), watch.attribute(own, "head_size")),
            watch.attribute(up, "activation"),
        )


class BertEncoder(nn.Module):
    """The stack of layers."""

    # The packed layers in one call, made at the first use.
    together: PackedLayers | None = None

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])

    def in_one_call(self, stream: Stream, layout: TokenLayout, which: slice = slice(None)) -> Stream | None:
        """Packed layers together, without calling their modules; None where they are to be called one by one."""
        if torch.compiler.is_compiling():
            return None
        if self.together is None:
            self.together = PackedLayers(self._parts)
        return self.together.run(stream, layout, which)

    def _parts(self, watch: Watch) -> list[LayerParts]:
        watch.owner(self)
        layers = watch.child(self, "layer", nn.ModuleList)
        return [watch.child(layers, name, BertLayer).parts(watch) for name in watch.children(layers)]


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
        self._check_embeddings(value, self.config.embedding_width)
        self.base_model.embeddings.word_embeddings = value
        self.tie_weights()


class BertInputs(NamedTuple):
    """The arguments that the encoder and every head take, in the encoder's order; `BertModel.forward` says what they
    are."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None


class _Ran(NamedTuple):
    """What the layers made: the last rows in the parameters' dtype, and of every layer what was asked for."""

    rows: Tensor
    states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class BertModel(BertPreTrainedModel):
    """The encoder.

    Args:
        config: the configuration.
        add_pooling_layer: whether to have the pooler.

    Raises:
        ValueError: a field of the configuration cannot be honoured.
    """

    layers_class: ClassVar[type[nn.Module]] = BertEncoder
    pooler_class: ClassVar[type[nn.Module]] = BertPooler

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(
            config.vocab_size,
            config.embedding_width,
            config.max_position_embeddings,
            config.type_vocab_size,
            padding_idx=config.pad_token_id,
            position_padding_idx=self._position_padding(config),
            eps=config.layer_norm_eps,
            dropout_p=config.hidden_dropout_prob,
        )
        self.encoder = self.layers_class(config)
        self.pooler = self.pooler_class(config) if add_pooling_layer else None
        self.checkpointing: dict[str, Any] | None = None
        self.init_weights()

    @staticmethod
    def _position_padding(config: BertConfig) -> int | None:
        """The row of the position table that is padding's and receives no gradient, if there is one."""
        return None

    @classmethod
    def max_tokens_of(cls, config: BertConfig) -> int:
        """The most tokens of a row: what the position table has rows for."""
        return config.max_position_embeddings

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
            position_ids: ``[B, T]`` or ``[1, T]``; by default the place in the padded row (RoBERTa's family counts
                tokens: see `RobertaModel`).
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
        rows = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        given = BertInputs(
            *rows,
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        self.pack_if_due()
        layout = self._arrange(given, cu_seqlens, max_seqlen)
        stream = self._embed(given, layout)
        ran = self._run(stream, given, layout)
        return self._output(ran, layout, keep_packed, return_dict)

    def _arrange(self, given: BertInputs, cu_seqlens: Tensor | None, max_seqlen: int | None) -> TokenLayout:
        """Checks what was given and says where its tokens lie."""
        config, weight = self.config, self.embeddings.word_embeddings.weight
        check_tensors(
            input_ids=given.input_ids,
            attention_mask=given.attention_mask,
            token_type_ids=given.token_type_ids,
            position_ids=given.position_ids,
            inputs_embeds=given.inputs_embeds,
            cu_seqlens=cu_seqlens,
        )
        packed = cu_seqlens is not None
        name, tokens = check_tokens(
            given.input_ids, given.inputs_embeds, config.embedding_width, weight.device, packed=packed
        )
        if packed:
            self._check_packed(given.attention_mask, given.output_attentions)
            check_device("cu_seqlens", cu_seqlens, tokens.device)
            layout = TokenLayout.from_cu_seqlens(cu_seqlens, tokens.shape[0], max_seqlen)
        else:
            check_device("attention_mask", given.attention_mask, tokens.device)
            layout = TokenLayout.from_mask(given.attention_mask, *tokens.shape[:2])
        if given.position_ids is None:
            self._check_length(name, given, layout)
        if layout.bias is not None:
            layout = replace(layout, bias=layout.bias.to(torch.promote_types(weight.dtype, torch.float32)))
        return layout

    def _check_length(self, name: str, given: BertInputs, layout: TokenLayout) -> None:
        longest, most = layout.max_seqlen if layout.length is None else layout.length, self.max_tokens
        if longest > most:
            raise ValueError(f"{name}: got {longest} tokens a row, wanted at most max_position_embeddings {most}")

    def _positions(self, given: BertInputs, layout: TokenLayout) -> Tensor | None:
        """Rows of the position table, as the caller gave none: ``[B, T]``, packed ``[total]``; None for the places."""
        if not layout.packed:
            return None
        tokens = given.input_ids if given.inputs_embeds is None else given.inputs_embeds[..., 0]
        total = tokens.numel() if layout.indices is None else layout.indices.numel()
        return layout.positions(tokens.device, total)

    def _dtypes(self) -> tuple[torch.dtype, torch.dtype | None]:
        """Of the residual stream, and of the products where it is not the stream's."""
        weight = self.embeddings.word_embeddings.weight
        low = weight.dtype in LOW_PRECISION and self.config.residual_in_fp32
        stream_dtype = torch.float32 if low else weight.dtype
        autocast = torch.is_autocast_enabled(weight.device.type)
        product_dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        return stream_dtype, None if product_dtype == stream_dtype else product_dtype

    def _embed(self, given: BertInputs, layout: TokenLayout) -> Stream:
        """The first layer's rows."""
        tokens = given.input_ids if given.inputs_embeds is None else given.inputs_embeds[..., 0]  # [B, T] or [total]
        shape, device = tokens.shape, tokens.device
        token_type_ids = check_ids("token_type_ids", given.token_type_ids, shape, device)
        position_ids = check_ids("position_ids", given.position_ids, shape, device)
        position_ids = self._positions(given, layout) if position_ids is None else layout.take(position_ids)
        table = None
        if given.inputs_embeds is None:
            rows = layout.take(given.input_ids)  # [B, T], packed [total]
        else:
            # The vectors are a table of their own, and each row looks itself up: one op serves both inputs, and
            # leaving out the padding costs no extra pass.
            dtype = self.embeddings.word_embeddings.weight.dtype
            table = given.inputs_embeds.reshape(-1, self.config.embedding_width).to(dtype)  # [B * T, E]
            rows = torch.arange(tokens.numel(), device=device).view(shape) if layout.indices is None else layout.indices
        stream_dtype, copy_dtype = self._dtypes()
        embedded = self.embeddings(
            rows,
            token_type_ids if token_type_ids is None else layout.take(token_type_ids),
            position_ids,
            word_table=table,
            out_dtype=stream_dtype,
            copy_dtype=copy_dtype,
        )  # [B, T, E], packed [total, E]
        return rows_and_stream(embedded)

    def _public(self, stream: Stream) -> Tensor:
        """A stream's rows in the parameters' dtype."""
        x, residual = stream
        dtype = self.embeddings.word_embeddings.weight.dtype
        return x if x.dtype == dtype else residual.to(dtype)

    def _run(self, stream: Stream, given: BertInputs, layout: TokenLayout) -> _Ran:
        """All layers, and of each what was asked for."""
        copy_dtype = self._dtypes()[1]
        states = [self._public(stream)] if given.output_hidden_states else None
        attentions = [] if given.output_attentions else None
        recompute = self.checkpointing is not None and self.training and torch.is_grad_enabled()
        done, together = None, True
        if not (given.output_attentions or given.output_hidden_states):
            done = self.encoder.in_one_call(stream, layout)
        if done is not None:
            stream = done
        for index, layer in enumerate(self.encoder.layer if done is None else ()):
            if states is not None and attentions is None and together:
                done = self.encoder.in_one_call(stream, layout, slice(index, index + 1))
                together = done is not None
                if done is not None:
                    stream = done
                    states.append(self._public(stream))
                    continue
            inputs = (*stream, layout, copy_dtype, given.output_attentions)
            *stream, weights = checkpoint(layer, *inputs, **self.checkpointing) if recompute else layer(*inputs)
            if states is not None:
                states.append(self._public(stream))
            if attentions is not None:
                attentions.append(weights)
        return _Ran(
            states[-1] if states is not None else self._public(stream),
            None if states is None else tuple(states),
            None if attentions is None else tuple(attentions),
        )

    def _output(
        self, ran: _Ran, layout: TokenLayout, keep_packed: bool, return_dict: bool | None
    ) -> ModelOutput | tuple:
        pooled = self.pooler(layout.first(ran.rows)) if self.pooler is not None else None  # [B, E]
        if keep_packed:
            return PackedModelOutput(ran.rows, pooled, ran.states, ran.attentions, layout)
        states = None if ran.states is None else tuple(layout.restore(state) for state in ran.states)
        last = layout.restore(ran.rows) if states is None else states[-1]  # [B, T, E]
        return self._returned(BaseModelOutputWithPooling(last, pooled, states, ran.attentions), return_dict)

    @staticmethod
    def _check_packed(attention_mask: Tensor | None, output_attentions: bool) -> None:
        if attention_mask is not None:
            raise ValueError("attention_mask: given together with cu_seqlens, wanted one of them")
        if output_attentions:
            raise ValueError("output_attentions: got True for packed input, wanted a padded batch")
