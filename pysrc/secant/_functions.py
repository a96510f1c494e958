"""Functions of users, of tensors or of arrays, as what optimizers evaluate: values, gradients, graphs, counts."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant.optim._flat_optimizer import NUMERICAL, OTHER

#: Points that are remembered, so that the one which a run ends at is not evaluated again.
_REMEMBERED = 4
#: Rows or columns up to which a Jacobian is made by as many passes over one graph, whatever the graph is.
_FEW = 32


class Form(NamedTuple):
    """Tells what x0 was: an array or a tensor, of which shape, dtype and device; what comes back is so, too."""

    arrays: bool
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def give(self, x: Tensor) -> Any:
        """Return a copy of a tensor in this form."""
        x = x.detach().clone()
        return x.cpu().numpy() if self.arrays else x


def start(op: str, x0: object) -> tuple[Tensor, Form]:
    """Copy x0 into a tensor, and tell its form.

    Raises:
        TypeError, ValueError: it is no tensor, array or list of real numbers, or it is empty.
    """
    if isinstance(x0, Tensor):
        if torch._C._functorch.is_batchedtensor(x0):
            # What a run decides by its values is not the same for all that vmap maps over.
            expected = "a tensor outside of torch.func transforms (for many problems at once, batch=True)"
            raise _checks.fail(op, "x0", expected, "one inside torch.func.vmap")
        x = _checks.tensor(op, "x0", x0, _checks.REAL).detach().clone(memory_format=torch.contiguous_format)
        form = Form(False, x.shape, x.dtype, x.device)
    else:
        x = _from_array(op, "x0", x0, None)
        form = Form(True, x.shape, x.dtype, x.device)
    if x.numel() == 0:
        raise _checks.fail(op, "x0", "at least one number", _checks.describe(x0))
    return x, form


def batched_start(op: str, x0: object, size: str) -> tuple[Tensor, Form]:
    """Copy an x0 of many problems, (B, `size`)."""
    x, form = start(op, x0)
    if x.dim() != 2:
        raise _checks.fail(op, "x0", f"shape (B, {size}), as batch=True says", f"shape {tuple(x.shape)}")
    return x, form


def _from_array(op: str, name: str, values: object, dtype: torch.dtype | None) -> Tensor:
    """Make a tensor of an array, a list or a number; None: of its dtype, float64 for integers."""
    import numpy as np

    expected = "a tensor, or an array or list of float32, float64 or integers"
    try:
        array = np.atleast_1d(np.asarray(values))
    except ValueError:  # rows of different lengths
        raise TypeError(f"{op}: {name}: expected {expected}, got {_checks.show(values)}") from None
    if array.dtype.kind in "iu" or (dtype is not None and array.dtype.kind == "f"):
        array = array.astype(np.float64)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise TypeError(f"{op}: {name}: expected {expected}, got {array.dtype} from {_checks.show(values)}")
    made = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    return made if dtype is None else made.to(dtype)


def as_tensor(op: str, name: str, values: Any, like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Bring what a function returned to the dtype, device and a shape of as many numbers.

    Raises:
        TypeError, ValueError: it is something else.
    """
    found = values if isinstance(values, Tensor) else _from_array(op, name, values, like.dtype)
    if found.numel() != math.prod(shape):
        raise Malformed(*_checks.fail(op, name, f"shape {tuple(shape)}", f"shape {tuple(found.shape)}").args)
    return found.to(like.device, like.dtype).reshape(shape)


class Malformed(TypeError):
    """Says that a function returned another kind of thing than it must; no step would make that better."""


class _Loss(torch.autograd.Function):
    """f of x as a node of the graph, whose gradient g may have a graph of its own.

    g comes in a tuple, where autograd does not see it: or the first derivative would go through its graph, for nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, gradient: tuple[Tensor]) -> Tensor:
        (ctx.gradient,) = gradient
        return f.clone()

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        return u.to(ctx.gradient.dtype) * ctx.gradient, None, None


class _Linear(torch.autograd.Function):
    """A vector function of x as a node of the graph, of which `product` is u -> J^T u; linear also for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.product = product
        return value.clone()

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        return ctx.product(u), None, None


def check_functions(op: str, fun: object, jac: object) -> None:
    """Raise unless `fun` is a function and `jac` is one, a flag, or None."""
    if not callable(fun):
        raise TypeError(f"{op}: fun: expected a function, got {_checks.describe(fun)}")
    if not (jac is None or isinstance(jac, bool) or callable(jac)):
        raise _checks.fail(op, "jac", "None (by autograd), True, or a function", _checks.describe(jac))


class Function:
    """Base of a user's function of x with its derivative: how it is called, and what is counted.

    It gets a tensor where x0 is one or where autograd differentiates it, an array otherwise.
    """

    def __init__(
        self, op: str, form: Form, fun: Callable[..., Any], jac: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        check_functions(op, fun, jac)
        self.op, self.form = op, form
        self._fun, self._jac, self._args, self._kwargs = fun, jac or None, args, kwargs
        self.arrays = form.arrays and self._jac is not None
        self.nfev = self.njev = self.nhev = 0
        self._error: Exception | None = None

    def _call(self, function: Callable[..., Any], x: Tensor, *more: Tensor) -> Any:
        """Call a function of the user at x, and on vectors; arrays that it is given are its own."""
        if self.arrays:
            return function(*(y.detach().cpu().numpy().copy() for y in (x, *more)), *self._args, **self._kwargs)
        return function(x, *more, *self._args, **self._kwargs)

    def _evaluate(self, x: Tensor) -> tuple[Any, Any]:
        """Call the function: what it returns, and its derivative where that comes with it."""
        self.nfev += 1
        try:
            returned = self._call(self._fun, x)
        except NUMERICAL as error:
            if self.nfev == 1:
                self._error = error
            raise
        if self._jac is not True:
            return returned, None
        if not (isinstance(returned, (tuple, list)) and len(returned) == 2):
            raise Malformed(f"{self.op}: fun: expected a pair (f, g), as jac=True says, got {_checks.show(returned)}")
        return returned[0], returned[1]

    def raise_first_error(self) -> None:
        """Raise what the function raised at x0, if an optimizer took it for an infinite loss."""
        if self._error is not None:
            raise self._error


class Objective(Function):
    """Evaluates a scalar function of the user: values with gradients, or a loss with its graph.

    Args:
        op: for messages.
        form: of x0.
        fun: x, *args -> f, or (f, g).
        args: more arguments of every function.
        jac: None, True, or a function x -> g.
        hess, hessp: x -> H, and x, v -> H v; None: by autograd, where the loss is to have a graph.
    """

    def __init__(
        self, op: str, form: Form, fun: Callable[..., Any], args: tuple[Any, ...], jac: Any, hess: Any, hessp: Any
    ) -> None:
        super().__init__(op, form, fun, jac, args, {})
        for name, function in (("hess", hess), ("hessp", hessp)):
            if function is not None and not callable(function):
                raise _checks.fail(op, name, "None or a function", _checks.describe(function))
        self._hess, self._hessp = hess, hessp
        self._known: deque[tuple[Tensor, Any, Tensor]] = deque(maxlen=_REMEMBERED)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # of a graph: x, f and g, which has a graph

    def value_and_gradient(self, x: Tensor) -> tuple[Any, Tensor]:
        """Evaluate at a point, which is not kept: f as a tensor or a number, and g."""
        x = x.detach().clone()
        if self._jac is None:
            with torch.enable_grad():
                loss = self._value(x.requires_grad_(), graph=True)
                g = self._autograd(loss, x)
        else:
            with torch.no_grad():
                returned, g = self._evaluate(x)
                loss = self._checked(returned, x)
                g = self._gradient(x, g)
        self.njev += 1
        found = loss.detach() if isinstance(loss, Tensor) else loss
        self._known.append((x.detach(), found, g))
        return found, g

    def loss(self, x: Tensor) -> Tensor:
        """Evaluate at x; the loss has a graph that leads to it, as far as second derivatives.

        The graph is always that of f and of its gradient as one node: whoever evaluates a point again, to look for a
        faster way to the Hessian, is told that there is no other, and the function is not called for it.
        """
        if not torch.is_grad_enabled():
            return self._tensor(self._value(x.detach(), graph=False), x)
        derived = self._hess is not None or self._hessp is not None
        if self._last is None or not torch.equal(self._last[0], x.detach()):
            at = x.detach().clone() if derived else x.clone()  # what a graph keeps is not written when x moves
            if self._jac is None:
                value = self._value(at.requires_grad_() if derived else at, graph=True)
                g = self._autograd(value, at, graph=not derived)
            else:
                returned, g = self._evaluate(at)
                value = self._checked(returned, at)
                g = self._gradient(at, g)
                if not derived and not g.requires_grad and self.njev == 0:
                    raise Malformed(
                        f"{self.op}: jac: expected a gradient that autograd can follow (create_graph=True), or hess or "
                        "hessp besides, got one without a graph"
                    )
            self.njev += 1
            value, point = self._tensor(value, x).detach(), at.detach().clone()
            self._known.append((point, value, g.detach()))
            self._last = point, value, _Linear.apply(x, g.detach(), self._products(point)) if derived else g
        _, value, g = self._last
        return _Loss.apply(x, value, (g,))

    def found(self, x: Tensor) -> tuple[float, Tensor]:
        """Return f and g where a run has ended; evaluate there only if that was not one of the last points."""
        for point, value, g in reversed(self._known):
            if torch.equal(point, x):
                return float(value), g
        value, g = self.value_and_gradient(x)
        return float(value), g

    def _value(self, x: Tensor, *, graph: bool) -> Any:
        """Call the function and check what it returns, which has a graph if autograd is to differentiate it."""
        returned, _ = self._evaluate(x)
        value = self._checked(returned, x)
        followed = isinstance(value, Tensor) and value.requires_grad
        if graph and not followed and self.nfev == 1 and math.isfinite(float(value)):
            got = "one without a graph" if isinstance(value, Tensor) else _checks.describe(value)
            raise Malformed(f"{self.op}: fun: expected a tensor that autograd can follow (or give jac), got {got}")
        return value

    def _checked(self, value: Any, x: Tensor) -> Any:
        if isinstance(value, Tensor):
            if value.numel() == 1 and not value.is_complex():
                return value.reshape(()) if value.is_floating_point() else value.reshape(()).to(x.dtype)
        else:
            if not isinstance(value, Real) and getattr(value, "size", None) == 1 and hasattr(value, "item"):
                value = value.item()
            if isinstance(value, Real) and not isinstance(value, bool):
                return float(value)
        raise Malformed(f"{self.op}: fun: expected a real number or a tensor of one, got {_checks.describe(value)}")

    def _tensor(self, value: Any, x: Tensor) -> Tensor:
        return value if isinstance(value, Tensor) else x.new_tensor(value)

    def _gradient(self, x: Tensor, g: Any) -> Tensor:
        """Return the user's gradient, computed if it did not come with the value."""
        if self._jac is not True:
            assert callable(self._jac)
            g = self._call(self._jac, x)
        return as_tensor(self.op, "jac", g, x, self.form.shape)

    def _autograd(self, loss: Any, x: Tensor, *, graph: bool = False) -> Tensor:
        """Differentiate; what has no graph is constant, or, where it is not finite, no matter."""
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            return torch.zeros_like(x)
        (g,) = torch.autograd.grad(loss, x, allow_unused=True, create_graph=graph)
        return torch.zeros_like(x) if g is None else g

    def _products(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Make the function v -> H v at a point of which nobody else writes."""
        shape, n = self.form.shape, x.numel()
        matrix: list[Tensor] = []

        def product(v: Tensor) -> Tensor:
            if self._hessp is not None:
                self.nhev += 1
                return as_tensor(self.op, "hessp", self._call(self._hessp, x, v.to(x.dtype)), x, shape)
            if not matrix:
                self.nhev += 1
                matrix.append(as_tensor(self.op, "hess", self._call(self._hess, x), x, (n, n)))
            return (matrix[0] @ v.reshape(n)).view(shape)

        return product


class Residuals(Function):
    """Evaluates a vector function of the user, with its graph.

    Args:
        op, form, fun: as for `Objective`; fun returns a tensor or array of any shape, not empty.
        jac: None, True (fun returns both), or a function x -> J (m, n), or what has as many numbers in that order.
        args, kwargs: more arguments of every function.
    """

    def __init__(
        self, op: str, form: Form, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], jac: Any
    ) -> None:
        super().__init__(op, form, fun, jac, args, kwargs)
        self._m: int | None = None  # once it is known
        self._known: deque[tuple[Tensor, Tensor, Callable[[], Tensor] | None]] = deque(maxlen=_REMEMBERED)

    def residuals(self, x: Tensor) -> Tensor:
        """Evaluate at x; the residuals have a graph that leads to it.

        Where J is given, or has few rows or columns, the graph is one node: whoever evaluates a point again, to look
        for a faster way to J, is told that there is no other, and the function is not called for it.
        """
        if self._known and torch.equal(self._known[-1][0], x.detach()):
            _, r, known = self._known[-1]
            if known is not None:
                return self._linear(x, r, known)
        if self._jac is None:
            return self._followed(x)
        at = x.detach().clone()
        with torch.no_grad():
            returned, given = self._evaluate(at)
        r = self._checked(returned, x)
        matrix: list[Tensor] = []

        def jacobian() -> Tensor:
            if not matrix:
                self.njev += 1
                found = self._call(self._jac, at) if callable(self._jac) else given
                matrix.append(as_tensor(self.op, "jac", found, at, (r.numel(), at.numel())))
            return matrix[0]

        self._known.append((at, r, jacobian))
        return self._linear(x, r, jacobian)

    def _followed(self, x: Tensor) -> Tensor:
        """Evaluate at x what autograd follows."""
        few = torch.is_grad_enabled() and (x.numel() <= _FEW or (self._m is not None and self._m <= _FEW))
        at = x.detach().clone().requires_grad_() if few else x
        returned, _ = self._evaluate(at)
        r = self._checked(returned, at)
        self._m = r.numel()
        if torch.is_grad_enabled() and not r.requires_grad and self.nfev == 1:
            raise Malformed(
                f"{self.op}: fun: expected a tensor that autograd can follow (or give jac), got one without a graph"
            )
        if not few:
            self.njev += torch.is_grad_enabled()
            self._known.append((x.detach().clone(), r.detach(), None))
            return r
        graph, matrix = [r], list[Tensor]()

        def jacobian() -> Tensor:
            if not matrix:
                self.njev += 1
                with torch.enable_grad():
                    matrix.append(_differentiated(graph.pop().reshape(-1), at))
            return matrix[0]

        self._known.append((at.detach(), r.detach(), jacobian))
        return self._linear(x, r.detach(), jacobian)

    def _linear(self, x: Tensor, r: Tensor, jacobian: Callable[[], Tensor]) -> Tensor:
        return _Linear.apply(x, r, lambda u: (jacobian().mT @ u.reshape(-1).to(x.dtype)).view(x.shape))

    def found(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return r and J (m, n) where a run has ended; evaluate there only what is not known."""
        for point, r, jacobian in reversed(self._known):
            if jacobian is not None and torch.equal(point, x):
                return r, jacobian()
        x = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            r = self.residuals(x)
            jacobian = self._known[-1][2]
            return r.detach(), _differentiated(r.reshape(-1), x) if jacobian is None else jacobian()

    def _checked(self, returned: Any, x: Tensor) -> Tensor:
        if isinstance(returned, Tensor) and returned.numel() > 0 and not returned.is_complex():
            return returned if returned.is_floating_point() else returned.to(x.dtype)
        if self.arrays and not isinstance(returned, Tensor):
            r = _from_array(self.op, "fun", returned, x.dtype)
            if r.numel() > 0:
                return r
        expected = "an array" if self.arrays else "a tensor"
        raise Malformed(f"{self.op}: fun: expected {expected} of real residuals, got {_checks.describe(returned)}")


def _differentiated(r: Tensor, x: Tensor) -> Tensor:
    """Make J (m, n) of the graph of r (m,): by columns where they are fewer and the graph allows it, else by rows."""
    m, n = r.numel(), x.numel()
    if not r.requires_grad:
        return x.new_zeros(m, n)
    if n < m:
        u = torch.linspace(1.0, 2.0, m, dtype=r.dtype, device=r.device).requires_grad_()
        (back,) = torch.autograd.grad(r, x, u, create_graph=True, allow_unused=True)
        if back is not None and back.requires_grad:
            with contextlib.suppress(RuntimeError):  # of an operation that is not differentiable twice, and says so
                found = torch.stack(_gradients(back.reshape(-1), u), 1).to(x.dtype)
                # Of one that does not say so a part is missing.
                lost, size = (found.mT @ u.to(x.dtype) - back.reshape(-1)).abs(), found.abs().mT @ u.to(x.dtype)
                if bool((lost <= torch.finfo(x.dtype).eps ** 0.5 * size).all()):
                    return found.detach()
    return torch.stack(_gradients(r, x)).reshape(m, n)


def _gradients(values: Tensor, x: Tensor) -> list[Tensor]:
    """Return the gradient of each of several values."""
    found = [torch.autograd.grad(value, x, retain_graph=True, allow_unused=True)[0] for value in values.unbind()]
    return [torch.zeros_like(x) if g is None else g for g in found]


def forgiven(error: Exception) -> bool:
    """Tell whether what a function raised at a trial stands for an infinite value."""
    return isinstance(error, NUMERICAL) and not isinstance(error, OTHER)
