"""`pyxlbert bench`: what is refused before it is timed, what is written as it comes, and wrong usage."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import partial

import calls_of_memory
import pytest
import torch
from pyxlbert.bench import command, families, limits, ops, report, shapes, statistics
from pyxlbert.bench.timer import Timing

from pyxlbert.cli import main
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Use, as_tuple

TIME = Timing(1e-3, 9e-4, 2e-3, 5, (1e-3, 9e-4, 2e-3, 1e-3, 1e-3))
# A race of a moment.
QUICK = ["--op", "layer_norm", "--shape", "1x8", "--rounds", "3", "--rest", "0", "--peer", "eager", "--no-memory"]


@pytest.fixture(autouse=True)
def no_limits(monkeypatch) -> None:
    """Measuring them takes longer than a race."""
    monkeypatch.setattr(limits, "gemm_rate", lambda dtype: 1e12)
    monkeypatch.setattr(limits, "copy_bandwidth", lambda: 1e10)


def corner(out: torch.Tensor) -> torch.Tensor:
    """The last element is its neighbour."""
    flat = out.detach().clone().flatten()
    flat[-1] = flat[-2]
    return flat.view_as(out)


def first_row(out: torch.Tensor) -> torch.Tensor:
    """Of a head in the middle, which is not compared with float64 where sequences are long."""
    out = out.clone()
    out[..., 0, 1, :] = 0
    return out


def spoilt(function, spoil, **arguments):
    outputs = as_tuple(function(**arguments))
    changed = (spoil(outputs[0]), *outputs[1:])
    return changed if len(changed) > 1 else changed[0]


def scaled(function, **arguments):
    """Before it is rounded."""
    wide = {
        name: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in arguments.items()
    }
    return (function(**wide) * 1.001).to(arguments["query"].dtype)


def shorter(function, **arguments):
    return function(**arguments | {"key_lengths": arguments["key_lengths"] - 1})


def other_seed(function, **arguments):
    return function(**arguments | {"seed": arguments["seed"] + 1})


BROKEN = {
    "nothing": lambda function: function,
    "a corner": lambda function: partial(spoilt, function, corner),
    "0.1 %": lambda function: partial(scaled, function),
    "a mask off by one": lambda function: partial(shorter, function),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_kernel_is_refused(fault: str, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(ops, "race_on", lambda device, copies, **options: {name: TIME for name in copies[0]})
    spec = SPECS["attention"]
    case = shapes.sized(next(case for case in spec.used(Use.RACE) if not case.gradients), 2, 100)
    broken = dataclasses.replace(spec, function=BROKEN[fault](spec.function))
    row = ops.race_of(broken, case, dtype).run()
    assert "SDPA" in row.timings
    if fault == "nothing":
        assert set(row.timings) == {"SDPA", "pyxlbert"} and not row.failed
    else:
        assert "pyxlbert" not in row.timings and row.failed["pyxlbert"].startswith("wrong answer: "), row.failed


def test_a_head_that_float64_does_not_see_is_compared_with_pytorch(monkeypatch) -> None:
    monkeypatch.setattr(ops, "race_on", lambda device, copies, **options: {name: TIME for name in copies[0]})
    spec = SPECS["attention"]
    case = shapes.sized(next(case for case in spec.used(Use.RACE) if not case.gradients), 1, 520)
    case = dataclasses.replace(case, inputs=dataclasses.replace(case.inputs, heads=3))
    race = ops.race_of(
        dataclasses.replace(spec, function=partial(spoilt, spec.function, first_row)), case, torch.float32
    )
    assert race.build().part is not ops._itself
    assert "whole" in race.run().failed["pyxlbert"]


def test_dropout_is_checked_too(monkeypatch) -> None:
    """Ours by the seed, which the truth has; another library's on the average."""
    monkeypatch.setattr(ops, "race_on", lambda device, copies, **options: {name: TIME for name in copies[0]})
    spec = SPECS["attention"]
    case = next(case for case in spec.used(Use.RACE) if case.inputs.dropout_p and case.gradients)
    case = shapes.sized(case, 2, 64)
    right = ops.race_of(spec, case, torch.float32).run()
    assert set(right.timings) == {"SDPA", "pyxlbert"}
    wrong = dataclasses.replace(spec, function=partial(other_seed, spec.function))
    assert "wrong answer" in ops.race_of(wrong, case, torch.float32).run().failed["pyxlbert"]
    usual = torch.nn.functional.scaled_dot_product_attention

    def halved(q, k, v, mask=None, dropout_p=0.0):
        return usual(q, k, v, mask, dropout_p) * (0.5 if dropout_p else 1)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", halved)
    assert "times the truth" in ops.race_of(spec, case, torch.float32).run().failed["SDPA"]


def test_a_run_is_printed_and_written(tmp_path, capsys) -> None:
    out, tables = tmp_path / "new" / "a.json", tmp_path / "a.md"
    assert main(["bench", *QUICK, "--dtype", "float32", "--json", str(out), "--markdown", str(tables)]) == 0
    text = capsys.readouterr().out
    assert f"every contestant with {torch.get_num_threads()} threads" in text
    assert "peer flash-attn             does not race: " in text and "GB/s" in text and "of limit" in text
    document = report.read(out)
    assert "does not race" in document["peers"]["liger"] and document["peers"]["eager"] == torch.__version__
    assert document["version"] == report.VERSION and set(document["device"]) <= set(report.DEVICE_FIELDS)
    assert [row["case"] for row in document["rows"]] == ["8x384", "8x768 forward+backward"]
    for row in document["rows"]:
        assert set(row["timings"]) == {"pyxlbert", "F.layer_norm"} and row["work"]["bytes"] > 0
        assert all(len(timing["samples"]) == 3 for timing in row["timings"].values())
        assert report.row_from(row).line().startswith("layer_norm")
    assert "| 8x384 | float32 |" in tables.read_text()
    html = tmp_path / "a.html"
    assert main(["bench", "--read", str(out), "--html", str(html)]) == 0 and html.read_text().count("<tbody data-") == 2
    # A second run adds to the file what it had not.
    assert main(["bench", *QUICK, "--dtype", "bfloat16", "--json", str(out)]) == 0
    assert len(report.read(out)["rows"]) == 4


def test_an_interrupted_run_keeps_what_it_had(tmp_path, capsys, monkeypatch) -> None:
    out, usual = tmp_path / "a.json", ops.Race.run

    def run(race: ops.Race, *args, **options):
        if "backward" in race.case:
            raise KeyboardInterrupt
        return usual(race, *args, **options)

    monkeypatch.setattr(ops.Race, "run", run)
    assert main(["bench", *QUICK, "--json", str(out)]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1] == f"pyxlbert bench: interrupted; {out} has every race that had ended"
    )
    assert [row["case"] for row in report.read(out)["rows"]] == ["8x384"]
    assert os.listdir(tmp_path) == ["a.json"]


def test_peers_that_are_not_asked_for_are_not_timed() -> None:
    settings = command.Settings(peers=frozenset({"sdpa"}))
    names = ("pyxlbert", "pyxlbert, padded", "SDPA", "F.layer_norm", "torch.compile")
    assert [name for name in names if settings.wants(name)] == ["pyxlbert", "pyxlbert, padded", "SDPA"]
    found = {name: families.family_of(name) for name in ("OpenVINO", "ONNX Runtime int8", "einsum, gather, SDPA")}
    assert found == {
        "OpenVINO": "openvino",
        "ONNX Runtime int8": "onnxruntime",
        "einsum, gather, SDPA": "eager",
    }


def test_memory_is_a_calls_own() -> None:
    """Half of a gigabyte above its result, in another process."""
    from pyxlbert.bench import memory

    found = memory.measure(calls_of_memory.hungry, 1 << 27)
    assert (1 << 29) <= found < 1.1 * (1 << 29)
    # 256 MB in blocks, where the process had freed as many before.
    assert memory.measure(calls_of_memory.hungry_in_freed_memory, 1 << 13) > (1 << 27)
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        memory.measure(calls_of_memory.failing)
    assert memory.measure(calls_of_memory.hungry, memory.MOST) is None


def test_intervals_hold_the_ratio_and_narrow_with_samples() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int, scale: float) -> list[float]:
        return (scale * (1 + 0.05 * torch.randn(count, generator=generator))).tolist()

    few, many = (statistics.interval(drawn(n, 2.0), drawn(n, 1.0)) for n in (9, 99))
    assert few[0] < 2 < few[1] and many[0] < 2 < many[1] and many[1] - many[0] < few[1] - few[0]
    assert statistics.interval([1.0], [1.0]) is None
    # A machine that is slow in some rounds is slow for both.
    slow = [1.0, 5.0, 1.0, 5.0, 1.0, 5.0, 3.0]
    assert statistics.interval([2 * x for x in slow], slow) == (2.0, 2.0)
    assert 1.64 < statistics.quantile_of_normal(0.95) < 1.65


BAD = [
    (["--op", "softmax"], "--op: got 'softmax', wanted one of attention, "),
    (["--peer", "tensorflow"], "--peer: got 'tensorflow', wanted one of compile, "),
    (["--peer", "flash-attn"], "--peer: flash-attn cannot race: "),
    (["nothing"], "suite: got 'nothing', on cpu wanted one of ops, "),
    (["--shape", "8by128"], "--shape: got '8by128', wanted a batch and a length such as 8x128"),
    (["--rounds", "1"], "--rounds: got 1, wanted at least 3"),
    (["--threads", "0"], "--threads: got 0, wanted at least 1"),
    (["--json", "."], "is a directory"),
    (["--json", "x.json", "--markdown", "x.json"], "--markdown: got 'x.json', which is the file of --json; wanted"),
    (["--html", "/dev/null/y.html"], "is not writable"),
    (["--read", "x.json"], "--read needs --html or --markdown"),
    (["models", "--device", "cuda"], "suite: got 'models', on cuda wanted one of gpu"),
    (["--device", "cuda", "--shape", "1x8"], "--shape: the races of a GPU are chosen by --only"),
    (["layer", "--op", "linear"], "--op and a suite: got both"),
    (["text"], "the suite text needs --data and --model"),
    (["--only", "no such race", "--op", "linear"], "no race is of what was asked for"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: " ".join(value) if value is list else None)
def test_bad_usage(arguments: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    assert caught.value.code == 2 and words in capsys.readouterr().err


ROW = '{"rows": [{"subject": "x", "case": "y", "dtype": "z", "timings": {}, "work": []}], "device": {}}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not valid JSON"),
        ("{}", "holds no results"),
        ('{"version": 9, "device": {}, "rows": []}', "got results of version 9, wanted 1 or 2"),
        ('{"device": {}, "rows": [{"subject": "x"}]}', "row 0 lacks some of subject, case, dtype, timings"),
        (ROW.replace("{}", '{"a": {"median": 1, "samples": [1, -1]}}', 1).replace("[]", "{}"), "row 0: a has a sample"),
        (ROW.replace("[]", '{"speed": 1}'), "row 0: work holds {'speed': 1}, wanted positive numbers of flops"),
        (ROW.replace("[]", "[1]"), "row 0: work is no object"),
        (
            '{"device": {}, "rows": [{"subject": "x", "case": "y", "dtype": "z", "timings": {"a": {"median": "1"}}}]}',
            "row 0: a has no time",
        ),
    ],
)
def test_a_file_of_something_else_is_left_alone(content: str, words: str, tmp_path, capsys) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        main(["bench", *QUICK, "--json", str(path)])
    assert caught.value.code == 2 and words in capsys.readouterr().err
    assert path.read_text() == content


def test_results_of_another_machine_are_not_mixed(tmp_path, capsys) -> None:
    path = tmp_path / "a.json"
    rows = [{"subject": "x", "case": "y", "dtype": "z", "timings": {}}]
    path.write_text(json.dumps({"version": 2, "device": {"processor": "an abacus"}, "rows": rows}))
    before = path.read_text()
    assert main(["bench", *QUICK, "--json", str(path)]) == 2
    assert "holds results of another machine, and is left as it is: processor an abacus and" in capsys.readouterr().err
    assert path.read_text() == before
