"""Weights kept a second time in the processor's own order, for inference: `pack` and `unpack`."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyxlbert import backends
from pyxlbert.nn.saved_integers import SavedIntegers
from pyxlbert.nn.watch import hooked_everywhere
from pyxlbert.ops import _packed, _seen
from pyxlbert.ops._integers import Integers, quantise
from pyxlbert.ops._torch import is_zerotensor, transformed, watched

_LOG = logging.getLogger("pyxlbert")


@dataclass(frozen=True, eq=False)
class Projection:
    """A parameter `[E, H, D]` that is multiplied as a layer without bias.

    Attributes:
        parameter: the weight.
        to_heads: from E to H·D; False from H·D to E.
    """

    parameter: torch.nn.Parameter
    to_heads: bool

    @property
    def weight(self) -> Tensor:
        """`[N, K]`."""
        matrix = self.parameter.flatten(1)
        return matrix.t() if self.to_heads else matrix


Layers = tuple[torch.nn.Linear | Projection, ...]


class Packable(torch.nn.Module):
    """A module that multiplies by the weights of `packed_layers`, and by their packed copy where it may.

    The copy is no parameter and in no state dict.  `train()`, `load_state_dict` and whatever casts or moves the
    module drop it; a copied or unpickled module has none.
    """

    # By the names of `packed_products`; set on the instance by `pack`.
    packed: PackedProducts | None = None
    # Products that keep their dtype if a model is packed in eight-bit integers.
    never_quantised: tuple[str, ...] = ()
    # Set to `forward` in the body of a class whose layers may be one product with others of this very class: that
    # forward is a linear layer's.  A subclass has one of its own, and so has a patched class.
    fuses: Any = None

    def packed_layers(self, product: str = "") -> Layers:
        """The layers whose outputs a product holds side by side: the module itself, unless it says otherwise."""
        return (self,)  # type: ignore[return-value]

    def packed_products(self) -> tuple[str, ...]:
        """The names of the products, of a module that has several."""
        return ("",)

    def packed_product(self, x: Tensor, activation: str = "none", product: str = "") -> Tensor | None:
        """The outputs of `packed_layers` side by side, `[..., N]`, or None where the layers are to be called.

        Args:
            x: `[..., K]`.
            activation: "none", "gelu" (erf), "gelu_tanh", "relu" or "silu".
            product: one of `packed_products`.
        """
        packed = self.packed
        if packed is None or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return packed[product].product(x, self.packed_layers(product), activation)

    def drop_packed(self) -> None:
        """Forgets the copies, and tells whoever uses them."""
        packed, self.packed = self.packed, None
        if packed is not None:
            packed.drop()

    def train(self, mode: bool = True) -> Packable:
        if mode:
            self.drop_packed()
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.drop_packed()
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.drop_packed()
        super()._load_from_state_dict(*arguments, **options)


class _Once:
    """That something was done; a copy has not done it."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class PacksItself(torch.nn.Module):
    """A model that packs its weights when it first runs for inference, and again after its parts have dropped copies.

    Attributes:
        packs: None: it does not; "own": in its own dtype; "int8".
        saved_integers: those that it was loaded with.
    """

    packs: str | None = None
    saved_integers: SavedIntegers | None = None
    _packed_once: _Once | None = None

    def forget(self) -> None:
        """Packs again at the next forward pass for inference."""
        self._packed_once = None

    def pack_if_due(self) -> None:
        """Packs before a forward pass whose copies may be used."""
        if self.packs is None or self._packed_once is not None or self.training or torch.is_grad_enabled():
            return
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or watched()
        usual = not torch.is_autocast_enabled("cpu") and backends.default_backend() in (None, "cpu")
        if traced or not usual or not next(self.parameters()).is_cpu:
            return
        with _packing:
            if self._packed_once is None:
                pack(self, None if self.packs == "own" else self.packs)


# One thread packs, and the others wait for it.
_packing = threading.RLock()


def packs_by_default() -> bool:
    """Whether loaded models pack themselves: unless the environment says PYXLBERT_PACK=0.

    Raises:
        ValueError: it says another word.
    """
    wanted = os.environ.get("PYXLBERT_PACK", "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"PYXLBERT_PACK: got {wanted!r}, wanted 0 or 1")
    return wanted == "1"


class PackedWeight:
    """The weights `[N, K]` of one or more layers, one below the other, in the processor's order, and their biases.

    It follows its originals: a parameter that was written to or replaced is packed again at its next use, past
    autograd's version counter too unless some of it stays as it was (see `repack`).  Threads may use it at once.

    Args:
        quantised: as eight-bit integers.
        saved: those of some weights.
    """

    def __init__(self, quantised: bool = False, saved: SavedIntegers | None = None) -> None:
        self.quantised = quantised
        self._saved = saved
        # One attribute, replaced as a whole, so that a thread never sees half of a new copy.
        self._copy: _Copy | None = None

    def product(self, x: Tensor, layers: Layers, activation: str) -> Tensor | None:
        """See `Packable.packed_product`."""
        packed = self.current(layers) if _usual(x) else None
        return _packed.product(x, packed, activation) if packed is not None and _fits(x, packed) else None

    @property
    def bytes(self) -> int:
        """Of the copy."""
        return 0 if self._copy is None else self._copy.packed.bytes

    def current(self, layers: Layers) -> Any:
        """The packed weight of the layers as they are now; None where there is nothing to gain."""
        parameters = _parameters(layers)
        if parameters is None:
            return None
        copy = self._copy
        if copy is None or not copy.follows(parameters):
            self._copy = copy = _Copy.of(layers, parameters, self._integers(layers))
        return None if copy is None else copy.packed

    def forget(self) -> None:
        """Packs again at the next use."""
        self._copy = None

    def _integers(self, layers: Layers) -> Callable[[], list[Integers]] | None:
        """What gives those of the layers, if there are any."""
        if not self.quantised:
            return None
        return lambda: [_integers(_parameter(layer), layer.weight, self._saved) for layer in layers]


class _User(Protocol):
    """What is made of packed weights, and is to go when they do."""

    def forget(self) -> None: ...


class PackedProducts(dict[str, PackedWeight]):
    """The packed weights of a module's products, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.users: WeakSet[_User] = WeakSet()

    def drop(self) -> None:
        """Tells the users that the module has no copies any more."""
        for user in list(self.users):
            user.forget()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # What is in the processor's order can be neither copied nor pickled: a copy of the module starts without.
        return type(None), ()

    __hash__ = object.__hash__  # type: ignore[assignment]


class _Copy:
    """The packed form of some parameters, and what tells whether they are still the same."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.packed: Any = None
        self._contents = _seen.Contents(parameters)
        addresses = ((one.data_ptr(), one._version) for one in parameters)
        self._sources = [(alias, *one) for alias, one in zip(self._contents.aliases, addresses, strict=True)]

    @classmethod
    def of(
        cls, layers: Layers, parameters: list[Tensor], integers: Callable[[], list[Integers]] | None
    ) -> _Copy | None:
        _packed.require_memory(parameters)
        weights = [layer.weight.detach() for layer in layers]
        biases = [one.detach() for one in parameters if one.dim() == 1]
        # What tells of writes is read before the values: one in between is then seen.
        copy = cls(parameters)
        copy.packed = _packed.pack(weights, biases or None, integers)
        return None if copy.packed is None else copy

    def follows(self, parameters: list[Tensor]) -> bool:
        return (
            len(parameters) == len(self._sources)
            and _packed.readable(self.packed)
            and all(
                one._version == version
                and one.data_ptr() == address
                and one.dtype is source.dtype
                and one.shape == source.shape
                and one.stride() == source.stride()
                for one, (source, address, version) in zip(parameters, self._sources, strict=True)
            )
            and self._contents.unchanged()
        )


def pack(model: torch.nn.Module, dtype: str | None = None) -> torch.nn.Module:
    """Keeps the weights of a model's linear layers a second time, in the order in which the processor multiplies.

    Query, key and value of a self-attention become one product, and so do key and value of XLNet's.  The copies are
    used in eval mode where gradients are off (`torch.no_grad`, `torch.inference_mode`), and take as much memory as the
    weights; the layers of an encoder then run in one call.  They follow writes to the weights (see `repack` for those
    past autograd); `model.train()`, `load_state_dict` and `.to()` drop them, and a copied or unpickled model has none.
    Where the processor has nothing to gain the model stays as it is.

    Args:
        model: in eval mode; layers of `pyxlbert.nn` anywhere in it are packed.
        dtype: "int8" multiplies in the encoder's layers by eight-bit integers: of weights with a scale for each output,
            of rows with a smallest value and a scale for each row.  None keeps the model's own dtype.

    Returns:
        the same model.

    Raises:
        TypeError: model is not a module.
        ValueError: model is in training mode, where the copies would not be used, or holds no layer of this package;
            dtype is another word, or "int8" for a model that has no layers for it, or not in a dtype that is multiplied
            by the processor, or with a layer of more than 66,311 inputs, whose sums 32-bit integers would not hold.
    """
    _check_module("pack", model)
    if dtype not in (None, "int8"):
        raise ValueError(f"pack: dtype: got {dtype!r}, wanted None or 'int8'")
    if model.training:
        raise ValueError("pack: model: got a model in training mode, wanted one in eval mode: call model.eval() first")
    if not any(isinstance(module, Packable | PacksItself) for module in model.modules()):
        raise ValueError(
            f"pack: model: got {type(model).__name__}, which holds no layer of pyxlbert: "
            "call pyxlbert.accelerate(model) first, if it is a model of transformers"
        )
    quantised = {(id(module), product) for module, product in _quantised_products(model)} if dtype == "int8" else set()
    saved = saved_integers(model)
    covered: set[int] = set()
    made: list[PackedProducts] = []
    for module in model.modules():
        if not isinstance(module, Packable) or id(module) in covered:
            continue
        copies = PackedProducts()
        for product in module.packed_products():
            parts = module.packed_layers(product)
            packed = PackedWeight((id(module), product) in quantised, saved)
            if packed.current(parts) is not None:
                covered.update(id(part) for part in parts)
                copies[product] = packed
        if len(copies) == len(module.packed_products()):
            module.drop_packed()
            module.packed = copies
            made.append(copies)
    if dtype == "int8" and not any(one.quantised for copies in made for one in copies.values()):
        raise ValueError("pack: dtype: got 'int8' for a model without layers of an encoder in float32 or 16 bits")
    _follow_fused_optimizers()
    size = sum(one.bytes for copies in made for one in copies.values())
    if made:
        _LOG.info("%s: linear layers are packed, %d MB; unpack() drops that", type(model).__name__, size >> 20)
    for module in model.modules():
        if isinstance(module, PacksItself):
            module.packs, module._packed_once = module.packs and (dtype or "own"), _Once()
            for copies in made:
                copies.users.add(module)
    return model


def repack(model: torch.nn.Module) -> torch.nn.Module:
    """Has what `pack` keeps made anew at its next use, for what was written to weights past autograd.

    Writes that autograd counts are seen, and so are others (through `.data`, numpy, another process or library) that
    change all of a weight or bias, or anything in a bias.  A few elements of a matrix that are written to past autograd
    are not: whoever does that calls this.

    Args:
        model: any module; without copies it stays as it is.

    Returns:
        the same model.

    Raises:
        TypeError: model is not a module.
    """
    _check_module("repack", model)
    for module in model.modules():
        if isinstance(module, Packable) and module.packed is not None:
            for one in module.packed.values():
                one.forget()
            module.packed.drop()
    return model


def _quantised_products(model: torch.nn.Module) -> Iterator[tuple[Packable, str]]:
    """What "int8" is for: every product of a module inside a layer of an encoder."""
    layers = (module for module in model.modules() if getattr(module, "is_encoder_layer", False))
    for module in dict.fromkeys(part for layer in layers for part in layer.modules() if isinstance(part, Packable)):
        for product in module.packed_products():
            if product not in module.never_quantised:
                yield module, product


def is_quantised(model: torch.nn.Module) -> bool:
    """Whether `pack(model, "int8")` was the last word, or a model is to pack itself so."""
    for module in model.modules():
        if isinstance(module, PacksItself) and module.packs == "int8":
            return True
        if isinstance(module, Packable) and any(one.quantised for one in (module.packed or {}).values()):
            return True
    return False


def quantised_weights(model: torch.nn.Module) -> list[tuple[torch.nn.Parameter, Tensor]]:
    """The parameters that "int8" quantises, each with the `[N, K]` that it is multiplied as."""
    found: dict[int, tuple[torch.nn.Parameter, Tensor]] = {}
    for module, product in _quantised_products(model):
        layers = module.packed_layers(product)
        if _parameters(layers) is not None:
            found |= {id(_parameter(layer)): (_parameter(layer), layer.weight) for layer in layers}
    return list(found.values())


def integers_of(model: torch.nn.Module) -> list[tuple[torch.nn.Parameter, Integers]]:
    """The same parameters, and what they are multiplied as: as it was saved, or as they are now."""
    saved = saved_integers(model)
    return [(parameter, _integers(parameter, weight, saved)) for parameter, weight in quantised_weights(model)]


def saved_integers(model: torch.nn.Module) -> SavedIntegers | None:
    """Those that some part of the model was loaded with."""
    parts = (module for module in model.modules() if isinstance(module, PacksItself))
    return next((one.saved_integers for one in parts if one.saved_integers is not None), None)


def _parameter(layer: torch.nn.Linear | Projection) -> torch.nn.Parameter:
    return layer.parameter if isinstance(layer, Projection) else layer.weight


def _integers(parameter: torch.nn.Parameter, weight: Tensor, saved: SavedIntegers | None) -> Integers:
    return (saved.get(parameter) if saved is not None else None) or quantise(weight)


@functools.cache
def _follow_fused_optimizers() -> None:
    """Fused steps write to parameters without raising their versions; from now on it is done for them."""

    def follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for one in group["params"] if group.get("fused") else ():
                if one.grad is not None and not one.is_inference():
                    increment_version(one)

    register_optimizer_step_post_hook(follow)


def unpack(model: torch.nn.Module) -> torch.nn.Module:
    """Drops what `pack` has kept, and what a model was to pack by itself.

    Args:
        model: any module.

    Returns:
        the same model.

    Raises:
        TypeError: model is not a module.
    """
    _check_module("unpack", model)
    for module in model.modules():
        if isinstance(module, Packable):
            module.drop_packed()
        elif isinstance(module, PacksItself):
            module.packs = None
    return model


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function}: model: got {type(model).__name__}, wanted a torch.nn.Module")


def _parameters(layers: Layers) -> list[Tensor] | None:
    """Weights and biases in order, or None where the layers are not plain ones that can stand in one product."""
    if isinstance(layers[0], Projection):
        return _plain([layer.parameter for layer in layers])
    if not all(isinstance(layer, Packable) and isinstance(layer, torch.nn.Linear) for layer in layers):
        return None
    found: list[Tensor] = []
    several, biased = len(layers) > 1, layers[0].bias is not None
    for layer in layers:
        # Whoever has put another layer there, or watches one, wants it called.
        if several and (type(layer) is not type(layers[0]) or not _is_linear(layer)):
            return None
        if (layer.bias is not None) is not biased:
            return None
        if biased and layer.bias.shape != layer.weight.shape[:1]:
            return None
        found += (layer.weight, layer.bias) if biased else (layer.weight,)
    return _plain(found)


def _is_linear(layer: Packable) -> bool:
    """Whether a call of the layer is its product and nothing more."""
    state, kind = vars(layer), vars(type(layer))
    hooked = state["_forward_hooks"] or state["_forward_pre_hooks"]
    plain = kind.get("fuses") is not None and kind["fuses"] is kind.get("forward")
    return plain and not (hooked or layer.training or "forward" in state or hooked_everywhere())


def _plain(parameters: list[Tensor]) -> list[Tensor] | None:
    """The parameters, or None where a copy could not follow them or their products do not fit side by side."""
    first = parameters[0]
    for one in parameters:
        # A subclass of tensor, a parametrization or an inference tensor has no version to follow; one that is shared
        # with other processes is written to by them.
        if type(one) is not torch.nn.Parameter or one.is_inference() or one.dtype is not first.dtype or not one.is_cpu:
            return None
        if one.is_shared() or one.is_neg():
            return None
        if (one.dim() == 2 and one.shape[1] != first.shape[1]) or (one.dim() == 3 and one.shape != first.shape):
            return None
    return parameters


def _usual(x: Tensor) -> bool:
    """Whether this x is multiplied as it is: anything else is for the op, which casts, refuses or is traced."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.numel() > 0
        and x.dim() > 0
        and backends.default_backend() in (None, "cpu")
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        # Addresses are read: not of a view that negates what lies there, nor past a mode that wants to see the call.
        and not (x.is_neg() or is_zerotensor(x))
        and not (watched() or transformed())
    )


def _fits(x: Tensor, packed: Any) -> bool:
    return x.shape[-1] == packed.inner and _packed.dtype_of(packed) is x.dtype
