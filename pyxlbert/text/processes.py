"""Processes that work beside this one: each has its share of the threads, and none outlives its parent."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from types import TracebackType
from typing import Any

import torch

from .batches import BAR_DELAY, check_count

# The most texts that travel to a process at once.
_LARGEST_CHUNK = 5000

# What a process of the pool holds.
_held: Any = None


def check_pool(pool: object) -> None:
    """None, or a pool.

    Raises:
        TypeError: it is something else.
    """
    if pool is not None and not isinstance(pool, ProcessPool):
        raise TypeError(f"pool: got {type(pool).__name__}, wanted what start_multi_process_pool gives")


class ProcessPool:
    """Processes that each hold a copy of an encoder. They start with the first work and end with `close`.

    A program that starts one keeps its own work under ``if __name__ == "__main__":``, since each process imports the
    program's main module.

    Args:
        encoder: what is copied: a `SentenceEncoder` or a `CrossEncoder`.
        devices: one a process, "cpu" or "cuda:0", say.

    Raises:
        TypeError: `devices` is not several names.
        ValueError: there is none, or one is not a device.
    """

    def __init__(self, encoder: Any, devices: Sequence[str]) -> None:
        if isinstance(devices, str) or not all(isinstance(one, (str, torch.device)) for one in devices):
            raise TypeError(f"target_devices: got {devices!r}, wanted a list such as ['cpu', 'cpu']")
        if not devices:
            raise ValueError("target_devices: got none, wanted a device for each process")
        for device in devices:
            try:
                torch.device(device)
            except RuntimeError as error:
                raise ValueError(f"target_devices: got {device!r}: {str(error).splitlines()[0]}") from None
        context = multiprocessing.get_context("spawn")
        names = context.SimpleQueue()
        for device in devices:
            names.put(str(device))
        self.size = len(devices)
        # By value: a tensor that is shared with other processes is not packed.
        content = pickle.dumps(encoder)
        self._executor = ProcessPoolExecutor(
            self.size, context, _take_up, (content, names, share_of_threads(self.size))
        )

    def run(
        self, method: str, items: list[Any], chunk_size: int | None, show_progress: bool | None, options: dict[str, Any]
    ) -> list[Any]:
        """Calls a method of the encoder on the items in chunks.

        Args:
            method: takes a list of items first.
            items: what is to be done; not empty.
            chunk_size: items a call; None takes a tenth of a process's share, at most 5,000.
            show_progress: a bar; None shows it on a terminal when the work takes long.
            options: the method's other arguments, by name.

        Returns:
            What each chunk gave, in order.

        Raises:
            RuntimeError: a process died, or the pool is closed.
        """
        from tqdm import tqdm

        if chunk_size is None:
            chunk_size = max(1, min(math.ceil(len(items) / self.size / 10), _LARGEST_CHUNK))
        check_count("chunk_size", chunk_size)
        chunks = [items[start : start + chunk_size] for start in range(0, len(items), chunk_size)]
        bar = tqdm(
            total=len(items),
            unit="text",
            delay=BAR_DELAY if show_progress is None else 0,
            disable=True if show_progress is False else None if show_progress is None else False,
        )
        futures: list[Future[Any]] = []
        try:
            with bar:
                futures.extend(self._executor.submit(_call, method, chunk, options) for chunk in chunks)
                results = []
                for chunk, future in zip(chunks, futures, strict=True):
                    results.append(future.result())
                    bar.update(len(chunk))
            return results
        except BrokenProcessPool:
            raise RuntimeError("pool: a process died (was it killed, or out of memory?); start another pool") from None
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Ends the processes; what is being done is finished first."""
        self._executor.shutdown(cancel_futures=True)

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def default_devices() -> list[str]:
    """Each CUDA device, or else the CPU as often as there are threads, at most four times."""
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu"] * min(4, torch.get_num_threads())


def share_of_threads(processes: int) -> int:
    """Of this process's threads, those of each of several processes; at least one."""
    return max(1, torch.get_num_threads() // processes)


def take_threads(threads: int) -> None:
    """Lets this process use so many threads, before it tokenizes for the first time."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer's
    torch.set_num_threads(threads)


def begin(threads: int) -> None:
    """What a process does first: it takes its share of threads, and goes when its parent has gone.

    An interrupt from the terminal reaches all processes; the parent alone decides what happens then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    take_threads(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(parent: int) -> None:
    connection.wait([parent])
    os._exit(1)


def _take_up(content: bytes, devices: Any, threads: int) -> None:
    global _held
    begin(threads)
    _held = pickle.loads(content)
    device = devices.get()
    if device != "cpu":
        _held.model.to(device)


def _call(method: str, items: list[Any], options: dict[str, Any]) -> Any:
    return getattr(_held, method)(items, show_progress=False, **options)
