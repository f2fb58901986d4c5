"""The peers as `--peer` names them, and why one is not here."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import NamedTuple

import torch


class Family(NamedTuple):
    """A peer with all of its contestants.

    Attributes:
        words: one of its contestants' names begins with one of them.
        module, package: what it needs, as Python imports it and as pip installs it.
        cuda: it runs on CUDA devices alone.
    """

    words: tuple[str, ...]
    module: str
    package: str
    cuda: bool = False


FAMILIES = {
    "compile": Family(("torch.compile",), "torch", "torch"),
    "sdpa": Family(("SDPA",), "torch", "torch"),
    "flex": Family(("FlexAttention",), "torch", "torch"),
    "transformers": Family(("transformers",), "transformers", "transformers"),
    "onnxruntime": Family(("ONNX Runtime",), "onnxruntime", "onnxruntime"),
    "openvino": Family(("OpenVINO",), "openvino", "openvino"),
    "sentence-transformers": Family(("sentence-transformers",), "sentence_transformers", "sentence-transformers"),
    "flash-attn": Family(("flash-attn",), "flash_attn", "flash-attn", cuda=True),
    "liger": Family(("Liger",), "liger_kernel", "liger-kernel", cuda=True),
    # What is none of the above is written in plain calls of torch.
    "eager": Family(("",), "torch", "torch"),
}


def family_of(contestant: str) -> str:
    """The peer that a contestant, none of ours, is one of."""
    return next(name for name, family in FAMILIES.items() if contestant.startswith(family.words))


def why_not(name: str, device: str) -> str | None:
    """Why a peer cannot race on "cpu" or "cuda", or None."""
    family = FAMILIES[name]
    if importlib.util.find_spec(family.module) is None:
        return f"{family.package} is not installed"
    return "it runs on CUDA devices alone" if family.cuda and device == "cpu" else None


def here(device: str) -> dict[str, str]:
    """Every peer with its version, or why it does not race."""
    return {name: why_not(name, device) or _version(family) for name, family in FAMILIES.items()}


def _version(family: Family) -> str:
    try:
        return metadata.version(family.package)
    except metadata.PackageNotFoundError:  # a build of its own, without metadata
        return torch.__version__ if family.module == "torch" else "of unknown version"
