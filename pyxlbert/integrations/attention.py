"""``attn_implementation="pyxlbert"``: the op `attention` in every model that asks transformers for one by name.

Both of transformers' interfaces are served, that of attention and that of masks: without the second, transformers would
hand over no mask, and padding would be attended.  Of a mask the shape says what it means:

- None: every key, or with a causal module those up to the query;
- lengths ``[B]``, integers: the first keys of each sequence, and causal as above;
- keys ``[B, Tk]``, boolean: these keys, and causal as above;
- ``[B, H or 1, Tq or 1, Tk]``: the whole mask, boolean, or floating point and added to the scores.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from pyxlbert.integrations.swap import can_look
from pyxlbert.ops._weights import attention_with_weights
from pyxlbert.ops.attention import attention

NAME = "pyxlbert"

# Of what a model may ask beside: changes of the scores that the op does not make.
_UNKNOWN = ("softcap", "s_aux", "sinks", "head_mask", "sliding_window_mask")


def register_attention() -> None:
    """Makes ``attn_implementation="pyxlbert"`` known to transformers, for models made or switched after it.

    Raises:
        ImportError: transformers is not installed, or has no such interfaces.
    """
    from transformers import AttentionInterface

    register_masks()
    AttentionInterface.register(NAME, attention_forward)


def register_masks() -> None:
    """Makes the form of masks known to transformers; raises ImportError as `register_attention` does."""
    from transformers import AttentionMaskInterface, __version__, masking_utils

    if "q_length" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError(
            f"register_attention: got transformers {__version__}, wanted 5.4 or later: masks differ there"
        )
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """What transformers hands to `attention_forward`: lengths or keys if they say it all, else a whole mask.

    Args:
        batch_size, q_length, kv_length: B, Tq and Tk.
        q_offset, kv_offset: the places of the first query and the first key.
        mask_function: which query may see which key.
        attention_mask: ``[B, places]``, 1 for a token.
        options: transformers' others.

    Returns:
        see the module.
    """
    from transformers import masking_utils

    bidirectional = mask_function is getattr(masking_utils, "bidirectional_mask_function", ())
    causal = mask_function is getattr(masking_utils, "causal_mask_function", ())
    # A causal op has its last query see the last key.
    aligned = type(q_offset) is int and type(kv_offset) is int and q_offset + q_length == kv_offset + kv_length
    # What is not to be left out is put together with another mask later.
    short = (bidirectional and options.get("allow_is_bidirectional_skip", False)) or (
        causal and aligned and options.get("allow_is_causal_skip", True)
    )
    if not short:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **options,
        )
    keys = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return None if keys is None else shortest(keys[:, kv_offset : kv_offset + kv_length])


def shortest(keys: Tensor) -> Tensor | None:
    """A mask of keys ``[B, Tk]`` as None or lengths, where they say the same."""
    keys = keys.to(torch.bool)
    if not can_look(keys):
        return keys
    if bool(keys.all()):
        return None
    lengths = keys.sum(1, dtype=torch.int32)
    prefix = torch.arange(keys.shape[1], device=keys.device) < lengths[:, None]
    return lengths if bool((prefix == keys).all()) else keys


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it.

    Args:
        module: the attention module that calls; whether it is causal counts where `is_causal` is None.
        query: ``[B, H, Tq, D]``.
        key, value: ``[B, H or fewer, Tk, D]``; each of fewer heads serves as many of the query's.
        attention_mask: see the module.
        dropout: probability that a weight is dropped.
        scaling: factor of q kᵀ; None: D ** -0.5.
        is_causal: whether a query sees only keys up to itself, if the mask is not a whole one.
        position_bias: added to the scores, ``[B or 1, H or 1, Tq or 1, Tk]``.
        options: `output_attentions` asks for the weights; others of transformers change nothing here.

    Returns:
        out ``[B, Tq, H, D]``, and None or the weights ``[B, H, Tq, Tk]``.

    Raises:
        ValueError: the model asks for what the op does not compute, or the mask has another shape.
    """
    for name in _UNKNOWN:
        if options.get(name) is not None:
            raise ValueError(f"attn_implementation 'pyxlbert': {name}: got {options[name]!r}, wanted None")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    given: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "bias": position_bias}
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    given["causal"] = bool(causal)
    if attention_mask is not None:
        given |= _masks(attention_mask, position_bias)
    rows = (one.transpose(1, 2) for one in (query, key, value))  # [B, T, H, D]
    if options.get("output_attentions"):
        return attention_with_weights(*rows, **given)
    return attention(*rows, **given), None


def _masks(mask: Tensor, bias: Tensor | None) -> dict[str, Any]:
    """A mask as arguments of the op."""
    if mask.dim() == 1:
        return {"key_lengths": mask}
    if mask.dim() == 2:
        return {"attention_mask": mask.to(torch.bool)[:, None, None, :]}
    if mask.dim() != 4:
        raise ValueError(
            f"attn_implementation 'pyxlbert': attention_mask: got shape {list(mask.shape)}, wanted 1, 2 or 4 dimensions"
        )
    # A whole mask holds what is causal, too.
    if mask.is_floating_point():
        return {"causal": False, "bias": mask if bias is None else bias + mask}
    return {"causal": False, "attention_mask": mask.to(torch.bool)}
