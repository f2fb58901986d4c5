"""What stands in the place of transformers' modules: the same parameters under the same names, run by our ops.

Each one does what it can prove and leaves the rest to the class that it replaced: a module that somebody watches, that
was exchanged, or an argument that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyxlbert.backends import use_backend
from pyxlbert.integrations import together
from pyxlbert.integrations.architecture import EmbeddingParts, LayerParts, Stack
from pyxlbert.integrations.swap import (
    Replaced,
    Settings,
    at,
    can_look,
    is_as_set,
    recorded,
    settings_of,
    watched,
    watched_anywhere,
)
from pyxlbert.nn import Linear, TokenLayout, attend, linear_activation
from pyxlbert.nn.embeddings import without_gradient_of_padding
from pyxlbert.nn.encoder_layers import LayerParts as PartsOfLayer
from pyxlbert.nn.encoder_layers import PackedLayers
from pyxlbert.nn.packing import Packable
from pyxlbert.nn.watch import Watch, hooked_everywhere
from pyxlbert.ops.dropout_add_layer_norm import dropout_add_layer_norm
from pyxlbert.ops.embedding_layer_norm import embedding_layer_norm

# Attention of transformers that takes a mask [B, 1, 1, T]: boolean, or for "eager" added to the scores.
IMPLEMENTATIONS = ("eager", "sdpa", "pyxlbert")

# Arguments that change nothing inside a layer.
HARMLESS = ("position_ids", "output_hidden_states", "return_dict", "use_cache")

Path = tuple[str, ...]


class Skipped(NamedTuple):
    """A module that an op stands for: its path, class, that class's `forward`, and how it was set."""

    path: Path
    kind: type[nn.Module]
    forward: Any
    settings: Settings

    @classmethod
    def of(cls, parent: nn.Module, path: Path) -> Skipped:
        """The module at a path as it is now."""
        module = at(parent, path)
        return cls(path, type(module), type(module).forward, settings_of(module))


# The modules of a layer, by their names in `LayerParts`.
MODULES = (
    *("query", "key", "value", "attention_dropout", "out", "out_dropout", "out_norm"),
    *("up", "activation", "down", "down_dropout", "norm"),
)


def path_of(name: str) -> Path:
    """The names of a path with dots."""
    return tuple(name.split("."))


class ReplacedLinear(Replaced, Linear):
    """`torch.nn.Linear`, computed by the op `linear`."""


def dropout_of(module: nn.Dropout | None) -> float:
    """The probability with which a module drops now."""
    return module.p if module is not None and module.training else 0.0


def asked(kwargs: dict[str, Any], config: Any, *names: str) -> bool:
    """Whether one of these outputs is asked for."""
    return any(kwargs.get(name) or getattr(config, name, False) for name in names)


@dataclass(frozen=True, eq=False)
class LayerState:
    """What a layer knows.

    Attributes:
        parts: where its modules are.
        paths: the same, by the names of `MODULES`, of those that the layer has.
        skipped: the modules that are computed by an op in their place.
        heads: H.
        activation: what `activation_kind` returns; None: a module that is called.
        tuples: whether it returns a tuple, as it does in some versions of transformers.
        bias_at: which of its arguments after the mask is the bias, or None.
        config: the model's.
        implementation: of attention, as the configuration named it.
        forward: the replaced class's.
    """

    parts: LayerParts
    paths: Mapping[str, Path]
    skipped: tuple[Skipped, ...]
    heads: int
    activation: str | None
    tuples: bool
    bias_at: int | None
    config: Any
    implementation: str | None
    forward: Any


class Layer(Replaced, Packable):
    """A post-norm layer: attention, residual, feed-forward network, residual.

    The mask may be a `TokenLayout`: the rows are then packed ``[total, E]``.  Its packed product is query, key and
    value side by side.
    """

    is_encoder_layer = True
    remembers = True

    def packed_layers(self, product: str = "") -> Any:
        return tuple(at(self, self._pyxlbert.paths[name]) for name in ("query", "key", "value"))

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        state: LayerState = self._pyxlbert
        bias, others, place = kwargs.get("position_bias"), args, state.bias_at
        if place is not None and len(args) > place:
            bias, others = args[place], (*args[:place], *args[place + 1 :])
        if not self._usual(attention_mask, others, kwargs):
            return self._by_modules(hidden_states, attention_mask, args, kwargs)
        layout = _layout(attention_mask, hidden_states)
        if bias is not None and not layout.packed:
            layout = replace(layout, bias=bias if layout.bias is None else layout.bias + bias)
        rows = self._rows(hidden_states, layout, bias)
        return (rows,) if state.tuples else rows

    def _usual(self, mask: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether nobody watches a module that is skipped, each is the one that was found, and all arguments known."""
        if not (mask is None or isinstance(mask, TokenLayout) or (isinstance(mask, Tensor) and mask.dim() == 4)):
            return False
        if not _harmless(args, {name: value for name, value in kwargs.items() if not self._knows(name)}):
            return False
        state: LayerState = self._pyxlbert
        now = getattr(state.config, "_attn_implementation", None)
        if self.pyxlbert_original.forward is not state.forward or now not in (state.implementation, *IMPLEMENTATIONS):
            return False
        if any(getattr(at(self, state.paths[name]), "bias", None) is None for name in ("out_norm", "norm")):
            return False
        # Hidden states are recorded where layers are called, which they still are.
        keys = recorded()
        keys = None if keys is None else keys - {"hidden_states", "_hidden_states_layers"}
        return self.is_as_set() and _as_found(self, self._pyxlbert.skipped, keys)

    def as_set_inside(self) -> bool:
        """Whether this layer's settings, and those of the modules that it stands for, still are what they were."""
        skipped = self._pyxlbert.skipped
        return self.is_as_set() and all(is_as_set(at(self, one.path), one.settings) for one in skipped)

    def _knows(self, name: str) -> bool:
        return name == "position_bias" and self._pyxlbert.parts.biased

    def _rows(self, x: Tensor, layout: TokenLayout, bias: Tensor | None) -> Tensor:
        state: LayerState = self._pyxlbert
        part = {name: at(self, path) for name, path in state.paths.items()}
        heads = (state.heads, -1)
        side_by_side = self.packed_product(x)
        if side_by_side is None:
            query, key, value = (part[name](x).unflatten(-1, heads) for name in ("query", "key", "value"))
        else:
            query, key, value = side_by_side.unflatten(-1, (3, *heads)).unbind(-3)
        dropout_p = self._attention_dropout(part.get("attention_dropout"))
        if layout.packed and bias is not None:
            # A bias is by the places of the padded batch.
            there = TokenLayout(layout.batch, layout.length, attention_mask=_keys(layout, x), bias=bias)
            padded = (layout.restore(one) for one in (query, key, value))  # [B, T, H, D]
            mixed = layout.take(attend(*padded, there, dropout_p)[0])  # [total, E]
        else:
            mixed = attend(query, key, value, layout, dropout_p)[0]  # as x
        x = _residual(part["out"](mixed), x, part.get("out_dropout"), part["out_norm"])
        inner = self._inner(x, part["up"], part["activation"], state.activation)  # [B, T, F], packed [total, F]
        return _residual(part["down"](inner), x, part.get("down_dropout"), part["norm"])

    def _attention_dropout(self, dropout: nn.Dropout | None) -> float:
        """The interface of attention drops where the module of attention is in training mode, not its dropout."""
        state: LayerState = self._pyxlbert
        if dropout is None or state.parts.biased:
            return dropout_of(dropout)
        return dropout.p if at(self, state.paths["attention_dropout"][:-1]).training else 0.0

    @staticmethod
    def _inner(x: Tensor, up: nn.Module, activation: Any, kind: str | None) -> Tensor:
        if kind is not None and isinstance(up, ReplacedLinear) and not watched(up):
            return linear_activation(up, x, kind)
        return activation(up(x))

    def _by_modules(self, hidden_states: Tensor, mask: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """As the class that was replaced computes it, padded."""
        state: LayerState = self._pyxlbert
        layout = mask if isinstance(mask, TokenLayout) else None
        if layout is not None:
            hidden_states, mask = layout.restore(hidden_states), _keys(layout, hidden_states)
        output = super().forward(hidden_states, native_mask(mask, hidden_states.dtype, state), *args, **kwargs)
        if layout is None:
            return output
        if isinstance(output, tuple):
            return (layout.take(output[0]), *output[1:])
        return layout.take(output)


def _harmless(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether arguments after the mask change nothing inside a layer."""
    given = (*args, *(value for name, value in kwargs.items() if name not in HARMLESS))
    return all(one is None or one is False for one in given)


def _as_found(module: nn.Module, skipped: tuple[Skipped, ...], recording: frozenset[str] | None) -> bool:
    """Whether every part that is skipped is what was found there, and neither patched nor watched."""
    if hooked_everywhere():
        return False
    for one in skipped:
        part = at(module, one.path)
        if type(part) is not one.kind or one.kind.forward is not one.forward or watched(part, recording):
            return False
        if not is_as_set(part, one.settings):
            return False
    return True


def native_mask(mask: Any, dtype: torch.dtype, state: LayerState) -> Any:
    """A boolean mask as the replaced layer takes it: added to the scores, where its attention is plain code."""
    additive = state.parts.biased or getattr(state.config, "_attn_implementation", None) in ("eager", None)
    if not (additive and isinstance(mask, Tensor) and mask.dtype is torch.bool):
        return mask
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)


def _layout(mask: Any, x: Tensor) -> TokenLayout:
    if isinstance(mask, TokenLayout):
        return mask
    if mask is None:
        return TokenLayout(*x.shape[:2])
    if mask.is_floating_point():
        return TokenLayout(*x.shape[:2], bias=mask)
    return TokenLayout(*x.shape[:2], attention_mask=mask.to(torch.bool))


def _keys(layout: TokenLayout, x: Tensor) -> Tensor | None:
    """The layout as a mask of keys ``[B, 1, 1, T]``, True where a token is."""
    tokens = layout.tokens(x.device)
    return None if tokens is None else tokens[:, None, None, :]


def _residual(x: Tensor, residual: Tensor, dropout: nn.Dropout | None, norm: nn.LayerNorm) -> Tensor:
    return dropout_add_layer_norm(x, residual, norm.weight, norm.bias, dropout_p=dropout_of(dropout), eps=norm.eps)


@dataclass(frozen=True, eq=False)
class EmbeddingState:
    """What embeddings know: where their modules are, and which an op stands for."""

    parts: EmbeddingParts
    skipped: tuple[Skipped, ...]


class Embeddings(Replaced):
    """Word, position and token-type embeddings with their LayerNorm and dropout, in one pass."""

    remembers = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        parts: EmbeddingParts = self._pyxlbert.parts
        given = dict(zip(parts.arguments, args, strict=False)) | kwargs
        ids, places, types = (given.pop(name, None) for name in ("input_ids", "position_ids", "token_type_ids"))
        # Ready-made vectors, or tokens after others.
        others = any(value is not None and not (type(value) is int and value == 0) for value in given.values())
        if ids is None or others or (types is not None and parts.token_type is None) or not self._usual():
            return super().forward(*args, **kwargs)
        if not self._counts(ids, places, types):
            return super().forward(*args, **kwargs)
        word, position = getattr(self, parts.word), getattr(self, parts.position)
        norm, kinds = getattr(self, parts.norm), None if parts.token_type is None else getattr(self, parts.token_type)
        if places is None and parts.positions == "token":
            real = ids.ne(self.padding_idx).int()
            places = (real.cumsum(1, dtype=torch.int32) * real + self.padding_idx).long()
        return embedding_layer_norm(
            ids,
            word.weight,
            None if kinds is None else kinds.weight,
            without_gradient_of_padding(position),
            norm.weight,
            norm.bias,
            token_type_ids=types,
            position_ids=places,
            padding_idx=word.padding_idx,
            dropout_p=dropout_of(getattr(self, parts.dropout)),
            eps=norm.eps,
        )

    def _usual(self) -> bool:
        return self.is_as_set() and _as_found(self, self._pyxlbert.skipped, recorded())

    def _counts(self, ids: Tensor, places: Tensor | None, types: Tensor | None) -> bool:
        """Whether the buffers of places and types that the model falls back on say 0, 1, 2 and 0, 0, 0."""
        row, kinds = self._buffers.get("position_ids"), self._buffers.get("token_type_ids")
        length = ids.shape[-1]
        if places is None and self._pyxlbert.parts.positions == "place" and row is not None and can_look(row):
            there = row[0, :length]
            if not torch.equal(there, torch.arange(len(there), device=row.device)):
                return False
        return types is not None or kinds is None or not can_look(kinds) or not bool(kinds.any())


@dataclass(frozen=True, eq=False)
class ModelState:
    """What an encoder and its model know.

    Attributes:
        config: the model's.
        pack: whether padding is removed.
        backend: whose kernels run, or None.
        stack: which layers the encoder calls.
        encoder: its path in the model.
        output: the class of what the encoder returns; None where it returns more than its rows.
        as_tuple: whether the encoder returns a tuple unless `return_dict` is given; None: it does not know that.
        forward: that of the encoder's class.
        whole: whether encoder and all layers are replaced, and the model hands on a mask of keys.
    """

    config: Any
    pack: bool
    backend: str | None
    stack: Stack
    encoder: Path = ()
    output: type | None = None
    as_tuple: bool | None = None
    forward: Any = None
    whole: bool = True


class Encoder(Replaced):
    """The stack of layers; the padding is removed before the first and put back, as zeros, after the last.

    Layers whose weights are packed run in one call.
    """

    # The packed layers in one call, made at the first use.
    together: PackedLayers | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        done = self._in_one_call(hidden_states, attention_mask, args, kwargs)
        if done is not None:
            return done
        layout = self._packed(hidden_states, attention_mask, kwargs)
        if layout is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        output = self._run(layout.take(hidden_states), layout, args, kwargs)
        if isinstance(output, tuple):
            return (layout.restore(output[0]), *output[1:])
        output.last_hidden_state = layout.restore(output.last_hidden_state)  # [B, T, E]
        return output

    def _run(self, rows: Tensor, layout: TokenLayout, args: tuple, kwargs: dict[str, Any]) -> Any:
        # The class that was replaced hands rows and mask from layer to layer, whatever they are.
        return super().forward(rows, layout, *args, **kwargs)

    def _in_one_call(self, x: Tensor, mask: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Packed layers together, without calling their modules; None where they are to be called one by one."""
        state: ModelState = self._pyxlbert
        if state.output is None or self.pyxlbert_original.forward is not state.forward or x.dim() != 3:
            return None
        if getattr(state.config, "_attn_implementation", None) not in (*IMPLEMENTATIONS, None):
            return None
        if not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)) or not _harmless(args, kwargs):
            return None
        if asked(kwargs, state.config, "output_attentions", "output_hidden_states"):
            return None
        if not together.ready(self, state.stack, x):
            return None
        layout = self._arranged(x, mask)
        rows = together.run(self, state.stack, layout.take(x), layout)
        if rows is None:
            return None
        as_tuple = state.as_tuple is not None and not kwargs.get("return_dict", not state.as_tuple)
        return together.returned(state.output, layout.restore(rows), as_tuple)

    def find_layers(self, watch: Watch) -> list[PartsOfLayer]:
        """See `PackedLayers`."""
        return together.find(watch, self, self._pyxlbert.stack)

    def _arranged(self, x: Tensor, mask: Any) -> TokenLayout:
        """Where the rows of a call lie, with the masks."""
        return self._without_padding(x, mask) or _layout(mask, x)

    def _packed(self, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> TokenLayout | None:
        """The layout without padding; None where every place is computed."""
        if asked(kwargs, self._pyxlbert.config, "output_attentions", "output_hidden_states"):
            return None
        if not all(isinstance(one, Layer) for one in together.layers_of(self, self._pyxlbert.stack)):
            return None
        layout = self._without_padding(x, mask)
        if layout is None or watched_anywhere(self, recorded()):
            return None
        # One that is set otherwise may let tokens see what is at padding.
        layers = together.layers_of(self, self._pyxlbert.stack)
        return layout if all(one.as_set_inside() for one in layers) else None

    def _without_padding(self, x: Tensor, mask: Any) -> TokenLayout | None:
        real = tokens_of(mask, x) if self._pyxlbert.pack else None  # [B, T]
        # Beside more keys than there are places; a head reads the first place of every sequence, token or not.
        if real is None or real.shape[1] != x.shape[1] or not bool(real[:, 0].all()):
            return None
        layout = TokenLayout.from_mask(real, *x.shape[:2])
        return layout if layout.packed else None


def tokens_of(mask: Any, x: Tensor) -> Tensor | None:
    """Bool ``[B, T]``, True where a token is, if that is all that a model's mask says, in whatever form it was made."""
    if not (isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1 and can_look(mask)):
        return None
    keys = mask[:, 0, 0]  # [B, T]
    if mask.shape[2] > 1 and not bool((mask == keys[:, None, None]).all()):
        return None
    if mask.is_floating_point():
        real = keys == 0
        # What is added to the scores of padding leaves nothing of them.
        if not bool((real | (keys <= torch.finfo(mask.dtype).min / 2)).all()):
            return None
        keys = real
    elif mask.dtype is not torch.bool:
        return None
    return keys.expand(x.shape[0], -1)


def _side_by_side(layout: TokenLayout) -> bool:
    """Whether there is no padding between the tokens of a sequence, so that two are as far apart as their rows."""
    starts, ends = layout.cu_seqlens[:-1], layout.cu_seqlens[1:]
    return bool((layout.indices[ends - 1] - layout.indices[starts] == ends - starts - 1).all())


class BiasedEncoder(Encoder):
    """The same, for layers that share a bias by the distance of two places."""

    def compute_position_bias(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[1, H, T, T]``: no sequence has one of its own."""
        return super().compute_position_bias(x[:1], *args, **kwargs)

    def _arranged(self, x: Tensor, mask: Any) -> TokenLayout:
        bias = self.compute_position_bias(x)  # [1, H, T, T]
        layout = self._without_padding(x, mask)
        if layout is None or not _side_by_side(layout):
            layout = _layout(mask, x)
        return replace(layout, bias=bias if layout.bias is None else bias + layout.bias)

    def _run(self, rows: Tensor, layout: TokenLayout, args: tuple, kwargs: dict[str, Any]) -> Any:
        bias = self.compute_position_bias(rows.new_empty(1, layout.length, 0))  # [1, H, T, T]
        for layer in self.layer:
            rows = layer(rows, layout, position_bias=bias)[0]
        if not kwargs.get("return_dict"):
            return (rows,)
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=rows)


class Model(Replaced):
    """A model; its 2-D mask goes to the layers as a mask of keys ``[B, 1, 1, T]``, never as a T×T tensor."""

    keeps_signature = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: ModelState = self._pyxlbert
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if self._whole() and isinstance(mask, Tensor) and mask.dim() == 2 and self._takes(mask, args, kwargs):
            mask = key_mask(mask)
            if len(args) > 1:
                args = (args[0], mask, *args[2:])
            else:
                kwargs["attention_mask"] = mask
        if state.backend is None:
            return super().forward(*args, **kwargs)
        with use_backend(state.backend):
            return super().forward(*args, **kwargs)

    def _whole(self) -> bool:
        """Whether everything that reads the mask still is ours."""
        state: ModelState = self._pyxlbert
        encoder = at(self, state.encoder)
        layers = together.layers_of(encoder, state.stack) if state.whole and isinstance(encoder, Encoder) else []
        return bool(layers) and all(isinstance(one, Layer) for one in layers)

    def _takes(self, mask: Tensor, args: tuple, kwargs: dict[str, Any]) -> bool:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        config = self._pyxlbert.config
        known = getattr(config, "_attn_implementation", None) in (*IMPLEMENTATIONS, None)
        # A decoder's mask is more than which keys there are.
        known = known and not getattr(config, "is_decoder", False)
        return known and isinstance(tokens, Tensor) and tokens.shape[:2] == mask.shape and tokens.device == mask.device


def key_mask(mask: Tensor) -> Tensor | None:
    """A mask ``[B, T]`` as one of keys ``[B, 1, 1, T]``, boolean; None where it says nothing."""
    mask = mask.to(torch.bool)
    if can_look(mask) and mask.device.type == "cpu" and bool(mask.all()):
        return None
    return mask[:, None, None, :]
