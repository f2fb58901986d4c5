"""What an XLNet is called with, checked and arranged: where tokens lie, who sees whom, where targets stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyxlbert.models.inputs import (
    check_device,
    check_ids,
    check_integers,
    check_range,
    check_shape,
    check_tensors,
    check_tokens,
    check_zero_one,
)
from pyxlbert.models.xlnet_config import XLNetConfig
from pyxlbert.nn import MEMORY_RANK, PADDING_RANK, UNSEEN_RANK, TokenLayout, has_values


class XLNetInputs(NamedTuple):
    """The arguments of one call; `XLNetModel.forward` says what they are.

    The first `SHARED` are those that every head takes, in the order in which the encoder takes them.
    """

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    mems: Sequence[Tensor] | None = None
    perm_mask: Tensor | None = None
    target_mapping: Tensor | None = None
    token_type_ids: Tensor | None = None
    input_mask: Tensor | None = None
    inputs_embeds: Tensor | None = None
    use_mems: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    target_positions: Tensor | None = None
    query_rank: Tensor | None = None
    key_rank: Tensor | None = None
    mems_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    reads: str | None = None


SHARED = XLNetInputs._fields.index("target_positions")


@dataclass(frozen=True, eq=False)
class Arrangement:
    """A batch that was checked, in the order in which it is computed.

    Attributes:
        tokens: where the rows of the content stream lie.
        padding_read: whether somebody looks at what stands at padding.
        mems: one ``[mem_len, B, E]`` a layer as they were given; None where there are none.
        seen_mems: the same with zeros at padding.
        memory: mem_len.
        token_types: ``[B, T]``, packed ``[total]``, or None.
        target_mapping: ``[B, M, T]``, where targets are computed at every place.
        target_positions: int32 ``[B, M]``, where they are computed at theirs. Without targets both are None.
        masks: who may see whom, as fields of a `RelativeLayout`.
    """

    tokens: TokenLayout
    padding_read: bool
    mems: Sequence[Tensor] | None
    seen_mems: Sequence[Tensor] | None
    memory: int
    token_types: Tensor | None
    target_mapping: Tensor | None
    target_positions: Tensor | None
    masks: dict[str, Any]

    @property
    def longest(self) -> int:
        """T, packed the longest sequence's length."""
        return self.tokens.max_seqlen if self.tokens.packed else self.tokens.length

    @property
    def target_shape(self) -> tuple[int, int] | None:
        """B and M, or None without targets."""
        targets = self.target_positions if self.target_mapping is None else self.target_mapping
        return None if targets is None else (targets.shape[0], targets.shape[1])


def arrange(given: XLNetInputs, config: XLNetConfig, weight: Tensor) -> Arrangement:
    """Checks a call's arguments and arranges them.

    Args:
        given: the arguments, with defaults filled in.
        config: the model's.
        weight: of the word embeddings, for its device and its dtype.

    Raises:
        ValueError: an argument has a wrong shape or value, or two exclude each other; the message names it.
        TypeError: an argument has a wrong dtype.
    """
    device = weight.device
    check_tensors(
        input_ids=given.input_ids,
        attention_mask=given.attention_mask,
        perm_mask=given.perm_mask,
        target_mapping=given.target_mapping,
        token_type_ids=given.token_type_ids,
        input_mask=given.input_mask,
        inputs_embeds=given.inputs_embeds,
        target_positions=given.target_positions,
        query_rank=given.query_rank,
        key_rank=given.key_rank,
        mems_mask=given.mems_mask,
        cu_seqlens=given.cu_seqlens,
    )
    padded = given.cu_seqlens is None
    _, rows = check_tokens(given.input_ids, given.inputs_embeds, config.d_model, device, packed=not padded)
    if given.input_ids is not None:
        check_range("input_ids", given.input_ids, 0, config.vocab_size - 1)
    mems, padding_read = None, False
    if padded:
        batch, length = rows.shape[:2]
        real = _real_tokens(given, batch, length, device)
        mems = _checked_mems(given, config, batch, device)
        _check_order(given, batch, length, device)
        padding_read = given.use_mems or given.output_attentions or _reads_padding(given.reads, real)
        # With a tensor for pairs of places, or places of targets and memories, nothing is left out.
        placed = any(x is not None for x in (mems, given.perm_mask, given.target_mapping, given.target_positions))
        whole = padding_read or placed or _moving_window(config)
        if whole or real is None or not has_values(real) or not _one_piece(real):
            tokens = TokenLayout(batch, length, token_mask=real)
        else:
            tokens = TokenLayout.from_mask(real, batch, length)
    else:
        tokens = _packed_tokens(given, rows.shape[0], device)
    if config.bi_data and tokens.batch % 2:
        raise ValueError(f"bi_data: got a batch of {tokens.batch}, wanted an even one: half reads backwards")
    shape = rows.shape if given.inputs_embeds is None else rows.shape[:-1]
    token_types = check_ids("token_type_ids", given.token_type_ids, shape, device)
    if token_types is not None:
        check_range("token_type_ids", token_types, -(2**31), 2**31 - 1)
    memory = 0 if mems is None else mems[0].shape[0]
    mapping = positions = None
    masks: dict[str, Any] = {"causal": config.attn_type == "uni"}
    if padded:
        mapping, positions = _targets(given, batch, length, weight)
        masks = _masks(given, config, tokens, memory, positions is not None, padding_read, device)
    seen_mems = mems
    if mems is not None and given.mems_mask is not None:
        unseen = ~given.mems_mask.to(torch.bool).t()[..., None]  # [mem_len, B, 1]
        seen_mems = [one.masked_fill(unseen, 0.0) for one in mems]
    return Arrangement(tokens, padding_read, mems, seen_mems, memory, token_types, mapping, positions, masks)


def _packed_tokens(given: XLNetInputs, total: int, device: torch.device) -> TokenLayout:
    """The layout of rows that came packed, beside which nothing may be given that has places."""
    for name in (
        "mems",
        "attention_mask",
        "input_mask",
        "perm_mask",
        "target_mapping",
        "target_positions",
        "query_rank",
        "key_rank",
        "mems_mask",
    ):
        if getattr(given, name) is not None:
            raise ValueError(f"{name}: given together with cu_seqlens, wanted a padded batch")
    for name in ("use_mems", "output_attentions"):
        if getattr(given, name):
            raise ValueError(f"{name}: given together with cu_seqlens, wanted a padded batch")
    check_device("cu_seqlens", given.cu_seqlens, device)
    return TokenLayout.from_cu_seqlens(given.cu_seqlens, total, given.max_seqlen)


def _real_tokens(given: XLNetInputs, batch: int, length: int, device: torch.device) -> Tensor | None:
    """Bool [B, T], True where a token is; None when every place has one."""
    if given.attention_mask is not None and given.input_mask is not None:
        raise ValueError("input_mask: given together with attention_mask, wanted one of them")
    name = "attention_mask" if given.input_mask is None else "input_mask"
    mask = getattr(given, name)
    if mask is None:
        return None
    check_device(name, mask, device)
    check_shape(name, mask, (batch, length))
    check_zero_one(name, mask)
    real = mask.to(torch.bool) if given.input_mask is None else ~mask.to(torch.bool)  # [B, T]
    return None if has_values(real) and bool(real.all()) else real


def _checked_mems(given: XLNetInputs, config: XLNetConfig, batch: int, device: torch.device) -> Sequence[Tensor] | None:
    """The memories, None where there are none; their mask is checked too."""
    mems = _mems(given.mems, config, batch, device)
    if given.mems_mask is not None:
        check_device("mems_mask", given.mems_mask, device)
        check_shape("mems_mask", given.mems_mask, (batch, 0 if mems is None else mems[0].shape[0]))
        check_zero_one("mems_mask", given.mems_mask)
    return mems


def _mems(mems: object, config: XLNetConfig, batch: int, device: torch.device) -> Sequence[Tensor] | None:
    if mems is not None and not isinstance(mems, (list, tuple)):
        raise TypeError(f"mems: got {type(mems).__name__}, wanted a list or a tuple with a tensor for every layer")
    if mems is None or all(one is None for one in mems):
        return None
    if len(mems) != config.n_layer:
        raise ValueError(f"mems: got {len(mems)} memories, wanted one for each of {config.n_layer} layers")
    for one in mems:
        if not isinstance(one, Tensor):
            raise TypeError(f"mems: got {type(one).__name__}, wanted a tensor for every layer")
        check_tensors(mems=one)
        if not one.is_floating_point():
            raise TypeError(f"mems: got {one.dtype}, wanted a floating-point dtype")
        if one.dim() != 3 or one.shape[1:] != (batch, config.d_model) or one.shape[0] != mems[0].shape[0]:
            wanted = f"[mem_len, {batch}, {config.d_model}], the same mem_len in every layer"
            raise ValueError(f"mems: got shape {list(one.shape)}, wanted {wanted}")
        check_device("mems", one, device)
    return mems if mems[0].shape[0] else None


def _check_order(given: XLNetInputs, batch: int, length: int, device: torch.device) -> None:
    """Raises ValueError or TypeError for what says who may see whom."""
    query_rank, key_rank, perm_mask = given.query_rank, given.key_rank, given.perm_mask
    if (query_rank is None) != (key_rank is None):
        missing = "query_rank" if query_rank is None else "key_rank"
        raise ValueError(f"{missing}: got None, wanted both query_rank and key_rank or neither")
    if perm_mask is not None:
        if query_rank is not None:
            raise ValueError("perm_mask: given together with query_rank and key_rank, wanted one of the two")
        check_device("perm_mask", perm_mask, device)
        check_shape("perm_mask", perm_mask, (batch, length, length))
    for name, rank in (("query_rank", query_rank), ("key_rank", key_rank)):
        if rank is None:
            continue
        if rank.dtype != torch.int32:
            raise TypeError(f"{name}: got {rank.dtype}, wanted torch.int32")
        check_device(name, rank, device)
        check_shape(name, rank, (batch, length))


def _targets(given: XLNetInputs, batch: int, length: int, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The mapping or the positions, whichever is computed with; both None without targets."""
    mapping, positions = given.target_mapping, given.target_positions
    if mapping is not None and positions is not None:
        raise ValueError("target_positions: given together with target_mapping, wanted one of them")
    if positions is not None:
        check_integers("target_positions", positions)
        check_device("target_positions", positions, weight.device)
        if positions.dim() != 2 or positions.shape[0] != batch:
            raise ValueError(f"target_positions: got shape {list(positions.shape)}, wanted [{batch}, M]")
        check_range("target_positions", positions, -1, length - 1)
        return None, positions.int()
    if mapping is None:
        return None, None
    check_device("target_mapping", mapping, weight.device)
    if mapping.dim() != 3 or (mapping.shape[0], mapping.shape[2]) != (batch, length):
        raise ValueError(f"target_mapping: got shape {list(mapping.shape)}, wanted [{batch}, M, {length}]")
    # The weights at every place are what transformers returns, so they are computed at every place.
    found = None if given.output_attentions else _one_hot_positions(mapping)
    return (mapping.to(weight.dtype), None) if found is None else (None, found)


def _masks(
    given: XLNetInputs,
    config: XLNetConfig,
    tokens: TokenLayout,
    memory: int,
    at_positions: bool,
    padding_read: bool,
    device: torch.device,
) -> dict[str, Any]:
    """Who may see whom, as fields of a `RelativeLayout`."""
    query_rank, key_rank, perm_mask = given.query_rank, given.key_rank, given.perm_mask
    causal = config.attn_type == "uni"
    if tokens.packed:
        ranks = {} if query_rank is None else {"query_rank": query_rank, "key_rank": key_rank}
        return {"causal": causal} | {name: tokens.take(x) for name, x in ranks.items()}  # [total]
    batch, length = tokens.batch, tokens.length
    keys = memory + length
    numbers = torch.arange(keys, device=device, dtype=torch.int32)  # [Tk]
    places = torch.arange(length, device=device, dtype=torch.int32)  # [T]
    visible = None  # [B or 1, T, Tk]
    if causal and (config.same_length or (at_positions and (perm_mask is not None or query_rank is not None))):
        visible = (numbers <= places[:, None] + memory)[None]
        if config.same_length:
            visible = visible & (numbers >= places[:, None])
        causal = False
    hidden = _hidden_keys(given.mems_mask, tokens, memory, device)  # [B, Tk]
    if perm_mask is not None:
        allowed = perm_mask <= 0 if perm_mask.dtype != torch.bool else ~perm_mask  # [B, T, T]
        allowed = F.pad(allowed, (memory, 0), value=True)  # [B, T, Tk]
        allowed = allowed if hidden is None else allowed & ~hidden[:, None, :]
        visible = allowed if visible is None else visible & allowed
    elif query_rank is not None:
        key_rank = F.pad(key_rank, (memory, 0), value=MEMORY_RANK)  # [B, Tk]
    elif hidden is not None or (causal and at_positions):
        query_rank = torch.zeros(batch, length, dtype=torch.int32, device=device)  # [B, T]
        key_rank = torch.full((batch, keys), -1, dtype=torch.int32, device=device)  # [B, Tk]
        if causal and at_positions:
            query_rank = query_rank + places + (memory + 1)
            key_rank = key_rank + numbers + 1
            causal = False
    if key_rank is not None and hidden is not None:
        # The average of masked_rows="uniform" is over padding too.
        own_row = padding_read or config.masked_rows == "uniform"
        key_rank = key_rank.masked_fill(hidden, PADDING_RANK if own_row else UNSEEN_RANK)
        key_rank[:, :memory].masked_fill_(hidden[:, :memory], UNSEEN_RANK)
    return {
        "query_rank": query_rank,
        "key_rank": key_rank,
        "attention_mask": None if visible is None else visible[:, None],  # [B or 1, 1, T, Tk]
        "causal": causal,
    }


def _hidden_keys(mems_mask: Tensor | None, tokens: TokenLayout, memory: int, device: torch.device) -> Tensor | None:
    """Bool [B, Tk], True for keys that nothing but themselves may see; None where there are none."""
    if tokens.token_mask is None and mems_mask is None:
        return None
    hidden = torch.zeros(tokens.batch, memory + tokens.length, dtype=torch.bool, device=device)
    if mems_mask is not None:
        hidden[:, :memory] = ~mems_mask.to(torch.bool)
    if tokens.token_mask is not None:
        hidden[:, memory:] = ~tokens.token_mask
    return hidden


def _moving_window(config: XLNetConfig) -> bool:
    """Whether a row sees only so many keys before it, which only a dense mask can say."""
    return config.same_length and config.attn_type == "uni"


def _reads_padding(reads: str | None, real: Tensor | None) -> bool:
    """Whether padding stands at a place that a head reads."""
    if reads is None or real is None:
        return False
    if not has_values(real):
        return True
    places = {"first": real[:, :1], "last": real[:, -1:], "mean": real}[reads]
    return not bool(places.all())


def _one_piece(real: Tensor) -> bool:
    """Whether the tokens of every row stand side by side: leaving out padding then changes no distance."""
    starts = real[:, 1:] & ~real[:, :-1]
    return real.shape[1] == 0 or bool((starts.sum(1) + real[:, 0] <= 1).all())


def _one_hot_positions(mapping: Tensor) -> Tensor | None:
    """int32 [B, M] for a mapping [B, M, T] whose rows are one-hot or zero, each at its own place; else None."""
    if not has_values(mapping) or mapping.requires_grad or not mapping.shape[2]:
        return None
    ones = mapping == 1
    count = ones.sum(2)
    if not bool((ones | (mapping == 0)).all()) or bool((count > 1).any()) or bool((ones.sum(1) > 1).any()):
        return None
    return torch.where(count == 1, ones.to(torch.uint8).argmax(2), -1).int()
