"""What every backend of the `search` family must do: one call of a backend on a device, against the reference.

The machine is arithmetic of float64 rounded operation by operation, so that all of it is compared bit for bit: the
gradients and directions here are such that every order gives the same sum. Around every tensor lies memory that must
stay as it is.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from secant.kernels.search import contract, reference
from secant.kernels.search.contract import (
    BLIND,
    CONVERGED,
    ENDED,
    FLAGS,
    FRACTION,
    HIGH,
    KEPT_T,
    KEPT_VALUE,
    LAST,
    LOW,
    NFEV,
    NIT,
    NOISE,
    RUNNING,
    SIZE,
    SLOPE,
    STATUS,
    USED,
    VALUE,
    ZOOMS,
    Rule,
    Search,
    T,
)
from torch import Tensor

from secant.solvers import Trial, strong_wolfe

F32, F64 = torch.float32, torch.float64
PAD = 16  # entries around each tensor
POISON = 12345  # exact in every dtype
RULE = Rule(1e-4, 0.9, 1e-9, 25, 2.0**-52, 0.5, 0.0, 100, 100)


class Guarded:
    """Contiguous tensors between entries that nobody may touch."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device, self.around = device, []

    def __call__(self, x: Tensor) -> Tensor:
        """A copy."""
        memory = torch.full((x.numel() + 2 * PAD,), POISON, dtype=x.dtype, device=self.device)
        self.around.append(memory)
        return memory[PAD : PAD + x.numel()].view(x.shape).copy_(x)

    def check(self) -> None:
        for memory in self.around:
            assert bool((memory[:PAD] == POISON).all()), "memory before a tensor was written"
            assert bool((memory[-PAD:] == POISON).all()), "memory behind a tensor was written"


def bits(x: Tensor) -> Tensor:
    """What is compared: any NaN is one, and zeros have signs."""
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.nan, x)
        return x.contiguous().view(torch.int32 if x.dtype is F32 else torch.int64)
    return x


def assert_same(got: Tensor, want: Tensor, mask: Tensor | None, name: str) -> None:
    wrong = bits(got) != bits(want)
    if mask is not None:
        wrong &= mask
    where = wrong.nonzero()[:3].tolist()
    assert not where, f"{name}: {where}: {[(got[tuple(i)].item(), want[tuple(i)].item()) for i in where]}"


def call(
    backend: Any, name: str, search: Search, args: tuple[Any, ...], rows: Tensor | None, rule: Rule,
    device: str | torch.device = "cpu", **options: Any,
) -> Search:  # fmt: skip
    """A call on copies; what they became, on the CPU."""
    guard = Guarded(device)
    copies = Search(*map(guard, search))
    given = [guard(x) if isinstance(x, Tensor) else x for x in args]
    inputs = [copies.d, *(x for x in given if x is not None)]
    if name == "begin":  # scalars of any stride
        given = [x if x is None else torch.stack((x, x.new_full(x.shape, math.nan)), 1)[:, 0] for x in given]
    before = [x.clone() for x in inputs]
    getattr(backend, name)(copies, *given, None if rows is None else rows.to(device), rule, **options)
    guard.check()
    for x, old in zip(inputs, before, strict=True):
        assert_same(x.cpu(), old.cpu(), None, "an input")
    return Search(*(x.cpu() for x in copies))


def a_state(b: int, n: int, dtype: torch.dtype, seed: int) -> tuple[Search, tuple[Tensor, Tensor]]:
    """Searches in all phases, full of ties, and what their trials bring: some not finite, some rows stopped."""
    draw = torch.Generator().manual_seed(seed)

    def pick(values: list[float], *shape: int) -> Tensor:
        return torch.tensor(values, dtype=F64)[torch.randint(len(values), shape, generator=draw)]

    def eighths(*shape: int) -> Tensor:
        return torch.randint(-16, 17, shape, generator=draw, dtype=F64).to(dtype) / 8

    x, g, d, kept, trial = (eighths(b, n) for _ in range(5))
    numbers = torch.zeros(len(contract.NUMBERS), b, dtype=F64)
    numbers[VALUE] = pick([0.0, 1.0, 1.25, 3.0], b)
    numbers[SLOPE] = -pick([2.0**-60, 0.25, 1.0, 1.5, 8.0], b)
    ts = [0.125, 0.25, 0.3, 0.5, 0.75, 1.0, 2.0]
    for row in (T, LAST, LOW, HIGH):
        numbers[row] = pick(ts, b)
    for row in (LAST, LOW):
        numbers[row + 1], numbers[row + 2] = pick([0.0, 0.7, 1.0, 1.25, 3.0], b), pick([-2.0, -0.3, 0.0, 0.5], b)
    numbers[HIGH + 1] = pick([0.0, 1.0, 1.25, 3.1, math.inf], b)
    numbers[HIGH + 2] = torch.where(numbers[HIGH + 1] == math.inf, math.nan, pick([-2.0, -0.5, 0.0, 0.5, 2.0], b))
    numbers[FRACTION] = pick([1.0, 0.5, 0.125], b)
    numbers[SIZE] = pick([1.0, 2.0**-26, 1e-9], b)
    numbers[NOISE] = pick([0.0, 2.0**-52, 0.01, 0.5], b)
    numbers[KEPT_T] = pick([0.0, *ts], b)
    numbers[KEPT_VALUE] = pick([0.0, 0.9, 1.25], b)
    counts = torch.zeros(len(contract.COUNTS), b, dtype=torch.int32)
    counts[USED] = torch.randint(0, 26, (b,), generator=draw)
    counts[USED] = torch.where(pick([0, 1], b) == 1, counts[USED].clamp(max=2), counts[USED])
    counts[BLIND] = torch.randint(0, 7, (b,), generator=draw)
    counts[FLAGS] = torch.randint(0, 8, (b,), generator=draw)
    counts[USED] = torch.where((counts[FLAGS] & ZOOMS) != 0, counts[USED].clamp(min=1), counts[USED])
    counts[FLAGS] |= (ENDED * pick([0, 0, 0, 0, 1], b)).int()
    counts[STATUS] = pick([RUNNING] * 8 + [0, 4, 6], b).int()
    counts[NIT], counts[NFEV] = pick([0, 5, 99], b).int(), pick([1, 50, 99], b).int()
    step = pick([0.0, 1.0, 0.5], b)
    value = pick([-1.0, 0.0, 0.3, 0.9, 1.0, 1.0, 1.25, 1.25, 3.0, 5.0, math.nan, math.inf, -math.inf], b)
    grad = eighths(b, n)
    # Half of the slopes are one of a few, so that they tie, too.
    first = torch.arange(b)
    grad[::2] = 0.0
    d[::2, 0] = 1.0
    grad[::2, 0] = pick([-3.0, -0.5, -0.3, 0.0, 0.0625, 0.5, 2.0], len(first[::2])).to(dtype)
    grad[::37, -1] = math.nan
    grad[::41, 0] = math.inf
    return Search(x, g, d, kept, trial, step, numbers, counts), (value, grad)


def is_for(name: str, search: Search, rows: Tensor | None) -> Tensor:
    """The problems that a call is for."""
    b = len(search.x)
    asked = torch.ones(b, dtype=torch.bool)
    if rows is not None:
        asked[:] = False
        asked[rows[(rows >= 0) & (rows < b)]] = True
    ended = (search.counts[FLAGS] & ENDED) != 0
    return asked & (ended if name == "begin" else (search.counts[STATUS] == RUNNING) & ~ended)


def compare(name: str, before: Search, got: Search, want: Search, rows: Tensor | None) -> None:
    """All that has a meaning is the same, and all of the rows that the call is not for is as it was."""
    here = is_for(name, before, rows)
    for member, x, old in zip(Search._fields, got, before, strict=True):
        mask = ~here if member in ("numbers", "counts", "step") else ~here[:, None]
        assert_same(x, old, mask, f"{member} of others")
    for member in ("x", "g", "trial", "step"):
        x, y = getattr(got, member), getattr(want, member)
        assert_same(x, y, here[:, None] if x.dim() == 2 else here, member)
    flags, goes_on = want.counts[FLAGS], here & (want.counts[STATUS] == RUNNING)
    searching = goes_on & ((flags & ENDED) == 0)
    zooms = searching & ((flags & ZOOMS) != 0)
    assert_same(got.counts[FLAGS] & (ZOOMS | ENDED), flags & (ZOOMS | ENDED), here, "flags")
    for row, mask in ((USED, searching), (BLIND, zooms), (FLAGS, zooms), (STATUS, here), (NIT, here), (NFEV, here)):
        assert_same(got.counts[row], want.counts[row], mask, contract.COUNTS[row])
    kept = searching & (want.numbers[KEPT_T] > 0) & (want.counts[USED] > 0)
    meaningful = {VALUE: here, SLOPE: searching, T: searching, SIZE: searching, NOISE: searching, FRACTION: zooms}
    meaningful |= dict.fromkeys(range(LAST, LAST + 3), searching & ~zooms & (want.counts[USED] > 0))
    meaningful |= dict.fromkeys((*range(LOW, LOW + 3), *range(HIGH, HIGH + 3)), zooms)
    meaningful |= {KEPT_T: searching & (want.counts[USED] > 0), KEPT_VALUE: kept}
    assert set(meaningful) == set(range(len(contract.NUMBERS)))
    for row, mask in meaningful.items():
        assert_same(got.numbers[row], want.numbers[row], mask, contract.NUMBERS[row])
    assert_same(got.kept, want.kept, kept[:, None], "kept")


def advance(
    backend: Any, b: int, n: int, dtype: torch.dtype, seed: int = 0, rule: Rule = RULE, rows: Tensor | None = None,
    **options: Any,
) -> Search:  # fmt: skip
    """A step of searches in all phases."""
    before, (value, grad) = a_state(b, n, dtype, seed)
    given = (value, grad)
    if rows is not None:
        valid = rows.clamp(0, b - 1)
        given = (value[valid], grad[valid])
    want = call(reference, "advance", before, given, rows, rule)
    got = call(backend, "advance", before, given, rows, rule, **options)
    compare("advance", before, got, want, rows)
    return want


def begin(
    backend: Any, b: int, n: int, dtype: torch.dtype, seed: int = 0, rule: Rule = RULE, rows: Tensor | None = None,
    first: bool = False, **options: Any,
) -> Search:  # fmt: skip
    """Ends and new searches."""
    before, _ = a_state(b, n, dtype, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    before.counts[FLAGS] |= (torch.randint(0, 2, (b,), generator=draw) * ENDED).int()
    before.counts[STATUS] = torch.randint(-1, 6, (b,), generator=draw).int()
    values = torch.tensor([-1.0, -0.25, -1e-300, 0.0, 0.5, math.nan, -math.inf], dtype=F64)
    slope = values[torch.randint(len(values), (b,), generator=draw)]
    g_max = torch.tensor([0.0, 0.5, 0.6, math.nan], dtype=F64)[torch.randint(4, (b,), generator=draw)]
    t = torch.rand(b, generator=draw, dtype=F64) if first else None
    want = call(reference, "begin", before, (slope, g_max, t), rows, rule)
    got = call(backend, "begin", before, (slope, g_max, t), rows, rule, **options)
    compare("begin", before, got, want, rows)
    return want


def sizes(backend: Any, most: int = 1030, **options: Any) -> None:
    """Every tail of a register, one problem and one variable, and long rows."""
    for i, n in enumerate((1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 33, 64, 130, 1030)):
        for dtype in (F32, F64) if n <= most else ():
            advance(backend, 40 - 2 * i, n, dtype, seed=i, **options)
            begin(backend, 40 - 2 * i, n, dtype, seed=i, first=i % 2 == 0, **options)


def some_rows(backend: Any, **options: Any) -> None:
    """Of the rows asked for alone, in any order; numbers that are no places are passed over."""
    for rows in ([5, 3, 77, 0], [99], [-1, 4, 100, 2**40, -(2**62), 98]):
        places = torch.tensor(rows)
        advance(backend, 100, 6, F64, rows=places, **options)
        begin(backend, 100, 6, F64, rows=places, **options)


def limits(backend: Any, **options: Any) -> None:
    """Every status, and which of two overrides the other."""
    rule = RULE._replace(max_trials=3, ftol=0.25, max_iter=6, max_nfev=51)
    found = advance(backend, 3000, 3, F64, rule=rule, **options)
    assert set(range(-1, 5)) - {CONVERGED} <= set(found.counts[STATUS].tolist())
    advance(backend, 300, 3, F32, rule=rule._replace(max_trials=1, max_iter=2**62, max_nfev=0), **options)
    found = begin(backend, 3000, 3, F64, rule=rule, **options)
    assert set(range(-1, 6)) <= set(found.counts[STATUS].tolist())


def long_slopes(backend: Any, device: str | torch.device = "cpu", n: int = 5000, **options: Any) -> None:
    """Of many terms: n u |g| |d| from the exact sum (Higham, Accuracy and Stability, 3.5)."""
    for dtype in (F32, F64):
        b = 9
        before, _ = a_state(b, n, dtype, 3)
        draw = torch.Generator().manual_seed(4)
        grad, d = (torch.randn(b, n, generator=draw, dtype=F64).to(dtype) for _ in range(2))
        d = torch.where((grad * d).sum(1, keepdim=True) < 0, d, -d)
        # So far below the line that a search grows, and keeps the slope.
        before.numbers[VALUE], before.numbers[NOISE], before.numbers[SLOPE] = 0.0, 0.0, -1e-3
        before.counts[USED], before.counts[FLAGS], before.counts[STATUS] = 0, 0, RUNNING
        value = torch.full((b,), -1e9, dtype=F64)
        got = call(backend, "advance", before._replace(d=d), (value, grad), None, RULE, device, **options)
        pairs = zip(grad.tolist(), d.tolist(), strict=True)
        exact = [math.fsum(x * y for x, y in zip(*pair, strict=True)) for pair in pairs]
        bound = n * 2.0**-53 * (grad.double() * d.double()).abs().sum(1)
        assert bool((got.counts[FLAGS] == 0).all())
        assert bool(((got.numbers[LAST + 2] - torch.tensor(exact, dtype=F64)).abs() <= bound).all())


def neighbours(backend: Any, **options: Any) -> None:
    """A problem has the same bits wherever it stands, and alone."""
    draw = torch.Generator().manual_seed(7)
    for dtype in (F32, F64):
        before, (value, grad) = a_state(70, 11, dtype, 5)
        before = before._replace(d=torch.randn(70, 11, generator=draw, dtype=F64).to(dtype))
        whole = call(backend, "advance", before, (value, grad), None, RULE, **options)

        def some(search: Search, places: Tensor) -> Search:
            return Search(*(x[places] for x in search[:6]), *(x[:, places] for x in search[6:]))

        for places in (torch.randperm(70, generator=draw), torch.tensor([13]), torch.arange(20, 50)):
            got = call(backend, "advance", some(before, places), (value[places], grad[places]), None, RULE, **options)
            for member, x, y in zip(Search._fields, got, some(whole, places), strict=True):
                assert_same(x, y, None, member)


# ------------------------------------------------------------------------------ the steps of the generator

#: Functions of t: falling for ever, wells near and far, steep walls, infinite and undefined beyond, bumps, flat, noisy.
LINES = {
    "well at 3": lambda t: ((t - 3.0) ** 2, 2.0 * (t - 3.0)),
    "well at .01": lambda t: ((t - 0.01) ** 2, 2.0 * (t - 0.01)),
    "well at 1e4": lambda t: ((t - 1e4) ** 2, 2.0 * (t - 1e4)),
    "quartic": lambda t: ((t - 2.0) ** 4 - t, 4.0 * (t - 2.0) ** 3 - 1.0),
    "for ever": lambda t: (-t, -1.0),
    "exponential": lambda t: (math.exp(-t), -math.exp(-t)),
    "sine": lambda t: (-math.sin(t), -math.cos(t)),
    "fast sine": lambda t: (-math.sin(30.0 * t) - 0.1 * t, -30.0 * math.cos(30.0 * t) - 0.1),
    "wall": lambda t: (-t + math.exp(40.0 * (t - 1.0)) if t < 18.0 else math.inf,
                       -1.0 + 40.0 * math.exp(40.0 * (t - 1.0)) if t < 18.0 else math.inf),
    "infinite beyond .3": lambda t: ((t - 1.0) ** 2, 2.0 * (t - 1.0)) if t < 0.3 else (math.inf, math.inf),
    "undefined beyond 2": lambda t: ((t - 5.0) ** 2, 2.0 * (t - 5.0)) if t < 2.0 else (math.nan, math.nan),
    "undefined everywhere": lambda t: (1.0, -1.0) if t == 0.0 else (math.nan, math.nan),
    "up at once": lambda t: (t - 1e-9 * t, 1.0) if t > 0.0 else (0.0, -1.0),
    "steps": lambda t: (round(10.0 * (t - 0.7) ** 2) / 10.0, 2.0 * (t - 0.7)),
    "far below rounding": lambda t: (1.0 - 1e-20 * t, -1e-20 * (1.0 - t)),
    "same everywhere": lambda t: (1.0, -1e-18),
    "a kink": lambda t: (abs(t - 0.4), -1.0 if t < 0.4 else 1.0),
}  # fmt: skip
#: noise, first trial, trials allowed, size.
SETTINGS = list(itertools.product((0.0, 1e-16, 1e-3), (1.0, 1e-3, 50.0), (1, 2, 4, 25), (1.0, 1e-8)))


def alone(line: Any, t: float, **options: Any) -> tuple[list[float], float]:
    """Run the generator; return the ts that were tried, and what it chose."""
    trial = lambda t: Trial(t, *line(t))  # noqa: E731
    search, tried = strong_wolfe(trial(0.0), trial(t), **options), [t]
    try:
        wanted = next(search)
        while True:
            tried.append(wanted[0])
            wanted = search.send(trial(wanted[0]))
    except StopIteration as end:
        return tried, end.value.trial.t


def begun(backend: Any, at: Tensor, ts: Tensor, rule: Rule, device: str | torch.device = "cpu") -> Search:
    """Searches along d = 1 from x = 0; `at` has values and slopes."""
    b = len(at)
    x = torch.zeros(b, 1, dtype=F64, device=device)
    numbers = torch.zeros(len(contract.NUMBERS), b, dtype=F64, device=device)
    counts = torch.zeros(len(contract.COUNTS), b, dtype=torch.int32, device=device)
    numbers[VALUE], counts[STATUS], counts[FLAGS] = at[:, 0].to(device), RUNNING, ENDED
    step = torch.zeros(b, dtype=F64, device=device)
    search = Search(x, x.clone(), torch.ones_like(x), x.clone(), x.clone(), step, numbers, counts)
    slope = at[:, 1].to(device)
    backend.begin(search, slope, slope.abs(), ts.to(device), None, rule)
    return search


def together(
    backend: Any, lines: list[Any], ts: list[float], *, size: float, noise: float, rule: Rule, device: Any = "cpu"
) -> list[tuple[list[float], float]]:
    """Run the machine on all lines until the last is done; what has ended is tried on, and must not matter."""
    at = torch.tensor([line(0.0) for line in lines], dtype=F64)
    search = begun(backend, at, torch.tensor(ts, dtype=F64), rule, device)
    search.numbers[SIZE], search.numbers[NOISE] = size, noise
    tried: list[list[float]] = [[] for _ in lines]
    chosen: list[float | None] = [None] * len(lines)
    for _ in range(60):
        now = search.numbers[T].tolist()
        values = torch.tensor([line(t) for line, t in zip(lines, now, strict=True)], dtype=F64)
        backend.advance(search, values[:, 0].contiguous().to(device), values[:, 1:].contiguous().to(device), None, rule)
        for i, (t, flags) in enumerate(zip(now, search.counts[FLAGS].tolist(), strict=True)):
            if chosen[i] is None:
                tried[i].append(t)
                if flags & ENDED:
                    chosen[i] = float(search.step[i])
        if None not in chosen:
            assert search.x.flatten().tolist() == chosen
            return list(zip(tried, chosen, strict=True))
    raise AssertionError("a search does not end")


def steps_of_the_generator(backend: Any, settings: Any = SETTINGS, **options: Any) -> None:
    """Each problem of a batch makes the trials of `strong_wolfe`, to the last bit, and ends where it ends."""
    for noise, first, limit, size in settings:
        rule = RULE._replace(max_trials=limit, max_iter=1000, max_nfev=1000)
        lines, ts = list(LINES.values()), [first] * len(LINES)
        found = together(backend, lines, ts, size=size, noise=noise, rule=rule, **options)
        for (name, line), got in zip(LINES.items(), found, strict=True):
            want = alone(line, first, size=size, noise=noise, max_evaluations=limit)
            assert got == want, (name, noise, first, limit, size)


def random_lines(backend: Any, count: int = 400, **options: Any) -> None:
    """Polynomials with many turns, first trials of all lengths."""
    draw = torch.Generator().manual_seed(5)
    coefs = torch.randn(count, 7, generator=draw, dtype=F64)
    coefs[:, 1] = -coefs[:, 1].abs() - 1e-3
    lines = []
    for c in coefs.tolist():

        def line(t: float, c: Any = c) -> tuple[float, float]:
            return sum(x * t**i for i, x in enumerate(c)), sum(i * x * t ** (i - 1) for i, x in enumerate(c) if i)

        lines.append(line)
    ts = (10.0 ** (4.0 * torch.rand(count, generator=draw, dtype=F64) - 3.0)).tolist()
    for c2 in (0.1, 0.9):
        for noise in (0.0, 1e-12):
            rule = RULE._replace(c2=c2, max_iter=1000, max_nfev=1000)
            found = together(backend, lines, ts, size=1.0, noise=noise, rule=rule, **options)
            for i, line in enumerate(lines):
                assert found[i] == alone(line, ts[i], noise=noise, c2=c2), (i, c2, noise)
