"""Training on mini-batches: steps and seconds to the loss of tuned AdamW and tuned Muon, and what noise does.

Every optimizer is tuned by as many runs, one for each rate of its own ladder, on the first start (two starts of the
pole, where luck weighs more); the best rate runs on the other starts. All of them warm up over the first twentieth and
follow a cosine to zero. A goal is the final error of the tuned optimizer of this name at the same start.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from secant.benchmarks import machine
from secant.benchmarks.case import Bar, Case, Check, Contender, Row, Wanted, WholeRun, everything, find, ratio
from secant.benchmarks.families import Choice, Family
from secant.benchmarks.race import thinned
from secant.benchmarks.report import Table, duration, times
from secant.benchmarks.timing import Timed, Timing
from secant.benchmarks.training_optimizers import (
    ADAMW,
    AT_DEFAULT,
    FLAGSHIP,
    MUON,
    NATURAL,
    OFTEN,
    OURS,
    PACKAGED,
    RATES,
    RAW,
    Entry,
    absent,
    entries,
)
from secant.benchmarks.training_runs import Key, Ledger, Run, train
from secant.benchmarks.training_tasks import HELD_OUT, TASKS

#: Starts of a task, of the pole, and of what only looks at noise.
STARTS, POLE_STARTS, NOISE_STARTS = 3, 5, 20
#: Tasks whose noise is looked at, and their steps.
NOISY, NOISE_STEPS = ("quadratic", "rotated", "mlp"), 300
#: Name of the choice of tasks that stands for them.
NOISE = "noise"
#: Steps of each optimizer before the first that are timed.
WARM_UP_STEPS = 3
POLE = "cartpole"
#: Tasks whose data are scikit-learn's.
DIGITS = ("autoencoder", "mlp", "cnn")
#: What can be chosen.
CHOICES = (*TASKS, NOISE)


class Start:
    """A task from the start of a seed."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device


@dataclasses.dataclass(frozen=True)
class Trained(WholeRun):
    """Runs on mini-batches. op: the task. steps: of a run. starts: each a seed."""

    steps: int
    starts: int

    FAILURE = "does not get there"
    #: Starts on which the rates are tried.
    TRIED: ClassVar[int] = 1

    @property
    def entries(self) -> dict[str, Entry]:
        """Return what runs here, by name, each with the rates that are tried: the middle ones of its ladder."""
        count = getattr(self, "rates", 1)
        found = {}
        for name, entry in entries(self.op).items():
            skipped = max(0, len(entry.rates) - count) // 2
            found[name] = entry._replace(rates=entry.rates[skipped : skipped + count])
        return found

    def names(self, device: torch.device) -> list[str]:
        """List the optimizers."""
        return list(self.entries)

    def problem(self, device: torch.device, seed: int = 0) -> Start:
        """Return where to start."""
        return Start(seed, device)

    def contender(self, problem: Start, name: str) -> Contender:
        """Prepare the one of this name, at its middle rate; timed as a whole run."""
        entry = self.entries[name]

        def call() -> Run:
            return train(self.op, entry, entry.default, problem.seed, problem.device, self.steps)

        return Contender(self, name, entry.kind, Timed([call]), call)

    def judge(self, problem: Start, contender: Contender, answer: Run) -> Check:
        """Compare the end with the start."""
        return Check(answer.final / answer.curve[0][2], 1.0)


@dataclasses.dataclass(frozen=True)
class Training(Trained):
    """A task to the final error of a tuned optimizer. goal: its name. rates: how many are tried."""

    rates: int
    goal: str

    @property
    def title(self) -> str:
        """Name task and goal."""
        return f"{TASKS[self.op].title}, {self.steps} steps, to tuned {self.goal}'s last {TASKS[self.op].measure}"

    def targets(self, tuned: Mapping[str, Sequence[Run]]) -> list[float]:
        """Return the error to reach from each start."""
        return [run.final for run in tuned[self.goal]]

    def score(self, run: Run) -> tuple[float, float]:
        """Say how good a rate is: the lower the better."""
        return run.final, 0.0


@dataclasses.dataclass(frozen=True)
class Solving(Trained):
    """The pole on a cart, to a mean return of 475. rates: how many are tried."""

    rates: int

    TRIED = 2

    @property
    def title(self) -> str:
        """Name the problem."""
        return f"{TASKS[self.op].title}, {self.steps * self.episodes} episodes at most, to a mean return of 475"

    @property
    def episodes(self) -> int:
        """Count those of a step."""
        found: int = TASKS[self.op].episodes  # type: ignore[attr-defined]  # of this task only
        return found

    def targets(self, tuned: Mapping[str, Sequence[Run]]) -> list[float]:
        """Return the error at which it is solved."""
        return [TASKS[self.op].target] * self.starts

    def score(self, run: Run) -> tuple[float, float]:
        """Say how good a rate is: by the steps, then by what is lacking."""
        there = run.reached(TASKS[self.op].target)
        return (math.inf if there is None else float(there[0])), run.final


@dataclasses.dataclass(frozen=True)
class Noise(Trained):
    """A task with every optimizer at its own defaults, without warm-up or schedule, from many starts."""

    FAILURE = "diverges"

    @property
    def title(self) -> str:
        """Name the task."""
        return f"{TASKS[self.op].title}, {self.steps} steps at defaults, {self.starts} starts"

    @property
    def entries(self) -> dict[str, Entry]:
        """Return each optimizer once."""
        return {name: entry for name, entry in super().entries.items() if not entry.key and name != OFTEN}

    def contender(self, problem: Start, name: str) -> Contender:
        """Prepare the one of this name, at its defaults."""
        entry = self.entries[name]

        def call() -> Run:
            return train(self.op, entry, None, problem.seed, problem.device, self.steps)

        return Contender(self, name, entry.kind, Timed([call]), call)


class Runs:
    """Makes the runs of cases on one task that are not in a ledger, where there is time.

    Args:
        total: runs that are wanted, for the progress. choice, ledger, device: of the family.
    """

    def __init__(self, total: int, choice: Choice, ledger: Ledger, device: torch.device) -> None:
        self.total, self.choice, self.ledger, self.device, self.done = total, choice, ledger, device, 0
        self.warm: set[str] = set()
        self.refused: set[str] = set()

    def get(self, case: Trained, entry: Entry, rate: float | None, seed: int, *, always: bool = False) -> Run | None:
        """Return a run, made now if it must be; None where time is over, unless `always`."""
        self.done += 1
        key = Key(case.op, entry.kept, rate, seed, case.steps)
        label = f"{case.op}: {entry.name}" + ("" if rate is None else f", rate {rate:g}") + f", start {seed}"
        if key not in self.ledger:
            if entry.name in self.refused or not (always or self.choice.allows(f"{case.op}: {entry.name}")):
                self.refused.add(entry.name)
                return None
            if entry.name not in self.warm:  # first calls import, choose and allocate
                self.warm.add(entry.name)
                train(case.op, entry, rate, seed, self.device, min(case.steps, WARM_UP_STEPS))
            self.ledger.add(train(case.op, entry, rate, seed, self.device, case.steps), entry.kind)
        self.choice.advance(self.done / self.total, label)
        return self.ledger[key]


def _wanted(case: Trained, choice: Choice, device: torch.device, wanted: Wanted, goals: Iterable[str]) -> list[Entry]:
    """List the optimizers, those that are goals first: without them there is nothing to reach."""
    found = case.entries
    names = [*goals, *(name for name in case.names(device) if name not in goals)]
    chosen = [name for name in names if name in goals or not choice.optimizers or name in choice.optimizers]
    return [found[name] for name in chosen if wanted(case, name)]


def tuned_rows(
    cases: Sequence[Any], device: torch.device, *, choice: Choice, ledger: Ledger, wanted: Wanted = everything
) -> list[Row]:
    """Tune every optimizer on a task, run its best rate from the other starts, and make the rows of all goals."""
    first = cases[0]
    goals = [case.goal for case in cases] if isinstance(first, Training) else []
    running = _wanted(first, choice, device, wanted, goals)
    total = sum(len(x.rates) * first.TRIED + first.starts - first.TRIED for x in running)
    runs = Runs(total, choice, ledger, device)
    always = running[0].name if running else ""
    tried: dict[str, dict[float, list[Run]]] = {}
    for entry in running:
        got = {
            rate: [
                runs.get(first, entry, rate, seed, always=entry.name == always)
                for seed in range(min(first.TRIED, first.starts))
            ]
            for rate in entry.rates
        }
        kept = {rate: [run for run in own if run is not None] for rate, own in got.items()}
        if all(None not in own for own in got.values()):
            tried[entry.name] = kept
    best = {name: _best(first, own) for name, own in tried.items()}
    tuned = {name: list(tried[name][rate]) for name, rate in best.items()}
    for seed in range(min(first.TRIED, first.starts), first.starts):  # all optimizers in turns
        for entry in running:
            if entry.name in tuned:
                run = runs.get(first, entry, best[entry.name], seed, always=entry.name == always)
                if run is None:
                    del tuned[entry.name]
                else:
                    tuned[entry.name].append(run)
    order = [name for name in first.names(device) if name in tuned]
    found = first.entries
    return [
        _row(case, found[name], best[name], tuned, tried[name], whole=case is first)
        for case in cases
        if not isinstance(case, Training) or case.goal in tuned
        for name in order
    ]


def _best(case: Any, tried: Mapping[float, Sequence[Run]]) -> float:
    """Return the rate of the best mean score; of those as good the lowest."""

    def score(rate: float) -> tuple[float, float]:
        first, second = zip(*(case.score(run) for run in tried[rate]), strict=True)
        return statistics.fmean(first), statistics.fmean(second)

    return min(tried, key=score)


def _over(error: float, target: float) -> float:
    """Divide an error by that to be reached, which may be zero."""
    return error / target if target > 0.0 else 1.0 if error <= target else math.inf


def _median(values: Iterable[float | None]) -> float | None:
    """Return the median; None where there are none or one of them is missing."""
    found = list(values)
    known = [x for x in found if x is not None]
    return statistics.median(known) if known and len(known) == len(found) else None


def _row(
    case: Any,
    entry: Entry,
    best: float,
    tuned: Mapping[str, Sequence[Run]],
    tried: Mapping[float, Sequence[Run]],
    *,
    whole: bool,
) -> Row:
    """Make the row of an optimizer and a goal.

    Args:
        case, entry, best: what, by whom, at which rate. tuned: the runs of everyone, from every start. tried: those of
            the rates. whole: with what is the same for every goal: curves, rates, times of a step.
    """
    runs, targets = tuned[entry.name], case.targets(tuned)
    there = [run.reached(target) for run, target in zip(runs, targets, strict=True)]
    lowest = [
        _over(min(x for _, _, x in run.curve if not math.isnan(x)), target)
        for run, target in zip(runs, targets, strict=True)
    ]
    got = [x for x in there if x is not None]
    timing = Timing(tuple(seconds for _, seconds in got)) if len(got) == len(there) else None
    everyone = {run.key: run for own in (*tried.values(), runs) for run in own}.values()
    diverged = [run for run in everyone if run.failure]
    notes = [] if timing is not None else [f"{len(got)} of {len(there)} starts"]
    if len(entry.rates) > 1 and best in (entry.rates[0], entry.rates[-1]):
        notes.append("best rate at the end of its ladder")
    notes += [f"{run.failure.partition(':')[0]}, rate {run.key.rate:g}" for run in diverged[:1]]
    figures: dict[str, Any] = {
        "rate": best,
        "steps": _median(x and x[0] for x in there),
        "steps_to": [x and x[0] for x in there],
        "finals": [run.final for run in runs],
    }
    curve: Sequence[tuple[float, float]] = ()
    if whole:
        steps = [max(1, run.steps) for run in runs]
        middle = sorted(range(len(runs)), key=lambda i: runs[i].final)[len(runs) // 2]
        base = tuned.get(ADAMW)
        curve = thinned([(seconds, error) for _, seconds, error in runs[middle].curve])
        figures |= {
            "seconds": [run.seconds for run in runs],
            "at_equal_seconds": None
            if base is None
            else [run.at(x.seconds) for run, x in zip(runs, base, strict=True)],
            "validation": _median(run.validation for run in runs),
            "optimizer_ms": _median(1e3 * run.inside / k for run, k in zip(runs, steps, strict=True)),
            "model_ms": _median(1e3 * (run.seconds - run.inside) / k for run, k in zip(runs, steps, strict=True)),
            "state": runs[0].state,
            "runs": len(everyone),
            "diverged": len(diverged),
            "rates": [(rate, statistics.fmean(run.final for run in own)) for rate, own in tried.items()],
            "by_step": thinned([(float(step), error) for step, _, error in runs[middle].curve]),
        }
    return Row(case, entry.name, entry.kind, timing, max(lowest), 1.0, "; ".join(notes), 1, tuple(curve), figures)


def noise_rows(
    cases: Sequence[Noise], device: torch.device, *, choice: Choice, ledger: Ledger, wanted: Wanted = everything
) -> list[Row]:
    """Run every optimizer at its defaults from every start, and count what diverges."""
    [case] = cases
    running = _wanted(case, choice, device, wanted, [])
    runs = Runs(len(running) * case.starts, choice, ledger, device)
    rows = []
    for i, entry in enumerate(running):
        got = [runs.get(case, entry, None, seed, always=i == 0) for seed in range(case.starts)]
        own = [run for run in got if run is not None]
        if len(own) < case.starts:
            continue
        diverged = [run for run in own if run.failure]
        worst = max(run.final / run.curve[0][2] for run in own)
        timing = None if diverged else Timing(tuple(run.seconds for run in own))
        note = f"{len(diverged)} of {len(own)} diverge: {diverged[0].failure}" if diverged else ""
        figures = {
            "diverged": len(diverged),
            "finals": [run.final for run in own],
            "failures": sorted({run.failure for run in diverged}),
        }
        rows.append(Row(case, entry.name, entry.kind, timing, worst, 1.0, note, 1, (), figures))
    return rows


def _has_data(task: str) -> bool:
    return task not in DIGITS or importlib.util.find_spec("sklearn") is not None


def groups_of(choice: Choice) -> Callable[..., list[Sequence[Case]]]:
    """Make what lists the chosen tasks."""

    def groups(device: torch.device, *, quick: bool = False, full: bool = False) -> list[Sequence[Case]]:
        """List what `python -m secant bench --family training` measures, a group a task."""
        chosen = choice.tasks or (("quadratic",) if quick else CHOICES)
        found: list[Sequence[Case]] = []
        for name in chosen:
            if name == NOISE:
                starts, steps = (1, 20) if quick else (NOISE_STARTS, NOISE_STEPS)
                found += [[Noise(op, steps, starts)] for op in NOISY if _has_data(op)]
                continue
            if not _has_data(name):
                continue
            task = TASKS[name]
            steps, rates = (task.quick_steps, 1) if quick else (task.steps, RATES)
            if name == POLE:
                found.append([Solving(name, steps, 1 if quick else choice.starts or POLE_STARTS, rates)])
                continue
            starts = 1 if quick else choice.starts or STARTS
            goals = [goal for goal in (ADAMW, MUON) if goal in entries(name)]
            found.append([Training(name, steps, starts, rates, goal) for goal in goals])
        return found

    return groups


def choose(choice: Choice) -> Family:
    """Make the family of some tasks, optimizers and starts, with runs kept in a file."""
    ledgers: dict[torch.device, Ledger] = {}

    def measure(
        cases: Sequence[Any], device: torch.device, *, seconds: float, wanted: Wanted = everything
    ) -> list[Row]:
        """Make the rows of a task; a run takes what it takes, whatever the seconds."""
        if device not in ledgers:
            ledgers[device] = Ledger(choice.runs, machine.describe(device))
        make = noise_rows if isinstance(cases[0], Noise) else tuned_rows
        return make(cases, device, choice=choice, ledger=ledgers[device], wanted=wanted)

    return Family("Training on mini-batches", 1.0, groups_of(choice), bars, measure, choose, tables)


def _of(row: Row | None, name: str) -> Any:
    return None if row is None else row.figures.get(name)


def _share(ours: Row | None, theirs: Row | None, name: str) -> float | None:
    """Divide steps or seconds of ours by theirs; infinity where ours does not get there."""
    if ours is None or theirs is None:
        return None
    if ours.timing is None:
        return math.inf
    if name == "seconds":
        return ratio(ours, theirs)
    steps, other = _of(ours, "steps"), _of(theirs, "steps")
    return None if not other else steps / other


def _episodes(ours: Row | None, theirs: Row | None) -> float | None:
    """Divide the median episodes until the problem is solved; a start from which it never is counts as infinity."""
    if ours is None or theirs is None:
        return None
    mine, other = (
        statistics.median(math.inf if x is None else x for x in row.figures["steps_to"]) for row in (ours, theirs)
    )
    return None if math.isinf(other) else mine / other


def _flagship_bars(rows: Sequence[Row], task: str, cases: Mapping[tuple[str, str], Training]) -> list[Bar]:
    """Set the bars of the flagship at its default rate on the transformer and on the autoencoder."""
    adamw, muon = cases.get((task, ADAMW)), cases.get((task, MUON))
    if adamw is None:
        return []
    name = FLAGSHIP + AT_DEFAULT
    ours, base, other = find(rows, adamw, name), find(rows, adamw, ADAMW), find(rows, adamw, MUON)
    why = "not measured" if FLAGSHIP in adamw.entries else f"{FLAGSHIP} is not in this version"
    found: list[Bar] = []

    def bar(measure: str, target: float, value: float | None, *, at_least: bool = False, unit: str = "") -> None:
        found.append(Bar(f"{TASKS[task].title}: {measure}", target, at_least, value, why, adamw, unit))

    def lacking(a: Row | None, b: Row | None) -> float | None:
        pairs = zip(_of(a, "finals") or (), _of(b, "finals") or (), strict=True)
        return min((y - x for x, y in pairs), default=None) if a is not None and b is not None else None

    if task == "autoencoder":
        finals = _of(ours, "finals")
        bar(f"{name}, last loss on every start", 0.31, finals and max(finals))
        bar(f"{name} to tuned {ADAMW}'s last loss, share of its time", 0.50, _share(ours, base, "seconds"))
        return found
    bar(f"{name} to tuned {ADAMW}'s last loss, share of its steps", 0.45, _share(ours, base, "steps"))
    bar("the same, share of its time", 0.50, _share(ours, base, "seconds"))
    if muon is not None:
        mine, theirs = find(rows, muon, name), find(rows, muon, MUON)
        bar(f"{name} to tuned {MUON}'s last loss, share of its time", 0.90, _share(mine, theirs, "seconds"))
    bar(f"last loss below that of tuned {MUON} by, on every start", 0.03, lacking(ours, other), at_least=True)
    rates = [error for rate, error in _of(find(rows, adamw, FLAGSHIP), "rates") or () if 3e-3 <= rate <= 3e-2]
    best = min((error for _, error in _of(base, "rates") or ()), default=None)
    worst = max(rates) / best if rates and best else None
    bar(f"every rate of {FLAGSHIP} from 3e-3 to 3e-2, last loss over {ADAMW}'s best", 1.0, worst)
    known = [row for row in (other, base) if row is not None and "optimizer_ms" in row.figures]
    beside = ", ".join(f"{row.name} {row.figures['optimizer_ms']:.2g}" for row in known)
    beside = f" ({beside} in the same run)" if beside else ""
    for who, target in ((name, 1.2), (OFTEN, 2.5)):
        row = find(rows, adamw, who)
        bar(f"milliseconds a step in {who}{beside}", target, _of(row, "optimizer_ms"), unit=" ms")
    package = find(rows, adamw, PACKAGED)
    if package is not None:
        share = _of(ours, "optimizer_ms") / _of(package, "optimizer_ms") if ours is not None else None
        bar(f"milliseconds a step in {name} over those in {PACKAGED}, same blocks and refreshes", 1.0 / 3.0, share)
    return found


def bars(rows: Sequence[Row], device: torch.device, bandwidth: float = 0.0) -> list[Bar]:
    """Set what was to be reached on two cores."""
    cases = {(row.case.op, row.case.goal): row.case for row in rows if isinstance(row.case, Training)}
    full = {key: case for key, case in cases.items() if case.steps == TASKS[case.op].steps}
    found = [bar for task in ("characters", "autoencoder") for bar in _flagship_bars(rows, task, full)]
    noisy = [row.case for row in rows if isinstance(row.case, Noise) and row.case.starts == NOISE_STARTS]
    for noise in dict.fromkeys(noisy):
        own = [row for row in rows if row.case == noise]
        ours = [row for row in own if row.kind == "backend" and row.name in OURS]
        diverged = float(sum(row.figures["diverged"] for row in ours)) if ours else None
        measure = f"{noise.title}: divergences of ours ({', '.join(row.name for row in ours)})"
        found.append(Bar(measure, 0.0, False, diverged, "none of ours is in this version", noise))
        if (raw := find(own, noise, RAW)) is not None:
            measure = f"{noise.title}: divergences of {RAW}, pairs from changing batches"
            found.append(Bar(measure, 1.0, True, float(raw.figures["diverged"]), case=noise))
    poles = [row.case for row in rows if isinstance(row.case, Solving) and row.case.steps == TASKS[POLE].steps]
    for pole in dict.fromkeys(poles):
        value = _episodes(find(rows, pole, NATURAL), find(rows, pole, ADAMW))
        measure = f"{TASKS[pole.op].title}: episodes of {NATURAL} over tuned {ADAMW}'s, median of {pole.starts} starts"
        found.append(Bar(measure, 0.60, False, value, f"{ADAMW} does not solve it", pole))
    return found


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _spread(values: Sequence[float]) -> str:
    """Write the median and the smallest and largest."""
    middle = statistics.median(values)
    return f"{middle:.3g}" if len(values) == 1 else f"{middle:.3g} ({min(values):.3g} to {max(values):.3g})"


def tables(title: str, rows: Sequence[Row], bandwidth: float | None, bars: Sequence[Bar] = ()) -> list[Table]:
    """Show a table a task, a line an optimizer."""
    found = []
    for op in dict.fromkeys(row.case.op for row in rows if not isinstance(row.case, Noise)):
        own = [row for row in rows if row.case.op == op and not isinstance(row.case, Noise)]
        cases = list(dict.fromkeys(row.case for row in own))
        found.append(_task_table(title, cases, own))
    noisy = [row for row in rows if isinstance(row.case, Noise)]
    if noisy:
        lines = [
            (row.case.title, row.name, str(row.figures["diverged"]), _spread(row.figures["finals"]), row.note)
            for row in noisy
        ]
        found.append(
            Table(f"{title}: noise, everyone at defaults", ("task", "by", "diverged", "last error", ""), lines)
        )
    missing = [*absent(), *(["the digits: pip install scikit-learn"] if not _has_data("mlp") else [])]
    if missing and found:
        found[-1] = found[-1]._replace(notes=(*found[-1].notes, "Not here: " + "; ".join(missing) + "."))
    return found


def _task_table(title: str, cases: Sequence[Any], rows: Sequence[Row]) -> Table:
    first = cases[0]
    task = TASKS[first.op]
    goals = [getattr(case, "goal", "solved") for case in cases]
    columns = (
        "by", "rate", f"last {task.measure}", "other data", f"in {ADAMW}'s time",
        *(f"{what} to {goal}" for goal in goals for what in ("steps", "time")),
        "model ms", "own ms", "state", "diverged", "",
    )  # fmt: skip
    lines = []
    for row in (row for row in rows if row.case == first):
        figures = row.figures
        reached = []
        for case in cases:
            own = find(rows, case, row.name)
            steps = _of(own, "steps")
            got = [x for x in _of(own, "steps_to") or () if x is not None]
            partly = f"{len(got)} of {case.starts}" if got else "-"
            reached += [partly if steps is None else _number(steps), duration(None if own is None else own.seconds)]
        equal = figures["at_equal_seconds"]
        lines.append(
            (
                row.name,
                f"{figures['rate']:g}",
                _spread(figures["finals"]),
                _number(figures["validation"]),
                "-" if not equal else f"{statistics.median(equal):.3g}",
                *reached,
                _number(figures["model_ms"]),
                _number(figures["optimizer_ms"]),
                times(figures["state"]),
                f"{figures['diverged']} of {figures['runs']}",
                "; ".join(note for note in row.note.split("; ") if not note.endswith(" starts")),
            )
        )
    notes = (
        f"Medians of {first.starts} starts, lowest and highest in brackets; each tuned over {first.rates} rates"
        f"{'; no default was tuned on this task' if first.op == HELD_OUT else ''}.",
        "own ms: of a step, outside the model. state: its bytes over those of the parameters.",
    )
    return Table(f"{title}: {task.title}, {first.steps} steps", columns, lines, notes)


FAMILY = choose(Choice())
