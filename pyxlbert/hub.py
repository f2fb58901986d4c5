"""Models by name: a folder stays a folder, and any other name asks `huggingface_hub`, its cache first."""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from pyxlbert.files import read_json

# In the order in which they are preferred; each may also come as an index and its shards.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Of a tokenizer: one set of the first makes one, the others are settings.
_TOKENIZERS = (("tokenizer.json",), ("vocab.txt",), ("spiece.model",), ("vocab.json", "merges.txt"))
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# As `pyxlbert.text.folder_settings` reads them, older names too.
_SETTINGS += ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json")
_SETTINGS += ("sentence_camembert_config.json", "sentence_albert_config.json", "sentence_xlm-roberta_config.json")
_SETTINGS += ("sentence_xlnet_config.json",)
_SENTENCES = ("modules.json", "config_sentence_transformers.json")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Hub:
    """How the hub is asked for a model.

    Attributes:
        revision: a branch, a tag or a commit; None is "main".
        cache_dir: where downloads are kept; None is the hub's own place (HF_HOME, HF_HUB_CACHE).
        token: for private and gated models; None and True take the one that is logged in, False none.
        local_files_only: whether the cache alone is looked at, as with HF_HUB_OFFLINE=1.

    Raises:
        TypeError: an attribute has another type.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        for name, kinds, wanted in (
            ("revision", str, "a branch, a tag or a commit"),
            ("cache_dir", str | Path, "a path"),
            ("token", str | bool, "a token, True or False"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                raise TypeError(f"{name}: got {value!r}, wanted {wanted}, or None")
        if not isinstance(self.local_files_only, bool):
            raise TypeError(f"local_files_only: got {self.local_files_only!r}, wanted True or False")

    def folder(self, name: str | Path, *, text: bool = False, weights: bool = True) -> Path:
        """The folder of a model: `name` itself if there is such a folder, or the hub's copy of the model of that name.

        What the cache holds whole is taken as it is, without a question to the hub. Else the files that are read here,
        and no others, are downloaded: the configuration, the weights (safetensors if there are any), and for `text`
        the tokenizer and the modules of a sentence encoder.

        Args:
            name: a path, or as a str also the name of a model such as "FacebookAI/roberta-base".
            text: whether the tokenizer and the modules are wanted too.
            weights: False where the configuration is all that is wanted.

        Returns:
            The folder. A path that does not exist and is no name is returned as it is, for its reader to refuse.

        Raises:
            FileNotFoundError: there is no such folder, and no such model, or it cannot be downloaded; the message says
                why and what to do.
            PermissionError: the model is gated, and the token opens no gate.
            ValueError: the model has no such revision.
            TypeError: `name` is neither.
        """
        if not isinstance(name, (str, os.PathLike)):
            raise TypeError(f"directory: got {type(name).__name__}, wanted a folder, or the name of a model of the hub")
        if name == "":
            raise FileNotFoundError("directory: got '', wanted a folder, or the name of a model of the hub")
        if not isinstance(name, str) or os.path.lexists(name) or not _NAME.fullmatch(name):
            return Path(name)
        try:
            import huggingface_hub
        except ImportError:
            raise FileNotFoundError(
                f"directory: {name!r} does not exist; a model of the hub by that name takes: pip install pyxlbert[hub]"
            ) from None
        cached = self._cached(name, "modules.json" if text else "config.json") or self._cached(name, "config.json")
        if cached is not None and not weights:
            return cached
        if cached is not None and _whole(cached, text) and (not text or self._modules_known(name)):
            return cached
        if self.local_files_only or huggingface_hub.constants.HF_HUB_OFFLINE:
            why = "local_files_only=True" if self.local_files_only else "HF_HUB_OFFLINE=1"
            return self._without_network(name, cached, text, f"{why} forbids to download it")
        try:
            return self._download(name, text) if weights else self._download_config(name)
        except Exception as error:
            return self._refused(name, cached, text, error)

    def _cached(self, name: str, file: str) -> Path | None:
        """The snapshot in the cache that holds a file."""
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(name, file, cache_dir=self.cache_dir, revision=self.revision)
        except ValueError as error:
            raise FileNotFoundError(f"directory: {name!r} is no folder, and no model's name: {error}") from None
        return Path(found).parent if isinstance(found, str) else None

    def _modules_known(self, name: str) -> bool:
        """Whether the cache has `modules.json` or knows that the model has none."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "modules.json", cache_dir=self.cache_dir, revision=self.revision)
        return found is not None

    def _download_config(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        place: dict[str, Any] = {"revision": self.revision, "cache_dir": self.cache_dir, "token": self.token}
        return Path(hf_hub_download(name, "config.json", **place)).parent

    def _download(self, name: str, text: bool) -> Path:
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.utils import EntryNotFoundError

        files = [one.rfilename for one in HfApi(token=self.token).model_info(name, revision=self.revision).siblings]
        place: dict[str, Any] = {"revision": self.revision, "cache_dir": self.cache_dir, "token": self.token}
        listing: Path | None = None
        if text:
            try:  # asked for even if it is not listed: so the cache learns that there is none
                listing = Path(hf_hub_download(name, "modules.json", **place))
            except EntryNotFoundError:
                listing = None
        chosen = _chosen(files, _folders(listing), text)
        if not any(one.rpartition("/")[2].startswith(("model", "pytorch_model")) for one in chosen):
            wanted = ", ".join(form for one in _WEIGHTS for form in (one, f"{one}.index.json"))
            raise _NoWeights(f"directory: the model {name!r} of the hub has no weights: wanted one of {wanted}")
        return Path(snapshot_download(name, allow_patterns=[escape(one) for one in chosen], **place))

    def _refused(self, name: str, cached: Path | None, text: bool, error: Exception) -> Path:
        """What the cache has in spite of an error, or the error in words."""
        from huggingface_hub import utils

        if isinstance(error, _NoWeights) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise error
        told = str(error).strip().split("\n")[0]
        if isinstance(error, utils.GatedRepoError):
            raise PermissionError(
                f"directory: the model {name!r} of the hub is gated: ask for access on its page, then log in with "
                "`hf auth login` or pass token="
            ) from error
        if isinstance(error, utils.RepositoryNotFoundError):
            raise FileNotFoundError(
                f"directory: {name!r} is neither a folder nor a model of the hub (a private one takes `hf auth login` "
                "or token=)"
            ) from error
        if isinstance(error, utils.RevisionNotFoundError):
            raise ValueError(f"revision: got {self.revision!r}, which the model {name!r} does not have") from error
        return self._without_network(name, cached, text, f"the hub gave no answer ({type(error).__name__}: {told})")

    def _without_network(self, name: str, cached: Path | None, text: bool, why: str) -> Path:
        if cached is not None and _whole(cached, text):
            warnings.warn(
                f"{name}: the cache does not say whether the model has a modules.json, and {why}: without it texts are "
                "mean-pooled and not normalised",
                stacklevel=4,
            )
            return cached
        there = "is in the hub's cache only in part" if cached is not None else "is not in the hub's cache"
        raise FileNotFoundError(
            f"directory: {name!r} is no folder, {there}, and {why}; where there is a network, `hf download {name}` "
            "fetches it: then give its folder, or cache_dir= or HF_HOME of the cache that holds it"
        )


class _NoWeights(FileNotFoundError):
    pass


def _folders(listing: Path | None) -> list[str]:
    """The folders that `modules.json` names, each with a slash at its end, and the model's own."""
    found = [""]
    for module in [] if listing is None else read_json(listing, list):
        path = module.get("path") if isinstance(module, dict) else None
        if isinstance(path, str) and path:
            found.append(f"{path.strip('/')}/")
    return found


def _weights(files: Collection[str], folder: str) -> list[str]:
    """The files of the preferred form of the weights."""
    for whole in _WEIGHTS:
        stem, _, kind = whole.rpartition(".")
        if f"{folder}{whole}" in files:
            return [f"{folder}{whole}"]
        if f"{folder}{whole}.index.json" in files:
            shard = re.compile(rf"{re.escape(folder + stem)}-\d+-of-\d+\.{kind}")
            return [f"{folder}{whole}.index.json", *filter(shard.fullmatch, files)]
    return []


def _chosen(files: Collection[str], folders: Iterable[str], text: bool) -> list[str]:
    """Which of a model's files are read here."""
    names = ["config.json"]
    if text:
        names += [*(one for form in _TOKENIZERS for one in form), *_SETTINGS, *_SENTENCES]
    chosen = []
    for folder in folders:
        chosen += [f"{folder}{name}" for name in names if f"{folder}{name}" in files]
        chosen += _weights(files, folder)
    return chosen


def _whole(snapshot: Path, text: bool) -> bool:
    """Whether a snapshot has what is read of it; of a download that was broken off something is missing."""
    files = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    listing = snapshot / "modules.json"
    folders = _folders(listing if text and "modules.json" in files else None)
    # The model stands in the first folder that has a configuration of one.
    home = next((one for one in folders if f"{one}config.json" in files and _weights(files, one)), None)
    if home is None:
        return False
    for index in (one for folder in folders for one in _weights(files, folder) if one.endswith(".index.json")):
        placed = read_json(snapshot / index).get("weight_map")
        shards = set(placed.values()) if isinstance(placed, dict) else set()
        if any(f"{index.rpartition('/')[0]}/{shard}".lstrip("/") not in files for shard in shards):
            return False
    if not text:
        return True
    # A folder of modules without files, as of normalisation, is in no listing.
    dense = [one for one in folders if one and re.search(r"Dense", one)]
    if any(not _weights(files, one) for one in dense):
        return False
    pooling = [one for one in folders if "Pooling" in one]
    if any(f"{one}config.json" not in files for one in pooling):
        return False
    tokenizer = any(all(f"{home}{name}" in files for name in form) for form in _TOKENIZERS)
    return tokenizer and f"{home}tokenizer_config.json" in files
