"""pytest-benchmark over the `blocks` cases: every n from 1 to 64, every backend and every peer on the same batch.

    pytest bench/test_blocks.py --benchmark-group-by=group --benchmark-sort=fullname

A group is a case. What pytest-benchmark measures one after the other is also taken in turns first, and what
`extra_info` has is of those turns: time a block, share of the copy bandwidth, and how many times longer the fastest
peer takes. SECANT_BENCH_DEVICE=cuda runs it on a GPU, SECANT_BENCH_QUICK=1 on a few small batches.
`python -m secant bench --family blocks --full --plot FILE` draws the same cases, one curve per backend and peer.
"""

from __future__ import annotations

import os

import pytest
import torch

from secant.benchmarks import blocks, blocks_report, report
from secant.benchmarks.blocks import Case, Problem

DEVICE = torch.device(os.environ.get("SECANT_BENCH_DEVICE", "cpu"))
QUICK = os.environ.get("SECANT_BENCH_QUICK", "0") == "1"
#: Seconds of turns per case; samples and calls before them of pytest-benchmark, whose own choice would take hours.
SECONDS, ROUNDS, WARM_UP = (0.0, 3, 1) if QUICK else (0.1, 5, 1)

CASES = blocks.small_cases() if QUICK else blocks.cases(DEVICE, full=True)


def _label(case: Case) -> str:
    return f"{case.label.replace(', ', ' ')} n={case.n:02} {report.dtype_name(case.dtype)}"


#: By case, so that one batch is in memory at a time.
PARAMETERS = [
    pytest.param(case, name, id=f"{_label(case)} {name}")
    for case in CASES
    for name in (*blocks.serving(case, DEVICE), *blocks.peers(case, DEVICE))
]


class Group:
    """The rows taken in turns, and one problem with its contenders."""

    def __init__(self, case: Case) -> None:
        self.rows = blocks.measure(case, DEVICE, seconds=SECONDS)
        self.problem = Problem(case, DEVICE)
        self.contenders = {one.name: one for one in blocks.contenders(self.problem)}


@pytest.mark.parametrize(("case", "name"), PARAMETERS)
def test_block(benchmark, group_of, to_the_end, case, name):
    group = group_of(case)
    row, contender = report.find(group.rows, case, name), group.contenders[name]
    assert row.correct, f"{row.note}: test ratio {row.error:.1e}: a wrong answer has no speed"
    call = contender.on(group.problem, row.blocks)
    benchmark.group = _label(case)
    with contender.around():
        benchmark.pedantic(to_the_end(call, DEVICE), rounds=ROUNDS, warmup_rounds=WARM_UP)
    benchmark.extra_info.update(
        blocks=row.blocks,
        ns_per_block=row.seconds * 1e9,
        GB_per_s=row.bytes_per_second / 1e9,
        of_copy_bandwidth=blocks_report.of_copy(group.rows, row),
        times_slower_fastest_peer=report.ratio(blocks_report.fastest(group.rows, case), row),
        error=row.error,
    )
