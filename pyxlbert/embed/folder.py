"""The output folder: which job it belongs to, which shards are done, and that one process writes at a time.

Nothing is ever half there: the job's file and each shard appear by a rename of a file that is whole and on the disk.
So a shard's presence is its entry in the journal, and whatever else a killed process leaves is swept away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pyxlbert.files import check_folder, check_inside, read_json, whole_file

from .plan import Plan, Shard, difference

# Names that begin so are no data to whoever reads the folder as one table.
_JOB, _LOCK = "_job.json", "_lock"
MARK = b"pyxlbert.job"


class OutputFolder:
    """A folder of shards.

    Args:
        path: where it is or will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self) -> None:
        """Whether the folder may be a job's, before anything is read or written.

        Raises:
            OSError: it is a file, it or its parent is not writable, or the parent is missing.
            ValueError: it holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"out: {str(self.path)!r} is a file, wanted a folder")
        if self.path.is_dir() and not (self.path / _JOB).is_file():
            others = [name for name in sorted(os.listdir(self.path)) if not self._ours(name)]
            if others:
                raise ValueError(
                    f"out: {str(self.path)!r} holds {others[0]!r} and no job; wanted a new or an empty folder"
                )
        if self.path.is_dir():
            check_inside("out", self.path)
        else:
            check_folder("out", str(self.path), self.path.parent)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and keeps other processes from writing to it. A killed process lets go.

        Raises:
            ValueError: another process is at work.
        """
        made = not self.path.is_dir()
        self.path.mkdir(exist_ok=True)
        descriptor = self._lock()
        try:
            yield
        finally:
            self._sweep()
            (self.path / _LOCK).unlink(missing_ok=True)
            os.close(descriptor)
            if made and not os.listdir(self.path):  # nothing was begun
                self.path.rmdir()

    def _lock(self) -> int:
        """The descriptor of the lock's file, which is locked until it is closed."""
        file = self.path / _LOCK
        while True:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise ValueError(f"out: another process is writing to {str(self.path)!r}") from None
            # Whoever held it before may have removed the file that was opened.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == file.stat().st_ino:
                    return descriptor
            os.close(descriptor)

    def begin(self, plan: Plan) -> None:
        """Writes down the job, or finds that it is the one that is here already.

        Raises:
            ValueError: the folder belongs to another job; the message says what differs.
        """
        self._sweep()
        file = self.path / _JOB
        if file.is_file():
            written = read_json(file)
            try:
                differs = difference(written["identity"], plan.identity())
            except (KeyError, TypeError):
                raise ValueError(f"{file} is not a job's file") from None
            if differs is not None:
                raise ValueError(
                    f"out: {str(self.path)!r} holds another job: {differs}; "
                    "go on with what it was, or name a new folder"
                )
            return
        content = {
            "about": "The job whose vectors lie beside this file; the same command goes on with it.",
            "identity": plan.identity(),
            "rows": plan.rows,
            "shards": len(plan.shards()),
            "inputs": [source.path for source in plan.sources],
            "model": plan.model,
        }
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        self._to_disk()

    def missing(self, plan: Plan) -> list[Shard]:
        """The shards that are still to be done.

        Raises:
            ValueError: a part is there that is not the job's; the message names it.
        """
        return [shard for shard in plan.shards() if not self._is_done(plan, shard)]

    @contextmanager
    def shard(self, shard: Shard) -> Iterator[Path]:
        """A path to write a shard to, which takes its place when the block ends well."""
        with whole_file(self.path / shard.name) as temporary:
            yield temporary
        self._to_disk()

    def _is_done(self, plan: Plan, shard: Shard) -> bool:
        path = self.path / shard.name
        if not path.exists():
            return False
        try:
            about = pq.read_metadata(path)
            if (about.metadata or {}).get(MARK) == plan.mark(shard) and about.num_rows == shard.rows:
                return True
        except (pa.ArrowException, OSError):
            pass
        raise ValueError(f"out: {str(path)!r} is not this job's, or damaged; remove it and it is written again")

    def _sweep(self) -> None:
        """Removes what a process left that was killed while it wrote."""
        for name in os.listdir(self.path):
            if name.startswith(".") and name.endswith(".part"):
                (self.path / name).unlink(missing_ok=True)

    @staticmethod
    def _ours(name: str) -> bool:
        return name == _LOCK or (name.startswith(".") and name.endswith(".part"))

    def _to_disk(self) -> None:
        """The folder's names, too, survive a loss of power."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some file systems cannot
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)
