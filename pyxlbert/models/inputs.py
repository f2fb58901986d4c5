"""What the models ask of their arguments, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from pyxlbert import checks
from pyxlbert.nn import has_values, sizes_are_fixed

IGNORED = -100  # the label that counts for nothing


def can_read_values(tensor: Tensor) -> bool:
    """Whether a tensor's values may be looked at: not in a traced graph, and not where it would wait for a device."""
    return has_values(tensor) and tensor.device.type == "cpu"


def check_tensors(**given: object) -> None:
    """Raises TypeError for what is no strided tensor and not None, ValueError for one whose memory was given back."""
    traced = sizes_are_fixed() or torch.jit.is_tracing()
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, wanted a tensor")
        if value.is_nested or value.layout is not torch.strided:
            layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.").removeprefix("_")
            raise TypeError(f"{name}: got a tensor of layout {layout}, wanted a strided one")
        if not traced:
            _check_memory(name, value)


def _check_memory(name: str, value: Tensor) -> None:
    if type(value) is not Tensor and type(value) is not Parameter:  # whose memory may lie in other tensors
        return
    try:
        held = value.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # sparse, nested, or inside torch.func: with no storage to ask
        return
    # The usual tensor is contiguous, and at its storage's beginning.
    if held < value.numel() * value.element_size() or not value.is_contiguous() or value.storage_offset():
        wrong = checks.short_storage(value)
        if wrong is not None:
            raise ValueError(f"{name}: {wrong}")


def check_zero_one(name: str, mask: Tensor) -> None:
    """Raises ValueError for a mask on the CPU with other values than 0 and 1."""
    if mask.dtype != torch.bool and can_read_values(mask) and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{name}: got other values than 0 and 1, wanted 1 for a token")


def check_device(name: str, tensor: Tensor | None, device: torch.device) -> None:
    """Raises ValueError when a tensor is on another device."""
    if tensor is not None and tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, wanted {device}")


def check_integers(name: str, ids: Tensor) -> None:
    """Raises TypeError for other dtypes than int64 and int32."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got {ids.dtype}, wanted torch.int64 or torch.int32")


def check_shape(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError when the shape is none of these."""
    # A tracer compares symbolic sizes one by one, and would take `in` to be false.
    if not any(tensor.dim() == len(shape) and tensor.shape == shape for shape in shapes):
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, wanted {wanted}")


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Raises ValueError when a value on the CPU lies outside low .. high."""
    if not can_read_values(values) or not values.numel():
        return
    least, most = (int(x) for x in values.aminmax())
    if least < low or most > high:
        raise ValueError(f"{name}: got {least if least < low else most}, wanted {low} to {high}")


def check_labels(name: str, labels: object, device: torch.device, *shapes: tuple[int, ...]) -> None:
    """Raises TypeError for what is no tensor, ValueError for another device than the logits' or another shape."""
    check_tensors(**{name: labels})
    check_device(name, labels, device)
    check_shape(name, labels, *shapes)


def check_choices(**given: object) -> tuple[int, int]:
    """B and C of arguments of several choices: `inputs_embeds` [B, C, T, E], the others [B, C, T].

    Raises:
        TypeError: one is no tensor.
        ValueError: neither or both of `input_ids` and `inputs_embeds` are given, one has another number of dimensions,
            or B, C and T are not the same in all.
    """
    check_tensors(**given)
    if (given["input_ids"] is None) == (given["inputs_embeds"] is None):
        raise ValueError("input_ids: wanted exactly one of input_ids and inputs_embeds")
    present = {name: tuple(x.shape) for name, x in given.items() if isinstance(x, Tensor)}
    first = "input_ids" if "input_ids" in present else "inputs_embeds"
    for name, shape in ((first, present[first]), *present.items()):
        wanted = "[B, C, T, E]" if name == "inputs_embeds" else "[B, C, T]"
        if len(shape) != len(wanted.split(",")):
            raise ValueError(f"{name}: got shape {list(shape)}, wanted {wanted}")
        if shape[:3] != present[first][:3]:
            raise ValueError(f"{name}: got shape {list(shape)}, wanted {list(present[first][:3])} as {first}")
    return present[first][0], present[first][1]


def check_classes(name: str, labels: Tensor, classes: int, ignore_index: int = IGNORED) -> None:
    """Raises TypeError or ValueError for labels that are neither classes nor `ignore_index`."""
    check_integers(name, labels)
    if not can_read_values(labels) or not labels.numel():
        return
    counted = labels[labels != ignore_index]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= classes):
        worst = int(counted.min()) if int(counted.min()) < 0 else int(counted.max())
        raise ValueError(f"{name}: got {worst}, wanted 0 to {classes - 1}, or {ignore_index} for none")


def check_tokens(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, hidden: int, device: torch.device, packed: bool = False
) -> tuple[str, Tensor]:
    """The one of the two that was given, with its name.

    Raises:
        ValueError: none or both were given, or the shape or the device is wrong.
        TypeError: the dtype is wrong.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids: wanted exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        check_integers("input_ids", input_ids)
        given, tokens, wanted = "input_ids", input_ids, "[total]" if packed else "[B, T]"
        good = input_ids.dim() == (1 if packed else 2)
    else:
        if not inputs_embeds.is_floating_point():
            raise TypeError(f"inputs_embeds: got {inputs_embeds.dtype}, wanted a floating-point dtype")
        given, tokens = "inputs_embeds", inputs_embeds
        wanted = f"[total, {hidden}]" if packed else f"[B, T, {hidden}]"
        good = inputs_embeds.dim() == (2 if packed else 3) and inputs_embeds.shape[-1] == hidden
    if not good:
        raise ValueError(f"{given}: got shape {list(tokens.shape)}, wanted {wanted}")
    check_device(given, tokens, device)
    return given, tokens


def check_ids(name: str, ids: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor | None:
    """Integers of the tokens' shape; one row stands for all.

    Raises:
        ValueError: the shape or the device is wrong.
        TypeError: the dtype is wrong.
    """
    if ids is None:
        return None
    check_integers(name, ids)
    check_device(name, ids, device)
    if ids.shape != shape:
        if ids.dim() != len(shape) or ids.shape[-1] != shape[-1] or ids.shape[0] != 1:
            raise ValueError(f"{name}: got shape {list(ids.shape)}, wanted {list(shape)}")
        ids = ids.expand(shape)
    return ids
