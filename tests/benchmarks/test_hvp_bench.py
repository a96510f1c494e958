"""The benchmark of the `hvp` family: its cases, its checks, its bars, and the command."""

from __future__ import annotations

import json
import math

import pytest
import torch

from secant import backends
from secant.__main__ import main
from secant.benchmarks import machine, report
from secant.benchmarks import measure as measuring
from secant.benchmarks.case import Bar, Row, find, no_compile
from secant.benchmarks.families import hvp
from secant.benchmarks.families.hvp import READ, Case, Problem
from secant.benchmarks.measure import copies, measure
from secant.benchmarks.timing import REPLAY, Timing

CPU = torch.device("cpu")
CASES = hvp.small_cases(CPU)


def named(case):
    return f"{case.op} {case.k}{' sparse' * bool(case.entries)}"


def test_bytes_count_x_once():
    assert Case("glm_hvp", 10, 3, 2).nbytes == (30 + 10 + 12) * 4
    assert Case("glm_hvp", 10, 3, 1, torch.bfloat16).nbytes == 30 * 2 + (10 + 6) * 4
    assert Case("softmax_hvp", 10, 3, 5).nbytes == (30 + 50 + 30) * 4
    assert Case("cross_entropy_hvp", 10, 3).nbytes == 90 * 4
    assert Case("gram", 10, 3).nbytes == (30 + 9) * 4
    assert Case("glm_hvp", 10, 30, 2, entries=4).nbytes == 10 * (4 * 8 + 4) + (10 + 120) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_contender_is_right(case, dtype):
    if dtype is torch.bfloat16 and (case.entries or case.op not in ("glm_hvp", "cross_entropy_hvp")):
        pytest.skip("peers take X of one dtype, sparse rows are of float32 or float64")
    case = case.replace(dtype=dtype)
    problem = Problem(case, CPU)
    found = case.contenders(problem, no_compile)
    assert [one.name for one in found] == [*case.serving(CPU), "eager"]
    for one in found:
        with one.timed.around():
            error = problem.error(one.probe())
        # Sums of at most 300 terms, and cross entropy rounded to its dtype.
        assert 0 <= error < 600 * torch.finfo(case.compute).eps + 4 * torch.finfo(dtype).eps, one.name


@pytest.mark.parametrize("case", [case for case in CASES if not case.entries], ids=named)
def test_what_is_compiled_is_right(monkeypatch, case):
    monkeypatch.setattr(hvp, "compiled", lambda function: torch.compile(function, backend="aot_eager"))
    problem = Problem(case, CPU)
    [one] = case.contenders(problem, lambda case, name: name == "compiled")
    assert 0 <= problem.error(one.probe()) < 600 * torch.finfo(case.compute).eps


@pytest.mark.parametrize("value", [1.01, math.nan])
def test_a_wrong_answer_has_no_speed(monkeypatch, value):
    case = CASES[0]
    first = case.serving(CPU)[0]
    backend = backends.load("hvp", first)
    right = backend.glm_hvp

    def wrong(x, v, weight, l2, out):
        right(x, v, weight, l2, out)
        out[7] *= value

    monkeypatch.setattr(backend, "glm_hvp", wrong)
    rows = measure([case], CPU, seconds=0.0, wanted=no_compile)
    ours = find(rows, case)
    assert (ours.name, ours.seconds, ours.bytes_per_second, ours.note) == (first, None, None, "wrong answer")
    assert find(rows, case, "eager").seconds > 0
    assert any("wrong answer" in line for line in report.losses(rows))


def test_a_peer_that_fails_fails_alone(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such library")

    monkeypatch.setattr(hvp, "_softmax_hvp", broken)
    rows = measure([CASES[3]], CPU, seconds=0.0, wanted=no_compile)
    assert find(rows, CASES[3], "eager").note == "failed: RuntimeError"
    assert find(rows, CASES[3]).seconds > 0


def test_the_bars_are_those_of_the_full_cases():
    def row(case, name, kind, seconds):
        return Row(case, name, kind, Timing((seconds,)), 0.0, 1.0)

    rows = []
    for case in hvp.cases(CPU):
        rows += [row(case, "cpu", "backend", 1.0), row(case, "eager", "peer", 5.0), row(case, READ, "limit", 1.0)]
    bars = {bar.measure: bar for bar in hvp.cpu_bars(rows)}
    assert len(bars) == 13
    measure = "glm_hvp 200,000 x 784, k = 8 against eager, times faster"
    assert bars[measure][:4] == Bar(measure, 8.0, True, 5.0)[:4]
    assert bars[measure].case == Case("glm_hvp", 200_000, 784, 8)
    assert bars["gram 3,500 x 449, float64 against eager, times faster"].target == 1.6
    assert [bar.met for bar in bars.values()].count(False) == 2
    assert bars[f"glm_hvp 200,000 x 784, k = 1 against {READ}, times longer"].met is True


def test_the_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    target, picture = tmp_path / "out.json", tmp_path / "out.png"
    assert main(["bench", "--family", "hvp", "--quick", "--json", str(target), "--plot", str(picture)]) == 0
    found = json.loads(target.read_text())["families"]["hvp"]
    assert {row["op"] for row in found["rows"]} == {case.op for case in CASES}
    assert all(row["median"] > 0 for row in found["rows"])
    assert picture.stat().st_size > 10_000
    assert "Products" in capsys.readouterr().out


def test_copies_outgrow_the_cache_of_a_gpu(monkeypatch):
    case = Case("glm_hvp", 1_000_000, 8)
    assert copies(case, CPU) == 1
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 50 * 10**6)
    assert copies(case, CPU) == 3
    assert copies(Case("glm_hvp", 200_000, 784), CPU) == 1
    assert copies(Case("glm_hvp", 10, 8), CPU) == Case.MAX_COPIES


def test_backends_are_timed_by_graph_replay_too(monkeypatch):
    """Where there are graphs: a row more for each backend, behind the calls; what cannot be captured says so."""
    case = Case("glm_hvp", 50, 8)
    turns = []

    def captured(timed, device):
        turns.append(len(timed.calls))
        return timed if len(turns) == 1 else "not captured: RuntimeError"

    monkeypatch.setattr(measuring, "has_graphs", lambda device: True)
    monkeypatch.setattr(measuring, "captured", captured)
    monkeypatch.setattr(measuring, "copies", lambda case, device: 2)
    rows = measure([case], CPU, seconds=0.0, wanted=no_compile)
    assert turns == [2, 2]
    found = [(row.name, row.note, row.seconds is not None) for row in rows if row.kind == "backend"]
    first, second = case.serving(CPU)[:2]
    assert found == [
        (first, "", True), (second, "", True), (first, REPLAY, True), (second, "not captured: RuntimeError", False)
    ]  # fmt: skip
    assert find(rows, case).note == ""
    assert not any("wrong answer" in line for line in report.losses(rows))
