"""What `accelerate` does with a Conformer: each part that can be replaced is, alone, and proves itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyxlbert.integrations import conformer, probe
from pyxlbert.integrations.architecture import ConformerArchitecture
from pyxlbert.integrations.conformer import ConformerState, Keys
from pyxlbert.integrations.modules import ReplacedLinear
from pyxlbert.integrations.report import Entry
from pyxlbert.integrations.swap import Unlike, settings_of, shares_weights, swap
from pyxlbert.nn import ACTIVATIONS

Swap = Callable[[nn.Module], None]


def replace_conformer(
    name: str, model: nn.Module, table: ConformerArchitecture, backend: str | None, verify: bool
) -> list[Entry]:
    """Replaces what can be replaced, and says so.

    Args:
        name: the model's path.
        model: it.
        table: of its architecture.
        backend: whose kernels run, or None.
        verify: whether replacements prove themselves.
    """
    return _Conformer(name, model, table, backend, verify).replace()


class _Conformer:
    def __init__(
        self, name: str, model: nn.Module, table: ConformerArchitecture, backend: str | None, verify: bool
    ) -> None:
        self.name, self.model, self.table, self.backend, self.verify = name, model, table, backend, verify
        self.plain = shares_weights(model)

    def replace(self) -> list[Entry]:
        was, entries = type(self.model).__name__, []
        try:
            self._check_configuration()
            layers = [(name, one) for name, one in self.model.named_modules() if self._is(one, "layer")]
            if not layers:
                raise Unlike("got no layers")
        except Unlike as reason:
            return [Entry(self.name, was, reason=str(reason))]
        for name, layer in layers:
            for inside, module in layer.named_modules():
                path = ".".join(part for part in (self.name, name, inside) if part)
                for what, prepare in (
                    ("attention", self._attention),
                    ("feed_forward", self._feed_forward),
                    ("convolution", self._convolution),
                ):
                    if self._is(module, what):
                        entries.append(self._part(path, module, prepare))
        if not any(entry.now for entry in entries):
            return entries
        if self.table.distances is not None:
            for module in list(self.model.modules()):
                if self._is(module, "distances"):
                    swap(module, conformer.SameDistances)
        return [*entries, self._whole(was, all(entry.now for entry in entries))]

    def _is(self, module: nn.Module, what: str) -> bool:
        kind = type(module)
        return kind.__name__ == self.table.name(what) and kind.__module__.startswith("transformers.models.")

    def _check_configuration(self) -> None:
        config = self.model.config
        for name, allowed in self.table.holds.items():
            value = getattr(config, name, None)
            if value not in allowed:
                raise Unlike(f"{name}: got {value!r}, wanted {' or '.join(map(repr, allowed))}")
        if getattr(config, "quantization_config", None) is not None:
            raise Unlike("quantization_config: got quantised weights, wanted floating-point ones")

    def _part(self, path: str, module: nn.Module, prepare: Callable[[nn.Module], tuple[Swap, list[Any]]]) -> Entry:
        was = type(module).__name__
        try:
            for name, parameter in module.named_parameters():
                if not parameter.is_floating_point():
                    raise Unlike(f"{name}: got {parameter.dtype}, wanted floating-point weights")
            change, calls = prepare(module)
            if self.verify:
                plain, trial = shares_weights(module), shares_weights(module)
                change(trial)
                fault = probe.part_fault(plain, trial, calls, self.backend)
                if fault is not None:
                    raise Unlike(fault)
        except Unlike as reason:
            return Entry(path, was, reason=str(reason))
        change(module)
        return Entry(path, was, f"pyxlbert {type(module).pyxlbert_ours.__name__}")  # type: ignore[attr-defined]

    def _attention(self, module: nn.Module) -> tuple[Swap, list[Any]]:
        parts = self.table.attention_parts
        for name in (parts.query, parts.key, parts.value, parts.out, parts.position):
            _child(module, name)
        biases = [getattr(module, name, None) for name in (parts.content_bias, parts.position_bias)]
        for name, bias in zip((parts.content_bias, parts.position_bias), biases, strict=True):
            if not isinstance(bias, Tensor) or bias.dim() != 2 or bias.shape != biases[0].shape:
                raise Unlike(f"{name}: got {_described(bias)}, wanted a parameter [H, D]")
        dropout = getattr(module, parts.dropout, None)
        if type(dropout) not in (nn.Dropout, float, int):
            raise Unlike(f"{parts.dropout}: got {_described(dropout)}, wanted a Dropout or a number")
        state = conformer.AttentionState(parts, self.model.config)

        def change(one: nn.Module) -> None:
            _swap_linears(one)
            swap(one, conformer.DistanceAttention, state)

        return change, self._attention_calls(module)

    def _attention_calls(self, module: nn.Module) -> list[Any]:
        """Calls without a mask, with the mask that the module takes, and with what ours may get in its place."""
        parts, like = self.table.attention_parts, getattr(module, self.table.attention_parts.content_bias)
        tokens = probe.places(like.device)
        batch, length = tokens.shape
        x, several = self._random(like, batch, length), self._random(like, batch, 2 * length - 1)

        def given(mask: Callable[[torch.dtype], Any] | None) -> probe.Arguments:
            # Where dropout is on the distances, each sequence has its own.
            same = mask is not None
            return lambda dtype: {
                "hidden_states": x.to(dtype),
                parts.positions: several[:1].to(dtype).expand_as(several) if same else several.to(dtype),
                parts.mask: None if mask is None else mask(dtype),
            }

        def native(dtype: torch.dtype) -> Tensor:
            if parts.masks == "square":
                return Keys(tokens).square()
            if parts.masks == "keys":
                return tokens[:, None].int()
            if getattr(self.model.config, "_attn_implementation", None) not in ("eager", None):
                return tokens[:, None, None, :]
            dense = torch.zeros(len(tokens), 1, 1, tokens.shape[1], dtype=dtype, device=tokens.device)
            return dense.masked_fill(~tokens[:, None, None, :], torch.finfo(dtype).min)

        short = {"square": lambda _: Keys(tokens), "interface": lambda _: tokens.sum(1, dtype=torch.int32)}
        masks = [native, short[parts.masks]] if parts.masks in short else [native]
        return [(given(None), given(None)), *((given(native), given(mask)) for mask in masks)]

    def _random(self, like: Tensor, *sizes: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*sizes, self.model.config.hidden_size, generator=generator).to(like.device, like.dtype)

    def _feed_forward(self, module: nn.Module) -> tuple[Swap, list[Any]]:
        parts = self.table.feed_forward_parts
        up = _child(module, parts.up)
        _child(module, parts.down)
        activation = _child(module, parts.activation)
        for name in (parts.inner_dropout, parts.dropout):
            dropout = 0.0 if name is None else getattr(module, name, None)
            if not isinstance(dropout, float | int | nn.Module):
                raise Unlike(f"{name}: got {_described(dropout)}, wanted a Dropout or a number")
        named = getattr(self.model.config, parts.activation_name, None)
        kind = ACTIVATIONS.get(named) if isinstance(named, str) else None
        state = conformer.FeedForwardState(parts, kind, type(activation), settings_of(activation))

        def change(one: nn.Module) -> None:
            _swap_linears(one)
            swap(one, conformer.FeedForward, state)

        return change, [self._rows(up)]

    def _convolution(self, module: nn.Module) -> tuple[Swap, list[Any]]:
        found = [one for one in module.modules() if conformer.is_pointwise(one)]
        if not found:
            raise Unlike("got no convolution of one place, wanted one")

        def change(one: nn.Module) -> None:
            for inner in one.modules():
                if conformer.is_pointwise(inner):
                    swap(inner, conformer.PointwiseConvolution)
            swap(one, conformer.Convolution)

        return change, [self._rows(found[0])]

    def _rows(self, like: nn.Module) -> tuple[probe.Arguments, probe.Arguments]:
        weight: Any = like.weight
        x = self._random(weight, *probe.places(weight.device).shape)
        arguments = {"hidden_states": x}
        return (lambda dtype: {name: one.to(dtype) for name, one in arguments.items()},) * 2

    def _whole(self, was: str, complete: bool) -> Entry:
        """The model itself, whose masks are made in another form where everything that they go to is replaced."""
        masks, reason = self.table.attention_parts.masks, None
        state = ConformerState(None if masks == "keys" else masks, self.backend)
        if state.masks is not None:
            reason = self._mask_fault(state) if complete else "not all of its layers' parts are replaced"
        if reason is not None:
            state, reason = conformer.without_masks(state), f"its masks stay as they are: {reason}"
        swap(self.model, conformer.Conformer, state)
        return Entry(self.name, was, "pyxlbert Conformer", reason)

    def _mask_fault(self, state: ConformerState) -> str | None:
        try:
            conformer.prepare_masks(self.table.attention_parts.masks)
        except ImportError as error:
            return str(error)
        if not self.verify:
            return None
        trial = shares_weights(self.model)
        swap(trial, conformer.Conformer, state)
        config = self.model.config
        width, frames = (getattr(config, one) if isinstance(one, str) else one for one in self.table.inputs)
        return probe.conformer_fault(self.plain, trial, width, frames)


def _child(module: nn.Module, name: str) -> nn.Module:
    child = module._modules.get(name)
    if child is None:
        raise Unlike(f"{name}: got nothing, wanted a module")
    return child


def _described(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else "nothing" if value is None else type(value).__name__


def _swap_linears(module: nn.Module) -> None:
    for inner in module.modules():
        if type(inner) is nn.Linear:
            swap(inner, ReplacedLinear)
