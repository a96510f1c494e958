"""Every optimizer for mini-batches at its defaults, where gradients are noisy: it goes down, and nothing is NaN."""

import functools

import pytest
import torch

from secant.optim import SOAP, AdaHessian, BlockAdam, Muon, Shampoo, Sophia, StochasticLBFGS

OPTIMIZERS = {
    "adahessian": AdaHessian,
    "block-adam": BlockAdam,
    "muon": Muon,
    "shampoo": Shampoo,
    "soap": SOAP,
    "sophia": Sophia,
    "stochastic-lbfgs": StochasticLBFGS,
    "stochastic-lbfgs-same": functools.partial(StochasticLBFGS, pairs="same-batch"),
}


def quadratic(seed, n=20, condition=1e6):
    """0.5 x.Ax with gradients that are off by .01 in every direction, and by a tenth of A z."""
    gen = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=gen))[0]
    a = (q / torch.logspace(0.0, torch.tensor(condition).log10().item(), n)) @ q.T
    x = torch.randn(n, generator=gen).requires_grad_()

    def batch():
        z, e = (torch.randn(n, generator=gen) for _ in range(2))
        noise = 0.1 * a @ z + 0.01 * e
        return lambda: 0.5 * x @ a @ x + noise @ x

    return [x], batch, lambda: 0.5 * x @ a @ x


def logistic(seed, n=1000, d=20):
    """Labels of a linear model, a tenth of them wrong, features of scales from .1 to 10; batches of 32."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=gen) * torch.logspace(-1, 1, d)
    wrong = torch.rand(n, generator=gen) < 0.1
    y = ((x @ torch.randn(d, generator=gen) > 0.0) ^ wrong).float()
    w = torch.zeros(d, requires_grad=True)
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def batch():
        rows = torch.randint(n, (32,), generator=gen)
        return lambda: loss(x[rows] @ w, y[rows])

    return [w], batch, lambda: loss(x @ w, y)


def digits(seed):
    """A network with ReLU; batches of 32."""
    pytest.importorskip("sklearn")
    from secant.benchmarks.digits import load

    data = load(torch.device("cpu"))
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    gen = torch.Generator().manual_seed(seed)
    loss = torch.nn.functional.cross_entropy

    def batch():
        rows = torch.randint(len(data.train_y), (32,), generator=gen)
        return lambda: loss(model(data.train_x[rows]), data.train_y[rows])

    return list(model.parameters()), batch, lambda: loss(model(data.train_x), data.train_y)


def run(make, problem, seed, steps):
    """The loss over all data before and after, and the largest that a batch had."""
    params, batch, whole = problem(seed)
    optimizer = make(params)
    begun, largest = whole().item(), 0.0
    for _ in range(steps):
        loss = batch()

        def closure(loss=loss):
            optimizer.zero_grad()
            value = loss()
            value.backward(create_graph=getattr(optimizer, "needs_graph", False))
            return value

        largest = max(largest, optimizer.step(closure).item())
        assert all(torch.isfinite(p).all() for p in params)
    return begun, whole().item(), largest


@pytest.mark.parametrize("problem", [quadratic, logistic, digits], ids=lambda problem: problem.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_divergence_at_the_defaults(name, problem):
    for seed in range(2):
        begun, ended, largest = run(OPTIMIZERS[name], problem, seed, 150)
        assert ended < 0.9 * begun
        assert largest < 10.0 * begun + 1.0


@pytest.mark.slow
@pytest.mark.parametrize("problem", [quadratic, logistic, digits], ids=lambda problem: problem.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_divergence_over_twenty_seeds(name, problem):
    for seed in range(20):
        begun, ended, largest = run(OPTIMIZERS[name], problem, seed, 500)
        assert ended < 0.75 * begun  # of the logistic regression .6 cannot be had: a tenth of its labels is wrong
        assert largest < 10.0 * begun + 1.0
