"""Newton, NewtonCG, TrustRegion, CubicNewton and SaddleFreeNewton: closed forms, rules, batches, ends."""

from __future__ import annotations

import gc
import itertools
import math
import weakref

import pytest
import torch
from torch.nn import functional as F

from optimizer_problems import PROBLEMS, quadratic, rosenbrock
from secant import Status
from secant.curvature import KFAC, EvaluatedPoint, Hessian
from secant.optim import CubicNewton, Newton, NewtonCG, SaddleFreeNewton, TrustRegion

F64 = torch.float64
ALL = {
    "newton": (Newton, {}),
    "newton-cg": (NewtonCG, {}),
    "trust-region": (TrustRegion, {}),
    "trust-region-exact": (TrustRegion, {"subproblem": "exact"}),
    "cubic-newton": (CubicNewton, {}),
    "saddle-free-newton": (SaddleFreeNewton, {}),
}
every = pytest.mark.parametrize("name", ALL)


def make(name, params, **options):
    cls, fixed = ALL[name]
    return cls(params, **{**fixed, **options})


def parameter(values, dtype=F64):
    return torch.tensor(values, dtype=dtype).requires_grad_()


def derivatives(loss, x):
    return torch.func.grad(lambda z: loss([z]))(x.detach()), torch.func.hessian(lambda z: loss([z]))(x.detach())


def symmetric(n, values, seed=0):
    q = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))).Q
    return (q * torch.tensor(values, dtype=F64)) @ q.T, q


@pytest.fixture
def one_mode(monkeypatch):
    """Spare the comparison of modes, which evaluates the closure at will."""
    monkeypatch.setattr(Hessian, "_MODES", Hessian._MODES[:1])


# Closed forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1e1, 1e4])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("newton", {"modify": modify}) for modify in ("abs", "clamp", "shift")),
        ("trust-region-exact", {"initial_radius": 1e3}),
        ("trust-region-exact", {"initial_radius": 1e3, "curvature": "hessian"}),
        ("newton-cg", {"forcing": 1e-6}),
    ],
)
def test_a_quadratic_takes_one_step(name, options, condition):
    loss, told = quadratic(condition), []
    x = torch.ones(30, dtype=F64, requires_grad=True)
    optimizer = make(name, [x], max_iter=1, callback=told.append, **options)
    start = x.detach().clone()
    optimizer.step(lambda: loss([x]))
    g, h = derivatives(loss, start)
    want = start - torch.linalg.solve(h, g)
    # Solved to rounding, times the condition; by CG to 1e-6 of the residual, which the condition magnifies likewise.
    tolerance = (1e-6 if name == "newton-cg" else 1e-14) * condition
    assert float((x.detach() - want).norm()) <= tolerance * float((want - start).norm())
    assert told[-1].step == pytest.approx(1.0 if name != "trust-region-exact" else float((want - start).norm()))
    assert optimizer.state[x]["func_evals"] == 2


def test_n_products_solve_a_quadratic_of_n():
    a, _ = symmetric(12, [1, 1, 1, 3, 3, 5, 5, 5, 7, 7, 9, 9])  # five distinct eigenvalues: five products
    x, told = torch.ones(12, dtype=F64, requires_grad=True), []
    optimizer = NewtonCG([x], forcing=1e-6, max_iter=1, callback=told.append)
    optimizer.step(lambda: 0.5 * x @ a @ x)
    assert told[-1].inner == 5
    assert float(x.detach().norm()) <= 1e-9


@pytest.mark.parametrize("modify", ["abs", "clamp", "shift"])
def test_newton_modifies_eigenvalues(modify):
    values = [4.0, 1.0, 0.0, -2.0]
    a, q = symmetric(4, values)
    x = torch.ones(4, dtype=F64, requires_grad=True)
    floor = 0.01
    optimizer = Newton([x], modify=modify, floor=floor, lr=1e-4, max_iter=1)
    start, least = x.detach().clone(), floor * 4.0
    optimizer.step(lambda: 0.5 * x @ a @ x)
    w = {
        "abs": [4.0, 1.0, least, 2.0],
        "clamp": [4.0, 1.0, least, least],
        "shift": [v + 2.0 + least for v in values],
    }[modify]
    want = -1e-4 * (q / torch.tensor(w, dtype=F64)) @ (q.T @ (a @ start))
    assert torch.allclose(x.detach() - start, want, rtol=1e-9, atol=1e-15)


def test_saddle_free_steps_are_of_the_absolute_value():
    values = [4.0, 1.0, 0.3, -2.0, -0.1]
    a, q = symmetric(5, values)
    x = torch.ones(5, dtype=F64, requires_grad=True)
    start = x.detach().clone()
    optimizer = SaddleFreeNewton([x], damping=0.25, max_iter=1)
    optimizer.step(lambda: 0.5 * x @ a @ x)
    absolute = torch.tensor(values, dtype=F64).abs()
    want = start - (q / (absolute + 0.25 * 4.0)) @ (q.T @ (a @ start))
    assert torch.allclose(x.detach(), want, rtol=1e-12)
    # rho = 1 on a quadratic: Nielsen's rule divides by three.
    assert optimizer.state[x]["lambda"] == pytest.approx(1.0 / 3.0)


def test_cubic_steps_solve_the_cubic_model_and_sigma_learns():
    a, _ = symmetric(6, [4.0, 1.0, 0.3, -2.0, -0.1, 2.0])
    x = torch.ones(6, dtype=F64, requires_grad=True)
    start = x.detach().clone()
    optimizer = CubicNewton([x], sigma=3.0, max_iter=1)
    optimizer.step(lambda: 0.5 * x @ a @ x)
    s = x.detach() - start
    left = a @ start + a @ s + 3.0 * s.norm() * s
    # To half the gradient at the start of a run: CG-like accuracy.
    assert float(left.norm()) <= 0.5 * float((a @ start).norm())
    assert optimizer.state[x]["sigma"] == 1.5  # the cubic model is above the loss: rho > 0.9


def test_the_step_along_negative_curvature():
    """The first direction, -g, has none but negative curvature: as long as the reach, which doubles."""
    x = parameter([0.3, 0.4])
    optimizer = NewtonCG([x], max_iter=1)
    optimizer.step(lambda: -x.square().sum() / 2)
    assert torch.allclose(x.detach(), torch.tensor([0.3, 0.4], dtype=F64) * (0.5 + 1.0) / 0.5)
    assert optimizer.state[x]["reach"] == 2.0
    # In the second: the minimum along positive curvature, then the reach times |c| / |g.Hg / g.g| along the other.
    x = parameter([1.0, 1e-4])
    optimizer = NewtonCG([x], max_iter=1, forcing=1e-6)
    optimizer.step(lambda: x[0] ** 2 / 2 - 0.25 * x[1] ** 2 / 2)
    assert abs(float(x[0].detach())) <= 1e-4
    assert float(x[1].detach()) == pytest.approx(0.25 + 1e-4, rel=1e-3)


def test_negative_curvature_by_rounding_is_not_followed():
    """A singular matrix in float32 whose last products are rounding: the step is that of CG."""
    gen = torch.Generator().manual_seed(0)
    j, y = torch.randn(5, 40, generator=gen), torch.randn(5, generator=gen)
    x = torch.zeros(40, requires_grad=True)

    def closure():
        outputs = j @ x
        return outputs, (outputs - y).square().sum()

    optimizer = NewtonCG([x], curvature="ggn", forcing=1e-6, max_iter=5)
    optimizer.step(closure)
    want = torch.linalg.lstsq(j.double(), y.double()[:, None], driver="gelsd").solution[:, 0]  # the shortest
    assert float((x.detach().double() - want).norm()) <= 1e-4 * float(want.norm())


def test_the_radius_follows_the_ratio():
    """f = x^2 / 2 from 10: the model is exact, so the radius doubles until the minimum is inside."""
    x, radii = parameter([10.0]), []
    optimizer = TrustRegion([x], "exact", max_iter=1, max_radius=4.0)
    for _ in range(4):
        optimizer.step(lambda: x.square().sum() / 2)
        radii.append(optimizer.state[x]["radius"])
    assert radii == [2.0, 4.0, 4.0, 4.0]
    assert float(x.detach()) == pytest.approx(0.0, abs=1e-12)  # 9, 7, 3 and inside
    # |x| beyond a kink: the model promises 1/2, and the loss rises. A quarter of the step, and a fifth.
    x = parameter([0.1])
    optimizer = TrustRegion([x], "exact", max_iter=1)
    optimizer.step(lambda: (1e4 * x.square() + 1e-8).sqrt().sum() / 100 + 0.0 * x.sum() ** 2)
    assert optimizer.state[x]["radius"] < 1.0


def test_the_radius_survives_batches():
    x, scale = parameter([5.0, 5.0]), 1.0
    optimizer = TrustRegion([x], max_iter=1)
    for k in range(3):
        scale = 1.0 + 0.1 * k
        optimizer.step(lambda scale=scale: scale * x.square().sum())
    assert optimizer.state[x]["radius"] == 8.0


# Against scipy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subproblem", "method"), [("steihaug", "trust-ncg"), ("exact", "trust-exact")])
def test_as_many_evaluations_as_scipy(subproblem, method):
    scipy = pytest.importorskip("scipy.optimize")
    x = torch.linspace(-1, 1, 20, dtype=F64).requires_grad_()
    optimizer = TrustRegion([x], subproblem, max_iter=500, tolerance_grad=1e-6)
    start = x.detach().numpy().copy()
    optimizer.step(lambda: rosenbrock([x]))
    assert optimizer.status is Status.CONVERGED
    assert float((x.detach() - 1.0).abs().max()) <= 1e-5
    peer = scipy.minimize(
        scipy.rosen, start, jac=scipy.rosen_der, hess=scipy.rosen_hess, method=method, options={"gtol": 1e-6}
    )
    assert peer.success
    # Rules and constants are the same; residuals, and a radius that shrinks to a quarter of the step, are not.
    assert optimizer.state[x]["func_evals"] <= 1.5 * peer.nfev + 10


# Curvature ------------------------------------------------------------------------------------------------------------


def test_the_ggn_of_squares_makes_gauss_newton_steps():
    t, y = torch.linspace(0, 1, 20, dtype=F64), torch.linspace(1, 3, 20, dtype=F64)
    x = parameter([1.0, 1.0])

    def outputs(p):
        return p[0] * torch.exp(p[1] * t)

    def closure():
        out = outputs(x)
        return out, 0.5 * (out - y).square().sum()

    start = x.detach().clone()
    j = torch.func.jacrev(outputs)(start)
    want = start - torch.linalg.solve(j.T @ j, j.T @ (outputs(start) - y))
    optimizer = NewtonCG([x], curvature="ggn", forcing=1e-6, max_iter=1)
    loss = optimizer.step(closure)
    assert torch.allclose(x.detach(), want, rtol=1e-6)
    assert float(loss) == pytest.approx(0.5 * float((outputs(start) - y).square().sum()))


@pytest.mark.parametrize(
    "name", ["newton-cg", "trust-region", "trust-region-exact", "cubic-newton", "saddle-free-newton"]
)
@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_a_classifier_by_every_curvature(name, curvature):
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, generator=gen, dtype=F64), torch.randint(3, (60,), generator=gen)
    runs = []
    for _ in range(2):
        w = torch.zeros(3, 3, dtype=F64, requires_grad=True)

        def closure(w=w):
            logits = x @ w
            return logits, F.cross_entropy(logits, y) + 0.0 * w.sum()

        optimizer = make(name, [w], curvature=curvature, max_iter=15)
        start = optimizer.step(closure)
        runs.append(w.detach().clone())
    assert torch.equal(*runs)  # labels are drawn from the number of the iteration
    g = torch.func.grad(lambda w: F.cross_entropy(x @ w, y))(runs[0])
    at_zero = torch.func.grad(lambda w: F.cross_entropy(x @ w, y))(torch.zeros(3, 3, dtype=F64))
    assert float(start) == pytest.approx(math.log(3.0))
    # The GGN of a linear model is the Hessian; the sampled Fisher is within sampling error of it.
    assert float(g.norm()) <= (1e-6 if curvature == "ggn" else 0.05) * float(at_zero.norm())


@pytest.mark.usefixtures("one_mode")
def test_curvature_on_the_same_batch_is_biased():
    """Whitened features, curvature 1 in every direction. Along the gradient of a batch of m, pure noise in n
    dimensions, the batch itself shows 1 + n / m (Marchenko and Pastur), another batch 1: arXiv 2410.14325."""
    n, m, trials = 20, 40, 60
    gen = torch.Generator().manual_seed(0)
    lengths = {"same": [], "other": []}
    for _ in range(trials):
        batches = [(torch.randn(m, n, generator=gen, dtype=F64), torch.randn(m, generator=gen, dtype=F64))
                   for _ in range(2)]  # fmt: skip
        for which in lengths:
            w = torch.zeros(n, dtype=F64, requires_grad=True)
            losses = [lambda x=x, y=y, w=w: 0.5 * (x @ w - y).square().mean() for x, y in batches]
            (g,) = torch.autograd.grad(losses[0](), w)
            told = []
            optimizer = NewtonCG([w], max_iter=1, max_inner=1, callback=told.append)
            optimizer.step(losses[0], None if which == "same" else losses[1])
            lengths[which].append(told[-1].step and float(g.dot(g) / -(w.detach() / told[-1].step).dot(g)))
    mean = {which: sum(x) / trials for which, x in lengths.items()}
    # A trial has a deviation of about sqrt(2 / m) = 0.22 times its mean, the mean of 60 one of 0.03: four of them.
    assert mean["other"] == pytest.approx(1.0, abs=0.12)
    assert mean["same"] == pytest.approx(1.0 + n / m, abs=0.18)


@every
@pytest.mark.usefixtures("one_mode")
def test_the_curvature_closure(name):
    """Of another scale, it changes the step and not the loss; it raises, or is no function, without a trace."""
    x, told = parameter([1.0, 2.0]), []
    optimizer = make(name, [x], max_iter=1, callback=told.append)
    counts = {"loss": 0, "curvature": 0}

    def loss():
        counts["loss"] += 1
        return x.square().sum()

    def curvature():
        counts["curvature"] += 1
        return 50.0 * x.square().sum()

    optimizer.step(loss, curvature)
    assert counts == {"loss": 2, "curvature": 1}
    assert optimizer.state[x]["func_evals"] == 2
    assert told[-1].value == pytest.approx(float(x.detach().square().sum()))
    if name in ("newton", "newton-cg"):
        assert torch.allclose(x.detach(), torch.tensor([1.0, 2.0], dtype=F64) * (1 - 2.0 / 100.0))
    before, state = x.detach().clone(), dict(optimizer.state[x])
    with pytest.raises(TypeError, match="step: curvature_closure: expected a function or None, got float"):
        optimizer.step(loss, 1.0)

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(loss, broken)
    with pytest.raises(ValueError, match="closure: expected a loss with its graph"):
        optimizer.step(loss, lambda: 1.0)
    assert torch.equal(x.detach(), before)
    assert dict(optimizer.state[x]) == state
    optimizer.step(loss, lambda: curvature() * math.nan)
    assert optimizer.status is Status.NOT_FINITE
    assert torch.equal(x.detach(), before)


def test_nystrom_saves_products():
    """Twenty large eigenvalues, of which the sketch of 25 sees all."""
    n = 200
    a, _ = symmetric(n, [*torch.logspace(6, 3, 20).tolist(), *torch.linspace(1, 2, 180).tolist()])
    b = torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(1))
    inner = {}
    for preconditioner in (None, "nystrom"):
        x, told = torch.zeros(n, dtype=F64, requires_grad=True), []
        optimizer = NewtonCG([x], preconditioner=preconditioner, rank=25, forcing=1e-6, max_iter=1,
                             callback=told.append)  # fmt: skip
        optimizer.step(lambda x=x: 0.5 * x @ a @ x - b @ x)
        inner[preconditioner] = told[-1].inner
        want = torch.linalg.solve(a, b)
        assert float((x.detach() - want).norm()) <= 1e-4 * float(want.norm())
    assert 25 < inner["nystrom"] <= 0.6 * inner[None]


def test_damping_is_added():
    x = parameter([2.0, -3.0])
    NewtonCG([x], damping=3.0, forcing=1e-6, max_iter=1).step(lambda: x.square().sum() / 2)
    assert torch.allclose(x.detach(), torch.tensor([2.0, -3.0], dtype=F64) * 0.75)


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_lambda_follows_the_gain_ratio(lr):
    """Of a quadratic the model without lambda is exact: rho = 1. Of a loss that bends more, rho is less."""
    a, _ = symmetric(4, [1.0, 2.0, 3.0, 4.0])
    x = torch.ones(4, dtype=F64, requires_grad=True)
    optimizer = NewtonCG([x], lr, damping=3.0, adaptive=True, forcing=1e-6, max_iter=1)
    optimizer.step(lambda: 0.5 * x @ a @ x)
    start = torch.ones(4, dtype=F64)
    want = start - lr * torch.linalg.solve(a + 3.0 * torch.eye(4, dtype=F64), a @ start)
    assert torch.allclose(x.detach(), want, rtol=1e-6)
    assert optimizer.state[x]["lambda"] == pytest.approx(2.0)
    optimizer.step(lambda: 0.5 * x @ a @ x)
    assert optimizer.state[x]["lambda"] == pytest.approx(4.0 / 3.0)


@pytest.mark.parametrize(
    ("bend", "factor"), [(0.4, 2 / 3), (1.74, 2 / 3), (1.76, 1.0), (3.24, 1.0), (3.26, 3 / 2), (5.0, 3 / 2)]
)
def test_lambda_falls_stays_or_rises(bend, factor):
    """f = bend x^2 / 2 from 1, with curvature 1 from another batch and lambda = 1: d = -bend / 2, and

    rho = (bend^2 / 2 - bend^3 / 8) / (bend^2 / 2 - bend^2 / 8) = (4 - bend) / 3;    beyond 4 it is shortened."""
    x = parameter([1.0])
    optimizer = NewtonCG([x], damping=1.0, adaptive=True, max_iter=1)
    optimizer.step(lambda: bend * x.square().sum() / 2, lambda: x.square().sum() / 2)
    assert optimizer.state[x]["lambda"] == pytest.approx(factor)


def test_lambda_starts_at_a_tenth_of_the_curvature_along_the_gradient():
    x = parameter([3.0, 4.0])
    optimizer = NewtonCG([x], adaptive=True, max_iter=1)
    optimizer.step(lambda: 5.0 * x.square().sum())
    assert optimizer.state[x]["lambda"] == pytest.approx(0.1 * 10.0 * 2.0 / 3.0)


def test_lambda_does_not_hold_a_run_on_a_plateau_for_ever():
    """1 + 1e-3 x^2 in float32: lambda = 1e6 allows only steps of 1e-9, whose decrease is rounding."""
    x = torch.tensor([0.5]).requires_grad_()
    optimizer = NewtonCG([x], adaptive=True, damping=1e6, max_iter=1)

    def loss():
        return (1.0 + 1e-3 * x.square()).sum()

    for _ in range(80):
        optimizer.step(loss)
    # Seen is a decrease of 4e-7 and more, so that |x| = 0.02 is where all are lost; lambda was 1e-8 by then.
    assert abs(float(x.detach())) <= 0.02


def linear_problem(outputs, seed=0):
    """Return a Linear layer, and a closure of least squares whose inputs have condition 1e4."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(100, 12, generator=gen, dtype=F64) * torch.logspace(0, -4, 12, dtype=F64)
    y = torch.randn(100, outputs, generator=gen, dtype=F64)
    model = torch.nn.Linear(12, outputs, dtype=F64)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()

    def closure():
        out = model(x)
        return out, F.mse_loss(out, y)

    return model, closure


def test_a_kronecker_product_is_the_matrix_of_one_output():
    """There S is a number, and its one sample exact: the preconditioner is the inverse but for lambda."""
    inner = {}
    for preconditioner in (None, "kronecker"):
        model, closure = linear_problem(1)
        told = []
        optimizer = NewtonCG(model.parameters(), curvature="ggn", preconditioner=preconditioner, forcing=1e-6,
                             damping=1e-14, max_iter=1, callback=told.append)  # fmt: skip
        optimizer.step(closure)
        inner[preconditioner] = told[-1].inner
    # sqrt(lambda) = 1e-7 in either factor, beside least eigenvalues of 1e-8: a few products, not one.
    assert inner["kronecker"] <= 6 < 13 <= inner[None]


def test_kronecker_factors_are_those_of_the_formula():
    model, closure = linear_problem(3)
    params = list(model.parameters())
    point = EvaluatedPoint(closure, params, "outputs")
    b, lam = point.ggn(), 0.3
    with torch.no_grad():
        b._solver_product()
        solve = KFAC._around(b, 5).inverse(damping=lam)
        signs = 2.0 * torch.randint(2, (100, 3), generator=b.generator(5), dtype=F64) - 1.0
        delta = signs * math.sqrt(2.0 / 300.0)  # H_L = 2 / (100 * 3) I
        (matrix,) = b._iterate()
        h = torch.cat([matrix.jacobian.layers.layers[0].inputs, torch.ones(100, 1, dtype=F64)], 1)
        a, s = h.T @ h / 100, delta.T @ delta
        pi = math.sqrt(float((a.trace() / 13) / (s.trace() / 3)))
        m = torch.kron(
            s + math.sqrt(lam) / pi * torch.eye(3, dtype=F64), a + math.sqrt(lam) * pi * torch.eye(13, dtype=F64)
        )
        r = torch.randn(3, 13, dtype=F64, generator=torch.Generator().manual_seed(2))
        want = torch.linalg.solve(m, r.reshape(-1)).reshape(3, 13)
        found = solve @ torch.cat([r[:, :-1].reshape(-1), r[:, -1]])
    assert torch.allclose(found, torch.cat([want[:, :-1].reshape(-1), want[:, -1]]), rtol=1e-9)


def test_kronecker_products_save_products_of_a_deep_network():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, generator=gen, dtype=F64) @ torch.randn(20, 20, generator=gen, dtype=F64)
    inner = {}
    for preconditioner in (None, "kronecker"):
        torch.manual_seed(0)
        layers = []
        for width, wider in itertools.pairwise((20, 16, 8, 4, 8, 16, 20)):
            layers += [torch.nn.Linear(width, wider), torch.nn.Tanh()]
        model, told = torch.nn.Sequential(*layers[:-1]).double(), []

        def closure(model=model):
            out = model(x)
            return out, F.mse_loss(out, x)

        optimizer = NewtonCG(model.parameters(), curvature="ggn", preconditioner=preconditioner,
                             adaptive=True, max_iter=20, callback=told.append)  # fmt: skip
        optimizer.step(closure)
        inner[preconditioner] = sum(each.inner for each in told)
    assert inner["kronecker"] <= 0.5 * inner[None]


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_kronecker_products_are_of_layers(curvature):
    x = parameter([1.0, 2.0])
    optimizer = NewtonCG([x], curvature=curvature, preconditioner="kronecker")

    def closure():
        out = x.exp()
        loss = out.square().sum()
        return loss if curvature == "hessian" else (out, loss)

    with pytest.raises(ValueError, match=r"NewtonCG: preconditioner: expected 'kronecker' with \"ggn\" or"):
        optimizer.step(closure)
    assert x.tolist() == [1.0, 2.0]


# Ends -----------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_at_the_rounding_floor_it_stalls(name, dtype):
    loss, start = PROBLEMS["rosenbrock-10"]
    x = start[0].to(dtype).clone().requires_grad_()
    optimizer = make(name, [x], max_iter=300)
    optimizer.step(lambda: loss([x]) + 1.0)  # of which the last decreases are lost
    assert optimizer.status in (Status.STALLED, Status.CONVERGED)
    # The gradient's own rounding, eps times terms of 400, over the smallest curvature, about 1/2... and a margin of 10.
    assert float((x.detach() - 1.0).abs().max()) <= 1e4 * torch.finfo(dtype).eps * 2
    before = x.detach().clone()
    optimizer.step(lambda: loss([x]) + 1.0)
    assert float((x.detach() - before).abs().max()) <= 1e4 * torch.finfo(dtype).eps * 2


@every
def test_flat_directions_stay_and_one_parameter_is_enough(name):
    x = parameter([3.0, 5.0, 7.0])
    optimizer = make(name, [x], max_iter=100, tolerance_grad=1e-10)
    optimizer.step(lambda: x[0].cosh() + 0.0 * x.sum())
    assert optimizer.status is Status.CONVERGED
    assert abs(float(x[0].detach())) <= 1e-9
    assert torch.allclose(x.detach()[1:], torch.tensor([5.0, 7.0], dtype=F64), atol=1e-12)
    one = parameter(2.0)
    optimizer = make(name, [one], max_iter=100, tolerance_grad=1e-10)
    optimizer.step(lambda: one.cosh())
    assert optimizer.status is Status.CONVERGED
    assert abs(float(one.detach())) <= 1e-9


@every
def test_errors_of_the_closure_at_trials(name):
    """ln x to its left: a trial below zero raises, or counts as infinite."""

    def run(on_error, first=1e-3):
        x = parameter([first])

        def closure():
            if float(x.detach()) <= 0.0:
                raise ValueError("the logarithm of a negative number")
            return (x - 0.5 * x.log()).sum()

        return x, make(name, [x], max_iter=60, on_error=on_error, tolerance_grad=1e-8), closure

    x, optimizer, closure = run("backtrack", 2.0)
    optimizer.step(closure)
    assert optimizer.status is Status.CONVERGED
    assert float(x.detach()) == pytest.approx(0.5)
    x, optimizer, closure = run("backtrack", -1.0)  # at the start there is nothing to go back to
    with pytest.raises(ValueError, match="logarithm"):
        optimizer.step(closure)
    assert float(x.detach()) == -1.0


@pytest.mark.parametrize("name", ["trust-region", "trust-region-exact", "cubic-newton", "saddle-free-newton"])
def test_there_is_no_lr_where_the_model_says_how_far(name):
    x, y = parameter([1.0]), parameter([2.0])
    with pytest.raises(ValueError, match=r"lr: expected none \(the model .*\), got 0.1"):
        make(name, [{"params": [x], "lr": 0.1}, {"params": [y]}])
    with pytest.raises(TypeError, match="lr"):
        make(name, [x], lr=0.1)


@every
def test_lr_of_zero_and_a_gradient_too_small_to_square(name):
    x = parameter([1.0])
    if name in ("newton", "newton-cg"):
        optimizer = make(name, [x], lr=0.0)
        optimizer.step(lambda: x.square().sum())
        assert optimizer.status is Status.SMALL_CHANGE
        assert float(x.detach()) == 1.0
    x = parameter([1e-200])
    optimizer = make(name, [x], max_iter=5)
    optimizer.step(lambda: x.square().sum())
    assert isinstance(optimizer.status, Status)
    assert abs(float(x.detach())) <= 1e-200


@every
def test_the_graph_is_let_go(name):
    x, held = parameter([1.0, 2.0]), []
    optimizer = make(name, [x], max_iter=3)

    def closure():
        inner = x.exp()
        held.append(weakref.ref(inner))
        return inner.sum() - x.sum()

    optimizer.step(closure)
    gc.collect()
    assert len(held) > 1
    assert all(ref() is None for ref in held)


def test_a_maximum_of_a_pair():
    x = parameter([0.5, -0.5])

    def closure():
        out = x * 1.0
        return out, -(out - 2.0).square().sum()

    optimizer = TrustRegion([x], curvature="ggn", maximize=True, max_iter=20, tolerance_grad=1e-9)
    assert float(optimizer.step(closure)) == pytest.approx(-2.25 - 6.25)
    assert torch.allclose(x.detach(), torch.full((2,), 2.0, dtype=F64))


@every
def test_a_loss_is_brought_to_the_host_once(name, monkeypatch):
    """On a GPU each time is a wait; the one more is the loss that a step returns, which stays where it is."""
    calls = []
    kind = ALL[name][0]
    original = kind._loss
    monkeypatch.setattr(kind, "_loss", lambda self, point: (calls.append(point), original(self, point))[1])
    x = parameter([-1.2, 1.0])
    optimizer = make(name, [x], max_iter=30)
    optimizer.step(lambda: rosenbrock([x]))
    evaluations = optimizer.state[x]["func_evals"]
    assert 2 < len(calls) <= evaluations + 1


# NewtonCG's strong Wolfe search ---------------------------------------------------------------------------------------


def _walk(line_search_fn, start, **options):
    """Run to a gradient of 1e-6; return what was told, the parameters after each iteration, and the optimizer."""
    x, told, places = parameter(start), [], []

    def callback(iteration):
        told.append(iteration)
        places.append(x.detach().clone())

    optimizer = NewtonCG(
        [x], max_iter=1000, tolerance_grad=1e-6, line_search_fn=line_search_fn, callback=callback, **options
    )
    optimizer.step(lambda: rosenbrock([x]))
    return told, places, optimizer


def test_steps_satisfy_the_strong_wolfe_conditions(one_mode):
    """Wherever the Hessian is positive definite; along negative curvature steps are shortened only."""
    told, places, optimizer = _walk("strong_wolfe", [-1.2, 1.0] * 5)
    assert optimizer.status is Status.CONVERGED
    judged = 0
    for (before, after), iteration in zip(itertools.pairwise(places), told[1:], strict=True):
        d = (after - before) / iteration.step
        g, new_g = (torch.func.grad(lambda z: rosenbrock([z]))(z) for z in (before, after))
        slope = float(g @ d)
        if float(torch.linalg.eigvalsh(torch.func.hessian(lambda z: rosenbrock([z]))(before))[0]) <= 0.0:
            continue
        # The direction is known to a rounding of the parameters over the step.
        slack = 1e-12 * float(new_g.norm() * after.norm()) / iteration.step
        assert float(rosenbrock([after])) <= float(rosenbrock([before])) + 1e-4 * iteration.step * slope + 1e-15
        assert abs(float(new_g @ d)) <= 0.9 * abs(slope) + slack
        judged += 1
    assert judged > 10


def test_a_step_that_is_too_short_is_lengthened(one_mode):
    """The slope at t is 1 - t of that at the start, .95 for the first trial; the next is at most ten times as long."""
    told = []
    x = parameter([1.0, 2.0])
    optimizer = NewtonCG([x], lr=0.05, max_iter=1, forcing=1e-6, line_search_fn="strong_wolfe", callback=told.append)
    optimizer.step(lambda: x.square().sum())
    assert told[-1].step == 0.5
    assert optimizer.state[x]["func_evals"] == 3
    assert torch.allclose(x.detach(), torch.tensor([0.5, 1.0], dtype=F64), rtol=1e-15)


def test_a_search_that_lengthens_saves_products_in_a_valley(one_mode):
    """1,619 to 4,787 when this was written."""
    products = {}
    for search in ("backtracking", "strong_wolfe"):
        told, _, optimizer = _walk(search, [-1.2, 1.0] * 50, forcing=0.3)
        assert optimizer.status is Status.CONVERGED
        products[search] = sum(iteration.inner for iteration in told)
    assert products["strong_wolfe"] < 0.5 * products["backtracking"]


def test_a_search_without_a_finite_trial_or_evaluations_stays(one_mode):
    for limit, want in ((None, Status.NOT_FINITE), (2, Status.NOT_FINITE)):
        x = parameter([1.0, 2.0])
        start = x.detach().clone()
        optimizer = NewtonCG([x], line_search_fn="strong_wolfe", max_eval=limit)
        away = lambda x=x, start=start: 0.0 if torch.equal(x.detach(), start) else math.nan  # noqa: E731
        optimizer.step(lambda x=x, away=away: x.square().sum() + away())
        assert optimizer.status is want
        assert torch.equal(x.detach(), start)
    # A step far too long, and one evaluation to see it.
    x = parameter([-1.2, 1.0])
    optimizer = NewtonCG([x], lr=100.0, line_search_fn="strong_wolfe", max_eval=2)
    optimizer.step(lambda: rosenbrock([x]))
    assert optimizer.status is Status.MAX_EVAL
    assert x.tolist() == [-1.2, 1.0]
    assert optimizer.state[x]["func_evals"] == 2


def test_an_earlier_trial_of_a_search_is_gone_back_to(one_mode):
    """Newton's step leads to where the slope is steeper, a longer one into a wall, and there is no time to look on."""
    x, seen = parameter([0.0]), []

    def loss():
        seen.append(float(x))
        beyond = torch.where(x <= 1.005, -1.5 - 2.0 * (x - 1.0), 100.0 + x)
        return torch.where(x < 0.5, 0.5 * x * x - x, beyond).sum()

    optimizer = NewtonCG([x], max_iter=1, max_eval=5, line_search_fn="strong_wolfe")
    optimizer.step(loss)
    assert seen[:2] == [0.0, 1.0]
    assert min(seen[2:4]) > 1.005
    assert seen[4:] == [1.0]
    assert x.tolist() == [1.0]
    assert optimizer.state[x]["func_evals"] == 5
