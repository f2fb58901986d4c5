"""`pyxlbert export --onnx`: the graph in ONNX Runtime computes what the model and transformers compute."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from small_bert import SMALL

from pyxlbert import cli, models
from pyxlbert.export import export_onnx
from pyxlbert.export import onnx as exporter
from pyxlbert.export.plain import decompositions
from pyxlbert.models.tasks import TASKS
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.models import randomize

ALL = os.environ.get("PYXLBERT_TEST_ALL") == "1"
XLNET = {"vocab_size": 40, "d_model": 24, "n_layer": 1, "n_head": 3, "d_inner": 20, "start_n_top": 2, "end_n_top": 3}
NAMES = ["input_ids", "attention_mask", "token_type_ids"]


def save(name: str, folder: Path, **fields: object) -> torch.nn.Module:
    """A small random model's directory."""
    model_class = getattr(models, name)
    bert = {**SMALL, "num_hidden_layers": 1}
    config = model_class.config_class.from_dict({**(XLNET if name.startswith("XLNet") else bert), **fields})
    model = model_class(config).eval()
    randomize(model, torch.Generator().manual_seed(2))
    model.save_pretrained(folder)
    return model


def inputs(rows: int, length: int, seed: int, choices: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """A batch with padding on both sides, a hole, and a row without tokens."""
    generator = np.random.default_rng(seed)
    shape = (rows, *choices, length)
    mask = np.ones(shape, np.int64)
    mask[0, ..., length // 2 :] = 0
    if rows > 3:
        mask[1, ..., : length // 3] = 0
        mask[2, ..., length // 2] = 0
        mask[3] = 0
    mask[-1, ..., -1] = 1 if rows == 1 else mask[-1, ..., -1]
    return dict(zip(NAMES, (generator.integers(0, 40, shape), mask, generator.integers(0, 2, shape)), strict=True))


def compare_with(session: onnxruntime.InferenceSession, model: torch.nn.Module, given: dict, real: bool) -> None:
    """Every output of the graph, at tokens alone where `real`."""
    extra = {"use_mems": False} if "XLNet" in type(model).__name__ else {}
    with torch.no_grad():
        wanted = model(**{name: torch.from_numpy(x) for name, x in given.items()}, **extra)
    for output, got in zip(session.get_outputs(), session.run(None, given), strict=True):
        a, b = torch.from_numpy(got), wanted[output.name]
        if real:
            tokens = torch.from_numpy(given["attention_mask"]).bool()
            tokens = tokens if a.shape[:2] == tokens.shape else tokens.any(1)
            a, b = a[tokens], b[tokens]
        compare.close(output.name, a, b, tolerances.MODEL_FLOAT32)


class Exported(NamedTuple):
    """A directory, the file that the command made of it, and what was saved there."""

    model: Path
    file: Path
    program: torch.onnx.ONNXProgram


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("bert")
    save("BertForPreTraining", folder / "model")
    made = []
    with pytest.MonkeyPatch.context() as patch:
        traced = exporter._traced
        patch.setattr(exporter, "_traced", lambda *given: made.append(traced(*given)) or made[0])
        assert cli.main(["export", "--onnx", str(folder / "model"), str(folder / "bert.onnx")]) == 0
    return Exported(folder / "model", folder / "bert.onnx", made[0])


def test_bert(bert: Exported) -> None:
    session = onnxruntime.InferenceSession(str(bert.file), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["prediction_logits", "seq_relationship_logits"]
    ours = models.BertForPreTraining.from_pretrained(bert.model)
    theirs = transformers.BertForPreTraining.from_pretrained(bert.model).eval()
    for rows, length in ((1, 1), (5, 9), (4, 16), (2, 3)):
        given = inputs(rows, length, length)
        compare_with(session, ours, given, real=False)
        if rows < 4:
            compare_with(session, theirs, given, real=True)
    with pytest.raises(Exception, match=r"(?i)invalid|broadcast|fail"):
        session.run(None, inputs(1, 17, 0))  # there are 16 positions


def test_what_the_file_holds(bert: Exported) -> None:
    graph = onnx.load(bert.file)
    onnx.checker.check_model(graph, full_check=True)
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", 20)]
    assert graph.producer_name == "pyxlbert"
    for one in graph.graph.input:
        assert one.type.tensor_type.elem_type == onnx.TensorProto.INT64
        assert [d.dim_param for d in one.type.tensor_type.shape.dim] == ["batch", "length"]
    assert [one.name for one in graph.graph.input] == NAMES
    assert [d.dim_param for d in graph.graph.output[0].type.tensor_type.shape.dim] == ["batch", "length", ""]
    kinds = [node.op_type for node in graph.graph.node]
    assert (kinds.count("Softmax"), kinds.count("LayerNormalization"), kinds.count("Gelu")) == (1, 4, 2)
    assert not re.search(rb"(/[\w.-]+){2,}/pyxlbert|\.py\b", bert.file.read_bytes())
    assert [path.name for path in bert.file.parent.iterdir() if path.name != "model"] == ["bert.onnx"]


def test_xlnet(tmp_path: Path, capsys) -> None:
    ours = save("XLNetLMHeadModel", tmp_path / "model")
    theirs = transformers.XLNetLMHeadModel.from_pretrained(tmp_path / "model").eval()
    capsys.readouterr()
    assert cli.main(["export", "--onnx", str(tmp_path / "model"), str(tmp_path / "x.onnx")]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(
        r"XLNetLMHeadModel: input_ids, attention_mask, token_type_ids -> logits\n"
        r"checked in ONNX Runtime: outputs differ by at most \d\.\de-\d\d of the largest\n",
        said.out,
    )
    assert said.err == f"{tmp_path / 'x.onnx'}\n"
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    for rows, length in ((1, 1), (5, 9), (2, 60)):
        given = inputs(rows, length, length)
        compare_with(session, ours, given, real=False)
        compare_with(session, theirs, given, real=True)


def test_roberta(tmp_path: Path) -> None:
    """Under XLM-RoBERTa's name: positions that count tokens from the padding's id on, and no second type."""
    fields = {"model_type": "xlm-roberta", "type_vocab_size": 1, "max_position_embeddings": 18}
    ours = save("RobertaForSequenceClassification", tmp_path / "model", **fields)
    theirs = transformers.XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    done = export_onnx(tmp_path / "model", tmp_path / "x.onnx")
    assert done.class_name == "RobertaForSequenceClassification" and done.difference <= tolerances.ONNX
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    for rows, length in ((1, 1), (5, 9), (2, 16)):
        given = inputs(rows, length, length)
        given["token_type_ids"] *= 0
        # The padding's id stands at padding, and in the middle of a row too.
        given["input_ids"] = np.where(given["attention_mask"] == 1, given["input_ids"], 1)
        compare_with(session, ours, given, real=False)
        if rows < 4:
            compare_with(session, theirs, given, real=True)
    with pytest.raises(Exception, match=r"(?i)invalid|broadcast|fail|bounds"):
        session.run(None, inputs(1, 19, 0) | {"token_type_ids": np.zeros((1, 19), np.int64)})


HEADS = [
    (kind, task)
    for kind, tasks in TASKS.items()
    for task in tasks
    if task not in ("pretraining", "text-generation") and kind not in ("xlm-roberta", "camembert")
]


@pytest.mark.skipif(not ALL, reason="only with PYXLBERT_TEST_ALL=1: each takes ten seconds")
@pytest.mark.parametrize(("kind", "task"), HEADS)
def test_every_head(kind: str, task: str, tmp_path: Path) -> None:
    model = save(TASKS[kind][task], tmp_path / "model")
    done = export_onnx(tmp_path / "model", tmp_path / "x.onnx", opset=23)
    assert done.class_name == TASKS[kind][task]
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    choices = (3,) if task == "multiple-choice" else ()
    searches = done.class_name == "XLNetForQuestionAnswering"
    for rows, length in ((1, 4), (2, 9) if searches else (5, 9)):
        compare_with(session, model, inputs(rows, length, length, choices), real=False)


@pytest.mark.skipif(not ALL, reason="only with PYXLBERT_TEST_ALL=1: each takes ten seconds")
@pytest.mark.parametrize(
    "fields",
    [
        {"attn_type": "uni"},
        {"clamp_len": 3, "untie_r": False},
        {"masked_rows": "uniform"},
        {"summary_type": "mean", "summary_at_padding": True},
        {"same_length": True, "attn_type": "uni"},
        {"ff_activation": "relu", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_xlnets_options(fields: dict, tmp_path: Path) -> None:
    save("XLNetForSequenceClassification", tmp_path / "model", **fields)
    assert export_onnx(tmp_path / "model", tmp_path / "x.onnx").difference <= tolerances.ONNX


def test_weights_beside_the_file(bert: Exported, tmp_path: Path, monkeypatch) -> None:
    """What is too large for one file is two, and a smaller one takes the place of both."""
    monkeypatch.setattr(exporter, "_traced", lambda graph, opset: bert.program)
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "MOST_INSIDE", 0)
        done = export_onnx(bert.model, tmp_path / "x.onnx")
    assert [path.name for path in done.files] == ["x.onnx", "x.onnx.data"]
    assert done.difference <= tolerances.ONNX
    inside, beside = (path.stat().st_size for path in done.files)
    assert beside > 2 * 4 * SMALL["vocab_size"] * SMALL["hidden_size"] > 0 and inside < bert.file.stat().st_size
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    compare_with(session, models.BertForPreTraining.from_pretrained(bert.model), inputs(5, 9, 1), real=False)
    export_onnx(bert.model, tmp_path / "x.onnx", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]
    replace = os.replace

    def broken_off(source: str | Path, target: str | Path) -> None:
        if Path(target) == tmp_path / "x.onnx":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "MOST_INSIDE", 0)
        patch.setattr(exporter.os, "replace", broken_off)
        with pytest.raises(KeyboardInterrupt):
            export_onnx(bert.model, tmp_path / "x.onnx", force=True)
    # No graph beside the weights of another.
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx.data"]


def test_another_graph_is_not_kept(bert: Exported, tmp_path: Path, monkeypatch, capsys) -> None:
    """The check sees other weights, and the graph of another model."""
    model = save("BertForPreTraining", tmp_path / "other", initializer_range=0.5)
    with torch.no_grad():
        model.cls.seq_relationship.bias += 0.01
    model.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(exporter, "_traced", lambda graph, opset: bert.program)
    assert cli.main(["export", "--onnx", str(tmp_path / "other"), str(tmp_path / "x.onnx")]) == 1
    assert re.search(
        r"ONNX Runtime's outputs differ by \d\.\de-\d\d of the largest, wanted 1e-05", capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert export_onnx(bert.model, tmp_path / "x.onnx").difference <= tolerances.ONNX


def test_without_packages(bert: Exported, tmp_path: Path, monkeypatch, capsys) -> None:
    find = importlib.util.find_spec
    command = ["export", "--onnx", str(bert.model), str(tmp_path / "x.onnx")]

    def without(*names: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest)
        )

    without("onnx", "onnxscript")
    assert cli.main(command) == 1
    assert "exporting takes onnx and onnxscript: pip install 'pyxlbert[onnx]'" in capsys.readouterr().err
    without("onnxruntime")
    monkeypatch.setattr(exporter, "_traced", lambda graph, opset: bert.program)
    assert cli.main(command) == 0
    assert "not checked: onnxruntime is not installed" in capsys.readouterr().out


def test_bad_input(bert: Exported, tmp_path: Path, capsys) -> None:
    model = str(bert.model)
    (tmp_path / "there.onnx").write_text("x")
    save("XLNetModel", tmp_path / "two_ways", bi_data=True)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        ([model, "x.txt"], "wanted a name that ends in .onnx"),
        ([model, "there.onnx"], "exists; --force replaces it"),
        ([model, "a/x.onnx"], "the directory of"),
        (["nowhere", "x.onnx"], "nowhere"),
        (["t5", "x.onnx"], "model_type is 't5'; wanted one of bert, roberta, xlm-roberta, camembert, albert, xlnet"),
        (
            [model, "x.onnx", "--task", "text-classification"],
            "which would be random: classifier.bias, classifier.weight",
        ),
        ([model, "x.onnx", "--task", "text-generation"], "task: got 'text-generation', wanted for bert one of"),
        (["two_ways", "x.onnx"], "bi_data: got True"),
        ([model, "x.onnx", "--opset", "9"], "opset: got 9, wanted 18 to 23"),
    ):
        first, second, *rest = arguments
        given = [str(tmp_path / first), str(tmp_path / second), *rest]
        assert cli.main(["export", "--onnx", *given]) == 1
        assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit):
        cli.main(["export", model, str(tmp_path / "x.onnx")])


def test_calls_for_training_are_refused() -> None:
    table = decompositions()
    op = torch.ops.pyxlbert.layer_norm_fwd.default
    x, weight, bias = torch.randn(2, 3), torch.ones(3), torch.zeros(3)
    compare.close(
        "layer_norm",
        table[op](x, weight, bias, 1e-5, False, "torch")[0],
        op(x, weight, bias, 1e-5, False, "torch")[0],
        tolerances.MODEL_FLOAT32,
    )
    with pytest.raises(ValueError, match="in a graph for inference"):
        table[op](x, weight, bias, 1e-5, True, "torch")


@pytest.mark.quick
def test_a_row_that_sees_nothing_is_zeros() -> None:
    """In the graph too, before anything is put over it: runtimes may look for NaN."""
    table, generator = decompositions(), torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 5, 3, 4, generator=generator) for _ in range(3))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0], mask[1, :, :, 3:] = False, False
    op = torch.ops.pyxlbert.attention_fwd.default
    given = (query, key, value, None, None, 0, mask, None, False, 0.5, 0.0, None, "torch")
    compare.close("attention", table[op](*given)[0], op(*given)[0], tolerances.MODEL_FLOAT32)
    assert not table[op](*given)[0][0].any()

    op = torch.ops.pyxlbert.relative_attention_fwd.default
    distances, embedding = torch.randn(10, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    biases = [torch.randn(3, 4, generator=generator) for _ in range(3)]
    segments = torch.randint(0, 2, (2, 5), generator=generator, dtype=torch.int32)
    query_rank = torch.tensor([[0, 3, 1, 2, 0], [0, 0, 0, 0, 0]], dtype=torch.int32)
    key_rank = torch.tensor([[0, 2, 1, -1, 2**31 - 1], [2**31 - 1] * 5], dtype=torch.int32)
    for see_self in (False, True):
        given = (
            *(query, key, value, distances, *biases[:2], 5, biases[2], embedding, segments, segments, None, None, None),
            *(0, query_rank, key_rank, see_self, None, False, False, 0.5, 0.0, None, "torch"),
        )
        compare.close("relative_attention", table[op](*given)[0], op(*given)[0], tolerances.MODEL_FLOAT32)
        assert not table[op](*given)[0][1].any()
