"""Problems of the `hvp` family, the reference's answers in float64, and how far rounding may carry an answer.

The bounds are of the first order in the rounding unit of the arithmetic, with worst-case constants (Higham, Accuracy
and Stability of Numerical Algorithms, section 3.1): an inner product of length d is summed in at least two partial
sums, d/2 additions each; a sum over rows in runs of at most 512 rows, then in float64.
"""

from __future__ import annotations

import torch
from secant.kernels import hvp
from secant.kernels.hvp import reference
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LOSSES = hvp.LOSSES
RUN = 512
#: Roundings of an exponential, a logarithm, a quotient and what is done with them.
FUNCTION = 12


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for X of `dtype`."""
    return F64 if dtype is F64 else F32


def unit(dtype: torch.dtype) -> float:
    """The rounding unit of the arithmetic."""
    return torch.finfo(arithmetic(dtype)).eps / 2


def shape_of(loss: str, delta: float) -> float:
    """The number that a loss takes: a power for "tweedie", `delta` for the others."""
    return 1.3 if loss == "tweedie" else delta


class Problem:
    """Random data of N rows and d features, all of it positive or negative alike, and its answers."""

    def __init__(self, n: int, d: int, dtype: torch.dtype, k: int = 1, *, intercept: bool = False, seed: int = 0):
        g = torch.Generator().manual_seed(seed + 7919 * n + 31 * d + k)
        self.n, self.d, self.k, self.dtype, self.compute = n, d, k, dtype, arithmetic(dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=F64)

        self.x = normal(n, d).to(dtype)
        self.v = (normal(d + intercept, k) / max(1, d) ** 0.5).to(self.compute)
        self.weight = torch.rand(n, generator=g, dtype=F64).to(self.compute)
        self.sample_weight = (torch.rand(n, generator=g, dtype=F64) * 2).to(self.compute)
        self.binary = (torch.rand(n, generator=g) < 0.5).to(self.compute)
        self.counts = torch.poisson(torch.rand(n, generator=g) * 4, generator=g).to(self.compute)
        self.classes = torch.randint(k, (n,), generator=g)
        self.probs = torch.softmax(normal(n, k), -1).to(self.compute)

    def target(self, loss: str) -> Tensor:
        """A target that suits the loss."""
        suited = {"logistic": self.binary, "poisson": self.counts, "gamma": self.counts + 0.5, "tweedie": self.counts}
        return suited.get(loss, self.counts - 2)


def csr(x: Tensor, index: torch.dtype = torch.int64) -> Tensor:
    """The entries of a dense matrix that are not zero, with indices of this dtype."""
    sparse = x.to_sparse_csr()
    crow, col = sparse.crow_indices().to(index), sparse.col_indices().to(index)
    return torch.sparse_csr_tensor(crow, col, sparse.values(), x.shape, check_invariants=True)


def _with_ones(x: Tensor, rows: int) -> Tensor:
    x = x.double()
    return torch.cat((x, torch.ones(len(x), 1, dtype=F64)), 1) if rows > x.shape[1] else x


def _logits_error(x: Tensor, v: Tensor, u: float) -> Tensor:
    return (x.shape[1] / 2 + 8) * u * (x.abs() @ v.abs())


def _gradient_bound(x: Tensor, r: Tensor, r_error: Tensor, u: float) -> Tensor:
    """Of X^T r, for r with an error."""
    return x.abs().mT @ (r_error + (min(len(x), RUN) + 8) * u * r.abs())


def product_bound(x: Tensor, v: Tensor, weight: Tensor, l2: float, dtype: torch.dtype) -> Tensor:
    """Of X^T (weight * (X v)) + l2 v, componentwise."""
    u, x, v = unit(dtype), _with_ones(x, len(v)), v.double()
    w, z = weight.double().abs()[:, None], x.abs() @ v.abs()
    return _gradient_bound(x, w * z, w * (_logits_error(x, v, u) + 2 * u * z), u) + 4 * u * l2 * v.abs()


def gram_bound(x: Tensor, weight: Tensor | None, before: Tensor | None = None, run: int = 256) -> Tensor:
    """Of X^T diag(weight) X, added to `before`: sums of `run` rows, added in float64 or in the arithmetic itself."""
    size = x.double().abs()
    size = size.mT @ (size if weight is None else weight.double().abs()[:, None] * size)
    runs = len(x) / run if x.dtype is F64 or run != 256 else 0  # the CPU adds those of float32 in float64
    terms = min(len(x), run) + runs + 4
    return (size * terms + (0 if before is None else 4 * before.double().abs())) * unit(x.dtype)


def value_grad_bounds(
    x: Tensor, target: Tensor, coef: Tensor, loss: str, delta: float, c: Tensor | None, l2: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of value, gradient and weights. Where a weight may jump (huber) its bound is 1."""
    u, x, coef, t = unit(dtype), _with_ones(x, len(coef)), coef.double(), target.double()
    c = torch.ones(len(x), dtype=F64) if c is None else c.double()
    z = x @ coef
    dz = _logits_error(x, coef, u)
    value, first, second = reference.losses(z, t, loss, delta)
    if loss == "poisson":
        slope = torch.exp(z) * torch.expm1(dz.clamp(max=1)) / dz.clamp(min=1e-300)  # of exp over the error
        parts, jump = torch.exp(z) + (t * z).abs(), slope
    elif loss in ("gamma", "tweedie"):
        # Terms a e^(bz): over the error they grow by its exponential, and b z is rounded before that is taken.
        up, down = torch.exp((2 - delta) * z), t * torch.exp((1 - (2 if loss == "gamma" else delta)) * z)
        slope = (down if loss == "gamma" else up + down) * torch.expm1(dz.clamp(max=1)) / dz.clamp(min=1e-300)
        rounded = 1 + z.abs()
        if loss == "gamma":
            parts, jump = down * rounded + z.abs(), slope
        else:
            parts, jump = (up / (2 - delta) + down / (delta - 1)) * rounded, slope
    elif loss == "logistic":
        slope, parts, jump = torch.full_like(z, 0.25), 1 + (t * z).abs() + value, second
    else:
        slope, parts, jump = torch.ones_like(z), value + z.abs() + t.abs() + first**2, torch.zeros_like(z)
    first_error = slope * dz + FUNCTION * u * (
        first.abs() + (z.abs() + t.abs() if loss in ("squared", "huber") else 1 + t)
    )
    if loss == "poisson":
        first_error = first_error + FUNCTION * u * torch.exp(z)
    if loss in ("gamma", "tweedie"):
        terms_of_first = down + 1 if loss == "gamma" else up + down
        first_error = slope * dz + FUNCTION * u * terms_of_first * rounded
        second = second * rounded
    terms = c * ((first.abs() + first_error) * dz + FUNCTION * u * parts + first_error * first.abs())
    weight = c * (jump * dz * 2 + FUNCTION * u * second)
    if loss == "huber":
        weight = torch.where(((z - t).abs() - delta).abs() <= 2 * dz + 4 * u * (z.abs() + t.abs()), c, weight)
    grad = _gradient_bound(x, c * first, c * first_error, u) + 4 * u * l2 * coef.abs()
    return terms.sum() + 4 * u * l2 * (coef**2).sum() + 1e-12 * (c * value).abs().sum(), grad, weight


def softmax_bound(x: Tensor, v: Tensor, probs: Tensor, c: Tensor | None, l2: float, dtype: torch.dtype) -> Tensor:
    """Of `softmax_hvp`."""
    u, x, v, p = unit(dtype), _with_ones(x, len(v)), v.double(), probs.double()
    c = torch.ones(len(x), 1, dtype=F64) if c is None else c.double()[:, None]
    z, dz = x.abs() @ v.abs(), _logits_error(x, v, u)
    classes = v.shape[1]
    mean, mean_error = (p * z).sum(-1, keepdim=True), (p * (dz + (classes / 2 + 8) * u * z)).sum(-1, keepdim=True)
    r = c * p * (z + mean)
    return _gradient_bound(x, r, c * p * (dz + mean_error) + 6 * u * r, u) + 4 * u * l2 * v.abs()


def softmax_value_grad_bounds(
    x: Tensor, coef: Tensor, c: Tensor | None, l2: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of value, gradient and probabilities."""
    u, x, coef = unit(dtype), _with_ones(x, len(coef)), coef.double()
    c = torch.ones(len(x), dtype=F64) if c is None else c.double()
    z, dz = x @ coef, _logits_error(x, coef, u)
    classes = coef.shape[1]
    worst = dz.max(-1).values + u * (z.max(-1).values - z.min(-1).values)
    relative = 2 * worst + (classes / 2 + FUNCTION) * u
    p = torch.softmax(z, -1)
    p_error = p * relative[:, None] + torch.finfo(F32).tiny
    value = (c * (2 * worst + relative + FUNCTION * u * (1 + z.abs().max(-1).values))).sum()
    r, r_error = c[:, None] * (p + 1), c[:, None] * (p_error + 4 * u)
    grad = _gradient_bound(x, r, r_error, u) + 4 * u * l2 * coef.abs()
    return value + 4 * u * l2 * (coef**2).sum(), grad, p_error


def cross_entropy_bound(logits: Tensor, u_: Tensor, dtype: torch.dtype) -> Tensor:
    """Of `cross_entropy_hvp`, with one rounding to the storage dtype. Sums in runs of 4,096 or in a tree."""
    u, x, v = unit(dtype), logits.double(), u_.double()
    p = torch.softmax(x, -1)
    spread = (x - x.max(-1, keepdim=True).values).abs()
    relative = FUNCTION * u * 2 + u * spread  # of an exponential: that of its argument comes on top
    summed = 4096 / 4 * u + (p * relative).sum(-1, keepdim=True)
    mean = (p * v).abs().sum(-1, keepdim=True)
    size = p * (v.abs() + mean)
    storage = torch.finfo(dtype).eps / 2
    return size * (relative + 2 * summed + 6 * u) + p * mean * 2 * summed + storage * size + torch.finfo(dtype).tiny
