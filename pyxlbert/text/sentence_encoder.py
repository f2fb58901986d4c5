"""Sentences to vectors: tokenise, run longest first in packed batches, pool, normalise."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from pyxlbert import backends
from pyxlbert.hub import Hub
from pyxlbert.models import BertModel, RobertaModel, XLNetModel
from pyxlbert.models.by_type import encoder_class
from pyxlbert.models.integers import FILE as INTEGERS
from pyxlbert.nn.packing import pack, packs_by_default

from .pooling import POOLINGS, SentenceModules, pool, read_modules
from .tokenizer import TextTokenizer

# A progress bar that nobody asked for appears after so many seconds, on a terminal.
_BAR_DELAY = 2.0


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
    """

    def __init__(
        self,
        model: BertModel | RobertaModel | XLNetModel,
        tokenizer: TextTokenizer,
        modules: SentenceModules | None = None,
        quantised: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        if quantised or packs_by_default():
            pack(self.model, "int8" if quantised else None)
        self.tokenizer = tokenizer
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

        Raises:
            FileNotFoundError: the directory or one of its files is missing, or a model of the hub cannot be had; the
                message says what to do.
            ValueError: a file is corrupt or asks for what is not supported; the message names it.
            TypeError: `dtype` is not one that models run in.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, "int8"):
            raise TypeError(f"dtype: got {dtype!r}, wanted torch.float32, torch.bfloat16, torch.float16 or 'int8'")
        directory = Hub(revision, cache_dir, token, local_files_only).folder(directory, text=True)
        modules, folder = read_modules(directory)
        model = _read_model(folder, dtype)
        tokenizer = TextTokenizer.from_directory(folder, model.max_tokens)
        if tokenizer.largest_id >= model.config.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has ids up to {tokenizer.largest_id}, but config.json says vocab_size "
                f"{model.config.vocab_size}"
            )
        return cls(model, tokenizer, modules, dtype == "int8")

    def _mode(self, mode: str) -> str:
        return self._cls if mode == "cls" else mode

    @property
    def size(self) -> int:
        """The length of a sentence vector, with the directory's own pooling."""
        return self.modules.size(self.model.config.hidden_size)

    def encode(
        self,
        texts: str | Iterable[str],
        batch_size: int = 32,
        normalize: bool | None = None,
        layers: int | Sequence[Any] | None = None,
        pooling: str | None = None,
        token_vectors: bool | str = False,
        show_progress: bool | None = None,
    ) -> Any:
        """One vector a text, or one a token.

        Args:
            texts: a text or several. A text longer than the tokenizer's limit is cut; an empty one is its special
                tokens; surrogate code points are read as U+FFFD.
            batch_size: texts per run of the model; they run longest first, without padding.
            normalize: divide each vector by its length; None does what the directory's modules say (for token
                vectors: no).
            layers: None is the last; an int is that layer, 0 being the embeddings and negatives counting from the
                top; several ints are averaged; `("sum", -1, -2)` adds them, `("mean", -1, -2)` is the average.
            pooling: "mean", "cls" (the classification token's: BERT's first, XLNet's last) or "max"; None is the
                directory's own, dense layers included.
            token_vectors: True gives the vectors of the tokens, "word" those of the words (the mean of their pieces).
            show_progress: a bar on standard error; None shows it on a terminal when the work takes long.

        Shape:
            A text gives [E], N texts [N, E]; several pooling modes or a dense layer change E as they say.

        Returns:
            float32 NumPy in the order of the texts; with `token_vectors` a `TokenVectors`, or a list of them.

        Raises:
            TypeError: an argument, or an item of `texts`, has the wrong type.
            ValueError: an argument has a value that means nothing; the message names it.
        """
        single = isinstance(texts, str)
        items = [texts] if single else _check_texts(texts)
        _check_batch_size(batch_size)
        for name, value in (("normalize", normalize), ("show_progress", show_progress)):
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}, wanted True, False or None")
        chosen, combine = _resolve_layers(layers, self.model.config.num_hidden_layers)
        if pooling is not None and pooling not in POOLINGS:
            raise ValueError(f"pooling: got {pooling!r}, wanted None or one of {', '.join(POOLINGS)}")
        if not isinstance(token_vectors, bool) and token_vectors != "word":
            raise ValueError(f"token_vectors: got {token_vectors!r}, wanted True, False or 'word'")
        if token_vectors and pooling is not None:
            raise ValueError(f"pooling: got {pooling!r} with token_vectors, which are not pooled; wanted None")
        hidden = _Hidden(self.model, self.tokenizer, chosen, combine)
        if token_vectors:
            result: Any = self._tokens(
                items, hidden, batch_size, bool(normalize), token_vectors == "word", show_progress
            )
        else:
            divide = self.modules.normalize if normalize is None else normalize
            result = self._sentences(items, hidden, batch_size, divide, pooling, show_progress)
        return result[0] if single else result

    def _sentences(
        self,
        texts: list[str],
        hidden: _Hidden,
        batch_size: int,
        normalize: bool,
        pooling: str | None,
        show_progress: bool | None,
    ) -> np.ndarray:
        size = self.size if pooling is None else self.model.config.hidden_size
        result = np.empty((len(texts), size), dtype=np.float32)
        ids = self.tokenizer.ids(texts)
        for rows in _longest_first([len(i) for i in ids], batch_size, show_progress):
            lengths = [len(ids[row]) for row in rows]
            with torch.inference_mode():
                x = hidden([ids[row] for row in rows])
                vectors = self.modules(x, lengths) if pooling is None else pool(x, lengths, (self._mode(pooling),))
                if normalize:
                    vectors = F.normalize(vectors, dim=-1)
                result[rows] = vectors.cpu().numpy()
        return result

    def _tokens(
        self,
        texts: list[str],
        hidden: _Hidden,
        batch_size: int,
        normalize: bool,
        words: bool,
        show_progress: bool | None,
    ) -> list[TokenVectors]:
        tokenized = self.tokenizer.tokenize(texts)
        result: dict[int, TokenVectors] = {}
        for rows in _longest_first([len(t.ids) for t in tokenized], batch_size, show_progress):
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
                    if normalize:
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
    model = _read_model(folder, torch.bfloat16 if backends.multiplies_bfloat16() else torch.float32)
    model.save_integers(folder)
    return folder / INTEGERS


class _Hidden:
    """Runs the model on packed ids and returns the chosen layer or combination of layers, [total, E]."""

    def __init__(
        self,
        model: BertModel | RobertaModel | XLNetModel,
        tokenizer: TextTokenizer,
        layers: list[int] | None,
        combine: str,
    ) -> None:
        self.model, self.tokenizer, self.layers, self.combine = model, tokenizer, layers, combine

    def __call__(self, ids: list[np.ndarray]) -> torch.Tensor:
        device = next(self.model.parameters()).device
        given: dict[str, Any] = {}
        tokens = torch.from_numpy(ids[0][None] if len(ids) == 1 else np.concatenate(ids)).long().to(device)
        lengths = [len(i) for i in ids]
        if len(ids) > 1:  # a text alone is a batch without padding
            cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
            given = {"cu_seqlens": cu_seqlens.to(device), "max_seqlen": max(lengths)}
        types = [one for one in map(self.tokenizer.types, lengths) if one is not None]
        if types:
            given["token_type_ids"] = torch.from_numpy(np.concatenate(types)).view(tokens.shape).to(device)
        # A directory's config may ask for tuples or for attention weights.
        given |= {"output_attentions": False, "return_dict": True}
        output = self.model(input_ids=tokens, output_hidden_states=self.layers is not None, **given)
        if self.layers is None:
            return output.last_hidden_state.flatten(end_dim=-2)
        first, *rest = (output.hidden_states[layer].flatten(end_dim=-2) for layer in self.layers)
        total = first.float()
        for other in rest:
            total = total + other.float()
        return total / len(self.layers) if self.combine == "mean" else total


def _longest_first(lengths: list[int], batch_size: int, show_progress: bool | None) -> Iterator[list[int]]:
    """Rows of each batch. Longest first: memory is at its largest at once, and the bar's estimate never grows."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    if show_progress is False or (show_progress is None and len(order) <= batch_size):
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]
        return
    from tqdm import tqdm

    bar = tqdm(
        total=len(order),
        unit="text",
        delay=_BAR_DELAY if show_progress is None else 0,
        disable=None if show_progress is None else False,  # None: unless it is a terminal
    )
    with bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows
            bar.update(len(rows))


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


def _check_texts(texts: object) -> list[str]:
    if isinstance(texts, (bytes, bytearray, Mapping, AbstractSet)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: got {type(texts).__name__}, wanted a str or a list of str")
    items = list(texts)
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise TypeError(f"texts: item {index} is {type(item).__name__}, wanted str")
    return items


def _check_batch_size(batch_size: object) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)):
        raise TypeError(f"batch_size: got {type(batch_size).__name__}, wanted int")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, wanted at least 1")


def _resolve_layers(layers: object, count: int) -> tuple[list[int] | None, str]:
    """The indices into `hidden_states` (None: the last layer's output) and "mean" or "sum"."""
    if layers is None:
        return None, "mean"
    several = isinstance(layers, (Sequence, range)) and not isinstance(layers, (str, bytes))
    items = list(layers) if several or (isinstance(layers, np.ndarray) and layers.ndim == 1) else [layers]
    combine = items.pop(0) if items and isinstance(items[0], str) and items[0] in ("sum", "mean") else "mean"
    wanted = f"wanted layers from {-count - 1} to {count} (0 is the embeddings)"
    if not items:
        raise ValueError(f"layers: got {layers!r}, which names no layer; {wanted}")
    for layer in items:
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
            raise TypeError(f"layers: got {layers!r}; wanted an int, several, or ('sum', int, ...)")
        if not -count - 1 <= layer <= count:
            raise ValueError(f"layers: got {layer}; {wanted}")
    resolved = [int(layer) % (count + 1) for layer in items]
    return (None, "mean") if resolved == [count] else (resolved, combine)
