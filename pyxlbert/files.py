"""Files of a model directory: reading with errors that name the file, writing whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What the system says of a file, in words that say what to look at.
_SAID = {
    errno.ENOENT: "there is no such file",
    errno.EISDIR: "is a folder, wanted a file",
    errno.ENOTDIR: "a part of this path is a file, wanted a folder",
    errno.EACCES: "may not be opened by this user",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "this user's share of the disk is full",
    errno.ENAMETOOLONG: "this name is too long for a file",
}
_WANTED = "wanted a local directory with a model's files"


def said(error: BaseException) -> str:
    """An error as a sentence: of the system's about a file its name first, and no number."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    own = error.strerror if error.strerror != os.strerror(error.errno) else None
    if error.filename is None:  # what is printed, above all
        return own or _SAID.get(error.errno) or str(error)
    link = leads(error.filename) if error.errno == errno.ENOENT else ""
    name = str(os.fspath(error.filename))
    # A sentence is one line, whatever a file is called.
    return f"{name if not set(name) & _BREAKS else repr(name)}{link}: {own or _SAID.get(error.errno, error.strerror)}"


# What ends a line, or moves a terminal's cursor.
_BREAKS = set(map(chr, range(32))) | {"\x7f", "\x85", "\u2028", "\u2029"}


def leads(name: Any) -> str:
    """Where a name that stands for nothing leads, if it is a link; else nothing."""
    if not isinstance(name, (str, os.PathLike)) or not os.path.islink(name) or os.path.exists(name):
        return ""
    return f" (a link to {os.readlink(name)})"


def shown(name: str | Path) -> str:
    """A name as it was given, for an error that says that nothing is there: of a link where it leads too."""
    return f"{str(name)!r}{leads(name)}"


def is_there(path: Path) -> bool:
    """Whether there is a file, of those that may be left out.

    Raises:
        FileNotFoundError: it was not left out, but is a link that leads nowhere.
    """
    if path.is_file():
        return True
    if leads(path):
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, where no file is")
    return False


def real_path(option: str, name: str) -> Path:
    """The path behind a name that a command was given, links followed.

    Raises:
        ValueError: no file can have the name: it is empty, or holds a zero or half of a character.
        FileNotFoundError: it is relative, and the working directory is gone.
    """
    if name == "":  # which stands for the working directory
        raise ValueError(f"{option}: got '', wanted a name")
    try:
        path = os.path.realpath(name)
        os.fsencode(path)
        os.path.lexists(path)
    except FileNotFoundError:  # of a relative name
        raise FileNotFoundError(f"{option}: got {name!r}, but the working directory is gone") from None
    except ValueError as error:
        raise ValueError(f"{option}: got {name!r}, which is no file's name: {error}") from None
    if "\0" in name:
        raise ValueError(f"{option}: got {name!r}, which is no file's name: it holds a zero")
    return Path(path)


def check_writable(option: str, name: str, path: Path) -> None:
    """That a file can be made, or replaced, at the real path of a name that a command was given.

    Raises:
        OSError: it is a folder or no file at all, or its folder is missing or not writable.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{option}: {name!r} is a directory")
    if path.exists() and not path.is_file():  # which a file would take the place of
        raise FileExistsError(f"{option}: {name!r} is a device or a pipe, wanted a file's name")
    check_folder(option, name, path.parent)


def check_apart(option: str, name: str, path: Path, source: str) -> None:
    """That an output, at its real path, is not the input, which it would take the place of.

    Raises:
        ValueError: it is.
    """
    if source != "-" and path.exists() and os.path.exists(source) and os.path.samefile(path, source):
        raise ValueError(f"{option}: got {name!r}, which is the input; wanted another name")


def check_distinct(outputs: Mapping[str, str | Path | None]) -> None:
    """That no two outputs are one file, of which the last one written would be left.

    Args:
        outputs: by option; None: there is none.

    Raises:
        ValueError: two are.
    """
    taken: dict[str, str] = {}
    for option, name in outputs.items():
        if name is None:
            continue
        other = taken.setdefault(os.path.realpath(name), option)
        if other != option:
            raise ValueError(f"{option}: got {str(name)!r}, which is the file of {other}; wanted another name")


def check_folder(option: str, name: str, folder: Path) -> None:
    """That something can be made in the folder in which a command was told to make it.

    Raises:
        OSError: the folder is missing or not writable.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{option}: the directory of {shown(name)} does not exist")
    check_inside(option, folder, f"the directory of {name!r}")


def check_inside(option: str, folder: Path, called: str | None = None) -> None:
    """That something can be made in a folder that is there, by making it: rights say nothing of root, of what is
    mounted to be read alone, or of a system's own folders.

    Args:
        option: for the message.
        folder: which folder.
        called: what the message calls it, by default its path.

    Raises:
        OSError: it is not writable.
    """
    try:
        _make_inside(folder)
    except OSError as error:
        raise PermissionError(f"{option}: {called or repr(str(folder))} is not writable: {error.strerror}") from None


def _make_inside(folder: Path) -> None:
    """Makes a file there that is gone again; one without a name where the system has those, which leaves no trace."""
    nameless = getattr(os, "O_TMPFILE", None)
    if nameless is not None:
        with contextlib.suppress(OSError):  # not every file system has them
            os.close(os.open(folder, os.O_WRONLY | nameless, 0o600))
            return
    tried = folder / f".{secrets.token_hex(6)}.part"
    os.close(os.open(tried, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    tried.unlink()


def check_parents(option: str, path: Path) -> None:
    """That something can be made at a path whose folders are made too where they are missing.

    Raises:
        OSError: the nearest folder that is there is none, or not writable.
    """
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{option}: {str(folder)!r} is not writable: it is no folder")
    check_inside(option, folder)


def model_directory(directory: str | Path) -> Path:
    """The directory as a Path.

    Raises:
        FileNotFoundError: nothing is there.
        NotADirectoryError: it is a file.
    """
    path = Path(directory)
    if directory == "":  # which a Path takes for the working directory
        raise FileNotFoundError(f"directory: got ''; {_WANTED}")
    if not path.exists():
        raise FileNotFoundError(f"directory: {shown(path)} does not exist; {_WANTED}")
    if not path.is_dir():
        raise NotADirectoryError(f"directory: {str(path)!r} is not a directory; {_WANTED}")
    return path


def require_file(directory: str | Path, name: str) -> Path:
    """The path of a file that must be there.

    Raises:
        FileNotFoundError: the directory or the file is missing.
        NotADirectoryError: the directory is a file.
    """
    path = model_directory(directory) / name
    if not is_there(path):
        raise FileNotFoundError(f"{name} is missing in {directory}")
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to: it becomes `path` when the block ends, and is removed when the block raises.

    Raises:
        OSError: it cannot be written; the message names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # NumPy's of a full disk has no number and no name: "160000 requested and 25568 written".
        if error.filename not in (None, temporary, str(temporary)) or str(path) in str(error):
            raise
        raise type(error)(
            error.errno or errno.EIO, f"cannot be written: {error.strerror or error}", str(path)
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path, end: str) -> Path:
    """A name of its own in the same folder, no longer than a file's may be where `path`'s is not."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}.{end}")


def named_path(option: str, name: str | Path) -> Path:
    """A name as a Path, which would take an empty one for the working directory.

    Raises:
        TypeError: it is no name.
        ValueError: as `real_path`.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"{option}: got {type(name).__name__}, wanted a str or a Path")
    real_path(option, os.fspath(name))
    return Path(name)


def check_new_directory(path: Path, force: bool = False) -> None:
    """Whether `whole_directory` may write there.

    Raises:
        FileExistsError: the directory holds something, and is not to be replaced; a directory without a
            ``config.json`` is no model's and is never replaced.
        NotADirectoryError: it is a file.
        FileNotFoundError: the directory in which it is to be made does not exist.
        PermissionError: that directory cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output: {str(path)!r} is a file, wanted a directory's name")
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise FileExistsError(f"output: {str(path)!r} is not empty; --force replaces a model's directory")
        if not (path / "config.json").is_file():
            raise FileExistsError(f"output: {str(path)!r} holds no config.json, so that it is not replaced")
    check_folder("output", str(path), path.resolve().parent)


@contextmanager
def whole_directory(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary directory to write to: it becomes `path` when the block ends, and is removed when the block raises.

    Args:
        path: the directory; what it held before is gone afterwards.
        force: whether it may hold something.

    Raises:
        OSError: as `check_new_directory`.
    """
    check_new_directory(path, force)
    path = path.resolve()  # a link keeps pointing where it did
    temporary, old = _beside(path, "part"), _beside(path, "old")
    temporary.mkdir()
    try:
        yield temporary
        for written in temporary.iterdir():
            with written.open("rb+") as file:
                os.fsync(file.fileno())
        try:
            if path.is_dir():
                os.replace(path, old)
            os.replace(temporary, path)
        except BaseException:  # a signal's too
            if old.is_dir() and not path.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def read_lines(name: str) -> list[str]:
    """The lines of a UTF-8 file, or of standard input for "-"; a line ends in LF or CR LF.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not UTF-8; the message has its number.
    """
    if name == "-":
        content = _standard_input()
    else:
        real_path("FILE", name)  # for names that no file can have
        content = Path(name).read_bytes()
    refuse_encoded("standard input" if name == "-" else name, content[:4])
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":  # what follows the last line end is no line
        lines.pop()
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            where = "standard input" if name == "-" else name
            raise ValueError(f"{where}: line {number} is not UTF-8: {error.reason} at byte {error.start}") from None
    return texts


def refuse_encoded(name: str | Path, begin: bytes) -> None:
    """That a text does not begin as what it is often given in, and cannot be read as.

    Args:
        name: of the file.
        begin: its first four bytes.

    Raises:
        ValueError: it is UTF-16, or packed.
    """
    for mark, kind, advice in _ENCODED:
        if begin.startswith(mark):
            raise ValueError(f"{name} is {kind}, wanted UTF-8: {advice}")


_ENCODED = (
    *((mark, "UTF-16", "convert it first") for mark in (b"\xff\xfe", b"\xfe\xff")),
    (b"\x1f\x8b", "packed by gzip", "unpack it first"),
    (b"\xfd7zX", "packed by xz", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd", "unpack it first"),
    (b"PK\x03\x04", "a zip archive", "unpack it first"),
)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _standard_input() -> bytes:
    # A process may be started without any; Python then has none, or one that cannot be read.
    try:
        return sys.stdin.buffer.read()
    except (AttributeError, ValueError, OSError) as error:
        reason = "it is closed" if sys.stdin is None else str(error)
        raise OSError(f"standard input cannot be read: {reason}") from None


def parsed_json(place: str, text: str) -> Any:
    """What a JSON text stands for.

    Raises:
        ValueError: it is not JSON; the message begins with `place`.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{place} is not JSON that can be read: it is nested too deep") from None
    except ValueError as error:  # a number of thousands of digits too
        raise ValueError(f"{place} is not valid JSON: {error}") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file whose outermost value is a `kind`.

    Raises:
        ValueError: the file is not JSON, or holds something else than a `kind`.
    """
    content = parsed_json(str(path), read_text(path))
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; wanted a {kind.__name__}")
    return content


def read_optional_json(path: Path) -> dict[str, Any]:
    """Like `read_json`, and an empty dict when the file is not there.

    Raises:
        FileNotFoundError: as `is_there`.
    """
    return read_json(path) if is_there(path) else {}


def setting(path: Path, content: dict[str, Any], key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """A field of a settings file, or `default` where it is missing or null.

    Raises:
        ValueError: it is of another type, or no finite number; true and false are no numbers.
    """
    value = content.get(key)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    odd = isinstance(value, float) and not math.isfinite(value)
    if not isinstance(value, kinds) or odd or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(_JSON_NAMES[one] for one in kinds)
        raise ValueError(f"{path}: {key} is {value!r}; wanted {wanted}")
    return value


_JSON_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_JSON_NAMES |= {list: "a list", dict: "an object"}
