"""The measurement of some cases: every contender is checked first, then those that are right are timed in turns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from secant.benchmarks import machine
from secant.benchmarks.case import Case, Check, Contender, Row, Wanted, everything
from secant.benchmarks.timing import REPLAY, Timed, captured, clock_for, has_graphs, interleaved


def copies(case: Case, device: torch.device) -> int:
    """Count the inputs that take turns so that none is in the cache of a GPU, at most `MAX_COPIES` of the case."""
    return max(1, min(case.MAX_COPIES, math.ceil(2 * machine.cache_bytes(device) / max(1, case.input_bytes))))


def fits(cases: Sequence[Case], device: torch.device) -> bool:
    """Say whether there is memory to measure these cases together."""
    free = machine.free_bytes(device)
    return free is None or copies(cases[0], device) * cases[0].memory(cases, device) < free


def measure(cases: Sequence[Case], device: torch.device, *, seconds: float, wanted: Wanted = everything) -> list[Row]:
    """Check some cases on one input, then time them all in turns.

    Args:
        cases: what to compute, all on the same input.
        device: where.
        seconds: to spend on the timing, roughly.
        wanted: which contenders of which case, by name.

    Returns:
        A row per case and contender, of each case the backends first; on a GPU one of each that was replayed from a
        graph; and that of the limit.

    Raises:
        ValueError: the cases need more than one input.
    """
    first = cases[0]
    if len({case.input for case in cases}) != 1:
        *most, last = first.INPUT
        raise ValueError(f"measure: cases: expected one {', '.join(most)} and {last}, got {list(cases)}")
    problems = [first.problem(device, seed) for seed in range(copies(first, device))]
    built = [[one for case in cases for one in case.contenders(problem, wanted)] for problem in problems]
    checked, replayed = list[tuple[Contender, Check, str]](), list[tuple[Contender, Check, str]]()
    timed: dict[tuple[Case, str, str], Timed] = {}
    for group in zip(*built, strict=True):
        one, check, note = _checked(group, problems, device)
        checked.append((one, check, note))
        if check.excess <= 1:
            calls = [one.timed.calls, *(other.timed.calls for other in group[1:])]
            turn = one.timed._replace(calls=[call for some in calls for call in some])
            timed[one.case, one.name, ""] = turn
            if has_graphs(device) and one.capturable:
                graph = captured(turn, device)
                replayed.append((one, check, graph if isinstance(graph, str) else REPLAY))
                if isinstance(graph, Timed):
                    timed[one.case, one.name, REPLAY] = graph
    limit = first.limit(problems[0])
    if limit is not None and wanted(first, first.LIMIT):
        timed[first, first.LIMIT, ""] = Timed([limit])
    timings = interleaved(timed, clock_for(device), seconds=seconds)

    def row(one: Contender, check: Check, note: str, way: str) -> Row:
        timing = timings.get((one.case, one.name, way))
        per_unit = None if timing is None else timing.per(one.units)
        return Row(one.case, one.name, one.kind, per_unit, check.error, check.bound, note, one.units)

    rows = [row(*one, "") for one in checked] + [row(*one, REPLAY) for one in replayed]
    if (first, first.LIMIT, "") in timings:
        units = first.units
        timing = timings[first, first.LIMIT, ""].per(units)
        rows.append(Row(first, first.LIMIT, "limit", timing, 0.0, 0.0, "", units))
    return rows


def _checked(
    group: Sequence[Contender], problems: Sequence[object], device: torch.device
) -> tuple[Contender, Check, str]:
    """Check a contender on what it is timed on; the worst of its checks on all inputs, and what is to be said."""
    one = group[0]
    try:
        one = one.fitting(clock_for(device))
    except Exception as failure:
        if one.kind == "backend":
            raise
        check = Check(math.nan, math.nan, f"failed: {type(failure).__name__}")
        return one, check, check.failure
    checks = [x.check(problem) for x, problem in zip([one, *group[1:]], problems, strict=True)]
    check = max(checks, key=lambda check: check.excess)
    part = (
        "" if one.units == group[0].units else f"timed on {one.units:,} of {group[0].units:,} {one.case.UNIT}s, scaled"
    )
    return one, check, part if check.excess <= 1 else check.failure or "wrong answer"
