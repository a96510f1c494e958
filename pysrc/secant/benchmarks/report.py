"""Rows, ratios and bars, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from secant.benchmarks.lbfgs import LIMIT, REPLAY, Case, Row
from secant.benchmarks.timing import Timing


class Table(NamedTuple):
    """A title, the names of the columns, rows of text, and what is to be said below."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def duration(seconds: float | None) -> str:
    """Three digits and a unit."""
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError("unreachable")


def times(ratio: float | None) -> str:
    """A ratio."""
    return "-" if ratio is None else f"{ratio:.3g}x" if ratio < 100 else f"{ratio:.0f}x"


def dtype_name(dtype: torch.dtype) -> str:
    """Without the prefix."""
    return str(dtype).removeprefix("torch.")


class Measured(Protocol):
    """A row of any family."""

    @property
    def case(self) -> Any:
        """What was computed."""

    @property
    def name(self) -> str:
        """By whom."""

    @property
    def kind(self) -> str:
        """Is it a backend, a peer or a limit."""

    @property
    def seconds(self) -> float | None:
        """Median time; None when it was not measured or was wrong."""

    @property
    def note(self) -> str:
        """What is to be said of it."""


R = TypeVar("R", bound=Measured)


def ratio(slow: Measured | None, fast: Measured | None) -> float | None:
    """How many times longer `slow` took; None when either was not measured or was wrong."""
    if slow is None or fast is None or slow.seconds is None or fast.seconds is None:
        return None
    return slow.seconds / fast.seconds


def ratios(rows: Sequence[Row], row: Row) -> dict[str, float]:
    """How many times longer each peer took than `row` on the same case, in the same way (a graph, or calls)."""
    like = (peer for peer in rows if peer.kind == "peer" and (peer.case, peer.note) == (row.case, row.note))
    found = ((peer.name, ratio(peer, row)) for peer in like)
    return {name: value for name, value in found if value is not None}


class Overhead(NamedTuple):
    """Seconds per iteration outside the closure, by optimizer."""

    n: int
    history: int
    line_search: str | None
    timings: dict[str, Timing]

    @property
    def ratio(self) -> float:
        """How many times longer `torch.optim.LBFGS` takes."""
        return self.timings["torch"].median / self.timings["secant"].median


class Bar(NamedTuple):
    """A figure to reach: `measured` at least (or at most) `target`. None: not measured here, and `why`."""

    measure: str
    target: float
    at_least: bool
    measured: float | None
    why: str = "not measured in this run"

    @property
    def met(self) -> bool | None:
        """Whether it is reached; None when it was not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target


def find(rows: Iterable[R], case: object, name: str | None = None, *, note: str | None = None) -> R | None:
    """The first row of a case: by name, or of what `auto` takes; and with this note, when one is given."""
    for row in rows:
        if row.case == case and (row.name == name if name else row.kind == "backend") and note in (None, row.note):
            return row
    return None


def cpu_bars(rows: Sequence[Row], overheads: Sequence[Overhead], errors: dict[str, float] | None) -> list[Bar]:
    """The bars for two cores, with what this run measured.

    Args:
        rows: of `lbfgs.groups()`. overheads: of both optimizers.
        errors: `digits.direction_errors`, None without the data.
    """
    bars = []
    for n, target in ((10**3, 20.0), (10**4, 6.0), (10**5, 3.0), (10**7, 2.2)):
        case = Case("two_loop", n)
        value = ratio(find(rows, case, "eager"), find(rows, case))
        bars.append(Bar(f"two_loop against eager, n = {n:.0e}, times faster", target, True, value))
    large = Case("two_loop", 10**7)
    value = ratio(find(rows, large), find(rows, large, LIMIT))
    bars.append(Bar("two_loop against two reads of the history, n = 1e+07, times longer", 1.3, False, value))
    for op in ("direction", "step"):
        wide, narrow = (find(rows, Case(op, 10**7, storage=x)) for x in (torch.float32, torch.bfloat16))
        bars.append(Bar(f"bf16 history against float32, {op}, n = 1e+07, times faster", 1.6, True, ratio(wide, narrow)))
    batched = Case("two_loop", 64, batch=10_000)
    value = ratio(find(rows, batched, "eager bmm"), find(rows, batched))
    bars.append(Bar("two_loop against eager bmm, 10,000 x 64, times faster", 5.0, True, value))
    for n, target in ((10**3, 4.0), (10**6, 2.0)):
        for history in (10, 100):
            found = [x.ratio for x in overheads if (x.n, x.history, x.line_search) == (n, history, None)]
            name = f"outside the closure against torch, history {history}, n = {n:.0e}, times less"
            bars.append(Bar(name, target, True, found[0] if found else None))
    why = "needs scikit-learn: pip install secant[demo]" if errors is None else ""
    error = None if errors is None else errors["secant"]
    bars.append(Bar("relative error of the float32 direction, pairs of a real run", 1e-5, False, error, why))
    return bars


def gpu_bars(rows: Sequence[Row], bandwidth: float) -> list[Bar]:
    """The bars for an H100, with what this run measured; only the two reads of the history count as moved."""
    bars = []
    large, batched = Case("step", 10**7), Case("two_loop", 64, batch=10_000)
    for label, case, target in (("step, n = 1e+07", large, 0.8), ("two_loop, 10,000 x 64", batched, 0.6)):
        row = find(rows, case)
        share = None if row is None or row.seconds is None else 2 * case.history_bytes / row.seconds / bandwidth
        bars.append(Bar(f"{label}, share of the copy bandwidth", target, True, share))
    for n in (10**3, 10**4, 10**5):
        row = find(rows, Case("two_loop", n), note=REPLAY)
        replay = row.seconds * 1e6 if row and row.seconds is not None else None
        bars.append(Bar(f"two_loop in a replayed graph, n = {n:.0e}, microseconds", 15.0, False, replay))
    return bars


def rows_table(rows: Sequence[Row], bandwidth: float) -> Table:
    """Every measurement."""
    columns = (
        "op",
        "shape",
        "m",
        "dtype",
        "history",
        "by",
        "median",
        "min",
        "GB/s",
        "of bandwidth",
        "error",
        "speed-up over",
    )
    lines = []
    for row in rows:
        case, rate = row.case, row.bytes_per_second
        speed = ratios(rows, row) if row.kind == "backend" and row.name != "reference" else {}
        lines.append(
            (
                case.op,
                case.shape,
                str(case.m),
                dtype_name(case.dtype),
                dtype_name(case.storage),
                row.name,
                duration(row.seconds),
                duration(row.best),
                "-" if rate is None else f"{rate / 1e9:.3g}",
                "-" if rate is None else f"{rate / bandwidth:.0%}",
                "-" if row.kind == "limit" else f"{row.error:.1e}",
                row.note or ", ".join(f"{name} {times(value)}" for name, value in speed.items()),
            )
        )
    return Table(
        "Directions",
        columns,
        lines,
        ("GB/s counts the bytes that must be moved; over 100% of the bandwidth: from cache",),
    )


def overheads_table(overheads: Sequence[Overhead]) -> Table:
    """Time per iteration outside the closure."""
    rows = [
        (
            f"{x.n:,}",
            str(x.history),
            x.line_search or "none",
            duration(x.timings["torch"].median),
            duration(x.timings["secant"].median),
            times(x.ratio),
        )
        for x in overheads
    ]
    columns = ("n", "history", "line search", "torch.optim.LBFGS", "secant.optim.LBFGS", "times less")
    return Table("Outside the closure, per iteration", columns, rows)


def bars_table(bars: Sequence[Bar], title: str = "Bars") -> Table:
    """Bar, measured, met or not."""
    rows = []
    for bar in bars:
        sign = "≥" if bar.at_least else "≤"
        verdict = bar.why if bar.met is None else "met" if bar.met else "NOT MET"
        rows.append(
            (bar.measure, f"{sign} {bar.target:g}", "-" if bar.measured is None else f"{bar.measured:.3g}", verdict)
        )
    return Table(title, ("measure", "bar", "measured", ""), rows)


def losses(rows: Sequence[Row], overheads: Iterable[Overhead]) -> list[str]:
    """Every comparison that we lose, in words: what `auto` takes against each peer, and any wrong answer of ours."""
    lost = [
        f"{r.case.op} {r.case.shape}: {r.name} gives a wrong answer (error {r.error:.1e})"
        for r in rows
        if r.kind == "backend" and not r.correct
    ]
    for case in dict.fromkeys(row.case for row in rows):
        own = find(rows, case)
        if own is None:
            continue
        for name, value in ratios(rows, own).items():
            if value < 1:
                label = f"{case.op} {case.shape}, {dtype_name(case.storage)} history"
                lost.append(f"{label}: {own.name} takes {times(1 / value)} the time of {name}")
    for x in overheads:
        if x.ratio < 1:
            lost.append(
                f"optimizer n = {x.n:,}, history {x.history}: {times(1 / x.ratio)} the time of torch.optim.LBFGS"
            )
    return lost


def as_json(
    about: dict[str, Any], rows: Sequence[Row], overheads: Sequence[Overhead], bars: Sequence[Bar], bandwidth: float
) -> dict[str, Any]:
    """Everything as plain data; times in seconds."""
    return {
        "machine": about,
        "rows": [
            row.case._asdict()
            | {
                "dtype": dtype_name(row.case.dtype),
                "storage": dtype_name(row.case.storage),
                "by": row.name,
                "kind": row.kind,
                "median": row.seconds,
                "min": row.best,
                "bytes": row.case.nbytes,
                "flops": row.case.flops,
                "bandwidth_fraction": None if row.bytes_per_second is None else row.bytes_per_second / bandwidth,
                "error": row.error,
                "tolerance": row.tolerance,
                "note": row.note,
                "speedup_over": ratios(rows, row) if row.kind == "backend" else {},
            }
            for row in rows
        ],
        "outside_closure": [
            {"n": x.n, "history": x.history, "line_search": x.line_search, "ratio": x.ratio}
            | {name: timing.median for name, timing in x.timings.items()}
            for x in overheads
        ],
        "bars": [bar._asdict() | {"met": bar.met} for bar in bars],
        "lost": losses(rows, overheads),
    }
