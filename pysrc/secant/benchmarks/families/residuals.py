"""Residual problems: seconds to an error for every optimizer, and the time of the rows of a Jacobian.

Equations are those of `residual_problems`, with the residuals that a user writes; the error is |u - exact| / |exact| at
other points. Medians over three seeds of the network. Adam's rate is the best of `ADAM_RATES` on the first seed with
`--full`, else `ADAM_RATE`; cosine over the seconds that it has. torchzero runs with `--full`, where it is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import secant
from secant.benchmarks.case import Bar, Case, Check, Contender, Row, find, ratio
from secant.benchmarks.families import Family
from secant.benchmarks.race import Race, Runner, Watching, at_least, measured
from secant.benchmarks.residual_problems import EQUATIONS, Sinc, network
from secant.benchmarks.timing import Timed

#: Rates of Adam that are tried.
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
#: The one that is taken without trying: the best of them on most problems.
ADAM_RATE = 1e-2
#: Pairs that limited-memory methods keep.
HISTORY = 100
#: A network with more parameters than residuals, on the first equation.
DEEP = "poisson-2d, 5,425 parameters"
WIDTHS = {DEEP: (2, 64, 48, 32, 16, 1)}
SINC = "sinc, batches of 1,000"
OURS = ("LevenbergMarquardt", "NaturalGradient", "BFGS", "LBFGS")
PEERS = ("torch LBFGS", "Adam", "scipy L-BFGS-B")
#: Of torchzero, both on its Gauss-Newton matrix.
TORCHZERO = {"torchzero LM": "LevenbergMarquardt", "torchzero TrustCG": "TrustCG"}


class Start:
    """A problem and a network at its initial point."""

    def __init__(self, op: str, seed: int, device: torch.device) -> None:
        self.device = device
        name = op.partition(",")[0]
        self.problem: Any = Sinc(device=device) if op == SINC else EQUATIONS[name](device=device)
        self.seed, self.model = seed, network(*WIDTHS.get(op, self.problem.widths), seed=seed).to(device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """List them."""
        return list(self.model.parameters())

    def residuals(self) -> tuple[Tensor, ...]:
        """Compute the residuals, with their graph."""
        found: tuple[Tensor, ...] = self.problem.residuals(self.model)
        return found

    def loss(self) -> Tensor:
        """Return half their squared sum."""
        return 0.5 * torch.stack([r.square().sum() for r in self.residuals()]).sum()


class _Trained(Runner):
    """An optimizer of `torch.optim`'s kind on a start."""

    def __init__(self, start: Start) -> None:
        self.start = start

    def error(self) -> float:
        return float(self.start.problem.error(self.start.model))

    def backward(self, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        """Make a closure that calls backward."""

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.start.loss()
            loss.backward()
            return loss.detach()

        return closure


class _Ours(_Trained):
    """One of ours; its callback is asked."""

    def __init__(self, start: Start, name: str) -> None:
        super().__init__(start)
        self.name = name

    def run(self, over: Watching, seconds: float) -> None:
        make = getattr(secant.optim, self.name)
        options: dict[str, Any] = {"max_iter": 10**6, "callback": over}
        if self.name in ("BFGS", "LBFGS"):
            options |= {"tolerance_grad": 0.0, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
            options |= {"max_eval": 10**7}
        if self.name == "LBFGS":
            options["history_size"] = HISTORY
        optimizer = make(self.start.parameters, **options)
        calls_backward = self.name in ("BFGS", "LBFGS")
        optimizer.step(self.backward(optimizer) if calls_backward else self.start.residuals)


class _TorchLBFGS(_Trained):
    """That of torch, ten iterations a call: it tells nobody of an iteration."""

    def run(self, over: Watching, seconds: float) -> None:
        optimizer = torch.optim.LBFGS(
            self.start.parameters, max_iter=10, max_eval=1000, history_size=HISTORY, tolerance_grad=0.0,
            tolerance_change=0.0, line_search_fn="strong_wolfe",
        )  # fmt: skip
        closure, state = self.backward(optimizer), optimizer.state[self.start.parameters[0]]
        while True:
            before = state.get("n_iter", 0)
            optimizer.step(closure)
            if over() or state["n_iter"] == before:
                return


class _Adam(_Trained):
    """Adam with a cosine schedule over the steps that fit the seconds."""

    def __init__(self, start: Start, rate: float, every: int = 20) -> None:
        super().__init__(start)
        self.rate, self.every = rate, every

    def run(self, over: Watching, seconds: float) -> None:
        optimizer = torch.optim.Adam(self.start.parameters, lr=self.rate)
        closure = self.backward(optimizer)
        begin = time.perf_counter()
        for _ in range(self.every):
            closure()
        steps = max(self.every, int(seconds / ((time.perf_counter() - begin) / self.every * 1.1)))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for k in range(steps):
            closure()
            optimizer.step()
            schedule.step()
            if k % self.every == self.every - 1 and over():
                return
        over()


class _Torchzero(_Trained):
    """A trust region of torchzero; its Jacobian is of batched backward passes."""

    def __init__(self, start: Start, name: str) -> None:
        super().__init__(start)
        self.name = name

    def run(self, over: Watching, seconds: float) -> None:
        zero: Any = importlib.import_module("torchzero")
        region = getattr(zero.m, TORCHZERO[self.name])(zero.m.GaussNewton())
        optimizer = zero.Optimizer(self.start.parameters, region)

        def closure(backward: bool = True) -> Tensor:
            with torch.enable_grad():  # trials come without, and the residuals have derivatives of their own
                return torch.cat([r.reshape(-1) for r in self.start.residuals()])

        optimizer.step(closure)
        while not over():
            optimizer.step(closure)


class _Scipy(_Trained):
    """scipy's L-BFGS-B on the flat vector, with gradients by autograd."""

    def run(self, over: Watching, seconds: float) -> None:
        from scipy.optimize import minimize

        parameters = self.start.parameters

        def put(x: Any) -> None:
            torch.nn.utils.vector_to_parameters(torch.from_numpy(x).to(parameters[0]), parameters)

        def fun(x: Any) -> tuple[float, Any]:
            put(x)
            loss = self.start.loss()
            grads = torch.autograd.grad(loss, parameters)
            return loss.item(), torch.cat([g.reshape(-1) for g in grads]).cpu().numpy()

        def callback(x: Any) -> None:
            put(x)
            if over():
                raise StopIteration

        x0 = torch.nn.utils.parameters_to_vector(parameters).detach().cpu().numpy()
        options = {"maxcor": HISTORY, "maxiter": 10**6, "maxfun": 10**7, "ftol": 0.0, "gtol": 0.0}
        minimize(fun, x0, jac=True, method="L-BFGS-B", callback=callback, options=options)


class _Batches(_Trained):
    """Levenberg-Marquardt on another thousand of the points at each step; sixty epochs at most."""

    def error(self) -> float:
        return float(self.start.problem.mse(self.start.model))

    def run(self, over: Watching, seconds: float) -> None:
        problem, model = self.start.problem, self.start.model
        optimizer = secant.optim.LevenbergMarquardt(self.start.parameters, max_iter=1)
        generator = torch.Generator().manual_seed(self.start.seed)
        for _ in range(60):
            for rows in torch.randperm(len(problem.x), generator=generator).split(1000):
                optimizer.step(functools.partial(problem.residuals, model, rows.to(problem.x.device)))
            if over():
                return


@dataclasses.dataclass(frozen=True)
class Fit(Race):
    """An equation, or the curve, to an error.

    others: optimizers besides Levenberg-Marquardt. tunes: the rate of Adam is tried.
    """

    others: tuple[str, ...] = ()
    tunes: bool = False

    @property
    def title(self) -> str:
        """Name problem and error."""
        kind = "mean squared error" if self.op == SINC else "relative error"
        return f"{self.op}, to a {kind} of {self.target:.2g}"

    def ours(self) -> Sequence[str]:
        """List our optimizers."""
        return OURS

    def names(self, device: torch.device) -> list[str]:
        """List the optimizers that run here."""
        names = ["LevenbergMarquardt", *self.others]
        return [name for name in names if name not in OURS or hasattr(secant.optim, name)]

    def problem(self, device: torch.device, seed: int = 0) -> Start:
        """Make the start of a seed."""
        return Start(self.op, seed, device)

    def runner(self, problem: Start, name: str) -> Runner:
        """Put an optimizer there."""
        if self.op == SINC:
            return _Batches(problem)
        if name in OURS:
            return _Ours(problem, name)
        if name == "torch LBFGS":
            return _TorchLBFGS(problem)
        if name in TORCHZERO:
            return _Torchzero(problem, name)
        if name == "Adam":
            return _Adam(problem, best_rate(self.op, self.SECONDS[1], problem.device) if self.tunes else ADAM_RATE)
        return _Scipy(problem)


@functools.cache
def best_rate(op: str, seconds: float, device: torch.device) -> float:
    """Return the rate with which Adam comes to the smallest error on the first seed, in so many seconds."""
    ends = {rate: _Adam(Start(op, 0, device), rate).until(0.0, seconds)[-1][1] for rate in ADAM_RATES}
    return min(ends, key=lambda rate: math.inf if math.isnan(ends[rate]) else ends[rate])


#: Networks whose rows are timed: residuals, parameters.
ROWS = {(2, 64, 1): 2.0, (2, 64, 64, 1): 4.0}


@dataclasses.dataclass(frozen=True)
class Rows(Case):
    """The Jacobian of the residuals of the first equation, against loss and gradient of the same closure."""

    widths: tuple[int, ...]
    LIMIT = "loss and gradient"
    LIMITS = "times loss and gradient"

    @property
    def title(self) -> str:
        """Name rows and columns."""
        return f"{self.op} of {self.rows:,} residuals, {self.columns:,} parameters, float64"

    @property
    def rows(self) -> int:
        """Count the residuals."""
        return EQUATIONS["poisson-2d"].interior + EQUATIONS["poisson-2d"].boundary

    @property
    def columns(self) -> int:
        """Count the parameters."""
        return sum((a + 1) * b for a, b in zip(self.widths, self.widths[1:], strict=False))

    @property
    def nbytes(self) -> int:
        """Count the result."""
        return 8 * self.rows * self.columns

    @property
    def flops(self) -> float:
        """Count a product and a sum for each entry; most of the work is what the graph does."""
        return 2.0 * self.rows * self.columns

    def problem(self, device: torch.device, seed: int = 0) -> Start:
        """Make the network and its points."""
        start = Start("poisson-2d", seed, device)
        start.model = network(*self.widths, seed=seed).to(device)
        return start

    def names(self, device: torch.device) -> list[str]:
        """List ours, and one backward pass for each row, batched."""
        return ["secant", "backward passes"]

    def contender(self, problem: Start, name: str) -> Contender:
        """Prepare the one of this name; the residuals are evaluated within the time."""
        if name == "secant":
            last = [secant.curvature.EvaluatedPoint(problem.residuals, problem.parameters, "residuals")]

            def ours() -> Tensor:
                """Go from point to point, as an optimizer does."""
                last[0] = secant.curvature.EvaluatedPoint(
                    problem.residuals, problem.parameters, "residuals", like=last[0]
                )
                return last[0].jacobian().rows()

            return Contender(self, name, "backend", Timed([ours]), ours)

        def passes() -> Tensor:
            r = torch.cat(problem.residuals())
            found = torch.autograd.grad(
                r, problem.parameters, torch.eye(len(r), dtype=r.dtype, device=r.device), is_grads_batched=True,
                materialize_grads=True, allow_unused=True,
            )  # fmt: skip
            return torch.cat([g.reshape(len(r), -1) for g in found], 1)

        return Contender(self, name, "peer", Timed([passes]), passes)

    def judge(self, problem: Start, contender: Contender, answer: Tensor) -> Check:
        """Compare with reverse passes, entry by entry, relative to the largest of a row."""
        r = torch.cat(problem.residuals())
        worst = 0.0
        for i in range(0, len(r), 51):
            want = torch.autograd.grad(
                r[i], problem.parameters, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            row = torch.cat([g.reshape(-1) for g in want])
            worst = max(worst, float((answer[i] - row).abs().max() / row.abs().max()))
        return Check(worst, 1e3 * torch.finfo(torch.float64).eps)

    def limit(self, problem: Start) -> Callable[[], object]:
        """Evaluate loss and gradient."""

        def gradient() -> object:
            return torch.autograd.grad(problem.loss(), problem.parameters)

        return gradient


def groups(device: torch.device, *, quick: bool = False, full: bool = False) -> list[Sequence[Case]]:
    """List what `python -m secant bench` measures, the errors of a problem in one race; `full`: with all peers."""
    everyone: tuple[str, ...] = ("NaturalGradient", "BFGS", "LBFGS", *PEERS)
    rows: list[Sequence[Case]] = [[Rows("Jacobian", widths)] for widths in ROWS]
    if quick:  # the passes of a small network take an eighth of the time
        return [[Rows("Jacobian", (2, 8, 1))], [Fit("poisson-2d", 0.5)]]
    few: tuple[str, ...] = ("BFGS", "LBFGS", "torch LBFGS", "Adam") if full else ()
    if full and importlib.util.find_spec("torchzero") is not None:
        everyone = (*everyone, *TORCHZERO)
    return [
        *rows,
        [
            Fit("poisson-2d", 1e-3, everyone, full),
            Fit("poisson-2d", 1e-4, everyone, full),
            Fit("poisson-2d", 1e-6, tunes=full),
        ],
        [Fit(SINC, 3.3e-7)],
        [Fit("heat-1+1d", 1e-3, few, full), Fit("heat-1+1d", 1e-5, tunes=full)],
        [Fit(DEEP, 1e-3, ("LBFGS", *few[2:]), full)],
        [Fit("poisson-5d", 1e-3, few, full)],
        [Fit("heat-4+1d", 1e-3, few, full)],
        *([[Fit("reaction-2d", 1e-3, few, full)]] if full else []),
    ]


def bars(rows: Sequence[Row], device: torch.device, bandwidth: float = 0.0) -> list[Bar]:
    """Set what was to be reached on two cores."""
    cases = {(row.case.op, row.case.target): row.case for row in rows if isinstance(row.case, Fit)}
    found = []
    for one in rows:
        if isinstance(one.case, Rows) and one.kind == "backend" and one.case.widths in ROWS:
            value = ratio(one, find(rows, one.case, one.case.LIMIT))
            title = f"{one.case.label} against loss and gradient, times longer"
            found.append(Bar(title, ROWS[one.case.widths], False, value, case=one.case, unit=" times"))
    for key, peer, ours, target in (
        (("poisson-2d", 1e-3), "torch LBFGS", "LevenbergMarquardt", 20.0),
        (("poisson-2d", 1e-4), "LBFGS", "LevenbergMarquardt", 10.0),
        (("poisson-2d", 1e-3), "torch LBFGS", "BFGS", 6.0),
        ((DEEP, 1e-3), "LBFGS", "LevenbergMarquardt", 4.0),
    ):
        if key in cases:
            found.append(at_least(rows, cases[key], peer, ours, target))
    for key, seconds in (
        (("poisson-2d", 1e-6), math.inf), (("heat-1+1d", 1e-5), math.inf), (("poisson-5d", 1e-3), math.inf),
        (("heat-4+1d", 1e-3), math.inf), ((SINC, 3.3e-7), 5.0),
    ):  # fmt: skip
        if key in cases:
            row = find(rows, cases[key], "LevenbergMarquardt")
            value = None if row is None else math.inf if row.seconds is None else row.seconds
            limit = Fit.SECONDS[0] if math.isinf(seconds) else seconds
            found.append(Bar(f"{cases[key].label}: seconds, every seed", limit, False, value, case=cases[key]))
    return found


FAMILY = Family("Residuals", 2.0, groups, bars, measured)
