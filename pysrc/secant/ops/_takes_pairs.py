"""What learns from pairs in one form or another: the checks of its arguments, and what is called on it."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks, backends
from secant.kernels.lbfgs.contract import Pair
from secant.ops import _register


def settled_vectors(
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    sizes: dict[str, int],
    given: Sequence[Any],
) -> tuple[Tensor | None, ...]:
    """Check the vectors of a registered op, for who calls it itself, and lay out those that are read, and t.

    Args:
        dtype, device: of the state. sizes: n, the length of a vector; b, how many there are, where it is a batch.
        given: grad, s, y, y_prev, t, out and prev_out.
    """
    grad, s, y, y_prev, t, out, prev_out = given
    vectors = {"grad": grad, "s": s, "y": y, "y_prev": y_prev, "out": out, "prev_out": prev_out}
    shape = "bn?" if sizes.get("b", 1) > 1 or any(x is not None and x.dim() == 2 for x in vectors.values()) else "n?"
    _checks.shapes(op, ((name, x, shape, dtype) for name, x in vectors.items()), device, {"b": 1} | sizes)
    if (s is None) != (y is None) or (y_prev is not None and y is None):
        raise _checks.fail(op, "s, y", "both or neither, and y_prev only with them", "one of them")
    if (s is None and out is None) or (out is None and prev_out is not None) or (out is not None and grad is None):
        raise _checks.fail(op, "out", "a tensor where there is no pair, and for prev_out, and only with grad", out)
    _checks.tensor(op, "t", t, (torch.float64,), device)
    if t.numel() not in (1, sizes.get("b", 1)):
        raise _checks.fail(op, "t", "a number, or one a problem", f"shape {tuple(t.shape)}")
    read = (None if x is None else x.resolve_neg().contiguous() for x in (grad, s, y, y_prev))
    return (*read, t.resolve_neg().reshape(-1).contiguous())


class TakesPairs(abc.ABC):
    """Base of what learns from pairs (s, y) and gives directions -H g. Nothing here reads a value back to the host.

    A subclass makes the state and says what is in it.
    """

    #: Of the family's contract: (state, pair, grad, *options, out, prev_out).
    _kernel: ClassVar[_register.Kernel]

    n: int
    batch: int | None
    dtype: torch.dtype
    device: torch.device
    stats: Any
    _state: Any  # a named tuple of tensors
    _options: tuple[Any, ...]

    def _prepare(
        self,
        op: str,
        n: int,
        batch: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
        curvature_tol: float | None,
    ) -> None:
        """Check and keep what all of them are told."""
        self.n = _checks.integer(op, "n", n, 1)
        self.batch = None if batch is None else _checks.integer(op, "batch", batch, 1)
        if dtype not in _checks.REAL:
            raise TypeError(f"{op}: dtype: expected torch.float32 or torch.float64, got {_checks.show(dtype)}")
        tol = torch.finfo(dtype).eps if curvature_tol is None else curvature_tol
        self.curvature_tol = _checks.number(op, "curvature_tol", tol, "a number in [0, 1)", lambda x: 0 <= x < 1)
        self.dtype, self.device = dtype, torch.empty(0, device=device).device
        if self.device.type == "meta":
            raise _checks.fail(op, "device", "a device with memory", "meta")

    def _settle(self, state: Any, *options: Any) -> None:
        """Keep the state, and what a kernel is told beside it."""
        self._state, self._options = state, options
        # Those whose changes autograd follows.
        self._versioned = [x for x in state if not x.is_inference()]
        self._shape = torch.Size((self.n,) if self.batch is None else (self.batch, self.n))
        self._bytes = self._shape.numel() * torch.finfo(self.dtype).bits // 8

    @abc.abstractmethod
    def reset(self) -> None:
        """Forget every pair."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return what a run needs to go on: tensors of fixed shape (references, as torch's modules)."""

    @abc.abstractmethod
    def _check_contents(self, state: dict[str, Tensor]) -> None:
        """Raise a ValueError unless the counters of a state are such as this can have."""

    def _backend(self) -> Any:
        return backends.resolve("lbfgs", self.device, self.dtype)

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
        """Tell whether two contiguous vectors overlap; there are no addresses to compare while compiling."""
        return not torch.compiler.is_dynamo_compiling() and abs(a.data_ptr() - b.data_ptr()) < self._bytes

    def append(self, s: Tensor, y: Tensor) -> Tensor:
        """Offer the pair (s, y); it enters when it passes the gate.

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
        """Compute d = -H grad.

        Args:
            grad: (n,) or (B, n), of `dtype`. out: likewise, contiguous; receives d, and may be `grad`.

        Returns:
            d. `stats` then holds g.d, |g|_2 and |g|_inf of this call.

        Raises:
            TypeError, ValueError: dtype, shape or device do not fit.
        """
        g = self._vector("direction", "grad", grad)
        d = torch.empty_like(g) if out is None else self._output("direction", "out", out)
        if out is not None and out is not grad and self._overlaps(d, g):
            raise _checks.fail("direction", "out", "grad itself or no overlap with it", "overlapping memory")
        self._update(g, None, None, None, 1.0, d, None)
        return d

    def step(self, grad: Tensor, prev_grad: Tensor, direction: Tensor, t: float | Tensor) -> Any:
        """One fused update and direction: what an iteration does between two line searches.

        Forms s = t * direction and y = grad - prev_grad, offers the pair, computes the new direction and advances:
        `prev_grad` becomes a copy of `grad` and `direction` becomes d = -H grad, both in place.

        Args:
            grad: (n,) or (B, n), of `dtype`: gradient at the new point.
            prev_grad: likewise, contiguous: gradient at the last point; overwritten with `grad`.
            direction: likewise, contiguous: the direction that led here; overwritten with the new one.
            t: step length, a number or a float64 tensor of () or (B,) on the device.

        Returns:
            `stats` of the step, on the device.

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
        """Launch, or leave a compiler the schema."""
        if torch.compiler.is_dynamo_compiling():
            # An argument that is written may not appear twice in a schema, so the inputs that the kernel would have
            # replaced in place are copies here; and a schema has one type for t.
            t = t if isinstance(t, Tensor) else torch.full((1,), t, dtype=torch.float64, device=self.device)
            s = s.clone() if s is not None and out is not None else s
            y_prev = y_prev.clone() if y_prev is not None else None
            self._kernel.registered(*self._state, grad, s, y, y_prev, t, *self._options, out, prev_out)
        else:
            pair = None if s is None or y is None else Pair(s, y, y_prev, t)
            getattr(self._backend(), self._kernel.method)(self._state, pair, grad, *self._options, out, prev_out)
            written = self._versioned
            if out is not None and not out.is_inference():
                written = [*written, out] if prev_out is None else [*written, out, prev_out]
            torch.autograd.graph.increment_version(written)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` into this one; the shapes and dtypes must be those of this one.

        A state that does not fit changes nothing.

        Raises:
            ValueError: a key is missing or unknown, a tensor has another shape or dtype, or a counter is none that
                this can have.
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
        self._check_contents(state)
