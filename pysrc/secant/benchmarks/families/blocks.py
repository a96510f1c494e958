"""Cases of the `blocks` family: batches of small matrices, inverted, solved with, decomposed.

The yardstick is a copy of the batch, `out.copy_(a)`, in turns with the rest. An answer is right when LAPACK's test
ratios of it, computed in float64 over all blocks that are timed, stay below the threshold of LAPACK's own test
programs: 30, with the machine epsilon of the dtype in the denominator.

References:
    Blackford and Dongarra, Installation Guide for LAPACK, LAPACK Working Note 41: the ratios of xPOT03 (inverse),
    xGET02 (solution) and xDRVST (eigenvectors).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import secant
from secant.benchmarks import machine
from secant.benchmarks.case import (
    Around,
    Bar,
    Check,
    Contender,
    Row,
    around,
    dtype_name,
    serving,
    speed_bar,
)
from secant.benchmarks.case import Case as Base
from secant.benchmarks.families import Family
from secant.benchmarks.timing import Timed

#: Elements of a batch: n^2 times the number of blocks. On a GPU more than its cache holds.
ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
#: Where the batches of a CPU lie that are chosen by its last-level cache: their bytes over those of the cache. What is
#: computed from a batch is as large again.
HELD = {"cache": 1 / 8, "memory": 4.0}
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
#: Sizes of the batches that are chosen by the cache.
SMALL_SIZES = tuple(range(1, 17))
#: Rows and number of the blocks of small batches, and how many times faster than torch.linalg.eigh they have to be.
FEW = {(64, 1): 1.0, (64, 4): 2.0, (64, 32): 2.0, (32, 1): 1.0, (32, 8): 3.0}
#: Bound on LAPACK's test ratios, from the input of its tests of linear equations; taken for eigenvectors too.
THRESHOLD = 30.0
#: Elements that are checked at a time.
CHECKED = 1 << 20
#: Name of the row that says how long a copy of the batch takes.
COPY = "copy"

Answer = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Case(Base):
    """Op and assumption of `KINDS`; `batch` blocks of n rows; held: of `HELD`, for a batch chosen by the cache.

    few: whether the batch is one of so few blocks that their number is part of the name.
    """

    assume: str
    n: int
    batch: int
    dtype: torch.dtype = torch.float32
    held: str = ""
    few: bool = False

    UNIT = "block"
    KIND = ("op", "assume")
    LIMIT = COPY
    LIMITS = "copies"

    @property
    def title(self) -> str:
        """Name op, assumption and n."""
        kind = self.op if self.assume == "symmetric" else f"{self.op}, {self.assume}"
        return f"{kind}, n = {self.n}"

    @property
    def label(self) -> str:
        """Add the dtype, and where the batch lies."""
        batch = f", batch in {self.held}" if self.held else ""
        if self.few:
            batch = f", {self.batch} block" + "s" * (self.batch > 1)
        return f"{self.title}, {dtype_name(self.dtype)}{batch}"

    @property
    def series(self) -> tuple[str, int] | None:
        """Join each kind in float32."""
        if self.dtype is not torch.float32 or self.held or self.few:
            return None
        return self.title.rpartition(",")[0], self.n

    @property
    def function(self) -> str:
        """Return the function of the contract that computes it."""
        return self.op.removeprefix("block_")

    @property
    def units(self) -> int:
        """Count the blocks."""
        return self.batch

    @property
    def nbytes(self) -> int:
        """Count a block and its results once, the code of `info` (int32)."""
        elements = {"block_inv": 2 * self.n**2, "block_solve": self.n**2 + 2 * self.n}
        return elements.get(self.op, 2 * self.n**2 + self.n) * self.dtype.itemsize + 4

    @property
    def limit_bytes(self) -> int:
        """Count a block, read and written."""
        return 2 * self.n**2 * self.dtype.itemsize

    @property
    def flops(self) -> float:
        """Count LAPACK's algorithms for a block, the leading terms; backends may need more or less.

        Cholesky n^3 / 3, LU 2 n^3 / 3, the inverse from them twice as much again, triangular solves 2 n^2; eigenvectors
        9 n^3 (Golub and Van Loan, Matrix Computations, 4th ed., section 8.3).
        """
        if self.op == "block_eigh":
            return 9.0 * self.n**3
        factor = self.n**3 / 3 * (1 if self.assume == "spd" else 2)
        return 3 * factor if self.op == "block_inv" else factor + 2 * self.n**2

    def serving(self, device: torch.device) -> list[str]:
        """List the backends that can serve it, the one that `auto` takes first."""
        return serving("blocks", device, self.dtype, large=False)

    def problem(self, device: torch.device, seed: int = 0) -> Problem:
        """Make random blocks."""
        return Problem(self, device, seed)

    def names(self, device: torch.device) -> list[str]:
        """List every backend, then what torch and the libraries of CUDA have."""
        return [*self.serving(device), *peers(self, device)]

    def contender(self, problem: Problem, name: str) -> Contender:
        """Prepare the one of this name; a slow one on a part of the blocks."""
        names = self.serving(problem.device)
        if name not in names:
            return contender(problem, name, "peer", peers(self, problem.device)[name])
        compute = _ours(self, torch.empty_like(problem.b if self.op == "block_solve" else problem.a))
        return contender(problem, name, "backend", compute, name != "reference", around(name, names))

    def judge(self, problem: Problem, contender: Contender, answer: Answer) -> Check:
        """Take the largest test ratio."""
        return Check(problem.worst_ratio(answer), THRESHOLD)

    def limit(self, problem: Problem) -> Callable[[], Tensor]:
        """Copy the batch."""
        return functools.partial(torch.empty_like(problem.a).copy_, problem.a)


def contender(
    problem: Problem,
    name: str,
    kind: str,
    compute: Compute,
    whole: bool = False,
    chosen: Around = contextlib.nullcontext,
) -> Contender:
    """Make one way to compute a case, on all blocks, however long that takes (`whole`), or on some."""
    batch = problem.case.batch

    def on(blocks: int) -> Callable[[], Answer]:
        return functools.partial(compute, problem.a[:blocks], problem.b[:blocks])

    capturable = kind == "backend" and whole
    part = None if whole else on
    return Contender(problem.case, name, kind, Timed([on(batch)], chosen), on(batch), capturable, batch, part)


def batch_of(n: int, device: torch.device, held: str = "", dtype: torch.dtype = torch.float32) -> int:
    """Count the blocks of n rows that have `ELEMENTS` elements together, or as many bytes as `HELD` says."""
    elements = int(HELD[held] * machine.last_level_cache() / dtype.itemsize) if held else ELEMENTS[device.type]
    return elements // n**2


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
        """Find the largest test ratio of the answer for the first blocks; NaN when it has one, or a code is not 0.

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
    """Compute ||I - A X||_1 / (n ||A||_1 ||X||_1)."""
    return _norm1(_eye(a) - a @ x) / (a.shape[-1] * _norm1(a) * _norm1(x))


def _solution_ratio(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Compute ||b - A x||_1 / (||A||_1 ||x||_1)."""
    return (b - (a @ x.unsqueeze(-1)).squeeze(-1)).abs().sum(-1) / (_norm1(a) * x.abs().sum(-1))


def _eigen_ratio(a: Tensor, b: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Take the larger of ||A - V W V^T||_1 / (n ||A||_1) and ||I - V^T V||_1 / n; NaN where w does not ascend."""
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
    """Make zeros for a peer that raises, or says nothing, instead of returning codes; they take up no memory."""
    return torch.zeros((), dtype=torch.int32, device=a.device).expand(len(a))


@functools.cache
def _cublas() -> ctypes.CDLL:
    """Load the cuBLAS that torch has loaded."""
    torch.cuda.current_blas_handle()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return ctypes.CDLL(next(line.split()[-1] for line in lines if "/libcublas.so" in line))


def _cublas_inverse(a: Tensor, b: Tensor) -> Answer:
    """Call matinvBatched of cuBLAS (n up to 32). It inverts the transpose of what lies in memory."""
    x, info = torch.empty_like(a), torch.empty(len(a), dtype=torch.int32, device=a.device)
    first = torch.arange(len(a), device=a.device) * (a.stride(0) * a.element_size())
    sources, targets = first + a.data_ptr(), first + x.data_ptr()
    invert = getattr(_cublas(), "cublasDmatinvBatched" if a.dtype is torch.float64 else "cublasSmatinvBatched")
    handle, n = torch.cuda.current_blas_handle(), a.shape[-1]  # in the current stream
    source, target, code = (ctypes.c_void_p(y.data_ptr()) for y in (sources, targets, info))
    status = invert(ctypes.c_void_p(handle), n, source, n, target, n, code, len(a))
    if status:
        raise RuntimeError(f"cuBLAS: status {status}")
    return x, info


def _cupy_inverse(a: Tensor, b: Tensor) -> Answer:
    cupy: Any = importlib.import_module("cupy")
    with cupy.cuda.ExternalStream(torch.cuda.current_stream(a.device).cuda_stream, a.device.index):
        return torch.from_dlpack(cupy.linalg.inv(cupy.from_dlpack(a))), _no_codes(a)


def peers(case: Case, device: torch.device) -> dict[str, Compute]:
    """List what computes the same elsewhere, by name."""
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
    if device.type == "cuda":
        if case.n <= 32:
            found["matinvBatched"] = _cublas_inverse
        if importlib.util.find_spec("cupy") is not None:
            found["cupy"] = _cupy_inverse
    return found


def _ours(case: Case, out: Tensor) -> Compute:
    """Make the call as its user does in a loop, with the result in a buffer where there is an `out`."""
    if case.op == "block_inv":
        return lambda a, b: secant.ops.block_inv(a, assume=case.assume, out=out[: len(a)])
    if case.op == "block_solve":
        return lambda a, b: secant.ops.block_solve(a, b, assume=case.assume, out=out[: len(a)])
    return lambda a, b: secant.ops.block_eigh(a)


def groups(device: torch.device, *, quick: bool = False, full: bool = False) -> list[Sequence[Base]]:
    """List what `python -m secant bench` measures, a case after the other: `SIZES`; `DOUBLE` in float64.

    With `full` every n, and on a CPU the inverse of small blocks with the batch inside and outside of its last-level
    cache.
    """
    if quick:
        return [[case] for case in small_cases()]
    cpu = device.type == "cpu"
    held, few = held_cases() if full and cpu else [], few_cases() if cpu else []
    return [[case] for case in (*cases(device, full=full), *few, *held)]


def cases(device: torch.device, *, full: bool = False) -> list[Case]:
    """List the cases of `groups` with batches of `ELEMENTS`."""
    measured: Iterable[tuple[torch.dtype, Sequence[int]]] = (
        (torch.float32, EVERY_SIZE if full else SIZES),
        (torch.float64, DOUBLE),
    )
    return [
        Case(op, assume, n, batch_of(n, device), dtype)
        for dtype, sizes in measured
        for op, assume in KINDS
        for n in sizes
    ]


def held_cases() -> list[Case]:
    """List inverses of SPD blocks, the batch inside and outside of the last-level cache of a CPU."""
    cpu = torch.device("cpu")
    return [Case("block_inv", "spd", n, batch_of(n, cpu, held), held=held) for n in SMALL_SIZES for held in HELD]


def few_cases() -> list[Case]:
    """List eigenproblems of so few blocks that each has to be fast by itself, as optimizers ask for."""
    return [
        Case("block_eigh", "symmetric", n, batch, dtype, few=True)
        for dtype in (torch.float32, torch.float64)
        for n, batch in FEW
    ]


def small_cases() -> list[Case]:
    """List a case of each kind that takes no time, to see that it runs."""
    return [
        Case(op, assume, n, 100 // n, dtype)
        for dtype, sizes in ((torch.float32, (3, 9)), (torch.float64, (3,)))
        for op, assume in KINDS
        for n in sizes
    ]


class Goal(NamedTuple):
    """Times faster than the fastest of some peers, at least; or against the copy, the most copies that it may take.

    sizes: the n for which it holds. float64 has to be half as good.
    """

    op: str
    assume: tuple[str, ...]
    sizes: Sequence[int]
    against: tuple[str, ...]
    factor: float

    def target(self, dtype: torch.dtype) -> float:
        """Return the factor for a dtype."""
        half = 2 if self.against == (COPY,) else 1 / 2
        return self.factor * (half if dtype is torch.float64 else 1)


_SPD, _GENERAL, _ANY = ("spd",), ("general",), ("spd", "general")
_INVERSES, _SOLVE, _EIGH = ("inv_ex", "cholesky"), ("solve_ex",), ("eigh",)

#: For two cores with AVX2.
CPU_GOALS = (
    Goal("block_inv", _SPD, (2, 3), _INVERSES, 25.0),
    Goal("block_inv", _SPD, (4,), _INVERSES, 12.0),
    Goal("block_inv", _SPD, range(5, 9), _INVERSES, 9.0),
    Goal("block_inv", _SPD, range(9, 17), _INVERSES, 14.0),
    Goal("block_inv", _SPD, (24, 32), _INVERSES, 10.0),
    Goal("block_inv", _SPD, (48, 64), _INVERSES, 5.0),
    Goal("block_inv", _SPD, range(2, 17), (COPY,), 2.5),
    Goal("block_inv", _SPD, (32,), (COPY,), 4.0),
    Goal("block_inv", _GENERAL, range(3, 10), ("inv_ex",), 10.0),
    Goal("block_inv", _GENERAL, (16,), ("inv_ex",), 8.0),
    Goal("block_inv", _GENERAL, (32,), ("inv_ex",), 6.0),
    Goal("block_solve", _ANY, range(3, 17), _SOLVE, 10.0),
    Goal("block_eigh", ("symmetric",), (3, 6, 9), _EIGH, 10.0),
    Goal("block_eigh", ("symmetric",), (16, 32), _EIGH, 4.0),
)
#: For an H100. Copies are what a share of the copy bandwidth comes to: 60% and 35%.
_GPU_INVERSES = (*_INVERSES, "matinvBatched", "cupy")
GPU_GOALS = (
    Goal("block_inv", _SPD, range(1, 17), (COPY,), 1 / 0.6),
    Goal("block_inv", _SPD, range(17, 33), (COPY,), 1 / 0.35),
    Goal("block_inv", _ANY, range(1, 65), _GPU_INVERSES, 3.0),
    Goal("block_eigh", ("symmetric",), range(1, 65), _EIGH, 5.0),
)


#: For batches of few blocks on two cores, the same for both dtypes.
FEW_GOALS = {key: Goal("block_eigh", ("symmetric",), (key[0],), _EIGH, factor) for key, factor in FEW.items()}
#: For batches that are chosen by the cache, which is what they differ in.
HELD_GOALS = (Goal("block_inv", _SPD, SMALL_SIZES, (COPY,), 2.5),)


def goals(case: Case, device: torch.device) -> list[Goal]:
    """List the bars that hold for a case; none for a batch of another size than theirs."""
    if case.few:
        return [FEW_GOALS[case.n, case.batch]]
    if case.batch != batch_of(case.n, device, case.held, case.dtype):
        return []
    table = HELD_GOALS if case.held else GPU_GOALS if device.type == "cuda" else CPU_GOALS
    return [goal for goal in table if goal.op == case.op and case.assume in goal.assume and case.n in goal.sizes]


def bars(rows: Sequence[Row], device: torch.device, bandwidth: float = 0.0) -> list[Bar]:
    """List every bar that holds for a measured case, against the fastest of its peers or the copy."""
    cases = dict.fromkeys(row.case for row in rows)
    of = ((case, goal) for case in cases for goal in goals(case, device))
    return [
        speed_bar(rows, case, goal.against, goal.factor if case.few else goal.target(case.dtype)) for case, goal in of
    ]


FAMILY = Family("Blocks", 0.4, groups, bars)
