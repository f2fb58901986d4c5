"""Each replacement proves itself: run once on a small ragged batch beside what it replaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from pyxlbert.backends import use_backend
from pyxlbert.integrations.architecture import Architecture
from pyxlbert.integrations.modules import LayerState, key_mask, native_mask
from pyxlbert.nn import TokenLayout
from pyxlbert.testing import compare, tolerances

# The lengths of a probe's sequences.
LENGTHS = (7, 4, 1)


@contextmanager
def _quiet(backend: str | None, device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _backend(backend):
        yield


def _backend(name: str | None) -> Any:
    return nullcontext() if name is None else use_backend(name)


def _mask(device: torch.device) -> Tensor:
    """Bool ``[B, T]``, True where a token is."""
    return torch.arange(max(LENGTHS), device=device) < torch.tensor(LENGTHS, device=device)[:, None]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def layer_fault(plain: nn.Module, ours: nn.Module, state: LayerState, width: int, backend: str | None) -> str | None:
    """Why a layer is not what it replaces, or None.

    Args:
        plain, ours: the layer before and after, in eval mode.
        state: ours'.
        width: E.
        backend: what ours runs on.
    """
    weight = next(one for one in plain.parameters() if one.is_floating_point())
    device, dtype, generator = weight.device, weight.dtype, _generator()
    mask = _mask(device)
    batch, length = mask.shape
    x = torch.randn(batch, length, width, generator=generator).to(device, dtype)
    keys = key_mask(mask)
    bias = torch.randn(1, state.heads, length, length, generator=generator).to(device, dtype)

    def run(layer: nn.Module, x: Tensor, mask: Any) -> Tensor:
        output = layer(x, mask, bias.to(x.dtype)) if state.parts.biased else layer(x, mask)
        return output[0] if isinstance(output, tuple) else output

    with _quiet(backend, device):
        wanted = run(plain, x, native_mask(keys, x.dtype, state))
        exact = x.double()
        truth = run(deepcopy(plain).double(), exact, native_mask(keys, exact.dtype, state))
        layout = TokenLayout.from_mask(mask, batch, length)
        padded, packed = run(ours, x, keys), run(ours, layout.take(x), layout)
    try:
        compare.within_budget("padded", padded, wanted, truth, factor=tolerances.REPLACEMENT_FACTOR)
        rows = (packed, layout.take(wanted), layout.take(truth))
        compare.within_budget("packed", *rows, factor=tolerances.REPLACEMENT_FACTOR)
    except AssertionError as error:
        return f"it computes something else: {error}"
    return None


def model_fault(plain: nn.Module, ours: nn.Module, architecture: Architecture) -> str | None:
    """Why a model with everything replaced is not what it was, or None.

    Args:
        plain, ours: the model before and after, in eval mode.
        architecture: its table.
    """
    words = getattr(ours.get_submodule("embeddings"), architecture.embedding_parts.word)
    device, dtype, generator = words.weight.device, words.weight.dtype, _generator()
    mask = _mask(device)
    ids = torch.randint(0, words.num_embeddings, mask.shape, generator=generator).to(device)
    if words.padding_idx is not None:
        ids = torch.where(mask, ids, words.padding_idx)
    with _quiet(None, device):
        wanted = plain(ids, mask.long())[0]
        got = ours(ids, mask.long())[0]
    try:
        # Each layer has been proven already; what is further off than this is connected in another way.
        compare.close("last_hidden_state", got[mask], wanted[mask], tolerances.CONTESTANT[dtype])
    except AssertionError as error:
        return f"it computes something else: {error}"
    return None
