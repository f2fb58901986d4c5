"""The `pyxlbert` command: sentence vectors, integers, and what is here; `commands` holds the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import torch

import pyxlbert
from pyxlbert import backends, evaluate, machine
from pyxlbert.commands import bench, convert, export, finetune, parity, pretrain
from pyxlbert.commands import embed as many
from pyxlbert.commands.typed import speaker
from pyxlbert.files import check_apart, check_writable, read_lines, real_path, said, whole_file
from pyxlbert.hub import Hub
from pyxlbert.text import DTYPES
from pyxlbert.text.hidden import COMBINATIONS
from pyxlbert.text.sentence_encoder import check_encoding, quantise_directory

# Packages whose versions matter in a report; read from their metadata, so that none is imported.
_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "transformers", "triton")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: what follows the command's name; None takes the process's own.

    Returns:
        The exit status: 0, or 1 after an error (of a job of many files 2), which has been printed, or where a command
        has found what is wrong; 141 where nobody reads on what it prints. Wrong usage exits with 2.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    options.said = speaker(parser, options, sys.argv[1:] if arguments is None else arguments)
    try:
        _stop_orderly()
        if backends.level_error is not None and options.command != "info":
            raise ValueError(backends.level_error)
        status = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError as error:
        if not _left_unread():
            print(f"pyxlbert {options.command}: error: {said(error)}", file=sys.stderr)
            return 1
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, ImportError) as error:
        print(f"pyxlbert {options.command}: error: {options.said(error)}", file=sys.stderr)
        _give_up_output()
        return 1
    except KeyboardInterrupt:
        print(f"pyxlbert {options.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # not foreseen: still one line, with the kind of the error
        print(f"pyxlbert {options.command}: error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return status or 0


def _stop_orderly() -> None:
    """Lets a terminated process leave through its `finally` blocks, so that no half-written file stays."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, leave)


def _give_up_output() -> None:
    """What is printed and cannot be written, on a disk that is full, goes nowhere: Python would try again on exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _left_unread() -> bool:
    """Whether the reader of what is printed has gone, as `head` does; what is left of it then goes nowhere.

    Python ignores SIGPIPE, which would have ended the process, and would raise once more on exit.
    """
    unread = [stream for stream in (1, 2) if _without_reader(stream)]
    for stream in unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    return bool(unread)


def _without_reader(stream: int) -> bool:
    looked = select.poll()
    looked.register(stream, 0)
    return any(event & select.POLLERR for _, event in looked.poll(0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyxlbert", description=pyxlbert.__doc__)
    parser.add_argument("--version", action="version", version=f"pyxlbert {pyxlbert.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    embed = commands.add_parser(
        "embed",
        help="write one vector for each line of a file, or row of Parquet files",
        description="One text a line, UTF-8; an empty line is an empty text; row i of the output is line i.",
    )
    embed.add_argument(
        "files", nargs="+", metavar="FILE", help="the texts, or - for standard input; or Parquet, or several"
    )
    embed.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="a folder as Hugging Face or sentence-transformers write it, or the name of a model of the hub",
    )
    embed.add_argument(
        "--out", required=True, metavar="X.npy|X.jsonl|X/", help="a matrix, a JSON object a line, or a folder"
    )
    embed.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts per run of the model (32)")
    embed.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model; the output is float32")
    embed.add_argument("--pooling", choices=("mean", "cls", "max"), help="instead of the directory's own")
    embed.add_argument(
        "--layers",
        type=_layers,
        metavar="L",
        help="a layer (0: embeddings, -1: last), the mean of several (--layers=-2,-1), their sum (--layers=sum:-2,-1), "
        "or side by side (--layers=concat:-2,-1)",
    )
    embed.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="divide each vector by its length, or don't, instead of what the directory says",
    )
    embed.add_argument("--threads", type=int, metavar="N", help="processor threads to use")
    embed.add_argument("--progress", action=argparse.BooleanOptionalAction, help="a progress bar (on long work)")
    many.add_options(embed)
    embed.set_defaults(run=_embed, refuse=embed.error, arguments={"directory": "--model", "inputs": "FILE"})

    evaluation = commands.add_parser("evaluate", help="how good a model is on data that you bring")
    evaluate.add_tasks(evaluation)
    evaluation.set_defaults(run=evaluate.run, arguments={"directory": "--model"})

    quantise = commands.add_parser(
        "quantise",
        help="write a model's eight-bit integers beside its weights",
        description="Writes int8.safetensors, which --dtype int8 then takes; other files stay as they are.",
    )
    quantise.add_argument("model", metavar="DIR", help="a folder as Hugging Face or sentence-transformers write it")
    quantise.set_defaults(run=_quantise, arguments={"directory": "DIR"})

    finetune.add(commands)
    pretrain.add(commands)
    convert.add(commands)
    export.add(commands)
    parity.add(commands)
    bench.add(commands)

    info = commands.add_parser("info", help="versions, processor, OpenMP runtimes and backends")
    info.set_defaults(run=lambda options: print(info_text()))
    return parser


def _layers(text: str) -> int | tuple[str | int, ...]:
    combine, _, listed = text.rpartition(":")
    try:
        layers = [int(part) for part in listed.split(",")]
    except ValueError:
        layers = []
    if combine not in ("", *COMBINATIONS) or not layers:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a layer such as -2, or several such as sum:-2,-1")
    return layers[0] if len(layers) == 1 else (combine or "mean", *layers)


def _embed(options: argparse.Namespace) -> int:
    if many.is_job(options):
        return many.run(options)
    # Everything that can be wrong without the model is found before minutes are spent.
    out = _output_path(options.out)
    check_apart("--out", options.out, out, options.files[0])
    arguments = many.encoding(options)
    if options.threads is not None:
        many.set_threads(options.threads)
    texts = read_lines(options.files[0])
    if options.precision in ("int8", "uint8") and options.ranges is None and len(texts) == 1:
        raise ValueError(f"ranges: got none for precision {options.precision!r} and one text, which has no range")
    model = Hub().folder(options.model, text=True)
    check_encoding(model, **arguments)
    encoder = pyxlbert.SentenceEncoder.from_pretrained(model, DTYPES[options.dtype])
    vectors = encoder.encode(texts, show_progress=options.progress, **arguments)
    with whole_file(out) as path, path.open("xb") as file:
        _WRITERS[Path(options.out).suffix](file, texts, vectors)
    print(f"{len(texts)} texts, {vectors.shape[1]} numbers each: {options.out}", file=sys.stderr)
    return 0


def _quantise(options: argparse.Namespace) -> None:
    path = quantise_directory(options.model)
    print(f"{path.stat().st_size >> 10} KiB: {path}", file=sys.stderr)


def _output_path(name: str) -> Path:
    path = real_path("--out", name)  # a link keeps pointing where it did
    if Path(name).suffix not in _WRITERS:
        raise ValueError(f"--out: got {name!r}, wanted a name that ends in {' or '.join(_WRITERS)}, or / for a folder")
    check_writable("--out", name, path)
    return path


def _write_npy(file: BinaryIO, texts: list[str], vectors: np.ndarray) -> None:
    np.save(file, vectors)


def _write_jsonl(file: BinaryIO, texts: list[str], vectors: np.ndarray) -> None:
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(f"--out: JSON has no number for the values of line {int(finite.argmin()) + 1}, not all finite")
    for text, vector in zip(texts, vectors, strict=True):
        # str of a float32 is the shortest text that reads back as the same float32.
        numbers = ", ".join(map(str, vector))
        file.write(f'{{"text": {json.dumps(text, ensure_ascii=False)}, "vector": [{numbers}]}}\n'.encode())


_WRITERS: dict[str, Callable[[BinaryIO, list[str], np.ndarray], None]] = {".npy": _write_npy, ".jsonl": _write_jsonl}


def info_text() -> str:
    """What `pyxlbert info` prints."""
    lines = [f"pyxlbert {pyxlbert.__version__}", f"python {platform.python_version()}"]
    lines += [f"{name} {_version(name)}" for name in _PACKAGES]
    model, features = machine.processor()
    lines += ["", f"processor: {model}, {os.cpu_count()} cores", f"features: {' '.join(features) or 'unknown'}"]
    if backends.unavailable("cpu") is None:
        from pyxlbert import _C

        lines.append(f"instruction set: {_C.level()} (of {', '.join(_C.levels())})")
    if backends.level_error is not None:
        lines.append(f"error: {backends.level_error}")
    lines.append(f"threads: {torch.get_num_threads()}")
    runtimes = machine.openmp_runtimes()
    lines.append(f"OpenMP runtimes: {', '.join(runtimes) or 'none loaded'}")
    if len(runtimes) > 1:
        lines.append("warning: several OpenMP runtimes are loaded; their thread pools compete for the same cores")
    lines += ["", "backends:"]
    for name in backends.NAMES:
        reason = backends.unavailable(name)
        lines.append(f"  {name:<7} " + ("available" if reason is None else f"missing: {reason}"))
    lines += [f"  left out: {sentence}" for sentence in backends.REFUSED]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
