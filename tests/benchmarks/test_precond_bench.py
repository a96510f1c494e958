"""The benchmark of the `precond` family: its cases, its checks and the command."""

from __future__ import annotations

import json
import math

import pytest
import torch

from secant import backends
from secant.__main__ import main
from secant.benchmarks.case import find, no_compile
from secant.benchmarks.families import precond
from secant.benchmarks.families.precond import Case
from secant.benchmarks.measure import measure

CPU = torch.device("cpu")
CASES = precond.small_cases()
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)


def test_bytes_and_operations_are_those_of_the_readme():
    """A step moves 11 + 2 / n times the bytes of its parameters, with 3 n^3 multiply-adds a tile, SOAP 7 n^3."""
    n = 64
    case = Case("precond_step", 10, n, n, torch.float32, "shampoo")
    assert case.nbytes == 10 * n * n * 4 * (11 + 2 / n)
    soap = case.replace(method="soap")
    for one, cubes in ((case, 3), (soap, 7)):
        assert one.flops == 10 * (2 * (cubes * n**3 + n * n) + 20 * n * n)
    tall = Case("precond_step", 1, 8, 4, torch.float64, "shampoo")
    assert tall.nbytes == 8 * (7 * 32 + 64 + 16 + 8 * 9 + 4 * 5)
    assert Case("newton_schulz", 3, 5, 7).nbytes == 3 * 35 * 8
    assert Case("newton_schulz", 1, 7, 5).flops == 2 * 5 * (2 * 25 * 7 + 125)


@every_case
def test_every_contender_is_right(case):
    problem = case.problem(CPU)
    found = case.contenders(problem, no_compile)
    assert [one.name for one in found] == case.names(CPU)[:-1]
    assert case.names(CPU)[-1] == "compiled"
    for one in found:
        check = one.check(problem)
        assert 0 <= check.excess <= 1, (one.name, check)
        assert one.case is case
        before = problem.state.copy() if case.op == "precond_step" else None
        one.timed.calls[0]()
        if before is not None:  # a turn leaves the parameters
            assert all(map(torch.equal, before.params, problem.state.params))


def test_compiled_steps_are_the_same_functions():
    """What a compiler gets, uncompiled: the answer of the eager contender."""
    for case in CASES[:2]:
        problem = case.problem(CPU)
        answer = precond._torch_step(case, False, problem.state.copy(), 1.0)()
        assert problem.error(answer) < precond.TOLERANCE * torch.finfo(torch.float32).eps
    assert "compiled" not in Case("precond_step", 300, 4, 4, method="soap").names(CPU)


@pytest.mark.parametrize("value", [1.1, math.nan])
@every_case
def test_a_wrong_answer_has_no_speed(monkeypatch, case, value):
    backend = backends.load("precond", case.serving(CPU)[0])
    name = {"precond_step": "step"}.get(case.op, case.op)
    right = getattr(backend, name)

    def wrong(*args):
        right(*args)
        place = {"newton_schulz": -1, "newton_inv_root": -2}
        (args[0].params[1] if name == "step" else args[place[name]])[0].mul_(value)

    monkeypatch.setattr(backend, name, wrong)
    rows = measure([case], CPU, seconds=0.0, wanted=no_compile)
    ours = find(rows, case)
    assert (ours.seconds, ours.note) == (None, "wrong answer")
    assert find(rows, case, case.names(CPU)[-2]).seconds > 0


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    target, picture = tmp_path / "out.json", tmp_path / "out.png"
    assert main(["bench", "--family", "precond", "--quick", "--json", str(target), "--plot", str(picture)]) == 0
    found = json.loads(target.read_text())["families"]["precond"]
    assert {row["op"] for row in found["rows"]} == {case.op for case in CASES}
    assert all(row["median"] > 0 for row in found["rows"])
    assert picture.stat().st_size > 10_000
    assert "Preconditioned steps" in capsys.readouterr().out
