"""Hugging Face model directories: reading and writing files, and the names of tensors in them.

Nothing here builds a model. A directory is read and checked completely before anyone gets a tensor.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from torch import Tensor

from pyxlbert.files import file_digest, is_there, model_directory, read_json, whole_file

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order in which they are looked for


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken file can raise whatever unpickling meets on its way
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(f"{path} is not a whole file of weights alone: {reason}") from error
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a dictionary of tensors")
    return dict(state)


def _read_file(path: Path) -> dict[str, Tensor]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _shards(index_path: Path) -> tuple[dict[str, str], list[str]]:
    """The index's shard of each tensor, and the names of the shards, all of which are there."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index_path} has no weight_map")
    for shard in weight_map.values():
        # Names are judged under both systems' rules. Links are left alone: download caches are made of them.
        parts = (PurePosixPath(str(shard)), PureWindowsPath(str(shard)))
        if not isinstance(shard, str) or any(p.is_absolute() or p.drive or ".." in p.parts for p in parts):
            raise ValueError(f"{index_path} names the shard {shard!r}, which is outside its directory")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not is_there(index_path.parent / shard):
            raise FileNotFoundError(f"{index_path} names the shard {shard!r}, which is missing")
    return weight_map, shards


def _read_shards(index_path: Path) -> dict[str, Tensor]:
    weight_map, shards = _shards(index_path)
    state: dict[str, Tensor] = {}
    for shard in shards:
        tensors = _read_file(index_path.parent / shard)
        for name in (name for name, place in weight_map.items() if place == shard):
            if name not in tensors:
                raise ValueError(f"{index_path} places {name!r} in the shard {shard!r}, which does not hold it")
            state[name] = tensors[name]
    return state


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """Every tensor of a model directory, under the names in its files.

    ``model.safetensors`` is preferred to its sharded form (``model.safetensors.index.json``), and both to
    ``pytorch_model.bin`` and its sharded form. Pickled files are read with ``weights_only=True``.

    Raises:
        FileNotFoundError: there is no directory, it has no weights, or an index names a shard that is not there.
        ValueError: a file is truncated or corrupt, or an index leads outside the directory.
    """
    path = _weights_file(directory)
    return _read_shards(path) if path.suffix == ".json" else _read_file(path)


def _weights_file(directory: str | Path) -> Path:
    """What a directory's weights are read from: one file, or the index of several."""
    directory = model_directory(directory)
    forms = [form for name in WEIGHTS for form in (name, f"{name}.index.json")]
    for form in forms:
        if is_there(directory / form):
            return directory / form
    raise FileNotFoundError(f"no weights in {directory}: wanted one of {', '.join(forms)}")


def weights_digest(directory: str | Path) -> str:
    """SHA-256 of the files that `read_weights` reads, as hexadecimal digits.

    Raises:
        OSError, ValueError: as `read_weights` of files that are missing, or of an index.
    """
    path = _weights_file(directory)
    files = [path, *(path.parent / shard for shard in _shards(path)[1])] if path.suffix == ".json" else [path]
    return hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: it cannot be written, for want of space, say.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


def write_weights(directory: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``model.safetensors``; the file appears whole or not at all. No two tensors may share memory."""
    own = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with whole_file(Path(directory) / "model.safetensors") as path:
        save(own, path, {"format": "pt"})


def layers_of(names: Iterable[str]) -> int:
    """How many layers a checkpoint's names count."""
    found = (re.search(r"(?:^|\.)layer\.(\d{1,9})\.", name) for name in names)
    return max((int(one[1]) + 1 for one in found if one is not None), default=0)


# What wrappers of a whole model put before every name, and those of its layers in the middle of one.
WRAPPERS = ("_orig_mod.", "module.", "_forward_module.", "model.")
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def wrapping(names: Iterable[str]) -> tuple[str, list[str]]:
    """What torch.compile, DataParallel, DeepSpeed and others have put before every name, and inside of some.

    Returns:
        the common prefix, ``""`` where there is none, and the wrappers' names that stand elsewhere.
    """
    names, prefix = list(names), ""
    while True:
        found = next((one for one in WRAPPERS if names and all(n.startswith(prefix + one) for n in names)), None)
        if found is None:
            break
        prefix += found
    rest = [f".{name.removeprefix(prefix)}" for name in names]
    return prefix, [one for one in INNER_WRAPPERS if any(f".{one}" in name for name in rest)]


def _unwrapped(name: str, prefix: str, inner: Iterable[str]) -> str:
    name = f".{name.removeprefix(prefix)}"
    for one in inner:
        name = name.replace(f".{one}", ".")
    return name[1:]


def own_names(theirs: Iterable[str], *, base: str, base_parts: Iterable[str], headed: bool) -> dict[str, str | None]:
    """The name that each tensor of a checkpoint has in our model.

    Args:
        theirs: names in the checkpoint.
        base: what a model with a head calls its encoder, such as ``"bert"``.
        base_parts: the encoder's own top-level names.
        headed: whether our model has a head, and so the prefix.

    What `wrapping` finds is taken off first.

    Returns:
        Their name to ours; None for buffers that we have no use for.

    Raises:
        ValueError: two names lead to the same one.
    """
    theirs = list(theirs)
    prefix, wrappers = f"{base}.", wrapping(theirs)
    unwrapped = {name: _unwrapped(name, *wrappers) for name in theirs}
    prefixed = any(name.startswith(prefix) for name in unwrapped.values())
    names: dict[str, str | None] = {}
    taken: dict[str, str] = {}
    for name, plain in unwrapped.items():
        if name.endswith(("embeddings.position_ids", "embeddings.token_type_ids")):
            names[name] = None
            continue
        ours = re.sub(r"(LayerNorm|layer_norm)\.gamma$", r"\1.weight", plain)
        ours = re.sub(r"(LayerNorm|layer_norm)\.beta$", r"\1.bias", ours)
        if not headed:
            ours = ours.removeprefix(prefix)
        elif not prefixed and ours.split(".")[0] in base_parts:
            ours = prefix + ours
        if ours in taken:
            raise ValueError(f"the checkpoint holds both {taken[ours]!r} and {name!r}, which are the same weight")
        names[name] = ours
        taken[ours] = name
    return names
