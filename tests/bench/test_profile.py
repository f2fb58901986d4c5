"""`pyxlbert bench --profile`: every op of a pass, its floor, its files, and wrong usage."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from pyxlbert.bench import limits, profile

import pyxlbert
from pyxlbert.cli import main
from pyxlbert.testing import tolerances

SMALL = {
    **{"vocab_size": 60, "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 80},
    **{"max_position_embeddings": 40},
}


@pytest.fixture(autouse=True)
def known_limits(monkeypatch) -> None:
    monkeypatch.setattr(limits, "gemm_rate", lambda dtype: 1e9)
    monkeypatch.setattr(limits, "copy_bandwidth", lambda: 1e9)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("a model of mine")
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(folder)
    return str(folder)


def test_a_directory_in_both_kinds_of_pass(directory: str, tmp_path, capsys) -> None:
    names = [tmp_path / f"x.{ending}" for ending in ("json", "html", "svg")]
    files = [f"--{option}={name}" for option, name in zip(("json", "html", "picture"), names, strict=True)]
    assert main(["bench", "--profile", directory, "2x8", "--rounds", "3", *files]) == 0
    text = capsys.readouterr().out
    assert "bert of a directory 2x8 float32, forward: " in text and "training step: " in text
    assert "of floor" in text and "faults" in text and "optimizer" in text
    document = json.loads(names[0].read_text())
    forward, step = document["profiles"]
    assert document["version"] == profile.VERSION and forward["kind"] == "forward" and step["kind"] == "training step"
    assert (
        set(step["phases"]) == {"forward", "backward", "optimizer"}
        and sum(step["phases"].values()) < 2 * step["seconds"]
    )
    found = {(line["phase"], line["op"]): line for line in step["lines"]}
    assert found["forward", "linear_fwd"]["calls"] >= found["forward", "attention_fwd"]["calls"] == 2
    assert found["backward", "attention_bwd"]["calls"] == 2 and found["backward", "attention_bwd"]["floor"] > 0
    assert any(op.startswith("torch.") for phase, op in found if phase == "optimizer")
    times = [line["seconds"] for line in step["lines"]]
    assert times == sorted(times, reverse=True) and all(line["faults"] >= 0 for line in step["lines"])
    page, picture = names[1].read_text(), names[2].read_text()
    assert page.count("<svg") == 2 and picture.startswith("<svg") and "attention_bwd, backward" in page
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|https?:(?!//www\.w3\.org/2000/svg)", page)
    # Nothing says where the model lies.
    assert directory not in names[0].read_text() + page


def test_a_model_of_transformers_is_accelerated(tmp_path) -> None:
    config = transformers.DistilBertConfig(vocab_size=60, dim=48, n_heads=4, n_layers=1, hidden_dim=80)
    transformers.DistilBertModel(config).save_pretrained(tmp_path)
    (forward, _) = profile.profiles(str(tmp_path), (2, 8), torch.float32, 2)
    assert forward.model == "distilbert of transformers, accelerated"
    assert {"attention_fwd", "linear_fwd"} <= {line.op for line in forward.lines}


def test_floors_are_those_of_the_specs() -> None:
    x, weight = torch.randn(6, 40, requires_grad=True), torch.randn(24, 40, requires_grad=True)
    with profile.Watch() as watch:
        watch.begin("forward")
        out = pyxlbert.linear(x, weight, torch.zeros(24))
        watch.begin("backward")
        out.sum().backward()
        torch.mm(x, x.mT)
        x.unsqueeze(0)
    found = {event.op: event for event in watch.events}
    assert found["linear_fwd"].floor == pytest.approx(2 * 6 * 24 * 40 / 1e9, rel=tolerances.FLOAT64)
    assert found["linear_bwd"].floor == pytest.approx(4 * 6 * 24 * 40 / 1e9, rel=tolerances.FLOAT64)
    assert found["torch.mm"].floor == pytest.approx(2 * 6 * 6 * 40 / 1e9, rel=tolerances.FLOAT64)
    assert found["linear_bwd"].phase == "backward" and found["torch.unsqueeze"].floor is None


def test_what_is_small_is_one_line_of_its_phase() -> None:
    lines = [profile.Line("forward", f"op {i}", 1, 1e-6, None, 1) for i in range(3)]
    big = profile.Line("forward", "big", 1, 1.0, 0.5, 0)
    found = profile._gathered([*lines, big])
    assert [line.op for line in found] == ["big", "other ops (3)"] and found[1].calls == found[1].faults == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["bert-huge", "8x128"],
            "--profile: got 'bert-huge', wanted bert-base, minilm, xlnet-base or a model's directory",
        ),
        (["bert-base", "8"], "--profile: got '8', wanted a batch and a length such as 8x128"),
        (["minilm", "1x513"], "--profile: minilm takes up to 512 places, got 513"),
        ([".", "1x8"], "--profile: '.' holds no weights"),
        (["minilm", "1x8", "--json", "."], "is a directory"),
    ],
)
def test_bad_usage(arguments: list[str], words: str, capsys) -> None:
    try:
        status = main(["bench", "--profile", *arguments])
    except SystemExit as caught:
        status = caught.code
    assert status == 2 and words in capsys.readouterr().err


def test_other_results_are_left_alone(directory: str, tmp_path, capsys) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(SystemExit):
        main(["bench", "--profile", directory, "1x8", "--json", str(path)])
    assert "is there already" in capsys.readouterr().err and path.read_text() == "{}"
