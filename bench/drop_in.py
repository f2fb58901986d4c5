"""Races of models that `pyxlbert.accelerate` has taken: beside themselves untouched, and beside other engines.

Sentences go through sentence-transformers with real weights, tokenisation included; classification and training steps
have random weights and the lengths of real paragraphs.  Every answer is compared with the untouched model in float32
before it is timed.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyxlbert.bench import limits, peers
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import race

import pyxlbert
from pyxlbert.testing import compare, tolerances

LONGEST = 256  # tokens
Call = Callable[[], Any]


def _matrices(encoder: torch.nn.Module) -> int:
    """Weights that a token is multiplied by."""
    return sum(one.weight.numel() for one in encoder.modules() if isinstance(one, torch.nn.Linear))


class _Engine(torch.nn.Module):
    """Another library's forward where sentence-transformers has a model of transformers."""

    def __init__(self, config: Any, forward: peers.Forward) -> None:
        super().__init__()
        self.config, self._run = config, forward

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self._run(input_ids, attention_mask))


@dataclass(frozen=True)
class SentenceRace:
    """Some texts through a sentence-transformers directory.

    Attributes:
        name: of the texts.
        texts: them.
        model: the directory.
        dtype: of the model; "int8" is raced against float32 of the others, and their own integers.
    """

    name: str
    texts: tuple[str, ...]
    model: Path
    dtype: torch.dtype | str

    def __str__(self) -> str:
        return f"drop-in {self.model.name} {self.name} {self.dtype}"

    def run(self) -> Row:
        """Builds the contestants, compares their vectors, times them."""
        from sentence_transformers import SentenceTransformer

        quantised = self.dtype == "int8"
        dtype = torch.float32 if quantised else self.dtype

        def load() -> Any:
            return SentenceTransformer(str(self.model), device="cpu").eval()

        texts = list(self.texts)
        plain = load()
        hf, truth = plain[0].auto_model, plain.encode(texts)
        tokens = sum(len(one) for one in plain.tokenizer(texts, truncation=True)["input_ids"])
        limit = None if quantised else 2 * tokens * _matrices(hf.encoder) / limits.gemm_rate(dtype)
        packed = pyxlbert.pack(pyxlbert.accelerate(load().to(dtype)), "int8" if quantised else None)
        models = {"pyxlbert": packed}
        if not quantised:
            models["pyxlbert, not packed"] = pyxlbert.accelerate(load().to(dtype))
        failed = {}
        for name, build in {"ONNX Runtime": peers.onnx_runtime_any, "OpenVINO": peers.openvino_any}.items():
            name += " int8" if quantised and build is peers.onnx_runtime_any else ""
            options = {"quantised": True} if name.endswith("int8") else {}
            try:
                other = load()
                other[0].model = _Engine(hf.config, build(hf, dtype, **options))
                other.encode(texts[:1])
                models[name] = other
            except Exception as error:  # a peer that fails is a line of the report
                failed[name] = f"{type(error).__name__}: {error}"[:160]
        models["sentence-transformers"] = plain.to(dtype)
        far = {name: _farthest(model.encode(texts), truth) for name, model in models.items()}
        allowed = tolerances.COSINE_INT8 if quantised else tolerances.COSINE[dtype]
        ours = torch.from_numpy(packed.encode(texts))
        compare.cosine_distance("pyxlbert", ours, torch.from_numpy(truth), allowed)
        contestants: dict[str, Call] = {name: lambda model=model: model.encode(texts) for name, model in models.items()}
        timings = race(contestants, rounds=7, rest=peers.REST)
        note = f"{len(texts)} texts of {tokens} tokens, worst 1 - cosine "
        note += ", ".join(f"{name} {one:.1e}" for name, one in far.items())
        config = hf.config
        case = f"{config.model_type} {config.num_hidden_layers}x{config.hidden_size} {self.name}"
        shown = "int8" if quantised else str(dtype).removeprefix("torch.")
        return Row("accelerated sentences", case, shown, timings, limit, note, failed)


def _farthest(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest 1 - cosine of two vectors of a text."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(truth, axis=1)
    return float(1 - ((found * truth).sum(1) / lengths).min())


@dataclass(frozen=True)
class ClassificationRace:
    """XLM-R base classifies a batch of paragraphs, in the order of the corpus.

    Attributes:
        lengths: of the paragraphs, in tokens.
        dtype: of the model.
    """

    lengths: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"drop-in XLM-R classification {self.dtype}"

    def run(self) -> Row:
        """Builds the contestants, compares their logits, times them."""
        import transformers

        config = transformers.XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514, type_vocab_size=1)
        torch.manual_seed(0)
        plain = transformers.XLMRobertaForSequenceClassification(config).eval()
        ids, mask = _batch(self.lengths, 250002, config.pad_token_id)

        def call(model: torch.nn.Module) -> Call:
            def logits() -> torch.Tensor:
                with torch.inference_mode():
                    return model(ids, mask).logits

            return logits

        truth = call(plain)().clone()
        plain = plain.to(self.dtype)
        unpacked = pyxlbert.accelerate(copy.deepcopy(plain))
        packed = pyxlbert.pack(pyxlbert.accelerate(copy.deepcopy(plain)))
        models = {"pyxlbert": packed, "pyxlbert, not packed": unpacked, "transformers": plain}
        calls = {name: call(model) for name, model in models.items()}
        failed = {}
        try:
            calls["torch.compile"] = _compiled(copy.deepcopy(plain), ids, mask)
        except Exception as error:  # a peer that fails is a line of the report
            failed["torch.compile"] = f"{type(error).__name__}: {error}"[:160]
        for name in ("pyxlbert", "pyxlbert, not packed"):
            compare.close(name, calls[name]().float(), truth, tolerances.CONTESTANT[self.dtype])
        timings = race(calls, rounds=7, rest=peers.REST)
        tokens = sum(self.lengths)
        limit = 2 * tokens * _matrices(plain.roberta.encoder) / limits.gemm_rate(self.dtype)
        note = f"{len(self.lengths)} paragraphs of {tokens} tokens, {tokens / mask.numel():.0%} full: less work"
        dtype = str(self.dtype).removeprefix("torch.")
        return Row("accelerated classification", "XLM-R base", dtype, timings, limit, note, failed)


@dataclass(frozen=True)
class StepRace:
    """A training step: BERT-base classifies paragraphs; forward, backward, AdamW.

    Attributes:
        lengths: of the paragraphs, in tokens.
        bf16: under autocast, as the Trainer's option of this name has it.
    """

    lengths: tuple[int, ...]
    bf16: bool

    def __str__(self) -> str:
        return f"drop-in training step {'bfloat16' if self.bf16 else 'float32'}"

    def run(self) -> Row:
        """Builds the contestants, compares their losses and gradients without dropout, times their steps."""
        import transformers

        config = transformers.BertConfig()
        torch.manual_seed(0)
        plain = transformers.BertForSequenceClassification(config)
        ids, mask = _batch(self.lengths, config.vocab_size, config.pad_token_id)
        given = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(ids)) % 2}
        models = {"pyxlbert": pyxlbert.accelerate(copy.deepcopy(plain)), "transformers": plain}
        found = {name: self._gradient(model.eval(), given) for name, model in models.items()}
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        compare.close("gradient", found["pyxlbert"], found["transformers"], tolerances.CONTESTANT[dtype])
        calls = {name: self._step(model.train(), given) for name, model in models.items()}
        timings = race(calls, rounds=5, rest=peers.REST)
        tokens = sum(self.lengths)
        limit = 3 * 2 * tokens * _matrices(plain.bert.encoder) / limits.gemm_rate(dtype)
        note = f"{len(self.lengths)} paragraphs of {tokens} tokens, {tokens / mask.numel():.0%} full: less work"
        shown = str(dtype).removeprefix("torch.")
        return Row("accelerated training step", "BERT-base", shown, timings, limit, note)

    def _gradient(self, model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            model(**given).loss.backward()
        gradient = model.bert.encoder.layer[0].intermediate.dense.weight.grad.clone()
        model.zero_grad()
        return gradient

    def _step(self, model: torch.nn.Module, given: dict[str, torch.Tensor]) -> Call:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = model(**given).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step


def _batch(lengths: tuple[int, ...], words: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and the mask `[B, T]` of paragraphs of these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, words, mask.shape, generator=torch.Generator().manual_seed(0))
    return torch.where(mask, ids, padding), mask.long()


def _compiled(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Call:
    from torch._inductor import config

    run = torch.compile(model)
    with config.patch(freezing=True), torch.no_grad():
        run(ids, mask)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return run(ids, mask).logits

    return call


def races(data: Path, model: Path) -> Iterator[Any]:
    """Sentences of STS-B and paragraphs of WikiText-2 through `model`; classification; training steps.

    Raises:
        FileNotFoundError: `data` lacks stsb/sts-dev.csv or wikitext2/valid.txt.
    """
    from transformers import AutoTokenizer

    with open(data / "stsb" / "sts-dev.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    short = tuple(text for row in rows[:128] for text in row[5:7])
    lines = (data / "wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines()
    paragraphs = [line.strip() for line in lines if line.strip() and not line.strip().startswith("=")]
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = tuple(min(len(one), LONGEST) for one in tokenizer(paragraphs[:16])["input_ids"])
    for dtype in (torch.float32, torch.bfloat16, "int8"):
        yield SentenceRace("short", short, model, dtype)
        yield SentenceRace("paragraphs", tuple(paragraphs[:48]), model, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        yield ClassificationRace(lengths, dtype)
    for bf16 in (False, True):
        yield StepRace(lengths[:8], bf16)
