"""From token vectors to one vector a text: pooling, and the modules that a sentence-transformers directory lists.

Everything here works on packed rows: `hidden` is [total, E], `lengths` says how many rows each text has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from pyxlbert.files import is_there, model_directory, read_json, read_optional_json, setting
from pyxlbert.models.checkpoints import read_weights

from .folder_settings import refuse_other, refuse_unknown


def _mean(rows: torch.Tensor) -> torch.Tensor:
    return rows.mean(0)


def _mean_sqrt_length(rows: torch.Tensor) -> torch.Tensor:
    return rows.sum(0) / len(rows) ** 0.5


def _weighted_mean(rows: torch.Tensor, skip: int = 0) -> torch.Tensor:
    weights = torch.arange(1 + skip, len(rows) + 1 + skip, dtype=rows.dtype, device=rows.device)
    return weights @ rows / weights.sum()


# Named as in a sentence-transformers pooling file, in the order in which several are concatenated.
_MODES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda rows: rows[0],
    "max": lambda rows: rows.amax(0),
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_length,
    "weightedmean": _weighted_mean,
    "lasttoken": lambda rows: rows[-1],
}
# Older files have a key for each: `"pooling_mode_mean_tokens": true`.
_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": F.gelu,
    "SiLU": F.silu,
    "Sigmoid": torch.sigmoid,
}
POOLINGS = ("mean", "cls", "max")
_DENSE = ("in_features", "out_features", "bias", "activation_function", "module_input_name", "module_output_name")
_DENSE += ("use_residual",)


def pool(hidden: torch.Tensor, lengths: Sequence[int], modes: Sequence[str] = ("mean",), skip: int = 0) -> torch.Tensor:
    """One vector a text; several modes are concatenated in the order given.

    Args:
        hidden: [total, E], the texts' rows one after the other.
        lengths: B numbers of rows, `total` in sum. A text without rows gets zeros.
        modes: of "cls", "max", "mean", "mean_sqrt_len_tokens" (the sum over the root of the length), "weightedmean"
            (weights 1, 2, 3, ...), "lasttoken".
        skip: so many rows at the beginning of each text are left out; the weights of the others stay as they are.

    Returns:
        [B, len(modes)·E] in float32; each text is reduced alone, so its vector does not depend on its neighbours.
    """
    if len(lengths) == 0:
        return hidden.new_zeros(0, len(modes) * hidden.shape[-1], dtype=torch.float32)
    pieces = [rows[skip:] for rows in hidden.float().split(list(lengths))]
    empty = hidden.new_zeros(hidden.shape[-1], dtype=torch.float32)
    reduce = _MODES | {"weightedmean": partial(_weighted_mean, skip=skip)}
    columns = [torch.stack([reduce[mode](rows) if len(rows) else empty for rows in pieces]) for mode in modes]
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)


@dataclass(frozen=True)
class Dense:
    """A linear layer and an activation after pooling.

    Shape: weight [out, in], bias [out] or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str

    @classmethod
    def from_directory(cls, directory: Path) -> Dense:
        """Reads `config.json` and the weights beside it.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is corrupt, or the activation is not known.
        """
        config = read_optional_json(directory / "config.json")
        file, tanh = directory / "config.json", "torch.nn.modules.activation.Tanh"
        activation = setting(file, config, "activation_function", str, tanh).rsplit(".", 1)[-1]
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"{directory / 'config.json'}: activation_function {activation!r} is not one of {known}")
        refuse_unknown(file, config, _DENSE)
        refuse_other(file, config, "module_input_name", ("sentence_embedding",))
        refuse_other(file, config, "module_output_name", ("sentence_embedding",))
        refuse_other(file, config, "use_residual", (False,))
        state = read_weights(directory)
        if "linear.weight" not in state:
            raise ValueError(f"{directory}: the Dense module's file has no linear.weight")
        if setting(file, config, "bias", bool, "linear.bias" in state) != ("linear.bias" in state):
            there = "a" if "linear.bias" in state else "no"
            raise ValueError(f"{file}: bias is {config['bias']}, but the weights have {there} linear.bias")
        bias = state.get("linear.bias")
        weight = state["linear.weight"].float()
        if weight.dim() != 2 or (bias is not None and tuple(bias.shape) != tuple(weight.shape[:1])):
            shapes = f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
            raise ValueError(f"{directory}: linear.weight and linear.bias are {shapes}; wanted [out, in] and [out]")
        wanted = tuple(
            setting(file, config, key, int, size)
            for key, size in zip(("out_features", "in_features"), weight.shape, strict=True)
        )
        if tuple(weight.shape) != wanted:
            raise ValueError(f"{directory}: linear.weight is {tuple(weight.shape)}; config.json says {wanted}")
        return cls(weight, None if bias is None else bias.float(), activation)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.device)
        return ACTIVATIONS[self.activation](F.linear(x, weight, None if self.bias is None else self.bias.to(x.device)))


@dataclass(frozen=True)
class SentenceModules:
    """What happens after the transformer: pooling modes, dense layers, normalisation, in that order.

    Attributes:
        include_prompt: whether the tokens of a prompt are pooled with those of the text.
        embedding_size: of a token's vector, where the folder says it.
    """

    modes: tuple[str, ...] = ("mean",)
    dense: tuple[Dense, ...] = ()
    normalize: bool = False
    include_prompt: bool = True
    embedding_size: int | None = None

    def check_fits(self, directory: Path, hidden_size: int) -> None:
        """That pooling takes the model's rows, and each dense layer what comes before it.

        Raises:
            ValueError: one does not; the message names it.
        """
        if self.embedding_size not in (None, hidden_size):
            raise ValueError(
                f"{directory}: pooling takes {self.embedding_size} numbers a token, the model {hidden_size}"
            )
        size = len(self.modes) * hidden_size
        for number, layer in enumerate(self.dense, start=1):
            rows, columns = layer.weight.shape
            if columns != size:
                raise ValueError(f"{directory}: Dense layer {number} takes {columns} numbers, wanted {size}")
            size = rows

    def size(self, hidden_size: int) -> int:
        """The length of a sentence vector for a model of `hidden_size`."""
        return self.dense[-1].weight.shape[0] if self.dense else len(self.modes) * hidden_size

    def __call__(self, hidden: torch.Tensor, lengths: Sequence[int], skip: int = 0) -> torch.Tensor:
        """Pooling and dense layers (normalisation is the caller's): [total, E] to float32 [B, size]; see `pool`."""
        x = pool(hidden, lengths, self.modes, skip)
        for layer in self.dense:
            x = layer(x)
        return x


def read_modules(directory: str | Path) -> tuple[SentenceModules, Path]:
    """Reads `modules.json` and the folders it names. Without that file: mean pooling, no normalisation.

    Returns:
        The modules, and the folder that holds the model and the tokenizer.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a module of a kind, an order or a setting that is not supported; the message names it.
    """
    root = model_directory(directory)
    listing = root / "modules.json"
    if not is_there(listing):
        return SentenceModules(), root
    transformer: Path | None = None
    modes: tuple[str, ...] | None = None
    dense: list[Dense] = []
    normalize, include_prompt, size = False, True, None
    for module in read_json(listing, list):
        kind, path = module_of(root, module, listing)
        if kind == "Transformer" and transformer is None:
            transformer = path
        elif kind == "Pooling" and transformer is not None and modes is None:
            modes, include_prompt, size = _read_pooling(path / "config.json")
        elif kind == "Dense" and modes is not None and not normalize:
            dense.append(Dense.from_directory(path))
        elif kind == "Normalize" and modes is not None:
            file = path / "config.json"
            config = read_optional_json(file)
            refuse_unknown(file, config, ("module_input_name", "module_output_name"))
            for key in config:
                refuse_other(file, config, key, ("sentence_embedding",))
            normalize = True
        else:
            raise ValueError(
                f"{listing}: module {module['type']!r} at this place is not supported; "
                "wanted Transformer, Pooling, then Dense layers and Normalize"
            )
    if transformer is None or modes is None:
        raise ValueError(f"{listing} lists no {'Transformer' if transformer is None else 'Pooling'} module")
    return SentenceModules(modes, tuple(dense), normalize, include_prompt, size), transformer


def module_of(root: Path, module: object, listing: Path) -> tuple[str, Path]:
    """The kind and the folder of an entry of `modules.json`.

    Raises:
        ValueError: it is no entry, or one of another package's code; the message names it.
    """
    if not isinstance(module, dict) or not isinstance(module.get("type"), str):
        raise ValueError(f"{listing}: an entry is {module!r}; wanted an object with a type and a path")
    package, _, kind = module["type"].rpartition(".")
    if package and package.split(".")[0] != "sentence_transformers":
        raise ValueError(f"{listing}: module {module['type']!r} is not of sentence_transformers, and is not supported")
    refuse_unknown(listing, module, ("idx", "name", "path", "type", "kwargs"))
    refuse_other(listing, module, "kwargs", ([],))
    return kind, _inside(root, module.get("path", ""), listing)


def _inside(root: Path, path: object, listing: Path) -> Path:
    # A name with a surrogate or a zero is none that a file can have.
    good = isinstance(path, str) and path.isprintable()
    if not good or not (root / path).resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{listing}: path {path!r} is not a folder of this directory")
    return root / path  # need not exist: Normalize has no files, and some archives drop empty folders


def _read_pooling(path: Path) -> tuple[tuple[str, ...], bool, int | None]:
    if not is_there(path):
        raise ValueError(f"{path} is missing, which modules.json names")
    config = read_json(path)
    sizes = ("embedding_dimension", "word_embedding_dimension")
    refuse_unknown(path, config, ("pooling_mode", "include_prompt", *sizes, *_KEYS))
    size = next((one for one in (setting(path, config, key, int) for key in sizes) if one is not None), None)
    word = config.get("pooling_mode")
    if word is not None:
        chosen = [word] if isinstance(word, str) else word
    else:
        # As in the library, the mean where no key is true.
        chosen = [mode for key, mode in _KEYS.items() if setting(path, config, key, bool, False)] or ["mean"]
    if not isinstance(chosen, list) or not chosen or any(mode not in tuple(_MODES) for mode in chosen):
        raise ValueError(f"{path}: pooling mode: got {chosen!r}, wanted one or several of {', '.join(_MODES)}")
    modes = tuple(mode for mode in _MODES if mode in chosen)
    return modes, setting(path, config, "include_prompt", bool, True), size
