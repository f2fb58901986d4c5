"""A model as an ONNX file, of any batch and any length, by torch's exporter on plain operators."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyxlbert import backends, models
from pyxlbert.export import check
from pyxlbert.export.plain import decompositions
from pyxlbert.files import check_writable, read_json, real_path, require_file
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.models.tasks import TASKS, class_name

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OPSETS = (18, 23)
OPSET = 20
# A protobuf message holds less than 2 GiB; larger weights lie in a file beside it.
MOST_INSIDE = 2**31 - 2**24
_NEEDED = ("onnx", "onnxscript")


class Exported(NamedTuple):
    """What was written.

    Attributes:
        class_name: of the model.
        inputs: names of the graph's inputs, int64 ``[batch, length]``.
        outputs: names of its outputs.
        difference: the largest difference found in ONNX Runtime, relative to the largest element of an output (at least
            1); None where ONNX Runtime is not installed.
        files: the file, and beside it the weights' where they are too large for one.
    """

    class_name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    difference: float | None
    files: tuple[Path, ...]


def export_onnx(
    directory: str | Path, output: str | Path, *, task: str | None = None, opset: int = OPSET, force: bool = False
) -> Exported:
    """Write a model's graph with its weights in float32.

    The graph takes `INPUTS`, int64 ``[batch, length]`` (multiple choice: ``[batch, choices, length]``), with 1 in
    `attention_mask` for a token, in any pattern, and gives the model's outputs under their names. What stands at
    padding is what the model gives there: zeros, and for the logits of spans the lowest number; a row of padding alone
    is zeros. XLNet's graph has neither memories nor orders nor targets.

    Args:
        directory: the model's.
        output: ends in ``.onnx``; it appears whole or not at all.
        task: as `pyxlbert.models.tasks` has them; None takes the class that ``config.json`` names, else the encoder.
        opset: the version of ONNX's operators.
        force: replace a file.

    Raises:
        ImportError: a package of the extra "onnx" is missing.
        FileNotFoundError: the model or the output's directory is missing.
        FileExistsError: the output is there.
        ValueError: the model has no such task or lacks its weights, or ONNX Runtime computes something else.
    """
    _require_packages()
    output = _output(output, force)
    if isinstance(opset, bool) or not isinstance(opset, int) or not OPSETS[0] <= opset <= OPSETS[1]:
        raise ValueError(f"opset: got {opset!r}, wanted {OPSETS[0]} to {OPSETS[1]}")
    model, name = _load(directory, task)
    graph = _Graph(model, name)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".part", dir=output.parent) as folder:
        path = Path(folder) / output.name
        size = sum(parameter.numel() * parameter.element_size() for parameter in graph.parameters())
        _traced(graph, opset).save(path, external_data=size > MOST_INSIDE)
        difference = _checked(path, graph) if check.runtime_is_here() else None
        written = sorted(Path(folder).iterdir(), key=lambda file: file.name == output.name)  # the graph last
        if len(written) > 1:
            output.unlink(missing_ok=True)  # which would be read with the new one's weights, were this to end between
        for file in written:
            os.replace(file, output.with_name(file.name))
    stale = output.with_name(f"{output.name}.data")
    if len(written) == 1 and force and stale.is_file():
        stale.unlink()  # of the file that was replaced
    return Exported(
        name, INPUTS, graph.outputs, difference, tuple(output.with_name(file.name) for file in written[::-1])
    )


def _require_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"exporting takes {' and '.join(missing)}: pip install 'pyxlbert[onnx]'")


def _output(name: str | Path, force: bool) -> Path:
    path = real_path("output", str(name))  # a link keeps pointing where it did
    if Path(name).suffix != ".onnx":
        raise ValueError(f"output: got {str(name)!r}, wanted a name that ends in .onnx")
    check_writable("output", str(name), path)
    if path.exists() and not force:
        raise FileExistsError(f"output: {str(name)!r} exists; --force replaces it")
    return path


def _load(directory: str | Path, task: str | None) -> tuple[PretrainedModel, str]:
    """The model in float32, with all of its weights, and its class's name."""
    config = read_json(require_file(directory, "config.json"))
    kind = config.get("model_type")
    if kind not in TASKS:
        raise ValueError(f"{directory}: model_type is {kind!r}; wanted one of {', '.join(TASKS)}")
    encoder = class_name(kind, "feature-extraction")
    # XLM-RoBERTa's and CamemBERT's classes are RoBERTa's under another name.
    named = str((config.get("architectures") or [""])[0])
    named = re.sub(r"^(XLMRoberta|Camembert)", "Roberta", named)
    if task is None:
        name = named if named in TASKS[kind].values() else encoder
    else:
        name = class_name(kind, task)
        beam, simple = (TASKS[kind].get(one) for one in ("question-answering", "question-answering-simple"))
        if name == beam and named == simple and simple is not None:
            name = simple  # XLNet has two models for this task, and the directory is of this one
    model_class: type[PretrainedModel] = getattr(models, name)
    if getattr(model_class.config_class.from_pretrained(directory), "bi_data", False):
        raise ValueError("bi_data: got True, which halves a batch; wanted False for a graph of any batch")
    options: dict[str, Any] = {"dtype": torch.float32, "pack": False, "output_loading_info": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing is an error here, and what is left out does no harm
        model, info = model_class.from_pretrained(directory, **options)
        missing = info["missing_keys"]
        if missing and all(one.startswith("pooler.") for one in missing):
            model, info = model_class.from_pretrained(directory, **options, add_pooling_layer=False)
            missing = info["missing_keys"]
    if missing:
        raise ValueError(f"{directory} lacks weights of {name}, which would be random: {', '.join(missing)}")
    return model, name


class _Graph(torch.nn.Module):
    """A model that takes the graph's inputs and returns its outputs as a tuple."""

    def __init__(self, model: PretrainedModel, name: str) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.options = {"use_mems": False} if config.model_type == "xlnet" else {}
        self.choices = name.endswith("ForMultipleChoice")
        self.searches = name == "XLNetForQuestionAnswering"
        self.least = max(config.start_n_top, config.end_n_top) if self.searches else 1
        self.most = model.base_model.max_tokens or 2**31 - 1
        self.types = max(1, min(2, getattr(config, "type_vocab_size", 2)))
        config.output_hidden_states = config.output_attentions = False
        with torch.no_grad():
            self.outputs = tuple(self._run(*self.example()))

    def shape(self, rows: int, length: int) -> tuple[int, ...]:
        """Of an input."""
        return (rows, 3, length) if self.choices else (rows, length)

    def example(self) -> list[Tensor]:
        """A batch to trace: no size of it is one that a tracer takes for a constant."""
        shape = self.shape(5, min(self.most, max(self.least, 7)))
        places, word = torch.arange(shape[-1]).expand(shape), (self.model.config.pad_token_id or 0) + 1
        return [torch.full(shape, word), places % 2, places % self.types]

    def batches(self) -> list[list[Tensor]]:
        """To check the graph with."""
        # Among places of no probability, which all padding has, a search may find any.
        sizes = (self.model.config.vocab_size, self.types)
        return check.batches(self.shape, self.least, self.most, sizes, empty=not self.searches)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._run(input_ids, attention_mask, token_type_ids).values())

    def _run(self, *inputs: Tensor) -> dict[str, Tensor]:
        output = self.model(**dict(zip(INPUTS, inputs, strict=True)), **self.options, return_dict=True)
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def _traced(graph: _Graph, opset: int) -> torch.onnx.ONNXProgram:
    """The model on plain operators in place of our ops."""
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("length", min=graph.least, max=graph.most)
    axes = {0: batch, 1: torch.export.Dim("choices"), 2: length} if graph.choices else {0: batch, 1: length}
    names = {axis: dimension.__name__ for axis, dimension in axes.items()}
    shapes = dict.fromkeys(INPUTS, axes)
    with _quiet(), torch.no_grad(), backends.use_backend(None):
        program = torch.export.export(graph, tuple(graph.example()), dynamic_shapes=shapes)
        program = program.run_decompositions(decompositions())
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=INPUTS,
            output_names=graph.outputs,
            dynamic_shapes=dict.fromkeys(INPUTS, names),
            verbose=False,
        )
    _tidy(made.model)
    return made


def _tidy(model: Any) -> None:
    """Takes away what the exporter notes of this machine: paths of source files and stacks of calls."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs):
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "pyxlbert", None


def _checked(path: Path, graph: _Graph) -> float:
    difference = check.largest_difference(path, graph, INPUTS, graph.batches())
    if not difference <= check.limit():
        raise ValueError(
            f"ONNX Runtime's outputs differ by {difference:.1e} of the largest, wanted {check.limit():.0e}"
        )
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of its own parts while it exports."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
