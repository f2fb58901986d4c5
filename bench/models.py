"""Races of whole models with random weights: BERT-base against transformers, torch.compile, ONNX Runtime and OpenVINO,
XLNet-base against transformers, and `accelerate` (`conformer.py`)."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyxlbert.bench import conformer, limits, memory, peers
from pyxlbert.bench.contest import Check, Settings, contest, lazily, reason_of
from pyxlbert.bench.report import Row, Work
from pyxlbert.bench.sizes import SIZES, XLNET, xlnet_fields
from pyxlbert.bench.timer import Contestants, Timing, race

import pyxlbert
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs._spec import as_tuple


@dataclass(frozen=True)
class ModelRace:
    """One shape of one dtype.

    Attributes:
        batch, length: of the padded input.
        dtype: of the parameters.
        fill: share of the positions that hold a token; below 1, ours computes fewer rows.
        size: of the model, a name of SIZES.
        quantised: ours multiplies in eight-bit integers, beside the peers and ourselves in `dtype`.
    """

    batch: int
    length: int
    dtype: torch.dtype
    fill: float = 1.0
    size: str = "BERT-base"
    quantised: bool = False
    rounds: int = 7

    def __str__(self) -> str:
        return f"{self.subject} {self.case} {self.dtype}"

    @property
    def subject(self) -> str:
        return self.size + (" int8" if self.quantised else "")

    @property
    def case(self) -> str:
        return f"{self.batch}x{self.length}" + (f" {self.fill:.0%} full" if self.fill < 1 else "")

    def ours(self) -> peers.Call:
        """Our model alone."""
        hf, inputs = self._original()
        return self._ours(hf, inputs, self.quantised)

    def run(self, settings: Settings = Settings()) -> Row:  # noqa: B008, it is frozen
        """Builds every contestant from the same weights, compares outputs with float32 transformers, then times."""
        hf, inputs = self._original()
        with torch.inference_mode():
            truth = hf(**inputs).last_hidden_state.clone()
        real = inputs["attention_mask"].bool()
        checked = Checked(truth, real, self.dtype, self.quantised)
        # Each is built when it is first called: if that fails, it is that contestant's failure.
        calls = {name: lazily(build) for name, build in self.builds(hf, inputs).items()}
        found = contested(calls, checked, self.rounds, settings)
        note = checked.note()
        if self.fill < 1:
            note = f"{float(real.float().mean()):.0%} full: ours computes fewer rows, less work; {note}"
        pairs = int(real.sum(1).square().sum())
        size = SIZES[self.size]
        products = int(real.sum()) * size.hidden * (4 * size.hidden + 2 * size.inner)
        flops = 2 * size.layers * (products + 2 * pairs * size.hidden)
        dtype = "int8" if self.quantised else str(self.dtype).removeprefix("torch.")
        limit = None if self.quantised else flops / limits.gemm_rate(self.dtype)
        peaks = measured(found[0], settings, alone, self)
        work = Work(flops, None, self.length)
        return Row(self.subject, self.case, dtype, found[0], limit, note, found[1], peaks, work)

    def builds(self, hf: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, Callable[[], peers.Call]]:
        """What makes each contestant's call."""

        def built(build: Callable[..., peers.Call]) -> Callable[[], peers.Call]:
            return lambda: build(copy.deepcopy(hf).to(self.dtype), inputs, self.dtype)

        ours = lazily(lambda: self._ours(hf, inputs, self.quantised))
        found: dict[str, Callable[[], peers.Call]] = {"pyxlbert": lambda: ours}
        if torch.get_num_threads() > 1 and self.fill == 1.0:
            found["pyxlbert, one thread"] = lambda: in_one_thread(ours)
        if not self.quantised:
            return found | {name: built(build) for name, build in peers.PEERS.items()}
        found["pyxlbert unquantised"] = lambda: self._ours(hf, inputs, False)
        found["ONNX Runtime int8"] = lambda: peers.onnx_runtime(hf, inputs, torch.float32, True)
        # Its ranges are of the very inputs: nobody's calibration is closer.
        integers = partial(peers.openvino, calibration=[inputs])
        return found | {"OpenVINO": built(peers.openvino), "OpenVINO int8": built(integers)}

    def _original(self) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        size = SIZES[self.size]
        config = BertConfig(
            num_hidden_layers=size.layers,
            hidden_size=size.hidden,
            intermediate_size=size.inner,
            num_attention_heads=12,
            max_position_embeddings=max(512, self.length),
        )
        hf = BertModel(config, add_pooling_layer=False).eval()
        lengths = torch.linspace(max(1, self.length * (2 * self.fill - 1)), self.length, self.batch).round().long()
        return hf, {
            "input_ids": torch.randint(1000, 30000, (self.batch, self.length)),
            "attention_mask": (torch.arange(self.length)[None] < lengths[:, None]).long(),
        }

    def _ours(self, hf: torch.nn.Module, inputs: dict[str, torch.Tensor], quantised: bool) -> peers.Call:
        from pyxlbert.models import BertModel

        with tempfile.TemporaryDirectory() as folder:
            hf.save_pretrained(folder)
            model = BertModel.from_pretrained(folder, add_pooling_layer=False).to(self.dtype).eval()
        pyxlbert.pack(model, "int8" if quantised else None)

        def call() -> torch.Tensor:
            with torch.inference_mode():
                return model(**inputs).last_hidden_state

        return call


def in_one_thread(call: peers.Call) -> peers.Call:
    """The call with one thread of this process: what the others are worth."""

    def run() -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return run


@dataclass(frozen=True)
class XLNetRace:
    """XLNet-base of one shape, every position real, no memories, beside our BERT-base of the same shape."""

    batch: int
    length: int
    dtype: torch.dtype
    rounds: int = 5

    def __str__(self) -> str:
        return f"XLNet-base {self.batch}x{self.length} {self.dtype}"

    def run(self, settings: Settings = Settings()) -> Row:  # noqa: B008, it is frozen
        """Compares outputs with float32 `transformers`, then times."""
        hf, model = _xlnets(XLNET.layers)
        hf, model = hf.eval(), model.to(self.dtype).eval()
        ids = torch.randint(1000, 30000, (self.batch, self.length))
        pyxlbert.pack(model)

        def call(module: torch.nn.Module) -> peers.Call:
            def run() -> torch.Tensor:
                with torch.inference_mode():
                    return module(ids, use_mems=False).last_hidden_state

            return run

        truth, ours = call(hf)(), call(model)
        hf = hf.to(self.dtype)
        bert = ModelRace(self.batch, self.length, self.dtype).ours()
        contestants = {"pyxlbert": ours, "transformers": call(hf), "pyxlbert BERT-base": bert}
        # The last is another model, checked in its own race.
        checked = Checked(truth, None, self.dtype, others=("pyxlbert BERT-base",))
        rows = self.batch * self.length
        layers, e, f = XLNET
        products = rows * (4 * e * e + 2 * e * f) + 2 * self.length * e * e
        flops = 2 * layers * (products + 3 * rows * self.length * e)
        dtype = str(self.dtype).removeprefix("torch.")
        limit = flops / limits.gemm_rate(self.dtype)
        timings, failed = contested(contestants, checked, self.rounds, settings)
        work = Work(flops, None, self.length)
        case = f"{self.batch}x{self.length}"
        return Row("XLNet-base", case, dtype, timings, limit, checked.note(), failed, work=work)


@dataclass(frozen=True)
class XLNetStepRace:
    """Forward and backward of three layers of XLNet-base with both streams under a permutation, M = T / 6 targets.

    Every contestant gets the same dense `perm_mask` and one-hot `target_mapping`, "pyxlbert, ranks" the permutation and
    the targets themselves.  In bfloat16 the peer runs under autocast, since in pure bfloat16 its query stream raises.
    """

    batch: int
    length: int
    dtype: torch.dtype
    layers: int = 3
    rounds: int = 5

    def __str__(self) -> str:
        return f"XLNet-base {self.case} {self.dtype}"

    @property
    def case(self) -> str:
        return f"training step {self.batch}x{self.length} {self.layers} layers"

    def run(self, settings: Settings = Settings()) -> Row:  # noqa: B008, it is frozen
        """Compares outputs and gradients with float32 `transformers`, then times."""
        b, t, m = self.batch, self.length, self.length // 6
        hf, model = _xlnets(self.layers)
        ids = torch.randint(1000, 30000, (b, t))
        rank = torch.stack([torch.randperm(t) for _ in range(b)]).int()
        positions = rank.argsort(1)[:, t - m :].sort(1).values
        dense = {
            "perm_mask": (rank[:, :, None] <= rank[:, None, :]).float(),
            "target_mapping": torch.nn.functional.one_hot(positions, t).float(),
        }
        ranks = {"query_rank": rank, "key_rank": rank, "target_positions": positions}
        cotangent = torch.randn(b, m, XLNET.hidden)

        def call(module: torch.nn.Module, permutation: dict[str, torch.Tensor], autocast: bool) -> peers.Call:
            parameters = list(module.parameters())

            def run() -> tuple[torch.Tensor, ...]:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    out = module(ids, use_mems=False, **permutation).last_hidden_state
                gradients = torch.autograd.grad(out, parameters, cotangent.to(out.dtype), allow_unused=True)
                return out.detach(), next(g for g in gradients if g is not None)

            return run

        low = self.dtype is not torch.float32
        truth = call(hf, dense, False)()
        contestants = {"pyxlbert": call(copy.deepcopy(model).to(self.dtype), dense, False)}
        contestants["pyxlbert, ranks"] = call(copy.deepcopy(model).to(self.dtype), ranks, False)
        if low:
            contestants["pyxlbert, autocast"] = call(model, dense, True)
        contestants["transformers, autocast" if low else "transformers"] = call(hf, dense, low)
        checked = Checked(truth, None, self.dtype)
        found = contested(contestants, checked, self.rounds, settings)
        # Of the last layer only the query stream is wanted.
        rows = [b * (t + m)] * (self.layers - 1) + [b * m]
        # Query and output of the rows, key and value of T, the table; the two feed-forward products.
        e, f = XLNET.hidden, XLNET.inner
        products = sum(e * e * (2 * n + 2 * b * t + 2 * t) + n * 2 * e * f for n in rows)
        # Attention: three products forward, eight backward.
        flops = 2 * (3 * products + 11 * sum(rows) * t * e)
        dtype = str(self.dtype).removeprefix("torch.")
        limit, work = flops / limits.gemm_rate(self.dtype), Work(flops, None, t)
        return Row("XLNet-base", self.case, dtype, found[0], limit, checked.note(), found[1], work=work)


def _xlnets(layers: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """`transformers`' XLNet-base without dropout, and ours with its weights; both in training mode."""
    from transformers import XLNetConfig
    from transformers import XLNetModel as Original

    from pyxlbert.models import XLNetModel

    torch.manual_seed(0)
    hf = Original(XLNetConfig(**xlnet_fields(layers), dropout=0.0)).train()
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        return hf, XLNetModel.from_pretrained(folder).train()


class Checked:
    """The check of a model's output, or of outputs that come together; remembers each contestant's largest error.

    Args:
        truth: of float32 `transformers`, one or several.
        real: where a token is, in the first two dimensions; None: everywhere.
        dtype: of the race.
        quantised: contestants multiply in eight-bit integers.
        others: contestants that compute something else, and are not compared.
    """

    def __init__(
        self,
        truth: torch.Tensor | tuple[torch.Tensor, ...],
        real: torch.Tensor | None,
        dtype: torch.dtype,
        quantised: bool = False,
        others: tuple[str, ...] = (),
    ) -> None:
        self._truth, self._real, self._dtype = as_tuple(truth), real, dtype
        self._quantised, self._others = quantised, others
        self.errors: dict[str, float] = {}

    def __call__(self, name: str, output: Any) -> None:
        """See `contest`: ours in float32 is held to what rounding allows, others to being near."""
        if name in self._others:
            return
        for place, (found, truth) in enumerate(zip(as_tuple(output), self._truth, strict=True)):
            a, t = (found, truth) if self._real is None else (found[self._real], truth[self._real])
            if place == 0:
                self.errors[name] = float((a.float() - t).abs().max())
            exact = name.startswith("pyxlbert") and self._dtype is torch.float32 and not self._quantised
            if exact:
                limit = tolerances.MODEL_GRADIENT_FLOAT32 if place else tolerances.MODEL_FLOAT32
            elif self._quantised:
                limit = tolerances.CONTESTANT_INT8
            else:
                limit = tolerances.CONTESTANT[self._dtype]
            compare.close(f"{name} {place}" if place else name, a, t, limit)

    def note(self) -> str:
        """The errors in words."""
        return "largest error " + ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())


def contested(
    calls: dict[str, peers.Call], check: Check, rounds: int, settings: Settings
) -> tuple[dict[str, Timing], dict[str, str]]:
    """`contest` of models, with a rest before each."""
    rest = peers.REST if settings.rest is None else settings.rest

    def timer(copies: list[Contestants]) -> dict[str, Timing]:
        return race(copies[0], rounds=settings.rounds or rounds, rest=rest)

    wanted = {name: call for name, call in calls.items() if settings.wants(name)}
    return contest([wanted], check, timer)


def measured(
    timings: dict[str, Timing], settings: Settings, make: Callable[..., memory.Alone], race: Any
) -> dict[str, int]:
    """Peaks of those that were timed, where the command asks for them."""
    peaks = {}
    for name in timings if settings.memory else ():
        try:
            peak = memory.measure(make, race, name)
        except RuntimeError as error:
            print(f"NO MEMORY MEASURED: {race}: {name}: {reason_of(error)}", file=sys.stderr)
        else:
            peaks |= {} if peak is None else {name: peak}
    return peaks


def nothing() -> None:
    """What warms an engine that keeps the memory of its first call: that is what the call needs."""


def alone(race: ModelRace, name: str) -> memory.Alone:
    """A contestant by itself, warmed by one short text, or by its own where it is compiled for one shape."""

    def made(race: ModelRace) -> peers.Call:
        hf, inputs = race._original()
        if name == "OpenVINO":
            # For one shape it takes a call's memory when it compiles, where nobody could tell it from the weights'.
            forward = peers.openvino_any(hf.to(race.dtype), race.dtype)
            return lambda: forward(inputs["input_ids"], inputs["attention_mask"])
        return race.builds(hf, inputs)[name]()

    call = made(race)
    if name in ("OpenVINO", "ONNX Runtime", "ONNX Runtime int8"):
        return memory.Alone(nothing, call)
    anywhere = name.startswith("pyxlbert") or name == "transformers"
    return memory.Alone(made(replace(race, batch=1, length=16)) if anywhere else call, call)


def races(sizes: Sequence[tuple[int, int]] = ()) -> Iterator[Any]:
    """Every race of the suite `models`.

    Args:
        sizes: batch and length in the place of the suite's own, of the encoders' inference alone.
    """
    for dtype in (torch.float32, torch.bfloat16):
        for batch, length in sizes:
            yield ModelRace(batch, length, dtype)
            yield ModelRace(batch, length, dtype, size="MiniLM")
            yield XLNetRace(batch, length, dtype)
        if sizes:
            continue
        for batch, length in ((8, 128), (2, 512), (1, 128), (1, 16)):
            yield ModelRace(batch, length, dtype)
        yield ModelRace(8, 128, dtype, fill=0.56)
        for batch, length in ((32, 128), (32, 16), (1, 16)):
            yield ModelRace(batch, length, dtype, size="MiniLM")
        yield XLNetRace(8, 128, dtype)
        yield XLNetRace(2, 512, dtype)
        yield XLNetRace(1, 2048, dtype, rounds=3)
        yield XLNetStepRace(4, 512, dtype)
    if sizes:
        return
    for batch, length in ((8, 128), (1, 128), (1, 16)):
        yield ModelRace(batch, length, torch.bfloat16, quantised=True)
    yield ModelRace(32, 16, torch.bfloat16, size="MiniLM", quantised=True)
    yield from conformer.races()
