"""What must not change the answer does not, and what describes the run is true."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import secant
from secant.result import Status

LOSSES = ("squared", "logistic", "poisson", "huber", "multinomial")


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_are_repeated_rows(problem, solver, loss):
    x, y = problem(loss, n=150)
    count = np.random.default_rng(0).integers(0, 4, 150)
    options = {"loss": loss, "l2": 0.7, "tol": 1e-11, "solver": solver}
    weighted = secant.glm.fit(x, y, sample_weight=count.astype(float), **options)
    repeated = secant.glm.fit(np.repeat(x, count, axis=0), np.repeat(y, count), **options)
    assert weighted.status == repeated.status == Status.CONVERGED
    assert weighted.value == pytest.approx(repeated.value, rel=1e-12)
    # |w - w*| <= |g| / l2 for both, |g| <= sqrt(P) 1e-11 N.
    bound = 2.0 * np.sqrt(weighted.coef.numel()) * 1e-11 * count.sum() / 0.7
    assert float((weighted.coef - repeated.coef).abs().max()) <= bound


def test_weight_of_zero_is_no_row(problem, solver):
    x, y = problem("logistic")
    keep = np.arange(len(y)) % 3 != 0
    x[~keep] *= 100.0
    some = secant.glm.fit(x, y, l2=1.0, sample_weight=keep.astype(float), tol=1e-11, solver=solver)
    only = secant.glm.fit(x[keep], y[keep], l2=1.0, tol=1e-11, solver=solver)
    assert torch.allclose(some.coef, only.coef, rtol=0.0, atol=2 * 3 * 1e-11 * len(y))


@pytest.mark.parametrize("loss", LOSSES)
def test_scales_and_offsets_only_change_units(problem, solver, loss):
    """Without a penalty w -> w / s and b -> b - m.w / s under x -> s x + m: the same predictions and values."""
    x, y = problem(loss)
    scale, shift = np.exp(3.0 * np.linspace(-1, 1, 7)), np.linspace(-50.0, 50.0, 7)
    plain = secant.glm.fit(x, y, loss=loss, tol=1e-8, solver=solver)
    moved = secant.glm.fit(x * scale + shift * scale, y, loss=loss, tol=1e-8, solver=solver)
    assert plain.status == moved.status == Status.CONVERGED
    # Both are within g.H^-1 g / 2 of the minimum.
    assert moved.value == pytest.approx(plain.value, rel=1e-9)
    assert moved.n_iter <= 2 * plain.n_iter + 5


def test_same_input_same_bits(problem, solver):
    x, y = problem("logistic", n=30_000, d=12)
    first, second = (secant.glm.fit(x, y, l2=1.0, solver=solver) for _ in range(2))
    assert torch.equal(first.coef, second.coef)
    assert torch.equal(first.intercept, second.intercept)
    assert first.history == second.history


@pytest.mark.parametrize("loss", LOSSES)
def test_sparse_is_dense(problem, solver, loss):
    x, y = problem(loss)
    x = np.where(np.random.default_rng(0).random(x.shape) < 0.4, x, 0.0)
    dense = secant.glm.fit(x, y, loss=loss, l2=0.5, tol=1e-10, solver=solver)
    for index in (torch.int64, torch.int32):
        csr = torch.from_numpy(x).to_sparse_csr()
        csr = torch.sparse_csr_tensor(
            csr.crow_indices().to(index), csr.col_indices().to(index), csr.values(), csr.shape
        )
        sparse = secant.glm.fit(csr, y, loss=loss, l2=0.5, tol=1e-10, solver=solver)
        assert sparse.status == dense.status == Status.CONVERGED
        assert torch.allclose(sparse.coef, dense.coef, rtol=0.0, atol=2 * 5 * 1e-10 * len(y) / 0.5)


def test_layouts_and_arrays(problem):
    x, y = problem("logistic")
    want = secant.glm.fit(x, y, l2=1.0)
    wide = torch.zeros(len(y), 2 * x.shape[1], dtype=torch.float64)
    wide[:, : x.shape[1]] = torch.from_numpy(x)
    read_only = x.copy()
    read_only.flags.writeable = False
    for same in (torch.from_numpy(x), np.asfortranarray(x), wide[:, : x.shape[1]], read_only, x[::-1][::-1]):
        got = secant.glm.fit(same, torch.from_numpy(y), l2=1.0)
        # Other strides may take other vector paths: rounding, magnified by a conditioning of about 1e3.
        assert torch.allclose(got.coef, want.coef, rtol=1e-9, atol=1e-12)


class Frame:
    """What knows how to become an array, as the tables of other libraries do."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values


def test_numbers_and_tables_of_other_libraries(problem):
    x, y = problem("logistic")
    want = secant.glm.fit(x, y, l2=1.0, max_iter=50, tol=1e-6).coef
    options = {"l2": np.float32(1.0), "max_iter": np.int64(50), "tol": np.float64(1e-6)}
    assert torch.equal(secant.glm.fit(Frame(x), Frame(y), **options).coef, want)
    assert torch.allclose(secant.glm.fit(x.tolist(), y.tolist(), **options).coef.double(), want, rtol=1e-3, atol=1e-3)


def test_targets_of_any_number_type(problem):
    x, y = problem("logistic")
    want = secant.glm.fit(x, y, l2=1.0).coef
    for same in (y.astype(int), y.astype(bool), y.astype(np.float32), torch.from_numpy(y).bool()):
        assert torch.equal(secant.glm.fit(x, same, l2=1.0).coef, want)


def test_float32_is_float64_to_its_precision(problem, solver):
    x, y = problem("logistic")
    x = (x - x.mean(0)) / x.std(0)
    half = secant.glm.fit(x.astype(np.float32), y, l2=1.0, solver=solver)
    full = secant.glm.fit(x, y, l2=1.0, tol=1e-10, solver=solver)
    assert half.coef.dtype is torch.float32
    assert half.status == Status.CONVERGED
    # |w - w*| <= |g| / l2 with |g| <= sqrt(7) 1e-6 N, and as much again for the rounding of the gradient.
    assert float((half.coef.double() - full.coef).abs().max()) <= 2 * np.sqrt(7) * 1e-6 * len(y)


def test_two_classes_of_a_multinomial_are_logistic(problem, solver):
    """Softmax over (w / 2, -w / 2) is the logistic model in w, and 2 |w / 2|^2 l2 the penalty |w|^2 l2 / 2."""
    x, y = problem("logistic")
    two = secant.glm.fit(x, y.astype(int), loss="multinomial", l2=2.0, tol=1e-11, solver=solver)
    one = secant.glm.fit(x, y, l2=1.0, tol=1e-11, solver=solver)
    bound = 4 * np.sqrt(8) * 1e-11 * len(y)
    assert float((two.coef[:, 1] - two.coef[:, 0] - one.coef).abs().max()) <= bound
    assert two.value == pytest.approx(one.value, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_warm_start(problem, solver, loss):
    x, y = problem(loss)
    first = secant.glm.fit(x, y, loss=loss, l2=1.0, tol=1e-8, solver=solver)
    again = secant.glm.fit(x, y, loss=loss, l2=1.0, tol=1.01e-8, solver=solver, start=first)
    assert again.n_iter == 0
    assert torch.equal(again.coef, first.coef)
    near = secant.glm.fit(x, y, loss=loss, l2=1.05, tol=1e-8, solver=solver, start=(first.coef, first.intercept))
    cold = secant.glm.fit(x, y, loss=loss, l2=1.05, tol=1e-8, solver=solver)
    assert near.history[0].value < cold.history[0].value
    assert near.value == pytest.approx(cold.value, rel=1e-10)


def test_a_start_is_copied(problem):
    x, y = problem("logistic")
    coef = torch.zeros(7, dtype=torch.float64)
    result = secant.glm.fit(x, y, l2=1.0, start=(coef, 0.0), fit_intercept=False)
    assert float(coef.abs().max()) == 0.0
    assert float(result.coef.abs().max()) > 0.0
    assert float(result.intercept) == 0.0


@pytest.mark.parametrize("rows", [300, 40_000])
def test_callback_sees_the_history_and_stops_it(problem, oracle, flat, solver, rows):
    x, y = problem("logistic", n=rows)
    seen = []
    result = secant.glm.fit(x, y, l2=1.0, solver=solver, callback=seen.append)
    assert seen == result.history
    assert [one.n for one in seen] == list(range(len(seen)))
    assert seen[-1].value == result.value
    assert seen[-1].grad_norm == result.grad_norm
    counts = [one.evaluations for one in seen]
    assert counts[0] == 1
    assert all(1 <= more - fewer <= 31 for fewer, more in itertools.pairwise(counts))
    for last in {0, 2, len(seen) - 2}:
        stopped = secant.glm.fit(x, y, l2=1.0, solver=solver, callback=lambda one, last=last: one.n == last)
        assert stopped.status == Status.STOPPED
        assert stopped.history == seen[: last + 1]
        # Of all rows, also when it was the sample's iterations that were stopped.
        value, grad = oracle(x, y, "logistic", l2=1.0)(flat(stopped))
        assert stopped.value == pytest.approx(value, rel=1e-12)
        assert stopped.grad_norm == pytest.approx(np.abs(grad).max() / rows, rel=1e-6)


def test_values_fall_from_iteration_to_iteration(problem, solver):
    x, y = problem("poisson")
    values = [one.value for one in secant.glm.fit(x, y, loss="poisson", solver=solver, tol=1e-4).history]
    assert all(b < a for a, b in itertools.pairwise(values))


def test_fit_changes_none_of_its_arguments(problem, solver):
    x, y = problem("logistic", n=40_000)
    weight = np.ones(len(y))
    before = x.copy(), y.copy()
    secant.glm.fit(x, y, sample_weight=weight, solver=solver)
    assert np.array_equal(x, before[0])
    assert np.array_equal(y, before[1])
    assert (weight == 1.0).all()


def test_tensors_that_require_grad_are_data(problem):
    x, y = problem("logistic")
    x = torch.from_numpy(x).requires_grad_()
    result = secant.glm.fit(x, y, l2=1.0)
    assert not result.coef.requires_grad
    assert x.grad is None
