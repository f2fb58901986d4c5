"""Races of training: our model and transformers', with the same weights, in the same loop on the same rows.

The loop is that of `pyxlbert finetune` and `pyxlbert pretrain`: a step is its passes forward and backward, clipping and
AdamW.  Rows have the lengths of real paragraphs, and dropout is as models have it.  Losses and gradients are compared
with transformers' in float32, without dropout, before anything is timed.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyxlbert.bench import limits, peers
from pyxlbert.bench.contest import Settings, contest
from pyxlbert.bench.drop_in import LONGEST
from pyxlbert.bench.report import Row
from pyxlbert.bench.sizes import xlnet_fields
from pyxlbert.bench.timer import Contestants, Timing, race
from torch import Tensor, nn

from pyxlbert.testing import compare, tolerances
from pyxlbert.training.evaluation import TaskModel
from pyxlbert.training.loop import Job, Loop, accelerator
from pyxlbert.training.options import TrainingOptions
from pyxlbert.training.steps import Passes
from pyxlbert.training.tasks import TASKS

_ROWS = 8
PRETRAINING = 512  # tokens of a row, as XLNet was pretrained
# Of base size, less deep.
_SIZES = {
    "Bert": {"num_hidden_layers": 4},
    "XLNet": xlnet_fields(4),
}


class _Steps:
    """One step, again and again."""

    epoch_steps = 1

    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def passes(self, step: int, rank: int, processes: int) -> Passes:
        """See `pyxlbert.training.steps.StepSource`."""
        return self._passes


class _Permuted(nn.Module):
    """An XLNet that learns a permutation's targets, ours or transformers'; called as `PretrainingModel` is."""

    def __init__(self, model: nn.Module, dense: bool) -> None:
        super().__init__()
        self.model, self._dense = model, dense

    def forward(self, batch: dict[str, Tensor], remembers: bool = True) -> dict[str, Tensor]:
        """The sum over a batch's labels."""
        ids, labels, rank = batch["input_ids"], batch["labels"], batch["query_rank"]
        given: dict[str, Tensor] = {"input_ids": ids, "use_mems": False}
        if not self._dense:
            names = ("query_rank", "key_rank", "target_positions")
            output = self.model(**given, **{name: batch[name] for name in names}, labels=labels, output_logits=False)
            return {"tokens": output.loss * labels.numel()}
        length = ids.shape[1]
        given["perm_mask"] = (rank[:, :, None] <= rank[:, None, :]).float()
        given["target_mapping"] = nn.functional.one_hot(batch["target_positions"].long(), length).float()
        logits = self.model(**given).logits.float()  # [B, M, V]
        return {"tokens": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")}


@dataclass(frozen=True)
class TrainingRace:
    """Steps of one model on one batch.

    Attributes:
        name: "BERT classifies", "XLNet classifies" or "XLNet pretrains".
        lengths: of the rows, in tokens.
        dtype: bfloat16 is `--precision bfloat16`.
    """

    name: str
    lengths: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"training {self.name} {self.dtype}"

    def run(self, settings: Settings = Settings()) -> Row:  # noqa: B008, it is frozen
        """Builds both, compares their losses and gradients, times their steps."""
        theirs, ours = self._models()
        batch, counts = self._batch(theirs.config.vocab_size)
        makes = {"pyxlbert": (ours, False), "transformers": (theirs, True)}
        wanted = {name: make for name, make in makes.items() if settings.wants(name)}
        truth = _gradient(self._module(copy.deepcopy(theirs), True).eval(), batch, counts, torch.float32)
        modules = {name: self._module(*make) for name, make in wanted.items()}
        found = {name: _gradient(one.eval(), batch, counts, self.dtype) for name, one in modules.items()}

        def check(name: str, output: Any) -> None:
            for what, got, exact in zip(("loss", "gradient"), found[name], truth, strict=True):
                compare.close(f"{name}: {what}", got, exact, tolerances.CONTESTANT[self.dtype])

        rest = peers.REST if settings.rest is None else settings.rest

        def timer(copies: list[Contestants]) -> dict[str, Timing]:
            return race(copies[0], rounds=settings.rounds or 5, rest=rest)

        with tempfile.TemporaryDirectory() as folder:
            calls = {
                name: self._steps(one, batch, counts, Path(folder) / str(place))
                for place, (name, one) in enumerate(modules.items())
            }
            timings, failed = contest([calls], check, timer)
        tokens = sum(self.lengths)
        targets = counts["tokens"] if "pretrains" in self.name else 0
        dtype = str(self.dtype).removeprefix("torch.")
        limit = _flops(theirs, tokens, targets) / limits.gemm_rate(self.dtype)
        full = tokens / (len(self.lengths) * max(self.lengths))
        note = (
            f"{theirs.config.num_hidden_layers} layers of base size, {len(self.lengths)} paragraphs of {tokens} tokens"
        )
        note += f", {full:.0%} full: less work" if full < 1 else ""
        return Row("training loop", self.name, dtype, timings, limit, note, failed)

    def _models(self) -> tuple[nn.Module, nn.Module]:
        """transformers' and ours, with the same weights."""
        import transformers

        from pyxlbert import models

        kind = "Bert" if self.name.startswith("BERT") else "XLNet"
        config = getattr(transformers, f"{kind}Config")(**_SIZES[kind])
        head = "LMHeadModel" if "pretrains" in self.name else "ForSequenceClassification"
        torch.manual_seed(0)
        theirs = getattr(transformers, kind + head)(config)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            return theirs, getattr(models, kind + head).from_pretrained(folder)

    def _module(self, model: nn.Module, theirs: bool) -> nn.Module:
        if "pretrains" in self.name:
            return _Permuted(model, dense=theirs)
        return TaskModel(TASKS["text-classification"](), model)

    def _batch(self, words: int) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Random ids; of pretraining rows that are full, a permutation, and a sixth of the places as targets."""
        g = torch.Generator().manual_seed(0)
        rows, length = len(self.lengths), max(self.lengths)
        ids = torch.randint(10, words, (rows, length), generator=g)
        if "pretrains" in self.name:
            rank = torch.stack([torch.randperm(length, generator=g) for _ in range(rows)]).int()
            targets = rank.argsort(1)[:, length - length // 6 :].sort(1).values
            labels = ids.gather(1, targets)
            batch = {"input_ids": ids, "query_rank": rank, "key_rank": rank, "target_positions": targets}
            return batch | {"labels": labels}, {"tokens": labels.numel()}
        real = torch.arange(length) < torch.tensor(self.lengths)[:, None]
        if self.name.startswith("XLNet"):
            real = real.flip(1)  # XLNet's padding is on the left
        batch = {"input_ids": ids * real, "attention_mask": real.long(), "token_type_ids": torch.zeros_like(ids)}
        return batch | {"labels": torch.arange(rows) % 2}, {"loss": rows}

    def _steps(
        self, module: nn.Module, batch: dict[str, Tensor], counts: dict[str, int], folder: Path
    ) -> Callable[[], None]:
        """The next step of a loop that has no end."""
        folder.mkdir()
        options = TrainingOptions(
            max_steps=1_000_000,
            batch_size=len(self.lengths),
            learning_rate=1e-6,
            precision=str(self.dtype).removeprefix("torch."),
            progress=False,
        )
        passes = Passes([batch], 1, len(self.lengths))
        job = Job(module, _Steps(passes), lambda one: counts, ("loss", False), None, lambda state: None, {}, "")
        loop = Loop(job, options, folder, accelerator())
        module.train()
        return lambda: (loop.step(passes), None)[1]


def _flops(model: nn.Module, tokens: int, targets: int) -> int:
    """What a step's products with weights take at least.

    A linear of the layers multiplies each token, and of XLNet's each target, whose content stream ends at the last
    layer's keys and values.  A pair of tokens of one sequence is at one of twice as many distances as it has tokens,
    which dropout makes the sequence's own, and whose embeddings are not learned: they need no gradient.  What the heads
    multiply of a sequence's summary is left out.

    Args:
        model: transformers'.
        tokens: of the batch, without padding.
        targets: of the query stream, all of which the output layer multiplies; 0 for none.
    """
    if not hasattr(model, "transformer"):
        return (
            6 * tokens * sum(one.weight.numel() for one in model.bert.encoder.modules() if isinstance(one, nn.Linear))
        )
    products = distances = 0
    for place, layer in enumerate(model.transformer.layer):
        attention = layer.rel_attn
        keys, queries = attention.k.numel() + attention.v.numel(), attention.q.numel() + attention.o.numel()
        queries += layer.ff.layer_1.weight.numel() + layer.ff.layer_2.weight.numel()
        content = 0 if targets and place == len(model.transformer.layer) - 1 else tokens
        products += tokens * keys + (content + targets) * queries
        distances += 2 * tokens * attention.r.numel()
    if targets:
        products += targets * model.lm_loss.weight.numel()
    return 6 * products + 4 * distances


def _gradient(
    module: nn.Module, batch: dict[str, Tensor], counts: dict[str, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The mean loss, and the gradient of a matrix of the first layer; the module has none afterwards."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        sums = module(batch, True)
    loss = sum(value / counts[name] for name, value in sums.items())
    loss.backward()
    named = {name: one.grad for name, one in module.named_parameters() if one.grad is not None}
    first = next(name for name in named if ".layer.0." in name and name.endswith(_FIRST))
    gradient = named[first].clone()
    module.zero_grad()
    return loss.detach(), gradient


_FIRST = ("intermediate.dense.weight", "ff.layer_1.weight")


def races(data: Path, model: Path) -> Iterator[TrainingRace]:
    """Paragraphs of WikiText-2 as `model` tokenises them, in the order of the corpus.

    Raises:
        FileNotFoundError: `data` lacks wikitext2/valid.txt.
    """
    from transformers import AutoTokenizer

    lines = (data / "wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines()
    paragraphs = (line.strip() for line in lines if line.strip() and not line.strip().startswith("="))
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = tokenizer(list(itertools.islice(paragraphs, _ROWS)))["input_ids"]
    lengths = tuple(min(len(one), LONGEST) for one in found)
    for dtype in (torch.float32, torch.bfloat16):
        yield TrainingRace("BERT classifies", lengths, dtype)
        yield TrainingRace("XLNet classifies", lengths, dtype)
        yield TrainingRace("XLNet pretrains", (PRETRAINING,) * 2, dtype)
