"""Processes that are forked, or spawned, from one whose threads have worked; what each way finds is printed as JSON.

    python tests/ops/forking.py {os, late, thread, pool, loader, server, forkserver, spawn} ...

A child gives the threads that it added to itself, and whether its states are the parent's to the bit.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

import pyxlbert
from pyxlbert.models import BertConfig, BertModel

THREADS = 3
IDS = torch.arange(1, 385).reshape(6, 64)


def model() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return BertModel(BertConfig(vocab_size=400, **sizes)).eval()


def states(bert: BertModel) -> list[list[float]]:
    """Of our ops; torch runs parallel regions beside them, whose sums depend on the number of threads."""
    torch.linspace(0, 1, 2**18).exp().sum()
    with torch.no_grad():
        return bert(IDS)[0].reshape(-1, 64)[::50].tolist()


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def child(bert: BertModel, wanted: list[list[float]]) -> tuple[int, bool]:
    before = tasks()
    same = states(bert) == wanted
    return tasks() - before, same


def forked(work: Callable[[], Any]) -> Any:
    """What `work` gives in a child of os.fork."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        with os.fdopen(write, "w") as stream:
            json.dump(work(), stream)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return json.loads(text)


class Rows(torch.utils.data.Dataset):
    """A dataset whose items are made by the model, as of a loader that embeds texts."""

    def __init__(self, bert: BertModel, wanted: list[list[float]]) -> None:
        self.bert, self.wanted = bert, wanted

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bool:
        return states(self.bert) == self.wanted


def fresh(wanted: list[list[float]]) -> tuple[int, bool]:
    """In a process that has no model yet."""
    torch.set_num_threads(THREADS)
    return child(model(), wanted)


def ways() -> dict[str, Callable[[BertModel, list[list[float]]], Any]]:
    def os_fork(bert: BertModel, wanted: list[list[float]]) -> Any:
        return forked(lambda: child(bert, wanted))

    def late(bert: BertModel, wanted: list[list[float]]) -> Any:
        """A child whose own children are forked after it has worked, and a parent that works after both."""
        found = forked(lambda: [child(bert, wanted), forked(lambda: child(bert, wanted))])
        return [*found, [THREADS - 1, states(bert) == wanted]]

    def thread(bert: BertModel, wanted: list[list[float]]) -> Any:
        """Another thread than the first forks, after both have worked."""
        found: list[Any] = []

        def fork() -> None:
            torch.set_num_threads(THREADS)
            states(bert)
            found.append(forked(lambda: child(bert, wanted)))

        forker = threading.Thread(target=fork)
        forker.start()
        forker.join()
        return found

    def pool(bert: BertModel, wanted: list[list[float]]) -> Any:
        with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as workers:
            return workers.starmap(child, [(bert, wanted)] * 2, chunksize=1)

    def loader(bert: BertModel, wanted: list[list[float]]) -> Any:
        loader = torch.utils.data.DataLoader(Rows(bert, wanted), num_workers=2, multiprocessing_context="fork")
        # The workers' one thread is torch's rule.
        return [[THREADS - 1, bool(same)] for same in loader]

    def server(bert: BertModel, wanted: list[list[float]]) -> Any:
        """A web server that has warmed its model up before it forks its workers, packed."""
        pyxlbert.pack(bert)
        packed = states(bert)
        return [forked(lambda: child(bert, packed)) for _ in range(2)]

    def elsewhere(way: str) -> Callable[[BertModel, list[list[float]]], Any]:
        def run(bert: BertModel, wanted: list[list[float]]) -> Any:
            context = multiprocessing.get_context(way)
            if way == "forkserver":
                context.set_forkserver_preload(["pyxlbert"])
            with context.Pool(1) as workers:
                return workers.map(fresh, [wanted])

        return run

    found = {"os": os_fork, "late": late, "thread": thread, "pool": pool, "loader": loader, "server": server}
    return found | {way: elsewhere(way) for way in ("forkserver", "spawn")}


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    bert = model()
    wanted = states(bert)
    print(json.dumps({way: ways()[way](bert, wanted) for way in sys.argv[1:]}))
