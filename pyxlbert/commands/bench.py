"""`pyxlbert bench`: ops, layers and models beside their peers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pyxlbert.files import said


def add(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "bench",
        help="times of ops, layers and models beside their peers",
        description="Races every op and model against the peers that are installed. Every answer is checked before it "
        "is timed; all have the same number of threads and take turns in a new order every round. The exit status is "
        "0, 1 if one of ours was wrong, did not run or has become slower, 2 for a wrong option or an interrupted run.",
    )
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE",
        help="ops, layer, attention, relative, two_stream, lengths, models, text, drop-in, training (every op, "
        "and models)",
    )
    what = parser.add_argument_group("what is raced")
    what.add_argument("--op", action="append", metavar="NAME", help="this op; may be given again")
    what.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="in this dtype (both)")
    what.add_argument("--shape", action="append", metavar="BxT", help="at this batch and length; may be given again")
    what.add_argument("--peer", action="append", metavar="NAME", help="against this peer (all that are installed)")
    what.add_argument("--only", default="", metavar="TEXT", help="races whose line holds this text")
    what.add_argument("--quick", action="store_true", help="one small shape of every op, in a minute")
    how = parser.add_argument_group("how it is timed")
    how.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: the GPU that is here, suite gpu")
    how.add_argument("--threads", type=int, metavar="N", help="of every contestant (as many as torch takes)")
    how.add_argument("--rounds", type=int, metavar="N", help="samples of each contestant (as many as the race says)")
    how.add_argument("--rest", type=float, metavar="SECONDS", help="before each sample (0.01 of ops, 0.05 of models)")
    how.add_argument("--seconds", type=float, default=float("inf"), help="begin no race after this time")
    how.add_argument("--memory", action=argparse.BooleanOptionalAction, help="peak memory too, in a process for each")
    how.add_argument("--keep-pages", action="store_true", help="freed memory stays with the process")
    change = parser.add_argument_group("whether ours has become slower, more than the noise")
    change.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="from A to B, race nothing")
    change.add_argument("--against", metavar="REV", help="since a git revision, built and taking turns")
    where = parser.add_argument_group("where the time goes")
    where.add_argument(
        "--profile",
        nargs=2,
        metavar=("MODEL", "BxT"),
        help="of bert-base, minilm, xlnet-base or a model's directory, op by op, in a forward and in a training step",
    )
    data = parser.add_argument_group("what the suites text, drop-in and training need")
    data.add_argument("--data", type=Path, metavar="DIR", help="a folder with stsb/ and wikitext2/")
    data.add_argument("--model", type=Path, metavar="DIR", help="a sentence-transformers model's directory")
    out = parser.add_argument_group("where results go, row by row")
    out.add_argument("--json", "--out", type=Path, metavar="FILE", help="with every sample; rows of a file are kept")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="as tables")
    out.add_argument("--html", type=Path, metavar="FILE", help="as one page with charts that loads nothing")
    out.add_argument(
        "--read", type=Path, metavar="FILE", help="race nothing: --html and --markdown of a file of --json"
    )
    out.add_argument("--picture", type=Path, metavar="FILE", help="SVG of a profile, or of the suite lengths")
    parser.set_defaults(run=lambda options: _run(options, parser))


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from pyxlbert.bench import command

    try:
        return command.run(options, parser.error)
    except (ValueError, OSError) as error:
        print(f"pyxlbert bench: error: {said(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        kept = "nothing was to be written" if options.json is None else f"{options.json} has every race that had ended"
        print(f"pyxlbert bench: interrupted; {kept}", file=sys.stderr)
    return 2
