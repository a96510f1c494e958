"""Time of an L-BFGS optimizer inside and outside the closure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import secant
from secant.benchmarks.case import Case, Check, Contender
from secant.benchmarks.timing import Clock, Timed, clock_for

#: What is compared, by the name that the tables show.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch": torch.optim.LBFGS,
    "secant": secant.optim.LBFGS,
}


class Stopwatch:
    """A closure that notes when it was entered and left, and the losses that it returned."""

    def __init__(self, closure: Callable[[], Any], clock: Clock) -> None:
        self.closure, self.clock = closure, clock
        self.spans: list[tuple[Any, Any]] = []
        self.losses: list[Tensor] = []

    def __call__(self) -> Any:
        """Call the closure."""
        start = self.clock.mark()
        found = self.closure()
        self.spans.append((start, self.clock.mark()))
        if isinstance(found, Tensor):
            self.losses.append(found.detach())
        return found

    def inside(self) -> float:
        """Add up the seconds in the closure; after `clock.wait`."""
        return sum(self.clock.seconds(start, end) for start, end in self.spans)


class Steps(NamedTuple):
    """One call of `optimizer.step`, in seconds on the clock; losses and the times after which they were known."""

    total: float
    inside: float
    iterations: int
    evaluations: int
    times: list[float]
    losses: list[float]

    @property
    def outside(self) -> float:
        """Return the seconds in the optimizer itself."""
        return self.total - self.inside


def counts(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Count iterations and evaluations so far; both optimizers file them under the first parameter."""
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    return state.get("n_iter", 0), state.get("func_evals", 0)


def timed_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor], clock: Clock) -> Steps:
    """Call `optimizer.step(closure)` and say where the time went."""
    watch = Stopwatch(closure, clock)
    before = counts(optimizer)
    clock.wait()
    start = clock.mark()
    optimizer.step(watch)
    end = clock.mark()
    clock.wait()
    after = counts(optimizer)
    return Steps(
        clock.seconds(start, end),
        watch.inside(),
        after[0] - before[0],
        after[1] - before[1],
        [clock.seconds(start, left) for _, left in watch.spans],
        [float(loss) for loss in watch.losses],
    )


class Quadratic:
    """f(x) = sum_i h_i x_i^2 / 2 with h log-uniform in [1, 1e4]: next to no work in the closure, many iterations."""

    def __init__(self, n: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.h = (10.0 ** (4.0 * torch.rand(n, generator=generator))).to(device)
        self.x = torch.randn(n, generator=generator).to(device).requires_grad_()
        self.x.grad = torch.zeros_like(self.x)  # closures write here; an optimizer may put another tensor in its place

    @torch.no_grad()
    def closure(self) -> Tensor:
        """Compute the loss; the gradient is written where `x.grad` lies."""
        grad = self.x.grad
        assert grad is not None
        torch.mul(self.h, self.x, out=grad)
        return torch.dot(self.x, grad) / 2


#: Iterations of a timed call.
ITERATIONS = 5


class Running:
    """An optimizer on `Quadratic` with its history full, to be advanced by `ITERATIONS` at a time.

    Raises:
        RuntimeError: it stopped early, so that there is nothing to compare; from `advance` when its time is taken.
    """

    def __init__(self, name: str, case: OutsideClosure, device: torch.device) -> None:
        self.name, self.f = name, Quadratic(case.n, device)
        self.watch = Stopwatch(self.f.closure, clock_for(device))
        options = {"tolerance_grad": 0.0, "tolerance_change": 0.0, "line_search_fn": case.line_search}
        self.optimizer = OPTIMIZERS[name](
            [self.f.x], max_iter=ITERATIONS, max_eval=100 * ITERATIONS, history_size=case.history, **options
        )
        self.expected = 0
        self.first: float | None = None
        while counts(self.optimizer)[0] <= case.history:
            self.advance()
            self.inside(self.watch.clock)

    def advance(self) -> None:
        """Make one call of `step`."""
        self.expected += ITERATIONS
        self.optimizer.step(self.watch)

    def inside(self, clock: Clock) -> float:
        """Add up the seconds in the closure; after `clock.wait`."""
        clock.wait()
        seconds, last = self.watch.inside(), float(self.watch.losses[-1])
        self.first = float(self.watch.losses[0]) if self.first is None else self.first
        self.watch.spans.clear()
        self.watch.losses.clear()
        done = counts(self.optimizer)[0]
        if done != self.expected:
            made = ITERATIONS - self.expected + done
            raise RuntimeError(f"{self.name}: stopped after {made} of {ITERATIONS} iterations, loss {last}")
        return seconds

    def progress(self) -> float:
        """Advance once; the loss over that at the start."""
        self.advance()
        last = float(self.watch.losses[-1])
        self.inside(self.watch.clock)
        assert self.first is not None
        return last / self.first


@dataclasses.dataclass(frozen=True)
class OutsideClosure(Case):
    """Seconds per iteration outside the closure on `Quadratic`: ours against that of torch.

    op: the optimizer. n: parameters, in one tensor (more would cost `torch.optim.LBFGS` a longer concatenation).
    history: pairs; it is full. line_search: as the optimizers have it.
    """

    n: int
    history: int
    line_search: str | None = None
    dtype: torch.dtype = torch.float32

    UNIT = "iteration"

    @property
    def title(self) -> str:
        """Name optimizer, parameters, history and line search."""
        search = f", {self.line_search}" if self.line_search else ""
        return f"{self.op} outside the closure, n = {self.n:,}, history {self.history}{search}"

    @property
    def nbytes(self) -> int:
        """Count the history twice, and of n each: g, g_prev twice, d four times, x twice, a pair."""
        return (4 * self.history + 11) * self.n * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Count the recursion, the new pair with its products, and x + t d."""
        return self.n * (8 * self.history + 1 + 8 + 2)

    def problem(self, device: torch.device, seed: int = 0) -> Tensor:
        """Return nothing, where it runs: every contender has a `Quadratic` of its own."""
        return torch.empty(0, device=device)

    def names(self, device: torch.device) -> list[str]:
        """List ours, then that of torch."""
        return ["secant", "torch"]

    def contender(self, problem: Tensor, name: str) -> Contender:
        """Prepare the one of this name, with a full history."""
        running = Running(name, self, problem.device)
        timed = Timed([running.advance], inside=running.inside)
        kind = "backend" if name == "secant" else "peer"
        return Contender(self, name, kind, timed, running.progress, units=ITERATIONS)

    def judge(self, problem: Tensor, contender: Contender, answer: float) -> Check:
        """Say whether the loss is below that at the start."""
        return Check(answer, 1.0)
