"""Commands that are killed (kill -9), at random moments and after each name that they give to what they have written:
nothing is half-written or lost, the same command goes on.

    python tests/faults/kills.py --moments 100       # of each job
    python tests/faults/kills.py embed --moments 20  # of one

A job runs in a forked child, so that a moment costs what the job takes and not what imports take.  However it was
killed, its result is in the end that of a job that nobody disturbed, to the bit.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Commands import some of these when they come to it: here once, and not in every child.
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sklearn.metrics  # noqa: F401
import torch
import torch._dynamo
import torch.utils.tensorboard
from safetensors.torch import load_file

import pyxlbert.embed.job
import pyxlbert.training.finetune
import pyxlbert.training.pretraining.run  # noqa: F401
from pyxlbert import cli
from pyxlbert.testing.directories import tiny_bert
from pyxlbert.training import checkpoints

WORDS = ("the", "hello", "world", "trains", "naive", "a", "b", "c")


class Job(NamedTuple):
    """A command and what it leaves.

    Attributes:
        prepare: writes what it reads.
        arguments: of the command, in a folder.
        check: raises AssertionError where something of the folder is half-written; it may have been killed.
        result: the bytes of what it makes, when it has ended.
    """

    prepare: Callable[[Path], None]
    arguments: Callable[[Path], list[str]]
    check: Callable[[Path], None]
    result: Callable[[Path], dict[str, bytes]]


def texts(count: int) -> list[str]:
    draw = random.Random(count)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(count)]


def _prepare_lines(root: Path) -> None:
    (root / "in.txt").write_text("\n".join(texts(600)) + "\n")
    np.save(root / "out.npy", np.full((3, 2), 7.0))


def _check_lines(root: Path) -> None:
    """The old matrix or the new one, whole; beside them hidden files alone."""
    found = np.load(root / "out.npy")
    assert found.shape in ((3, 2), (600, 32)), found.shape
    assert found.shape != (3, 2) or (found == 7.0).all()
    assert {path.name for path in root.iterdir() if not path.name.startswith(".")} == {"in.txt", "out.npy"}


def _prepare_rows(root: Path) -> None:
    rows = pa.table({"id": range(600), "text": texts(600)})
    pq.write_table(rows, root / "in.parquet")


def _check_shards(root: Path) -> None:
    """Every shard that has its name is whole, and holds the rows that it should."""
    for path in (root / "out").glob("part-*"):
        rows = pq.read_table(path)
        assert rows["id"].to_pylist() == list(range(rows["id"][0].as_py(), rows["id"][0].as_py() + rows.num_rows))


def _prepare_labels(root: Path) -> None:
    lines = [f"{text}\t{'yes' if 'hello' in text else 'no'}" for text in texts(24)]
    (root / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")


def _check_run(root: Path) -> None:
    """Every checkpoint that has its name can be read, and so can the model."""
    if not (root / "out").is_dir():
        return
    for step in checkpoints.steps(root / "out"):
        checkpoints.read(root / "out", step)
    if (root / "out" / "model.safetensors").exists():
        load_file(root / "out" / "model.safetensors")


def _run_result(root: Path) -> dict[str, bytes]:
    """The files of a trained model. `run.json` names the data's folder, and the picture need only be there."""
    out = root / "out"
    assert (out / "curves.png").is_file(), sorted(path.name for path in out.iterdir())
    names = {path.name for path in out.iterdir() if path.suffix in (".json", ".safetensors", ".txt")} - {"run.json"}
    return {name: (out / name).read_bytes() for name in names}


def _prepare_text(root: Path) -> None:
    sentences = texts(60)
    documents = ["\n".join(sentences[start : start + 6]) for start in range(0, len(sentences), 6)]
    (root / "text.txt").write_text("\n\n".join(documents) + "\n")


_FINETUNE = ("--epochs", "2", "--batch-size", "8", "--learning-rate", "0.001", "--checkpoint-every", "2", "--resume")
_PRETRAIN = ("--max-length", "16", "--batch-size", "4", "--steps", "6", "--checkpoint-every", "2", "--resume")


def jobs(model: Path) -> dict[str, Job]:
    """By name; all with this model."""
    one = ["--model", str(model), "--threads", "1"]

    def finetune(root: Path) -> list[str]:
        files = ("--train", str(root / "train.tsv"), "--out", str(root / "out"))
        return ["finetune", "text-classification", *files, *one, *_FINETUNE]

    return {
        "embed": Job(
            _prepare_lines,
            lambda root: ["embed", str(root / "in.txt"), *one, "--out", str(root / "out.npy")],
            _check_lines,
            lambda root: {"out.npy": (root / "out.npy").read_bytes()},
        ),
        "embed, many files": Job(
            _prepare_rows,
            lambda root: ["embed", str(root / "in.parquet"), *one, "--out", f"{root / 'out'}/", "--shard-rows", "40"],
            _check_shards,
            lambda root: {path.name: path.read_bytes() for path in (root / "out").glob("part-*")},
        ),
        "finetune": Job(_prepare_labels, finetune, _check_run, _run_result),
        "finetune, evaluated": Job(
            _prepare_labels,
            lambda root: [*finetune(root), "--dev", str(root / "train.tsv"), "--evaluate-every", "3"],
            _check_run,
            _run_result,
        ),
        "pretrain": Job(
            _prepare_text,
            lambda root: [
                *("pretrain", "bert", str(root / "text.txt"), "--out", str(root / "out"), "--threads", "1"),
                *("--config", str(model), "--tokenizer", str(model), *_PRETRAIN),
            ],
            _check_run,
            _run_result,
        ),
    }


def started(arguments: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """The number of a child that runs the command after `prepare`, silent, and ends with its status."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        prepare()
        status = cli.main(arguments)
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def undisturbed(job: Job, folder: Path) -> tuple[dict[str, bytes], float]:
    """What the job makes if nobody kills it, and the seconds that it takes."""
    root = folder / "undisturbed"
    root.mkdir()
    job.prepare(root)
    begun = time.monotonic()
    status = ended(started(job.arguments(root)))
    assert status == 0, f"undisturbed it ended with {status}"
    return job.result(root), time.monotonic() - begun


def _killed_after(renames: int) -> None:
    """From here on this process kills itself as soon as it has given so many files or folders their names."""
    rename, left = os.replace, [renames]

    def replace(*arguments: Any, **options: Any) -> None:
        rename(*arguments, **options)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def killed_after_every_rename(job: Job, folder: Path) -> int:
    """Kills the job after its first rename, another one after its second, and so on: what a run leaves changes there.

    Each goes on with the same command, to its end.

    Returns:
        how many renames it does.

    Raises:
        AssertionError: something was half-written, lost, or other than without kills.
    """
    wanted, _ = undisturbed(job, folder)
    for renames in itertools.count(1):
        root = folder / f"{renames} renames"
        root.mkdir()
        job.prepare(root)
        status = ended(started(job.arguments(root), partial(_killed_after, renames)))
        assert status in (0, -signal.SIGKILL), f"{renames} renames: it ended with {status}"
        job.check(root)
        if status:
            again = ended(started(job.arguments(root)))
            assert again == 0, f"killed after {renames} renames, it did not go on: {again}"
        found = job.result(root)
        assert found.keys() == wanted.keys(), f"{renames} renames: {sorted(found)}, wanted {sorted(wanted)}"
        assert found == wanted, f"{renames} renames: other bits than undisturbed"
        shutil.rmtree(root)
        if status == 0:
            return renames - 1


def killed_again_and_again(job: Job, folder: Path, moments: int, seed: int) -> tuple[int, int]:
    """Kills the job so many times.

    Returns:
        how many kills met it at work, and how often it came to its end between them.

    Raises:
        AssertionError: something was half-written, lost, or other than without kills.
    """
    draw = random.Random(seed)
    wanted, seconds = undisturbed(job, folder)
    hits = ends = 0
    root = folder / "killed"
    for moment in range(moments + 1):
        if not root.is_dir():
            root.mkdir()
            job.prepare(root)
        child, begun = started(job.arguments(root)), time.monotonic()
        if moment < moments:
            time.sleep(draw.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        assert status in (0, -signal.SIGKILL), f"moment {moment}: it ended with {status}"
        hits += status != 0
        job.check(root)
        if status == 0:
            ends += 1
            # The first one may have been slow, and no kill would meet those after it at work.
            seconds = min(seconds, time.monotonic() - begun)
            found = job.result(root)
            assert found.keys() == wanted.keys(), f"moment {moment}: {sorted(found)}, wanted {sorted(wanted)}"
            assert found == wanted, f"moment {moment}: other bits than undisturbed"
            shutil.rmtree(root)
    return hits, ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("jobs", nargs="*", help="names of them; all")
    parser.add_argument("--moments", type=int, default=100, help="of each job")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        known = jobs(tiny_bert(Path(folder) / "model"))
        unknown = set(options.jobs) - known.keys()
        if unknown:
            parser.error(f"jobs: got {', '.join(sorted(unknown))}, wanted some of {', '.join(known)}")
        for name in options.jobs or known:
            place = Path(folder) / name
            place.mkdir()
            begun = time.monotonic()
            hits, ends = killed_again_and_again(known[name], place, options.moments, options.seed)
            (place / "renames").mkdir()
            renames = killed_after_every_rename(known[name], place / "renames")
            print(
                f"{name}: {options.moments} moments, {hits} at work, {ends} ends; after each of {renames} renames; "
                f"all as undisturbed, {time.monotonic() - begun:.0f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
