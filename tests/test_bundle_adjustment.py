"""The bundle adjustment of `examples/`: its derivatives, its step, and the same run on `torch.linalg`."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "bundle_adjustment.py"
    spec = importlib.util.spec_from_file_location("bundle_adjustment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_derivatives_are_those_of_the_projection(example):
    scene = example.make_scene(4, 60)
    points = example.Sight(scene.index, scene.points.shape[1]).gather(scene.points)
    pixels, by_camera, by_point = example.linearize(scene.cameras, points)
    torch.testing.assert_close(pixels, example.project(scene.cameras, points), rtol=1e-12, atol=1e-9)

    def one(camera: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
        return example.project(camera[None], point[None, :, None])[0, :, 0]

    for c in range(len(scene.cameras)):
        for i in range(3):
            camera, point = torch.func.jacfwd(one, argnums=(0, 1))(scene.cameras[c], points[c, :, i])
            torch.testing.assert_close(by_camera[c, :, :, i].T, camera, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(by_point[c, :, :, i].T, point, rtol=1e-9, atol=1e-9)


def test_a_step_solves_the_damped_normal_equations(example):
    scene = example.make_scene(4, 30)
    sight = example.Sight(scene.index, scene.points.shape[1])
    normal = example.Normal(scene, sight, scene.cameras, scene.points)
    lam = 0.1
    dc, dp, _ = example.step(normal, lam, example.SECANT.inv, tolerance=1e-13)

    def residual(cameras: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        return ((example.project(cameras, sight.gather(points)) - scene.pixels) * scene.mask).flatten()

    parts = torch.func.jacfwd(residual, argnums=(0, 1))(scene.cameras, scene.points)
    jacobian = torch.cat([part.flatten(1) for part in parts], 1)
    hessian = jacobian.T @ jacobian
    hessian.diagonal().mul_(1 + lam)
    want = torch.linalg.solve(hessian, -jacobian.T @ residual(scene.cameras, scene.points))
    got = torch.cat([dc.flatten(), dp.flatten()])
    assert (got - want).norm() <= 1e-8 * want.norm()


def test_the_same_run_on_secant_and_on_torch(example):
    scene = example.make_scene(8, 300)
    ours, *peers = (example.solve(scene, blocks, 12) for blocks in (example.SECANT, example.CHOLESKY, example.INV_EX))
    for theirs in peers:
        assert example.largest_difference(ours, theirs) <= 1e-9
    costs = ours.costs
    assert all(after <= before for before, after in itertools.pairwise(costs))
    assert costs[-1] < 1e-2 * costs[0]
    # The residuals of the fit are those of the noise, to the scatter of an RMS of 2 N numbers; five sigma are allowed.
    scatter = 5 / (4 * scene.observations) ** 0.5
    assert abs(example.rms(scene, costs[-1]) / scene.expected_rms - 1) <= scatter


def test_a_step_that_raises_the_cost_is_refused_and_damped_more(example, monkeypatch):
    scene, half_square, calls = example.make_scene(4, 60), example.half_square, itertools.count()

    def failing(residual):  # the step of the third iteration leads nowhere, that of the fourth uphill
        return {3: math.nan, 4: math.inf}.get(next(calls), half_square(residual))

    monkeypatch.setattr(example, "half_square", failing)
    rows = example.solve(scene, example.SECANT, 8).rows
    assert [row.accepted for row in rows[:6]] == [True, True, False, False, True, True]
    costs, tried = [row.cost for row in rows], [row.lam for row in rows]
    assert costs[1] == costs[2] == costs[3] > costs[4]
    assert tried[2] < tried[3] < tried[4]


def test_it_prints_and_draws(example, tmp_path, capsys):
    picture = tmp_path / "bundle.png"
    example.main(["--cameras", "4", "--points", "60", "--iterations", "3", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "accepted" in capsys.readouterr().out
