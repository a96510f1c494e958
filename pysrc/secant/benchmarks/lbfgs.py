"""Cases of the `lbfgs` family: every backend and every peer on the same pairs, checked before they are timed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import secant
from secant.benchmarks import choice, machine, peers
from secant.benchmarks.timing import REPLAY, Timed, captured, clock_for, interleaved

#: Largest history that the reference, which widens all of it to float64 several times over, is asked to handle.
REFERENCE_ELEMENTS = 1 << 25
#: Columns of random numbers; longer vectors repeat them.
PERIOD = 1 << 20
#: Copies of the input that take turns on a GPU, at most: histories from 0.8 MB on outgrow a cache of 50 MB twice.
MAX_COPIES = 128
#: Name of the row that says how long reading the history twice takes.
LIMIT = "two reads of the history"
#: Unknowns and pairs of the problems of which other projects publish figures (`bench/published`): 3 an atom.
PUBLISHED, PUBLISHED_PAIRS = (3 * 10**4, 3 * 10**5, 3 * 10**6), 6

Call = Callable[[], Tensor]


class Case(NamedTuple):
    """What is computed: op "two_loop", "direction" or "step"; batch 0 means a flat problem."""

    op: str
    n: int
    m: int = 10
    batch: int = 0
    dtype: torch.dtype = torch.float32
    storage: torch.dtype = torch.float32

    @property
    def function(self) -> str:
        """The function of the contract that computes it."""
        return "two_loop" if self.op == "two_loop" else "update"

    @property
    def history_bytes(self) -> int:
        """Of s and y together."""
        return 2 * max(self.batch, 1) * self.m * self.n * self.storage.itemsize

    @property
    def nbytes(self) -> int:
        """What must be moved: the history twice, every vector once (g, d; in a step g, g_prev twice, d twice)."""
        vectors = max(self.batch, 1) * self.n
        if self.op == "step":  # which also writes a pair
            return 2 * self.history_bytes + vectors * (5 * self.dtype.itemsize + 2 * self.storage.itemsize)
        return 2 * self.history_bytes + vectors * 2 * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Operations of the recursion as it is defined, sums and products apart; backends may need more.

        Of each pair two dot products and two additions of a multiple, 8 n, and n to scale. From pairs alone also s.y of
        each and y.y of one, 2 n each; in a step s, y and three products of the new pair, 8 n.
        """
        extra = {"two_loop": 2 * self.m + 2, "direction": 0, "step": 8}[self.op]
        return max(self.batch, 1) * self.n * (8 * self.m + 1 + extra)

    @property
    def shape(self) -> str:
        """For tables."""
        return (f"{self.batch:,} x " if self.batch else "") + f"{self.n:,}"


class Problem:
    """A gradient and pairs of a quadratic with a diagonal Hessian, eigenvalues log-uniform in [1/2, 2].

    g (n,) or (B, n); s, y (m, n) or (B, m, n), oldest first, along random steps. Beyond `PERIOD` columns repeat, so the
    exact direction is known from one period.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lead, period = ((case.batch,) if case.batch else ()), min(case.n, PERIOD)
        noise = torch.randn(*lead, case.m + 1, period, generator=generator, dtype=case.dtype).to(device)
        hessian = 4.0 ** (torch.rand(period, generator=generator, dtype=case.dtype).to(device) - 0.5)
        steps = noise[..., : case.m, :]
        self.g, self.s, self.y = (_repeated(x, case.n) for x in (noise[..., case.m, :], steps, steps * hessian))
        self.case, self.device = case, device
        self._exact: dict[tuple[torch.dtype, bool], peers.Exact] = {}

    @functools.cached_property
    def probe(self) -> tuple[Tensor, Tensor]:
        """(g_prev, d) from which a step with t = 2 to g offers the oldest pair once more."""
        return self.g - self.y.select(-2, 0), self.s.select(-2, 0) / 2

    def exact(self, storage: torch.dtype, *, stepped: bool) -> peers.Exact:
        """The direction from pairs rounded to `storage`; `stepped`: after the step of `probe`."""
        key = (storage, stepped)
        if key not in self._exact:
            g, prev_grad = self.g[..., :PERIOD], self.probe[0][..., :PERIOD]
            s, y = (list(x[..., :PERIOD].unbind(-2)) for x in (self.s, self.y))
            if stepped:  # g - (g - y) is not y: what a step sees is what it subtracts
                s, y = [*s[1:], s[0]], [*y[1:], g - prev_grad]
            weight = torch.full((g.shape[-1],), self.case.n // g.shape[-1], dtype=torch.float64, device=self.device)
            weight[: self.case.n % g.shape[-1]] += 1
            d, amplification = peers.exact(g, s, y, storage=storage, weight=weight)
            self._exact[key] = peers.Exact(_repeated(d, self.case.n), amplification)
        return self._exact[key]


def _repeated(x: Tensor, n: int) -> Tensor:
    """The last dimension repeated to length n."""
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    for piece in out.split(x.shape[-1], dim=-1):
        piece.copy_(x[..., : piece.shape[-1]])
    return out


class Check(NamedTuple):
    """Relative error of an answer against float64, the largest of a batch; the bound on it; what failed, if any."""

    error: float
    bound: float
    failure: str = ""

    @property
    def excess(self) -> float:
        """Error over bound, at most 1 if the answer is right. A NaN is further off than anything."""
        return math.inf if math.isnan(self.error) else self.error / self.bound


class Contender(NamedTuple):
    """One way to compute a case.

    kind: "backend" or "peer". timed: the calls. probe: one call whose answer is known.
    """

    case: Case
    name: str
    kind: str
    timed: Timed
    probe: Call
    capturable: bool = True

    def check(self, problem: Problem) -> Check:
        """Make the probe. A peer that cannot run here (torch.compile without a compiler) fails, and only itself."""
        case, backend = self.case, self.kind == "backend"
        # A peer keeps its pairs in the dtype of the vectors, and sums n products in it: an error of sqrt(n) u with high
        # probability (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). Backends sum in float64.
        storage = case.storage if backend else case.dtype
        dots = 0.0 if backend else math.sqrt(case.n) * torch.finfo(case.dtype).eps / 2
        try:
            with self.timed.around():
                got = self.probe().double()
        except Exception as failure:
            if backend:
                raise
            return Check(math.nan, math.nan, f"failed: {type(failure).__name__}")
        want, amplification = problem.exact(storage, stepped=case.op == "step")
        norm = functools.partial(torch.linalg.vector_norm, dim=-1)
        error = float((norm(got - want) / norm(want)).max())
        return Check(error, peers.tolerance(case.m, amplification, case.dtype, dots))


def serving(case: Case, device: torch.device) -> list[str]:
    """The backends that can serve a case, the one that `auto` takes first."""
    names = choice.serving("lbfgs", device, case.dtype, case.function, case.n)
    large = case.history_bytes // case.storage.itemsize > REFERENCE_ELEMENTS
    return [name for name in names if not (large and name == "reference")]


def _backend(case: Case, problem: Problem, name: str, names: Sequence[str]) -> Contender:
    around = choice.around(name, names)
    with around():
        calls, probe = _two_loop_calls(case, problem) if case.op == "two_loop" else _history_calls(case, problem)
    return Contender(case, name, "backend", Timed(calls, around), probe)


def _two_loop_calls(case: Case, problem: Problem) -> tuple[list[Call], Call]:
    s, y = problem.s.to(case.storage), problem.y.to(case.storage)
    call = functools.partial(secant.ops.two_loop, problem.g, s, y, out=torch.empty_like(problem.g))
    return [call], call


def _history_calls(case: Case, problem: Problem) -> tuple[list[Call], Call]:
    history = secant.LBFGSHistory(
        case.n,
        case.m,
        batch=case.batch or None,
        dtype=case.dtype,
        device=problem.device,
        storage_dtype=case.storage,
    )
    for s, y in zip(problem.s.unbind(-2), problem.y.unbind(-2), strict=True):
        history.append(s, y)
    if case.op == "direction":
        call = functools.partial(history.direction, problem.g, out=torch.empty_like(problem.g))
        return [call], call

    def step(grad: Tensor, prev_grad: Tensor, direction: Tensor) -> Tensor:
        history.step(grad, prev_grad, direction, 2.0)
        return direction

    return _step_calls(problem, step)


def _step_calls(problem: Problem, step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[list[Call], Call]:
    """Two calls of `step(grad, prev_grad, direction)` (t = 2, returns the next) that can go round for ever; the probe.

    Gradients are g, -g, g, ... From g_prev = -g and d.g > 0 come y = 2 g and s = 2 d: the pair is accepted. The next
    direction satisfies H y = s, so it is -H g = -s / 2 = -d, and the next pair is (-s, -y): numbers stay as they are.
    """
    g = problem.g
    minus, prev_grad, direction = -g, -g, g.clone()

    def turn(grad: Tensor) -> Tensor:
        nonlocal direction
        direction = step(grad, prev_grad, direction)
        return direction

    def probe() -> Tensor:
        return step(g, *(x.clone() for x in problem.probe))

    return [functools.partial(turn, g), functools.partial(turn, minus)], probe


def _peer(case: Case, problem: Problem, name: str) -> Contender:
    if name != "eager":
        call = _stateless_peer(case, problem, name)
        return Contender(case, name, "peer", Timed([call]), call)
    history = peers.EagerHistory(problem.s, problem.y)
    if case.op == "step":
        calls, probe = _step_calls(problem, functools.partial(history.step, t=2.0))
    else:
        probe = functools.partial(history.direction, problem.g)
        calls = [probe]
    return Contender(case, name, "peer", Timed(calls), probe, capturable=False)


def _stateless_peer(case: Case, problem: Problem, name: str) -> Call:
    g, s, y = problem.g, problem.s, problem.y
    if name == "compact":
        if case.op == "two_loop":
            return functools.partial(peers.compact_from_pairs, g, s, y)
        return functools.partial(peers.compact, g, s, y, *peers.gram(s, y))
    function = peers.two_loop_bmm if name == "eager bmm" else peers.compiled()
    sy, yy = (s * y).sum(-1), (y[..., -1, :] ** 2).sum(-1)
    return functools.partial(function, g, s, y, 1.0 / sy, sy[..., -1] / yy)


def peer_names(case: Case) -> list[str]:
    """The loop of torch.optim.LBFGS (by bmm for a batch), its compiled version, and the compact representation."""
    if case.storage != case.dtype or (case.op == "step" and case.batch):
        return []
    return ["eager"] if case.op == "step" else ["eager bmm" if case.batch else "eager", "compiled", "compact"]


Wanted = Callable[[Case, str], bool]


def everything(case: Case, name: str) -> bool:
    """Every contender is wanted."""
    return True


def contenders(case: Case, problem: Problem, wanted: Wanted = everything) -> list[Contender]:
    """Every backend that serves the case, what `auto` takes first, then every peer, on one input."""
    names = serving(case, problem.device)
    own = [_backend(case, problem, name, names) for name in names if wanted(case, name)]
    return own + [_peer(case, problem, name) for name in peer_names(case) if wanted(case, name)]


class Row(NamedTuple):
    """One line of the results. Times are None when the answer was wrong: a wrong answer has no speed.

    kind: "backend", "peer" or "limit". seconds: median; best: shortest sample. error: relative, against float64.
    """

    case: Case
    name: str
    kind: str
    seconds: float | None
    best: float | None
    error: float
    tolerance: float
    note: str = ""

    @property
    def correct(self) -> bool:
        """Whether the error is within its bound (a NaN is not)."""
        return self.error <= self.tolerance

    @property
    def bytes_per_second(self) -> float | None:
        """Of the bytes that must be moved."""
        return None if self.seconds is None else self.case.nbytes / self.seconds


def measure(
    cases: Sequence[Case],
    device: torch.device,
    *,
    seconds: float,
    wanted: Wanted = everything,
    graph: bool = False,
    limit: bool = False,
) -> list[Row]:
    """Check some cases on one problem, then time them all in turns.

    Args:
        cases: what to compute; all of the same n, m, batch and dtype.
        device: where.
        seconds: to spend on the timing, roughly.
        wanted: which contenders of which case, by name.
        graph: replay CUDA graphs of those that can be captured; the device is a GPU.
        limit: on a CPU, time two reads of the history in turn with the rest.

    Returns:
        A row per case and contender, of each case the backends first.

    Raises:
        ValueError: the cases differ in more than op and storage.
    """
    if len({case._replace(op="", storage=torch.float32) for case in cases}) != 1:
        raise ValueError(f"measure: cases: expected one n, m, batch and dtype, got {list(cases)}")
    problems = [Problem(cases[0], device, seed) for seed in range(_copies(cases[0], device))]
    built = [[c for case in cases for c in contenders(case, problem, wanted)] for problem in problems]
    groups = list(zip(*built, strict=True))
    checks, notes = [], dict[tuple[Case, str], str]()
    timed: dict[tuple[Case, str], Timed] = {}
    for group in groups:
        first = group[0]
        checks.append(max((c.check(p) for c, p in zip(group, problems, strict=True)), key=lambda check: check.excess))
        if checks[-1].excess <= 1:
            turn = Timed([call for one in group for call in one.timed.calls], first.timed.around)
            found = captured(turn, device) if graph and first.capturable else turn
            if isinstance(found, str):
                notes[first.case, first.name] = found
            else:
                timed[first.case, first.name] = found
    if limit and device.type == "cpu" and machine.can_read():
        timed[cases[0], LIMIT] = Timed([functools.partial(machine.read, 2, problems[0].s, problems[0].y)])
    timings = interleaved(timed, clock_for(device), seconds=seconds)
    rows = []
    for (first, *_), check in zip(groups, checks, strict=True):
        timing = timings.get((first.case, first.name))
        median, best = (timing.median, timing.best) if timing else (None, None)
        note = REPLAY if graph and first.capturable else ""
        note = note if timing else notes.get((first.case, first.name)) or check.failure or "wrong answer"
        rows.append(Row(first.case, first.name, first.kind, median, best, check.error, check.bound, note))
    if (cases[0], LIMIT) in timings:
        timing = timings[cases[0], LIMIT]
        rows.append(Row(cases[0], LIMIT, "limit", timing.median, timing.best, 0.0, 0.0))
    return rows


def fits(cases: Sequence[Case], device: torch.device) -> bool:
    """Whether there is memory to measure these cases together, by a generous estimate."""
    free = machine.free_bytes(device)
    if free is None:
        return True
    case = cases[0]
    pairs = 3 * case._replace(storage=case.dtype).history_bytes  # the problem, and what an eager history becomes
    rings = sum(len(serving(one, device)) * one.history_bytes for one in cases if one.op != "two_loop")
    vectors = 40 * max(case.batch, 1) * case.n * case.dtype.itemsize
    return _copies(case, device) * (pairs + rings + vectors) < free


def _copies(case: Case, device: torch.device) -> int:
    """Inputs that take turns so that none is found in the cache of a GPU, at most `MAX_COPIES`."""
    return max(1, min(MAX_COPIES, math.ceil(2 * machine.cache_bytes(device) / case.history_bytes)))


def published() -> list[Case]:
    """A step of each problem of `PUBLISHED`, in float64."""
    return [Case("step", n, PUBLISHED_PAIRS, 0, torch.float64, torch.float64) for n in PUBLISHED]


def groups(device: torch.device, *, quick: bool = False) -> list[list[Case]]:
    """What `python -m secant bench` measures, cases timed in turns together; with `quick`, the same on small inputs.

    Those of `published` on a GPU: the figures to compare with are of one.
    """
    sizes = (10**3, 10**4) if quick else tuple(10**k for k in range(3, 8))
    long, batch = ((10**4,), 100) if quick else ((10**5, 10**7), 10_000)
    storages = (torch.float32, torch.bfloat16)
    histories = [[Case(op, n, storage=x) for op in ("direction", "step") for x in storages] for n in long]
    return [
        *([Case("two_loop", n)] for n in sizes),
        *histories,
        [Case("two_loop", 64, batch=batch), Case("direction", 64, batch=batch)],
        *([case] for case in published() if device.type == "cuda" and not quick),
    ]
