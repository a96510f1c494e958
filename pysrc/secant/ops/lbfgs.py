"""Limited-memory quasi-Newton directions: `two_loop` and `LBFGSHistory`.

The mathematics, the bytes that must move and the error bound are in `kernels/lbfgs/README.md`; the contract between
this module and the kernels is in `kernels/lbfgs/reference.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant import _checks, backends
from secant.ops import _batching, _gate, _shortcut

MAX_HISTORY = 256
STORAGE = (torch.float32, torch.float64, torch.bfloat16)

_lib = torch.library.Library("secant", "FRAGMENT")
_lib.define("lbfgs_two_loop(Tensor grad, Tensor s, Tensor y, float? gamma, Tensor(a!) out) -> ()")
_lib.define(
    "lbfgs_update(Tensor(a!) s_ring, Tensor(b!) y_ring, Tensor(c!) sy, Tensor(d!) yy, Tensor(e!) head, "
    "Tensor(f!) count, Tensor(g!) stats, Tensor? grad, Tensor? s, Tensor? y, Tensor? y_prev, Tensor t, float tol, "
    "Tensor(h!)? out, Tensor(i!)? prev_out) -> ()"
)


def _two_loop_kernel(grad: Tensor, s: Tensor, y: Tensor, gamma: float | None, out: Tensor) -> None:
    backends.resolve("lbfgs", grad.device, grad.dtype).two_loop(grad, s, y, gamma, out)


def _update_kernel(s_ring: Tensor, *args: Any) -> None:
    vector = args[7] if args[7] is not None else args[6]  # s, else grad
    backends.resolve("lbfgs", vector.device, vector.dtype).update(s_ring, *args)


def _no_op(*args: Any) -> None:
    """Fake implementation: every result is written into an argument."""


for _name, _kernel in (("lbfgs_two_loop", _two_loop_kernel), ("lbfgs_update", _update_kernel)):
    for _key in ("CPU", "CUDA"):
        _lib.impl(_name, _kernel, _key)
    torch.library.register_fake(f"secant::{_name}", _no_op, lib=_lib)


def two_loop(grad: Tensor, s: Tensor, y: Tensor, *, gamma: float | None = None, out: Tensor | None = None) -> Tensor:
    """Quasi-Newton direction d = -H grad from curvature pairs, by the L-BFGS two-loop recursion.

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
        >>> g, s = torch.randn(5), torch.randn(3, 5)
        >>> secant.ops.two_loop(g, s, 2 * s)        # Hessian 2 I: the Newton step
        >>> # equals -g / 2
    """
    if gamma is None and not torch.compiler.is_compiling():
        plain = _plain()
        if plain is not None and _shortcut.takes(grad, s, y):
            d = torch.empty_like(grad) if out is None else out
            if type(d) is Tensor and not (d.requires_grad or d.is_neg()) and plain(grad, s, y, d):
                if out is not None:
                    _gate.written(out)
                return d
        plan = _plans.get(_plan_key(grad, s, y))
        if plan is not None and not _gate.is_transformed(grad, s, y) and (out is None or plan.takes(grad, s, y, out)):
            d = torch.empty_like(grad) if out is None else out
            if out is not None or type(d) is Tensor:
                plan.backend.two_loop(grad, s, y, None, d)
                if out is not None:
                    _gate.written(out)
                return d
    _check_two_loop(grad, s, y, gamma, out)
    if not _gate.is_transformed(grad, s, y):
        return _two_loop(grad, s, y, gamma, out)
    if s.requires_grad or y.requires_grad:
        raise _checks.fail("two_loop", "s, y", "tensors that do not require grad (detach them)", "requires_grad=True")
    if out is not None:
        raise _checks.fail("two_loop", "out", "None when grad is being differentiated", "a tensor")
    return _batching.apply(_TwoLoop, grad, s, y, gamma)


_plain = _shortcut.Shortcut("lbfgs", "two_loop_plain")


class _Plan(NamedTuple):
    """The way that a call took which the gate has passed: the backend, and the bytes from first to last element."""

    backend: Any
    vector: int
    s: int
    y: int

    def takes(self, grad: Tensor, s: Tensor, y: Tensor, out: Tensor) -> bool:
        """Whether `out` is `grad` or like it and apart from everything; if not, the gate says what is wrong."""
        if out is grad:
            return not out.requires_grad
        if type(out) is not Tensor or out.layout is not torch.strided or out.requires_grad:
            return False
        if out.is_nested or not out.is_contiguous() or out.is_neg():
            return False
        if out.shape != grad.shape or out.dtype is not grad.dtype or out.device != grad.device:
            return False
        at, spans = out.data_ptr(), ((grad, self.vector), (s, self.s), (y, self.y))
        return all(at >= (start := x.data_ptr()) + size or at + self.vector <= start for x, size in spans)


# What the gate has seen and passed: everything that it and the dispatch look at, so that equal keys take the same way.
_plans: dict[Any, _Plan] = {}


def _plan_key(grad: Tensor, s: Tensor, y: Tensor) -> Any:
    try:
        return (
            grad.shape, s.shape, y.shape, grad.dtype, s.dtype, y.dtype, grad.device, s.device, y.device,
            grad.is_contiguous(), s.stride(), y.stride(), grad.is_neg(), s.is_neg(), y.is_neg(),
            type(grad), type(s), type(y), backends.current_backend(),
        )  # fmt: skip
    except (AttributeError, RuntimeError):  # no tensor, or no strides: the gate says so
        return None


def _check_two_loop(grad: Tensor, s: Tensor, y: Tensor, gamma: float | None, out: Tensor | None) -> None:
    op = "two_loop"
    _checks.tensor(op, "grad", grad, _checks.REAL + _checks.HALF)
    if grad.dim() not in (1, 2):
        raise _checks.fail(op, "grad", "shape (n,) or (B, n)", f"shape {tuple(grad.shape)}")
    for name, pair in (("s", s), ("y", y)):
        _checks.tensor(op, name, pair, (*STORAGE, torch.float16), grad.device)
        want = (*grad.shape[:-1], pair.shape[-2] if pair.dim() == grad.dim() + 1 else -1, grad.shape[-1])
        if pair.shape != want:
            form = "(m, n)" if grad.dim() == 1 else "(B, m, n)"
            raise _checks.fail(
                op, name, f"shape {form} for grad of shape {tuple(grad.shape)}", f"shape {tuple(pair.shape)}"
            )
    if s.shape != y.shape:
        raise _checks.fail(op, "y", f"the shape of s, {tuple(s.shape)}", f"shape {tuple(y.shape)}")
    if s.dtype != y.dtype:
        raise TypeError(f"{op}: y: expected the dtype of s, {s.dtype}, got {y.dtype}")
    if s.shape[-2] > MAX_HISTORY:
        raise _checks.fail(op, "s", f"at most {MAX_HISTORY} pairs", s.shape[-2])
    if gamma is not None:
        _checks.positive(op, "gamma", gamma, "None or a positive finite number")
    if out is not None:
        inputs = {"s": s, "y": y, "grad": grad}
        _gate.output(op, out, tuple(grad.shape), grad.dtype, grad.device, inputs, same="grad")


def _two_loop(grad: Tensor, s: Tensor, y: Tensor, gamma: float | None, out: Tensor | None) -> Tensor:
    """Checked arguments: canonical layout, dispatch, and back."""
    given = (grad, s, y)
    g, s, y = grad.resolve_neg(), s.resolve_neg(), y.resolve_neg()
    g = (g if g.dtype in _checks.REAL else g.float()).contiguous()
    if s.dtype is torch.float16:
        s, y = s.float(), y.float()
    s = s if s.stride(-1) == 1 or s.shape[-1] <= 1 else s.contiguous()
    y = y if y.stride(-1) == 1 or y.shape[-1] <= 1 else y.contiguous()
    direct = out is not None and out.dtype == g.dtype and out.is_contiguous() and not out.is_neg()
    d = out if direct and out is not None else torch.empty_like(g)
    if s.shape[-2] == 0:
        torch.mul(g, -1.0 if gamma is None else -gamma, out=d)
    elif g.numel():
        if torch.compiler.is_compiling() or not _gate.is_plain(g, s, y, d):
            torch.ops.secant.lbfgs_two_loop(g, s, y, gamma, d)
        else:
            backend = backends.resolve("lbfgs", g.device, g.dtype)
            backend.two_loop(g, s, y, gamma, d)
            if g is grad and s is given[1] and y is given[2]:
                if len(_plans) >= 1024:
                    _plans.clear()
                _plans[_plan_key(grad, s, y)] = _Plan(backend, *map(_gate.span, (grad, s, y)))
    if out is None:
        return d if d.dtype == grad.dtype else d.to(grad.dtype)
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


class Stats(NamedTuple):
    """What a step of `LBFGSHistory` knows at no extra cost; float64 views, () or (B,), on the device.

    gd: g.d. g_norm: |g|_2. g_max: |g|_inf. sy: s.y. s_norm: |s|. y_norm: |y|. accepted: 1.0 if the pair entered the
    history. gamma: scale of H_0.
    """

    gd: Tensor
    g_norm: Tensor
    g_max: Tensor
    sy: Tensor
    s_norm: Tensor
    y_norm: Tensor
    accepted: Tensor
    gamma: Tensor


class LBFGSHistory:
    """Curvature pairs of L-BFGS in rings of fixed shape, with the Gram matrices that turn a direction into two passes.

    With S^T g, Y^T g and the Gram matrices s_i.y_j and y_i.y_j the two-loop recursion runs on coefficients, so a
    direction reads the history twice (4 m n elements) and needs one reduction. Nothing here reads a value back to the
    host: which pairs are valid, where the ring starts and how many pairs it holds live on the device.

    Args:
        n: length of a vector, >= 1.
        history_size: m, number of pairs kept, 1 to 256.
        batch: None for one problem, or B >= 1 independent problems, each with its own ring.
        dtype: of gradients and directions, float32 (default) or float64.
        device: of all tensors.
        storage_dtype: of the pairs: float32, float64 or bfloat16; None: `dtype`. The Gram matrices are computed from
            the stored values, so the pairs stay consistent when they are rounded.
        curvature_tol: a pair enters when s.y > curvature_tol |s| |y| and everything is finite; a rejected pair changes
            nothing. None: the machine epsilon of `dtype`.

    Attributes:
        s, y: (m, n) or (B, m, n) rings. sy, yy: float64 (m, m) Gram matrices by slot. head, count: int32 () or (B,),
        next slot and number of pairs. stats: `Stats` of the last call.

    References:
        Byrd, Nocedal, Schnabel, Representations of quasi-Newton matrices, Math. Program. 63 (1994), section 3.
        Chen, Wang, Zhou, Large-scale L-BFGS using MapReduce, NIPS 2014, Algorithm 2 (the recursion on coefficients).

    Example:
        >>> history = secant.LBFGSHistory(1000, 10)
        >>> history.append(s, y)
        >>> d = history.direction(grad)
    """

    def __init__(
        self,
        n: int,
        history_size: int,
        *,
        batch: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        storage_dtype: torch.dtype | None = None,
        curvature_tol: float | None = None,
    ) -> None:
        op = "LBFGSHistory"
        n = _checks.integer(op, "n", n, 1)
        history_size = _checks.integer(op, "history_size", history_size, 1, MAX_HISTORY)
        batch = None if batch is None else _checks.integer(op, "batch", batch, 1)
        if dtype not in _checks.REAL:
            raise TypeError(f"{op}: dtype: expected torch.float32 or torch.float64, got {_checks.show(dtype)}")
        storage_dtype = dtype if storage_dtype is None else storage_dtype
        if storage_dtype not in STORAGE:
            raise TypeError(
                f"{op}: storage_dtype: expected float32, float64 or bfloat16, got {_checks.show(storage_dtype)}"
            )
        tol = torch.finfo(dtype).eps if curvature_tol is None else curvature_tol
        self.curvature_tol = _checks.number(op, "curvature_tol", tol, "a number in [0, 1)", lambda x: 0 <= x < 1)
        self.n, self.history_size, self.batch = n, history_size, batch
        self.dtype, self.storage_dtype = dtype, storage_dtype
        self.device = torch.empty(0, device=device).device
        if self.device.type == "meta":
            raise _checks.fail(op, "device", "a device with memory", "meta")
        b, m = batch or 1, history_size
        kw: dict[str, Any] = {"device": self.device}
        self._s = torch.zeros(b, m, n, dtype=storage_dtype, **kw)
        self._y = torch.zeros(b, m, n, dtype=storage_dtype, **kw)
        self._sy = torch.zeros(b, m, m, dtype=torch.float64, **kw)
        self._yy = torch.zeros(b, m, m, dtype=torch.float64, **kw)
        self._head = torch.zeros(b, dtype=torch.int32, **kw)
        self._count = torch.zeros(b, dtype=torch.int32, **kw)
        self._stats = torch.zeros(b, len(Stats._fields), dtype=torch.float64, **kw)
        self._stats_views = Stats(*(self._stats if batch is not None else self._stats[0]).unbind(-1))
        self._state = (self._s, self._y, self._sy, self._yy, self._head, self._count, self._stats)
        # Those whose changes autograd follows.
        self._versioned = [x for x in self._state if not x.is_inference()]
        self._shape = torch.Size((n,) if batch is None else (batch, n))
        self._bytes = b * n * torch.finfo(dtype).bits // 8

    def __repr__(self) -> str:
        batch = f", batch={self.batch}" if self.batch is not None else ""
        return (
            f"LBFGSHistory(n={self.n}, history_size={self.history_size}{batch}, dtype={self.dtype}, "
            f"device={self.device}, storage_dtype={self.storage_dtype})"
        )

    def _view(self, x: Tensor) -> Tensor:
        return x if self.batch is not None else x[0]

    @property
    def s(self) -> Tensor:
        """Ring of steps, (m, n) or (B, m, n), by slot."""
        return self._view(self._s)

    @property
    def y(self) -> Tensor:
        """Ring of gradient differences, (m, n) or (B, m, n), by slot."""
        return self._view(self._y)

    @property
    def sy(self) -> Tensor:
        """s_i.y_j by slot, float64, 0 where i is newer than j (the recursion never asks for those)."""
        return self._view(self._sy)

    @property
    def yy(self) -> Tensor:
        """y_i.y_j by slot, float64."""
        return self._view(self._yy)

    @property
    def head(self) -> Tensor:
        """Slot that the next accepted pair takes, int32, () or (B,)."""
        return self._view(self._head)

    @property
    def count(self) -> Tensor:
        """Number of pairs held, int32, () or (B,)."""
        return self._view(self._count)

    @property
    def stats(self) -> Stats:
        """Scalars of the last call, as views of `stats_tensor`."""
        return self._stats_views

    @property
    def stats_tensor(self) -> Tensor:
        """The scalars of the last call in one float64 tensor, (8,) or (B, 8), columns as `Stats`: one transfer."""
        return self._view(self._stats)

    def _vector(self, op: str, name: str, x: Tensor) -> Tensor:
        """A checked input, contiguous."""
        plain = type(x) is Tensor and x.layout is torch.strided and not x.is_nested
        if plain and x.shape == self._shape and x.dtype is self.dtype and x.device == self.device:
            return x.resolve_neg().contiguous()
        return _checks.shaped(op, name, x, tuple(self._shape), self.dtype, self.device).resolve_neg().contiguous()

    def _output(self, op: str, name: str, x: Tensor, *others: Tensor) -> Tensor:
        """A checked output: contiguous as it is, and apart from the other vectors (all of one size)."""
        if self._vector(op, name, x) is not x:
            got = "a negated view" if x.is_neg() else f"strides {x.stride()}"
            raise _checks.fail(op, name, "a contiguous tensor (it is written in place)", got)
        if x.requires_grad and torch.is_grad_enabled():
            raise _checks.fail(
                op, name, "a tensor that does not require grad (or torch.no_grad())", "requires_grad=True"
            )
        for other in others:
            if self._overlaps(x, other):
                raise _checks.fail(op, name, "no overlap with the other vectors", "overlapping memory")
        return x

    def _overlaps(self, a: Tensor, b: Tensor) -> bool:
        """Two contiguous vectors of this history; there are no addresses to compare while compiling."""
        return not torch.compiler.is_compiling() and abs(a.data_ptr() - b.data_ptr()) < self._bytes

    def append(self, s: Tensor, y: Tensor) -> Tensor:
        """Offer the pair (s, y); it enters the ring when it passes the gate, in place of the oldest when that is full.

        Args:
            s: (n,) or (B, n), of `dtype`: a step. y: likewise, the change of the gradient along it.

        Returns:
            1.0 or 0.0, float64, () or (B,), on the device: whether the pair entered. A rejected pair changes nothing.

        Raises:
            TypeError, ValueError: dtype, shape or device do not fit.
        """
        s2, y2 = self._vector("append", "s", s), self._vector("append", "y", y)
        self._update(None, s2, y2, None, 1.0, None, None)
        return self.stats.accepted.clone()

    def direction(self, grad: Tensor, *, out: Tensor | None = None) -> Tensor:
        """d = -H grad, with H_0 = gamma I, gamma = s.y / y.y of the newest pair (1 when there is none).

        Args:
            grad: (n,) or (B, n), of `dtype`. out: likewise, contiguous; receives d, and may be `grad`.

        Returns:
            d. `stats` then holds g.d, |g|_2, |g|_inf and gamma of this call.

        Raises:
            TypeError, ValueError: dtype, shape or device do not fit.
        """
        g = self._vector("direction", "grad", grad)
        d = torch.empty_like(g) if out is None else self._output("direction", "out", out)
        if out is not None and out is not grad and self._overlaps(d, g):
            raise _checks.fail("direction", "out", "grad itself or no overlap with it", "overlapping memory")
        self._update(g, None, None, None, 1.0, d, None)
        return d

    def step(self, grad: Tensor, prev_grad: Tensor, direction: Tensor, t: float | Tensor) -> Stats:
        """One fused update and direction: what an L-BFGS iteration does between two line searches.

        Forms s = t * direction and y = grad - prev_grad, offers the pair, computes the new direction and advances:
        `prev_grad` becomes a copy of `grad` and `direction` becomes d = -H grad, both in place.

        Args:
            grad: (n,) or (B, n), of `dtype`: gradient at the new point.
            prev_grad: likewise, contiguous: gradient at the last point; overwritten with `grad`.
            direction: likewise, contiguous: the direction that led here; overwritten with the new one.
            t: step length, a number or a float64 tensor of () or (B,) on the device.

        Returns:
            `Stats` of the step, on the device.

        Raises:
            TypeError, ValueError: dtype, shape or device do not fit, or `prev_grad` or `direction` is not contiguous or
            overlaps another argument.
        """
        g = self._vector("step", "grad", grad)
        p = self._output("step", "prev_grad", prev_grad, g)
        d = self._output("step", "direction", direction, g, p)
        if isinstance(t, Tensor):
            shape = () if self.batch is None else (self.batch,)
            if t.dtype is not torch.float64 or t.device != self.device or t.shape not in ((), shape):
                raise _checks.fail(
                    "step", "t", f"a number or a float64 tensor of {shape} on {self.device}", _checks.describe(t)
                )
            t = t.resolve_neg().reshape(-1).contiguous()
        else:
            t = _checks.number("step", "t", t, "a number or a float64 tensor", lambda x: True)
        self._update(g, d, g, p, t, d, p)
        return self.stats

    def _update(
        self,
        grad: Tensor | None,
        s: Tensor | None,
        y: Tensor | None,
        y_prev: Tensor | None,
        t: float | Tensor,
        out: Tensor | None,
        prev_out: Tensor | None,
    ) -> None:
        if torch.compiler.is_compiling():
            # An argument that is written may not appear twice in a schema, so the inputs that the kernel would have
            # replaced in place are copies here; and a schema has one type for t.
            t = t if isinstance(t, Tensor) else torch.full((1,), t, dtype=torch.float64, device=self.device)
            s = s.clone() if s is not None and out is not None else s
            y_prev = y_prev.clone() if y_prev is not None else None
            torch.ops.secant.lbfgs_update(*self._state, grad, s, y, y_prev, t, self.curvature_tol, out, prev_out)
        else:
            kernel = backends.resolve("lbfgs", self.device, self.dtype)
            kernel.update(*self._state, grad, s, y, y_prev, t, self.curvature_tol, out, prev_out)
            torch.autograd.graph.increment_version(self._versioned)
            if out is not None:
                _gate.written(out) if prev_out is None else _gate.written(out, prev_out)

    def reset(self) -> None:
        """Forget every pair; the next direction is -grad."""
        for x in self._state:
            x.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The rings, Gram matrices and counters: six tensors of fixed shape (references, as torch's modules give)."""
        return {"s": self.s, "y": self.y, "sy": self.sy, "yy": self.yy, "head": self.head, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` into this history; the shapes and dtypes must be those of this history.

        A state that does not fit changes nothing.

        Raises:
            ValueError: a key is missing or unknown, a tensor has another shape or dtype, or `head` or `count` is not
                one of a ring of this size.
        """
        self.check_state(state)
        own = self.state_dict()
        for key, value in state.items():
            own[key].copy_(value)

    def check_state(self, state: dict[str, Tensor]) -> None:
        """Raise what `load_state_dict` would, and change nothing. It reads the counters back to the host."""
        own = self.state_dict()
        if set(state) != set(own):
            raise _checks.fail("load_state_dict", "state", f"keys {sorted(own)}", sorted(state))
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.shape != own[key].shape or value.dtype != own[key].dtype:
                raise _checks.fail(
                    "load_state_dict", f"state[{key!r}]", _checks.describe(own[key]), _checks.describe(value)
                )
            if value.is_nested or value.layout is not torch.strided or value.is_meta:
                raise _checks.fail("load_state_dict", f"state[{key!r}]", "a dense tensor with memory", value.device)
        # A kernel takes these for places in the ring.
        for key, high in (("head", self.history_size - 1), ("count", self.history_size)):
            if state[key].numel():
                low, top = (int(x) for x in torch.aminmax(state[key]))
                if low < 0 or top > high:
                    raise _checks.fail(
                        "load_state_dict", f"state[{key!r}]", f"numbers in 0..{high}", f"values in {low}..{top}"
                    )
