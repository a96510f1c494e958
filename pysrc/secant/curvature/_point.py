"""One evaluated point: value, gradient, products and Jacobian of one evaluation of a closure, each found when asked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from secant import _checks
from secant.curvature import _errors, _evaluate, _graph, jacobian
from secant.curvature._curvature import CurvatureOperator, mean_over_processes
from secant.curvature._evaluate import Adapted, KeptEvaluator
from secant.curvature._parameters import Parameters
from secant.curvature._random import Randomness
from secant.curvature.fisher import Fisher
from secant.curvature.ggn import GGN, SquaresGGN
from secant.curvature.hessian import Hessian
from secant.curvature.jacobian import Jacobian

Operator = TypeVar("Operator", bound=CurvatureOperator)

#: What a closure of each kind does.
KINDS = {
    "loss": "a loss with its graph, and no call of backward",
    "outputs": "a pair (outputs, loss) with their graph, and no call of backward",
    "residuals": "residuals with their graph (a tensor or several), and no call of backward",
    "gradient": "a loss, and a call of backward within",
}
#: Kinds that give each operator.
_GIVING = {
    "hessian": ("loss", "outputs", "residuals"),
    "ggn": ("outputs", "residuals"),
    "fisher": ("outputs",),
    "jacobian": ("residuals", "outputs"),
}


class WrongClosure(ValueError):
    """Says that a closure returned another kind of thing than was asked for."""


class _Routine:
    """Counts the points of one problem, and tells which of them are looked at closely.

    The first is, the second, the fourth, the eighth and so on, and any whose closure is another function than that of
    the one before, or computes something else as far as the size of its graph shows; then the next one is too.

    Attributes:
        is_quiet: see `KeptEvaluator`; at the last point that was looked at.
    """

    def __init__(self) -> None:
        self.is_quiet = False
        self._count = 0
        self._code: Any = None
        self._graph: Any = None

    def is_due(self, closure: Callable[[], Any]) -> bool:
        """Count a point, and tell whether it is looked at."""
        code = _code_of(closure)
        self._count = self._count + 1 if code is self._code else 1
        self._code = code
        return self._count & (self._count - 1) == 0

    def is_new(self, graph: Any) -> bool:
        """Tell whether a point has another graph than the one before, so that it is looked at after all."""
        before, self._graph = self._graph, graph
        if graph == before:
            return False
        if self._count & (self._count - 1):
            self._count = 0
        return True


class _Gradient:
    """Computes the gradient of one loss in the shapes of the parameters, and keeps the one that has a graph."""

    def __init__(self, loss: Tensor, tensors: Sequence[Tensor]) -> None:
        self.loss, self.tensors = loss, tensors
        self._kept: list[Tensor | None] | None = None

    def parts(self, *, create_graph: bool) -> list[Tensor | None]:
        """Return its parts, None for zero."""
        if self._kept is not None and create_graph:
            return self._kept
        one = torch.ones_like(self.loss)
        found = list(_graph.pull([self.loss], self.tensors, [one], create_graph=create_graph))
        if create_graph:
            self._kept = found
        return found

    def of(self, loss: Tensor) -> list[Tensor | None] | None:
        """Return them with their graph; None of another loss."""
        return self.parts(create_graph=True) if loss is self.loss else None


class EvaluatedPoint:
    r"""Evaluate a closure once, at the current parameters, and give what that tells.

    | kind | the closure returns | value | also gives |
    |---|---|---|---|
    | "loss" | the loss with its graph | it | `hessian` |
    | "outputs" | (outputs, loss) | the loss | `hessian`, `ggn`, `fisher`, `jacobian` |
    | "residuals" | a tensor r or several | 1/2 sum r^2 | `hessian`, `ggn`, `jacobian`, `residuals` |
    | "gradient" | the loss, having called backward | it | - |

    and all give `gradient()`. Each is computed when it is first asked for, once, from the graph of that evaluation.
    Only modes that by their nature evaluate a closure at every product ("forward-over-reverse", "reverse-over-forward",
    "forward"), and their comparison with others where a mode is yet to be chosen, evaluate it again, with the same
    random numbers. The operators belong to this point: once a parameter is written, their products are an error.

    The evaluation is one of the training program: generators go on as after a plain call of the closure, and modules in
    training update their buffers, once per point. A closure that raises leaves both as they were.

    Where `torch.distributed` is initialised, value, gradient and products are means over the processes, and all make
    the same calls; residuals and `jacobian` are those of this process, as is everything of the kind "gradient".

    Args:
        closure: () -> what its kind returns.
        params: as for `Hessian`.
        kind: "loss", "outputs", "residuals" or "gradient".
        modes: the mode of each operator, {"hessian": ..., "ggn": ..., "fisher": ..., "jacobian": ...}, as `modes` of
            another point has it; those that are missing are chosen by timing. Kept in the state of an optimizer, it
            makes a resumed run repeat the first bit for bit.
        like: an earlier point over the same parameters, whose choices and checks hold here too. Of the points that are
            made so, those in a row that are no power of two take for granted what was looked for in vain before: in
            the closure, a generator of its own, numbers drawn from Python's or numpy's, attention, normalisations and a
            call of backward; in its graph, layers, other parameters and operations without a second derivative. One of
            a closure that is another function than the last one's, or made another number of nodes, is always looked
            at.
        process_group: as for `Hessian`.
        name: of the caller, for messages.

    Attributes:
        kind: as given. value: the loss (), without a graph.

    Raises:
        TypeError, ValueError: an argument is invalid; the closure returns another kind, which the message names.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> point = secant.curvature.EvaluatedPoint(lambda: (w**4).sum() / 4, [w])
        >>> float(point.value), point.gradient().tolist(), (point.hessian() @ torch.ones(2)).tolist()
        (4.25, [1.0, 8.0], [3.0, 12.0])
    """

    value: Tensor
    params: Parameters
    _modes: dict[str, str | None]
    _learnt: dict[str, dict[str, Any]]
    _routine: _Routine

    def __init__(
        self,
        closure: Callable[[], Any],
        params: Iterable[Tensor],
        kind: str = "loss",
        *,
        modes: Mapping[str, str | None] | None = None,
        like: EvaluatedPoint | None = None,
        process_group: Any = "auto",
        name: str = "EvaluatedPoint",
    ) -> None:
        if not callable(closure):
            raise TypeError(f"{name}: closure: expected a function, got {_checks.describe(closure)}")
        if kind not in KINDS:
            raise _checks.fail(name, "kind", " or ".join(map(repr, KINDS)), repr(kind))
        unknown = sorted(set(modes or ()) - set(_GIVING))
        if unknown:
            raise _checks.fail(name, "modes", f"keys among {', '.join(_GIVING)}", unknown[0])
        self.kind, self.name, self.process_group = kind, name, process_group
        if like is not None:
            self.params, self._learnt = self._same(like, list(params)), like._known()
            self._routine = like._routine
        else:
            self._routine = _Routine()
            with torch.inference_mode(False), torch.enable_grad():
                self.params, self._learnt = Parameters(name, params), {}
        self._modes = dict(like.modes if like is not None else {}) | dict(modes or {})
        self._operators: dict[Any, CurvatureOperator] = {}
        self._gradient: Tensor | None = None
        self._is_light = not self._routine.is_due(closure)
        self._closure, self._released = closure, False
        if kind == "gradient":
            self._call()
        else:
            with _evaluate.plain(self.params.device):
                self._evaluate()
        self._state = self.params.state()

    def _same(self, like: EvaluatedPoint, tensors: list[Tensor]) -> Parameters:
        """Return the parameters of another point, which have to be these."""
        found = like.params
        same = len(tensors) == len(found.tensors) and all(
            p is q and p.dtype is found.dtype and p.device == found.device and p.shape.numel() == size
            for p, q, size in zip(tensors, found.tensors, found.sizes, strict=True)
        )
        if not same:
            raise _checks.fail(self.name, "params", "those of the point that this one is like", "others")
        return found

    def __repr__(self) -> str:
        return f"EvaluatedPoint(kind={self.kind!r}, n={self.params.n}, value={self.value.item():g})"

    # Evaluation -------------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluate a closure that does not call backward."""
        params = self.params
        warn = functools.partial(_evaluate.warn_of_attention, self.name)  # that keeps nothing of the point
        again = any(mode not in (None, "double-backward", "r-operator") for mode in self._modes.values())
        watched = not self._is_light or again or not self._routine.is_quiet
        randomness = Randomness(params.device, foreign=watched)
        self._evaluator = KeptEvaluator(self._closure, 0, randomness, params.tensors, warn)
        self._evaluator.watched = watched
        begun = torch.autograd._get_sequence_nr()
        result = self._result = self._evaluator()
        if watched:
            self._routine.is_quiet = self._evaluator.is_quiet
        if self._evaluator.called_backward:
            raise self._other("one that called backward")
        with torch.enable_grad():
            self._loss = self._read(result)
        if self._routine.is_new(_fingerprint(self._loss, begun)):
            self._is_light = False
        self._parts = _Gradient(self._loss, params.tensors)
        self.value = mean_over_processes(self._loss.detach().reshape(()).clone(), self.process_group)

    def _read(self, result: Any) -> Tensor:
        """Return the loss of what a closure returned."""
        if self.kind == "loss":
            if _is_loss(result) and result.requires_grad:
                return result
        elif self.kind == "outputs":
            if _is_pair(result) and result[0].requires_grad and result[1].requires_grad:
                return result[1]
        elif _are_real(result):
            residuals = jacobian.joined(self.name, result, self.params.dtype)
            if residuals.requires_grad:
                return _half_squares(residuals)
        raise self._other(_described(result))

    def _call(self) -> None:
        """Call a closure that calls backward, as the program would."""
        before = [(p.grad, None if p.grad is None else p.grad._version) for p in self.params.tensors]
        with torch.enable_grad():
            result = self._closure()
        after = [(p.grad, None if p.grad is None else p.grad._version) for p in self.params.tensors]
        number = isinstance(result, (int, float)) and not isinstance(result, bool)
        if not (number or _is_loss(result)):
            raise self._other(_described(result))
        same = all(x is y and u == v for (x, u), (y, v) in zip(before, after, strict=True))
        if all(g is None for g, _ in after) or (same and not number and result.requires_grad):
            raise self._other("one that did not call backward: no gradient was written")
        gradient = torch.empty(self.params.n, dtype=self.params.dtype, device=self.params.device)
        self.params.join([g for g, _ in after], gradient)
        self._gradient = gradient
        if number:
            result = torch.tensor(result, dtype=torch.float64, device=self.params.device)
        self.value = result.detach().reshape(()).clone()

    def _other(self, got: str) -> ValueError:
        return WrongClosure(*_checks.fail(self.name, "closure", KINDS[self.kind], got).args)

    # What it tells ----------------------------------------------------------------------------------------------------

    def gradient(self) -> Tensor:
        """Return the gradient of the value, flat (n,), zero for a parameter that the closure does not use.

        Raises:
            ValueError: the closure uses none of the parameters.
            RuntimeError: the graph cannot be differentiated, or was freed or changed since.
        """
        if self._gradient is None:
            params = self.params
            with _evaluate.plain(params.device):
                try:
                    found = self._parts.parts(create_graph=self._shares())
                except RuntimeError as error:
                    raise RuntimeError(_errors.reason(self.name, "gradient", error, [self._loss.grad_fn])) from error
            if all(g is None for g in found):
                raise _checks.fail(self.name, "params", "tensors that the closure uses", "none that it does")
            gradient = torch.empty(params.n, dtype=params.dtype, device=params.device)
            params.join(found, gradient)
            self._gradient = mean_over_processes(gradient, self.process_group)
        return self._gradient

    def _shares(self) -> bool:
        """Tell whether products with the Hessian are known to differentiate the gradient again."""
        operator = self._operators.get(("hessian",))
        mode = self._modes.get("hessian") if operator is None else operator.chosen_mode
        return mode == "double-backward"

    def residuals(self) -> Tensor:
        """Return the residuals, flat (m,), without a graph.

        Raises:
            ValueError: the closure is of another kind.
        """
        if self.kind != "residuals":
            raise self._needed("residuals", ("residuals",))
        return jacobian.joined(self.name, self._evaluator(), self.params.dtype).detach().reshape(-1)

    def hessian(self) -> Hessian:
        """Return the Hessian of the value, an operator on this point's graph.

        Raises:
            ValueError: the closure is of the kind "gradient".
        """
        reads = {"loss": _whole, "outputs": _second, "residuals": self._halving()}
        return self._operator("hessian", Hessian, reads)

    def ggn(self) -> GGN:
        """Return J^T H_L J; J^T J of residuals.

        Raises:
            ValueError: the closure gives neither (outputs, loss) nor residuals.
        """
        if self.kind == "residuals":
            return self._operator(
                "ggn", SquaresGGN, {"residuals": functools.partial(_with_loss, self.name, self.params.dtype)}
            )
        return self._operator("ggn", GGN, {"outputs": _whole})

    def fisher(self, **options: Any) -> Fisher:
        """Return the Fisher information of the outputs.

        Args:
            options: likelihood, samples, reduction and seed of `Fisher`; other options are another operator.

        Raises:
            ValueError: the closure does not give (outputs, loss).
        """
        return self._operator("fisher", Fisher, {"outputs": _whole}, **options)

    def jacobian(self, **options: Any) -> Jacobian:
        """Return the Jacobian of the residuals, or of the outputs; its rows are read from this point's graph.

        Args:
            options: row and samples of `Jacobian`; other options are another operator.

        Raises:
            TypeError, ValueError: the closure gives neither; an option is invalid.
        """
        return self._operator("jacobian", Jacobian, {"residuals": _whole, "outputs": _first}, **options)

    @property
    def modes(self) -> dict[str, str | None]:
        """Return the modes that operators have settled on, here or at the point that this one is `like`."""
        found = {key[0]: operator.chosen_mode for key, operator in self._operators.items()}
        return self._modes | {name: mode for name, mode in found.items() if mode is not None}

    def release(self) -> None:
        """Let go of the graph and the operators; the value, a gradient that was asked for, and what was learnt stay."""
        if self.kind == "gradient" or self._released:
            return
        self._learnt, self._modes = self._known(), self.modes
        self._operators, self._released = {}, True
        del self._evaluator, self._loss, self._closure, self._result, self._parts

    def _operator(
        self, name: str, cls: type[Operator], reads: Mapping[str, Callable[[Any], Any]], **options: Any
    ) -> Operator:
        """Return the operator of this name and these options, made once.

        Args:
            reads: what it takes of the result of a closure of each kind that gives it.
        """
        if self.kind not in reads:
            raise self._needed(name, _GIVING[name])
        if self._released:
            raise RuntimeError(f"{self.name}.{name}: point: expected one with its graph, got one that was released")
        key = (name, *sorted(options.items()))
        operator = self._operators.get(key)
        if operator is None:
            group = {} if cls is Jacobian else {"process_group": self.process_group}
            evaluator = Adapted(self._evaluator, reads[self.kind])
            learnt = self._learnt.get(name, {})
            operator = cls._at(evaluator, self.params, self._state, learnt, light=self._is_light, **group, **options)
            if cls is Hessian:
                operator._gradients = self._parts.of
            if name in self._modes and self._modes[name] != operator.chosen_mode:
                operator.chosen_mode = self._modes[name]
            self._operators[key] = operator
        assert isinstance(operator, cls)
        return operator

    def _known(self) -> dict[str, dict[str, Any]]:
        """Collect what the operators have found out, by their names."""
        return self._learnt | {key[0]: operator._learnt() for key, operator in self._operators.items()}

    def _needed(self, what: str, kinds: Iterable[str]) -> ValueError:
        expected = ", or ".join(f"{KINDS[kind]} (kind {kind!r})" for kind in kinds)
        got = f"{KINDS[self.kind]} (kind {self.kind!r})"
        return _checks.fail(f"{self.name}.{what}", "closure", expected, got)

    def _halving(self) -> Callable[[Any], Tensor]:
        """Return what reads the loss of residuals, and keeps nothing of the point that keeps it."""
        if self.kind != "residuals" or self._released:
            return _whole
        name, dtype, known, loss = self.name, self.params.dtype, self._result, self._loss

        def halved(result: Any) -> Tensor:
            return loss if result is known else _half_squares(jacobian.joined(name, result, dtype))

        return halved


def _code_of(closure: Any) -> Any:
    """Return what is the same of closures that are one function."""
    while isinstance(closure, functools.partial):
        closure = closure.func
    return getattr(closure, "__code__", None) or type(closure)


def _fingerprint(loss: Tensor, begun: int) -> tuple[Any, ...]:
    """Return how many nodes were made since `begun` for a loss, and what the last of them are."""
    node = loss.grad_fn
    if node is None:
        return ()
    return node._sequence_nr() - begun, node.name(), *(k.name() for k, _ in node.next_functions if k is not None)


def _whole(result: Any) -> Any:
    return result


def _first(result: Any) -> Any:
    return result[0]


def _second(result: Any) -> Any:
    return result[1]


def _with_loss(name: str, dtype: torch.dtype, result: Any) -> tuple[Tensor, Tensor]:
    residuals = jacobian.joined(name, result, dtype)
    return residuals, _half_squares(residuals)


def _half_squares(residuals: Tensor) -> Tensor:
    return 0.5 * residuals.square().sum()


def _is_loss(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_nested and x.numel() == 1 and x.is_floating_point()


def _is_pair(x: Any) -> bool:
    return isinstance(x, (tuple, list)) and len(x) == 2 and isinstance(x[0], Tensor) and _is_loss(x[1])


def _are_real(x: Any) -> bool:
    parts = x if isinstance(x, (tuple, list)) else [x]
    return len(parts) > 0 and all(isinstance(t, Tensor) and not t.is_nested and t.is_floating_point() for t in parts)


def _described(result: Any) -> str:
    """Say which kind of result this is."""
    if isinstance(result, Tensor) and not _are_real(result):
        return _checks.describe(result)
    if _is_loss(result):
        return "a loss with its graph" if result.requires_grad else "a loss without its graph (detached, or no_grad?)"
    if isinstance(result, Tensor):
        graph = "" if result.requires_grad else " without a graph"
        return f"residuals, or outputs, of shape {tuple(result.shape)}{graph}"
    if _is_pair(result):
        without = [name for name, x in zip(("outputs", "loss"), result, strict=True) if not x.requires_grad]
        return "a pair (outputs, loss)" + (f", {' and '.join(without)} without a graph" if without else "")
    if isinstance(result, (tuple, list)):
        return f"a {type(result).__name__} of {', '.join(type(x).__name__ for x in result) or 'nothing'}"
    if isinstance(result, (int, float)) and not isinstance(result, bool):
        return "a number without a graph"
    return type(result).__name__
