"""The losses of the heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
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
from pyxlbert.nn import TokenLayout, sizes_are_fixed, vocabulary_loss

LOW_PRECISION = (torch.bfloat16, torch.float16)


def widened(logits: Tensor) -> Tensor:
    """Half-precision logits in float32, so that a loss keeps float32's digits."""
    return logits.float() if logits.dtype in LOW_PRECISION else logits


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """The mean over labels that count."""
    classes = logits.shape[-1]
    return F.cross_entropy(widened(logits).reshape(-1, classes), labels.reshape(-1).long(), ignore_index=ignore_index)


def class_loss(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of one class a row.

    Args:
        name: what an error calls `labels`.
        logits: ``[B, classes]``.
        labels: ``[B]``, -100 for none.

    Raises:
        ValueError: labels of a wrong shape or value.
        TypeError: labels of a wrong dtype.
    """
    batch, classes = logits.shape
    check_labels(name, labels, logits.device, (batch,), (batch, 1))
    check_classes(name, labels, classes)
    return cross_entropy(logits, labels)


def token_loss(logits: Tensor, labels: Tensor, layout: TokenLayout) -> Tensor:
    """The loss of one class a token.

    Args:
        logits: ``[B, T, classes]``, packed ``[total, classes]``.
        labels: ``[B, T]``, -100 for none; those on padding are ignored.
        layout: where the rows lie.

    Raises:
        ValueError: labels of a wrong shape or value.
        TypeError: labels of a wrong dtype.
    """
    check_labels("labels", labels, logits.device, (layout.batch, layout.length))
    check_classes("labels", labels, logits.shape[-1])
    return cross_entropy(logits, layout.labels(labels))


def loss_without_logits(
    decoder: nn.Module,
    rows: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORED,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The mean over labels that count of a decoder's cross entropy; what nobody is asked about is not computed.

    Where sizes must not depend on values, under `torch.compile` and `torch.export`, the logits of all rows are.

    Args:
        decoder: gives the logits ``[..., V]``.
        rows: ``[B, T, E]``, packed ``[total, E]``.
        labels: ``[B, T]``, packed ``[total]``; checked, and `ignore_index` at padding.
        ignore_index: the label that means "none".
        transform: what a head does with its rows before the decoder.
    """
    if sizes_are_fixed():
        return cross_entropy(decoder(rows if transform is None else transform(rows)), labels, ignore_index)
    rows, labels = labelled_rows(rows, labels, ignore_index)
    return vocabulary_loss(decoder, rows if transform is None else transform(rows), labels)


def labelled_rows(rows: Tensor, labels: Tensor, ignore_index: int = IGNORED) -> tuple[Tensor, Tensor]:
    """The rows ``[labelled, E]`` whose label is not `ignore_index`, and their labels, int64 ``[labelled]``."""
    labels = labels.reshape(-1)
    chosen = (labels != ignore_index).nonzero().squeeze(1)  # [labelled]
    return rows.reshape(-1, rows.shape[-1]).index_select(0, chosen), labels.index_select(0, chosen).long()


def require_labels(labels: Tensor | None, output_logits: bool) -> None:
    """Raises ValueError for a call that asks for neither a loss nor logits, TypeError for what is no bool."""
    if not isinstance(output_logits, bool):
        raise TypeError(f"output_logits: got {output_logits!r}, wanted True or False")
    if labels is None and not output_logits:
        raise ValueError("output_logits: got False without labels, wanted labels, whose loss is all that is left")


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


def answer_loss(
    start: Tensor, end: Tensor, start_places: Tensor | None, end_places: Tensor | None, layout: TokenLayout
) -> Tensor | None:
    """The mean of `span_loss` of both ends of an answer; None unless both places are given.

    Args:
        start, end: logits ``[B, T]``.
        start_places, end_places: ``[B]``.
        layout: says which places are padding.
    """
    if start_places is None or end_places is None:
        return None
    tokens = layout.tokens(start.device)
    start_loss = span_loss("start_positions", start, start_places, tokens)
    return (start_loss + span_loss("end_positions", end, end_places, tokens)) / 2
