"""pytest-benchmark over the `hvp` cases: every backend and every peer on the same rows.

    pytest bench/test_hvp.py --benchmark-group-by=group --benchmark-sort=fullname

A group is a case. What pytest-benchmark measures one after the other is also taken in turns first, and what
`extra_info` has is of those turns: GB/s of the bytes that must move, and how many times longer each peer takes.
SECANT_BENCH_DEVICE=cuda runs it on a GPU, SECANT_BENCH_QUICK=1 on small inputs without compiling.
`python -m secant bench --family hvp --plot FILE` draws the same cases.
"""

from __future__ import annotations

import os

import pytest
import torch

from secant.benchmarks import hvp, report
from secant.benchmarks.hvp import Case, Problem

DEVICE = torch.device(os.environ.get("SECANT_BENCH_DEVICE", "cpu"))
QUICK = os.environ.get("SECANT_BENCH_QUICK", "0") == "1"
SECONDS, ROUNDS, WARM_UP = (0.0, 3, 1) if QUICK else (1.0, 5, 1)
CASES = hvp.small_cases(DEVICE) if QUICK else hvp.cases(DEVICE)


class Group:
    """The rows taken in turns, and one problem with its contenders."""

    def __init__(self, case: Case) -> None:
        self.rows = hvp.measure(case, DEVICE, seconds=SECONDS, compiled=not QUICK)
        self.contenders = {one.name: one for one in hvp.contenders(Problem(case, DEVICE), compiled=not QUICK)}


def _names(case: Case) -> list[str]:
    ours = [name for name in hvp.serving(case, DEVICE) if name != "reference"] or ["reference"]
    return [*ours, "eager", *(() if QUICK else ("compiled",))]


PARAMETERS = [
    pytest.param(case, name, id=f"{case.label} {report.dtype_name(case.dtype)} {name}")
    for case in CASES
    for name in _names(case)
]


@pytest.mark.parametrize(("case", "name"), PARAMETERS)
def test_hvp(benchmark, group_of, to_the_end, case, name):
    group = group_of(case)
    row = report.find(group.rows, case, name)
    assert row is not None
    assert row.note == "" or row.kind == "peer", f"{name}: {row.note}"
    if row.seconds is None:
        pytest.skip(row.note)
    benchmark.group = f"{case.label}, {report.dtype_name(case.dtype)}"
    benchmark.extra_info.update(
        {
            "GB/s": row.bytes_per_second / 1e9,
            "error": row.error,
            "times longer than ours": report.ratio(row, report.find(group.rows, case)),
        }
    )
    one = group.contenders[name]
    with one.around():
        benchmark.pedantic(to_the_end(one.call, DEVICE), rounds=ROUNDS, warmup_rounds=WARM_UP)
