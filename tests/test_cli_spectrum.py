"""`python -m secant spectrum`."""

from __future__ import annotations

import json

import pytest
import torch

from secant.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_quick_run_writes_what_it_says(tmp_path, capsys):
    picture, figures = tmp_path / "s.png", tmp_path / "s.json"
    assert main(["spectrum", "--quick", "--plot", str(picture), "--json", str(figures)]) == 0
    out = capsys.readouterr().out
    for word in ("Hessian", "GGN", "at the initial point", "after training", "17,226 parameters", str(picture)):
        assert word in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(figures.read_text())
    assert found["losses"]["after training"] < 0.1 * found["losses"]["at the initial point"]
    assert [(one["matrix"], one["mode"], one["n"]) for one in found["spectra"]] == [
        ("Hessian", "r-operator", 17226),
        ("GGN", "r-operator", 17226),
    ] * 2
    for one in found["spectra"]:
        weights = torch.tensor(one["weights"], dtype=torch.float64)
        assert (weights.sum(1) - 1).abs().max() < 1e-10
        nodes = torch.tensor(one["nodes"], dtype=torch.float64)
        trace = 17226 * (weights * nodes).sum(1).mean()
        assert one["trace"]["value"] == pytest.approx(float(trace), rel=1e-10)
        # The GGN of cross-entropy is positive semi-definite; float32 rounds a zero to either side.
        if one["matrix"] == "GGN":
            assert nodes.min() > -1e-4 * nodes.max()
    start = found["spectra"][0]
    assert start["smallest"][0] < -0.5 < 0.5 < start["largest"][0]
    assert 0.3 < start["negative_share"]["value"] < 0.7


def test_wrong_device_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["spectrum", "--device", "cuda:99"])
    assert "there is no device cuda:99" in capsys.readouterr().err
