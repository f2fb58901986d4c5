"""Pretraining: from text files to a model's directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyxlbert.files import named_path, shown, whole_directory, whole_file
from pyxlbert.models.albert import AlbertConfig, AlbertForPreTraining
from pyxlbert.models.bert import BertConfig
from pyxlbert.models.bert_heads import BertForPreTraining
from pyxlbert.models.xlnet_config import XLNetConfig
from pyxlbert.models.xlnet_heads import XLNetLMHeadModel
from pyxlbert.training import checkpoints
from pyxlbert.training.claim import FILE
from pyxlbert.training.loop import Job, Loop, accelerator, check_run, started_run
from pyxlbert.training.options import TrainingOptions
from pyxlbert.training.pretraining.documents import check_files, check_layout, named, on_disk
from pyxlbert.training.pretraining.fits import check_pairs, check_pieces, check_segments, check_sizes
from pyxlbert.training.pretraining.objective import PretrainingModel, counts
from pyxlbert.training.pretraining.pairs import PairOptions, SentencePairs
from pyxlbert.training.pretraining.rules import MOST_LENGTH, MOST_PIECES, require_integer, require_share
from pyxlbert.training.pretraining.scores import METRIC, HeldOut
from pyxlbert.training.pretraining.segments import SegmentOptions, Segments, own_rows
from pyxlbert.training.pretraining.sizes import albert_config, bert_config, xlnet_config
from pyxlbert.training.pretraining.steps import PairSteps, SegmentSteps, passes_of
from pyxlbert.training.pretraining.store import TokenStore, digest, open_or_build
from pyxlbert.training.pretraining.vocabularies import FILES, TRAINERS, Vocabulary

TOKENIZER, TEXT = "tokenizer", "text"
MODELS = {"bert": BertForPreTraining, "albert": AlbertForPreTraining, "xlnet": XLNetLMHeadModel}


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """What is pretrained, on what.

    Attributes:
        files: the text, in UTF-8.
        data: `PairOptions` for a BERT, with `swapped` for an ALBERT, `SegmentOptions` for an XLNet.
        config: the model's directory or ``config.json``; None: one of `size`.
        size: a name of `pyxlbert.training.pretraining.sizes.SIZES`.
        dropout: of a model of `size`; None: 0.1, of an ALBERT 0, as published.
        mem_len: of an XLNet of `size`, how many places it remembers; None: one and a half times `reuse_len`.
        tokenizer: the directory of one; None: it is trained from the text.
        vocab_size: of a tokenizer that is trained.
        lowercase: likewise; None: not of an XLNet's.
        layout: how the text lies in its files.
        evaluate: text to evaluate on, in files laid out the same.
    """

    files: Sequence[str | Path]
    data: PairOptions | SegmentOptions
    config: str | Path | None = None
    size: str = "small"
    dropout: float | None = None
    mem_len: int | None = None
    tokenizer: str | Path | None = None
    vocab_size: int = 8000
    lowercase: bool | None = None
    layout: str = "sentences"
    evaluate: Sequence[str | Path] = ()

    @property
    def kind(self) -> str:
        """A name of `MODELS`."""
        if isinstance(self.data, SegmentOptions):
            return "xlnet"
        return "albert" if self.data.swapped else "bert"

    def check(self) -> None:
        """What can be known to be wrong before the text is read.

        Raises:
            TypeError: an argument is of another kind.
            ValueError: a value is out of range, or two do not go together.
            OSError: a file is missing.
        """
        if not isinstance(self.data, (PairOptions, SegmentOptions)):
            raise TypeError(f"data: got {type(self.data).__name__}, wanted PairOptions or SegmentOptions")
        check_layout(self.layout)
        trained_on = set(map(on_disk, check_files(self.files)))
        for path in check_files(self.evaluate, "evaluate") if self.evaluate else ():
            if on_disk(path) in trained_on:
                raise ValueError(f"evaluate: got {str(path)!r}, which is trained on; wanted text that is held out")
        require_integer("vocab_size", self.vocab_size, 16, MOST_PIECES)
        if self.dropout is not None:
            require_share("dropout", self.dropout)
            if self.config is not None:
                raise ValueError("dropout: given together with config, which says it")
        if self.mem_len is not None:
            require_integer("mem_len", self.mem_len, 0, MOST_LENGTH)
            if self.config is not None:
                raise ValueError("mem_len: given together with config, which says it")
            if self.kind != "xlnet":
                raise ValueError(f"mem_len: got one for a model of kind {self.kind!r}, which has no memory")
            if 0 < self.mem_len < self.data.reuse_len:
                reuse = self.data.reuse_len
                raise ValueError(
                    f"mem_len: got {self.mem_len}, wanted at least reuse_len, {reuse}: so many tokens are remembered"
                )
        for name, place in (("config", self.config), ("tokenizer", self.tokenizer)):
            if place is not None and not named_path(name, place).exists():
                raise FileNotFoundError(f"{name}: {shown(place)} does not exist")
            if place is not None and Path(place).is_file() and (name, Path(place).name) != ("config", "config.json"):
                raise NotADirectoryError(f"{name}: {str(place)!r} is a file, wanted a folder")

    def model_config(self, vocab_size: int, pad_id: int) -> BertConfig | AlbertConfig | XLNetConfig:
        """The configuration of the model."""
        if self.config is not None:
            path = Path(self.config)
            folder = path.parent if path.name == "config.json" else path
            return MODELS[self.kind].config_class.from_pretrained(folder)
        usual = 0.0 if self.kind == "albert" else 0.1
        dropout = usual if self.dropout is None else self.dropout
        if isinstance(self.data, PairOptions):
            made = albert_config if self.data.swapped else bert_config
            return made(self.size, vocab_size, pad_id, self.data.max_length, dropout)
        reuse = self.data.reuse_len
        mem_len = reuse * 3 // 2 if self.mem_len is None else self.mem_len
        return xlnet_config(self.size, vocab_size, pad_id, (mem_len, reuse), self.data.bi_data, dropout)

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one that was broken off."""
        config = self.model_config(self.vocab_size, 0).to_dict()
        tokenizer = "trained" if self.tokenizer is None else Vocabulary.read(self.tokenizer, self.kind).fingerprint
        return {
            "kind": self.kind,
            "files": digest(self.files),
            "evaluate": digest(self.evaluate),
            "layout": self.layout,
            "config": config,
            "tokenizer": tokenizer,
            "vocab_size": self.vocab_size if self.tokenizer is None else None,
            "lowercase": self.lowercase,
            **{f"data_{f.name}": getattr(self.data, f.name) for f in fields(self.data)},
        }


def pretrain(
    what: Pretraining,
    output: str | Path,
    *,
    options: TrainingOptions,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Trains a new model.

    Args:
        what: the model and its text.
        output: the directory to make: the model, its curves, its checkpoints, a tokenizer and the text's tokens.
        options: how to train.
        resume: go on with the run in `output`; it begins where there is none.
        say: takes a line for the person who waits.

    Returns:
        The best scores on the text that is held out, none without any; in the first process, in others nothing.

    Raises:
        OSError: a file cannot be read or written; `output` holds something already.
        ValueError: a line or an option is not what it should be, sizes do not fit, or a loss is not finite.
        ImportError: a package of the extra "train" is missing.
    """
    what.check()
    if not isinstance(options, TrainingOptions):
        raise TypeError(f"options: got {type(options).__name__}, wanted TrainingOptions")
    work = accelerator()
    tell = say if work.is_main_process else lambda line: None
    folder = named_path("output", output)
    if work.is_main_process:
        check_run(folder, resume)
    config = what.model_config(what.vocab_size, 0)
    check_sizes(config, what.data, options.batch_size)
    if isinstance(what.data, SegmentOptions):
        passes = passes_of(options.batch_size, options.micro_batch_size, work.num_processes)
        own_rows(options.batch_size, what.data.bi_data, processes=work.num_processes, parts=passes)
    if what.config is not None:
        given = None if what.tokenizer is None else Vocabulary.read(what.tokenizer, what.kind)
        check_pieces(config, what.vocab_size, given)
    identity = {**what.identity(), "options": options.decisive()}
    with _begun(folder, identity, resume, work.is_main_process, tell) as prepared:
        if work.is_main_process:
            _prepare(what, folder, tell)
        work.wait_for_everyone()
        vocabulary, stores = _prepare(what, folder, lambda line: None)
        config = what.model_config(vocabulary.size, vocabulary.pad_id)
        source = _source(what, config, vocabulary, stores[0], options, work.num_processes)
        held_out = HeldOut(stores[1], vocabulary, what.data, options.evaluation_batch_size) if what.evaluate else None
        checkpoints.seed_chance(options.seed)
        model = MODELS[what.kind](config)
        prepared()
        size = sum(one.numel() for one in model.parameters())
        tell(
            f"{size / 1e6:.1f} million parameters, {len(stores[0].tokens)} tokens, {source.epoch_steps} steps an epoch"
        )
        if held_out is not None:
            tell(f"held out: {len(stores[1].tokens)} tokens, unigram entropy {held_out.entropy:.4f}")
        module = PretrainingModel(model)

        def evaluate(trained: nn.Module, work: Any) -> dict[str, float]:
            with torch.autocast(work.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
                return held_out.scores(trained, module, work.device)

        job = Job(
            module=module,
            source=source,
            counts=counts,
            metric=(METRIC, False),
            evaluate=None if held_out is None else evaluate,
            save=lambda state: _save(model, vocabulary, folder, state),
            title=f"{what.kind}: {named([Path(path).name for path in what.files])}",
            memory=module,
        )
        scores = Loop(job, options, folder, work, tell).run()
        tell(f"{what.kind}: {output}")
    return scores if work.is_main_process else {}


@contextmanager
def _begun(
    folder: Path, identity: dict[str, Any], resume: bool, main: bool, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """The run's folder, until the run ends. If it is new and its preparation is refused, it goes again.

    What a signal or the system breaks off keeps the tokenizer and the tokens that are made: they take longest.

    Yields:
        What is called when all is prepared.
    """
    if not main:
        yield lambda: None
        return
    there, before = folder.is_dir(), folder.is_dir() and any(path.name != FILE for path in folder.iterdir())
    waiting = [True]
    with started_run(folder, identity, resume):
        try:
            yield waiting.clear
        except BaseException as error:
            made = [path for path in (folder / TOKENIZER, *folder.glob(f"{TEXT}/[!.]*")) if path.is_dir()]
            if not waiting or before:
                pass
            elif made and isinstance(error, (KeyboardInterrupt, SystemExit, OSError)):
                say(f"{folder} keeps what is prepared; the same command with --resume goes on")
            else:
                shutil.rmtree(folder, ignore_errors=True)
                if there:
                    folder.mkdir(exist_ok=True)  # the working directory stays as it is
            raise


def _prepare(what: Pretraining, folder: Path, say: Callable[[str], None]) -> tuple[Vocabulary, list[TokenStore]]:
    """The tokenizer and the texts as tokens, which are made where they are missing."""
    directory = folder / TOKENIZER if what.tokenizer is None else Path(what.tokenizer)
    if what.tokenizer is None and not directory.is_dir():
        say(f"trains a tokenizer of {what.vocab_size} pieces")
        lowercase = what.kind != "xlnet" if what.lowercase is None else what.lowercase
        with whole_directory(directory) as temporary:
            TRAINERS[what.kind](
                what.files, temporary, vocab_size=what.vocab_size, lowercase=lowercase, layout=what.layout
            )
    vocabulary = Vocabulary.read(directory, what.kind)
    texts = [what.files, *([what.evaluate] if what.evaluate else [])]
    stores = [open_or_build(files, vocabulary, folder / TEXT, layout=what.layout, say=say) for files in texts]
    return vocabulary, stores


def _source(
    what: Pretraining,
    config: BertConfig | XLNetConfig,
    vocabulary: Vocabulary,
    store: TokenStore,
    options: TrainingOptions,
    processes: int,
) -> PairSteps | SegmentSteps:
    if isinstance(what.data, PairOptions):
        check_pairs(config, what.data, vocabulary)
        return PairSteps(SentencePairs(store, vocabulary, what.data, options.batch_size), options.micro_batch_size)
    check_segments(config, what.data, vocabulary, options.batch_size)
    segments = Segments(store, vocabulary, what.data, options.batch_size)
    return SegmentSteps(segments, options.micro_batch_size, processes)


def _save(model: nn.Module, vocabulary: Vocabulary, folder: Path, state: dict[str, torch.Tensor]) -> None:
    for name in FILES:
        if (vocabulary.directory / name).is_file():
            with whole_file(folder / name) as path:
                shutil.copyfile(vocabulary.directory / name, path)
    model.save_pretrained(folder, state)
