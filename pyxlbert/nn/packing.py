"""Weights kept a second time in the processor's own order, for inference: `pack` and `unpack`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.ops import _packed
from pyxlbert.ops._torch import is_zerotensor, watched

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

    def train(self, mode: bool = True) -> Packable:
        if mode:
            self.packed = None
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.packed = None
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.packed = None
        super()._load_from_state_dict(*arguments, **options)


class PacksItself(torch.nn.Module):
    """A model that packs its weights when it first runs for inference, and again after whatever has dropped them.

    Attributes:
        packs: None: it does not; "own": in its own dtype; "int8".
        pack_due: whether it has not done so since.
    """

    packs: str | None = None
    pack_due = True

    def train(self, mode: bool = True) -> PacksItself:
        self.pack_due = self.pack_due or mode
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.pack_due = True
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.pack_due = True
        super()._load_from_state_dict(*arguments, **options)

    def pack_if_due(self) -> None:
        """Packs before a forward pass whose copies may be used."""
        if self.packs is None or not self.pack_due or self.training or torch.is_grad_enabled():
            return
        first = next(self.parameters())
        if torch.compiler.is_compiling() or not first.is_cpu or torch.is_autocast_enabled("cpu"):
            return
        pack(self, None if self.packs == "own" else self.packs)
        size = sum(one.numel() * one.element_size() for one in self.parameters() if one.dim() > 1) >> 20
        _LOG.info("%s: linear layers are packed, at most %d MB; pack=False leaves that out", type(self).__name__, size)


class PackedWeight:
    """The weights `[N, K]` of one or more layers, one below the other, in the processor's order, and their biases.

    It follows its originals: a parameter that was written to or replaced is packed again at its next use.  Not seen
    are writes past autograd's version counter, through `.data` or through memory shared with another library.
    Threads may use it at once.

    Args:
        quantised: as eight-bit integers.
    """

    def __init__(self, quantised: bool = False) -> None:
        self.quantised = quantised
        # One attribute, replaced as a whole, so that a thread never sees half of a new copy.
        self._copy: _Copy | None = None

    def product(self, x: Tensor, layers: Layers, activation: str) -> Tensor | None:
        """See `Packable.packed_product`."""
        if not _takes(x, layers[0]):
            return None
        packed = self.current(layers)
        return None if packed is None else _packed.product(x, packed, activation)

    def current(self, layers: Layers) -> Any:
        """The packed weight of the layers as they are now; None where there is nothing to gain."""
        parameters = _parameters(layers)
        if parameters is None:
            return None
        copy = self._copy
        if copy is None or not copy.follows(parameters):
            self._copy = copy = _Copy.of(layers, parameters, self.quantised)
        return None if copy is None else copy.packed


class PackedProducts(dict[str, PackedWeight]):
    """The packed weights of a module's products, by name."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # What is in the processor's order can be neither copied nor pickled: a copy of the module starts without.
        return type(None), ()


class _Copy:
    """The packed form of some parameters, and what tells whether they are still the same.

    An alias of each parameter is kept, so that no other tensor can come to lie at its address.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.packed: Any = None
        self._sources = [(one.detach(), one.data_ptr(), one._version) for one in parameters]

    @classmethod
    def of(cls, layers: Layers, parameters: list[Tensor], quantised: bool) -> _Copy | None:
        weights = [layer.weight.detach() for layer in layers]
        biases = [one.detach() for one in parameters if one.dim() == 1]
        # The versions are read before the values: a write in between is then seen as one.
        copy = cls(parameters)
        copy.packed = _packed.pack(weights, biases or None, quantised)
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
        )


def pack(model: torch.nn.Module, dtype: str | None = None) -> torch.nn.Module:
    """Keeps the weights of a model's linear layers a second time, in the order in which the processor multiplies.

    Query, key and value of a self-attention become one product, and so do key and value of XLNet's.  The copies are
    used in eval mode where gradients are off (`torch.no_grad`, `torch.inference_mode`), and take as much memory as the
    weights; the layers of an encoder then run in one call.  They follow writes to the weights, except through `.data`;
    `model.train()`, `load_state_dict` and `.to()` drop them, and a copied or unpickled model has none.  Where the
    processor has nothing to gain the model stays as it is.

    Args:
        model: in eval mode; layers of `pyxlbert.nn` anywhere in it are packed.
        dtype: "int8" multiplies in the encoder's layers by eight-bit integers: of weights with a scale for each output,
            of rows with a smallest value and a scale for each row.  None keeps the model's own dtype.

    Returns:
        the same model.

    Raises:
        TypeError: model is not a module.
        ValueError: model is in training mode, where the copies would not be used, or dtype is another word.
    """
    _check_module("pack", model)
    if dtype not in (None, "int8"):
        raise ValueError(f"pack: dtype: got {dtype!r}, wanted None or 'int8'")
    if model.training:
        raise ValueError("pack: model: got a model in training mode, wanted one in eval mode: call model.eval() first")
    quantised: set[int] = set()
    if dtype == "int8":
        layers = [module for module in model.modules() if getattr(module, "is_encoder_layer", False)]
        quantised = {id(part) for layer in layers for part in layer.modules()}
    covered: set[int] = set()
    for module in model.modules():
        if not isinstance(module, Packable) or id(module) in covered:
            continue
        copies = PackedProducts()
        for product in module.packed_products():
            parts = module.packed_layers(product)
            packed = PackedWeight(id(module) in quantised and product not in module.never_quantised)
            if packed.current(parts) is not None:
                covered.update(id(part) for part in parts)
                copies[product] = packed
        if len(copies) == len(module.packed_products()):
            module.packed = copies
    for module in model.modules():
        if isinstance(module, PacksItself):
            module.packs, module.pack_due = module.packs and (dtype or "own"), False
    return model


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
            module.packed = None
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
    found: list[Tensor] = []
    several, biased = len(layers) > 1, layers[0].bias is not None
    for layer in layers:
        if not isinstance(layer, Packable) or not isinstance(layer, torch.nn.Linear):
            return None
        if several and (
            type(layer) is not type(layers[0]) or layer._forward_hooks or layer._forward_pre_hooks or layer.training
        ):
            # Whoever has put another layer there, or watches one, wants it called.
            return None
        if (layer.bias is not None) is not biased:
            return None
        found += (layer.weight, layer.bias) if biased else (layer.weight,)
    return _plain(found)


def _plain(parameters: list[Tensor]) -> list[Tensor] | None:
    """The parameters, or None where a copy could not follow them or their products do not fit side by side."""
    first = parameters[0]
    for one in parameters:
        # A subclass of tensor, a parametrization or an inference tensor has no version to follow.
        if type(one) is not torch.nn.Parameter or one.is_inference() or one.dtype is not first.dtype or not one.is_cpu:
            return None
        if (one.dim() == 2 and one.shape[1] != first.shape[1]) or (one.dim() == 3 and one.shape != first.shape):
            return None
    return parameters


def _takes(x: Tensor, layer: torch.nn.Linear | Projection) -> bool:
    """Whether this x is multiplied as it is: anything else is for the op, which casts, refuses or is traced."""
    weight = layer.weight
    return (
        type(x) is Tensor
        and x.dtype is weight.dtype
        and x.is_cpu
        and x.numel() > 0
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and backends.default_backend() in (None, "cpu")
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        # Addresses are read: not of a view that negates what lies there, nor past a mode that wants to see the call.
        and not (x.is_neg() or is_zerotensor(x))
        and not watched()
    )
