"""`pyxlbert parity`: every op and model that can run here against float64."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import pyxlbert
from pyxlbert import backends, machine
from pyxlbert.files import check_distinct, check_writable, real_path, said, whole_file

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "parity",
        help="errors of every op and model against float64",
        description="Runs every op on every backend and instruction-set level that is here, and whole models beside "
        "transformers, and compares them with float64: each may be twice as wrong as plain PyTorch in the same dtype. "
        "The exit status is 0 if all are within budget, 1 if one is not.",
    )
    parser.add_argument("--op", action="append", metavar="NAME", help="this op; may be given again (all, and models)")
    parser.add_argument("--backend", action="append", choices=backends.NAMES, help="this backend (all)")
    parser.add_argument("--dtype", action="append", choices=_DTYPES, help="this dtype (all)")
    parser.add_argument("--quick", action="store_true", help="a few small cases of each, in less than a minute")
    parser.add_argument("--model", metavar="DIR", help="instead: a model's own layers, one by one")
    parser.add_argument("--json", metavar="FILE", help="also write every row as JSON")
    parser.add_argument("--html", metavar="FILE", help="also write a page that loads nothing")
    parser.add_argument("--summary", action="store_true", help="print no rows, only the summary")
    parser.set_defaults(run=lambda options: _run(options, parser))


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from pyxlbert.commands import parity_models as models
    from pyxlbert.testing.parity import ops, report
    from pyxlbert.testing.specs import SPECS

    # Everything that can be wrong is found before minutes are spent.
    for name in options.op or ():
        if name not in SPECS:
            parser.error(f"--op: got {name!r}, wanted one of {', '.join(sorted(SPECS))}")
    # A Path takes an empty name for the working directory.
    if options.model is not None and not (options.model and Path(options.model).is_dir()):
        parser.error(f"--model: got {options.model!r}, which is no directory")
    if options.model is not None and not (Path(options.model) / "config.json").is_file():
        parser.error(f"--model: got {options.model!r}, which has no config.json")
    for option in ("json", "html"):
        _check_output(parser, option, getattr(options, option))
    try:
        check_distinct({f"--{option}": getattr(options, option) for option in ("json", "html")})
    except ValueError as error:
        parser.error(str(error))
    names = list(dict.fromkeys(options.backend or backends.NAMES))
    dtypes = [_DTYPES[name] for name in dict.fromkeys(options.dtype or _DTYPES)]
    rows = []
    if options.model is not None:
        rows += models.layers(Path(options.model), names, dtypes)
    else:
        rows += ops.rows(options.op or sorted(SPECS), names, dtypes, options.quick)
        if options.op is None:
            rows += models.rows(names, dtypes)
    print(report.summary(rows))
    if not options.summary:
        print(f"\n{report.table(rows)}")
    machine = _machine()
    for option, make in (("json", report.document), ("html", report.page)):
        name = getattr(options, option)
        if name is not None:
            with whole_file(real_path(f"--{option}", name)) as part:
                part.write_text(make(rows, machine), encoding="utf-8")
    return 0 if report.good(rows) else 1


def _check_output(parser: argparse.ArgumentParser, option: str, name: str | None) -> None:
    if name is None:
        return
    try:
        check_writable(f"--{option}", name, real_path(f"--{option}", name))
    except (ValueError, OSError) as error:
        parser.error(said(error))


def _machine() -> dict[str, Any]:
    """What the numbers depend on; no names, no paths."""
    found = {"pyxlbert": pyxlbert.__version__, "torch": torch.__version__, "processor": machine.processor()[0]}
    if backends.unavailable("cpu") is None:
        found["level"] = pyxlbert._C.level()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"threads": torch.get_num_threads()}
