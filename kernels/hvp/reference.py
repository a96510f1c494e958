"""Products with the Hessians of linear models, of cross entropy and of layers, in plain PyTorch: the definition.

Every backend module of this family has `available`, `supports` and the functions below, with these signatures. The
public functions of `secant.ops.hvp` check and allocate; what arrives here is valid:

* `x` is (N, d), N >= 1, d >= 1, of dtype T in {float32, float64, bfloat16, float16}, its inner stride 1 and the stride
  between rows free; for a backend with `SPARSE_ROWS = True` also torch.sparse_csr of float32 or float64, its indices
  int32 or int64. C is float64 for T = float64, else float32; it is the dtype of the arithmetic and of every other
  real tensor but `value`. All but `x`, `logits`, `u` and the factors of `paired_matmul` are contiguous. Indices are
  64-bit. The indices of sparse rows may hold anything, and the two arrays of them may be of different widths.
* `v`, `coef`, `grad` and `out` have d rows, or d + 1: then the last belongs to an implicit column of ones in `x`, the
  intercept, and the l2 term leaves it out.
* `weight` and `sample_weight` are (N,); the latter may be None, for ones. `l2` is a number >= 0; with 0 there is no
  penalty, whatever it would multiply.
* `value` is a scalar of float64, summed in float64.
* Outputs are written whole; none overlaps an input.

What every backend owes:

* The same input gives the same bits: sums are split and combined in a fixed order.
* `x` is read from memory once a call where a row fits on chip.
* Sums over rows have an error that does not grow with N: runs of bounded length in C, combined in float64 or by a
  tree. Inner products of length d are summed in C with at least the lanes of a vector as partial sums.
* No function reads a value back to the host, none allocates by values.

Here everything is computed in float64, a chunk of rows at a time, and rounded once at the end.

References:
    McCullagh and Nelder, Generalized Linear Models, 2nd ed., section 2.5 (weights of a row).
    Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994 (the R-operator).
    Schraudolph, Fast curvature matrix-vector products, Neural Computation 14(7), 2002.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from secant.kernels.hvp import rows as sparse
from torch import Tensor

#: Whether x may be a torch.sparse_csr tensor.
SPARSE_ROWS = True
_CHUNK = 1 << 22  # elements of x that are widened at a time


def available() -> str | None:
    """Return None when this backend can run here, else the reason why it cannot."""
    return None


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when `x` of this device and dtype is supported, else the reason why it is not."""
    return None


def _chunks(op: str, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    if x.layout is torch.sparse_csr:
        yield slice(None), sparse.checked(op, "x", x).double()
        return
    step = max(1, _CHUNK // x.shape[1])
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        yield rows, x[rows].double()


def _logits(x: Tensor, v: Tensor) -> Tensor:
    """X V, plus the intercept where V has a row for it."""
    d = x.shape[1]
    z = x @ v[:d]
    return z + v[d] if len(v) > d else z


def _add_gradient(total: Tensor, x: Tensor, r: Tensor) -> None:
    d = x.shape[1]
    total[:d] += x.mT @ r
    if len(total) > d:
        total[d] += r.sum(0)


def _penalized(v: Tensor, d: int, l2: float) -> Tensor:
    if l2 == 0:
        return torch.zeros_like(v)  # no penalty, whatever v is
    p = l2 * v
    p[d:] = 0
    return p


def _penalty(v: Tensor, d: int, l2: float) -> Tensor:
    return l2 / 2 * (v[:d] ** 2).sum() if l2 else v.new_zeros(())


def glm_hvp(x: Tensor, v: Tensor, weight: Tensor, l2: float, out: Tensor) -> None:
    """out = X^T (weight * (X v)) + l2 v, for k vectors at once.

    Args:
        x: (N, d). v: (d, k), 1 <= k <= 64. weight: (N,). l2: number. out: (d, k).
    """
    wide = v.double()
    total = _penalized(wide, x.shape[1], l2)
    for rows, part in _chunks("glm_hvp", x):
        _add_gradient(total, part, weight[rows, None].double() * _logits(part, wide))
    out.copy_(total)


def losses(z: Tensor, t: Tensor, loss: str, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Value, first and second derivative of a loss by z, element by element."""
    if loss == "squared":
        r = z - t
        return r * r / 2, r, torch.ones_like(z)
    if loss == "logistic":
        e = torch.exp(-z.abs())
        q = e / (1 + e)  # of the less likely label
        # max(z, 0) - t z without the cancellation at large z, and p - t: each side of zero has its own difference.
        value = torch.where(z >= 0, (1 - t) * z, -t * z) + torch.log1p(e)
        return value, torch.where(z >= 0, (1 - t) - q, q - t), q / (1 + e)
    if loss == "poisson":
        m = torch.exp(z)
        return m - t * z, m - t, m
    if loss in ("gamma", "tweedie"):
        p = 2.0 if loss == "gamma" else delta
        down = torch.where((t == 0) & ~z.isnan(), 0, t * torch.exp((1 - p) * z))
        if loss == "gamma":
            return down + z, 1 - down, down
        up = torch.exp((2 - p) * z)
        return up / (2 - p) - down / (1 - p), up - down, (2 - p) * up - (1 - p) * down
    r = z - t
    inner = r.abs() <= delta
    value = torch.where(inner, r * r / 2, delta * (r.abs() - delta / 2))
    return value, r.clamp(-delta, delta), torch.where(inner, 1, torch.where(r.isnan(), r, 0))


def glm_value_grad(
    x: Tensor,
    target: Tensor,
    coef: Tensor,
    loss: str,
    delta: float,
    sample_weight: Tensor | None,
    l2: float,
    value: Tensor,
    grad: Tensor,
    weight: Tensor,
) -> None:
    """Value, gradient and the second derivatives of the rows, of sum_i c_i loss(z_i, t_i) + l2/2 |coef|^2.

    loss: "squared" (z - t)^2 / 2; "logistic" log(1 + e^z) - t z; "poisson" e^z - t z; "huber" r^2 / 2 for
    |r| <= delta, else delta (|r| - delta / 2), r = z - t; "gamma" t e^-z + z; "tweedie" e^((2-p) z) / (2-p) -
    t e^((1-p) z) / (1-p), p the power. "logistic" is finite for every finite z, and keeps its digits where z is large:
    its value, gradient and weight have small relative errors on either side. A target of zero makes its term of
    "gamma" and "tweedie" zero for every z. A row whose z or target is NaN has a NaN for each result that depends on it.

    Args:
        x: (N, d). target: (N,). coef: (d,). loss: of `LOSSES`. delta: the number of the loss: > 0 for "huber", the
            power in (1, 2) for "tweedie". sample_weight: (N,) or None. l2: number. value: scalar of float64.
        grad: as coef. weight: (N,), receives c_i loss''(z_i, t_i).
    """
    wide = coef.double()
    total = _penalized(wide, x.shape[1], l2)
    sum_ = _penalty(wide, x.shape[1], l2)
    for rows, part in _chunks("glm_value_grad", x):
        parts = losses(_logits(part, wide), target[rows].double(), loss, delta)
        c = 1.0 if sample_weight is None else sample_weight[rows].double()
        loss_, first, second = (c * p for p in parts)
        sum_ = sum_ + loss_.sum()
        _add_gradient(total, part, first)
        weight[rows] = second.to(weight.dtype)
    value.copy_(sum_)
    grad.copy_(total)


def softmax_hvp(x: Tensor, v: Tensor, probs: Tensor, sample_weight: Tensor | None, l2: float, out: Tensor) -> None:
    """Product with the Hessian of multinomial logistic regression.

    Z = X V; R_ij = c_i p_ij (Z_ij - sum_l p_il Z_il); out = X^T R + l2 V.

    Args:
        x: (N, d). v: (d, K), K >= 2. probs: (N, K). sample_weight: (N,) or None. l2: number. out: (d, K).
    """
    wide = v.double()
    total = _penalized(wide, x.shape[1], l2)
    for rows, part in _chunks("softmax_hvp", x):
        z, p = _logits(part, wide), probs[rows].double()
        r = p * (z - (p * z).sum(-1, keepdim=True))
        _add_gradient(total, part, r if sample_weight is None else sample_weight[rows, None].double() * r)
    out.copy_(total)


def softmax_value_grad(
    x: Tensor,
    target: Tensor,
    coef: Tensor,
    sample_weight: Tensor | None,
    l2: float,
    value: Tensor,
    grad: Tensor,
    probs: Tensor,
) -> None:
    """Value, gradient and probabilities of sum_i c_i (logsumexp(Z_i) - Z_i,target) + l2/2 |coef|^2, Z = X coef.

    A target that is no class makes `value` and `grad` NaN, whatever its weight; nothing is read or written for it.

    Args:
        x: (N, d). target: (N,), int64 in 0..K-1. coef: (d, K). sample_weight: (N,) or None. l2: number.
        value: scalar of float64. grad: (d, K). probs: (N, K), receives softmax(Z).
    """
    wide = coef.double()
    total = _penalized(wide, x.shape[1], l2)
    sum_ = _penalty(wide, x.shape[1], l2)
    for rows, part in _chunks("softmax_value_grad", x):
        z, t = _logits(part, wide), target[rows, None]
        known = (t >= 0) & (t < z.shape[1])
        hot = t == torch.arange(z.shape[1], device=z.device)
        high = z.max(-1, keepdim=True).values
        e = torch.exp(z - high)
        own, others = (torch.where(where, e, 0).sum(-1, keepdim=True) for where in (hot, ~hot))
        p = e / (own + others)
        # p - 1 of the target is minus the sum of the other probabilities, and the sum of exponentials may be 1 and a
        # little: its logarithm is that of what it has above 1.
        r = torch.where(hot, -others / (own + others), p)
        terms = torch.log1p((own - 1) + others) + (high - torch.where(hot, z, 0).sum(-1, keepdim=True))
        terms, r = (torch.where(known, y, torch.nan) for y in (terms, r))
        if sample_weight is not None:
            terms, r = sample_weight[rows, None].double() * terms, sample_weight[rows, None].double() * r
        sum_ = sum_ + terms.sum()
        _add_gradient(total, part, r)
        probs[rows] = p.to(probs.dtype)
    value.copy_(sum_)
    grad.copy_(total)


def cross_entropy_hvp(logits: Tensor, u: Tensor, lse: Tensor | None, out: Tensor) -> None:
    """out = (diag(p) - p p^T) u for every row, p = exp(logits - lse).

    Args:
        logits: (R, V), T, inner stride 1, the stride between rows free. u: as logits. lse: (R,) of C, the log-sum-exp
            of each row, or None. out: (R, V), T, contiguous.
    """
    for rows, part in _chunks("cross_entropy_hvp", logits):
        log_sum = torch.logsumexp(part, -1) if lse is None else lse[rows].double()
        p, wide = torch.exp(part - log_sum[:, None]), u[rows].double()
        out[rows] = (p * (wide - (p * wide).sum(-1, keepdim=True))).to(out.dtype)


def paired_matmul(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    e: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    out: Tensor,
) -> None:
    """out = scale * (a b + c e + bias) + p * q: a step of the R-operator through a layer.

    Args:
        a: (M, K), any strides, float32 or float64, like all here. b: (K, N), any strides. c, e: (M, L) and (L, N), any
            strides, or None. bias: (N,) or None. scale: (M, N) or None. p, q: (M, N) or None, both or none.
        out: (M, N).
    """
    total = a.double() @ b.double()
    if c is not None and e is not None:
        total += c.double() @ e.double()
    if bias is not None:
        total += bias.double()
    if scale is not None:
        total *= scale.double()
    if p is not None and q is not None:
        total += p.double() * q.double()
    out.copy_(total)


def gram(x: Tensor, weight: Tensor | None, accumulate: bool, out: Tensor) -> None:
    """out = X^T diag(weight) X, symmetric bit for bit.

    Args:
        x: (m, n), m >= 1, n >= 1, any strides, float32 or float64, like all here. weight: (m,) or None, for ones.
        accumulate: whether the product is added to `out`, of which the lower triangle is read then.
        out: (n, n).
    """
    total = out.double() if accumulate else torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    for rows, part in _chunks("gram", x):
        total = total + part.mT @ (part if weight is None else weight[rows, None].double() * part)
    out.copy_(mirrored(total))


def mirrored(x: Tensor) -> Tensor:
    """Return the symmetric matrix that has the lower triangle of x."""
    return x.tril() + x.tril(-1).mT
