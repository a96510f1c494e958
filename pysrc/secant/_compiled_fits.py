"""A model, its derivatives and the normal equations of a fit, as loops that torch.compile makes of them.

What a step needs of k data and p parameters are p (p + 3) / 2 sums. In eager mode every operation of the model and of
its derivatives writes k numbers for each fit, and the Jacobian k p of them, which are read once; here they are never
in memory.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant._functions import Malformed
from secant.solvers._robust import Robust
from secant.solvers.batched_least_squares import Equations, Trial

#: What compiles; the tests take "eager", which compiles nothing.
_BACKEND = "inductor"
#: All sums in one loop, in which nothing is written down: by default the compiler keeps what is used more than a few
#: times, and sums no more than 16 numbers at once, which takes twice the time.
_OPTIONS = {
    "realize_reads_threshold": 10_000,
    "realize_opcount_threshold": 10_000,
    "realize_acc_reads_threshold": 10_000,
    "max_fusion_size": 1_024,
    "cpp.max_horizontal_fusion_size": 256,
}
#: Models of which the compiled forms are kept.
_KEPT = 64


class Data(NamedTuple):
    """What belongs to the fits: inputs of the model, y (B, k), 1 / sigma (B, k) or None, which data count or None."""

    inputs: tuple[Tensor, ...]
    y: Tensor
    scale: Tensor | None
    there: Tensor | None


class Model(NamedTuple):
    """A model as it is to be called. packed: with its inputs as a tuple. each: which inputs have a row for each fit."""

    f: Callable[..., Any]
    packed: bool
    each: tuple[bool, ...]

    def values(self, parameters: Sequence[Tensor], index: Tensor, data: Data) -> Tensor:
        """Evaluate (b, k)."""
        own = tuple(x[index] if each else x for x, each in zip(data.inputs, self.each, strict=True))
        found: Tensor = self.f(own if self.packed else own[0], *parameters)
        return found.expand(len(index), data.y.shape[1])


def _weighed(r: Tensor, index: Tensor, data: Data) -> Tensor:
    """Leave out what is no datum, and divide the rest by sigma."""
    if data.there is not None:
        r = torch.where(data.there[index], r, 0.0)
    return r if data.scale is None else r * data.scale[index]


def _loop(model: Model, robust: Robust) -> Callable[..., tuple[Tensor, ...]]:
    def trial(x: Tensor, index: Tensor, before: Tensor, data: Data) -> tuple[Tensor, ...]:
        """Return r, the loss, how much less it is than before, J^T W u, J^T W^2 J, the squared columns of J."""
        b, k = before.shape
        p = x.shape[1]
        own = [x[:, i, None].expand(b, k) for i in range(p)]
        linear: Any = torch.func.vjp(lambda *z: model.values(z, index, data), *own)
        values, back = linear
        r = _weighed(values - data.y[index], index, data)
        columns = [_weighed(column, index, data) for column in back(torch.ones_like(values))]
        right, weights = robust.linearized(r)
        squares = None
        if weights is not None:
            squares = torch.stack([column.square().sum(1) for column in columns], 1)
            columns = [column * weights for column in columns]
        g = torch.stack([(column * right).sum(1) for column in columns], 1)
        entries = [(columns[i] * columns[j]).sum(1) for i in range(p) for j in range(i + 1)]
        places = [max(i, j) * (max(i, j) + 1) // 2 + min(i, j) for i in range(p) for j in range(p)]
        a = torch.stack([entries[place] for place in places], 1).view(b, p, p)
        if squares is None:
            squares = torch.stack([entries[i * (i + 3) // 2] for i in range(p)], 1)
        return r, robust.value(r), robust.decrease(before, r), g, a, squares

    return trial


@functools.lru_cache(maxsize=_KEPT)
def _compiled(model: Model, robust: Robust, backend: str) -> Callable[..., tuple[Tensor, ...]]:
    function = _loop(model, robust)
    # A compiler counts the versions of a code object and stops at a few: each model has one of its own.
    code = function.__code__.replace(co_name=f"{function.__name__}_{getattr(model.f, '__name__', 'model')}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    known = torch._inductor.list_options()
    options: dict[str, Any] = {name: value for name, value in _OPTIONS.items() if name in known}
    if backend != "inductor":
        options = {}
    return torch.compile(own, fullgraph=True, backend=backend, options=options or None)


class CompiledRows:
    """Evaluates some of the fits, all that there is to know at once.

    Args:
        op: for messages. model: every value of which depends on its own parameters alone. data: of these fits.
    """

    def __init__(self, op: str, model: Model, data: Data) -> None:
        self._op, self._model, self._data = op, model, data

    def residuals(self, x: Tensor, index: Tensor) -> Tensor:
        """Evaluate r (b, k)."""
        return self.trial(x, index, None, Robust("linear", 1.0, batched=True)).r

    def equations(self, x: Tensor, index: Tensor, r: Tensor, robust: Robust) -> Equations:
        """Evaluate again."""
        found = self.trial(x, index, r, robust).equations
        assert found is not None
        return found

    @torch.no_grad()
    def trial(self, x: Tensor, index: Tensor, before: Tensor | None, robust: Robust) -> Trial:
        """Evaluate r (b, k), the loss, how much less it is than before, and the equations."""
        count = len(x)
        if before is None:
            before = x.new_zeros(count, self._data.y.shape[1])
        if count == 1:  # a compiler takes sizes of 0 and 1 for constants
            x, index, before = (part.expand(2, *part.shape[1:]) for part in (x, index, before))
        given = [part.contiguous() for part in (x, index, before)]
        for one in (*given, self._data.y, self._data.scale, self._data.there):
            if one is not None and len(one) > 1:
                torch._dynamo.maybe_mark_dynamic(one, 0)
        try:
            found = _compiled(self._model, robust, _BACKEND)(*given, self._data)
        except torch._dynamo.exc.Unsupported as error:
            said = str(error).partition("\n")[0]
            raise Malformed(
                f"{self._op}: compile: expected an f that torch.compile goes through, got: {said}"
            ) from None
        r, value, decrease, *equations = (part[:count] for part in found)
        return Trial(r, value, decrease, Equations(*equations))
