"""A step of a dense quasi-Newton method: the update of H by a pair, and the next direction."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import secant
from secant.benchmarks import peers
from secant.benchmarks.case import Case, Check, Contender, around, dtype_name, serving
from secant.benchmarks.timing import Timed

#: Pairs that H has learned from before.
TAUGHT = 3


@dataclasses.dataclass(frozen=True)
class DenseStep(Case):
    """One step of BFGS on n parameters."""

    n: int
    dtype: torch.dtype = torch.float64

    LIMIT = "a triangle read and written"
    LIMITS = "times the triangle"

    @property
    def title(self) -> str:
        """Name n and dtype."""
        return f"dense step {self.n:,}, {dtype_name(self.dtype)}"

    @property
    def kind(self) -> tuple[str, torch.dtype]:
        """Tell dtypes apart."""
        return "dense step", self.dtype

    @property
    def triangle(self) -> int:
        """Count the entries of a triangle."""
        return self.n * (self.n + 1) // 2

    @property
    def nbytes(self) -> int:
        """Count a triangle read and written, and g, g_prev and d read, g_prev, d, s and H y written."""
        return (2 * self.triangle + 7 * self.n) * self.dtype.itemsize

    @property
    def limit_bytes(self) -> int:
        """Count the triangle."""
        return 2 * self.triangle * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Count two products of a symmetric matrix, 4 n^2, and the two sides of an update of rank 2, 2.5 n^2."""
        return 13 * self.n * self.n // 2

    def memory(self, cases: Sequence[Any], device: torch.device) -> int:
        """Add up a triangle for each backend, and a few matrices in float64 for reference and peers."""
        return 8 * 10 * self.n * self.n

    def problem(self, device: torch.device, seed: int = 0) -> DenseProblem:
        """Make gradient and pairs of a quadratic."""
        return DenseProblem(self, device, seed)

    def names(self, device: torch.device) -> list[str]:
        """List every backend, the formula in torch, and its compiled version."""
        return [*serving("lbfgs", device, self.dtype, large=self.n > 1000), "eager", "compiled"]

    def contender(self, problem: DenseProblem, name: str) -> Contender:
        """Prepare the one of this name, with a matrix of its own."""
        if name in ("eager", "compiled"):
            step = bfgs_step if name == "eager" else peers.compiled(bfgs_step)
            calls, probe = _calls(problem, functools.partial(_stepped, step, problem.matrix.clone()))
            return Contender(self, name, "peer", Timed(calls), probe)
        chosen = around(name, serving("lbfgs", problem.device, self.dtype, large=False))
        with chosen():
            h = problem.taught()

            def step(grad: Tensor, prev_grad: Tensor, direction: Tensor) -> None:
                h.step(grad, prev_grad, direction, 2.0)

            calls, probe = _calls(problem, step)
        return Contender(self, name, "backend", Timed(calls, chosen), probe)

    def judge(self, problem: DenseProblem, contender: Contender, answer: Tensor) -> Check:
        """Compute the relative error of a direction against the formula in float64.

        Each of the updates multiplies by y, n products each of an error u, and H (its eigenvalues in [1/2, 2]) makes at
        most four times of it.
        """
        error = float((answer.double() - problem.exact).norm() / problem.exact.norm())
        return Check(error, 4 * (TAUGHT + 1) * self.n * torch.finfo(self.dtype).eps)

    def limit(self, problem: DenseProblem) -> Callable[[], object]:
        """Read and write a triangle by torch's threads."""
        x = torch.zeros(self.triangle, dtype=self.dtype, device=problem.device)
        return functools.partial(x.mul_, 1.0)


class DenseProblem:
    """A gradient, and pairs of a quadratic whose Hessian is diagonal, eigenvalues log-uniform in [1/2, 2]."""

    def __init__(self, case: DenseStep, device: torch.device, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(TAUGHT + 2, case.n, generator=draw, dtype=torch.float64).to(device, case.dtype)
        self.case, self.device = case, device
        self.hessian = (4.0 ** (torch.rand(case.n, generator=draw, dtype=torch.float64) - 0.5)).to(noise)
        self.g, self.s = noise[0], noise[1:]
        self.probe = (self.g - self.s[-1] * self.hessian, self.s[-1] / 2)  # with t = 2, a step to g

    def taught(self) -> secant.InverseHessian:
        """Make one that has learned from all pairs but the last."""
        h = secant.InverseHessian(self.case.n, rule="bfgs", dtype=self.case.dtype, device=self.device)
        for s in self.s[:-1]:
            h.append(s, self.hessian * s)
        return h

    @functools.cached_property
    def matrix(self) -> Tensor:
        """Return H in full."""
        return self.taught().matrix()

    @functools.cached_property
    def exact(self) -> Tensor:
        """Compute the direction after the step of `probe` in float64."""
        h, previous, direction = (x.to(torch.float64, copy=True) for x in (self.matrix, *self.probe))
        bfgs_step(h, self.g.double(), previous, direction, 2.0)
        return direction


def bfgs_step(h: Tensor, grad: Tensor, prev_grad: Tensor, direction: Tensor, t: float) -> None:
    """Make a step of BFGS as one would in torch: one product with two vectors, one update of rank 2, all in place."""
    s, y = t * direction, grad - prev_grad
    hg, w = (h @ torch.stack((grad, y), 1)).unbind(1)
    sy, yhy = s @ y, y @ w
    u = torch.stack((s, w), 1)
    c = torch.stack((yhy / sy / sy + 1 / sy, -1 / sy, -1 / sy, torch.zeros_like(sy))).view(2, 2)
    h.addmm_(u, c @ u.mT)
    direction.copy_(-(hg + u @ (c @ (u.mT @ grad))))
    prev_grad.copy_(grad)


def _stepped(step: Callable[..., None], h: Tensor, grad: Tensor, prev_grad: Tensor, direction: Tensor) -> None:
    step(h, grad, prev_grad, direction, 2.0)


def _calls(
    problem: DenseProblem, step: Callable[[Tensor, Tensor, Tensor], None]
) -> tuple[list[Callable[[], Tensor]], Callable[[], Tensor]]:
    """Make calls that can go round for ever, and the probe, which comes first.

    Gradients are g, -g, g, ...; see `families.lbfgs`: from H y = s the next direction is -H g = -d, and so on.
    """
    previous, direction = problem.g.neg(), problem.g.clone()

    def turn(grad: Tensor) -> Tensor:
        step(grad, previous, direction)
        return direction

    def probe() -> Tensor:
        before, d = (x.clone() for x in problem.probe)
        step(problem.g, before, d)
        return d

    return [functools.partial(turn, sign * problem.g) for sign in (1, -1)], probe
