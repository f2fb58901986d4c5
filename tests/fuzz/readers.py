"""Every reader of files that others have written, each with a file to spoil: it is read, or refused as is agreed.

    python tests/fuzz/readers.py --seconds 15                  # all readers in turn
    python tests/fuzz/readers.py config --guided --runs 10000  # one, guided by the coverage of our code (atheris)

A failure is anything but an answer: an exception of another kind or without the file's name, a panic, a crash, or
more than SECONDS of work.  The file that made it is written to `build/fuzz`; once mended, it belongs into
`tests/fuzz/corpus/<reader>/`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # where PYTHONSAFEPATH leaves it out
from mutations import mutate

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
FOUND = HERE.parents[1] / "build" / "fuzz"
# Of the processor: a reader that takes more hangs.  A machine that does other things too may take far longer.
SECONDS = 20.0
WAITING = 900.0
AGREED = (ValueError, OSError, ImportError)


class Reader(NamedTuple):
    """A file and who reads it.

    Attributes:
        folder: which of `folders` it is in.
        file: its name there.
        read: reads the folder.
    """

    folder: str
    file: str
    read: Callable[[Path], object]


class Wrong(Exception):
    """A reader did what it must not."""


def folders(root: Path) -> None:
    """The folders that readers read, each whole and small."""
    import torch
    from safetensors.torch import load_file, save_file

    from pyxlbert.models import BertModel
    from pyxlbert.testing.directories import tiny_bert, tiny_xlnet, train_pieces

    text = ["the quick brown fox, 9,500 times", "jumps over the lazy dog in 1999,"] * 4
    bert = tiny_bert(root / "bert", hidden_size=8, num_hidden_layers=1, intermediate_size=8, max_position_embeddings=16)
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": 16, "added_tokens_decoder": {}}
    (bert / "tokenizer_config.json").write_text(json.dumps(config))
    (bert / "special_tokens_map.json").write_text('{"cls_token": "[CLS]", "unk_token": {"content": "[UNK]"}}')
    (bert / "added_tokens.json").write_text("{}")
    pooling = {"embedding_dimension": 8, "pooling_mode": "mean", "include_prompt": True}
    dense = {
        "in_features": 8,
        "out_features": 4,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    for name, content in {
        "modules.json": [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (path, kind) in enumerate(
                [("", "Transformer"), ("1", "Pooling"), ("2", "Dense"), ("3", "Normalize")]
            )
        ],
        "sentence_bert_config.json": {"max_seq_length": 9, "processing_kwargs": {"text": {"max_length": 8}}},
        "config_sentence_transformers.json": {"prompts": {"query": "a "}, "similarity_fn_name": "cosine"},
        "1/config.json": pooling,
        "2/config.json": dense,
        "3/config.json": {"module_input_name": "sentence_embedding"},
    }.items():
        path = root / "sentences" / name
        if not (root / "sentences").is_dir():
            shutil.copytree(bert, root / "sentences")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    save_file({"linear.weight": torch.ones(4, 8)}, root / "sentences/2/model.safetensors")

    sharded = root / "sharded"
    shutil.copytree(bert, sharded)
    (sharded / "model.safetensors").rename(sharded / "part.safetensors")
    names = load_file(sharded / "part.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "part.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))

    pickled = root / "pickled"
    shutil.copytree(bert, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()

    integers = root / "integers"
    shutil.copytree(bert, integers)
    BertModel.from_pretrained(integers, add_pooling_layer=False).save_integers(integers)

    tokenizers = root / "tokenizers"
    shutil.copytree(bert, tokenizers)
    from pyxlbert.text.tokenizer import load_tokenizer

    load_tokenizer(bert).save(str(tokenizers / "tokenizer.json"))

    # A table of replacements of its own: the usual one is larger than all else together.
    rules = root / "rules.tsv"
    rules.write_text("FF21\t41\nFB01\t66 69\n")
    pieces = train_pieces(text, 60, hard_vocab_limit=False, normalization_rule_tsv=str(rules))
    xlnet = tiny_xlnet(root / "xlnet", pieces, d_model=8, n_layer=1, d_inner=8)
    (xlnet / "tokenizer_config.json").write_text('{"tokenizer_class": "XLNetTokenizer", "keep_accents": false}')
    saved = root / "xlnet_saved"
    shutil.copytree(xlnet, saved)
    load_tokenizer(xlnet).save(str(saved / "tokenizer.json"))
    (saved / "spiece.model").unlink()

    pairs = root / "pairs"
    pairs.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyzĠ"
    vocabulary = {
        one: place for place, one in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "th", "the"])
    }
    (pairs / "vocab.json").write_text(json.dumps(vocabulary))
    (pairs / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    (pairs / "config.json").write_text('{"model_type": "roberta"}')
    (pairs / "tokenizer_config.json").write_text('{"model_max_length": 9}')

    original = HERE.parent / "models" / "saved_by_tensorflow" / "bert_pretraining"
    shutil.copytree(original, root / "original")
    lines = root / "lines"
    lines.mkdir()
    (lines / "texts.txt").write_text("a\nb\r\n\n")


def _tokenizer(folder: Path) -> None:
    from pyxlbert.text import TextTokenizer

    TextTokenizer.from_directory(folder, 16).ids(["the quick, 9,500 brown", ""])


def _model(kind: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        from pyxlbert import models

        return getattr(models, kind).from_pretrained(folder)

    return read


def _sentences(folder: Path) -> None:
    from pyxlbert import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(folder)
    encoder.encode(["the hello", ""], prompt_name="query" if encoder.prompts.get("query") else None)


def _integers(folder: Path) -> object:
    from pyxlbert.models import BertModel

    return BertModel.from_pretrained(folder, dtype="int8", add_pooling_layer=False)


def _weights(folder: Path) -> object:
    from pyxlbert.models.checkpoints import read_weights

    return read_weights(folder)


def _original(folder: Path) -> None:
    from pyxlbert.original.bundle import Bundle, find_checkpoint

    prefix = find_checkpoint(folder)
    if prefix is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint")
    bundle = Bundle(prefix)
    for name in sorted(bundle.entries)[:4]:
        bundle.tensor(name)


def _lines(folder: Path) -> object:
    from pyxlbert.cli import read_lines

    return read_lines(str(folder / "texts.txt"))


READERS = {
    "config": Reader("bert", "config.json", _model("BertModel")),
    "weights": Reader("bert", "model.safetensors", _weights),
    "weights, pickled": Reader("pickled", "pytorch_model.bin", _weights),
    "index": Reader("sharded", "model.safetensors.index.json", _model("BertModel")),
    "integers": Reader("integers", "int8.safetensors", _integers),
    "tokenizer": Reader("tokenizers", "tokenizer.json", _tokenizer),
    "tokenizer settings": Reader("bert", "tokenizer_config.json", _tokenizer),
    "special tokens": Reader("bert", "special_tokens_map.json", _tokenizer),
    "added tokens": Reader("bert", "added_tokens.json", _tokenizer),
    "vocabulary": Reader("bert", "vocab.txt", _tokenizer),
    "pieces": Reader("xlnet", "spiece.model", _tokenizer),
    "xlnet config": Reader("xlnet", "config.json", _model("XLNetModel")),
    "xlnet tokenizer": Reader("xlnet_saved", "tokenizer.json", _tokenizer),
    "xlnet settings": Reader("xlnet_saved", "tokenizer_config.json", _tokenizer),
    "pairs, vocabulary": Reader("pairs", "vocab.json", _tokenizer),
    "pairs, merges": Reader("pairs", "merges.txt", _tokenizer),
    "modules": Reader("sentences", "modules.json", _sentences),
    "sentence settings": Reader("sentences", "sentence_bert_config.json", _sentences),
    "prompts": Reader("sentences", "config_sentence_transformers.json", _sentences),
    "pooling": Reader("sentences", "1/config.json", _sentences),
    "dense": Reader("sentences", "2/config.json", _sentences),
    "dense weights": Reader("sentences", "2/model.safetensors", _sentences),
    "normalize": Reader("sentences", "3/config.json", _sentences),
    "original index": Reader("original", "bert_model.ckpt.index", _original),
    "lines": Reader("lines", "texts.txt", _lines),
}


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Raises where the block hangs; a hang outside of Python ends the process with a stack."""

    def stop(*_: object) -> None:
        raise Wrong(f"it took more than {SECONDS:.0f} seconds of the processor")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(WAITING, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Run:
    """Readers on their folders, which are made anew.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        folders(root)
        self.root = root
        self.seeds = {name: (root / one.folder / one.file).read_bytes() for name, one in READERS.items()}

    def read(self, name: str, data: bytes) -> None:
        """One file.

        Raises:
            Wrong: the reader did not do what is agreed.
        """
        reader = READERS[name]
        folder = self.root / reader.folder
        (folder / reader.file).write_bytes(data)
        try:
            with in_time(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(folder)
        except Wrong:
            raise
        except AGREED as error:
            if str(folder) not in str(error):
                raise Wrong(f"{type(error).__name__} without the file's name: {error}") from error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust's is no Exception
            raise Wrong(f"{type(error).__name__}: {error}") from error
        finally:
            (folder / reader.file).write_bytes(self.seeds[name])

    def inputs(self, name: str) -> list[bytes]:
        """The file as it is, and what the corpus keeps."""
        kept = sorted((CORPUS / name.replace(", ", "_").replace(" ", "_")).glob("*"))
        return [self.seeds[name], *(path.read_bytes() for path in kept)]


def report(name: str, data: bytes, error: Wrong) -> None:
    """Keeps what went wrong, and says where."""
    FOUND.mkdir(parents=True, exist_ok=True)
    path = FOUND / f"{name.replace(', ', '_').replace(' ', '_')}-{hashlib.sha1(data).hexdigest()[:10]}"
    path.write_bytes(data)
    print(f"FAILED {name}: {str(error)[:300]}\n  {path}", flush=True)
    if error.__cause__ is not None:
        print("".join(traceback.format_exception(error.__cause__)[-4:]), flush=True)


def mutated(run: Run, names: list[str], seconds: float, runs: int, seed: int) -> int:
    """All readers in turn, each on mutations of its inputs; how many files were wrong."""
    rng, wrong, done = random.Random(seed), 0, 0
    pools = {name: run.inputs(name) for name in names}
    end, kinds = time.monotonic() + seconds, set()
    while done < runs and (done < len(names) or time.monotonic() < end):
        name = names[done % len(names)]
        done += 1
        data = mutate(rng.choice(pools[name]), rng)
        try:
            run.read(name, data)
        except Wrong as error:
            kind = (name, str(error)[:60])
            if kind not in kinds:
                kinds.add(kind)
                report(name, data, error)
            wrong += 1
    print(f"{done} files, {wrong} wrong", flush=True)
    return wrong


def guided(run: Run, name: str, runs: int, number: int) -> None:
    """One reader by libFuzzer, which keeps the files that reach new code; ends the process."""
    import atheris

    with tempfile.TemporaryDirectory() as folder:
        for place, data in enumerate(run.inputs(name)):
            (Path(folder) / str(place)).write_bytes(data)

        def test(data: bytes) -> None:
            try:
                run.read(name, data)
            except Wrong as error:
                report(name, data, error)
                raise

        def mutation(data: bytes, most: int, seed: int) -> bytes:
            return mutate(data, random.Random(seed), most)

        limits = ("-timeout=60", "-rss_limit_mb=4096", "-max_len=65536")
        arguments = [sys.argv[0], f"-runs={runs}", f"-seed={number}", *limits, folder]
        atheris.Setup(arguments, test, custom_mutator=mutation)
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(READERS)}; all")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--runs", type=int, default=10**9, help="files in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true", help="by the coverage of our code; runs count each")
    options = parser.parse_args()
    unknown = set(options.readers) - READERS.keys()
    if unknown:
        parser.error(f"readers: got {', '.join(sorted(unknown))}, wanted some of {', '.join(READERS)}")
    if options.guided and len(options.readers) != 1:
        # One process each, which libFuzzer ends.
        command = [sys.executable, __file__, "--guided", "--runs", str(options.runs), "--seed", str(options.seed)]
        return max(subprocess.run([*command, name]).returncode for name in options.readers or READERS)
    if options.guided:
        import atheris

        with atheris.instrument_imports(include=["pyxlbert"]):
            import pyxlbert.cli
            import pyxlbert.original.bundle
            import pyxlbert.text  # noqa: F401
    with tempfile.TemporaryDirectory() as root:
        run = Run(Path(root))
        if options.guided:
            guided(run, options.readers[0], options.runs, options.seed)
        return min(1, mutated(run, options.readers or list(READERS), options.seconds, options.runs, options.seed))


if __name__ == "__main__":
    sys.exit(main())
