"""What two-stream attention races against: the calls of `relative_attention` that it stands for.

Two calls of ours, the second with the M rows of the query stream; and with T rows, to which `transformers` spreads the
M.
"""

from __future__ import annotations

import torch
from pyxlbert.bench.opponents import Call, Opponents, Peer

import pyxlbert
from pyxlbert.testing.specs._spec import Arguments, Case
from pyxlbert.testing.specs.two_stream_attention import plain, streams


def _two_calls(a: Arguments) -> Call:
    content, query = streams(a)
    # Only dropout asks which stream it is.
    del query["tag"]

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return pyxlbert.relative_attention(**content), pyxlbert.relative_attention(**query)

    return call


def _every_row(a: Arguments) -> Arguments:
    rest = {name: value for name, value in a.items() if name != "target_positions"}
    return rest | {"query_query": torch.zeros_like(a["content_query"])}


def _plain(a: Arguments) -> Call:
    return lambda: plain(**a)


def opponents(case: Case) -> Opponents:
    """See `Opponents`."""
    peers = {
        "pyxlbert, two calls": Peer(_two_calls),
        "pyxlbert, T rows": Peer(_two_calls, _every_row, _plain),
    }
    return Opponents(_plain, peers)
