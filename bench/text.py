"""Races of sentence encoding on real texts: ours against transformers, ONNX Runtime and OpenVINO.

Every contestant embeds the same texts to the same normalised mean, in batches of 32 sorted by length, tokenisation
included, and is compared with transformers in float32 before it is timed.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pyxlbert.bench import peers
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import race

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
        alone: each contestant is timed by itself, after a rest, and ONNX Runtime's threads may spin between calls.
    """

    name: str
    texts: tuple[str, ...]
    model: Path
    dtype: torch.dtype | str
    alone: bool = False

    def __str__(self) -> str:
        return f"text {self.name} {self.dtype}"

    def run(self) -> Row:
        """Builds the contestants, compares their vectors, times them."""
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        hf = AutoModel.from_pretrained(self.model, attn_implementation="sdpa").eval()
        encoder = pyxlbert.SentenceEncoder.from_pretrained(self.model, dtype=self.dtype)
        limit = encoder.tokenizer.max_length

        def encode(forward: Forward) -> np.ndarray:
            order = sorted(range(len(self.texts)), key=lambda i: -len(self.texts[i]))
            result = np.empty((len(self.texts), hf.config.hidden_size), np.float32)
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                batch = tokenizer(
                    [self.texts[i] for i in rows], padding=True, truncation=True, max_length=limit, return_tensors="pt"
                )
                ids, mask = batch["input_ids"], batch["attention_mask"]
                hidden = forward(ids, mask).float()
                weights = mask[..., None].float()
                result[rows] = F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1).numpy()
            return result

        def torch_forward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return hf(input_ids=ids, attention_mask=mask).last_hidden_state

        truth = encode(torch_forward)
        dtype = torch.bfloat16 if self.dtype == "int8" else self.dtype
        texts = list(self.texts) if len(self.texts) > 1 else self.texts[0]
        contestants: dict[str, Encode] = {
            "pyxlbert": lambda: encoder.encode(texts, batch_size=BATCH, normalize=True),
        }
        failed = {}
        onnx_runtime = partial(peers.onnx_runtime_any, spinning=self.alone)
        builds = {"ONNX Runtime": onnx_runtime, "OpenVINO": peers.openvino_any}
        if self.dtype == "int8":
            integers = partial(onnx_runtime, quantised=True)
            builds = {"ONNX Runtime int8": lambda hf, _: integers(hf, torch.float32), "OpenVINO": peers.openvino_any}
        for name, build in builds.items():
            try:
                forward = build(hf, dtype)
                contestants[name] = lambda forward=forward: encode(forward)
                contestants[name]()
            except Exception as error:  # a peer that fails is a line of the report
                contestants.pop(name, None)
                failed[name] = f"{type(error).__name__}: {error}"[:160]
        hf = hf.to(dtype)
        contestants["transformers"] = lambda: encode(torch_forward)
        ours = np.atleast_2d(contestants["pyxlbert"]())
        limit_of = tolerances.COSINE_INT8 if self.dtype == "int8" else tolerances.COSINE[self.dtype]
        worst = compare.cosine_distance("pyxlbert", torch.from_numpy(ours), torch.from_numpy(truth), limit_of)
        off = {name: _worst(np.atleast_2d(call()), truth) for name, call in contestants.items()}
        if self.alone:
            timings = {}
            for name, call in contestants.items():
                time.sleep(REST)
                timings |= race({name: call}, rounds=21)
        else:
            timings = race(contestants, rounds=7, rest=peers.REST)
        rate = len(self.texts) / timings["pyxlbert"].median
        note = f"{len(self.texts)} texts, {rate:.0f} texts a second, worst 1 - cosine {worst:.1e}"
        note += "".join(f", {name} {far:.1e}" for name, far in off.items() if name != "pyxlbert")
        return Row("sentence encoder", self.name, str(self.dtype).removeprefix("torch."), timings, None, note, failed)


def _worst(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest 1 - cosine of two vectors of a text."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(truth, axis=1)
    return float(1 - ((found * truth).sum(1) / lengths).min())


def races(data: Path, model: Path) -> Iterator[TextRace]:
    """Short texts from STS-B, long ones from WikiText-2, and one short text alone.

    Raises:
        FileNotFoundError: `data` lacks stsb/sts-dev.csv or wikitext2/valid.txt.
    """
    with open(data / "stsb" / "sts-dev.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    short = tuple(text for row in rows[:320] for text in row[5:7])
    lines = (data / "wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines()
    long = tuple(line.strip() for line in lines if len(line.split()) > 60)[:128]
    for dtype in (torch.float32, torch.bfloat16, "int8"):
        yield TextRace("short", short, model, dtype)
        yield TextRace("long", long, model, dtype)
        yield TextRace("one short", short[:1], model, dtype)
        yield TextRace("one short, alone", short[:1], model, dtype, alone=True)
