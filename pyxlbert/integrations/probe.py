"""Each replacement proves itself: run once on a small ragged batch beside what it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import wraps
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


def _reason(proof: Callable[..., None]) -> Callable[..., str | None]:
    """The proof as a function that returns why it failed, or None."""

    @wraps(proof)
    def tried(*args: Any) -> str | None:
        try:
            proof(*args)
        except AssertionError as error:
            return f"it computes something else: {error}"
        except Exception as error:  # another library's modules may raise anything; the reason is what counts
            return f"it cannot be tried: {type(error).__name__}: {error}"
        return None

    return tried


def returns_tuple(layer: nn.Module, width: int) -> bool:
    """Whether a layer, in eval mode, returns a tuple for one token of `width`."""
    weight = next(one for one in layer.parameters() if one.is_floating_point())
    with _quiet(None, weight.device):
        return isinstance(layer(weight.new_zeros(1, 1, width)), tuple)


@_reason
def layer_fault(plain: nn.Module, ours: nn.Module, state: LayerState, width: int, backend: str | None) -> None:
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
        output = layer(x, mask, position_bias=bias.to(x.dtype)) if state.parts.biased else layer(x, mask)
        return output[0] if isinstance(output, tuple) else output

    with _quiet(backend, device):
        wanted = run(plain, x, native_mask(keys, x.dtype, state))
        exact = x.double()
        truth = run(deepcopy(plain).double(), exact, native_mask(keys, exact.dtype, state))
        layout = TokenLayout.from_mask(mask, batch, length)
        padded, packed = run(ours, x, keys), run(ours, layout.take(x), layout)
    compare.within_budget("padded", padded, wanted, truth, factor=tolerances.REPLACEMENT_FACTOR)
    rows = (packed, layout.take(wanted), layout.take(truth))
    compare.within_budget("packed", *rows, factor=tolerances.REPLACEMENT_FACTOR)


def _ids(model: nn.Module, architecture: Architecture) -> tuple[Tensor, Tensor, torch.dtype]:
    """Ids and a mask ``[B, T]``, and the dtype of a model."""
    words = getattr(model.get_submodule("embeddings"), architecture.embedding_parts.word)
    mask = _mask(words.weight.device)
    ids = torch.randint(0, words.num_embeddings, mask.shape, generator=_generator()).to(mask.device)
    if words.padding_idx is not None:
        ids = torch.where(mask, ids, words.padding_idx)
    return ids, mask, words.weight.dtype


def takes_keys(model: nn.Module, architecture: Architecture) -> bool:
    """Whether a model, in eval mode, hands on a mask of keys ``[B, 1, 1, T]``, which some versions refuse."""
    ids, mask, _ = _ids(model, architecture)
    layer = next(one for one in model.modules() if type(one).__name__ == architecture.name("layer"))
    seen: list[Any] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[1] if len(given) > 1 else None))
    try:
        with _quiet(None, ids.device):
            model(ids, key_mask(mask))
    except Exception:
        return False
    finally:
        hook.remove()
    return bool(seen) and isinstance(seen[0], Tensor) and tuple(seen[0].shape[1:3]) == (1, 1)


def encoder_output(model: nn.Module, architecture: Architecture) -> type | None:
    """The class of what an encoder, in eval mode, returns; None if that is more than its rows, or cannot be seen."""
    ids, mask, _ = _ids(model, architecture)
    encoder = next(one for one in model.modules() if type(one).__name__ == architecture.name("encoder"))
    seen: list[Any] = []
    hook = encoder.register_forward_hook(lambda _, given, output: seen.append(output))
    try:
        with _quiet(None, ids.device):
            model(ids, mask.long())
    except Exception:
        return None
    finally:
        hook.remove()
    if len(seen) != 1:
        return None
    rows = seen[0].values() if hasattr(seen[0], "last_hidden_state") else seen[0]
    return type(seen[0]) if [isinstance(one, Tensor) for one in rows if one is not None] == [True] else None


@_reason
def model_fault(plain: nn.Module, ours: nn.Module, architecture: Architecture) -> None:
    """Why a model with everything replaced is not what it was, or None.

    Args:
        plain, ours: the model before and after, in eval mode.
        architecture: its table.
    """
    ids, mask, dtype = _ids(plain, architecture)
    with _quiet(None, ids.device):
        wanted = plain(ids, mask.long())[0]
        got = ours(ids, mask.long())[0]
    # Each layer has been proven already; what is further off than this is connected in another way.
    relative = tolerances.FLOAT64 if dtype is torch.float64 else tolerances.CONTESTANT[dtype]
    compare.close("last_hidden_state", got[mask], wanted[mask], relative)


@_reason
def relative_fault(plain: nn.Module, ours: nn.Module, like: Tensor) -> None:
    """Why a model of one of XLNet's layers is not what it was, or None.

    Args:
        plain, ours: the model before and after, in eval mode.
        like: a parameter, for its last dimension E, its dtype and its device.
    """
    device, generator = like.device, _generator()
    mask = _mask(device)[:2].flip(1)  # XLNet has its padding in front; half of an even batch may read backwards
    masked = plain.attn_type != "uni"  # else transformers itself fails on masks of a batch
    batch, length = mask.shape
    vectors = torch.randn(batch, length, like.shape[-1], generator=generator).to(device, like.dtype)
    memory = torch.randn(2, batch, like.shape[-1], generator=generator).to(device, like.dtype)
    types = torch.arange(length, device=device).expand(batch, -1) // 3
    order = (torch.rand(batch, length, length, generator=generator) < 0.4).to(device)
    mapping = torch.eye(length, device=device)[[length - 1, length - 2]].expand(batch, -1, -1)

    def run(model: nn.Module, **more: Tensor) -> Tensor:
        dtype = model.mask_emb.dtype
        mems = [memory.to(dtype)] if "target_mapping" not in more else None
        more = {name: value.to(dtype) for name, value in more.items()}
        options = {"attention_mask": mask.to(dtype) if masked else None, "token_type_ids": types, "mems": mems, **more}
        return model(inputs_embeds=vectors.to(dtype), use_mems=False, **options)[0]

    targets = {"target_mapping": mapping} | ({"perm_mask": order} if masked else {})
    with _quiet(None, device):
        got, wanted, exact = (run(model)[mask] for model in (ours, plain, deepcopy(plain).double()))
        compare.within_budget("one stream", got, wanted, exact, factor=tolerances.REPLACEMENT_FACTOR)
        # In other dtypes than float32 transformers itself fails on two.
        got, wanted = (run(deepcopy(model).float(), **targets) for model in (ours, plain))
    compare.close("two streams", got, wanted, tolerances.CONTESTANT[torch.float32])
