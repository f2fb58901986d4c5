"""Attention that also returns its weights: the reference, differentiated by autograd.

A kernel never holds the weights.  Who wants to see them gets the readable definition, with the checks, the masks and
the dropout bits of the op, and a Tq×Tk tensor per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.ops.attention import Given as AttentionGiven
from pyxlbert.ops.attention import call_of as attention_call
from pyxlbert.ops.attention import check_values as check_attention
from pyxlbert.ops.relative_attention import Given as RelativeGiven
from pyxlbert.ops.relative_attention import call_of as relative_call
from pyxlbert.ops.relative_attention import check_values as check_relative
from pyxlbert.ops.two_stream_attention import Given as TwoStreamGiven
from pyxlbert.ops.two_stream_attention import call_of as two_stream_call
from pyxlbert.ops.two_stream_attention import check_values as check_two_stream
from pyxlbert.reference import attention, relative_attention, two_stream_attention


def attention_with_weights(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`attention`, and its weights.

    Args:
        query, key, value: as in `attention`.
        options: its other arguments, less `backend`.

    Returns:
        out, and the weights after dropout `[B, H, Tq, Tk]` in out's dtype.  Of packed rows Tq and Tk are the longest
        sequence's length, with zeros behind every sequence.

    Raises:
        TypeError, ValueError: as `attention`.
    """
    call = attention_call(AttentionGiven(query, key, value, **options, backend="torch"))
    return _run(attention.attention_with_weights, check_attention, call)


def relative_attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, position_key: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`relative_attention`, and its weights; see `attention_with_weights`."""
    call = relative_call(RelativeGiven(query, key, value, position_key, **options, backend="torch"))
    return _run(relative_attention.relative_attention_with_weights, check_relative, call)


def two_stream_attention_with_weights(
    content_query: Tensor, query_query: Tensor, key: Tensor, value: Tensor, position_key: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`two_stream_attention`, and the weights of the content and of the query stream; see `attention_with_weights`."""
    call = two_stream_call(
        TwoStreamGiven(content_query, query_query, key, value, position_key, **options, backend="torch")
    )
    return _run(two_stream_attention.two_stream_attention_with_weights, check_two_stream, call)


def _run(reference: Callable[[Any], Any], check_values: Callable[[Any], None], call: Any) -> Any:
    device = call[0].device.type
    if not torch.compiler.is_compiling() and (device == "cpu" or backends.checking()):
        check_values(call)
    # The dtypes are settled: no product inside is to be cast again.
    with torch.autocast(device, enabled=False):
        return reference(call)
