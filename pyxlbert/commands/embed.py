"""The options of `pyxlbert embed` for many files, and the job that they describe."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyxlbert.embed.plan import NULLS, Options, is_parquet
from pyxlbert.files import real_path
from pyxlbert.hub import Hub
from pyxlbert.text.batches import check_count
from pyxlbert.text.quantisation import PRECISIONS

# Endings of an output that is one file.
_FILES = (".npy", ".jsonl")
_MOST_THREADS = 4096

# What only a job takes, and what it is if nobody says.
_JOB = {
    "text_column": "text",
    "columns": None,
    "vector_column": "vector",
    "nulls": "error",
    "shard_rows": Options.shard_rows,
    "processes": 1,
    "engine": "local",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says how texts become vectors, and what a job of many files takes."""
    parser.add_argument("--prompt", metavar="TEXT", help="is put before every text")
    parser.add_argument("--prompt-name", metavar="NAME", help="the same, by a name of the directory's prompts")
    parser.add_argument("--truncate-dim", type=int, metavar="N", help="keep the first N numbers of each vector")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the numbers that are written")
    parser.add_argument(
        "--ranges", metavar="X.npy", help="for int8 and uint8: the smallest and largest value of each column, [2, E]"
    )
    job = parser.add_argument_group("many files, or Parquet, into a folder of Parquet files (--out FOLDER/)")
    job.add_argument("--text-column", default=_JOB["text_column"], metavar="NAME", help="the column of texts (text)")
    job.add_argument(
        "--columns", metavar="NAME,NAME", help='those that go with the vectors into the output (all; "" for none)'
    )
    job.add_argument("--vector-column", default=_JOB["vector_column"], metavar="NAME", help="the new one (vector)")
    job.add_argument(
        "--nulls",
        choices=NULLS,
        default=_JOB["nulls"],
        help="a text that is null is an error before anything is written (default), an empty text, or has no vector",
    )
    job.add_argument("--shard-rows", type=int, default=_JOB["shard_rows"], metavar="N", help="of a file (50000)")
    job.add_argument("--processes", type=int, default=1, metavar="N", help="that share the work and the threads (1)")
    job.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: the processes of a Ray cluster")


def encoding(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `SentenceEncoder.encode` that the options stand for.

    Raises:
        OSError, ValueError: the file of ranges cannot be read.
    """
    for name in ("batch_size", "truncate_dim"):
        if getattr(options, name) is not None:
            check_count(name, getattr(options, name))
    names = ("batch_size", "normalize", "layers", "pooling", "prompt", "prompt_name", "truncate_dim", "precision")
    arguments = {name: getattr(options, name) for name in names}
    if options.ranges is not None:
        arguments["ranges"] = _read_ranges(options.ranges)
    return arguments


def _read_ranges(name: str) -> np.ndarray:
    real_path("ranges", name)  # for names that no file can have
    with Path(name).open("rb") as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"ranges: {name!r} is no .npy file that can be read: {error}") from None


def is_job(options: argparse.Namespace) -> bool:
    """Whether the output is a folder. Exits with 2 if it does not go with the inputs or the other options."""
    suffix = Path(options.out).suffix
    if "" in options.files:  # which a Path takes for the working directory
        options.refuse("FILE: got '', wanted a name")
    many = len(options.files) > 1 or any(is_parquet(Path(one)) or Path(one).is_dir() for one in options.files)
    folder = options.out.endswith(os.sep) or (suffix not in _FILES and Path(options.out).is_dir())
    if many and suffix in (*_FILES, ".parquet", ".pq") and not folder:
        options.refuse(f"--out: got {options.out!r}; the vectors of Parquet or of several files go into a folder")
    if many and "-" in options.files:
        options.refuse("FILE: got - among several; standard input goes alone")
    if folder and options.files == ["-"]:
        options.refuse(f"--out: got {options.out!r}; a job reads its input again when it goes on, so it wants files")
    if many or folder:
        return True
    for name, usual in _JOB.items():
        if getattr(options, name) != usual:
            flag = "--" + name.replace("_", "-")
            options.refuse(f"{flag}: goes with a folder as --out; got {options.out!r}")
    return False


def run(options: argparse.Namespace) -> int:
    """Runs the job.

    Returns:
        The exit status: 0; 2 after an error, 130 after an interruption, and either has been printed.
    """
    try:
        from pyxlbert.embed.folder import OutputFolder
        from pyxlbert.embed.job import Interrupted, embed_files
    except ImportError as error:
        print(
            f"pyxlbert embed: error: Parquet needs pyarrow, which cannot be imported ({error}); "
            "pip install 'pyxlbert[parquet]'",
            file=sys.stderr,
        )
        return 2
    try:
        if options.threads is not None:
            set_threads(options.threads)
        OutputFolder(real_path("out", options.out)).check()  # before a model is fetched
        report = embed_files(
            options.files,
            Hub().folder(options.model, text=True),
            options.out,
            _options(options),
            processes=options.processes,
            engine=options.engine,
            show_progress=options.progress,
        )
    except Interrupted as stopped:
        print(f"pyxlbert embed: interrupted: {stopped}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"pyxlbert embed: error: {options.said(error)}", file=sys.stderr)
        return 2
    before = f", of which {report.before} were there" if report.before else ""
    print(f"{report.rows} rows in {report.shards} shards{before}: {options.out}", file=sys.stderr)
    return 0


def set_threads(threads: int) -> None:
    """Sets how many threads of the processor are used.

    Raises:
        ValueError: it is no number that makes sense.
    """
    if not 1 <= threads <= _MOST_THREADS:
        wanted = "wanted at least 1" if threads < 1 else f"wanted at most {_MOST_THREADS}"
        raise ValueError(f"--threads: got {threads}, {wanted}")
    torch.set_num_threads(threads)


def _options(options: argparse.Namespace) -> Options:
    given = encoding(options)
    ranges = given.pop("ranges", None)
    columns = None if options.columns is None else [name for name in options.columns.split(",") if name]
    return Options(
        dtype=options.dtype,
        ranges=None if ranges is None else np.asarray(ranges, dtype=np.float32).tolist(),
        text_column=options.text_column,
        columns=columns,
        vector_column=options.vector_column,
        nulls=options.nulls,
        shard_rows=options.shard_rows,
        **given,
    )
