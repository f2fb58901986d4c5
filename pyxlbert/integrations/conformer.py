"""Conformers: attention with a term of the distance, feed-forward networks and 1×1 convolutions, each on its own.

Their padding stays, since a convolution runs over it; what goes is the ``[B, H, T, 2 T - 1]`` product with the table of
distances, its shifted copy, and where the model's own code allows it the ``[B, 1, T, T]`` mask.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxlbert.backends import use_backend
from pyxlbert.integrations.architecture import DistanceParts, FeedForwardParts
from pyxlbert.integrations.attention import NAME, register_masks, shortest
from pyxlbert.integrations.modules import HARMLESS, ReplacedLinear, asked, tokens_of
from pyxlbert.integrations.swap import (
    Replaced,
    Settings,
    can_look,
    is_as_set,
    recorded,
    watched,
    watched_anywhere,
)
from pyxlbert.nn import linear_activation
from pyxlbert.nn.packing import Packable, Projection
from pyxlbert.ops.linear import linear
from pyxlbert.ops.relative_attention import relative_attention


class Keys:
    """Which places hold a token, in the place of a mask ``[B, 1, T, T]`` in which tokens see tokens alone.

    It goes through the code that would make one of them: every view of it is itself.

    Args:
        tokens: bool ``[B, T]``.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    @cached_property
    def shortest(self) -> Tensor | None:
        """None if all are tokens, lengths ``[B]`` if they say it all, else ``[B, T]``."""
        return shortest(self.tokens)

    def square(self) -> Tensor:
        """The mask itself."""
        return (self.tokens[:, None, :] & self.tokens[:, :, None])[:, None]

    def unsqueeze(self, dim: int) -> Keys:
        return self

    def expand(self, *sizes: int) -> Keys:
        return self

    def transpose(self, first: int, second: int) -> Keys:
        return self

    def __and__(self, other: Keys) -> Keys:
        return self

    def int(self) -> Tensor:
        """As the model returns it, ``[B, T]``."""
        return self.tokens.int()


@dataclass(frozen=True)
class AttentionState:
    """What attention knows: where its modules are, and the configuration."""

    parts: DistanceParts
    config: Any


class DistanceAttention(Replaced):
    """Attention with a term of the distance, in memory linear in the length; asked for weights it is as it was."""

    remembers = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parts: DistanceParts = self._pyxlbert.parts
        given = dict(zip(parts.arguments, args, strict=False)) | kwargs
        x, mask, distances = (given.pop(name, None) for name in ("hidden_states", parts.mask, parts.positions))
        options = None
        if isinstance(distances, Tensor) and len(args) <= len(parts.arguments) and self._usual(given):
            options = self._options(mask, x)
        if options is None:
            return self._by_module(args, kwargs)
        tokens = options.pop("tokens", None)
        content_bias = getattr(self, parts.content_bias)
        split = (-1, content_bias.shape[-1])
        query, key, value = (
            getattr(self, name)(x).unflatten(-1, split) for name in (parts.query, parts.key, parts.value)
        )  # [B, T, H, D]
        groups = query.shape[2] // key.shape[2]
        if groups > 1:
            key, value = (one.repeat_interleave(groups, dim=2) for one in (key, value))
        # One table, if all sequences have the same distances.
        distances = distances[0] if distances.shape[0] == 1 or distances.stride(0) == 0 else distances
        dropout = getattr(self, parts.dropout)
        mixed = relative_attention(
            query,
            key,
            value,
            getattr(self, parts.position)(distances).unflatten(-1, split),  # [R, H, D], or [B, R, H, D]
            content_bias=content_bias,
            position_bias=getattr(self, parts.position_bias),
            offset=x.shape[1] - 1,
            dropout_p=_probability(dropout) if self.training else 0.0,
            **options,
        )
        if tokens is not None:
            mixed = mixed.masked_fill(~tokens[:, :, None, None], 0.0)
        return getattr(self, parts.out)(mixed.flatten(2)), None

    def _usual(self, given: dict[str, Any]) -> bool:
        """Whether nobody asks for weights or watches the dropout, and every argument is known."""
        if any(value is not None and value is not False and name not in HARMLESS for name, value in given.items()):
            return False
        if "attentions" in (recorded() or ()) or not self.is_as_set():
            return False
        dropout = getattr(self, self._pyxlbert.parts.dropout)
        return not isinstance(dropout, nn.Module) or (type(dropout) is nn.Dropout and not watched(dropout))

    def _options(self, mask: Any, x: Tensor) -> dict[str, Any] | None:
        """A mask as arguments of the op, `tokens` beside them where padding sees nothing; None: it is not known."""
        if mask is None:
            return {}
        if isinstance(mask, Keys):
            short = mask.shortest
            return {} if short is None else _keys(short) | {"tokens": mask.tokens}
        if mask.dim() == 3 and self._pyxlbert.parts.masks == "keys":
            return _keys(shortest(mask[:, 0].ne(0)))
        if mask.dim() < 3:
            return _keys(mask)
        if mask.dim() != 4:
            return None
        tokens = tokens_of(mask, x)
        if tokens is not None:
            return _keys(shortest(tokens))
        return {"attention_mask": mask} if mask.dtype is torch.bool else None

    def _by_module(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """As the class that was replaced computes it, with the mask that it takes."""
        parts: DistanceParts = self._pyxlbert.parts
        place = parts.arguments.index(parts.mask)
        if len(args) > place:
            args = (*args[:place], self._native(args[place], args[0]), *args[place + 1 :])
        elif parts.mask in kwargs:
            x = args[0] if args else kwargs["hidden_states"]
            kwargs[parts.mask] = self._native(kwargs[parts.mask], x)
        return super().forward(*args, **kwargs)

    def _native(self, mask: Any, x: Tensor) -> Any:
        if isinstance(mask, Keys):
            return mask.square()
        if mask is None or mask.dim() > 2:
            return mask
        keys = mask if mask.dim() == 2 else torch.arange(x.shape[1], device=x.device) < mask[:, None]
        keys = keys[:, None, None, :]
        if getattr(self._pyxlbert.config, "_attn_implementation", None) not in ("eager", None):
            return keys
        return torch.zeros_like(keys, dtype=x.dtype).masked_fill(~keys, torch.finfo(x.dtype).min)


def _keys(mask: Tensor | None) -> dict[str, Tensor]:
    """Lengths or keys as an argument of the op."""
    if mask is None:
        return {}
    return {"key_lengths": mask} if mask.dim() == 1 else {"attention_mask": mask.to(torch.bool)[:, None, None, :]}


def _probability(dropout: Any) -> float:
    return float(dropout.p if isinstance(dropout, nn.Module) else dropout)


class SameDistances(Replaced):
    """Distances that do not depend on the sequence: made once, and seen by all."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states[:1]).expand(hidden_states.shape[0], -1, -1)


@dataclass(frozen=True)
class FeedForwardState:
    """What a feed-forward network knows: where its modules are, the activation's kind, its class and settings."""

    parts: FeedForwardParts
    activation: str | None
    kind: type[nn.Module]
    settings: Settings


class FeedForward(Replaced):
    """A feed-forward network, its activation with the first product."""

    remembers = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        state: FeedForwardState = self._pyxlbert
        parts = state.parts
        up, activation = getattr(self, parts.up), getattr(self, parts.activation)
        fused = state.activation is not None and isinstance(up, ReplacedLinear) and type(activation) is state.kind
        fused = fused and self.is_as_set() and is_as_set(activation, state.settings)
        if not fused or watched(up) or watched(activation):
            return super().forward(hidden_states)
        inner = linear_activation(up, hidden_states, state.activation)  # type: ignore[arg-type]  # [B, T, F]
        rows = getattr(self, parts.down)(self._drop(inner, parts.inner_dropout))  # [B, T, E]
        return self._drop(rows, parts.dropout)

    def _drop(self, x: Tensor, name: str | None) -> Tensor:
        dropout = None if name is None else getattr(self, name)
        if dropout is None or isinstance(dropout, nn.Module):
            return x if dropout is None else dropout(x)
        return F.dropout(x, dropout, self.training)


class PointwiseConvolution(Replaced, Packable):
    """A convolution of one place, ``[B, C, T]`` to ``[B, N, T]``: a linear layer on the places."""

    remembers = True

    def packed_layers(self, product: str = "") -> tuple[Projection, ...]:
        return (Projection(self.weight, to_heads=False),)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or not self.is_as_set():
            return super().forward(x)
        rows = x.transpose(1, 2)  # [B, T, C], as the model has it
        y = self.packed_product(rows)
        if y is None:
            y = linear(rows, self.weight.squeeze(-1), self.bias)
        elif self.bias is not None:
            y = y.add_(self.bias)  # nobody else has it, and there are no gradients
        return y.transpose(1, 2)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution of one place, and nothing more."""
    return type(module) is nn.Conv1d and (
        (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
        == ((1,), (1,), (0,), (1,), 1)
    )


class Convolution(Replaced):
    """The convolution's module: its 1×1 convolutions are replaced; beside `Keys` its own code runs."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        if attention_mask is None:
            return super().forward(hidden_states)
        if isinstance(attention_mask, Keys):
            attention_mask = attention_mask.tokens[:, None, None, :]
        return super().forward(hidden_states, attention_mask=attention_mask)


@dataclass(frozen=True)
class ConformerState:
    """What a model knows.

    Attributes:
        masks: in which form its mask is made; None: it stays as it is.
        backend: whose kernels run, or None.
    """

    masks: str | None
    backend: str | None


class Conformer(Replaced):
    """A model, or its encoder: its 2-D mask goes to the layers as lengths or keys, never as a T×T tensor."""

    keeps_signature = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: ConformerState = self._pyxlbert
        run = partial(super().forward, *args, **kwargs)
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if state.masks is not None and isinstance(mask, Tensor) and mask.dim() == 2 and self._may(mask, kwargs):
            run = partial(self.pyxlbert_original.forward, self._twin(state.masks), *args, **kwargs)
        with nullcontext() if state.backend is None else use_backend(state.backend):
            return run()

    def _may(self, mask: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether no layer hands the mask to somebody else, or has its weights asked for."""
        if not can_look(mask) or asked(kwargs, self.config, "output_attentions", "output_hidden_states"):
            return False
        return not watched_anywhere(self, recorded(), inside=True)

    def _twin(self, masks: str) -> nn.Module:
        """A module over the same parts, for this call: another makes its mask in a form that attention knows."""
        twin = self.pyxlbert_original.__new__(self.pyxlbert_original)
        twin.__dict__.update(self.__dict__)
        if masks == "interface":
            twin.__dict__["config"] = config = copy(self.config)
            config.__dict__["_attn_implementation_internal"] = NAME
        else:
            make: Callable[..., Tensor] = self._get_output_attention_mask
            twin.__dict__["_get_output_attention_mask"] = lambda *args, **kwargs: Keys(make(*args, **kwargs))
        return twin


def without_masks(state: ConformerState) -> ConformerState:
    """The state of a model whose mask stays as it is."""
    return replace(state, masks=None)


def prepare_masks(masks: str) -> None:
    """What has to be known to transformers before a model makes its mask in another form."""
    if masks == "interface":
        register_masks()
