"""Libraries around transformers; each test runs where its library is installed."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo

import pyxlbert
from pyxlbert.integrations.modules import ReplacedLinear
from pyxlbert.integrations.swap import Replaced
from pyxlbert.testing import compare, models, tolerances
from pyxlbert.testing.directories import VOCABULARY


@pytest.mark.parametrize("first", ["peft", "pyxlbert"])
@pytest.mark.parametrize(
    ("kind", "targets"), [("bert", ["query", "value"]), ("mpnet", ["q", "o"]), ("distilbert", ["lin1", "q_lin"])]
)
def test_lora(kind: str, targets: list[str], first: str) -> None:
    """On replaced linears, or replaced after it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    head = "ForTokenClassification"

    def adapted(ours: bool):
        model = zoo.build(kind, head)
        if ours and first == "pyxlbert":
            pyxlbert.accelerate(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        return pyxlbert.accelerate(model) if ours and first == "peft" else model

    plain, ours = adapted(False), adapted(True)
    assert any(isinstance(module, ReplacedLinear) for module in ours.modules())
    truth, cotangents = zoo.results(copy.deepcopy(plain).double(), head)
    before, _ = zoo.results(plain, head, cotangents=cotangents)
    after, _ = zoo.results(ours, head, cotangents=cotangents)
    assert any("lora_A" in name for name in after)
    models.within_budget((kind, first), after, before, truth)
    merged = [model.merge_and_unload().eval() for model in (plain, ours)]
    with torch.no_grad():
        wanted, got = (model(**zoo.batch(model))[0][zoo.MASK.bool()] for model in merged)
    compare.close("merged", got, wanted, tolerances.MODEL_FLOAT32)
    assert not any(isinstance(module, Replaced) for module in pyxlbert.restore(merged[1]).modules())


def _sentence_model(path, kind: str):
    transformers = pytest.importorskip("transformers")
    model = zoo.build(kind, vocab_size=len(VOCABULARY)).eval()
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    transformers.BertTokenizer(str(path / "vocab.txt"), model_max_length=12).save_pretrained(path)
    return path


TEXTS = ["hello world", "the naive train", "a", "the unbelievable world trains the naive world hello"]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra"])
def test_sentence_transformer(kind: str, tmp_path) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(_sentence_model(tmp_path, kind)), device="cpu")
    wanted = model.encode(TEXTS)
    model, report = pyxlbert.accelerate(model, report=True)
    assert not report.left
    got = model.encode(TEXTS)
    compare.cosine_distance(kind, torch.tensor(got), torch.tensor(wanted), tolerances.COSINE[torch.float32])
    compare.same_bits("restored", torch.tensor(pyxlbert.restore(model).encode(TEXTS)), torch.tensor(wanted))


def test_cross_encoder(tmp_path) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = library.CrossEncoder(str(_sentence_model(tmp_path, "bert")), num_labels=1, device="cpu")
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    wanted = model.predict(pairs)
    got = pyxlbert.accelerate(model).predict(pairs)
    compare.close("scores", torch.tensor(got), torch.tensor(wanted), tolerances.MODEL_FLOAT32)


def test_trainer(tmp_path) -> None:
    """Accumulation and checkpointing; the weights move as without."""
    pytest.importorskip("accelerate")
    import transformers

    head, weights = "ForTokenClassification", []
    for ours in (False, True):
        model = zoo.build("bert", head)
        if ours:
            pyxlbert.accelerate(model)
        batch = zoo.batch(model, head)
        rows = [{name: value[place] for name, value in batch.items()} for place in range(3)] * 2
        options = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=3,
            gradient_checkpointing=True,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            optim="sgd",
            learning_rate=0.1,
            seed=0,
            disable_tqdm=True,
        )
        transformers.Trainer(model, options, train_dataset=rows).train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    start = torch.cat([parameter.detach().flatten() for parameter in zoo.build("bert", head).parameters()])
    compare.close("steps", weights[1] - start, weights[0] - start, tolerances.MODEL_GRADIENT_FLOAT32)
