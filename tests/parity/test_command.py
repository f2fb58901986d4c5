"""`pyxlbert parity`: what runs, what it says of a broken kernel, and its files."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
import transformers

import pyxlbert
from pyxlbert.backends import OPS
from pyxlbert.cli import main
from pyxlbert.commands import parity_inputs as inputs
from pyxlbert.commands import parity_models as models
from pyxlbert.testing import runners
from pyxlbert.testing.parity import ops, report
from pyxlbert.testing.parity.rows import NOT_RUN, OK, OVER, WRONG, Row
from pyxlbert.testing.specs import SPECS

FLOAT32 = [torch.float32]


def test_an_op_on_every_level(capsys) -> None:
    assert main(["parity", "--op", "bias_gelu", "--dtype", "float32", "--backend", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("all ") and "within budget" in text
    for level in runners.levels():
        differs = level != "amx" or SPECS["bias_gelu"].tiles
        later = {"avx512_bf16": "amx", "avx2": "avx2_vnni"}.get(level)
        assert (f"cpu/{level} " in text) is (differs and later not in runners.levels())


def test_a_backend_that_is_not_here_says_why() -> None:
    rows = list(ops.rows(["linear"], ["triton", "torch"], FLOAT32, quick=True))
    (row,) = [row for row in rows if row.runner == "triton"]
    assert row.verdict == NOT_RUN and row.reason and row.compared == 0
    assert not report.good([row]) and report.good(rows)


def spoilt(name: str, spoil):
    """An op whose results are spoilt."""
    spec = SPECS[name]

    def function(**given):
        return spoil(spec.function(**given))

    return dataclasses.replace(spec, function=function)


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (lambda out: out * 1.001, OVER),
        (lambda out: out + torch.nn.functional.one_hot(torch.tensor(out.shape[-1] - 1), out.shape[-1]) * 1e-2, OVER),
        (lambda out: out * float("nan"), WRONG),
        (lambda out: out[:0], WRONG),
    ],
    ids=["0.1 %", "a column", "nan", "shape"],
)
def test_a_broken_kernel_fails(spoil, verdict: str, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setitem(SPECS, "layer_norm", spoilt("layer_norm", spoil))
    files = ["--json", str(tmp_path / "x.json"), "--html", str(tmp_path / "x.html")]
    assert main(["parity", "--op", "layer_norm", "--dtype", "float32", "--quick", *files]) == 1
    text = capsys.readouterr().out
    assert re.match(r"\d+ of \d+ rows wrong", text) and "WRONG" in text
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["good"] is False and document["version"] == report.VERSION
    assert verdict in {row["verdict"] for row in document["rows"]}
    assert 'class="bad"' in (tmp_path / "x.html").read_text()


def test_a_kernel_that_raises_is_a_row(monkeypatch) -> None:
    def fail(out):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(SPECS, "layer_norm", spoilt("layer_norm", fail))
    rows = list(ops.rows(["layer_norm"], ["torch"], FLOAT32, quick=True))
    assert {row.verdict for row in rows} == {WRONG} and "no such luck" in rows[0].reason


def test_models_within_budget_and_a_broken_one(monkeypatch) -> None:
    drop_in = pyxlbert.integrations.drop_in
    known = {"roberta": drop_in.architectures()["roberta"]}
    monkeypatch.setattr(drop_in, "architectures", lambda: known)
    rows = list(models.rows(["cpu"], FLOAT32))
    names = ("albert", "bert", "roberta", "xlnet", "roberta, accelerated")
    assert [row.subject for row in rows] == [name for name in names for _ in "fb"]
    assert {row.verdict for row in rows} == {OK} and all(row.ratio < 2 for row in rows)
    own = models._own

    def wrong(kind, theirs):
        model = own(kind, theirs)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "embedding" not in name:
                    parameter.mul_(1.001)
        return model

    monkeypatch.setattr(models, "_own", wrong)
    assert {row.verdict for row in models.rows(["cpu"], FLOAT32) if row.subject in names[:4]} == {OVER}


SPEECH = ("fastspeech2_conformer", "funnel", "parakeet_encoder", "seamless_m4t", "wav2vec2-bert", "wav2vec2-conformer")


def test_every_architecture_has_rows(monkeypatch) -> None:
    """Whatever a model is given, ids or features: none is left out for want of an input."""
    drop_in = pyxlbert.integrations.drop_in
    known = {kind: one for kind, one in drop_in.architectures().items() if kind in SPEECH}
    monkeypatch.setattr(drop_in, "architectures", lambda: known)
    monkeypatch.setattr(models, "OWN", {})
    rows = list(models.rows(["cpu"], FLOAT32))
    assert [row.subject for row in rows] == [f"{kind}, accelerated" for kind in SPEECH for _ in "fb"]
    assert {row.verdict for row in rows} == {OK}, [row.reason for row in rows]


def test_an_op_that_a_backend_lacks_is_no_fault_of_a_model(monkeypatch) -> None:
    monkeypatch.setattr(OPS["dropout_add_layer_norm"], "own_backends", ("torch",))
    monkeypatch.delattr(OPS["dropout_add_layer_norm"]._modules, "cpu")
    monkeypatch.setattr(models, "OWN", {"bert": models.OWN["bert"]})
    monkeypatch.setattr(pyxlbert.integrations.drop_in, "architectures", dict)
    rows = list(models.rows(["cpu"], FLOAT32))
    assert {row.verdict for row in rows} == {NOT_RUN} and "dropout_add_layer_norm has no cpu kernel" in rows[0].reason


def test_a_directory_of_features_layer_by_layer(tmp_path) -> None:
    inputs.build("parakeet_encoder").save_pretrained(tmp_path)
    rows = list(models.layers(tmp_path, ["cpu"], FLOAT32))
    assert [row.subject for row in rows] == ["embeddings", "layer 1", "layer 2"]
    assert {row.verdict for row in rows} == {OK}


def test_a_directory_layer_by_layer(tmp_path, capsys) -> None:
    inputs.build("bert").save_pretrained(tmp_path)
    assert main(["parity", "--model", str(tmp_path), "--dtype", "float32", "--backend", "cpu", "--summary"]) == 0
    text = capsys.readouterr().out
    assert [line.split("  ")[0] for line in text.splitlines()[2:]] == ["embeddings", "layer 1", "layer 2", "layer 3"]


def test_where_a_difference_begins(tmp_path, monkeypatch) -> None:
    transformers.BertModel(transformers.BertConfig(**inputs.SMALL)).save_pretrained(tmp_path)
    accelerate = pyxlbert.accelerate

    def wrong(model):
        with torch.no_grad():
            model.encoder.layer[1].output.dense.weight.mul_(1.01)
        return accelerate(model)

    monkeypatch.setattr(pyxlbert, "accelerate", wrong)
    rows = list(models.layers(tmp_path, ["cpu"], FLOAT32))
    assert [row.verdict for row in rows] == [OK, OK, OVER, OVER]


def test_a_page_with_hostile_names_is_inert() -> None:
    hostile = "</pre><script>alert(1)</script>\"'&"
    rows = [Row(hostile, hostile, hostile, hostile, 1, 1.0, 1.0, 2.0, hostile, OVER, hostile)]
    page = report.page(rows, {hostile: hostile})
    assert "alert(1)" in page and "<script>alert" not in page and page.count("<script>") == 1
    assert not re.search(r"https?:|src=|@import|url\(", page)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "softmax"], "--op: got 'softmax', wanted one of attention, "),
        (["--backend", "tpu"], "invalid choice: 'tpu'"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--model", "no/such/folder"], "--model: got 'no/such/folder', which is no directory"),
        (["--model", ""], "--model: got '', which is no directory"),
        (["--model", "tests"], "--model: got 'tests', which has no config.json"),
        (["--json", "no/such/folder/x.json"], "--json: the directory of 'no/such/folder/x.json' does not exist"),
        (["--html", "."], "--html: '.' is a directory"),
        (["--json", "x", "--html", "./x"], "--html: got './x', which is the file of --json; wanted another name"),
    ],
)
def test_bad_usage(arguments: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["parity", *arguments])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
