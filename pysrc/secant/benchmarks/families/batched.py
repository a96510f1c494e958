"""Thousands of small problems at once, against loops over one after the other; and what the machinery of it costs.

A unit is a problem. Ours solve all of them in one call; a loop is timed on the first of them, which are drawn like the
rest, and what is compared with its results is compared on those that it has solved. Both have the same derivatives in
closed form and the same tolerances, unless a name says otherwise.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import secant
from secant.benchmarks import batched_problems as problems
from secant.benchmarks.case import (
    Around,
    Bar,
    Case,
    Check,
    Contender,
    Row,
    Wanted,
    WholeRun,
    everything,
    find,
    speed_bar,
)
from secant.benchmarks.families import Family
from secant.benchmarks.report import Table, rows_table
from secant.benchmarks.timing import Timed, Timing, clock_for, interleaved

#: On the largest component of a gradient, with no other end; more iterations than any problem takes.
GTOL, ITERATIONS = 1e-7, 2000
#: Problems of a loop that are solved to be compared, and those that are timed, at most, by the device of ours: a GPU
#: does not wait for a loop on a CPU. Those of a short run.
COMPARED, TIMED, FEW = {"cpu": 1000, "cuda": 50}, {"cpu": 200, "cuda": 50}, 20
#: A value is another one if it differs by more; and that of another minimum, of which Rosenbrock's function has two.
SAME, ELSEWHERE = 1e-8, 1.0
#: Parameters of a fit are those of scipy's within so much of each; tolerances of all that are timed.
SAME_FIT, FIT_TOLERANCE = 1e-6, 1e-10
#: Iterations of an arm: what has not arrived then is at rest elsewhere, or creeps along a limit.
ARM_ITERATIONS = 200
#: A cluster is the global minimum if its energy is so near to it.
SAME_ENERGY = 1e-4
#: Rounds of the machinery that are timed, and pairs.
ROUNDS, PAIRS = 30, 10

#: What Gpufit publishes of its own code for a CPU.
PUBLISHED = (
    "Gpufit publishes 60,957 fits a second for its Cpufit: 5 x 5 pixels, 5 parameters, float32, tolerance 1e-4, "
    "at most 10 iterations, on a processor it does not name (examples/Gpufit_Cpufit_Performance_Comparison_readme.txt)."
)


class Ends(NamedTuple):
    """Where the first problems have ended: x (m, n), values (m,), whether each has converged (m,); what else is known.

    figures: plain data by name.
    """

    x: Tensor
    value: Tensor
    good: Tensor
    figures: Mapping[str, Any] = {}


#: Solves the first so many problems.
Solve = Callable[[int], Ends]


class Task(abc.ABC):
    """Many problems, made anew by a seed.

    count: of problems. n: variables of each. device: where.
    """

    #: What ours and peers are called, ours first.
    OURS: ClassVar[tuple[str, ...]] = ("secant", "secant, autograd")
    PEERS: ClassVar[Mapping[str, str]] = {"scipy": "scipy"}
    #: How large a share need not converge for times to be given.
    LEFT: ClassVar[float] = 0.0

    def __init__(self, count: int, n: int, device: torch.device, seed: int) -> None:
        self.count, self.n, self.device, self.seed = count, n, device, seed

    @abc.abstractmethod
    def solve(self, name: str, count: int) -> Ends:
        """Solve the first problems by the one of this name."""

    @functools.cached_property
    def known(self) -> Ends | None:
        """Return where scipy ends on those that are compared; None where it is not installed."""
        return self.solve("scipy", min(self.count, COMPARED[self.device.type])) if _has("scipy") else None

    def error(self, ends: Ends) -> tuple[float, float]:
        """Measure what is wrong with some ends, and how much may be."""
        return 1.0 - float(ends.good.double().mean()), self.LEFT

    def figures(self, ends: Ends) -> dict[str, Any]:
        """Count."""
        return {"problems": len(ends.good), "converged": int(ends.good.sum()), **ends.figures}


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _descended(
    fun: Callable[..., Any], x0: Tensor, *, jac: bool | None = True, bounds: Any = None, iterations: int = ITERATIONS
) -> Ends:
    """Minimize by ours, and count what is evaluated."""
    rows = 0

    def counted(x: Tensor, *, index: Tensor) -> Any:
        nonlocal rows
        rows += len(x)
        return fun(x, index)

    options = {"gtol": GTOL, "ftol": 0.0, "maxiter": iterations}
    method = "l-bfgs" if bounds is None else "l-bfgs-b"
    found = secant.minimize(counted, x0, batch=True, method=method, jac=jac, bounds=bounds, options=options)
    # An end that rounding has set is one, too, where the gradient is small enough for scipy's default.
    size = found.jac if bounds is None else found.x - (found.x - found.jac).clamp(*_sides(bounds, x0))
    good = size.abs().amax(-1) <= 10.0 * GTOL
    wasted = 1.0 - float(found.nfev.double().sum()) / rows
    return Ends(found.x.cpu(), found.fun.double().cpu(), good.cpu(), {"wasted": wasted, "rows": rows})


def _sides(bounds: Sequence[tuple[float, float]], x: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper = (torch.tensor(side).to(x) for side in zip(*bounds, strict=True))
    return lower, upper


def _looped(
    one: Callable[..., Any], x0: Tensor, *more: Tensor, bounds: Any = None, iterations: int = ITERATIONS
) -> Ends:
    """Minimize one after the other by scipy's L-BFGS-B; `one` gives value and gradient."""
    import numpy as np
    from scipy.optimize import minimize

    options = {"gtol": GTOL, "ftol": 0.0, "maxiter": iterations, "maxfun": 10 * iterations}
    found_x, found_values, found_sizes = [], [], []
    low, high = (-np.inf, np.inf) if bounds is None else np.array(bounds).T
    for row in zip(*(part.cpu().numpy() for part in (x0, *more)), strict=True):
        found = minimize(one, row[0], row[1:], jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        found_x.append(found.x)
        found_values.append(found.fun)
        found_sizes.append(np.abs(np.clip(found.x - found.jac, low, high) - found.x).max())
    x, values, sizes = (torch.from_numpy(np.array(part)) for part in (found_x, found_values, found_sizes))
    return Ends(x, values, sizes <= 10.0 * GTOL)


def _botorch(fun: Callable[..., Any], x0: Tensor, bounds: Any = None, iterations: int = ITERATIONS) -> Ends:
    """Minimize by botorch's L-BFGS-B, which evaluates in batches and loops over the rest."""
    from botorch.optim.batched_lbfgs_b import (  # type: ignore[import-not-found,unused-ignore]
        fmin_l_bfgs_b_batched,
    )

    def call(x: Any, batch_indices: Sequence[int]) -> tuple[Any, Any]:
        value, g = fun(torch.from_numpy(x), torch.tensor(batch_indices))
        return value.numpy(), g.numpy()

    x, values, each = fmin_l_bfgs_b_batched(
        call, x0.cpu().numpy(), bounds, factr=None, ftol=0.0, pgtol=GTOL, maxiter=iterations, pass_batch_indices=True
    )
    size = torch.stack([torch.as_tensor(result.jac) for result in each]).abs().amax(-1)
    return Ends(torch.from_numpy(x), torch.from_numpy(values), size <= 10.0 * GTOL)


def _jaxopt(fun: Callable[[Any], Any], x0: Tensor) -> Ends:
    """Minimize by jaxopt's L-BFGS under vmap and jit: all go on as long as the slowest."""
    import jax  # type: ignore[import-not-found,unused-ignore]
    import jaxopt  # type: ignore[import-not-found,unused-ignore]
    import numpy as np

    jax.config.update("jax_enable_x64", True)
    run = _jitted(fun, jax, jaxopt)
    x, size = (torch.from_numpy(np.array(part)) for part in run(jax.numpy.asarray(x0.cpu().numpy())))
    values = torch.from_numpy(np.array(jax.vmap(fun)(jax.numpy.asarray(x.numpy()))))
    return Ends(x, values, size <= 10.0 * GTOL)


@functools.cache
def _jitted(fun: Callable[[Any], Any], jax: Any, jaxopt: Any) -> Callable[[Any], tuple[Any, Any]]:
    solver = jaxopt.LBFGS(fun, maxiter=ITERATIONS, tol=GTOL, history_size=20, linesearch="zoom")

    def one(x: Any) -> tuple[Any, Any]:
        found = solver.run(x)
        return found.params, abs(jax.grad(fun)(found.params)).max()

    run: Callable[[Any], tuple[Any, Any]] = jax.jit(jax.vmap(one))
    return run


class Formula(NamedTuple):
    """A function of x: of rows (b, n) its values, and these with gradients; of one row in numpy both; in jax."""

    value: Callable[[Tensor], Tensor]
    value_grad: Callable[[Tensor], tuple[Tensor, Tensor]]
    one: Callable[..., Any]
    jax: Callable[[Any], Any]


class Descent(Task):
    """One function from many starts."""

    PEERS: ClassVar[Mapping[str, str]] = {"scipy": "scipy", "botorch": "botorch", "jaxopt": "jaxopt"}
    FORMULA: ClassVar[Formula]

    @functools.cached_property
    @abc.abstractmethod
    def start(self) -> Tensor:
        """Draw the starts."""

    def solve(self, name: str, count: int) -> Ends:
        """Solve the first problems by the one of this name."""
        x0, formula = self.start[:count], self.FORMULA
        if name == "scipy":
            return _looped(formula.one, x0)
        if name == "botorch":
            return _botorch(lambda x, index: formula.value_grad(x), x0)
        if name == "jaxopt":
            return _jaxopt(formula.jax, x0)
        if name == "secant":
            return _descended(lambda x, index: formula.value_grad(x), x0)
        return _descended(lambda x, index: formula.value(x), x0, jac=None)


def _rosenbrock_jax(x: Any) -> Any:
    return (100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2).sum()


class Rosenbrock(Descent):
    """Rosenbrock's function from random starts."""

    FORMULA = Formula(problems.rosenbrock, problems.rosenbrock_value_grad, problems.rosenbrock_one, _rosenbrock_jax)

    @functools.cached_property
    def start(self) -> Tensor:
        """Draw the starts."""
        return problems.rosenbrock_starts(self.count, self.n, self.seed).to(self.device)

    def figures(self, ends: Ends) -> dict[str, Any]:
        """Compare values with those of scipy from the same starts."""
        found = super().figures(ends)
        if self.known is not None:
            count = min(len(ends.value), len(self.known.value))
            both = ends.good[:count] & self.known.good[:count]
            gap = (ends.value[:count] - self.known.value[:count]).abs()[both]
            found |= {
                "compared": int(both.sum()),
                "differ": int((gap > SAME).sum()),
                "elsewhere": int((gap > ELSEWHERE).sum()),
                "converged_compared": int(ends.good[:count].sum()),
                "scipy_converged": int(self.known.good[:count].sum()),
                "best": int((ends.value[:count] < 1e-6).sum()),
                "scipy_best": int((self.known.value[:count] < 1e-6).sum()),
            }
        return found


class Peaks(Task):
    """Gaussian peaks fitted to noisy images; n pixels of a side."""

    OURS = ("secant, compiled", "secant", "secant, jac")

    @functools.cached_property
    def peaks(self) -> problems.Peaks:
        """Draw the images."""
        return problems.Peaks(*(x.to(self.device) for x in problems.peaks(self.count, self.n, self.seed)))

    def solve(self, name: str, count: int) -> Ends:
        """Fit the first images by the one of this name."""
        own = self.peaks
        ends: dict[str, Any] = dict.fromkeys(("ftol", "xtol", "gtol"), FIT_TOLERANCE)
        if name == "scipy":
            return self._scipy(count, **ends)
        given: dict[str, Any] = {"secant, compiled": {"compile": True}, "secant, jac": {"jac": problems.peak_jac}}
        found = secant.curve_fit(
            problems.peak, (own.x, own.y), own.data[:count], own.start[:count], **ends, **given.get(name, {})
        )
        return Ends(found.popt.cpu(), found.status.double().cpu(), (found.status <= secant.Status.SMALL_CHANGE).cpu())

    def _scipy(self, count: int, **options: Any) -> Ends:
        import numpy as np
        from scipy.optimize import curve_fit

        own = self.peaks
        at = np.stack([own.x.cpu().numpy(), own.y.cpu().numpy()])
        pairs = zip(own.data[:count].cpu().numpy(), own.start[:count].cpu().numpy(), strict=True)
        x = [curve_fit(problems.peak_one, at, y, p, **options)[0] for y, p in pairs]
        done = torch.ones(count, dtype=torch.bool)
        return Ends(torch.from_numpy(np.array(x)), done.double(), done)

    @functools.cached_property
    def known(self) -> Ends | None:
        """Fit by scipy, as near to the optimum as it gets."""
        tight = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-14)
        return self._scipy(min(self.count, COMPARED[self.device.type]), **tight) if _has("scipy") else None

    def error(self, ends: Ends) -> tuple[float, float]:
        """Compare parameters with those of scipy; of a width the sign is no matter."""
        if self.known is None:
            return super().error(ends)
        count = min(len(ends.x), len(self.known.x))
        want = self.known.x[:count].abs()
        return float(((ends.x[:count].abs() - want).abs() / want).max()), SAME_FIT


class Arm(Task):
    """An arm of seven joints, with limits, to reach goals."""

    OURS = ("secant",)
    PEERS: ClassVar[Mapping[str, str]] = {"scipy": "scipy", "botorch": "botorch"}
    LEFT = 1.0
    BOUNDS: ClassVar[tuple[tuple[float, float], ...]] = tuple((-x, x) for x in problems.LIMITS)

    @functools.cached_property
    def goals(self) -> problems.Goals:
        """Draw goals and starts."""
        return problems.Goals(*(x.to(self.device) for x in problems.goals(self.count, self.seed)))

    def solve(self, name: str, count: int) -> Ends:
        """Reach the first goals by the one of this name."""
        goal, start = self.goals.goal, self.goals.start[:count]
        iterations = ARM_ITERATIONS if self.count > FEW else FEW  # a short run need not arrive
        limits: dict[str, Any] = {"bounds": self.BOUNDS, "iterations": iterations}
        if name == "scipy":
            return _looped(problems.reach_one, start, goal[:count], **limits)
        if name == "botorch":
            return _botorch(lambda q, index: problems.reach_value_grad(q, goal[index]), start, **limits)
        return _descended(lambda q, index: problems.reach_value_grad(q, goal[index]), start, **limits)

    def figures(self, ends: Ends) -> dict[str, Any]:
        """Count the goals that are met."""
        found = super().figures(ends) | {"met": float((ends.value <= problems.MET).double().mean())}
        if self.known is not None:
            count = min(len(ends.value), len(self.known.value))
            found["met_compared"] = float((ends.value[:count] <= problems.MET).double().mean())
            found["scipy_met"] = float((self.known.value[:count] <= problems.MET).double().mean())
        return found


def _lennard_jones_jax(x: Any) -> Any:
    first, second = (part.numpy() for part in torch.triu_indices(len(x) // 3, len(x) // 3, 1))
    at = x.reshape(-1, 3)
    six = ((at[first] - at[second]) ** 2).sum(-1) ** -3
    return 4.0 * (six * six - six).sum()


class Clusters(Descent):
    """Clusters of atoms relaxed from random places; n: three times the atoms."""

    # Under vmap all go on as long as the slowest: jaxopt takes a second for each of a hundred clusters.
    PEERS: ClassVar[Mapping[str, str]] = {"scipy": "scipy", "botorch": "botorch"}
    LEFT = 0.01
    FORMULA = Formula(
        problems.lennard_jones, problems.lennard_jones_value_grad, problems.lennard_jones_one, _lennard_jones_jax
    )

    @functools.cached_property
    def start(self) -> Tensor:
        """Draw the clusters."""
        return problems.clusters(self.count, self.n // 3, self.seed).to(self.device)

    def figures(self, ends: Ends) -> dict[str, Any]:
        """Count the clusters that are the best there is."""

        def best(value: Tensor) -> int:
            return int((value < problems.LJ13 + SAME_ENERGY).sum())

        found = super().figures(ends) | {"best": best(ends.value)}
        if self.known is not None:
            count = min(len(ends.value), len(self.known.value))
            found |= {"best_compared": best(ends.value[:count]), "scipy_best": best(self.known.value[:count])}
        return found


TASKS: Mapping[str, type[Task]] = {
    "Rosenbrock": Rosenbrock,
    "Gaussian peaks": Peaks,
    "inverse kinematics": Arm,
    "Lennard-Jones clusters": Clusters,
}


@dataclasses.dataclass(frozen=True)
class Many(WholeRun):
    """Many problems at once. op: of `TASKS`. count: problems. n: of each, as the task has it."""

    count: int
    n: int

    UNIT = "problem"
    FAILURE = "does not solve them"

    @property
    def title(self) -> str:
        """Name the task."""
        return f"{self.count:,} x {self.op}, n = {self.n}"

    @property
    def units(self) -> int:
        """Count the problems."""
        return self.count

    def problem(self, device: torch.device, seed: int = 0) -> Task:
        """Draw them."""
        return TASKS[self.op](self.count, self.n, device, seed)

    def names(self, device: torch.device) -> list[str]:
        """List ours, then what is installed."""
        task = TASKS[self.op]
        short = self.count <= FEW
        peers = [name for name, module in task.PEERS.items() if _has(module)]
        return [*(name for name in task.OURS if not (short and name.endswith("compiled"))), *peers]

    def contender(self, problem: Task, name: str) -> Contender:
        """Prepare the one of this name; ours are timed on all problems, a loop on the first."""
        ours = name in problem.OURS
        loop = name in ("scipy", "botorch")
        units = min(self.count, TIMED[problem.device.type]) if loop else self.count
        timed = Timed([functools.partial(problem.solve, name, units)])
        first = min(self.count, COMPARED[problem.device.type])
        probe = functools.partial(problem.solve, name, first if loop else self.count)
        return Contender(self, name, "backend" if ours else "peer", timed, probe, units=units)

    def judge(self, problem: Task, contender: Contender, answer: Ends) -> Check:
        """Compare as the task does."""
        return Check(*problem.error(answer))


@dataclasses.dataclass(frozen=True)
class Rounds(WholeRun):
    """What "l-bfgs" does outside of the function, of many problems that all go on. pairs: kept of each. rounds: timed.

    The limit is what must move: the pairs read once, one of them written; the point, the gradient, the direction and
    the trial read and written.
    """

    count: int
    n: int
    pairs: int
    rounds: int

    UNIT = "round"

    @property
    def title(self) -> str:
        """Name the sizes."""
        return f"{self.op}, {self.count:,} problems, n = {self.n}, {self.pairs} pairs"

    @property
    def nbytes(self) -> int:
        """Count the bytes of one round, in float64."""
        return 8 * self.count * self.n * (2 * self.pairs + 2 + 8)

    @property
    def flops(self) -> float:
        """Count the recursion, the new pair with its products, and x + t d."""
        return float(self.count * self.n * (8 * self.pairs + 11))

    @property
    def units(self) -> int:
        """Count the rounds."""
        return self.rounds

    def problem(self, device: torch.device, seed: int = 0) -> Tensor:
        """Draw starts of Rosenbrock's function, none of which is solved in so few rounds."""
        return problems.rosenbrock_starts(self.count, self.n, seed).to(device)

    def names(self, device: torch.device) -> list[str]:
        """List ours, and the same in operations of torch."""
        return ["secant", "torch ops"]

    def contender(self, problem: Tensor, name: str) -> Contender:
        """Prepare the one of this name; the answer says how often the function was called for all, and for fewer."""
        calls = fewer = 0
        inside = 0.0

        def fun(x: Tensor, *, index: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls, fewer, inside
            begin = time.perf_counter()
            found = problems.rosenbrock_value_grad(x)
            if problem.device.type == "cuda":
                torch.cuda.synchronize()
            inside += time.perf_counter() - begin
            calls, fewer = calls + 1, fewer + (len(x) < self.count)
            if calls > self.rounds:
                raise _Over
            return found

        def call() -> tuple[int, int]:
            nonlocal calls, fewer, inside
            calls, fewer, inside = 0, 0, 0.0
            with contextlib.suppress(_Over):
                options = {"gtol": 0.0, "ftol": 0.0, "maxcor": self.pairs}
                secant.minimize(fun, problem, batch=True, method="l-bfgs", jac=True, options=options)
            return calls, fewer

        around: Around = contextlib.nullcontext
        if name == "torch ops":
            around = functools.partial(secant.use_backend, "reference")
        timed = Timed([call], around, lambda clock: inside)
        kind = "backend" if name == "secant" else "peer"
        return Contender(self, name, kind, timed, call, units=self.rounds)

    def judge(self, problem: Tensor, contender: Contender, answer: tuple[int, int]) -> Check:
        """See that all rounds were of all problems; the first call is that at the start."""
        calls, fewer = answer
        return Check(float(abs(calls - self.rounds - 1) + fewer), 0.5)


class _Over(Exception):
    """Ends a run after enough rounds."""


def measured(cases: Sequence[Any], device: torch.device, *, seconds: float, wanted: Wanted = everything) -> list[Row]:
    """Solve by each contender once, then time those that are right in turns; a row each, with what was counted."""
    [case] = cases
    problem = case.problem(device)
    checked: list[tuple[Contender, Check, dict[str, Any]]] = []
    for one in case.contenders(problem, wanted):
        figures: dict[str, Any] = {}
        try:
            with one.timed.around():
                answer = one.probe()
            check = case.judge(problem, one, answer)
            if isinstance(problem, Task):
                figures = problem.figures(answer)
        except Exception as failure:
            if one.kind == "backend":
                raise
            check = Check(float("nan"), float("nan"), f"failed: {type(failure).__name__}")
        checked.append((one, check, figures))
    right = {one.name: one.timed for one, check, _ in checked if check.error <= check.bound}
    timings = interleaved(right, clock_for(device), seconds=seconds)
    rows = []
    for one, check, figures in checked:
        timing: Timing | None = timings.get(one.name)
        part = "" if one.units == case.units else f"timed on {one.units:,} of {case.units:,} {case.UNIT}s, scaled"
        note = part if timing is not None else check.failure or case.FAILURE
        per = None if timing is None else timing.per(one.units)
        rows.append(Row(case, one.name, one.kind, per, check.error, check.bound, note, one.units, (), figures))
    return rows


ROSENBROCK = Many("Rosenbrock", 1000, 10)
PEAKS = Many("Gaussian peaks", 40_000, problems.SIDE)
ARM = Many("inverse kinematics", 10_000, 7)
CLUSTERS = Many("Lennard-Jones clusters", 1000, 39)
ROUND = Rounds("a round outside of the function", 10_000, 10, PAIRS, ROUNDS)
#: Problems that fill a GPU.
FILLED = 100_000


def groups(device: torch.device, *, quick: bool = False, full: bool = False) -> list[Sequence[Case]]:
    """List what `python -m secant bench` measures."""
    if quick:
        return [
            *([Many(case.op, FEW, case.n)] for case in (ROSENBROCK, PEAKS, ARM, CLUSTERS)),
            [Rounds(ROUND.op, 50, 10, 5, 5)],
        ]
    if device.type == "cuda":
        many = (dataclasses.replace(case, count=FILLED) for case in (ROSENBROCK, PEAKS, ARM, CLUSTERS))
        return [[ROUND], [dataclasses.replace(ROUND, count=FILLED)], *([case] for case in many)]
    more = [[dataclasses.replace(ROUND, count=count)] for count in (100, FILLED)] if full else []
    return [*([case] for case in (ROSENBROCK, PEAKS, ARM, CLUSTERS, ROUND)), *more]


def _figure(rows: Sequence[Row], case: Many, name: str) -> Any:
    row = find(rows, case)
    return None if row is None else row.figures.get(name)


def bars(rows: Sequence[Row], device: torch.device, bandwidth: float = 0.0) -> list[Bar]:
    """Set what was to be reached on two cores."""
    found: list[Bar] = []
    for case, target in ((ROSENBROCK, 20.0), (PEAKS, 100.0), (ARM, 50.0), (CLUSTERS, 10.0)):
        if find(rows, case) is not None:
            found.append(speed_bar(rows, case, ("scipy",), target))
    if (row := find(rows, ROSENBROCK)) is not None:
        names = ("differ", "elsewhere", "converged_compared", "scipy_converged")
        differ, elsewhere, own, theirs = (row.figures.get(name) for name in names)
        label, inside = ROSENBROCK.title, None if differ is None else differ - elsewhere
        found += [
            Bar(f"{label}: values further than {SAME:g} from scipy's where both converge", 0, False, differ),
            Bar(f"{label}: the same, in the same one of its two minima", 0, False, inside),
            Bar(f"{label}: converged, less those of scipy", 0, True, None if theirs is None else own - theirs),
            Bar(f"{label}: share of evaluations of problems that had ended", 0.05, False, row.figures["wasted"]),
        ]
    if (row := find(rows, PEAKS)) is not None:
        measure = f"{PEAKS.title}: parameters, against scipy's to rounding, relative"
        found.append(Bar(measure, SAME_FIT, False, row.error))
    own, theirs = _figure(rows, ARM, "met_compared"), _figure(rows, ARM, "scipy_met")
    if own is not None:
        found.append(Bar(f"{ARM.title}: share of goals met, over that of scipy", 1.0, True, own / theirs))
    own, theirs = _figure(rows, CLUSTERS, "best_compared"), _figure(rows, CLUSTERS, "scipy_best")
    if own is not None:
        found.append(Bar(f"{CLUSTERS.title}: in the global minimum, over those of scipy", 1.0, True, own / theirs))
    if (row := find(rows, ROUND)) is not None:
        value = row.seconds * bandwidth / ROUND.nbytes if row.seconds and bandwidth else None
        found.append(Bar(f"{ROUND.title}: time over that of its bytes", 3.0, False, value, case=ROUND))
        found.append(speed_bar(rows, ROUND, ("torch ops",), 10.0))
    return found


def tables(title: str, rows: Sequence[Row], bandwidth: float | None, bars: Sequence[Bar] = ()) -> list[Table]:
    """Show times, and what was counted."""
    first = rows_table(title, rows, bandwidth, bars)
    if any(row.case.op == PEAKS.op for row in rows):
        first = first._replace(notes=(*first.notes, PUBLISHED))
    lines = [
        (
            row.case.label,
            row.name,
            f"{row.figures['converged']:,} of {row.figures['problems']:,}",
            ", ".join(
                f"{name} {_shown(x)}" for name, x in row.figures.items() if name not in ("converged", "problems")
            ),
        )
        for row in rows
        if "converged" in row.figures
    ]
    return [first, *([Table(f"{title}: ends", ("case", "by", "converged", ""), lines)] if lines else [])]


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else f"{value:.3g}"


FAMILY = Family("Many problems at once", 4.0, groups, bars, measured, tables=tables)
