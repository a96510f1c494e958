"""The example of fits per pixel: it finds the map, its covariances are true, and lost pixels say so."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import secant


def test_it_finds_the_map(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    path = Path(__file__).parents[1] / "examples" / "fits_per_pixel.py"
    spec = importlib.util.spec_from_file_location("fits_per_pixel", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    t2, found = example.main(40, tmp_path / "x.png")
    good = found.status <= 1
    assert torch.equal((~good).nonzero()[:, 0], torch.arange(0, 1600, 997))
    assert bool((found.status[~good] == secant.Status.NOT_FINITE).all())
    off = ((found.popt[:, 1] - 1.0 / t2.reshape(-1)) / found.pcov[:, 1, 1].sqrt())[good]
    # 1,598 normal numbers: mean and standard deviation within four standard errors; bias of nonlinearity is of noise^2.
    assert abs(float(off.mean())) < 0.2
    assert abs(float(off.std()) - 1.0) < 4.0 / (2 * 1598) ** 0.5 + 0.02
    assert (tmp_path / "x.png").stat().st_size > 20_000
