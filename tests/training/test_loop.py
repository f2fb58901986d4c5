"""The loop: what a step is, what a kill leaves, and that a run goes on to the same bits."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_task import STILL, albert, bert, options, sentences, table, tagged, xlnet

from pyxlbert import cli
from pyxlbert.models import AlbertConfig, AlbertForSequenceClassification
from pyxlbert.testing import compare, tolerances
from pyxlbert.training import checkpoints
from pyxlbert.training.curves import draw
from pyxlbert.training.encoding import TaskTokenizer
from pyxlbert.training.finetune import finetune
from pyxlbert.training.loop import Loop
from pyxlbert.training.options import TrainingOptions
from pyxlbert.training.schedule import parameter_groups, rate
from pyxlbert.training.steps import ShuffledSteps, load


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    bert(folder / "bert")
    bert(folder / "still", **STILL)
    table(folder / "train.tsv")
    tagged(folder / "train.bio")
    return folder


def train(files: Path, out: Path, task: str = "text-classification", model: str = "bert", **given: Any) -> dict:
    data = files / ("train.tsv" if task == "text-classification" else "train.bio")
    others = {name: given.pop(name) for name in ("settings", "resume", "say") if name in given}
    dev = data if given.pop("dev", False) else None
    return finetune(task, files / model, data, dev, out, options=options(**given), **others)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(out: Path) -> list[tuple[str, str]]:
    with (out / "curves.csv").open(newline="") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def close(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    for name, value in one.items():
        compare.close(name, other[name], value, tolerances.TRAINED_FLOAT32, least=1.0)


def killed(files: Path, out: Path, *arguments: str) -> None:
    """A run in a process of its own, ended as soon as it has a checkpoint of step 3, in the middle of an epoch."""
    code = "import sys; from pyxlbert.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "finetune", "text-classification", "--model", str(files / "bert")]
    command += ["--train", str(files / "train.tsv"), "--out", str(out), "--epochs", "4", "--batch-size", "8"]
    command += ["--learning-rate", "0.001", "--log-every", "1", "--checkpoint-every", "3", "--threads", "1"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, *arguments], env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not checkpoints.steps(out):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@pytest.mark.parametrize("make", [bert, albert, xlnet], ids=lambda make: make.__name__)
def test_every_encoder_goes_on_to_the_same_bits(task: str, make: Any, files: Path, tmp_path: Path) -> None:
    """Parameters that no loss reaches too, of which an optimiser has nothing to keep: an XLNet has some."""
    model = make(tmp_path / "model")
    given = {"task": task, "model": str(model), "max_steps": 4, "checkpoint_every": 2}
    for out in ("a", "b"):
        train(files, tmp_path / out, **given)
    shutil.rmtree(checkpoints.folder(tmp_path / "a", 4))
    (tmp_path / "a" / "model.safetensors").unlink()
    said: list[str] = []
    train(files, tmp_path / "a", resume=True, say=said.append, **given)
    assert "goes on after step 2" in said and same(tmp_path / "a", tmp_path / "b")


def test_a_killed_run_goes_on_to_the_same_bits(files: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        killed(files, tmp_path / "a")
        # What a kill in the middle of writing leaves.
        torn = tmp_path / "a" / "checkpoints" / ".step-00000099.0.part"
        torn.mkdir()
        (torn / "state.pt").write_bytes(b"half")
        emptied = torn.with_name("step-00000001")  # and of removing
        emptied.mkdir()
        left = checkpoints.steps(tmp_path / "a")[-1]
        assert left < 20 and not (tmp_path / "a" / "model.safetensors").exists()
        given = {"epochs": 4, "checkpoint_every": 3}
        train(files, tmp_path / "a", resume=True, workers=2, **given)
        train(files, tmp_path / "b", **given)
    finally:
        torch.set_num_threads(before)
    assert same(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "b")) == 20
    assert not torn.exists() and not emptied.exists()
    assert (tmp_path / "a" / "curves.png").stat().st_size and list((tmp_path / "a" / "tensorboard").iterdir())
    # The last two stay.
    assert checkpoints.steps(tmp_path / "a") == [18, 20]
    # A finished run is left as it is.
    said: list[str] = []
    train(files, tmp_path / "a", resume=True, say=said.append, **given)
    assert "the run is finished already" in said


def test_another_run_is_not_gone_on_with(files: Path, tmp_path: Path) -> None:
    train(files, tmp_path / "a", max_steps=1)
    for change, message in (
        ({"learning_rate": 0.5}, "learning_rate: got .*, but the run in .* was started with"),
        ({"model": "still"}, "model: got '.*still', which has another content than '.*bert', that with which the run"),
        (
            {"settings": {"long_texts": "windows"}},
            "long_texts: got 'windows', but the run in .* was started with 'cut'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(files, tmp_path / "a", **{"max_steps": 1, "resume": True, **change})
    with pytest.raises(FileExistsError, match="--resume goes on"):
        train(files, tmp_path / "a", max_steps=1)
    # One of a version that kept the model's name alone.
    started = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps({**started, "model": started["model"]["name"]}))
    with pytest.raises(ValueError, match=r"model: got '.*bert', of which the run in .* kept the name alone, as older"):
        train(files, tmp_path / "a", max_steps=1, resume=True)
    # A kill before the first file was whole: nothing is lost, and nothing is in the way.
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".run.json.0.part").touch()
    assert train(files, tmp_path / "c", max_steps=1, resume=True, dev=True)["accuracy"] > 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="holds no run"):
        train(files, tmp_path / "b", resume=True)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train(files, tmp_path / "no" / "c")


def test_what_a_run_is_made_of_is_known_by_content(files: Path, tmp_path: Path, monkeypatch) -> None:
    """However it is spelt, and wherever it has gone."""

    def go_on(model: Any, data: Any, **given: Any) -> dict:
        usual = {"options": options(max_steps=2, checkpoint_every=1), "resume": True}
        return finetune("text-classification", model, data, data, tmp_path / "out", **usual | given)

    shutil.copytree(files, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    os.symlink("bert", "link")
    os.symlink("train.tsv", "link.tsv")
    shutil.copytree("bert", "copy")
    shutil.copyfile("train.tsv", "copy.tsv")
    scores = go_on("bert", "train.tsv")
    for model in ("bert/", "./bert", Path.cwd() / "bert", "../here/bert", "link", "copy"):
        assert go_on(model, "train.tsv") == scores
    for data in ("./train.tsv", Path.cwd() / "train.tsv", "link.tsv", "copy.tsv"):
        assert go_on("bert", data) == scores
    assert json.loads(Path("../out/run.json").read_text())["model"]["name"] == "bert"

    # What is called the same and is another is not gone on with.
    with open("copy.tsv", "a") as file:
        file.write("a text\tgood\n")
    with pytest.raises(ValueError, match=r"train: got 'copy.tsv', which has another content than 'train.tsv', that"):
        go_on("bert", "copy.tsv")
    state = load_file("copy/model.safetensors")
    save_file({name: 2 * value for name, value in state.items()}, "copy/model.safetensors")
    with pytest.raises(ValueError, match="model: got 'copy', which has another content than 'bert', that with which"):
        go_on("copy", "train.tsv")
    os.rename("copy", "bert2")
    os.rename("bert", "bert1")
    os.rename("bert2", "bert")
    with pytest.raises(ValueError, match="model: got 'bert', which has another content than that with which the run"):
        go_on("bert", "train.tsv")
    # Weights that are not read make no difference.
    out = tmp_path / "fresh"
    for model in ("bert", "bert1"):
        finetune(
            "text-classification", model, "train.tsv", None, out, fresh=True, resume=True, options=options(max_steps=1)
        )


def test_a_full_disk_leaves_the_last_checkpoint(files: Path, tmp_path: Path) -> None:
    train(files, tmp_path / "a", max_steps=4, checkpoint_every=2)
    good = checkpoints.read(tmp_path / "a", 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError):
            checkpoints.write(tmp_path / "a", 6, good, 2, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.steps(tmp_path / "a") == [2, 4]
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert torch.equal(checkpoints.read(tmp_path / "a", 2)["chance"][0]["torch"], good["chance"][0]["torch"])
    (tmp_path / "a" / "checkpoints" / "step-00000004" / "state.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"state\.pt is not a whole checkpoint"):
        checkpoints.read(tmp_path / "a", 4)


def test_the_last_checkpoint_that_is_whole_is_gone_on_with(files: Path, tmp_path: Path) -> None:
    """A machine without power may leave a file that is there and half empty."""
    given = {"max_steps": 6, "checkpoint_every": 2}
    train(files, tmp_path / "whole", **given)
    train(files, tmp_path / "a", **given)
    states = [checkpoints.folder(tmp_path / "a", step) / "state.pt" for step in (4, 6)]
    states[1].write_bytes(states[1].read_bytes()[:1000])
    said: list[str] = []
    train(files, tmp_path / "a", resume=True, say=said.append, **given)
    assert "goes on after step 4" in said and any("step-00000006" in line and "is removed" in line for line in said)
    assert same(tmp_path / "a", tmp_path / "whole") and checkpoints.last_whole(tmp_path / "a")[1] == {}
    for one in states:
        one.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"step-00000004.state\.pt is not a whole checkpoint"):
        train(files, tmp_path / "a", resume=True, **given)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: 3, "is not a whole checkpoint: it holds int, wanted a dict"),
        (lambda state: {}, "is not a whole checkpoint: model is missing, wanted a dict"),
        (lambda state: state | {"chance": {"a": 1}}, "is not a whole checkpoint: chance is a dict, wanted a list"),
        (lambda state: state | {"progress": {}}, "is not a whole checkpoint: progress is empty, wanted a dict"),
        (lambda state: state | {"progress": {"a": 1}}, "does not fit this run: ValueError: progress: got a, wanted b"),
        (lambda state: state | {"progress": state["progress"] | {"step": "4"}}, "wanted counts of steps"),
        (lambda state: state | {"progress": state["progress"] | {"loss": float("nan")}}, "a finite loss"),
        (lambda state: state | {"chance": [{}]}, "does not fit this run: KeyError: 'torch'"),
        (lambda state: state | {"chance": [3]}, "does not fit this run: TypeError"),
        (lambda state: state | {"model": {}}, "is not a whole checkpoint: model is empty, wanted a dict"),
        (lambda state: state | {"model": {"a": torch.ones(2)}}, "does not fit this run: RuntimeError"),
        (lambda state: state | {"optimiser": {"a": 1}}, "does not fit this run: KeyError"),
    ],
)
def test_a_checkpoint_of_something_else_is_named_and_stays(files: Path, tmp_path: Path, spoil, words: str) -> None:
    given = {"max_steps": 4, "checkpoint_every": 4}
    train(files, tmp_path / "a", **given)
    path = checkpoints.folder(tmp_path / "a", 4) / "state.pt"
    torch.save(spoil(checkpoints.read(tmp_path / "a", 4)), path)
    before = path.read_bytes()
    with pytest.raises(ValueError) as caught:
        train(files, tmp_path / "a", resume=True, **given)
    assert str(path.parent) in str(caught.value) and words in str(caught.value)
    assert path.read_bytes() == before


def test_what_cannot_be_sharded_is_said(files: Path, tmp_path: Path, monkeypatch) -> None:
    """`accelerate` passes over FSDP where there are no GPUs."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(
        ValueError, match="ACCELERATE_USE_FSDP: got true, but accelerate shards models over several GPUs"
    ):
        train(files, tmp_path / "a", max_steps=1)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_passes_add_up_to_the_step(files: Path, tmp_path: Path, task: str) -> None:
    """Sentences have 1 to 9 labels, and a step's last pass has fewer of them: each label weighs the same."""
    for name, size in (("a", None), ("b", 3)):
        train(files, tmp_path / name, task, "still", micro_batch_size=size, epsilon=1e-3)
    close(tmp_path / "a", tmp_path / "b")
    for (_, one), (_, other) in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert float(one) == pytest.approx(float(other), rel=tolerances.MODEL_FLOAT32)


_SPAWNED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_loop import train
from pyxlbert.training.loop import leave_group
train(Path(sys.argv[1]), Path(sys.argv[2]), "token-classification", "still", dev=True, micro_batch_size=2, epsilon=1e-3)
leave_group()
left = [task.read_text() for task in Path("/proc/self/task").glob("*/comm") if "gloo" in task.read_text()]
assert not left, f"threads are left: {{left}}"
"""


def test_two_processes_are_one_with_the_double_batch(files: Path, tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(_SPAWNED.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    # 40 sentences in steps of 8 and passes of 2: two passes in each of two processes.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, str(files), str(tmp_path / "b")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train(files, tmp_path / "a", "token-classification", "still", dev=True, micro_batch_size=4, epsilon=1e-3)
    close(tmp_path / "a", tmp_path / "b")
    assert [step for step, _ in losses(tmp_path / "a")] == [step for step, _ in losses(tmp_path / "b")]
    # One process goes on with the run of two: another number, the same steps.
    assert len(checkpoints.read(tmp_path / "b", 10)["chance"]) == 2
    shutil.rmtree(checkpoints.folder(tmp_path / "b", 10))
    said: list[str] = []
    given = {"dev": True, "micro_batch_size": 2, "epsilon": 1e-3}
    train(files, tmp_path / "b", "token-classification", "still", resume=True, say=said.append, **given)
    assert "the run had 2 processes and goes on with 1: the same steps, but not the same bits" in said
    assert "goes on after step 5" in said
    close(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("finetune.finetune", ["finetune", "text-classification", "--model", "m", "--train", "t.tsv"]),
        ("pretraining.run.pretrain", ["pretrain", "bert", "text.txt"]),
    ],
)
def test_a_command_leaves_the_group(function: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torchrun` starts: with the group left, its threads have no part in the end of the process."""

    def trained(*arguments: Any, **options: Any) -> dict[str, float]:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        return {}

    monkeypatch.setattr(f"pyxlbert.training.{function}", trained)
    assert cli.main([*words, "--out", "out"]) == 0
    assert not torch.distributed.is_initialized()


def test_steps_are_a_function_of_their_number() -> None:
    rows = list(range(21))
    source = ShuffledSteps(rows, lambda some: {"rows": torch.tensor(some)}, 8, 3, seed=5)
    assert source.epoch_steps == 3
    for epoch in (0, 1):
        seen = [row for step in range(3) for row in source.rows(3 * epoch + step)]
        assert sorted(seen) == rows and seen != rows
    assert source.rows(0) != source.rows(3)
    whole = [source.passes(step, 0, 1) for step in range(6)]
    for processes in (1, 2, 4):
        for step in range(6):
            parts = [source.passes(step, rank, processes) for rank in range(processes)]
            assert len({len(part.batches) for part in parts}) == 1
            real = [batch["rows"].tolist() for part in parts for batch in part.batches[: part.real]]
            assert sorted(row for part in real for row in part) == sorted(source.rows(step))
            assert max(map(len, real)) <= 3 and all(part.examples == len(source.rows(step)) for part in parts)
    for workers in (0, 2):
        loaded = list(load(source, 2, 6, 0, 1, workers))
        for one, other in zip(loaded, whole[2:], strict=True):
            assert all(torch.equal(a["rows"], b["rows"]) for a, b in zip(one.batches, other.batches, strict=True))
    with pytest.raises(ValueError, match="features: got none"):
        ShuffledSteps([], lambda some: {}, 8, None, 0)


def test_rates() -> None:
    given = TrainingOptions(warmup=0.2)
    assert [rate(given, step, 10) for step in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]
    cosine = TrainingOptions(warmup=0, schedule="cosine")
    assert rate(cosine, 0, 10) == 1.0 and rate(cosine, 5, 10) == pytest.approx(0.5, rel=tolerances.FLOAT64)
    assert rate(TrainingOptions(warmup=4, schedule="constant"), 1, 10) == 0.5


def test_layers_and_biases_have_their_own_groups(files: Path) -> None:
    from pyxlbert.models import BertForSequenceClassification

    with pytest.warns(UserWarning):
        model = BertForSequenceClassification.from_pretrained(files / "bert")
    given = TrainingOptions(learning_rate=1.0, layer_decay=0.5, weight_decay=0.25, head_learning_rate=3.0)
    found = {}
    for group in parameter_groups(model, given):
        for parameter in group["params"]:
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    by_name = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    assert by_name["classifier.weight"] == (3.0, 0.25) and by_name["classifier.bias"] == (3.0, 0.0)
    assert by_name["bert.pooler.dense.weight"] == (1.0, 0.25)
    assert by_name["bert.encoder.layer.1.output.dense.weight"] == (1.0, 0.25)
    assert by_name["bert.encoder.layer.0.output.dense.bias"] == (0.5, 0.0)
    assert by_name["bert.encoder.layer.0.output.LayerNorm.weight"] == (0.5, 0.0)
    assert by_name["bert.embeddings.word_embeddings.weight"] == (0.25, 0.25)


def test_shared_layers_have_the_rate_of_the_last(files: Path) -> None:
    sizes = {"num_hidden_layers": 4, "num_hidden_groups": 2, "hidden_size": 8, "num_attention_heads": 2}
    model = AlbertForSequenceClassification(AlbertConfig(**sizes, intermediate_size=8, embedding_size=4, vocab_size=9))
    groups = parameter_groups(model, TrainingOptions(learning_rate=1.0, layer_decay=0.5))
    found = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    layers = "albert.encoder.albert_layer_groups.{}.albert_layers.0.ffn.weight"
    by_name = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    assert by_name[layers.format(1)] == 1.0 and by_name[layers.format(0)] == 0.25
    assert by_name["albert.encoder.embedding_hidden_mapping_in.weight"] == 0.0625
    assert by_name["albert.pooler.weight"] == 1.0


def test_it_ends_when_nothing_gets_better(files: Path, tmp_path: Path) -> None:
    said: list[str] = []
    train(files, tmp_path / "a", dev=True, learning_rate=0.0, epochs=9, patience=2, say=said.append)
    assert said[-1] == "no better accuracy in 2 evaluations: ends at step 15"
    # The best model is the first, and its checkpoint stays beside the last two.
    assert checkpoints.steps(tmp_path / "a") == [5, 10, 15]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}


def test_bfloat16_and_recomputed_activations(files: Path, tmp_path: Path) -> None:
    train(files, tmp_path / "a", model="still", max_steps=3)
    train(files, tmp_path / "b", model="still", max_steps=3, recompute=True)
    assert same(tmp_path / "a", tmp_path / "b")
    train(files, tmp_path / "c", model="still", max_steps=3, precision="bfloat16")
    assert not same(tmp_path / "a", tmp_path / "c")
    assert {value.dtype for value in weights(tmp_path / "c").values()} == {torch.float32}
    for (_, one), (_, other) in zip(losses(tmp_path / "a"), losses(tmp_path / "c"), strict=True):
        assert float(one) == pytest.approx(float(other), rel=tolerances.MODEL_BFLOAT16)


@pytest.mark.parametrize("name", ["a$_{$.tsv", r"$\bad$", os.fsdecode(b"\xff.tsv")])
def test_a_picture_has_names_as_they_are(name: str, tmp_path: Path) -> None:
    """Not as formulas. A run whose picture cannot be drawn would never be finished."""
    points = [{"step": 1, "loss": 1.0, "learning_rate": 0.1, f"dev_f1_{name}": 0.5}]
    draw(points, tmp_path / "curves.png", f"text-classification: {name}")
    assert (tmp_path / "curves.png").stat().st_size


def test_a_loss_that_is_not_finite_ends_the_run(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss: got (nan|inf) by step \d+, wanted a finite number"):
        train(files, tmp_path / "a", learning_rate=1e30, max_gradient_norm=0, warmup=0, epochs=4, checkpoint_every=1)
    for step in checkpoints.steps(tmp_path / "a"):
        assert torch.isfinite(torch.tensor(checkpoints.read(tmp_path / "a", step)["progress"]["loss"]))


def test_a_model_whose_loss_is_not_finite_is_not_kept(files: Path, tmp_path: Path) -> None:
    """Points of the curves may be far apart: what is evaluated between them is checked first."""
    said: list[str] = []
    given = {"learning_rate": 1e30, "max_gradient_norm": 0, "warmup": 0, "evaluate_every": 1, "log_every": 1000}
    with pytest.raises(ValueError, match=r"loss: got (nan|inf) by step 2, "):
        train(files, tmp_path / "a", dev=True, say=said.append, **given)
    assert [line.partition(":")[0] for line in said if line.startswith("step ")] == ["step 1"]


@pytest.mark.parametrize("dev", [False, True])
def test_a_gradient_that_is_not_finite_ends_the_run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dev: bool
) -> None:
    """The loss before it was finite, and no loss follows the last step."""
    norms, clip = itertools.count(1), Loop._clip

    def last_is_infinite(self: Loop) -> torch.Tensor:
        norm = clip(self)
        return norm if next(norms) < 5 else norm * math.inf

    monkeypatch.setattr(Loop, "_clip", last_is_infinite)
    with pytest.raises(ValueError, match=r"gradient norm: got inf by step 5, wanted a finite number"):
        train(files, tmp_path / "a", dev=dev, epochs=1, log_every=1000, checkpoint_every=4)
    assert checkpoints.steps(tmp_path / "a") == [4]
    assert not (tmp_path / "a" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs: got 0"),
        ({"batch_size": 0}, "batch_size: got 0, wanted a whole number of at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan"),
        ({"layer_decay": 1.5}, "layer_decay: got 1.5, wanted a number from 0 to 1"),
        ({"schedule": "cubic"}, "schedule: got 'cubic'"),
        ({"workers": -1}, "workers: got -1"),
        ({"patience": True}, "patience: got True"),
        ({"batch_size": 10**30}, f"batch_size: got {10**30}, wanted a whole number of at most"),
        ({"workers": 10**5}, "workers: got 100000, wanted a whole number of at most 4096"),
        ({"seed": 2**63}, f"seed: got {2**63}, wanted a whole number of at most"),
        ({"epochs": 10**400}, "epochs: got 1000.*, wanted a number from 0 to"),
        ({"epochs": 1e300}, "epochs: got 1e.300, wanted a number from 0 to"),
        ({"warmup": float("inf")}, "warmup: got inf"),
        ({"learning_rate": "1"}, "learning_rate: got '1'"),
        ({"beta1": 1}, "beta1: got 1, wanted less"),
        ({"recompute": None}, "recompute: got None, wanted True or False"),
    ],
)
def test_options_are_checked(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**given)


def test_padding_is_the_models(files: Path) -> None:
    tokenizer = TaskTokenizer(files / "bert", 64)
    rows = [tokenizer.single(pieces) for pieces in tokenizer.texts([" ".join(words) for words in sentences(3)])]
    batch = tokenizer.batch(rows)
    assert batch["attention_mask"].sum(1).tolist() == [len(row.ids) for row in rows]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
