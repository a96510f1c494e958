"""Rows, ratios and bars of any family, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from secant.benchmarks.case import Bar, Row, find, ratios
from secant.benchmarks.timing import REPLAY


class Table(NamedTuple):
    """A title, the names of the columns, rows of text, and what is to be said below."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def duration(seconds: float | None) -> str:
    """Write three digits and a unit."""
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError("unreachable")


def times(ratio: float | None) -> str:
    """Write a ratio."""
    return "-" if ratio is None else f"{ratio:.3g}x" if ratio < 100 else f"{ratio:.0f}x"


def short(seconds: float | None) -> str:
    """Write as `duration`, and nanoseconds."""
    return f"{seconds * 1e9:.3g} ns" if seconds is not None and seconds < 1e-6 else duration(seconds)


def limit_of(rows: Sequence[Row], row: Row) -> Row | None:
    """Find the limit of the same case, or of one that moves as many bytes of the same input."""
    own = next((x for x in rows if x.kind == "limit" and x.case == row.case), None)
    key = (row.case.input, row.case.limit_bytes)
    return own or next((x for x in rows if x.kind == "limit" and (x.case.input, x.case.limit_bytes) == key), None)


def of_limit(rows: Sequence[Row], row: Row) -> float | None:
    """Divide the bytes per second by those of the limit in the same run."""
    limit = limit_of(rows, row)
    if limit is None or row.bytes_per_second is None or limit.bytes_per_second is None:
        return None
    return row.bytes_per_second / limit.bytes_per_second


def rows_table(title: str, rows: Sequence[Row], bandwidth: float | None, bars: Sequence[Bar] = ()) -> Table:
    """Show a line per case and backend but the reference: time, bandwidth, every peer, and the bars of the case."""
    columns = (
        "case", "by", "a", "median", "min", "spread", "GB/s", "of bandwidth", "of limit", "error", "times longer",
        "bars",
    )  # fmt: skip
    lines, limits = [], dict[str, None]()
    for row in rows:
        case, ours = row.case, find(rows, row.case)
        if row.kind != "backend" or (row.name == "reference" and row is not ours):
            continue
        if (limit := limit_of(rows, row)) is not None:
            limits[limit.name] = None
        peers = [f"{name} {times(value)}" for name, value in ratios(rows, row).items()]
        silent = [x for x in rows if x.kind == "peer" and x.case == case and x.timing is None and row.note != REPLAY]
        rate, share = row.bytes_per_second, of_limit(rows, row)
        lines.append(
            (
                case.label,
                row.name + (f", {row.note}" if row.note else ""),
                case.UNIT,
                short(row.seconds),
                short(row.best),
                "-" if row.timing is None else f"{row.timing.spread:.0%}",
                "-" if rate is None else f"{rate / 1e9:.3g}",
                "-" if rate is None or bandwidth is None else f"{rate / bandwidth:.0%}",
                "-" if share is None else f"{share:.0%}",
                f"{row.error:.1e}",
                ", ".join([*peers, *(f"{x.name}: {x.note}" for x in silent)]),
                ", ".join(bar.text for bar in bars if bar.case == case) if row is ours else "",
            )
        )
    notes = (
        "GB/s counts the bytes that must be moved; over 100% of the bandwidth: from cache. times longer: each peer.",
        *([f"of limit: against {', '.join(limits)}, in turns with the rest."] if limits else []),
    )
    return Table(title, columns, lines, notes)


def bars_table(bars: Sequence[Bar], title: str = "Bars") -> Table:
    """Show the bars that are not met, and those that are of no case, which no other table has."""
    rows = []
    for bar in bars:
        if bar.met and bar.case is not None:
            continue
        sign = "≥" if bar.at_least else "≤"
        measured = "-" if bar.measured is None else f"{bar.measured:.3g}"
        rows.append((bar.measure, f"{sign} {bar.target:.3g}", measured, bar.verdict))
    known = [bar for bar in bars if bar.met is not None]
    note = f"{sum(bar.met is True for bar in known)} of {len(known)} bars met."
    return Table(title, ("measure", "bar", "measured", ""), rows, (note,))


def losses(rows: Sequence[Row]) -> list[str]:
    """List every comparison that we lose, in words: what `auto` takes against each peer; and wrong answers of ours."""
    lost = [
        f"{row.case.label}: {row.name} {row.case.FAILURE} (error {row.error:.1e})"
        for row in rows
        if row.kind == "backend" and not row.correct
    ]
    for case in dict.fromkeys(row.case for row in rows):
        if (ours := find(rows, case)) is not None:
            found = ratios(rows, ours).items()
            lost += [f"{case.label}: {ours.name} takes {times(1 / x)} the time of {name}" for name, x in found if x < 1]
    return lost


def plain_row(rows: Sequence[Row], row: Row, bandwidth: float | None) -> dict[str, Any]:
    """Write a row as plain data, with the parameters of its case; times in seconds, of a unit."""
    rate = row.bytes_per_second
    return (
        row.case.parameters()
        | {
            "label": row.case.label,
            "unit": row.case.UNIT,
            "by": row.name,
            "kind": row.kind,
            "timed": row.units,
            "median": row.seconds,
            "min": row.best,
            "spread": None if row.timing is None else row.timing.spread,
            "bytes": row.case.limit_bytes if row.kind == "limit" else row.case.nbytes,
            "flops": row.case.flops,
            "bytes_per_second": rate,
            "bandwidth_fraction": None if rate is None or bandwidth is None else rate / bandwidth,
            "of_limit": of_limit(rows, row),
            "error": row.error,
            "tolerance": row.tolerance,
            "note": row.note,
            "speedup_over": ratios(rows, row) if row.kind == "backend" else {},
        }
        | ({"curve": row.curve} if row.curve else {})
        | ({"figures": dict(row.figures)} if row.figures else {})
    )


def plain_bar(bar: Bar) -> dict[str, Any]:
    """Write a bar as plain data, with the parameters of its case."""
    about = {} if bar.case is None else bar.case.parameters()
    return about | bar._asdict() | {"case": None if bar.case is None else bar.case.label, "met": bar.met}


def as_json(rows: Sequence[Row], bars: Sequence[Bar], bandwidth: float | None) -> dict[str, Any]:
    """Write what a family measured as plain data."""
    return {
        "bandwidth": bandwidth,
        "rows": [plain_row(rows, row, bandwidth) for row in rows],
        "bars": [plain_bar(bar) for bar in bars],
        "lost": losses(rows),
    }
