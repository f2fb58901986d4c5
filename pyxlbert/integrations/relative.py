"""XLNet: its whole model is replaced, since its masks and distances are tensors that its layers hand on.

What runs is `pyxlbert.models.XLNetModel.forward` over the very modules of the replaced model.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyxlbert.backends import use_backend
from pyxlbert.integrations import probe
from pyxlbert.integrations.architecture import RelativeArchitecture
from pyxlbert.integrations.modules import ReplacedLinear, dropout_of
from pyxlbert.integrations.report import Entry
from pyxlbert.integrations.swap import (
    Replaced,
    Settings,
    Unlike,
    is_as_made,
    is_as_set,
    replacement,
    settings_of,
    shares_weights,
    swap,
    watched_anywhere,
)
from pyxlbert.models import XLNetConfig, XLNetModel
from pyxlbert.nn import ACTIVATIONS, LastTable, RelativeAttention, linear_activation, rows_and_stream
from pyxlbert.nn.encoder_layers import LayerParts, watched_linear
from pyxlbert.nn.watch import Unusual, Watch
from pyxlbert.ops.dropout_add_layer_norm import dropout_add_layer_norm

_ARGUMENTS = (
    *("input_ids", "attention_mask", "mems", "perm_mask", "target_mapping", "token_type_ids", "input_mask"),
    *("inputs_embeds", "use_mems", "output_attentions", "output_hidden_states", "return_dict"),
)
# What our model and the replaced one have in common.
_SHARED = ("word_embedding", "mask_emb", "layer", "dropout")

# What `generate` hands on and nothing reads.
_HARMLESS = ("next_sequence_length",)


class ReplacedAttention(Replaced, RelativeAttention):
    """XLNet's attention: `relative` is ours, a call is the replaced class's."""

    @property
    def num_attention_heads(self) -> int:
        return self.n_head

    @property
    def head_size(self) -> int:
        return self.d_head

    @property
    def dropout_p(self) -> float:
        return self.dropout.p

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.pyxlbert_original.forward(self, *args, **kwargs)

    def relative(self, *args: Any, **options: Any) -> tuple[Tensor | None, Tensor | None, Any]:
        """See `RelativeAttention.forward`."""
        return RelativeAttention.forward(self, *args, **options)


class RelativeLayer(Replaced):
    """XLNet's layer: for streams and a layout it is ours, for tensors the replaced class's."""

    is_encoder_layer = True

    def forward(self, content: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(content, Tensor):
            return super().forward(content, *args, **kwargs)
        query, memory, layout, copy_dtype, content_needed, output_attentions = args
        mixed, target, weights = self.rel_attn.relative(
            content[0],
            None if query is None else query[0],
            memory,
            layout,
            content_needed=content_needed,
            output_attentions=output_attentions,
        )
        content = None if mixed is None else self._finish(mixed, content, copy_dtype)
        query = None if target is None else self._finish(target, query, copy_dtype)
        return content, query, weights

    def _finish(self, mixed: Tensor, stream: tuple[Tensor, Tensor], copy_dtype: torch.dtype | None) -> Any:
        attention, feed = self.rel_attn, self.ff
        x, residual = _residual(mixed, stream[1], attention, copy_dtype)
        inner = feed.dropout(linear_activation(feed.layer_1, x, self._pyxlbert))  # [B, T, F], packed [total, F]
        return _residual(feed.layer_2(inner), residual, feed, copy_dtype)


def _residual(x: Tensor, residual: Tensor, owner: nn.Module, copy_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    norm = owner.layer_norm
    options = {"dropout_p": dropout_of(owner.dropout), "eps": norm.eps, "copy_dtype": copy_dtype}
    return rows_and_stream(dropout_add_layer_norm(x, residual, norm.weight, norm.bias, **options))


class Twin(XLNetModel):
    """Our model over the modules of a replaced one."""

    def _parts(self, watch: Watch) -> list[LayerParts]:
        layers = watch.child(self, "layer", nn.ModuleList)
        return [_parts(watch, watch.child(layers, name)) for name in watch.children(layers)]


def _parts(watch: Watch, layer: nn.Module) -> LayerParts:
    """The modules of a replaced layer; the class of each is looked at by the model, before every call."""
    attention, feed = watch.child(layer, "rel_attn"), watch.child(layer, "ff")
    for module, ours in ((layer, RelativeLayer), (attention, ReplacedAttention)):
        if not (isinstance(module, ours) and is_as_made(module)):
            raise Unusual
    for name in ("q", "k", "v", "o", "r"):
        watch.parameter(attention, name)
    linear = replacement(nn.Linear, ReplacedLinear)
    for module in (attention, feed):
        watch.child(module, "dropout", nn.Dropout)
    return LayerParts(
        *(attention, ("q", "kv")),
        (attention, "o"),
        *((watched_linear(watch, feed, name, linear), "") for name in ("layer_1", "layer_2")),
        watch.child(attention, "layer_norm", nn.LayerNorm),
        watch.child(feed, "layer_norm", nn.LayerNorm),
        *(watch.attribute(attention, "n_head"), watch.attribute(attention, "d_head")),
        watch.attribute(layer, "_pyxlbert"),
        "r",
        ("r_w_bias", "r_r_bias", "r_s_bias", "seg_embed"),
    )


@dataclass(eq=False)
class RelativeState:
    """What the model knows.

    Attributes:
        config: the model's, as ours.
        reads: which places its head reads beside the tokens.
        backend: whose kernels run, or None.
        kinds: the class of every module, by name, as it was before.
        settings: how each of the others than linear layers and tables was set.
        twin: our model over the modules of the replaced one, which are in no list of modules a second time.
    """

    config: XLNetConfig
    reads: str | None
    backend: str | None
    kinds: dict[str, type[nn.Module]]
    settings: dict[str, Settings]
    twin: Twin | None = None


class RelativeModel(Replaced):
    """XLNet's model; padding is left out where the tokens stand side by side and nobody reads it."""

    keeps_signature = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: RelativeState = self._pyxlbert
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        for name in _HARMLESS:
            given.pop(name, None)
        unknown = [name for name in given if name not in _ARGUMENTS]
        if (
            any(given.pop(name) is not None for name in unknown)
            or watched_anywhere(self, inside=True)
            or not self._as_found()
        ):
            return super().forward(*args, **kwargs)
        as_dict = given.pop("return_dict", None)
        as_dict = self.config.return_dict if as_dict is None else as_dict
        for name in ("output_attentions", "output_hidden_states"):
            if given.get(name) is None:
                given[name] = getattr(self.config, name, False)
        if given.get("use_mems") is None:
            given["use_mems"] = self.config.use_mems_train if self.training else self.config.use_mems_eval
        with nullcontext() if state.backend is None else use_backend(state.backend):
            known = {name: given[name] for name in _ARGUMENTS if name in given}
            output = self._twin()(**known, reads=state.reads, keep_packed=True)
        rows, layout = output.last_hidden_state, output.layout
        read = given["use_mems"] or given["output_attentions"] or state.reads is not None
        found = {
            "last_hidden_state": rows if read and layout.indices is None else layout.restore(rows),  # [B, T, E]
            "mems": output.mems,
            "hidden_states": output.hidden_states,
            "attentions": output.attentions,
        }
        if not as_dict:
            return tuple(value for value in found.values() if value is not None)
        return sys.modules[self.pyxlbert_original.__module__].XLNetModelOutput(**found)

    def _as_found(self) -> bool:
        kinds = self._pyxlbert.kinds
        modules = dict(self.named_modules())
        if len(modules) != len(kinds) or any(_was(modules.get(name)) is not kind for name, kind in kinds.items()):
            return False
        return all(is_as_set(modules[name], known) for name, known in self._pyxlbert.settings.items())

    def _twin(self) -> Twin:
        """Our model over the modules of this one, made anew where one of them was replaced."""
        state: RelativeState = self._pyxlbert
        twin = state.twin
        if twin is None or any(getattr(twin, name) is not getattr(self, name) for name in _SHARED):
            twin = Twin.__new__(Twin)
            nn.Module.__init__(twin)
            twin.config, twin.checkpointing, twin.distances = state.config, None, LastTable()
            for name in _SHARED:
                setattr(twin, name, getattr(self, name))
            state.twin = twin
        twin.training = self.training
        return twin


def replace_relative(
    name: str, model: nn.Module, table: RelativeArchitecture, heads: list[str], options: dict[str, Any]
) -> Entry:
    """Replaces a model of XLNet, whole or not at all.

    Args:
        name: its path.
        model: it.
        table: of its architecture.
        heads: the classes of what it is in.
        options: `pack`, `backend` and `verify` of `accelerate`.
    """
    was = type(model).__name__
    try:
        config = _configuration(model, table)
        reads = next((place for head in heads if (place := table.place(head, config.summary_type)) is not None), None)
        state = RelativeState(config, reads if options["pack"] else "mean", options["backend"], {}, {})
        kind = ACTIVATIONS[config.ff_activation]
        if options["verify"]:
            for number, layer in enumerate(model.layer):
                fault = _fault(model, layer, state, kind)
                if fault is not None:
                    raise Unlike(f"layer.{number}: {fault}")
    except Unlike as reason:
        return Entry(name, was, reason=str(reason))
    _swap(model, state, kind)
    return Entry(
        name, was, "pyxlbert RelativeModel", None if state.reads != "mean" else "padding stays, for it is read"
    )


def _configuration(model: nn.Module, table: RelativeArchitecture) -> XLNetConfig:
    for name, kind in table.parts.items():
        modules = [model.get_submodule(name)] if name in dict(model.named_children()) else []
        modules += [layer.get_submodule(name) for layer in model.layer if name in dict(layer.named_modules())]
        if not modules or any(type(module).__name__ != kind for module in modules):
            raise Unlike(f"{name}: got {', '.join(type(module).__name__ for module in modules)}, wanted {kind}")
    values = model.config.to_dict()
    try:
        return XLNetConfig.from_dict(values | {"masked_rows": "uniform"})
    except (TypeError, ValueError) as error:
        raise Unlike(str(error)) from None


def _swap(model: nn.Module, state: RelativeState, kind: str) -> None:
    others = (nn.Linear, nn.Embedding)
    state.settings.update(
        {name: settings_of(module) for name, module in model.named_modules() if not isinstance(module, others)}
    )
    for layer in model.layer:
        for linear in (layer.ff.layer_1, layer.ff.layer_2):
            swap(linear, ReplacedLinear)
        swap(layer.rel_attn, ReplacedAttention)
        swap(layer, RelativeLayer, kind)
    swap(model, RelativeModel, state)
    state.kinds.update({name: _was(module) for name, module in model.named_modules()})
    model._twin()


def _was(module: nn.Module | None) -> type:
    """The class before it was replaced."""
    return getattr(type(module), "pyxlbert_original", type(module))


def _fault(model: nn.Module, layer: nn.Module, state: RelativeState, kind: str) -> str | None:
    """Why a model of this layer alone is not what it was, or None."""

    def alone() -> nn.Module:
        one = shares_weights(model)
        one._modules["layer"] = nn.ModuleList([shares_weights(layer)])
        weight = model.mask_emb
        one._modules["word_embedding"] = nn.Embedding(2, weight.shape[-1], device=weight.device, dtype=weight.dtype)
        return one.eval()

    plain, ours, config = alone(), alone(), copy(state.config)
    config.n_layer = 1
    _swap(ours, RelativeState(config, "mean", state.backend, {}, {}), kind)
    return probe.relative_fault(plain, ours, model.mask_emb)
