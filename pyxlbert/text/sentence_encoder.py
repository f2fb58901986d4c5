"""Sentences to vectors: tokenise, run longest first in packed batches, pool, normalise."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from pyxlbert import backends
from pyxlbert.files import check_writable
from pyxlbert.hub import Hub
from pyxlbert.models import BertModel, RobertaModel, XLNetModel
from pyxlbert.models.by_type import encoder_class
from pyxlbert.models.integers import FILE as INTEGERS
from pyxlbert.nn.packing import pack, packs_by_default

from .batches import check_count, check_switch, check_texts, longest_first
from .hidden import HiddenStates, Layers
from .pooling import POOLINGS, SentenceModules, pool, read_modules
from .processes import ProcessPool, check_pool, default_devices
from .quantisation import check_precision, check_ranges, quantise
from .settings import SentenceSettings, model_dtype
from .similarities import similarity, similarity_pairwise
from .tokenizer import TextTokenizer


class TokenVectors(NamedTuple):
    """The tokens (or words) of one text, without the special tokens around it.

    Shape: n tokens; `offsets` are character positions in the text, end excluded.
    """

    tokens: list[str]
    offsets: np.ndarray  # int64 [n, 2]
    vectors: np.ndarray  # float32 [n, E]


class SentenceEncoder:
    """A BERT, RoBERTa or XLNet model with its tokenizer and the pooling of its directory. Threads may share one.

    Args:
        model: a `BertModel`, a `RobertaModel` or an `XLNetModel`. It is owned from here on: set to evaluation, its
            weights packed for speed.
        tokenizer: gives at most as many tokens as the model has positions.
        modules: what happens after the model; None is mean pooling without normalisation.
        quantised: multiply in the layers by eight-bit integers: see `pyxlbert.pack`.
        settings: prompts, similarity and length of vectors; None is sentence-transformers' own default: no prompts,
            cosines, whole vectors.
    """

    def __init__(
        self,
        model: BertModel | RobertaModel | XLNetModel,
        tokenizer: TextTokenizer,
        modules: SentenceModules | None = None,
        quantised: bool = False,
        settings: SentenceSettings | None = None,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            wanted = "a BertModel, a RobertaModel or an XLNetModel"
            raise TypeError(f"model: got {type(model).__name__}, wanted {wanted}; from_pretrained reads a folder")
        self.quantised = quantised
        self.settings = SentenceSettings() if settings is None else settings
        self.model = model.eval().requires_grad_(False)
        if quantised or packs_by_default():
            pack(self.model, "int8" if quantised else None)
        self.tokenizer = tokenizer
        self._has_said_cut = False
        modules = SentenceModules() if modules is None else modules
        # XLNet's classification token stands behind the text.
        self._cls = "lasttoken" if isinstance(model, XLNetModel) else "cls"
        self.modules = replace(modules, modes=tuple(map(self._mode, modules.modes)))

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: torch.dtype | str = torch.float32,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        original_numbers: bool = False,
    ) -> SentenceEncoder:
        """Reads a Hugging Face or sentence-transformers directory.

        Args:
            directory: a model's folder. With `modules.json` its pooling, dense layers and normalisation are followed;
                without it texts are mean-pooled. A name that is no folder is that of a model of the hub, of which
                `huggingface_hub` has a copy or downloads one.
            dtype: of the model's weights and products; vectors are float32 always. "int8" multiplies in the layers by
                eight-bit integers: those of ``int8.safetensors`` if the folder has it (`pyxlbert quantise` writes it),
                with all else in its dtype; without, the weights are quantised, with all else in bfloat16 where the
                processor multiplies it, in float32 elsewhere.
            revision, cache_dir, token, local_files_only: how the hub is asked: see `pyxlbert.hub.Hub`.
            original_numbers: of XLNet's pieces, as `TextTokenizer.from_directory` says.

        Raises:
            FileNotFoundError: the directory or one of its files is missing, or a model of the hub cannot be had; the
                message says what to do.
            ValueError: a file is corrupt or asks for what is not supported; the message names it.
            TypeError: `dtype` is not one that models run in.
        """
        _, quantised = model_dtype(dtype)
        directory = Hub(revision, cache_dir, token, local_files_only).folder(directory, text=True)
        modules, folder = read_modules(directory)
        settings = SentenceSettings.from_directory(Path(directory))
        encoder = encoder_class(folder)
        config = encoder.config_class.from_pretrained(folder)
        modules.check_fits(Path(directory), config.hidden_size)
        longest = encoder.max_tokens_of(config)
        tokenizer = TextTokenizer.from_directory(folder, longest, original_numbers=original_numbers)
        if tokenizer.largest_id >= config.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has ids up to {tokenizer.largest_id}, but config.json says vocab_size "
                f"{config.vocab_size}"
            )
        return cls(_read_model(folder, dtype), tokenizer, modules, quantised, settings)

    def __reduce__(self) -> tuple[Any, ...]:
        # What is packed is packed again where the copy is made.
        return SentenceEncoder, (self.model, self.tokenizer, self.modules, self.quantised, self.settings)

    def _mode(self, mode: str) -> str:
        return self._cls if mode == "cls" else mode

    @property
    def _own(self) -> _Own:
        return _Own(self.model.config, self.modules, self.settings)

    @property
    def size(self) -> int:
        """The length of a sentence vector, with the directory's own pooling, layer and `truncate_dim`."""
        size = self.modules.size(self.model.config.hidden_size)
        return size if self.settings.truncate_dim is None else min(size, self.settings.truncate_dim)

    @property
    def prompts(self) -> dict[str, str]:
        """What `encode` may put before a text, by name."""
        return self.settings.prompts

    def encode(
        self,
        texts: str | Iterable[str],
        batch_size: int = 32,
        normalize: bool | None = None,
        layers: int | Sequence[Any] | None = None,
        pooling: str | None = None,
        token_vectors: bool | str = False,
        show_progress: bool | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        pool: ProcessPool | None = None,
        chunk_size: int | None = None,
    ) -> Any:
        """One vector a text, or one a token.

        Args:
            texts: a text or several. A text longer than the tokenizer's limit is cut, and the first call that cuts
                warns of how many; an empty one is its special tokens; surrogate code points are read as U+FFFD.
            batch_size: texts per run of the model; they run longest first, without padding.
            normalize: divide each vector by its length, after it is cut to `truncate_dim`; None does what the
                directory's modules say, before it is cut (for token vectors: no).
            layers: None is the last; an int is that layer, 0 being the embeddings and negatives counting from the
                top; several ints are averaged; `("sum", -1, -2)` adds them, `("mean", -1, -2)` is the average and
                `("concat", -1, -2)` lays them side by side.
            pooling: "mean", "cls" (the classification token's: BERT's first, XLNet's last) or "max"; None is the
                directory's own, dense layers included.
            token_vectors: True gives the vectors of the tokens, "word" those of the words (the mean of their pieces).
            show_progress: a bar on standard error; None shows it on a terminal when the work takes long.
            prompt_name: the name of one of `prompts`, which is put before every text; None is the default prompt, where
                the directory has one.
            prompt: what is put before every text; "" is nothing.
            truncate_dim: how many numbers of each vector are kept; None is what the directory says, else all.
            precision: "float32", or "int8", "uint8", "binary", "ubinary" as `quantise` says.
            ranges: [2, E], the smallest and largest value of each column for "int8" and "uint8"; without it they are
                found in this call's vectors.
            pool: processes that share the work, from `start_multi_process_pool`.
            chunk_size: texts that a process takes at once.

        Shape:
            A text gives [E], N texts [N, E]; several pooling modes or a dense layer change E as they say, and k
            layers side by side make it k·E.

        Returns:
            float32 NumPy in the order of the texts, or the precision's type; with `token_vectors` a `TokenVectors`, or
            a list of them.

        Raises:
            TypeError: an argument, or an item of `texts`, has the wrong type.
            ValueError: an argument has a value that means nothing; the message names it.
            RuntimeError: a process of the pool died.
        """
        single = isinstance(texts, str)
        items = [texts] if single else check_texts(texts)
        check_switch("show_progress", show_progress)
        given = {"batch_size": batch_size, "normalize": normalize, "layers": layers, "pooling": pooling}
        given |= {"token_vectors": token_vectors, "prompt_name": prompt_name, "prompt": prompt}
        given |= {"truncate_dim": truncate_dim, "precision": precision, "ranges": ranges}
        chosen, put_before, keep = self._own.asked(**given)
        check_pool(pool)
        if pool is not None and items:
            options = {"batch_size": batch_size, "normalize": normalize, "layers": layers, "pooling": pooling}
            options |= {"token_vectors": token_vectors, "prompt": put_before, "truncate_dim": truncate_dim}
            parts = pool.run("encode", items, chunk_size, show_progress, options)
            result: Any = [one for part in parts for one in part] if token_vectors else np.concatenate(parts)
        else:
            hidden = HiddenStates(self.model, self.tokenizer, chosen)
            wanted = _Wanted(batch_size, normalize, pooling, put_before, keep, show_progress)
            if token_vectors:
                result = self._tokens(items, hidden, wanted, token_vectors == "word")
            else:
                result = self._sentences(items, hidden, wanted)
        if not token_vectors and precision != "float32":
            result = quantise(result, precision, ranges)
        return result[0] if single else result

    def encode_query(self, texts: str | Iterable[str], **options: Any) -> Any:
        """`encode` with the prompt named "query" unless one is given: never with the default prompt."""
        return self.encode(texts, **_with_prompt("query", options))

    def encode_document(self, texts: str | Iterable[str], **options: Any) -> Any:
        """`encode` with the prompt named "document" unless one is given: never with the default prompt."""
        return self.encode(texts, **_with_prompt("document", options))

    def similarity(self, a: Any, b: Any) -> torch.Tensor:
        """float32 [N, M]: each of N vectors with each of M, by the directory's function (cosine if it names none)."""
        return similarity(a, b, self.settings.similarity)

    def similarity_pairwise(self, a: Any, b: Any) -> torch.Tensor:
        """float32 [N]: N vectors with N others, one by one."""
        return similarity_pairwise(a, b, self.settings.similarity)

    def start_multi_process_pool(self, target_devices: Sequence[str] | None = None) -> ProcessPool:
        """Processes that share the work of `encode(..., pool=)`, each with its share of this one's threads.

        Args:
            target_devices: one a process; None takes each CUDA device, or else the CPU as often as there are threads,
                at most four times.

        Returns:
            The pool; `stop_multi_process_pool`, or leaving its ``with`` block, ends it.
        """
        return ProcessPool(self, default_devices() if target_devices is None else target_devices)

    @staticmethod
    def stop_multi_process_pool(pool: ProcessPool) -> None:
        """Ends the processes of a pool."""
        pool.close()

    def _prompt_rows(self, prompt: str) -> int:
        """How many rows of a text are its prompt's and are to be left out of the pooling."""
        if self.modules.include_prompt or not prompt:
            return 0
        (text,) = self.tokenizer.tokenize([prompt])
        # As sentence-transformers counts: all tokens but one special one at the end.
        return len(text.ids) - int(bool(text.special[-1]))

    def _say_cut(self, cut: int, texts: int) -> None:
        """A warning at the first call that cuts texts."""
        if cut and not self._has_said_cut:
            self._has_said_cut = True
            warnings.warn(
                f"texts cut at {self.tokenizer.max_length} tokens: {cut} of {texts}; later calls do not say so",
                stacklevel=4,
            )

    def _sentences(self, texts: list[str], hidden: HiddenStates, wanted: _Wanted) -> np.ndarray:
        size = self._own.width(hidden.layers, wanted.pooling)
        result = np.empty((len(texts), wanted.keep), dtype=np.float32)
        ids, cut = self.tokenizer.ids_and_cut([wanted.prompt + text for text in texts] if wanted.prompt else texts)
        self._say_cut(cut, len(texts))
        skip = self._prompt_rows(wanted.prompt)
        modules = self.modules if wanted.pooling is None else SentenceModules((self._mode(wanted.pooling),))
        own = wanted.normalize is None and self.modules.normalize
        for rows in longest_first([len(i) for i in ids], wanted.batch_size, wanted.show_progress):
            lengths = [len(ids[row]) for row in rows]
            with torch.inference_mode():
                vectors = modules(hidden([ids[row] for row in rows]), lengths, skip)
                if own:
                    vectors = F.normalize(vectors, dim=-1)
                if wanted.keep < size:
                    vectors = vectors[:, : wanted.keep]
                if wanted.normalize:
                    vectors = F.normalize(vectors, dim=-1)
                result[rows] = vectors.cpu().numpy()
        return result

    def _tokens(self, texts: list[str], hidden: HiddenStates, wanted: _Wanted, words: bool) -> list[TokenVectors]:
        tokenized = self.tokenizer.tokenize([wanted.prompt + text for text in texts] if wanted.prompt else texts)
        self._say_cut(sum(one.cut for one in tokenized), len(texts))
        result: dict[int, TokenVectors] = {}
        for rows in longest_first([len(t.ids) for t in tokenized], wanted.batch_size, wanted.show_progress):
            with torch.inference_mode():
                x = hidden([tokenized[row].ids for row in rows]).float()
                pieces = x.split([len(tokenized[row].ids) for row in rows])
                for row, vectors in zip(rows, pieces, strict=True):
                    text = tokenized[row]
                    keep = np.flatnonzero(~text.special)
                    tokens, offsets = [text.tokens[i] for i in keep], text.offsets[keep]
                    vectors = vectors[torch.from_numpy(keep).to(vectors.device)]
                    if words:
                        tokens, offsets, vectors = _merge_words(text.text, text.words[keep], offsets, vectors)
                    if wanted.normalize:
                        vectors = F.normalize(vectors, dim=-1)
                    result[row] = TokenVectors(tokens, offsets, vectors.cpu().numpy())
        return [result[row] for row in range(len(texts))]


def _read_model(folder: Path, dtype: torch.dtype | str) -> BertModel | RobertaModel | XLNetModel:
    encoder = encoder_class(folder)
    with warnings.catch_warnings():
        # An encoder has no optional weights; what it leaves out is a head or the pooler, as intended here.
        warnings.simplefilter("ignore")
        # Every text of XLNet's reads forwards: no memory is kept, and none is of the half of a batch that reads
        # backwards.
        xlnet = {"use_mems_eval": False, "bi_data": False}
        fields = xlnet if encoder is XLNetModel else {"add_pooling_layer": False}
        return encoder.from_pretrained(folder, dtype=dtype, **fields)


def quantise_directory(directory: str | Path) -> Path:
    """Writes `int8.safetensors` beside the weights of a model, for `SentenceEncoder.from_pretrained(dtype="int8")`.

    Args:
        directory: as `SentenceEncoder.from_pretrained` reads it; its other files stay as they are.

    Returns:
        The path of the file, which appears whole or not at all.

    Raises:
        FileNotFoundError, ValueError: see `SentenceEncoder.from_pretrained`.
    """
    _, folder = read_modules(directory)
    check_writable("directory", str(folder / INTEGERS), folder / INTEGERS)
    model = _read_model(folder, torch.bfloat16 if backends.multiplies_bfloat16() else torch.float32)
    model.save_integers(folder)
    return folder / INTEGERS


def check_encoding(directory: str | Path, **arguments: Any) -> None:
    """That `SentenceEncoder.encode` of a directory takes its arguments, beside the texts: before its weights are read.

    Raises:
        FileNotFoundError, ValueError: as `SentenceEncoder.from_pretrained`.
        TypeError, ValueError: as `SentenceEncoder.encode`.
    """
    modules, folder = read_modules(directory)
    config = encoder_class(folder).config_class.from_pretrained(folder)
    _Own(config, modules, SentenceSettings.from_directory(Path(directory))).asked(**arguments)


class _Own(NamedTuple):
    """What a directory says, which decides what may be asked of its vectors."""

    config: Any
    modules: SentenceModules
    settings: SentenceSettings

    def asked(
        self,
        *,
        batch_size: int = 32,
        normalize: bool | None = None,
        layers: int | Sequence[Any] | None = None,
        pooling: str | None = None,
        token_vectors: bool | str = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
    ) -> tuple[Layers, str, int | None]:
        """The layers, what is put before a text, and how many numbers of a vector are kept; see `encode`."""
        check_count("batch_size", batch_size)
        check_switch("normalize", normalize)
        chosen = Layers.of(layers, self.config.depth)
        if pooling is not None and pooling not in POOLINGS:
            raise ValueError(f"pooling: got {pooling!r}, wanted None or one of {', '.join(POOLINGS)}")
        if not isinstance(token_vectors, bool) and token_vectors != "word":
            raise ValueError(f"token_vectors: got {token_vectors!r}, wanted True, False or 'word'")
        check_precision(precision)
        if ranges is not None and precision not in ("int8", "uint8"):
            raise ValueError(f"ranges: got some with precision {precision!r}, wanted them with int8 or uint8 alone")
        if token_vectors:
            _refuse_with_tokens(pooling=pooling, truncate_dim=truncate_dim, precision=precision)
        elif chosen.width > 1 and pooling is None and self.modules.dense:
            raise ValueError(
                f"layers: got {layers!r}, but the directory's dense layers take {self.config.hidden_size} "
                "numbers a token; wanted one layer, a sum or a mean, or pooling given"
            )
        put_before = self.settings.prompt(prompt, prompt_name)
        keep = None if token_vectors else self._kept(truncate_dim, self.width(chosen, pooling))
        if ranges is not None and keep is not None:
            check_ranges(ranges, keep)
        return chosen, put_before, keep

    def width(self, layers: Layers, pooling: str | None) -> int:
        """How many numbers a vector has before it is cut."""
        hidden = self.config.hidden_size * layers.width
        return self.modules.size(hidden) if pooling is None else hidden

    def _kept(self, truncate_dim: int | None, size: int) -> int:
        """How many numbers of a vector are kept."""
        if truncate_dim is None:
            return size if self.settings.truncate_dim is None else min(size, self.settings.truncate_dim)
        check_count("truncate_dim", truncate_dim)
        if truncate_dim > size:
            raise ValueError(f"truncate_dim: got {truncate_dim}, wanted at most the {size} numbers of a vector")
        return int(truncate_dim)


class _Wanted(NamedTuple):
    """What one call of `encode` asks for; `keep` is the length of its vectors."""

    batch_size: int
    normalize: bool | None
    pooling: str | None
    prompt: str
    keep: int | None
    show_progress: bool | None


def _with_prompt(name: str, options: dict[str, Any]) -> dict[str, Any]:
    given = options.get("prompt") is not None or options.get("prompt_name") is not None
    return options if given else {**options, "prompt_name": name}


def _refuse_with_tokens(**given: Any) -> None:
    for name, value in given.items():
        if value not in (None, "float32"):
            raise ValueError(f"{name}: got {value!r} with token_vectors, which are not pooled; wanted None")


def _merge_words(
    text: str, words: np.ndarray, offsets: np.ndarray, vectors: torch.Tensor
) -> tuple[list[str], np.ndarray, torch.Tensor]:
    """Joins neighbouring tokens of one word: its characters, its span, the mean of its vectors."""
    starts = np.flatnonzero(np.diff(words, prepend=-2))
    spans = list(pairwise([*starts.tolist(), len(words)]))
    merged = np.array([(offsets[a, 0], offsets[b - 1, 1]) for a, b in spans], dtype=np.int64).reshape(-1, 2)
    for row, (_, end) in enumerate(merged.tolist()):
        # Accents that the normaliser strips belong to no token: the word keeps those behind its last letter.
        limit = merged[row + 1, 0] if row + 1 < len(merged) else len(text)
        while end < limit and unicodedata.combining(text[end]):
            end += 1
        merged[row, 1] = end
    return [text[start:end] for start, end in merged], merged, pool(vectors, [b - a for a, b in spans])
