"""pytest-benchmark over the cases of every family: every backend and every peer on the same input.

    pytest bench/test_families.py --benchmark-group-by=group --benchmark-sort=fullname

A group is a case. What pytest-benchmark measures one after the other is also taken in turns first, and what
`extra_info` has is of those turns, as `python -m secant bench --json` writes it. SECANT_BENCH_DEVICE=cuda runs it on a
GPU, SECANT_BENCH_QUICK=1 on small inputs without compiling, SECANT_BENCH_FULL=1 over every size.
"""

from __future__ import annotations

import os

import pytest
import torch

from secant.benchmarks import families, machine, report
from secant.benchmarks.case import Case, everything, find, no_compile
from secant.benchmarks.measure import fits, measure
from secant.benchmarks.race import Race

DEVICE = torch.device(os.environ.get("SECANT_BENCH_DEVICE", "cpu"))
QUICK, FULL = (os.environ.get(f"SECANT_BENCH_{name}", "0") == "1" for name in ("QUICK", "FULL"))
WANTED = no_compile if QUICK else everything
#: Share of the seconds of a family that the turns take, most rounds and calls before them of pytest-benchmark, whose
#: own choice would take hours.
SHARE, ROUNDS, WARM_UP = (0.0, 3, 1) if QUICK else (0.5, 5, 1)


class Group:
    """The rows of some cases taken in turns, and one input with its contenders."""

    def __init__(self, key: tuple[float, tuple[Case, ...]]) -> None:
        seconds, cases = key
        self.rows = measure(cases, DEVICE, seconds=SHARE * seconds, wanted=WANTED)
        problem = cases[0].problem(DEVICE)
        self.contenders = {(x.case, x.name): x for case in cases for x in case.contenders(problem, WANTED)}


#: Grouped, so that one group's inputs are in memory at a time.
PARAMETERS = [
    pytest.param((family.seconds, tuple(group)), case, name, id=f"{case.label} {name}")
    for family in map(families.load, families.NAMES)
    for group in family.groups(DEVICE, quick=QUICK, full=FULL)
    if fits(group, DEVICE)
    for case in group
    if not isinstance(case, Race)  # runs of seconds or minutes, for `python -m secant bench`
    for name in case.names(DEVICE)
    if WANTED(case, name)
]


@pytest.fixture(scope="session")
def bandwidth() -> float:
    return machine.bandwidth(DEVICE).bytes_per_second


@pytest.mark.parametrize(("key", "case", "name"), PARAMETERS)
def test_case(benchmark, group_of, to_the_end, bandwidth, key, case, name):
    group = group_of(key)
    row, contender = find(group.rows, case, name), group.contenders[case, name]
    assert row.correct or row.kind == "peer", f"{row.note}: error {row.error:.1e}: a wrong answer has no speed"
    if row.timing is None:
        pytest.skip(row.note)
    if contender.part is not None:
        contender = contender._replace(timed=contender.timed._replace(calls=[contender.part(row.units)]))

    def call() -> None:
        for one in contender.timed.calls:
            one()

    benchmark.group = case.label
    with contender.timed.around():
        benchmark.pedantic(to_the_end(call, DEVICE), rounds=ROUNDS, warmup_rounds=WARM_UP)
    benchmark.extra_info.update(report.plain_row(group.rows, row, bandwidth))
