"""Derivatives of the `blocks` family, forward and reverse mode: any order, of functions of eigenvalues the first two.

Every function here takes blocks (*batch, n, n) of float32 or float64 and per-block tensors (*batch), and calls a
kernel once in `forward`; its derivatives are products of small matrices and further functions of this file, so that
they can be differentiated again. Where only the lower triangle of an argument is read, the argument stands for a
symmetric matrix: a tangent is symmetrised, and a gradient is symmetric (the convention of torch.linalg.cholesky). The
output of a bad block is NaN, and so is its gradient, which nothing carries over to another block.

References:
    Giles, Collected matrix derivative results for forward and reverse mode algorithmic differentiation (2008).
    Higham, Functions of Matrices, Theorem 3.11 (Daleckii and Krein) and section 6.1 (Sylvester equations of roots).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from secant.ops import _blocks_dispatch as kernels
from secant.ops import _blocks_functions as functions
from secant.ops._batching import apply


def _symmetric(g: Tensor) -> Tensor:
    return (g + g.mT) / 2


def _diagonal(a: Tensor) -> Tensor:
    return a.diagonal(dim1=-2, dim2=-1)


def _scale(lam: Tensor | None, value: float | None) -> Tensor | float | None:
    return value if lam is None else lam[..., None]


def damped(a: Tensor, lam: Tensor | None, value: float | None, scaled: bool) -> Tensor:
    """Add the damping to A: linear in `a`, and so its own tangent map when it is scaled."""
    scale = _scale(lam, value)
    if scale is None:
        return a
    shift = _diagonal(a) * scale if scaled else torch.zeros_like(_diagonal(a)) + scale
    return a + torch.diag_embed(shift)


def _kept(a: Tensor, lam: Tensor | None, scaled: bool) -> Tensor | None:
    """`a` where the derivatives by its damping need its values."""
    return a if scaled and lam is not None else None


def _damped_jvp(
    a: Tensor,
    tangent: Tensor | None,
    lam: Tensor | None,
    lam_tangent: Tensor | None,
    value: float | None,
    scaled: bool,
    symmetric: bool,
) -> Tensor:
    """Tangent of A + damping."""
    d = torch.zeros_like(a) if tangent is None else _symmetric(tangent) if symmetric else tangent
    if scaled:
        d = damped(d, lam, value, True)
    if lam_tangent is not None:
        d = d + torch.diag_embed(lam_tangent[..., None] * (_diagonal(a) if scaled else torch.ones_like(_diagonal(a))))
    return d


def _damped_vjp(
    a: Tensor, g: Tensor, lam: Tensor | None, value: float | None, scaled: bool, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of A and of lam from that of A + damping."""
    if symmetric:
        g = _symmetric(g)
    lam_grad = (_diagonal(g) * (_diagonal(a) if scaled else 1.0)).sum(-1) if lam is not None else None
    return (damped(g, lam, value, True) if scaled else g), lam_grad


def _lead(size: int, in_dims: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors with the dimension that vmap maps over in front."""
    return tuple(
        None if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=False)
    )


def _save(ctx: Any, info: Tensor, *tensors: Tensor | None) -> None:
    """Save what both derivatives find in `ctx.saved_tensors`; `info` has none, and no gradient is made of zeros."""
    ctx.mark_non_differentiable(info)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


class Inv(Function):
    """X = M^-1, M = A + damping: dX = -X dM X. The inverse itself is all that the derivatives need."""

    @staticmethod
    def forward(a: Tensor, lam: Tensor | None, value: float | None, scaled: bool, spd: bool) -> tuple[Tensor, Tensor]:
        return kernels.inv(a, lam, value, scaled, spd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, lam, *ctx.options = inputs
        x, info = output
        a = _kept(a, lam, ctx.options[1])
        _save(ctx, info, a, lam, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None, None
        a, lam, x = ctx.saved_tensors
        return *_damped_vjp(x if a is None else a, -(x.mT @ g @ x.mT), lam, *ctx.options), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, lam_tangent: Tensor | None, *_: Any) -> tuple[Tensor, None]:
        a, lam, x = ctx.saved_tensors
        return -(x @ _damped_jvp(x if a is None else a, tangent, lam, lam_tangent, *ctx.options) @ x), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, lam: Tensor | None, *options: Any) -> tuple[Any, Any]:
        return apply(Inv, *_lead(info.batch_size, in_dims, a, lam), *options), (0, 0)


class Solve(Function):
    """x = M^-1 b: dx = M^-1 (db - dM x), and with u = M^-T g the gradients are u of b and -u x^T of M.

    The derivatives factor M a second time. To keep the factor would mean to write n^2 numbers a block in the forward
    pass and to read them in the backward pass, in place of A, which is kept anyhow; for small n the bytes are the cost,
    and a factorization in registers is free.
    """

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, lam: Tensor | None, value: float | None, scaled: bool, spd: bool
    ) -> tuple[Tensor, Tensor]:
        return kernels.solve(a, b, lam, value, scaled, spd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, _, lam, *ctx.options = inputs
        x, info = output
        _save(ctx, info, a, lam, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None, None, None
        a, lam, x = ctx.saved_tensors
        spd = ctx.options[2]
        u, _ = apply(Solve, a if spd else a.mT, g, lam, *ctx.options)
        a_grad = lam_grad = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            a_grad, lam_grad = _damped_vjp(a, -(u @ x.mT), lam, *ctx.options)
        return a_grad, u, lam_grad, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, tangent: Tensor | None, b_tangent: Tensor | None, lam_tangent: Tensor | None, *_: Any
    ) -> tuple[Tensor, None]:
        a, lam, x = ctx.saved_tensors
        right = torch.zeros_like(x) if b_tangent is None else b_tangent
        if tangent is not None or lam_tangent is not None:
            right = right - _damped_jvp(a, tangent, lam, lam_tangent, *ctx.options) @ x
        return apply(Solve, a, right, lam, *ctx.options)[0], None

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor, lam: Tensor | None, *options: Any) -> tuple[Any, Any]:
        return apply(Solve, *_lead(info.batch_size, in_dims, a, b, lam), *options), (0, 0)


def _inverse_gaps(a: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """1 / (w_j - w_i); NaN where the two are equal to working precision, 0 on the diagonal.

    To rounding entries of A by eps each moves w_i by eps |v_i|^T |A| |v_i| at most. That is eps |w_i| in a diagonal
    block, about as much in a graded one that is definite (Demmel and Veselic), eps ||A|| in a rotated one: what is no
    larger than n times that, for the two together, is no gap.
    """
    n = w.shape[-1]
    moved = (v.abs() * (kernels.mirrored(a).abs() @ v.abs())).sum(-2) * (n * torch.finfo(w.dtype).eps)
    gap = w[..., None, :] - w[..., :, None]
    equal = gap.abs() <= moved[..., None, :] + moved[..., :, None]
    inverse = torch.where(equal, torch.nan, 1.0 / torch.where(equal, 1.0, gap))
    return torch.where(torch.eye(n, dtype=torch.bool, device=w.device), 0.0, inverse)


class Eigh(Function):
    """A = V diag(w) V^T: dw = diag(K) and dV = V (F * K), K = V^T dA V, F_ij = 1 / (w_j - w_i).

    Where w_i = w_j the vectors are free to turn into each other, and F_ij is NaN, unless nothing asks for it: in the
    forward mode where K_ij = 0, in the reverse mode where no vector of the block has a gradient.
    """

    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.eigh(a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        w, v, info = output
        _save(ctx, info, inputs[0], w, v)

    @staticmethod
    def backward(ctx: Any, w_grad: Tensor | None, v_grad: Tensor | None, _: Any) -> Tensor | None:
        if w_grad is None and v_grad is None:
            return None
        a, w, v = ctx.saved_tensors
        k = torch.zeros_like(v) if w_grad is None else torch.diag_embed(w_grad)
        if v_grad is not None:
            turn = v.mT @ v_grad
            asked = (v_grad != 0).any(-1, keepdim=True).any(-2, keepdim=True)
            k = k + torch.where(asked, _inverse_gaps(a, w, v), 0.0) * (turn - turn.mT) / 2
        return _symmetric(v @ k @ v.mT)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor, None]:
        a, w, v = ctx.saved_tensors
        k = v.mT @ _symmetric(tangent) @ v
        turn = torch.where(k == 0, 0.0, _inverse_gaps(a, w, v) * k)
        return _diagonal(k).clone(), v @ turn, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor) -> tuple[Any, Any]:
        return apply(Eigh, *_lead(info.batch_size, in_dims, a)), (0, 0, 0)


class Lyapunov(Function):
    """Y with S Y + Y S = C, for a positive definite S.

    It carries the derivatives of the roots: X = Z^(1/2) means X X = Z, hence X dX + dX X = dZ. In the eigenbasis of S
    it divides by s_i + s_j > 0, so that equal eigenvalues are no exception; this is the divided difference of the
    root. Its own derivatives are such equations again: dY solves S dY + dY S = dC - dS Y - Y dS.
    """

    @staticmethod
    def forward(s: Tensor, c: Tensor) -> Tensor:
        w, v, _ = kernels.eigh(s)
        return v @ ((v.mT @ c @ v) / (w[..., :, None] + w[..., None, :])) @ v.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        s, y = ctx.saved_tensors
        u = apply(Lyapunov, s, g)
        return -_symmetric(u @ y.mT + y.mT @ u), u

    @staticmethod
    def jvp(ctx: Any, s_tangent: Tensor, c_tangent: Tensor) -> Tensor:
        s, y = ctx.saved_tensors
        d = _symmetric(s_tangent)
        return apply(Lyapunov, s, c_tangent - d @ y - y @ d)

    @staticmethod
    def vmap(info: Any, in_dims: Any, s: Tensor, c: Tensor) -> tuple[Any, Any]:
        return apply(Lyapunov, *_lead(info.batch_size, in_dims, s, c)), 0


class InvRoot(Function):
    """X = M^(-1/p), p in {1, 2, 4}, M = A + damping: inverse and square roots in turn."""

    @staticmethod
    def forward(a: Tensor, lam: Tensor | None, value: float | None, scaled: bool, p: int) -> tuple[Tensor, Tensor]:
        return kernels.inv_root(a, p, lam, value, scaled)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, lam, ctx.value, ctx.scaled, ctx.p = inputs
        x, info = output
        a = _kept(a, lam, ctx.scaled)
        _save(ctx, info, a, lam, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None, None
        a, lam, x = ctx.saved_tensors
        g = _symmetric(g)
        for root in _roots(x, ctx.p):
            g = apply(Lyapunov, root, g)
        inverse = _inverse(x, ctx.p)
        g = -(inverse @ g @ inverse)
        return *_damped_vjp(x if a is None else a, g, lam, ctx.value, ctx.scaled, True), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, lam_tangent: Tensor | None, *_: Any) -> tuple[Tensor, None]:
        a, lam, x = ctx.saved_tensors
        inverse = _inverse(x, ctx.p)
        d = _damped_jvp(x if a is None else a, tangent, lam, lam_tangent, ctx.value, ctx.scaled, True)
        d = -(inverse @ d @ inverse)
        for root in reversed(_roots(x, ctx.p)):
            d = apply(Lyapunov, root, d)
        return d, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, lam: Tensor | None, *options: Any) -> tuple[Any, Any]:
        return apply(InvRoot, *_lead(info.batch_size, in_dims, a, lam), *options), (0, 0)


def clamped_root(a: Tensor, lam: Tensor | None, value: float | None, p: int) -> tuple[Tensor, Tensor]:
    """((A_+ + lambda max(w_n, 0) I)^(-1/p), info), A_+ the positive semidefinite part, made of what has derivatives.

    In float64, in which A_+ is far less wrong than what is added to it. A block without a positive eigenvalue has the
    root 0 and the gradient 0.
    """
    m = a.double()
    w, _, code = apply(Eigh, m)
    top = w[..., -1].clamp(min=0)
    dead = top == 0
    shift = torch.where(dead, 1.0, top * (value if lam is None else lam.double()))
    x, failed = apply(InvRoot, apply(Spectral, m, ("positive",))[0], shift, None, False, p)
    info = torch.where(code == 0, (w < 0).sum(-1).int(), torch.where(code > 0, -3, code))
    if lam is not None:
        info = torch.where((lam > 0) & (lam < math.inf) | (info < 0), info, -2)
    info = torch.where((failed != 0) & (info >= 0), -3, info)
    x = torch.where(dead[..., None, None], 0.0, x)
    return torch.where((info < 0)[..., None, None], torch.nan, x).to(a.dtype), info


def _roots(x: Tensor, p: int) -> tuple[Tensor, ...]:
    """Return the square roots on the way from M^-1 = X^p to X, the last one taken first."""
    return () if p == 1 else (x,) if p == 2 else (x, x @ x)


def _inverse(x: Tensor, p: int) -> Tensor:
    """M^-1 = X^p."""
    return x if p == 1 else _inverse(x @ x, p // 2)


class Frechet(Function):
    """Derivative of f(A) in the direction E: V (D * V^T E V) V^T, D_ij = f[w_i, w_j] (`_blocks_functions.py`).

    Linear and self-adjoint in E. In A its derivative in the direction H has the second divided differences,
    (V^T . V)_ij = sum_k f[w_i, w_k, w_j] (E_ik H_kj + H_ik E_kj) in the eigenbasis, symmetric in E and H. `parameter`
    is one number a block that f depends on, or None.
    """

    @staticmethod
    def forward(a: Tensor, e: Tensor, parameter: Tensor | None, rule: functions.Rule) -> Tensor:
        w, v = _defined(rule, *kernels.eigh(a))
        slopes = functions.first(rule, parameter, w[..., :, None], w[..., None, :]).to(v.dtype)
        return v @ (slopes * (v.mT @ e @ v)) @ v.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, e, parameter, ctx.rule = inputs
        ctx.save_for_backward(a, e, parameter)
        ctx.save_for_forward(a, e, parameter)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, e, parameter = ctx.saved_tensors
        a_grad = _symmetric(_frechet_second(a, e, g, parameter, ctx.rule)) if ctx.needs_input_grad[0] else None
        return a_grad, apply(Frechet, a, g, parameter, ctx.rule), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, e_tangent: Tensor, *_: Any) -> Tensor:
        a, e, parameter = ctx.saved_tensors
        second = _frechet_second(a, e, _symmetric(tangent), parameter, ctx.rule)
        return apply(Frechet, a, e_tangent, parameter, ctx.rule) + second

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, e: Tensor, parameter: Tensor | None, rule: Any) -> tuple[Any, Any]:
        return apply(Frechet, *_lead(info.batch_size, in_dims, a, e, parameter), rule), 0


def _frechet_second(a: Tensor, e: Tensor, h: Tensor, parameter: Tensor | None, rule: functions.Rule) -> Tensor:
    w, v = _defined(rule, *apply(Eigh, a))
    e, h = v.mT @ e @ v, v.mT @ h @ v
    y = torch.zeros_like(e)
    for k in range(a.shape[-1]):
        outer = e[..., :, k, None] * h[..., k, None, :] + h[..., :, k, None] * e[..., k, None, :]
        weights = functions.second(rule, parameter, w[..., :, None], w[..., k, None, None], w[..., None, :])
        y = y + weights.to(v.dtype) * outer
    return v @ y @ v.mT


def _defined(rule: functions.Rule, w: Tensor, v: Tensor, info: Tensor) -> tuple[Tensor, Tensor]:
    """(w in float64, NaN in blocks that have no f(A); v)."""
    w = w.double()
    bad = (info != 0)[..., None]
    if rule[0] != "floor":
        with torch.no_grad():
            value, outside = functions.value(rule, w)
            bad = bad | (outside | ~torch.isfinite(value.to(v.dtype))).any(-1, keepdim=True)
    return torch.where(bad, torch.nan, w), v


def spectral(a: Tensor, rule: functions.Rule) -> tuple[Tensor, Tensor]:
    """(V diag(f(w)) V^T, info) of blocks of float32 or float64, without derivatives; exactly symmetric.

    The sum over k runs element by element, so that the bits of a block do not depend on where it stands.
    """
    w, v, info = kernels.eigh(a)
    value, outside = functions.value(rule, w.double())
    value = value.to(v.dtype)
    count = (outside | ~torch.isfinite(value)).sum(-1).int()
    info = torch.where(info == 0, count, info)
    x = torch.zeros_like(v)
    for k in range(a.shape[-1]):
        x = x + value[..., k, None, None] * (v[..., :, k, None] * v[..., None, :, k])
    return torch.where((info != 0)[..., None, None], torch.nan, x), info


class Spectral(Function):
    """f(A) = V diag(f(w)) V^T, with derivatives from `Frechet`."""

    @staticmethod
    def forward(a: Tensor, rule: functions.Rule) -> tuple[Tensor, Tensor]:
        return spectral(a, rule)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, ctx.rule = inputs
        _save(ctx, output[1], a)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        if g is None:
            return None, None
        (a,) = ctx.saved_tensors
        return apply(Frechet, a, _symmetric(g), None, ctx.rule), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        (a,) = ctx.saved_tensors
        return None if tangent is None else apply(Frechet, a, _symmetric(tangent), None, ctx.rule), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, rule: Any) -> tuple[Any, Any]:
        return apply(Spectral, *_lead(info.batch_size, in_dims, a), rule), (0, 0)


class AbsInv(Function):
    """X = max(|A|, floor)^-1: dX = -X dM X, with dM from `Frechet`."""

    @staticmethod
    def forward(a: Tensor, floor: Tensor | None, value: float | None) -> tuple[Tensor, Tensor]:
        return kernels.abs_inv(a, floor, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, floor, ctx.value = inputs
        x, info = output
        _save(ctx, info, a, floor, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
        if g is None:
            return None, None, None
        a, floor, x = ctx.saved_tensors
        return apply(Frechet, a, -(x @ _symmetric(g) @ x), floor, ("floor", ctx.value)), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, floor_tangent: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        if floor_tangent is not None:
            raise RuntimeError("block_abs_inv: not differentiable in floor")
        a, floor, x = ctx.saved_tensors
        if tangent is None:
            return None, None
        return -(x @ apply(Frechet, a, _symmetric(tangent), floor, ("floor", ctx.value)) @ x), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, floor: Tensor | None, value: Any) -> tuple[Any, Any]:
        return apply(AbsInv, *_lead(info.batch_size, in_dims, a, floor), value), (0, 0)
