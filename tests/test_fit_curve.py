"""The example that fits curves: a robust loss finds what outliers hide from squares."""

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "fit_curve.py"
    spec = importlib.util.spec_from_file_location("fit_curve", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_outliers_pull_squares_and_not_the_robust_loss(example):
    truth = torch.tensor(example.TRUE, dtype=torch.float64)
    t = torch.linspace(0, 3, 60, dtype=torch.float64)
    error = {
        loss: float((example.decay(example.fit_decay(loss), t) - example.decay(truth, t)).abs().max())
        for loss in ("linear", "cauchy")
    }
    # 9 of 60 points lie 1.5 higher: 0.2 on average; without them three parameters are known to the noise.
    assert error["linear"] > 0.1
    assert error["cauchy"] < 2 * example.NOISE


def test_it_draws(example, tmp_path, capsys):
    assert example.main(["--epochs", "2", "--out", str(tmp_path / "fit.png")]) == 0
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert "cauchy" in capsys.readouterr().out
