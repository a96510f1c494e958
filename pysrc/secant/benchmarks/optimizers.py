"""Time of an L-BFGS optimizer inside and outside the closure."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import secant
from secant.benchmarks.timing import Clock, Timing, clock_for

#: What is compared, by the name that the tables show.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch": torch.optim.LBFGS,
    "secant": secant.optim.LBFGS,
}


class Stopwatch:
    """A closure that notes when it was entered and left, and what it returned."""

    def __init__(self, closure: Callable[[], Tensor], clock: Clock) -> None:
        self.closure, self.clock = closure, clock
        self.spans: list[tuple[Any, Any]] = []
        self.losses: list[Tensor] = []

    def __call__(self) -> Tensor:
        """Call the closure."""
        start = self.clock.mark()
        loss = self.closure()
        self.spans.append((start, self.clock.mark()))
        self.losses.append(loss.detach())
        return loss

    def inside(self) -> float:
        """Seconds in the closure; after `clock.wait`."""
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
        """Seconds in the optimizer itself."""
        return self.total - self.inside


def counts(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Iterations and evaluations so far; both optimizers file them under the first parameter."""
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    return state.get("n_iter", 0), state.get("func_evals", 0)


def timed_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor], clock: Clock) -> Steps:
    """Call `optimizer.step(closure)` and say where the time went."""
    watch = Stopwatch(closure, clock)
    before = counts(optimizer)
    clock.wait()
    start = clock.mark()
    optimizer.step(watch)  # type: ignore[arg-type]  # torch's annotation says float
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
        """Loss; the gradient is written where `x.grad` lies."""
        grad = self.x.grad
        assert grad is not None
        torch.mul(self.h, self.x, out=grad)
        return torch.dot(self.x, grad) / 2


#: Iterations of a timed call, and how many such calls there are at least and at most.
ITERATIONS, MIN_ROUNDS, MAX_ROUNDS = 5, 3, 30


def outside_per_iteration(
    n: int, history: int, device: torch.device, *, seconds: float = 2.0, line_search_fn: str | None = None
) -> dict[str, Timing]:
    """Seconds per iteration outside the closure, once the history is full, both optimizers in turn.

    Args:
        n: parameters, in one tensor (more tensors would cost `torch.optim.LBFGS` a longer concatenation).
        history: pairs. device: where.
        seconds: to spend once the histories are full, roughly.
        line_search_fn: as the optimizers have it.

    Raises:
        RuntimeError: an optimizer stopped early, so that there is nothing to compare.
    """
    clock = clock_for(device)
    runs = {}
    for name, make in OPTIMIZERS.items():
        f = Quadratic(n, device)
        options = {"tolerance_grad": 0.0, "tolerance_change": 0.0, "line_search_fn": line_search_fn}
        optimizer = make([f.x], max_iter=ITERATIONS, max_eval=100 * ITERATIONS, history_size=history, **options)
        while counts(optimizer)[0] <= history:
            _advance(name, optimizer, f, clock)
        runs[name] = (optimizer, f)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, deadline = list(runs), time.perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for name in order:
            steps = _advance(name, *runs[name], clock)
            samples[name].append(steps.outside / steps.iterations)
        order.reverse()
    return {name: Timing(tuple(x)) for name, x in samples.items()}


def _advance(name: str, optimizer: torch.optim.Optimizer, f: Quadratic, clock: Clock) -> Steps:
    steps = timed_step(optimizer, f.closure, clock)
    if steps.iterations != ITERATIONS:
        raise RuntimeError(
            f"{name}: stopped after {steps.iterations} of {ITERATIONS} iterations, loss {steps.losses[-1]}"
        )
    return steps
