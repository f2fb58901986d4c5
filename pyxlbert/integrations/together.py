"""The packed layers of an accelerated encoder in one call: which they are, and what such an encoder returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyxlbert.integrations.architecture import Stack
from pyxlbert.integrations.swap import RECORDER, Replaced, at, is_as_made, recorded
from pyxlbert.nn import Linear, TokenLayout
from pyxlbert.nn.encoder_layers import LayerParts, PackedLayers
from pyxlbert.nn.packing import Packable
from pyxlbert.nn.watch import Unusual, Watch, usual_call


def ready(encoder: nn.Module, stack: Stack, x: Tensor) -> bool:
    """Whether the layers of an encoder may be packed, before anything about the batch is looked at."""
    if not usual_call(x) or encoder.training or recorded():
        return False
    first = at(encoder, (*stack.layers, "0", *(() if stack.inside is None else (*stack.inside, "0"))))
    return isinstance(first, Packable) and first.packed is not None


def run(encoder: nn.Module, stack: Stack, x: Tensor, layout: TokenLayout) -> Tensor | None:
    """All layers of an encoder; None where they are to be called one by one.

    Args:
        encoder: it; `together`, its packed layers, is set at the first use.
        stack: which layers it calls.
        x: rows `[B, T, E]` or `[total, E]`.
        layout: where they lie.
    """
    if encoder.together is None:
        encoder.together = PackedLayers(lambda watch: _find(watch, encoder, stack), idle=RECORDER)
    if stack.before is not None:
        x = getattr(encoder, stack.before)(x)
    x = x.contiguous()
    # The residual stream is in float32, whatever the model's dtype.
    done = encoder.together.run((x, x.to(torch.promote_types(x.dtype, torch.float32))), layout)
    return None if done is None else done[0]


def _find(watch: Watch, encoder: nn.Module, stack: Stack) -> list[LayerParts]:
    watch.module(encoder)
    groups = _members(watch, encoder, stack.layers)
    if stack.inside is None:
        return [_parts(watch, one) for one in groups]
    count = watch.attribute(encoder.config, "num_hidden_layers")
    inside = [[_parts(watch, one) for one in _members(watch, group, stack.inside)] for group in groups]
    return [one for number in range(count) for one in inside[int(number / (count / len(inside)))]]


def _members(watch: Watch, parent: nn.Module, path: tuple[str, ...]) -> list[nn.Module]:
    for name in path:
        parent = watch.child(parent, name)
    return [watch.child(parent, name) for name in watch.children(parent)]


def _parts(watch: Watch, layer: nn.Module) -> LayerParts:
    """The modules of a layer, each of the class that it had when it was replaced."""
    if not (isinstance(layer, Replaced) and is_as_made(layer) and isinstance(layer, Packable)):
        raise Unusual
    state = watch.attribute(layer, "_pyxlbert")
    kinds = {path: kind for path, kind, _ in state.skipped}
    if any(kind.forward is not forward for _, kind, forward in state.skipped):
        raise Unusual
    seen: dict[tuple[str, ...], nn.Module] = {(): layer}

    def module(path: tuple[str, ...]) -> nn.Module:
        for depth in range(1, len(path) + 1):
            here = path[:depth]
            if here not in seen:
                seen[here] = watch.child(seen[here[:-1]], here[-1], kinds.get(here))
        return seen[path]

    def linear(name: str) -> tuple[Packable, str]:
        found = module(state.paths[name])
        if not (isinstance(found, Replaced) and is_as_made(found) and isinstance(found, Linear)):
            raise Unusual
        watch.parameter(found, "weight")
        watch.parameter(found, "bias")
        return found, ""

    for name in state.paths:
        module(state.paths[name])
    for name in ("query", "key", "value"):
        linear(name)
    if state.activation is None:
        raise Unusual
    width = module(state.paths["query"]).out_features
    return LayerParts(
        *(layer, ("",)),
        *(linear(name) for name in ("out", "up", "down")),
        *(module(state.paths[name]) for name in ("out_norm", "norm")),
        *(state.heads, width // state.heads),
        state.activation,
    )


def returned(kind: type | None, rows: Tensor, return_dict: Any) -> Any:
    """What an encoder returns that has nothing but its rows.

    Args:
        kind: the class of what it returned when it was looked at.
        rows: `[B, T, E]`.
        return_dict: the argument, None if it was not given.
    """
    if return_dict is False or kind is tuple:
        return (rows,)
    return kind(last_hidden_state=rows)
