"""Line searches, steps and convergence of many problems at once: `BatchedSearch`.

The mathematics and the bytes that must move are in `kernels/search/README.md`; the contract between this module and
the kernels is in `kernels/search/reference.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant.kernels.search.contract import (
    COUNTS,
    ENDED,
    FLAGS,
    NFEV,
    NIT,
    NOISE,
    NUMBERS,
    RUNNING,
    SIZE,
    SLOPE,
    STATUS,
    USED,
    VALUE,
    Rule,
    Search,
    T,
)
from secant.kernels.search.reference import Outcome, machine
from secant.ops import _gate, _register
from secant.result import Status

_MEMBERS = len(Search._fields)


def _advance_contract(*args: Any) -> tuple[Any, ...]:
    return Search(*args[:_MEMBERS]), *args[_MEMBERS : _MEMBERS + 3], Rule(*args[_MEMBERS + 3 :])


def _begin_contract(*args: Any) -> tuple[Any, ...]:
    return Search(*args[:_MEMBERS]), *args[_MEMBERS : _MEMBERS + 4], Rule(*args[_MEMBERS + 4 :])


def _rows(op: str, rows: Tensor | None, device: torch.device) -> Tensor | None:
    """Check the places of problems, whose contents a kernel bounds by itself, and return them contiguous."""
    if rows is None:
        return None
    _checks.tensor(op, "rows", rows, (torch.int64,), device)
    if rows.dim() != 1:
        raise _checks.fail(op, "rows", "shape (b,)", f"shape {tuple(rows.shape)}")
    return rows.resolve_neg().contiguous()


def _scalars(op: str, name: str, x: Tensor, batch: int, device: torch.device) -> Tensor:
    """Check one number of each problem, of any stride."""
    return _checks.shaped(op, name, x, (batch,), torch.float64, device).resolve_neg()


def _brought(
    op: str, search: Search, value: Tensor, grad: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check what trials have brought, and return it in the layout of the contract."""
    x = search.x
    rows = _rows(op, rows, x.device)
    b = len(x) if rows is None else len(rows)
    _checks.tensor(op, "value", value, _checks.REAL, x.device)
    value = _checks.shaped(op, "value", value, (b,), value.dtype, x.device).resolve_neg().double().contiguous()
    grad = _checks.shaped(op, "grad", grad, (b, x.shape[1]), x.dtype, x.device).resolve_neg().contiguous()
    # A function may return its argument: x is the gradient of |x|^2 / 2.
    written = (search.x, search.g, search.kept, search.trial)
    return value, grad.clone() if any(_gate.overlaps(grad, y) for y in written) else grad, rows


def _state(op: str, args: tuple[Any, ...]) -> Search:
    """Check what a kernel would otherwise trust, for who calls a registered op itself."""
    x = _checks.tensor(op, "x", args[0], _checks.REAL)
    if x.dim() != 2 or x.numel() == 0:
        raise _checks.fail(op, "x", "shape (B, n), not empty", f"shape {tuple(x.shape)}")
    b, n = x.shape
    for name, y in zip(Search._fields[1:5], args[1:5], strict=True):
        _checks.shaped(op, name, y, (b, n), x.dtype, x.device)
    _checks.shaped(op, "step", args[5], (b,), torch.float64, x.device)
    _checks.shaped(op, "numbers", args[6], (len(NUMBERS), b), torch.float64, x.device)
    _checks.shaped(op, "counts", args[7], (len(COUNTS), b), torch.int32, x.device)
    return Search(*(y.resolve_neg().contiguous() for y in args[:_MEMBERS]))


def _settled_advance(*args: Any) -> tuple[Any, ...]:
    op = "search_advance"
    _state(op, args)
    given = Search(*args[:_MEMBERS])
    laid = given._replace(d=given.d.resolve_neg().contiguous())
    return (*laid, *_brought(op, given, *args[_MEMBERS : _MEMBERS + 3]), *args[_MEMBERS + 3 :])


def _settled_begin(*args: Any) -> tuple[Any, ...]:
    op = "search_begin"
    search = _state(op, args)
    b, device = len(search.x), search.x.device
    slope, g_max, t, rows = args[_MEMBERS : _MEMBERS + 4]
    slope, g_max = _scalars(op, "slope", slope, b, device), _scalars(op, "g_max", g_max, b, device)
    t = None if t is None else _scalars(op, "t", t, b, device)
    laid = Search(*args[:_MEMBERS])._replace(x=search.x, d=search.d)
    return (*laid, slope, g_max, t, _rows(op, rows, device), *args[_MEMBERS + 4 :])


_RULE = (
    "float c1, float c2, float tolerance, int max_trials, float eps, float gtol, float ftol, int max_iter, "
    "int max_nfev)"
)
_advance = _register.Kernel(
    "search",
    "advance",
    "search_advance(Tensor(a!) x, Tensor(b!) g, Tensor d, Tensor(c!) kept, Tensor(d!) trial, Tensor(e!) step, "
    f"Tensor(f!) numbers, Tensor(g!) counts, Tensor value, Tensor grad, Tensor? rows, {_RULE}",
    settle=_settled_advance,
    contract=_advance_contract,
)
_begin = _register.Kernel(
    "search",
    "begin",
    "search_begin(Tensor x, Tensor g, Tensor d, Tensor kept, Tensor(a!) trial, Tensor(b!) step, Tensor(c!) numbers, "
    f"Tensor(d!) counts, Tensor slope, Tensor g_max, Tensor? t, Tensor? rows, {_RULE}",
    settle=_settled_begin,
    contract=_begin_contract,
)


class BatchedSearch:
    """Lets B problems step along their directions, each with a strong Wolfe search, an end and a failure of its own.

    Problem i minimizes f_i along x_i + t d_i by the steps of `secant.solvers.strong_wolfe`. In a round all make one
    trial of their searches:

        value, grad = f(search.trial)             for all at once
        search.advance(value, grad)               searches go on or end; x, g and value of those that end move
        ...                                       new directions in `search.d`, their slopes g.d and the |g|_inf
        search.begin(slope, g_max)                tests of convergence; next searches, next trials

    Nothing in a round reads a value back to the host. It begins along -g with a first trial at min(1, 1 / |g|_1).

    Args:
        x: (B, n), float32 or float64. value: (B,), f there, float32 or float64. grad: as `x`. All are copied.
        c1, c2, tolerance, max_trials: of the searches, as in `secant.solvers.strong_wolfe`.
        eps: relative error of a value; None: the machine epsilon of the dtype.
        gtol: a problem has converged with |g|_inf <= gtol.
        ftol: it ends, too, where a step changes f by at most ftol max(|f|, 1); 0: never.
        max_iter, max_nfev: steps and evaluations of a problem, the latter counted after each search.

    Attributes:
        x, g, d: (B, n), points, gradients and directions; a caller writes `d`. trial: (B, n), what is to be evaluated.
        step: (B,) float64, the length of the step that the last `advance` took, 0 for none. value: (B,) float64.
        status: (B,) int32, of `secant.Status`, and -1 while a problem goes on. nit, nfev: (B,) int32.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or numbers do not fit.

    References:
        Those of `secant.solvers.strong_wolfe`.

    Example:
        >>> x = torch.tensor([[4.0], [-1.0]], dtype=torch.float64)      # f = x^2 / 2, by steepest descent
        >>> search = secant.ops.BatchedSearch(x, x[:, 0] ** 2 / 2, x, gtol=1e-6)
        >>> while bool((search.status < 0).any()):
        ...     search.advance(search.trial[:, 0] ** 2 / 2, search.trial)
        ...     _ = search.d.copy_(-search.g)
        ...     search.begin(-(search.g**2).sum(1), search.g.abs().amax(1))
        >>> search.x.flatten().tolist(), search.nfev.tolist()
        ([0.0, 0.0], [3, 2])
    """

    def __init__(
        self,
        x: Tensor,
        value: Tensor,
        grad: Tensor,
        *,
        c1: float = 1e-4,
        c2: float = 0.9,
        tolerance: float = 1e-9,
        max_trials: int = 25,
        eps: float | None = None,
        gtol: float = 1e-5,
        ftol: float = 0.0,
        max_iter: int = 15_000,
        max_nfev: int = 15_000,
    ) -> None:
        op = "BatchedSearch"
        _checks.tensor(op, "x", x, _checks.REAL)
        if x.dim() != 2 or x.numel() == 0:
            raise _checks.fail(op, "x", "shape (B, n), not empty", f"shape {tuple(x.shape)}")
        b, device = len(x), x.device
        _checks.tensor(op, "value", value, _checks.REAL, device)
        _checks.shaped(op, "value", value, (b,), value.dtype, device)
        _checks.shaped(op, "grad", grad, tuple(x.shape), x.dtype, device)
        c1 = _checks.number(op, "c1", c1, "a number in (0, 1)", lambda v: 0.0 < v < 1.0)
        c2 = _checks.number(op, "c2", c2, "a number in (c1, 1)", lambda v: c1 < v < 1.0)
        self._rule = Rule(
            c1, c2, _checks.nonnegative(op, "tolerance", tolerance), _checks.integer(op, "max_trials", max_trials, 1),
            torch.finfo(x.dtype).eps if eps is None else _checks.nonnegative(op, "eps", eps),
            _checks.nonnegative(op, "gtol", gtol), _checks.nonnegative(op, "ftol", ftol),
            _checks.integer(op, "max_iter", max_iter, 0), _checks.integer(op, "max_nfev", max_nfev, 0),
        )  # fmt: skip
        x, g, value = (y.detach().clone(memory_format=torch.contiguous_format) for y in (x, grad, value))
        value = value.double()
        numbers = torch.zeros(len(NUMBERS), b, dtype=torch.float64, device=device)
        counts = torch.zeros(len(COUNTS), b, dtype=torch.int32, device=device)
        usable = value.isfinite() & g.isfinite().all(-1)
        g.masked_fill_(~usable[:, None], 0.0)
        wide = g.double()
        g_max = wide.abs().amax(-1)
        status = torch.where(g_max <= self._rule.gtol, int(Status.CONVERGED), RUNNING)
        counts[STATUS] = torch.where(usable, status, int(Status.NOT_FINITE))
        counts[FLAGS], counts[NFEV], numbers[VALUE] = ENDED * (counts[STATUS] == RUNNING), 1, value
        step = torch.zeros(b, dtype=torch.float64, device=device)
        self._settle(Search(x, g, -g, g.clone(), x.clone(), step, numbers, counts))
        first = (1.0 / wide.abs().sum(-1)).clamp_max(1.0)
        self.begin(-wide.square().sum(-1), g_max, first)

    def _settle(self, search: Search) -> None:
        self._search = search
        self._written = {
            "advance": [y for name, y in zip(Search._fields, search, strict=True) if name != "d"],
            "begin": [search.trial, search.step, search.numbers, search.counts],
        }
        self.x, self.g, self.d, self.trial, self.step = search.x, search.g, search.d, search.trial, search.step
        self.value = search.numbers[VALUE]
        self.status, self.nit, self.nfev = search.counts[STATUS], search.counts[NIT], search.counts[NFEV]

    def advance(self, value: Tensor, grad: Tensor, rows: Tensor | None = None) -> None:
        """Take what the trials brought: each search goes on, or ends and its problem steps.

        Args:
            value: (b,), float32 or float64, f at `trial[rows]`. What is not finite makes a search step back.
            grad: (b, n), of the dtype of x, the gradients there.
            rows: (b,), int64, on the device, the problems that were evaluated, each once; others stay as they are.
                None: all. What has stopped stays as it is, too, and so does all in a number that is no place.

        Raises:
            TypeError, ValueError: dtypes, shapes or devices do not fit.
        """
        brought = _brought("advance", self._search, value, grad, rows)
        _advance(*self._search, *brought, *self._rule)
        _gate.written(*self._written["advance"])

    def begin(self, slope: Tensor, g_max: Tensor, t: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Test the problems that stepped, and begin the next search of those that go on.

        Args:
            slope: (B,) float64, g.d of the new directions in `d`, which are to descend; any stride.
            g_max: (B,) float64, |g|_inf; any stride.
            t: (B,) float64, first trials; None: 1.
            rows: as for `advance`.

        Raises:
            TypeError, ValueError: dtypes, shapes or devices do not fit.
        """
        op, (b, _), device = "begin", self.x.shape, self.x.device
        slope, g_max = _scalars(op, "slope", slope, b, device), _scalars(op, "g_max", g_max, b, device)
        t = None if t is None else _scalars(op, "t", t, b, device)
        _begin(*self._search, slope, g_max, t, _rows(op, rows, device), *self._rule)
        _gate.written(*self._written["begin"])

    def take(self, places: Tensor) -> BatchedSearch:
        """Make a search of some of the problems, in the state that they are in.

        Args:
            places: (b,), int64, b >= 1, in any order.
        """
        new = object.__new__(BatchedSearch)
        new._rule = self._rule
        dims = (1 if name in ("numbers", "counts") else 0 for name in Search._fields)
        new._settle(Search(*(y.index_select(dim, places) for y, dim in zip(self._search, dims, strict=True))))
        return new


class BatchedLines:
    """Searches along B lines at once by the machine of `BatchedSearch` alone, in torch's operations.

    For methods whose points are not x + t d (bounds): who drives it evaluates the lines and keeps what may be chosen.

    Args:
        batch: B. device: of the numbers. c1, c2, tolerance, max_trials: as for `BatchedSearch`.

    Attributes:
        t: (B,) float64, what each search wants tried next; it may be written.
    """

    def __init__(
        self,
        batch: int,
        device: torch.device,
        *,
        c1: float = 1e-4,
        c2: float = 0.9,
        tolerance: float = 1e-9,
        max_trials: int = 25,
    ) -> None:
        self._rule = Rule(c1, c2, tolerance, max_trials, 0.0, 0.0, 0.0, 0, 0)
        self._numbers = torch.zeros(len(NUMBERS), batch, dtype=torch.float64, device=device)
        self._counts = torch.zeros(len(COUNTS), batch, dtype=torch.int32, device=device)

    @property
    def t(self) -> Tensor:
        """Return what each search wants tried next."""
        return self._numbers[T]

    def take(self, places: Tensor) -> None:
        """Go on with some of the problems."""
        self._numbers, self._counts = (x.index_select(1, places) for x in (self._numbers, self._counts))

    def begin(self, which: Tensor, value: Tensor, slope: Tensor, t: Tensor, size: Tensor, noise: Tensor) -> None:
        """Begin anew where the mask `which` is set; all (B,), float64 but for the mask.

        Args:
            value, slope: phi(0), phi'(0). t: first trials. size: |d|_inf. noise: of the values, see `strong_wolfe`.
        """
        for row, new in ((VALUE, value), (SLOPE, slope), (T, t), (SIZE, size), (NOISE, noise)):
            self._numbers[row] = torch.where(which, new, self._numbers[row])
        for row in (USED, FLAGS):
            self._counts[row].masked_fill_(which, 0)

    def advance(self, value: Tensor, slope: Tensor) -> Outcome:
        """Take the values and slopes at t, (B,) float64, and move t on where a search goes on."""
        return machine(self._numbers, self._counts, value, slope, self._rule)
