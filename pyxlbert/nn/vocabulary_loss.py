"""Cross entropy over a vocabulary whose logits exist for a part of the rows at a time.

With N rows, V words and E numbers a row, the logits and what autograd keeps of them are several tensors ``[N, V]``; a
chunk of C rows needs one or two ``[C, V]``. The gradient of a chunk's logits, softmax minus one-hot, is known as soon
as its loss is, so it is multiplied at once and the chunk is forgotten: three matrix products, as without chunks, where
recomputing the logits in the backward pass would take four.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pyxlbert.nn.layout import has_values
from pyxlbert.nn.linear import Linear
from pyxlbert.ops import _wide
from pyxlbert.ops._autograd import OpFunction, single_backward
from pyxlbert.ops._memory import KeptMemory, memory_of
from pyxlbert.ops._torch import keeps_graph
from pyxlbert.ops.linear import gradients, linear

# Logits that exist at a time, and rows: a product of fewer is slower, more gain nothing. The most rows keep a sum over
# a chunk within float16.
_LOGITS_AT_ONCE, _FEWEST, _MOST = 1 << 24, 64, 2048


def vocabulary_loss(decoder: nn.Module, rows: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of a decoder's logits, which never exist for all rows at once.

    Args:
        decoder: gives the logits ``[n, V]`` of rows ``[n, E]``. A plain `Linear` is differentiated here; any other
            module, and one with hooks, is called for each chunk, and once more in the backward pass.
        rows: ``[N, E]``.
        labels: int64 ``[N]``, 0 to V - 1.

    Returns:
        A scalar in float32 (float64 for rows in float64); NaN without rows, as the mean of nothing is.
    """
    # In inference a decoder may have a copy of its weights that is faster.
    if torch.is_grad_enabled() and type(decoder) is Linear and not _hooked(decoder):
        return linear_cross_entropy(rows, decoder.weight, decoder.bias, labels)
    total = None
    for part in _parts(rows.shape[0], _size(decoder)):
        arguments = (decoder, rows[part], labels[part])
        again = torch.is_grad_enabled()
        loss = checkpoint(_summed, *arguments, use_reentrant=False) if again else _summed(*arguments)
        total = loss if total is None else total + loss
    if total is None:
        total = _summed(decoder, rows, labels)
    return total / rows.shape[0] if rows.shape[0] else total + torch.nan


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """The mean cross entropy of the logits x weightᵀ + bias. Its gradients are computed with it.

    Args:
        x: ``[N, E]``, float32, bfloat16, float16 or, on backend "torch", float64. Under autocast all three are cast.
        weight: ``[V, E]``, x's dtype.
        bias: ``[V]``, likewise, or None.
        labels: int64 ``[N]``, 0 to V - 1.

    Returns:
        A scalar in float32 (float64 for x in float64); NaN without rows.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not listed above.
        ValueError: a shape, a device or, on the CPU, a label is wrong.
    """
    _check(x, weight, bias, labels)
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
    needed = tuple(one is not None and one.requires_grad and torch.is_grad_enabled() for one in (x, weight, bias))
    with torch.autocast(device, enabled=False):
        memory = memory_of(weight) if any(needed) else None
        return _LinearCrossEntropy.apply(x, weight, bias, labels, needed, dtype, memory)[0]


class _LinearCrossEntropy(OpFunction):
    op = "linear_cross_entropy"

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        needed: tuple[bool, ...],
        dtype: torch.dtype,
        memory: KeptMemory | None,
    ) -> tuple[Tensor, ...]:
        """The loss and the gradients; in float16, of the sum, N times those of the mean: none of them is too small."""
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        if any(needed) and _wide.multiplies(x, weight):
            return _with_wide_weight(x, weight, bias, labels, needed, memory)
        if memory is None or weight.dtype is dtype:
            weight = weight.to(dtype)
        else:
            weight = memory.empty(weight.shape, dtype).copy_(weight)
        wide = torch.promote_types(dtype, torch.float32)
        total = x.new_zeros((), dtype=wide)
        dx = torch.empty_like(x) if needed[0] else x.new_empty(0)
        dweight = dbias = x.new_empty(0)
        for part in _parts(x.shape[0], weight.shape[0]):
            logits = linear(x[part], weight, bias)  # [C, V]
            logp = F.log_softmax(logits, dim=1, dtype=wide)  # [C, V]
            del logits
            wanted = labels[part]  # [C]
            total -= logp.gather(1, wanted[:, None]).sum()
            if not any(needed):
                continue
            slope = logp.exp_()  # [C, V]
            slope[torch.arange(len(wanted), device=x.device), wanted] -= 1.0
            if dtype is not torch.float16:
                slope.mul_(1 / x.shape[0])
            one_dx, one_dweight, _ = gradients(
                slope.to(dtype), x[part] if needed[1] else None, weight if needed[0] else None
            )
            if needed[0]:
                dx[part] = one_dx
            if needed[1]:
                dweight = _added(dweight, one_dweight, wide)
            if needed[2]:
                dbias = _added(dbias, slope.sum(0), wide)
            del logp, slope  # before the next chunk's are made
        return total / x.shape[0], dx, dweight, dbias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.needed, ctx.summed, ctx.memory = inputs[4], inputs[5] is torch.float16, inputs[6]
        ctx.like = [None if one is None else (one.shape, one.dtype) for one in inputs[:3]]
        ctx.save_for_backward(*output[1:])

    @staticmethod
    @single_backward("linear_cross_entropy")
    def backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        rows = ctx.like[0][0][0]
        for one, needed, like in zip(ctx.saved_tensors, ctx.needed, ctx.like, strict=True):
            if not needed or dloss is None:
                found.append(None)
                continue
            shape, dtype = like
            scale = dloss / rows if rows and ctx.summed else dloss
            if not rows:
                found.append(dloss.new_zeros(shape, dtype=dtype))
            elif one.is_cpu:
                found.append(_scaled(one, scale, dtype, ctx.memory if len(found) == 1 else None))
                if len(found) == 2 and ctx.memory is not None:
                    ctx.memory.hand_over(found[1])
            else:
                found.append((one.to(dloss.dtype) * scale).to(dtype))
        return *found, None, None, None, None


def _with_wide_weight(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, needed: tuple[bool, ...], memory: KeptMemory | None
) -> tuple[Tensor, ...]:
    """The loss and the gradients with a weight in float32, which need not be rounded first, nor its gradient widened.

    The logits of a chunk are in bfloat16, and their gradient takes their place.
    """
    count, words = x.shape[0], weight.shape[0]
    total, dbias = x.new_zeros((), dtype=torch.float32), x.new_empty(0)
    dx = torch.empty_like(x) if needed[0] else x.new_empty(0)
    dweight = x.new_empty(0)
    for part in _parts(count, words):
        shape = (part.stop - part.start, words)
        logits = x.new_empty(shape) if memory is None else memory.empty(shape, x.dtype)
        _wide.product(x[part], weight, bias, logits)  # [C, V]
        total += _wide.softmax_slope(logits, labels[part], 1 / count)
        if needed[0]:
            dx[part] = _wide.to_rows(logits, weight)
        if needed[1]:
            dweight = _wide.to_weight(logits, x[part], weight, memory, dweight)
        if needed[2]:
            dbias = _added(dbias, logits.sum(0, dtype=torch.float32), torch.float32)
        del logits  # before the next chunk's are made
    return total / count, dx, dweight, dbias


def _scaled(one: Tensor, scale: Tensor, dtype: torch.dtype, memory: KeptMemory | None) -> Tensor:
    """On the CPU, where a tensor of no dimensions is not rounded to the other's dtype."""
    if torch.promote_types(one.dtype, dtype) is not dtype:
        return (one * scale).to(dtype)
    if memory is not None and one.dtype is dtype and not keeps_graph():
        # Nobody asks for it again.
        return one if scale == 1 else one.mul_(scale)
    scaled = torch.empty(one.shape, dtype=dtype) if memory is None else memory.empty(one.shape, dtype)
    if one.dtype is dtype:
        return torch.mul(one, scale, out=scaled)
    return scaled.copy_(one).mul_(scale)  # faster than a product of two dtypes


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    op = _LinearCrossEntropy.op
    for name, value in {"x": x, "weight": weight, "labels": labels, "bias": weight if bias is None else bias}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name}: got {type(value).__name__}, wanted a tensor")
    if x.dim() != 2:
        raise ValueError(f"{op}: x: got shape {list(x.shape)}, wanted [N, E]")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: weight: got shape {list(weight.shape)}, wanted [V, {x.shape[1]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias: got shape {list(bias.shape)}, wanted [{weight.shape[0]}]")
    if labels.shape != x.shape[:1]:
        raise ValueError(f"{op}: labels: got shape {list(labels.shape)}, wanted [{x.shape[0]}]")
    if labels.dtype is not torch.int64:
        raise TypeError(f"{op}: labels: got {labels.dtype}, wanted torch.int64")
    cast = torch.is_autocast_enabled(x.device.type)
    for name, value in {"weight": weight, "labels": labels, "bias": weight if bias is None else bias}.items():
        if value.device != x.device:
            raise ValueError(f"{op}: {name}: got device {value.device}, wanted x's, {x.device}")
        if name != "labels" and value.dtype is not x.dtype and not cast:
            raise TypeError(f"{op}: {name}: got {value.dtype}, wanted x's, {x.dtype}")
    if (
        has_values(labels)
        and labels.is_cpu
        and labels.numel()
        and not 0 <= int(labels.min()) <= int(labels.max()) < weight.shape[0]
    ):
        raise ValueError(f"{op}: labels: got {_outside(labels, weight.shape[0])}, wanted 0 to {weight.shape[0] - 1}")


def _outside(labels: Tensor, words: int) -> int:
    return int(labels[(labels < 0) | (labels >= words)][0])


def _added(total: Tensor, one: Tensor, wide: torch.dtype) -> Tensor:
    """A sum over chunks; the first is taken as it is, for often there is no other."""
    return one if not total.numel() else total.to(wide).add_(one)


def _summed(decoder: nn.Module, rows: Tensor, labels: Tensor) -> Tensor:
    logits = decoder(rows)  # [C, V]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, reduction="sum")


def _parts(rows: int, words: int) -> list[slice]:
    size = min(max(_FEWEST, _LOGITS_AT_ONCE // max(1, words)), _MOST)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _size(decoder: nn.Module) -> int:
    """V, as far as the module tells."""
    return int(getattr(decoder, "out_features", 0)) or 1 << 15


def _hooked(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)
