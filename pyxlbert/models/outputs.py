"""What models return: fields by name, by index and as a dictionary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch.utils._pytree as pytree
from torch import Tensor

if TYPE_CHECKING:
    from pyxlbert.nn.layout import TokenLayout


class ModelOutput(Mapping):
    """Base of the outputs. Fields that are None do not count: not as keys, not by index, not in the length.

    ``output.logits``, ``output["logits"]``, ``output[0]``, ``output[:2]``, ``output.to_tuple()``, ``**output`` and
    ``"logits" in output`` all work; iterating gives the names.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key in self.keys():
                return getattr(self, key)
            raise KeyError(key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self) if getattr(self, field.name) is not None)

    def __len__(self) -> int:
        return sum(getattr(self, field.name) is not None for field in fields(self))

    def __contains__(self, key: object) -> bool:
        return any(name == key for name in self)

    # Mapping's comparison would compare tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def to_tuple(self) -> tuple:
        """The fields that are not None, in their order."""
        return tuple(getattr(self, name) for name in self)


@dataclass(eq=False)
class BaseModelOutputWithPooling(ModelOutput):
    """``last_hidden_state`` [B, T, E], ``pooler_output`` [B, E]."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class PackedModelOutput(ModelOutput):
    """What the heads work on: ``last_hidden_state`` and ``hidden_states`` as rows, and the layout that places them."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    layout: TokenLayout | None = None

    def passed_on(self) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """What a head returns beside its own: `hidden_states` in their places, and `attentions`."""
        states = self.hidden_states
        return None if states is None else tuple(self.layout.restore(state) for state in states), self.attentions


@dataclass(eq=False)
class PreTrainingOutput(ModelOutput):
    """``prediction_logits`` [B, T, V], ``seq_relationship_logits`` [B, 2]."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class SentenceOrderOutput(ModelOutput):
    """``prediction_logits`` [B, T, V], ``sop_logits`` [B, 2]."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    sop_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class HeadOutput(ModelOutput):
    """``loss`` and ``logits`` of the heads that have one of each."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class QuestionAnsweringOutput(ModelOutput):
    """``start_logits`` and ``end_logits`` [B, T]."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class RecurrentModelOutput(ModelOutput):
    """``last_hidden_state`` [B, T, E], with targets [B, M, E]; ``mems`` one [mem_len, B, E] a layer."""

    last_hidden_state: Tensor | None = None
    mems: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple | None = None


@dataclass(eq=False)
class PackedRecurrentOutput(ModelOutput):
    """What the heads work on: ``last_hidden_state`` as rows, with padding's where it was kept, and their layout.

    `hidden_states` are in their places already: there may be two streams of them.
    """

    last_hidden_state: Tensor | None = None
    mems: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple | None = None
    layout: TokenLayout | None = None

    def passed_on(self) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None, tuple | None]:
        """What a head returns beside its own: `mems`, `hidden_states` and `attentions`."""
        return self.mems, self.hidden_states, self.attentions


@dataclass(eq=False)
class RecurrentHeadOutput(ModelOutput):
    """``loss``, ``logits`` and ``mems``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    mems: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple | None = None


@dataclass(eq=False)
class RecurrentQuestionAnsweringOutput(ModelOutput):
    """``start_logits`` and ``end_logits`` [B, T]."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    mems: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple | None = None


@dataclass(eq=False)
class BeamQuestionAnsweringOutput(ModelOutput):
    """With positions ``loss``; without them the best starts [B, S], their best ends [B, N·S] and ``cls_logits`` [B]."""

    loss: Tensor | None = None
    start_top_log_probs: Tensor | None = None
    start_top_index: Tensor | None = None
    end_top_log_probs: Tensor | None = None
    end_top_index: Tensor | None = None
    cls_logits: Tensor | None = None
    mems: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple | None = None
