"""`pyxlbert export`: a model as a file for another runtime."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from pyxlbert.models.tasks import TASK_NAMES

_DESCRIPTION = """\
Writes a BERT or XLNet directory as one ONNX file: standard operators in float32, any batch and any length. The graph
takes input_ids, attention_mask (1 for a token, 0 for padding, in any pattern) and token_type_ids, int64
[batch, length], and gives last_hidden_state, logits or what else the model's outputs are called. ONNX Runtime, if it
is installed, then runs it on batches of several lengths, and the file is kept if it computes what the model does, to
1e-5."""


def add(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    parser = commands.add_parser(
        "export",
        help="write a model as an ONNX file, and check it in ONNX Runtime",
        description=_DESCRIPTION,
        epilog="It takes onnx and onnxscript: pip install 'pyxlbert[onnx]'",
    )
    parser.add_argument("--onnx", action="store_true", required=True, help="the format; there is no other yet")
    parser.add_argument("model", metavar="MODEL_DIR", help="a folder as Hugging Face or `pyxlbert convert` write it")
    parser.add_argument(
        "output", metavar="OUTPUT.onnx", help="the file; weights of 2 GB and more lie beside it in OUTPUT.onnx.data"
    )
    parser.add_argument(
        "--task",
        choices=TASK_NAMES,
        help="whose head the graph has (default: that of config.json's architectures, else none: feature-extraction)",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="version of ONNX's operators, 18 to 23 (20)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.set_defaults(run=_run, arguments={"directory": "MODEL_DIR"})


def _run(options: argparse.Namespace) -> None:
    from pyxlbert.export import export_onnx

    chosen = {} if options.opset is None else {"opset": options.opset}
    done = export_onnx(options.model, options.output, task=options.task, force=options.force, **chosen)
    print(f"{done.class_name}: {', '.join(done.inputs)} -> {', '.join(done.outputs)}")
    if done.difference is None:
        print("not checked: onnxruntime is not installed (pip install 'pyxlbert[onnx]')")
    else:
        print(f"checked in ONNX Runtime: outputs differ by at most {done.difference:.1e} of the largest")
    print(", ".join(str(file) for file in done.files), file=sys.stderr)
