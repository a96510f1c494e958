"""Curvature pairs of L-BFGS in rings of fixed shape, and the directions that they give: `LBFGSHistory`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant import _checks, backends
from secant.kernels.lbfgs.contract import Pair, State
from secant.ops import _register
from secant.ops.lbfgs import MAX_HISTORY, STORAGE


def flat_to_contract(
    s_ring: Tensor,
    y_ring: Tensor,
    sy: Tensor,
    yy: Tensor,
    head: Tensor,
    count: Tensor,
    stats: Tensor,
    grad: Tensor | None,
    s: Tensor | None,
    y: Tensor | None,
    y_prev: Tensor | None,
    t: float | Tensor,
    tol: float,
    out: Tensor | None,
    prev_out: Tensor | None,
) -> tuple[Any, ...]:
    """From the flat arguments of a schema to those of the family's contract."""
    pair = None if s is None or y is None else Pair(s, y, y_prev, t)
    return (
        State(s_ring, y_ring, sy, yy, head, count, stats),
        pair,
        grad if out is not None else None,
        tol,
        out,
        prev_out,
    )


_kernel = _register.Kernel(
    "lbfgs",
    "update",
    "lbfgs_update(Tensor(a!) s_ring, Tensor(b!) y_ring, Tensor(c!) sy, Tensor(d!) yy, Tensor(e!) head, "
    "Tensor(f!) count, Tensor(g!) stats, Tensor? grad, Tensor? s, Tensor? y, Tensor? y_prev, Tensor t, float tol, "
    "Tensor(h!)? out, Tensor(i!)? prev_out)",
    contract=flat_to_contract,
    vector=(8, 7),  # s, else grad
)


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
        >>> history = secant.LBFGSHistory(3, 10)
        >>> accepted = history.append(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]))     # curvature 2
        >>> bool(accepted), int(history.count)
        (True, 1)
        >>> history.direction(torch.tensor([4.0, 1.0, 3.0]))        # H_0 = I / 2 where it knows nothing
        tensor([-2.0000, -0.5000, -1.5000])
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
        self._s = torch.empty(b, m, n, dtype=storage_dtype, **kw)
        self._y = torch.empty(b, m, n, dtype=storage_dtype, **kw)
        if self.device.type == "cpu" and (prepare := getattr(self._backend(), "prepare", None)):
            prepare(self._s, self._y)  # before the zeros are written
        self._s.zero_()
        self._y.zero_()
        self._sy = torch.zeros(b, m, m, dtype=torch.float64, **kw)
        self._yy = torch.zeros(b, m, m, dtype=torch.float64, **kw)
        self._head = torch.zeros(b, dtype=torch.int32, **kw)
        self._count = torch.zeros(b, dtype=torch.int32, **kw)
        self._stats = torch.zeros(b, len(Stats._fields), dtype=torch.float64, **kw)
        self._stats_views = Stats(*(self._stats if batch is not None else self._stats[0]).unbind(-1))
        self._state = State(self._s, self._y, self._sy, self._yy, self._head, self._count, self._stats)
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

    def _backend(self) -> Any:
        return backends.resolve("lbfgs", self.device, self.dtype)

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
        """Return the scalars of the last call, float64, (8,) or (B, 8), columns as `Stats`: one transfer."""
        return self._view(self._stats)

    def _vector(self, op: str, name: str, x: Tensor) -> Tensor:
        """Check an input, and return it contiguous."""
        plain = type(x) is Tensor and x.layout is torch.strided and not x.is_nested
        if plain and x.shape == self._shape and x.dtype is self.dtype and x.device == self.device:
            return x.resolve_neg().contiguous()
        return _checks.shaped(op, name, x, tuple(self._shape), self.dtype, self.device).resolve_neg().contiguous()

    def _output(self, op: str, name: str, x: Tensor, *others: Tensor) -> Tensor:
        """Check an output: contiguous as it is, and apart from the other vectors (all of one size)."""
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
        return not torch.compiler.is_dynamo_compiling() and abs(a.data_ptr() - b.data_ptr()) < self._bytes

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
        if torch.compiler.is_dynamo_compiling():
            # An argument that is written may not appear twice in a schema, so the inputs that the kernel would have
            # replaced in place are copies here; and a schema has one type for t.
            t = t if isinstance(t, Tensor) else torch.full((1,), t, dtype=torch.float64, device=self.device)
            s = s.clone() if s is not None and out is not None else s
            y_prev = y_prev.clone() if y_prev is not None else None
            _kernel.registered(*self._state, grad, s, y, y_prev, t, self.curvature_tol, out, prev_out)
        else:
            pair = None if s is None or y is None else Pair(s, y, y_prev, t)
            self._backend().update(self._state, pair, grad, self.curvature_tol, out, prev_out)
            written = self._versioned
            if out is not None and not out.is_inference():
                written = [*written, out] if prev_out is None else [*written, out, prev_out]
            torch.autograd.graph.increment_version(written)

    def reset(self) -> None:
        """Forget every pair; the next direction is -grad."""
        for x in self._state:
            x.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return rings, Gram matrices and counters: six tensors of fixed shape (references, as torch's modules)."""
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
