"""What is evaluated when, batches, modes, attention, and what is said when it goes wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvature_problems import ROUNDING, Residual, Transformer, data, dense, dense_hessian, error, mlp
from secant import SecantWarning
from secant.curvature import GGN, EmpiricalFisher, Fisher, Hessian, _matrices


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Counted:
    """A loss that counts its evaluations."""

    def __init__(self, net):
        (self.x, self.y), self.net, self.count = data(), net, 0
        self.x = self.x.flatten(1)

    def __call__(self):
        self.count += 1
        return F.cross_entropy(self.net(self.x), self.y)


@pytest.mark.parametrize("mode", ["auto", "double-backward"])
def test_one_evaluation_serves_all_products_of_a_point(mode):
    net = mlp()
    loss = Counted(net)
    H = Hessian(loss, net.parameters(), mode=mode)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    first = H @ v
    H.trace(20)
    H.eigs(2)
    assert loss.count == 1
    assert (H @ v == first).all()
    with torch.no_grad():
        next(net.parameters()).mul_(1.5)
    moved = H @ v
    assert loss.count == 2
    assert error(moved, dense_hessian(loss(), list(net.parameters())) @ v) < ROUNDING
    assert error(first, moved) > 1e-3


def test_a_parameter_with_new_memory_is_seen_and_a_change_of_data_takes_refresh():
    net = mlp()
    loss = Counted(net)
    H = Hessian(loss, net.parameters())
    v = torch.randn(H.shape[0], dtype=torch.float64)
    first = H @ v
    weight = net[1].weight
    weight.data = 2 * weight.data
    assert error(H @ v, first) > 1e-3
    assert loss.count == 2
    loss.x = 2 * loss.x
    stale = H @ v
    H.refresh()
    fresh = H @ v
    assert error(stale, fresh) > 1e-3
    assert error(fresh, dense_hessian(loss(), list(net.parameters())) @ v) < ROUNDING


def _batched(net):
    x, y = data(9)
    x = x.flatten(1)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]

    def closure(batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    return closure, batches, F.cross_entropy(net(x), y)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("make", [mlp, lambda: Residual().double()])
def test_batches_add_up(make, keep):
    net = make()
    closure, batches, whole = _batched(net)
    params = list(net.parameters())
    H = Hessian(closure, params, batches=batches, weights=[4 / 9, 5 / 9], keep_graphs=keep)
    assert error(dense(H), dense_hessian(whole, params)) < ROUNDING
    mean = Hessian(closure, params, batches=batches)
    both = sum(dense_hessian(closure(batch), params) for batch in batches)
    assert error(dense(mean), both / 2) < ROUNDING


def test_graphs_that_are_not_kept_serve_all_columns_of_a_product():
    net = mlp()
    closure, batches, _ = _batched(net)
    count = []
    H = Hessian(lambda b: count.append(1) or closure(b), net.parameters(), batches=batches, keep_graphs=False)
    H @ torch.eye(H.shape[0], dtype=torch.float64)
    assert len(count) == 2
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert len(count) == 4


@pytest.mark.parametrize("mode", ["auto", "forward-over-reverse", "reverse-over-forward"])
def test_dropout_keeps_its_mask(mode):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    loss = Counted(net)
    H = Hessian(loss, net.parameters(), mode=mode)
    state = torch.get_rng_state()
    first = dense(H)
    torch.rand(5)
    assert error(dense(H), first) < ROUNDING  # forward modes evaluate again
    torch.set_rng_state(state)
    assert error(first, dense_hessian(loss(), list(net.parameters()))) < ROUNDING


def test_a_hidden_use_of_a_parameter_is_not_trusted_to_forward_mode():
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g

    H = Hessian(lambda: Hidden.apply(w).sum(), [w])
    assert error(dense(H), torch.diag(6 * w.detach())) < ROUNDING
    assert H.mode == "double-backward"
    assert "Hidden" in H.timings["reverse-over-forward"]


def test_a_mode_that_is_a_little_off_is_left_out(monkeypatch):
    right = _matrices.ReverseOverForward.product

    def wrong(self, vector, out):
        right(self, vector, out)
        out[0] += 1e-4 * out.norm()

    monkeypatch.setattr(_matrices.ReverseOverForward, "product", wrong)
    net = Residual().double()
    loss = Counted(net)
    H = Hessian(loss, net.parameters())
    assert error(dense(H), dense_hessian(loss(), list(net.parameters()))) < ROUNDING
    assert "disagrees" in H.timings["reverse-over-forward"]
    assert isinstance(H.timings["forward-over-reverse"], float)


def test_attention_is_exact_and_says_so_once():
    net = Transformer().double()
    tokens = torch.randint(0, 11, (2, 4))
    params = [net.qkv.weight]

    def loss():
        return F.cross_entropy(net(tokens).view(-1, 11), tokens.view(-1))

    H = Hessian(loss, params)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    with pytest.warns(SecantWarning, match="scaled_dot_product_attention"):
        got = H @ v
    H.refresh()
    assert (H @ v == got).all()  # a second warning would be an error
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = dense_hessian(loss(), params) @ v
        Hessian(loss, params, mode="double-backward") @ got  # chosen by the caller: a warning would be an error
    # LayerNorm and attention divide and exponentiate: some hundreds of roundings rather than some tens.
    assert error(got, want) < 10 * ROUNDING


class Once(torch.autograd.Function):
    """Cannot be differentiated twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_an_operation_without_second_derivative_is_named():
    w = torch.randn(3, requires_grad=True)
    for mode in ("auto", "double-backward"):
        with pytest.raises(RuntimeError, match="Once: its backward is marked once_differentiable"):
            Hessian(lambda: Once.apply(w).sum(), [w], mode=mode) @ torch.ones(3)
    # Which operations have none changes between versions of torch; this one has none in any of those that run here.
    x, labels = torch.randn(2, 3, requires_grad=True), torch.tensor([[0, 1, -1], [1, -1, 0]])
    with pytest.raises(RuntimeError, match="multilabel_margin_loss_backward has no derivative"):
        Hessian(lambda: F.multilabel_margin_loss(x, labels), [x], mode="double-backward") @ torch.ones(6)


def test_backward_in_the_closure_is_named():
    net = Residual()

    def loss():
        value = net(torch.ones(2, 4)).square().sum()
        value.backward()
        return value

    H = Hessian(loss, net.parameters(), mode="double-backward")
    v = torch.ones(H.shape[0])
    with pytest.raises(RuntimeError, match="expected no call of backward"):
        H @ v


def _param():
    return torch.ones(3, requires_grad=True)


@pytest.mark.parametrize(
    ("make", "error_type", "message"),
    [
        (lambda: Hessian(1, [_param()]), TypeError, "Hessian: closure: expected a function"),
        (lambda: Hessian(abs, []), ValueError, "params: expected at least one tensor"),
        (lambda: Hessian(abs, _param()), TypeError, "params: expected an iterable of tensors, got a single tensor"),
        (lambda: Hessian(abs, nn.Linear(1, 1)), TypeError, r"pass module.parameters\(\)"),
        (lambda: Hessian(abs, [torch.ones(3)]), ValueError, r"params\[0\]: expected a tensor that requires gradients"),
        (lambda: Hessian(abs, [_param(), _param().double()]), TypeError, r"params\[1\]: expected torch.float32"),
        (lambda: Hessian(abs, [_param()] * 2), ValueError, "expected distinct tensors"),
        (lambda: Hessian(abs, [_param().to(torch.complex64)]), TypeError, "complex is not supported"),
        (lambda: Hessian(abs, [_param()], mode="fast"), ValueError, "mode: expected 'auto'"),
        (lambda: Hessian(abs, [_param()], weights=[1.0]), ValueError, "weights: expected None without batches"),
        (lambda: Hessian(abs, [_param()], batches=iter([1])), TypeError, "can be iterated again"),
        (lambda: Hessian(abs, [_param()], batches=[1], weights=[float("nan")]), ValueError, "finite numbers"),
        (lambda: Hessian.of(abs, abs, 1, 1), TypeError, "expected an nn.Module"),
        (lambda: Fisher(abs, [_param()], likelihood="poisson"), ValueError, "likelihood: expected 'categorical'"),
        (lambda: Fisher(abs, [_param()], samples=0), ValueError, "samples: expected an int >= 1"),
        (lambda: EmpiricalFisher(abs, [_param()], reduction="none"), ValueError, "reduction: expected 'mean' or 'sum'"),
    ],
)
def test_bad_arguments_are_named(make, error_type, message):
    with pytest.raises(error_type, match=message):
        make()


W = _param()


@pytest.mark.parametrize(
    ("operator", "error_type", "message"),
    [
        (Hessian(lambda: 1.0, [W]), TypeError, "closure: expected a loss"),
        (Hessian(lambda: W * W, [W]), ValueError, "closure: expected a loss of one real element"),
        (Hessian(lambda: (W * W).sum().detach(), [W]), ValueError, "closure: expected a loss with its graph"),
        (Hessian(lambda: (W * W).sum(), [W], mode="r-operator"), ValueError, "'r-operator', not for no Linear layer"),
        (Hessian(lambda b: (W * b).sum(), [W], batches=[]), ValueError, "batches: expected at least one"),
        (Hessian(lambda b: (W * b).sum(), [W], batches=[1, 2], weights=[1.0]), ValueError, "weights: expected one per"),
        (Hessian(lambda b: (W * b).sum(), [W], batches=[1], weights=[1.0, 2]), ValueError, "weights: expected one per"),
        (GGN(lambda: W.sum(), [W]), TypeError, r"expected a pair \(outputs, loss\)"),
        (GGN(lambda: (W * 2, W.sum()), [W]), ValueError, "expected a loss computed from the outputs"),
        (GGN(lambda: (torch.ones(3), W.sum()), [W]), ValueError, "expected outputs with their graph"),
        (EmpiricalFisher(lambda: (W * 2, W.sum()), [W]), ValueError, r"expected losses of shape \(3,\)"),
        (EmpiricalFisher(lambda: (W * 2, W * 3), [W]), ValueError, "expected losses computed from the outputs"),
    ],
)
def test_bad_closures_are_named(operator, error_type, message):
    with pytest.raises(error_type, match=message):
        operator @ torch.ones(3)


def test_bad_vectors_and_numbers_are_named():
    H = Hessian(lambda: (W**4).sum(), [W])
    for call, error_type, message in (
        (lambda: H @ torch.ones(4), ValueError, r"Hessian.matvec: v: expected shape \(3,\)"),
        (lambda: H @ torch.ones(3).double(), TypeError, "expected dtype float32"),
        (lambda: H.matmat(torch.ones(4, 2)), ValueError, r"Hessian.matmat: v: expected shape \(3, k\)"),
        (lambda: H + "x", TypeError, "damping: expected a number"),
        (lambda: H.trace(1), ValueError, "num_probes: expected an int >= 2"),
        (lambda: H.trace(9, method="exact"), ValueError, "method: expected 'hutchinson' or 'hutch"),
        (lambda: H.diag(0), ValueError, "num_probes: expected an int >= 1"),
        (lambda: H.diag(2.5), TypeError, "num_probes: expected an int"),
        (lambda: H.diag(2, seed="x"), TypeError, "seed: expected an int or a torch.Generator"),
        (lambda: H.eigs(4), ValueError, r"k: expected an int in \[1, 3\]"),
        (lambda: H.eigs(1, "BE"), ValueError, "which: expected 'LA', 'SA' or 'LM'"),
        (lambda: H.eigs(1, tol=0), ValueError, "tol: expected a number between 0 and 1"),
        (lambda: H.spectrum(1, steps=0), ValueError, "steps: expected an int >= 1"),
    ):
        with pytest.raises(error_type, match=message):
            call()


def test_data_parallel_wrapper_is_refused():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)

    with pytest.raises(TypeError, match=r"pass model\.module"):
        Hessian.of(Wrapped(), nn.MSELoss(), 1, 1)
