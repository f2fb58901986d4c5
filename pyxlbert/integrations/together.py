"""The packed layers of an accelerated encoder in one call: which they are, and what such an encoder returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyxlbert.integrations.architecture import Stack
from pyxlbert.integrations.swap import RECORDER, Replaced, Settings, at, is_as_made, is_as_set, recorded
from pyxlbert.nn import Linear, TokenLayout
from pyxlbert.nn.encoder_layers import LayerParts, PackedLayers
from pyxlbert.nn.packing import Packable
from pyxlbert.nn.watch import Unusual, Watch, usual_call


def ready(encoder: nn.Module, stack: Stack, x: Tensor) -> bool:
    """Whether the layers of an encoder may run in one call, before anything about the batch is looked at.

    Args:
        encoder: it; `together`, its packed layers, is set at the first use.
        stack: which layers it calls.
        x: rows as they come to it.
    """
    if not usual_call(x) or encoder.training or recorded():
        return False
    first = at(encoder, (*stack.layers, "0", *(() if stack.inside is None else (*stack.inside, "0"))))
    if not isinstance(first, Packable) or first.packed is None:
        return False
    if encoder.together is None:
        encoder.together = PackedLayers(encoder.find_layers, idle=RECORDER)
    return encoder.together.ready(x.contiguous())


def run(encoder: nn.Module, stack: Stack, x: Tensor, layout: TokenLayout) -> Tensor | None:
    """All layers of an encoder that is ready; None where they are to be called one by one.

    Args:
        encoder: it.
        stack: which layers it calls.
        x: rows `[B, T, E]` or `[total, E]`.
        layout: where they lie.
    """
    if stack.before is not None:
        x = getattr(encoder, stack.before)(x)
    x = x.contiguous()
    # The residual stream is in float32, whatever the model's dtype.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    done = encoder.together.run((x, wide), layout, ready=True)
    return None if done is None else done[0]


def find(watch: Watch, encoder: nn.Module, stack: Stack) -> list[LayerParts]:
    """The layers of an encoder, in the order in which it calls them; see `PackedLayers`."""
    watch.owner(encoder, "config")
    for name in (*([stack.before] if stack.before is not None else []), *stack.beside):
        watch.child(encoder, name)
    groups = _members(watch, encoder, stack.layers)
    if stack.inside is None:
        return [_parts(watch, one) for one in groups]
    count, found = (watch.attribute(encoder.config, f"num_hidden_{name}") for name in ("layers", "groups"))
    if found != len(groups):
        raise Unusual
    if any(not type(group).__module__.startswith("transformers.models.") for group in groups):
        raise Unusual
    inside = [[_parts(watch, one) for one in _members(watch, group, stack.inside)] for group in groups]
    return [one for number in range(count) for one in inside[int(number / (count / len(inside)))]]


def _members(watch: Watch, parent: nn.Module, path: tuple[str, ...]) -> list[nn.Module]:
    for name in path:
        parent = watch.child(parent, name)
        # A class of somebody's own may call its members in another way.
        if type(parent) is not nn.ModuleList and not type(parent).__module__.startswith("transformers.models."):
            raise Unusual
    return [watch.child(parent, name) for name in watch.children(parent)]


def layers_of(encoder: nn.Module, stack: Stack) -> list[nn.Module]:
    """The layers that an encoder has now."""
    members = list(getattr(at(encoder, stack.layers), "children", list)())
    if stack.inside is None:
        return members
    return [one for group in members for one in getattr(at(group, stack.inside), "children", list)()]


def _parts(watch: Watch, layer: nn.Module) -> LayerParts:
    """The modules of a layer, each of the class that it had when it was replaced."""
    if not (isinstance(layer, Replaced) and is_as_made(layer) and isinstance(layer, Packable)):
        raise Unusual
    state = watch.attribute(layer, "_pyxlbert")
    for kind in (layer.pyxlbert_original, nn.Linear):
        watch.kind(kind)
    kinds = {one.path: one.kind for one in state.skipped}
    known = ((layer.pyxlbert_original, state.forward), *((one.kind, one.forward) for one in state.skipped))
    if any(kind.forward is not forward for kind, forward in known):
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
    _settings(watch, layer, layer._pyxlbert_settings)
    for one in state.skipped:
        _settings(watch, module(one.path), one.settings)
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


def _settings(watch: Watch, module: nn.Module, known: Settings) -> None:
    for name, _ in known.values:
        watch.attribute(module, name)
    if not is_as_set(module, known):
        raise Unusual


def returned(kind: type, rows: Tensor, as_tuple: bool) -> Any:
    """What an encoder returns that has nothing but its rows.

    Args:
        kind: the class of what it returned when it was looked at.
        rows: `[B, T, E]`.
        as_tuple: whether it was asked for a tuple.
    """
    return (rows,) if as_tuple or kind is tuple else kind(last_hidden_state=rows)
