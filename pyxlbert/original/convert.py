"""From a checkpoint of the original code, or of the first PyTorch one, to a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyxlbert import models
from pyxlbert.files import check_new_directory, is_there, named_path, read_json, shown, whole_directory
from pyxlbert.models import checkpoints
from pyxlbert.models.config import ModelConfig
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.models.tasks import class_name
from pyxlbert.original import bert, fairseq, xlnet
from pyxlbert.original.bundle import Bundle, find_checkpoint
from pyxlbert.original.pickled import from_pickle
from pyxlbert.original.report import INITIALISED, NEW, NEW_ZEROS, UNUSED, Conversion, Row
from pyxlbert.original.variables import Architecture, Shape, Variable
from pyxlbert.original.vocabulary import Vocabulary, find_vocabulary, write_tokenizer

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NAMED_AT_MOST = 8
_INDEX = ("", ".index.json")  # of weights in one file, and in several
_OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"


def convert(
    source: str | Path,
    output: str | Path,
    *,
    task: str | None = None,
    config: str | Path | None = None,
    vocabulary: str | Path | None = None,
    lower_case: bool | None = None,
    tokenizer: bool = True,
    tanh_gelu: bool = False,
    force: bool = False,
) -> Conversion:
    """Turn an original checkpoint of BERT, RoBERTa or XLNet into a directory that `from_pretrained` reads.

    Everything that can be checked without the numbers is checked first, and every tensor's checksum when it is read.
    The directory appears whole or not at all.

    Args:
        source: a folder with a checkpoint, its configuration and its vocabulary; or the checkpoint's name in it, such
            as ``folder/model.ckpt-343``. A folder with ``pytorch_model.bin`` is a BERT of the first PyTorch code, one
            with ``model.pt``, or the name of that file, a RoBERTa of fairseq, without a tokenizer.
        output: the directory to write.
        task: whose model it becomes, as `pyxlbert.models.tasks` has them. None: that of the checkpoint's heads. A head
            that the checkpoint lacks is left new: not written, so that whoever loads the model gets fresh values.
        config: the configuration's file; by default ``bert_config.json``, ``xlnet_config.json`` or ``config.json``.
        vocabulary: the vocabulary's file; by default ``vocab.txt`` or ``spiece.model``.
        lower_case: whether text is lower-cased; None finds out, see `find_vocabulary`.
        tokenizer: whether to write the tokenizer's files.
        tanh_gelu: write the activation "gelu_new", the formula of the original code's last version, in place of
            "gelu", which transformers' own conversions have.
        force: replace a model's directory.

    Returns:
        What became of every variable, and the class.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        FileExistsError: the output is not empty.
        ValueError: a file is truncated, changed or another model's, or does not fit the configuration.
    """
    source, output = named_path("source", source), named_path("output", output)
    if not source.parent.is_dir():
        raise FileNotFoundError(f"source: {shown(source)} does not exist")
    check_new_directory(output, force)
    saved = _of_fairseq(source)
    if saved is not None:
        if tokenizer or config is not None or vocabulary is not None or tanh_gelu:
            raise ValueError(
                f"{saved} is a checkpoint of fairseq, whose configuration is in it, and whose dictionary is not read: "
                "wanted --no-tokenizer, and neither --config nor --tanh-gelu"
            )
        _check_apart(saved.parent, output)
        return _written(fairseq.read(saved, task), output, None, force)
    prefix = find_checkpoint(source)
    folder = source if prefix is None else prefix.parent
    if prefix is None and not any(
        (folder / f"{name}{end}").is_file() for name in checkpoints.WEIGHTS for end in _INDEX
    ):
        raise FileNotFoundError(f"no checkpoint in {folder}: wanted one's .index and .data files, or pytorch_model.bin")
    _check_apart(folder, output)
    settings_file = _find_config(folder, config)
    original = read_json(settings_file)
    architecture = _architecture(settings_file, original)
    if tanh_gelu:
        if original.get(architecture.ACTIVATION) != "gelu":
            raise ValueError(f"{settings_file}: {architecture.ACTIVATION} is not 'gelu', which --tanh-gelu replaces")
        original = {**original, architecture.ACTIVATION: "gelu_new"}
    found = find_vocabulary(folder, architecture.VOCABULARY, _path(vocabulary), lower_case) if tokenizer else None
    if prefix is None:
        if architecture is not bert:
            raise FileNotFoundError(f"no checkpoint in {folder}: wanted XLNet's .index and .data files")
        converted = from_pickle(folder, settings_file, original, task)
    else:
        converted = _from_bundle(Bundle(prefix), settings_file, original, architecture, task)
    return _written(converted, output, found, force)


class _Converted(Protocol):
    """A model that was read, its weights still to be written."""

    config: ModelConfig
    class_name: str
    rows: list[Row]

    def save(self, folder: Path) -> None: ...


def _written(converted: _Converted, output: Path, vocabulary: Vocabulary | None, force: bool) -> Conversion:
    with whole_directory(output, force) as temporary:
        converted.config.architectures = [converted.class_name]
        converted.config.save_pretrained(temporary)
        notes = [] if vocabulary is None else [_write_tokenizer(temporary, vocabulary, converted.config)]
        converted.save(temporary)
    return Conversion(converted.rows, converted.class_name, notes)


def _of_fairseq(source: Path) -> Path | None:
    """The file of a checkpoint of fairseq; None where there is none, or another kind of checkpoint too."""
    others = ("*.index", *(f"{name}{end}" for name in checkpoints.WEIGHTS for end in _INDEX))
    if source.is_dir() and any(next(source.glob(name), None) is not None for name in others):
        return None
    return fairseq.find(source)


def _check_apart(folder: Path, output: Path) -> None:
    if folder.resolve() == output.resolve() or output.resolve() in folder.resolve().parents:
        raise ValueError(f"output: {str(output)!r} holds the source, which must stay")


def _path(name: str | Path | None) -> Path | None:
    return None if name is None else Path(name)


def _find_config(folder: Path, given: str | Path | None) -> Path:
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"config: {shown(given)} is no file")
        return Path(given)
    names = (bert.CONFIG_FILE, xlnet.CONFIG_FILE, "config.json")
    for name in names:
        if is_there(folder / name):
            return folder / name
    raise FileNotFoundError(f"no configuration in {folder}: wanted {', '.join(names)}, or its file by --config")


def _architecture(file: Path, original: dict[str, Any]) -> Architecture:
    """BERT or XLNet, by the names of fields; no field may be missing."""
    architecture = xlnet if "n_token" in original or "d_model" in original else bert
    missing = [name for name in architecture.FIELDS if name not in original]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}, without which {architecture.MODEL_TYPE} cannot be built")
    return architecture


class _Bundled(NamedTuple):
    """What is to be written, its numbers still in the checkpoint."""

    bundle: Bundle
    used: list[Variable]
    zeros: dict[str, Tensor]
    config: ModelConfig
    class_name: str
    rows: list[Row]

    def save(self, folder: Path) -> None:
        """Writes the weights."""
        checkpoints.write_weights(folder, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters by name: views of the mapped files, but for what a stack of layers is cut into."""
        tensors = dict(self.zeros)
        for variable in self.used:
            whole = self.bundle.tensor(variable.name)
            parts = {parameter.name: parameter.of(whole) for parameter in variable.parameters}
            # No two parameters may share memory in the file.
            tensors |= parts if len(parts) == 1 else {name: part.clone() for name, part in parts.items()}
        return tensors


def _from_bundle(
    bundle: Bundle, file: Path, original: dict[str, Any], architecture: Architecture, task: str | None
) -> _Bundled:
    found = {name: entry.shape for name, entry in bundle.entries.items()}
    task = architecture.task_of(found) if task is None else task
    name = class_name(architecture.MODEL_TYPE, task)
    model_class: type[PretrainedModel] = getattr(models, name)
    try:
        config = model_class.config_class.from_dict(architecture.settings(original, task, found))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
    variables = architecture.variables(original, task, found)
    used, new = _parts(bundle, variables)
    _check_shapes(bundle, file, used)
    config.dtype = str(bundle.entries[used[0].name].dtype).removeprefix("torch.")
    fresh = architecture.fresh(original, task)
    absent = {parameter.name for variable in new for parameter in variable.parameters}
    zeros = {name: value for name, value in fresh.items() if name in absent}
    taken = {variable.name for variable in used}
    rows = [_row(variable, taken, zeros) for variable in variables]
    rows += [Row(name, shape, UNUSED, ()) for name, shape in sorted(found.items()) if name not in taken]
    return _Bundled(bundle, used, zeros, config, name, rows)


def _row(variable: Variable, taken: set[str], zeros: Mapping[str, Tensor]) -> Row:
    names = tuple(parameter.name for parameter in variable.parameters)
    state = INITIALISED if variable.name in taken else NEW_ZEROS if zeros.keys() & set(names) else NEW
    return Row(variable.name, variable.shape, state, names)


def _parts(bundle: Bundle, variables: list[Variable]) -> tuple[list[Variable], list[Variable]]:
    """The variables that the checkpoint has, and those of parts that it lacks as a whole."""
    have = bundle.entries.keys()
    encoder = [variable.name for variable in variables if variable.part == "encoder"]
    if not have & set(encoder):
        raise ValueError(_foreign(bundle, encoder[0]))
    present = {variable.part for variable in variables if variable.name in have}
    missing = [v.name for v in variables if v.part in present and v.name not in have and not v.optional]
    if missing:
        raise ValueError(f"{bundle.index} lacks variables that its configuration asks for: {_listed(missing)}")
    return [v for v in variables if v.name in have], [v for v in variables if v.name not in have]


def _foreign(bundle: Bundle, wanted: str) -> str:
    names = [name for name in bundle.entries if name != _OBJECTS]
    kind = "an object-based checkpoint of TensorFlow 2" if _OBJECTS in bundle.entries else "another model's checkpoint"
    return f"{bundle.index} is {kind}: it holds {_listed(names, 3)}, wanted {wanted} and its like"


def _listed(names: list[str], most: int = _NAMED_AT_MOST) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _check_shapes(bundle: Bundle, file: Path, used: list[Variable]) -> None:
    wrong = []
    for variable in used:
        entry = bundle.entries[variable.name]
        got: Shape = entry.shape
        if entry.dtype not in _FLOATING:
            raise ValueError(f"{bundle.index}: {variable.name!r} is {entry.dtype_name}, wanted a floating-point dtype")
        if got != variable.shape:
            wrong.append(f"{variable.name}: got shape {list(got)}, wanted {list(variable.shape)}")
    if wrong:
        raise ValueError(f"{bundle.index} does not fit {file}: {_listed(wrong)}")


def _write_tokenizer(folder: Path, vocabulary: Vocabulary, config: ModelConfig) -> str:
    limit = getattr(config, "max_position_embeddings", None)
    tokenizer_class = "BertTokenizer" if config.model_type == bert.MODEL_TYPE else "XLNetTokenizer"
    tokens = write_tokenizer(folder, vocabulary, tokenizer_class, limit)
    if tokens > config.vocab_size:
        raise ValueError(f"{vocabulary.file} holds {tokens} tokens, wanted at most vocab_size {config.vocab_size}")
    case = "lower-cased" if vocabulary.lower_case else "cased"
    return f"tokenizer: {tokens} tokens, {case} ({vocabulary.reason})"
