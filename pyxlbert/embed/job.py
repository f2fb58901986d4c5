"""The whole job: inputs are looked through, the folder is taken, what is missing is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from pyxlbert import __version__
from pyxlbert.files import model_directory, named_path
from pyxlbert.text import DTYPES, SentenceEncoder
from pyxlbert.text.batches import check_count

from . import engines, ray_engine, sources
from .folder import OutputFolder
from .plan import NULLS, Options, Plan, Source, model_digest
from .shards import ShardWriter, load_encoder

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        rows: of the whole job.
        shards: of the whole job.
        before: rows that were there already.
    """

    rows: int
    shards: int
    before: int


class Interrupted(KeyboardInterrupt):
    """An interrupted job; the text says how much of it is there."""


def embed_files(
    inputs: str | Path | Sequence[str | Path],
    model: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    processes: int = 1,
    engine: str = "local",
    show_progress: bool | None = None,
) -> Report:
    """Writes a vector for each text of Parquet or text files into a folder of Parquet files.

    The folder is one table, ``part-000000.parquet`` and so on, with the inputs' columns and the vectors, in the order
    of the inputs and their rows. The same call goes on with a job that was interrupted or killed.

    Args:
        inputs: Parquet files (``.parquet``, ``.pq``), folders of them, or text files with a text a line.
        model: its folder.
        out: a new or empty folder, or one that holds this very job.
        options: what is written; None is the default of each.
        processes: how many work at once.
        engine: "local", or "ray" for a Ray cluster.
        show_progress: a bar; None shows it on a terminal.

    Raises:
        ValueError, TypeError: an argument or an input is wrong; the message says which, and where.
        OSError: something cannot be read or written; on a full disk what is finished stays.
        ImportError: Ray is not installed.
        RuntimeError: a process died.
        Interrupted: by the keyboard.
    """
    options = Options() if options is None else options
    inputs = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    if not inputs:
        raise ValueError("inputs: got none, wanted files or folders")
    for name in inputs:
        named_path("inputs", name)  # the working directory is no input that nobody named
    _check(options, processes, engine)
    if engine == "ray":
        ray_engine.load()
    folder = OutputFolder(Path(os.path.realpath(out)))
    for place in (Path(name).resolve() for name in inputs):
        if place.is_dir() and folder.path.is_relative_to(place):
            raise ValueError(f"out: {str(folder.path)!r} lies in the input {str(place)!r}; wanted another folder")
    folder.check()
    paths = sources.find([str(name) for name in inputs])
    _check_schemas(paths, options)
    root = model_directory(model).resolve()
    encoder: SentenceEncoder | None = load_encoder(root, options)
    digest = model_digest(root)
    with folder.locked():
        surveyed = tuple(_survey(paths, options, show_progress))
        plan = Plan(surveyed, str(root), digest, options, __version__)
        folder.begin(plan)
        missing = folder.missing(plan)
        report = Report(plan.rows, len(plan.shards()), plan.rows - sum(shard.rows for shard in missing))
        if not missing:
            return report
        with progress_bar("embedding", plan.rows, report.before, show_progress) as bar:
            try:
                if engine == "ray" or processes > 1:
                    encoder = None  # each process has its own
                    run = ray_engine.run if engine == "ray" else engines.processes
                    run(plan, folder.path, missing, min(processes, len(missing)), bar.update)
                else:
                    engines.here(ShardWriter(plan, folder.path, encoder), missing, bar.update)
            except KeyboardInterrupt:
                raise Interrupted(_state(folder, plan)) from None
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise OSError(f"the disk of {str(folder.path)!r} is full: {_state(folder, plan)}") from None
        return report


def progress_bar(what: str, total: int, before: int, show_progress: bool | None) -> tqdm:
    """A bar with the rate and the time that is left."""
    hidden = None if show_progress is None else not show_progress  # None: unless it is a terminal
    return tqdm(desc=what, total=total, initial=before, unit="row", unit_scale=True, disable=hidden)


def _check(options: Options, processes: int, engine: str) -> None:
    check_count("processes", processes)
    check_count("shard_rows", options.shard_rows)
    for name, value, known in (("engine", engine, ENGINES), ("nulls", options.nulls, NULLS)):
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(known)}")
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype: got {options.dtype!r}, wanted one of {', '.join(DTYPES)}")
    if options.precision in ("int8", "uint8") and options.ranges is None:
        raise ValueError(
            f"ranges: got none for precision {options.precision!r}; all shards need the same smallest and largest "
            "value of each column"
        )
    if not options.vector_column:
        raise ValueError("vector_column: got '', wanted a name")
    if options.columns is not None and len(set(options.columns)) < len(options.columns):
        raise ValueError(f"columns: got {', '.join(options.columns)}, one of them twice")


def _check_schemas(paths: Sequence[Path], options: Options) -> None:
    first = sources.schema_of(paths[0], options)
    for path in paths[1:]:
        other = sources.schema_of(path, options)
        if [(f.name, f.type) for f in other] != [(f.name, f.type) for f in first]:
            raise ValueError(
                f"{path} has other columns than {paths[0]}: {_columns(other)} instead of {_columns(first)}; "
                "name those that are kept"
            )


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema) or "none"


def _survey(paths: Sequence[Path], options: Options, show_progress: bool | None) -> Iterator[Source]:
    total = sum(path.stat().st_size for path in paths)
    hidden = None if show_progress is None else not show_progress
    with tqdm(desc="reading", total=total, unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
        for path in paths:
            yield sources.survey(path, options)
            bar.update(path.stat().st_size)


def _state(folder: OutputFolder, plan: Plan) -> str:
    missing = folder.missing(plan)
    done = plan.rows - sum(shard.rows for shard in missing)
    shards = len(plan.shards()) - len(missing)
    return f"{done} of {plan.rows} rows are written, in {shards} shards; the same command goes on"
