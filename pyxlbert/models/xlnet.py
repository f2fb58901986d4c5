"""XLNet: the encoder with its memories and its two streams, and its heads.

Names of parameters, arguments and outputs are those of `transformers`. What differs is how it is computed: order is
ranks instead of a T×T mask where it can be, the query stream is as many rows as there are targets, the embeddings of
distances are projected once a layer, and padding is removed where no memory is used.

Source:
    Yang et al., "XLNet: Generalized Autoregressive Pretraining for Language Understanding", 2019.
    Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pyxlbert.models.config import ModelConfig
from pyxlbert.models.generation import Generates
from pyxlbert.models.inputs import (
    check_choices,
    check_classes,
    check_device,
    check_ids,
    check_integers,
    check_labels,
    check_range,
    check_shape,
    check_tensors,
    check_tokens,
    check_zero_one,
)
from pyxlbert.models.losses import LOW_PRECISION, classification_loss, cross_entropy, span_loss, widened
from pyxlbert.models.outputs import (
    BeamQuestionAnsweringOutput,
    ModelOutput,
    PackedRecurrentOutput,
    RecurrentHeadOutput,
    RecurrentModelOutput,
    RecurrentQuestionAnsweringOutput,
)
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.nn import (
    HIDDEN_RANK,
    MEMORY_RANK,
    PADDING_RANK,
    DropoutAddLayerNorm,
    LastTable,
    LayerNorm,
    Linear,
    LinearActivation,
    RelativeAttention,
    RelativeLayout,
    TokenLayout,
    activation_kind,
    has_values,
    rows_and_stream,
)

ATTENTION_TYPES = ("bi", "uni")
SUMMARY_TYPES = ("last", "first", "mean", "cls_index")
MASKED_ROWS = ("zero", "uniform")
# What is taken from the logits of places that cannot be an answer; float16 cannot hold the larger one.
MASKED_LOGIT = {torch.float16: 65500.0}
MASKED_LOGIT_ELSE = 1e30


@dataclass(kw_only=True)
class XLNetConfig(ModelConfig):
    """XLNet's configuration, with the defaults of `transformers`.

    `hidden_size`, `num_hidden_layers`, `num_attention_heads` and `n_token` are other names of `d_model`, `n_layer`,
    `n_head` and `vocab_size`, in files and as attributes.

    Fields beyond those of `transformers`:
        untie_r: False makes r_w_bias, r_r_bias and r_s_bias the same for all layers, as in the original code.
        residual_in_fp32: in bfloat16 and float16 models, keep the residual stream between the layers in float32.
        masked_rows: what a row of the query stream gives that may see nothing: ``"zero"``, or ``"uniform"``, the
            average over all keys, as in `transformers`.

    Raises:
        ValueError: a field cannot be honoured; the message names it.
    """

    model_type: ClassVar[str] = "xlnet"
    unsupported: ClassVar[dict[str, tuple]] = {
        **ModelConfig.unsupported,
        "summary_proj_to_labels": (False, None),
    }
    aliases: ClassVar[dict[str, str]] = {
        "n_token": "vocab_size",
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }

    vocab_size: int = 32000
    d_model: int = 1024
    n_layer: int = 24
    n_head: int = 16
    d_inner: int = 4096
    d_head: int | None = None
    ff_activation: str = "gelu"
    attn_type: str = "bi"
    untie_r: bool = True
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    mem_len: int | None = 512
    reuse_len: int | None = None
    use_mems_eval: bool = True
    use_mems_train: bool = False
    bi_data: bool = False
    clamp_len: int = -1
    same_length: bool = False
    summary_type: str = "last"
    summary_use_proj: bool = True
    summary_activation: str | None = "tanh"
    summary_first_dropout: float = 0.0
    summary_last_dropout: float = 0.1
    start_n_top: int = 5
    end_n_top: int = 5
    pad_token_id: int | None = 5
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    residual_in_fp32: bool = True
    masked_rows: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_head is None:
            self.d_head = self.d_model // self.n_head

    def validate(self) -> None:
        super().validate()
        for name in ("vocab_size", "d_model", "n_head", "d_inner", "start_n_top", "end_n_top"):
            self._integer(name, 1)
        self._integer("n_layer", 0)
        self._integer("clamp_len", -1)
        if self.d_model % self.n_head:
            raise ValueError(f"n_head: got {self.n_head}, wanted a divisor of d_model {self.d_model}")
        if self.d_model % 2:
            raise ValueError(f"d_model: got {self.d_model}, wanted an even number: half are sines, half cosines")
        if self.d_head not in (None, self.d_model // self.n_head):
            raise ValueError(f"d_head: got {self.d_head}, wanted d_model / n_head, {self.d_model // self.n_head}")
        for name in ("mem_len", "reuse_len"):
            if getattr(self, name) is not None:
                self._integer(name, 0)
        for name in ("dropout", "summary_first_dropout", "summary_last_dropout"):
            self._number(name, 0, 1)
        self._number("layer_norm_eps", 0)
        self._number("initializer_range", 0)
        activation_kind(self.ff_activation, "ff_activation")
        for name, allowed in (
            ("attn_type", ATTENTION_TYPES),
            ("summary_type", SUMMARY_TYPES),
            ("masked_rows", MASKED_ROWS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted one of {', '.join(allowed)}")
        if self.summary_activation not in (None, "", "tanh"):
            activation_kind(self.summary_activation, "summary_activation")

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> XLNetConfig:
        def renamed(named: dict[str, Any]) -> dict[str, Any]:
            return {cls.aliases.get(name, name): value for name, value in named.items()}

        return super().from_dict(renamed(values), **renamed(overrides))

    @property
    def hidden_size(self) -> int:
        """`d_model`."""
        return self.d_model

    @property
    def num_hidden_layers(self) -> int:
        """`n_layer`."""
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        """`n_head`."""
        return self.n_head


class XLNetRelativeAttention(RelativeAttention):
    """Attention with its residual and LayerNorm."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config.d_model, config.n_head, config.d_head, config.dropout)
        self.layer_norm = DropoutAddLayerNorm(config.d_model, config.layer_norm_eps, config.dropout)


class XLNetFeedForward(nn.Module):
    """The feed-forward network with its residual and LayerNorm."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.layer_norm = DropoutAddLayerNorm(config.d_model, config.layer_norm_eps, config.dropout)
        self.layer_1 = LinearActivation(config.d_model, config.d_inner, config.ff_activation)
        self.layer_2 = Linear(config.d_inner, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor, copy_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Returns the rows for the next product and the residual stream."""
        inner = self.dropout(self.layer_1(x))
        return rows_and_stream(self.layer_norm(self.layer_2(inner), residual, copy_dtype))


Stream = tuple[Tensor, Tensor]  # the rows for the next product and the residual stream, which may be one tensor


class XLNetLayer(nn.Module):
    """One layer: attention and feed-forward network, for one stream or two."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.rel_attn = XLNetRelativeAttention(config)
        self.ff = XLNetFeedForward(config)

    def forward(
        self,
        content: Stream,
        query: Stream | None,
        memory: Tensor | None,
        layout: RelativeLayout,
        copy_dtype: torch.dtype | None = None,
        content_needed: bool = True,
        output_attentions: bool = False,
    ) -> tuple[Stream | None, Stream | None, Any]:
        """One layer.

        Args:
            content: the content stream's rows ``[B, T, E]`` or ``[total, E]``.
            query: the query stream's rows ``[B, M, E]``, or None.
            memory: ``[mem_len, B, E]`` or None.
            layout: what the layers share.
            copy_dtype: the products' dtype where it is not the residual stream's.
            content_needed: False leaves the next content stream out.
            output_attentions: also return the attention weights.

        Returns:
            The next content stream, the next query stream, and the weights or None.
        """
        mixed, target, weights = self.rel_attn(
            content[0],
            None if query is None else query[0],
            memory,
            layout,
            content_needed=content_needed,
            output_attentions=output_attentions,
        )
        content = None if mixed is None else self.finish(mixed, content, copy_dtype)
        query = None if target is None else self.finish(target, query, copy_dtype)
        return content, query, weights

    def finish(self, mixed: Tensor, stream: Stream, copy_dtype: torch.dtype | None) -> Stream:
        """What follows attention: its residual and the feed-forward network."""
        x, residual = rows_and_stream(self.rel_attn.layer_norm(mixed, stream[1], copy_dtype))
        return self.ff(x, residual, copy_dtype)


class XLNetPreTrainedModel(PretrainedModel):
    """What `XLNetModel` and the heads share."""

    config_class = XLNetConfig
    base_model_prefix = "transformer"
    base_parts = ("word_embedding", "mask_emb", "layer")
    required_parts = base_parts
    config: XLNetConfig

    SHARED_BIASES: ClassVar[tuple[str, ...]] = ("r_r_bias", "r_s_bias", "r_w_bias")

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings."""
        return self.base_model.word_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings, and with them a tied decoder.

        Raises:
            TypeError: `value` is no embedding.
            ValueError: the table has another size than the configuration's.
        """
        self._check_embeddings(value, self.config.d_model)
        self.base_model.word_embedding = value
        self.tie_weights()

    def tied_names(self) -> dict[str, str]:
        if self.config.untie_r:
            return {}
        prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
        return {
            f"{prefix}layer.{layer}.rel_attn.{name}": f"{prefix}layer.0.rel_attn.{name}"
            for layer in range(1, self.config.n_layer)
            for name in self.SHARED_BIASES
        }

    def tie_weights(self) -> None:
        if self.config.untie_r:
            return
        layers = self.base_model.layer
        for layer in layers[1:]:
            for name in self.SHARED_BIASES:
                setattr(layer.rel_attn, name, getattr(layers[0].rel_attn, name))

    def _untie(self, names: list[str]) -> None:
        if any("rel_attn" in name for name in names):
            self.config.untie_r = True
        if any("rel_attn" not in name for name in names):
            self.config.tie_word_embeddings = False

    def _tensors_to_save(self) -> dict[str, Tensor]:
        tensors = super()._tensors_to_save()
        for name, same in self.tied_names().items():
            if "rel_attn" in name:
                # transformers has a bias of its own in every layer.
                tensors[name] = tensors[same].detach().clone()
        return tensors

    def _returns_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict


class XLNetModel(XLNetPreTrainedModel):
    """The encoder.

    Args:
        config: the configuration.

    Raises:
        ValueError: a field of the configuration cannot be honoured.
    """

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self.word_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.mask_emb = nn.Parameter(torch.empty(1, 1, config.d_model))
        self.layer = nn.ModuleList([XLNetLayer(config) for _ in range(config.n_layer)])
        self.dropout = nn.Dropout(config.dropout)
        self.checkpointing: dict[str, Any] | None = None
        self.distances = LastTable()
        self.tie_weights()
        self.init_weights()

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
        use_mems: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        target_positions: Tensor | None = None,
        query_rank: Tensor | None = None,
        key_rank: Tensor | None = None,
        mems_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        keep_packed: bool = False,
        reads: str | None = None,
    ) -> ModelOutput | tuple:
        """Encode a batch.

        Args:
            input_ids: ``[B, T]``, integers.
            attention_mask: ``[B, T]`` of 1 (token) and 0 (padding).
            mems: one ``[mem_len, B, E]`` a layer, as an earlier call returned them: tokens before these.
            perm_mask: ``[B, T, T]``, 1 where i (row) may not see j.
            target_mapping: ``[B, M, T]``, 1 where a row of the query stream stands at a place. Rows of one 1, each at
                a place of its own, become positions; any other mapping is computed at every place.
            token_type_ids: ``[B, T]``, integers that int32 holds; only whether two are equal counts. Memories are of
                type 0.
            input_mask: ``[B, T]``, 1 minus `attention_mask`, in place of it.
            inputs_embeds: ``[B, T, E]``, in place of `input_ids` and their table.
            use_mems: whether to return memories; by default the configuration's `use_mems_eval` or `use_mems_train`.
            output_attentions: also return each layer's attention weights, with targets a pair.
            output_hidden_states: also return the embeddings' and each layer's output, with targets of both streams in
                turn.
            return_dict: False returns a plain tuple.
            target_positions: int32 or int64 ``[B, M]``, in place of `target_mapping`: the targets' places, -1 for no
                target.
            query_rank: int32 ``[B, T]``, with `key_rank` in place of `perm_mask`: i may see j where query_rank[i] >
                key_rank[j]; the content stream sees itself too.
            key_rank: int32 ``[B, T]``; memories are seen by all, and 2**31 - 1 by none.
            mems_mask: ``[B, mem_len]``, 1 where a memory is of a token, 0 where it is of padding, which nothing sees.
            cu_seqlens: int32 ``[B + 1]``; the input is packed: `input_ids` and `token_type_ids` are ``[total]``,
                `inputs_embeds` is ``[total, E]``, and so are the outputs.
            max_seqlen: the longest sequence's length, where it is known.
            keep_packed: return rows and their layout as a `PackedRecurrentOutput`, for a head.
            reads: which places a head reads beside the tokens: ``"first"``, ``"last"`` or ``"mean"``; padding is
                computed where it stands at one of them.

        Returns:
            `RecurrentModelOutput`: `last_hidden_state` ``[B, T, E]``, zeros at padding, with targets ``[B, M, E]``;
            `mems`; `hidden_states` and `attentions` where asked for.

        Raises:
            ValueError: an argument has a wrong shape or value, or two exclude each other; the message names it.
            TypeError: an argument has a wrong dtype.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if use_mems is None:
            use_mems = cu_seqlens is None and (config.use_mems_train if self.training else config.use_mems_eval)
        weight = self.word_embedding.weight
        device = weight.device
        check_tensors(
            input_ids=input_ids,
            attention_mask=attention_mask,
            perm_mask=perm_mask,
            target_mapping=target_mapping,
            token_type_ids=token_type_ids,
            input_mask=input_mask,
            inputs_embeds=inputs_embeds,
            target_positions=target_positions,
            query_rank=query_rank,
            key_rank=key_rank,
            mems_mask=mems_mask,
            cu_seqlens=cu_seqlens,
        )
        _, tokens = check_tokens(input_ids, inputs_embeds, config.d_model, device, packed=cu_seqlens is not None)
        if input_ids is not None:
            check_range("input_ids", input_ids, 0, config.vocab_size - 1)
        if cu_seqlens is not None:
            self._check_packed(
                mems=mems,
                attention_mask=attention_mask,
                input_mask=input_mask,
                perm_mask=perm_mask,
                target_mapping=target_mapping,
                target_positions=target_positions,
                query_rank=query_rank,
                key_rank=key_rank,
                mems_mask=mems_mask,
                use_mems=use_mems or None,
                output_attentions=output_attentions or None,
            )
            check_device("cu_seqlens", cu_seqlens, device)
            tokens_layout = TokenLayout.from_cu_seqlens(cu_seqlens, tokens.shape[0], max_seqlen)
            memory = 0
        else:
            batch, length = tokens.shape[:2]
            real = self._real_tokens(attention_mask, input_mask, batch, length, device)
            mems, memory = self._check_mems(mems, batch, device)
            if mems_mask is not None:
                check_device("mems_mask", mems_mask, device)
                check_shape("mems_mask", mems_mask, (batch, memory))
                check_zero_one("mems_mask", mems_mask)
            self._check_order(perm_mask, query_rank, key_rank, batch, length, device)
            # Whether somebody looks at what stands at padding.
            padding_read = use_mems or output_attentions or _reads_padding(reads, real)
            # With a tensor for pairs of places, or places of targets and memories, nothing is left out.
            given = (mems, perm_mask, target_mapping, target_positions)
            whole = padding_read or self._moving_window or any(x is not None for x in given)
            if whole or real is None or not has_values(real) or not _one_piece(real):
                tokens_layout = TokenLayout(batch, length, token_mask=real)
            else:
                tokens_layout = TokenLayout.from_mask(real, batch, length)
        if config.bi_data and tokens_layout.batch % 2:
            raise ValueError(f"bi_data: got a batch of {tokens_layout.batch}, wanted an even one: half reads backwards")
        token_type_ids = check_ids(
            "token_type_ids", token_type_ids, tokens.shape[: tokens.dim() - (input_ids is None)], device
        )
        if token_type_ids is not None:
            check_range("token_type_ids", token_type_ids, -(2**31), 2**31 - 1)
        if cu_seqlens is None:
            target_mapping, target_positions = self._targets(
                target_mapping, target_positions, batch, length, device, weight.dtype, output_attentions
            )
            at_positions = target_positions is not None
            masks = self._masks(
                tokens_layout, memory, mems_mask, perm_mask, query_rank, key_rank, at_positions, padding_read, device
            )
        else:
            masks = {"causal": config.attn_type == "uni"}

        longest = tokens_layout.max_seqlen if tokens_layout.packed else tokens_layout.length
        segments = None if token_type_ids is None else tokens_layout.take(token_type_ids).int()
        layout = RelativeLayout(
            tokens_layout,
            self._positions(longest, longest + memory, masks["causal"], tokens_layout.batch, device),
            query_segments=segments,
            key_segments=segments if segments is None or not memory else F.pad(segments, (memory, 0)),
            target_positions=target_positions,
            target_mapping=target_mapping,
            masked_rows=config.masked_rows,
            **masks,
        )

        stream_dtype, product_dtype, copy_dtype = self.dtypes()
        public = self.public

        def stream(x: Tensor) -> Stream:
            x = self.dropout(x)
            return x.to(product_dtype), x.to(stream_dtype)

        if inputs_embeds is None:
            words = F.embedding(tokens_layout.take(input_ids), weight)
        else:
            words = tokens_layout.take(inputs_embeds).to(weight.dtype)
            if tokens_layout.token_mask is not None:
                # What is computed for nobody begins with zeros; what is read must be finite, so that in no product,
                # here or in a gradient, its zero weight meets a NaN.
                kept = tokens_layout.token_mask[..., None]
                words = torch.where(kept | words.isfinite() if padding_read else kept, words, 0.0)
        content, query = stream(words), None
        if target_positions is not None or target_mapping is not None:
            targets = target_positions if target_mapping is None else target_mapping
            query = stream(self.mask_emb.expand(*targets.shape[:2], -1))

        new_mems = [] if use_mems else None
        seen_mems = mems
        if mems is not None and mems_mask is not None:
            seen_mems = [one.masked_fill(~mems_mask.to(torch.bool).t()[..., None], 0.0) for one in mems]
        states = [] if output_hidden_states else None
        attentions = [] if output_attentions else None

        def keep(content: Stream, query: Stream | None) -> None:
            states.append(tokens_layout.restore(public(content)))
            if query is not None:
                states.append(public(query))

        recompute = self.checkpointing is not None and self.training and torch.is_grad_enabled()
        for index, layer in enumerate(self.layer):
            if use_mems:
                new_mems.append(self._next_memory(public(content), None if mems is None else mems[index]))
            if output_hidden_states:
                keep(content, query)
            last = index == len(self.layer) - 1
            inputs = (
                content,
                query,
                None if seen_mems is None else seen_mems[index],
                layout,
                copy_dtype,
                # The last content rows are for nobody when there are targets.
                query is None or not last or output_hidden_states or output_attentions,
                output_attentions,
            )
            content, query, weights = checkpoint(layer, *inputs, **self.checkpointing) if recompute else layer(*inputs)
            if output_attentions:
                attentions.append(weights)
        if output_hidden_states:
            keep(content, query)

        output = self.dropout(public(content if query is None else query))
        # Targets have no padding among them.
        rows_layout = tokens_layout if query is None else TokenLayout(batch, output.shape[1])
        new_mems = None if new_mems is None else tuple(new_mems)
        states = None if states is None else tuple(states)
        attentions = None if attentions is None else tuple(attentions)
        if keep_packed:
            return PackedRecurrentOutput(output, new_mems, states, attentions, rows_layout)
        result = RecurrentModelOutput(rows_layout.restore(output), new_mems, states, attentions)
        return result if self._returns_dict(return_dict) else result.to_tuple()

    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype | None]:
        """Of the residual stream, of the products, and of the products where it is not the stream's."""
        weight = self.word_embedding.weight
        low = weight.dtype in LOW_PRECISION and self.config.residual_in_fp32
        stream_dtype = torch.float32 if low else weight.dtype
        autocast = torch.is_autocast_enabled(weight.device.type)
        product_dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        return stream_dtype, product_dtype, None if product_dtype == stream_dtype else product_dtype

    def public(self, stream: Stream) -> Tensor:
        """A stream's rows in the parameters' dtype."""
        x, residual = stream
        dtype = self.word_embedding.weight.dtype
        return x if x.dtype == dtype else residual.to(dtype)

    @staticmethod
    def _check_packed(**given: Any) -> None:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: given together with cu_seqlens, wanted a padded batch")

    @staticmethod
    def _real_tokens(
        attention_mask: Tensor | None, input_mask: Tensor | None, batch: int, length: int, device: torch.device
    ) -> Tensor | None:
        """Bool [B, T], True where a token is; None when every place has one."""
        if attention_mask is not None and input_mask is not None:
            raise ValueError("input_mask: given together with attention_mask, wanted one of them")
        name, mask = ("attention_mask", attention_mask) if input_mask is None else ("input_mask", input_mask)
        if mask is None:
            return None
        check_device(name, mask, device)
        check_shape(name, mask, (batch, length))
        check_zero_one(name, mask)
        real = mask.to(torch.bool) if input_mask is None else ~mask.to(torch.bool)
        return None if has_values(real) and bool(real.all()) else real

    def _check_mems(
        self, mems: Sequence[Tensor] | None, batch: int, device: torch.device
    ) -> tuple[Sequence[Tensor] | None, int]:
        """The memories, None where there are none, and their length."""
        if mems is not None and not isinstance(mems, (list, tuple)):
            raise TypeError(f"mems: got {type(mems).__name__}, wanted a list or a tuple with a tensor for every layer")
        if mems is None or all(one is None for one in mems):
            return None, 0
        if len(mems) != self.config.n_layer:
            raise ValueError(f"mems: got {len(mems)} memories, wanted one for each of {self.config.n_layer} layers")
        for one in mems:
            if not isinstance(one, Tensor):
                raise TypeError(f"mems: got {type(one).__name__}, wanted a tensor for every layer")
            if not one.is_floating_point():
                raise TypeError(f"mems: got {one.dtype}, wanted a floating-point dtype")
            if one.dim() != 3 or one.shape[1:] != (batch, self.config.d_model) or one.shape[0] != mems[0].shape[0]:
                wanted = f"[mem_len, {batch}, {self.config.d_model}], the same mem_len in every layer"
                raise ValueError(f"mems: got shape {list(one.shape)}, wanted {wanted}")
            check_device("mems", one, device)
        return (mems, mems[0].shape[0]) if mems[0].shape[0] else (None, 0)

    @staticmethod
    def _targets(
        mapping: Tensor | None,
        positions: Tensor | None,
        batch: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        output_attentions: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mapping or the positions, whichever is computed with; both None without targets."""
        if mapping is not None and positions is not None:
            raise ValueError("target_positions: given together with target_mapping, wanted one of them")
        if positions is not None:
            check_integers("target_positions", positions)
            check_device("target_positions", positions, device)
            if positions.dim() != 2 or positions.shape[0] != batch:
                raise ValueError(f"target_positions: got shape {list(positions.shape)}, wanted [{batch}, M]")
            check_range("target_positions", positions, -1, length - 1)
            return None, positions.int()
        if mapping is None:
            return None, None
        check_device("target_mapping", mapping, device)
        if mapping.dim() != 3 or (mapping.shape[0], mapping.shape[2]) != (batch, length):
            raise ValueError(f"target_mapping: got shape {list(mapping.shape)}, wanted [{batch}, M, {length}]")
        # The weights at every place are what transformers returns, so they are computed at every place.
        found = None if output_attentions else _one_hot_positions(mapping)
        return (mapping.to(dtype), None) if found is None else (None, found)

    def _masks(
        self,
        tokens: TokenLayout,
        memory: int,
        mems_mask: Tensor | None,
        perm_mask: Tensor | None,
        query_rank: Tensor | None,
        key_rank: Tensor | None,
        at_positions: bool,
        padding_read: bool,
        device: torch.device,
    ) -> dict[str, Any]:
        """Who may see whom, as fields of a `RelativeLayout`."""
        if tokens.packed:
            ranks = {} if query_rank is None else {"query_rank": query_rank, "key_rank": key_rank}
            return {"causal": self.config.attn_type == "uni"} | {name: tokens.take(x) for name, x in ranks.items()}
        batch, length = tokens.batch, tokens.length
        keys = memory + length
        padding = None if tokens.token_mask is None else ~tokens.token_mask
        causal, same_length = self.config.attn_type == "uni", self.config.same_length
        numbers = torch.arange(keys, device=device, dtype=torch.int32)
        places = torch.arange(length, device=device, dtype=torch.int32)
        visible = None  # [B or 1, T, Tk]
        if causal and (same_length or (at_positions and (perm_mask is not None or query_rank is not None))):
            visible = (numbers <= places[:, None] + memory)[None]
            if same_length:
                visible = visible & (numbers >= places[:, None])
            causal = False
        # The keys that nothing but themselves may see.
        hidden = (
            None if padding is None and mems_mask is None else torch.zeros(batch, keys, dtype=torch.bool, device=device)
        )
        if mems_mask is not None:
            hidden[:, :memory] = ~mems_mask.to(torch.bool)
        if padding is not None:
            hidden[:, memory:] = padding
        if perm_mask is not None:
            allowed = perm_mask <= 0 if perm_mask.dtype != torch.bool else ~perm_mask
            allowed = F.pad(allowed, (memory, 0), value=True)
            allowed = allowed if hidden is None else allowed & ~hidden[:, None, :]
            visible = allowed if visible is None else visible & allowed
        elif query_rank is not None:
            key_rank = F.pad(key_rank, (memory, 0), value=MEMORY_RANK)
        elif hidden is not None or (causal and at_positions):
            query_rank = torch.zeros(batch, length, dtype=torch.int32, device=device)
            key_rank = torch.full((batch, keys), -1, dtype=torch.int32, device=device)
            if causal and at_positions:
                query_rank = query_rank + places + (memory + 1)
                key_rank = key_rank + numbers + 1
                causal = False
        if key_rank is not None and hidden is not None:
            # The average of masked_rows="uniform" is over padding too.
            own_row = padding_read or self.config.masked_rows == "uniform"
            key_rank = key_rank.masked_fill(hidden, PADDING_RANK if own_row else HIDDEN_RANK)
            key_rank[:, :memory].masked_fill_(hidden[:, :memory], HIDDEN_RANK)
        return {
            "query_rank": query_rank,
            "key_rank": key_rank,
            "attention_mask": None if visible is None else visible[:, None],
            "causal": causal,
        }

    @staticmethod
    def _check_order(
        perm_mask: Tensor | None,
        query_rank: Tensor | None,
        key_rank: Tensor | None,
        batch: int,
        length: int,
        device: torch.device,
    ) -> None:
        if (query_rank is None) != (key_rank is None):
            missing = "query_rank" if query_rank is None else "key_rank"
            raise ValueError(f"{missing}: got None, wanted both query_rank and key_rank or neither")
        if perm_mask is not None:
            if query_rank is not None:
                raise ValueError("perm_mask: given together with query_rank and key_rank, wanted one of the two")
            check_device("perm_mask", perm_mask, device)
            check_shape("perm_mask", perm_mask, (batch, length, length))
        for name, rank in (("query_rank", query_rank), ("key_rank", key_rank)):
            if rank is None:
                continue
            if rank.dtype != torch.int32:
                raise TypeError(f"{name}: got {rank.dtype}, wanted torch.int32")
            check_device(name, rank, device)
            check_shape(name, rank, (batch, length))

    @property
    def _moving_window(self) -> bool:
        """Whether a row sees only so many keys before it, which only a dense mask can say."""
        return self.config.same_length and self.config.attn_type == "uni"

    def _positions(self, queries: int, keys: int, causal: bool, batch: int, device: torch.device) -> Tensor:
        """``[R, E]``, ``[2, R, E]`` or, where dropout makes each sequence's its own, ``[B, R, E]``."""
        table = self.distances.get(
            queries,
            keys,
            self.config.d_model,
            clamp=self.config.clamp_len,
            backwards=self.config.bi_data,
            causal=causal,
            device=device,
            dtype=self.word_embedding.weight.dtype,
        )
        if not self.training or self.dropout.p == 0:
            return table
        if table.dim() == 3:
            return self.dropout(table.repeat_interleave(batch // 2, dim=0))
        return self.dropout(table.expand(batch, -1, -1))

    def _next_memory(self, states: Tensor, memory: Tensor | None) -> Tensor:
        """The last `mem_len` rows of the old memory and the first `reuse_len` rows of these states [B, T, E]."""
        rows = states.detach().transpose(0, 1)
        if self.config.reuse_len:
            rows = rows[: self.config.reuse_len]
        if memory is not None:
            rows = torch.cat([memory.detach().to(rows.dtype), rows])
        return rows[-self.config.mem_len :] if self.config.mem_len else rows


def _reads_padding(reads: str | None, real: Tensor | None) -> bool:
    """Whether padding stands at a place that a head reads."""
    if reads is None or real is None:
        return False
    if not has_values(real):
        return True
    places = {"first": real[:, :1], "last": real[:, -1:], "mean": real}[reads]
    return not bool(places.all())


def _one_piece(real: Tensor) -> bool:
    """Whether the tokens of every row stand side by side: leaving out padding then changes no distance."""
    starts = real[:, 1:] & ~real[:, :-1]
    return real.shape[1] == 0 or bool((starts.sum(1) + real[:, 0] <= 1).all())


def _one_hot_positions(mapping: Tensor) -> Tensor | None:
    """int32 [B, M] for a mapping [B, M, T] whose rows are one-hot or zero, each at its own place; else None."""
    if not has_values(mapping) or mapping.requires_grad or not mapping.shape[2]:
        return None
    ones = mapping == 1
    count = ones.sum(2)
    if not bool((ones | (mapping == 0)).all()) or bool((count > 1).any()) or bool((ones.sum(1) > 1).any()):
        return None
    return torch.where(count == 1, ones.to(torch.uint8).argmax(2), -1).int()


class XLNetLMHeadModel(XLNetPreTrainedModel, Generates):
    """The encoder with logits over the vocabulary; the decoder's weight is the word embeddings'."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self.transformer = XLNetModel(config)
        self.lm_loss = Linear(config.d_model, config.vocab_size)
        self.tie_weights()
        self.init_weights("lm_loss.")

    def tied_names(self) -> dict[str, str]:
        tied = super().tied_names()
        if self.config.tie_word_embeddings:
            tied["lm_loss.weight"] = "transformer.word_embedding.weight"
        return tied

    def tie_weights(self) -> None:
        super().tie_weights()
        if self.config.tie_word_embeddings:
            self.lm_loss.weight = self.transformer.word_embedding.weight

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
    ) -> RecurrentHeadOutput | tuple:
        """Arguments not listed are those of `XLNetModel.forward`.

        Args:
            labels: ``[B, M]``, with no targets ``[B, T]``: token ids, -100 for none; those on padding are ignored.

        Returns:
            `logits` ``[B, M, V]`` or ``[B, T, V]`` (zeros at padding), `mems`, and with labels `loss`.
        """
        encoded = self.transformer(
            input_ids,
            attention_mask,
            mems,
            perm_mask,
            target_mapping,
            token_type_ids,
            input_mask,
            inputs_embeds,
            use_mems,
            output_attentions,
            output_hidden_states,
            target_positions=target_positions,
            query_rank=query_rank,
            key_rank=key_rank,
            mems_mask=mems_mask,
            keep_packed=True,
        )
        layout = encoded.layout
        logits = self.lm_loss(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            check_labels("labels", labels, logits.device, (layout.batch, layout.length))
            check_classes("labels", labels, self.config.vocab_size)
            loss = cross_entropy(logits, layout.labels(labels))
        output = RecurrentHeadOutput(
            loss, layout.restore(logits), encoded.mems, encoded.hidden_states, encoded.attentions
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()


_SUMMARY_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class XLNetSequenceSummary(nn.Module):
    """One vector a sequence: a place of it or the mean of all, a projection and an activation.

    The places are those that `transformers` takes, padding or not: the last place of the row, its first, or all.
    """

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        # Without a place of its own, the classification token is the last.
        self.reads = "last" if config.summary_type == "cls_index" else config.summary_type
        self.summary = Linear(config.d_model, config.d_model) if config.summary_use_proj else nn.Identity()
        name = config.summary_activation
        self.activation = (
            torch.tanh if name == "tanh" else _SUMMARY_ACTIVATIONS[activation_kind(name)] if name else None
        )
        self.first_dropout = nn.Dropout(config.summary_first_dropout)
        self.last_dropout = nn.Dropout(config.summary_last_dropout)

    def forward(self, encoded: PackedRecurrentOutput) -> Tensor:
        """Returns ``[B, E]``."""
        rows, layout = encoded.last_hidden_state, encoded.layout
        if layout.packed:
            # Padding was left out because it is not at the place that is read.
            places = layout.cu_seqlens[1:] - 1 if self.reads == "last" else layout.cu_seqlens[:-1]
            chosen = rows.index_select(0, places)
        else:
            chosen = rows.mean(dim=1) if self.reads == "mean" else rows[:, -1 if self.reads == "last" else 0]
        x = self.summary(self.first_dropout(chosen))
        return self.last_dropout(x if self.activation is None else self.activation(x))


class XLNetForSequenceClassification(XLNetPreTrainedModel):
    """The encoder with a classifier or regressor on the summary."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = XLNetModel(config)
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
        encoded = self.transformer(
            input_ids,
            attention_mask,
            mems,
            perm_mask,
            target_mapping,
            token_type_ids,
            input_mask,
            inputs_embeds,
            use_mems,
            output_attentions,
            output_hidden_states,
            keep_packed=True,
            reads=self.sequence_summary.reads,
        )
        logits = self.logits_proj(self.sequence_summary(encoded))
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        output = RecurrentHeadOutput(loss, logits, encoded.mems, encoded.hidden_states, encoded.attentions)
        return output if self._returns_dict(return_dict) else output.to_tuple()


class XLNetForTokenClassification(XLNetPreTrainedModel):
    """The encoder with a classifier on every token."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = XLNetModel(config)
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
        encoded = self.transformer(
            input_ids,
            attention_mask,
            mems,
            perm_mask,
            target_mapping,
            token_type_ids,
            input_mask,
            inputs_embeds,
            use_mems,
            output_attentions,
            output_hidden_states,
            keep_packed=True,
        )
        layout = encoded.layout
        logits = self.classifier(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            check_labels("labels", labels, logits.device, (layout.batch, layout.length))
            check_classes("labels", labels, self.num_labels)
            loss = cross_entropy(logits, layout.labels(labels))
        output = RecurrentHeadOutput(
            loss, layout.restore(logits), encoded.mems, encoded.hidden_states, encoded.attentions
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()


class XLNetForMultipleChoice(XLNetPreTrainedModel):
    """The encoder with one score for each choice."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self.transformer = XLNetModel(config)
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
        flat = {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "input_mask": input_mask,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
        }
        batch, choices = check_choices(**flat)
        encoded = self.transformer(
            **{name: None if x is None else x.flatten(0, 1) for name, x in flat.items()},
            mems=mems,
            perm_mask=perm_mask,
            target_mapping=target_mapping,
            use_mems=use_mems,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            keep_packed=True,
            reads=self.sequence_summary.reads,
        )
        logits = self.logits_proj(self.sequence_summary(encoded)).view(batch, choices)
        loss = None
        if labels is not None:
            check_labels("labels", labels, logits.device, (batch,), (batch, 1))
            check_classes("labels", labels, choices)
            loss = cross_entropy(logits, labels)
        output = RecurrentHeadOutput(loss, logits, encoded.mems, encoded.hidden_states, encoded.attentions)
        return output if self._returns_dict(return_dict) else output.to_tuple()


class XLNetForQuestionAnsweringSimple(XLNetPreTrainedModel):
    """The encoder with a classifier for where an answer starts and ends.

    Raises:
        ValueError: ``config.num_labels`` is not 2.
    """

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels: got {config.num_labels}, wanted 2 (start and end) for question answering")
        self.num_labels = config.num_labels
        self.transformer = XLNetModel(config)
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
        encoded = self.transformer(
            input_ids,
            attention_mask,
            mems,
            perm_mask,
            target_mapping,
            token_type_ids,
            input_mask,
            inputs_embeds,
            use_mems,
            output_attentions,
            output_hidden_states,
            keep_packed=True,
        )
        layout = encoded.layout
        logits = self.qa_outputs(encoded.last_hidden_state)
        logits = layout.restore(logits, fill=torch.finfo(logits.dtype).min)
        start, end = logits[..., 0].contiguous(), logits[..., 1].contiguous()
        loss = None
        if start_positions is not None and end_positions is not None:
            tokens = layout.tokens(logits.device)
            start_loss = span_loss("start_positions", start, start_positions, tokens)
            loss = (start_loss + span_loss("end_positions", end, end_positions, tokens)) / 2
        output = RecurrentQuestionAnsweringOutput(
            loss, start, end, encoded.mems, encoded.hidden_states, encoded.attentions
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()


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
        x = torch.tanh(self.dense_0(torch.cat([hidden, start_states], dim=-1)))
        return _mask_logits(self.dense_1(self.LayerNorm(x)).squeeze(-1), p_mask)


class XLNetPoolerAnswerClass(nn.Module):
    """Whether there is an answer at all."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        self.dense_0 = Linear(2 * config.d_model, config.d_model)
        self.dense_1 = Linear(config.d_model, 1, bias=False)

    def forward(self, start_states: Tensor, class_states: Tensor) -> Tensor:
        """Two times ``[B, E]`` to ``[B]``."""
        x = torch.tanh(self.dense_0(torch.cat([start_states, class_states], dim=-1)))
        return self.dense_1(x).squeeze(-1)


class XLNetForQuestionAnswering(XLNetPreTrainedModel):
    """The encoder with a search for the best starts, the best end for each, and whether there is an answer."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self.start_n_top = config.start_n_top
        self.end_n_top = config.end_n_top
        self.transformer = XLNetModel(config)
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
        encoded = self.transformer(
            input_ids,
            attention_mask,
            mems,
            perm_mask,
            target_mapping,
            token_type_ids,
            input_mask,
            inputs_embeds,
            use_mems,
            output_attentions,
            output_hidden_states,
            keep_packed=True,
            reads="last" if cls_index is None else None,
        )
        layout = encoded.layout
        batch, length = layout.batch, layout.length
        # Padding that was computed is kept: it may be the place of the classification token.
        hidden = layout.restore(encoded.last_hidden_state) if layout.packed else encoded.last_hidden_state
        if p_mask is not None:
            check_device("p_mask", p_mask, hidden.device)
            check_shape("p_mask", p_mask, (batch, length))
        tokens = layout.tokens(hidden.device)
        if tokens is not None:
            p_mask = ~tokens if p_mask is None else torch.where(tokens, p_mask.to(hidden.dtype), 1.0)
        if cls_index is not None:
            cls_index = self._places("cls_index", cls_index, batch, length)
        start_logits = self.start_logits(hidden, p_mask)
        rest = (encoded.mems, encoded.hidden_states, encoded.attentions)
        if start_positions is not None and end_positions is not None:
            start = self._places("start_positions", start_positions, batch, length)
            end = self._places("end_positions", end_positions, batch, length)
            start_states = _states_at(hidden, start)
            end_logits = self.end_logits(hidden, start_states[:, None].expand_as(hidden), p_mask)
            loss = (cross_entropy(start_logits, start) + cross_entropy(end_logits, end)) / 2
            if cls_index is not None and is_impossible is not None:
                check_shape("is_impossible", is_impossible, (batch,), (batch, 1))
                class_logits = widened(self.answer_class(start_states, _states_at(hidden, cls_index)))
                wanted = is_impossible.reshape(-1).to(class_logits.dtype)
                loss = loss + F.binary_cross_entropy_with_logits(class_logits, wanted) / 2
            output = BeamQuestionAnsweringOutput(loss, None, None, None, None, None, *rest)
        else:
            output = BeamQuestionAnsweringOutput(None, *self._search(hidden, start_logits, cls_index, p_mask), *rest)
        return output if self._returns_dict(return_dict) else output.to_tuple()

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
        start_top, start_index = start_probabilities.topk(self.start_n_top, dim=-1)
        start_states = hidden.gather(1, start_index[..., None].expand(-1, -1, width))  # [B, S, E]
        shape = (batch, length, self.start_n_top, width)
        end_logits = self.end_logits(
            hidden[:, :, None].expand(shape),
            start_states[:, None].expand(shape),
            None if p_mask is None else p_mask[..., None],
        )
        end_top, end_index = torch.softmax(end_logits, dim=1).topk(self.end_n_top, dim=1)  # [B, N, S]
        expected_start = torch.einsum("bte,bt->be", hidden, start_probabilities)
        class_states = hidden[:, -1] if cls_index is None else _states_at(hidden, cls_index)
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
