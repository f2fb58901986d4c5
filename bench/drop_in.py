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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyxlbert.bench import limits, peers
from pyxlbert.bench.contest import Settings, contest, lazily
from pyxlbert.bench.report import Row
from pyxlbert.bench.text import Distances
from pyxlbert.bench.timer import Contestants, Timing, race

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

    def run(self, settings: Settings = Settings()) -> Row:  # noqa: B008, it is frozen
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

        def accelerated() -> Any:
            return pyxlbert.accelerate(load().to(dtype))

        def engine(build: Callable[..., peers.Forward], **options: Any) -> Any:
            other = load()
            other[0].model = _Engine(hf.config, build(hf, dtype, **options))
            return other

        makes = {"pyxlbert": lambda: pyxlbert.pack(accelerated(), "int8" if quantised else None)}
        if quantised:
            makes["ONNX Runtime int8"] = lambda: engine(peers.onnx_runtime_any, quantised=True)
        else:
            makes["pyxlbert, not packed"] = accelerated
            makes["ONNX Runtime"] = lambda: engine(peers.onnx_runtime_any)
        makes["OpenVINO"] = lambda: engine(peers.openvino_any)
        makes["sentence-transformers"] = lambda: load().to(dtype)

        def encoding(make: Callable[[], Any]) -> Call:
            return lazily(lambda: partial(make().encode, texts))

        calls = {name: encoding(make) for name, make in makes.items() if settings.wants(name)}
        check = Distances(truth, self.dtype)
        timings, failed = contest([calls], check, _timer(settings, 7))
        note = f"{len(texts)} texts of {tokens} tokens, {check.note()}"
        config = hf.config
        case = f"{config.model_type} {config.num_hidden_layers}x{config.hidden_size} {self.name}"
        shown = "int8" if quantised else str(dtype).removeprefix("torch.")
        return Row("accelerated sentences", case, shown, timings, limit, note, failed)


def _timer(settings: Settings, rounds: int) -> Callable[[list[Contestants]], dict[str, Timing]]:
    rest = peers.REST if settings.rest is None else settings.rest
    return lambda copies: race(copies[0], rounds=settings.rounds or rounds, rest=rest)


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

    def run(self, settings: Settings = Settings()) -> Row:  # noqa: B008, it is frozen
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
        makes = {
            "pyxlbert": lambda: call(pyxlbert.pack(pyxlbert.accelerate(copy.deepcopy(plain)))),
            "pyxlbert, not packed": lambda: call(pyxlbert.accelerate(copy.deepcopy(plain))),
            "transformers": lambda: call(plain),
            "torch.compile": lambda: _compiled(copy.deepcopy(plain), ids, mask),
        }

        def check(name: str, output: torch.Tensor) -> None:
            compare.close(name, output.float(), truth, tolerances.CONTESTANT[self.dtype])

        calls = {name: lazily(make) for name, make in makes.items() if settings.wants(name)}
        timings, failed = contest([calls], check, _timer(settings, 7))
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

    def run(self, settings: Settings = Settings()) -> Row:  # noqa: B008, it is frozen
        """Builds the contestants, compares their losses and gradients without dropout, times their steps."""
        import transformers

        config = transformers.BertConfig()
        torch.manual_seed(0)
        plain = transformers.BertForSequenceClassification(config)
        ids, mask = _batch(self.lengths, config.vocab_size, config.pad_token_id)
        given = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(ids)) % 2}
        models = {"pyxlbert": pyxlbert.accelerate(copy.deepcopy(plain)), "transformers": plain}
        wanted = {name: model for name, model in models.items() if settings.wants(name)}
        truth = self._gradient(plain.eval(), given)
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        calls = {name: self._step(model, given) for name, model in wanted.items()}

        def check(name: str, output: None) -> None:
            compare.close(f"{name}: gradient", gradients[name], truth, tolerances.CONTESTANT[dtype])

        # Before any step: a step changes the weights.
        gradients = {name: self._gradient(model.eval(), given) for name, model in wanted.items()}
        for model in wanted.values():
            model.train()
        timings, failed = contest([calls], check, _timer(settings, 5))
        tokens = sum(self.lengths)
        limit = 3 * 2 * tokens * _matrices(plain.bert.encoder) / limits.gemm_rate(dtype)
        note = f"{len(self.lengths)} paragraphs of {tokens} tokens, {tokens / mask.numel():.0%} full: less work"
        shown = str(dtype).removeprefix("torch.")
        return Row("accelerated training step", "BERT-base", shown, timings, limit, note, failed)

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
