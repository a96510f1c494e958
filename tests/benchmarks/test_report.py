from __future__ import annotations

import json
import math

import pytest
import torch

from secant.benchmarks import families, report
from secant.benchmarks.case import Bar, Row, no_compile, ratios
from secant.benchmarks.families.lbfgs import LIMIT, Case, cpu_bars, gpu_bars
from secant.benchmarks.optimizers import OutsideClosure
from secant.benchmarks.report import losses
from secant.benchmarks.timing import REPLAY, Timing

SMALL, LARGE = Case("two_loop", 10**3), Case("two_loop", 10**7)


def row(case, name, seconds, kind="backend", error=0.0, note=""):
    return Row(case, name, kind, None if seconds is None else Timing((seconds,)), error, 1e-6, note)


def overhead(n, history, torch_seconds, secant_seconds):
    case = OutsideClosure("LBFGS", n, history)
    return [row(case, "secant", secant_seconds), row(case, "torch", torch_seconds, "peer")]


ROWS = [
    row(SMALL, "cpu", 10e-6),
    row(SMALL, "reference", 500e-6),
    row(SMALL, "eager", 250e-6, "peer"),
    row(SMALL, "compact", 5e-6, "peer"),
    row(LARGE, "cpu", 0.070),
    row(LARGE, "eager", 0.105, "peer"),
    row(LARGE, LIMIT, 0.056, "limit"),
]


def test_ratios_are_per_case_and_only_of_peers():
    assert ratios(ROWS, ROWS[0]) == pytest.approx({"eager": 25.0, "compact": 0.5})
    assert ratios(ROWS, ROWS[1]) == pytest.approx({"eager": 0.5, "compact": 0.01})
    assert ratios(ROWS, ROWS[4]) == pytest.approx({"eager": 1.5})


def test_ratios_compare_replays_with_replays():
    replays = [row(SMALL, "cuda", 2e-6, note=REPLAY), row(SMALL, "compact", 8e-6, "peer", note=REPLAY)]
    assert ratios([*ROWS, *replays], replays[0]) == pytest.approx({"compact": 4.0})
    assert ratios([*ROWS, *replays], ROWS[0]) == pytest.approx({"eager": 25.0, "compact": 0.5})


def test_cpu_bars():
    overheads = [*overhead(10**3, 10, 500e-6, 100e-6), *overhead(10**6, 10, 3e-3, 2e-3)]
    bars = {bar.measure: bar for bar in cpu_bars([*ROWS, *overheads], {"secant": 2e-7, "eager": 6e-7})}
    found = {bar.measured and round(bar.measured, 9): bar.met for bar in bars.values()}
    assert found[25.0] is True  # at least 20
    assert found[1.5] is False  # at least 2.2, and the optimizer: at least 2
    assert found[1.25] is True  # two reads: at most 1.3
    assert found[5.0] is True  # the optimizer, n = 1e3
    assert found[2e-7] is True
    assert sum(bar.met is None for bar in bars.values()) == 7
    assert len(bars) == 13
    assert all(bar.measured is None for bar in cpu_bars([], None))


def test_cpu_bars_of_bf16():
    wide, narrow = (Case("direction", 10**7, storage=x) for x in (torch.float32, torch.bfloat16))
    bars = cpu_bars([row(wide, "cpu", 0.1), row(narrow, "cpu", 0.05)], None)
    assert [(bar.measured, bar.met) for bar in bars if bar.measured is not None] == [(2.0, True)]


def test_gpu_bars():
    step, batched = Case("step", 10**7), Case("two_loop", 64, batch=10_000)
    bandwidth = 2e12
    rows = [
        row(step, "cuda", 2 * step.history_bytes / (0.85 * bandwidth)),
        row(batched, "cuda", 2 * batched.history_bytes / (0.5 * bandwidth)),
        row(SMALL, "cuda", 30e-6),
        row(SMALL, "cuda", 9e-6, note=REPLAY),
    ]
    bars = gpu_bars(rows, bandwidth)
    assert [bar.met for bar in bars] == [True, False, True, None, None]
    assert [bar.measured for bar in bars[:3]] == pytest.approx([0.85, 0.5, 9.0])


def test_bars_table_says_met_not_met_or_why_not():
    bars = [Bar("a", 2.0, True, 3.0), Bar("b", 2.0, True, 1.0), Bar("c", 1.0, False, None, "no GPU")]
    table = report.bars_table(bars)
    assert [line[1:] for line in table.rows] == [("≥ 2", "3", "met"), ("≥ 2", "1", "NOT MET"), ("≤ 1", "-", "no GPU")]


def test_losses_name_what_auto_loses_and_what_is_wrong():
    rows = [*ROWS, row(Case("step", 10), "cpu", None, error=math.nan)]
    lost = losses([*rows, *overhead(10**3, 100, 1.0, 2.0)])
    assert len(lost) == 3
    assert "wrong answer" in lost[0]
    assert "cpu takes 2x the time of compact" in lost[1]
    assert "history 100: secant takes 2x the time of torch" in lost[2]


def test_rows_table_shows_speed_against_the_bandwidth_the_limit_and_every_peer():
    table = report.rows_table("Directions", ROWS, LARGE.nbytes / 0.056, cpu_bars(ROWS, None))
    small, large = (dict(zip(table.columns, line, strict=True)) for line in table.rows)
    assert (large["of bandwidth"], large["median"], large["times longer"]) == ("80%", "70 ms", "eager 1.5x")
    assert large["of limit"] == f"{LARGE.nbytes / 0.070 / (2 * LARGE.history_bytes / 0.056):.0%}"
    assert large["bars"] == "2.2x: NOT MET, 1.3 times two reads: met"
    assert (small["of limit"], small["times longer"]) == ("-", "eager 25x, compact 0.5x")
    assert LIMIT in table.notes[1]


def test_rows_table_says_what_a_peer_could_not_do():
    rows = [*ROWS[:3], row(SMALL, "compiled", None, "peer", math.nan, "failed: RuntimeError")]
    assert report.rows_table("", rows, None).rows[0][-2] == "eager 25x, compiled: failed: RuntimeError"


def test_the_limit_is_that_of_the_case_or_of_as_many_bytes_of_its_input():
    step, narrow = Case("step", 10**7), Case("step", 10**7, storage=torch.bfloat16)
    rows = [*ROWS, row(step, "cpu", 0.1), row(narrow, "cpu", 0.1)]
    assert report.limit_of(rows, rows[-2]) is ROWS[6]
    assert report.limit_of(rows, rows[-1]) is None
    own = row(step, LIMIT, 0.2, "limit")
    assert report.limit_of([*rows, own], rows[-2]) is own


def test_json_is_plain_data():
    rows = [*ROWS, *overhead(10, 5, 2.0, 1.0)]
    bars = cpu_bars(ROWS, None)
    data = json.loads(json.dumps(report.as_json(rows, bars, 1e10)))
    assert data["bandwidth"] == 1e10
    assert data["rows"][0]["speedup_over"] == pytest.approx({"eager": 25.0, "compact": 0.5})
    assert data["rows"][0]["bandwidth_fraction"] == pytest.approx(SMALL.nbytes / 10e-6 / 1e10)
    assert data["rows"][-2]["speedup_over"] == {"torch": 2.0}
    assert SMALL.parameters().items() <= data["rows"][0].items()
    assert [bar["met"] for bar in data["bars"]] == [bar.met for bar in bars]
    assert len(data["lost"]) == 1


@pytest.mark.parametrize("name", families.NAMES)
def test_names_are_those_of_the_contenders(name):
    device = torch.device("cpu")
    for [case, *_] in families.load(name).groups(device, quick=True):
        found = case.contenders(case.problem(device), no_compile)
        assert [one.name for one in found] == [x for x in case.names(device) if no_compile(case, x)]
        assert {one.case for one in found} == {case}


def test_every_family_has_rows_of_one_shape():
    """The keys of all families are the same but for the parameters of their cases."""
    keys = set()
    for name in families.NAMES:
        family = families.load(name)
        for [case, *_] in family.groups(torch.device("cpu"), quick=True):
            data = report.plain_row([], row(case, "cpu", 1e-3), 1e10)
            assert data["unit"] in ("run", "problem") or (data["bytes"] > 0 and data["flops"] > 0)
            assert data.keys() >= case.parameters().keys()
            keys.add(frozenset(data.keys() - case.parameters().keys()))
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (2.5, "2.5 s"), (0.0123456, "12.3 ms"), (8.1e-6, "8.1 µs"), (2e-8, "0.02 µs")]
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


def test_times():
    assert [report.times(x) for x in (None, 0.5, 12.34, 123.4)] == ["-", "0.5x", "12.3x", "123x"]
