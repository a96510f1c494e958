"""Functions to minimize, and a way to run an optimizer that records every point it evaluates."""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def rosenbrock(params: list[Tensor]) -> Tensor:
    (x,) = params
    return (100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2).sum()


def quadratic(condition: float, n: int = 30):
    """0.5 x.Ax - b.x with eigenvalues spread geometrically between 1 and `condition`."""
    gen = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(n, n, generator=gen, dtype=torch.float64))[0]
    a = (q * torch.logspace(0.0, math.log10(condition), n, dtype=torch.float64)) @ q.T
    a, b = 0.5 * (a + a.T), torch.randn(n, generator=gen, dtype=torch.float64)
    return lambda params: 0.5 * params[0] @ a @ params[0] - b @ params[0]


def mlp():
    """Mean squared error of a tanh network on 64 points, and its initial parameters (four tensors)."""
    gen = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    x = randn(64, 5)
    y = torch.sin(x.sum(1, keepdim=True))
    start = [0.5 * randn(5, 8), torch.zeros(8).double(), 0.5 * randn(8, 1), torch.zeros(1).double()]

    def loss(params: list[Tensor]) -> Tensor:
        w1, b1, w2, b2 = params
        return ((torch.tanh(x @ w1 + b1) @ w2 + b2 - y) ** 2).mean()

    return loss, start


PROBLEMS = {
    "quadratic-1e1": (quadratic(1e1), [torch.zeros(30).double()]),
    "quadratic-1e3": (quadratic(1e3), [torch.ones(30).double()]),
    "quadratic-1e6": (quadratic(1e6), [torch.ones(30).double()]),
    "rosenbrock-2": (rosenbrock, [torch.tensor([-1.2, 1.0]).double()]),
    "rosenbrock-10": (rosenbrock, [torch.linspace(-1, 1, 10).double()]),
    "mlp": mlp(),
}


def quadratic_residuals(condition: float, n: int = 30):
    """A^(1/2) x - A^(-1/2) b, of the quadratic above."""
    gen = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(n, n, generator=gen, dtype=torch.float64))[0]
    roots = torch.logspace(0.0, 0.5 * math.log10(condition), n, dtype=torch.float64)
    b = q.T @ torch.randn(n, generator=gen, dtype=torch.float64)
    return lambda params: roots * (q.T @ params[0]) - b / roots


def mlp_residuals():
    """The residuals of the network, half of whose squared sum is its loss."""
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(64, 5, generator=gen, dtype=torch.float64)
    y = torch.sin(x.sum(1, keepdim=True))

    def residuals(params: list[Tensor]) -> Tensor:
        w1, b1, w2, b2 = params
        return (torch.tanh(x @ w1 + b1) @ w2 + b2 - y) * math.sqrt(2.0 / 64.0)

    return residuals


#: Of problems that are sums of squares.
RESIDUALS = {"quadratic-1e1": quadratic_residuals(1e1), "mlp": mlp_residuals()}


class Run:
    """An optimizer on a function: `points` and `losses` of every evaluation, `ends` of every step."""

    def __init__(self, cls, loss, start, **options):
        self.params = [x.clone().requires_grad_() for x in start]
        self.loss, self.points, self.losses, self.ends = loss, [], [], []
        self.optimizer = cls(self.params, **options)

    @property
    def x(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    @property
    def state(self) -> dict:
        return self.optimizer.state[self.params[0]]

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.params)
        loss.backward()
        self.points.append(self.x)
        self.losses.append(loss.item())
        return loss

    def step(self, calls: int = 1) -> "Run":
        for _ in range(calls):
            self.optimizer.step(self.closure)
            self.ends.append(self.x)
        return self


class Reads(TorchDispatchMode):
    """Counts what brings data to the host: `_local_scalar_dense`, and `Tensor.tolist`, which dispatches nothing."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        tolist = torch.Tensor.tolist

        def counted(x):
            self.count += x.dim() > 0
            return tolist(x)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))
