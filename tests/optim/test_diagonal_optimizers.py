"""AdaHessian and Sophia: their formulas, their samples of the diagonal, and what they leave behind."""

import gc
import math

import pytest
import torch

from optimizer_problems import PROBLEMS
from secant.optim import AdaHessian, Sophia
from secant.optim._diagonal_optimizer import mixed

SHAPES = [(4, 3), (5,), (2, 3, 2, 2), ()]


def separable(seed=0):
    """sum c (p^4 + p^2) + b p, whose Hessian is its diagonal: z * (H z) is that whatever the signs are."""
    gen = torch.Generator().manual_seed(seed)
    coefficients = [torch.rand(shape, generator=gen, dtype=torch.float64) + 0.1 for shape in SHAPES]
    slopes = [torch.randn(shape, generator=gen, dtype=torch.float64) for shape in SHAPES]
    start = [torch.randn(shape, generator=gen, dtype=torch.float64) for shape in SHAPES]

    def loss(params):
        return sum((c * (p**4 + p**2) + b * p).sum() for c, b, p in zip(coefficients, slopes, params, strict=True))

    def derivatives(p, i):
        return coefficients[i] * (4 * p**3 + 2 * p) + slopes[i], coefficients[i] * (12 * p**2 + 2)

    return loss, derivatives, start


def run(make, steps=50):
    loss, _, start = separable()
    params = [x.clone().requires_grad_() for x in start]
    optimizer = make(params)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(params).backward(create_graph=optimizer.needs_graph)
        optimizer.step()
    return [p.detach() for p in params]


#: Of 50 steps of at most .1, each of some twenty operations; the curvature is .2 at least.
ROUNDING = 50 * 20 * 0.1 * 1e2 * 2.0**-52


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_adahessian_is_the_formula(power, clip, every):
    lr, beta1, beta2, eps, decay = 0.05, 0.9, 0.99, 1e-4, 0.1
    ours = run(
        lambda params: AdaHessian(
            params, lr, (beta1, beta2), eps, hessian_power=power, clip=clip, update_every=every, weight_decay=decay
        )
    )
    _, derivatives, start = separable()
    for i, (p, x) in enumerate(zip(start, ours, strict=True)):
        m, v, samples = torch.zeros_like(p), torch.zeros_like(p), 0
        for t in range(1, 51):
            g, diagonal = derivatives(p, i)
            m = beta1 * m + (1 - beta1) * g
            if t % every == 1 % every:
                if p.dim() == 4:
                    diagonal = diagonal.mean(dim=(2, 3), keepdim=True).expand_as(p)
                v, samples = beta2 * v + (1 - beta2) * diagonal**2, samples + 1
            step = m / (1 - beta1**t) / ((v / (1 - beta2**samples)).sqrt() ** power + eps)
            step = step if clip is None else step.clamp(-clip, clip)
            p = p - lr * decay * p - lr * step
        assert (x - p).abs().max() <= ROUNDING


@pytest.mark.parametrize("every", [1, 10])
def test_sophia_is_the_formula(every):
    lr, beta1, beta2, rho, decay = 0.05, 0.96, 0.9, 0.5, 0.1
    ours = run(lambda params: Sophia(params, lr, (beta1, beta2), rho, update_every=every, weight_decay=decay))
    _, derivatives, start = separable()
    for i, (p, x) in enumerate(zip(start, ours, strict=True)):
        m, h = torch.zeros_like(p), torch.zeros_like(p)
        for t in range(1, 51):
            g, diagonal = derivatives(p, i)
            m = beta1 * m + (1 - beta1) * g
            if t % every == 1 % every:
                h = beta2 * h + (1 - beta2) * diagonal
            p = p - lr * decay * p
            p = p - lr * (m / (rho * h).clamp(min=1e-12)).clamp(-1, 1)
        assert (x - p).abs().max() <= ROUNDING


def test_sophia_g_is_the_formula():
    lr, beta1, beta2, rho, size = 0.05, 0.9, 0.9, 0.5, 8
    gen = torch.Generator().manual_seed(0)
    p = torch.randn(6, generator=gen, dtype=torch.float64).requires_grad_()
    optimizer = Sophia([p], lr, (beta1, beta2), rho, estimator="gnb", update_every=5)
    assert not optimizer.is_second_order
    assert not optimizer.needs_graph
    x, m, h = p.detach().clone(), torch.zeros(6).double(), torch.zeros(6).double()
    for t in range(50):
        g = torch.randn(6, generator=gen, dtype=torch.float64)
        if t % 5 == 0:
            p.grad = torch.randn(6, generator=gen, dtype=torch.float64)
            h = beta2 * h + (1 - beta2) * size * p.grad**2
            optimizer.update_hessian(size)
        p.grad = g
        optimizer.step()
        m = beta1 * m + (1 - beta1) * g
        x = x - lr * (m / (rho * h).clamp(min=1e-12)).clamp(-1, 1)
    assert (p.detach() - x).abs().max() <= ROUNDING


# Samples --------------------------------------------------------------------------------------------------------------


def exact_hessian():
    loss, start = PROBLEMS["mlp"]
    sizes = [x.numel() for x in start]

    def of_vector(x):
        return loss([piece.view(p.shape) for piece, p in zip(x.split(sizes), start, strict=True)])

    return torch.autograd.functional.hessian(of_vector, torch.cat([x.reshape(-1) for x in start]))


@pytest.mark.parametrize("make", [AdaHessian, Sophia])
@pytest.mark.parametrize("through", ["graph", "closure"])
def test_samples_are_unbiased(make, through):
    """Var z_i (H z)_i = sum_(j != i) H_ij^2; five deviations are exceeded by one of 57 means in 3e4 cases."""
    loss, start = PROBLEMS["mlp"]
    params = [x.clone().requires_grad_() for x in start]
    closure = None if through == "graph" else (lambda: loss(params))
    optimizer = make(params, lr=0.0, update_every=1, hessian_closure=closure)
    count, total = 300, 0.0
    for _ in range(count):
        optimizer.zero_grad()
        loss(params).backward(create_graph=optimizer.needs_graph)
        optimizer.step()
        total = total + torch.cat([optimizer._samples[id(p)].reshape(-1) for p in params])
    h = exact_hessian()
    deviation = ((h**2).sum(1) - h.diagonal() ** 2).div(count).sqrt()
    assert ((total / count - h.diagonal()).abs() <= 5.0 * deviation + 1e-14).all()
    assert (deviation > 0.0).all()
    assert all(torch.equal(p, x) for p, x in zip(params, start, strict=True))


@pytest.mark.parametrize("through", ["gradients", "closure"])
def test_gauss_newton_bartlett_is_unbiased(through):
    """Against the exact diagonal of the Gauss-Newton matrix; deviations as found, five of them, for 24 entries."""
    gen = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=gen, dtype=torch.float64) for shape in ((16, 6), (6, 4)))
    w.requires_grad_()
    p = torch.softmax(x @ w.detach(), -1)
    exact = ((x**2).T @ (p * (1 - p))) / 16
    closure = None if through == "gradients" else (lambda: x @ w)
    optimizer = Sophia([w], 0.0, (0.9, 0.0), estimator="gnb", update_every=1, hessian_closure=closure)
    found = []
    for _ in range(600 if through == "gradients" else 60):
        if through == "gradients":
            labels = torch.multinomial(p, 1, generator=gen)[:, 0]
            (w.grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x @ w, labels), [w])
            optimizer.update_hessian(16)
        else:
            w.grad = torch.zeros_like(w)
            optimizer.step()
        found.append(optimizer.state[w]["hessian"].clone())
    found = torch.stack(found)
    deviation = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact).abs() <= 5.0 * deviation).all()
    assert (deviation > 0.0).all()
    assert (deviation < 0.5 * exact).all()


def test_signs_depend_on_seed_number_and_step():
    def signs(seed=0, steps=1):
        p, q = (torch.ones(64, dtype=torch.float64, requires_grad=True) for _ in range(2))
        optimizer = AdaHessian([p, q], lr=0.0, seed=seed)
        for _ in range(steps):
            optimizer.zero_grad()
            (p.sum() * q.sum()).backward(create_graph=True)
            optimizer.step()
        return optimizer._samples[id(p)].clone(), optimizer._samples[id(q)].clone()

    assert all(torch.equal(x, y) for x, y in zip(signs(), signs(), strict=True))
    assert not torch.equal(*signs())
    assert not torch.equal(signs()[0], signs(seed=1)[0])
    assert not torch.equal(signs()[0], signs(steps=2)[0])
    low = {mixed(seed, number, step) % 2**32 for seed in range(10) for number in range(10) for step in range(100)}
    assert len(low) > 9_990  # of 10,000 among 2^32, a birthday pair is found once in a hundred times


# Graphs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["graph", "closure"])
@pytest.mark.parametrize("make", [AdaHessian, Sophia])
def test_graphs_are_freed(make, through):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    x = torch.randn(8, 4)
    closure = None if through == "graph" else (lambda: model(x).square().mean())
    optimizer = make(model.parameters(), update_every=1, hessian_closure=closure)

    def tensors():
        return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward(create_graph=optimizer.needs_graph)
        optimizer.step()

    for _ in range(5):
        step()
    gc.collect()
    gc.disable()  # what lives in cycles counts, too
    try:
        before = tensors()
        for _ in range(200):
            step()
        assert tensors() == before
    finally:
        gc.enable()


def test_gradients_without_a_graph_are_an_error_only_where_one_is_needed():
    p = torch.ones(3, requires_grad=True)
    optimizer = Sophia([p], update_every=3)
    for t in range(1, 10):
        due = t % 3 == 1
        assert optimizer.needs_graph is due
        optimizer.zero_grad()
        (p**2).sum().backward()
        if due:
            before = p.detach().clone()
            with pytest.raises(ValueError, match=r"Sophia: gradients: expected a graph, by backward\(create_graph"):
                optimizer.step()
            assert torch.equal(p, before)
            assert p not in optimizer.state or optimizer.state[p]["step"].item() == t - 1
            optimizer.zero_grad()
            (p**2).sum().backward(create_graph=True)
        optimizer.step()


def test_a_closure_of_another_kind_is_named():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    for closure, message in [
        (lambda: None, "NoneType"),
        (lambda: 1.0, "float"),
        (lambda: p.detach().sum(), "a tensor"),
    ]:
        optimizer = AdaHessian([p], hessian_closure=closure)
        with pytest.raises(TypeError, match=f"AdaHessian: hessian_closure: expected it to return a loss .*{message}"):
            optimizer.step()
    with pytest.raises(TypeError, match="AdaHessian: hessian_closure: expected a function or None"):
        AdaHessian([p], hessian_closure=1.0)


@pytest.mark.parametrize("make", [AdaHessian, Sophia])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_checkpoint_before_the_first_step_takes_no_sample_away(make, resumed):
    """A distributed checkpoint builds the state by a step with gradients of zero and lr = 0; the next one samples."""
    loss, derivatives, start = separable()
    params = [x.clone().requires_grad_() for x in start]
    optimizer = make(params, lr=0.01, update_every=4)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    assert all(map(torch.equal, params, start))
    if resumed:
        state, optimizer = optimizer.state_dict(), make(params, lr=0.01, update_every=4)
        optimizer.load_state_dict(state)
    name = "hessian" if make is Sophia else "exp_hessian_sq"
    needs = []
    for _ in range(5):
        needs.append(optimizer.needs_graph)
        optimizer.zero_grad()
        loss(params).backward(create_graph=optimizer.needs_graph)
        optimizer.step()
        if len(needs) == 1:
            for i, (p, x) in enumerate(zip(params, start, strict=True)):
                state, h = optimizer.state[p], derivatives(x, i)[1]
                assert state["hessian_step"] == 1
                h = h if make is Sophia else (h.mean((2, 3), keepdim=True) if h.dim() > 2 else h).square()
                beta = optimizer.param_groups[0]["betas"][1]
                torch.testing.assert_close(state[name], (1 - beta) * h)
    assert needs == [True, False, False, True, False]  # steps 2 and 5 of the count


def test_sophia_wants_to_be_told():
    p = torch.ones(3, requires_grad=True)
    optimizer = Sophia([p], estimator="gnb")
    p.grad = torch.ones(3)
    for _ in range(20):
        optimizer.step()
    with pytest.raises(ValueError, match="Sophia: update_hessian: expected a call every 10 steps"):
        optimizer.step()
    optimizer.update_hessian(1)
    optimizer.step()
    with pytest.raises(ValueError, match=r"Sophia.update_hessian: batch_size: expected an integer"):
        optimizer.update_hessian(0)
    with pytest.raises(ValueError, match=r"Sophia.update_hessian: estimator: expected 'gnb'"):
        Sophia([p]).update_hessian(1)
    with pytest.raises(ValueError, match="Sophia: estimator: expected 'gnb' in every group"):
        optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)], "estimator": "hutchinson"})


# Diagonals that are zero, or not finite -------------------------------------------------------------------------------


def test_adahessian_takes_no_long_step_where_the_diagonal_is_zero():
    """Of a linear loss the published step is the gradient over eps, 1e4 gradients; ours is at most clip, times lr."""
    p, q = (torch.zeros(4, requires_grad=True) for _ in range(2))
    for clip, longest in ((0.1, 0.01), (None, 1e3)):
        optimizer = AdaHessian([p, q], lr=0.1, clip=clip)
        before = p.detach().clone()
        optimizer.zero_grad()
        (p.sum() + (q**2).sum()).backward(create_graph=True)
        optimizer.step()
        torch.testing.assert_close(before - p.detach(), torch.full((4,), longest), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("make", [AdaHessian, Sophia])
def test_networks_with_relu_stay_finite(make):
    """Also with units that are never on, whose derivatives are all zero."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 20), torch.nn.ReLU(),
                                torch.nn.Linear(20, 3))  # fmt: skip
    with torch.no_grad():
        model[0].bias[:5] = -100.0
    optimizer = make(model.parameters(), update_every=2)
    x, y = torch.randn(256, 10), torch.randint(3, (256,))
    losses = []
    for k in range(300):
        rows = slice(32 * (k % 8), 32 * (k % 8) + 32)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward(create_graph=optimizer.needs_graph)
        optimizer.step()
        losses.append(loss.item())
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("make", [AdaHessian, Sophia])
def test_a_second_derivative_that_is_not_finite_teaches_nothing(make):
    p = torch.tensor([0.0, 1.0], requires_grad=True)  # |p|^1.5 has the slope 0 and the curvature inf at 0
    optimizer = make([p], update_every=1)
    for _ in range(3):
        optimizer.zero_grad()
        (p.abs() ** 1.5).sum().backward(create_graph=True)
        optimizer.step()
    assert torch.isfinite(p).all()
    assert p[1] < 1.0
    assert all(torch.isfinite(x).all() for x in optimizer.state[p].values())
