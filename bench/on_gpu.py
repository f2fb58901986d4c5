"""The races of `make gpu`: the targets' shapes, 16384 rows or tokens, on the GPU that is here."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from pyxlbert.bench import limits, ops
from pyxlbert.bench.ops import AttentionShape, Call, Race
from pyxlbert.bench.relative import Problem
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import Timing, race_on_gpu

import pyxlbert
from pyxlbert.backends import measured

TOKENS = 16384
ROUNDS = 51


def with_compiled(race: Race) -> Race:
    """The race with torch.compile of its first peer beside it."""

    def build() -> tuple[Call, dict[str, Call], Call | None]:
        ours, peers, truth = race.build()
        torch._dynamo.reset()
        return ours, peers | {"torch.compile": torch.compile(next(iter(peers.values())))}, truth

    return replace(race, build=build, rounds=ROUNDS)


def packed_attention(length: int, dtype: torch.dtype) -> Race:
    """Sequences of half the length on average, packed, against the padded form and against SDPA over every position."""
    batch, heads, size = TOKENS // length, 12, 64

    def build() -> tuple[Call, dict[str, Call], None]:
        qkv = torch.randn(batch, length, 3, heads, size).to(dtype)
        lengths = torch.linspace(1, length, batch).round().to(torch.int32)
        real = torch.arange(length)[None] < lengths[:, None]
        packed = qkv[real]
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return (
            lambda: pyxlbert.attention(*packed.unbind(1), cu_seqlens=offsets, max_seqlen=length),
            {
                "pyxlbert, padded": lambda: pyxlbert.attention(*qkv.unbind(2), key_lengths=lengths),
                "SDPA over padding": lambda: F.scaled_dot_product_attention(q, k, v),
            },
            None,
        )

    return Race("attention", f"{batch}x{length}x{heads}x{size} 50% full, packed", dtype, build, None, ROUNDS)


@dataclass(frozen=True)
class HostRace:
    """What a small call costs on the host: many of them in a row, while the GPU has less to do than the host."""

    op: str
    calls: int = 500

    def __str__(self) -> str:
        return f"host time {self.op}"

    def run(self, device: str) -> Row:
        with torch.device(device):
            x, weight, bias = torch.randn(16, 768), torch.randn(768), torch.randn(768)
            q, k, v = (torch.randn(1, 16, 12, 64).bfloat16() for _ in range(3))
        contestants: dict[str, Call] = {
            "layer_norm": {
                "pyxlbert": lambda: pyxlbert.layer_norm(x, weight, bias),
                "F.layer_norm": lambda: F.layer_norm(x, (768,), weight, bias),
            },
            "attention": {
                "pyxlbert": lambda: pyxlbert.attention(q, k, v),
                "SDPA": lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))),
            },
        }[self.op]
        with torch.no_grad():
            samples = {name: sorted(self._sample(call) for _ in range(9)) for name, call in contestants.items()}
        timings = {name: Timing(found[4], found[2], found[6], 9) for name, found in samples.items()}
        return Row("host time of a call", self.op, "float32" if self.op == "layer_norm" else "bfloat16", timings, 25e-6)

    def _sample(self, call: Call) -> float:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(self.calls):
            call()
        seconds = (time.perf_counter() - start) / self.calls
        torch.cuda.synchronize()
        return seconds


@dataclass(frozen=True)
class ModelRace:
    """BERT-base or XLNet-base in bfloat16, inference or a training step, against `transformers` as it is and compiled.

    Attributes:
        name: "BERT-base" or "XLNet-base".
        batch, length: of the padded input.
        fill: share of the positions that hold a token; below 1 ours computes fewer rows of BERT.
        training: forward and backward, without an optimizer; dropout is 0.
    """

    name: str
    batch: int
    length: int
    fill: float = 1.0
    training: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.case} torch.bfloat16"

    @property
    def case(self) -> str:
        kind = "training step " if self.training else ""
        return f"{kind}{self.batch}x{self.length}" + (f" {self.fill:.0%} full" if self.fill < 1 else "")

    def run(self, device: str) -> Row:
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
            truth = hf(**inputs).last_hidden_state
        hf = hf.bfloat16()
        calls = {
            "pyxlbert": self._call(ours, inputs),
            "transformers": self._call(hf, inputs),
            "torch.compile": self._call(torch.compile(hf), inputs),
        }
        peers, failed = ops._those_that_run({name: call for name, call in calls.items() if name != "pyxlbert"})
        calls = {"pyxlbert": calls["pyxlbert"]} | peers
        errors = {name: float((call().float() - truth)[real].abs().max()) for name, call in calls.items()}
        note = "largest error " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        if self.fill < 1 and self.name == "BERT-base":
            note = f"{float(real.float().mean()):.0%} full: ours computes fewer rows, less work; {note}"
        timings = race_on_gpu(calls, rounds=15)
        return Row(self.name, self.case, "bfloat16", timings, note=note, failed=failed)

    def _models(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        import transformers

        from pyxlbert import models

        torch.manual_seed(0)
        if self.name == "BERT-base":
            config = transformers.BertConfig(
                max_position_embeddings=max(512, self.length), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
            hf = transformers.BertModel(config, add_pooling_layer=False)
            options: dict[str, Any] = {"add_pooling_layer": False}
            ours: Callable[..., Any] = models.BertModel.from_pretrained
        else:
            hf = transformers.XLNetModel(
                transformers.XLNetConfig(d_model=768, n_layer=12, n_head=12, d_inner=3072, dropout=0.0)
            )
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

    def build() -> tuple[Call, dict[str, Call], Call | None]:
        ours, peers, truth = race.build()

        def on(name: str) -> Call:
            def call() -> Any:
                with pyxlbert.use_backend(name):
                    return ours()

            return call

        return ours, peers | {f"pyxlbert {name}": on(name) for name in measured.USUAL}, truth

    return replace(race, build=build)


def races() -> Iterator[Any]:
    """Every race of `python -m pyxlbert.bench gpu`, the targets first."""
    for race in _races():
        yield with_backends(race) if isinstance(race, Race) else race


def _races() -> Iterator[Any]:
    half = torch.bfloat16
    for op in ("layer_norm", "attention"):
        yield HostRace(op)
    yield with_compiled(ops.layer_norm(TOKENS, 768, half))
    yield with_compiled(ops.layer_norm(TOKENS, 768, half, backward=True))
    yield with_compiled(ops.dropout_add_layer_norm(TOKENS, 768, half))
    yield with_compiled(ops.bias_gelu(TOKENS, 3072, half, "none"))
    yield with_compiled(ops.embedding_layer_norm(TOKENS // 512, 512, 768, half))
    for length in (512, 2048, 8192):
        batch = TOKENS // length
        for backward in (False, True):
            yield replace(Problem(batch, length, half, backward).race(), rounds=ROUNDS)
            yield replace(ops.attention(AttentionShape(batch, length, 12, 64), half, backward=backward), rounds=ROUNDS)
    yield packed_attention(512, half)
    yield packed_attention(2048, half)
    for training in (False, True):
        yield ModelRace("BERT-base", 32, 512, training=training)
        yield ModelRace("BERT-base", 32, 512, fill=0.5, training=training)
        yield ModelRace("XLNet-base", 32, 512, training=training)
    yield ModelRace("XLNet-base", 8, 2048)
    for backward in (False, True):
        yield replace(ops.attention(AttentionShape(8, 2048, 8, 128), half, backward=backward), rounds=ROUNDS)
        yield replace(ops.attention(AttentionShape(8, 2048, 12, 64, 0.5), half, backward=backward), rounds=ROUNDS)
    for columns in (384, 1024):
        yield with_compiled(ops.layer_norm(TOKENS, columns, half))
        yield with_compiled(ops.layer_norm(TOKENS, columns, half, backward=True))
        yield with_compiled(ops.dropout_add_layer_norm(TOKENS, columns, half))
        yield with_compiled(ops.bias_gelu(TOKENS, 4 * columns, half, "none"))
        yield with_compiled(ops.embedding_layer_norm(TOKENS // 512, 512, columns, half))
    yield with_compiled(ops.layer_norm(TOKENS, 768, torch.float32))
    yield replace(Problem(8, 2048, torch.float32).race(), rounds=ROUNDS)
    yield replace(ops.attention(AttentionShape(8, 2048, 12, 64), torch.float32), rounds=ROUNDS)


def describe() -> str:
    """The machine's limits, in words."""
    return (
        f"{torch.cuda.get_device_name()}: copy {limits.copy_bandwidth() / 1e12:.2f} TB/s, products "
        f"{limits.gemm_rate(torch.bfloat16) / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{limits.gemm_rate(torch.float32) / 1e12:.0f} in float32"
    )
