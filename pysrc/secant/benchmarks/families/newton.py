"""Newton's methods: whole minimizations against other libraries, an autoencoder, saddle points, the problems of MGH.

A minimization is right when its value is within `EXCESS` of the minimum. The autoencoder is a race (see `race`): the
curvature of `NewtonCG` is that of another part of the images at each step, or of all. With tanh all get off the start;
with sigmoid, where the start is a plateau, torch's L-BFGS stays there in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import secant
from secant.benchmarks import mgh
from secant.benchmarks.case import Bar, Case, Check, Contender, Row, WholeRun, find, speed_bar
from secant.benchmarks.families import Family
from secant.benchmarks.race import Race, Runner, Watching, at_least, measured
from secant.benchmarks.saddles import saddles
from secant.benchmarks.timing import Timed

#: Value of a minimization above the minimum, relative to max(1, |f*|).
EXCESS = 1e-6
#: Iterations are not limited, gradients are.
GRADIENT = 1e-6
AUTOENCODER = "digits autoencoder, 5,544 parameters"
#: Images of 1,797 whose curvature a step of `NewtonCG` uses.
CURVATURE_BATCH = 512
HISTORY = 20
#: Of L-BFGS between two looks at the loss.
ITERATIONS = 5
#: Best on this problem of 1e-3, 3e-3, 1e-2 and 3e-2.
ADAM_RATE = 1e-2


class Objective:
    """A function of n variables in float64, its start, and its minimum."""

    def __init__(self, op: str, n: int, device: torch.device) -> None:
        self.device, self.op = device, op
        generator = torch.Generator().manual_seed(0)
        if op == "Rosenbrock":
            self.start, self.value = torch.linspace(-1.0, 1.0, n, dtype=torch.float64, device=device), _rosenbrock
            return
        x = torch.randn(20 * n, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, n).double()
        w = 3.0 * torch.randn(n, generator=generator, dtype=torch.float64)
        y = (torch.rand(20 * n, generator=generator, dtype=torch.float64) < torch.sigmoid(x @ w)).double()
        self.start = torch.zeros(n, dtype=torch.float64, device=device)
        self.value = functools.partial(_logistic, x.to(device), y.to(device))

    @functools.cached_property
    def minimum(self) -> float:
        """Find the minimum by exact Newton steps."""
        x = self.start.clone().requires_grad_()
        optimizer = secant.optim.TrustRegion([x], max_iter=500, subproblem="exact", tolerance_grad=1e-12)
        optimizer.step(lambda: self.value(x))
        return float(self.value(x.detach()))


def _rosenbrock(x: Tensor) -> Tensor:
    return (100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2).sum()


def _logistic(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(x @ w, y) + 5e-5 * w.square().sum()


@dataclasses.dataclass(frozen=True)
class Minimization(WholeRun):
    """A whole run of `secant.minimize`. op: the function. n: variables. method: as `secant.minimize` has it."""

    n: int
    method: str

    KIND = ("op", "method")

    @property
    def title(self) -> str:
        """Name method, function and size."""
        return f"{self.method}, {self.op}, n = {self.n}"

    def problem(self, device: torch.device, seed: int = 0) -> Objective:
        """Make the function and its start."""
        return Objective(self.op, self.n, device)

    def names(self, device: torch.device) -> list[str]:
        """List ours, and the libraries that are installed."""
        found = [name for name, module in (("pytorch-minimize", "torchmin"), ("scipy", "scipy")) if _has(module)]
        return ["secant", *found]

    def contender(self, problem: Objective, name: str) -> Contender:
        """Prepare the one of this name; the answer is the value where it ended."""
        call = functools.partial(_MINIMIZERS[name], problem, self.method)
        return Contender(self, name, "backend" if name == "secant" else "peer", Timed([call]), call)

    def judge(self, problem: Objective, contender: Contender, answer: float) -> Check:
        """Compare the value with the minimum."""
        return Check((answer - problem.minimum) / max(1.0, abs(problem.minimum)), EXCESS)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _ours(problem: Objective, method: str) -> float:
    return float(secant.minimize(problem.value, problem.start, method=method, tol=GRADIENT).fun)


def _torchmin(problem: Objective, method: str) -> float:
    from torchmin import minimize  # type: ignore[import-not-found,unused-ignore]

    options = {"gtol": GRADIENT} if method.startswith("trust") else {"xtol": 1e-10}
    return float(minimize(problem.value, problem.start.clone(), method=method, max_iter=1000, options=options).fun)


def _scipy(problem: Objective, method: str) -> float:
    """Minimize by scipy, with products on the graph of the last gradient."""
    from scipy.optimize import minimize

    kept: dict[str, Any] = {}

    def fun(x: Any) -> tuple[float, Any]:
        w = torch.from_numpy(x).clone().requires_grad_()
        loss = problem.value(w)
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        kept.update(x=x.copy(), w=w, g=g)
        return loss.item(), g.detach().numpy()

    def hessp(x: Any, p: Any) -> Any:
        if not (kept["x"] == x).all():
            fun(x)
        return torch.autograd.grad(kept["g"], kept["w"], torch.from_numpy(p), retain_graph=True)[0].numpy()

    options = {"gtol": GRADIENT} if method.startswith("trust") else {"xtol": 1e-10}
    options["maxiter"] = 1000
    start = problem.start.cpu().numpy()
    return float(minimize(fun, start, jac=True, hessp=hessp, method=method, options=options).fun)


_MINIMIZERS: dict[str, Callable[[Objective, str], float]] = {
    "secant": _ours,
    "pytorch-minimize": _torchmin,
    "scipy": _scipy,
}


class Images:
    """The 1,797 digits, standardised, and an autoencoder 64-32-16-8-16-32-64 with tanh at its initial point."""

    def __init__(self, seed: int, device: torch.device) -> None:
        from sklearn.datasets import load_digits

        x = torch.tensor(load_digits().data, dtype=torch.float32)
        deviation = x.std(0)
        deviation[deviation == 0] = 1.0
        self.x, self.device, self.seed = ((x - x.mean(0)) / deviation).to(device), device, seed
        widths = (64, 32, 16, 8, 16, 32, 64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for a, b in itertools.pairwise(widths):
                layers += [nn.Linear(a, b), nn.Tanh()]
            self.model = nn.Sequential(*layers[:-1]).to(device)

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and mean squared error of some images."""
        found = self.model(x)
        return found, nn.functional.mse_loss(found, x)


#: Images whose curvature a step uses; 0: of all, at the point of the gradient.
_BATCHES = {"NewtonCG": CURVATURE_BATCH, "NewtonCG, whole batch": 0}


class _Autoencoder(Runner):
    def __init__(self, images: Images, name: str) -> None:
        self.images, self.name = images, name

    @torch.no_grad()
    def error(self) -> float:
        return float(self.images.outputs(self.images.x)[1])

    def run(self, over: Watching, seconds: float) -> None:
        images, x = self.images, self.images.x
        params = list(images.model.parameters())
        if self.name in _BATCHES:
            count, generator = _BATCHES[self.name], torch.Generator().manual_seed(images.seed)

            def curvature() -> tuple[Tensor, Tensor]:
                """Draw anew at each iteration."""
                return images.outputs(x[torch.randperm(len(x), generator=generator)[:count].to(x.device)])

            newton = secant.optim.NewtonCG(
                params, max_iter=1000, curvature="ggn", adaptive=True, preconditioner="kronecker", callback=over
            )
            while not over():
                newton.step(functools.partial(images.outputs, x), curvature if count else None)
            return
        optimizer = _peer(self.name, params)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = images.outputs(x)[1]
            loss.backward()
            return loss.detach()

        while True:
            optimizer.step(closure)  # type: ignore[arg-type]  # torch's annotation says float
            if over():
                return


def _peer(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "Adam":
        return torch.optim.Adam(params, lr=ADAM_RATE)
    cls = torch.optim.LBFGS if name == "torch LBFGS" else secant.optim.LBFGS
    return cls(
        params, max_iter=ITERATIONS, max_eval=1000, history_size=HISTORY, tolerance_grad=0.0, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Autoencoder(Race):
    """A deep autoencoder to a mean squared error per standardised pixel: all data at each evaluation."""

    SECONDS = (60.0, 60.0)

    @property
    def title(self) -> str:
        """Name problem and error."""
        return f"{self.op} to {self.target:g}"

    def ours(self) -> Sequence[str]:
        """List our optimizers."""
        return (*_BATCHES, "LBFGS")

    def names(self, device: torch.device) -> list[str]:
        """List the optimizers."""
        return [*_BATCHES, "LBFGS", "torch LBFGS", "Adam"]

    def problem(self, device: torch.device, seed: int = 0) -> Images:
        """Make the network of a seed."""
        return Images(seed, device)

    def runner(self, problem: Images, name: str) -> Runner:
        """Put an optimizer there."""
        return _Autoencoder(problem, name)


def groups(device: torch.device, *, quick: bool = False, full: bool = False) -> list[Sequence[Case]]:
    """List what `python -m secant bench` measures."""
    if quick:
        return [[Minimization("Rosenbrock", 5, "trust-ncg")]]
    methods = ("trust-ncg", "newton-cg", *(("trust-exact",) if full else ()))
    runs = [[Minimization(op, 100, method)] for method in methods for op in ("Rosenbrock", "logistic regression")]
    return [*runs, *([[Autoencoder(AUTOENCODER, error) for error in (0.35, 0.26)]] if _has("sklearn") else [])]


#: Optimizers that leave saddle points.
ESCAPING = ("TrustRegion", "CubicNewton", "SaddleFreeNewton", "NewtonCG")


def reached_minima(name: str) -> int:
    """Count the saddle problems of which an optimizer reaches the minimum."""
    count = 0
    for saddle in saddles():
        params = [x.requires_grad_() for x in saddle.noisy_start()]
        getattr(secant.optim, name)(params, max_iter=200).step(functools.partial(saddle.loss, params))
        value = float(saddle.loss([p.detach() for p in params]))
        count += value <= saddle.minimum + 1e-10 * max(1.0, abs(saddle.minimum))
    return count


def _solved(problem: mgh.Problem, value: float, grad: Any) -> bool:
    small = float(torch.as_tensor(grad).abs().max()) <= 1e-5 * max(1.0, abs(value))
    return problem.excess(value) <= 1e-5 or small


def evaluations(method: str) -> tuple[int, int, int]:
    """Run the 35 problems of MGH by a method of ours and by scipy's.

    Returns:
        Evaluations of ours and of scipy where scipy solves, and how many of those ours leaves unsolved.
    """
    from scipy import optimize

    ours = theirs = unsolved = 0
    for problem in mgh.PROBLEMS:
        if method == "least_squares":
            found = secant.least_squares(problem.residuals, problem.start)
            other = optimize.least_squares(
                lambda x, p=problem: p.residuals(torch.from_numpy(x)).numpy(), problem.start.numpy(),
                jac=lambda x, p=problem: torch.func.jacrev(p.residuals)(torch.from_numpy(x)).numpy(),
            )  # fmt: skip
            good = [_solved(problem, 2.0 * x.cost, x.grad) for x in (found, other)]
        else:

            def grad(x: Any, p: mgh.Problem = problem) -> Tensor:
                return torch.func.grad(p.value)(torch.as_tensor(x))

            def hess(x: Any, p: mgh.Problem = problem) -> Tensor:
                return torch.func.hessian(p.value)(torch.as_tensor(x))

            exact = method == "trust-exact"
            given: dict[str, Any] = {"jac": grad, "hess": hess} if exact else {}
            found = secant.minimize(problem.value, problem.start, method=method, **given)
            other = optimize.minimize(
                lambda x, p=problem: float(p.value(torch.from_numpy(x))), problem.start.numpy(),
                method="trust-exact" if exact else "L-BFGS-B", jac=lambda x, g=grad: g(x).numpy(),
                **({"hess": lambda x, h=hess: h(x).numpy(), "options": {"gtol": 1e-5}} if exact else {}),
            )  # fmt: skip
            good = [_solved(problem, float(x.fun), x.jac) for x in (found, other)]
        if good[1]:
            ours, theirs, unsolved = ours + found.nfev, theirs + other.nfev, unsolved + (not good[0])
    return ours, theirs, unsolved


def bars(rows: Sequence[Row], device: torch.device, bandwidth: float = 0.0) -> list[Bar]:
    """Set what was to be reached on two cores."""
    found = []
    for row in rows:
        if isinstance(row.case, Minimization) and row.kind == "backend" and row.case.n == 100:
            found += [speed_bar(rows, row.case, (name,), 1.0) for name in row.case.names(device)[1:]]
    case = Autoencoder(AUTOENCODER, 0.35)
    if find(rows, case) is None:
        return found  # a short run
    found.append(at_least(rows, case, "torch LBFGS", "NewtonCG", 3.0))
    problems = len(saddles())
    for name in ESCAPING:
        found.append(Bar(f"saddles left and minimum reached, {name}", problems, True, float(reached_minima(name))))
    if _has("scipy"):
        for method in ("l-bfgs", "trust-exact", "least_squares"):
            ours, theirs, unsolved = evaluations(method)
            found.append(Bar(f"MGH, {method}: unsolved of what scipy solves", 0.0, False, float(unsolved)))
            found.append(Bar(f"MGH, {method}: evaluations over those of scipy", 1.0, False, ours / theirs))
    return found


FAMILY = Family("Newton", 3.0, groups, bars, measured)
