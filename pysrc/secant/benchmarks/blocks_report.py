"""Rows of the `blocks` family against their bars, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from secant.benchmarks.blocks import COPY, THRESHOLD, Case, Row, batch_of
from secant.benchmarks.report import Table, dtype_name, find, ratio, times
from secant.benchmarks.timing import REPLAY


class Goal(NamedTuple):
    """Times faster than the fastest of some peers, at least; or against the copy, the most copies that it may take.

    sizes: the n for which it holds. float64 has to be half as good.
    """

    op: str
    assume: tuple[str, ...]
    sizes: Sequence[int]
    against: tuple[str, ...]
    factor: float

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.against != (COPY,)

    def target(self, dtype: torch.dtype) -> float:
        """The factor for a dtype."""
        if dtype is not torch.float64:
            return self.factor
        return self.factor / 2 if self.at_least else self.factor * 2

    def met(self, measured: float, dtype: torch.dtype) -> bool:
        """Whether what was measured reaches it."""
        target = self.target(dtype)
        return measured >= target if self.at_least else measured <= target

    def text(self, dtype: torch.dtype) -> str:
        """For tables."""
        target = f"{self.target(dtype):.3g}"
        return f"{target}x" if self.at_least else f"{target} copies"


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


def goals(case: Case, device: torch.device) -> list[Goal]:
    """The bars that hold for a case; none for a batch of another size than theirs."""
    if case.batch != batch_of(case.n, device):
        return []
    table = GPU_GOALS if device.type == "cuda" else CPU_GOALS
    return [goal for goal in table if goal.op == case.op and case.assume in goal.assume and case.n in goal.sizes]


class Verdict(NamedTuple):
    """A bar of a case, and what was measured; None when it was not, or the answer was wrong."""

    case: Case
    goal: Goal
    measured: float | None

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached."""
        return None if self.measured is None else self.goal.met(self.measured, self.case.dtype)

    @property
    def text(self) -> str:
        """For tables."""
        word = {None: "not measured", True: "met", False: "NOT MET"}[self.met]
        return f"{self.goal.text(self.case.dtype)}: {word}"


def fastest(rows: Iterable[Row], case: Case, names: Sequence[str] | None = None) -> Row | None:
    """The row of the fastest peer, of those named if any are."""
    found = [
        row
        for row in rows
        if row.case == case and row.kind == "peer" and row.seconds is not None and (not names or row.name in names)
    ]
    return min(found, key=lambda row: row.seconds or 0.0, default=None)


def of_copy(rows: Iterable[Row], row: Row) -> float | None:
    """Share of the bandwidth of the copy of the same run."""
    copy = find(rows, row.case, COPY)
    if copy is None or row.bytes_per_second is None or copy.bytes_per_second is None:
        return None
    return row.bytes_per_second / copy.bytes_per_second


def verdicts(rows: Sequence[Row], device: torch.device) -> list[Verdict]:
    """Every bar that holds for a measured case."""
    found = []
    for case in dict.fromkeys(row.case for row in rows):
        for goal in goals(case, device):
            ours = find(rows, case)
            if goal.at_least:
                measured = ratio(fastest(rows, case, goal.against), ours)
            else:
                measured = ratio(ours, find(rows, case, COPY))
            found.append(Verdict(case, goal, measured))
    return found


def _nanoseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e9:.3g}" if seconds < 1e-6 else f"{seconds * 1e9:.0f}"


def rows_table(rows: Sequence[Row], device: torch.device) -> Table:
    """A line per case and backend, but for the reference: time, bandwidth, the fastest peer, the bars."""
    columns = (
        "op",
        "n",
        "dtype",
        "by",
        "ns a block",
        "GB/s",
        "of copy",
        "error",
        "fastest peer",
        "ns",
        "times",
        "bars",
    )
    found = verdicts(rows, device)
    lines = []
    for row in rows:
        case = row.case
        if row.kind != "backend" or (row.name == "reference" and row is not find(rows, case)):
            continue
        peer, share, rate = fastest(rows, case), of_copy(rows, row), row.bytes_per_second
        bars = [verdict.text for verdict in found if verdict.case == case] if row is find(rows, case) else []
        lines.append(
            (
                case.label,
                str(case.n),
                dtype_name(case.dtype),
                f"{row.name}, {REPLAY}" if row.note == REPLAY else row.name,
                _nanoseconds(row.seconds),
                "-" if rate is None else f"{rate / 1e9:.3g}",
                "-" if share is None else f"{share:.0%}",
                f"{row.error:.2g}",
                "-" if peer is None else peer.name,
                "-" if peer is None else _nanoseconds(peer.seconds),
                times(ratio(peer, row)),
                ("" if row.correct else "wrong answer; ") + ", ".join(bars),
            )
        )
    notes = (
        "GB/s counts the bytes that must be moved; of copy: against out.copy_(a) of the same batch in the same run.",
        f"error: LAPACK's test ratio, the largest of all blocks; {THRESHOLD:g} and more is wrong.",
        "Peers too slow for the whole batch are timed on its first blocks and scaled per block.",
        "The JSON has every peer, the reference, and on how many blocks each was timed.",
    )
    return Table("Blocks", columns, lines, notes)


def bars_table(found: Sequence[Verdict]) -> Table:
    """The bars that are not met."""
    lines = [
        (
            x.case.label,
            str(x.case.n),
            dtype_name(x.case.dtype),
            ("at least " if x.goal.at_least else "at most ") + x.goal.text(x.case.dtype),
            f"{x.measured:.3g}",
        )
        for x in found
        if x.measured is not None and not x.met
    ]
    known = [x for x in found if x.met is not None]
    note = f"{sum(x.met is True for x in known)} of {len(known)} bars met."
    return Table("Bars of the blocks that are not met", ("op", "n", "dtype", "bar", "measured"), lines, (note,))


def losses(rows: Sequence[Row]) -> list[str]:
    """Every comparison that we lose, in words: what `auto` takes against each peer, and any wrong answer of ours."""
    lost = []
    for row in rows:
        label = f"{row.case.label}, n = {row.case.n}, {dtype_name(row.case.dtype)}"
        if row.kind == "backend" and not row.correct:
            lost.append(f"{label}: {row.name} gives a wrong answer (ratio {row.error:.1e})")
        ours = find(rows, row.case)
        value = ratio(row, ours) if row.kind == "peer" else None
        if ours is not None and value is not None and value < 1:
            lost.append(f"{label}: {ours.name} takes {times(1 / value)} the time of {row.name}")
    return lost


def as_json(rows: Sequence[Row], device: torch.device) -> dict[str, Any]:
    """Everything as plain data; times in seconds per block."""
    found = verdicts(rows, device)

    def plain(row: Row) -> dict[str, Any]:
        peer = fastest(rows, row.case) if row.kind == "backend" else None
        return row.case._asdict() | {
            "dtype": dtype_name(row.case.dtype),
            "by": row.name,
            "kind": row.kind,
            "timed_blocks": row.blocks,
            "median": row.seconds,
            "min": row.best,
            "bytes": row.case.block_bytes,
            "flops": row.case.block_flops,
            "bytes_per_second": row.bytes_per_second,
            "of_copy_bandwidth": of_copy(rows, row),
            "error": row.error,
            "tolerance": THRESHOLD,
            "note": row.note,
            "fastest_peer": peer.name if peer else None,
            "speedup": ratio(peer, row) if peer else None,
        }

    return {
        "rows": [plain(row) for row in rows],
        "bars": [
            {
                "op": x.case.op,
                "assume": x.case.assume,
                "n": x.case.n,
                "dtype": dtype_name(x.case.dtype),
                "against": list(x.goal.against),
                "target": x.goal.target(x.case.dtype),
                "at_least": x.goal.at_least,
                "measured": x.measured,
                "met": x.met,
            }
            for x in found
        ],
        "lost": losses(rows),
    }
