"""The guide's page and the examples in it exist as they are written."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import secant

PAGE = (Path(__file__).resolve().parents[2] / "docs/curvature.md").read_text()


def test_the_calls_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs, targets = torch.randn(9, 3), torch.randint(0, 2, (9,))
    params = list(model.parameters())
    closures = {
        "Hessian": lambda: F.cross_entropy(model(inputs), targets),
        "GGN": lambda: (outputs := model(inputs), F.cross_entropy(outputs, targets)),
        "Fisher": lambda: model(inputs),
        "EmpiricalFisher": lambda: (outputs := model(inputs), F.cross_entropy(outputs, targets, reduction="none")),
        "Jacobian": lambda: (model(inputs) - 1.0, 0.1 * params[0]),
    }
    n = sum(p.numel() for p in params)
    names = {"secant": secant, "nn": nn, "params": params, "model": model, "inputs": inputs, "targets": targets}
    m = 9 * 2 + params[0].numel()
    names |= {"v": torch.randn(n), "V": torch.randn(n, 2), "u": torch.randn(m), "U": torch.randn(m, 2)}
    names |= {"r": torch.randn(m), "torch": torch, "losses": lambda: closures["EmpiricalFisher"]()[1]}
    names["residual_closure"] = closures["Jacobian"]
    block = [line.strip() for line in re.findall(r"^    (.+)$", PAGE, flags=re.M)]
    assert len(block) >= 12
    for line in block:
        kind = re.search(r"curvature\.(\w+)\(closure", line)
        if kind:
            names["closure"] = closures[kind[1]]
        exec(line, names)
    assert (tmp_path / "spectrum.png").exists()
    for name in closures:
        operator = names[name[0]]
        assert isinstance(operator, getattr(secant.curvature, name))
        assert torch.isfinite(operator @ names["v"]).all()


def test_the_examples_of_the_docstrings_say_what_comes():
    for cls in (secant.curvature.EvaluatedPoint, secant.curvature.Jacobian):
        for test in doctest.DocTestFinder(recurse=False).find(
            cls, cls.__name__, globs={"secant": secant, "torch": torch}
        ):
            runner = doctest.DocTestRunner()
            runner.run(test)
            assert runner.tries > 2
            assert runner.failures == 0
