"""Third derivatives: Hessians of losses that contain derivatives, against differences of gradients in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvature_problems import dense, error
from secant.curvature import GGN, Hessian

F64 = torch.float64


class Rows(nn.Module):
    """A layer of sequences on rows of features."""

    def __init__(self, layer: nn.Module, *shape: int) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, h):
        y = self.layer(h.view(-1, *self.shape))
        return (y[0] if isinstance(y, tuple) else y).reshape(len(h), -1)


class Attention(nn.Module):
    def forward(self, h):
        q = h.unsqueeze(0)
        return F.scaled_dot_product_attention(q, 1.3 * q, q + 0.1)[0]


class Function(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, h):
        return self.f(h)


LAYERS = {
    "layer_norm": lambda: nn.LayerNorm(8),
    "layer_norm without weight": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "layer_norm of two dimensions": lambda: Rows(nn.LayerNorm((2, 4)), 2, 4),
    "torch.layer_norm": lambda: Function(lambda h: torch.layer_norm(h, (8,))),
    "batch_norm": lambda: nn.BatchNorm1d(8),
    "batch_norm without running statistics": lambda: nn.BatchNorm1d(8, track_running_stats=False),
    "batch_norm of sequences": lambda: Rows(nn.BatchNorm1d(4), 4, 2),
    "batch_norm after a convolution": lambda: Rows(
        nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.BatchNorm1d(2)), 2, 4
    ),
    "batch_norm in evaluation": lambda: nn.BatchNorm1d(8).eval(),
    "torch.batch_norm": lambda: Function(lambda h: torch.batch_norm(h, None, None, None, None, True, 0.1, 1e-5, False)),
    "instance_norm": lambda: Rows(nn.InstanceNorm1d(2, affine=True), 2, 4),
    "group_norm": lambda: nn.GroupNorm(2, 8),
    "rms_norm": lambda: nn.RMSNorm(8),
    "softmax": lambda: nn.Softmax(-1),
    "log_softmax": lambda: nn.LogSoftmax(-1),
    "attention": lambda: Attention(),
    "lstm": lambda: Rows(nn.LSTM(8, 8, batch_first=True), 1, 8),
    "gru": lambda: Rows(nn.GRU(8, 8, batch_first=True), 1, 8),
    "gelu": lambda: nn.GELU(),
    "normalize": lambda: Function(lambda h: F.normalize(h, dim=-1)),
}


#: Those that torch differentiates wrongly; torch.func refuses running statistics, which are written in place.
THIRD = ["layer_norm", "batch_norm without running statistics", "instance_norm"]


class Problem:
    """u(x) of a net 4-8-1 with the layer in the middle, and losses with du/dx by four ways of torch."""

    def __init__(self, layer):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), layer, nn.Tanh(), nn.Linear(8, 1)).double()
        self.params = list(self.net.parameters())
        self.x = torch.randn(5, 4, dtype=F64)
        with torch.no_grad():
            for p in self.params:
                p.add_(0.3 * torch.randn_like(p))

    def _square(self, x):
        return self.net(x).square().sum()

    def backward(self):
        x = self.x.clone().requires_grad_()
        return torch.autograd.grad(self._square(x), x, create_graph=True)[0]

    def reverse(self):
        return torch.func.grad(self._square)(self.x)

    def forward(self):
        return torch.func.jvp(self.net, (self.x,), (torch.ones_like(self.x),))[1]

    def second(self):
        x = self.x.clone().requires_grad_()
        (g,) = torch.autograd.grad(self._square(x), x, create_graph=True)
        return torch.autograd.grad(g[:, 0].sum(), x, create_graph=True)[0]

    def directional(self, loss, v, h=1e-3):
        """d/dt grad loss(w + t v) by a difference of fourth order, each gradient by torch in the first derivative."""
        parts = [
            part.view(p.shape) for part, p in zip(v.split([p.numel() for p in self.params]), self.params, strict=True)
        ]
        total = 0.0
        for t, c in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            with torch.no_grad():
                for p, part in zip(self.params, parts, strict=True):
                    p.add_(part, alpha=t * h)
            found = torch.autograd.grad(loss(), self.params, allow_unused=True, materialize_grads=True)
            total = total + c * torch.cat([g.reshape(-1) for g in found])
            with torch.no_grad():
                for p, part in zip(self.params, parts, strict=True):
                    p.sub_(part, alpha=t * h)
        return total / (12 * h)


@pytest.mark.filterwarnings("ignore::secant.SecantWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_hessian_of_a_loss_with_a_derivative(name):
    problem = Problem(LAYERS[name]())

    def loss():
        return problem.backward().square().sum()

    H = Hessian(loss, problem.params)
    u, v = torch.randn(2, H.shape[0], dtype=F64)
    hu, hv = H @ u, H @ v
    assert abs(float(u @ hv - v @ hu)) < 1e-11 * float(u.norm() * hv.norm())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = problem.directional(loss, v / v.norm())
    # h^4 = 1e-12 times a sixth derivative of up to some 1e4 of the value, and rounding 1e-13 over h; faults were 0.1.
    assert float((hv / v.norm() - want).norm() / want.norm()) < 1e-6


@pytest.mark.parametrize("way", ["backward", "reverse", "forward", "second"])
@pytest.mark.parametrize("name", THIRD)
def test_every_mode_under_every_way_to_differentiate(name, way):
    problem = Problem(LAYERS[name]())

    def loss():
        return getattr(problem, way)().square().sum()

    matrices = {}
    for mode in Hessian._MODES:
        if "forward" in mode and way in ("backward", "second"):  # torch.func refuses requires_grad_ in the closure
            continue
        matrices[mode] = dense(Hessian(loss, problem.params, mode=mode))
        assert error(matrices[mode].T, matrices[mode]) < 1e-11
    first = matrices["double-backward"]
    assert len(matrices) == (1 if way in ("backward", "second") else 3)
    for other in matrices.values():
        assert error(other, first) < 1e-11
    if way in ("backward", "reverse"):  # of the others torch's own gradient is wrong too
        v = torch.randn(len(first), dtype=F64)
        want = problem.directional(loss, v / v.norm())
        assert float((first @ v / v.norm() - want).norm() / want.norm()) < 1e-6


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "instance_norm", "group_norm", "rms_norm"])
def test_forward_modes_of_a_loss_without_a_derivative(name):
    """torch differentiates the forward mode of layer_norm wrongly."""
    problem = Problem(LAYERS[name]())

    def loss():
        return (problem.net(problem.x) ** 3).sum()

    want = dense(Hessian(loss, problem.params, mode="double-backward"))
    for mode in ("auto", "forward-over-reverse", "reverse-over-forward"):
        H = Hessian(loss, problem.params, mode=mode)
        assert error(dense(H), want) < 1e-12
        assert "disagrees" not in str(H.timings)


@pytest.mark.parametrize("mode", ["auto", "double-backward", "forward"])
@pytest.mark.parametrize("name", THIRD)
def test_ggn_whose_outputs_are_a_derivative(name, mode):
    problem = Problem(LAYERS[name]())

    def closure():
        outputs = problem.reverse()
        return outputs, 0.5 * outputs.square().sum()

    outputs = problem.reverse().reshape(-1)
    rows = [
        torch.autograd.grad(y, problem.params, retain_graph=True, allow_unused=True, materialize_grads=True)
        for y in outputs
    ]
    jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    assert error(dense(GGN(closure, problem.params, mode=mode)), jacobian.T @ jacobian) < 1e-11


def test_half_precision_is_normalised_in_float32():
    problem = Problem(nn.LayerNorm(8))
    want = dense(Hessian(lambda: problem.reverse().square().sum(), problem.params))
    problem.net.to(torch.bfloat16)
    problem.x = problem.x.to(torch.bfloat16)
    H = Hessian(lambda: problem.reverse().square().sum(), problem.params, mode="double-backward")
    got = H @ torch.eye(H.shape[0], dtype=torch.bfloat16)
    # bfloat16 keeps 8 bits: some tens of roundings of 2^-9.
    assert float((got.double() - want).norm() / want.norm()) < 30 * 2**-9


class Wrong(torch.autograd.Function):
    """x1 x2 whose backward takes one of its factors for a constant."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * b, g * a.detach()


@pytest.mark.parametrize("mode", ["auto", "double-backward"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_product_that_is_not_symmetric_is_refused_and_its_function_named(mode, keep):
    a, b = (torch.randn(4, requires_grad=True) for _ in range(2))
    H = Hessian(lambda: (Wrong.apply(a, b) ** 2).sum() + (a**3).sum(), [a, b], mode=mode, keep_graphs=keep)
    with pytest.raises(RuntimeError, match=r"u\.H v and v\.H u differ by .* the derivative of Wrong is wrong"):
        H @ torch.ones(8)


def test_terms_beside_recognised_layers_are_checked_too():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    a, b = (torch.randn(4, requires_grad=True) for _ in range(2))
    right = Hessian(lambda: net(x).square().mean() + (a * b).square().sum(), [*net.parameters(), a, b])
    right @ torch.ones(right.shape[0])
    assert right.mode == "r-operator"
    H = Hessian(lambda: net(x).square().mean() + Wrong.apply(a, b).square().sum(), [*net.parameters(), a, b])
    with pytest.raises(RuntimeError, match="Wrong is wrong"):
        H @ torch.ones(H.shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_a_matrix_that_is_zero_is_no_asymmetry(dtype):
    torch.manual_seed(0)
    w, x = torch.randn(20, 30, dtype=dtype, requires_grad=True), torch.randn(40, 30, dtype=dtype)
    for seed in range(5):
        torch.manual_seed(seed)
        with torch.no_grad():
            w.normal_()
        for mode in Hessian._MODES:
            got = Hessian(lambda: torch.softmax(x @ w.T, 1).sum(), [w], mode=mode) @ torch.ones(600, dtype=dtype)
            assert got.abs().max() < 1e-2 if dtype is torch.float32 else 1e-10
