"""embedding_layer_norm: y = dropout(LN(word[id] + position[place] + token_type[type])) in one pass.

Source: `BertEmbeddings` of BERT (https://arxiv.org/abs/1810.04805, section 3, figure 2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert import checks
from pyxlbert.ops._autograd import OpFunction, backward_backend, single_backward
from pyxlbert.ops._define import Op
from pyxlbert.ops._dropout import dropout_of
from pyxlbert.ops._torch import apply

OP = Op("embedding_layer_norm", ("torch", "cpu", "triton", "cuda"), ids_first=True)

_INTEGERS = (torch.int32, torch.int64)


def _check_values(call: Any) -> None:
    """Every id is a row of its table, and so is every place in a sequence where no position ids are given."""
    if call.position is not None and call.position_ids is None and call.input_ids.shape[-1] > call.position.shape[0]:
        raise ValueError(
            f"embedding_layer_norm: position: got {call.position.shape[0]} rows, wanted at least "
            f"{call.input_ids.shape[-1]}, the length of a sequence"
        )
    for name, ids, table, of in (
        ("input_ids", call.input_ids, call.word, "word"),
        ("token_type_ids", call.token_type_ids, call.token_type, "token_type"),
        ("position_ids", call.position_ids, call.position, "position"),
    ):
        if ids is None or table is None or ids.numel() == 0:
            continue
        low, high = (int(x) for x in ids.aminmax())
        if low >= 0 and high < table.shape[0]:
            continue
        wrong = ((ids < 0) | (ids >= table.shape[0])).nonzero()[0].tolist()
        raise ValueError(
            f"embedding_layer_norm: {name}: got {int(ids[tuple(wrong)])} at {wrong}, "
            f"wanted at least 0 and less than {table.shape[0]}, the rows of {of}"
        )


def _fwd_fake(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    word = call.word
    shape = (*call.input_ids.shape, word.shape[-1])
    statistics = word.new_empty(call.input_ids.shape, dtype=torch.promote_types(word.dtype, torch.float32))
    copy = word.new_empty(shape if call.copy_dtype is not None else (0,), dtype=call.copy_dtype or call.out_dtype)
    return word.new_empty(shape, dtype=call.out_dtype), copy, statistics, torch.empty_like(statistics)


def _bwd_fake(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def table(given: Tensor | None, needed: bool) -> Tensor:
        return call.word.new_empty(0) if given is None or not needed else given.new_empty(given.shape)

    n = call.word.shape[-1] if call.needs_parameters else 0
    return (
        table(call.word, call.needs_word),
        table(call.token_type, call.needs_token_type),
        table(call.position, call.needs_position),
        call.weight.new_empty(n),
        call.bias.new_empty(n),
    )


_TABLES = (
    "Tensor input_ids, Tensor word, Tensor? token_type, Tensor? position, Tensor weight, Tensor bias,"
    " Tensor? token_type_ids, Tensor? position_ids"
)

_SHAPES = {"input_ids": "*", "word": "=VN", "token_type": "=SN", "position": "=PN", "weight": "N", "bias": "N"}

Forward, _fwd = OP.define(
    "fwd",
    f"({_TABLES}, float dropout_p, Tensor? seed, float eps, ScalarType out_dtype, ScalarType? copy_dtype, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    _check_values,
    shapes=_SHAPES,
)
# Backward checks values again: a saved tensor's may have changed since forward, by a way that autograd does not see.
Backward, _bwd = OP.define(
    "bwd",
    f"(Tensor dy, {_TABLES}, Tensor mean, Tensor rstd, float dropout_p, Tensor? seed, int padding_idx,"
    " bool needs_word, bool needs_token_type, bool needs_position, bool needs_parameters, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    _check_values,
    shapes=_SHAPES | {"dy": "*N", "mean": "~4|*", "rstd": "~4|*", "seed": "8?"},
)


class _EmbeddingLayerNorm(OpFunction):
    op = "embedding_layer_norm"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _fwd(Forward(*arguments[:-2]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *call, ctx.padding_idx, ctx.backend = inputs
        call = Forward(*call)
        _, copy, mean, rstd = output
        ctx.dropout_p, ctx.has_copy = call.dropout_p, call.copy_dtype is not None
        ctx.mark_non_differentiable(mean, rstd, *(() if ctx.has_copy else (copy,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tuple(call)[:8], mean, rstd, call.seed)

    @staticmethod
    @single_backward("embedding_layer_norm")
    def backward(ctx: Any, dy: Tensor | None, dcopy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if not ctx.has_copy:
            dcopy = None  # a compiled graph hands in zeros
        if dy is None and dcopy is None:
            return (None,) * 16
        if dy is None:
            dy = dcopy
        elif dcopy is not None:
            dy = dy + dcopy.to(dy.dtype)
        *saved, seed = ctx.saved_tensors
        _, needs_word, needs_type, needs_position, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        needs = (needs_word, needs_type, needs_position, needs_weight or needs_bias)
        call = Backward(dy, *saved, ctx.dropout_p, seed, ctx.padding_idx, *needs, ctx.backend)
        dword, dtype, dposition, dweight, dbias = _bwd(call)
        return (
            None,
            dword if needs_word else None,
            dtype if needs_type else None,
            dposition if needs_position else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            *(None,) * 10,
        )


def embedding_layer_norm(
    input_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    eps: float = 1e-12,
    out_dtype: torch.dtype | None = None,
    copy_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Three look-ups, their sum, LayerNorm and dropout in one pass; sum and statistics in float32.

    Args:
        input_ids: `[B, T]`, or `[total]` for packed tokens; int32 or int64.
        word: `[V, N]`, float32, bfloat16 or float16 (float64 on backend "torch").
        token_type: `[types, N]` in word's dtype, or None.
        position: `[places, N]` in word's dtype, or None.
        weight: `[N]`, word's dtype or float32.
        bias: `[N]`, word's dtype or float32.
        token_type_ids: rows of `token_type`, broadcastable to input_ids' shape; None takes row 0.
        position_ids: rows of `position`, broadcastable to input_ids' shape; None takes 0 .. T - 1, which packed
            tokens cannot.
        padding_idx: the row of `word` that receives no gradient; None: every row does.
        dropout_p: probability that an element is dropped; kept ones are scaled by 1 / (1 - dropout_p).
        seed: int64 tensor of one element or an int; None draws one from the device's default generator.
        eps: added to the variance; at least 0.
        out_dtype: y's dtype; None is word's.
        copy_dtype: asks for y in a second dtype too, rounded from the same float32 values.
        backend: one of `pyxlbert.backends.NAMES`; None takes the first that supports the inputs.

    Returns:
        y `[..., N]`, or with `copy_dtype` the pair (y, copy).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device, a probability or (on CPU) an id is wrong.
        RuntimeError: the named backend cannot run here.
    """
    op = "embedding_layer_norm"
    OP.refuse_transforms(input_ids, word, token_type, position, weight, bias, token_type_ids, position_ids, seed)
    _check_arguments(input_ids, word, token_type, position, weight, bias, token_type_ids, position_ids)
    eps = checks.non_negative(op, "eps", eps)
    skip = -1
    if padding_idx is not None:
        skip = checks.integer(op, "padding_idx", padding_idx)
        if not 0 <= skip < word.shape[0]:
            raise ValueError(f"{op}: padding_idx: got {skip}, wanted a row of word, 0 to {word.shape[0] - 1}")
    checks.output_dtype(op, "out_dtype", out_dtype, word)
    checks.output_dtype(op, "copy_dtype", copy_dtype, word)
    dropout_p, seed = dropout_of(op, dropout_p, seed, word.device)
    backend = OP.resolve(backend, word)
    tensors = (input_ids, word, token_type, position, weight, bias, token_type_ids, position_ids)
    call = Forward(*tensors, dropout_p, seed, eps, out_dtype or word.dtype, copy_dtype, backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, copy, *_ = apply(_EmbeddingLayerNorm, *call, skip, backward_backend(backend))
    else:
        y, copy, *_ = _fwd(call)
    return y if copy_dtype is None else (y, copy)


def _check_arguments(
    input_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
) -> None:
    op = "embedding_layer_norm"
    checks.tensor(op, "input_ids", input_ids)
    checks.dtype(op, "input_ids", input_ids, *_INTEGERS)
    if input_ids.dim() == 0:
        raise ValueError(f"{op}: input_ids: got a scalar, wanted [B, T] or [total]")
    checks.tensor(op, "word", word)
    checks.floating(op, "word", word)
    if word.dim() != 2:
        raise ValueError(f"{op}: word: got shape {list(word.shape)}, wanted [V, N]")
    n = word.shape[1]
    checks.same_device(op, "input_ids", input_ids, "word", word)
    for name, table in (("token_type", token_type), ("position", position)):
        if table is None:
            continue
        checks.tensor(op, name, table)
        checks.same_device(op, name, table, "word", word)
        checks.dtype(op, name, table, word.dtype)
        if table.dim() != 2 or table.shape[1] != n or table.shape[0] == 0:
            raise ValueError(f"{op}: {name}: got shape {list(table.shape)}, wanted [rows, {n}] with at least one row")
    for name, value in (("weight", weight), ("bias", bias)):
        checks.tensor(op, name, value)
        checks.same_device(op, name, value, "word", word)
        checks.parameter_dtype(op, name, value, word)
        checks.shape(op, name, value, (n,), "N, the columns of word")
    for name, ids, table in (("token_type_ids", token_type_ids, token_type), ("position_ids", position_ids, position)):
        if ids is None:
            continue
        checks.tensor(op, name, ids)
        checks.dtype(op, name, ids, *_INTEGERS)
        checks.same_device(op, name, ids, "word", word)
        if table is None:
            raise ValueError(f"{op}: {name}: got {checks.describe(ids)} without a table {name.removesuffix('_ids')}")
        _check_broadcast(name, ids, input_ids)
    if position is not None and position_ids is None:
        if input_ids.dim() == 1:
            raise ValueError(f"{op}: position_ids: got None for packed input_ids, wanted {list(input_ids.shape)}")
        if input_ids.shape[-1] > position.shape[0]:
            raise ValueError(
                f"{op}: input_ids: got {input_ids.shape[-1]} tokens a row, wanted at most {position.shape[0]}, "
                "the rows of position"
            )


def _check_broadcast(name: str, ids: Tensor, input_ids: Tensor) -> None:
    wanted = tuple(input_ids.shape)
    shape = (1,) * (len(wanted) - ids.dim()) + tuple(ids.shape)
    if len(shape) != len(wanted) or any(a not in (1, b) for a, b in zip(shape, wanted, strict=True)):
        raise ValueError(
            f"embedding_layer_norm: {name}: got shape {list(ids.shape)}, wanted one that broadcasts to input_ids', "
            f"{list(wanted)}"
        )
