"""The losses of the heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyxlbert.models.inputs import (
    IGNORED,
    check_classes,
    check_device,
    check_integers,
    check_labels,
    check_shape,
    check_tensors,
)

LOW_PRECISION = (torch.bfloat16, torch.float16)


def widened(logits: Tensor) -> Tensor:
    """Half-precision logits in float32, so that a loss keeps float32's digits."""
    return logits.float() if logits.dtype in LOW_PRECISION else logits


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """The mean over labels that count."""
    classes = logits.shape[-1]
    return F.cross_entropy(widened(logits).reshape(-1, classes), labels.reshape(-1).long(), ignore_index=ignore_index)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of a classifier or regressor with one row of logits a sequence.

    Args:
        logits: ``[B, num_labels]``.
        labels: for ``"regression"`` numbers ``[B]`` or ``[B, num_labels]``, for ``"single_label_classification"``
            classes ``[B]``, for ``"multi_label_classification"`` 0 or 1 ``[B, num_labels]``.
        problem_type: one of these; None is regression for one label, else the second for integer labels and the third
            for others.

    Raises:
        ValueError: labels of a wrong shape or value.
        TypeError: labels of a wrong dtype.
    """
    batch, count = logits.shape
    check_tensors(labels=labels)
    check_device("labels", labels, logits.device)
    kind = problem_type
    if kind is None:
        integers = labels.dtype in (torch.int64, torch.int32)
        several = "single_label_classification" if integers else "multi_label_classification"
        kind = "regression" if count == 1 else several
    if kind == "single_label_classification":
        check_shape("labels", labels, (batch,), (batch, 1))
        check_classes("labels", labels, count)
        return cross_entropy(logits, labels)
    if kind == "regression" and count == 1:
        check_shape("labels", labels, (batch,), (batch, 1))
    else:
        check_shape("labels", labels, (batch, count))
    if labels.is_complex():
        raise TypeError(f"labels: got {labels.dtype}, wanted real numbers")
    logits = widened(logits)
    labels = labels.to(logits.dtype).view(batch, count)
    return F.mse_loss(logits, labels) if kind == "regression" else F.binary_cross_entropy_with_logits(logits, labels)


def span_loss(name: str, logits: Tensor, places: Tensor, tokens: Tensor | None) -> Tensor:
    """The loss of where a span starts or ends.

    Args:
        name: what an error calls `places`.
        logits: ``[B, T]``.
        places: ``[B]``; one beyond the row counts for nothing, one before it is the first token.
        tokens: bool ``[B, T]``, False at padding: a place there counts for nothing. None: no padding.

    Raises:
        ValueError: places of a wrong shape.
        TypeError: places of a wrong dtype.
    """
    batch, length = logits.shape
    check_labels(name, places, logits.device, (batch,), (batch, 1))
    check_integers(name, places)
    places = places.reshape(-1).long().clamp(0, length)
    if tokens is not None and length:
        real = tokens.gather(1, places.clamp(max=length - 1)[:, None]).squeeze(1)
        places = torch.where(real, places, length)
    return cross_entropy(logits, places, ignore_index=length)
