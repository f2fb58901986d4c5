"""Races of whole models with random weights: BERT-base against transformers, torch.compile, ONNX Runtime and OpenVINO,
XLNet-base against transformers, and `accelerate` (`conformer.py`)."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pyxlbert.bench import conformer, limits, peers
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import race

import pyxlbert
from pyxlbert.testing import compare, tolerances


@dataclass(frozen=True)
class Size:
    """Of an encoder."""

    layers: int
    hidden: int
    inner: int


# Heads of 64 and, of the small one, 32.
SIZES = {"BERT-base": Size(12, 768, 3072), "MiniLM": Size(6, 384, 1536), "BERT 2 layers": Size(2, 768, 3072)}


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

    def run(self) -> Row:
        """Builds every contestant from the same weights, compares outputs with float32 transformers, then times."""
        hf, inputs = self._original()
        with torch.inference_mode():
            truth = hf(**inputs).last_hidden_state.clone()
        ours = self._ours(hf, inputs, self.quantised)
        hf = hf.to(self.dtype)
        real = inputs["attention_mask"].bool()
        if self.dtype is torch.float32 and not self.quantised:
            compare.close("pyxlbert", ours()[real], truth[real], tolerances.MODEL_FLOAT32)
        contestants, failed, errors = {"pyxlbert": ours}, {}, {"pyxlbert": _error(ours(), truth, real)}
        builds = dict(peers.PEERS)
        if self.quantised:
            builds = {
                "pyxlbert unquantised": lambda hf, inputs, _: self._ours(hf.float(), inputs, False),
                "ONNX Runtime int8": lambda hf, inputs, _: peers.onnx_runtime(hf.float(), inputs, torch.float32, True),
                "OpenVINO": peers.openvino,
            }
        for name, build in builds.items():
            try:
                call = build(hf, inputs, self.dtype)
                errors[name] = _error(call(), truth, real)
                contestants[name] = call
            except Exception as error:  # a peer that fails is a line of the report
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
        timings = race(contestants, rounds=self.rounds, rest=peers.REST)
        note = "largest error " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        if self.fill < 1:
            note = f"{float(real.float().mean()):.0%} full: ours computes fewer rows, less work; {note}"
        pairs = int(real.sum(1).square().sum())
        size = SIZES[self.size]
        products = int(real.sum()) * size.hidden * (4 * size.hidden + 2 * size.inner)
        flops = 2 * size.layers * (products + 2 * pairs * size.hidden)
        dtype = "int8" if self.quantised else str(self.dtype).removeprefix("torch.")
        limit = None if self.quantised else flops / limits.gemm_rate(self.dtype)
        return Row(
            self.subject,
            self.case,
            dtype,
            timings,
            limit,
            note,
            failed,
        )

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


@dataclass(frozen=True)
class XLNetRace:
    """XLNet-base of one shape, every position real, no memories, beside our BERT-base of the same shape."""

    batch: int
    length: int
    dtype: torch.dtype
    rounds: int = 5

    def __str__(self) -> str:
        return f"XLNet-base {self.batch}x{self.length} {self.dtype}"

    def run(self) -> Row:
        """Compares our output with float32 `transformers`, then times."""
        hf, model = _xlnets(12)
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
        if self.dtype is torch.float32:
            compare.close("pyxlbert", ours(), truth, tolerances.MODEL_FLOAT32)
        errors = {
            name: float((contestants[name]().float() - truth).abs().max()) for name in ("pyxlbert", "transformers")
        }
        note = "largest error " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        rows = self.batch * self.length
        products = rows * (4 * 768 * 768 + 2 * 768 * 3072) + 2 * self.length * 768 * 768
        flops = 2 * 12 * (products + 3 * rows * self.length * 768)
        dtype = str(self.dtype).removeprefix("torch.")
        limit = flops / limits.gemm_rate(self.dtype)
        timings = race(contestants, rounds=self.rounds, rest=peers.REST)
        return Row("XLNet-base", f"{self.batch}x{self.length}", dtype, timings, limit, note)


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

    def run(self) -> Row:
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
        cotangent = torch.randn(b, m, 768)

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
        if not low:
            for name in ("pyxlbert", "pyxlbert, ranks"):
                output, gradient = contestants[name]()
                compare.close(f"{name}: output", output, truth[0], tolerances.MODEL_FLOAT32)
                compare.close(f"{name}: gradient", gradient, truth[1], tolerances.MODEL_GRADIENT_FLOAT32)
        errors = {name: float((run()[0].float() - truth[0]).abs().max()) for name, run in contestants.items()}
        note = "largest error " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        timings = race(contestants, rounds=self.rounds)
        # Of the last layer only the query stream is wanted.
        rows = [b * (t + m)] * (self.layers - 1) + [b * m]
        # Query and output of the rows, key and value of T, the table; the two feed-forward products.
        products = sum(768 * 768 * (2 * n + 2 * b * t + 2 * t) + n * 2 * 768 * 3072 for n in rows)
        # Attention: three products forward, eight backward.
        flops = 2 * (3 * products + 11 * sum(rows) * t * 768)
        dtype = str(self.dtype).removeprefix("torch.")
        return Row("XLNet-base", self.case, dtype, timings, flops / limits.gemm_rate(self.dtype), note)


def _xlnets(layers: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """`transformers`' XLNet-base without dropout, and ours with its weights; both in training mode."""
    from transformers import XLNetConfig
    from transformers import XLNetModel as Original

    from pyxlbert.models import XLNetModel

    torch.manual_seed(0)
    hf = Original(XLNetConfig(d_model=768, n_layer=layers, n_head=12, d_inner=3072, dropout=0.0)).train()
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        return hf, XLNetModel.from_pretrained(folder).train()


def _error(output: torch.Tensor, truth: torch.Tensor, real: torch.Tensor) -> float:
    return float((output.float() - truth)[real].abs().max())


def races() -> Iterator[ModelRace | XLNetRace | XLNetStepRace | conformer.ConformerRace]:
    """Every race of `python -m pyxlbert.bench models`."""
    for dtype in (torch.float32, torch.bfloat16):
        for batch, length in ((8, 128), (2, 512), (1, 128), (1, 16)):
            yield ModelRace(batch, length, dtype)
        yield ModelRace(8, 128, dtype, fill=0.56)
        for batch, length in ((32, 128), (32, 16), (1, 16)):
            yield ModelRace(batch, length, dtype, size="MiniLM")
        yield XLNetRace(8, 128, dtype)
        yield XLNetRace(2, 512, dtype)
        yield XLNetRace(1, 2048, dtype, rounds=3)
        yield XLNetStepRace(4, 512, dtype)
    for batch, length in ((8, 128), (1, 128), (1, 16)):
        yield ModelRace(batch, length, torch.bfloat16, quantised=True)
    yield ModelRace(32, 16, torch.bfloat16, size="MiniLM", quantised=True)
    yield from conformer.races()
