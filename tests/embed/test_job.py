"""Vectors of many files: rows, bits, resumption and what is refused, in this process but for two tests."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from pyxlbert import cli, files  # noqa: E402
from pyxlbert.embed import folder, shards, sources  # noqa: E402
from pyxlbert.embed.job import embed_files  # noqa: E402
from pyxlbert.embed.plan import Options, Shard  # noqa: E402
from pyxlbert.testing.directories import tiny_bert  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return corpus.write(tmp_path / "in")


def command(model: Path, out: Path | str, *arguments: object) -> int:
    return cli.main(["embed", *map(str, arguments), "--model", str(model), "--out", str(out)])


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shard_rows", [9, 40, 1000])
def test_rows_and_bits(tmp_path: Path, model: Path, inputs: list[Path], shard_rows: int) -> None:
    out = tmp_path / "out"
    report = embed_files([tmp_path / "in"], model, out, Options(shard_rows=shard_rows))
    corpus.check(out, inputs, model)
    counts = [pq.read_metadata(path).num_rows for path in sorted(out.glob("part-*"))]
    assert (report.rows, report.shards, report.before) == (205, len(counts), 0)
    assert max(counts) <= shard_rows
    assert embed_files(inputs, model, out, Options(shard_rows=shard_rows)).before == 205


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], {}),
        (["--dtype", "int8"], {"dtype": "int8"}),
        (["--dtype", "bfloat16", "--batch-size", "5"], {"dtype": "bfloat16"}),
        (["--layers=concat:-1,-2", "--pooling", "max"], {"layers": ("concat", -1, -2), "pooling": "max"}),
        (["--layers=sum:-1,-2", "--truncate-dim", "9"], {"layers": ("sum", -1, -2), "truncate_dim": 9}),
        (["--prompt", "hello: ", "--normalize"], {"prompt": "hello: ", "normalize": True}),
        (["--precision", "ubinary"], {"precision": "ubinary"}),
    ],
    ids=str,
)
def test_options(tmp_path: Path, model: Path, inputs: list[Path], options: list[str], arguments: dict) -> None:
    assert command(model, tmp_path / "out", *inputs, "--shard-rows", 50, *options) == 0
    corpus.check(tmp_path / "out", inputs, model, **arguments)


def test_ranges_are_those_of_the_whole_job(tmp_path: Path, model: Path, inputs: list[Path]) -> None:
    ranges = np.stack([np.full(32, -1.5, dtype=np.float32), np.full(32, 1.5, dtype=np.float32)])
    np.save(tmp_path / "ranges.npy", ranges)
    given = ("--precision", "int8", "--ranges", tmp_path / "ranges.npy")
    assert command(model, tmp_path / "out", *inputs, "--shard-rows", 50, *given) == 0
    corpus.check(tmp_path / "out", inputs, model, precision="int8", ranges=ranges)


def test_columns(tmp_path: Path, model: Path, inputs: list[Path]) -> None:
    """Those that are asked for, in that order; strings of any kind; a vector for an empty text, or none for a null."""
    given = ("--columns", "id", "--vector-column", "v")
    assert command(model, tmp_path / "out", *inputs, *given) == 0
    assert pq.read_table(tmp_path / "out").column_names == ["id", "v"]
    assert command(model, tmp_path / "none", *inputs, "--columns", "") == 0
    rows = pq.read_table(tmp_path / "none")
    assert rows.column_names == ["vector"]
    assert rows["vector"].type == pa.list_(pa.float32(), 32)
    words = ["hello", None, "", "the world"]
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"words": pa.array(words, pa.string()).cast(kind)}), tmp_path / "w.parquet")
        for nulls in ("empty", "null"):
            out = tmp_path / f"{nulls}-{kind}"
            assert command(model, out, tmp_path / "w.parquet", "--text-column", "words", "--nulls", nulls) == 0
            found = pq.read_table(out)
            assert found["words"].to_pylist() == words
            assert [one is None for one in found["vector"].to_pylist()] == [False, nulls == "null", False, False]
    alone = shards.load_encoder(model, Options()).encode(["hello", "the world"])
    assert np.array_equal(np.array(found["vector"].to_pylist()[0], dtype=np.float32), alone[0])
    assert np.array_equal(np.array(found["vector"].to_pylist()[3], dtype=np.float32), alone[1])


def test_text_files(tmp_path: Path, model: Path) -> None:
    lines = [*corpus.texts(30), "", "a\u2028b", "c\rd"]
    (tmp_path / "a.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    (tmp_path / "b.txt").write_bytes(("\n".join(lines) + "\n").encode())
    assert command(model, tmp_path / "out", tmp_path / "a.txt", tmp_path / "b.txt", "--shard-rows", 7) == 0
    rows = pq.read_table(tmp_path / "out")
    assert rows["text"].to_pylist() == lines * 2
    encoder = shards.load_encoder(model, Options())
    assert np.array_equal(corpus.vectors(tmp_path / "out"), encoder.encode(lines * 2))
    assert command(model, f"{tmp_path / 'one'}{os.sep}", tmp_path / "b.txt") == 0
    assert pq.read_table(tmp_path / "one").num_rows == len(lines)


def test_no_rows_at_all(tmp_path: Path, model: Path) -> None:
    corpus.write(tmp_path / "in", (0, 0))
    assert command(model, tmp_path / "out", tmp_path / "in") == 0
    rows = pq.read_table(tmp_path / "out")
    assert (rows.num_rows, rows.column_names) == (0, ["id", "text", "vector"])


def test_blocks_end_where_the_texts_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever pieces they come; a text that is too large is a block of its own."""
    monkeypatch.setattr(shards, "_TEXT_BYTES", 20)
    words = ["a" * size for size in (3, 8, 9, 1, 25, 0, 20, 1, 1, 1, 1, 1, 1, 19, 2)]
    found = []
    for size in (1, 2, 4, 15):
        pieces = [pa.record_batch({"text": words[i : i + size]}) for i in range(0, len(words), size)]
        found.append([block["text"].to_pylist() for block in shards.blocks(iter(pieces), Options(), 4)])
    assert [len(text) for block in found[0] for text in block] == [len(word) for word in words]
    assert [[len(text) for text in block] for block in found[0]] == [
        [3, 8, 9],
        [1],
        [25],
        [0, 20],
        [1, 1, 1, 1],
        [1, 1],
        [19],
        [2],
    ]
    assert all(one == found[0] for one in found)


def test_a_reader_goes_on_and_back(tmp_path: Path, model: Path) -> None:
    """Shards in any order, in one row group and across several."""
    path = tmp_path / "a.parquet"
    for group in (1000, 13):
        pq.write_table(corpus.table(100), path, row_group_size=group)
        source = sources.survey(path, Options())
        reader = sources.Reader([source], Options())
        for first, rows in ((0, 10), (10, 10), (40, 25), (30, 5), (35, 65), (0, 100), (99, 1)):
            batches = list(reader.read(Shard(0, 0, first, rows)))
            assert pa.Table.from_batches(batches)["id"].to_pylist() == list(range(first, first + rows))


class Watched(io.BufferedWriter):
    """A file that tells of every write."""

    told: Any = None

    def write(self, data: Any) -> int:
        count = super().write(data)
        self.flush()
        type(self).told()
        return count


def test_a_job_that_dies_anywhere_is_gone_on_with(
    tmp_path: Path, model: Path, inputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a copy of the folder as it was at each moment at which the disk changes, the same command ends the same."""
    out, options = tmp_path / "out", Options(shard_rows=60)
    moments: dict[tuple, Path] = {}

    def look() -> None:
        # A file under way is another one once something of it is on the disk.
        state = tuple(sorted((path.name, path.stat().st_size > 100) for path in out.iterdir()))
        if state not in moments:
            moments[state] = tmp_path / "moments" / str(len(moments))
            shutil.copytree(out, moments[state])

    def telling(function: Any) -> Any:
        def told(*arguments: Any, **named: Any) -> Any:
            look()
            result = function(*arguments, **named)
            look()
            return result

        return told

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", telling(os.replace))
        patch.setattr(files.os, "fsync", telling(os.fsync))
        patch.setattr(Watched, "told", staticmethod(look))
        patch.setattr(shards, "open_part", lambda path: Watched(io.FileIO(path, "xb")))
        embed_files(inputs, model, out, options)
    corpus.check(out, inputs, model)
    assert len(moments) > 15
    assert any(name.endswith(".part") and begun for state in moments for name, begun in state)
    parts = {path.name: pq.read_table(path) for path in out.glob("part-*")}
    for state, place in moments.items():
        finished = {name for name, _ in state if name in parts}
        before = {name: (place / name).stat().st_mtime_ns for name in finished}
        report = embed_files(inputs, model, place, options)
        assert report.before == sum(parts[name].num_rows for name in finished)
        corpus.check(place, inputs, model)
        assert {name: (place / name).stat().st_mtime_ns for name in finished} == before  # none is written twice


def start(model: Path, out: Path, inputs: list[Path], *options: str) -> subprocess.Popen:
    """The command in a process of its own, until it has written two more shards."""
    before = len(list(out.glob("part-*")))
    arguments = [
        *map(str, inputs),
        "--model",
        str(model),
        "--out",
        str(out),
        "--shard-rows",
        "20",
        "--dtype",
        "int8",
        *options,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "pyxlbert", "embed", *arguments],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        text=True,
    )
    while len(list(out.glob("part-*"))) < before + 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    return process


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in found]


def test_killed_and_interrupted(tmp_path: Path, model: Path) -> None:
    """Processes of its own: kill -9 with two workers, which go with it; then an interrupt; then the rest here."""
    inputs, out, options = (
        corpus.write(tmp_path / "in", (1400, 600)),
        tmp_path / "out",
        Options(shard_rows=20, dtype="int8"),
    )
    process = start(model, out, inputs, "--processes", "2")
    process.send_signal(signal.SIGSTOP)
    workers = children(process.pid)
    assert len(workers) >= 2
    with pytest.raises(ValueError, match="another process is writing"), folder.OutputFolder(out).locked():
        pass
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    there = len(list(out.glob("part-*")))
    assert 2 <= there < 100
    process = start(model, out, inputs)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "of 2000 rows are written" in errors and "the same command goes on" in errors
    assert not [path for path in out.iterdir() if path.name.startswith(".") or path.name == "_lock"]
    # After the interrupt, what is there is as it was; processes go on with it.
    assert there < len(list(out.glob("part-*"))) < 100
    report = embed_files(inputs, model, out, options)
    assert 0 < report.before < 2000
    corpus.check(out, inputs, model, "int8")


class Full(io.BufferedWriter):
    """A disk that has no room for a third shard."""

    room = 3

    def write(self, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)

    def close(self) -> None:
        if not self.closed:
            type(self).room -= 1
        super().close()


def test_a_full_disk(
    tmp_path: Path,
    model: Path,
    inputs: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards, "open_part", lambda path: Full(io.FileIO(path, "xb")))
        assert command(model, tmp_path / "out", *inputs, "--shard-rows", 30) == 2
    message = capsys.readouterr().err
    assert "is full: 90 of 205 rows are written, in 3 shards; the same command goes on" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[0] == "_job.json"
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert command(model, tmp_path / "out", *inputs, "--shard-rows", 30) == 0
    corpus.check(tmp_path / "out", inputs, model)


def test_another_job_is_refused(tmp_path: Path, model: Path, inputs: list[Path]) -> None:
    """Whatever has changed is named, and the folder stays as it is; an input may have moved."""
    out, options = tmp_path / "out", Options(shard_rows=60)
    embed_files(inputs, model, out, options)
    before = tree(out)
    other = tiny_bert(tmp_path / "other", seed=1)
    changed = tmp_path / "a.parquet"
    pq.write_table(corpus.table(130, 9), changed)
    for given, message in (
        ((inputs, other, options), "the model is another"),
        ((inputs, model, Options(shard_rows=61)), "shard_rows was 60, and now is 61"),
        ((inputs, model, Options(shard_rows=60, layers=("sum", 1, 2))), r"layers was None, and now is \['sum', 1, 2\]"),
        ((inputs[:2], model, options), "it had 3 inputs, and now there are 2"),
        (([changed, *inputs[1:]], model, options), "input 1 is a.parquet: its content has changed"),
        (([*inputs[1:], inputs[0]], model, options), "input 1 is b.parquet: it was a.parquet"),
    ):
        with pytest.raises(ValueError, match=f"holds another job: {message}; go on with what it was"):
            embed_files(given[0], given[1], out, given[2])
    assert tree(out) == before
    (tmp_path / "in").rename(tmp_path / "moved")
    assert embed_files([tmp_path / "moved"], model, out, options).before == 205
    (tmp_path / "moved" / inputs[0].name).rename(tmp_path / "moved" / f"a{inputs[0].name}")
    assert embed_files([tmp_path / "moved"], model, out, options).before == 205  # and be called otherwise
    shutil.copy(out / "part-000000.parquet", out / "part-000001.parquet")
    with pytest.raises(ValueError, match=r"part-000001.parquet' is not this job's, or damaged"):
        embed_files([tmp_path / "moved"], model, out, Options(shard_rows=60))


def damaged(path: Path) -> Path:
    """A file whose second row group cannot be read: one bit of a page is wrong."""
    pq.write_table(corpus.table(90), path, row_group_size=30, compression="none", write_page_checksum=True)
    about = pq.read_metadata(path).row_group(1).column(1)
    content = bytearray(path.read_bytes())
    content[about.dictionary_page_offset + about.total_compressed_size - 3] ^= 4
    path.write_bytes(content)
    return path


def bad_inputs(root: Path) -> None:
    pq.write_table(corpus.table(20), root / "good.parquet")
    pq.write_table(pa.table({"id": [1]}), root / "lacks.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), root / "numbers.parquet")
    pq.write_table(pa.table({"id": [1], "text": ["a"], "vector": [3]}), root / "taken.parquet")
    pq.write_table(pa.table({"text": ["a", "b"] * 700 + [None, "c"]}), root / "nulls.parquet")
    raw = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), root / "latin.parquet")
    damaged(root / "damaged.parquet")
    whole = (root / "good.parquet").read_bytes()
    (root / "cut.parquet").write_bytes(whole[:-30])
    (root / "text.parquet").write_text("hello\n")
    (root / "latin.txt").write_bytes(b"a\nb\n\xff\n")
    (root / "empty").mkdir()
    (root / "full").mkdir()
    (root / "full/notes.txt").write_text("mine")


BAD: list[tuple[list[str], dict[str, str], list[str]]] = [
    (["nowhere.parquet"], {}, ["nowhere.parquet is not there"]),
    (["empty"], {}, ["empty is a folder without Parquet files"]),
    (["good.parquet", "good.parquet"], {}, ["good.parquet is given twice"]),
    (["lacks.parquet"], {}, ["lacks.parquet has no column 'text'; it has 'id'"]),
    (["numbers.parquet"], {}, ["numbers.parquet: the column 'text' holds int64, wanted strings"]),
    (["taken.parquet"], {}, ["taken.parquet has a column 'vector' already"]),
    (["good.parquet", "lacks.parquet"], {}, ["lacks.parquet has no column 'text'"]),
    (["good.parquet", "nulls.parquet"], {}, ["nulls.parquet has other columns than", "name those that are kept"]),
    (["nulls.parquet"], {}, ["nulls.parquet: row 1400 (the first is 0) has no text", "'empty'"]),
    (["latin.parquet"], {}, ["latin.parquet: row group 0", "cannot be read", "UTF"]),
    (["damaged.parquet"], {}, ["damaged.parquet: row group 1 (rows 30 to 59, the first row being 0) cannot be read"]),
    (["cut.parquet"], {}, ["cut.parquet is no Parquet file that can be read"]),
    (["text.parquet"], {}, ["text.parquet is no Parquet file that can be read"]),
    (["latin.txt", "good.parquet"], {}, ["good.parquet has other columns"]),
    (["latin.txt"], {"out": "out/"}, ["latin.txt: line 3 is not UTF-8"]),
    (["good.parquet"], {"--columns": "id,none"}, ["has no column 'none'"]),
    (["good.parquet"], {"--columns": "id,id"}, ["columns: got id, id, one of them twice"]),
    (["good.parquet"], {"--layers": "concat:-1,9"}, ["layers: got 9"]),
    (["good.parquet"], {"--processes": "0"}, ["processes: got 0, wanted at least 1"]),
    (["good.parquet"], {"--threads": "0"}, ["threads: got 0, wanted at least 1"]),
    (["good.parquet"], {"--batch-size": "0"}, ["--batch-size: got 0"]),
    (["good.parquet"], {"--shard-rows": "0"}, ["--shard-rows: got 0, wanted at least 1"]),
    (["good.parquet"], {"--prompt-name": "no"}, ["--prompt-name: got 'no'"]),
    (["good.parquet"], {"--truncate-dim": "33"}, ["--truncate-dim: got 33, wanted at most the 32"]),
    (["good.parquet"], {"--precision": "int8"}, ["ranges: got none for precision 'int8'"]),
    (["good.parquet"], {"--model": "nowhere"}, ["nowhere"]),
    (["good.parquet"], {"out": "full"}, ["holds 'notes.txt' and no job; wanted a new or an empty folder"]),
    (["good.parquet"], {"out": "missing/out"}, ["does not exist"]),
    (["good.parquet"], {"out": "latin.txt"}, ["is a file, wanted a folder"]),
    (["good.parquet"], {"out": "x.npy"}, ["the vectors of Parquet or of several files go into a folder"]),
    (["good.parquet"], {"out": "x.parquet"}, ["go into a folder"]),
    (["latin.txt"], {"out": "x.npy", "--processes": "2"}, ["--processes: goes with a folder"]),
    (["latin.txt", "-"], {}, ["standard input goes alone"]),
    (["empty", "good.parquet"], {"out": "empty/out"}, ["lies in the input"]),
]


@pytest.mark.parametrize(("names", "options", "messages"), BAD, ids=str)
def test_what_is_wrong_is_said_and_nothing_is_written(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    options: dict[str, str],
    messages: list[str],
) -> None:
    bad_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    given = {"--model": str(model), "--out": "out", **options}
    given["--out"] = given.pop("out", given["--out"])
    try:
        status = cli.main(["embed", *names, *(f"{name}={value}" for name, value in given.items())])
    except SystemExit as error:
        status = error.code
    assert status == 2
    captured = capsys.readouterr().err
    for message in messages:
        assert message in captured
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_input_that_changes_is_seen(
    tmp_path: Path, model: Path, inputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look through and the work; nothing of it is written."""
    begin = folder.OutputFolder.begin

    def late(self: Any, plan: Any) -> None:
        begin(self, plan)
        pq.write_table(corpus.table(130, 9), inputs[0])

    monkeypatch.setattr(folder.OutputFolder, "begin", late)
    with pytest.raises(ValueError, match=r"a\.parquet has changed since the job began"):
        embed_files(inputs, model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_job.json"]


@pytest.mark.parametrize("name", ["pyarrow", "ray"])
def test_a_library_that_is_missing(
    tmp_path: Path,
    model: Path,
    inputs: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    if name == "pyarrow":
        for module in [one for one in sys.modules if one.startswith("pyxlbert.embed.")]:
            monkeypatch.delitem(sys.modules, module)
    assert command(model, tmp_path / "out", *inputs, "--engine", "ray") == 2
    extra = {"pyarrow": "parquet", "ray": "ray"}[name]
    assert f"pip install 'pyxlbert[{extra}]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_bar_has_rate_and_time(
    tmp_path: Path, model: Path, inputs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(model, tmp_path / "out", *inputs, "--progress", "--shard-rows", 50) == 0
    shown = capsys.readouterr().err
    assert "embedding: 100%" in shown and "205/205" in shown and "row/s" in shown
    assert command(model, tmp_path / "out", *inputs, "--shard-rows", 50) == 0
    assert "205 rows in 5 shards, of which 205 were there" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_input(tmp_path: Path, model: Path) -> None:
    """Nearly 200 MB, most of it in one row group, after 90 MB; texts of more than a megabyte among them."""
    small, large = tmp_path / "small.parquet", tmp_path / "large.parquet"
    schema = pa.schema([("id", pa.int64()), ("text", pa.string()), ("body", pa.string())])
    body = np.random.default_rng(0).integers(97, 123, 400_000, dtype=np.uint8).tobytes().decode()
    for path, rows in ((small, 5000), (large, 10_000)):
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            ids = list(range(rows))
            bodies = [body[index * 7 % 300_000 :][:20_000] for index in ids]
            words = ["hello world" if index % 5000 else "a " * 600_000 for index in ids]
            writer.write_table(pa.table({"id": ids, "text": words, "body": bodies}, schema=schema), row_group_size=9000)
    assert large.stat().st_size - small.stat().st_size > 90 << 20
    code = (
        "import re, sys\n"
        "from pyxlbert.embed.job import embed_files\n"
        # Not getrusage's, which begins with the parent's.
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "model, small, large, out = sys.argv[1:]\n"
        "embed_files([small], model, out + '/small'); before = peak()\n"
        "embed_files([large], model, out + '/large'); print(before, peak())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(small), str(large), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, done.stdout.split())
    assert after - before < 45 << 10  # KiB: half of what the input has grown by
    assert pq.read_metadata(tmp_path / "large/part-000000.parquet").num_rows == 10_000
