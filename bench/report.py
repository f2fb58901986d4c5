"""Results as rows: printed as a table, written as JSON through an allow-list of fields."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyxlbert.bench.statistics import interval
from pyxlbert.bench.timer import Timing

import pyxlbert
from pyxlbert import files

# Nothing else of a machine or an environment is written: no host name, no paths, no user.
DEVICE_FIELDS = ("gpu", "processor", "level", "threads", "copy_bandwidth", "gemm_float32", "gemm_bfloat16")
VERSIONS = ("pyxlbert", "torch", "triton", "transformers", "onnxruntime", "openvino", "numpy")

# The name under which a row says what kept a race from being run at all.
RACE = "the race"
_REFUSED = re.compile(r"backend '\w+' is unavailable: ")


def is_peer(name: str) -> bool:
    """Whether a contestant is another library's way to the same result, and not given a part of it."""
    return not name.startswith("pyxlbert") and not name.endswith(" given") and name != RACE


class Work(NamedTuple):
    """What a call does at least.

    Attributes:
        flops: of it; None where memory is what limits it, or they were not counted.
        bytes: moved; None where they were not counted.
        length: places of the longest sequence, where there is one.
    """

    flops: float | None = None
    bytes: int | None = None
    length: int | None = None


@dataclass
class Row:
    """One race.

    Attributes:
        subject: the op or model.
        case: what it was given.
        dtype: of the tensors.
        timings: of every contestant; ours is called "pyxlbert".
        limit: seconds that the machine's measured limit allows, where it is known.
        note: what a reader must know, such as "less work".
        failed: what has no time, and why: it did not run, or its answer was wrong.
        memory: bytes of every contestant's peak above inputs and results, where it was measured.
        work: of a call.
    """

    subject: str
    case: str
    dtype: str
    timings: dict[str, Timing]
    limit: float | None = None
    note: str = ""
    failed: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    work: Work = field(default_factory=Work)

    @property
    def ours(self) -> Timing | None:
        """None where it did not run or was wrong."""
        return self.timings.get("pyxlbert")

    @property
    def faults(self) -> dict[str, str]:
        """What is wrong with ours, or with the race itself, by name; a named backend may refuse."""
        refused = {name for name, why in self.failed.items() if name != "pyxlbert" and _REFUSED.search(why)}
        return {name: why for name, why in self.failed.items() if not is_peer(name) and name not in refused}

    @property
    def best_peer(self) -> tuple[str, Timing] | None:
        peers = {name: timing for name, timing in self.timings.items() if is_peer(name)}
        return min(peers.items(), key=lambda item: item[1].median) if peers else None

    def line(self) -> str:
        peer, ours = self.best_peer, self.ours
        own = "no time" if ours is None else shown(ours.median)
        parts = [f"{self.subject:24} {self.case:28} {self.dtype:9} {own:>10}"]
        if ours is not None and (rate := rate_of(self.work, ours.median)):
            parts.append(f"{rate:>12}")
        if peer is not None:
            ratio = "" if ours is None else f" {peer[1].median / ours.median:6.2f}x"
            sure = None if ours is None else interval(peer[1].samples, ours.samples)
            ratio += "" if sure is None else f" [{sure[0]:.2f}, {sure[1]:.2f}]"
            parts.append(f"{peer[0]:>14} {shown(peer[1].median):>10}{ratio}")
        if self.limit is not None and ours is not None:
            parts.append(f"{self.limit / ours.median:5.0%} of limit")
        return "  ".join(parts) + (f"  ({self.note})" if self.note else "")

    def details(self) -> str:
        """Every contestant with its quartiles."""
        lines = []
        for name, t in sorted(self.timings.items(), key=lambda item: item[1].median):
            quartiles = f"[{shown(t.lower)}, {shown(t.upper)}]"
            memory = f"{self.memory[name] / 1e6:10.1f} MB" if name in self.memory else ""
            ratio = "" if self.ours is None else f"{t.median / self.ours.median:5.2f}x"
            lines.append(f"    {name:22} {shown(t.median):>10} {quartiles:22} {ratio}{memory}")
        return "\n".join(lines + [f"    {name:22} no time: {why}" for name, why in self.failed.items()])


def rate_of(work: Work, seconds: float) -> str:
    """GFLOP/s, or GB/s where FLOPs are not what a call costs; empty where nothing was counted."""
    if work.flops:
        return f"{work.flops / seconds / 1e9:.3g} GFLOP/s"
    return f"{work.bytes / seconds / 1e9:.3g} GB/s" if work.bytes else ""


def shown(seconds: float) -> str:
    """With its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def device() -> dict[str, object]:
    """The fields of DEVICE_FIELDS that are known, of torch's default device: a GPU's name where it is one."""
    from pyxlbert.bench import limits

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.get_default_device().type == "cuda" else {}
    return gpu | {
        "processor": f"{platform.machine()} {_processor()}",
        "level": pyxlbert._C.level(),
        "threads": torch.get_num_threads(),
        "copy_bandwidth": round(limits.copy_bandwidth() / 1e9, 1),
        "gemm_float32": round(limits.gemm_rate(torch.float32) / 1e9),
        "gemm_bfloat16": round(limits.gemm_rate(torch.bfloat16) / 1e9),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    extras = [
        flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16") if f" {flag} " in f"{flags} "
    ]
    return f"{names[0] if names else platform.processor()} ({' '.join(extras)})"


def versions() -> dict[str, str]:
    """Versions of what raced."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


#: Of the JSON document; files without one are of version 1, whose rows have no samples and no work.
VERSION = 2
# What tells one machine from another.
MACHINE = ("gpu", "processor", "level", "threads")


def read(path: Path) -> dict[str, Any]:
    """A document of results.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no document of results, or of a version that this code does not know.
    """
    document = files.read_json(path)
    version = document.get("version", 1)
    if version not in (1, VERSION):
        raise ValueError(f"{path}: got results of version {version!r}, wanted 1 or {VERSION}")
    rows = document.get("rows")
    if not isinstance(document.get("device"), dict) or not isinstance(rows, list):
        raise ValueError(f"{path} holds no results: wanted an object with device and rows")
    for number, row in enumerate(rows):
        fault = _fault(row)
        if fault is not None:
            raise ValueError(f"{path}: row {number}{fault}")
        rows[number] = _ABSENT | row
    return document


# What rows of version 1, or those that somebody else has written, may lack.
_ABSENT: dict[str, Any] = {"limit": None, "note": "", "failed": {}, "memory": {}, "work": {}, "command": ""}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _fault(row: Any) -> str | None:
    """What is wrong with a row of a document, or None."""
    fields = ("subject", "case", "dtype", "timings")
    if not isinstance(row, dict) or not set(fields) <= row.keys():
        return f" lacks some of {', '.join(fields)}"
    words = [*(row[name] for name in fields[:3]), row.get("note", ""), row.get("command", "")]
    if not all(isinstance(word, str) for word in words):
        return ": subject, case, dtype, note or command is no text"
    for name in ("timings", "failed", "memory", "work"):
        if not isinstance(row.get(name, {}), dict):
            return f": {name} is no object"
    for name, timing in row["timings"].items():
        if not isinstance(timing, dict) or not _positive(timing.get("median")):
            return f": {name} has no time that is a positive number of seconds"
        samples = timing.get("samples", [])
        others = [timing[key] for key in ("lower", "upper", "rounds") if key in timing]
        if not isinstance(samples, list) or not all(map(_positive, [*samples, *others])):
            return f": {name} has a sample, a quartile or a number of rounds that is no positive number"
    work, limit = row.get("work", {}), row.get("limit")
    if not work.keys() <= set(Work._fields) or not all(map(_positive, work.values())):
        return f": work holds {work}, wanted positive numbers of {', '.join(Work._fields)}"
    if not all(isinstance(why, str) for why in row.get("failed", {}).values()):
        return ": failed holds a reason that is no text"
    if not all(isinstance(peak, int) for peak in row.get("memory", {}).values()):
        return ": memory holds what is no number of bytes"
    if limit is not None and not _positive(limit):
        return f": limit is {limit!r}, wanted a positive number of seconds"
    return None


def row_from(entry: dict[str, Any]) -> Row:
    """The row that a document holds as `entry`."""
    timings = {}
    for name, t in entry["timings"].items():
        median = t["median"]
        samples = tuple(t.get("samples", ()))
        timings[name] = Timing(median, t.get("lower", median), t.get("upper", median), t.get("rounds", 1), samples)
    return Row(
        *(entry["subject"], entry["case"], entry["dtype"], timings, entry.get("limit"), entry.get("note", "")),
        *(entry.get("failed", {}), entry.get("memory", {})),
        work=Work(**entry.get("work", {})),
    )


def same_machine(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between two descriptions of a machine, in words; nothing where both are of the same."""
    return [
        f"{name} {one.get(name, 'unknown')} and {other.get(name, 'unknown')}"
        for name in MACHINE
        if one.get(name) != other.get(name)
    ]


def refuse_other_machine(path: Path, description: dict[str, Any]) -> dict[str, Any]:
    """The document that is there, if its results are this machine's.

    Raises:
        OSError, ValueError: as `read`, or it holds results of another machine.
    """
    document = read(path)
    differ = same_machine(document["device"], description) if document["rows"] and description else []
    if differ:
        raise ValueError(f"{path} holds results of another machine, and is left as it is: {', '.join(differ)}")
    return document


def document_of(
    rows: list[Row],
    command: str,
    description: dict[str, Any],
    old: dict[str, Any] | None = None,
    peers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Results as they are written; rows of the same race in an older document are replaced where they stand.

    Args:
        rows: of this run.
        command: that they come from.
        description: of the device.
        old: what a file has held.
        peers: each with its version, or why it does not race.
    """
    found = {(r["subject"], r["case"], r["dtype"]): r for r in (old or {}).get("rows", [])}
    found |= {
        (r.subject, r.case, r.dtype): {
            "subject": r.subject,
            "case": r.case,
            "dtype": r.dtype,
            "timings": {name: _written(t) for name, t in r.timings.items()},
            "limit": r.limit,
            "note": r.note,
            "failed": r.failed,
            "memory": r.memory,
            "work": {name: value for name, value in r.work._asdict().items() if value is not None},
            "command": command,
        }
        for r in rows
    }
    return {
        "version": VERSION,
        "device": {name: description[name] for name in DEVICE_FIELDS if name in description},
        "versions": versions(),
        "peers": (old or {}).get("peers", {}) if peers is None else peers,
        "rows": list(found.values()),
    }


def _written(timing: Timing) -> dict[str, Any]:
    # Five digits: the clock has no more.
    return asdict(timing) | {"samples": [float(f"{one:.5g}") for one in timing.samples]}


def write(
    path: Path,
    rows: list[Row],
    command: str,
    description: dict[str, object] | None = None,
    peers: dict[str, str] | None = None,
) -> None:
    """Writes the results whole or not at all; rows of the same race in an older file are replaced where they stand.

    Args:
        path: the JSON file.
        rows: to add to it.
        command: that they come from.
        description: what `device` gave where they ran; by default it is asked here.
        peers: see `document_of`.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the older file holds no results, or those of another machine.
    """
    description = device() if description is None else description
    old = refuse_other_machine(path, description) if path.exists() else None
    document = document_of(rows, command, description, old, peers)
    with files.whole_file(path) as part:
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
