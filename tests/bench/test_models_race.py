"""Races of whole models on the CPU, small: who is wrong or missing has a reason, and no time."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from pyxlbert.bench import limits, models, peers, sizes, text, training
from pyxlbert.bench.contest import Settings
from pyxlbert.bench.report import is_peer

MOMENT = Settings(rounds=3, rest=0.0)


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(limits, "gemm_rate", lambda dtype: 1e12)
    monkeypatch.setattr(models, "SIZES", {"BERT-base": sizes.Size(1, 96, 128)})
    xlnets = models._xlnets
    monkeypatch.setattr(models, "_xlnets", lambda layers: xlnets(1))


def missing(hf, inputs, dtype):
    raise ImportError("no such engine")


def fast_because_wrong(hf, inputs, dtype):
    out = torch.zeros(*inputs["input_ids"].shape, 96, dtype=dtype)
    return lambda: out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_peer_that_is_wrong_or_missing_is_a_reason(dtype: torch.dtype, monkeypatch) -> None:
    given = {"transformers": peers.transformers_sdpa, "OpenVINO": fast_because_wrong, "ONNX Runtime": missing}
    monkeypatch.setattr(peers, "PEERS", given)
    row = models.ModelRace(2, 12, dtype, fill=0.7).run(MOMENT)
    assert set(row.timings) == {"pyxlbert", "transformers"} and row.work.length == 12
    assert row.failed["OpenVINO"].startswith("wrong answer: OpenVINO: largest difference")
    assert row.failed["ONNX Runtime"] == "ImportError: no such engine" and not row.faults
    assert "less work" in row.note and "largest error pyxlbert" in row.note
    only = models.ModelRace(2, 12, dtype).run(Settings(3, 0.0, frozenset({"sdpa"})))
    assert set(only.timings) == {"pyxlbert"} and not only.failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ours_is_refused_too(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(peers, "PEERS", {"transformers": peers.transformers_sdpa})
    ours = models.ModelRace._ours

    def wrong(race, hf, inputs, quantised):
        call = ours(race, hf, inputs, quantised)
        return lambda: call() * 1.2

    monkeypatch.setattr(models.ModelRace, "_ours", wrong)
    row = models.ModelRace(2, 12, dtype).run(MOMENT)
    assert set(row.timings) == {"transformers"} and row.faults["pyxlbert"].startswith("wrong answer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_xlnet_and_its_step(dtype: torch.dtype) -> None:
    row = models.XLNetRace(2, 12, dtype).run(MOMENT)
    assert set(row.timings) == {"pyxlbert", "transformers", "pyxlbert BERT-base"} and not row.failed
    step = models.XLNetStepRace(2, 24, dtype, layers=1).run(MOMENT)
    assert not step.failed and {"pyxlbert", "pyxlbert, ranks"} <= set(step.timings)
    assert len([name for name in step.timings if is_peer(name)]) == 1


def test_what_more_threads_are_worth_is_in_the_row(monkeypatch) -> None:
    """Ours takes part with one thread too; everybody else has all of them."""
    seen: dict[str, set[int]] = {"pyxlbert": set(), "transformers": set()}

    def watched(name: str, build):
        def built(*arguments):
            call = build(*arguments)
            return lambda: (seen[name].add(torch.get_num_threads()), call())[1]

        return built

    monkeypatch.setattr(peers, "PEERS", {"transformers": watched("transformers", peers.transformers_sdpa)})
    monkeypatch.setattr(models.ModelRace, "_ours", watched("pyxlbert", models.ModelRace._ours))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        row = models.ModelRace(2, 12, torch.float32).run(MOMENT)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(row.timings) == {"pyxlbert", "pyxlbert, one thread", "transformers"} and not row.failed
    assert seen == {"pyxlbert": {1, 2}, "transformers": {2}}


def test_vectors_that_point_elsewhere_are_refused() -> None:
    truth = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))).numpy()
    check = text.Distances(truth, torch.float32)
    check("pyxlbert", truth)
    with pytest.raises(AssertionError, match="worst 1 - cosine"):
        check("OpenVINO", -truth)
    # Ours is held to more than another library.
    near = truth + 0.05
    check("OpenVINO", near)
    with pytest.raises(AssertionError, match="worst 1 - cosine"):
        check("pyxlbert", near)
    assert "pyxlbert" in check.note()


REMEMBERS = "XLNet pretrains, with memory"
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", ".", "and", "then", "it", "saw"]


@pytest.fixture
def small_training(tmp_path, monkeypatch):
    """Makes races of small models; that with memory reads a text of a few words."""
    small = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    xlnet = {"vocab_size": 40, "d_model": 32, "n_head": 2, "d_inner": 48, "n_layer": 1}
    monkeypatch.setattr(training, "_SIZES", {"Bert": {**small, "num_hidden_layers": 1}, "XLNet": xlnet})
    rng = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(rng.choices(WORDS, k=9)) for _ in range(40)), encoding="utf-8")
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    (tmp_path / "vocab.txt").write_text("\n".join([*special.values(), *WORDS]) + "\n", encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")

    def make(name: str) -> training.TrainingRace:
        lengths = (12, 12) if "pretrains" in name else (5, 12, 9)
        return training.TrainingRace(name, lengths, torch.float32, *([path, tmp_path] if name == REMEMBERS else ()))

    return make


@pytest.mark.parametrize("name", ["BERT classifies", "XLNet classifies", "XLNet pretrains", REMEMBERS])
def test_both_are_trained_by_one_loop(name: str, small_training, monkeypatch) -> None:
    jobs, usual = [], training.Loop
    monkeypatch.setattr(training, "Loop", lambda job, *rest: (jobs.append(job), usual(job, *rest))[1])
    row = small_training(name).run(MOMENT)
    assert set(row.timings) == {"pyxlbert", "transformers"} and not row.failed
    assert len(jobs) == 2 and all(isinstance(job.title, str) and job.memory is None for job in jobs)
    assert "1 layers" in row.note and ("full: less work" in row.note) == ("classifies" in name)
    assert ("9 remembered" in row.note) == (name == REMEMBERS)
    # The products with weights of a step, counted by hand; the rate is 10^12 a second.
    four, two = 4 * 32 * 32, 2 * 32 * 48  # weights of attention and of the feed-forward network
    flops = {
        "BERT classifies": 6 * 26 * (four + two),
        "XLNet classifies": 6 * 26 * (four + two) + 4 * 52 * 32 * 32,
        "XLNet pretrains": 6 * (24 * four // 2 + 4 * (four // 2 + two + 40 * 32)) + 4 * 48 * 32 * 32,
        # Twice nine memories; of each row 9 + 12 distances to what stands before a token, and 6 to what is behind it.
        # One of four targets falls on a special token and is none.
        REMEMBERS: 6 * (24 * four // 2 + 3 * (four // 2 + two + 40 * 32)) + 4 * (18 * four // 2 + 54 * 32 * 32),
    }
    assert row.limit == flops[name] / 1e12
    # A loss or a gradient that is another is a reason, and has no time.
    monkeypatch.setattr(training, "_gradient", lambda module, *given: {"loss": torch.rand(()), "other": torch.rand(3)})
    assert set(small_training(name).run(MOMENT).failed) == {"pyxlbert", "transformers"}


def test_steps_of_a_text_go_on_in_it_and_are_checked_with_memories(small_training, monkeypatch) -> None:
    race = small_training(REMEMBERS)
    batches = [passes.batches[0] for passes in race._steps(40)]
    assert len(batches) == training._STEPS
    for before, after in itertools.pairwise(batches):
        # A row's first block is what the one before it had as its second one's beginning.
        assert torch.equal(before["input_ids"][:, 6], after["input_ids"][:, 0])
    assert bool(batches[0]["begins"]) and not any(bool(one["begins"]) for one in batches[1:])
    first, second = batches[0]["query_rank"][:, :6], batches[0]["key_rank"][:, 6:]
    assert bool((first[:, :, None] <= second[:, None, :]).all())  # the first block sees nothing of the second
    # What is compared is another number without what was remembered, in both models.
    theirs, ours = race._models()
    for module in (race._module(ours, False).eval(), race._module(theirs, True).eval()):
        found = training._gradient(module, batches[:3], race._counts, torch.float32)
        fresh = training._gradient(module, [batches[2] | {"begins": torch.tensor([True])}], race._counts, torch.float32)
        assert len(found) == 3 and not any(torch.equal(found[what], fresh[what]) for what in found)
