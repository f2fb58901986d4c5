"""`pyxlbert convert`: the checkpoints of the original codes into Hugging Face directories."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from pyxlbert.models.tasks import TASK_NAMES

_DESCRIPTION = """\
Reads a checkpoint as google-research/bert and zihangdai/xlnet save it (bert_config.json or xlnet_config.json,
*.ckpt.index and *.ckpt.data-*, vocab.txt or spiece.model), without TensorFlow, and writes a directory that pyxlbert
and transformers read. Prints every variable: its name and shape, whether the model takes it from the checkpoint, and
what it is called in the directory; what the model has and the checkpoint lacks is left new, the rest (an optimiser's)
is unused. A folder with pytorch_model.bin, whose LayerNorms have gamma and beta, is read as a BERT of the first PyTorch
code, and model.pt as a RoBERTa of fairseq (with --no-tokenizer: its dictionary is not read)."""


def add(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    parser = commands.add_parser(
        "convert",
        help="turn an original checkpoint of BERT, RoBERTa or XLNet into a Hugging Face directory",
        description=_DESCRIPTION,
    )
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint's folder, or its name: folder/model.ckpt-343")
    parser.add_argument("output", metavar="OUTPUT", help="the directory to write; it appears whole or not at all")
    parser.add_argument(
        "--task",
        choices=TASK_NAMES,
        help="whose model it becomes (default: that of the checkpoint's heads); a head that is not there is left new",
    )
    parser.add_argument("--config", metavar="FILE", help="the configuration, if it is not in the checkpoint's folder")
    parser.add_argument("--vocab", metavar="FILE", help="vocab.txt or spiece.model, if it is not in that folder")
    parser.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")
    case = parser.add_mutually_exclusive_group()
    case.add_argument("--cased", action="store_true", help="the tokenizer keeps capital letters")
    case.add_argument(
        "--uncased",
        action="store_true",
        help="it lower-cases text (default: as tokenizer_config.json says, else whether the vocabulary has capitals)",
    )
    parser.add_argument(
        "--tanh-gelu",
        action="store_true",
        help="write the activation gelu_new, the original code's formula, where transformers' directories say gelu",
    )
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it is a model's directory")
    parser.set_defaults(run=_run, arguments={"vocabulary": "--vocab"})


def _run(options: argparse.Namespace) -> None:
    from pyxlbert.original import convert

    for name in ("vocab", "cased", "uncased"):
        if options.no_tokenizer and getattr(options, name):
            raise ValueError(f"--{name}: given together with --no-tokenizer, wanted one of them")
    done = convert(
        options.source,
        options.output,
        task=options.task,
        config=options.config,
        vocabulary=options.vocab,
        lower_case=options.uncased if options.cased or options.uncased else None,
        tokenizer=not options.no_tokenizer,
        tanh_gelu=options.tanh_gelu,
        force=options.force,
    )
    print("\n".join([done.table(), *done.notes]))
    print(f"{done.class_name}: {options.output}", file=sys.stderr)
