"""L-BFGS within box bounds: a projected quasi-Newton method.

    minimize f(x)  with  l <= x <= u,    model  m(z) = f + g.(z - x) + (z - x).B (z - x) / 2,    B = theta I - W M W^T

Each iteration finds the generalised Cauchy point, the first minimizer of m along the projected path P(x - t g); the
variables that are at a bound there stay, the model is minimized in the others, and what comes out is projected onto the
box. A line search goes from x towards that point. Points that are evaluated are never outside the box.

References:
    Byrd, Lu, Nocedal and Zhu, A limited memory algorithm for bound constrained optimization, SIAM J. Sci. Comput. 16
    (1995): Algorithm CP, p. 8; the direct primal method, section 5.1; eq. 3.3 and 3.4 of the compact form.
    Morales and Nocedal, Remark on Algorithm 778, ACM TOMS 38 (2011): the projection of the subspace minimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant.result import Status
from secant.solvers.line_search import Trial, strong_wolfe

_EPS = torch.finfo(torch.float64).eps
#: Breakpoints of the projected path that are looked at together, first; then twice as many, and so on.
_BLOCK = 32
#: Iterations that neither the value nor the projected gradient shows to be of use; then the rest is rounding.
_PATIENCE = 20
#: Sufficient decrease, as in the published code.
_C1 = 1e-3

#: At a point of the box: its value and its gradient, of its shape; what is not finite counts as an infinite value.
Evaluate = Callable[[Tensor], tuple[float, Tensor]]


class BoxResult(NamedTuple):
    """Tells where a run in a box ended and why.

    x: of the dtype and shape that it began with. value, grad: there; the gradient in float64. status: CONVERGED for
    gtol, SMALL_CHANGE for ftol, MAX_ITER, MAX_EVAL, STALLED, NO_DESCENT, NOT_FINITE or STOPPED. n_iter, evaluations:
    how many.
    """

    x: Tensor
    value: float
    grad: Tensor
    status: Status
    n_iter: int
    evaluations: int


class BoxIterate(NamedTuple):
    """Holds an iterate as `record` is told it: number, point, value, |P(x - g) - x|_inf, step, evaluations so far."""

    n: int
    x: Tensor
    value: float
    grad_norm: float
    step: float
    evaluations: int


class _Point(NamedTuple):
    """Holds an evaluated point: x in float64, exactly what was evaluated, f and g."""

    x: Tensor
    value: float
    grad: Tensor


class Box:
    """The set l <= x <= u, of points of one dtype.

    Bounds that the dtype does not have are rounded inwards, so that no point of the box breaks them.

    Args:
        lower, upper: vectors of float64, infinite where there is no bound.
        dtype: of the points.

    Raises:
        ValueError: a lower bound is above the upper one, or no number of the dtype is between them.

    Example:
        >>> box = secant.solvers.box.Box(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 1.0]), torch.float32)
        >>> box.project(torch.tensor([3.0, 0.5]))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, lower: Tensor, upper: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.lower, self.upper = lower.double(), upper.double()
        if dtype is not torch.float64:
            up, down = lower.new_tensor(math.inf, dtype=dtype), lower.new_tensor(-math.inf, dtype=dtype)
            low, high = self.lower.to(dtype), self.upper.to(dtype)
            low = torch.where(low.double() < self.lower, torch.nextafter(low, up), low)
            high = torch.where(high.double() > self.upper, torch.nextafter(high, down), high)
            self.lower, self.upper = low.double(), high.double()
        if not bool((self.lower <= self.upper).all()):
            i = int((~(self.lower <= self.upper)).nonzero()[0])
            raise _checks.fail(
                "Box", f"bounds[{i}]", "lower <= upper", f"({float(self.lower[i])}, {float(self.upper[i])})"
            )
        self.bounded = bool(torch.isfinite(self.lower).any() or torch.isfinite(self.upper).any())
        self.finite = bool(torch.isfinite(self.lower).all() and torch.isfinite(self.upper).all())

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest point of the box, rounded to the dtype of its points, in float64."""
        x = torch.clamp(x.double(), self.lower, self.upper)
        return x if self.dtype is torch.float64 else x.to(self.dtype).double()

    def slack(self, x: Tensor, grad: Tensor) -> float:
        """Return |P(x - g) - x|_inf, which is zero where the first-order conditions hold."""
        return float(projected_gradient(x, grad, self.lower, self.upper).abs().max())

    def longest(self, x: Tensor, d: Tensor) -> float:
        """Return the largest t with x + t d in the box."""
        return float(room(x, d, self.lower, self.upper).min())


def room(x: Tensor, d: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Return the largest t with x + t d within the bounds, component by component; infinite where d is zero."""
    return torch.where(d == 0, torch.inf, torch.where(d > 0, upper - x, x - lower) / d.abs())


def projected_gradient(x: Tensor, grad: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Return x - P(x - grad), which is zero where x is optimal; without the rounding of that difference."""
    return torch.minimum(torch.maximum(grad, x - upper), x - lower)


class _Model:
    """The compact form B = theta I - W M W^T of the pairs (s_i, y_i), with theta = y.y / s.y of the newest.

    With W = [Y S], M^-1 = [[-D, L^T / theta], [L / theta, S^T S / theta]]: D has s_i.y_i, L the s_i.y_j with s_i newer
    than y_j. The rows of W^T are y_0, s_0, y_1, s_1, ...; a new pair takes the place of the oldest.
    """

    def __init__(self, n: int, history_size: int, device: torch.device) -> None:
        self._size = history_size
        self._rows = torch.empty(history_size, 2, n, dtype=torch.float64, device=device)
        self._gram = torch.zeros(history_size, 2, history_size, 2, dtype=torch.float64, device=device)
        self.clear()

    def clear(self) -> None:
        """Forget all pairs."""
        self.count, self._newest = 0, -1
        self._age: list[int] = []
        self.theta = 1.0

    def append(self, s: Tensor, y: Tensor) -> bool:
        """Take a pair, unless its curvature is not positive beyond rounding; tell whether it was taken."""
        sy, yy, ss = (float(torch.dot(a, b)) for a, b in ((s, y), (y, y), (s, s)))
        if not (sy > _EPS * math.sqrt(ss) * math.sqrt(yy) and math.isfinite(yy) and 0.0 < yy / sy < math.inf):
            return False
        slot = self._newest = (self._newest + 1) % self._size
        if self.count < self._size:
            self.count += 1
            self._age.append(0)
        self._age[slot] = max(self._age) + 1
        self._rows[slot, 0], self._rows[slot, 1] = y, s
        k = self.count
        products = (self.rows @ self._rows[slot].mT).view(k, 2, 2)
        self._gram[:k, :, slot] = products
        self._gram[slot, :, :k] = products.permute(2, 0, 1)
        self.theta = yy / sy
        self._factor()
        return True

    @property
    def rows(self) -> Tensor:
        """Give W^T, of shape (2 k, n)."""
        return self._rows[: self.count].flatten(0, 1)

    def _factor(self) -> None:
        """Form M^-1, with rows and columns scaled to a diagonal of +-1, and factor it."""
        k, theta = self.count, self.theta
        gram = self._gram[:k, :, :k]
        sy = gram[:, 1, :, 0]
        age = torch.tensor(self._age, device=sy.device)
        newer = torch.where(age[:, None] > age[None, :], sy, 0.0) / theta
        inverse = torch.zeros_like(gram)
        inverse[:, 0, :, 0] = torch.diag(-sy.diagonal())
        inverse[:, 0, :, 1], inverse[:, 1, :, 0] = newer.mT, newer
        inverse[:, 1, :, 1] = gram[:, 1, :, 1] / theta
        self._inverse = inverse.reshape(2 * k, 2 * k)
        self._scale = self._inverse.diagonal().abs().rsqrt()
        self._lu = self._factored(self._inverse)

    def _factored(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        factors, pivots, _ = torch.linalg.lu_factor_ex(self._scale[:, None] * matrix * self._scale)
        return factors, pivots

    def _solved(self, lu: tuple[Tensor, Tensor], b: Tensor) -> Tensor:
        columns = torch.atleast_2d(self._scale * b).mT
        return self._scale * torch.linalg.lu_solve(*lu, columns).mT.view_as(b)

    def middle(self, b: Tensor) -> Tensor:
        """Multiply M and each row of b, of shape (2 k) or (r, 2 k)."""
        return self._solved(self._lu, b)

    def newton(self, r: Tensor, free: Tensor | None) -> Tensor:
        """Solve B_FF d = -r in the free variables, by the formula of Sherman, Morrison and Woodbury (eq. 5.11).

        free: their indices; None: all.
        """
        theta = self.theta
        if self.count == 0:
            return -r / theta
        rows = self.rows if free is None else self.rows.index_select(1, free)
        k = self.count
        gram = self._gram[:k, :, :k].reshape(2 * k, 2 * k) if free is None else rows @ rows.mT
        v = self._solved(self._factored(self._inverse - gram / theta), rows @ r)
        return -(r + (v @ rows) / theta) / theta


class _Path(NamedTuple):
    """Where the path P(x - t g) has its Cauchy point: the point, W^T (point - x), and which variables are free."""

    x: Tensor
    c: Tensor
    free: Tensor


def _cauchy(box: Box, x: Tensor, g: Tensor, model: _Model) -> _Path:
    """Find the first minimizer of the model along P(x - t g), Algorithm CP.

    Passing the breakpoint of variable b changes p, c, f' and f'' by sums over the breakpoints before it; so they are
    formed for a block of breakpoints at once, as cumulative sums.
    """
    bound = torch.where(g < 0, box.upper, box.lower)
    stuck = ((x <= box.lower) & (g >= 0)) | ((x >= box.upper) & (g <= 0))
    t = torch.where(stuck, 0.0, torch.where(g == 0, math.inf, (x - bound) / g))
    d = torch.where(t > 0, -g, 0.0)
    theta, rows, some = model.theta, model.rows, model.count > 0
    p = rows @ d
    c = torch.zeros_like(p)
    slope = -float(torch.dot(d, d))
    curvature = -theta * slope - (float(torch.dot(p, model.middle(p))) if some else 0.0)
    least = _EPS * -theta * slope
    curvature = max(curvature, least)
    if not curvature > 0.0:  # |d|^2 is below what a number can be
        return _Path(x.clone(), c, t > 0)

    candidates = ((t > 0) & (t < math.inf)).nonzero()[:, 0]
    times, order = t[candidates].sort()
    order = candidates[order]
    passed, block, last = 0, _BLOCK, 0.0
    while passed < len(order):
        if -slope / curvature < float(times[passed]) - last:
            break
        b, tb = order[passed : passed + block], times[passed : passed + block]
        gb, zb = g[b], bound[b] - x[b]
        dt = torch.diff(tb, prepend=tb.new_tensor([last]))
        change_2, change_1 = -theta * gb * gb, gb * gb + theta * gb * zb
        if some:
            wb = rows.index_select(1, b).mT
            ps = torch.cat([p[None], p + (gb[:, None] * wb).cumsum(0)])
            cs = torch.cat([c[None], c + (dt[:, None] * ps[:-1]).cumsum(0)])
            wm = model.middle(wb)
            change_2 = change_2 - gb * (2.0 * (wm * ps[:-1]).sum(1) + gb * (wm * wb).sum(1))
            change_1 = change_1 - gb * (wm * cs[1:]).sum(1)
        curvatures = torch.cat([dt.new_tensor([curvature]), curvature + change_2.cumsum(0)]).clamp_min(least)
        slopes = torch.cat([dt.new_tensor([slope]), slope + (dt * curvatures[:-1] + change_1).cumsum(0)])
        ends = (-slopes[:-1] / curvatures[:-1] < dt).nonzero()[:, 0]
        k = int(ends[0]) if len(ends) else len(b)
        if k:
            passed, last = passed + k, float(tb[k - 1])
        slope, curvature = float(slopes[k]), float(curvatures[k])
        if some:
            p, c = ps[k], cs[k]
        if len(ends):
            break
        block *= 2
    done = order[:passed]
    moves = t > 0
    moves[done] = False
    rest = max(-slope / curvature, 0.0) if bool(moves.any()) else 0.0
    point = torch.where(moves, x + (last + rest) * d, x)
    point[done] = bound[done]
    return _Path(torch.clamp(point, box.lower, box.upper), c + rest * p, moves)


def _target(box: Box, x: Tensor, g: Tensor, model: _Model) -> Tensor:
    """Minimize the model over the box, roughly: the Cauchy point, and from there in its free variables.

    The minimizer in these is projected onto the box; where that way does not descend, it is followed from the Cauchy
    point up to the first bound.
    """
    if not box.bounded:
        return x + model.newton(g, None)
    path = _cauchy(box, x, g, model)
    free = path.free.nonzero()[:, 0]
    if model.count == 0 or len(free) == 0:
        return path.x
    r = g + model.theta * (path.x - x) - model.middle(path.c) @ model.rows
    whole = len(free) == len(x)
    d = model.newton(r if whole else r[free], None if whole else free)
    if not whole:
        d = torch.zeros_like(x).index_copy(0, free, d)
    target = torch.clamp(path.x + d, box.lower, box.upper)
    if float(torch.dot(target - x, g)) > 0.0:
        target = torch.clamp(path.x + min(1.0, box.longest(path.x, d)) * d, box.lower, box.upper)
    return target


class _Search:
    """Evaluates points and searches along lines within the box; counts."""

    def __init__(self, evaluate: Evaluate, box: Box, like: Tensor, rounding: float, max_evaluations: int) -> None:
        self._evaluate, self._box, self._like, self._rounding = evaluate, box, like, rounding
        self.max_evaluations, self.evaluations = max_evaluations, 0

    @property
    def left(self) -> int:
        """Give the evaluations that are left."""
        return self.max_evaluations - self.evaluations

    def at(self, x: Tensor) -> _Point:
        """Evaluate at a point of the box."""
        self.evaluations += 1
        value, grad = self._evaluate(x.to(self._like.dtype).view(self._like.shape))
        grad = grad.detach().double().reshape(-1)
        if not (math.isfinite(value) and bool(torch.isfinite(grad).all())):
            value = math.inf
        return _Point(x, value, grad)

    def along(self, start: _Point, target: Tensor, slope: float, t: float, trials: int) -> tuple[_Point, float, bool]:
        """Search from start towards the target, and beyond it up to the bounds.

        Returns the point, its t (0 for the start), and whether any trial was finite.
        """
        d = target - start.x
        longest = max(self._box.longest(start.x, d), 1.0)
        tried: dict[float, _Point] = {0.0: start}
        finite = False

        def trial(t: float) -> Trial:
            nonlocal finite
            point = tried[t] = self.at(self._box.project(target if t == 1.0 else start.x + t * d))
            finite = finite or math.isfinite(point.value)
            return Trial(t, point.value, float(torch.dot(point.grad, d)))

        new = trial(min(t, longest))
        search = strong_wolfe(
            Trial(0.0, start.value, slope),
            new,
            c1=_C1,
            tolerance=0.0,
            max_evaluations=min(trials, self.left + 1),
            noise=self._rounding * abs(start.value),
        )
        begun = False
        try:
            while True:
                t, best = search.send(new) if begun else next(search)
                begun = True
                if t > longest:
                    if new.t == longest:  # it still falls where the box ends
                        return tried[longest], longest, True
                    t = longest
                for other in tried.keys() - {0.0, best}:
                    del tried[other]
                new = trial(t)
        except StopIteration as end:
            chosen = end.value.trial.t
            return tried[chosen], chosen, finite


def lbfgs_b(
    evaluate: Evaluate,
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    history_size: int = 20,
    gtol: float = 1e-5,
    ftol: float = 1e7 * _EPS,
    max_iter: int = 15000,
    max_evaluations: int = 15000,
    max_trials: int = 20,
    rounding: float | None = None,
    record: Callable[[BoxIterate], object] | None = None,
) -> BoxResult:
    """Minimize a smooth function within box bounds by L-BFGS-B.

    Vectors and scalars of the method are float64, whatever the dtype of x; the points that are evaluated have that of x
    and are in the box. A point whose value or gradient is not finite is never accepted. The curvature of a pair is
    learned where s.y > eps |s| |y|. A search that finds nothing drops the pairs, and the method goes on from the
    projected gradient; if it finds nothing then, it ends.

    Args:
        evaluate: x -> (f(x), gradient), x of the shape and dtype of the start.
        x: where to start, float32 or float64, of any shape; projected onto the box.
        lower, upper: tensors of the shape of x, or that broadcast to it; infinite where there is no bound.
        history_size: pairs kept, >= 1.
        gtol: stop when |P(x - g) - x|_inf is at most this, P the projection onto the box.
        ftol: stop when f falls by at most this times max(|f_k|, |f_k+1|, 1); 0: go on where values cannot tell, by the
            gradient, until twenty iterations have lowered neither.
        max_iter: iterations.
        max_evaluations: of f with its gradient.
        max_trials: evaluations of one line search.
        rounding: error of a value relative to it; None: the machine epsilon of x.
        record: told each iterate, the start as number 0; a true value stops.

    Returns:
        A `BoxResult`.

    Raises:
        TypeError, ValueError: an argument is invalid. What `evaluate` raises passes.

    Example: the nearest point of the unit square to (2, 0.5).
        >>> def evaluate(x):
        ...     r = x - torch.tensor([2.0, 0.5])
        ...     return float(r @ r), 2.0 * r
        >>> found = secant.solvers.lbfgs_b(evaluate, torch.zeros(2), torch.zeros(2), torch.ones(2))
        >>> found.x, str(found.status)
        (tensor([1.0000, 0.5000]), 'converged')
    """
    op = "lbfgs_b"
    _checks.tensor(op, "x", x, _checks.REAL)
    box = Box(_checked_bound(op, "lower", lower, x), _checked_bound(op, "upper", upper, x), x.dtype)
    _checks.integer(op, "history_size", history_size, 1)
    for name, limit in (("max_iter", max_iter), ("max_evaluations", max_evaluations), ("max_trials", max_trials)):
        _checks.integer(op, name, limit, 1)
    for name, tolerance in (("gtol", gtol), ("ftol", ftol)):
        _checks.nonnegative(op, name, tolerance)

    rounding = torch.finfo(x.dtype).eps if rounding is None else rounding
    search = _Search(evaluate, box, x, rounding, max_evaluations)
    model = _Model(x.numel(), history_size, x.device)
    point = search.at(box.project(x.detach().reshape(-1)))
    last, n, step = point, 0, 0.0
    lowest, flattest, since = math.inf, math.inf, 0

    def end(status: Status) -> BoxResult:
        shaped = point.x.to(x.dtype).view(x.shape)
        return BoxResult(shaped, point.value, point.grad.view(x.shape), status, n, search.evaluations)

    if not math.isfinite(point.value):
        return end(Status.NOT_FINITE)
    while True:
        slack = box.slack(point.x, point.grad)
        if record is not None and record(
            BoxIterate(n, point.x.to(x.dtype).view(x.shape), point.value, slack, step, search.evaluations)
        ):
            return end(Status.STOPPED)
        if slack <= gtol:
            return end(Status.CONVERGED)
        if n > 0 and ftol > 0.0 and last.value - point.value <= ftol * max(abs(last.value), abs(point.value), 1.0):
            return end(Status.SMALL_CHANGE)
        since = 0 if point.value < lowest or slack < flattest else since + 1
        lowest, flattest = min(lowest, point.value), min(flattest, slack)
        if since == _PATIENCE:
            return end(Status.STALLED)
        if n >= max_iter:
            return end(Status.MAX_ITER)
        last = point
        while True:
            target = _target(box, point.x, point.grad, model)
            d = target - point.x
            slope, size = float(torch.dot(point.grad, d)), float(d.norm())
            failed = Status.NO_DESCENT if math.isfinite(slope) and math.isfinite(size) else Status.NOT_FINITE
            if -math.inf < slope < 0.0 and size < math.inf:
                if search.left < 1:
                    return end(Status.MAX_EVAL)
                t = 1.0 if model.count or box.finite else min(1.0, 1.0 / size)
                point, step, finite = search.along(last, target, slope, t, max_trials)
                if step != 0.0:
                    break
                if search.left < 1:
                    return end(Status.MAX_EVAL)
                failed = Status.STALLED if finite else Status.NOT_FINITE
            if model.count == 0:
                return end(failed)
            model.clear()
        model.append(point.x - last.x, point.grad - last.grad)
        n += 1


def _checked_bound(op: str, name: str, bound: object, x: Tensor) -> Tensor:
    """Check a bound and lay it out like x."""
    bound = _checks.tensor(op, name, bound, _checks.REAL, x.device)
    try:
        return bound.detach().double().expand(x.shape).reshape(-1)
    except RuntimeError:
        raise _checks.fail(op, name, f"a shape that broadcasts to {tuple(x.shape)}", tuple(bound.shape)) from None
