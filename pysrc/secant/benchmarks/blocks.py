"""Cases of the `blocks` family: every backend and every peer on the same batch, checked before they are timed.

The yardstick is a copy of the batch, `out.copy_(a)`, in turns with the rest. An answer is right when LAPACK's test
ratios of it, computed in float64 over all blocks that are timed, stay below the threshold of LAPACK's own test
programs: 30, with the machine epsilon of the dtype in the denominator.

References:
    Blackford and Dongarra, Installation Guide for LAPACK, LAPACK Working Note 41: the ratios of xPOT03 (inverse),
    xGET02 (solution) and xDRVST (eigenvectors).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import secant
from secant.benchmarks import choice
from secant.benchmarks.timing import REPLAY, Clock, Timed, captured, clock_for, has_graphs, interleaved

#: Elements of a batch: n^2 times the number of blocks. On a GPU more than its cache holds.
ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
#: What is computed: op, and what is assumed of the blocks.
KINDS = (
    ("block_inv", "spd"),
    ("block_inv", "general"),
    ("block_solve", "spd"),
    ("block_solve", "general"),
    ("block_eigh", "symmetric"),
)
#: Sizes that are measured by default, and those also in float64.
SIZES, DOUBLE = (2, 3, 4, 6, 8, 9, 12, 16, 24, 32, 48, 64), (3, 6, 9, 16, 32)
EVERY_SIZE = tuple(range(1, 65))
#: Bound on LAPACK's test ratios, from the input of its tests of linear equations; taken for eigenvectors too.
THRESHOLD = 30.0
#: A peer, or the reference, is timed on as many blocks as this many seconds allow, at least `PILOT`: short turns, and
#: more of them, so that a disturbance of the machine is outvoted in the median.
SLICE_SECONDS, PILOT = 0.012, 32
#: Elements that are checked at a time.
CHECKED = 1 << 20
#: Name of the row that says how long a copy of the batch takes.
COPY = "copy"

Answer = tuple[Tensor, ...]


class Case(NamedTuple):
    """What is computed: see `KINDS`; `batch` blocks of n rows."""

    op: str
    assume: str
    n: int
    batch: int
    dtype: torch.dtype = torch.float32

    @property
    def function(self) -> str:
        """The function of the contract that computes it."""
        return self.op.removeprefix("block_")

    @property
    def block_bytes(self) -> int:
        """What must be moved for a block: it and the results once, the code of `info` (int32)."""
        elements = {"block_inv": 2 * self.n**2, "block_solve": self.n**2 + 2 * self.n}
        return elements.get(self.op, 2 * self.n**2 + self.n) * self.dtype.itemsize + 4

    @property
    def block_flops(self) -> float:
        """Operations of LAPACK's algorithms for a block, the leading terms; backends may need more or less.

        Cholesky n^3 / 3, LU 2 n^3 / 3, the inverse from them twice as much again, triangular solves 2 n^2; eigenvectors
        9 n^3 (Golub and Van Loan, Matrix Computations, 4th ed., section 8.3).
        """
        if self.op == "block_eigh":
            return 9.0 * self.n**3
        factor = self.n**3 / 3 * (1 if self.assume == "spd" else 2)
        return 3 * factor if self.op == "block_inv" else factor + 2 * self.n**2

    @property
    def label(self) -> str:
        """For tables."""
        return self.op if self.assume == "symmetric" else f"{self.op}, {self.assume}"


def batch_of(n: int, device: torch.device) -> int:
    """Blocks of n rows that have `ELEMENTS` elements together."""
    return ELEMENTS[device.type] // n**2


class Problem:
    """A batch of random blocks, G of normal numbers: G G^T / n + I, G, or (G + G^T) / 2; and a right-hand side."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (case.batch, case.n, case.n)
        g = torch.randn(shape, generator=generator, dtype=case.dtype, device=device)
        if case.assume == "spd":
            eye = torch.eye(case.n, dtype=case.dtype, device=device)
            self.a = torch.baddbmm(eye.expand(shape), g, g.mT, alpha=1 / case.n)
        else:
            self.a = g if case.assume == "general" else (g + g.mT) / 2
        self.b = torch.randn(shape[:2], generator=generator, dtype=case.dtype, device=device)
        self.case, self.device = case, device

    def worst_ratio(self, answer: Answer) -> float:
        """The largest test ratio of the answer for the first blocks; NaN when anything in it is, or a code is not 0.

        Raises:
            ValueError: the answer has another shape than that of the first blocks.
        """
        op = self.case.op
        *results, info = answer
        count = len(results[0])
        matrices, vectors = self.a[:count].shape, self.b[:count].shape
        expected = {"block_inv": [matrices], "block_solve": [vectors], "block_eigh": [vectors, matrices]}[op]
        if [x.shape for x in results] != expected or info.shape != (count,):
            raise ValueError(f"expected shapes {expected}, got {[x.shape for x in results]} and {info.shape}")
        if bool(info.any()):
            return math.nan
        ratio, step = _RATIOS[op], max(1, CHECKED // self.case.n**2)
        eps = torch.finfo(self.case.dtype).eps
        parts = zip(*(x.split(step) for x in (self.a[:count], self.b[:count], *results)), strict=True)
        worst = [ratio(*(x.double() for x in part)).max() for part in parts]
        return float(torch.stack(worst).max() / eps)


def _norm1(a: Tensor) -> Tensor:
    return a.abs().sum(-2).amax(-1)


def _eye(a: Tensor) -> Tensor:
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def _inverse_ratio(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """||I - A X||_1 / (n ||A||_1 ||X||_1)."""
    return _norm1(_eye(a) - a @ x) / (a.shape[-1] * _norm1(a) * _norm1(x))


def _solution_ratio(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """||b - A x||_1 / (||A||_1 ||x||_1)."""
    return (b - (a @ x.unsqueeze(-1)).squeeze(-1)).abs().sum(-1) / (_norm1(a) * x.abs().sum(-1))


def _eigen_ratio(a: Tensor, b: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The larger of ||A - V W V^T||_1 / (n ||A||_1) and ||I - V^T V||_1 / n; NaN where w does not ascend."""
    n = a.shape[-1]
    reconstructed = _norm1(a - (v * w.unsqueeze(-2)) @ v.mT) / (n * _norm1(a))
    ratio = torch.maximum(reconstructed, _norm1(_eye(a) - v.mT @ v) / n)
    return ratio.masked_fill((w.diff(dim=-1) < 0).any(-1), math.nan)


_RATIOS: dict[str, Callable[..., Tensor]] = {
    "block_inv": _inverse_ratio,
    "block_solve": _solution_ratio,
    "block_eigh": _eigen_ratio,
}

Compute = Callable[[Tensor, Tensor], Answer]


def _inv_ex(a: Tensor, b: Tensor) -> Answer:
    return torch.linalg.inv_ex(a)


def _cholesky_inverse(a: Tensor, b: Tensor) -> Answer:
    factor, info = torch.linalg.cholesky_ex(a)
    return torch.cholesky_inverse(factor), info


def _solve_ex(a: Tensor, b: Tensor) -> Answer:
    return torch.linalg.solve_ex(a, b)


def _cholesky_solve(a: Tensor, b: Tensor) -> Answer:
    factor, info = torch.linalg.cholesky_ex(a)
    return torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1), info


def _eigh(a: Tensor, b: Tensor) -> Answer:
    return *torch.linalg.eigh(a), _no_codes(a)


def _no_codes(a: Tensor) -> Tensor:
    """Zeros for a peer that raises, or says nothing, instead of returning codes; they take up no memory."""
    return torch.zeros((), dtype=torch.int32, device=a.device).expand(len(a))


def _cublas_inverse(a: Tensor, b: Tensor) -> Answer:
    """matinvBatched of cuBLAS (n up to 32). It is asked for the inverse of the transpose of what lies in memory."""
    cublas: Any = importlib.import_module("cupy_backends.cuda.libs.cublas")
    handle = importlib.import_module("cupy").cuda.get_cublas_handle()
    x, info = torch.empty_like(a), torch.empty(len(a), dtype=torch.int32, device=a.device)
    first = torch.arange(len(a), device=a.device) * (a.stride(0) * a.element_size())
    sources, targets = first + a.data_ptr(), first + x.data_ptr()
    cublas.setStream(handle, torch.cuda.current_stream(a.device).cuda_stream)
    invert = cublas.dmatinvBatched if a.dtype is torch.float64 else cublas.smatinvBatched
    n = a.shape[-1]
    invert(handle, n, sources.data_ptr(), n, targets.data_ptr(), n, info.data_ptr(), len(a))
    return x, info


def _cupy_inverse(a: Tensor, b: Tensor) -> Answer:
    cupy: Any = importlib.import_module("cupy")
    with cupy.cuda.ExternalStream(torch.cuda.current_stream(a.device).cuda_stream, a.device.index):
        return torch.from_dlpack(cupy.linalg.inv(cupy.from_dlpack(a))), _no_codes(a)


def peers(case: Case, device: torch.device) -> dict[str, Compute]:
    """What computes the same elsewhere, by name."""
    if case.op == "block_eigh":
        return {"eigh": _eigh}
    spd, found = case.assume == "spd", dict[str, Compute]()
    if case.op == "block_solve":
        found["solve_ex"] = _solve_ex
        if spd:
            found["cholesky"] = _cholesky_solve
        return found
    found["inv_ex"] = _inv_ex
    if spd:
        found["cholesky"] = _cholesky_inverse
    if device.type == "cuda" and importlib.util.find_spec("cupy") is not None:
        if case.n <= 32:
            found["matinvBatched"] = _cublas_inverse
        found["cupy"] = _cupy_inverse
    return found


def serving(case: Case, device: torch.device) -> list[str]:
    """The backends that can serve a case, the one that `auto` takes first."""
    return choice.serving("blocks", device, case.dtype, case.function, case.n)


def _ours(case: Case, out: Tensor) -> Compute:
    """The call as its user makes it in a loop, with the result in a buffer where there is an `out`."""
    if case.op == "block_inv":
        return lambda a, b: secant.ops.block_inv(a, assume=case.assume, out=out[: len(a)])
    if case.op == "block_solve":
        return lambda a, b: secant.ops.block_solve(a, b, assume=case.assume, out=out[: len(a)])
    return lambda a, b: secant.ops.block_eigh(a)


def _once(call: Callable[[], object], clock: Clock) -> float:
    start = clock.mark()
    call()
    end = clock.mark()
    clock.wait()
    return clock.seconds(start, end)


class Contender(NamedTuple):
    """One way to compute a case. kind: "backend" or "peer"; whole: on all blocks, however long that takes."""

    name: str
    kind: str
    compute: Compute
    whole: bool
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext

    def on(self, problem: Problem, blocks: int) -> Callable[[], Answer]:
        """The call for the first blocks of a problem."""
        return functools.partial(self.compute, problem.a[:blocks], problem.b[:blocks])

    def fitting(self, problem: Problem, clock: Clock) -> int:
        """How many blocks to time: four times as many until they take more than a quarter of `SLICE_SECONDS`."""
        batch = problem.case.batch
        blocks = batch if self.whole else min(PILOT, batch)
        with self.around():
            self.on(problem, blocks)()  # the first call of a process initialises libraries
            while blocks < batch:
                call = self.on(problem, blocks)
                # The best of three: one call in a bad moment must not decide for a slice that is all overhead.
                if 4 * min(_once(call, clock) for _ in range(3)) > SLICE_SECONDS:
                    break
                blocks = min(4 * blocks, batch)
        return blocks


Wanted = Callable[[Case, str], bool]


def everything(case: Case, name: str) -> bool:
    """Every contender is wanted."""
    return True


def contenders(problem: Problem, wanted: Wanted = everything) -> list[Contender]:
    """Every backend that serves the case, what `auto` takes first, then every peer."""
    case, names = problem.case, serving(problem.case, problem.device)
    compute = _ours(case, torch.empty_like(problem.b if case.op == "block_solve" else problem.a))
    found = [Contender(name, "backend", compute, name != "reference", choice.around(name, names)) for name in names]
    found += [Contender(name, "peer", function, False) for name, function in peers(case, problem.device).items()]
    return [one for one in found if wanted(case, one.name)]


class Row(NamedTuple):
    """One line of the results. Times are None when the answer was wrong: a wrong answer has no speed.

    kind: "backend", "peer" or "limit" (the copy). blocks: how many were timed. seconds, best: per block, of the median
    and the shortest sample. error: the largest test ratio.
    """

    case: Case
    name: str
    kind: str
    blocks: int
    seconds: float | None
    best: float | None
    error: float
    note: str = ""

    @property
    def correct(self) -> bool:
        """Whether the test ratio is below its threshold (a NaN is not)."""
        return self.error < THRESHOLD

    @property
    def bytes_per_second(self) -> float | None:
        """Of the bytes that must be moved; of a copy, those read and written."""
        if self.seconds is None:
            return None
        moved = 2 * self.case.n**2 * self.case.dtype.itemsize if self.kind == "limit" else self.case.block_bytes
        return moved / self.seconds


class Checked(NamedTuple):
    """A contender with what it is timed on, and what came of the check."""

    contender: Contender
    blocks: int
    error: float
    note: str

    @property
    def right(self) -> bool:
        """Whether it may be timed."""
        return self.error < THRESHOLD


def check(contender: Contender, problem: Problem) -> Checked:
    """Choose the blocks and check the answer for all of them. A peer that cannot run here fails, and only itself."""
    try:
        blocks = contender.fitting(problem, clock_for(problem.device))
        with contender.around():
            error = problem.worst_ratio(contender.on(problem, blocks)())
    except Exception as failure:
        if contender.kind == "backend":
            raise
        return Checked(contender, 0, math.nan, f"failed: {type(failure).__name__}")
    note = "" if blocks == problem.case.batch else f"timed on {blocks:,} of {problem.case.batch:,} blocks, scaled"
    return Checked(contender, blocks, error, note if error < THRESHOLD else "wrong answer")


def measure(case: Case, device: torch.device, *, seconds: float, wanted: Wanted = everything) -> list[Row]:
    """Check every contender of a case on one problem, then time those that are right, and the copy, in turns.

    Args:
        case: what to compute. device: where. seconds: to spend on the timing, roughly.
        wanted: which contenders, by name.

    Returns:
        A row per contender, the backends first; on a GPU one of each backend that was replayed from a graph; and one
        of the copy.
    """
    problem = Problem(case, device)
    checked = [check(one, problem) for one in contenders(problem, wanted)]
    target = torch.empty_like(problem.a)
    timed = {COPY: Timed([functools.partial(target.copy_, problem.a)])}
    replays: list[tuple[Checked, str]] = []
    for one in checked:
        if one.right:
            name = one.contender.name
            timed[name] = Timed([one.contender.on(problem, one.blocks)], one.contender.around)
            if has_graphs(device) and one.contender.kind == "backend" and one.contender.whole:
                graph = captured(timed[name], device)
                replays.append((one, graph if isinstance(graph, str) else REPLAY))
                if isinstance(graph, Timed):
                    timed[f"{name}, {REPLAY}"] = graph
    timings = interleaved(timed, clock_for(device), seconds=seconds)

    def row(name: str, kind: str, blocks: int, error: float, note: str, way: str = "") -> Row:
        timing = timings.get(name + way)
        median, best = (timing.median / blocks, timing.best / blocks) if timing else (None, None)
        return Row(case, name, kind, blocks, median, best, error, note)

    rows = [row(x.contender.name, x.contender.kind, x.blocks, x.error, x.note) for x in checked]
    rows += [row(x.contender.name, "backend", x.blocks, x.error, note, f", {REPLAY}") for x, note in replays]
    return [*rows, row(COPY, "limit", case.batch, 0.0, "")]


def cases(device: torch.device, *, full: bool = False) -> list[Case]:
    """What `python -m secant bench --family blocks` measures: `SIZES`, or every n with `full`; `DOUBLE` in float64."""
    plan: Iterable[tuple[torch.dtype, Sequence[int]]] = (
        (torch.float32, EVERY_SIZE if full else SIZES),
        (torch.float64, DOUBLE),
    )
    return [
        Case(op, assume, n, batch_of(n, device), dtype) for dtype, sizes in plan for op, assume in KINDS for n in sizes
    ]


def small_cases() -> list[Case]:
    """A case of each kind that takes no time, to see that it runs."""
    return [
        Case(op, assume, n, 100 // n, dtype)
        for dtype, sizes in ((torch.float32, (3, 9)), (torch.float64, (3,)))
        for op, assume in KINDS
        for n in sizes
    ]
