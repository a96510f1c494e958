"""What operators of a closure share: points that are evaluated once, batches, the choice of a mode, all-reduce."""

from __future__ import annotations

import abc
import contextlib
import copy
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from secant import _checks
from secant.curvature import _errors, _estimators, _evaluate, _graph
from secant.curvature._columns import Columns, Product, agree
from secant.curvature._evaluate import Evaluator
from secant.curvature._matrices import BatchMatrix
from secant.curvature._operator import LinearOperator
from secant.curvature._parameters import Parameters
from secant.curvature._random import Meeting, Randomness

#: Products per mode when modes are compared; the first warms up.
_TRIALS = 3


class CurvatureOperator(LinearOperator):
    """A matrix over the parameters that a closure defines at their current values. See `Hessian` for the arguments."""

    #: Ways to compute a product, the safest first; the others are checked against it.
    _MODES: tuple[str, ...]
    #: Whether the matrix is one over the parameters on both sides.
    _SYMMETRIC = True

    def __init__(
        self,
        closure: Callable[..., Any],
        params: Iterable[Tensor] | Parameters,
        *,
        batches: Iterable[Any] | None = None,
        weights: Sequence[float] | None = None,
        mode: str = "auto",
        keep_graphs: bool = True,
        process_group: Any = "auto",
    ) -> None:
        op = self._name
        if not callable(closure):
            raise TypeError(f"{op}: closure: expected a function, got {_checks.describe(closure)}")
        if isinstance(params, Parameters):  # of an evaluated point, which has checked them
            self.params = params
        else:
            with torch.inference_mode(False), torch.enable_grad():
                self.params = Parameters(op, params)
        shapes = [p.shape for p in self.params.tensors]
        size = self.params.n if self._SYMMETRIC else None
        super().__init__(size, self.params.dtype, self.params.device, shapes)
        modes = ("auto", "r-operator", *self._MODES)
        if mode not in modes:
            raise _checks.fail(op, "mode", " or ".join(map(repr, modes)), repr(mode))
        self._check_batches(batches, weights)
        self.closure, self.batches, self.weights = closure, batches, weights
        self.keep_graphs, self.process_group = keep_graphs, process_group
        self._requested, self._chosen = mode, None if mode in ("auto", "r-operator") else mode
        self._used = mode
        self._given: Evaluator | None = None
        #: Of the modes that were compared: seconds per product, or why it cannot be used.
        self.timings: dict[str, float | str] = {}
        self._columns = Columns(op)
        self._kept: list[BatchMatrix] | None = None
        self._state: tuple[tuple[int, int], ...] = ()
        self._warned = False
        self._slots: _graph.Slots = {}
        self._used_slots: set[int] = set()
        self._in_parts = self._is_visible = self._is_checked = False
        self._is_surveyed = self._is_unlayered = False  # a graph was looked at; it had no layers that are recognised
        self._is_light = False  # at this point what was found out at others is taken for granted
        self._gradients: Callable[[Tensor], Sequence[Tensor | None] | None] | None = None
        self._eps = torch.finfo(self.dtype).eps  # of the coarsest precision that the closure computes in
        self._start()

    def _start(self) -> None:
        """Begin a new point.

        Raises:
            RuntimeError: the operator is that of an evaluated point, which is another.
        """
        if self._given is not None and self._state not in ((), self.params.state()):
            raise RuntimeError(
                f"{self._name}: params: expected the values at the evaluated point of this operator, got others: they "
                "were written since; evaluate the closure again"
            )
        self._kept = None
        if self._given is not None:
            return
        self._randomness = Randomness(self.device)
        self._first_values: dict[Any, Tensor] = {}

    def _check_batches(self, batches: Iterable[Any] | None, weights: Sequence[float] | None) -> None:
        op = self._name
        if batches is None:
            if weights is not None:
                raise _checks.fail(op, "weights", "None without batches", repr(weights))
            return
        if not isinstance(batches, Iterable) or isinstance(batches, Tensor):
            raise TypeError(f"{op}: batches: expected an iterable of batches, got {_checks.describe(batches)}")
        if isinstance(batches, Iterator):
            raise TypeError(f"{op}: batches: expected something that can be iterated again (a list, a DataLoader)")
        if weights is not None and not all(
            isinstance(w, (int, float)) and not isinstance(w, bool) and abs(w) <= sys.float_info.max for w in weights
        ):
            raise _checks.fail(op, "weights", "finite numbers", f"[{', '.join(map(_estimators.brief, weights))}]")

    @property
    def mode(self) -> str:
        """Tell how products are computed: as asked for, or as chosen at the first product."""
        return self._used

    @property
    def columns(self) -> str | None:
        """Tell how several vectors are multiplied, once they were: "together", or why one after the other."""
        return self._columns.said

    @property
    def chosen_mode(self) -> str | None:
        """Get or set the mode that `mode="auto"` has settled on, None before the first product.

        Modes are compared by timing, so that another run may choose another one, which differs in rounding. Give an
        operator of a resumed run what the first one chose, and it makes the same products bit for bit and times
        nothing. "r-operator" is not a choice but read from the graph; given that, the next product looks again, and
        given None, it chooses again.

        Raises:
            ValueError: what is assigned is no mode of this operator, or not the one that it was made with.

        Example:
            >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
            >>> H = secant.curvature.Hessian(lambda: (w**4).sum() / 12, [w])        # diag(1, 4, 9)
            >>> product = H @ torch.ones(3)             # compares the modes
            >>> again = secant.curvature.Hessian(lambda: (w**4).sum() / 12, [w])
            >>> again.chosen_mode = H.chosen_mode       # compares nothing
            >>> bool((again @ torch.ones(3) == product).all())
            True
        """
        if self._chosen is None and self._used == "r-operator":
            return self._used
        return self._chosen

    @chosen_mode.setter
    def chosen_mode(self, mode: str | None) -> None:
        asked = self._requested
        modes = ("r-operator", *self._MODES) if asked == "auto" else (asked,)
        if mode is not None and mode not in modes:
            raise _checks.fail(self._name, "chosen_mode", " or ".join(map(repr, (*modes, None))), repr(mode))
        if asked == "auto":
            self._chosen = None if mode == "r-operator" else mode
            self._used = mode or "auto"
            self._start()

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join tensors in the shapes of the parameters to one flat vector (n,)."""
        out = torch.empty(self.params.n, dtype=self.dtype, device=self.device)
        self.params.join(tensors, out)
        return out

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Split a flat vector (n,) into views in the shapes of the parameters."""
        return self.params.split(vector)

    def refresh(self) -> None:
        """Forget the graph of the last point, so that the next product evaluates the closure again.

        Needed only after a change that cannot be seen: of the data, of buffers, of the random numbers to be used, or of
        a parameter through `.data`.
        """
        self._start()

    # Points -----------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _batch_matrix(self, evaluator: Evaluator) -> BatchMatrix:
        """Build the matrix of one batch at the current parameters."""

    @classmethod
    def _at(
        cls,
        evaluator: Evaluator,
        params: Parameters,
        state: tuple[Any, ...],
        learnt: Mapping[str, Any],
        *,
        light: bool,
        **options: Any,
    ) -> Self:
        """Make the operator of a point that has been evaluated.

        Args:
            evaluator: gives what was found there, and evaluates again with other parameters. state: of them there.
            learnt: what another operator of the same problem has found out. light: whether that is taken for granted.
        """
        operator = cls(evaluator, params, **options)
        operator._learn(learnt)
        operator._given, operator._state = evaluator, state
        operator._is_light = light and operator._is_surveyed and not operator._in_parts and not params.computed
        operator._randomness = evaluator.randomness
        return operator

    #: What is found out once per operator, and holds at other points of the same problem.
    _LEARNT: tuple[str, ...] = (
        "timings", "_columns", "_chosen", "_used", "_used_slots", "_in_parts", "_is_visible", "_is_checked", "_eps",
        "_warned", "_is_surveyed", "_is_unlayered",
    )  # fmt: skip

    def _learnt(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._LEARNT}

    def _learn(self, learnt: Mapping[str, Any]) -> None:
        """Take over what another operator of the same problem has found out."""
        for name, value in learnt.items():
            setattr(self, name, copy.copy(value))

    def _evaluators(self) -> Iterator[Evaluator]:
        if self._given is not None:
            yield self._given
        elif self.batches is None:
            yield self._evaluator(0, self.closure)
        else:
            yield from self._evaluators_of(self.batches)

    def _evaluators_of(self, batches: Iterable[Any]) -> Iterator[Evaluator]:
        iterator: Iterator[Any] | None = None
        for key in itertools.count():
            with self._randomness.section(("batch", key)) as meet, Meeting(meet):  # a loader that shuffles repeats it
                iterator = iter(batches) if iterator is None else iterator
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield self._evaluator(key, functools.partial(self.closure, batch))

    def _evaluator(self, key: int, closure: Callable[[], Any]) -> Evaluator:
        tensors = self.params.tensors
        return Evaluator(closure, key, self._randomness, tensors, self._warn, in_parts=self._in_parts)

    def _evaluated(self, evaluator: Evaluator, read: Callable[[Any], Tensor]) -> tuple[Any, Tensor]:
        """Evaluate the closure, and read of what it returns what is differentiated.

        Args:
            read: the latter from the former.

        Raises:
            ValueError: a parameter has no part in it, where that can only be a mistake.
        """
        self._slots = self.params.locate()
        result = evaluator()
        root = read(result)
        if self._is_light and self._used in ("auto", "r-operator", "double-backward"):  # others evaluate again
            return result, root
        found = _graph.survey([_graph.edge_of(root)], self._slots)
        if found.unreliable and not evaluator.in_parts:
            self._in_parts = evaluator.in_parts = True
            result = evaluator()
            root = read(result)
            found = _graph.survey([_graph.edge_of(root)], self._slots)
        if any(self._slots.get(edge) != i for edge, i in self.params.locate().items()):
            raise _checks.fail(self._name, "closure", "parameters left as they are", "one changed in place")
        self._note(found)
        self._is_surveyed = True
        self._repeated((evaluator.key, "root"), root)
        return result, root

    def _note(self, found: _graph.Survey) -> None:
        """Remember which parameters were used; one with a graph of its own always has to be."""
        used = found.used
        self._used_slots |= used
        self._eps = max(self._eps, found.eps)
        self._columns.note(found)
        for i, p in enumerate(self.params.tensors):
            if not p.is_leaf and i not in used:
                got = f"one made before ({_graph.name_of(p.grad_fn)}) that it does not: was it computed again within?"
                raise _checks.fail(self._name, f"params[{i}]", "a tensor that the closure uses", got)

    def _visible(self, evaluator: Evaluator, read: Callable[[Any], Tensor]) -> None:
        """Check once that every use of a parameter is one that can be replaced: that forward modes miss none.

        Raises:
            RuntimeError: a use is hidden from torch's function overrides, as in a torch.autograd.Function.
        """
        if self._is_visible:
            return
        slots = self.params.locate()
        twins = [p.detach().requires_grad_() for p in self.params.tensors]
        root = read(evaluator({id(p): twin for p, twin in zip(self.params.tensors, twins, strict=True)}))
        edge = _graph.edge_of(root)
        for i in sorted(_graph.survey([edge], slots).used):
            functions = ", ".join(_graph.custom_functions([edge[0]]))
            raise RuntimeError(
                f"closure: a use of params[{i}] is hidden from torch's function overrides: computed before the closure "
                f"ran{', or by ' + functions if functions else ', or returned as it is'}"
            )
        self._note(_graph.survey([edge], {_graph.edge_of(twin): i for i, twin in enumerate(twins)}))
        self._is_visible = True

    def _repeated(self, key: Any, value: Tensor) -> None:
        """Compare what the closure gives with what it gave first at this point and batch.

        Raises:
            RuntimeError: something else, beyond rounding. Where looking means waiting (on a GPU) only the second
                evaluation is compared.
        """
        now = value.detach()
        now = torch.stack((now.double().sum(), torch.linalg.vector_norm(now.double()))) if now.numel() > 1 else now
        now = now.double().reshape(-1)
        before = self._first_values.get(key)
        if before is None:
            self._first_values[key] = now
        elif self.device.type == "cpu" or (key, "compared") not in self._first_values:
            self._first_values[(key, "compared")] = now
            distance = torch.linalg.vector_norm(now - before)
            if bool(distance > max(self._eps, torch.finfo(value.dtype).eps) ** 0.5 * torch.linalg.vector_norm(before)):
                raise RuntimeError(
                    f"{self._name}: closure: expected the same value whenever it is evaluated at one point, got "
                    f"{float(now[0])!r} after {float(before[0])!r}: batches in another order, or random numbers that "
                    "are not torch's, Python's or numpy's global ones (a numpy.random.Generator)? Draw them outside, "
                    "or keep the graphs"
                )

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            _evaluate.warn_of_attention(self._name)

    def _iterate(self) -> Iterator[BatchMatrix]:
        """Yield the matrices of all batches: those that are kept, or new ones."""
        state = self.params.state()
        if state != self._state:
            self._start()
            self._state = state
        if self._kept is not None:
            yield from self._kept
            return
        kept, count = [], 0
        for evaluator in self._evaluators():
            matrix = self._batch_matrix(evaluator)
            if self.keep_graphs:
                kept.append(matrix)
            count += 1
            yield matrix
        if count and not self._used_slots:
            raise _checks.fail(self._name, "params", "tensors that the closure uses", "none that it does")
        if self.keep_graphs:
            self._kept = kept
        self._state = self.params.state()

    def _rows(self, vectors: Tensor) -> Tensor:
        self._check_surroundings()
        with _evaluate.plain(self.device), torch.no_grad(), self._kept_gradients():
            if vectors.is_inference():
                vectors = vectors.clone()
            return self._sum(functools.partial(self._write, vectors), vectors)

    def _solver_product(self) -> Callable[[Tensor], Tensor]:
        """Return v -> A v, (n,) to (m,), for a solver that makes many products here and gives what fits.

        What `matvec` checks at each is checked once: the argument, that the parameters are where they were, that no
        transform is around, nor autocast or inference mode. They are made within `torch.no_grad()`, by the caller.
        """
        self._check_surroundings()
        dist = torch.distributed
        alone = self.process_group is None or not dist.is_available() or not dist.is_initialized()
        if self.batches is not None or self.params.computed or not alone or not self._SYMMETRIC:
            return self.matvec
        around = _evaluate.plain(self.device)
        is_plain = around is _evaluate.NOTHING
        with around, torch.no_grad():
            (matrix,) = self._iterate()

        def product(v: Tensor) -> Tensor:
            out = torch.empty_like(v)
            try:
                matrix.product(v, out)
            except RuntimeError as error:
                raise RuntimeError(_errors.reason(self._name, self._used, error, ())) from error
            return out

        return product if is_plain else _evaluate.within_plain(self.device, product)

    def _sum(self, write: Callable[[BatchMatrix, Tensor], None], like: Tensor) -> Tensor:
        """Over batches and processes.

        Args:
            write: puts the part of a batch into a tensor like `like`.
        """
        total = torch.empty_like(like)
        if self.batches is None:
            for matrix in self._iterate():
                write(matrix, total)
        else:
            self._accumulate(write, total)
        return self._reduced(total)

    def _check_surroundings(self) -> None:
        if _evaluate.is_transformed():
            raise RuntimeError(
                f"{self._name}: expected a product outside of torch.func transforms and forward mode, got one within: "
                "it has no derivative, and takes several vectors as columns (matmat)"
            )

    def _kept_gradients(self) -> contextlib.AbstractContextManager[None]:
        """Leave `.grad` of the parameters alone; autograd writes it where retain_grad was called."""
        return self._putting_back() if self.params.computed else contextlib.nullcontext()

    @contextlib.contextmanager
    def _putting_back(self) -> Iterator[None]:
        retained = [(p, p.grad) for p in self.params.computed if p.retains_grad]
        try:
            yield
        finally:
            for p, gradient in retained:
                p.grad = gradient

    def _write(self, vectors: Tensor, matrix: BatchMatrix, out: Tensor) -> None:
        self._multiply(Product("A v", matrix.together, matrix.product, matrix.products), vectors, out)

    def _multiply(self, product: Product, vectors: Tensor, out: Tensor) -> None:
        """Write the products of all rows."""
        try:
            self._columns.multiply(product, vectors, out, self._used, self._eps)
        except RuntimeError as error:
            raise RuntimeError(_errors.reason(self._name, self._used, error, ())) from error

    def _accumulate(self, write: Callable[[BatchMatrix, Tensor], None], total: Tensor) -> None:
        """Write the weighted sum over the batches."""
        part, count = torch.empty_like(total), 0
        total.zero_()
        for matrix in self._iterate():
            write(matrix, part)
            total.add_(part, alpha=1.0 if self.weights is None else self._weight(count))
            count += 1
        if count == 0:
            raise _checks.fail(self._name, "batches", "at least one", "none")
        if self.weights is None:
            total /= count
        elif count != len(self.weights):
            raise _checks.fail(self._name, "weights", f"one per batch ({count})", len(self.weights))

    def _weight(self, i: int) -> float:
        assert self.weights is not None
        if i >= len(self.weights):
            raise _checks.fail(self._name, "weights", "one per batch", f"{len(self.weights)} for more batches")
        return float(self.weights[i])

    def _reduced(self, total: Tensor) -> Tensor:
        return mean_over_processes(total, self.process_group)

    # Modes ------------------------------------------------------------------------------------------------------------

    def _choose(
        self,
        candidates: dict[str, Callable[[], BatchMatrix]],
        evaluator: Evaluator,
        nodes: Sequence[Any],
        size: Tensor,
    ) -> BatchMatrix:
        """Return the matrix by the fastest mode, and use that mode from now on.

        Each makes a few products with one random vector; one that fails, that is not symmetric, or that disagrees with
        the first that works, is left out, and `timings` says why. Such cases are a closure that hides a use of the
        parameters from torch's function overrides, and wrong formulas. At an evaluated point, as an optimizer makes
        many, the modes that evaluate the closure at every product are left out, too, where an evaluation alone takes
        longer than a product on the kept graph.

        Args:
            evaluator: of the closure. size: see `_asymmetry`.
        """
        op, (u, v) = self._name, self._random_pair()
        reference: Tensor | None = None
        best: tuple[float, str, BatchMatrix] | None = None
        finite, outrun = True, False
        for mode, make in candidates.items():
            out = torch.empty_like(v)
            try:
                outrun = best is not None and (outrun or self._is_outrun(evaluator, best[0]))
                if outrun:
                    self.timings[mode] = f"{op}: mode '{mode}': an evaluation of the closure alone takes longer"
                    continue
                matrix = make()
                seconds = self._timed(matrix, v, out)  # warms up
                outrun = reference is None and len(candidates) > 1 and self._is_outrun(evaluator, seconds)
                if not outrun:
                    seconds = min(seconds, *(self._timed(matrix, v, out) for _ in range(_TRIALS - 1)))
                if reference is not None and finite and not agree(out, reference, self._eps):
                    self.timings[mode] = f"{op}: mode '{mode}': disagrees with the others"
                    continue
                asymmetry = self._asymmetry(matrix, u, v, out, size)
            except RuntimeError as error:
                self.timings[mode] = _errors.reason(op, mode, error, nodes)
                continue
            if asymmetry is not None:
                self.timings[mode] = _errors.asymmetric(op, mode, asymmetry, nodes)
                continue
            if reference is None:
                reference, finite = out, bool(torch.isfinite(out).all())
            self.timings[mode] = seconds
            if best is None or seconds < best[0]:
                best = seconds, mode, matrix
        if best is None:
            raise RuntimeError("; ".join(str(why) for why in self.timings.values()))
        self._used, self._is_checked = best[1], True
        if finite:  # else nothing was compared: at the next point again
            self._chosen = best[1]
        return best[2]

    def _checked(self, matrix: BatchMatrix, mode: str, nodes: Sequence[Any], size: Tensor) -> BatchMatrix:
        """Check the matrix by a mode that no other is compared with: once per operator, u.H v against v.H u.

        Raises:
            RuntimeError: they differ; the message names what can be the cause.
        """
        if not self._is_checked:
            self._is_checked = True
            u, v = self._random_pair()
            out = torch.empty_like(v)
            matrix.product(v, out)
            asymmetry = self._asymmetry(matrix, u, v, out, size)
            if asymmetry is not None:
                raise RuntimeError(_errors.asymmetric(self._name, mode, asymmetry, nodes))
        return matrix

    def _random_pair(self) -> tuple[Tensor, Tensor]:
        generator, n = self.generator(0), self.params.n
        v, u = (torch.randn(n, dtype=self.dtype, device=self.device, generator=generator) for _ in range(2))
        return u, v

    def _asymmetry(self, matrix: BatchMatrix, u: Tensor, v: Tensor, product: Tensor, size: Tensor) -> float | None:
        """|u.H v - v.H u| / max(|H u|, |H v|) when it is more than half the digits, else None.

        For independent normal u and v, u.H v is about |H v|. What rounding leaves of a matrix that is zero, or small
        beside its terms, is not symmetric: so a part of the loss is allowed too, as if every parameter were doubled.

        Args:
            product: H v. size: of the loss, a scalar.
        """
        other = torch.empty_like(product)
        matrix.product(u, other)
        u, v, product, other = (x.double() for x in (u, v, product, other))
        eps = self._eps
        norms = torch.stack([torch.linalg.vector_norm(x.double()) for x in self.params.tensors])
        weights = torch.linalg.vector_norm(norms)
        scale = torch.where(weights > 0, weights, 1.0).square()
        slack = 1e3 * eps * size.double().abs() * torch.linalg.vector_norm(u) * torch.linalg.vector_norm(v) / scale
        largest = torch.maximum(torch.linalg.vector_norm(product), torch.linalg.vector_norm(other))
        difference = (torch.dot(u, product) - torch.dot(v, other)).abs()
        if bool(difference > eps**0.5 * largest + slack):
            return float(difference / largest)
        return None

    def _is_outrun(self, evaluator: Evaluator, seconds: float) -> bool:
        """Tell whether to evaluate the closure of a point with other parameters takes longer than this, twice."""
        if self._given is None:
            return False
        twins = {id(p): p.detach().requires_grad_() for p in self.params.tensors}
        try:
            return all(self._seconds(functools.partial(evaluator, twins)) > seconds for _ in range(2))
        except RuntimeError:  # the modes that do so will say why
            return False

    def _timed(self, matrix: BatchMatrix, v: Tensor, out: Tensor) -> float:
        return self._seconds(functools.partial(matrix.product, v, out))

    def _seconds(self, call: Callable[[], object]) -> float:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def mean_over_processes(total: Tensor, group: Any) -> Tensor:
    """Average in place over the processes of a group: "auto" for the default one where there is one, None for none."""
    dist = torch.distributed
    if group is None or not dist.is_available() or not dist.is_initialized():
        return total
    group = None if group == "auto" else group
    size = dist.get_world_size(group)
    if size > 1:
        dist.all_reduce(total, group=group)
        total /= size
    return total
