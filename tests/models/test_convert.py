"""`pyxlbert convert`: what it writes computes what the original code computes, here and in transformers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import original_checkpoints as original
import pytest
import torch
import transformers
from bundles import rewrite_index, write_bundle
from original_forward import bert, tanh_gelu, xlnet
from safetensors import safe_open

from pyxlbert import cli, models
from pyxlbert.original import Conversion, convert
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.directories import VOCABULARY, train_pieces
from pyxlbert.text import TextTokenizer

TEXT = ["the cat sat on the mat and the dog ran", "hello world this is a text of a few words", "trains run on rails"]
CLASSES = {
    "bert_pretraining": "BertForPreTraining",
    "bert_classifier": "BertForSequenceClassification",
    "bert_squad": "BertForQuestionAnswering",
    "bert_partitioned": "BertForQuestionAnswering",
    "xlnet_lm": "XLNetLMHeadModel",
    "xlnet_classifier": "XLNetForSequenceClassification",
    "xlnet_squad": "XLNetForQuestionAnswering",
}


@pytest.fixture(scope="module")
def pieces() -> bytes:
    return train_pieces(TEXT * 9, 70, hard_vocab_limit=False)


def source_of(kind: str, folder: Path, pieces: bytes) -> Path:
    """A folder as a released checkpoint's archive holds it."""
    shutil.copytree(original.FOLDER / kind, folder)
    name = "bert_config.json" if kind.startswith("bert") else "xlnet_config.json"
    (folder / name).write_text(json.dumps(original.CONFIGS[kind]))
    if kind.startswith("bert"):
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    else:
        (folder / "spiece.model").write_bytes(pieces)
    return folder


@pytest.fixture
def source(tmp_path: Path, pieces: bytes):
    return lambda kind: source_of(kind, tmp_path / "source", pieces)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, pieces: bytes) -> dict[str, tuple[Path, Conversion]]:
    """Every kind's directory."""
    folder = tmp_path_factory.mktemp("converted")
    return {
        kind: (folder / kind, convert(source_of(kind, folder / f"{kind}_source", pieces), folder / kind))
        for kind in original.CONFIGS
    }


def batch(kind: str) -> dict[str, np.ndarray]:
    """Ids, mask and types; XLNet's padding is on the left, where its texts have it."""
    generator = np.random.default_rng(3)
    config = original.CONFIGS[kind]
    ids = generator.integers(0, config.get("vocab_size", config.get("n_token")), (3, 7))
    mask = (np.arange(7) < np.array([[7], [4], [1]])).astype(np.int64)
    types = generator.integers(0, 2, (3, 7))
    return {"ids": ids, "mask": mask if kind.startswith("bert") else mask[:, ::-1].copy(), "types": types}


def outputs(model: torch.nn.Module, kind: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model's outputs; the encoder's too."""
    inputs = {
        name: torch.from_numpy(given[short])
        for name, short in (("input_ids", "ids"), ("attention_mask", "mask"), ("token_type_ids", "types"))
    }
    if kind == "xlnet_squad" and isinstance(model, transformers.PreTrainedModel):
        inputs["p_mask"] = 1.0 - inputs["attention_mask"]
    extra = {} if kind.startswith("bert") else {"use_mems": False}
    with torch.no_grad():
        found = dict(model(**inputs, **extra).items())
        found |= dict(model.base_model(**inputs, **extra).items())
    return {name: value.numpy() for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.quick
@pytest.mark.parametrize("kind", original.CONFIGS)
@pytest.mark.parametrize("library", ["pyxlbert", "transformers"])
def test_both_libraries_compute_what_the_original_does(kind: str, library: str, converted, recwarn) -> None:
    folder, done = converted[kind]
    assert done.class_name == CLASSES[kind]
    top = {"start_n_top": 1, "end_n_top": 1} if kind == "xlnet_squad" else {}
    model_class = getattr(models if library == "pyxlbert" else transformers, done.class_name)
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **top)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    given = batch(kind)
    wanted = (bert if kind.startswith("bert") else xlnet)(original.values(kind), original.CONFIGS[kind], **given)
    got = outputs(model.eval(), kind, given)
    if library == "pyxlbert":
        assert not [w for w in recwarn if "pyxlbert" in str(w.filename)]
    compared = wanted.keys() & got.keys()
    # Question answering has no pooler, and the masked LM's model gives its loss's logits under their own names.
    assert compared == wanted.keys() - ({"pooler_output"} if CLASSES[kind] == "BertForQuestionAnswering" else set())
    real = given["mask"].astype(bool)
    for name in compared:
        a, b = got[name], wanted[name]
        if a.shape[:2] == real.shape:
            a, b = a[real], b[real]
        compare.close(f"{name} of {kind}", torch.tensor(a).double(), torch.tensor(b), tolerances.MODEL_FLOAT32)


def test_tanh_gelu(source, tmp_path: Path) -> None:
    """The formula of the original code's last version, on request."""
    convert(source("xlnet_lm"), tmp_path / "out", tanh_gelu=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["ff_activation"] == "gelu_new"
    given = batch("xlnet_lm")
    wanted = xlnet(original.values("xlnet_lm"), original.CONFIGS["xlnet_lm"], **given, activation=tanh_gelu)
    real = given["mask"].astype(bool)
    got = outputs(models.XLNetLMHeadModel.from_pretrained(tmp_path / "out"), "xlnet_lm", given)["logits"]
    compare.close(
        "logits", torch.tensor(got[real]).double(), torch.tensor(wanted["logits"][real]), tolerances.MODEL_FLOAT32
    )


def test_the_table_has_every_variable(converted) -> None:
    done = converted["bert_pretraining"][1]
    states = {row.name: row.state for row in done.rows}
    ours = original.shapes("bert_pretraining")
    assert {name for name, state in states.items() if state == "initialised"} == set(ours)
    unused = {name for name, state in states.items() if state == "unused"}
    assert unused == {"global_step"} | {f"{name}/{slot}" for name in ours for slot in ("adam_m", "adam_v")}
    assert {row.name: row.shape for row in done.rows[: len(ours)]} == ours
    table = done.table().splitlines()
    line = next(line for line in table if line.startswith("bert/pooler/dense/kernel "))
    assert line.split("  ")[-1].strip() == "bert.pooler.dense.weight"
    assert re.search(r"\(16, 16\) +initialised", line)
    assert table[-1] == "46 variables from the checkpoint, 0 left new, 93 unused"
    stacked = next(row for row in converted["xlnet_lm"][1].rows if row.name == "model/transformer/seg_embed")
    assert stacked.parameters == ("transformer.layer.0.rel_attn.seg_embed", "transformer.layer.1.rel_attn.seg_embed")
    fresh = next(row for row in converted["xlnet_squad"][1].rows if row.name.endswith("mask_emb"))
    assert fresh.state == "left new: zeros"


@pytest.mark.parametrize(
    ("kind", "task", "name", "new"),
    [
        ("bert_pretraining", "text-classification", "BertForSequenceClassification", {"output_weights", "output_bias"}),
        ("bert_pretraining", "fill-mask", "BertForMaskedLM", set()),
        ("bert_pretraining", "next-sentence", "BertForNextSentencePrediction", set()),
        ("bert_classifier", "token-classification", "BertForTokenClassification", set()),
        ("bert_squad", "feature-extraction", "BertModel", set()),
        ("bert_squad", "multiple-choice", "BertForMultipleChoice", {"output_weights", "output_bias"}),
        ("xlnet_classifier", "multiple-choice", "XLNetForMultipleChoice", {"logits/dense/kernel", "logits/dense/bias"}),
        ("xlnet_lm", "feature-extraction", "XLNetModel", set()),
        (
            "xlnet_lm",
            "question-answering-simple",
            "XLNetForQuestionAnsweringSimple",
            {"qa_outputs/kernel", "qa_outputs/bias"},
        ),
    ],
)
def test_tasks(kind: str, task: str, name: str, new: set[str], source, tmp_path: Path) -> None:
    """What a task's model lacks is not written, so that each library gives it fresh values."""
    done = convert(source(kind), tmp_path / "out", task=task)
    assert done.class_name == name
    missing = {row.name for row in done.rows if row.state == "left new"}
    assert missing == new
    parameters = {parameter for row in done.rows if row.state == "left new" for parameter in row.parameters}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert not parameters & set(file.keys())
    if new:
        with pytest.warns(UserWarning, match="not in the checkpoint"):
            model = getattr(models, name).from_pretrained(tmp_path / "out")
        assert set(model.loading_info["missing_keys"]) == parameters
    else:
        model = getattr(models, name).from_pretrained(tmp_path / "out")
        assert not model.loading_info["missing_keys"] and not model.loading_info["unexpected_keys"]
    if task == "token-classification":
        compare.same_bits(
            "classifier", model.classifier.weight.detach(), torch.tensor(original.values(kind)["output_weights"])
        )


@pytest.mark.parametrize("kind", ["bert_classifier", "xlnet_lm"])
def test_tokenizers(kind: str, converted) -> None:
    folder = converted[kind][0]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = TextTokenizer.from_directory(folder, 32)
    texts = [*TEXT, "Hello, world! naïve 你好", ""]
    assert theirs(texts)["input_ids"] == [ids.tolist() for ids in ours.ids(texts)]
    with_file = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    try:
        again = TextTokenizer.from_directory(folder, 32)
        assert [ids.tolist() for ids in again.ids(texts)] == [ids.tolist() for ids in ours.ids(texts)]
    finally:
        (folder / "tokenizer.json").write_bytes(with_file)
    if kind.startswith("bert"):
        assert theirs.decode(theirs("the trains").input_ids, skip_special_tokens=True) == "the trains"


@pytest.mark.parametrize(
    ("lines", "settings", "options", "lower", "reason"),
    [
        (VOCABULARY, None, {}, False, "the vocabulary has 'Hello'"),
        ([t for t in VOCABULARY if t not in ("Hello", "H")] + ["x1", "x2"], None, {}, True, "no capital letter"),
        (VOCABULARY, {"do_lower_case": True}, {}, True, "as tokenizer_config.json says"),
        (VOCABULARY, {"do_lower_case": True}, {"lower_case": False}, False, "as --cased says"),
        (VOCABULARY, None, {"lower_case": True}, True, "as --uncased says"),
    ],
)
def test_case(lines, settings, options, lower: bool, reason: str, source, tmp_path: Path) -> None:
    folder = source("bert_squad")
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    done = convert(folder, tmp_path / "out", **options)
    assert reason in done.notes[0]
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["do_lower_case"] is lower
    first = TextTokenizer.from_directory(tmp_path / "out").ids(["Hello"])[0].tolist()
    assert (first == TextTokenizer.from_directory(tmp_path / "out").ids(["hello"])[0].tolist()) is lower


def test_what_stands_elsewhere(source, tmp_path: Path) -> None:
    """A training's folder has neither configuration nor vocabulary, and several checkpoints."""
    folder = source("bert_classifier")
    (folder / "bert_config.json").rename(tmp_path / "c.json")
    (folder / "vocab.txt").rename(tmp_path / "v.txt")
    for file in (original.FOLDER / "bert_squad").iterdir():
        shutil.copy(file, folder)
    done = convert(
        folder / "model.ckpt-343", tmp_path / "out", config=tmp_path / "c.json", vocabulary=tmp_path / "v.txt"
    )
    assert done.class_name == "BertForSequenceClassification"
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (tmp_path / "v.txt").read_bytes()
    done = convert(folder / "model.ckpt-21", tmp_path / "bare", config=tmp_path / "c.json", tokenizer=False)
    assert done.class_name == "BertForQuestionAnswering" and not done.notes
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {"config.json", "model.safetensors"}


def test_bfloat16_stays(source, tmp_path: Path) -> None:
    folder = source("bert_squad")
    prefix = folder / original.PREFIXES["bert_squad"]
    tensors = {name: torch.from_numpy(array).bfloat16() for name, array in original.values("bert_squad").items()}
    write_bundle(prefix, tensors)
    convert(folder, tmp_path / "out")
    model = models.BertForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    compare.same_bits("bias", model.qa_outputs.bias.detach(), tensors["cls/squad/output_bias"])


def old_pytorch(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The first PyTorch code's folder of the same numbers: gamma, beta, and the decoder a second time."""
    v = original.values("bert_pretraining" if name == "pretraining" else "bert_squad")
    state = {}
    for variable, array in v.items():
        tensor = torch.from_numpy(array.T.copy() if variable.endswith("kernel") else array)
        new = re.sub(r"layer_(\d+)", r"layer.\1", variable).replace("/", ".")
        new = re.sub(r"\.kernel$", ".weight", new)
        new = new.replace("cls.squad.output_", "qa_outputs.")
        new = new.replace("cls.seq_relationship.output_", "cls.seq_relationship.").replace("weights", "weight")
        new = new.replace("predictions.output_bias", "predictions.bias")
        new = f"{new}.weight" if new.endswith("_embeddings") else new
        state[new] = tensor
    state["bert.embeddings.position_ids"] = torch.arange(32)[None]
    if name == "pretraining":
        state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "bert_config.json").write_text(json.dumps(original.BERT_CONFIG))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return state


@pytest.mark.parametrize(("name", "kind"), [("pretraining", "bert_pretraining"), ("squad", "bert_squad")])
def test_old_pytorch(name: str, kind: str, converted, tmp_path: Path) -> None:
    state = old_pytorch(tmp_path / "source", name)
    assert "bert.embeddings.LayerNorm.gamma" in state
    done = convert(tmp_path / "source", tmp_path / "out")
    assert done.class_name == CLASSES[kind]
    unused = {row.name for row in done.rows if row.state == "unused"}
    assert unused == {"bert.embeddings.position_ids"} | (
        {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} if name == "squad" else set()
    )
    for library in (models, transformers):
        ours, theirs = (
            getattr(library, CLASSES[kind]).from_pretrained(x) for x in (tmp_path / "out", converted[kind][0])
        )
        wanted = theirs.state_dict()
        for parameter, tensor in ours.state_dict().items():
            compare.same_bits(parameter, tensor, wanted[parameter])
    if name == "squad":
        with pytest.raises(ValueError, match=r"lack what BertForPreTraining has: cls\.predictions"):
            convert(tmp_path / "source", tmp_path / "other", task="pretraining")
        (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"PK\3\4 no")
        with pytest.raises(ValueError, match=r"pytorch_model.bin is not a whole file"):
            convert(tmp_path / "source", tmp_path / "other")


def rename_all(rows: dict[bytes, bytes]) -> None:
    for name in [name for name in rows if name]:
        rows[b"resnet/" + name] = rows.pop(name)


def drop(name: bytes):
    return lambda folder: rewrite_index(folder / "model.ckpt-21", lambda rows: rows.pop(name))


def config(**fields):
    def change(folder: Path) -> None:
        values = {**original.BERT_CONFIG, **fields}
        values = {name: value for name, value in values.items() if value is not None}
        (folder / "bert_config.json").write_text(json.dumps(values))

    return change


def flip(folder: Path) -> None:
    path = folder / "model.ckpt-21.data-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "model.ckpt-21.data-00000-of-00001"
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (flip, ("model.ckpt-21.data-00000-of-00001", "the checksum of 'cls/squad/output_weights' is wrong")),
        (cut, ("model.ckpt-21.data-00000-of-00001 is truncated", "'global_step'")),
        (lambda f: (f / "model.ckpt-21.data-00000-of-00001").unlink(), ("data-00000-of-00001 is missing",)),
        (lambda f: (f / "model.ckpt-21.index").unlink(), ("model.ckpt-21.index is missing", "has no index")),
        (
            lambda f: rewrite_index(f / "model.ckpt-21", rename_all),
            ("another model's", "resnet/bert", "wanted bert/emb"),
        ),
        (drop(b"bert/encoder/layer_1/output/dense/bias"), ("model.ckpt-21.index lacks", "layer_1/output/dense/bias")),
        (drop(b"cls/squad/output_bias"), ("model.ckpt-21.index lacks", "cls/squad/output_bias")),
        (config(num_hidden_layers=3), ("lacks", "bert/encoder/layer_2/attention/self/query/kernel")),
        (config(intermediate_size=20), ("layer_0/intermediate/dense/kernel: got shape [16, 24], wanted [16, 20]",)),
        (config(vocab_size=None), ("bert_config.json lacks vocab_size",)),
        (config(type_vocab_size=None, hidden_act=None), ("bert_config.json lacks hidden_act, type_vocab_size",)),
        (config(hidden_size="x"), ("bert_config.json: hidden_size: got 'x'",)),
        (config(num_attention_heads=5), ("bert_config.json: num_attention_heads: got 5",)),
        (config(hidden_act="cube"), ("bert_config.json: hidden_act: got 'cube'",)),
        (lambda f: (f / "bert_config.json").write_text("{"), ("bert_config.json is not valid JSON",)),
        (lambda f: (f / "bert_config.json").unlink(), ("no configuration in", "--config")),
        (lambda f: (f / "vocab.txt").unlink(), ("vocab.txt is missing", "--vocab", "--no-tokenizer")),
        (lambda f: (f / "vocab.txt").write_text("a\nb\n"), ("vocab.txt has no line '[UNK]'",)),
        (lambda f: (f / "vocab.txt").write_bytes(b"\xff\n"), ("vocab.txt is not UTF-8",)),
        (
            lambda f: (f / "vocab.txt").write_text("\n".join([*VOCABULARY, "more"]), encoding="utf-8"),
            ("vocab.txt holds 100 tokens, wanted at most vocab_size 99",),
        ),
    ],
)
def test_bad_sources(change, parts: tuple[str, ...], source, tmp_path: Path, capsys) -> None:
    folder = source("bert_squad")
    change(folder)
    assert cli.main(["convert", str(folder), str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("pyxlbert convert: error: ") and said.err.count("\n") == 1
    for part in parts:
        assert part in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_bad_outputs(source, tmp_path: Path, capsys) -> None:
    folder, out = source("bert_squad"), tmp_path / "out"
    command = ["convert", str(folder), str(out)]

    def fails(*parts: str, arguments: list[str] = command) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(arguments) == 1
        said = capsys.readouterr().err
        assert all(part in said for part in parts), said
        assert sorted(tmp_path.rglob("*")) == before

    out.write_text("a file")
    fails("is a file")
    out.unlink()
    out.mkdir()
    assert cli.main(command) == 0
    (out / "notes.txt").write_text("x")
    capsys.readouterr()
    fails("is not empty", "--force")
    assert cli.main([*command, "--force"]) == 0
    assert not (out / "notes.txt").exists()
    capsys.readouterr()
    (out / "config.json").unlink()
    fails("holds no config.json", arguments=[*command, "--force"])
    fails("does not exist", arguments=["convert", str(folder), str(tmp_path / "a" / "b")])
    fails("does not exist", arguments=["convert", str(tmp_path / "a" / "b"), str(out)])
    fails("no checkpoint in", "pytorch_model.bin", arguments=["convert", str(tmp_path), str(tmp_path / "o")])
    (folder / "config.json").write_text("{}")
    fails("holds the source", arguments=["convert", str(folder), str(folder), "--force"])
    fails("holds the source", arguments=["convert", str(folder / "model.ckpt-21"), str(folder), "--force"])
    fails(
        "wanted for bert one of", arguments=["convert", str(folder), str(tmp_path / "o"), "--task", "text-generation"]
    )
    fails("--uncased: given together", arguments=[*command, "--no-tokenizer", "--uncased"])


def test_a_failure_keeps_what_was_there(source, tmp_path: Path) -> None:
    folder, out = source("bert_squad"), tmp_path / "out"
    convert(folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    flip(folder)
    with pytest.raises(ValueError, match="checksum"):
        convert(folder, out, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_what_the_command_prints(source, tmp_path: Path, capsys) -> None:
    assert cli.main(["convert", str(source("xlnet_classifier")), str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "35 variables from the checkpoint, 1 left new, 1 unused\n" in said.out
    assert "tokenizer: " in said.out.splitlines()[-1]
    assert said.err == f"XLNetForSequenceClassification: {tmp_path / 'out'}\n"
