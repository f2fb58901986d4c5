"""Pairs of texts to scores: a classifier that reads both texts at once, as rerankers do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyxlbert.files import is_there, model_directory, read_json, read_optional_json, setting
from pyxlbert.hub import Hub
from pyxlbert.models import BertForSequenceClassification
from pyxlbert.nn.packing import pack, packs_by_default

from .batches import check_count, check_switch, check_texts, longest_first
from .hidden import boundaries
from .pooling import ACTIVATIONS, module_of
from .processes import ProcessPool, check_pool, default_devices
from .settings import FILE, SentenceSettings, model_dtype
from .tokenizer import TextTokenizer


class CrossEncoder:
    """A BERT classifier of pairs with its tokenizer. Threads may share one.

    Args:
        model: owned from here on: set to evaluation, its weights packed for speed.
        tokenizer: gives at most as many tokens as the model has positions.
        activation: on the model's logits: "Sigmoid", "Identity" or another of `pyxlbert.text.pooling.ACTIVATIONS`;
            None is the sigmoid for one label, else nothing.
        quantised: multiply in the layers by eight-bit integers: see `pyxlbert.pack`.
        settings: prompts; None has none.

    Raises:
        ValueError: `activation` is another word.
    """

    def __init__(
        self,
        model: BertForSequenceClassification,
        tokenizer: TextTokenizer,
        activation: str | None = None,
        quantised: bool = False,
        settings: SentenceSettings | None = None,
    ) -> None:
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        self.activation = activation or ("Sigmoid" if model.num_labels == 1 else "Identity")
        self.quantised = quantised
        self.settings = SentenceSettings() if settings is None else settings
        self.model = model.eval().requires_grad_(False)
        if quantised or packs_by_default():
            pack(self.model, "int8" if quantised else None)
        self.tokenizer = tokenizer

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
    ) -> CrossEncoder:
        """Reads the folder of a `BertForSequenceClassification`, as transformers or sentence-transformers write it.

        The activation is the one that `config_sentence_transformers.json` or `config.json` names
        (`sentence_transformers.activation_fn`, `sbert_ce_default_activation_function`).

        Args:
            directory, dtype, revision, cache_dir, token, local_files_only: as in `SentenceEncoder.from_pretrained`.

        Raises:
            FileNotFoundError: the directory or one of its files is missing.
            ValueError: a file is corrupt, asks for what is not supported, or holds no classifier.
            TypeError: `dtype` is not one that models run in.
        """
        dtype, quantised = model_dtype(dtype)
        directory = Hub(revision, cache_dir, token, local_files_only).folder(directory, text=True)
        folder = _transformer(model_directory(directory))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is missing is an error below
            model = BertForSequenceClassification.from_pretrained(folder, dtype=dtype)
        missing = (model.loading_info or {}).get("missing_keys")
        if missing:
            raise ValueError(f"{folder}: holds no cross-encoder: {', '.join(missing)} is missing")
        tokenizer = TextTokenizer.from_directory(folder, model.config.max_position_embeddings)
        if tokenizer.largest_id >= model.config.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has ids up to {tokenizer.largest_id}, but config.json says vocab_size "
                f"{model.config.vocab_size}"
            )
        settings = SentenceSettings.from_directory(Path(directory))
        return cls(model, tokenizer, _saved_activation(Path(directory), folder), quantised, settings)

    def __reduce__(self) -> tuple[Any, ...]:
        return CrossEncoder, (self.model, self.tokenizer, self.activation, self.quantised, self.settings)

    def predict(
        self,
        pairs: Sequence[str] | Iterable[Sequence[str]],
        batch_size: int = 32,
        activation: str | Callable[[torch.Tensor], torch.Tensor] | None = None,
        apply_softmax: bool = False,
        show_progress: bool | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        pool: ProcessPool | None = None,
        chunk_size: int | None = None,
    ) -> Any:
        """The score of each pair.

        Args:
            pairs: a pair of texts or several. What is too long for the model is cut from the longer text first.
            batch_size: pairs per run of the model; they run longest first, without padding.
            activation: on the logits [B, labels] in place of the folder's own, by name or as a function.
            apply_softmax: of several labels, make each pair's scores sum to 1 after the activation.
            show_progress, prompt_name, prompt, pool, chunk_size: as in `SentenceEncoder.encode`; a prompt is put before
                the first text of each pair.

        Returns:
            float32 NumPy: a pair gives a number, N pairs [N]; with L > 1 labels [L] and [N, L].

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument has a value that means nothing.
            RuntimeError: a process of the pool died.
        """
        if isinstance(pairs, str):
            raise TypeError("pairs: got str, wanted a pair of texts, or several")
        items: list[Any] = list(pairs)
        single = len(items) == 2 and all(isinstance(one, str) for one in items)
        items = [_pair(item, index) for index, item in enumerate([items] if single else items)]
        check_count("batch_size", batch_size)
        check_switch("show_progress", show_progress)
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        put_before = self.settings.prompt(prompt, prompt_name)
        check_pool(pool)
        if pool is not None and items:
            options = {"batch_size": batch_size, "activation": activation, "apply_softmax": apply_softmax}
            scores = np.concatenate(
                pool.run("predict", items, chunk_size, show_progress, {**options, "prompt": put_before})
            )
        else:
            function = activation if callable(activation) else ACTIVATIONS[activation or self.activation]
            scores = self._scores(items, batch_size, function, show_progress, put_before)
            if apply_softmax and scores.ndim > 1:
                scores = torch.softmax(torch.from_numpy(scores), dim=1).numpy()
        return scores[0] if single else scores

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """The documents that go best with a query, best first.

        Args:
            query: one text.
            documents: the others.
            top_k: how many are returned; None returns all.
            return_documents: the text of each, too.
            options: of `predict`.

        Returns:
            `{"corpus_id": index, "score": number}` a document, with "text" if it was asked for.

        Raises:
            TypeError, ValueError: as in `predict`; the model has several labels.
        """
        if self.model.num_labels != 1:
            raise ValueError(f"rank: the model has {self.model.num_labels} labels, wanted one; see predict")
        if not isinstance(query, str):
            raise TypeError(f"query: got {type(query).__name__}, wanted str")
        if top_k is not None:
            check_count("top_k", top_k)
        texts = check_texts([documents] if isinstance(documents, str) else documents, "documents")
        scores = self.predict([(query, text) for text in texts], **options)
        # The sort is stable: of equal scores the earlier document comes first.
        order = sorted(range(len(texts)), key=lambda index: -scores[index])[:top_k]
        extra = [{"text": texts[index]} if return_documents else {} for index in order]
        return [
            {"corpus_id": index, "score": float(scores[index]), **more}
            for index, more in zip(order, extra, strict=True)
        ]

    def start_multi_process_pool(self, target_devices: Sequence[str] | None = None) -> ProcessPool:
        """See `SentenceEncoder.start_multi_process_pool`."""
        return ProcessPool(self, default_devices() if target_devices is None else target_devices)

    @staticmethod
    def stop_multi_process_pool(pool: ProcessPool) -> None:
        """Ends the processes of a pool."""
        pool.close()

    def _scores(
        self,
        pairs: list[tuple[str, str]],
        batch_size: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
        show_progress: bool | None,
        prompt: str,
    ) -> np.ndarray:
        labels = self.model.num_labels
        result = np.empty((len(pairs), labels), dtype=np.float32)
        ids, types = self.tokenizer.pairs([prompt + first for first, _ in pairs], [second for _, second in pairs])
        device = next(self.model.parameters()).device
        for rows in longest_first([len(i) for i in ids], batch_size, show_progress):
            packed = [
                torch.from_numpy(np.concatenate([of[row] for row in rows])).long().to(device) for of in (ids, types)
            ]
            with torch.inference_mode():
                output = self.model.base_model(
                    input_ids=packed[0],
                    token_type_ids=packed[1],
                    output_attentions=False,
                    output_hidden_states=False,
                    return_dict=True,
                    **boundaries([len(ids[row]) for row in rows], device),
                )
                logits = self.model.classifier(output.pooler_output)  # [B, labels]
                result[rows] = activation(logits.float()).cpu().numpy()
        return result[:, 0] if labels == 1 else result


def _pair(item: object, index: int) -> tuple[str, str]:
    pair = list(item) if isinstance(item, Iterable) and not isinstance(item, (str, bytes)) else []
    if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise TypeError(f"pairs: item {index} is {item!r}, wanted two str")
    return pair[0], pair[1]


def _transformer(root: Path) -> Path:
    """The folder of the model: the root itself, or the one that `modules.json` names."""
    listing = root / "modules.json"
    if not is_there(listing):
        return root
    modules = [module_of(root, module, listing) for module in read_json(listing, list)]
    kinds = [kind for kind, _ in modules]
    if kinds != ["Transformer"]:
        raise ValueError(f"{listing}: lists {kinds}; wanted the one module Transformer of a cross-encoder")
    return modules[0][1]


def _saved_activation(root: Path, folder: Path) -> str | None:
    path = root / FILE
    name = setting(path, read_optional_json(path), "activation_fn", str)
    if name is None:
        path = folder / "config.json"
        config = read_json(path)
        own = setting(path, config, "sentence_transformers", dict, {})
        name = setting(path, own, "activation_fn", str)
        if "activation_fn" not in own:
            name = setting(path, config, "sbert_ce_default_activation_function", str)
    if name is None:
        return None
    word = name.rsplit(".", 1)[-1]
    if word not in ACTIVATIONS:
        raise ValueError(f"{path}: the activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return word
