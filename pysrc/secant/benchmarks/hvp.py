"""Cases of the `hvp` family: every backend and every peer on the same input, checked before they are timed.

The yardstick of the products with X is one read of X by all threads, in turns with the rest (on a GPU, the bandwidth
of the same run). An answer is right when its largest error, relative to the largest component of the reference in
float64, stays below `TOLERANCE` rounding units of the arithmetic.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import secant
from secant import backends
from secant.benchmarks import choice, machine
from secant.benchmarks.report import Bar, Table, dtype_name, duration, find, ratio, times
from secant.benchmarks.timing import REPLAY, Timed, captured, clock_for, has_graphs, interleaved

#: Name of the row that says how long reading X once takes.
READ = "one read of X"
#: Copies of the input that take turns on a GPU, at most.
MAX_COPIES = 16
#: In units of the machine epsilon. Peers sum rows in an order of their own, with errors that grow with N.
TOLERANCE = 2000.0

Answer = tuple[Tensor, ...]
Call = Callable[[], Answer]


class Case(NamedTuple):
    """What is computed: op; N rows of d features (cross entropy: of d logits), k vectors or classes.

    entries: those of a sparse row, as many for each, whose indices the call checks; 0 for dense rows.
    """

    op: str
    n: int
    d: int
    k: int = 1
    dtype: torch.dtype = torch.float32
    entries: int = 0

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    @property
    def matrix_bytes(self) -> int:
        """Of X, or of the logits. A sparse row has its entries, their columns and a pointer, int32."""
        if self.entries:
            return self.n * (self.entries * (self.dtype.itemsize + 4) + 4)
        return self.n * self.d * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """What must be moved: X once; logits, u and the result once each."""
        if self.op == "cross_entropy_hvp":
            return 3 * self.matrix_bytes
        per_row = {"glm_hvp": 1, "glm_value_grad": 2, "softmax_hvp": self.k}[self.op]
        return self.matrix_bytes + (per_row * self.n + 2 * self.d * self.k) * self.compute.itemsize

    @property
    def flops(self) -> int:
        """Operations of the formula, an exponential counted as one.

        X V and its transpose 4 N d k, and what a row needs between them: a product with its weight, or the loss and
        its derivatives (about 10), or for each class a product with a probability, a sum, a difference and a product.
        An entry of logits: x - lse, exp, a product and a sum for p.u, u - p.u, a product.
        """
        if self.op == "cross_entropy_hvp":
            return 6 * self.n * self.d
        row = {"glm_hvp": self.k, "glm_value_grad": 10, "softmax_hvp": 4 * self.k}[self.op]
        return 4 * self.n * (self.entries or self.d) * self.k + row * self.n

    @property
    def label(self) -> str:
        """For tables."""
        extra = {"glm_hvp": f", k = {self.k}", "softmax_hvp": f", {self.k} classes"}.get(self.op, "")
        return f"{self.op} {self.n:,} x {self.d:,}{extra}" + (f", {self.entries} entries a row" if self.entries else "")


class Problem:
    """Random rows, vectors and what else the op takes."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.case, self.device = case, device

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=case.compute, device=device)

        self.x = self._sparse(generator) if case.entries else normal(case.n, case.d).to(case.dtype)
        self.v = normal(case.d, case.k) / case.d**0.5
        self.weight = torch.rand(case.n, generator=generator, dtype=case.compute, device=device)
        self.target = (self.weight < 0.5).to(case.compute)
        if case.op == "softmax_hvp":
            self.probs = torch.softmax(normal(case.n, case.k), -1)
        if case.op == "cross_entropy_hvp":
            self.x *= 3
            self.u, self.lse = normal(case.n, case.d).to(case.dtype), torch.logsumexp(self.x.to(case.compute), -1)

    def _sparse(self, generator: torch.Generator) -> Tensor:
        case = self.case
        size = case.n * case.entries
        # A column out of each of as many ranges, so that those of a row differ and rise.
        places = torch.rand(case.n, case.entries, generator=generator, dtype=torch.float64)
        col = ((places + torch.arange(case.entries)) * case.d / case.entries).int().clamp(max=case.d - 1)
        crow = torch.arange(0, size + 1, case.entries, dtype=torch.int32)
        values = torch.randn(size, generator=generator, dtype=case.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            return torch.sparse_csr_tensor(crow, col.view(-1), values, (case.n, case.d), check_invariants=True)

    @functools.cached_property
    def exact(self) -> Answer:
        """The reference's answer, in float64."""
        reference = backends.load("hvp", "reference")
        assert not isinstance(reference, str)
        wide = functools.partial(torch.empty, dtype=torch.float64, device=self.device)
        if self.case.op == "cross_entropy_hvp":
            out = wide(self.x.shape)
            reference.cross_entropy_hvp(self.x, self.u, None, out)
        elif self.case.op == "glm_value_grad":
            value, grad = wide(()), wide(self.case.d)
            curvature = wide(self.case.n)
            reference.glm_value_grad(
                self.x, self.target, self.v[:, 0].contiguous(), "logistic", 1.0, None, 0.0, value, grad, curvature
            )
            return value, grad
        elif self.case.op == "softmax_hvp":
            out = wide(self.v.shape)
            reference.softmax_hvp(self.x, self.v, self.probs, None, 0.0, out)
        else:
            out = wide(self.v.shape)
            reference.glm_hvp(self.x, self.v, self.weight, 0.0, out)
        return (out,)

    def error(self, answer: Answer) -> float:
        """The largest error of any result, relative to its largest component; NaN when anything is."""
        found = []
        for result, exact in zip(answer, self.exact, strict=True):
            found.append(float((result.double() - exact).abs().max() / exact.abs().max()))
        return math.nan if any(math.isnan(x) for x in found) else max(found)


def _ours(problem: Problem) -> Call:
    case, x, v = problem.case, problem.x, problem.v
    if case.op == "glm_hvp":
        out = torch.empty_like(v)
        return lambda: (secant.ops.glm_hvp(x, v, problem.weight, out=out),)
    if case.op == "glm_value_grad":
        coef = v[:, 0].contiguous()
        return lambda: secant.ops.glm_value_grad(x, problem.target, coef, loss="logistic")[:2]
    if case.op == "softmax_hvp":
        return lambda: (secant.ops.softmax_hvp(x, v, problem.probs),)
    return lambda: (secant.ops.cross_entropy_hvp(x, problem.u, lse=problem.lse),)


def _glm_hvp(x: Tensor, v: Tensor, weight: Tensor) -> Answer:
    return (x.mT @ (weight[:, None] * (x @ v)),)


def _glm_value_grad(x: Tensor, coef: Tensor, target: Tensor) -> Answer:
    coef = coef.detach().requires_grad_()
    value = F.binary_cross_entropy_with_logits(x @ coef, target, reduction="sum")
    return value.detach(), *torch.autograd.grad(value, coef)


def _glm_value_grad_formula(x: Tensor, coef: Tensor, target: Tensor) -> Answer:
    z = x @ coef
    return (F.softplus(z) - target * z).sum(), x.T @ (torch.sigmoid(z) - target)


def _softmax_hvp(x: Tensor, v: Tensor, probs: Tensor) -> Answer:
    z = x @ v
    z += -(probs * z).sum(1, keepdim=True)  # as scikit-learn's LinearModelLoss
    return (x.T @ (z * probs),)


def _cross_entropy_hvp(logits: Tensor, u: Tensor) -> Answer:
    p = torch.softmax(logits, -1)
    return (p * (u - (p * u).sum(-1, keepdim=True)),)


def peers(problem: Problem) -> dict[str, Call]:
    """What computes the same with torch, by name: as one writes it, and that compiled."""
    x, v = problem.x, problem.v
    function: Callable[..., Answer]
    arguments: tuple[Tensor, ...]
    if problem.case.op == "glm_hvp":
        v1 = v[:, :1].squeeze(1) if problem.case.k == 1 else v
        if problem.case.k == 1:
            weight = problem.weight

            def single(x: Tensor, v: Tensor, weight: Tensor) -> Answer:
                return ((x.mT @ (weight * (x @ v))).unsqueeze(1),)

            function, arguments = single, (x, v1, weight)
        else:
            function, arguments = _glm_hvp, (x, v, problem.weight)
    elif problem.case.op == "glm_value_grad":
        coef = v[:, 0].contiguous()
        eager = functools.partial(_glm_value_grad, x, coef, problem.target)
        formula = torch.compile(_glm_value_grad_formula, dynamic=False)
        return {"eager": eager, "compiled": functools.partial(formula, x, coef, problem.target)}
    elif problem.case.op == "softmax_hvp":
        function, arguments = _softmax_hvp, (x, v, problem.probs)
    else:
        function, arguments = _cross_entropy_hvp, (x, problem.u)
    return {
        "eager": functools.partial(function, *arguments),
        "compiled": functools.partial(torch.compile(function, dynamic=False), *arguments),
    }


class Row(NamedTuple):
    """One line of the results. Times are None when the answer was wrong: a wrong answer has no speed.

    kind: "backend", "peer" or "limit". seconds, best: of the median and the shortest sample.
    """

    case: Case
    name: str
    kind: str
    seconds: float | None
    best: float | None
    error: float
    note: str = ""

    @property
    def bytes_per_second(self) -> float | None:
        """Of the bytes that must be moved."""
        moved = self.case.matrix_bytes if self.kind == "limit" else self.case.bytes
        return None if self.seconds is None else moved / self.seconds


def serving(case: Case, device: torch.device) -> list[str]:
    """The backends that can serve a case, the one that `auto` takes first."""
    return choice.serving("hvp", device, case.dtype, case.op, case.d)


class Contender(NamedTuple):
    """One way to compute a case."""

    name: str
    kind: str
    call: Call
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


def contenders(problem: Problem, *, compiled: bool = True, reference: bool = False) -> list[Contender]:
    """Every backend that serves the case, what `auto` takes first, then every peer."""
    names = serving(problem.case, problem.device)
    found = []
    for name in names:
        if name == "reference" and not reference and name != names[0]:
            continue
        found.append(Contender(name, "backend", _ours(problem), choice.around(name, names)))
    for name, call in peers(problem).items():
        if compiled or name != "compiled":
            found.append(Contender(name, "peer", call))
    return found


def _copies(case: Case, device: torch.device) -> int:
    """Inputs that take turns so that none is found in the cache of a GPU."""
    return max(1, min(MAX_COPIES, math.ceil(2 * machine.cache_bytes(device) / case.bytes)))


def measure(
    case: Case, device: torch.device, *, seconds: float, compiled: bool = True, reference: bool = False
) -> list[Row]:
    """Check every contender of a case, then time those that are right, and one read of X, in turns.

    Args:
        case: what to compute. device: where. seconds: to spend on the timing, roughly.
        compiled: whether to compile the peers. reference: whether to time the reference too.

    Returns:
        A row per contender, the backends first; on a CPU that of the read; on a GPU one of each backend that was
        replayed from a graph.
    """
    problems = [Problem(case, device, seed) for seed in range(_copies(case, device))]
    limit = TOLERANCE * torch.finfo(case.compute).eps
    if case.op == "cross_entropy_hvp":
        limit = max(limit, 8 * torch.finfo(case.dtype).eps)
    built = [contenders(problem, compiled=compiled, reference=reference) for problem in problems]
    timed: dict[tuple[str, str], Timed] = {}
    checked: dict[tuple[str, str], tuple[float, str]] = {}
    for group in zip(*built, strict=True):
        one = group[0]
        try:
            with one.around():
                errors = [problem.error(x.call()) for problem, x in zip(problems, group, strict=True)]
        except Exception as failure:
            if one.kind == "backend":
                raise
            checked[one.name, ""] = (math.nan, f"failed: {type(failure).__name__}")
            continue
        error = math.nan if any(math.isnan(x) for x in errors) else max(errors)
        checked[one.name, ""] = (error, "" if error < limit else "wrong answer")
        if error < limit:
            turn = timed[one.name, ""] = Timed([x.call for x in group], one.around)
            if has_graphs(device) and one.kind == "backend":
                graph = captured(turn, device)
                checked[one.name, REPLAY] = (error, graph if isinstance(graph, str) else REPLAY)
                if isinstance(graph, Timed):
                    timed[one.name, REPLAY] = graph
    if device.type == "cpu" and machine.can_read() and case.op != "cross_entropy_hvp" and not case.entries:
        timed[READ, ""] = Timed([functools.partial(machine.read, 1, problems[0].x)])
    timings = interleaved(timed, clock_for(device), seconds=seconds)

    def row(name: str, kind: str, way: str = "") -> Row:
        timing = timings.get((name, way))
        median, best = (timing.median, timing.best) if timing else (None, None)
        return Row(case, name, kind, median, best, *checked.get((name, way), (0.0, "")))

    rows = [row(one.name, one.kind) for one in built[0]]
    rows += [row(name, "backend", way) for name, way in checked if way]
    return [*rows, *([row(READ, "limit")] if (READ, "") in timed else [])]


def cases(device: torch.device) -> list[Case]:
    """What `python -m secant bench --family hvp` measures."""
    f32, bf16 = torch.float32, torch.bfloat16
    shapes = ((100_000, 256), (200_000, 784))
    found = [Case("glm_hvp", n, d, k) for n, d in shapes for k in (1, 8)]
    found += [Case("glm_hvp", 200_000, 784, 1, bf16), Case("glm_hvp", 100_000, 256, 1, torch.float64)]
    found += [Case("glm_hvp", 100_000, 256, 64), Case("glm_hvp", 1_000_000, 8), Case("glm_hvp", 400, 100_000)]
    found += [Case("glm_value_grad", n, d) for n, d in (*shapes, (1_000_000, 8))]
    found += [Case("softmax_hvp", 100_000, 256, 10), Case("softmax_hvp", 200_000, 784, 10)]
    if device.type == "cpu":
        found += [Case("glm_hvp", 200_000, 10_000, k, entries=20) for k in (1, 8)]
    rows = 16384 if device.type == "cuda" else 512
    found += [Case("cross_entropy_hvp", rows, 50304, 1, dtype) for dtype in (f32, bf16)]
    return found


def small_cases(device: torch.device) -> list[Case]:
    """A case of each op that takes no time, to see that it runs."""
    sparse = [Case("glm_hvp", 200, 50, 1, entries=5)] if device.type == "cpu" else []
    return [
        Case("glm_hvp", 200, 20),
        Case("glm_hvp", 200, 20, 8),
        Case("glm_value_grad", 200, 20),
        Case("softmax_hvp", 200, 20, 10),
        *sparse,
        Case("cross_entropy_hvp", 8, 300),
    ]


# --------------------------------------------------------------------------------------------------------- the report


def cpu_bars(rows: Sequence[Row]) -> list[Bar]:
    """The targets for two cores with AVX2."""
    found = []
    for case in dict.fromkeys(row.case for row in rows):
        ours, eager = find(rows, case), find(rows, case, "eager")
        target = {
            ("glm_hvp", 1): 2.5, ("glm_hvp", 8): 8.0, ("glm_value_grad", 1): 3.0, ("softmax_hvp", 10): 3.0
        }.get((case.op, case.k))  # fmt: skip
        if target is None or case.dtype is not torch.float32 or case[1:3] not in ((100_000, 256), (200_000, 784)):
            continue
        found.append(Bar(f"{case.label} against eager, times faster", target, True, ratio(eager, ours)))
        if case[:4] == ("glm_hvp", 200_000, 784, 1):
            read = find(rows, case, READ)
            found.append(Bar(f"{case.label} against {READ}, times longer", 1.5, False, ratio(ours, read)))
    return found


def gpu_bars(rows: Sequence[Row], bandwidth: float) -> list[Bar]:
    """The targets for an H100: shares of the copy bandwidth."""
    found = []
    for case in dict.fromkeys(row.case for row in rows):
        ours = find(rows, case)
        rate = ours.bytes_per_second if ours is not None else None
        share = None if rate is None else rate / bandwidth
        if case.op == "glm_hvp" and case.k == 1 and case.matrix_bytes > 1 << 28:
            found.append(Bar(f"{case.label} against the copy bandwidth", 0.75, True, share))
        if case.op == "cross_entropy_hvp":
            found.append(Bar(f"{case.label} against the copy bandwidth", 0.7, True, share))
    return found


def rows_table(rows: Sequence[Row], bandwidth: float) -> Table:
    """A line per row."""
    lines = []
    for row in rows:
        rate, ours = row.bytes_per_second, find(rows, row.case)
        faster = times(ratio(row, ours)) if row.kind == "peer" else "-"
        lines.append(
            (
                row.case.label,
                dtype_name(row.case.dtype),
                row.name,
                duration(row.seconds),
                duration(row.best),
                "-" if rate is None else f"{rate / 1e9:.3g}",
                "-" if rate is None else f"{rate / bandwidth:.0%}",
                "-" if row.kind == "limit" else f"{row.error:.1e}",
                faster + (f" ({row.note})" if row.note else ""),
            )
        )
    columns = ("op", "dtype", "by", "median", "min", "GB/s", "of bandwidth", "error", "times longer than ours")
    return Table("Products", columns, lines, ("GB/s counts the bytes that must be moved, X once.",))


def losses(rows: Sequence[Row]) -> list[str]:
    """Every comparison that we lose, in words, and any wrong answer of ours."""
    lost = []
    for row in rows:
        ours = find(rows, row.case)
        label = f"{row.case.label}, {dtype_name(row.case.dtype)}"
        if row.kind == "backend" and row.note == "wrong answer":
            lost.append(f"{label}: {row.name} gives a wrong answer (error {row.error:.1e})")
        value = ratio(row, ours) if row.kind == "peer" else None
        if ours is not None and value is not None and value < 1:
            lost.append(f"{label}: {ours.name} takes {times(1 / value)} the time of {row.name}")
    return lost


def as_json(rows: Sequence[Row], bars: Sequence[Bar]) -> dict[str, Any]:
    """Everything as plain data; times in seconds."""

    def plain(row: Row) -> dict[str, Any]:
        return row.case._asdict() | {
            "dtype": dtype_name(row.case.dtype),
            "by": row.name,
            "kind": row.kind,
            "median": row.seconds,
            "min": row.best,
            "bytes": row.case.bytes,
            "flops": row.case.flops,
            "bytes_per_second": row.bytes_per_second,
            "error": row.error,
            "note": row.note,
        }

    return {
        "rows": [plain(row) for row in rows],
        "bars": [x._asdict() | {"met": x.met} for x in bars],
        "lost": losses(rows),
    }
