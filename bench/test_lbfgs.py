"""pytest-benchmark over the `lbfgs` cases: every backend and every peer on the same input.

    pytest bench --benchmark-group-by=group --benchmark-sort=fullname

A group is a case. What pytest-benchmark measures one after the other is also taken in turns first, and the ratios in
`extra_info` are of those turns. SECANT_BENCH_DEVICE=cuda runs it on a GPU, SECANT_BENCH_QUICK=1 on small inputs.
"""

from __future__ import annotations

import os

import pytest
import torch

from secant.benchmarks import lbfgs, machine, report
from secant.benchmarks.lbfgs import Case, Problem

DEVICE = torch.device(os.environ.get("SECANT_BENCH_DEVICE", "cpu"))
QUICK = os.environ.get("SECANT_BENCH_QUICK", "0") == "1"
#: Seconds of turns per group of cases.
SECONDS = 0.02 if QUICK else 1.0


def _wanted(case: Case, name: str) -> bool:
    return not (QUICK and name == "compiled")


def _names(case: Case) -> list[str]:
    return [name for name in (*lbfgs.serving(case, DEVICE), *lbfgs.peer_names(case)) if _wanted(case, name)]


GROUPS = [tuple(group) for group in lbfgs.groups(DEVICE, quick=QUICK)]


def _label(case: Case) -> str:
    return f"{case.op} {case.shape.replace(' ', '')} {report.dtype_name(case.storage)}"


#: Grouped, so that one group's inputs are in memory at a time.
PARAMETERS = [
    pytest.param(group, case, name, id=f"{_label(case)} {name}")
    for group in GROUPS
    for case in group
    for name in _names(case)
]


@pytest.fixture(scope="session")
def bandwidth() -> machine.Bandwidth:
    return machine.bandwidth(DEVICE)


class Group:
    """The rows taken in turns, and one problem with its contenders."""

    def __init__(self, cases: tuple[Case, ...]) -> None:
        self.rows = lbfgs.measure(cases, DEVICE, seconds=SECONDS, wanted=_wanted)
        problem = Problem(cases[0], DEVICE)
        found = (c for case in cases for c in lbfgs.contenders(case, problem, _wanted))
        self.contenders = {(c.case, c.name): c for c in found}


@pytest.mark.parametrize(("cases", "case", "name"), PARAMETERS)
def test_direction(benchmark, group_of, to_the_end, bandwidth, cases, case, name):
    group = group_of(cases)
    row, contender = report.find(group.rows, case, name), group.contenders[case, name]
    assert row.correct, f"error {row.error:.1e} over {row.tolerance:.1e}: a wrong answer has no speed"
    turn = contender.timed.calls

    def call() -> None:
        for one in turn:
            one()

    benchmark.group = _label(case)
    with contender.timed.around():
        benchmark(to_the_end(call, DEVICE))
    benchmark.extra_info.update(
        calls=len(turn),
        GB_per_s=row.bytes_per_second / 1e9,
        of_bandwidth=row.bytes_per_second / bandwidth.bytes_per_second,
        times_slower_peers=report.ratios(group.rows, row),
        error=row.error,
    )
