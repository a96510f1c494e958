"""The multinomial loss over CSR rows in torch expressions, with the signatures of `secant.ops`: two passes over X."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_value_grad(
    x: Tensor, target: Tensor, coef: Tensor, *, sample_weight: Tensor | None, l2: float, intercept: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Value (float64), gradient and probabilities; see `secant.ops.softmax_value_grad`."""
    log_p = torch.log_softmax(_product(x, coef, intercept), 1)
    own = target[:, None]
    probs = log_p.exp()
    terms = -log_p.gather(1, own)[:, 0]
    r = probs.scatter_add(1, own, torch.full_like(probs[:, :1], -1.0))
    if sample_weight is not None:
        terms, r = terms * sample_weight, r * sample_weight[:, None]
    shrunk = _penalised(coef, intercept)
    value = terms.double().sum() + 0.5 * l2 * shrunk.double().square().sum()
    return value, _transposed(x, r, intercept) + l2 * shrunk, probs


def softmax_hvp(
    x: Tensor, v: Tensor, probs: Tensor, *, sample_weight: Tensor | None, l2: float, intercept: bool
) -> Tensor:
    """X^T (c P (Z - sum P Z)) + l2 V, Z = X V; see `secant.ops.softmax_hvp`."""
    z = _product(x, v, intercept)
    r = probs * (z - (probs * z).sum(1, keepdim=True))
    if sample_weight is not None:
        r = r * sample_weight[:, None]
    return _transposed(x, r, intercept) + l2 * _penalised(v, intercept)


def _product(x: Tensor, v: Tensor, intercept: bool) -> Tensor:
    d = x.shape[1]
    z = x @ v[:d]
    return z + v[d] if intercept else z


def _transposed(x: Tensor, r: Tensor, intercept: bool) -> Tensor:
    out = x.t() @ r
    return torch.cat([out, r.sum(0, keepdim=True)]) if intercept else out


def _penalised(v: Tensor, intercept: bool) -> Tensor:
    return torch.cat([v[:-1], torch.zeros_like(v[:1])]) if intercept else v
