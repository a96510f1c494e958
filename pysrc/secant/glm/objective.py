"""The objective of a generalised linear model at a point: value, gradient, Hessian products, Hessian."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant.glm.gram import block_rows, row_blocks, softmax_gram, weighted_gram, weighted_moments
from secant.ops import hvp as ops

#: Second derivative of a row's logistic loss below which it is taken for this in what approximates the Hessian.
_SATURATED = 1e-12


class FitPoint(NamedTuple):
    """Holds what is known of the objective at one point.

    theta: coefficients, (p,) or (p, K), the intercept in the last row if there is one. value: of the sum. grad: of the
    sum, as theta. largest: max |grad_j|. curvature: second derivatives by row (N,), or probabilities (N, K).
    """

    theta: Tensor
    value: float
    grad: Tensor
    largest: float
    curvature: Tensor

    @property
    def finite(self) -> bool:
        """Tell whether value and gradient are."""
        return math.isfinite(self.value) and math.isfinite(self.largest)


@dataclass(frozen=True, eq=False)
class Objective:
    """sum_i c_i loss((x_i - m) . w + b + o_i, t_i) + l2 / 2 |w|^2 over (w, b).

    x: (N, d) dense or CSR. target: (N,), of the dtype of x, or int64 classes. delta: of the Huber loss. power: of the
    Tweedie. classes: K for "multinomial", else 0. total: sum of the c_i. offset: (N,) or (N, K), the o_i, or None.
    shift: (d,), m, or None for zero, only with an intercept. level: what was taken off the targets and the intercept.
    """

    x: Tensor
    target: Tensor
    loss: str
    delta: float
    sample_weight: Tensor | None
    l2: float
    intercept: bool
    classes: int
    total: float
    offset: Tensor | None = None
    shift: Tensor | None = None
    level: float = 0.0
    power: float = 1.5

    @property
    def rows(self) -> int:
        """Count them: N."""
        return self.x.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Give that of theta."""
        p = self.x.shape[1] + self.intercept
        return (p, self.classes) if self.classes else (p,)

    def zeros(self) -> Tensor:
        """Make coefficients to start from."""
        return torch.zeros(self.shape, dtype=self.x.dtype, device=self.x.device)

    def first(self) -> Tensor:
        """Choose coefficients to start from: zero, and with a logarithmic link the intercept that is best for these.

        From zero Newton's method moves a predictor by about one an iteration, however far the targets are.
        """
        theta = self.zeros()
        powers = {"poisson": 1.0, "gamma": 2.0, "tweedie": self.power}
        if not self.intercept or self.loss not in powers:
            return theta
        p = powers[self.loss]
        offset = torch.zeros_like(self.target) if self.offset is None else self.offset
        log_c = 0.0 if self.sample_weight is None else self.sample_weight.double().log()
        above = torch.logsumexp(log_c + self.target.double().log() + (1.0 - p) * offset.double(), 0)
        best = above - torch.logsumexp(log_c + (2.0 - p) * offset.double() + torch.zeros_like(offset).double(), 0)
        if bool(torch.isfinite(best)):
            theta[self.x.shape[1]] = best
        return theta

    def evaluate(self, theta: Tensor) -> FitPoint:
        """Evaluate by one pass over X (two with an offset) and one transfer to the host."""
        if self.shift is None:
            value, grad, curvature = self._value_grad(self.x, theta, slice(None), self.l2)
        else:
            value, total, curvatures = self._penalty(theta), self._penalty_grad(theta), []
            for rows, block in self._blocks():
                part, grad, curvature = self._value_grad(block, theta, rows, 0.0)
                value += part
                total += grad
                curvatures.append(curvature)
            grad, curvature = total.to(theta.dtype), torch.cat(curvatures)
        number, largest = torch.stack([value, grad.abs().amax().double()]).tolist()
        return FitPoint(theta, number, grad, largest, curvature)

    def move(self, point: FitPoint, p: Tensor, t: float) -> FitPoint:
        """Evaluate at the point plus t p."""
        return self.evaluate(point.theta + t * p)

    def noise(self, point: FitPoint) -> float:
        """Bound the rounding error of the difference of two values near the point."""
        return 16.0 * torch.finfo(point.grad.dtype).eps * max(abs(point.value), self.total)

    def _value_grad(self, x: Tensor, theta: Tensor, rows: slice, l2: float) -> tuple[Tensor, Tensor, Tensor]:
        """Give (value, grad, curvature) of some rows, which `x` holds as they are to be taken."""
        c = None if self.sample_weight is None else self.sample_weight[rows]
        if self.offset is not None:
            return self._value_grad_with_offset(x, theta, rows, c, l2)
        return self._kernel(x, self.target[rows], theta, c, l2, self.intercept)

    def _kernel(
        self, x: Tensor, target: Tensor, theta: Tensor, c: Tensor | None, l2: float, intercept: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        common: dict[str, Any] = {"sample_weight": c, "l2": l2, "intercept": intercept}
        if self.classes:
            return ops.softmax_value_grad(x, target, theta, **common)
        return ops.glm_value_grad(x, target, theta, loss=self.loss, delta=self.delta, power=self.power, **common)

    def _value_grad_with_offset(
        self, x: Tensor, theta: Tensor, rows: slice, c: Tensor | None, l2: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do without an offset in the kernels: for value and curvature the predictors are taken for features."""
        assert self.offset is not None
        target, d = self.target[rows], self.x.shape[1]
        z = x @ theta[:d] + self.offset[rows]
        if self.intercept:
            z = z + theta[d]
        if self.classes:
            value, _, curvature = self._kernel(z, target, torch.eye(self.classes).to(z), c, 0.0, False)
            r = curvature.scatter_add(1, target[:, None], curvature.new_full((len(target), 1), -1.0))
        else:
            value, _, curvature = self._kernel(z[:, None], target, z.new_ones(1), c, 0.0, False)
            r = _slopes(self.loss, z, target, self.delta, self.power)
        if c is not None:
            r = r * (c[:, None] if self.classes else c)
        grad = x.mT @ r
        if self.intercept:
            grad = torch.cat([grad, r.sum(0, keepdim=True)])
        if l2:
            value, grad = value + self._penalty(theta), grad + self._penalty_grad(theta).to(grad.dtype)
        return value, grad, curvature

    def _penalty(self, theta: Tensor) -> Tensor:
        return self.l2 / 2 * (theta[: self.x.shape[1]].double() ** 2).sum()

    def _penalty_grad(self, theta: Tensor) -> Tensor:
        grad = self.l2 * theta.double()
        grad[self.x.shape[1] :] = 0.0
        return grad

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start, stop, block in row_blocks(self.x, block_rows(self.x, 2 * self.x.shape[1]), self.shift):
            yield slice(start, stop), block

    def hvp(self, point: FitPoint, v: Tensor) -> Tensor:
        """Multiply the Hessian at the point by v; one pass over X."""
        if self.shift is None:
            return self._hvp(self.x, point.curvature, v, slice(None), self.l2)
        total = self._penalty_grad(v)
        for rows, block in self._blocks():
            total += self._hvp(block, point.curvature[rows], v, rows, 0.0)
        return total.to(v.dtype)

    def _hvp(self, x: Tensor, curvature: Tensor, v: Tensor, rows: slice, l2: float) -> Tensor:
        if self.classes:
            c = None if self.sample_weight is None else self.sample_weight[rows]
            return ops.softmax_hvp(x, v, curvature, sample_weight=c, l2=l2, intercept=self.intercept)
        return ops.glm_hvp(x, v, curvature, l2=l2, intercept=self.intercept)

    def product(self, theta: Tensor) -> Tensor:
        """Compute (x_i - m) . w + b by row, (N,) or (N, K), without the offset."""
        d = self.x.shape[1]
        if self.shift is None:
            z = self.x @ theta[:d]
        else:
            z = torch.cat([block @ theta[:d] for _, block in self._blocks()])
        return z + theta[d] if self.intercept else z

    def uncentred(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Give (w, b) of x_i . w + b, with no shift taken off the features. b is zero without an intercept."""
        w, d = theta[: self.x.shape[1]], self.x.shape[1]
        if not self.intercept:
            return w, torch.zeros_like(theta[0])
        b = theta[d].double() + self.level
        if self.shift is not None:
            b = b - self.shift.double() @ w.double()
        return w, b.to(theta.dtype)

    def centred(self, w: Tensor, b: Tensor) -> Tensor:
        """Make theta of coefficients and intercept as `uncentred` gives them."""
        if not self.intercept:
            return w.clone()
        b = b.double() - self.level
        if self.shift is not None:
            b = b + self.shift.double() @ w.double()
        return torch.cat([w, b.to(w.dtype)[None]])

    @property
    def majorised(self) -> bool:
        """Tell whether `gram` and `moments` are those of an upper bound of the Hessian.

        Huber's second derivative is 0 or 1 and says nothing about the rows on the other side of delta; 1 bounds it.
        """
        return self.loss == "huber"

    def gram(self, point: FitPoint) -> Tensor:
        """Compute the Hessian (or its bound), (P, P) float64 over the flattened theta."""
        if self.classes:
            h = softmax_gram(
                self.x, self._unsaturated(point), self.sample_weight, intercept=self.intercept, shift=self.shift
            )
            return self._fix_gauge(h).reshape(math.prod(self.shape), -1)
        h = weighted_gram(self.x, self._row_weight(point), intercept=self.intercept, shift=self.shift)
        h.diagonal()[: self.x.shape[1]] += self.l2
        return h

    def moments(self, point: FitPoint) -> tuple[Tensor, Tensor, Tensor]:
        """Compute `weighted_moments` with the diagonals of the Hessians by row."""
        return weighted_moments(self.x, self._row_weight(point), self.shift)

    def sample(self, stride: int) -> Objective:
        """Make the objective on every stride-th row, weighted so that it estimates this one."""
        x = self.x[::stride]
        c = self.sample_weight
        if c is None:
            c = torch.ones(x.shape[0], dtype=x.dtype, device=x.device)
        else:
            c = c[::stride]
        kept = float(c.double().sum())
        scaled = c * (self.total / kept) if kept > 0.0 else c
        offset = None if self.offset is None else self.offset[::stride]
        target = self.target[::stride].contiguous()
        return replace(self, x=x, target=target, sample_weight=scaled.contiguous(), offset=offset)

    def _row_weight(self, point: FitPoint) -> Tensor:
        if self.majorised:
            return torch.ones_like(point.curvature) if self.sample_weight is None else self.sample_weight
        curvature = self._unsaturated(point)
        if not self.classes:
            return curvature
        w = curvature * (1.0 - curvature)
        return w if self.sample_weight is None else w * self.sample_weight[:, None]

    def _unsaturated(self, point: FitPoint) -> Tensor:
        """Take `point.curvature`, of which rows with huge logits keep some: else a step may be longer than 1e200."""
        curvature = point.curvature
        if self.classes:
            return curvature * (1.0 - _SATURATED) + _SATURATED / self.classes
        if self.loss != "logistic":
            return curvature
        floor = _SATURATED if self.sample_weight is None else _SATURATED * self.sample_weight
        return torch.clamp(curvature, min=floor)

    def _fix_gauge(self, h: Tensor) -> Tensor:
        """Add l2, and what makes the multinomial Hessian regular.

        Adding one number to a row of theta changes no probability. Where no penalty decides, the Hessian is singular
        along it and the gradient is zero: any positive curvature there leaves the Newton step as it is.
        """
        k, d = self.classes, self.x.shape[1]
        diagonal = h.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1)  # (p, K)
        size = diagonal.mean(1)
        diagonal[:d] += self.l2
        if self.l2 > 0.0:
            size[:d] = 0.0
        h += torch.diag(size / k)[:, None, :, None]
        return h


def _slopes(loss: str, z: Tensor, t: Tensor, delta: float, power: float) -> Tensor:
    """Differentiate each row's loss by its predictor."""
    if loss == "squared":
        return z - t
    if loss == "logistic":
        return (1.0 - t) * torch.sigmoid(z) - t * torch.sigmoid(-z)
    if loss == "poisson":
        return torch.exp(z) - t
    if loss == "gamma":
        return 1.0 - t * torch.exp(-z)
    if loss == "tweedie":
        # A target of zero makes its term zero for every z.
        return torch.exp((2.0 - power) * z) - torch.where(t == 0.0, 0.0, t * torch.exp((1.0 - power) * z))
    return (z - t).clamp(-delta, delta)
