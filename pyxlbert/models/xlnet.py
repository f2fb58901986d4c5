"""XLNet: the encoder with its memories and its two streams. Its heads stand in `xlnet_heads`.

Names of parameters, arguments and outputs are those of `transformers`. What differs is how it is computed: order is
ranks instead of a T×T mask where it can be, the query stream is as many rows as there are targets, the embeddings of
distances are projected once a layer, and padding is removed where no memory is used.

Source:
    Yang et al., "XLNet: Generalized Autoregressive Pretraining for Language Understanding", 2019.
    Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pyxlbert.models.losses import LOW_PRECISION
from pyxlbert.models.outputs import ModelOutput, PackedRecurrentOutput, RecurrentModelOutput
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.models.xlnet_config import XLNetConfig
from pyxlbert.models.xlnet_inputs import Arrangement, XLNetInputs, arrange
from pyxlbert.nn import (
    Dropout,
    DropoutAddLayerNorm,
    LastTable,
    Linear,
    LinearActivation,
    OwnRows,
    RelativeAttention,
    RelativeLayout,
    TokenLayout,
    rows_and_stream,
    sizes_are_fixed,
    words_of,
)
from pyxlbert.nn.encoder_layers import LayerParts, PackedLayers, watched_linear
from pyxlbert.nn.watch import Watch, is_patched, unseen


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
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor, copy_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Returns the rows for the next product and the residual stream."""
        inner = self.dropout(self.layer_1(x))  # [B, T, F], packed [total, F]
        return rows_and_stream(self.layer_norm(self.layer_2(inner), residual, copy_dtype))


Stream = tuple[Tensor, Tensor]  # the rows for the next product and the residual stream, which may be one tensor


class XLNetLayer(nn.Module):
    """One layer: attention and feed-forward network, for one stream or two."""

    is_encoder_layer = True

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
        if mixed is not None and target is not None and self._joins():
            return *self._finish_both(mixed, target, content, query, copy_dtype), weights
        content = None if mixed is None else self.finish(mixed, content, copy_dtype)
        query = None if target is None else self.finish(target, query, copy_dtype)
        return content, query, weights

    def _joins(self) -> bool:
        """Whether what follows attention may be called once for both streams: nobody would see it."""
        after = (self.rel_attn.layer_norm, *self.ff.modules())
        return self.training and not is_patched(self) and unseen(after)

    def parts(self, watch: Watch) -> LayerParts:
        """See `PackedLayers`."""
        attention, ff = watch.child(self, "rel_attn", XLNetRelativeAttention), watch.child(self, "ff", XLNetFeedForward)
        for name in ("q", "k", "v", "o", "r"):
            watch.parameter(attention, name)
        up = watched_linear(watch, ff, "layer_1", LinearActivation)
        watch.child(ff, "dropout", Dropout)
        return LayerParts(
            *(attention, ("q", "kv")),
            (attention, "o"),
            (up, ""),
            (watched_linear(watch, ff, "layer_2", Linear), ""),
            watch.child(attention, "layer_norm", DropoutAddLayerNorm),
            watch.child(ff, "layer_norm", DropoutAddLayerNorm),
            *(watch.attribute(attention, "num_attention_heads"), watch.attribute(attention, "head_size")),
            watch.attribute(up, "activation"),
            "r",
            ("r_w_bias", "r_r_bias", "r_s_bias", "seg_embed"),
        )

    def _finish_both(
        self, mixed: Tensor, target: Tensor, content: Stream, query: Stream, copy_dtype: torch.dtype | None
    ) -> tuple[Stream, Stream]:
        """`finish` of both streams in one: see `in_one`."""
        rows = [torch.cat([one.flatten(0, -2) for one in pair]) for pair in ((mixed, target), (content[1], query[1]))]
        done = self.finish(rows[0], (rows[0], rows[1]), copy_dtype)  # [rows of both, E] twice
        shapes = (mixed.shape[:-1], target.shape[:-1])
        sizes = [one.numel() for one in shapes]
        first = [part.unflatten(0, shape) for part, shape in zip(done[0].split(sizes), shapes, strict=True)]
        if done[1] is done[0]:
            return (first[0], first[0]), (first[1], first[1])
        second = [part.unflatten(0, shape) for part, shape in zip(done[1].split(sizes), shapes, strict=True)]
        return (first[0], second[0]), (first[1], second[1])

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


class _Ran(NamedTuple):
    """What the layers made: the last streams, and of every layer what was asked for."""

    content: Stream | None
    query: Stream | None
    mems: tuple[Tensor, ...] | None
    states: tuple[Tensor, ...] | None
    attentions: tuple | None


class XLNetModel(XLNetPreTrainedModel):
    """The encoder.

    Args:
        config: the configuration.

    Raises:
        ValueError: a field of the configuration cannot be honoured.
    """

    # The packed layers in one call, made at the first use.
    together: PackedLayers | None = None

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__(config)
        self.word_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.mask_emb = nn.Parameter(torch.empty(1, 1, config.d_model))
        self.layer = nn.ModuleList([XLNetLayer(config) for _ in range(config.n_layer)])
        self.dropout = Dropout(config.dropout)
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
        if use_mems is None:
            use_mems = cu_seqlens is None and (config.use_mems_train if self.training else config.use_mems_eval)
        rows = (input_ids, attention_mask, mems, perm_mask, target_mapping, token_type_ids, input_mask, inputs_embeds)
        given = XLNetInputs(
            *rows,
            use_mems,
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            target_positions,
            query_rank,
            key_rank,
            mems_mask,
            cu_seqlens,
            max_seqlen,
            reads,
        )
        self.pack_if_due()
        arranged = arrange(given, config, self.word_embedding.weight)
        layout = self._layout(arranged)
        content, query = self._embed(given, arranged)
        ran = self._run(content, query, given, arranged, layout)
        return self._output(ran, arranged, keep_packed, return_dict)

    def _layout(self, arranged: Arrangement) -> RelativeLayout:
        """What the attention of all layers shares."""
        tokens, memory, longest = arranged.tokens, arranged.memory, arranged.longest
        types = arranged.token_types
        segments = None if types is None else tokens.take(types).int()  # [B, T], packed [total]
        keys = segments if segments is None or not memory else F.pad(segments, (memory, 0))  # [B, Tk]
        positions, own_rows = self._positions(longest, longest + memory, arranged.masks["causal"], tokens)
        return RelativeLayout(
            tokens,
            positions,
            own_rows=own_rows,
            query_segments=segments,
            key_segments=keys,
            target_positions=arranged.target_positions,
            target_mapping=arranged.target_mapping,
            masked_rows=self.config.masked_rows,
            **arranged.masks,
        )

    def _positions(self, queries: int, keys: int, causal: bool, tokens: TokenLayout) -> tuple[Tensor, OwnRows | None]:
        """``[R, E]`` or ``[2, R, E]``; where dropout makes each sequence's its own, ``[B, R, E]``, or of packed
        sequences those rows that they meet ``[N, E]``, and which they are. Those are rounded for all layers at once.
        """
        weight = self.word_embedding.weight
        table = self.distances.get(
            queries,
            keys,
            self.config.d_model,
            clamp=self.config.clamp_len,
            backwards=self.config.bi_data,
            causal=causal,
            device=weight.device,
            dtype=weight.dtype,
        )
        if not self.training or self.dropout.p == 0:
            return table, None
        own = None
        if tokens.packed and not sizes_are_fixed():
            own = OwnRows.of(tokens.cu_seqlens, queries, table.shape[-2])
            table = own.take(table)
        elif table.dim() == 3:
            table = table.repeat_interleave(tokens.batch // 2, dim=0)
        else:
            table = table.expand(tokens.batch, -1, -1)
        return self.dropout(table).to(self.dtypes()[1]), own

    def _embed(self, given: XLNetInputs, arranged: Arrangement) -> tuple[Stream, Stream | None]:
        """The content stream, and the query stream where there are targets."""
        weight, tokens = self.word_embedding.weight, arranged.tokens
        if given.inputs_embeds is None:
            words = words_of(tokens.take(given.input_ids), weight)  # [B, T, E], packed [total, E]
        else:
            words = tokens.take(given.inputs_embeds).to(weight.dtype)  # [B, T, E], packed [total, E]
            if tokens.token_mask is not None:
                # What is computed for nobody begins with zeros; what is read must be finite, so that in no product,
                # here or in a gradient, its zero weight meets a NaN.
                kept = tokens.token_mask[..., None]  # [B, T, 1]
                words = torch.where(kept | words.isfinite() if arranged.padding_read else kept, words, 0.0)
        content = self._stream(words)
        if arranged.target_shape is None:
            return content, None
        return content, self._stream(self.mask_emb.expand(*arranged.target_shape, -1))  # [B, M, E]

    def _stream(self, x: Tensor) -> Stream:
        """Embeddings as what the first layer takes."""
        stream_dtype, product_dtype, _ = self.dtypes()
        x = self.dropout(x)
        return x.to(product_dtype), x.to(stream_dtype)

    def _run(
        self,
        content: Stream,
        query: Stream | None,
        given: XLNetInputs,
        arranged: Arrangement,
        layout: RelativeLayout,
    ) -> _Ran:
        """All layers, and of each what was asked for."""
        copy_dtype = self.dtypes()[2]
        public, all_kept = self.public, given.output_hidden_states or given.output_attentions
        mems: list[Tensor] = []
        states: list[Tensor] = []
        attentions: list[Any] = []

        def keep(content: Stream, query: Stream | None) -> None:
            states.append(layout.tokens.restore(public(content)))  # [B, T, E]
            if query is not None:
                states.append(public(query))  # [B, M, E]

        recompute = self.checkpointing is not None and self.training and torch.is_grad_enabled()
        alone = query is None and arranged.seen_mems is None and not given.output_attentions
        step = 1 if given.use_mems or given.output_hidden_states else len(self.layer)
        for index, layer in enumerate(self.layer):
            if given.use_mems:
                old = None if arranged.mems is None else arranged.mems[index]
                mems.append(self._next_memory(public(content), old))
            if given.output_hidden_states:
                keep(content, query)
            if alone and index % step == 0:
                done = self._in_one_call(content, layout, slice(index, index + step))
                alone = done is not None
                if done is not None:
                    content = done
                    if step > 1:
                        break
                    continue
            last = index == len(self.layer) - 1
            inputs = (
                content,
                query,
                None if arranged.seen_mems is None else arranged.seen_mems[index],
                layout,
                copy_dtype,
                # The last content rows are for nobody when there are targets.
                query is None or not last or all_kept,
                given.output_attentions,
            )
            content, query, weights = checkpoint(layer, *inputs, **self.checkpointing) if recompute else layer(*inputs)
            if given.output_attentions:
                attentions.append(weights)
        if given.output_hidden_states:
            keep(content, query)
        return _Ran(
            content,
            query,
            tuple(mems) if given.use_mems else None,
            tuple(states) if given.output_hidden_states else None,
            tuple(attentions) if given.output_attentions else None,
        )

    def _in_one_call(self, content: Stream, layout: RelativeLayout, which: slice) -> Stream | None:
        """Packed layers together, without calling their modules; None where they are to be called one by one."""
        if torch.compiler.is_compiling():
            return None
        if self.together is None:
            self.together = PackedLayers(self._parts)
        return self.together.run(content, layout, which)

    def _parts(self, watch: Watch) -> list[LayerParts]:
        layers = watch.child(self, "layer", nn.ModuleList)
        return [watch.child(layers, name, XLNetLayer).parts(watch) for name in watch.children(layers)]

    def _next_memory(self, states: Tensor, memory: Tensor | None) -> Tensor:
        """The last `mem_len` rows of the old memory and the first `reuse_len` rows of these states [B, T, E]."""
        rows = states.detach().transpose(0, 1)  # [T, B, E]
        if self.config.reuse_len:
            rows = rows[: self.config.reuse_len]
        if memory is not None:
            rows = torch.cat([memory.detach().to(rows.dtype), rows])
        return rows[-self.config.mem_len :] if self.config.mem_len else rows

    def _output(
        self, ran: _Ran, arranged: Arrangement, keep_packed: bool, return_dict: bool | None
    ) -> ModelOutput | tuple:
        rows = self.dropout(self.public(ran.content if ran.query is None else ran.query))  # as a stream
        # Targets have no padding among them.
        layout = arranged.tokens if ran.query is None else TokenLayout(*arranged.target_shape)
        rest = (ran.mems, ran.states, ran.attentions)
        if keep_packed:
            return PackedRecurrentOutput(rows, *rest, layout)
        return self._returned(RecurrentModelOutput(layout.restore(rows), *rest), return_dict)

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
