"""Stochastic L-BFGS against a naive one, and what its pairs and the length of its steps are good for."""

import math

import pytest
import torch

from secant.optim import StochasticLBFGS
from test_diagonal_optimizers import SHAPES, separable


def noisy(seed=0):
    """The gradients of fifty batches at any point: of sum c (p^4 + p^2) + b p, and noise that depends on the batch."""
    _, derivatives, start = separable()
    gen = torch.Generator().manual_seed(seed)
    noise = [[0.1 * torch.randn(shape, generator=gen, dtype=torch.float64) for shape in SHAPES] for _ in range(50)]

    def gradients(params, k):
        return [derivatives(p, i)[0] + e for i, (p, e) in enumerate(zip(params, noise[k], strict=True))]

    return gradients, start


def vector(tensors):
    return torch.cat([x.reshape(-1) for x in tensors])


def two_loop(m, pairs):
    """Nocedal and Wright, Algorithm 7.4."""
    q, alphas = m.clone(), []
    for s, y in reversed(pairs):
        alphas.append(s @ q / (s @ y))
        q = q - alphas[-1] * y
    if pairs:
        s, y = pairs[-1]
        q = q * (s @ y / (y @ y))
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + s * (alpha - y @ q / (s @ y))
    return q


def naive(kind, every, graft, damping, svrg=None, size=3, lr=0.05, average=0.9, betas=(0.9, 0.99), tol=1e-4, clip=0.5):
    gradients, start = noisy()
    shapes = [x.shape for x in start]
    x = vector(start)
    m, v, mean_x, mean_g, last, pairs = torch.zeros_like(x), torch.zeros_like(x), 0.0, 0.0, None, []

    def at(x, k):
        pieces = x.split([math.prod(shape) for shape in shapes])
        return vector(gradients([p.view(shape) for p, shape in zip(pieces, shapes, strict=True)], k))

    def offer(s, y):
        if damping and pairs:
            gamma = pairs[-1][0] @ pairs[-1][1] / (pairs[-1][1] @ pairs[-1][1])
            if s @ y < 0.2 * s @ s / gamma:
                theta = 0.8 * (s @ s / gamma) / (s @ s / gamma - s @ y)
                y = theta * y + (1 - theta) * s / gamma
        if s @ y > tol * s.norm() * y.norm():
            pairs.append((s, y))
            del pairs[:-size]

    for t in range(1, 51):
        g = at(x, t - 1)
        raw = g
        if svrg is not None:
            if (t - 1) % svrg == 0:
                snapshot, full = x, sum(at(x, k) for k in range(50)) / 50
            g = g - at(snapshot, t - 1) + full
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        if kind == "averages":
            mean_x, mean_g = average * mean_x + (1 - average) * x, average * mean_g + (1 - average) * g
            if t % every == 0:
                now = mean_x / (1 - average**t), mean_g / (1 - average**t)
                if last is not None:
                    offer(now[0] - last[0], now[1] - last[1])
                last = now
        mean = m / (1 - betas[0] ** t)
        adam = mean / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)
        d = two_loop(mean, pairs)
        if not pairs:
            step = adam
        elif graft:
            step = d * (adam.norm() / d.norm())
        else:
            step = d * min(1.0, clip * math.sqrt(len(d)) / d.norm())
        new = x - lr * 0.1 * x - lr * step
        if kind != "averages" and t % every == 0:
            offer(new - x, at(new, t - 1) - raw)
        x = new
    return x


@pytest.mark.parametrize("graft", [True, False], ids=["graft", "clip"])
@pytest.mark.parametrize(
    ("kind", "every", "damping", "svrg"),
    [("averages", 1, False, None), ("averages", 5, False, None), ("averages", 5, True, None),
     ("same-batch", 1, True, None), ("same-batch", 3, False, None), ("overlap", 1, True, None),
     ("averages", 5, False, 10), ("same-batch", 1, True, 10)],
)  # fmt: skip
def test_it_is_the_formula(kind, every, damping, svrg, graft):
    """Where a pair is nearly refused its rounding grows by 1/tol = 1e4, and less than that each time with the next."""
    gradients, start = noisy()
    params = [x.clone().requires_grad_() for x in start]
    optimizer = StochasticLBFGS(
        params, 0.05, kind, 3, betas=(0.9, 0.99), average=0.9, update_every=every, damping=damping, graft=graft,
        clip=0.5, weight_decay=0.1, svrg_every=svrg,
    )  # fmt: skip

    def everything():
        at = [gradients([p.detach() for p in params], k) for k in range(50)]
        for i, p in enumerate(params):
            p.grad = sum(grads[i] for grads in at) / 50
        return 0.0

    optimizer.full_closure = everything
    for k in range(50):

        def closure(k=k):
            for p, g in zip(params, gradients([p.detach() for p in params], k), strict=True):
                p.grad = g
            return 0.0

        if kind == "averages" and svrg is None:
            closure()
            optimizer.step()
        elif kind in ("averages", "same-batch"):
            optimizer.step(closure)
        else:
            closure()
            kept = [p.grad for p in params]
            optimizer.step(overlap=closure)
            assert all(p.grad is g for p, g in zip(params, kept, strict=True))
    expected = naive(kind, every, graft, damping, svrg)
    assert (vector([p.detach() for p in params]) - expected).abs().max() < 50 * 1e4 * 2.0**-52 * 10
    assert int(optimizer.state[params[0]]["count"]) == 3


def train(seed, pairs, *, graft=True, lr=0.01, steps=300, condition=1e4):
    """A quadratic with noisy gradients of changing batches; the value at the end over that at the start."""
    gen = torch.Generator().manual_seed(seed)
    n = 20
    q = torch.linalg.qr(torch.randn(n, n, generator=gen))[0]
    a = (q * torch.logspace(-math.log10(condition), 0.0, n)) @ q.T
    p = torch.randn(n, generator=gen).requires_grad_()
    begun = (0.5 * p @ a @ p).item()
    optimizer = StochasticLBFGS([p], lr, pairs="overlap" if pairs == "raw" else pairs, graft=graft, damping=False,
                                curvature_tol=0.0, clip=1e6)  # fmt: skip
    for _ in range(steps):
        noise = [0.1 * torch.randn(n, generator=gen) for _ in range(2)]

        def gradient(noise):
            p.grad = a @ p.detach() + noise
            return 0.0

        if pairs == "raw":  # the gradient before the step and the one after it are of different batches
            calls = iter((noise[0], noise[1]))
            gradient(noise[0])
            optimizer.step(overlap=lambda calls=calls: gradient(next(calls)))
        elif pairs == "same-batch":
            optimizer.step(lambda noise=noise: gradient(noise[0]))
        else:
            gradient(noise[0])
            optimizer.step()
    return (0.5 * p.detach() @ a @ p.detach()).item() / begun


def test_pairs_of_changing_batches_diverge_and_others_do_not():
    """Steps of their own length from the differences of two batches end above where they began."""
    for seed in range(3):
        raw = train(seed, "raw", graft=False, lr=1.0)
        assert not raw < 2.0  # or NaN
        for pairs in ("same-batch", "averages"):
            assert train(seed, pairs) < 0.5


def test_svrg_takes_the_noise_away():
    """The error that noise leaves at a fixed rate, of a mean of quadratics with one Hessian, is gone."""
    gen = torch.Generator().manual_seed(0)
    scales, centres = torch.logspace(-2, 0, 10), torch.randn(64, 10, generator=gen)

    def distance(svrg_every):
        p = torch.full((10,), 3.0).requires_grad_()

        def loss_of(rows):
            def closure():
                p.grad = scales * (p.detach() - centres[rows].mean(0))
                return 0.0

            return closure

        optimizer = StochasticLBFGS([p], 0.3, "same-batch", graft=False, clip=10.0, svrg_every=svrg_every,
                                    full_closure=loss_of(slice(None)))  # fmt: skip
        for _ in range(300):
            optimizer.step(loss_of(torch.randint(64, (4,), generator=gen)))
        return (p.detach() - centres.mean(0)).norm().item()

    assert distance(None) > 0.05
    assert distance(20) < 1e-3


def test_closures_that_are_missing_or_not_wanted():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    for options, given, message in [
        ({"pairs": "same-batch"}, {}, "closure: expected a function, for pairs='same-batch', got None"),
        ({"pairs": "overlap"}, {}, "overlap: expected a function, for pairs='overlap', got None"),
        ({"svrg_every": 10}, {}, "closure: expected a function, for svrg_every, got None"),
        ({"svrg_every": 10}, {"closure": lambda: 0.0}, "full_closure: expected a function, for svrg_every, got None"),
        ({}, {"overlap": lambda: 0.0}, "overlap: expected None for pairs='averages', got a function"),
    ]:
        optimizer = StochasticLBFGS([p], **options)
        with pytest.raises(ValueError, match=f"StochasticLBFGS.step: {message}"):
            optimizer.step(**given)
        assert not optimizer.state
        assert torch.equal(p, torch.ones(3))
    optimizer = StochasticLBFGS([p], lr=0.0, pairs="same-batch")
    optimizer.step()  # which builds the state
    assert optimizer.state
    assert torch.equal(p, torch.ones(3))


def test_a_step_without_gradients_learns_nothing():
    p = torch.ones(3, requires_grad=True)
    optimizer = StochasticLBFGS([p], pairs="same-batch", damping=False)

    def closure(absent=False):
        p.grad = None if absent else p.detach() * 2.0
        return 0.0

    for _ in range(2):
        optimizer.step(closure)
    before = p.detach().clone()
    optimizer.step(lambda: closure(absent=True))
    assert torch.equal(p, before)
    assert int(optimizer.state[p]["count"]) == 2
    assert optimizer.state[p]["step"].item() == 2


def test_layouts_that_do_not_fit():
    p, q = torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match=r"StochasticLBFGS: params\[1\]: expected torch.float32 as the first"):
        StochasticLBFGS([p, q])
    empty = torch.zeros(0, requires_grad=True)
    empty.grad = torch.zeros(0)
    optimizer = StochasticLBFGS([empty])
    with pytest.raises(ValueError, match="StochasticLBFGS: params: expected at least one element"):
        optimizer.step()
    optimizer = StochasticLBFGS([p])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["history_size"] = 5
    with pytest.raises(ValueError, match="StochasticLBFGS: svrg_every, history_size, pairs: expected what they were"):
        optimizer.step()


@pytest.mark.parametrize(
    ("pairs", "svrg_every", "memory"), [("averages", None, 26), ("same-batch", None, 22), ("same-batch", 5, 24)]
)
def test_its_memory(pairs, svrg_every, memory):
    p = torch.ones(10_000, requires_grad=True)
    optimizer = StochasticLBFGS([p], pairs=pairs, svrg_every=svrg_every)

    def closure():
        p.grad = p.detach().clone()
        return 0.0

    optimizer.full_closure = closure
    optimizer.step(closure)
    found = sum(x.numel() * x.element_size() for x in optimizer.state[p].values())
    assert found == pytest.approx(memory * 40_000, rel=1e-2)
