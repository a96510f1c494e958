"""Cases of the `lbfgs` family: directions and steps on the same pairs, and the optimizers that make them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import secant
from secant.benchmarks import digits, machine, peers
from secant.benchmarks.case import (
    Bar,
    Check,
    Contender,
    Row,
    around,
    dtype_name,
    find,
    ratio,
    serving,
    speed_bar,
)
from secant.benchmarks.case import Case as Base
from secant.benchmarks.dense import DenseStep
from secant.benchmarks.families import Family
from secant.benchmarks.optimizers import OutsideClosure
from secant.benchmarks.timing import REPLAY, Timed

#: Largest history that the reference, which widens all of it to float64 several times over, is asked to handle.
REFERENCE_ELEMENTS = 1 << 25
#: Columns of random numbers; longer vectors repeat them.
PERIOD = 1 << 20
#: Longest vector of the flat problems that GPU users would replay from a graph.
GRAPH_N = 10**5
#: Name of the row that says how long reading the history twice takes.
LIMIT = "two reads of the history"
#: Unknowns and pairs of the problems of which other projects publish figures (`bench/published`): 3 an atom.
PUBLISHED, PUBLISHED_PAIRS = (3 * 10**4, 3 * 10**5, 3 * 10**6), 6
#: n, history and line search of the optimizers that are compared.
OPTIMIZERS = (
    *((n, history, None) for n in (10**3, 10**6) for history in (10, 100)),
    (10**3, 10, "strong_wolfe"),
    (10**6, 10, "strong_wolfe"),
)

Call = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Case(Base):
    """A direction: op "two_loop", "direction" or "step"; batch 0 means a flat problem."""

    n: int
    m: int = 10
    batch: int = 0
    dtype: torch.dtype = torch.float32
    storage: torch.dtype = torch.float32

    INPUT = ("n", "m", "batch", "dtype")
    KIND = ("op", "batch", "dtype")
    LIMIT = LIMIT
    LIMITS = "times two reads"
    MAX_COPIES = 128  # histories from 0.8 MB on outgrow a cache of 50 MB twice

    @property
    def title(self) -> str:
        """Name op, batch and n; pairs where they are not ten."""
        return f"{self.op} {self.shape}" + (f", {self.m} pairs" if self.m != 10 else "")

    @property
    def label(self) -> str:
        """Add the dtypes where they are not float32."""
        vectors = "" if self.dtype is torch.float32 else f", {dtype_name(self.dtype)}"
        return self.title + vectors + ("" if self.storage is self.dtype else f", {dtype_name(self.storage)} history")

    @property
    def series(self) -> tuple[str, int] | None:
        """Join flat problems in float32 by op."""
        plain = not self.batch and self.m == 10 and self.dtype is self.storage is torch.float32
        return (f"{self.op}, {self.m} pairs, float32", self.n) if plain else None

    @property
    def function(self) -> str:
        """Return the function of the contract that computes it."""
        return "two_loop" if self.op == "two_loop" else "update"

    @property
    def history_bytes(self) -> int:
        """Count s and y together."""
        return 2 * max(self.batch, 1) * self.m * self.n * self.storage.itemsize

    @property
    def nbytes(self) -> int:
        """Count the history twice, every vector once (g, d; in a step g, g_prev twice, d twice)."""
        vectors = max(self.batch, 1) * self.n
        if self.op == "step":  # which also writes a pair
            return 2 * self.history_bytes + vectors * (5 * self.dtype.itemsize + 2 * self.storage.itemsize)
        return 2 * self.history_bytes + vectors * 2 * self.dtype.itemsize

    @property
    def limit_bytes(self) -> int:
        """Count the history twice."""
        return 2 * self.history_bytes

    @property
    def input_bytes(self) -> int:
        """Count the history."""
        return self.history_bytes

    @property
    def flops(self) -> int:
        """Count the recursion as it is defined, sums and products apart; backends may need more.

        Of each pair two dot products and two additions of a multiple, 8 n, and n to scale. From pairs alone also s.y of
        each and y.y of one, 2 n each; in a step s, y and three products of the new pair, 8 n.
        """
        extra = {"two_loop": 2 * self.m + 2, "direction": 0, "step": 8}[self.op]
        return max(self.batch, 1) * self.n * (8 * self.m + 1 + extra)

    @property
    def shape(self) -> str:
        """Write batch and n, for tables."""
        return (f"{self.batch:,} x " if self.batch else "") + f"{self.n:,}"

    def memory(self, cases: Sequence[Case], device: torch.device) -> int:
        """Add up the problem, what an eager history becomes, a ring for each backend of each case, and vectors."""
        pairs = 3 * self.replace(storage=self.dtype).history_bytes
        rings = sum(len(one.serving(device)) * one.history_bytes for one in cases if one.op != "two_loop")
        return pairs + rings + 40 * max(self.batch, 1) * self.n * self.dtype.itemsize

    def serving(self, device: torch.device) -> list[str]:
        """List the backends that can serve it, the one that `auto` takes first."""
        large = self.history_bytes // self.storage.itemsize > REFERENCE_ELEMENTS
        return serving("lbfgs", device, self.dtype, large=large)

    def problem(self, device: torch.device, seed: int = 0) -> Problem:
        """Make random pairs of a quadratic."""
        return Problem(self, device, seed)

    def names(self, device: torch.device) -> list[str]:
        """List every backend, the loop of torch.optim.LBFGS, its compiled version, the compact representation."""
        return self.serving(device) + peer_names(self)

    def contender(self, problem: Problem, name: str) -> Contender:
        """Prepare the one of this name, with pairs of its own where it keeps some."""
        names = self.serving(problem.device)
        return _backend(self, problem, name, names) if name in names else _peer(self, problem, name)

    def judge(self, problem: Problem, contender: Contender, answer: Tensor) -> Check:
        """Compute the relative error of a direction against float64, and its bound."""
        # A peer keeps its pairs in the dtype of the vectors, and sums n products in it: an error of sqrt(n) u with high
        # probability (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). Backends sum in float64.
        backend = contender.kind == "backend"
        storage = self.storage if backend else self.dtype
        dots = 0.0 if backend else math.sqrt(self.n) * torch.finfo(self.dtype).eps / 2
        want, amplification = problem.exact(storage, stepped=self.op == "step")
        norm = functools.partial(torch.linalg.vector_norm, dim=-1)
        error = float((norm(answer.double() - want) / norm(want)).max())
        return Check(error, peers.tolerance(self.m, amplification, self.dtype, dots))

    def limit(self, problem: Problem) -> Callable[[], None] | None:
        """Read the history twice by all threads, of flat problems on a CPU."""
        if self.batch or problem.device.type != "cpu" or not machine.can_read():
            return None
        return functools.partial(machine.read, 2, problem.s, problem.y)


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
        """Make (g_prev, d) from which a step with t = 2 to g offers the oldest pair once more."""
        return self.g - self.y.select(-2, 0), self.s.select(-2, 0) / 2

    def exact(self, storage: torch.dtype, *, stepped: bool) -> peers.Exact:
        """Compute the direction from pairs rounded to `storage`; `stepped`: after the step of `probe`."""
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
    """Repeat the last dimension to length n."""
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    for piece in out.split(x.shape[-1], dim=-1):
        piece.copy_(x[..., : piece.shape[-1]])
    return out


def _backend(case: Case, problem: Problem, name: str, names: Sequence[str]) -> Contender:
    chosen = around(name, names)
    with chosen():
        calls, probe = _two_loop_calls(case, problem) if case.op == "two_loop" else _history_calls(case, problem)
    return Contender(case, name, "backend", Timed(calls, chosen), probe, _replayed(case))


def _replayed(case: Case) -> bool:
    return case.n <= GRAPH_N or case in published()


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
    """Make calls of `step(grad, prev_grad, direction)` (t = 2) that can go round for ever, and the probe.

    Gradients alternate, g, -g, g, ..., each with another small part beside. From g_prev = -g and d.g > 0 come y = 2 g
    and s = 2 d: the pair is accepted. The next direction satisfies H y = s, so it is -H g = -s / 2 = -d, and the next
    pair is (-s, -y): numbers stay as they are. With the small parts every pair has a share in every direction; without
    them the newest says it all, and the other rows would not be read.
    """
    g = problem.g
    gradients = [sign * (g + g.roll(k + 1, -1) / 256) for k, sign in enumerate((1, -1, 1, -1))]
    prev_grad, direction = gradients[-1].clone(), g.clone()

    def turn(grad: Tensor) -> Tensor:
        nonlocal direction
        direction = step(grad, prev_grad, direction)
        return direction

    def probe() -> Tensor:
        return step(g, *(x.clone() for x in problem.probe))

    return [functools.partial(turn, x) for x in gradients], probe


def _peer(case: Case, problem: Problem, name: str) -> Contender:
    if name != "eager" and case.op != "step":
        call = _stateless_peer(case, problem, name)
        return Contender(case, name, "peer", Timed([call]), call, _replayed(case))
    if case.op == "step":
        history = (peers.EagerHistory if name == "eager" else peers.CompiledHistory)(problem.s, problem.y)
        calls, probe = _step_calls(problem, functools.partial(history.step, t=2.0))
    else:
        probe = functools.partial(peers.EagerHistory(problem.s, problem.y).direction, problem.g)
        calls = [probe]
    return Contender(case, name, "peer", Timed(calls), probe)


def _stateless_peer(case: Case, problem: Problem, name: str) -> Call:
    g, s, y = problem.g, problem.s, problem.y
    if name == "compact":
        if case.op == "two_loop":
            return functools.partial(peers.compact_from_pairs, g, s, y)
        return functools.partial(peers.compact, g, s, y, *peers.gram(s, y))
    function = peers.two_loop_bmm if name == "eager bmm" else peers.compiled(peers.two_loop_rows)
    sy, yy = (s * y).sum(-1), (y[..., -1, :] ** 2).sum(-1)
    return functools.partial(function, g, s, y, 1.0 / sy, sy[..., -1] / yy)


def peer_names(case: Case) -> list[str]:
    """List the loop of torch.optim.LBFGS (by bmm for a batch), its compiled version, the compact representation."""
    if case.storage != case.dtype or (case.op == "step" and case.batch):
        return []
    return ["eager bmm" if case.batch else "eager", "compiled", *(["compact"] if case.op != "step" else [])]


def published() -> list[Case]:
    """List a step of each problem of `PUBLISHED`, in float64."""
    return [Case("step", n, PUBLISHED_PAIRS, 0, torch.float64, torch.float64) for n in PUBLISHED]


def groups(device: torch.device, *, quick: bool = False, full: bool = False) -> list[Sequence[Base]]:
    """List what `python -m secant bench` measures, cases timed in turns together.

    `quick`: the same on small inputs; `full`: every op over the whole range of n. Those of `published` on a GPU: the
    figures to compare with are of one.
    """
    sizes = (10**3, 10**4) if quick else tuple(10**k for k in range(3, 8))
    long, batch = ((10**4,), 100) if quick else ((10**5, 10**7), 10_000)
    alone: list[tuple[str, int]] = [("two_loop", n) for n in sizes]
    if full:
        everywhere = (10**2, *sizes[:-1], 3 * 10**6, sizes[-1])
        ops = ("two_loop", "direction", "step")
        alone = [(op, n) for op in ops for n in everywhere if op == "two_loop" or n not in long]
    storages = (torch.float32, torch.bfloat16)
    return [
        *([Case(*each)] for each in alone),
        *([Case(op, n, storage=x) for op in ("direction", "step") for x in storages] for n in long),
        [Case("two_loop", 64, batch=batch), Case("direction", 64, batch=batch)],
        *([DenseStep("dense_update", n)] for n in ((200,) if quick else (10**3, 5 * 10**3))),
        *([case] for case in published() if device.type == "cuda" and not quick),
        *([OutsideClosure("LBFGS", *each)] for each in (OPTIMIZERS[:1] if quick else OPTIMIZERS)),
    ]


def bars(rows: Sequence[Row], device: torch.device, bandwidth: float) -> list[Bar]:
    """Set the bars of the device, with what this run measured."""
    if device.type == "cuda":
        return gpu_bars(rows, bandwidth)
    try:
        errors = digits.direction_errors(digits.load(device))
    except ImportError:
        errors = None
    return cpu_bars(rows, errors)


def cpu_bars(rows: Sequence[Row], errors: dict[str, float] | None) -> list[Bar]:
    """Set the bars for two cores; errors: `digits.direction_errors`, None without the data."""
    found = []
    for n, target in ((10**3, 20.0), (10**4, 6.0), (10**5, 3.0), (10**7, 2.2)):
        found.append(speed_bar(rows, Case("two_loop", n), ("eager",), target))
    found.append(speed_bar(rows, Case("two_loop", 10**7), (LIMIT,), 1.3))
    for op in ("direction", "step"):
        wide, narrow = (find(rows, Case(op, 10**7, storage=x)) for x in (torch.float32, torch.bfloat16))
        measure = f"bf16 history against float32, {op}, n = 1e+07, times faster"
        found.append(Bar(measure, 1.6, True, ratio(wide, narrow), unit="x"))
    found.append(speed_bar(rows, Case("two_loop", 64, batch=10_000), ("eager bmm",), 5.0))
    for n, target in ((10**3, 4.0), (10**6, 2.0)):
        found += [speed_bar(rows, OutsideClosure("LBFGS", n, history), ("torch",), target) for history in (10, 100)]
    why = "needs scikit-learn: pip install secant[demo]" if errors is None else ""
    error = None if errors is None else errors["secant"]
    found.append(Bar("relative error of the float32 direction, pairs of a real run", 1e-5, False, error, why))
    return found


def gpu_bars(rows: Sequence[Row], bandwidth: float) -> list[Bar]:
    """Set the bars for an H100; only the two reads of the history count as moved."""
    found = []
    large, batched = Case("step", 10**7), Case("two_loop", 64, batch=10_000)
    for label, case, target in (("step, n = 1e+07", large, 0.8), ("two_loop, 10,000 x 64", batched, 0.6)):
        row = find(rows, case)
        share = None if row is None or row.seconds is None else 2 * case.history_bytes / row.seconds / bandwidth
        found.append(Bar(f"{label}, share of the copy bandwidth", target, True, share))
    for n in (10**3, 10**4, 10**5):
        row = find(rows, Case("two_loop", n), note=REPLAY)
        replay = row.seconds * 1e6 if row and row.seconds is not None else None
        found.append(Bar(f"two_loop in a replayed graph, n = {n:.0e}, microseconds", 15.0, False, replay))
    return found


FAMILY = Family("Directions", 2.0, groups, bars)
