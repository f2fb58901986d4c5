"""`pyxlbert pretrain KIND FILE...`: a new BERT, ALBERT or XLNet from text files."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from pyxlbert.commands.embed import set_threads
from pyxlbert.training.options import PRECISIONS, SCHEDULES, TrainingOptions
from pyxlbert.training.pretraining.documents import LAYOUTS
from pyxlbert.training.pretraining.pairs import PairOptions
from pyxlbert.training.pretraining.segments import SegmentOptions
from pyxlbert.training.pretraining.sizes import SIZES

_DESCRIPTION = {
    "bert": """\
Trains a BERT on masked tokens and on whether a second passage follows the first, with the data of the published
create_pretraining_data.""",
    "albert": """\
Trains an ALBERT, whose layers share their weights, on masked spans of words and on the order of two passages that
follow each other.""",
    "xlnet": """\
Trains an XLNet on tokens in random orders. Each row of a batch goes on where the row was in the batch before, and its
memories with it.""",
}
_NAMES = {"bert": "a new BERT", "albert": "a new ALBERT", "xlnet": "a new XLNet"}
_COMMON = """
The folder that is made holds the model, its tokenizer, its curves and its checkpoints, and is read by transformers and
by `pyxlbert finetune`. Started by torchrun or `accelerate launch` it is trained by several processes, to the same
steps. With --eval, the loss on text that is held out is told beside the entropy of that text's tokens, which is what a
model comes to that knows only how frequent each token is; an XLNet's loss also without its memories."""
_DROPOUT = {"bert": 0.1, "albert": 0.0, "xlnet": 0.1}
_WARMUP, _RATE, _STEPS = 0.1, 5e-4, 10_000
# What Python calls otherwise than the options are called, or than they are when a run goes on.
_ARGUMENTS = {"output": "--out", "max_steps": "--steps", "evaluate_every": "--eval-every", "evaluate": "--eval"}
_ARGUMENTS |= {"lowercase": "not --cased", "seq_len": "--max-length", "directory": "--tokenizer"}


def add(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    parser = commands.add_parser("pretrain", help="train a new BERT, ALBERT or XLNet on text files")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, text in _DESCRIPTION.items():
        one = kinds.add_parser(kind, help=_NAMES[kind], description=text + _COMMON)
        one.add_argument("files", nargs="+", metavar="FILE", help="text in UTF-8")
        one.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
        one.add_argument("--resume", action="store_true", help="go on with the run in that folder, to the same bits")
        one.add_argument(
            "--eval", nargs="+", default=[], metavar="FILE", help="text that is held out, laid out likewise"
        )
        one.add_argument(
            "--layout",
            choices=LAYOUTS,
            default="sentences",
            help="of the files: a sentence a line and an empty line between documents; raw text with an empty line "
            "between documents; raw text, a file a document (sentences)",
        )
        _model(one.add_argument_group("model"), kind)
        _rows(one.add_argument_group("rows"), kind)
        _training(one.add_argument_group("training"))
        one.set_defaults(run=_run, arguments=_ARGUMENTS)


def _model(group: Any, kind: str) -> None:
    group.add_argument(
        "--size", choices=tuple(SIZES), default="small", help="layers and widths of a known BERT (small)"
    )
    group.add_argument("--config", metavar="DIR", help="in place of --size: a folder with a config.json")
    group.add_argument("--dropout", type=float, metavar="X", help=f"of a model of --size ({_DROPOUT[kind]:g})")
    group.add_argument("--tokenizer", metavar="DIR", help="a folder with a tokenizer (one is trained from the text)")
    group.add_argument(
        "--vocab-size", type=int, default=8000, metavar="N", help="pieces of a tokenizer that is trained (8000)"
    )
    usual = "they do" if kind == "xlnet" else "they don't"
    group.add_argument(
        "--cased",
        action=argparse.BooleanOptionalAction,
        help=f"whether capitals count in one that is trained ({usual})",
    )
    if kind == "xlnet":
        group.add_argument(
            "--mem-len", type=int, metavar="N", help="tokens before a row that it remembers (1.5 times --reuse-len)"
        )


def _rows(group: Any, kind: str) -> None:
    group.add_argument("--max-length", type=int, default=128, metavar="N", help="tokens of a row (128)")
    usual = "they are" if kind == "albert" else "they aren't"
    group.add_argument(
        "--whole-words",
        action=argparse.BooleanOptionalAction,
        default=kind == "albert",
        help=f"whether all pieces of a word are predicted or none ({usual})",
    )
    if kind != "xlnet":
        longest = 3 if kind == "albert" else 1
        group.add_argument(
            "--max-gram",
            type=int,
            default=longest,
            metavar="N",
            help=f"words, without --whole-words tokens, of the longest span that is predicted ({longest})",
        )
        group.add_argument("--mask-share", type=float, default=0.15, metavar="X", help="of the tokens (0.15)")
        group.add_argument("--max-predictions", type=int, default=20, metavar="N", help="of a row at most (20)")
        group.add_argument(
            "--short-share",
            type=float,
            default=0.1,
            metavar="X",
            help="of documents with rows of a random length (0.1)",
        )
        return
    group.add_argument("--reuse-len", type=int, default=64, metavar="N", help="tokens that the next row remembers (64)")
    group.add_argument("--num-predict", type=int, metavar="N", help="targets of a row (a sixth of its tokens)")
    group.add_argument("--perm-size", type=int, metavar="N", help="tokens that share an order (the most that fit)")
    group.add_argument("--bi-data", action="store_true", help="half of the rows run backwards")
    group.add_argument("--max-gram", type=int, default=5, metavar="N", help="tokens of the longest span (5)")


def _training(group: Any) -> None:
    usual = TrainingOptions()

    def add(name: str, kind: type, text: str, default: Any, metavar: str = "N") -> None:
        shown = "" if default is None else f" ({default:g})"
        group.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text + shown)

    add("steps", int, "steps of the optimiser", _STEPS)
    add("batch-size", int, "rows a step, all processes together", usual.batch_size)
    add("micro-batch-size", int, "rows a pass of one process (its whole share)", None)
    add("learning-rate", float, "the highest learning rate", _RATE, "X")
    add("warmup", float, "steps until the highest rate; below 1 a share of all", _WARMUP, "X")
    group.add_argument("--schedule", choices=SCHEDULES, default=usual.schedule, help="how the rate falls (linear)")
    add("weight-decay", float, "of AdamW, on matrices", usual.weight_decay, "X")
    add("max-gradient-norm", float, "longer gradients are scaled down to it; 0: none is", usual.max_gradient_norm, "X")
    group.add_argument("--precision", choices=PRECISIONS, default=usual.precision, help="of products (float32)")
    group.add_argument("--recompute", action="store_true", help="keep no activations: less memory, a third more time")
    add("seed", int, "the same seed gives the same run", usual.seed)
    add("eval-every", int, "steps between evaluations (an epoch's)", None)
    add("evaluation-batch-size", int, "rows a pass of an evaluation", usual.evaluation_batch_size)
    add("patience", int, "evaluations without a better loss until training ends (never)", None)
    add("checkpoint-every", int, "steps between checkpoints (those between evaluations)", None)
    add("keep-checkpoints", int, "how many of the last stay, beside the best", usual.keep_checkpoints)
    add("log-every", int, "steps between points of the curves", usual.log_every)
    add("workers", int, "processes that make batches", usual.workers)
    add("threads", int, "processor threads to use", None)
    group.add_argument("--progress", action=argparse.BooleanOptionalAction, help="a progress bar (on a terminal)")


def _run(options: argparse.Namespace) -> int:
    from pyxlbert.training.loop import leave_group
    from pyxlbert.training.pretraining.run import Pretraining, pretrain

    if options.threads is not None:
        set_threads(options.threads)
    given = vars(options)
    kind = SegmentOptions if options.kind == "xlnet" else PairOptions
    of_kind = {"swapped": True} if options.kind == "albert" else {}
    data = kind(**{name: given[name] for name in kind.__dataclass_fields__ if name in given} | of_kind)
    renamed = {"max_steps": options.steps, "evaluate_every": options.eval_every}
    training = TrainingOptions(
        **{name: given[name] for name in TrainingOptions.__dataclass_fields__ if name in given} | renamed
    )
    what = Pretraining(
        files=options.files,
        data=data,
        config=options.config,
        size=options.size,
        dropout=options.dropout,
        mem_len=given.get("mem_len"),
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        lowercase=None if options.cased is None else not options.cased,
        layout=options.layout,
        evaluate=options.eval,
    )
    scores = pretrain(
        *(what, options.out),
        options=training,
        resume=options.resume,
        say=lambda line: print(line, file=sys.stderr),
    )
    for name, value in scores.items():
        print(f"  {name:<24}{value:.4f}")
    leave_group()
    return 0
