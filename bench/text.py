"""Races of sentence encoding on real texts: ours against transformers, ONNX Runtime and OpenVINO.

Every contestant embeds the same texts to the same normalised mean, in batches of 32 sorted by length, tokenisation
included, and is compared with transformers in float32 before it is timed.
"""

from __future__ import annotations

import copy
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pyxlbert.bench import peers
from pyxlbert.bench.contest import Settings, contest, lazily
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import Contestants, Timing, race

import pyxlbert
from pyxlbert.testing import compare, tolerances

BATCH = 32
REST = 1.0  # seconds, after which no thread of the last contestant spins any more
Encode = Callable[[], np.ndarray]
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TextRace:
    """Some texts, one dtype.

    Attributes:
        name: "short", "long", "one short" or "one short, alone".
        texts: to embed.
        model: a sentence-transformers directory.
        dtype: of the model's products; "int8" is raced against the peers' integers and bfloat16.
        calibration: other texts, on which a peer finds the ranges of its integers.
        alone: each contestant is timed by itself, after a rest, and ONNX Runtime's threads may spin between calls.
    """

    name: str
    texts: tuple[str, ...]
    model: Path
    dtype: torch.dtype | str
    calibration: tuple[str, ...] = ()
    alone: bool = False

    def __str__(self) -> str:
        return f"text {self.name} {self.dtype}"

    def run(self, settings: Settings = Settings()) -> Row:  # noqa: B008, it is frozen
        """Builds the contestants, compares their vectors, times them."""
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        hf = AutoModel.from_pretrained(self.model, attn_implementation="sdpa").eval()
        encoder = pyxlbert.SentenceEncoder.from_pretrained(self.model, dtype=self.dtype)
        limit = encoder.tokenizer.max_length

        def tokenize(texts: Sequence[str]) -> dict[str, torch.Tensor]:
            batch = tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
            return {name: batch[name] for name in ("input_ids", "attention_mask")}

        def encode(forward: Forward) -> np.ndarray:
            order = sorted(range(len(self.texts)), key=lambda i: -len(self.texts[i]))
            result = np.empty((len(self.texts), hf.config.hidden_size), np.float32)
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                batch = tokenize([self.texts[i] for i in rows])
                hidden = forward(**batch).float()
                weights = batch["attention_mask"][..., None].float()
                result[rows] = F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1).numpy()
            return result

        def torch_forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return hf(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

        truth = encode(torch_forward)
        dtype = torch.bfloat16 if self.dtype == "int8" else self.dtype
        texts = list(self.texts) if len(self.texts) > 1 else self.texts[0]
        onnx_runtime = partial(peers.onnx_runtime_any, spinning=self.alone)
        builds = {"ONNX Runtime": onnx_runtime, "OpenVINO": peers.openvino_any}
        if self.dtype == "int8":
            integers = partial(onnx_runtime, quantised=True)
            samples = [tokenize([text]) for text in self.calibration]
            builds = {
                "ONNX Runtime int8": lambda hf, _: integers(hf, torch.float32),
                "OpenVINO": peers.openvino_any,
                "OpenVINO int8": partial(peers.openvino_any, calibration=samples),
            }
        same = copy.deepcopy(hf)

        def other(build: Callable[..., Forward]) -> Encode:
            return lazily(lambda: partial(encode, build(same, dtype)))

        contestants: dict[str, Encode] = {
            "pyxlbert": lambda: encoder.encode(texts, batch_size=BATCH, normalize=True),
            **{name: other(build) for name, build in builds.items()},
            "transformers": lambda: encode(torch_forward),
        }
        hf = hf.to(dtype)
        check = Distances(truth, self.dtype)

        def timer(copies: list[Contestants]) -> dict[str, Timing]:
            if not self.alone:
                rest = peers.REST if settings.rest is None else settings.rest
                return race(copies[0], rounds=settings.rounds or 7, rest=rest)
            timings = {}
            for name, call in copies[0].items():
                time.sleep(REST)
                timings |= race({name: call}, rounds=settings.rounds or 21)
            return timings

        wanted = {name: call for name, call in contestants.items() if settings.wants(name)}
        timings, failed = contest([wanted], check, timer)
        note = f"{len(self.texts)} texts"
        if "pyxlbert" in timings:
            note += f", {len(self.texts) / timings['pyxlbert'].median:.0f} texts a second"
        note += f", {check.note()}"
        return Row("sentence encoder", self.name, str(self.dtype).removeprefix("torch."), timings, None, note, failed)


class Distances:
    """The check of vectors `[N, E]`, or one, beside transformers' in float32; remembers the worst of each contestant.

    Args:
        truth: transformers' vectors.
        dtype: of the race; ours is held to what rounding in it allows, others to being near.
    """

    def __init__(self, truth: np.ndarray, dtype: torch.dtype | str) -> None:
        self._truth = torch.from_numpy(np.atleast_2d(truth))
        self._ours = tolerances.COSINE_INT8 if dtype == "int8" else tolerances.COSINE[dtype]
        self.worst: dict[str, float] = {}

    def __call__(self, name: str, output: np.ndarray) -> None:
        """See `contest`."""
        limit = self._ours if name.startswith("pyxlbert") else tolerances.COSINE_CONTESTANT
        found = torch.from_numpy(np.atleast_2d(output))
        self.worst[name] = compare.cosine_distance(name, found, self._truth, limit)

    def note(self) -> str:
        """The distances in words."""
        return "worst 1 - cosine " + ", ".join(f"{name} {far:.1e}" for name, far in self.worst.items())


def races(data: Path, model: Path) -> Iterator[TextRace]:
    """Short texts from STS-B, long ones from WikiText-2, and one short text alone.

    Raises:
        FileNotFoundError: `data` lacks stsb/sts-dev.csv or wikitext2/valid.txt.
    """
    with open(data / "stsb" / "sts-dev.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    short = tuple(text for row in rows[:320] for text in row[5:7])
    # Three hundred, NNCF's own number, of both kinds.
    others = tuple(row[5] for row in rows[320:470])
    lines = (data / "wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines()
    paragraphs = tuple(line.strip() for line in lines if len(line.split()) > 60)
    long, others = paragraphs[:128], others + paragraphs[128:278]
    for dtype in (torch.float32, torch.bfloat16, "int8"):
        yield TextRace("short", short, model, dtype, others)
        yield TextRace("long", long, model, dtype, others)
        yield TextRace("one short", short[:1], model, dtype, others)
        yield TextRace("one short, alone", short[:1], model, dtype, others, alone=True)
