"""What `accelerate` does with Funnel: its layers hand on token types in a form of ours, so all are replaced or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyxlbert.integrations import funnel, probe
from pyxlbert.integrations.architecture import FunnelArchitecture
from pyxlbert.integrations.modules import ReplacedLinear
from pyxlbert.integrations.report import Entry
from pyxlbert.integrations.swap import Unlike, settings_of, shares_weights, swap
from pyxlbert.nn import ACTIVATIONS


def replace_funnel(name: str, model: nn.Module, table: FunnelArchitecture, backend: str | None, verify: bool) -> Entry:
    """Replaces a model, whole or not at all.

    Args:
        name: its path.
        model: it.
        table: of its architecture.
        backend: whose kernels run, or None.
        verify: whether replacements prove themselves.
    """
    was = type(model).__name__
    try:
        _check(model, table)
        activation = _found(model, table, "layer")[0][1].ffn.activation_function
        state = funnel.FunnelState(
            ACTIVATIONS.get(model.config.hidden_act),
            _found(model, table, "structure")[0][1].cls_token_type_id,
            *(type(activation), settings_of(activation)),
        )
        if verify:
            structure = _found(model, table, "structure")[0][1]
            for path, layer in _found(model, table, "layer"):
                fault = _fault(structure, layer, state, backend)
                if fault is not None:
                    raise Unlike(f"{path}: {fault}")
    except Unlike as reason:
        return Entry(name, was, reason=str(reason))
    for _, layer in _found(model, table, "layer"):
        _swap_layer(layer, state)
    for _, structure in _found(model, table, "structure"):
        swap(structure, funnel.Structure)
    swap(model, funnel.Funnel, funnel.FunnelModelState(backend))
    return Entry(name, was, "pyxlbert Funnel")


def _found(model: nn.Module, table: FunnelArchitecture, what: str) -> list[tuple[str, Any]]:
    return [(path, one) for path, one in model.named_modules() if type(one).__name__ == table.name(what)]


def _check(model: nn.Module, table: FunnelArchitecture) -> None:
    config: Any = model.config
    for field, allowed in table.holds.items():
        value = getattr(config, field, None)
        if value not in allowed:
            raise Unlike(f"{field}: got {value!r}, wanted {' or '.join(map(repr, allowed))}")
    if getattr(config, "quantization_config", None) is not None:
        raise Unlike("quantization_config: got quantised weights, wanted floating-point ones")
    if not _found(model, table, "structure") or not _found(model, table, "layer"):
        raise Unlike("got no layers")
    for path, layer in _found(model, table, "layer"):
        inside = dict(layer.named_modules())
        for part, kind in table.parts.items():
            got = type(inside[part]).__name__ if part in inside else "nothing"
            if got != kind:
                raise Unlike(f"{path}.{part}: got {got}, wanted {kind}")
        for parameter_name, parameter in layer.named_parameters():
            if not parameter.is_floating_point():
                raise Unlike(f"{path}.{parameter_name}: got {parameter.dtype}, wanted floating-point weights")


def _swap_layer(layer: Any, state: funnel.FunnelState) -> None:
    for inner in layer.modules():
        if type(inner) is nn.Linear:
            swap(inner, ReplacedLinear)
    swap(layer.attention, funnel.FunnelAttention, state)
    swap(layer.ffn, funnel.FunnelFeedForward, state)


def _fault(structure: nn.Module, layer: Any, state: funnel.FunnelState, backend: str | None) -> str | None:
    """Why a layer is not what it was, or None: on its own rows and, behind the first block, with pooled queries."""
    plain, trial, ours = shares_weights(layer), shares_weights(layer), shares_weights(structure)
    _swap_layer(trial, state)
    swap(ours, funnel.Structure)
    pooled = (False, True) if layer.attention.block_index > 0 else (False,)
    calls = [(_arguments(shares_weights(structure), layer, first), _arguments(ours, layer, first)) for first in pooled]
    return probe.part_fault(plain, trial, calls, backend)


def _arguments(structure: Any, layer: Any, pooled: bool) -> probe.Arguments:
    """Arguments of a layer of its block, on a small ragged batch of two segments.

    Args:
        structure: makes what all attention shares.
        layer: for its block and its device.
        pooled: whether its queries are those of the block, its keys of the block before.
    """
    like, block = layer.attention.r_w_bias, layer.attention.block_index
    tokens = probe.places(like.device).repeat_interleave(2**block, dim=1)  # [B, T]
    batch, length = tokens.shape
    types = (torch.arange(length, device=like.device) * 2 // length).expand(batch, -1).clone()
    types[:, 0] = structure.cls_token_type_id
    if not structure.config.separate_cls:
        types[:, 0] = 0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, structure.config.d_model, generator=generator).to(like.device)

    def arguments(dtype: torch.dtype) -> dict[str, Any]:
        hidden: Tensor = x.to(dtype)
        inputs = structure.init_attention_inputs(hidden, tokens.to(dtype), types)
        for place in range(block):
            query, inputs = structure.pre_attention_pooling(hidden, inputs)
            if pooled and place == block - 1:
                key = hidden if structure.config.pool_q_only else query
                return {"query": query, "key": key, "value": key, "attention_inputs": inputs}
            inputs, hidden = structure.post_attention_pooling(inputs), query
        return {"query": hidden, "key": hidden, "value": hidden, "attention_inputs": inputs}

    return arguments
