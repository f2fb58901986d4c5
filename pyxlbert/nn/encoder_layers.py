"""The layers of a packed encoder in one call: what they are made of, and when it may stand for their modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from pyxlbert.nn.layer_norm import DropoutAddLayerNorm
from pyxlbert.nn.layout import TokenLayout
from pyxlbert.nn.packing import Packable
from pyxlbert.nn.relative_attention import RelativeLayout
from pyxlbert.nn.watch import Unusual, Watch, usual_call
from pyxlbert.ops import _encoder_stack as stack
from pyxlbert.ops import _packed


class LayerParts(NamedTuple):
    """The modules of one layer, each already watched, and their packed products.

    Attributes:
        attention: the module whose products query, key and value are; `projections` are their names.
        out, up, down: modules with a packed product: ("module", "product").
        attention_norm, norm: after either residual sum; of `torch.nn.LayerNorm`, its rows alone are normalised.
        position: the name of the attention's product of distances; None where there is none.
        terms: names of the attention's parameters, or none.
    """

    attention: Packable
    projections: tuple[str, ...]
    out: tuple[Packable, str]
    up: tuple[Packable, str]
    down: tuple[Packable, str]
    attention_norm: nn.Module
    norm: nn.Module
    heads: int
    head_size: int
    activation: str
    position: str | None = None
    terms: tuple[str, ...] = ()


Find = Callable[[Watch], list[LayerParts]]


class PackedLayers:
    """Runs the layers of an encoder in one call while nothing about them is unusual.

    Args:
        find: a method of the encoder: looks at every module that the layers are made of, by the watch that it is given.
        idle: the Python module whose hooks on those modules do nothing.
    """

    def __init__(self, find: Find, idle: str | None = None) -> None:
        # Weakly: the encoder holds this, and its weights are to go with its last reference.
        self._find, self._idle = WeakMethod(find), idle
        self._found: _Found | None = None
        self._failed: Watch | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy of the model makes its own.
        return type(None), ()

    def forget(self) -> None:
        """Drops what was made of weights that are packed no more."""
        self._found = self._failed = None

    def ready(self, x: Tensor) -> bool:
        """Whether rows like these may be run in one call, as far as their layout has no say.

        Args:
            x: of the products' dtype; of any width.
        """
        if not usual_call(x) or not stack.takes(x, x):
            return False
        found = self._found
        if found is None or found.level != stack.level() or not found.watch.unchanged():
            self._found = found = self._look()
        return found is not None and found.dtype is x.dtype

    def run(
        self,
        stream: tuple[Tensor, Tensor],
        layout: TokenLayout | RelativeLayout,
        which: slice = slice(None),
        ready: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Some or all layers; None where they are to be called one by one.

        Args:
            stream: rows `[B, T, E]` or `[total, E]` in the products' dtype, and the residual stream's.
            layout: where they lie.
            which: the layers, one after the other.
            ready: whether `ready` has just said so.
        """
        x, residual = stream
        if not usual_call(x) or not stack.takes(x, residual):
            return None
        tokens = layout if isinstance(layout, TokenLayout) else layout.tokens
        if x.dim() != (3 if tokens.cu_seqlens is None else 2):
            return None
        found = self._found
        if not ready and (found is None or found.level != stack.level() or not found.watch.unchanged()):
            self._found = found = self._look()
        if found is None or found.dtype is not x.dtype or found.hidden != x.shape[-1]:
            return None
        mask = layout.attention_mask
        bias = layout.bias if isinstance(layout, TokenLayout) else None
        if not stack.takes_masks(x, tokens.cu_seqlens, tokens.max_seqlen, mask, bias, found.heads):
            return None  # the modules say what is wrong
        size, offsets = found.head_size, tokens.cu_seqlens
        places = stack.Places(found.heads, size, size**-0.5, offsets, attention_mask=mask, bias=bias)
        distances = None
        if isinstance(layout, RelativeLayout):
            if layout.own_rows is not None:
                return None  # of a model that trains
            places = places._replace(causal=layout.causal)
            distances = stack.Distances(
                layout.positions.to(x.dtype).contiguous(),
                x.shape[1] if offsets is None else tokens.max_seqlen,
                layout.query_segments,
                layout.key_segments,
                layout.query_rank,
                layout.key_rank,
                layout.see_self,
                layout.masked_rows == "uniform",
            )
        first, last, _ = which.indices(len(found.stack))
        return found.stack.run(x, residual, places, distances, first, last - first)

    def _look(self) -> _Found | None:
        if self._failed is not None and self._failed.as_failed():
            return None
        watch = Watch(self._idle)
        try:
            find = self._find()
            layers = [] if find is None else find(watch)
            found = _Found(watch, layers, self) if layers else None
            self._failed = None
        except Unusual:
            watch.failed()
            self._failed, found = watch, None
        return found


class _Found:
    """The native stack of layers as they were found."""

    def __init__(self, watch: Watch, layers: list[LayerParts], user: PackedLayers) -> None:
        self.watch, self.level = watch, stack.level()
        first = layers[0]
        self.heads, self.head_size = first.heads, first.head_size
        if any((one.heads, one.head_size) != (self.heads, self.head_size) for one in layers):
            raise Unusual
        native = [self._layer(watch, one) for one in layers]
        self.hidden = native[0].down.columns
        self.dtype = stack.dtype_of(native[0].down)
        for one in native:
            self._check(one)
        self.stack = stack.Stack(native, self.hidden)
        watch.found()
        for layer in layers:
            for module in (layer.attention, layer.out[0], layer.up[0], layer.down[0]):
                module.packed.users.add(user)

    def _check(self, layer: Any) -> None:
        """Raises Unusual unless a layer's parameters are of the sizes and the dtype of the others, ValueError if one's
        memory is gone."""
        width, hidden, wide = self.heads * self.head_size, self.hidden, layer.up.columns
        products = (*layer.projections, layer.out, layer.up, layer.down)
        sizes = [
            (sum(one.columns for one in layer.projections), 3 * width),
            *((one.inner, hidden) for one in (*layer.projections, layer.up)),
            *((layer.out.columns, hidden), (layer.out.inner, width)),
            *((layer.down.columns, hidden), (layer.down.inner, wide)),
        ]
        if layer.position is not None:
            products = (*products, layer.position)
            sizes += [(layer.position.columns, width), (layer.position.inner, hidden)]
        shapes = [(tuple(one.shape), (hidden,)) for norm in (layer.attention_norm, layer.norm) for one in norm[:2]]
        terms = [(self.heads, self.head_size)] * 3 + [(2, self.heads, self.head_size)]
        shapes += [(tuple(one.shape), shape) for one, shape in zip(layer.terms, terms, strict=True) if one is not None]
        copied = [one for norm in (layer.attention_norm, layer.norm) for one in norm[:2]]
        copied += [one for one in layer.terms if one is not None]
        _packed.require_memory(copied)
        dtypes = [one.dtype for one in copied]
        if (
            any(got != wanted for got, wanted in (*sizes, *shapes))
            or any(stack.dtype_of(one) is not self.dtype for one in products)
            or any(dtype not in (self.dtype, torch.float32) for dtype in dtypes)
            or not stack.takes_sizes(self.dtype, hidden, width, wide)
            or layer.activation not in stack.ACTIVATIONS
            or any(type(norm[2]) is not float for norm in (layer.attention_norm, layer.norm))
            or (layer.position is not None and None in layer.terms)
        ):
            raise Unusual

    @staticmethod
    def _layer(watch: Watch, parts: LayerParts) -> Any:
        def packed(module: Packable, product: str) -> Any:
            products = watch.attribute(module, "packed")
            found = None if products is None else products[product].current(module.packed_layers(product))
            if found is None:
                raise Unusual
            return found

        def norm(module: nn.Module) -> tuple[Tensor, Tensor, float]:
            if type(module) not in (DropoutAddLayerNorm, nn.LayerNorm):
                raise Unusual
            weight, bias = watch.parameter(module, "weight"), watch.parameter(module, "bias")
            if weight is None or bias is None:
                raise Unusual
            return weight, bias, watch.attribute(module, "eps")

        terms = [watch.parameter(parts.attention, name) for name in parts.terms]
        return stack.Layer(
            tuple(packed(parts.attention, name) for name in parts.projections),
            *(packed(*one) for one in (parts.out, parts.up, parts.down)),
            *(norm(one) for one in (parts.attention_norm, parts.norm)),
            parts.activation,
            None if parts.position is None else packed(parts.attention, parts.position),
            (*terms, *[None] * (4 - len(terms))),
        )


def watched_linear(watch: Watch, parent: nn.Module, name: str, kind: type[nn.Module]) -> Packable:
    """A linear layer among the watched, with its weight and bias."""
    module = watch.child(parent, name, kind)
    watch.parameter(module, "weight")
    watch.parameter(module, "bias")
    return module
