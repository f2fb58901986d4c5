"""Encoder layers for few rows: the native kernels of the ops one after the other, and no tensor between them.

With a handful of rows a layer's kernels take less time than the calls around them: checks, dispatch, a tensor for every
intermediate result.  Here that is done once for all layers: the results lie in one buffer, and a kernel gets addresses.
The kernels and their arguments are those of the ops, and so are the bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.cpu import _onednn
from pyxlbert.launch.rows import DTYPE
from pyxlbert.ops._scores import check_offsets
from pyxlbert.ops._torch import is_zerotensor, watched

try:
    from pyxlbert import _C
    from pyxlbert.cpu._attention import longest
except ImportError:  # backend "cpu" is not here
    _C = None  # type: ignore[assignment]

_ALIGNMENT = 64  # bytes: a cache line


@dataclass(frozen=True)
class LinearParameters:
    """A linear layer: addresses of weight `[N, K]`, contiguous, and bias `[N]`."""

    weight: int
    bias: int
    columns: int
    inner: int


@dataclass(frozen=True)
class NormParameters:
    """LayerNorm: addresses of weight and bias, and eps."""

    weight: int
    bias: int
    eps: float


@dataclass(frozen=True)
class LayerParameters:
    """A layer with LayerNorm after each residual sum, and gelu ("none" or "tanh") between its last two products."""

    query: LinearParameters
    key: LinearParameters
    value: LinearParameters
    mixed: LinearParameters
    attention_norm: NormParameters
    up: LinearParameters
    down: LinearParameters
    norm: NormParameters
    heads: int
    approximate: str


def takes(x: Tensor) -> bool:
    """Whether these rows `[..., E]` are few and on the CPU, and nobody asks for another backend or watches the ops."""
    return (
        _C is not None
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in DTYPE
        and x.numel() > 0
        and x.is_contiguous()
        and not (x.is_neg() or is_zerotensor(x))
        and backends.default_backend() in (None, "cpu")
        and not torch.is_autocast_enabled("cpu")
        and not watched()
        and _onednn.few_rows(x)
    )


def encoder_layers_fwd(
    x: Tensor, residual: Tensor, layers: list[LayerParameters], cu_seqlens: Tensor | None, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    """The layers one after the other, without dropout.

    Args:
        x: `[B, T, E]`, or packed `[total, E]`, contiguous; the dtype of every parameter.
        residual: the same rows in the dtype of the residual stream: x itself, or a float32 tensor.
        layers: at least one.
        cu_seqlens, max_seqlen: as in `attention`, for packed rows.

    Returns:
        the last layer's output in the dtype of x and in that of the stream; one tensor where they are the same.

    Raises:
        ValueError: cu_seqlens or max_seqlen is wrong.
    """
    hidden, heads = x.shape[-1], layers[0].heads
    rows, head_size = x.numel() // hidden, hidden // heads
    if cu_seqlens is not None:
        check_offsets("attention", cu_seqlens, rows, max_seqlen)
        batch, length, total = cu_seqlens.shape[0] - 1, longest(cu_seqlens), rows
    else:
        batch, length, total = x.shape[0], x.shape[1], 0
    threads, dtype, stream_dtype = torch.get_num_threads(), DTYPE[x.dtype], DTYPE[residual.dtype]
    copies = dtype != stream_dtype

    def aligned(size: int) -> int:
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    width = aligned(rows * hidden * x.element_size())
    stream_width = aligned(rows * hidden * residual.element_size())
    wide_width = aligned(rows * max(layer.up.columns for layer in layers) * x.element_size())
    lse_width = aligned(rows * heads * 4)
    buffer = torch.empty(6 * width + wide_width + stream_width + lse_width + _ALIGNMENT, dtype=torch.uint8)
    query = aligned(buffer.data_ptr())
    key, value, mixed, product, middle = (query + i * width for i in range(1, 6))
    wide = query + 6 * width
    middle_stream = wide + wide_width if copies else middle
    lse = wide + wide_width + stream_width
    y_stream = torch.empty_like(residual)
    y = torch.empty_like(x) if copies else y_stream
    strides = (length * hidden, hidden, head_size)
    attention = _C.cpu.AttentionInputs(
        *(query, strides, key, strides, value, strides),
        *(0, cu_seqlens.data_ptr() if cu_seqlens is not None else 0),  # key_lengths, cu_seqlens
        *(0, (0, 0, 0, 0), 0, (0, 0, 0, 0)),  # mask, bias
        (batch, heads, length, length, head_size),
        total,
        head_size**-0.5,
        *(0.0, 0),  # dropout_p, seed
        *(dtype, 0, False, threads),  # bias_dtype, causal
    )

    def linear(source: int, to: LinearParameters, target: int, gelu: bool = False, tanh: bool = False) -> None:
        _C.cpu.linear_fwd(
            *(source, to.weight, to.bias, target, rows, to.columns, to.inner, to.inner, dtype, gelu, tanh, threads)
        )

    def add_norm(source: int, residual: int, norm: NormParameters, target: int, copy: int) -> None:
        _C.cpu.dropout_add_layer_norm_fwd(
            *(source, 0, residual, norm.weight, norm.bias, 0),  # x_bias, seed
            *(target, copy if copies else 0, 0, 0, 0),  # sum, mean, rstd
            *(rows, hidden, hidden, hidden, norm.eps, 0.0),  # x_stride, residual_stride, dropout_p
            *(dtype, stream_dtype, dtype, dtype, dtype, dtype, threads),  # x_bias, weight, bias, copy
        )

    source, stream = x.data_ptr(), residual.data_ptr()
    target, target_stream = y.data_ptr(), y_stream.data_ptr()
    for layer in layers:
        linear(source, layer.query, query)
        linear(source, layer.key, key)
        linear(source, layer.value, value)
        _C.cpu.attention_fwd(attention, mixed, lse)
        linear(mixed, layer.mixed, product)
        add_norm(product, stream, layer.attention_norm, middle_stream, middle)
        linear(middle, layer.up, wide, True, layer.approximate == "tanh")
        linear(wide, layer.down, product)
        add_norm(product, middle_stream, layer.norm, target_stream, target)
        source, stream = target, target_stream
    return y, y_stream
