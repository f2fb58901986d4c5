"""The hidden states of packed texts: which layers, and how several become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pyxlbert.models import BertModel, RobertaModel, XLNetModel

from .tokenizer import TextTokenizer

COMBINATIONS = ("mean", "sum", "concat")


class Layers(NamedTuple):
    """Which layers of a model, and how several become one.

    Attributes:
        indices: into `hidden_states`, 0 being the embeddings; None is the last layer's output alone.
        combine: "mean", "sum" or "concat".
    """

    indices: tuple[int, ...] | None = None
    combine: str = "mean"

    @property
    def width(self) -> int:
        """How many times the hidden size a row has."""
        return len(self.indices) if self.indices is not None and self.combine == "concat" else 1

    @classmethod
    def of(cls, layers: object, count: int) -> Layers:
        """What the argument `layers` of `SentenceEncoder.encode` says, for a model of `count` layers.

        Raises:
            TypeError: it is neither a layer nor several.
            ValueError: it names no layer, or one that the model does not have.
        """
        if layers is None:
            return cls()
        several = isinstance(layers, (Sequence, range)) and not isinstance(layers, (str, bytes))
        items = list(layers) if several or (isinstance(layers, np.ndarray) and layers.ndim == 1) else [layers]
        combine = items.pop(0) if items and isinstance(items[0], str) and items[0] in COMBINATIONS else "mean"
        wanted = f"wanted layers from {-count - 1} to {count} (0 is the embeddings)"
        if not items:
            raise ValueError(f"layers: got {layers!r}, which names no layer; {wanted}")
        for layer in items:
            if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
                raise TypeError(f"layers: got {layers!r}; wanted an int, several, ('sum', int, ...) or ('concat', ...)")
            if not -count - 1 <= layer <= count:
                raise ValueError(f"layers: got {layer}; {wanted}")
        resolved = tuple(int(layer) % (count + 1) for layer in items)
        return cls() if resolved == (count,) else cls(resolved, combine)


class HiddenStates:
    """Runs a model on packed ids and returns the chosen layer or combination of layers.

    Shape: ids of B texts, `total` of them in all, give [total, width·E].
    """

    def __init__(self, model: BertModel | RobertaModel | XLNetModel, tokenizer: TextTokenizer, layers: Layers) -> None:
        self.model, self.tokenizer, self.layers = model, tokenizer, layers

    def __call__(self, ids: list[np.ndarray]) -> torch.Tensor:
        given = packed_inputs(ids, self.tokenizer, next(self.model.parameters()).device)
        # A directory's config may ask for tuples or for attention weights.
        given |= {"output_attentions": False, "return_dict": True}
        output = self.model(output_hidden_states=self.layers.indices is not None, **given)
        if self.layers.indices is None:
            return output.last_hidden_state.flatten(end_dim=-2)
        states = [output.hidden_states[layer].flatten(end_dim=-2).float() for layer in self.layers.indices]
        if self.layers.combine == "concat":
            return torch.cat(states, dim=-1)
        total, *rest = states
        for other in rest:
            total = total + other
        return total / len(states) if self.layers.combine == "mean" else total


def packed_inputs(ids: list[np.ndarray], tokenizer: TextTokenizer, device: torch.device) -> dict[str, Any]:
    """The model's arguments for texts that lie one after the other."""
    given: dict[str, Any] = {}
    tokens = torch.from_numpy(ids[0][None] if len(ids) == 1 else np.concatenate(ids)).long().to(device)
    lengths = [len(i) for i in ids]
    if len(ids) > 1:  # a text alone is a batch without padding
        given |= boundaries(lengths, device)
    types = [one for one in map(tokenizer.types, lengths) if one is not None]
    if types:
        given["token_type_ids"] = torch.from_numpy(np.concatenate(types)).view(tokens.shape).to(device)
    return {"input_ids": tokens, **given}


def boundaries(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Where packed texts begin and end, as the models take it."""
    cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    return {"cu_seqlens": cu_seqlens.to(device), "max_seqlen": max(lengths)}
