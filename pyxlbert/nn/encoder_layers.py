"""The layers of a packed encoder in one call: what they are made of, and when it may stand for their modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyxlbert.nn.layer_norm import DropoutAddLayerNorm
from pyxlbert.nn.layout import TokenLayout
from pyxlbert.nn.packing import Packable
from pyxlbert.nn.relative_attention import RelativeLayout
from pyxlbert.nn.watch import Unusual, Watch, usual_call
from pyxlbert.ops import _encoder_stack as stack


class LayerParts(NamedTuple):
    """The modules of one layer, each already watched, and their packed products.

    Attributes:
        attention: the module whose products query, key and value are; `projections` are their names.
        out, up, down: modules with a packed product: ("module", "product").
        attention_norm, norm: after either residual sum.
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
        find: looks at every module that the layers are made of, by the watch that it is given.
    """

    def __init__(self, find: Find) -> None:
        self._find = find
        self._found: _Found | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy of the model makes its own.
        return type(None), ()

    def run(
        self, stream: tuple[Tensor, Tensor], layout: TokenLayout | RelativeLayout, which: slice = slice(None)
    ) -> tuple[Tensor, Tensor] | None:
        """Some or all layers; None where they are to be called one by one.

        Args:
            stream: rows `[B, T, E]` or `[total, E]` in the products' dtype, and the residual stream's.
            layout: where they lie.
            which: the layers, one after the other.
        """
        x, residual = stream
        if not usual_call(x) or not stack.takes(x, residual):
            return None
        found = self._found
        if found is None or not found.watch.unchanged():
            self._found = found = self._look()
        if found is None or found.dtype is not x.dtype or found.hidden != x.shape[-1]:
            return None
        tokens = layout if isinstance(layout, TokenLayout) else layout.tokens
        if tokens.cu_seqlens is not None:
            stack.check_offsets(tokens.cu_seqlens, x.shape[0], tokens.max_seqlen)
        places = stack.Places(
            found.heads, found.head_size, found.head_size**-0.5, tokens.cu_seqlens, attention_mask=tokens.attention_mask
        )
        if isinstance(layout, TokenLayout):
            places, distances = places._replace(bias=layout.bias), None
        else:
            places = places._replace(attention_mask=layout.attention_mask, causal=layout.causal)
            distances = stack.Distances(
                layout.positions.to(x.dtype).contiguous(),
                tokens.max_seqlen if tokens.cu_seqlens is not None else x.shape[1],
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
        watch = Watch()
        try:
            layers = self._find(watch)
            return _Found(watch, layers) if layers else None
        except Unusual:
            return None


class _Found:
    """The native stack of layers as they were found."""

    def __init__(self, watch: Watch, layers: list[LayerParts]) -> None:
        self.watch = watch
        first = layers[0]
        self.heads, self.head_size = first.heads, first.head_size
        if any((one.heads, one.head_size) != (self.heads, self.head_size) for one in layers):
            raise Unusual
        native = [self._layer(watch, one) for one in layers]
        self.hidden = native[0].down.columns
        width = self.heads * self.head_size
        for one in native:
            sizes = (
                (sum(p.columns for p in one.projections), 3 * width),
                *((p.inner, self.hidden) for p in (*one.projections, one.up)),
                *((one.out.columns, self.hidden), (one.out.inner, width), (one.down.columns, self.hidden)),
                (one.down.inner, one.up.columns),
                *((norm[i].numel(), self.hidden) for norm in (one.attention_norm, one.norm) for i in (0, 1)),
            )
            if any(got != wanted for got, wanted in sizes):
                raise Unusual
        self.dtype: torch.dtype = watch.parameter(first.norm, "weight").dtype  # type: ignore[union-attr]
        if self.dtype not in stack.DTYPES or not stack.takes_sizes(self.dtype, self.hidden, width):
            raise Unusual
        self.stack = stack.Stack(native, self.hidden)
        watch.found()

    @staticmethod
    def _layer(watch: Watch, parts: LayerParts) -> Any:
        def packed(module: Packable, product: str) -> Any:
            products = watch.attribute(module, "packed")
            found = None if products is None else products[product].current(module.packed_layers(product))
            if found is None:
                raise Unusual
            return found

        def norm(module: nn.Module) -> tuple[Tensor, Tensor, float]:
            if type(module) is not DropoutAddLayerNorm:
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
