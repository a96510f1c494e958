"""The `hvp` family as expressions of torch operations: what is differentiated when autograd goes further.

The kernels are differentiable by the vector that they multiply, where each is its own derivative. By any other
argument, and to higher order, these expressions are differentiated in their place; they read X once per product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secant.ops import _hvp_products as products


def _logits(op: str, x: Tensor, v: Tensor) -> Tensor:
    d = x.shape[1]
    z = products.times(op, x, v[:d])
    return z + v[d] if len(v) > d else z


def _product(op: str, x: Tensor, r: Tensor, v: Tensor, l2: float) -> Tensor:
    d = x.shape[1]
    g = products.transposed_times(op, x, r)
    g = g + l2 * v[:d] if l2 else g
    return torch.cat((g, r.sum(0, keepdim=True))) if len(v) > d else g


def glm_hvp(x: Tensor, v: Tensor, weight: Tensor, l2: float) -> Tensor:
    """X^T (weight * (X v)) + l2 v for v (d, k)."""
    op = "glm_hvp"
    return _product(op, x, weight[:, None] * _logits(op, x, v), v, l2)


def _log1p_exp(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two parts of log(1 + e^z), max(z, 0) and log(1 + e^-|z|).

    The second keeps its digits, and so do all its derivatives, where z is large, and none of them is infinite. The
    side of zero is chosen for both by the same condition, so that the derivatives of the sum are right at zero too.
    """
    positive = z > 0
    return torch.where(positive, z, 0), torch.log1p(torch.exp(torch.where(positive, -z, z)))


def glm_value(
    x: Tensor, target: Tensor, coef: Tensor, loss: str, delta: float, sample_weight: Tensor | None, l2: float
) -> Tensor:
    """sum_i c_i loss(z_i, t_i) + l2/2 |coef|^2."""
    z = _logits("glm_value_grad", x, coef)
    if loss == "squared":
        terms = (z - target) ** 2 / 2
    elif loss == "logistic":
        # max(z, 0) - t z without the cancellation at large z: each side of zero has its own product.
        terms = torch.where(z > 0, (1 - target) * z, -target * z) + _log1p_exp(z)[1]
    elif loss == "poisson":
        terms = torch.exp(z) - target * z
    elif loss in ("gamma", "tweedie"):
        up, down, p = _log_link(z, target, loss, delta)
        terms = down + z if loss == "gamma" else up / (2 - p) - down / (1 - p)
    else:
        r = z - target  # huber_loss of torch has no forward mode in its derivative
        terms = torch.where(r.abs() <= delta, r * r / 2, delta * (r.abs() - delta / 2))
    return _penalized(terms, x, coef, sample_weight, l2)


def glm_weight(
    x: Tensor, target: Tensor, coef: Tensor, loss: str, delta: float, sample_weight: Tensor | None
) -> Tensor:
    """c_i loss''(z_i, t_i)."""
    z = _logits("glm_value_grad", x, coef)
    if loss == "squared":
        w = torch.ones_like(z)
    elif loss == "logistic":
        w = torch.sigmoid(z) * torch.sigmoid(-z)
    elif loss == "poisson":
        w = torch.exp(z)
    elif loss in ("gamma", "tweedie"):
        up, down, p = _log_link(z, target, loss, delta)
        w = down if loss == "gamma" else (2 - p) * up - (1 - p) * down
    else:
        r = z - target
        w = torch.where(r.abs() <= delta, 1, torch.where(r.isnan(), r, 0))
    return w if sample_weight is None else sample_weight * w


def _log_link(z: Tensor, t: Tensor, loss: str, power: float) -> tuple[Tensor, Tensor, float]:
    """e^((2-p) z), t e^((1-p) z) and the power p. A target of zero makes its term zero for every z."""
    p = 2.0 if loss == "gamma" else power
    # Where it would overflow, the exponential is that of zero, so that its derivatives do not either.
    inner = torch.where((t == 0) & ((1 - p) * z > math.log(torch.finfo(z.dtype).max) - 1), 0, z)
    return torch.exp((2 - p) * z), t * torch.exp((1 - p) * inner), p


def _penalized(terms: Tensor, x: Tensor, coef: Tensor, sample_weight: Tensor | None, l2: float) -> Tensor:
    if sample_weight is not None:
        terms = sample_weight * terms
    value = terms.double().sum()
    return value + l2 / 2 * (coef[: x.shape[1]].double() ** 2).sum() if l2 else value


def softmax_hvp(x: Tensor, v: Tensor, probs: Tensor, sample_weight: Tensor | None, l2: float) -> Tensor:
    """X^T R + l2 V, R = c p (Z - sum p Z), Z = X V."""
    op = "softmax_hvp"
    z = _logits(op, x, v)
    r = probs * (z - (probs * z).sum(-1, keepdim=True))
    return _product(op, x, r if sample_weight is None else sample_weight[:, None] * r, v, l2)


def softmax_value(x: Tensor, target: Tensor, coef: Tensor, sample_weight: Tensor | None, l2: float) -> Tensor:
    """sum_i c_i (logsumexp(Z_i) - Z_i,target) + l2/2 |coef|^2; a class out of range makes it, and its gradient, NaN."""
    z = _logits("softmax_value_grad", x, coef)
    classes = z.shape[1]
    known = (target >= 0) & (target < classes)
    hot = torch.where(known, target, 0)[:, None] == torch.arange(classes, device=z.device)
    if classes == 1:
        terms = 0 * z[:, 0]
    else:
        # log(1 + e^m), m = logsumexp of the other classes minus the logit of this one: it keeps its digits in the tail.
        own = torch.where(hot, z, 0).sum(-1)
        large, small = _log1p_exp(torch.logsumexp(torch.where(hot, -torch.inf, z), -1) - own)
        terms = large + small
    return _penalized(terms * torch.where(known, 1, torch.nan), x, coef, sample_weight, l2)


def softmax_probs(x: Tensor, coef: Tensor) -> Tensor:
    """softmax(Z), Z = X coef."""
    return torch.softmax(_logits("softmax_value_grad", x, coef), -1)


def cross_entropy_hvp(logits: Tensor, u: Tensor) -> Tensor:
    """p * (u - sum p u) for every row."""
    wide = logits.double() if logits.dtype is torch.float64 else logits.float()
    p, v = torch.softmax(wide, -1), u.to(wide.dtype)
    return (p * (v - (p * v).sum(-1, keepdim=True))).to(logits.dtype)


def paired_matmul(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    e: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
) -> Tensor:
    """scale * (a b + c e + bias) + p * q."""
    x = a @ b
    if c is not None and e is not None:
        x = x + c @ e
    if bias is not None:
        x = x + bias
    if scale is not None:
        x = scale * x
    return x + p * q if p is not None and q is not None else x
