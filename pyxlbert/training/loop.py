"""The loop: steps, evaluations and checkpoints, in one process or several, resumed to the same bits.

Processes, devices and sharding are those of Hugging Face's `accelerate`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from pyxlbert.files import check_folder, check_inside, read_json, whole_file
from pyxlbert.training import checkpoints
from pyxlbert.training.claim import FILE, claimed
from pyxlbert.training.curves import Curves
from pyxlbert.training.evaluation import on_device
from pyxlbert.training.options import TrainingOptions
from pyxlbert.training.packages import require
from pyxlbert.training.schedule import optimiser, rate, set_rate
from pyxlbert.training.steps import Passes, StepSource, load
from pyxlbert.training.tasks.base import Batch

if torch.distributed.is_available():
    # Its functions keep the process group that exists when it is imported: the group would outlive `leave_group`.
    importlib.import_module("torch.distributed.nn.functional")

RUN = "run.json"
# Of a file: SHA-256 as hexadecimal digits.
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Counts(Protocol):
    """How many labels each loss of a batch is a sum over."""

    def __call__(self, batch: Batch) -> dict[str, int]: ...


class Memory(Protocol):
    """What a process keeps from step to step beside parameters and chance."""

    def process_state(self) -> Any:
        """Tensors on the CPU, numbers, strings, lists and dicts."""
        ...

    def load_process_state(self, states: Sequence[Any]) -> None:
        """Goes on from what all processes of the run had; there may be another number of them now."""
        ...


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        module: called with a batch and True it gives the sums of its losses; its `model` is a `PretrainedModel`.
        source: the steps.
        counts: what the losses of a batch are sums over.
        metric: the score that decides which model is the best, and whether more is better.
        evaluate: scores of the module as it is, called by all processes; None: there is nothing to evaluate on.
        save: writes the model that is the best so far, from the whole state of `module`; called by one process.
        title: of the picture.
        memory: what else a checkpoint has to hold; None: nothing.
    """

    module: nn.Module
    source: StepSource
    counts: Counts
    metric: tuple[str, bool]
    evaluate: Callable[[nn.Module, Any], dict[str, float]] | None
    save: Callable[[dict[str, torch.Tensor]], None]
    title: str
    memory: Memory | None = None


class _Clock:
    """Examples per second of training, without what happens in between."""

    def __init__(self) -> None:
        self._start, self.examples = time.perf_counter(), 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The block takes no time."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin

    def speed(self) -> float:
        """Since this was asked last."""
        now = time.perf_counter()
        speed = self.examples / max(now - self._start, 1e-9)
        self._start, self.examples = now, 0
        return speed


@dataclass
class _Progress:
    """What a run has come to; saved with it."""

    step: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    without_gain: int = 0
    finished: bool = False
    loss: float = 0.0  # of all processes, summed since the last point of the curves
    summed: int = 0  # steps that it is summed over

    @classmethod
    def of(cls, saved: dict[str, Any]) -> _Progress:
        """What was saved.

        Raises:
            ValueError: a field is missing, unknown or not of its kind.
        """
        names = {one.name for one in fields(cls)}
        if saved.keys() != names:
            raise ValueError(f"progress: got {', '.join(map(str, saved))}, wanted {', '.join(sorted(names))}")
        counts = [saved[name] for name in ("step", "without_gain", "summed")]
        counts += [] if saved["best_step"] is None else [saved["best_step"]]
        loss, scores = saved["loss"], saved["best_scores"]
        right = all(type(one) is int and one >= 0 for one in counts) and type(saved["finished"]) is bool
        right = right and isinstance(loss, int | float) and math.isfinite(loss) and isinstance(scores, dict)
        # A score may be NaN: a correlation with predictions that are all the same is.
        if not right or not all(isinstance(one, int | float) for one in scores.values()):
            raise ValueError(f"progress: got {saved}, wanted counts of steps, a finite loss and numbers for scores")
        return cls(**saved)


def accelerator() -> Any:
    """Who does the work: as `torchrun` or `accelerate launch` say, else this process.

    Raises:
        ImportError: a package that every run needs is not installed.
        ValueError: the launcher was told to shard the model, but accelerate does not do so here.
    """
    require("training", "accelerate", "matplotlib")
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # Parameters may be without a gradient: XLNet's mask has none without targets.
    plugin = DistributedDataParallelKwargs(find_unused_parameters=True)
    work = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[plugin])
    kind = work.distributed_type.value
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and kind != "FSDP":
        raise ValueError(
            f"ACCELERATE_USE_FSDP: got true, but accelerate shards models over several GPUs alone, and this run is of "
            f"kind {kind}: wanted a launch without FSDP"
        )
    return work


def leave_group() -> None:
    """Leaves the launch's process group, if there is one: what a process does last, after training.

    Threads of a group that are at work while Python ends may abort the process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # models in reference cycles would keep the group
        torch.distributed.destroy_process_group()


def check_run(directory: Path, resume: bool) -> None:
    """Whether a run's folder can be made, or one can go on in it: what is known before any data is read.

    Raises:
        FileExistsError: there is something else, or a run that is not to be resumed.
        OSError: it is a file, the folder in which to make it is missing, or it cannot be written to; another process
            trains in it.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"output: {str(directory)!r} is a file, wanted a directory's name")
    if not directory.is_dir():
        check_folder("output", str(directory), directory.resolve().parent)
        return
    check_inside("output", directory)
    if (directory / FILE).exists():
        with claimed(directory):  # unless another process trains there
            pass
    _check_content(directory, resume)


def _check_content(directory: Path, resume: bool) -> None:
    there = (directory / RUN).is_file()
    if there and not resume:
        raise FileExistsError(f"output: {str(directory)!r} holds a run; --resume goes on with it")
    # A run that was killed when it had hardly begun has left nothing but these.
    left = [path for path in directory.iterdir() if path.name != FILE and not path.match(f".{RUN}.*.part")]
    if not there and left:
        raise FileExistsError(f"output: {str(directory)!r} is not empty, and holds no run")


@contextmanager
def started_run(directory: Path, identity: dict[str, Any], resume: bool) -> Iterator[None]:
    """Makes a run's folder, or checks that one can go on, and keeps other processes out of it.

    Raises:
        OSError: as `check_run`; another process trains there.
        ValueError: the run was started with other options, another model or other data.
    """
    check_run(directory, resume)
    directory.resolve().mkdir(exist_ok=True)  # a link keeps pointing where it did
    with claimed(directory):
        _check_content(directory, resume)  # another may have begun and ended since
        checkpoints.clean(directory)
        if (directory / RUN).is_file():
            check_identity(directory, identity)
        else:
            with whole_file(directory / RUN) as temporary:
                temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        yield


def known(name: str | Path, digest: str) -> dict[str, Any]:
    """A file or a folder in a run's identity: what it holds decides, and its name is for people.

    Args:
        name: as it was given; a run may go on with another name of the same.
        digest: of what it holds.
    """
    return {"name": str(name), "sha256": digest}


def _is_known(value: Any) -> bool:
    return isinstance(value, dict) and "name" in value and "sha256" in value


def _same(now: Any, then: Any) -> bool:
    if _is_known(now) and _is_known(then):
        return all(now[key] == then[key] for key in (now.keys() & then.keys()) - {"name"})
    return now == then


def check_identity(directory: Path, identity: dict[str, Any]) -> None:
    """That the run of a folder, if it has one, is this one.

    Raises:
        ValueError: it was started with other options, another model or other data.
    """
    if not (directory / RUN).is_file():
        return
    saved, identity = read_json(directory / RUN), json.loads(json.dumps(identity))  # as it is read back
    differing = [name for name in {**saved, **identity} if not _same(identity.get(name), saved.get(name))]
    if differing:
        raise ValueError(_differs(differing[0], identity, saved, directory))


def _differs(name: str, identity: dict[str, Any], saved: dict[str, Any], directory: Path) -> str:
    """What a run's identity has otherwise than that which it is to go on with, down to one option."""
    now, then = identity.get(name), saved.get(name)
    if _is_known(now) and _is_known(then):
        content = "another content than" if now["name"] == then["name"] else f"another content than {then['name']!r},"
        return f"{name}: got {now['name']!r}, which has {content} that with which the run in {directory} was started"
    if isinstance(now, dict) and isinstance(then, dict):
        inner = next(one for one in {**then, **now} if then.get(one) != now.get(one))
        return _differs(inner, now, then, directory)
    if all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in (now, then)):
        return f"{name}: got another content than that with which the run in {directory} was started"
    name = name.removeprefix("data_")  # of options that say how rows are made
    now, then = (one["name"] if _is_known(one) else one for one in (now, then))
    if now == then:
        return (
            f"{name}: got {now!r}, of which the run in {directory} kept the name alone, as older versions did: "
            "wanted a run of this version, or a folder of its own"
        )
    return f"{name}: got {now!r}, but the run in {directory} was started with {then!r}"


class Loop:
    """One run.

    Args:
        job: what is trained.
        options: how.
        directory: of the run, which exists.
        accelerator: who does the work.
        say: takes a line for the person who waits.
    """

    def __init__(
        self,
        job: Job,
        options: TrainingOptions,
        directory: Path,
        accelerator: Any,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._job, self._options, self._directory, self._say = job, options, directory, say
        self._accelerator = accelerator
        self._epoch = job.source.epoch_steps
        self._total = options.max_steps or math.ceil(options.epochs * self._epoch)
        if options.recompute:
            job.module.model.gradient_checkpointing_enable()
        adam = optimiser(job.module.model, options)
        self._module, self._optimiser = accelerator.prepare(job.module, adam)
        self._adam = getattr(self._optimiser, "optimizer", self._optimiser)
        self._progress = _Progress()
        # Of this process's labels, since the last point of the curves; on the device, which need not be waited for.
        self._loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self._norm: torch.Tensor | None = None  # of the last step's gradient
        checkpoints.seed_chance(options.seed + accelerator.process_index)
        self._restore()

    # State

    def _restore(self) -> None:
        """Goes on after the last checkpoint that is whole, if there is any.

        Raises:
            ValueError: there are checkpoints, and none of them is whole, or the last whole one is not of this run.
        """
        state, broken = checkpoints.last_whole(self._directory)
        self._accelerator.wait_for_everyone()  # all have looked
        for step, why in broken.items():
            self._say(f"{why}: it is removed, and the one before is taken")
            if self._accelerator.is_main_process:
                shutil.rmtree(checkpoints.folder(self._directory, step))
        if state is None:
            return
        try:
            self._take(state)
        except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            # Another process may not have removed the broken ones yet.
            last = max(step for step in checkpoints.steps(self._directory) if step not in broken)
            where = checkpoints.folder(self._directory, last)
            words = (str(error).splitlines() or [""])[0]
            raise ValueError(f"{where} does not fit this run: {type(error).__name__}: {words}") from error

    def _take(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's state."""
        self._progress = _Progress.of(state["progress"])
        step = self._progress.step
        if self._accelerator.is_main_process:
            self._loss += self._progress.loss
        checkpoints.scatter(state, self._module, self._adam)
        rank, saved = self._accelerator.process_index, state["chance"]
        if len(saved) == self._accelerator.num_processes:
            checkpoints.set_chance(saved[rank])
        else:
            # Nobody had this place: a start of its own for each process and step.
            checkpoints.seed_chance(self._options.seed + 7919 * step + rank)
            self._say(
                f"the run had {len(saved)} processes and goes on with {self._accelerator.num_processes}: the same "
                "steps, but not the same bits"
            )
        if self._job.memory is not None:
            self._job.memory.load_process_state(state["memories"])
        self._say(f"goes on after step {step}")

    def _checkpoint(self) -> None:
        progress = self._progress
        if progress.step in checkpoints.steps(self._directory):
            return
        state = checkpoints.gather(self._module, self._adam)
        memory = self._job.memory
        own = [(checkpoints.chance(), None if memory is None else memory.process_state())]
        if self._accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            own = gather_object(own)
        progress.loss = self._summed_loss()
        if self._accelerator.is_main_process:
            state |= {"progress": vars(progress), "chance": [chance for chance, _ in own]}
            if memory is not None:
                state["memories"] = [kept for _, kept in own]
            keep = self._options.keep_checkpoints
            checkpoints.write(self._directory, progress.step, state, keep, progress.best_step)
        self._accelerator.wait_for_everyone()

    def _summed_loss(self) -> float:
        """The losses since the last point of the curves, of all processes.

        Raises:
            ValueError: one was not finite, or the last gradient's norm, which has broken the model all the same.
        """
        loss = self._loss
        if self._accelerator.num_processes > 1:
            loss = self._accelerator.reduce(loss, "sum")
        norm = 0.0 if self._norm is None else float(self._norm)
        for name, value in (("loss", float(loss)), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise ValueError(
                    f"{name}: got {value} by step {self._progress.step}, wanted a finite number: a lower learning rate "
                    "or a longer warm-up may help; the last checkpoint is from before"
                )
        return float(loss)

    # Work

    def run(self) -> dict[str, float]:
        """Trains to the end.

        Returns:
            The best scores, none without anything to evaluate on.

        Raises:
            ValueError: a loss is not finite.
            OSError: a checkpoint cannot be written; the last one stays.
        """
        progress, options = self._progress, self._options
        if progress.finished:
            self._say("the run is finished already")
            return progress.best_scores
        curves = Curves(self._directory, progress.step) if self._accelerator.is_main_process else None
        share = (self._accelerator.process_index, self._accelerator.num_processes)
        clock = _Clock()
        self._module.train()
        with self._bar() as bar:
            for passes in load(self._job.source, progress.step, self._total, *share, options.workers):
                norm = self.step(passes)
                clock.examples += passes.examples
                last = progress.step == self._total
                if progress.step % options.log_every == 0 or last:
                    self._point(curves, bar, clock, norm)
                bar.update()
                with clock.paused():
                    evaluates = self._evaluates()
                    if evaluates:
                        self._evaluate(curves)
                    progress.finished = last or self._has_stopped()
                    if progress.finished:
                        self._finish(curves)
                    if progress.finished or self._keeps(evaluates):
                        self._checkpoint()
                if progress.finished:
                    break
        return progress.best_scores

    def _finish(self, curves: Curves | None) -> None:
        """Writes what a run leaves. Its last checkpoint comes after: a run that is resumed from it writes nothing."""
        if self._job.evaluate is None:
            self._save_model()
        if curves is not None:
            curves.finish(self._job.title)

    def step(self, passes: Passes) -> torch.Tensor:
        """One step of the optimiser.

        Args:
            passes: what this process does in it.

        Returns:
            The norm of the gradient, before it was scaled down.
        """
        progress = self._progress
        set_rate(self._adam, rate(self._options, progress.step, self._total))
        self._losses(passes)
        self._norm = norm = self._clip()
        self._optimiser.step()
        self._optimiser.zero_grad()
        progress.step += 1
        progress.summed += 1
        return norm

    def _bar(self) -> tqdm:
        progress = self._options.progress if self._accelerator.is_main_process else False
        silent = None if progress is None else not progress  # None: unless it is a terminal
        return tqdm(total=self._total, initial=self._progress.step, unit="step", disable=silent)

    def _evaluates(self) -> bool:
        if self._job.evaluate is None:
            return False
        step = self._progress.step
        return step == self._total or step % (self._options.evaluate_every or self._epoch) == 0

    def _keeps(self, evaluated: bool) -> bool:
        """Whether there is to be a checkpoint of this step."""
        every, step = self._options.checkpoint_every, self._progress.step
        best = evaluated and self._progress.best_step == step
        return best or step % (every or self._options.evaluate_every or self._epoch) == 0

    def _has_stopped(self) -> bool:
        patience = self._options.patience
        if patience is None or self._progress.without_gain < patience:
            return False
        self._say(f"no better {self._job.metric[0]} in {patience} evaluations: ends at step {self._progress.step}")
        return True

    def _point(self, curves: Curves | None, bar: tqdm, clock: _Clock, norm: torch.Tensor) -> None:
        """Shows what the steps since the last point were like."""
        progress = self._progress
        loss = self._summed_loss() / progress.summed
        self._loss.zero_()
        progress.summed = 0
        share = rate(self._options, progress.step - 1, self._total)
        point = {
            "epoch": progress.step / self._epoch,
            "loss": loss,
            "learning_rate": share * self._options.learning_rate,
            "gradient_norm": float(norm),
            "examples_per_second": clock.speed(),
        }
        if curves is not None:
            curves.add(progress.step, point)
        bar.set_postfix_str(f"loss {loss:.4f}, {point['examples_per_second']:.0f} examples/s", refresh=False)

    def _losses(self, passes: Passes) -> None:
        """Runs a step's passes forward and backward."""
        totals: dict[str, int] = {}
        for batch in passes.batches[: passes.real]:
            for name, count in self._job.counts(batch).items():
                totals[name] = totals.get(name, 0) + count
        if self._accelerator.num_processes > 1:
            totals = self._sum_counts(totals, passes.batches[0])
        device = self._accelerator.device
        for number, batch in enumerate(passes.batches):
            last = number == len(passes.batches) - 1
            with contextlib.nullcontext() if last else self._accelerator.no_sync(self._module):
                with torch.autocast(
                    device.type, torch.bfloat16, enabled=self._options.precision == "bfloat16", cache_enabled=True
                ):
                    sums = self._module(on_device(batch, device), True)
                # Each label weighs the same, whatever pass and process it is in.
                loss = sum(value / max(1, totals[name]) for name, value in sums.items())
                if number >= passes.real:
                    loss = loss * 0.0
                # Processes average their gradients.
                self._accelerator.backward(loss * self._accelerator.num_processes)
            self._loss += loss.detach()

    def _sum_counts(self, totals: dict[str, int], batch: Batch) -> dict[str, int]:
        names = sorted(self._job.counts(batch))  # a process may have no pass that counts
        device = self._accelerator.device
        tensor = torch.tensor([totals.get(name, 0) for name in names], dtype=torch.int64, device=device)
        return dict(zip(names, self._accelerator.reduce(tensor, "sum").tolist(), strict=True))

    def _clip(self) -> torch.Tensor:
        most = self._options.max_gradient_norm or math.inf
        return self._accelerator.clip_grad_norm_(self._module.parameters(), most)

    def _evaluate(self, curves: Curves | None) -> None:
        progress = self._progress
        self._summed_loss()  # a model that is broken might score better than the best so far, and take its place
        scores = self._job.evaluate(self._module, self._accelerator)
        name, more = self._job.metric
        sign, best = 1 if more else -1, progress.best_scores
        better = not best or sign * scores[name] > sign * best[name]
        if better:
            progress.best_scores, progress.best_step, progress.without_gain = scores, progress.step, 0
            self._save_model()
        else:
            progress.without_gain += 1
        if curves is not None:
            curves.add(progress.step, {f"dev_{key}": value for key, value in scores.items()})
        told = ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
        self._say(f"step {progress.step}: {told}{' (the best so far)' if better else ''}")

    def _save_model(self) -> None:
        state = checkpoints.gather(self._module, self._adam)["model"]
        if self._accelerator.is_main_process:
            self._job.save({name.removeprefix("model."): value for name, value in state.items()})
        self._accelerator.wait_for_everyone()
