"""Random calls of the ops on backend "cpu": shapes, strides, dtypes, masks and levels that nobody has written down.

    python tests/fuzz/ops.py --calls 2000                     # of all ops together, the same ones each time
    python tests/fuzz/ops.py attention --calls 5000 --seed 3  # others, of one

What holds for each call, forward and backward:

- results and gradients are within the error budget of the suite, beside float64;
- all inputs and results lie between pages that may not be touched, in memory that is full of NaN;
- nothing that is given is written to;
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
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # where PYTHONSAFEPATH leaves it out
if __name__ == "__main__":
    # Before its runtime is loaded: a second thread that waits by spinning takes as much time as the first one works.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch
from drawn import CALLS, LEVELS, Drawn
from hypothesis import HealthCheck, Phase, given, seed, settings
from pages import guarded, guarded_results
from torch import Tensor

from pyxlbert.testing import compare, runners, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, Case, as_tuple

FOUND = Path(__file__).parents[2] / "build" / "fuzz"
# hypothesis remembers what it has tried; a round begins anew.
ROUND = 500


class Tried:
    """A drawn call, its arguments, and what is right.

    Attributes:
        arguments: of the call.
        apart: the same in memory of their own, between pages that may not be touched.
        plain, truth: results and gradients of plain PyTorch, in the call's dtype and in float64.
    """

    def __init__(self, op: str, drawn: Drawn) -> None:
        # On two threads these small tensors take several times as long.
        torch.set_num_threads(1)
        self.spec, self.drawn = SPECS[op], drawn
        generator = torch.Generator().manual_seed(drawn.seed)
        self.arguments = self.spec.arguments(Case("drawn", drawn.inputs), generator, drawn.dtype, runners.CPU)
        tensors = {n: x for n, x in self.arguments.items() if isinstance(x, Tensor)}
        self.apart = self.arguments | {n: guarded(x, drawn.at_end) for n, x in tensors.items()}
        self.plain = runners.run(self.spec.plain, self.spec, self.arguments, drawn.gradients)
        self.wide = self.spec.in_float64(self.arguments)
        # Of plain PyTorch's outputs, in their dtypes.
        self.cotangents = runners.cotangents_of(tuple(x for name, x in self.plain.items() if name.startswith("out")))
        self.truth = runners.run(self.spec.plain, self.spec, self.wide, drawn.gradients, self.cotangents)
        self._peers: dict[str, compare.Peer] = {}
        self._terms: dict[str, Tensor | float | None] = {}

    def run(self, arguments: Arguments) -> runners.Results:
        """Results and gradients, as `runners.run` names them."""
        function = self.spec.function
        return runners.run(
            lambda **a: function(**a, backend="cpu"), self.spec, arguments, self.drawn.gradients, self.cotangents
        )

    def guarded(self) -> runners.Results:
        """In memory of its own, between pages that may not be touched."""
        with guarded_results(self.drawn.at_end):
            found = self.run(self.apart)
        return {name: x.clone() for name, x in found.items()}

    def peer(self, name: str, ours: Tensor) -> compare.Peer:
        """Plain PyTorch's error, measured once for all levels; of an output in the dtype of ours."""
        if name not in self._peers:
            plain = self.plain[name].to(ours.dtype) if name.startswith("out") else self.plain[name]
            self._peers[name] = compare.Peer.of(plain, self.truth[name])
        return self._peers[name]

    def terms(self, name: str) -> Tensor | float | None:
        """The sums of absolute terms of a result, once for all levels."""
        if name not in self._terms:
            terms = self.spec.terms
            self._terms[name] = None if terms is None else terms(name, self.wide, self.cotangents)
        return self._terms[name]

    def same(self, what: str, one: runners.Results, other: runners.Results) -> None:
        for name, value in one.items():
            compare.same_bits(f"{what}: {name}", value, other[name])


def check(op: str, drawn: Drawn) -> None:
    """One call, on every level that is here.

    Raises:
        AssertionError: something does not hold.
    """
    call = Tried(op, drawn)
    for level in LEVELS:
        try:
            with runners.running(f"cpu/{level}"):
                check_level(call)
        except AssertionError as error:
            raise AssertionError(f"level {level}: {error}") from error
    for name, x in call.apart.items():
        if isinstance(x, Tensor):
            compare.same_bits(f"{name} after the call", x.detach(), call.arguments[name].detach())


def check_level(call: Tried) -> None:
    """All that is asked of a call, on the level that is active."""
    spec, drawn = call.spec, call.drawn
    torch.set_num_threads(drawn.threads)
    ours = call.guarded()
    if spec.vendor:  # whose bits follow the number of threads, and where in 64 bytes a tensor begins
        again = call.guarded()
    else:
        torch.set_num_threads(3 - drawn.threads)
        again = call.run(call.arguments)
    call.same("again", ours, again)
    torch.set_num_threads(drawn.threads if spec.vendor else 1)
    check_numbers(call, ours)
    if not spec.vendor:
        check_alone(call, ours)
    check_unseen(call, ours)


def check_numbers(call: Tried, ours: runners.Results) -> None:
    """Beside plain PyTorch and float64."""
    factor = tolerances.factor(call.spec.name, call.drawn.dtype, "cpu")
    for name, value in ours.items():
        peer = call.peer(name, value)
        if not peer.clearly(value, factor):
            compare.within_budget(name, value, peer.plain, peer.truth, terms=call.terms(name), factor=factor)


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
    drawn = -(-each // len(LEVELS))
    wrong = 0
    # The ops in turn, so that a run that is ended early has tried all of them.
    for place, done in enumerate(range(0, drawn, ROUND)):
        more = min(ROUND, drawn - done)
        for op in ops:
            try:
                search(op, more, options.seed * 10**6 + place)
            except Exception:  # the others are asked all the same
                wrong += 1
                traceback.print_exc()
        said = f"{wrong} rounds of an op with a wrong one" if wrong else "none wrong"
        print(
            f"{(done + more) * len(LEVELS) * len(ops)} calls of {len(ops)} ops, each on levels {', '.join(LEVELS)}, "
            f"in {time.monotonic() - begun:.0f} s, {said}",
            flush=True,
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
