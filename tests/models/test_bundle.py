"""TensorFlow's checkpoints, read without it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import original_checkpoints as original
import pytest
import torch
from bundles import message, number, rewrite_index, stored, write_bundle

from pyxlbert.original import crc32c as crc
from pyxlbert.original.bundle import Bundle, find_checkpoint
from pyxlbert.original.table import read_table, uncompress
from pyxlbert.testing import compare

FOLDER = original.FOLDER


def bitwise(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        # RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_checksums_of_the_standard(data: bytes, wanted: int) -> None:
    assert crc.crc32c(data) == wanted


@pytest.mark.parametrize("size", [2047, 2048, 2049, 6145])
def test_checksums_of_several_chunks(size: int, monkeypatch) -> None:
    data = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(size), dtype=torch.uint8).numpy()
    wanted = bitwise(data.tobytes())
    assert crc.crc32c(data.tobytes()) == wanted
    monkeypatch.setattr(crc, "_TOGETHER", 2)
    assert crc.crc32c(memoryview(data)) == wanted


def test_snappy() -> None:
    """Bytes as they are, and copies with offsets of eleven bits, of two bytes and of four, overlapping too."""
    stream = bytes([70, 3 << 2]) + b"abcd" + bytes([(4 - 4) << 2 | 1, 4, (59 << 2) | 2, 8, 0, 1 << 2 | 3, 8, 0, 0, 0])
    text = b"abcdabcd" + (b"abcdabcd" * 8)[:60]
    assert uncompress(stream) == text + text[-8:-6]
    long = bytes(range(200)) * 2
    assert uncompress(bytes([0x90, 3, 61 << 2, 0x8F, 1]) + long) == long
    assert uncompress(stored(b"a" * 300 + b"bc")) == b"a" * 300 + b"bc"
    for broken in (stream[:-1], bytes([71]) + stream[1:], bytes([4, 1, 9])):
        with pytest.raises((ValueError, IndexError)):
            uncompress(broken)


@pytest.mark.quick
@pytest.mark.parametrize("kind", original.CONFIGS)
def test_what_tensorflow_wrote(kind: str) -> None:
    bundle = Bundle(FOLDER / kind / original.PREFIXES[kind])
    wanted = original.values(kind)
    beside = {"global_step"}
    if kind in original.WITH_OPTIMISER:
        beside |= {f"{name}/{slot}" for name in wanted for slot in ("adam_m", "adam_v")}
    assert bundle.entries.keys() == wanted.keys() | beside
    for name, array in wanted.items():
        assert bundle.entries[name].shape == array.shape
        compare.same_bits(name, bundle.tensor(name), torch.from_numpy(array))
    assert int(bundle.tensor("global_step")) == 0
    assert len({bundle.file_of(entry) for entry in bundle.entries.values()}) == original.SHARDS.get(kind, 0) + 1


def test_a_compressed_index(copied) -> None:
    prefix = copied("bert_squad")
    before = read_table(prefix.with_name(f"{prefix.name}.index"))
    rewrite_index(prefix, lambda rows: None, compressed=True)
    assert read_table(prefix.with_name(f"{prefix.name}.index")) == before
    Bundle(prefix).tensor("cls/squad/output_bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("gap", [b"", b"x"], ids=["aligned", "one byte off"])
def test_dtypes_and_places(tmp_path: Path, dtype: torch.dtype, gap: bytes) -> None:
    tensors = {
        "a": torch.arange(6).view(2, 3).to(dtype),
        "b": torch.ones((), dtype=dtype),
        "c": torch.ones(0, 3).to(dtype),
    }
    write_bundle(tmp_path / "x", tensors, gap)
    bundle = Bundle(tmp_path / "x")
    for name, wanted in tensors.items():
        compare.same_bits(name, bundle.tensor(name), wanted)


@pytest.fixture
def copied(tmp_path: Path):
    """Copies a checkpoint and gives its prefix."""

    def copy(kind: str) -> Path:
        for file in (FOLDER / kind).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path / original.PREFIXES[kind]

    return copy


def change(prefix: Path, ending: str, edit) -> None:
    path = prefix.with_name(prefix.name + ending)
    content = edit(bytearray(path.read_bytes()))
    path.unlink() if content is None else path.write_bytes(content)


def flipped(place: int):
    def edit(content: bytearray) -> bytearray:
        content[place] ^= 0x10
        return content

    return edit


DATA = ".data-00000-of-00001"
NAME = b"cls/squad/output_bias"
SHAPE = message(2, number(1, 2))


@pytest.mark.parametrize(
    ("ending", "edit", "error", "parts"),
    [
        (DATA, lambda c: c[:-9], ValueError, (DATA, "is truncated", "cls/squad/output_weights")),
        (DATA, lambda c: c[:0], ValueError, (DATA, "is truncated", "it has 0 bytes")),
        (DATA, lambda c: None, FileNotFoundError, (DATA, "is missing", "'bert/")),
        (DATA, flipped(100), ValueError, (DATA, "the checksum of 'bert/embeddings/", "has changed")),
        (".index", flipped(40), ValueError, (".index", "the checksum of the block at byte 0 is wrong")),
        (".index", flipped(-1), ValueError, (".index", "does not end as a table")),
        (".index", flipped(-45), ValueError, (".index", "is not a whole index")),
        (".index", lambda c: c[:-20], ValueError, (".index", "does not end as a table")),
        (".index", lambda c: c[:10], ValueError, (".index", "does not end as a table")),
        (".index", lambda c: b"", ValueError, (".index", "does not end as a table")),
        (".index", lambda c: None, FileNotFoundError, (".index",)),
    ],
)
def test_broken_files(copied, ending: str, edit, error: type[Exception], parts: tuple[str, ...]) -> None:
    prefix = copied("bert_squad")
    change(prefix, ending, edit)
    with pytest.raises(error) as raised:
        bundle = Bundle(prefix)
        for name in original.shapes("bert_squad"):
            bundle.tensor(name)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("row", "error", "part"),
    [
        (number(1, 7) + number(5, 0), TypeError, "is of dtype string"),
        (number(1, 1) + SHAPE + message(2, SHAPE) + number(5, 12), ValueError, "has 12 bytes, which is not its shape"),
        (number(1, 1) + message(2, SHAPE) + number(4, 10**6) + number(5, 8), ValueError, "ends at byte 1000008"),
        (number(1, 1) + message(2, SHAPE) + message(7, b""), ValueError, "has 0 dimensions, wanted 1"),
        (number(1, 1) + message(2, SHAPE) + message(7, message(1, b"")), ValueError, "it lacks the part - of"),
        (number(1, 1) + message(2, SHAPE) + number(3, 5), FileNotFoundError, ".data-00005-of-00001 is missing"),
        (number(1, 1) + message(2, SHAPE)[:-1], ValueError, "is not the index of a checkpoint: a message ends"),
        (b"\x0b", ValueError, "is not the index of a checkpoint: a message has a field of the unknown kind 3"),
    ],
)
def test_broken_entries(copied, row: bytes, error: type[Exception], part: str) -> None:
    prefix = copied("bert_squad")
    rewrite_index(prefix, lambda rows: rows.update({NAME: row}))
    with pytest.raises(error, match=re.escape(part)):
        Bundle(prefix).tensor(NAME.decode())


@pytest.mark.parametrize(
    ("change_rows", "part"),
    [
        (lambda rows, keys: rows.pop(keys[1]), "it lacks the part 25,25:0,16 of 'bert/embeddings/word_embeddings'"),
        (lambda rows, keys: rows.update({keys[1]: rows[keys[3]]}), "part 25,25:0,16' is [24, 16] of float32, wanted"),
        (lambda rows, keys: _parts(rows, keys, 3), "is [99, 16], which is not what its parts 0,25:0,16 and"),
        (lambda rows, keys: _parts(rows, [keys[0], keys[0], *keys[2:]], 4), "which is not what its parts"),
    ],
)
def test_broken_partitions(copied, change_rows, part: str) -> None:
    prefix = copied("bert_partitioned")
    name = b"bert/embeddings/word_embeddings"

    def change(rows: dict[bytes, bytes]) -> None:
        change_rows(rows, sorted(key for key in rows if key.startswith(b"\0" + name)))

    rewrite_index(prefix, change)
    with pytest.raises(ValueError, match=re.escape(part)):
        Bundle(prefix)


def _parts(rows: dict[bytes, bytes], keys: list[bytes], count: int) -> None:
    """Has the word embeddings say that they are of these parts alone."""
    name = b"bert/embeddings/word_embeddings"
    starts = {key: start for key, start in zip(sorted(set(keys)), (0, 25, 50, 75), strict=False)}
    slices = b"".join(
        message(7, message(1, number(1, starts[key]) + number(2, 24 + (starts[key] < 75))) + message(1, number(2, 16)))
        for key in keys[:count]
    )
    rows[name] = number(1, 1) + message(2, message(2, number(1, 99)) + message(2, number(1, 16))) + slices


def test_a_part_that_has_changed(copied) -> None:
    prefix = copied("bert_partitioned")
    bundle = Bundle(prefix)
    part = bundle._parts["bert/embeddings/word_embeddings"][2]
    change(prefix, ".data-00000-of-00001", lambda c: c[: part.offset] + b"\x55" + c[part.offset + 1 :])
    with pytest.raises(ValueError, match=r"the checksum of 'bert/embeddings/word_embeddings, part 50,25:0,16' is"):
        Bundle(prefix).tensor("bert/embeddings/word_embeddings")


def test_headers(copied) -> None:
    prefix = copied("bert_squad")
    rewrite_index(prefix, lambda rows: rows.update({b"": number(1, 1) + number(2, 1)}))
    with pytest.raises(ValueError, match="is big-endian"):
        Bundle(prefix)
    rewrite_index(prefix, lambda rows: rows.pop(b""))
    with pytest.raises(ValueError, match="has no header"):
        Bundle(prefix)


def test_finding(copied, tmp_path: Path) -> None:
    prefix = copied("bert_squad")
    for named in (tmp_path, prefix, prefix.with_name(f"{prefix.name}.index"), prefix.with_name(f"{prefix.name}{DATA}")):
        assert find_checkpoint(named) == prefix
    copied("bert_classifier")
    with pytest.raises(ValueError, match=r"several checkpoints.*: model.ckpt-21, model.ckpt-343"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "gs://a/b/model.ckpt-343"\nall_model_ckpt...: "x"\n')
    assert find_checkpoint(tmp_path).name == "model.ckpt-343"
    with pytest.raises(FileNotFoundError, match=r"model.ckpt-7.index is missing"):
        find_checkpoint(tmp_path / "model.ckpt-7")
    (tmp_path / "empty").mkdir()
    assert find_checkpoint(tmp_path / "empty") is None
    (tmp_path / "empty" / "m.ckpt.data-00000-of-00001").touch()
    with pytest.raises(FileNotFoundError, match=r"m.ckpt.index is missing: m.ckpt.data-00000-of-00001 has no index"):
        find_checkpoint(tmp_path / "empty")


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="tensorflow is not installed")
def test_the_writer_writes_these_files(tmp_path: Path) -> None:
    writer = Path(__file__).with_name("write_tensorflow_checkpoints.py")
    subprocess.run([sys.executable, str(writer), str(tmp_path)], check=True, env={**os.environ})
    for file in FOLDER.rglob("*.*"):
        if file.is_file():
            assert (tmp_path / file.relative_to(FOLDER)).read_bytes() == file.read_bytes(), file.name
