"""`int8.safetensors` beside a model's weights: the integers and scales that its layers multiply by.

The weights stay what they are, so that the directory is an ordinary one.  For each of them that is quantised, say
`encoder.layer.0.output.dense.weight`, the file holds that name with int8 `[N, K]` and, with `.scales` behind it,
float32 `[N]`.  Its metadata has the SHA-256 of each weight, so that integers of other weights are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyxlbert.files import is_there, model_directory, whole_file
from pyxlbert.models.checkpoints import save
from pyxlbert.ops._integers import MOST, Integers, check_inputs

FILE = "int8.safetensors"
_SCALES = ".scales"
_HASH = "sha256 of "
_DTYPE = "dtype of all else"
_DTYPES = {str(one).removeprefix("torch."): one for one in (torch.float32, torch.bfloat16, torch.float16)}


class SavedModel(NamedTuple):
    """What the file holds.

    Attributes:
        integers: by the name of the weight in `model.safetensors`.
        dtype: in which the model ran that was saved.
    """

    integers: dict[str, Integers]
    dtype: torch.dtype


def write(
    directory: str | Path, integers: Mapping[str, Integers], weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Writes the file, whole or not at all.

    Args:
        directory: of the model.
        integers: by the name of the weight.
        weights: what the directory's files of weights hold.
        dtype: of the model.
    """
    metadata = {"format": "pt", _DTYPE: str(dtype).removeprefix("torch.")}
    tensors = {}
    for name, (weight, scales) in integers.items():
        metadata[_HASH + name] = _hash(weights[name])
        tensors[name], tensors[name + _SCALES] = weight, scales
    with whole_file(Path(directory) / FILE) as path:
        save(tensors, path, metadata)


def remove(directory: str | Path) -> None:
    """Removes the file, if there is one."""
    (Path(directory) / FILE).unlink(missing_ok=True)


def read(directory: str | Path, weights: Mapping[str, Tensor]) -> SavedModel | None:
    """What the file holds; None if there is none.

    Args:
        directory: of the model.
        weights: what its files of weights hold.

    Raises:
        ValueError: the file is corrupt, or of other weights; the message says what to do.
    """
    from safetensors import SafetensorError, safe_open

    path = model_directory(directory) / FILE
    if not is_there(path):
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    dtype = _DTYPES.get(metadata.get(_DTYPE, ""))
    if dtype is None:
        raise ValueError(f"{path}: {_DTYPE}: got {metadata.get(_DTYPE)!r}, wanted one of {', '.join(_DTYPES)}")
    integers = {}
    for key, value in metadata.items():
        if not key.startswith(_HASH):
            continue
        name = key.removeprefix(_HASH)
        integers[name] = _checked(path, name, tensors)
        if name not in weights or _hash(weights[name]) != value:
            what = "is another" if name in weights else "is missing"
            raise ValueError(
                f"{path} belongs to other weights: {name} {what} in {path.parent}; "
                f"`pyxlbert quantise {path.parent}` writes it anew, and without it weights are quantised when loaded"
            )
    return SavedModel(integers, dtype)


def _checked(path: Path, name: str, tensors: Mapping[str, Tensor]) -> Integers:
    weight, scales = tensors.get(name), tensors.get(name + _SCALES)
    if weight is None or scales is None:
        raise ValueError(f"{path} lacks {name if weight is None else name + _SCALES}")
    if weight.dtype is not torch.int8 or weight.dim() != 2 or bool((weight < -MOST).any()):
        raise ValueError(
            f"{path}: {name}: got {weight.dtype} {list(weight.shape)}, wanted int8 [N, K] from -{MOST} to {MOST}"
        )
    check_inputs(f"{path}: {name}", weight)
    if scales.dtype is not torch.float32 or scales.shape != weight.shape[:1]:
        raise ValueError(
            f"{path}: {name}{_SCALES}: got {scales.dtype} {list(scales.shape)}, wanted float32 [{weight.shape[0]}]"
        )
    return Integers(weight, scales)


def _hash(weight: Tensor) -> str:
    found = hashlib.sha256(f"{weight.dtype} {list(weight.shape)} ".encode())
    found.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
