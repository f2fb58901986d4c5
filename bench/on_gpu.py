"""The races of `make gpu`: the targets' shapes, 16384 rows or tokens, on the GPU that is here."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyxlbert.bench import ops
from pyxlbert.bench.contest import Asked, Contested, contest
from pyxlbert.bench.ops import Built, Call, Race
from pyxlbert.bench.report import Row
from pyxlbert.bench.sizes import xlnet_fields
from pyxlbert.bench.timer import Contestants, Timing, race_on, running
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyxlbert
from pyxlbert.backends import measured
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._attention import Scores
from pyxlbert.testing.specs._spec import HALF, Case, Spec, Use

ROUNDS = 51
# Of the few that are to end within two minutes.
DECIDING_ROUNDS = 21
# Kernels of other packages, where they are installed.
OTHERS = ("flash-attn", "Liger")


def with_compiled(race: Race) -> Race:
    """The race with torch.compile of its first peer beside it."""

    def build() -> Built:
        built = race.build()
        first = next(iter(built.peers.values()))
        return built._replace(peers=built.peers | {"torch.compile": torch.compile(first)})

    return replace(race, build=build)


@dataclass(frozen=True)
class HostRace(Contested):
    """What a small call costs on the host: many of them in a row, while the GPU has less to do than the host."""

    spec: Spec
    case: Case
    dtype: torch.dtype
    calls: int = 500

    def __str__(self) -> str:
        return f"host time {self.spec.name}"

    def row(self, timings: dict[str, Timing], failed: dict[str, str]) -> Row:
        """See `Race`; the limit is the target."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Row("host time of a call", self.spec.name, dtype, timings, 25e-6, failed=failed)

    def held(self, device: str, asked: Asked) -> Row:
        """See `Contested`."""
        tell, without, settings, _ = asked
        torch.manual_seed(0)
        with torch.device(device):
            built = ops.race_of(self.spec, self.case, self.dtype).build()
        truth = built.truth()

        def check(name: str, output: torch.Tensor) -> None:
            compare.close(name, output, truth, tolerances.CONTESTANT[self.dtype])

        def timer(copies: list[Contestants]) -> dict[str, Timing]:
            timings = {}
            for name, call in copies[0].items():
                tell(name)
                with running(name):
                    found = sorted(self._sample(call, device) for _ in range(9))
                timings[name] = Timing(found[4], found[2], found[6], 9)
            return timings

        with torch.no_grad():
            found = contest([built.contestants()], check, timer, tell=tell, without=without, wants=settings.wants)
            return self.row(*found)

    def _sample(self, call: Callable[[], object], device: str) -> float:
        wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
        for _ in range(10):
            call()
        wait()
        start = time.perf_counter()
        for _ in range(self.calls):
            call()
        seconds = (time.perf_counter() - start) / self.calls
        wait()
        return seconds


@dataclass(frozen=True)
class ModelRace(Contested):
    """BERT-base or XLNet-base in bfloat16, inference or a training step, against `transformers` as it is and compiled.

    One copy is enough: the weights are larger than the caches.

    Attributes:
        name: "BERT-base" or "XLNet-base".
        batch, length: of the padded input.
        fill: share of the positions that hold a token; below 1 ours computes fewer rows of BERT.
        training: forward and backward, without an optimizer; dropout is 0.
        layers: of the encoder.
    """

    name: str
    batch: int
    length: int
    fill: float = 1.0
    training: bool = False
    layers: int = 12

    def __str__(self) -> str:
        return f"{self.name} {self.case} torch.bfloat16"

    @property
    def case(self) -> str:
        kind = "training step " if self.training else ""
        return f"{kind}{self.batch}x{self.length}" + (f" {self.fill:.0%} full" if self.fill < 1 else "")

    def row(self, timings: dict[str, Timing], failed: dict[str, str], note: str = "") -> Row:
        """See `Race`."""
        return Row(self.name, self.case, "bfloat16", timings, note=note, failed=failed)

    def held(self, device: str, asked: Asked) -> Row:
        """Compares outputs with float32 `transformers`, then times."""
        tell, without, settings, _ = asked
        hf, ours = self._models()
        lengths = torch.linspace(max(1, self.length * (2 * self.fill - 1)), self.length, self.batch).round().long()
        inputs = {"input_ids": torch.randint(1000, 30000, (self.batch, self.length)).to(device)}
        real = (torch.arange(self.length)[None] < lengths[:, None]).to(device)
        if self.fill < 1:
            inputs["attention_mask"] = real.long()
        if self.name == "XLNet-base":
            inputs["use_mems"] = False
        hf, ours = hf.to(device), ours.to(device).bfloat16()
        with torch.no_grad():
            truth = hf(**inputs).last_hidden_state[real]
        hf = hf.bfloat16()
        calls = {
            "transformers": self._call(hf, inputs),
            "torch.compile": self._call(torch.compile(hf), inputs),
            "pyxlbert": self._call(ours, inputs),
        }
        errors: dict[str, float] = {}

        def check(name: str, output: torch.Tensor) -> None:
            errors[name] = float((output[real].float() - truth).abs().max())
            compare.close(name, output[real], truth, tolerances.CONTESTANT[torch.bfloat16])

        def timer(copies: list[Contestants]) -> dict[str, Timing]:
            return race_on(device, copies, rounds=settings.rounds or 15, tell=tell)

        calls = {name: call for name, call in calls.items() if settings.wants(name)}
        found = contest([calls], check, timer, tell=tell, without=without)
        note = "largest error " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        if self.fill < 1 and self.name == "BERT-base":
            note = f"{float(real.float().mean()):.0%} full: ours computes fewer rows, less work; {note}"
        return self.row(*found, note)

    def _models(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        import transformers

        from pyxlbert import models

        torch.manual_seed(0)
        if self.name == "BERT-base":
            config = transformers.BertConfig(
                num_hidden_layers=self.layers,
                max_position_embeddings=max(512, self.length),
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            hf = transformers.BertModel(config, add_pooling_layer=False)
            options: dict[str, Any] = {"add_pooling_layer": False}
            ours: Callable[..., Any] = models.BertModel.from_pretrained
        else:
            hf = transformers.XLNetModel(transformers.XLNetConfig(**xlnet_fields(self.layers), dropout=0.0))
            ours, options = models.XLNetModel.from_pretrained, {}
        with tempfile.TemporaryDirectory() as folder:
            hf.save_pretrained(folder)
            return hf.train(self.training), ours(folder, **options).train(self.training)

    def _call(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Callable[[], torch.Tensor]:
        def infer() -> torch.Tensor:
            with torch.inference_mode():
                return model(**inputs).last_hidden_state

        def step() -> torch.Tensor:
            out = model(**inputs).last_hidden_state
            out.float().square().mean().backward()
            for parameter in model.parameters():
                parameter.grad = None
            return out.detach()

        return step if self.training else infer


def with_backends(race: Race) -> Race:
    """The race with each of our backends beside the one that a call takes by itself."""

    def build() -> Built:
        built = race.build()

        def on(name: str) -> Call:
            def call() -> Any:
                with pyxlbert.use_backend(name):
                    return built.ours()

            return call

        named = {f"pyxlbert {name}": on(name) for name in measured.USUAL}
        return built._replace(peers=built.peers | named)

    return replace(race, build=build)


def races(change: Callable[[Case], Case] = lambda case: case, layers: int = 12) -> Iterator[Any]:
    """Every race of `python -m pyxlbert.bench gpu`, the targets first.

    Args:
        change: of every case: tests take small ones.
        layers: of the models.
    """
    for spec in SPECS.values():
        for case in spec.used(Use.HOST):
            for dtype in case.uses[Use.HOST]:
                yield HostRace(spec, case, dtype)
    scores, rows = ("relative_attention", "attention"), [name for name in SPECS if "attention" not in name]
    (half,) = HALF
    yield from _races(Use.TARGET, scores, half, change)
    yield from _races(Use.TARGET, rows, half, change)
    yield from _races(Use.GPU, scores, half, change)
    for training in (False, True):
        yield ModelRace("BERT-base", 32, 512, training=training, layers=layers)
        yield ModelRace("BERT-base", 32, 512, fill=0.5, training=training, layers=layers)
        yield ModelRace("XLNet-base", 32, 512, training=training, layers=layers)
    yield ModelRace("XLNet-base", 8, 2048, layers=layers)
    yield from _races(Use.GPU, rows, half, change)
    yield from _races(Use.GPU, (*rows, *scores), torch.float32, change)


def with_flash(race: Race) -> Race:
    """The race with SDPA's flash path beside the one that it takes by itself."""

    def build() -> Built:
        built = race.build()
        usual = built.peers.get("SDPA")

        def flash() -> Any:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return usual()

        return built if usual is None else built._replace(peers=built.peers | {"SDPA, flash": flash})

    return replace(race, build=build)


def deciding(change: Callable[[Case], Case] = lambda case: case) -> Iterator[Race]:
    """The twenty races of `python -m pyxlbert.bench decide`: attention and relative attention, forward and backward,
    at every length, and the ops on rows; beside ours SDPA and its flash path, or PyTorch's calls, and FlexAttention.
    """
    scores, (half,) = ("attention", "relative_attention"), HALF
    rows = [name for name in SPECS if name not in scores]
    for use, names in ((Use.TARGET, scores), (Use.DECIDE, scores), (Use.DECIDE, rows)):
        for spec, case in _in_turn(use, names, half):
            race = ops.race_of(spec, change(case), half, DECIDING_ROUNDS, ("FlexAttention",))
            yield with_flash(with_backends(race))


def _in_turn(use: Use, names: Iterable[str], dtype: torch.dtype) -> Iterator[tuple[Spec, Case]]:
    """Of every op in turn: a run that is out of time has met them all."""
    turns = [[(SPECS[name], case) for case in SPECS[name].used(use) if dtype in case.uses[use]] for name in names]
    return (one for turn in itertools.zip_longest(*turns) for one in turn if one is not None)


def _races(use: Use, names: Iterable[str], dtype: torch.dtype, change: Callable[[Case], Case]) -> Iterator[Race]:
    for spec, case in _in_turn(use, names, dtype):
        # A compiler of attention would take longer than all races.
        race = ops.race_of(spec, change(case), dtype, ROUNDS, OTHERS)
        yield with_backends(race if isinstance(case.inputs, Scores) else with_compiled(race))
