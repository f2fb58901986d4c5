"""The shards of a job on a Ray cluster, by Ray Data: a pool of actors, each of which holds the model.

Inputs, model and output folder are paths that every node sees. A shard whose actor dies is given to another one; since
shards appear whole or not at all, and always with the same rows and bits, none is lost or written twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from pyxlbert.text.processes import share_of_threads, take_threads

from .plan import Plan, Shard
from .shards import ShardWriter


def run(plan: Plan, out: Path, shards: Sequence[Shard], count: int, seen: Callable[[int], None]) -> None:
    """Writes the shards by `count` actors.

    A cluster is joined if RAY_ADDRESS names one or the program has joined one; otherwise one is started here for the
    time of the job.

    Raises:
        ImportError: Ray is not installed.
        ValueError: the cluster has too few CPUs, or what a shard raises.
    """
    ray = load()
    threads = share_of_threads(count)
    with _joined(ray, count * threads):
        cpus = ray.cluster_resources().get("CPU", 0)
        if cpus < count * threads:
            raise ValueError(
                f"processes: got {count} of {threads} threads each, but the Ray cluster has {cpus:g} CPUs; "
                "wanted fewer processes or threads"
            )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        data = ray.data.from_items([{"shard": astuple(shard)} for shard in shards], override_num_blocks=len(shards))
        data = data.map_batches(
            _Actor,
            fn_constructor_args=(plan, str(out), threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(count, len(shards))),
            num_cpus=threads,
        )
        try:
            for row in data.iter_rows():
                seen(int(row["rows"]))
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None


def load() -> Any:
    """The library.

    Raises:
        ImportError: it is not installed.
    """
    # Nobody is told that it is used.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        message = f"engine 'ray' needs Ray, which cannot be imported ({error}); pip install 'pyxlbert[ray]'"
        raise ImportError(message) from None
    return ray


class _Actor:
    """What Ray Data keeps in each process of its pool."""

    def __init__(self, plan: Plan, out: str, threads: int) -> None:
        take_threads(threads)
        self._writer = ShardWriter(plan, Path(out))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        numbers = [[int(number) for number in one] for one in batch["shard"]]
        rows = [self._writer.write(Shard(*one), lambda _: None) for one in numbers]
        return {"rows": np.array(rows, dtype=np.int64)}


@contextlib.contextmanager
def _joined(ray: Any, cpus: int) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    own: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        own = {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False}
        own["_node_ip_address"] = "127.0.0.1"  # nobody else is to reach it
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **own)
    except Exception as error:  # Ray raises bare Exception where a node does not come up in time
        raise RuntimeError(f"the Ray cluster cannot be started or joined: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _cause(error: BaseException) -> BaseException:
    """What the shard itself raised, beneath Ray's wrappings."""
    found: BaseException = error
    while (inner := getattr(found, "cause", None) or found.__cause__) is not None and inner is not found:
        found = inner
    return found
