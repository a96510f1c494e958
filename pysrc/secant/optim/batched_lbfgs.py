"""L-BFGS for parameters that hold many problems, one in each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks
from secant.ops.history import LBFGSHistory
from secant.ops.lbfgs import MAX_HISTORY
from secant.optim._closure import Closure
from secant.optim._flat_optimizer import Callback, FlatOptimizer
from secant.solvers.batched_descent import batched_descent
from secant.solvers.batched_pairs import Pairs

#: What a counter of a problem holds.
_MOST = 2**31 - 1


class BatchedLBFGS(FlatOptimizer):
    r"""L-BFGS with a strong Wolfe search on B problems at once, each with its own pairs, search, end and failure.

    Every parameter is (B, ...); row b of all of them together is the vector of problem b, and loss b must depend on no
    other row. All problems are evaluated together, one call of the closure for a trial of each. What has stopped stays
    where it is while the others go on, and a NaN changes nothing of the others.

    A step lasts until every problem has made `max_iter` iterations or has stopped; the next one goes on from the pairs
    that each has. Two steps are bit for bit one of twice as many iterations, if the closure repeats itself.

    * **Rounding.** Values that differ by less than rounding are equal; the slopes decide then.
    * **A closure that raises** leaves parameters, gradients and state as they were before the step.
    * **State:** the pairs of each problem and counts; a run continues from it bit for bit.

    Args:
        params: parameters or groups, all (B, ...); real, dense, distinct, float32 or float64, of one dtype and device.
            No option may differ between groups.
        history_size: pairs of each problem.
        max_iter: iterations of each problem per call of `step`, >= 1.
        max_eval: evaluations per call, >= 2, counted after each search; None for any number.
        tolerance_grad: a problem stops when the largest component of its gradient is at most this.
        tolerance_change_rel: and when its loss falls by at most this times max(|f_k|, |f_k+1|, 1).
        callback: called with a `secant.result.Iteration` whenever problems have taken a step: its value is the sum of
            the losses, its grad_norm and step are the largest of all problems. A true value ends the step, with
            STOPPED for what was going on. It is not part of the state.

    Attributes:
        status: int32 (B,), a `secant.result.Status` for each problem, why the last step ended; None before the first.

    Raises:
        TypeError, ValueError: an argument is invalid.

    References:
        Liu and Nocedal, On the limited memory BFGS method for large scale optimization, Math. Program. 45 (1989).

    Example:
        >>> centers = torch.arange(6.0).reshape(3, 2)
        >>> x = torch.zeros(3, 2, requires_grad=True)
        >>> optimizer = secant.optim.BatchedLBFGS([x], tolerance_grad=1e-4)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     losses = (x - centers).square().sum(-1)
        ...     losses.sum().backward()
        ...     return losses
        >>> losses = optimizer.step(closure)
        >>> optimizer.status.tolist(), bool((x - centers).abs().max() < 1e-4)
        ([0, 0, 0], True)
    """

    OPTIONS: ClassVar[Mapping[str, _checks.Option]] = {
        "history_size": _checks.integer_from(1, MAX_HISTORY),
        "max_iter": _checks.integer_from(1),
        "max_eval": _checks.or_none(_checks.integer_from(2)),
        "tolerance_grad": _checks.number_from(0.0),
        "tolerance_change_rel": _checks.number_from(0.0),
    }
    PER_GROUP: ClassVar[tuple[str, ...]] = ()
    LAYOUT: ClassVar[tuple[str, ...]] = ("history_size",)

    status: Tensor | None = None  # type: ignore[assignment]
    _history: LBFGSHistory

    def __init__(
        self,
        params: Any,
        history_size: int = 20,
        max_iter: int = 20,
        max_eval: int | None = None,
        *,
        tolerance_grad: float = 1e-7,
        tolerance_change_rel: float = 0.0,
        callback: Callback | None = None,
    ) -> None:
        given = locals()
        super().__init__(params, {name: given[name] for name in self.OPTIONS}, callback)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what was learned so far is forgotten.

        Raises:
            TypeError, ValueError: as for every optimizer, or a parameter has another number of rows.
        """
        super().add_param_group(param_group)
        rows = self._first.shape[0] if self._first.dim() else 0
        for i, p in enumerate(self._params):
            if p.dim() == 0 or p.shape[0] != rows or rows == 0:
                self.param_groups.pop()
                expected = "shape (B, ...)" if i == 0 else f"shape ({rows}, ...), like params[0]"
                raise _checks.fail(self._name, f"params[{i}]", expected, f"shape {tuple(p.shape)}")

    # State ------------------------------------------------------------------------------------------------------------

    def _new_state(self) -> dict[str, Any]:
        b, flat = self._first.shape[0], self._flat
        size = self.param_groups[0]["history_size"]
        self._history = LBFGSHistory(flat.n // b, size, batch=b, dtype=flat.dtype, device=flat.device)
        return super()._new_state() | self._history.state_dict()

    def _build(self, state: Mapping[str, Any] | None, *, mine: bool) -> dict[str, Any]:
        if mine and state:  # of another size: the pairs are forgotten
            state = {name: state[name] for name in self.NUMBERS}
        return super()._build(state, mine=mine)

    def _check_state(self, state: Mapping[str, Any], like: Mapping[str, Any]) -> None:
        super()._check_state(state, like)
        self._history.check_state({name: state[name] for name in self._history.state_dict()})

    # A step -----------------------------------------------------------------------------------------------------------

    def _iterate(self, closure: Closure) -> tuple[Any, Any]:
        own, options, flat = self._own, self.param_groups[0], self._flat
        b = self._first.shape[0]
        self._undo.keep("parameters", flat.tensors)
        self._undo.keep("pairs", list(self._history.state_dict().values()))
        here = torch.cat([p.detach().reshape(b, -1) for p in flat.tensors], 1)
        first: list[Any] = []

        def place(x: Tensor) -> None:
            parts = x.split([p.numel() // b for p in flat.tensors], 1)
            for p, part in zip(flat.tensors, parts, strict=True):
                p.copy_(part.reshape(p.shape))

        def evaluate(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            here[index] = x
            place(here)
            losses = self._losses(closure, b)
            first[:] = first or [losses]
            g = torch.cat([part.reshape(b, -1) for part in flat.split(flat.grad)], 1)
            return losses.detach().reshape(b)[index], g[index]

        def record(value: Tensor, size: Tensor, t: Tensor) -> bool:
            own["n_iter"] += 1
            if self.callback is None:
                return False
            return self._report(*torch.stack([value.sum(), size.amax(), t.amax()]).tolist())

        found = batched_descent(
            evaluate, here.clone(), Pairs(self._history), gtol=options["tolerance_grad"],
            ftol=options["tolerance_change_rel"], max_iter=min(options["max_iter"], _MOST),
            max_nfev=options["max_eval"] or _MOST, compact=False, record=record,
        )  # fmt: skip
        place(found.x)
        parts = found.grad.split([p.numel() // b for p in flat.tensors], 1)
        for view, part in zip(flat.split(flat.grad), parts, strict=True):
            view.copy_(part.reshape(view.shape))
        return first[0], found.status

    def _losses(self, closure: Closure, b: int) -> Tensor:
        """Call the closure and gather the gradients."""
        self._own["func_evals"] += 1
        with torch.enable_grad():
            losses = closure()
        if not (isinstance(losses, Tensor) and losses.shape in ((b,), (b, 1)) and losses.is_floating_point()):
            got = _checks.describe(losses)
            raise TypeError(f"{self._name}.step: closure: expected it to return losses ({b},), got {got}")
        self._flat.gather_grad()
        if len(self._flat.absent) == len(self._flat.tensors) and losses.requires_grad:
            expected = "expected one that calls backward on the sum of the losses, got one that did not"
            raise TypeError(f"{self._name}.step: closure: {expected}: no gradient")
        return losses
