"""RoBERTa's directories, XLM-RoBERTa's and CamemBERT's: tokens against `transformers`, vectors against its models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import pyxlbert
from pyxlbert import cli
from pyxlbert.models import RobertaConfig, RobertaModel
from pyxlbert.testing import tolerances
from pyxlbert.testing.models import randomize
from pyxlbert.text import SentenceEncoder, TextTokenizer

transformers = pytest.importorskip("transformers")

LINES = [
    "The loaf needs forty minutes in the oven, and the dough another hour to rise.",
    "It is the baker's habit to weigh the flour: 500 grams of it, 350 of water, 10 of salt.",
    "Naïve bakers weigh nothing; their loaves rise, or don't, as the weather wants.",
    "In the morning the bread is sold at the market, and by noon there is nothing left.",
]
TEXTS = [
    *LINES,
    "",
    "a",
    "  two  spaces ",
    "你好 😀 – £5",
    "\ud800 surrogate",
    "the " * 40,
    "<mask> of </s> flour<pad>",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
# Of a table of 34 rows, 32 are for tokens.
POSITIONS = 34


def tokenizer_of(kind: str) -> Tokenizer:
    mask = AddedToken("<mask>", lstrip=True)
    if kind == "roberta":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=[*SPECIAL[:4], mask], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(LINES, trainer)
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        return tokenizer
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=[*SPECIAL[:4], mask], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


@pytest.fixture(scope="module", params=["roberta", "xlm-roberta", "camembert"])
def directory(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = tokenizer_of(request.param)
    model = RobertaModel(
        RobertaConfig.from_dict(
            {"model_type": request.param},
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=POSITIONS,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
    )
    randomize(model, torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    names |= {"cls_token": "<s>", "sep_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"model_max_length": 512}))
    return folder


def peer_ids(directory: Path) -> list[list[int]]:
    peer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = [text.replace("\ud800", "\ufffd") for text in TEXTS]
    return peer(texts, truncation=True, max_length=POSITIONS - 2)["input_ids"]


def test_ids_and_limit(directory: Path) -> None:
    """The limit is what the position table has rows for, not its size, which transformers would overrun."""
    encoder = SentenceEncoder.from_pretrained(directory)
    assert encoder.tokenizer.max_length == POSITIONS - 2 == encoder.model.max_tokens
    wanted = peer_ids(directory)
    assert [one.tolist() for one in encoder.tokenizer.ids(TEXTS)] == wanted
    assert max(map(len, wanted)) == POSITIONS - 2
    padded = encoder.tokenizer.padded(TEXTS)
    assert (padded.ids[padded.mask == 0] == 1).all()


@pytest.mark.parametrize("layers", [None, -2, (0, 1, 2, 3)])
def test_vectors_against_transformers(directory: Path, layers) -> None:
    encoder = SentenceEncoder.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    got = encoder.encode(TEXTS, layers=layers)
    for row, ids in zip(got, peer_ids(directory), strict=True):
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        chosen = [states[i] for i in ([3] if layers is None else [layers] if isinstance(layers, int) else layers)]
        wanted = torch.stack(chosen).mean(0)[0].mean(0).numpy()
        assert np.abs(row - wanted).max() <= tolerances.MODEL_FLOAT32 * np.abs(wanted).max()


def test_tokens_and_words(directory: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(directory)
    text = "The naïve baker's loaf, 500 grams"
    tokens = encoder.encode(text, token_vectors=True)
    assert len(tokens.tokens) == len(tokens.vectors) == len(tokens.offsets) > 0
    words = encoder.encode(text, token_vectors="word")
    assert "".join(words.tokens).replace(" ", "") == text.replace(" ", "")
    assert all(text[start:end] == word for word, (start, end) in zip(words.tokens, words.offsets, strict=True))


def test_a_sentence_transformers_directory(directory: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    kinds = library.models if hasattr(library, "models") else library.sentence_transformer.modules
    transformer = kinds.Transformer(str(directory), max_seq_length=24)
    parts = [transformer, kinds.Pooling(32, pooling_mode="mean"), kinds.Normalize()]
    peer = library.SentenceTransformer(modules=parts, device="cpu")
    peer.save(str(tmp_path))
    encoder = pyxlbert.SentenceEncoder.from_pretrained(tmp_path)
    assert encoder.modules.normalize and encoder.tokenizer.max_length == 24
    texts = [text.replace("\ud800", "\ufffd") for text in TEXTS]
    got, wanted = encoder.encode(texts), peer.encode(texts)
    assert np.abs(got - wanted).max() <= tolerances.MODEL_FLOAT32 * np.abs(wanted).max()


def test_the_command(directory: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(LINES), encoding="utf-8")
    assert cli.main(["embed", str(file), "--model", str(directory), "--out", str(out)]) == 0
    wanted = SentenceEncoder.from_pretrained(directory).encode(LINES)
    assert np.array_equal(np.load(out), wanted)


@pytest.mark.parametrize("prefix", [False, True])
def test_pairs_of_bytes_without_a_tokenizer_json(tmp_path: Path, prefix: bool) -> None:
    """An older directory of RoBERTa: the same ids as its tokenizer.json gives."""
    tokenizer = tokenizer_of("roberta")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": prefix}))
    ours = TextTokenizer.from_directory(tmp_path, 32)
    tokenizer.enable_truncation(32)
    texts = [text.replace("\ud800", "\ufffd") for text in TEXTS]
    for got, wanted in zip(ours.tokenize(texts), tokenizer.encode_batch(texts), strict=True):
        assert got.ids.tolist() == wanted.ids
        assert got.special.tolist() == [bool(one) for one in wanted.special_tokens_mask]
    (tmp_path / "merges.txt").write_text("#version: 0.2\nq z\n")
    with pytest.raises(ValueError, match=r"merges.txt are not pairs of bytes that can be read"):
        TextTokenizer.from_directory(tmp_path, 32)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"nor vocab.json with merges.txt"):
        TextTokenizer.from_directory(tmp_path, 32)


def test_another_model_is_named(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mpnet"}')
    with pytest.raises(ValueError, match=r"config.json: model_type is 'mpnet'; wanted one of bert, roberta, xlm"):
        SentenceEncoder.from_pretrained(tmp_path)
