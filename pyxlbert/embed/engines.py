"""Who writes the shards: this process, or several of this machine. A Ray cluster is in `ray_engine`."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from pyxlbert.text.processes import begin, share_of_threads

from .plan import Plan, Shard
from .shards import ShardWriter

Seen = Callable[[int], None]

# How often the bar moves, in seconds.
_GLANCE = 0.2

# Of a process that writes shards.
_writer: ShardWriter | None = None
_rows: Any = None


def here(writer: ShardWriter, shards: Sequence[Shard], seen: Seen) -> None:
    """One shard after the other, in this process."""
    for shard in shards:
        writer.write(shard, seen)


def processes(plan: Plan, out: Path, shards: Sequence[Shard], count: int, seen: Seen) -> None:
    """Several processes, each with its share of the threads; each takes the next shard when it has done one.

    Raises:
        RuntimeError: a process died.
    """
    context = multiprocessing.get_context("spawn")
    rows = context.Queue()
    executor = ProcessPoolExecutor(count, context, _take_up, (plan, out, rows, share_of_threads(count)))
    try:
        waiting = {executor.submit(_write, shard) for shard in shards}
        while waiting:
            done, waiting = wait(waiting, timeout=_GLANCE, return_when=FIRST_EXCEPTION)
            _tell(rows, seen)
            for future in done:
                future.result()
        _tell(rows, seen)
    except BrokenProcessPool:
        raise RuntimeError(
            "a process died (was it killed, or out of memory?); shards that were written are kept, "
            "and the same command goes on"
        ) from None
    finally:
        # Whatever is not finished is not waited for: it is written anew.
        children = list((getattr(executor, "_processes", None) or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.terminate()
        for child in children:
            child.join()
        rows.close()
        rows.cancel_join_thread()


def _tell(rows: Any, seen: Seen) -> None:
    while True:
        try:
            seen(rows.get_nowait())
        except queue.Empty:
            return


def _take_up(plan: Plan, out: Path, rows: Any, threads: int) -> None:
    global _writer, _rows
    begin(threads)
    _writer, _rows = ShardWriter(plan, out), rows


def _write(shard: Shard) -> int:
    if _writer is None:
        raise RuntimeError("the process has not begun")
    return _writer.write(shard, _rows.put)
