"""The Jacobian of residuals or outputs as a rectangular linear operator."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secant import _checks
from secant.curvature import _errors, _evaluate, _graph, _losses, _matrices, _row_sources, _rows
from secant.curvature._columns import Product
from secant.curvature._estimators import Diagonal
from secant.curvature._evaluate import Evaluator, Remembered
from secant.curvature._operator import LinearOperator, Seed
from secant.curvature._parameters import Parameters
from secant.curvature._rows import Source, Write
from secant.curvature.ggn import _JacobianOperator
from secant.curvature.hessian import trainable


class Jacobian(_JacobianOperator):
    r"""J = d residuals / d params at the current parameters, as an operator of shape (m, n).

        J v = d/dt residuals(params + t v)  at t = 0,        J^T u = grad (u . residuals)(params)

    A row is one number of what the closure returns, flattened; of several tensors, one after the other. A column is one
    number of the parameters, in their order. `J @ v`, `J @ V`, `J.T @ u`, `u @ J`, `J.rmatmat(U)`, `J.to_dense()` and
    the algebra of `LinearOperator`: `J.T @ J` is the Gauss-Newton matrix of half the squared sum, and known to be
    symmetric, so that `(J.T @ J).damped(1e-3).inverse()` solves the equations of Levenberg and Marquardt. `shape` is
    known once the closure was evaluated, and evaluates it where it was not.

    The modes are those of `GGN`, chosen as there by the time that J v and J^T u take together: Linear + activation
    layers are recognised ("r-operator"), less a constant too, as residuals are; elsewhere J v is the derivative of
    J^T u by u on the kept graph ("double-backward") or forward mode through the closure ("forward"). J^T u is always
    one backward pass on the kept graph.

    **Rows.** `J.rows()`, `J.row_blocks()`, `J.gram()` = J^T J, `J.outer()` = J J^T and `J.gram_and_gradient(r)` have
    the rows of all residuals by one backward pass of their sum, where residual i depends on row i of every value alone:

        J_i = sum over the uses u of a parameter of (row i of the gradient at u) times (row i of the other argument)

    whatever the closure does with its inputs, `torch.autograd.grad(..., create_graph=True)` included. K numbers per
    sample take K passes. A product of J^T with a random vector decides whether rows are independent; `rows_by` says how
    rows were found, and why not so where they depend on each other (a batch norm in training, x - x.mean()) or a
    parameter is used in a way that is not known: then they come from `row`, or by as many backward passes as there are
    rows.

    A list of tensors in the shapes of the parameters is a vector too (`J @ params`); the product is flat. A parameter
    that the closure does not use has zero columns. NaN and infinities stay in the rows that they belong to.

    Args:
        closure: () -> residuals, or (batch) -> with `batches`: a real tensor of any shape with its graph, or a list or
            tuple of them, of which one at least has one.
        params, keep_graphs: as for `Hessian`; params may be a dict by names.
        batches: as for `Hessian`; the rows of one batch follow those of another.
        mode: "auto", "r-operator", "double-backward" or "forward".
        row: (params, *sample) -> the residuals of one sample, a number or (K,), as `torch.func.vmap` takes it: params
            is a dict of tensors where `params` is one, as for `torch.func.functional_call`, and else a list; the
            samples' rows follow each other in the order of the closure's. Used where rows are not read from the graph.
        samples: of `row`: a tensor, or a tuple of them, whose first dimension is that of the samples, or a function ()
            -> such, asked at each point.

    Rows are those of this process: nothing is reduced over processes.

    Raises:
        TypeError, ValueError: an argument is invalid. At a product: the closure returns something else.
        RuntimeError: at a product: an operation cannot be differentiated; the message names it.

    References:
        Nocedal and Wright, Numerical Optimization, 2nd ed., section 10.3 (Gauss-Newton, Levenberg-Marquardt).
        Goodfellow, Efficient per-example gradient computations, arXiv 1510.01799 (2015). Freivalds, Fast probabilistic
        algorithms, MFCS (1979): a matrix is another where a random vector tells no difference.

    Example:
        >>> t, y = torch.linspace(0, 1, 5), torch.tensor([1.0, 0.8, 0.6, 0.5, 0.4])
        >>> a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
        >>> J = secant.curvature.Jacobian(lambda: a * torch.exp(b * t) - y, [a, b])
        >>> J.shape
        torch.Size([5, 2])
        >>> (J @ torch.tensor([1.0, 0.0]) - torch.exp(-t)).abs().max() < 1e-6
        tensor(True)
    """

    _SYMMETRIC = False

    def __init__(
        self,
        closure: Callable[..., Any],
        params: Iterable[Tensor] | Mapping[str, Tensor] | Parameters,
        *,
        batches: Iterable[Any] | None = None,
        mode: str = "auto",
        keep_graphs: bool = True,
        row: Callable[..., Any] | None = None,
        samples: Any = None,
    ) -> None:
        self._m: int | None = None
        self._facts = _row_sources.Facts()
        self._sources: list[Source] | None = None
        self._remembered: list[Evaluator] | None = None
        names = None
        if isinstance(params, Mapping):
            names, params = list(params), list(params.values())
        super().__init__(closure, params, batches=batches, mode=mode, keep_graphs=keep_graphs, process_group=None)
        self._row = None
        if row is not None or samples is not None:
            if batches is not None:
                raise _checks.fail(self._name, "row", "None with batches", "a function")
            self._row = _row_sources.RowFunction(self._name, row, samples, self.params, names)

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, **options: Any) -> Jacobian:
        """Return the Jacobian of model(inputs) with respect to the parameters that require gradients.

        Args:
            options: those of the class.

        Raises:
            TypeError, ValueError: an argument is invalid.
        """
        return cls(lambda: model(inputs), trainable(cls.__name__, model), **options)

    @property
    def shape(self) -> torch.Size:
        """Return (m, n); evaluates the closure where that was not done at this point."""
        if self._m is None or (self.keep_graphs and (self._kept is None or self.params.state() != self._state)):
            self._check_surroundings()
            with _evaluate.plain(self.device), torch.no_grad(), self._kept_gradients():
                self._counted(list(map(_length, self._iterate())))
        assert self._m is not None
        return torch.Size((self._m, self.params.n))

    def _counted(self, lengths: list[int]) -> None:
        """Remember how many rows there are."""
        if not lengths:
            raise _checks.fail(self._name, "batches", "at least one", "none")
        self._m = sum(lengths)

    def _outputs(self, result: Any) -> Tensor:
        return joined(self._name, result, self.dtype)

    def _middle(self, outputs: Tensor, result: Any) -> _losses.Middle:
        return _losses.IdentityMiddle()

    def _size(self, result: Any) -> Tensor:
        return self._outputs(result).detach().square().sum()

    def _rows(self, vectors: Tensor) -> Tensor:
        self._check_surroundings()
        with _evaluate.plain(self.device), torch.no_grad(), self._kept_gradients():
            if vectors.is_inference():
                vectors = vectors.clone()
            parts = []
            for matrix in self._iterate():
                jacobian = _jacobian(matrix)
                out = torch.empty(len(vectors), _length(matrix), dtype=self.dtype, device=self.device)
                one, several = functools.partial(_push, jacobian), functools.partial(_push_columns, jacobian)
                self._multiply(Product("J v", jacobian.together, one, several), vectors, out)
                parts.append(out)
            self._counted([part.shape[1] for part in parts])
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _transposed_rows(self, vectors: Tensor) -> Tensor:
        self._check_surroundings()
        with _evaluate.plain(self.device), torch.no_grad(), self._kept_gradients():
            if vectors.is_inference():
                vectors = vectors.clone()
            total: Tensor | None = None
            lengths: list[int] = []
            for matrix in self._iterate():
                jacobian, first, length = _jacobian(matrix), sum(lengths), _length(matrix)
                lengths.append(length)
                some = vectors[:, first : first + length]
                if some.shape[1] != length:
                    break
                out = torch.empty(len(vectors), self.params.n, dtype=self.dtype, device=self.device)
                one, several = functools.partial(_pull, matrix), functools.partial(_pull_columns, matrix)
                self._multiply(Product("J^T u", jacobian.together, one, several), some, out)
                total = out if total is None else total.add_(out)
            self._counted(lengths)
            if self._m != vectors.shape[1] or total is None:
                expected = f"{vectors.shape[1]} residuals, as before"
                raise _checks.fail(self._name, "closure", expected, f"{self._m} or more")
            return total

    # Rows -------------------------------------------------------------------------------------------------------------

    _LEARNT = (*_JacobianOperator._LEARNT, "_facts")

    def _start(self) -> None:
        super()._start()
        self._sources = self._remembered = None

    def _evaluators(self) -> Iterator[Evaluator]:
        """Yield those of the batches, which evaluate once for products and for rows."""
        if self._given is not None or not self.keep_graphs:
            yield from super()._evaluators()
        elif self._remembered is not None:
            yield from self._remembered
        else:
            found: list[Evaluator] = []
            for evaluator in super()._evaluators():
                found.append(Remembered(evaluator))
                yield found[-1]
            self._remembered = found

    @property
    def rows_by(self) -> str | None:
        """Tell how rows were found, once they were: "one backward pass", "row: " or "backward passes: " and why."""
        return self._facts.said

    def rows(self, *, out: Tensor | None = None) -> Tensor:
        """Return J as a dense tensor.

        Args:
            out: (m, n), written and returned: memory that a caller uses again.

        Returns:
            (m, n), without a graph.

        Raises:
            TypeError, ValueError, RuntimeError: as for a product; `out` does not fit.

        Example:
            >>> x = torch.linspace(0, 1, 4).requires_grad_()
            >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
            >>> def residuals():                            # u' + u = 0
            ...     u = net(x[:, None])[:, 0]
            ...     return torch.autograd.grad(u.sum(), x, create_graph=True)[0] + u
            >>> J = secant.curvature.Jacobian(residuals, net.parameters())
            >>> J.rows().shape, J.rows_by
            (torch.Size([4, 25]), 'one backward pass')
        """
        op = f"{self._name}.rows"
        with self._reading_rows():
            sources = self._row_sources()
            m = self._m
            assert m is not None
            if out is None:
                out = torch.empty(m, self.params.n, dtype=self.dtype, device=self.device)
            else:
                _checks.shaped(op, "out", out, (m, self.params.n), self.dtype, self.device)
            first = 0
            for source in sources:
                _fill(source, out[first : first + source.m])
                first += source.m
            return out

    def to_dense(self) -> Tensor:
        """Return J (m, n): its rows where they are found by one backward pass, else by n or m products."""
        return self.rows()

    def row_blocks(self, max_bytes: int = _row_sources.MAX_BYTES) -> Iterator[tuple[slice, Tensor]]:
        """Yield J in blocks of rows: where they are, and the block, which only the next one overwrites.

        Args:
            max_bytes: that a block may take; one row at least is made.

        Raises:
            TypeError, ValueError, RuntimeError: as for a product.
        """
        _checks.integer(f"{self._name}.row_blocks", "max_bytes", max_bytes, 1)
        with self._reading_rows():
            sources = self._row_sources()
        chunks = self._chunks(sources, max_bytes, own=True)
        while True:
            with self._reading_rows():
                found = next(chunks, None)
            if found is None:
                return
            yield found

    def gram(self, *, out: Tensor | None = None, max_bytes: int = _row_sources.MAX_BYTES) -> Tensor:
        """Return J^T J as a dense tensor.

        Args:
            out: (n, n), written and returned. max_bytes: that J may take; where it would take more, it is made and
                multiplied in blocks of rows.

        Returns:
            (n, n), without a graph.

        Raises:
            TypeError, ValueError, RuntimeError: as for a product; an argument does not fit.

        Example:
            >>> t, w = torch.arange(4.0), torch.zeros(2, requires_grad=True)
            >>> secant.curvature.Jacobian(lambda: w[0] + w[1] * t, [w]).gram().tolist()
            [[4.0, 6.0], [6.0, 14.0]]
        """
        return self._gram(f"{self._name}.gram", None, out, max_bytes)[0]

    def gram_and_gradient(
        self, residuals: Tensor, *, out: Tensor | None = None, max_bytes: int = _row_sources.MAX_BYTES
    ) -> tuple[Tensor, Tensor]:
        """Return J^T J and J^T r, from the same rows.

        Args:
            residuals: r (m,). out, max_bytes: as for `gram`.

        Returns:
            (n, n) and (n,), without a graph.

        Raises:
            TypeError, ValueError, RuntimeError: as for a product; an argument does not fit.
        """
        found, gradient = self._gram(f"{self._name}.gram_and_gradient", residuals, out, max_bytes)
        assert gradient is not None
        return found, gradient

    def _gram(
        self, op: str, residuals: Tensor | None, out: Tensor | None, max_bytes: int
    ) -> tuple[Tensor, Tensor | None]:
        _checks.integer(op, "max_bytes", max_bytes, 1)
        n, gradient = self.params.n, None
        out = self._square_out(op, out, n)
        with self._reading_rows():
            sources = self._row_sources()
            if residuals is not None:
                _checks.shaped(op, "residuals", residuals, (self._m or 0,), self.dtype, self.device)
                gradient, residuals = out.new_zeros(n), residuals.detach()
            begun = False
            for rows, block in self._chunks(sources, max_bytes):
                _rows.symmetric_product(block, out, accumulate=begun)
                begun = True
                if gradient is not None and residuals is not None:
                    gradient.addmv_(block.T, residuals[rows])
            if not begun:
                out.zero_()
        return out, gradient

    def outer(self, *, out: Tensor | None = None, max_bytes: int = _row_sources.MAX_BYTES) -> Tensor:
        """Return J J^T as a dense tensor.

        Args:
            out: (m, m), written and returned. max_bytes: that J may take; where it would take more, pairs of blocks of
                rows are made and multiplied.

        Returns:
            (m, m), without a graph.

        Raises:
            TypeError, ValueError, RuntimeError: as for a product; an argument does not fit.

        Example:
            >>> t, w = torch.arange(3.0), torch.zeros(2, requires_grad=True)
            >>> secant.curvature.Jacobian(lambda: w[0] + w[1] * t, [w]).outer().tolist()
            [[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 3.0, 5.0]]
        """
        op = f"{self._name}.outer"
        _checks.integer(op, "max_bytes", max_bytes, 1)
        with self._reading_rows():
            sources = self._row_sources()
            m, n = self._m or 0, self.params.n
            out = self._square_out(op, out, m)
            size = n * self.dtype.itemsize
            if m * size <= max_bytes:
                whole = self._facts.room(m, n, self.dtype, self.device)
                first = 0
                for source in sources:
                    _fill(source, whole[first : first + source.m])
                    first += source.m
                _rows.symmetric_product(whole.T, out, accumulate=False)
                return out
            out.zero_()  # rows that no block holds
            most, first = max(1, max_bytes // (2 * size), *(source.least for source in sources)), 0
            blocks: list[tuple[slice, Write]] = []
            for source in sources:
                blocks += [(_moved(rows, first), write) for rows, write in source.blocks(most)]
                first += source.m
            room = self._facts.room(2 * most, n, self.dtype, self.device)
            for i, (rows, write) in enumerate(blocks):
                block = _written(write, room[:most], rows)
                out[rows, rows] = _own_products(block)
                for others, write_others in blocks[:i]:
                    product = block @ _written(write_others, room[most:], others).T
                    out[rows, others], out[others, rows] = product, product.T
            return out

    def _square_out(self, op: str, out: Tensor | None, size: int) -> Tensor:
        if out is None:
            return torch.empty(size, size, dtype=self.dtype, device=self.device)
        return _checks.shaped(op, "out", out, (size, size), self.dtype, self.device)

    @contextlib.contextmanager
    def _reading_rows(self) -> Iterator[None]:
        self._check_surroundings()
        explained = _errors.explained(self._name, "rows")
        with _evaluate.plain(self.device), torch.no_grad(), self._kept_gradients(), explained:
            yield

    def _row_sources(self) -> list[Source]:
        """Return the rows of all batches: those that are kept, or new ones."""
        state = self.params.state()
        if state != self._state:
            self._start()
            self._state = state
        if self._sources is not None:
            return self._sources
        sources, first = list[Source](), 0
        self._facts.said = None
        for evaluator in self._evaluators():
            result, outputs = self._evaluated(evaluator, self._rooted)
            parts = list(result) if isinstance(result, (tuple, list)) else [result]
            with _errors.explained(self._name, "rows", [_graph.edge_of(outputs)[0]]):
                sources.append(self._facts.source(parts, self._slots, self, self._row, first))
            first += sources[-1].m
        if sources and not self._used_slots:
            raise _checks.fail(self._name, "params", "tensors that the closure uses", "none that it does")
        self._counted([source.m for source in sources])
        if self.keep_graphs:
            self._sources = sources
        self._state = self.params.state()
        return sources

    def _chunks(self, sources: list[Source], max_bytes: int, *, own: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of rows, each overwritten by the next: all of a batch where they fit.

        Args:
            own: whether they are in memory of their own, rather than in that which other methods overwrite.
        """
        n, first = self.params.n, 0
        most = max(1, max_bytes // max(1, n * self.dtype.itemsize), *(source.least for source in sources))
        rows = min(most, max((source.m for source in sources), default=0))
        if own:
            room = torch.empty(rows, n, dtype=self.dtype, device=self.device)
        else:
            room = self._facts.room(rows, n, self.dtype, self.device)
        for source in sources:
            if source.m <= most:
                block = room[: source.m]
                _fill(source, block)
                yield slice(first, first + source.m), block
            else:
                for places, write in source.blocks(most):
                    yield _moved(places, first), _written(write, room, places)
            first += source.m

    def diag(self, num_probes: int | None = None, *, distribution: str = "rademacher", seed: Seed = 0) -> Diagonal:
        """Return the diagonal of a square J; see `LinearOperator.diag`."""
        return LinearOperator.diag(self, num_probes, distribution=distribution, seed=seed)

    def _exact_diagonal(self) -> Tensor:
        return LinearOperator._exact_diagonal(self)


def per_sample_gradients(closure: Callable[[], Tensor], params: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradient of each of several losses, by one backward pass where they are independent.

        G_p[i] = d losses_i / d p

    Args:
        closure: () -> losses (N,), one per sample, with their graph. params: as for `Hessian`.

    Returns:
        A tensor (N, *p.shape) for each parameter, without a graph.

    Raises:
        TypeError, ValueError, RuntimeError: as for `Jacobian`.

    Example:
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(50, 3), torch.randint(2, (50,))
        >>> def losses():
        ...     return torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> [tuple(g.shape) for g in secant.curvature.per_sample_gradients(losses, model.parameters())]
        [(50, 2, 3), (50, 2)]
    """
    J = Jacobian(closure, params)
    return _matrices.parts_of(J.rows(), J.params)


def _moved(rows: slice, first: int) -> slice:
    return slice(rows.start + first, rows.stop + first, rows.step)


def _fill(source: Source, out: Tensor) -> None:
    """Write all rows of a batch."""
    if not source.full:
        out.zero_()
    for rows, write in source.blocks(max(1, source.m)):
        write(out[rows])


def _written(write: Write, room: Tensor, rows: slice) -> Tensor:
    """Write a block into the first rows of a room."""
    block = room[: len(range(rows.start, rows.stop, rows.step or 1))]
    write(block)
    return block


def _own_products(block: Tensor) -> Tensor:
    out = block.new_empty(len(block), len(block))
    _rows.symmetric_product(block.T, out, accumulate=False)
    return out


def joined(op: str, result: Any, dtype: torch.dtype) -> Tensor:
    """Join residuals, a tensor or several, to one tensor; a single one stays as it is.

    Raises:
        TypeError, ValueError: they are something else.
    """
    parts = list(result) if isinstance(result, (tuple, list)) else [result]
    if not parts or not all(isinstance(x, Tensor) for x in parts):
        got = type(result).__name__ if parts == [result] or not parts else ", ".join(type(x).__name__ for x in parts)
        raise TypeError(f"{op}: closure: expected residuals (a tensor or several), got {got}")
    for i, x in enumerate(parts):
        if not x.is_floating_point() or x.is_nested:
            name = "closure" if len(parts) == 1 else f"closure: residuals[{i}]"
            raise _checks.fail(op, name, "a dense real tensor", _checks.describe(x))
    with torch.enable_grad():
        whole = parts[0] if len(parts) == 1 else torch.cat([x.reshape(-1) for x in parts])
        return whole if whole.dtype is dtype else whole.to(dtype)


def _jacobian(matrix: _matrices.BatchMatrix) -> _matrices.BatchJacobian:
    assert isinstance(matrix, _matrices.Sandwich)
    return matrix.jacobian


def _length(matrix: _matrices.BatchMatrix) -> int:
    """Return the number of rows of one batch."""
    assert isinstance(matrix, _matrices.Sandwich)
    return matrix.like.numel()


def _push(jacobian: _matrices.BatchJacobian, vector: Tensor, row: Tensor) -> None:
    row.copy_(jacobian.push(vector).reshape(-1))


def _push_columns(jacobian: _matrices.BatchJacobian, vectors: Tensor, rows: Tensor) -> None:
    rows.copy_(jacobian.push_columns(vectors).reshape(len(rows), -1))


def _pull(matrix: _matrices.BatchMatrix, u: Tensor, row: Tensor) -> None:
    assert isinstance(matrix, _matrices.Sandwich)
    matrix.jacobian.pull(u.reshape(matrix.like.shape), row)


def _pull_columns(matrix: _matrices.BatchMatrix, us: Tensor, rows: Tensor) -> None:
    assert isinstance(matrix, _matrices.Sandwich)
    matrix.jacobian.pull_columns(us.reshape(len(us), *matrix.like.shape), rows)
