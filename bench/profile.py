"""Where the time of a model goes: every op beside the least that it could take here, and the pages that it touches."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from pyxlbert.bench import limits, page
from pyxlbert.bench.report import shown
from pyxlbert.bench.sizes import SIZES, xlnet_fields
from pyxlbert.bench.statistics import quartiles
from pyxlbert.bench.svg import COLOURS, Axis, Chart
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import pyxlbert
from pyxlbert.testing.specs import SPECS

#: Of the JSON document.
VERSION = 1
ROUNDS = 5
# Ops of a smaller share are one line.
SMALL = 0.005
PRESETS = ("bert-base", "minilm", "xlnet-base")
_WEIGHTS = (".safetensors", ".bin")


@dataclass
class Line:
    """All calls of one op in one phase.

    Attributes:
        phase: "forward", "backward" or "optimizer".
        op: its name; "other ops" holds what is small.
        calls: of it.
        seconds: of all of them, the median of some passes.
        floor: seconds at the machine's limit, of products or of memory, whichever is more; None: not counted.
        faults: pages that were new to the process.
    """

    phase: str
    op: str
    calls: int
    seconds: float
    floor: float | None
    faults: int


@dataclass
class Profile:
    """Of one kind of pass.

    Attributes:
        kind: "forward" or "training step".
        model, case, dtype: what was run.
        seconds: of a pass that nobody watches, the median; of each phase in `phases`.
        faults: of such a pass.
        lines: by time, the longest first.
    """

    kind: str
    model: str
    case: str
    dtype: str
    seconds: float
    faults: int
    phases: dict[str, float]
    lines: list[Line]

    @property
    def ops(self) -> float:
        """Seconds of all ops one by one."""
        return sum(line.seconds for line in self.lines)


@dataclass
class _Event:
    phase: str
    op: str
    seconds: float
    floor: float | None
    faults: int


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Watch(TorchDispatchMode):
    """Times every op that passes, of autograd's backward too; `begin` names the phase."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[_Event] = []
        self._phase = ""

    def begin(self, phase: str) -> None:
        """What follows belongs to this phase."""
        self._phase = phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        faults, start = _faults(), time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - start
        faults = _faults() - faults
        name = func._schema.name.removeprefix("pyxlbert::").replace("aten::", "torch.")
        floor = None if func.is_view else floor_of(func, args, kwargs, out)
        self.events.append(_Event(self._phase, name, seconds, floor, faults))
        return out


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (x for x in tree_leaves(value) if isinstance(x, torch.Tensor))


def floor_of(func: Any, args: Any, kwargs: Any, out: Any) -> float | None:
    """Seconds at the machine's limit of a call of an op, or None where nothing is known of it."""
    given = [*_tensors((args, kwargs))]
    floating = next((x for x in given if x.is_floating_point()), None)
    if floating is None:
        return None
    flops, moved = _work(func, args, kwargs, out)
    dtype = floating.dtype if floating.dtype in (torch.float32, torch.bfloat16) else torch.float32
    products = flops / limits.gemm_rate(dtype) if flops else 0.0
    return max(products, moved / limits.copy_bandwidth())


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[float | None, int]:
    """FLOPs and bytes: of an op of ours what its spec says, else torch's count and every tensor once."""
    namespace, _, name = func._schema.name.partition("::")
    op, _, direction = name.rpartition("_")
    if namespace == "pyxlbert" and op in SPECS:
        names = (argument.name for argument in func._schema.arguments)
        given = {key: value for key, value in zip(names, args, strict=False) if value is not None} | kwargs
        # Backward of sums keeps the sum, and not what was added.
        given.setdefault("x", given.get("s", given.get("dy")))
        spec, found = SPECS[op], []
        for count in (spec.flops, spec.bytes_moved):
            if count is None:
                found.append(None)
                continue
            try:
                once = count(given, False)
                found.append(once if direction == "fwd" else count(given, True) - once)
            except (KeyError, AttributeError, TypeError):  # it asks for an argument that the schema does not pass on
                found.append(None)
        if found[1] is not None:
            return found[0], found[1]
        return found[0], _bytes(args, kwargs, out)
    count = flop_registry.get(func.overloadpacket)
    flops = count(*args, **kwargs, out_val=out) if count is not None else None
    return flops, _bytes(args, kwargs, out)


def _bytes(args: Any, kwargs: Any, out: Any) -> int:
    """Of every tensor once; what is expanded counts its memory alone."""
    found = {x.data_ptr(): x for x in _tensors((args, kwargs, out))}
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in found.values())


def require(name: str) -> None:
    """Whether there is anything to profile.

    Raises:
        ValueError: it is neither a preset nor a directory with a model.
    """
    if name in PRESETS:
        return
    if not Path(name).is_dir():
        raise ValueError(f"--profile: got {name!r}, wanted {', '.join(PRESETS)} or a model's directory")
    if not any(path.suffix in _WEIGHTS for path in Path(name).iterdir()):
        raise ValueError(f"--profile: {name!r} holds no weights, {' or '.join(_WEIGHTS)}")


def load(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, str, int]:
    """A preset with random weights, or a directory's model: ours where its type is one of ours, else accelerated.

    Returns:
        the model, what it is in words, and how many words its vocabulary has.

    Raises:
        ValueError: it is neither a preset nor a directory with a model.
    """
    require(name)
    torch.manual_seed(0)
    if name in PRESETS:
        return (*_preset(name, dtype), 30000)
    directory = Path(name)
    from pyxlbert.models.by_type import encoder_class

    try:
        kind = encoder_class(directory)
    except ValueError as error:
        try:
            import transformers
        except ImportError:
            raise ValueError(f"--profile: {error}, or transformers installed") from None
        model = transformers.AutoModel.from_pretrained(directory, local_files_only=True)
        model = pyxlbert.accelerate(model.to(dtype))
        words = f"{model.config.model_type} of transformers, accelerated"
        return model, words, model.config.vocab_size
    model = kind.from_pretrained(directory).to(dtype)
    return model, f"{model.config.model_type} of a directory", model.config.vocab_size


def _preset(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, str]:
    from pyxlbert.models import BertConfig, BertModel, XLNetConfig, XLNetModel

    if name == "xlnet-base":
        return XLNetModel(XLNetConfig(**xlnet_fields())).to(dtype), name
    size = SIZES["BERT-base" if name == "bert-base" else "MiniLM"]
    config = BertConfig(
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_attention_heads=12,
    )
    return BertModel(config).to(dtype), name


class _Passes:
    """A forward of the packed model, and a training step of it unpacked: forward, backward and AdamW."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor) -> None:
        self._model, self._ids = model, ids
        self._optimizer: torch.optim.Optimizer | None = None

    def forward(self, begin: Callable[[str], None]) -> None:
        begin("forward")
        with torch.inference_mode():
            self._model(self._ids)

    def training_step(self, begin: Callable[[str], None]) -> None:
        begin("forward")
        out = self._model(self._ids).last_hidden_state
        begin("backward")
        out.float().square().mean().backward()
        begin("optimizer")
        if self._optimizer is None:
            used = [one for one in self._model.parameters() if one.grad is not None]
            self._optimizer = torch.optim.AdamW(used, lr=1e-5)
        self._optimizer.step()
        self._optimizer.zero_grad()


def profiles(name: str, size: tuple[int, int], dtype: torch.dtype, rounds: int = ROUNDS) -> Iterator[Profile]:
    """The forward of a model, then its training step.

    Args:
        name: see `load`.
        size: batch and length.
        dtype: of the parameters.
        rounds: passes of each kind, watched and not.

    Raises:
        ValueError: as `load`, or the model takes no texts of this length.
    """
    limits.gemm_rate(dtype), limits.copy_bandwidth()
    model, words, vocabulary = load(name, dtype)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and most > 0 and size[1] > most:
        raise ValueError(f"--profile: {name} takes up to {most} places, got {size[1]}")
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, size, generator=torch.Generator().manual_seed(0))
    case, label = f"{size[0]}x{size[1]}", str(dtype).removeprefix("torch.")
    for kind in ("forward", "training step"):
        model.train(kind != "forward")
        if kind == "forward":
            pyxlbert.pack(model)
        # With all of its kind, packed weights are dropped when a model is trained.
        run = getattr(_Passes(model, ids), kind.replace(" ", "_"))
        yield Profile(kind, words, case, label, *_whole(run, rounds), _lines(run, rounds))


def _whole(run: Callable[[Callable[[str], None]], None], rounds: int) -> tuple[float, int, dict[str, float]]:
    """Seconds and page faults of a pass that nobody watches, and the seconds of its phases."""
    run(lambda phase: None)
    seconds, faults, phases = [], [], []
    for _ in range(rounds):
        marks: list[tuple[str, float]] = []
        before, start = _faults(), time.perf_counter()
        run(lambda phase, marks=marks: marks.append((phase, time.perf_counter())))
        end = time.perf_counter()
        seconds.append(end - start)
        faults.append(_faults() - before)
        ends = [*(at for _, at in marks[1:]), end]
        phases.append({phase: till - at for (phase, at), till in zip(marks, ends, strict=True)})
    middle = {phase: quartiles([one[phase] for one in phases])[1] for phase in phases[0]}
    return quartiles(seconds)[1], sorted(faults)[rounds // 2], middle


def _lines(run: Callable[[Callable[[str], None]], None], rounds: int) -> list[Line]:
    passes = []
    for _ in range(rounds):
        with _watching() as watch:
            run(watch.begin)
        passes.append(watch.events)
    found: dict[tuple[str, str], Line] = {}
    # Passes of the same calls are compared call by call; where they differ, the last stands for all.
    same = all([e.op for e in one] == [e.op for e in passes[0]] for one in passes)
    for place, event in enumerate(passes[-1]):
        calls = [one[place] for one in passes] if same else [event]
        line = found.setdefault((event.phase, event.op), Line(event.phase, event.op, 0, 0.0, None, 0))
        line.calls += 1
        line.seconds += quartiles([one.seconds for one in calls])[1]
        line.faults += sorted(one.faults for one in calls)[len(calls) // 2]
        if event.floor is not None:
            line.floor = (line.floor or 0.0) + event.floor
    return _gathered(list(found.values()))


@contextmanager
def _watching() -> Iterator[Watch]:
    with Watch() as watch:
        yield watch


def _gathered(lines: list[Line]) -> list[Line]:
    """The longest first; what is small is one line of its phase."""
    total = sum(line.seconds for line in lines)
    kept = [line for line in lines if line.seconds >= SMALL * total]
    for phase in dict.fromkeys(line.phase for line in lines):
        small = [line for line in lines if line.phase == phase and line.seconds < SMALL * total]
        if small:
            sums = (sum(getattr(line, name) for line in small) for name in ("calls", "seconds", "faults"))
            calls, seconds, faults = sums
            kept.append(Line(phase, f"other ops ({len(small)})", calls, seconds, None, faults))
    return sorted(kept, key=lambda line: -line.seconds)


def text(one: Profile) -> str:
    """The profile as lines of text."""
    head = f"{one.model} {one.case} {one.dtype}, {one.kind}: {shown(one.seconds)}, {one.faults} page faults"
    if len(one.phases) > 1:
        head += " (" + ", ".join(f"{phase} {shown(seconds)}" for phase, seconds in one.phases.items()) + ")"
    rest = one.seconds - one.ops
    outside = (
        f"{shown(rest)} between ops" if rest > 0 else f"{shown(-rest)} saved: packed layers run whole if nobody watches"
    )
    lines = [head, f"  {shown(one.ops)} in ops, watched one by one; {outside}"]
    lines.append(
        f"  {'phase':10} {'op':34} {'calls':>5} {'ms':>9} {'share':>6} {'floor ms':>9} {'of floor':>9} {'faults':>8}"
    )
    for line in one.lines:
        floor = "" if line.floor is None else f"{line.floor * 1e3:.3f}"
        times = "" if not line.floor else f"{line.seconds / line.floor:.2f}x"
        lines.append(
            f"  {line.phase:10} {line.op:34} {line.calls:5} {line.seconds * 1e3:9.3f} {line.seconds / one.ops:6.1%} "
            f"{floor:>9} {times:>9} {line.faults:8}"
        )
    return "\n".join(lines)


def picture(one: Profile) -> str:
    """A bar for every op with its floor in it, as SVG."""
    count = len(one.lines)
    names = [f"{line.op}, {line.phase}" if len(one.phases) > 1 else line.op for line in one.lines]
    words = [f"{name} ({line.calls})" for name, line in zip(names, one.lines, strict=True)]
    ticks = tuple((count - i - 0.5, label) for i, label in enumerate(words))
    scale = max((line.seconds for line in one.lines), default=1e-3) * 1e3
    left = 24 + round(7 * max(map(len, words), default=0))
    title = f"{one.kind}: {shown(one.seconds)}, {one.model} {one.case} {one.dtype}"
    axis = Axis("milliseconds in all calls of an op (in brackets: how many)", 0, 1.18 * scale, False)
    chart = Chart(title, axis, Axis("", 0, count, False, ticks), left + 560, 60 + 22 * count, left)
    chart.name("what the machine allows (products or memory)", COLOURS[2])
    chart.name("above it", COLOURS[0])
    chart.name("not counted", "#9aa4af")
    for i, line in enumerate(one.lines):
        y, spent = count - i - 0.5, line.seconds * 1e3
        floor = None if line.floor is None else min(line.floor * 1e3, spent)
        tip = f"{names[i]}: {spent:.3f} ms, {line.calls} calls, {line.faults} page faults"
        tip += "" if line.floor is None else f", at least {line.floor * 1e3:.3f} ms"
        chart.bar(0, spent, y, "#9aa4af" if floor is None else COLOURS[0], tip)
        if floor is not None:
            chart.bar(0, floor, y, COLOURS[2], tip)
        chart.words(spent, y, f" {line.seconds / one.ops:.0%}", up=-4)
    return chart.svg()


def document(found: Sequence[Profile], device: dict[str, Any]) -> str:
    """JSON: `version`, `device` and every field of the profiles."""
    listed = [asdict(one) for one in found]
    return json.dumps({"version": VERSION, "device": device, "profiles": listed}, indent=1) + "\n"


def html(found: Sequence[Profile], device: dict[str, Any]) -> str:
    """One page that loads nothing: the pictures, and the lines below each."""
    parts = [
        page.head("pyxlbert bench --profile"),
        f"<h1>Where the time goes</h1><p>{escape(page.described(device))}</p>",
        "<p class='faint'>Each op's time is the median of some passes, watched call by call. Its floor is what "
        "products at the vendors' rate, or a copy of its bytes, would take on this machine.</p>",
    ]
    for one in found:
        parts.append(f"<h2>{escape(one.kind)}</h2><div class='charts'>{picture(one)}</div>")
        parts.append(f"<div class='wide'><pre>{escape(text(one))}</pre></div>")
    return "\n".join([*parts, "</body></html>\n"])
