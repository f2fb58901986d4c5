"""Funnel: attention of pooled queries with a term of the distance, from which the first place is left out.

With `separate_cls` neither the first query nor the first key has a term of the distance or of the segment.  The first
query is attention without them, on its own; of the first key they are known for each query, and one more element of
query and key takes them away again.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxlbert.backends import use_backend
from pyxlbert.integrations.attention import shortest
from pyxlbert.integrations.modules import ReplacedLinear, dropout_of
from pyxlbert.integrations.swap import Replaced, Settings, can_look, is_as_set, watched
from pyxlbert.nn import linear_activation
from pyxlbert.ops.attention import attention
from pyxlbert.ops.dropout_add_layer_norm import dropout_add_layer_norm
from pyxlbert.ops.relative_attention import relative_attention


@dataclass(frozen=True)
class Segments:
    """Token types of queries ``[B, Tq]`` and keys ``[B, Tk]``, in the place of a matrix ``[B, Tq, Tk]``."""

    query: Tensor
    key: Tensor

    def matrix(self, cls_type: int) -> Tensor:
        """True where both are of one segment; that of `cls_type` is part of every other."""
        same = self.query[:, :, None] == self.key[:, None]
        return same | (self.query == cls_type)[:, :, None] | (self.key == cls_type)[:, None]


class Structure(Replaced):
    """What all attention of a model shares: token types stay one a place, and there is no mask of the first place."""

    remembers = True

    def init_attention_inputs(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> tuple:
        if token_type_ids is None or not self._plain(token_type_ids):
            return super().init_attention_inputs(inputs_embeds, attention_mask, token_type_ids)
        self.pooling_mult = 1
        self.seq_len = inputs_embeds.shape[1]
        distances = self.get_position_embeds(self.seq_len, inputs_embeds.dtype, inputs_embeds.device)
        return distances, Segments(token_type_ids, token_type_ids), attention_mask, None

    def _plain(self, types: Tensor) -> bool:
        """Whether segments that have a term are equal or not, and none is part of every other."""
        # What it notes of a call is no setting; a method put on the instance would see types in our form.
        if not can_look(types) or not is_as_set(self, self._pyxlbert_settings._replace(values=())):
            return False
        seen = types[:, 1:] if self.config.separate_cls else types
        return not bool((seen == self.cls_token_type_id).any())

    def stride_pool(self, tensor: Any, axis: Any) -> Any:
        if not isinstance(tensor, Segments):
            return super().stride_pool(tensor, axis)
        axes = axis if isinstance(axis, list | tuple) else [axis]
        query, key = (
            super(Structure, self).stride_pool(ids, 1) if place in axes else ids
            for place, ids in ((1, tensor.query), (2, tensor.key))
        )
        return Segments(query, key)


@dataclass(frozen=True)
class FunnelState:
    """What a layer knows: the activation's kind or None, class and settings; the type that is part of every segment."""

    activation: str | None
    cls_type: int
    kind: type[nn.Module]
    settings: Settings


class FunnelAttention(Replaced):
    """Attention of a layer with its residual, in memory linear in the length; asked for weights it is as it was."""

    remembers = True

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_inputs: tuple, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        distances, segments, mask, cls_mask = attention_inputs
        if not isinstance(segments, Segments):
            return super().forward(query, key, value, attention_inputs, output_attentions=output_attentions)
        if output_attentions or not self._usual():
            if self.config.separate_cls:
                ones = query.new_ones(query.shape[1] - 1, key.shape[1] - 1)
                cls_mask = F.pad(ones, (1, 0, 1, 0))
            dense = (distances, segments.matrix(self._pyxlbert.cls_type), mask, cls_mask)
            return super().forward(query, key, value, dense, output_attentions=output_attentions)
        split = (self.config.n_head, self.config.d_head)
        q, k, v = (
            layer(x).unflatten(-1, split)
            for layer, x in ((self.q_head, query), (self.k_head, key), (self.v_head, value))
        )  # [B, T, H, D]
        # Of pooled queries each stands two keys further than the one before.
        step = 1 if q.shape[1] == k.shape[1] else 2
        table = distances[self.block_index][step - 1] @ self.r_kernel.flatten(1)
        masks = {}
        if mask is not None:
            short = shortest(mask.ne(0))
            if short is not None:
                masks = {"key_lengths": short} if short.dim() == 1 else {"attention_mask": short[:, None, None, :]}
        options = masks | {"scale": self.scale, "dropout_p": dropout_of(self.attention_dropout)}
        mixed = self._mix(q, k, v, table.unflatten(-1, split), segments, step, options)  # [B, Tq, H, D]
        rows = self.post_proj(mixed.flatten(2))
        return (_residual(rows, query, self.hidden_dropout, self.layer_norm),)

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, segments: Segments, step: int, options: dict[str, Any]
    ) -> Tensor:
        # r_s_bias and its embedding: first of other segments, then of the same.
        biases = [self.r_w_bias, self.r_r_bias, self.r_s_bias]
        embedding = self.seg_embed.flip(0)
        offset, types = step * q.shape[1], segments.query
        first = None
        if self.config.separate_cls:
            first = attention(q[:, :1] + self.r_w_bias, k, v, **options)
            q, types, offset = q[:, 1:], types[:, 1:], offset - step
            # What the first key would get: at step s query i meets it at row offset - s * i.
            rows = table[offset - step * torch.arange(q.shape[1], device=q.device)]  # [Tq, H, D]
            same = (types == segments.key[:, :1])[:, :, None, None]
            segment = torch.where(same, embedding[0], embedding[1])  # [B, Tq, H, D]
            excess = ((q + self.r_r_bias) * rows + (q + self.r_s_bias) * segment).sum(-1, keepdim=True)
            one = torch.zeros_like(k[..., :1])
            one[:, 0] = 1
            q, k = torch.cat([q, -excess], -1), torch.cat([k, one], -1)
            v, table, embedding, *biases = (F.pad(x, (0, 1)) for x in (v, table, embedding, *biases))
        if step > 1:
            places = step * torch.arange(q.shape[1], device=q.device, dtype=torch.int32)
            options = options | {"query_positions": places.expand(q.shape[0], -1).contiguous()}
        mixed = relative_attention(
            q,
            k,
            v,
            table,
            content_bias=biases[0],
            position_bias=biases[1],
            segment_bias=biases[2],
            segment_embedding=embedding,
            query_segments=types.contiguous(),
            key_segments=segments.key,
            offset=offset,
            **options,
        )
        return mixed if first is None else torch.cat([first, mixed[..., :-1]], 1)

    def _usual(self) -> bool:
        plain = _plain(self.attention_dropout, nn.Dropout) and _plain_residual(self.hidden_dropout, self.layer_norm)
        return plain and self.is_as_set()


class FunnelFeedForward(Replaced):
    """A feed-forward network with its residual."""

    remembers = True

    def forward(self, hidden: Tensor) -> Tensor:
        kind, up = self._pyxlbert.activation, self.linear_1
        if not (self.is_as_set() and _plain_residual(self.dropout, self.layer_norm)):
            return super().forward(hidden)
        fused = kind is not None and isinstance(up, ReplacedLinear) and not watched(up)
        activation, known = self.activation_function, self._pyxlbert
        fused = fused and type(activation) is known.kind and is_as_set(activation, known.settings)
        if fused and not watched(activation):
            inner = linear_activation(up, hidden, kind)
        else:
            inner = self.activation_function(up(hidden))
        return _residual(self.linear_2(self.activation_dropout(inner)), hidden, self.dropout, self.layer_norm)


def _plain(module: Any, kind: type[nn.Module]) -> bool:
    return type(module) is kind and not watched(module)


def _plain_residual(dropout: Any, norm: Any) -> bool:
    return _plain(dropout, nn.Dropout) and _plain(norm, nn.LayerNorm)


def _residual(x: Tensor, residual: Tensor, dropout: nn.Dropout, norm: nn.LayerNorm) -> Tensor:
    return dropout_add_layer_norm(x, residual, norm.weight, norm.bias, dropout_p=dropout_of(dropout), eps=norm.eps)


@dataclass(frozen=True)
class FunnelModelState:
    """What a model knows: whose kernels run, or None."""

    backend: str | None


class Funnel(Replaced):
    """A model of Funnel; all that is replaced is inside it."""

    keeps_signature = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        backend = self._pyxlbert.backend
        with nullcontext() if backend is None else use_backend(backend):
            return super().forward(*args, **kwargs)
