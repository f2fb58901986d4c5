"""`evaluate stsb --layers all`: every layer and every sum of neighbouring ones, as a table and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pyxlbert import cli
from pyxlbert.layer_scores import best, draw_layers, layer_scores, layer_table
from pyxlbert.testing import tolerances
from pyxlbert.testing.directories import tiny_bert
from pyxlbert.text import SentenceEncoder

PAIRS = [("hello", "hello", 5), ("the world", "the trains", 3), ("a b c", "你 好", 0), ("un", "unbelievable", 4)]
PAIRS += [("x y", "x z", 2.5), ("train", "trains", 4.5)]
FIRST, SECOND, SCORES = [a for a, _, _ in PAIRS], [b for _, b, _ in PAIRS], np.array([s for _, _, s in PAIRS])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [f"g\tf\t2012\t{i}\t{s}\t{a}\t{b}" for i, (a, b, s) in enumerate(PAIRS)]
    (tmp_path / "sts-dev.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def with_pooling(root: Path, mode: str | list[str]) -> Path:
    tiny_bert(root)
    (root / "1_Pooling").mkdir()
    (root / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": mode}))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (root / "modules.json").write_text(json.dumps(listed))
    return root


@pytest.mark.parametrize("mode", ["mean", "cls", "max", ["mean", "cls"], ["mean", "max"]], ids=str)
def test_scores_are_those_of_encode(tmp_path: Path, mode: str | list[str]) -> None:
    """Whether the model runs once (poolings that are sums) or for each sum."""
    from scipy.stats import spearmanr

    encoder = SentenceEncoder.from_pretrained(with_pooling(tmp_path / "m", mode))
    table = layer_scores(encoder, FIRST, SECOND, SCORES)
    assert table.shape == (4, 4)
    assert np.isnan(table[np.tril_indices(4, -1)]).all()
    for i, j in ((0, 0), (3, 3), (1, 2), (0, 3)):
        a, b = (encoder.encode(texts, layers=("sum", *range(i, j + 1))) for texts in (FIRST, SECOND))
        if mode == "cls" and j == 0:
            assert np.isnan(table[i, j])  # the first token's embedding is the same in every text
            continue
        wanted = spearmanr((a.astype(np.float64) * b).sum(1), SCORES).statistic
        assert table[i, j] == pytest.approx(100 * wanted, rel=tolerances.SUMMATION_ORDER)
    assert best(table) != (0, 0) or mode != "cls"


def test_the_best_is_the_shortest_of_equals() -> None:
    table = np.array([[1.0, 5.0, 7.0], [np.nan, 7.0, 7.0], [np.nan, np.nan, 3.0]])
    assert best(table) == (1, 1)
    text = layer_table(table)
    assert "best: layer 1, 7.00 (the last layer has 3.00)" in text
    assert "embeddings      1.00    7.00" in text
    table[0, 2] = 8
    assert "best: the sum of layers 0 to 2, 8.00" in layer_table(table)


def test_picture(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    tables = {}
    for name, count in (("small", 4), ("large", 25)):
        tables[name] = np.where(np.triu(np.ones((count, count))), np.linspace(50, 80, count), np.nan)
    draw_layers(tables, tmp_path / "x.png", "made up")
    picture = matplotlib.image.imread(tmp_path / "x.png")
    assert picture.shape[0] > 1000
    assert picture[..., :3].std() > 0.1  # not blank


def test_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    models = [str(tiny_bert(tmp_path / name, seed=seed)) for seed, name in enumerate(("one", "two"))]
    given = ["evaluate", "stsb", "--data", str(data), "--model", *models]
    assert cli.main([*given, "--layers", "all", "--picture", str(tmp_path / "x.png")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("summed to the last") == 2
    assert "6 pairs, Spearman x 100: one float32" in shown and "Spearman x 100: two float32" in shown
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert cli.main(given) == 0
    last = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  pyxlbert")]
    rows = [line.split() for line in shown.splitlines() if line.startswith("  3 ")]
    assert [f"{float(score):.2f}" for score in last] == [row[1] for row in rows]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--picture", "x.png"], "--picture: draws layers; wanted --layers all with it"),
        (["--layers", "all", "--picture", "x.doc"], "--picture: got 'x.doc', wanted a name that ends in .png"),
        (["--layers", "all", "--picture", "no/x.png"], "--picture: the directory of 'no/x.png' does not exist"),
        (["--layers", "all", "--compare"], "--compare: goes with the directory's own layer alone"),
    ],
    ids=str,
)
def test_refusals(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["evaluate", "stsb", "--data", str(data), "--model", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err
