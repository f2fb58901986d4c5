"""Libraries around transformers, and other processes; each test runs where its library is installed."""

from __future__ import annotations

import copy
import json
import multiprocessing
import subprocess
import sys

import pytest
import torch
import workers
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


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_adapters_merged_past_autograd(kind: str, dtype: str | None) -> None:
    """peft writes through `.data` unless it is told to be safe, and takes the adapters out again the same way."""
    peft = pytest.importorskip("peft")
    model = pyxlbert.pack(pyxlbert.accelerate(zoo.build(kind, hidden_act="gelu").eval()), dtype)

    def rows(model) -> torch.Tensor:
        with torch.no_grad():
            return model(**zoo.batch(model))[0][zoo.MASK.bool()]

    plain = rows(model)
    config = peft.LoraConfig(r=2, target_modules=["query", "value", "q", "o"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    wanted = rows(adapted)
    limit = tolerances.MODEL_FLOAT32 if dtype is None else 3 * tolerances.INT8
    for _ in range(2):
        adapted.merge_adapter()
        compare.close("merged", rows(adapted), wanted, limit)
        adapted.unmerge_adapter()
        compare.close("taken out", rows(adapted), wanted, limit)
    merged = adapted.merge_and_unload()
    compare.close("merged for good", rows(merged), wanted, limit)
    assert (wanted - plain).abs().max() > 2 * limit * wanted.abs().max()


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


def test_pipelines(tmp_path) -> None:
    """One of texts in batches, which are padded, and one of tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(_sentence_model(tmp_path, "bert"))
    for task, head in (("text-classification", "ForSequenceClassification"), ("ner", "ForTokenClassification")):
        model = zoo.build("bert", head, vocab_size=len(VOCABULARY)).eval()
        pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu", batch_size=4)
        wanted = pipe(TEXTS)
        pyxlbert.accelerate(pipe.model)
        for got, was in zip(pipe(TEXTS), wanted, strict=True):
            got, was = ([one] if isinstance(one, dict) else one for one in (got, was))
            names = [{name: value for name, value in one.items() if name != "score"} for one in got]
            assert names == [{name: value for name, value in one.items() if name != "score"} for one in was] != []
            scores = [torch.tensor([float(one["score"]) for one in several]) for several in (got, was)]
            compare.close(task, *scores, tolerances.MODEL_FLOAT32)


def test_a_process_without_pyxlbert_loads_what_was_saved(tmp_path) -> None:
    model = pyxlbert.accelerate(zoo.build("roberta", "ForSequenceClassification").eval())
    model.save_pretrained(tmp_path)
    given = zoo.batch(model)
    with torch.no_grad():
        wanted = model(**given).logits
    code = (
        "import sys, json; sys.modules['pyxlbert'] = None\n"
        "import torch, transformers\n"
        "given = {name: torch.tensor(value) for name, value in json.loads(sys.argv[2]).items()}\n"
        "model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()\n"
        "print(json.dumps(model(**given).logits.tolist()))"
    )
    arguments = json.dumps({name: value.tolist() for name, value in given.items()})
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compare.close("logits", torch.tensor(json.loads(done.stdout)), wanted, tolerances.MODEL_FLOAT32)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_worker_processes(how: str) -> None:
    """A model that has run here, its weights packed, runs in workers too, a copy or the parent's own memory."""
    model = pyxlbert.pack(pyxlbert.accelerate(zoo.build("roberta").eval()))
    wanted = workers.states(model)
    context = multiprocessing.get_context(how)
    workers.MODEL = model  # what a fork finds
    with context.Pool(1 if how == "spawn" else 2, workers.start, (None if how == "fork" else model,)) as pool:
        found = pool.map_async(workers.run, range(4)).get(timeout=120)
    for got in found:
        compare.close(how, torch.from_numpy(got), torch.from_numpy(wanted), tolerances.MODEL_FLOAT32)
    # Weights that were handed to another process lie in shared memory, and their packed copies are no more used.
    compare.close("after", torch.from_numpy(workers.states(model)), torch.from_numpy(wanted), tolerances.MODEL_FLOAT32)


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
