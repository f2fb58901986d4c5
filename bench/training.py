"""Races of training: our model and transformers', with the same weights, in the same loop on the same rows.

The loop is that of `pyxlbert finetune` and `pyxlbert pretrain`: a step is its passes forward and backward, clipping and
AdamW.  Rows have the lengths of real paragraphs, and dropout is as models have it.  Losses and gradients are compared
with transformers' in float32, without dropout, before anything is timed.

XLNet is pretrained in two races.  In one an order of all places is drawn over random rows: nothing is seen by all, and
a token sees half of its row in the mean.  The other is what `pyxlbert pretrain xlnet` and Yang et al. train on: rows of
a text with spans to predict, a first block that sees nothing of the second, and memories that go from step to step.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
from pyxlbert.training.loop import Counts, Job, Loop, accelerator
from pyxlbert.training.options import TrainingOptions
from pyxlbert.training.pretraining import SegmentOptions, Segments, Vocabulary, open_or_build
from pyxlbert.training.pretraining.objective import PretrainingModel, counts
from pyxlbert.training.pretraining.steps import SegmentSteps
from pyxlbert.training.steps import Passes
from pyxlbert.training.tasks import TASKS

_ROWS = 8
PRETRAINING = 512  # tokens of a row, as XLNet was pretrained
# Steps of a text that are made before anything is timed, and how many fill the memories.
_STEPS, _FILLING = 24, 2
# Of base size, less deep.
_SIZES = {
    "Bert": {"num_hidden_layers": 4},
    "XLNet": xlnet_fields(4),
}


class _Steps:
    """What a loop asks of the steps' source that is given each one."""

    def __init__(self, steps: list[Passes]) -> None:
        self._steps, self.epoch_steps = steps, len(steps)

    def passes(self, step: int, rank: int, processes: int) -> Passes:
        """See `pyxlbert.training.steps.StepSource`."""
        return self._steps[step % self.epoch_steps]


class _Permuted(nn.Module):
    """Our XLNet that learns a permutation's targets without memories; called as `PretrainingModel` is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], remembers: bool = True) -> dict[str, Tensor]:
        """The sum over a batch's labels."""
        names = ("input_ids", "query_rank", "key_rank", "target_positions", "labels")
        output = self.model(**{name: batch[name] for name in names}, use_mems=False, output_logits=False)
        return {"tokens": output.loss * batch["labels"].numel()}


class _Dense(nn.Module):
    """transformers' XLNet on the same batches: ranks and places become the tensors of pairs that it takes."""

    def __init__(self, model: nn.Module, remembers: bool) -> None:
        super().__init__()
        self.model, self._remembers = model, remembers
        self._memories: dict[bool, Any] = {True: None, False: None}  # in training and in evaluation

    def forward(self, batch: dict[str, Tensor], remembers: bool = True) -> dict[str, Tensor]:
        """The sum over a batch's labels."""
        ids, labels, places = batch["input_ids"], batch["labels"], batch["target_positions"].long()
        mapping = nn.functional.one_hot(places.clamp(min=0), ids.shape[1]) * (places >= 0)[..., None]  # [B, M, T]
        output = self.model(
            ids,
            token_type_ids=batch.get("token_type_ids"),
            perm_mask=(batch["query_rank"][:, :, None] <= batch["key_rank"][:, None, :]).float(),  # [B, T, T]
            target_mapping=mapping.float(),
            mems=self._memories[self.training] if self._remembers and not bool(batch["begins"]) else None,
            use_mems=self._remembers,
        )
        self._memories[self.training] = output.mems
        logits = output.logits.float().flatten(0, 1)  # [B M, V]
        return {"tokens": nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")}


class _Work(NamedTuple):
    """What a step's products with weights multiply.

    Attributes:
        tokens: of the batch, without padding.
        targets: of the query stream, all of which the output layer multiplies.
        memories: rows of earlier steps, of which keys and values are made.
        distances: that pairs of places are at, summed over the sequences, each of which has its own by dropout.
    """

    tokens: int
    targets: int
    memories: int
    distances: int


@dataclass(frozen=True)
class TrainingRace:
    """Steps of one model on one batch.

    Attributes:
        name: "BERT classifies", "XLNet classifies", "XLNet pretrains" or "XLNet pretrains, with memory".
        lengths: of the rows, in tokens.
        dtype: bfloat16 is `--precision bfloat16`.
        text: with memory, a text file.
        tokenizer: and the directory of what makes tokens of it.
    """

    name: str
    lengths: tuple[int, ...]
    dtype: torch.dtype
    text: Path | None = None
    tokenizer: Path | None = None

    def __str__(self) -> str:
        return f"training {self.name} {self.dtype}"

    def run(self, settings: Settings = Settings()) -> Row:  # noqa: B008, it is frozen
        """Builds both, compares their losses and gradients, times their steps."""
        theirs, ours = self._models()
        steps = self._steps(theirs.config.vocab_size)
        makes = {"pyxlbert": (ours, False), "transformers": (theirs, True)}
        wanted = {name: make for name, make in makes.items() if settings.wants(name)}
        checked = [passes.batches[0] for passes in steps[: _FILLING + 1]]
        truth = _gradient(self._module(copy.deepcopy(theirs), True).eval(), checked, self._counts, torch.float32)
        modules = {name: self._module(*make) for name, make in wanted.items()}
        found = {name: _gradient(one.eval(), checked, self._counts, self.dtype) for name, one in modules.items()}

        def check(name: str, output: Any) -> None:
            for what, exact in truth.items():
                compare.close(f"{name}: {what}", found[name][what], exact, tolerances.CONTESTANT[self.dtype])

        rest = peers.REST if settings.rest is None else settings.rest

        def timer(copies: list[Contestants]) -> dict[str, Timing]:
            return race(copies[0], rounds=settings.rounds or 5, rest=rest)

        with tempfile.TemporaryDirectory() as folder:
            calls = {
                name: self._training(one, steps, Path(folder) / str(place))
                for place, (name, one) in enumerate(modules.items())
            }
            timings, failed = contest([calls], check, timer)
        dtype = str(self.dtype).removeprefix("torch.")
        limit = _flops(theirs, self._work(checked[-1])) / limits.gemm_rate(self.dtype)
        return Row("training loop", self.name, dtype, timings, limit, self._note(theirs), failed)

    @property
    def _pretrains(self) -> bool:
        return "pretrains" in self.name

    @property
    def _remembers(self) -> bool:
        return self.text is not None

    @property
    def _recipe(self) -> SegmentOptions:
        """Of a text's rows: XLNet's own sizes at its own length."""
        length = max(self.lengths)
        return SegmentOptions(
            max_length=length, reuse_len=length // 2, perm_size=length // 2, num_predict=length // 6, seed=0
        )

    @property
    def _memory(self) -> int:
        """mem_len."""
        return max(self.lengths) * 3 // 4 if self._remembers else 0

    def _note(self, theirs: nn.Module) -> str:
        tokens, rows, longest = sum(self.lengths), len(self.lengths), max(self.lengths)
        note = f"{theirs.config.num_hidden_layers} layers of base size, "
        if self._remembers:
            recipe = self._recipe
            note += f"{rows} rows of {longest} tokens, {self._memory} remembered, {recipe.num_predict} targets, "
            return f"{note}{recipe.reuse_len} tokens that see nothing of the rest"
        full = tokens / (rows * longest)
        note += f"{rows} paragraphs of {tokens} tokens"
        return note + (f", {full:.0%} full: less work" if full < 1 else "")

    def _work(self, batch: dict[str, Tensor]) -> _Work:
        tokens, rows = sum(self.lengths), len(self.lengths)
        targets = int((batch["target_positions"] >= 0).sum()) if self._pretrains else 0
        # A token meets places before it and behind it; behind it, those of its own block.
        behind = rows * self._recipe.reuse_len if self._remembers else tokens
        memories = rows * self._memory
        return _Work(tokens, targets, memories, memories + tokens + behind)

    def _models(self) -> tuple[nn.Module, nn.Module]:
        """transformers' and ours, with the same weights."""
        import transformers

        from pyxlbert import models

        kind = "Bert" if self.name.startswith("BERT") else "XLNet"
        remembered = {"mem_len": self._memory, "reuse_len": self._recipe.reuse_len} if self._remembers else {}
        config = getattr(transformers, f"{kind}Config")(**_SIZES[kind], **remembered)
        head = "LMHeadModel" if self._pretrains else "ForSequenceClassification"
        torch.manual_seed(0)
        theirs = getattr(transformers, kind + head)(config)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            return theirs, getattr(models, kind + head).from_pretrained(folder)

    def _module(self, model: nn.Module, theirs: bool) -> nn.Module:
        if not self._pretrains:
            return TaskModel(TASKS["text-classification"](), model)
        if theirs:
            return _Dense(model, self._remembers)
        return PretrainingModel(model) if self._remembers else _Permuted(model)

    def _counts(self, batch: dict[str, Tensor]) -> dict[str, int]:
        return counts(batch) if self._pretrains else {"loss": len(self.lengths)}

    def _steps(self, words: int) -> list[Passes]:
        """The steps of a text, or one step; a loop begins again where they end, with memories behind those that fill
        them.
        """
        rows = len(self.lengths)
        if not self._remembers:
            return [Passes([self._batch(words)], 1, rows)]
        vocabulary = Vocabulary.read(self.tokenizer, "xlnet")
        with tempfile.TemporaryDirectory() as folder:
            # One document: what is remembered is what stands before it in the text.
            store = open_or_build([self.text], vocabulary, folder, layout="files")
            source = SegmentSteps(Segments(store, vocabulary, self._recipe, rows), None, 1)
            return [source.passes(step, 0, 1) for step in range(min(_STEPS, source.epoch_steps))]

    def _batch(self, words: int) -> dict[str, Tensor]:
        """Random ids; of pretraining rows that are full, a permutation, and a sixth of the places as targets."""
        g = torch.Generator().manual_seed(0)
        rows, length = len(self.lengths), max(self.lengths)
        ids = torch.randint(10, words, (rows, length), generator=g)
        if self._pretrains:
            rank = torch.stack([torch.randperm(length, generator=g) for _ in range(rows)]).int()
            targets = rank.argsort(1)[:, length - length // 6 :].sort(1).values
            labels = ids.gather(1, targets)
            return {
                "input_ids": ids,
                "query_rank": rank,
                "key_rank": rank,
                "target_positions": targets,
                "labels": labels,
            }
        real = torch.arange(length) < torch.tensor(self.lengths)[:, None]
        if self.name.startswith("XLNet"):
            real = real.flip(1)  # XLNet's padding is on the left
        batch = {"input_ids": ids * real, "attention_mask": real.long(), "token_type_ids": torch.zeros_like(ids)}
        return batch | {"labels": torch.arange(rows) % 2}

    def _training(self, module: nn.Module, steps: list[Passes], folder: Path) -> Callable[[], None]:
        """The next step of a loop that has no end; a contest calls it more often than memories need before it times."""
        folder.mkdir()
        options = TrainingOptions(
            max_steps=1_000_000,
            batch_size=len(self.lengths),
            learning_rate=1e-6,
            precision=str(self.dtype).removeprefix("torch."),
            progress=False,
        )
        job = Job(
            module=module,
            source=_Steps(steps),
            counts=self._counts,
            metric=("loss", False),
            evaluate=None,
            save=lambda state: None,
            title=str(self),
        )
        loop = Loop(job, options, folder, accelerator())
        module.train()
        turns = itertools.chain(steps[:_FILLING], itertools.cycle(steps[_FILLING:] or steps))
        return lambda: (loop.step(next(turns)), None)[1]


def _flops(model: nn.Module, work: _Work) -> int:
    """What a step's products with weights take at least.

    A linear of the layers multiplies each token, and of XLNet's each target, whose content stream ends at the last
    layer's keys and values.  Memories become keys and values too, but have no gradient.  A pair of tokens of one
    sequence is at one of some distances, which dropout makes the sequence's own, and whose embeddings are not learned:
    they need no gradient either.  What the heads multiply of a sequence's summary is left out.

    Args:
        model: transformers'.
        work: what is multiplied.
    """
    if not hasattr(model, "transformer"):
        linears = [one for one in model.bert.encoder.modules() if isinstance(one, nn.Linear)]
        return 6 * work.tokens * sum(one.weight.numel() for one in linears)
    learned = given = 0  # products whose rows have a gradient, and those whose rows have none
    for place, layer in enumerate(model.transformer.layer):
        attention = layer.rel_attn
        keys, queries = attention.k.numel() + attention.v.numel(), attention.q.numel() + attention.o.numel()
        queries += layer.ff.layer_1.weight.numel() + layer.ff.layer_2.weight.numel()
        content = 0 if work.targets and place == len(model.transformer.layer) - 1 else work.tokens
        learned += work.tokens * keys + (content + work.targets) * queries
        given += work.memories * keys + work.distances * attention.r.numel()
    if work.targets:
        learned += work.targets * model.lm_loss.weight.numel()
    return 6 * learned + 4 * given


def _gradient(
    module: nn.Module, batches: list[dict[str, Tensor]], counts: Counts, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Of the last batch, after what the module remembers of those before it: the mean loss, and gradients of the first
    layer's `_LEARNED`, in the order in which they stand there; the module has none afterwards.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        with torch.no_grad():
            for batch in batches[:-1]:
                module(batch, True)
        sums = module(batches[-1], True)
    loss = sum(value / counts(batches[-1])[name] for name, value in sums.items())
    loss.backward()
    named = ((name, one.grad) for name, one in module.named_parameters() if ".layer.0." in name)
    learned = [gradient.clone() for name, gradient in named if name.endswith(_LEARNED)]
    module.zero_grad()
    return {"loss": loss.detach()} | {f"gradient {place}": one for place, one in enumerate(learned)}


# Ours and transformers' have the same names.  Of memories the keys are made.
_LEARNED = ("self.key.weight", "rel_attn.k", "intermediate.dense.weight", "ff.layer_1.weight")


def races(data: Path, model: Path) -> Iterator[TrainingRace]:
    """Paragraphs of WikiText-2 as `model` tokenises them, in the order of the corpus.

    Raises:
        FileNotFoundError: `data` lacks wikitext2/valid.txt.
    """
    from transformers import AutoTokenizer

    text = data / "wikitext2" / "valid.txt"
    lines = text.read_text(encoding="utf-8").splitlines()
    paragraphs = (line.strip() for line in lines if line.strip() and not line.strip().startswith("="))
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = tokenizer(list(itertools.islice(paragraphs, _ROWS)))["input_ids"]
    lengths = tuple(min(len(one), LONGEST) for one in found)
    for dtype in (torch.float32, torch.bfloat16):
        yield TrainingRace("BERT classifies", lengths, dtype)
        yield TrainingRace("XLNet classifies", lengths, dtype)
        yield TrainingRace("XLNet pretrains", (PRETRAINING,) * 2, dtype)
        yield TrainingRace("XLNet pretrains, with memory", (PRETRAINING,) * 2, dtype, text, model)
