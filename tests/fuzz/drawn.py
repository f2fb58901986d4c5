"""How calls of the ops are drawn: the fields of each spec's `Inputs`, small first, so that what fails is made small."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pyxlbert.backends import native
from pyxlbert.testing.specs import (
    attention,
    bias_gelu,
    dropout_add_layer_norm,
    embedding_layer_norm,
    encoder_layer,
    layer_norm,
    linear,
    linear_gelu,
    relative_attention,
    two_stream_attention,
)
from pyxlbert.testing.specs._attention import WHOLE
from pyxlbert.testing.specs._spec import VIEWS

LEVELS = ("portable",) if native._C is None else tuple(native._C.levels())


class Drawn(NamedTuple):
    """A call before its tensors are made.

    Attributes:
        inputs: the record of the op's spec.
        seed: of its numbers.
        threads: how many backend "cpu" has.
        at_end: see `pages.guarded`.
        gradients: whether backward runs too.
    """

    inputs: Any
    dtype: torch.dtype
    threads: int
    at_end: bool
    gradients: bool
    seed: int


# Half of the time of a drawn call went into making and checking the same strategies again: each is made once.
_among = functools.cache(st.integers)
_of = functools.cache(lambda *values: st.sampled_from(values))
_lists = functools.cache(lambda one, most: st.lists(one, max_size=most).map(tuple))
_same = functools.cache(lambda one, count: st.tuples(*[one] * count))


@functools.cache
def _some(usual: int, *odd: int) -> SearchStrategy[int]:
    """Small numbers, and some where kernels cut their work."""
    return st.one_of(_among(1, usual), _of(*odd))


_flags, _scales = st.booleans(), _of(1.0, 0.01, 30.0)
_columns = _some(40, 63, 64, 65, 129, 384, 768)
_leading = st.one_of(
    _lists(_among(0, 6), 3),
    _of((33,), (3, 70), (257,)),
)


@st.composite
def _shapes(draw: Any) -> tuple[int, ...]:
    return (*draw(_leading), draw(_columns))


def _rows(kind: type, **fields: SearchStrategy) -> SearchStrategy:
    """A record with a shape, or with a view."""
    views = st.builds(kind, view=st.sampled_from(tuple(VIEWS)))
    return st.one_of(st.builds(kind, shape=_shapes(), **fields), views)


_KEYS = st.one_of(st.none(), _some(40, 0, 65, 257, 515))


@st.composite
def _scores(draw: Any, kind: type) -> Any:
    """What all ops of scores have, and what they add."""
    relative, two = kind is not attention.Inputs, kind is two_stream_attention.Inputs
    batch, heads = draw(_among(0, 4)), draw(_among(1, 3))
    queries, keys = draw(_some(20, 0, 33, 49, 130)), draw(_KEYS)
    given: dict[str, Any] = {
        "head_size": draw(_some(24, 32, 40, 64, 65, 80)),
        "layout": draw(_of("fused", "by head", "heads first", "strided", "expanded", "apart")),
        "magnitude": draw(_of(1.0, 0.1, 3.0)),
        "scale": draw(_of(None, 0.3, -0.2)),
    }
    if draw(_flags):
        given |= {"dropout_p": draw(_of(0.1, 0.5, 1.0)), "seed": draw(_among(0, 2**40))}
    packed = not two and draw(_flags)
    if packed:
        given["packed"] = draw(_lists(_some(9, 0, 20, 70), 4))
        queries, keys = max((0, *given["packed"])), None
        given["layout"] = draw(_of("fused", "by head"))
    count = queries if keys is None else keys
    if not packed:
        if draw(_flags):
            given["lengths"] = draw(_same(_among(0, count), batch))
        if draw(_flags):
            given["mask"] = draw(_same(_of(1, WHOLE), 4))
            given["hidden"] = draw(_of(0.3, 0.0, 0.8, 1.0))
    if not two and draw(_flags):
        given["causal"] = True
    if not relative:
        if not packed and draw(_flags):
            given["bias"] = draw(_same(_of(1, WHOLE), 4))
            given["bias_float32"] = draw(_flags)
        return kind(queries, keys, batch, heads, **given)
    given |= {
        "biases": "".join(letter for letter in "uvs" if draw(_flags)) + "e" * draw(_flags),
        "wide": draw(_flags),
        "masked_rows": draw(_of(None, "zero", "uniform")),
        "ranks": "random" if draw(_flags) else "",
    }
    if "e" not in given["biases"]:
        given["biases"] = given["biases"].replace("s", "")
    if not packed and batch:
        given["tables"] = draw(_of(0, *(n for n in range(1, batch + 1) if batch % n == 0)))
    if not two and draw(_flags):
        given["see_self"] = True
    if two and batch and draw(_flags) and queries:
        targets = draw(_among(0, 6))
        given["targets"] = tuple(draw(_same(_among(-1, queries - 1), targets)) for _ in range(batch))
    return kind(queries, keys, batch, heads, **given)


@st.composite
def _layers(draw: Any) -> Any:
    given: dict[str, Any] = {
        "batch": draw(_among(0, 3)),
        "length": draw(_some(12, 0, 33)),
        "hidden": draw(_some(20, 48, 64)),
        "inner": draw(_some(20, 100, 128)),
        "heads": draw(_among(1, 3)),
        "head_size": draw(_some(12, 16, 64)),
        "activation": draw(_of("gelu", "gelu_tanh", "relu", "silu")),
        "biases": draw(_flags),
        "norms": draw(_of("", "float32")),
    }
    batch, length = given["batch"], given["length"]
    if draw(_flags):
        given["packed"] = draw(_lists(_among(0, 20), 4))
    elif draw(_flags):
        given["lengths"] = draw(_same(_among(0, length), batch))
    elif draw(_flags):
        given["mask"] = (draw(_of(1, batch)), 1, draw(_of(1, length)), length)
    return encoder_layer.Inputs(**given)


@st.composite
def _embeddings(draw: Any) -> Any:
    shape = (draw(_among(0, 4)), draw(_some(9, 0, 40)))
    return embedding_layer_norm.Inputs(
        shape,
        columns=draw(_columns),
        entries=draw(_among(1, 60)),
        tables=draw(_of(("position", "token_type"), ("position",), ("token_type",), ())),
        ids=draw(_of("own", "types", "default", "int32", "views")),
        wide=draw(_flags),
        dropout_p=draw(_of(None, 0.1, 1.0)),
    )


def _products(kind: type, **fields: SearchStrategy) -> SearchStrategy:
    return st.builds(kind, shape=_shapes(), outputs=_some(30, 64, 65, 130), bias=_flags, wide=_flags, **fields)


_approximations = st.sampled_from(("none", "tanh"))
_dropouts = st.sampled_from((0.0, 0.1, 0.5, 1.0))
_INPUTS: dict[str, SearchStrategy] = {
    "attention": _scores(attention.Inputs),
    "relative_attention": _scores(relative_attention.Inputs),
    "two_stream_attention": _scores(two_stream_attention.Inputs),
    "layer_norm": _rows(layer_norm.Inputs, scale=_scales, wide=_flags, shift=st.sampled_from((0.0, 5.0))),
    "dropout_add_layer_norm": _rows(
        dropout_add_layer_norm.Inputs,
        x_bias=_flags,
        dropout_p=_dropouts,
        stream=_flags,
        wide=_flags,
        scale=_scales,
    ),
    "bias_gelu": _rows(bias_gelu.Inputs, approximate=_approximations, bias=_flags, scale=_scales, wide=_flags),
    "embedding_layer_norm": _embeddings(),
    "linear": _products(linear.Inputs),
    "linear_gelu": _products(linear_gelu.Inputs, approximate=_approximations),
    "encoder_layer": _layers(),
}

CALLS: dict[str, SearchStrategy[Drawn]] = {
    op: st.builds(
        Drawn,
        inputs=inputs,
        dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        threads=st.sampled_from((1, 2)),
        at_end=_flags,
        # A layer with a gradient to come is made of other ops, drawn here too.
        gradients=st.just(False) if op == "encoder_layer" else _flags,
        seed=st.integers(0, 10**6),
    )
    for op, inputs in _INPUTS.items()
}
