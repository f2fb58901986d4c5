"""encoder_layer through the native module: a stack of layers with packed weights, and one call for all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyxlbert import _C
from pyxlbert.cpu import _packed
from pyxlbert.cpu._attention import adjacent_keys, longest
from pyxlbert.cpu._tensors import refusal
from pyxlbert.launch.attention import RELATIVE_ATTENTION, ScoreOptions, StreamOptions, score_strides
from pyxlbert.launch.rows import DTYPE, address, int32

Norm = tuple[Tensor, Tensor, float]  # weight and bias [E], eps


class Layer(NamedTuple):
    """One layer's packed weights and other parameters.

    Attributes:
        projections: query, key and value as one packed weight, or query and the other two.
        out, up, down: the projection back, and the feed-forward network's.
        attention_norm, norm: LayerNorm after either residual sum.
        activation: of the feed-forward network.
        position: of relative attention, the projection of the distances' embeddings; None where there is none.
        terms: of relative attention, content, position and segment bias `[H, D]` and segment embedding `[2, H, D]`.
    """

    projections: tuple[_packed.PackedLinear, ...]
    out: _packed.PackedLinear
    up: _packed.PackedLinear
    down: _packed.PackedLinear
    attention_norm: Norm
    norm: Norm
    activation: str
    position: _packed.PackedLinear | None = None
    terms: tuple[Tensor | None, ...] = (None, None, None, None)


class Places(NamedTuple):
    """Where the rows lie and what masks them; the fields are arguments of `attention`."""

    heads: int
    head_size: int
    scale: float
    cu_seqlens: Tensor | None = None
    key_lengths: Tensor | None = None
    attention_mask: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = False


class Distances(NamedTuple):
    """What relative attention has beside them; the fields are arguments of `relative_attention`.

    Attributes:
        positions: `[R, E]` or `[G, R, E]` in the rows' dtype, the embeddings of distances.
    """

    positions: Tensor
    offset: int
    query_segments: Tensor | None
    key_segments: Tensor | None
    query_rank: Tensor | None
    key_rank: Tensor | None
    see_self: bool
    uniform_rows: bool


class Stack:
    """Layers as the native module holds them; they keep the packed weights alive."""

    def __init__(self, layers: list[Layer], hidden: int) -> None:
        self.hidden = hidden
        self._native = _C.cpu.EncoderLayers(hidden)
        for layer in layers:
            keep: list[Tensor] = []

            def copied(x: Tensor | None, keep: list[Tensor] = keep) -> tuple[int, int]:
                if x is None:
                    return 0, 0
                keep.append(x.detach().float().contiguous())
                return keep[-1].data_ptr(), x.numel()

            norms = [(copied(n[0])[0], copied(n[1])[0], n[2]) for n in (layer.attention_norm, layer.norm)]
            self._native.add(
                list(layer.projections),
                *(layer.out, layer.up, layer.down),
                *norms,
                _packed.ACTIVATIONS[layer.activation],
                layer.position,
                [copied(x) for x in layer.terms],
            )

    def __len__(self) -> int:
        return len(self._native)

    def run(
        self, x: Tensor, residual: Tensor, places: Places, distances: Distances | None, first: int, count: int
    ) -> tuple[Tensor, Tensor]:
        """Layers first .. first + count - 1.

        Args:
            x: `[B, T, E]`, or packed `[total, E]`, contiguous, not empty.
            residual: the same rows in the dtype of the residual stream; x itself, or a float32 tensor.

        Returns:
            the rows in x's dtype and in that of the stream; one tensor where they are the same.
        """
        y = torch.empty_like(x)
        apart = residual.dtype is not x.dtype
        y_stream = torch.empty_like(residual) if apart else y
        inputs, kept = _inputs(x, places)
        relative, rows, more = (None, None, ()) if distances is None else _relative(distances, inputs, places, x)
        _C.cpu.encoder_layers_fwd(
            self._native,
            *(first, count),
            *(x.data_ptr(), residual.data_ptr(), y.data_ptr(), y_stream.data_ptr() if apart else 0),
            x.numel() // self.hidden,
            (DTYPE[x.dtype], DTYPE[residual.dtype]),
            inputs,
            0 if distances is None else distances.positions.data_ptr(),
            *(relative, rows),
        )
        del kept, more
        return y, y_stream


def encoder_layer_fwd(call: Any) -> Tensor:
    """See `pyxlbert.reference.encoder_layer.encoder_layer_fwd`."""
    hidden, width, inner = call.x.shape[-1], call.out_weight.shape[1], call.up_weight.shape[0]
    x = call.x.contiguous()
    if x.numel() == 0:
        return torch.empty_like(x)
    if x.dtype is torch.bfloat16 and (hidden % 2 or width % 2 or inner % 2):
        # Pairs of bfloat16 are multiplied, and a row of an odd number is no row of pairs.
        x = x.float()

    head_size = width // call.num_heads
    masks = (call.cu_seqlens, call.key_lengths, call.attention_mask, call.bias)
    places = Places(call.num_heads, head_size, head_size**-0.5, *masks)
    return _stack_of(call, x.dtype, hidden).run(x, x.float(), places, None, 0, 1)[0].to(call.x.dtype)


_PARAMETERS = tuple(f"{name}_{part}" for name in ("qkv", "out", "up", "down") for part in ("weight", "bias"))
_NORMS = ("attention_norm", "norm")

# The packed layer of a call, by its first weight, with which it goes; beside it what tells whether it still is right.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _stack_of(call: Any, dtype: torch.dtype, hidden: int) -> Stack:
    """The layer as a stack of one; packed at the first call with these weights, and again after one has changed."""
    names = (*_PARAMETERS, *(f"{name}_{part}" for name in _NORMS for part in ("weight", "bias")))
    tensors = [one for one in (getattr(call, name) for name in names) if one is not None]
    if any(one.is_inference() for one in tensors):
        return _packed_layer(call, dtype, hidden)  # they have no versions
    state = [(one.data_ptr(), one._version, one.dtype, one.shape, one.stride()) for one in tensors]
    key = (state, dtype, call.activation, call.eps, _C.level())
    found = _kept.get(call.qkv_weight)
    if found is None or found[0] != key:
        # An alias of each is kept, so that no other tensor can come to lie at its address.
        found = (key, _packed_layer(call, dtype, hidden), [one.detach() for one in tensors])
        _kept[call.qkv_weight] = found
    return found[1]


def _packed_layer(call: Any, dtype: torch.dtype, hidden: int) -> Stack:
    def packed(name: str) -> _packed.PackedLinear:
        bias = getattr(call, f"{name}_bias")
        return _packed.pack([getattr(call, f"{name}_weight").to(dtype)], None if bias is None else [bias])

    norms = [(getattr(call, f"{name}_weight"), getattr(call, f"{name}_bias"), call.eps) for name in _NORMS]
    return Stack([Layer((packed("qkv"),), *map(packed, ("out", "up", "down")), *norms, call.activation)], hidden)


def _inputs(x: Tensor, places: Places) -> tuple[_C.cpu.AttentionCall, Any]:
    """The native description of a call's rows, and the tensors that must live as long as it does."""
    packed = places.cu_seqlens is not None
    batch = places.cu_seqlens.shape[0] - 1 if packed else x.shape[0]
    length = longest(places.cu_seqlens) if packed else x.shape[1]
    mask, bias = adjacent_keys(places.attention_mask), adjacent_keys(places.bias)
    lengths, offsets = int32(places.key_lengths), int32(places.cu_seqlens)
    nowhere = (0, (0, 0, 0))
    inputs = _C.cpu.AttentionCall(
        *nowhere * 3,  # query, key and value are the layers' own
        *(address(lengths), address(offsets)),
        *(address(mask), score_strides(mask), address(bias), score_strides(bias)),
        (batch, places.heads, length, length, places.head_size),
        x.shape[0] if packed else 0,
        ScoreOptions(places.scale, places.causal),
        *(0.0, 0),  # dropout_p, seed
        DTYPE[x.dtype],
        0 if bias is None else DTYPE[bias.dtype],
        torch.get_num_threads(),
    )
    return inputs, (mask, bias, lengths, offsets)


def _relative(
    distances: Distances, inputs: Any, places: Places, x: Tensor
) -> tuple[_C.cpu.RelativeCall, _C.cpu.Stream, Any]:
    positions = distances.positions
    numbers = [
        int32(one)
        for one in (distances.key_rank, distances.key_segments, distances.query_rank, distances.query_segments)
    ]
    nowhere = (0, (0, 0, 0))
    relative = _C.cpu.RelativeCall(
        inputs,
        *nowhere,
        (positions.shape[0] if positions.dim() == 3 else 1, positions.shape[-2], distances.offset),
        *(0, 0, 0, 0),  # the terms are the layers' own
        *(address(numbers[0]), address(numbers[1])),
        distances,
    )
    length = longest(places.cu_seqlens) if places.cu_seqlens is not None else x.shape[1]
    rows = _C.cpu.Stream(
        *nowhere,
        length,
        *(0, 0),  # out, lse
        *(0, 0),  # positions, order
        *(address(numbers[2]), address(numbers[3])),
        StreamOptions(distances.see_self, False, RELATIVE_ATTENTION),
    )
    return relative, rows, numbers


supports = refusal
