"""Products with Hessians that are never formed: linear models, cross entropy, and the R-operator of a layer.

The bytes that must move and the choice of method are in `kernels/hvp/README.md`; the contract between this module and
the kernels is in `kernels/hvp/reference.py`.

`x` holds one row per observation: (N, d), float32, float64, bfloat16 or float16. Everything else is of the dtype of
the arithmetic, float64 for float64 and else float32. A matrix whose rows are contiguous is read where it is, whatever
the stride between them; another is copied. On a CPU `x` may be a torch.sparse_csr tensor of float32 or float64. Its
indices may be int32 and int64 in any combination; they are checked as they are read, since torch need not have done
that (`check_invariants=False`).

With `intercept=True` the coefficients have d + 1 rows, the last of which belongs to a column of ones that `x` need not
have, and to which `l2` does not apply.

No function reads a value back to the host, and the same input gives the same bits. Each product is differentiable by
the vector that it multiplies, in both modes, by the same kernel, and batches of vectors under torch.vmap are one call;
derivatives by the other arguments go through torch operations that read `x` once more each. With sparse rows all of
that is so for every argument but `x`, whose derivative is dense and that of the products alone, in reverse mode.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant.kernels.hvp import LOSSES, reference, rows
from secant.ops import _gate, _register, _shortcut
from secant.ops import _hvp_autograd as autograd
from secant.ops import _hvp_dispatch as dispatch
from secant.ops import _hvp_formulas as formulas

DTYPES = _checks.REAL + _checks.HALF
#: Vectors that a kernel takes at once; more are taken in turns.
MAX_VECTORS = 64


def _check_x(op: str, x: Tensor) -> torch.dtype:
    """Check X, and return the dtype of the arithmetic."""
    if isinstance(x, Tensor) and x.layout is torch.sparse_csr:
        if x.dtype not in _checks.REAL:
            raise TypeError(f"{op}: x: expected float32 or float64 for sparse rows, got {x.dtype}")
        if x.device.type != "cpu":
            raise _checks.fail(op, "x", "sparse rows on the CPU (pass x.to_dense() elsewhere)", x.device)
    else:
        _checks.tensor(op, "x", x, DTYPES)
    if x.dim() != 2 or x.shape[1] < 1:
        raise _checks.fail(op, "x", "shape (N, d), d >= 1", f"shape {tuple(x.shape)}")
    return _checks.arithmetic(x.dtype)


def checked_rows(op: str, name: str, x: Tensor) -> Tensor:
    """Check that the indices of rows, if they are sparse, lie in range, for who takes the rows to torch itself.

    Args:
        op, name: of the function and its argument, for the message. x: (N, d), dense or torch.sparse_csr.

    Returns:
        x, or sparse rows over the same values.

    Raises:
        ValueError: a row begins or ends where it must not, or has a column out of range; it is named.
    """
    return rows.checked(op, name, x) if x.layout is torch.sparse_csr else x


def _check_constant(op: str, x: Tensor) -> None:
    """Refuse sparse rows that require a derivative."""
    if x.layout is torch.sparse_csr and x.requires_grad and torch.is_grad_enabled():
        raise _checks.fail(op, "x", "sparse rows that require no derivative (pass x.to_dense())", "some that do")


def _check_columns(op: str, name: str, v: Tensor, x: Tensor, dtype: torch.dtype, intercept: bool, both: bool) -> Tensor:
    """`v` as a matrix of columns."""
    _checks.tensor(op, name, v, (dtype,), x.device)
    rows = x.shape[1] + bool(intercept)
    if v.dim() not in ((1, 2) if both else (2,)) or v.shape[0] != rows:
        shapes = f"({rows},) or ({rows}, k)" if both else f"({rows}, K)"
        raise _checks.fail(op, name, f"shape {shapes}", f"shape {tuple(v.shape)}")
    return v if v.dim() == 2 else v[:, None]


def _check_row_values(op: str, name: str, w: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    return w if w is None else _checks.shaped(op, name, w, (x.shape[0],), dtype, x.device)


def _check_number(op: str, name: str, value: float, positive: bool = False) -> float:
    return (_checks.positive if positive else _checks.nonnegative)(op, name, value)


def _only_penalty(x: Tensor, v: Tensor, l2: float) -> Tensor:
    """Compute the product when there are no rows."""
    out = l2 * v
    out[x.shape[1] :] = 0
    return out


_HVP, _VALUE_GRAD = range(2)
_NUMBERS = (float, int)
_LARGEST = sys.float_info.max  # an integer beyond it is no float
_glm_plain = _shortcut.Shortcut("hvp", "glm_plain")


def _plain(l2: float, delta: float = 1.0, power: float = 1.5) -> Any:
    """Return the shortcut of the `glm_` functions (`kernels/hvp/cpu.py`), None if the gate has to look at a number."""
    if torch.compiler.is_dynamo_compiling() or not (
        type(l2) in _NUMBERS
        and type(delta) in _NUMBERS
        and type(power) in _NUMBERS
        and 0 <= l2 <= _LARGEST >= delta > 0
        and 1 < power < 2
    ):
        return None
    return _glm_plain()


def _glm_product(x: Tensor, v: Tensor, weight: Tensor, l2: float) -> Tensor:
    """Compute the product for columns v (d, k), at most MAX_VECTORS of them at a time."""
    if not x.shape[0] or not v.numel():
        return _only_penalty(x, v, l2)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v.shape[1] <= MAX_VECTORS:
        dispatch.call("glm_hvp", x, v, weight, l2, out)
        return out
    for start in range(0, v.shape[1], MAX_VECTORS):
        part = v[:, start : start + MAX_VECTORS].contiguous()
        result = torch.empty_like(part)
        dispatch.call("glm_hvp", x, part, weight, l2, result)
        out[:, start : start + MAX_VECTORS] = result
    return out


def glm_hvp(
    x: Tensor, v: Tensor, weight: Tensor, *, l2: float = 0.0, intercept: bool = False, out: Tensor | None = None
) -> Tensor:
    """Multiply by the Hessian of a generalised linear model, X^T (weight * (X v)) + l2 v, reading X once.

    Args:
        x: (N, d), dense of any real dtype, or torch.sparse_csr on the CPU.
        v: (d,) or (d, k), k vectors at once; (d + 1, ...) with an intercept. float64 for x of float64, else float32.
        weight: (N,), of the dtype of `v`: the second derivative of each row's loss, as `glm_value_grad` returns it.
        l2: number >= 0.
        intercept: whether the last row of `v` belongs to an implicit column of ones.
        out: as `v`, contiguous; receives the result. It must not overlap an input.

    Returns:
        The product, of the shape of `v`.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shape, device, layout, an index of sparse rows or a number does not fit.

    References:
        McCullagh and Nelder, Generalized Linear Models, 2nd ed., section 2.5.

    Example:
        >>> x, y, coef = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0]), torch.zeros(2)
        >>> value, grad, weight = secant.ops.glm_value_grad(x, y, coef, loss="logistic", l2=1.0)
        >>> weight                                  # p (1 - p)
        tensor([0.2500, 0.2500])
        >>> secant.ops.glm_hvp(x, torch.tensor([4.0, 0.0]), weight, l2=1.0)
        tensor([5., 2.])
    """
    if out is None and (plain := _plain(l2)) and _shortcut.takes(x, v, weight):
        result = torch.empty_like(v)
        numbers = (l2, bool(intercept), 0, 1.0)
        if type(result) is Tensor and plain(_HVP, x, v, weight, None, *numbers, result, None, None):
            return result
    return _any_glm_hvp(x, v, weight, l2, intercept, out)


@_register.whole
def _any_glm_hvp(x: Tensor, v: Tensor, weight: Tensor, l2: float, intercept: bool, out: Tensor | None) -> Tensor:
    op = "glm_hvp"
    dtype = _check_x(op, x)
    columns = _check_columns(op, "v", v, x, dtype, intercept, both=True)
    _checks.shaped(op, "weight", weight, (x.shape[0],), dtype, x.device)
    l2 = _check_number(op, "l2", l2)
    if out is not None:
        stored = x.values() if x.layout is torch.sparse_csr else x
        _gate.output(op, out, tuple(v.shape), dtype, x.device, {"v": v, "weight": weight, "x": stored})

    def product(part: Tensor) -> Tensor:
        return _glm_product(x, part, weight, l2)

    if autograd.is_differentiated(x, weight):
        result = formulas.glm_hvp(x, columns, weight, l2)
    elif autograd.is_differentiated(v):
        result = autograd.apply(columns, product, True)
    elif (
        out is not None and out.is_contiguous() and not out.is_neg() and len(x) and 0 < columns.shape[1] <= MAX_VECTORS
    ):
        dispatch.call("glm_hvp", x, columns, weight, l2, out.view(columns.shape))
        _gate.written(out)
        return out
    else:
        result = product(columns)
    result = result.view(v.shape)
    return result if out is None else out.copy_(result)


def glm_value_grad(
    x: Tensor,
    target: Tensor,
    coef: Tensor,
    *,
    loss: str,
    sample_weight: Tensor | None = None,
    l2: float = 0.0,
    delta: float = 1.0,
    power: float = 1.5,
    intercept: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the objective of a generalised linear model, its gradient and the weights of its Hessian, reading X once.

    value = sum_i c_i loss(z_i, t_i) + l2/2 |coef|^2, a sum and not a mean, with z = X coef and one of the losses

    * "squared": (z - t)^2 / 2;
    * "logistic": log(1 + e^z) - t z, t in [0, 1], finite for every finite z;
    * "poisson": e^z - t z, the logarithmic link;
    * "huber": r^2 / 2 where |r| <= delta, else delta (|r| - delta / 2), r = z - t;
    * "gamma": t e^-z + z, t > 0, the logarithmic link;
    * "tweedie": e^((2-p) z) / (2-p) - t e^((1-p) z) / (1-p), t >= 0, p the power, the logarithmic link: a sum of a
      Poisson number of gamma variables, of variance proportional to the mean to the power p.

    "logistic" keeps its digits in both tails: value, gradient and weight of a row have small relative errors however
    large z is. A NaN among z and t makes NaN of whatever depends on it.

    Args:
        x: (N, d), dense of any real dtype, or torch.sparse_csr on the CPU.
        target: (N,), of the dtype of `coef`. Its values are not checked, which would be a synchronisation.
        coef: (d,), or (d + 1,) with an intercept. float64 for x of float64, else float32.
        loss: "squared", "logistic", "poisson", "huber", "gamma" or "tweedie".
        sample_weight: (N,), the c_i, or None for ones.
        l2: number >= 0. delta: number > 0, used by "huber". power: number, 1 < power < 2, used by "tweedie".
        intercept: whether the last coefficient belongs to an implicit column of ones.

    Returns:
        (value, grad, weight): a scalar of float64; as `coef`; (N,), c_i loss''(z_i, t_i), which feeds `glm_hvp`. The
        first two are differentiable by `coef`, and by the other real arguments through torch operations; `weight` is
        a constant to reverse mode.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shape, device, layout, an index of sparse rows, `loss` or a number does not fit; sparse `x` requires
            a derivative.

    References:
        McCullagh and Nelder, Generalized Linear Models, 2nd ed., section 2.5. Huber, Annals of Mathematical Statistics
        35(1), 1964. Jorgensen, Exponential dispersion models, Journal of the Royal Statistical Society B 49(2), 1987.
    """
    if (
        sample_weight is None
        and loss in LOSSES
        and (plain := _plain(l2, delta, power))
        and _shortcut.takes(x, target, coef)
    ):
        value, grad, weight = torch.empty((), dtype=torch.float64), torch.empty_like(coef), torch.empty_like(target)
        number = power if loss == "tweedie" else delta
        args = (None, l2, bool(intercept), LOSSES.index(loss), number, grad, value, weight)
        if type(grad) is Tensor and plain(_VALUE_GRAD, x, coef, target, *args):
            return value, grad, weight
    return _any_glm_value_grad(x, target, coef, loss, sample_weight, l2, delta, power, intercept)


@_register.whole
def _any_glm_value_grad(
    x: Tensor,
    target: Tensor,
    coef: Tensor,
    loss: str,
    sample_weight: Tensor | None,
    l2: float,
    delta: float,
    power: float,
    intercept: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "glm_value_grad"
    dtype = _check_x(op, x)
    _checks.shaped(op, "target", target, (x.shape[0],), dtype, x.device)
    _checks.shaped(op, "coef", coef, (x.shape[1] + bool(intercept),), dtype, x.device)
    _check_row_values(op, "sample_weight", sample_weight, x, dtype)
    if loss not in LOSSES:
        raise _checks.fail(op, "loss", f"one of {LOSSES}", _checks.show(loss))
    l2, delta = _check_number(op, "l2", l2), _check_number(op, "delta", delta, positive=True)
    power = _checks.number(op, "power", power, "a number between 1 and 2, neither included", lambda p: 1 < p < 2)
    number = power if loss == "tweedie" else delta

    _check_constant(op, x)

    def kernel(coef: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = torch.zeros((), dtype=torch.float64, device=x.device)
        grad, weight = torch.empty_like(coef, memory_format=torch.contiguous_format), torch.empty_like(target)
        if not len(x):
            grad = _only_penalty(x, coef, l2)
            return value + (grad * coef).double().sum() / 2, grad, weight
        dispatch.call("glm_value_grad", x, target, coef, loss, number, sample_weight, l2, value, grad, weight)
        return value, grad, weight

    def formula(coef: Tensor) -> Tensor:
        return formulas.glm_value(x, target, coef, loss, number, sample_weight, l2)

    others = autograd.is_differentiated(x, target, sample_weight)
    if others or (autograd.is_differentiated(coef) and not coef.requires_grad) or autograd.is_wrapped(coef):
        value, grad = autograd.value_grad_of(formula, coef)
        return value, grad, formulas.glm_weight(x, target, coef, loss, number, sample_weight)
    if autograd.is_differentiated(coef):
        return autograd.ValueGrad.apply(
            coef,
            kernel,
            formula,
            lambda g, weight: autograd.apply(g[:, None], lambda v: _glm_product(x, v, weight, l2), True)[:, 0],
        )
    return kernel(coef)


def _softmax_product(x: Tensor, v: Tensor, probs: Tensor, sample_weight: Tensor | None, l2: float) -> Tensor:
    if not x.shape[0] or not v.numel():
        return _only_penalty(x, v, l2)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dispatch.call("softmax_hvp", x, v, probs, sample_weight, l2, out)
    return out


@_register.whole
def softmax_hvp(
    x: Tensor,
    v: Tensor,
    probs: Tensor,
    *,
    sample_weight: Tensor | None = None,
    l2: float = 0.0,
    intercept: bool = False,
) -> Tensor:
    """Multiply by the Hessian of multinomial logistic regression, reading X once.

    Z = X V, R_ij = c_i p_ij (Z_ij - sum_l p_il Z_il), result X^T R + l2 V.

    Args:
        x: (N, d), dense of any real dtype, or torch.sparse_csr on the CPU.
        v: (d, K), or (d + 1, K) with an intercept. float64 for x of float64, else float32.
        probs: (N, K), the probabilities of the classes, as `softmax_value_grad` returns them.
        sample_weight: (N,), the c_i, or None for ones. l2: number >= 0.
        intercept: whether the last row of `v` belongs to an implicit column of ones.

    Returns:
        The product, of the shape of `v`.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shape, device, layout, an index of sparse rows or a number does not fit.

    References:
        Boehning, Annals of the Institute of Statistical Mathematics 44(1), 1992.
    """
    op = "softmax_hvp"
    dtype = _check_x(op, x)
    _check_columns(op, "v", v, x, dtype, intercept, both=False)
    _checks.shaped(op, "probs", probs, (x.shape[0], v.shape[1]), dtype, x.device)
    _check_row_values(op, "sample_weight", sample_weight, x, dtype)
    l2 = _check_number(op, "l2", l2)

    def product(v: Tensor) -> Tensor:
        return _softmax_product(x, v, probs, sample_weight, l2)

    if autograd.is_differentiated(x, probs, sample_weight):
        return formulas.softmax_hvp(x, v, probs, sample_weight, l2)
    return autograd.apply(v, product, False) if autograd.is_differentiated(v) else product(v)


@_register.whole
def softmax_value_grad(
    x: Tensor,
    target: Tensor,
    coef: Tensor,
    *,
    sample_weight: Tensor | None = None,
    l2: float = 0.0,
    intercept: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the objective of multinomial logistic regression, its gradient and the probabilities, reading X once.

    value = sum_i c_i (logsumexp(Z_i) - Z_i,target) + l2/2 |coef|^2, Z = X coef.

    Args:
        x: (N, d), dense of any real dtype, or torch.sparse_csr on the CPU.
        target: (N,), int64, the class of each row. Eager calls on the CPU check it. On a GPU, which that would
            synchronise, in compiled graphs and under torch.vmap, a class out of range makes value and gradient NaN.
        coef: (d, K), K >= 1, or (d + 1, K) with an intercept. float64 for x of float64, else float32.
        sample_weight: (N,), the c_i, or None for ones. l2: number >= 0.
        intercept: whether the last row of `coef` belongs to an implicit column of ones.

    Returns:
        (value, grad, probs): a scalar of float64; as `coef`; (N, K), which feeds `softmax_hvp`. The first two are
        differentiable by `coef`; `probs` is a constant to reverse mode.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shape, device, layout, an index of sparse rows, a class (in eager calls on the CPU) or a number does
            not fit; sparse `x` requires a derivative.
    """
    op = "softmax_value_grad"
    dtype = _check_x(op, x)
    _checks.shaped(op, "target", target, (x.shape[0],), torch.int64, x.device)
    _check_columns(op, "coef", coef, x, dtype, intercept, both=False)
    _check_row_values(op, "sample_weight", sample_weight, x, dtype)
    l2 = _check_number(op, "l2", l2)
    classes = coef.shape[1]
    _check_constant(op, x)
    if target.device.type == "cpu" and target.numel() and _gate.is_plain(target) and not autograd.is_wrapped(target):
        low, high = (int(t) for t in torch.aminmax(target))
        if low < 0 or high >= classes:
            raise _checks.fail(op, "target", f"classes in 0..{classes - 1}", f"values in {low}..{high}")

    def kernel(coef: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = torch.zeros((), dtype=torch.float64, device=x.device)
        grad = torch.empty_like(coef, memory_format=torch.contiguous_format)
        probs = torch.empty((len(x), classes), dtype=dtype, device=x.device)
        if not len(x):
            grad = _only_penalty(x, coef, l2)
            return value + (grad * coef).double().sum() / 2, grad, probs
        dispatch.call("softmax_value_grad", x, target, coef, sample_weight, l2, value, grad, probs)
        return value, grad, probs

    def formula(coef: Tensor) -> Tensor:
        return formulas.softmax_value(x, target, coef, sample_weight, l2)

    others = autograd.is_differentiated(x, sample_weight) or autograd.is_wrapped(target)
    if others or (autograd.is_differentiated(coef) and not coef.requires_grad) or autograd.is_wrapped(coef):
        value, grad = autograd.value_grad_of(formula, coef)
        return value, grad, formulas.softmax_probs(x, coef)
    if autograd.is_differentiated(coef):
        return autograd.ValueGrad.apply(
            coef,
            kernel,
            formula,
            lambda g, probs: autograd.apply(g, lambda v: _softmax_product(x, v, probs, sample_weight, l2), False),
        )
    return kernel(coef)


@_register.whole
def cross_entropy_hvp(logits: Tensor, u: Tensor, *, lse: Tensor | None = None) -> Tensor:
    """Multiply by the Hessian of cross entropy by its logits, (diag(p) - p p^T) u for every row.

    With a given log-sum-exp, p = exp(logits - lse), so that there is no other temporary of the size of the vocabulary.

    Args:
        logits: (..., V), float32, float64, bfloat16 or float16; computed in float32 but for float64.
        u: as `logits`.
        lse: (...), float64 for logits of float64, else float32: torch.logsumexp(logits, -1), or None.

    Returns:
        The products, of the shape and dtype of `logits`, contiguous. Differentiable in `u` by the same kernel, and in
        `logits` through torch operations; a given `lse` is differentiated as the function of `logits` that it is.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shape, device or layout does not fit.

    References:
        Schraudolph, Fast curvature matrix-vector products, Neural Computation 14(7), 2002, section 3.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])                  # two tokens
        >>> model = lambda w: x @ w                                     # w (features, vocabulary)
        >>> w, v = torch.zeros(2, 2), torch.tensor([[4.0, 0.0], [0.0, 4.0]])
        >>> logits, jv = torch.func.jvp(model, (w,), (v,))
        >>> hjv = secant.ops.cross_entropy_hvp(logits, jv)
        >>> torch.func.vjp(model, w)[1](hjv)[0].round(decimals=5)       # back through the model: GGN v
        tensor([[ 1., -1.],
                [-4.,  4.]])
    """
    op = "cross_entropy_hvp"
    _checks.tensor(op, "logits", logits, DTYPES)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise _checks.fail(op, "logits", "shape (..., V), V >= 1", f"shape {tuple(logits.shape)}")
    _checks.shaped(op, "u", u, tuple(logits.shape), logits.dtype, logits.device)
    if lse is not None:
        dtype = _checks.arithmetic(logits.dtype)
        _checks.shaped(op, "lse", lse, tuple(logits.shape[:-1]), dtype, logits.device)
    size = logits.shape[-1]

    def product(u: Tensor) -> Tensor:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        if out.numel():
            per_row = lse if lse is None else lse.reshape(-1)
            dispatch.call(
                "cross_entropy_hvp", logits.reshape(-1, size), u.reshape(-1, size), per_row, out.view(-1, size)
            )
        return out

    if autograd.is_differentiated(logits, lse):
        return formulas.cross_entropy_hvp(logits, u)
    return autograd.apply(u, product, False) if autograd.is_differentiated(u) else product(u)


@_register.whole
def paired_matmul(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    e: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    p: Tensor | None = None,
    q: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute scale * (a b + c e + bias) + p * q: the R-operator through a linear layer and its activation.

    With what a point keeps of its primal pass (h, the input of a layer; f' and f'' at its pre-activation z; delta, the
    gradient by z), one call makes the forward tangent of a layer, f' * (Rh W^T + h V^T + Rb), one the backward tangent
    f' * (Rdelta W + delta V) + (f'' g) * Rz, and one the product's weights, Rdelta^T h + delta^T Rh.

    Args:
        a: (M, K), float32 or float64, any strides. b: (K, N), likewise.
        c: (M, L), or None. e: (L, N), or None; both or none.
        bias: (N,), or None.
        scale: (M, N), or None for ones.
        p: (M, N), or None. q: (M, N), or None; both or none.
        out: (M, N), contiguous; receives the result. It must not overlap an input.

    Returns:
        (M, N), contiguous. Differentiable in everything, through torch operations.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shapes, devices or layouts do not fit, or one of a pair is missing.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994, equations (8) to (11).
    """
    op = "paired_matmul"
    _checks.tensor(op, "a", a, _checks.REAL)
    if a.dim() != 2:
        raise _checks.fail(op, "a", "shape (M, K)", f"shape {tuple(a.shape)}")
    _checks.tensor(op, "b", b, (a.dtype,), a.device)
    if b.dim() != 2 or b.shape[0] != a.shape[1]:
        raise _checks.fail(op, "b", f"shape ({a.shape[1]}, N)", f"shape {tuple(b.shape)}")
    rows, columns = a.shape[0], b.shape[1]
    for first, second, x, y in (("c", "e", c, e), ("p", "q", p, q)):
        if (x is None) != (y is None):
            raise ValueError(
                f"{op}: {first}, {second}: expected both or none, got only {first if y is None else second}"
            )
    if c is not None and e is not None:
        _checks.tensor(op, "c", c, (a.dtype,), a.device)
        if c.dim() != 2 or c.shape[0] != rows:
            raise _checks.fail(op, "c", f"shape ({rows}, L)", f"shape {tuple(c.shape)}")
        _checks.shaped(op, "e", e, (c.shape[1], columns), a.dtype, a.device)
    for name, z, shape in (
        ("bias", bias, (columns,)), ("scale", scale, (rows, columns)), ("p", p, (rows, columns)),
        ("q", q, (rows, columns)),
    ):  # fmt: skip
        if z is not None:
            _checks.shaped(op, name, z, shape, a.dtype, a.device)
    differentiated = autograd.is_differentiated(a, b, c, e, bias, scale, p, q)
    if out is None:
        if differentiated:
            return formulas.paired_matmul(a, b, c, e, bias, scale, p, q)
        out = torch.empty((rows, columns), dtype=a.dtype, device=a.device)
    else:
        _checks.shaped(op, "out", out, (rows, columns), a.dtype, a.device)
        if differentiated or not out.is_contiguous() or out.is_neg():
            wanted = "None where a derivative is wanted" if differentiated else "a contiguous tensor, not negated"
            raise _checks.fail(op, "out", wanted, _checks.describe(out))
        names = ("a", "b", "c", "e", "bias", "scale", "p", "q")
        inputs = dict(zip(names, (a, b, c, e, bias, scale, p, q), strict=True))
        _gate.output(op, out, (rows, columns), a.dtype, a.device, inputs)
    if out.numel():
        dispatch.call("paired_matmul", a, b, c, e, bias, scale, p, q, out)
        _gate.written(out)
    return out


@_register.whole
def gram(x: Tensor, *, weight: Tensor | None = None, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """Compute the Gram matrix X^T diag(weight) X of the columns of X: one triangle, then its mirror image.

    It is the symmetric rank-k update of BLAS, with weights: J^T J of Gauss-Newton, or J J^T as gram(J.T). The result
    is symmetric bit for bit, and half the arithmetic of a matrix product.

    Args:
        x: (m, n), float32 or float64, any strides.
        weight: (m,), of the dtype of `x`, of any sign, or None for ones.
        out: (n, n), of the dtype of `x`; receives the result. It must not overlap an input.
        accumulate: whether the product is added to `out`, as for blocks of rows. Of `out` the lower triangle is read.

    Returns:
        (n, n), contiguous where `out` is None. Differentiable in `x` and `weight`, in both modes.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shape, device or layout does not fit, or there is no `out` to add to.

    References:
        Goto and van de Geijn, High-performance implementation of the level-3 BLAS, ACM Transactions on Mathematical
        Software 35(1), 2008, section 3 (the symmetric update as a product of panels).

    Example:
        >>> j = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> secant.ops.gram(j)
        tensor([[ 1.,  2.],
                [ 2., 13.]])
        >>> total = torch.zeros(2, 2)
        >>> for rows in j.split(1):
        ...     _ = secant.ops.gram(rows, out=total, accumulate=True)
        >>> total
        tensor([[ 1.,  2.],
                [ 2., 13.]])
    """
    op = "gram"
    _checks.tensor(op, "x", x, _checks.REAL)
    if x.dim() != 2:
        raise _checks.fail(op, "x", "shape (m, n)", f"shape {tuple(x.shape)}")
    if weight is not None:
        _checks.shaped(op, "weight", weight, (x.shape[0],), x.dtype, x.device)
    shape = (x.shape[1], x.shape[1])
    if out is not None:
        _gate.output(op, out, shape, x.dtype, x.device, {"x": x, "weight": weight})
    elif accumulate:
        raise _checks.fail(op, "out", "a tensor to add to, with accumulate=True", None)

    def product(x: Tensor, weight: Tensor | None) -> Tensor:
        if not x.numel():
            return x.new_zeros(shape)
        result = torch.empty(shape, dtype=x.dtype, device=x.device)
        dispatch.call("gram", x, weight, False, result)
        return result

    if autograd.is_differentiated(x, weight, out):
        result = autograd.gram(x, weight, product)
    elif out is not None and x.numel() and out.is_contiguous() and not out.is_neg():
        dispatch.call("gram", x, weight, bool(accumulate), out)
        _gate.written(out)
        return out
    else:
        result = product(x, weight)
    if out is None:
        return result
    return out.copy_(reference.mirrored(out) + result if accumulate else result)
