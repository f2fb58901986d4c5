"""`pyxlbert evaluate TASK` or `python -m pyxlbert.evaluate TASK`: how good a model is, on data that you bring.

`stsb --data DIR --model DIR`: a model's score on STS Benchmark's dev pairs: Spearman's rank correlation, times 100,
between the cosine of two sentences' vectors and the similarity that people gave the pair. Needs SciPy, and
`transformers` for `--compare`. `--layers all` scores every layer and every sum of neighbouring layers; `--picture`
draws that, with matplotlib.

`tokens --text FILE --model PATH`: an XLNet tokenizer against that of `transformers`, line by line.

`text-classification`, `token-classification` and the other tasks of `pyxlbert finetune`: a trained model's scores on
examples with labels.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyxlbert.commands import finetune
from pyxlbert.commands.typed import speaker
from pyxlbert.files import read_text
from pyxlbert.hub import Hub
from pyxlbert.layer_scores import check_picture, draw_layers, layer_scores, layer_table, spearman
from pyxlbert.text import DTYPES, SentenceEncoder
from pyxlbert.text.batches import check_count
from pyxlbert.text.pooling import read_modules

# Columns of the tab-separated file: genre, file, year, id, score, sentence 1, sentence 2.
_SCORE, _FIRST, _SECOND = 4, 5, 6


def read_stsb(directory: Path, split: str = "dev") -> tuple[list[str], list[str], np.ndarray]:
    """The pairs and scores of `sts-<split>.csv`.

    Returns:
        First sentences, second sentences, scores in float64 from 0 to 5.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: a line has too few columns or a score that is no number, or the file is not UTF-8.
    """
    path = directory / f"sts-{split}.csv"
    first, second, scores = [], [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line:
            continue
        columns = line.rstrip("\r").split("\t")  # quotation marks mean nothing in this file
        try:
            scores.append(float(columns[_SCORE]))
            first.append(columns[_FIRST])
            second.append(columns[_SECOND])
        except (IndexError, ValueError):
            raise ValueError(f"{path}: line {number} is not a score and two sentences") from None
    return first, second, np.array(scores)


def differing_lines(ours: Sequence[np.ndarray], theirs: Sequence[Sequence[int]]) -> list[int]:
    """The numbers, from 0, of the lines whose ids are not the same."""
    return [number for number, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a.tolist() != list(b)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the evaluation.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m pyxlbert.evaluate", description="Scores on public benchmarks.")
    parser.set_defaults(arguments={"directory": "--model"})
    add_tasks(parser)
    options = parser.parse_args(arguments)
    options.said = speaker(parser, options, sys.argv[1:] if arguments is None else arguments)
    return run(options)


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Adds the tasks and their options."""
    tasks = parser.add_subparsers(dest="task", required=True)
    stsb = tasks.add_parser("stsb", help="sentence similarity: Spearman x 100 on the dev pairs of STS Benchmark")
    stsb.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder with sts-dev.csv")
    stsb.add_argument(
        "--model", required=True, nargs="+", metavar="DIR", help="the model's folder or its name in the hub, or several"
    )
    stsb.add_argument("--split", choices=("dev", "train", "test"), default="dev")
    stsb.add_argument("--dtype", choices=DTYPES, default="float32")
    stsb.add_argument("--batch-size", type=int, default=32, metavar="N")
    stsb.add_argument(
        "--compare",
        action="store_true",
        help="also by transformers: masked mean, in float32 and batches of the same size",
    )
    stsb.add_argument("--layers", choices=("all",), help="every layer, and every sum of neighbouring layers")
    stsb.add_argument("--picture", type=Path, metavar="X.png", help="of --layers all")
    tokens = tasks.add_parser("tokens", help="XLNet's tokens of a text against those of transformers")
    tokens.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8")
    tokens.add_argument("--model", type=Path, required=True, metavar="PATH", help="the folder, or a SentencePiece file")
    finetune.add_evaluations(tasks)


def run(options: argparse.Namespace) -> int:
    """Runs the task that was parsed.

    Returns:
        The exit status.
    """
    try:
        return {"stsb": _stsb, "tokens": _tokens}.get(options.task, finetune.evaluate)(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"pyxlbert evaluate: error: {options.said(error)}", file=sys.stderr)
        return 1


def _tokens(options: argparse.Namespace) -> int:
    from transformers import XLNetTokenizer

    from pyxlbert.text import TextTokenizer

    lines = read_text(options.text).split("\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model
        if folder.is_file():
            folder = Path(temporary)
            (folder / "spiece.model").write_bytes(options.model.read_bytes())
            (folder / "config.json").write_text('{"model_type": "xlnet"}', encoding="utf-8")
        tokenizer, peer = TextTokenizer.from_directory(folder), XLNetTokenizer.from_pretrained(folder)
    ids = tokenizer.ids(lines)
    differing = differing_lines(ids, peer(lines)["input_ids"])
    padded = tokenizer.padded(lines)
    wanted = peer(lines, padding=True)
    same_padding = np.array_equal(padded.ids, wanted["input_ids"])
    same_padding &= np.array_equal(padded.mask, wanted["attention_mask"])
    print(f"{len(lines)} lines, {sum(map(len, ids))} tokens, special ones included")
    print(f"  lines that differ    {len(differing)}")
    print(f"  padded on the left   {'the same' if same_padding else 'different'}")
    for number in differing[:5]:
        print(f"  line {number + 1}: {lines[number]!r}")
    return 1 if differing or not same_padding else 0


def _stsb(options: argparse.Namespace) -> int:
    if options.compare and options.layers:
        raise ValueError("--compare: goes with the directory's own layer alone, not with --layers")
    if options.picture and not options.layers:
        raise ValueError("--picture: draws layers; wanted --layers all with it")
    check_count("batch_size", options.batch_size)
    if options.picture:
        check_picture(options.picture)
    pairs = read_stsb(options.data, options.split)
    needed = {"scipy": "pip install scipy"}
    needed |= {"transformers": "pip install transformers"} if options.compare else {}
    for package, how in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"evaluate stsb takes {package}: {how}")
    for model in options.model:  # of several too, before the first is scored
        modules, _ = read_modules(Hub().folder(model, text=True))
        if options.compare and (modules.modes != ("mean",) or modules.dense):
            raise ValueError(f"--compare: {model} does not pool by mean alone, which is all that the peer does here")
    if options.layers:
        return _stsb_layers(options, pairs)
    for number, model in enumerate(options.model):
        if number:
            print()
        _stsb_model(options, model, pairs)
    return 0


def _name(model: str) -> str:
    """What a table calls a model: its folder's own name, or that of the hub."""
    return Path(model).absolute().name if Path(model).is_dir() else model


def _stsb_layers(options: argparse.Namespace, pairs: tuple[list[str], list[str], np.ndarray]) -> int:
    tables = {}
    for model in options.model:
        encoder = SentenceEncoder.from_pretrained(model, DTYPES[options.dtype])
        table = layer_scores(encoder, *pairs, batch_size=options.batch_size)
        name = _name(model)
        print(f"STS-B {options.split}, {len(pairs[2])} pairs, Spearman x 100: {name} {options.dtype}")
        print(layer_table(table) + "\n")
        tables[name if name not in tables else model] = table
    if options.picture:
        draw_layers(tables, options.picture, f"STS-B {options.split}, {len(pairs[2])} pairs")
        print(f"picture: {options.picture}")
    return 0


def _stsb_model(options: argparse.Namespace, model: str, pairs: tuple[list[str], list[str], np.ndarray]) -> None:
    first, second, scores = pairs
    encoder = SentenceEncoder.from_pretrained(model, DTYPES[options.dtype])
    own = spearman(lambda texts: encoder.encode(texts, batch_size=options.batch_size), first, second, scores)
    several = f": {_name(model)}" if len(options.model) > 1 else ""
    print(f"STS-B {options.split}, {len(scores)} pairs, Spearman x 100{several}")
    print(f"  pyxlbert {options.dtype:<12}{100 * own:.4f}")
    if options.compare:
        from pyxlbert.demo import transformers_encoder

        reference = transformers_encoder(model, encoder.tokenizer.max_length)

        def encode(texts: Sequence[str]) -> np.ndarray:
            size = options.batch_size
            return np.concatenate([reference(texts[start : start + size]) for start in range(0, len(texts), size)])

        peer = spearman(encode, first, second, scores)
        print(f"  transformers float32 {100 * peer:.4f}")
        print(f"  difference           {100 * (own - peer):+.4f}")


if __name__ == "__main__":
    sys.exit(main())
