"""`accelerate` and `restore`: the classes of a model's modules, replaced in place and given back."""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from pyxlbert import backends, checks
from pyxlbert.integrations import probe
from pyxlbert.integrations.architecture import (
    Architecture,
    ConformerArchitecture,
    FunnelArchitecture,
    LayerParts,
    RelativeArchitecture,
)
from pyxlbert.integrations.conformer_drop_in import replace_conformer
from pyxlbert.integrations.funnel_drop_in import replace_funnel
from pyxlbert.integrations.modules import (
    MODULES,
    BiasedEncoder,
    Embeddings,
    EmbeddingState,
    Encoder,
    Layer,
    LayerState,
    Model,
    ModelState,
    Path,
    ReplacedLinear,
    Skipped,
    path_of,
)
from pyxlbert.integrations.relative import replace_relative
from pyxlbert.integrations.report import Entry, Report
from pyxlbert.integrations.swap import Replaced, Unlike, at, give_back, is_as_made, shares_weights, swap
from pyxlbert.nn import ACTIVATIONS

Table = Architecture | RelativeArchitecture | ConformerArchitecture | FunnelArchitecture

_LOG = logging.getLogger("pyxlbert")
_FOLDER = "pyxlbert.integrations.transformers"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LINEARS = ("query", "key", "value", "out", "up", "down")
_NORMS = ("out_norm", "norm")
_DROPOUTS = ("attention_dropout", "out_dropout", "down_dropout")


@cache
def architectures() -> dict[str, Table]:
    """Every table by its model type."""
    folder = importlib.import_module(_FOLDER)
    names = [info.name for info in pkgutil.iter_modules(folder.__path__) if not info.name.startswith("_")]
    tables = [importlib.import_module(f"{_FOLDER}.{name}").ARCHITECTURE for name in names]
    return {table.model_type: table for table in tables}


def accelerate(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    pack: bool = True,
    verify: bool = True,
    report: bool = False,
) -> Any:
    """Runs the layers of an existing model on our ops, in place.

    The classes of its modules are replaced, of these instances alone: parameters stay the same objects under the same
    names, and so do hooks, state dict and configuration.  Nothing is downloaded, and no weight is kept twice.

    Args:
        model: a model of `transformers`, or any module that contains one, such as a `SentenceTransformer`.
        dtype: casts the whole model first, as `model.to(dtype)` does: float32, bfloat16 or float16.
        backend: one of `pyxlbert.backends.NAMES`, for every op of the model; None takes the first that supports the
            inputs of each.
        pack: padding is removed before the first layer and put back after the last, as zeros, where the model's head
            does not read it and the first place of every sequence is a token.
        verify: every replacement is run once, beside what it replaces, on a small ragged batch, and what is further off
            than `pyxlbert.testing.tolerances` allows is left alone.
        report: also return what replaced each module, or why nothing did.

    Returns:
        the same model; with `report` the pair (model, `Report`).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing could be replaced (the message holds the report), the model is accelerated already, was
            compiled, or has weights on a meta or another device that no backend serves, or `backend` is unknown.
        RuntimeError: the named backend cannot run here.
    """
    for name, value in (("pack", pack), ("verify", verify), ("report", report)):
        checks.flag("accelerate", name, value)
    _check_backend(backend)
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"accelerate: dtype: got {dtype!r}, wanted {', '.join(map(str, _DTYPES))} or None")
    _check_model(model)
    if dtype is not None and any(True for _ in _bases(model, [])):
        model.to(dtype)
    try:
        done = _replace(model, pack, backend, verify)
    except BaseException:
        # Whole or not at all.
        for module in _replaced(model).values():
            give_back(module)
        raise
    _LOG.info("accelerate: %d modules replaced, %d left alone", len(done.replaced), len(done.left))
    for entry in done.left:
        _LOG.warning("accelerate: %s", entry)
    return (model, done) if report else model


def _replace(model: nn.Module, pack: bool, backend: str | None, verify: bool) -> Report:
    """Replaces what can be replaced; raises ValueError if that is nothing."""
    entries: list[Entry] = []
    for name, base, table in _bases(model, entries):
        heads = _heads(model, name)
        if isinstance(table, RelativeArchitecture):
            options = {"pack": pack, "backend": backend, "verify": verify}
            entries.append(replace_relative(name, base, table, heads, options))
        elif isinstance(table, ConformerArchitecture):
            entries += replace_conformer(name, base, table, backend, verify)
        elif isinstance(table, FunnelArchitecture):
            entries.append(replace_funnel(name, base, table, backend, verify))
        else:
            _Base(name, base, table, heads, ModelState(base.config, pack, backend, table.stack), verify).replace(
                entries
            )
    done = Report(tuple(entries))
    if not done.replaced:
        known = ", ".join(sorted(architectures()))
        found = f"\n{done}" if entries else f": it contains no model of transformers of the types {known}"
        raise ValueError(f"accelerate: model: got {type(model).__name__}, in which nothing could be replaced{found}")
    return done


def _replaced(model: nn.Module) -> dict[str, Replaced]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Replaced)}


def restore(model: nn.Module) -> nn.Module:
    """Gives the modules of an accelerated model their classes back; a cast by `dtype` stays.

    Args:
        model: what `accelerate` took, or a module in it.

    Returns:
        the same model.

    Raises:
        TypeError: model is not a module.
        ValueError: nothing in it was ever accelerated, or something else (a parametrization, sharding) has replaced a
            class since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model: got {type(model).__name__}, wanted a torch.nn.Module")
    replaced = _replaced(model)
    if not replaced:
        raise ValueError(f"restore: model: got {type(model).__name__}, in which nothing is accelerated")
    for name, module in replaced.items():
        if not is_as_made(module):
            got = f"{name or type(model).__name__}, the class of which is now {type(module).__name__}"
            raise ValueError(f"restore: model: got {got}, wanted what replaced it after accelerate undone first")
    for module in replaced.values():
        give_back(module)
    return model


def _check_backend(backend: str | None) -> None:
    if backend is None:
        return
    if not (isinstance(backend, str) and backend in backends.NAMES):
        raise ValueError(f"accelerate: backend: got {backend!r}, wanted one of {', '.join(backends.NAMES)} or None")
    reason = backends.unavailable(backend)
    if reason is not None:
        raise RuntimeError(f"accelerate: backend {backend!r} is unavailable: {reason}")


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model: got {type(model).__name__}, wanted a torch.nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, Replaced):
            raise ValueError(f"accelerate: model: got {name or 'one'} accelerated already, wanted restore(model) first")
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"accelerate: model: got {name or 'one'} compiled, wanted it before torch.compile")
    for name, parameter in model.named_parameters():
        if parameter.device.type not in ("cpu", "cuda"):
            raise ValueError(f"accelerate: model: got {name} on device {parameter.device}, wanted cpu or cuda")


def _bases(model: nn.Module, entries: list[Entry]) -> Iterator[tuple[str, nn.Module, Any]]:
    """The models of known architectures in a module, by name."""
    for name, module in list(model.named_modules()):
        table = architectures().get(getattr(getattr(module, "config", None), "model_type", None))
        if table is None:
            continue
        kind, wanted = type(module), table.models()
        if kind.__name__ in wanted and _of_transformers(kind):
            yield name, module, table
        elif any(one.__name__ in wanted for one in kind.__mro__):
            reason = f"a class of {kind.__module__}, wanted transformers' {' or '.join(wanted)}"
            entries.append(Entry(name, kind.__name__, reason=reason))


def _of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.models.")


def _heads(model: nn.Module, name: str) -> list[str]:
    """The names of the classes of the modules that a module is in."""
    names = name.split(".") if name else []
    return [type(model.get_submodule(".".join(names[:depth]))).__name__ for depth in range(len(names))]


class _Base:
    """One model of transformers and its table.

    Args:
        name: its path.
        model: it.
        table: of its architecture.
        heads: the classes of what it is in.
        state: what its encoder is to know.
        verify: whether replacements prove themselves.
    """

    def __init__(
        self, name: str, model: nn.Module, table: Architecture, heads: list[str], state: ModelState, verify: bool
    ) -> None:
        self.name, self.model, self.table, self.heads = name, model, table, heads
        self.state, self.verify = state, verify
        self.plain = shares_weights(model)

    def replace(self, entries: list[Entry]) -> None:
        """Replaces what can be replaced, and says so."""
        try:
            self._check_configuration()
        except Unlike as reason:
            entries.append(Entry(self.name, type(self.model).__name__, reason=str(reason)))
            return
        layers = [(name, one) for name, one in self.model.named_modules() if self._is(one, "layer")]
        whole = bool(layers)
        for name, layer in layers:
            entry = self._layer(self._path(name), layer)
            entries.append(entry)
            whole = whole and entry.now is not None
        try:
            if not whole:
                raise Unlike("not all of its layers are replaced" if layers else "got no layers")
            entries += self._around()
        except Unlike as reason:
            was = type(self.model).__name__
            if self.state.backend is not None:
                # It still says whose kernels its layers run on.
                swap(self.model, Model, replace(self.state, whole=False))
            entries.append(Entry(self.name, was, reason=f"{reason}, so padding stays"))

    def _path(self, name: str) -> str:
        return ".".join(part for part in (self.name, name) if part)

    def _is(self, module: nn.Module, what: str) -> bool:
        return type(module).__name__ == self.table.name(what) and _of_transformers(type(module))

    def _check_configuration(self) -> None:
        config = self.model.config
        for name, allowed in self.table.holds.items():
            value = getattr(config, name, None)
            if value is not None and value not in allowed:
                raise Unlike(f"{name}: got {value!r}, wanted {' or '.join(map(repr, allowed))}")
        if getattr(config, "quantization_config", None) is not None:
            raise Unlike("quantization_config: got quantised weights, wanted floating-point ones")

    def _layer(self, name: str, layer: nn.Module) -> Entry:
        was = type(layer).__name__
        try:
            plain, trial = shares_weights(layer), shares_weights(layer)
            width = self._part(layer, self.table.layer_parts, "norm", nn.LayerNorm).normalized_shape[0]
            state = self._layer_state(layer, plain, width)
            if self.verify:
                _swap_layer(trial, state)
                fault = probe.layer_fault(plain, trial, state, width, self.state.backend)
                if fault is not None:
                    raise Unlike(fault)
        except Unlike as reason:
            return Entry(name, was, reason=str(reason))
        _swap_layer(layer, state)
        return Entry(name, was, "pyxlbert Layer")

    def _layer_state(self, layer: nn.Module, plain: nn.Module, width: int) -> LayerState:
        """What the layer will know; raises `Unlike` where it is not what the table says."""
        parts, config = self.table.layer_parts, self.model.config
        for name in _LINEARS:
            linear = self._part(layer, parts, name, nn.Module)
            if callable(getattr(linear, "weight", None)):  # torch's quantised layers unpack theirs when they are asked
                got = f"{type(linear).__name__} of {type(linear).__module__}"
                raise Unlike(f"{getattr(parts, name)}: got {got}, quantised, wanted floating-point weights")
        for name in _NORMS:
            norm = self._part(layer, parts, name, nn.LayerNorm)
            if norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
                raise Unlike(f"{getattr(parts, name)}: got {norm}, wanted a weight and a bias for rows")
        for name in _DROPOUTS:
            if getattr(parts, name) is not None:
                self._part(layer, parts, name, nn.Dropout)
        self._part(layer, parts, "activation", nn.Module)
        for name, parameter in layer.named_parameters():
            if not parameter.is_floating_point():
                raise Unlike(f"{name}: got {parameter.dtype}, wanted floating-point weights")
        *owner, attribute = path_of(parts.heads)
        heads = getattr(at(layer, tuple(owner)), attribute, None)
        if type(heads) is not int or heads < 1:
            raise Unlike(f"{parts.heads}: got {heads!r}, wanted the number of heads")
        kind = ACTIVATIONS.get(getattr(config, parts.activation_name, None))
        paths = {name: path_of(getattr(parts, name)) for name in MODULES if getattr(parts, name) is not None}
        try:
            tuples = probe.returns_tuple(plain, width)
        except Exception as error:  # what another library's module raises is the reason
            raise Unlike(f"it cannot be tried: {type(error).__name__}: {error}") from None
        arguments = list(inspect.signature(type(layer).forward).parameters)  # self, rows, mask, others
        place = arguments.index("position_bias") - 3 if "position_bias" in arguments else None
        skipped = _skipped(layer, paths, fused=kind is not None)
        bias_at, implementation = place if parts.biased else None, getattr(config, "_attn_implementation", None)
        known = (parts, paths, skipped, heads, kind, tuples, bias_at, config, implementation)
        return LayerState(*known, type(plain).forward)

    @staticmethod
    def _part(layer: nn.Module, parts: LayerParts, name: str, kind: type[nn.Module]) -> Any:
        path = getattr(parts, name)
        module = at(layer, path_of(path))
        good = module is not None and (kind is nn.Module or type(module) is kind)
        if not good:
            got = "nothing" if module is None else type(module).__name__
            raise Unlike(f"{path}: got {got}, wanted {'a module' if kind is nn.Module else kind.__name__}")
        return module

    def _around(self) -> list[Entry]:
        """The embeddings, the encoder and the model itself, together; raises `Unlike` where they stay as they are."""
        found = {what: self._only(what) for what in ("embeddings", "encoder")}
        was, reason = type(self.model).__name__, None
        # Clones of the original, whose modules may be watched for a moment.
        whole = probe.takes_keys(shares_weights(self.plain), self.table)
        output = probe.encoder_output(shares_weights(self.plain), self.table)
        name, encoder = found["encoder"]
        asked = inspect.signature(type(encoder).forward).parameters.get("return_dict")
        state = replace(
            self.state,
            whole=whole,
            encoder=path_of(name),
            output=output,
            as_tuple=None if asked is None else not asked.default,
            forward=type(encoder).forward,
        )
        summary = getattr(self.model.config, "summary_type", None)
        reader = next((head for head in self.heads if self.table.computes_padding(head, summary)), None)
        if state.pack and reader is not None:
            state, reason = replace(state, pack=False), f"padding stays, for {reader} reads it"
        encoder = BiasedEncoder if self.table.layer_parts.biased else Encoder
        kinds = {"embeddings": (Embeddings, self._embedding_state(found["embeddings"][1])), "encoder": (encoder, state)}
        if self.verify:
            trial = shares_weights(self.model)
            for what, (kind, known) in kinds.items():
                swap(trial.get_submodule(found[what][0]), kind, known)
            swap(trial, Model, state)
            fault = probe.model_fault(self.plain, trial, self.table)
            if fault is not None:
                raise Unlike(fault)
        entries = []
        for what, (kind, known) in kinds.items():
            name, module = found[what]
            entries.append(Entry(self._path(name), type(module).__name__, f"pyxlbert {kind.__name__}"))
            swap(module, kind, known)
        swap(self.model, Model, state)
        return [*entries, Entry(self.name, was, "pyxlbert Model", reason)]

    def _only(self, what: str) -> tuple[str, nn.Module]:
        found = [(name, one) for name, one in self.model.named_modules() if self._is(one, what)]
        if len(found) != 1:
            raise Unlike(f"{self.table.name(what)}: got {len(found)}, wanted one")
        return found[0]

    def _embedding_state(self, module: nn.Module) -> EmbeddingState:
        parts = self.table.embedding_parts
        skipped = []
        for name, kind in (
            *((one, nn.Embedding) for one in (parts.word, parts.position, parts.token_type)),
            (parts.norm, nn.LayerNorm),
            (parts.dropout, nn.Dropout),
        ):
            if name is None:
                continue
            child = at(module, (name,))
            if type(child) is not kind:
                raise Unlike(f"{name}: got {type(child).__name__}, wanted {kind.__name__}")
            if kind is nn.Embedding and (child.max_norm is not None or child.sparse or child.scale_grad_by_freq):
                raise Unlike(f"{name}: got {child}, wanted a plain table")
            skipped.append(Skipped.of(module, (name,)))
        return EmbeddingState(parts, tuple(skipped))


def _skipped(layer: nn.Module, paths: Mapping[str, Path], fused: bool) -> tuple[Skipped, ...]:
    """The modules of a layer that are not called: those around others, norms, dropouts, and a fused activation."""
    names = (*_NORMS, *_DROPOUTS, *(("activation",) if fused else ()))
    around = {path[:depth] for path in paths.values() for depth in range(1, len(path))}
    skipped = (*sorted(around), *(paths[name] for name in names if name in paths))
    return tuple(Skipped.of(layer, path) for path in skipped)


def _swap_layer(layer: nn.Module, state: LayerState) -> None:
    for name in _LINEARS:
        for module in at(layer, state.paths[name]).modules():
            if type(module) is nn.Linear:
                swap(module, ReplacedLinear)
    swap(layer, Layer, state)
