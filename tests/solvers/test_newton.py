"""The Newton loop on functions that are no generalised linear models, its forcing terms, and its search."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from secant.result import Recorder, Status
from secant.solvers import Direction, ForcingTerm, cg, newton
from secant.solvers.newton import search

F64 = torch.float64


class Evaluated(NamedTuple):
    x: Tensor
    value: float
    grad: Tensor
    largest: float


class Coshes:
    """sum_i cosh(u_i), u = B x - c: convex, far from quadratic, its minimum n where B x = c."""

    def __init__(self, n: int = 8, condition: float = 1e2, dtype: torch.dtype = F64) -> None:
        g = torch.Generator().manual_seed(0)
        q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=F64))
        self.b = (q * torch.logspace(0, math.log10(condition), n, dtype=F64)).to(dtype)
        self.solution = torch.randn(n, generator=g, dtype=F64).to(dtype) / condition
        self.c = self.b @ self.solution
        self.moves, self.rtols, self.atols, self.sizes = 0, [], set(), []

    def at(self, x: Tensor) -> Evaluated:
        u = self.b @ x - self.c
        grad = self.b.T @ u.sinh()
        return Evaluated(x, float(u.cosh().sum()), grad, float(grad.abs().max()))

    def move(self, point: Evaluated, p: Tensor, t: float) -> Evaluated:
        self.moves += 1
        return self.at(point.x + t * p)

    def noise(self, point: Evaluated) -> float:
        return 16 * torch.finfo(point.grad.dtype).eps * point.value

    def solve(self, objective, point, rtol, atol) -> Direction:
        assert objective is self
        self.rtols.append(rtol)
        self.atols.add(atol)
        weight = (self.b @ point.x - self.c).cosh()
        found = cg(lambda v: self.b.T @ (weight * (self.b @ v)), -point.grad, rtol=rtol, atol=atol)
        self.sizes.append(math.sqrt(-float(point.grad @ found.x)))
        return Direction(found.x, int(found.iterations))


def test_the_minimum_is_that_of_the_formula():
    f = Coshes()
    tol = 1e-9
    points = []
    found = newton(
        f, f.at(torch.zeros(8, dtype=F64)), f, tol=tol, max_iter=50, record=lambda point, *_: points.append(point.x)
    )
    assert found.status is Status.CONVERGED
    assert found.point.value == pytest.approx(8.0, rel=1e-15)
    # The smallest curvature is 1: |x - x*| <= |g| <= sqrt(8) tol, but for the rounding of c.
    assert float((found.point.x - f.solution).norm()) <= math.sqrt(8) * tol + 1e-13
    assert found.n_iter < 15
    assert torch.equal(points[-1], points[-2] + found.step)
    # The last system has a quarter of the tolerance, the change of the curvature the rest.
    assert f.atols == {0.25 * tol}


class Rosenbrock(Coshes):
    """100 (y - x^2)^2 + (1 - x)^2 by directions of Gauss and Newton, which always descend."""

    def __init__(self) -> None:
        self.moves, self.rtols = 0, []

    def at(self, x: Tensor) -> Evaluated:
        a, b = x.tolist()
        r, s = b - a * a, 1 - a
        grad = torch.tensor([-400 * a * r - 2 * s, 200 * r], dtype=F64)
        return Evaluated(x, 100 * r * r + s * s, grad, float(grad.abs().max()))

    def noise(self, point: Evaluated) -> float:
        return 1e-300

    def solve(self, objective, point, rtol, atol) -> Direction:
        a = float(point.x[0])
        jacobian = torch.tensor([[-20 * a, 10.0], [-1.0, 0.0]], dtype=F64)
        return Direction(torch.linalg.solve(2 * jacobian.T @ jacobian, -point.grad), 0)


def test_rosenbrock_with_directions_of_gauss_and_newton():
    f = Rosenbrock()
    found = newton(f, f.at(torch.tensor([-1.2, 1.0], dtype=F64)), f, tol=1e-10, max_iter=100)
    assert found.status is Status.CONVERGED
    # The smallest eigenvalue of the Hessian at (1, 1) is 0.3994.
    assert float((found.point.x - 1).norm()) <= math.sqrt(2) * 1e-10 / 0.39


def test_every_end_has_its_status():
    f = Coshes()
    start = f.at(torch.zeros(8, dtype=F64))
    ended = newton(f, start, f, tol=1e-9, max_iter=2)
    assert (ended.status, ended.n_iter) == (Status.MAX_ITER, 2)
    none = newton(f, start, f, tol=1e-9, max_iter=0)
    assert (none.status, none.n_iter, none.step, none.point) == (Status.MAX_ITER, 0, None, start)
    assert newton(f, start, f, tol=math.inf, max_iter=3).status is Status.CONVERGED
    assert newton(f, start, f, tol=1e-9, max_iter=9, record=lambda *_: True)[1:3] == (Status.STOPPED, 1)
    rounding = newton(f, start, f, tol=0.0, max_iter=500)
    assert rounding.status is Status.STALLED
    # |B|^T of rounding errors of sinh u ~ u, eps |B x - c| <= eps |B| |x|.
    assert rounding.point.largest <= 8 * torch.finfo(F64).eps * float(f.b.abs().sum() * f.c.abs().max())

    class Uphill(Coshes):
        def solve(self, objective, point, rtol, atol):
            return Direction(point.grad, 0)

    up = Uphill()
    stuck = newton(up, up.at(torch.zeros(8, dtype=F64)), up, tol=1e-9, max_iter=9)
    assert (stuck.status, stuck.n_iter, up.moves) == (Status.STALLED, 0, 0)
    for status in (x.status for x in (ended, none, rounding, stuck)):
        assert isinstance(status, Status)


def test_the_decrement_ends_it():
    f = Coshes()
    start = f.at(torch.zeros(8, dtype=F64))
    found = newton(f, start, f, tol=1e-12, max_iter=50, decrement_tol=1.0)
    assert found.status is Status.CONVERGED
    exact = newton(f, start, f, tol=1e-12, max_iter=50)
    assert found.n_iter < exact.n_iter
    # Half the decrement is what there is left, where the function is close to its quadratic model.
    assert 8.0 < found.point.value < 8.0 + 0.5


def test_the_record_has_every_iteration_and_evaluation():
    f = Coshes()
    seen, recorder = [], Recorder()

    def record(point, t, inner, evaluations):
        seen.append((t, inner, evaluations))
        return recorder(value=point.value, grad_norm=point.largest, step=t, inner=inner, evaluations=f.moves)

    found = newton(f, f.at(torch.zeros(8, dtype=F64)), f, tol=1e-9, max_iter=50, record=record)
    assert len(seen) == found.n_iter == len(f.rtols)
    assert sum(evaluations for *_, evaluations in seen) == f.moves == recorder.history[-1].evaluations
    assert all(inner >= 1 for _, inner, _ in seen)
    assert [one.n for one in recorder.history] == list(range(found.n_iter))
    assert recorder.history[-1].grad_norm == found.point.largest <= 1e-9
    values = [one.value for one in recorder.history]
    assert values == sorted(values, reverse=True)


def test_forcing_terms_are_those_of_the_formula():
    forcing = ForcingTerm(0.5, most=0.9, least=1e-3, gamma=0.8, alpha=1.5)
    assert forcing.value == 0.5
    assert forcing.update(4.0) == 0.5  # nothing to compare with yet
    # 0.8 (1/4)^1.5 = 0.1, but 0.8 0.5^1.5 = 0.2828 is the safeguard.
    assert forcing.update(1.0) == pytest.approx(0.8 * 0.5**1.5)
    # 0.8 0.2828^1.5 = 0.1203 still is.
    assert forcing.update(0.01) == pytest.approx(0.8 * (0.8 * 0.5**1.5) ** 1.5)
    # 0.8 0.1203^1.5 = 0.033 no longer: the lower bound.
    assert forcing.update(1e-6) == 1e-3
    assert forcing.update(1e-6) == pytest.approx(0.8)
    assert forcing.update(1.0) == 0.9
    assert forcing.value == 0.9


def test_systems_are_solved_the_better_the_faster_it_converges():
    f, inner = Coshes(condition=30.0), []
    start = f.at(torch.zeros(8, dtype=F64))
    found = newton(f, start, f, tol=1e-10, max_iter=50, record=lambda *told: inner.append(told[2]))
    assert f.rtols[0] == f.rtols[1] == 0.1
    for rtol, before, last in zip(f.rtols[2:], f.sizes, f.sizes[1:], strict=False):
        assert rtol == pytest.approx(min(0.1, max(1e-6, 0.9 * (last / before) ** 2)), rel=1e-9)
    assert min(f.rtols) < 0.01
    exact, more = Coshes(condition=30.0), []
    tight = ForcingTerm(1e-6, most=1e-6)
    best = newton(exact, start, exact, tol=1e-10, max_iter=50, forcing=tight, record=lambda *told: more.append(told[2]))
    assert exact.rtols == [1e-6] * best.n_iter
    assert found.n_iter <= best.n_iter + 2
    assert sum(inner) < sum(more)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"most": 1.0}, "most"),
        ({"least": 0.0}, "least"),
        ({"least": 0.5}, "least"),
        ({"first": 0.2}, "first"),
        ({"gamma": 1.1}, "gamma"),
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": True}, "alpha"),
    ],
)
def test_invalid_forcing_terms(options, name):
    with pytest.raises(ValueError, match=f"ForcingTerm: {name}: expected a number in"):
        ForcingTerm(**options)


class Rounded(Coshes):
    """(x - 1)^2 / 2 + 1000 to a multiple of 1 / 4, with the exact gradient: a value that tells nothing near 1."""

    def __init__(self) -> None:
        self.moves, self.rtols = 0, []

    def at(self, x: Tensor) -> Evaluated:
        value = round(4 * (0.5 * float((x - 1) ** 2) + 1000)) / 4
        return Evaluated(x, value, x - 1, abs(float(x - 1)))

    def noise(self, point: Evaluated) -> float:
        return 0.25

    def solve(self, objective, point, rtol, atol) -> Direction:
        return Direction(-1.9 * point.grad, 0)  # too long by almost a factor of two


def test_where_values_are_rounding_the_slope_decides():
    f = Rounded()
    start = f.at(torch.tensor(1.3, dtype=F64))
    found = newton(f, start, f, tol=1e-6, max_iter=100)
    assert found.status is Status.CONVERGED
    assert float(found.point.x) == pytest.approx(1.0, abs=1e-6)
    step = search(f, start, -start.grad, -(start.largest**2))
    assert step is not None
    assert (step.t, step.told, step.evaluations) == (1.0, False, 1)
    # Far away the value tells.
    far = f.at(torch.tensor(9.0, dtype=F64))
    assert search(f, far, -far.grad, -64.0).told
    # Below rounding no step that does not flatten the slope is one, whatever its value.
    assert search(f, start, -2.0 * start.grad, 2.0 * -(start.largest**2)) is not None

    class Steep(Rounded):
        def at(self, x):
            return super().at(x)._replace(grad=-0.1 + 1e-4 * (x - 1.3))  # lower by less than the curvature asks

    steep = Steep()
    assert search(steep, steep.at(torch.tensor(1.3, dtype=F64)), torch.tensor(0.1, dtype=F64), -0.01) is None
    assert steep.moves == 3


def test_iterations_that_help_nothing_end_it():
    """Equal values, and a gradient that a step turns by a right angle and makes no smaller."""

    class Turning(Rounded):
        def at(self, axis):
            grad = torch.zeros(2, dtype=F64)
            grad[axis] = 0.1
            return Evaluated(axis, 1.0, grad, 0.1)

        def move(self, point, p, t):
            return self.at(1 - point.x)

        def solve(self, objective, point, rtol, atol):
            return Direction(-point.grad, 0)

    f = Turning()
    found = newton(f, f.at(0), f, tol=1e-6, max_iter=100)
    # The first brings a decrement to compare with, twenty more bring nothing.
    assert (found.status, found.n_iter) == (Status.STALLED, 21)


def test_a_search_holds_few_points():
    class Watched(Coshes):
        most, seen = 0, ()

        def move(self, point, p, t):
            self.most = max(self.most, sum(grad() is not None for grad in self.seen))
            found = super().move(point, p, t)
            self.seen = (*self.seen, weakref.ref(found.grad))
            return found

    f = Watched()
    start = f.at(torch.zeros(8, dtype=F64))
    p = 1e6 * f.solve(f, start, 1e-6, 0.0).p
    found = search(f, start, p, float(start.grad @ p))
    assert found.point.value < start.value
    assert found.evaluations == f.moves > 6
    assert f.most <= 2  # beside the start: the one that may still be returned, and the last
