"""Random calls of the ops on backend "cpu": shapes, strides, dtypes, masks and levels that nobody has written down.

    python tests/fuzz/ops.py --calls 2000                     # of all ops together, the same ones each time
    python tests/fuzz/ops.py attention --calls 5000 --seed 3  # others, of one

What holds for each call, forward and backward:

- results and gradients are within the error budget of the suite, beside float64;
- all inputs and results lie between pages that may not be touched, in memory that is full of NaN;
- the same bits come on another number of threads, after other calls, in other memory;
- a sequence (a row) alone gives the bits that it gives in its batch;
- NaN in keys and values that no query may see changes no bit.

A failure prints the smallest call that fails.  A crash ends the process: the call stands in `build/fuzz/last-call`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # where PYTHONSAFEPATH leaves it out
import torch
from drawn import CALLS, Drawn
from hypothesis import HealthCheck, Phase, given, seed, settings
from pages import guarded, guarded_results
from torch import Tensor

from pyxlbert.testing import compare, runners, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, Case, Spec, as_tuple, to_float64

FOUND = Path(__file__).parents[2] / "build" / "fuzz"
# hypothesis remembers what it has tried; a round begins anew.
ROUND = 500


class Tried(NamedTuple):
    """A drawn call and its arguments."""

    spec: Spec
    drawn: Drawn
    arguments: Arguments

    def run(self, arguments: Arguments, function: Any = None) -> runners.Results:
        """Results and gradients, as `runners.run` names them."""
        call = function or (lambda **a: self.spec.function(**a, backend="cpu"))
        return runners.run(call, self.spec, arguments, self.drawn.gradients)

    def same(self, what: str, one: runners.Results, other: runners.Results) -> None:
        for name, value in one.items():
            compare.same_bits(f"{what}: {name}", value, other[name])


def check(op: str, drawn: Drawn) -> None:
    """One call.

    Raises:
        AssertionError: something does not hold.
    """
    spec = SPECS[op]
    generator = torch.Generator().manual_seed(drawn.seed)
    arguments = spec.arguments(Case("drawn", drawn.inputs), generator, drawn.dtype, runners.CPU)
    call = Tried(spec, drawn, arguments)
    torch.set_num_threads(drawn.threads)
    with runners.running(f"cpu/{drawn.level}"):
        own = {n: guarded(x, drawn.at_end) if isinstance(x, Tensor) else x for n, x in arguments.items()}
        with guarded_results(drawn.at_end):
            ours = call.run(own)
        ours = {name: x.clone() for name, x in ours.items()}
        check_numbers(call, ours)
        if not spec.vendor:
            torch.set_num_threads(3 - drawn.threads)
        call.same("again", ours, call.run(arguments))
        if not spec.vendor:
            check_alone(call, ours)
        check_unseen(call, ours)


def check_numbers(call: Tried, ours: runners.Results) -> None:
    """Beside plain PyTorch and float64."""
    spec, drawn, wide = call.spec, call.drawn, to_float64(call.arguments)
    plain = call.run(call.arguments, spec.plain)
    outputs = tuple(plain[name] for name in plain if name.startswith("out"))
    cotangents = runners.cotangents_of(outputs)
    truth = runners.run(spec.plain, spec, wide, drawn.gradients, cotangents)
    for name, value in ours.items():
        compare.within_budget(
            name,
            value,
            plain[name].to(value.dtype) if name.startswith("out") else plain[name],
            truth[name],
            terms=spec.terms(name, wide, cotangents) if spec.terms is not None else None,
            factor=tolerances.factor(spec.name, drawn.dtype, "cpu"),
        )


# The arguments whose first dimension is the batch, or 1.
_BY_SEQUENCE = (
    *("query", "key", "value", "content_query", "query_query", "x", "residual", "key_lengths", "attention_mask"),
    *("query_segments", "key_segments", "query_positions", "target_positions", "query_rank", "key_rank"),
)


def check_alone(call: Tried, ours: runners.Results) -> None:
    """One sequence of a padded batch: forward, since gradients of what sequences share are sums over them."""
    arguments, drawn = call.arguments, call.drawn
    first = next((arguments[n] for n in ("query", "content_query", "x") if n in arguments), None)
    batched = first is not None and first.dim() > 1 and first.shape[0] > 1 and arguments.get("cu_seqlens") is None
    if not batched or arguments.get("dropout_p"):  # which weights are dropped follows the place in the batch
        return
    batch = first.shape[0]
    b = drawn.seed % batch
    alone = {}
    for name, x in arguments.items():
        scores = name == "bias" and isinstance(x, Tensor) and x.dim() == 4
        if isinstance(x, Tensor) and (name in _BY_SEQUENCE or scores) and x.shape[0] == batch:
            x = x[b : b + 1]
        if name == "position_key" and x.dim() == 4:
            table = b * x.shape[0] // batch
            x = x[table : table + 1]
        alone[name] = x
    with torch.no_grad():
        found = as_tuple(call.spec.function(**alone, backend="cpu"))
    for place, x in enumerate(found):
        compare.same_bits(f"alone: out {place}", x, ours[f"out {place}"][b : b + 1])


def check_unseen(call: Tried, ours: runners.Results) -> None:
    """NaN where no query looks."""
    arguments = call.arguments
    key = arguments.get("key")
    if key is None or key.dim() != 4 or arguments.get("masked_rows") == "uniform":
        return
    place = torch.arange(key.shape[1])
    unseen = torch.zeros(key.shape[:2], dtype=torch.bool)
    if arguments.get("key_lengths") is not None:
        unseen |= place >= arguments["key_lengths"][:, None]
    mask = arguments.get("attention_mask")
    if mask is not None:
        hidden = ~mask.any(2).any(1).expand(key.shape[:2])
        queries = arguments["query"] if "query" in arguments else arguments["content_query"]
        if arguments.get("see_self") or "content_query" in arguments:
            hidden = hidden & (place < key.shape[1] - queries.shape[1])
        unseen |= hidden
    if not unseen.any():
        return
    poisoned = {n: arguments[n].masked_fill(unseen[..., None, None], float("nan")) for n in ("key", "value")}
    call.same("NaN that nobody sees", ours, call.run(arguments | poisoned))


def search(op: str, calls: int, number: int) -> None:
    """So many calls of one op; raises for the smallest that fails."""
    FOUND.mkdir(parents=True, exist_ok=True)
    with (FOUND / "last-call").open("wb") as last:

        @seed(number)
        @settings(
            max_examples=calls,
            deadline=None,
            database=None,
            print_blob=True,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(CALLS[op])
        def run(drawn: Drawn) -> None:
            os.truncate(last.fileno(), 0)
            os.pwrite(last.fileno(), f"check({op!r}, {drawn})\n".encode(), 0)
            check(op, drawn)

        run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(CALLS)}; all")
    parser.add_argument("--calls", type=int, default=2000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = set(options.ops) - CALLS.keys()
    if unknown:
        parser.error(f"ops: got {', '.join(sorted(unknown))}, wanted some of {', '.join(CALLS)}")
    ops, begun = options.ops or list(CALLS), time.monotonic()
    each = -(-options.calls // len(ops))
    for op in ops:
        for place, done in enumerate(range(0, each, ROUND)):
            search(op, min(ROUND, each - done), options.seed * 10**6 + place)
    print(f"{each * len(ops)} calls of {len(ops)} ops in {time.monotonic() - begun:.0f} s, none wrong", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
