"""Diagonal, trace, eigenvalues and spectrum of known matrices; that biased probes would be noticed."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn

from curvature_problems import data, dense, mlp
from secant.curvature import Hessian, LinearOperator, _estimators

PROBES = 4000
N = 40


class Matrix(LinearOperator):
    """A dense symmetric matrix that counts its products."""

    def __init__(self, a: torch.Tensor) -> None:
        super().__init__(len(a), a.dtype, a.device)
        self.a, self.count = a, 0

    def _rows(self, vectors):
        self.count += len(vectors)
        return vectors @ self.a


def test_an_operator_without_a_product_cannot_be_made():
    with pytest.raises(TypeError, match="_rows"):
        LinearOperator(3, torch.float32, torch.device("cpu"))


def _symmetric(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=g, dtype=torch.float64))
    a = q @ torch.diag(eigenvalues.double()) @ q.T
    return (a + a.T) / 2


@pytest.fixture
def matrix():
    """Indefinite, with a decaying end."""
    return _symmetric(torch.cat([torch.linspace(-1, 1, N - 4), torch.tensor([3.0, 5.0, 9.0, 20.0])]))


def _deviations(matrix):
    """Of every estimator, the distance from the truth in standard errors."""
    A = Matrix(matrix)
    trace, diagonal = float(matrix.trace()), matrix.diagonal()
    found = A.diag(PROBES, seed=1)
    yield float(((found.value - diagonal) / found.stderr).abs().max())
    for method in ("hutchinson", "hutch++"):
        # Many small runs: a standard error from one run of hutch++ would be that of its remainder alone.
        runs = torch.tensor([A.trace(12, method=method, seed=s).value for s in range(PROBES // 12)])
        # A spread of zero is as far as can be: what constant probes give depends on how a product rounds.
        yield float((runs.mean() - trace).abs() / (runs.std() / len(runs) ** 0.5))
    one = A.trace(PROBES, seed=2)
    yield abs(one.value - trace) / one.stderr
    spectrum = A.spectrum(400, steps=6, seed=3)
    for got, want in (
        (spectrum.trace(), trace),
        (spectrum.mean(lambda x: x**4), float((matrix @ matrix).norm() ** 2 / N)),
    ):
        yield abs(got.value - want) / got.stderr


def test_estimators_are_unbiased(matrix):
    # 40 entries of the diagonal and 6 numbers, each normal to good accuracy: beyond 4 with odds of 46 * 6e-5.
    for deviation in _deviations(matrix):
        assert deviation < 4


def test_constant_probes_would_fail(matrix, monkeypatch):
    def constant(k, n, dtype, device, generator):
        return -torch.ones(k, n, dtype=dtype, device=device) * (1 + 1e-9 * torch.arange(k, dtype=dtype).unsqueeze(1))

    monkeypatch.setattr(_estimators, "rademacher", constant)
    assert max(_deviations(matrix)) > 100


def test_probes_are_signs_in_equal_numbers_and_repeat_by_seed():
    make = torch.Generator().manual_seed
    z = _estimators.rademacher(500, 200, torch.float64, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(z.sum())) < 4 * z.numel() ** 0.5
    products = (z.T @ z)[~torch.eye(200, dtype=torch.bool)] / 500**0.5  # of independent signs: normal
    assert products.square().mean() == pytest.approx(1.0, abs=0.05)
    A = Matrix(_symmetric(torch.arange(N)))
    assert A.trace(10, seed=5) == A.trace(10, seed=make(5)) != A.trace(10, seed=6)


def test_standard_errors_are_the_spread(matrix):
    A = Matrix(matrix)
    runs = [A.trace(50, seed=s) for s in range(300)]
    values = torch.tensor([run.value for run in runs])
    claimed = torch.tensor([run.stderr for run in runs])
    # The spread of 300 values is known to 1 / sqrt(600), 4%; four of those.
    assert float(claimed.square().mean().sqrt() / values.std()) == pytest.approx(1.0, abs=0.17)


def test_hutch_plus_plus_is_exact_for_low_rank():
    a = _symmetric(torch.cat([torch.tensor([4.0, 2.0, 1.0]), torch.zeros(N - 3)]))
    found = Matrix(a).trace(12, method="hutch++")
    assert found.value == pytest.approx(7.0, rel=1e-12)
    assert found.stderr < 1e-12
    assert Matrix(a).trace(12).stderr > 0.1


@pytest.mark.parametrize("count", [12, 13, 100, 300])
def test_products_are_as_many_as_asked_for(count):
    for method in ("hutchinson", "hutch++"):
        A = Matrix(_symmetric(torch.arange(N)))
        found = A.trace(count, method=method)
        assert A.count == found.num_probes <= count


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_extreme_eigenvalues_are_scipys(matrix, which, k):
    A = Matrix(matrix)
    found = A.eigs(k, which)
    want = np.sort(scipy.sparse.linalg.eigsh(A.to_scipy(), k=k, which=which, return_eigenvectors=False))
    assert found.converged
    assert np.abs(found.values.numpy() - want).max() < 1e-8 * 20
    v = found.vectors
    assert (matrix @ v - v * found.values).norm(dim=0).max() < 1e-7 * 20
    assert (v.T @ v - torch.eye(k)).abs().max() < 1e-7


def test_all_eigenvalues(matrix):
    found = Matrix(matrix).eigs(N)
    assert (found.values - torch.linalg.eigvalsh(matrix)).abs().max() < 1e-12 * 20


def test_what_does_not_converge_says_so(matrix):
    found = Matrix(matrix).eigs(8, "SA", max_iter=8)
    assert not found.converged
    assert found.iterations == 8
    assert found.residuals.max() > 1e-3


def test_damping():
    a = _symmetric(torch.arange(N))
    A = Matrix(a)
    v = torch.randn(N, dtype=torch.float64)
    for operator in (A + 0.5, 0.5 + A, A - (-0.5), A + torch.tensor([0.5]), (A + 0.25) + 0.25):
        assert torch.allclose(operator @ v, a @ v + 0.5 * v, rtol=1e-14)
    assert (A + 2.0).eigs(1).values.item() == pytest.approx(N + 1)
    assert scipy.sparse.linalg.cg((A + 1.0).to_scipy(), v.numpy())[1] == 0


def test_spectrum_of_a_known_distribution(tmp_path):
    eigenvalues = torch.cat([torch.full((60,), -1.0), torch.zeros(100), torch.full((40,), 3.0)])
    spectrum = Matrix(_symmetric(eigenvalues)).spectrum(40, steps=12)
    assert spectrum.range == pytest.approx((-1.0, 3.0), abs=1e-10)
    for x, want in ((-0.5, 0.3), (0.5, 0.8), (4.0, 1.0)):
        found = spectrum.fraction_below(x)
        assert abs(found.value - want) <= 4 * found.stderr + 1e-12
    share = spectrum.negative_share()
    assert abs(share.value - 60 / 180) < 4 * share.stderr
    x = torch.linspace(-2, 4, 6001, dtype=torch.float64)
    density = spectrum.density(x)
    assert float(torch.trapezoid(density, x)) == pytest.approx(1.0, abs=1e-6)
    assert float(x[density.argmax()]) == pytest.approx(0.0, abs=0.002)
    spectrum.plot(tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_plot_puts_as_much_under_the_curve_as_there_are_eigenvalues():
    eigenvalues = torch.cat([torch.full((30,), -0.2), torch.full((70,), 3.0)])
    ax = Matrix(_symmetric(eigenvalues)).spectrum(400, steps=4).plot()
    x, y = ax.lines[0].get_data()
    below = x < 0
    for part, want in ((below, 30), (~below, 70)):
        assert np.trapezoid(y[part], x[part]) == pytest.approx(want, abs=2.0)  # 400 probes: 1.3 at four deviations


def test_hessian_estimates_agree_with_the_dense_matrix():
    torch.manual_seed(0)
    x, y = data()
    H = Hessian.of(mlp(), nn.CrossEntropyLoss(), x, y)
    matrix = dense(H)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert (H.eigs(2, "SA").values - eigenvalues[:2]).abs().max() < 1e-8
    assert abs(H.trace(400).value - float(matrix.trace())) < 4 * H.trace(400).stderr
    columns = torch.randn(H.shape[0], 3, dtype=torch.float64)
    assert torch.allclose(H @ columns, matrix @ columns, atol=1e-14)
    assert (H @ columns[:, :0]).shape == (H.shape[0], 0)
    parts = H.unflatten(columns[:, 0].contiguous())
    assert (H.flatten(parts) == columns[:, 0]).all()
