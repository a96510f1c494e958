"""What Hessian, GGN and Fisher share: points that are built once, batches, the choice of a mode, all-reduce."""

from __future__ import annotations

import abc
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from secant.curvature import _errors, _evaluate
from secant.curvature._evaluate import Evaluator
from secant.curvature._operator import LinearOperator
from secant.curvature._parameters import Parameters
from secant.curvature._points import Point
from secant.ops import _gate

#: Products per mode when modes are compared; the first warms up.
_TRIALS = 3


class CurvatureOperator(LinearOperator):
    """A matrix over the parameters that a closure defines at their current values. See `Hessian` for the arguments."""

    #: Ways to compute a product, the safest first; the others are checked against it.
    _MODES: tuple[str, ...]

    def __init__(
        self,
        closure: Callable[..., Any],
        params: Iterable[Tensor],
        *,
        batches: Iterable[Any] | None = None,
        weights: Sequence[float] | None = None,
        mode: str = "auto",
        keep_graphs: bool = True,
        process_group: Any = "auto",
    ) -> None:
        op = self._name
        if not callable(closure):
            raise TypeError(f"{op}: closure: expected a function, got {_gate.describe(closure)}")
        self.params = Parameters(op, params)
        super().__init__(self.params.n, self.params.dtype, self.params.device)
        modes = ("auto", "r-operator", *self._MODES)
        if mode not in modes:
            raise _gate.fail(op, "mode", " or ".join(map(repr, modes)), repr(mode))
        self._check_batches(batches, weights)
        self.closure, self.batches, self.weights = closure, batches, weights
        self.keep_graphs, self.process_group = keep_graphs, process_group
        self._requested, self._chosen = mode, None if mode in ("auto", "r-operator") else mode
        self._used = mode
        #: Of the modes that were compared: seconds per product, or why it cannot be used.
        self.timings: dict[str, float | str] = {}
        self._points: list[Point] | None = None
        self._state: tuple[tuple[int, int], ...] = ()
        self._warned = False

    def _check_batches(self, batches: Iterable[Any] | None, weights: Sequence[float] | None) -> None:
        op = self._name
        if batches is None:
            if weights is not None:
                raise _gate.fail(op, "weights", "None without batches", repr(weights))
            return
        if not isinstance(batches, Iterable) or isinstance(batches, Tensor):
            raise TypeError(f"{op}: batches: expected an iterable of batches, got {_gate.describe(batches)}")
        if isinstance(batches, Iterator):
            raise TypeError(f"{op}: batches: expected something that can be iterated again (a list, a DataLoader)")
        if weights is not None and not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights):
            raise _gate.fail(op, "weights", "finite numbers", repr(weights))

    @property
    def mode(self) -> str:
        """How products are computed: as asked for, or as chosen at the first product."""
        return self._used

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors in the shapes of the parameters as one flat vector (n,)."""
        out = torch.empty(self.shape[0], dtype=self.dtype, device=self.device)
        self.params.join(tensors, out)
        return out

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Views of a flat vector (n,) in the shapes of the parameters."""
        return self.params.split(vector)

    def refresh(self) -> None:
        """Forget the graph of the last point, so that the next product evaluates the closure again.

        Needed only after a change that cannot be seen: of the data, of buffers, or of a parameter through `.data`.
        """
        self._points = None

    # Points -----------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _point(self, evaluator: Evaluator) -> Point:
        """The matrix of one batch at the current parameters."""

    def _evaluators(self) -> Iterator[Evaluator]:
        if self.batches is None:
            yield Evaluator(self.closure, self.device, self._warn)
            return
        for batch in self.batches:
            yield Evaluator(functools.partial(self.closure, batch), self.device, self._warn)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            _evaluate.warn_of_attention(self._name)

    def _iterate(self) -> Iterator[Point]:
        """The points of all batches: those that are kept, or new ones."""
        state = self.params.state()
        if state != self._state:
            self._points, self._state = None, state
        if self._points is not None:
            yield from self._points
            return
        points = []
        for evaluator in self._evaluators():
            point = self._point(evaluator)
            if self.keep_graphs:
                points.append(point)
            yield point
        if self.keep_graphs:
            self._points = points
            self._state = self.params.state()

    def _rows(self, vectors: Tensor) -> Tensor:
        with torch.no_grad():
            total = torch.empty_like(vectors)
            if self.batches is None:
                for point in self._iterate():
                    self._write(point, vectors, total)
            else:
                self._accumulate(vectors, total)
            return self._reduced(total)

    def _write(self, point: Point, vectors: Tensor, out: Tensor) -> None:
        try:
            for i in range(len(vectors)):
                point.product(vectors[i], out[i])
        except RuntimeError as error:
            raise RuntimeError(_errors.reason(self._name, self._used, error, ())) from error

    def _accumulate(self, vectors: Tensor, total: Tensor) -> None:
        """Write the weighted sum over the batches."""
        part, count = torch.empty_like(vectors), 0
        total.zero_()
        for point in self._iterate():
            self._write(point, vectors, part)
            total.add_(part, alpha=1.0 if self.weights is None else self._weight(count))
            count += 1
        if count == 0:
            raise _gate.fail(self._name, "batches", "at least one", "none")
        if self.weights is None:
            total /= count
        elif count != len(self.weights):
            raise _gate.fail(self._name, "weights", f"one per batch ({count})", len(self.weights))

    def _weight(self, i: int) -> float:
        assert self.weights is not None
        if i >= len(self.weights):
            raise _gate.fail(self._name, "weights", "one per batch", f"{len(self.weights)} for more batches")
        return float(self.weights[i])

    def _reduced(self, total: Tensor) -> Tensor:
        """The mean over the processes of the group."""
        dist, group = torch.distributed, self.process_group
        if group is None or not dist.is_available() or not dist.is_initialized():
            return total
        group = None if group == "auto" else group
        size = dist.get_world_size(group)
        if size > 1:
            dist.all_reduce(total, group=group)
            total /= size
        return total

    # Modes ------------------------------------------------------------------------------------------------------------

    def _choose(self, candidates: dict[str, Callable[[], Point]], nodes: Sequence[Any]) -> Point:
        """The point of the fastest mode, and that mode from now on.

        Each makes a few products with one random vector; one that fails, or that disagrees with the first that works,
        is left out, and `timings` says why. Such cases are a closure that hides a use of the parameters from torch's
        function overrides, and wrong formulas (torch 2.13: backward through the forward mode of layer_norm).
        """
        n, op = self.shape[0], self._name
        v = torch.randn(n, dtype=self.dtype, device=self.device, generator=self.generator(0))
        reference: Tensor | None = None
        best: tuple[float, str, Point] | None = None
        for mode, make in candidates.items():
            out = torch.empty_like(v)
            try:
                point = make()
                seconds = min(self._timed(point, v, out) for _ in range(_TRIALS))
            except RuntimeError as error:
                self.timings[mode] = _errors.reason(op, mode, error, nodes)
                continue
            if reference is None:
                reference = out
            elif not torch.isfinite(reference).all() or not _agree(out, reference):
                self.timings[mode] = f"{op}: mode '{mode}': disagrees with the others"
                continue
            self.timings[mode] = seconds
            if best is None or seconds < best[0]:
                best = seconds, mode, point
        if best is None:
            raise RuntimeError("; ".join(str(why) for why in self.timings.values()))
        self._chosen = self._used = best[1]
        return best[2]

    def _timed(self, point: Point, v: Tensor, out: Tensor) -> float:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        point.product(v, out)
        if cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def _agree(a: Tensor, b: Tensor) -> bool:
    """To half the digits: more than rounding, less than a missing term."""
    return bool((a - b).norm(dtype=torch.float64) <= torch.finfo(a.dtype).eps ** 0.5 * b.norm(dtype=torch.float64))
