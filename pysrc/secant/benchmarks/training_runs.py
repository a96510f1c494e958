"""Runs on mini-batches: one of them, and a file of those that are finished.

Every run of a task has as many steps. The clock stands still while the error is measured; a closure's share of a step
is the model's, the rest the optimizer's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import secant
import secant.kernels
from secant.benchmarks.optimizers import Stopwatch
from secant.benchmarks.race import Watch
from secant.benchmarks.timing import clock_for
from secant.benchmarks.training_optimizers import Entry, Optimizer, factor, state_bytes
from secant.benchmarks.training_tasks import TASKS, Batch, Task


class Key(NamedTuple):
    """What tells a run from all others. rate: None for the optimizer's own default, at a constant rate."""

    task: str
    optimizer: str
    rate: float | None
    seed: int
    steps: int


class Run(NamedTuple):
    """A finished run.

    curve: (step, seconds, error), from the start on. inside: seconds in the optimizer. state: its bytes over those of
    the parameters. validation: at the end. failure: why it counts as diverged, if it does.
    """

    key: Key
    curve: tuple[tuple[int, float, float], ...]
    inside: float
    state: float
    validation: float | None = None
    failure: str = ""

    @property
    def steps(self) -> int:
        """Return the steps that were made."""
        return self.curve[-1][0]

    @property
    def seconds(self) -> float:
        """Return the seconds that they took."""
        return self.curve[-1][1]

    @property
    def final(self) -> float:
        """Return the error at the end; infinity where it diverged."""
        return math.inf if self.failure else self.curve[-1][2]

    def reached(self, target: float) -> tuple[int, float] | None:
        """Return the step and the seconds at which an error was first reached; None: never."""
        return next(((step, seconds) for step, seconds, error in self.curve if error <= target), None)

    def at(self, seconds: float) -> float:
        """Return the error that was last measured at some time."""
        return next(error for _, at, error in reversed(self.curve) if at <= max(seconds, 0.0))


def keeps_graph(optimizer: Optimizer) -> bool:
    """Say whether an optimizer needs the graph of the gradients of this step; of some only every few steps."""
    return bool(getattr(optimizer, "needs_graph", getattr(optimizer, "is_second_order", False)))


def _closure(task: Task, entry: Entry, optimizer: Optimizer, batch: Batch) -> Callable[[], Any]:
    """Make what the optimizer asks for at a batch."""
    if entry.returns == "residuals":
        return lambda: task.residuals(batch)
    if entry.returns == "outputs":
        return lambda: task.outputs(batch)

    def closure() -> torch.Tensor:
        task.model.zero_grad()
        with torch.enable_grad():
            loss = task.loss(batch)
            loss.backward(create_graph=keeps_graph(optimizer))
        return loss.detach()

    return closure


def train(
    task_name: str, entry: Entry, rate: float | None, seed: int, device: torch.device, steps: int | None = None
) -> Run:
    """Train from the start of a seed.

    Args:
        task_name: of `training_tasks.TASKS`. entry: the optimizer. device: where.
        rate: the highest one, reached after the warm-up; None: the optimizer's own, constant.
        seed: of start and batches. steps: how many; None: as the task has it.

    Returns:
        The run. It ends early where the error is not finite or the optimizer raises, which counts as diverged, as does
        an end above the start; and where the task's target is reached.
    """
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), warnings.catch_warnings():
        # Of cycles between parameters and graphs of gradients: the next closure, or the end, frees them.
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph")
        torch.manual_seed(seed)
        task = TASKS[task_name](seed, device)
        task.steps = steps or task.steps
        return _run(Key(task_name, entry.kept, rate, seed, task.steps), task, entry, device)


def _run(key: Key, task: Task, entry: Entry, device: torch.device) -> Run:
    optimizer, clock = entry.make(task, key.rate), clock_for(device)
    groups = optimizer.param_groups
    highest = [group["lr"] for group in groups]
    varies = entry.cosine and key.rate is not None
    curve, inside, failure = [(0, 0.0, task.error())], 0.0, ""
    marks: list[tuple[Any, Any, Stopwatch]] = []
    watch = Watch(functools.partial(_evaluated, optimizer, task.error), task.target, math.inf)
    for k in range(task.steps):
        if varies:
            for group, rate in zip(groups, highest, strict=True):
                group["lr"] = rate * factor(k, task.steps)
        batch = task.draw()
        closure = Stopwatch(_closure(task, entry, optimizer, batch), clock)
        start = clock.mark()
        try:
            optimizer.step(closure)
        except Exception as error:
            failure = f"{type(error).__name__} at step {k + 1}: {error}"
        marks.append((start, clock.mark(), closure))
        if not failure and (k + 1) % task.every and k + 1 < task.steps:
            continue
        clock.wait()
        inside += sum(clock.seconds(start, end) - closure.inside() for start, end, closure in marks)
        marks.clear()
        over = watch()
        curve.append((k + 1, *watch.curve[-1]))
        if not math.isfinite(curve[-1][2]):
            failure = failure or f"not finite by step {k + 1}"
        if over or failure:
            break
    if not failure and curve[-1][2] > curve[0][2]:
        failure = "ends above its start"
    parameters = sum(p.numel() * p.element_size() for p in task.model.parameters())
    task.model.zero_grad()
    validation = None if failure else _evaluated(optimizer, task.validation)
    return Run(key, tuple(curve), inside, state_bytes(optimizer) / parameters, validation, failure)


def _evaluated(optimizer: Optimizer, measure: Callable[[], Any]) -> Any:
    """Measure where an optimizer wants its parameters to be evaluated: those without a schedule average them."""
    averages = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if averages:
        optimizer.eval()
    found = measure()
    if averages:
        optimizer.train()
    return found


def _digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return what the runs of each kind depend on: of peers the benchmark's own files, of ours the whole package."""
    package = Path(secant.__file__).parent
    roots = {package, *(Path(x) for x in secant.kernels.__path__)}
    ours = [path for root in roots for path in root.rglob("*") if path.suffix in (".py", ".so", ".pyd")]
    here = [path for path in Path(__file__).parent.glob("*.py") if path.stem.startswith(("training_", "cart_pole"))]
    return {"backend": _digest(ours), "peer": _digest(here)}


#: What else a run depends on, of `machine.describe`.
ABOUT = ("cpu", "threads", "python", "torch", "device")


class Ledger:
    """Finished runs, in a file of JSON lines if there is one, so that a benchmark goes on where it was stopped.

    A line counts where it was written on such a machine with the same versions, and by the same code: of a peer the
    benchmark's, of ours the whole package's.

    Args:
        path: the file; None: runs are kept for this object only. about: of the machine, as `machine.describe` has it.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path = path
        self._about = {name: about.get(name) for name in ABOUT}
        self._versions = versions() if path is not None else {"backend": "", "peer": ""}
        self._runs: dict[Key, Run] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            data = json.loads(line)
        except ValueError:
            return  # the program was stopped while it wrote
        if data["about"] != self._about or data["version"] != self._versions[data["kind"]]:
            return
        key, curve = Key(*data["key"]), tuple((int(k), float(t), float(x)) for k, t, x in data["curve"])
        self._runs[key] = Run(key, curve, data["inside"], data["state"], data["validation"], data["failure"])

    def __contains__(self, key: Key) -> bool:
        return key in self._runs

    def __getitem__(self, key: Key) -> Run:
        """Return a run that is there."""
        return self._runs[key]

    def add(self, run: Run, kind: str) -> None:
        """Keep a run of ours ("backend") or of a peer ("peer")."""
        self._runs[run.key] = run
        if self.path is None:
            return
        line = {"about": self._about, "version": self._versions[kind], "kind": kind} | run._asdict()
        old = self.path.read_bytes()[-1:] if self.path.exists() else b""
        with self.path.open("a") as file:
            file.write(("\n" if old not in (b"", b"\n") else "") + json.dumps(line) + "\n")
