"""The examples of many problems at once: each finds what was put in, and draws it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import secant
from secant.benchmarks.batched_problems import LJ13, MET, gp_negative_log_likelihood, hand, himmelblau_waves, reach

pytest.importorskip("matplotlib")
pytest.importorskip("rich")


def example(name):
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "x.png"
    yield path
    assert path.stat().st_size > 20_000


def test_spots_are_where_the_covariances_say(picture):
    places, fitted, found = example("gaussian_peaks").main(400, picture)
    good = found.status <= secant.Status.SMALL_CHANGE
    assert int(good.sum()) >= 398
    off = ((fitted - places) / found.pcov.diagonal(dim1=-2, dim2=-1)[:, 1:3].sqrt())[good].reshape(-1)
    # 800 numbers, nearly normal: within four standard errors; weights of noisy counts cost some percent of deviation.
    assert abs(float(off.mean())) < 4.0 / len(off) ** 0.5
    assert abs(float(off.std()) - 1.0) < 4.0 / (2 * len(off)) ** 0.5 + 0.1


def test_hands_reach_their_goals_within_the_limits(picture):
    module = example("inverse_kinematics")
    goal, q, met = module.main(60, picture)
    assert met == sorted(met)
    assert met[-1] >= 0.9
    left = reach(q, goal)
    assert float((left <= MET).double().mean()) == met[-1]
    # By another way: the last joint that is drawn is the hand.
    drawn = torch.stack([module.joints(one)[-1] for one in q])
    torch.testing.assert_close(drawn, hand(q)[:, :3], rtol=0, atol=1e-12)
    torch.testing.assert_close(drawn[left <= MET], goal[left <= MET, :3], rtol=0, atol=MET**0.5)


def test_some_cluster_is_the_icosahedron(picture):
    found, energies = example("lennard_jones").main(150, picture)
    assert float(found.success.double().mean()) > 0.9
    # Some 1 in 9 random starts end there: that none of 150 does has a chance of 2e-8.
    assert abs(float(energies[0]) - LJ13) < 1e-4
    at = found.x[found.fun.argmin()].view(13, 3)
    near = torch.pdist(at) < 1.25
    assert int(near.sum()) == 42  # 12 from the middle, 30 edges


def test_every_minimum_is_listed_once(picture):
    module = example("multistart")
    minima = module.main(1500, picture)
    x = minima.x.clone().requires_grad_()
    (g,) = torch.autograd.grad(himmelblau_waves(x).sum(), x)
    assert float(g.abs().max()) < 1e-5
    assert bool((minima.value.diff() >= 0).all())
    assert float(torch.pdist(minima.x).min()) > 10 * module.APART
    assert int(minima.count.sum()) == int((minima.which >= 0).sum())
    # A grid is nowhere below the best, and each cell of it has a descent to one that is listed.
    line = torch.linspace(-module.EDGE, module.EDGE, 400, dtype=torch.float64)
    b, a = torch.meshgrid(line, line, indexing="ij")
    height = himmelblau_waves(torch.stack([a.reshape(-1), b.reshape(-1)], 1)).view(400, 400)
    assert float(minima.value[0]) <= float(height.min())
    inner = height[1:-1, 1:-1]
    shifted = [height[1 + i : 399 + i, 1 + j : 399 + j] for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
    lowest = torch.stack([inner < other for other in shifted]).all(0)
    at = torch.stack([a[1:-1, 1:-1][lowest], b[1:-1, 1:-1][lowest]], 1)
    step = float(line[1] - line[0])
    assert float(torch.cdist(at, minima.x).min(1).values.max()) < 2 * step


def test_ends_that_are_the_same_are_counted_once():
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1e-9, 0.0], [5.0, 5.0], [0.99949, 1.0], [0.99951, 1.0]]).double()
    value = torch.tensor([2.0, 1.0, 2.0, 0.0, 1.0, 1.0]).double()
    good = torch.tensor([True, True, True, False, True, True])
    found = example("multistart").distinct(x, value, good)
    assert found.value.tolist() == [1.0, 2.0]
    assert found.count.tolist() == [3, 2]
    assert found.which.tolist() == [1, 0, 1, -1, 0, 0]


def test_hyper_parameters_are_more_likely_than_the_true_ones(picture):
    _, found, made = example("gaussian_process").main(40, picture)
    good = found.jac.abs().amax(-1) < 1e-3
    assert int(good.sum()) >= 38
    assert bool((found.fun[good] <= made[good]).all())
    # Twice the gain is chi^2 of three, about, whose mean is 3 with a deviation of sqrt(6) a set.
    gain = 2.0 * (made - found.fun)[good]
    assert abs(float(gain.mean()) - 3.0) < 4.0 * (6.0 / len(gain)) ** 0.5 + 0.5


def test_the_likelihood_is_that_of_the_normal_distribution():
    draw = torch.Generator().manual_seed(3)
    theta, x = 0.3 * torch.randn(2, 3, generator=draw).double(), torch.rand(2, 5, generator=draw).double()
    y = torch.randn(2, 5, generator=draw).double()
    found = gp_negative_log_likelihood(theta, x, y)
    for i in range(2):
        length, size, noise = theta[i].exp()
        k = (
            size**2 * torch.exp(-0.5 * ((x[i][:, None] - x[i]) / length) ** 2)
            + (noise**2 + 1e-8) * torch.eye(5).double()
        )
        want = -torch.distributions.MultivariateNormal(torch.zeros(5).double(), k).log_prob(y[i])
        torch.testing.assert_close(found[i], want - 2.5 * torch.log(torch.tensor(2 * torch.pi).double()))
