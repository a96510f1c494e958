"""What is compared, by whom, and what came of it: one shape for every family."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import math
import types
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch

import secant
from secant import backends
from secant.benchmarks.timing import REPLAY, Clock, Timed, Timing

#: A contender that can be timed on a part of the units is given as many as this many seconds allow, at least `PILOT`:
#: short turns, and more of them, so that a disturbance of the machine is outvoted in the median.
SLICE_SECONDS, PILOT = 0.012, 32

Around = Callable[[], contextlib.AbstractContextManager[object]]


def dtype_name(dtype: torch.dtype) -> str:
    """Drop the prefix."""
    return str(dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class Case(abc.ABC):
    """A computation on one input; the fields of a family's class say which.

    A time, bytes and operations are of one `UNIT` of it: a call, or, where slow contenders are timed on a part of a
    batch, one member of the batch.
    """

    op: str

    UNIT: ClassVar[str] = "call"
    #: Fields that the input follows from; cases that agree in them can be timed in turns on one input.
    INPUT: ClassVar[tuple[str, ...]] = ()
    #: Fields that say more than a size.
    KIND: ClassVar[tuple[str, ...]] = ("op",)
    #: Name of the row that says how long the memory needs for what must be moved.
    LIMIT: ClassVar[str] = ""
    #: What multiples of it are called.
    LIMITS: ClassVar[str] = "limits"
    #: What is said of one of ours whose error is too large.
    FAILURE: ClassVar[str] = "gives a wrong answer"
    #: Inputs that take turns so that none is found in the cache of a GPU, at most.
    MAX_COPIES: ClassVar[int] = 1

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """Name the op and its sizes, for tables."""

    @property
    def label(self) -> str:
        """Return the title and what else tells the case from all others."""
        return self.title

    @property
    def kind(self) -> Hashable:
        """Return what tells kinds of cases apart: those of a kind differ in size."""
        return tuple(getattr(self, name) for name in self.KIND)

    @property
    def series(self) -> tuple[str, int] | None:
        """Return the curve of the picture that the case lies on and its size; None: a line of its own."""
        return None

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Count the bytes that must be moved."""

    @property
    @abc.abstractmethod
    def flops(self) -> float:
        """Count the operations of the definition; backends may need more."""

    @property
    def units(self) -> int:
        """Count the units that the whole of it is."""
        return 1

    @property
    def limit_bytes(self) -> int:
        """Return the bytes that the limit moves."""
        return self.nbytes

    @property
    def input_bytes(self) -> int:
        """Return the bytes of an input that a cache could keep."""
        return self.nbytes

    @property
    def input(self) -> tuple[object, ...]:
        """Return the values of the fields that the input follows from."""
        names = self.INPUT or tuple(field.name for field in dataclasses.fields(self))
        return tuple(getattr(self, name) for name in names)

    def memory(self, cases: Sequence[Any], device: torch.device) -> int:
        """Estimate, generously, the bytes that measuring these cases together takes; 0: too few to ask."""
        return 0

    @abc.abstractmethod
    def problem(self, device: torch.device, seed: int = 0) -> Any:
        """Make the input."""

    @abc.abstractmethod
    def names(self, device: torch.device) -> list[str]:
        """List every backend that serves the case, what `auto` takes first, then every peer."""

    @abc.abstractmethod
    def contender(self, problem: Any, name: str) -> Contender:
        """Prepare the one of this name on an input."""

    def contenders(self, problem: Any, wanted: Wanted) -> list[Contender]:
        """Prepare those of `names` that are wanted, on one input."""
        return [self.contender(problem, name) for name in self.names(problem.device) if wanted(self, name)]

    @abc.abstractmethod
    def judge(self, problem: Any, contender: Contender, answer: Any) -> Check:
        """Compare an answer of the contender with the reference."""

    def limit(self, problem: Any) -> Callable[[], object] | None:
        """Make the call that takes as long as the memory needs; None where there is none."""
        return None

    def replace(self, **changes: Any) -> Self:
        """Change some fields."""
        return dataclasses.replace(self, **changes)

    def parameters(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: dtype_name(x) if isinstance(x, torch.dtype) else x for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class WholeRun(Case):
    """A run of an optimizer to its end, of which neither bytes nor operations are counted."""

    UNIT = "run"

    @property
    def nbytes(self) -> int:
        """Count nothing: it is not about bytes."""
        return 0

    @property
    def flops(self) -> float:
        """Count nothing: each optimizer has its own way."""
        return 0.0


Wanted = Callable[[Case, str], bool]


def everything(case: Case, name: str) -> bool:
    """Want every contender."""
    return True


def no_compile(case: Case, name: str) -> bool:
    """Want what needs no compiler: compiling takes longer than small inputs do."""
    return name != "compiled"


def serving(family: str, device: torch.device, dtype: torch.dtype, *, large: bool) -> list[str]:
    """List the backends that can serve a call, the one that `auto` takes first.

    Args:
        family, device, dtype: of the call.
        large: spare the reference, which widens its inputs to float64, unless nothing else serves.
    """
    loaded = ((name, backends.load(family, name)) for name in backends.preferences(family, device))
    names = [name for name, x in loaded if not isinstance(x, str) and x.supports(device, dtype) is None]
    return [name for name in names if not (large and name == "reference" and len(names) > 1)]


def around(name: str, names: Sequence[str]) -> Around:
    """Make what chooses one of `names`, as `serving` gives them.

    What `auto` serves is timed as a user calls it. An explicit choice is entered outside the time.
    """
    auto = name == names[0] and secant.current_backend() == "auto"
    return contextlib.nullcontext if auto else functools.partial(secant.use_backend, name)


class Check(NamedTuple):
    """Error of an answer, the largest of a batch; the bound on it; what failed, if any."""

    error: float
    bound: float
    failure: str = ""

    @property
    def excess(self) -> float:
        """Divide the error by the bound: at most 1 if the answer is right. A NaN is further off than anything."""
        return math.inf if math.isnan(self.error) else self.error / self.bound


class Contender(NamedTuple):
    """One way to compute a case.

    kind: "backend" (ours) or "peer". timed: the calls, of `units` each. probe: a call whose answer is known. part: the
    call for the first units, for one that need not be timed on all of them. capturable: in a CUDA graph, as its user
    would.
    """

    case: Case
    name: str
    kind: str
    timed: Timed
    probe: Callable[[], Any]
    capturable: bool = False
    units: int = 1
    part: Callable[[int], Callable[[], Any]] | None = None

    def fitting(self, clock: Clock) -> Contender:
        """Take as many units as it does in a quarter of `SLICE_SECONDS`, found by fours; all if it can."""
        if self.part is None:
            return self
        units = min(PILOT, self.units)
        with self.timed.around():
            self.part(units)()  # the first call of a process initialises libraries
            while units < self.units:
                call = self.part(units)
                # The best of three: one call in a bad moment must not decide for a slice that is all overhead.
                if 4 * min(_once(call, clock) for _ in range(3)) > SLICE_SECONDS:
                    break
                units = min(4 * units, self.units)
        call = self.part(units)
        return self._replace(timed=Timed([call], self.timed.around), probe=call, units=units)

    def check(self, problem: Any) -> Check:
        """Make the probe. A peer that cannot run here (torch.compile without a compiler) fails, and only itself."""
        try:
            with self.timed.around():
                answer = self.probe()
        except Exception as failure:
            if self.kind == "backend":
                raise
            return Check(math.nan, math.nan, f"failed: {type(failure).__name__}")
        return self.case.judge(problem, self, answer)


def _once(call: Callable[[], object], clock: Clock) -> float:
    start = clock.mark()
    call()
    end = clock.mark()
    clock.wait()
    return clock.seconds(start, end)


class Row(NamedTuple):
    """One line of the results. There is no timing when the answer was wrong: a wrong answer has no speed.

    kind: "backend", "peer" or "limit". timing: of one unit. units: those that were timed. error, tolerance: as `Check`.
    curve: of a race, (seconds, error) of the start that took the median time. figures: what else was measured, plain
    data by name.
    """

    case: Any
    name: str
    kind: str
    timing: Timing | None
    error: float
    tolerance: float
    note: str = ""
    units: int = 1
    curve: tuple[tuple[float, float], ...] = ()
    figures: Mapping[str, Any] = types.MappingProxyType({})

    @property
    def seconds(self) -> float | None:
        """Return the median sample."""
        return None if self.timing is None else self.timing.median

    @property
    def best(self) -> float | None:
        """Return the shortest sample."""
        return None if self.timing is None else self.timing.best

    @property
    def correct(self) -> bool:
        """Say whether the error is within its bound (a NaN is not)."""
        return self.error <= self.tolerance

    @property
    def bytes_per_second(self) -> float | None:
        """Divide the bytes that must be moved (of a limit, those that it moves) by the median."""
        moved = self.case.limit_bytes if self.kind == "limit" else self.case.nbytes
        return None if self.timing is None or not moved else moved / self.timing.median


class Bar(NamedTuple):
    """A figure to reach: `measured` at least (or at most) `target`. None: not measured here, and `why`.

    case: whose row it is shown with. unit: of the figures. against: names of the rows that were compared with.
    """

    measure: str
    target: float
    at_least: bool
    measured: float | None
    why: str = "not measured"
    case: Case | None = None
    unit: str = ""
    against: tuple[str, ...] = ()

    @property
    def met(self) -> bool | None:
        """Say whether it is reached; None when it was not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target

    @property
    def verdict(self) -> str:
        """Say the same in words."""
        return self.why if self.met is None else "met" if self.met else "NOT MET"

    @property
    def text(self) -> str:
        """Write target and verdict."""
        return f"{self.target:.3g}{self.unit}: {self.verdict}"


def find(rows: Iterable[Row], case: object, name: str | None = None, *, note: str | None = None) -> Row | None:
    """Find the first row of a case: by name, or of what `auto` takes; and with this note, when one is given."""
    for row in rows:
        if row.case == case and (row.name == name if name else row.kind == "backend") and note in (None, row.note):
            return row
    return None


def ratio(slow: Row | None, fast: Row | None) -> float | None:
    """Divide the time of `slow` by that of `fast`; None when either was not measured or was wrong."""
    if slow is None or fast is None or slow.seconds is None or fast.seconds is None:
        return None
    return slow.seconds / fast.seconds


def ratios(rows: Iterable[Row], row: Row) -> dict[str, float]:
    """Divide the time of each peer by that of `row` on the same case; a replay of a graph against replays of peers.

    Where no peer was replayed, and for calls, against the calls of the peers.
    """
    peers = [peer for peer in rows if peer.kind == "peer" and peer.case == row.case]
    replays = [peer for peer in peers if peer.note == REPLAY]
    like = replays if row.note == REPLAY and replays else (peer for peer in peers if peer.note != REPLAY)
    found = ((peer.name, ratio(peer, row)) for peer in like)
    return {name: value for name, value in found if value is not None}


def fastest(rows: Iterable[Row], case: object, names: Sequence[str] | None = None) -> Row | None:
    """Find the row of the fastest peer, of those named if any are."""
    found = [
        row
        for row in rows
        if row.case == case and row.kind == "peer" and row.seconds is not None and (not names or row.name in names)
    ]
    return min(found, key=lambda row: row.seconds or 0.0, default=None)


def speed_bar(
    rows: Sequence[Row], case: Case, against: Sequence[str], target: float, *, title: str | None = None
) -> Bar:
    """Set a bar on the speed of what `auto` takes: at least `target` times as fast as the fastest of some peers.

    Against the limit of the case: at most `target` times its time.
    """
    ours, names = find(rows, case), " / ".join(against)
    if tuple(against) == (case.LIMIT,):
        value, unit, words = ratio(ours, find(rows, case, case.LIMIT)), f" {case.LIMITS}", "times longer"
    else:
        value, unit, words = ratio(fastest(rows, case, against), ours), "x", "times faster"
    measure = f"{title or case.label} against {names}, {words}"
    return Bar(measure, target, words == "times faster", value, case=case, unit=unit, against=tuple(against))
