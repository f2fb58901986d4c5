"""The races of `make gpu`: the targets' shapes, 16384 rows or tokens, on the GPU that is here."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from pyxlbert.bench import ops
from pyxlbert.bench.contest import contest
from pyxlbert.bench.ops import AttentionShape, Built, Call, Race
from pyxlbert.bench.relative import Problem
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import Contestants, Tell, Timing, nobody, race_on, running

import pyxlbert
from pyxlbert.backends import measured
from pyxlbert.testing import compare, tolerances

TOKENS = 16384
ROUNDS = 51


def with_compiled(race: Race) -> Race:
    """The race with torch.compile of its first peer beside it."""

    def build() -> Built:
        built = race.build()
        first = next(iter(built.peers.values()))
        return built._replace(peers=built.peers | {"torch.compile": torch.compile(first)})

    return replace(race, build=build, rounds=ROUNDS)


def packed_attention(batch: int, length: int, dtype: torch.dtype) -> Race:
    """Sequences of half the length on average, packed, against the padded form and against SDPA over every position."""
    heads, size = 12, 64

    def build() -> Built:
        qkv = torch.randn(batch, length, 3, heads, size).to(dtype)
        lengths = torch.linspace(1, length, batch).round().to(torch.int32)
        real = torch.arange(length)[None] < lengths[:, None]
        packed = qkv[real]
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        part = ops.some_heads(length, heads)

        def sdpa(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in x.unbind(2)), mask).transpose(1, 2)

        def padded() -> torch.Tensor:
            return sdpa(part(qkv).double(), real[:, None, None])

        return Built(
            lambda: pyxlbert.attention(*packed.unbind(1), cu_seqlens=offsets, max_seqlen=length),
            {
                "pyxlbert, padded": lambda: pyxlbert.attention(*qkv.unbind(2), key_lengths=lengths),
                "SDPA over padding": lambda: sdpa(qkv),
            },
            lambda: padded()[real],
            {"pyxlbert, padded": padded, "SDPA over padding": lambda: sdpa(part(qkv).double())},
            part,
        )

    case = f"{batch}x{length}x{heads}x{size} 50% full, packed"
    return Race("attention", case, dtype, build, 3 * batch * length * heads * size * dtype.itemsize // 2, None, ROUNDS)


@dataclass(frozen=True)
class HostRace:
    """What a small call costs on the host: many of them in a row, while the GPU has less to do than the host."""

    op: str
    calls: int = 500

    def __str__(self) -> str:
        return f"host time {self.op}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.op == "layer_norm" else torch.bfloat16

    def row(self, timings: dict[str, Timing], failed: dict[str, str]) -> Row:
        """See `Race`; the limit is the target."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Row("host time of a call", self.op, dtype, timings, 25e-6, failed=failed)

    def run(self, device: str, *, tell: Tell = nobody, without: Mapping[str, str] | None = None) -> Row:
        """See `Race`."""
        torch.manual_seed(0)
        with torch.device(device):
            x, weight, bias = torch.randn(16, 768), torch.randn(768), torch.randn(768)
            q, k, v = (torch.randn(1, 16, 12, 64).bfloat16() for _ in range(3))
        turned = [y.transpose(1, 2) for y in (q, k, v)]
        contestants: Contestants = {
            "layer_norm": {
                "F.layer_norm": lambda: F.layer_norm(x, (768,), weight, bias),
                "pyxlbert": lambda: pyxlbert.layer_norm(x, weight, bias),
            },
            "attention": {
                "SDPA": lambda: F.scaled_dot_product_attention(*turned).transpose(1, 2),
                "pyxlbert": lambda: pyxlbert.attention(q, k, v),
            },
        }[self.op]
        truth = {
            "layer_norm": lambda: F.layer_norm(x.double(), (768,), weight.double(), bias.double()),
            "attention": lambda: F.scaled_dot_product_attention(*(y.double() for y in turned)).transpose(1, 2),
        }[self.op]()

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
            return self.row(*contest([contestants], check, timer, tell=tell, without=without))

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
class ModelRace:
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

    def run(self, device: str, *, tell: Tell = nobody, without: Mapping[str, str] | None = None) -> Row:
        """Compares outputs with float32 `transformers`, then times."""
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
            return race_on(device, copies, rounds=15, tell=tell)

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
            sizes = {"d_model": 768, "n_layer": self.layers, "n_head": 12, "d_inner": 3072}
            hf = transformers.XLNetModel(transformers.XLNetConfig(**sizes, dropout=0.0))
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


def races(tokens: int = TOKENS, lengths: Sequence[int] = (512, 2048, 8192), layers: int = 12) -> Iterator[Any]:
    """Every race of `python -m pyxlbert.bench gpu`, the targets first.

    Args:
        tokens: rows, or tokens of attention.
        lengths: of sequences, three: tests take small ones.
        layers: of the models.
    """
    for race in _races(tokens, lengths, layers):
        yield with_backends(race) if isinstance(race, Race) else race


def _races(tokens: int, lengths: Sequence[int], layers: int) -> Iterator[Any]:
    half = torch.bfloat16
    short, middle, _ = lengths
    for op in ("layer_norm", "attention"):
        yield HostRace(op)
    for length in lengths:
        batch = tokens // length
        for backward in (False, True):
            yield replace(Problem(batch, length, half, backward).race(), rounds=ROUNDS)
            yield replace(ops.attention(AttentionShape(batch, length, 12, 64), half, backward=backward), rounds=ROUNDS)
    yield from _row_races(tokens, short, 768)
    yield packed_attention(tokens // short, short, half)
    yield packed_attention(tokens // middle, middle, half)
    for backward in (False, True):
        for shape in (AttentionShape(8, middle, 8, 128), AttentionShape(8, middle, 12, 64, 0.5)):
            yield replace(ops.attention(shape, half, backward=backward), rounds=ROUNDS)
    for training in (False, True):
        yield ModelRace("BERT-base", tokens // short, short, training=training, layers=layers)
        yield ModelRace("BERT-base", tokens // short, short, fill=0.5, training=training, layers=layers)
        yield ModelRace("XLNet-base", tokens // short, short, training=training, layers=layers)
    yield ModelRace("XLNet-base", tokens // middle, middle, layers=layers)
    for columns in (384, 1024):
        yield from _row_races(tokens, short, columns)
    yield with_compiled(ops.layer_norm(tokens, 768, torch.float32))
    yield replace(Problem(tokens // middle, middle, torch.float32).race(), rounds=ROUNDS)
    yield replace(ops.attention(AttentionShape(8, middle, 12, 64), torch.float32), rounds=ROUNDS)


def _row_races(tokens: int, length: int, columns: int) -> Iterator[Race]:
    half = torch.bfloat16
    yield with_compiled(ops.layer_norm(tokens, columns, half))
    yield with_compiled(ops.layer_norm(tokens, columns, half, backward=True))
    yield with_compiled(ops.dropout_add_layer_norm(tokens, columns, half))
    yield with_compiled(ops.bias_gelu(tokens, 4 * columns, half, "none"))
    yield with_compiled(ops.embedding_layer_norm(tokens // length, length, columns, half))
