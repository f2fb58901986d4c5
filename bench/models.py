"""Races of whole models with random weights: BERT-base against transformers, torch.compile, ONNX Runtime and OpenVINO,
XLNet-base against transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pyxlbert.bench import limits, peers
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import race

import pyxlbert
from pyxlbert.testing import compare, tolerances


@dataclass(frozen=True)
class ModelRace:
    """One shape of one dtype.

    Attributes:
        batch, length: of the padded input.
        dtype: of the parameters.
        fill: share of the positions that hold a token; below 1, ours computes fewer rows.
        layers: of the encoder.
    """

    batch: int
    length: int
    dtype: torch.dtype
    fill: float = 1.0
    layers: int = 12
    rounds: int = 7

    def ours(self) -> peers.Call:
        """Our model alone."""
        hf, inputs = self._original()
        return self._ours(hf, inputs)

    def run(self) -> Row:
        """Builds every contestant from the same weights, compares outputs with float32 transformers, then times."""
        hf, inputs = self._original()
        with torch.inference_mode():
            truth = hf(**inputs).last_hidden_state.clone()
        ours = self._ours(hf, inputs)
        hf = hf.to(self.dtype)
        real = inputs["attention_mask"].bool()
        if self.dtype is torch.float32:
            compare.close("pyxlbert", ours()[real], truth[real], tolerances.MODEL_FLOAT32)
        contestants, failed, errors = {"pyxlbert": ours}, {}, {"pyxlbert": _error(ours(), truth, real)}
        for name, build in peers.PEERS.items():
            try:
                call = build(hf, inputs, self.dtype)
                errors[name] = _error(call(), truth, real)
                contestants[name] = call
            except Exception as error:  # a peer that fails is a line of the report
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
        timings = race(contestants, rounds=self.rounds)
        note = "largest error " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        if self.fill < 1:
            note = f"{float(real.float().mean()):.0%} full: ours computes fewer rows, less work; {note}"
        flops = 2 * int(real.sum()) * self.layers * (4 * 768 * 768 + 2 * 768 * 3072)
        case = f"{self.batch}x{self.length}" + (f" {self.fill:.0%} full" if self.fill < 1 else "")
        dtype = str(self.dtype).removeprefix("torch.")
        limit = flops / limits.gemm_rate(self.dtype)
        return Row(
            "BERT-base" if self.layers == 12 else f"BERT {self.layers} layers",
            case,
            dtype,
            timings,
            limit,
            note,
            failed,
        )

    def _original(self) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        hf = BertModel(BertConfig(num_hidden_layers=self.layers), add_pooling_layer=False).eval()
        lengths = torch.linspace(max(1, self.length * (2 * self.fill - 1)), self.length, self.batch).round().long()
        return hf, {
            "input_ids": torch.randint(1000, 30000, (self.batch, self.length)),
            "attention_mask": (torch.arange(self.length)[None] < lengths[:, None]).long(),
        }

    def _ours(self, hf: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> peers.Call:
        from pyxlbert.models import BertModel

        with tempfile.TemporaryDirectory() as folder:
            hf.save_pretrained(folder)
            model = BertModel.from_pretrained(folder, add_pooling_layer=False).to(self.dtype).eval()
        pyxlbert.pack(model)

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

    def run(self) -> Row:
        """Compares our output with float32 `transformers`, then times."""
        from transformers import XLNetConfig
        from transformers import XLNetModel as Original

        from pyxlbert.models import XLNetModel

        torch.manual_seed(0)
        hf = Original(XLNetConfig(d_model=768, n_layer=12, n_head=12, d_inner=3072)).eval()
        ids = torch.randint(1000, 30000, (self.batch, self.length))
        with tempfile.TemporaryDirectory() as folder:
            hf.save_pretrained(folder)
            model = XLNetModel.from_pretrained(folder).to(self.dtype).eval()
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
        flops = 2 * 12 * (rows * (4 * 768 * 768 + 2 * 768 * 3072) + 2 * self.length * 768 * 768)
        dtype = str(self.dtype).removeprefix("torch.")
        limit = flops / limits.gemm_rate(self.dtype)
        timings = race(contestants, rounds=self.rounds)
        return Row("XLNet-base", f"{self.batch}x{self.length}", dtype, timings, limit, note)


def _error(output: torch.Tensor, truth: torch.Tensor, real: torch.Tensor) -> float:
    return float((output.float() - truth)[real].abs().max())


def races() -> Iterator[ModelRace | XLNetRace]:
    """Every race of `python -m pyxlbert.bench models`."""
    for dtype in (torch.float32, torch.bfloat16):
        yield ModelRace(8, 128, dtype)
        yield ModelRace(2, 512, dtype)
        yield ModelRace(8, 128, dtype, fill=0.56)
        yield XLNetRace(8, 128, dtype)
        yield XLNetRace(2, 512, dtype)
        yield XLNetRace(1, 2048, dtype, rounds=3)
