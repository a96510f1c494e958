"""The objective of a generalised linear model at a point: value, gradient, Hessian products, Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant.glm.gram import softmax_gram, weighted_gram, weighted_moments
from secant.ops import hvp as ops

#: Second derivative of a row's logistic loss below which it is taken for this in what approximates the Hessian.
_SATURATED = 1e-12


class Point(NamedTuple):
    """Where the objective was evaluated.

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
        """Whether value and gradient are."""
        return math.isfinite(self.value) and math.isfinite(self.largest)


@dataclass(frozen=True, eq=False)
class Objective:
    """sum_i c_i loss(x_i . w + b, t_i) + l2 / 2 |w|^2 over (w, b).

    x: (N, d) dense or CSR. target: (N,), of the dtype of x, or int64 classes. classes: K for "multinomial", else 0.
    total: sum of the c_i.
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

    @property
    def rows(self) -> int:
        """N."""
        return self.x.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of theta."""
        p = self.x.shape[1] + self.intercept
        return (p, self.classes) if self.classes else (p,)

    def zeros(self) -> Tensor:
        """Coefficients to start from."""
        return torch.zeros(self.shape, dtype=self.x.dtype, device=self.x.device)

    def evaluate(self, theta: Tensor) -> Point:
        """One pass over X, one transfer to the host."""
        common: dict[str, Any] = {"sample_weight": self.sample_weight, "l2": self.l2, "intercept": self.intercept}
        if self.classes:
            value, grad, curvature = ops.softmax_value_grad(self.x, self.target, theta, **common)
        else:
            value, grad, curvature = ops.glm_value_grad(
                self.x, self.target, theta, loss=self.loss, delta=self.delta, **common
            )
        number, largest = torch.stack([value, grad.abs().amax().double()]).tolist()
        return Point(theta, number, grad, largest, curvature)

    def hvp(self, point: Point, v: Tensor) -> Tensor:
        """Hessian at the point times v; one pass over X."""
        if self.classes:
            return ops.softmax_hvp(
                self.x, v, point.curvature, sample_weight=self.sample_weight, l2=self.l2, intercept=self.intercept
            )
        return ops.glm_hvp(self.x, v, point.curvature, l2=self.l2, intercept=self.intercept)

    def product(self, theta: Tensor) -> Tensor:
        """x_i . w + b by row, (N,) or (N, K)."""
        d = self.x.shape[1]
        z = self.x @ theta[:d]
        return z + theta[d] if self.intercept else z

    @property
    def majorised(self) -> bool:
        """Whether `gram` and `moments` are those of an upper bound of the Hessian.

        Huber's second derivative is 0 or 1 and says nothing about the rows on the other side of delta; 1 bounds it.
        """
        return self.loss == "huber"

    def gram(self, point: Point) -> Tensor:
        """The Hessian (or its bound), (P, P) float64 over the flattened theta."""
        if self.classes:
            h = softmax_gram(self.x, self._unsaturated(point), self.sample_weight, intercept=self.intercept)
            return self._fix_gauge(h).reshape(math.prod(self.shape), -1)
        h = weighted_gram(self.x, self._row_weight(point), intercept=self.intercept)
        h.diagonal()[: self.x.shape[1]] += self.l2
        return h

    def moments(self, point: Point) -> tuple[Tensor, Tensor, Tensor]:
        """`weighted_moments` with the diagonals of the Hessians by row."""
        return weighted_moments(self.x, self._row_weight(point))

    def sample(self, stride: int) -> Objective:
        """The objective on every stride-th row, weighted so that it estimates this one."""
        x = self.x[::stride]
        c = self.sample_weight
        if c is None:
            c = torch.ones(x.shape[0], dtype=x.dtype, device=x.device)
        else:
            c = c[::stride]
        kept = float(c.double().sum())
        scaled = c * (self.total / kept) if kept > 0.0 else c
        return replace(self, x=x, target=self.target[::stride].contiguous(), sample_weight=scaled.contiguous())

    def _row_weight(self, point: Point) -> Tensor:
        if self.majorised:
            return torch.ones_like(point.curvature) if self.sample_weight is None else self.sample_weight
        curvature = self._unsaturated(point)
        if not self.classes:
            return curvature
        w = curvature * (1.0 - curvature)
        return w if self.sample_weight is None else w * self.sample_weight[:, None]

    def _unsaturated(self, point: Point) -> Tensor:
        """`point.curvature`, of which rows with huge logits keep some: else a step may be longer than 1e200."""
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
