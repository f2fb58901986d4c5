"""What the ops race against, on the arguments that their specs make."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import pyxlbert
from pyxlbert.testing.specs._spec import Arguments, Case
from pyxlbert.testing.specs.attention import plain as plain_attention

Call = Callable[[], Any]
# A call of arguments; what need not be timed is done before it.
Bind = Callable[[Arguments], Call]


def unchanged(arguments: Arguments) -> Arguments:
    """The arguments."""
    return arguments


class Peer(NamedTuple):
    """A way to what ours computes, or to something near it.

    Attributes:
        bind: makes the call.
        change: what it takes in the place of the op's arguments, made once and not timed.
        own: where it computes something else: the call whose float64 value is right for it.
        random: its answer is right on the average alone.
    """

    bind: Bind
    change: Callable[[Arguments], Arguments] = unchanged
    own: Bind | None = None
    random: bool = False


class Opponents(NamedTuple):
    """Those of one case.

    Attributes:
        truth: the call whose float64 value is right for ours; None where nothing can be compared.
        peers: by name, plain PyTorch first; those of ours are called "pyxlbert ...".
        plain: what ours is held to where no peer computes the same: PyTorch in the dtype of the race.
    """

    truth: Bind | None
    peers: dict[str, Peer]
    plain: Bind | None = None


def first_is_right(peers: dict[str, Peer]) -> Opponents:
    """The first peer in float64 is the truth."""
    first = next(iter(peers.values()))
    return Opponents(lambda a: first.bind(first.change(a)), peers)


def _layer_norm(a: Arguments) -> Call:
    x, weight, bias, eps = a["x"], a["weight"], a["bias"], a["eps"]
    columns = x.shape[-1:]
    return lambda: F.layer_norm(x, columns, weight, bias, eps)


def _dropout_add_layer_norm(a: Arguments) -> Call:
    x, residual, weight, bias, eps = a["x"], a["residual"], a["weight"], a["bias"], a["eps"]
    columns = x.shape[-1:]
    return lambda: F.layer_norm(x + residual, columns, weight, bias, eps)


def _bias_gelu(a: Arguments) -> Call:
    x, bias, approximate = a["x"], a["bias"], a["approximate"]
    return lambda: F.gelu(x + bias, approximate=approximate)


def _embedding_layer_norm(a: Arguments) -> Call:
    ids, word, kind, position, weight, bias, eps = (
        a[name] for name in ("input_ids", "word", "token_type", "position", "weight", "bias", "eps")
    )
    columns = word.shape[-1:]
    types, places = torch.zeros_like(ids), torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)

    def call() -> torch.Tensor:
        total = F.embedding(ids, word) + F.embedding(places, position) + F.embedding(types, kind)
        return F.layer_norm(total, columns, weight, bias, eps)

    return call


def _linear(a: Arguments) -> Call:
    x, weight, bias = a["x"], a["weight"], a["bias"]
    return lambda: F.linear(x, weight, bias)


def _linear_gelu(a: Arguments) -> Call:
    x, weight, bias, approximate = a["x"], a["weight"], a["bias"], a["approximate"]
    return lambda: F.gelu(F.linear(x, weight, bias), approximate=approximate)


def _encoder_layer(a: Arguments) -> Call:
    x, heads, eps = a["x"], a["num_heads"], a.get("eps", 1e-12)

    def linear(rows: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(rows, a[f"{name}_weight"], a[f"{name}_bias"])

    def normalise(rows: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(rows, rows.shape[-1:], a[f"{name}_weight"], a[f"{name}_bias"], eps)

    def call() -> torch.Tensor:
        q, k, v = (one.transpose(1, 2) for one in linear(x, "qkv").unflatten(-1, (3, heads, -1)).unbind(-3))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        h = normalise(x + linear(mixed, "out"), "attention_norm")
        return normalise(h + linear(F.gelu(linear(h, "up")), "down"), "norm")

    return call


def sdpa(a: Arguments) -> Call:
    """PyTorch's scaled_dot_product_attention of transposed views, with the bias or the mask "real_keys", if any."""
    q, k, v = (a[name].transpose(1, 2) for name in ("query", "key", "value"))
    mask, dropout_p = a.get("bias", a.get("real_keys")), a.get("dropout_p", 0.0)
    return lambda: F.scaled_dot_product_attention(q, k, v, mask, dropout_p).transpose(1, 2)


def _with_mask(a: Arguments) -> Arguments:
    """key_lengths as SDPA takes them; on a GPU nothing if every key is real: its flash path takes no mask."""
    lengths, key = a.get("key_lengths"), a["key"]
    if lengths is None or (key.is_cuda and int(lengths.min()) == key.shape[1]):
        return a
    real = torch.arange(key.shape[1], device=key.device) < lengths[:, None]
    return a | {"real_keys": real[:, None, None]}


def _padded(a: Arguments) -> Arguments:
    """Packed sequences with padding behind each; "real" says where none is."""
    lengths = a["cu_seqlens"].diff()
    real = torch.arange(a["max_seqlen"], device=lengths.device) < lengths[:, None]
    packed = torch.stack([a[name] for name in ("query", "key", "value")], 1)
    padded = packed.new_zeros(*real.shape, *packed.shape[1:])
    padded[real] = packed
    q, k, v = padded.unbind(2)
    return _with_mask({"query": q, "key": k, "value": v, "key_lengths": lengths}) | {"real": real}


def _padded_attention(a: Arguments) -> Call:
    q, k, v, lengths = a["query"], a["key"], a["value"], a["key_lengths"]
    return lambda: pyxlbert.attention(q, k, v, key_lengths=lengths)


def _over_padding(a: Arguments) -> Call:
    return sdpa({name: a[name] for name in ("query", "key", "value")})


def _by_padding(a: Arguments) -> Call:
    padded = _padded(a)
    call = sdpa(padded)
    return lambda: call()[padded["real"]]


def _drawn(a: Arguments) -> Call:
    """With the dropout that the seed says."""
    return partial(plain_attention, **a)


def _kept(a: Arguments) -> Call:
    """Without dropout: what is dropped is 0 on the average."""
    return sdpa(a | {"dropout_p": 0.0})


def _attention(case: Case) -> Opponents:
    if case.inputs.packed:
        peers = {
            "pyxlbert, padded": Peer(_padded_attention, _padded, sdpa),
            "SDPA over padding": Peer(_over_padding, _padded, _over_padding),
        }
        return Opponents(_by_padding, peers)
    if case.inputs.dropout_p:
        # The two draw different masks: ours are known by the seed, SDPA's on the average.
        return Opponents(_drawn, {"SDPA": Peer(sdpa, _with_mask, _kept, random=True)}, _drawn)
    return first_is_right({"SDPA": Peer(sdpa, _with_mask)})


def _rows(name: str, bind: Bind) -> Callable[[Case], Opponents]:
    return lambda case: first_is_right({name: Peer(bind)})


OPPONENTS: dict[str, Callable[[Case], Opponents]] = {
    "layer_norm": _rows("F.layer_norm", _layer_norm),
    "dropout_add_layer_norm": _rows("F.layer_norm(x + r)", _dropout_add_layer_norm),
    "bias_gelu": _rows("F.gelu(x + b)", _bias_gelu),
    "embedding_layer_norm": _rows("F.embedding, F.layer_norm", _embedding_layer_norm),
    "linear": _rows("F.linear", _linear),
    "linear_gelu": _rows("F.gelu(F.linear)", _linear_gelu),
    "encoder_layer": _rows("F.linear, SDPA, F.layer_norm", _encoder_layer),
    "attention": _attention,
}
