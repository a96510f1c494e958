"""Limited-memory quasi-Newton directions from pairs that the caller keeps: `two_loop`.

The mathematics, the bytes that must move and the error bound are in `kernels/lbfgs/README.md`; the contract between
this module and the kernels is in `kernels/lbfgs/reference.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant.ops import _batching, _gate, _register, _shortcut

MAX_HISTORY = 256
STORAGE = (torch.float32, torch.float64, torch.bfloat16)
_VECTORS = _checks.REAL + _checks.HALF
_PAIRS = (*STORAGE, torch.float16)


def _settled(grad: Tensor, s: Tensor, y: Tensor, gamma: float | None, out: Tensor) -> tuple[Any, ...]:
    """Check what a kernel would otherwise trust, for who calls the registered op itself; lay it out."""
    op = "lbfgs_two_loop"
    _checks.tensor(op, "grad", grad, _checks.REAL)
    _checks.tensor(op, "s", s, _PAIRS)
    vector, pairs = ("bn", "bMn") if grad.dim() == 2 else ("n", "Mn")
    sizes = _checks.shapes(
        op,
        (
            ("grad", grad, vector, grad.dtype),
            ("s", s, pairs, s.dtype),
            ("y", y, pairs, s.dtype),
            ("out", out, vector, grad.dtype),
        ),
        grad.device,
    )
    if sizes["M"] > MAX_HISTORY:
        raise _checks.fail(op, "s", f"at most {MAX_HISTORY} pairs", sizes["M"])
    return grad.resolve_neg().contiguous(), _rows(s), _rows(y), gamma, out


_kernel = _register.Kernel(
    "lbfgs",
    "two_loop",
    "lbfgs_two_loop(Tensor grad, Tensor s, Tensor y, float? gamma, Tensor(a!) out)",
    settle=_settled,
)


def two_loop(grad: Tensor, s: Tensor, y: Tensor, *, gamma: float | None = None, out: Tensor | None = None) -> Tensor:
    """Compute the quasi-Newton direction d = -H grad from curvature pairs, by the L-BFGS two-loop recursion.

    H is the inverse-Hessian approximation that m BFGS updates build from H_0 = gamma I,

        H_{i+1} = (I - rho_i s_i y_i^T) H_i (I - rho_i y_i s_i^T) + rho_i s_i s_i^T,    rho_i = 1 / (s_i . y_i),

    so that H y = s holds for the newest pair. Dot products are accumulated in float64 (those of a long float32 history
    on a CPU from runs of at most 256 in float32).

    Args:
        grad: (n,) or (B, n), float32 or float64; bfloat16 and float16 are computed in float32.
        s: (m, n) or (B, m, n): steps, oldest first, 0 <= m <= 256; float32, float64, bfloat16 or float16, any strides.
        y: as `s`, of the same dtype: gradient differences.
        gamma: scale of H_0, a positive number. None: s.y / y.y of the newest valid pair, 1 when there is none.
        out: as `grad`; receives the result. It may be `grad` itself, and must not overlap `s` or `y`.

    Returns:
        d, as `grad`. A pair whose s.y or y.y is not finite or whose s.y <= 0 is ignored; a non-finite `grad` gives a
        non-finite d. Differentiable in `grad` (forward and reverse mode: the map is linear and symmetric), and not in
        `s` and `y`.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shapes, devices, layouts or `gamma` do not fit, or `out` overlaps an input.

    References:
        Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithm 7.4, p. 178.

    Example:
        >>> g, s = torch.tensor([2.0, -4.0, 6.0]), torch.eye(3)[:2]
        >>> secant.ops.two_loop(g, s, 2 * s)        # pairs of the Hessian 2 I: the Newton step -g / 2
        tensor([-1.,  2., -3.])
    """
    if gamma is None and not torch.compiler.is_dynamo_compiling():
        plain = _plain()
        if plain is not None and _shortcut.takes(grad, s, y):
            d = torch.empty_like(grad) if out is None else out
            if type(d) is Tensor and not (d.requires_grad or d.is_neg()) and plain(grad, s, y, d):
                if out is not None:
                    _gate.written(out)
                return d
    return _any_two_loop(grad, s, y, gamma, out)


_plain = _shortcut.Shortcut("lbfgs", "two_loop_plain")


@_register.whole
def _any_two_loop(grad: Tensor, s: Tensor, y: Tensor, gamma: float | None, out: Tensor | None) -> Tensor:
    _check(grad, s, y, gamma)
    if _gate.is_transformed(grad, s, y):
        if s.requires_grad or y.requires_grad:
            expected = "tensors that do not require grad (detach them)"
            raise _checks.fail("two_loop", "s, y", expected, "requires_grad=True")
        if out is not None:
            raise _checks.fail("two_loop", "out", "None when grad is being differentiated", "a tensor")
        return _batching.apply(_TwoLoop, grad, s, y, gamma)
    if out is not None:
        inputs = {"s": s, "y": y, "grad": grad}
        _gate.output("two_loop", out, tuple(grad.shape), grad.dtype, grad.device, inputs, same="grad")
    return _two_loop(grad, s, y, gamma, out)


def _check(grad: Tensor, s: Tensor, y: Tensor, gamma: float | None) -> None:
    op = "two_loop"
    _checks.tensor(op, "grad", grad, _VECTORS)
    _checks.tensor(op, "s", s, _PAIRS, grad.device)
    _checks.tensor(op, "y", y, _PAIRS, grad.device)
    shape, pairs = grad.shape, s.shape
    dim = len(shape)
    if dim not in (1, 2):
        raise _checks.fail(op, "grad", "shape (n,) or (B, n)", f"shape {tuple(shape)}")
    if y.shape != pairs or len(pairs) != dim + 1 or pairs[-1] != shape[-1] or (pairs[0] != shape[0] and dim == 2):
        for name, given in (("s", pairs), ("y", y.shape)):
            if len(given) != dim + 1 or given[:-2] != shape[:-1] or given[-1] != shape[-1]:
                form = "(m, n)" if dim == 1 else "(B, m, n)"
                expected = f"shape {form} for grad of shape {tuple(shape)}"
                raise _checks.fail(op, name, expected, f"shape {tuple(given)}")
        raise _checks.fail(op, "y", f"the shape of s, {tuple(pairs)}", f"shape {tuple(y.shape)}")
    if s.dtype is not y.dtype:
        raise TypeError(f"{op}: y: expected the dtype of s, {s.dtype}, got {y.dtype}")
    if pairs[-2] > MAX_HISTORY:
        raise _checks.fail(op, "s", f"at most {MAX_HISTORY} pairs", pairs[-2])
    if gamma is not None:
        _checks.positive(op, "gamma", gamma, "None or a positive finite number")


def _rows(x: Tensor) -> Tensor:
    """Pairs whose rows are contiguous, of a dtype that is stored; a copy only if need be."""
    if x.is_contiguous() and not x.is_neg() and x.dtype is not torch.float16:
        return x
    x = x.resolve_neg()
    x = x.float() if x.dtype is torch.float16 else x
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _two_loop(grad: Tensor, s: Tensor, y: Tensor, gamma: float | None, out: Tensor | None) -> Tensor:
    """Go from checked arguments to the canonical layout, launch, and back."""
    g = grad if grad.dtype in _checks.REAL else grad.float()
    if not g.is_contiguous() or g.is_neg():
        g = g.resolve_neg().contiguous()
    direct = out is not None and out.dtype is g.dtype and out.is_contiguous() and not out.is_neg()
    d = out if direct and out is not None else torch.empty_like(g)
    if s.shape[-2] == 0:
        torch.mul(g, -1.0 if gamma is None else -gamma, out=d)
    elif g.numel():
        _kernel(g, _rows(s), _rows(y), gamma, d)
    if out is None:
        return d if d.dtype is grad.dtype else d.to(grad.dtype)
    if not direct:
        return out.copy_(d)
    _gate.written(out)
    return out


class _TwoLoop(torch.autograd.Function):
    """d = -H g is linear in g with a symmetric H: its derivative, its transpose and itself are one map."""

    @staticmethod
    def forward(grad: Tensor, s: Tensor, y: Tensor, gamma: float | None) -> Tensor:
        return _two_loop(grad, s, y, gamma, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, s, y, ctx.gamma = inputs
        ctx.set_materialize_grads(False)  # so that a missing tangent of s or y is None, not zeros
        ctx.save_for_backward(s, y)
        ctx.save_for_forward(s, y)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        s, y = ctx.saved_tensors
        return None if v is None else _batching.apply(_TwoLoop, v, s, y, ctx.gamma), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, s_tangent: Any, y_tangent: Any, _: Any) -> Tensor | None:
        if s_tangent is not None or y_tangent is not None:
            raise RuntimeError("two_loop: not differentiable in s and y")
        s, y = ctx.saved_tensors
        return None if tangent is None else _batching.apply(_TwoLoop, tangent, s, y, ctx.gamma)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], grad: Tensor, s: Tensor, y: Tensor, gamma: Any) -> tuple[Tensor, int]:
        size = info.batch_size

        def lead(x: Tensor, dim: int | None) -> Tensor:
            return x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)

        grad, s, y = (lead(x, d) for x, d in zip((grad, s, y), in_dims[:3], strict=True))
        flat = _batching.apply(
            _TwoLoop,
            grad.flatten(0, -2),
            s.flatten(0, -3) if s.dim() > 3 else s,
            y.flatten(0, -3) if y.dim() > 3 else y,
            gamma,
        )
        return flat.reshape(grad.shape), 0
