"""Closures that draw, shuffle or count: one matrix per point, and nothing left behind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvature_problems import ROUNDING, data, dense, dense_hessian, error
from secant.curvature import GGN, EmpiricalFisher, Fisher, Hessian

F64 = torch.float64
EXPLICIT = torch.Generator()
W = torch.randn(5, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    EXPLICIT.manual_seed(0)


def _net():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def _states():
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), str(numpy), EXPLICIT.get_state().tolist()


DRAWS = {
    "torch": lambda: torch.rand(5, dtype=F64),
    "in place": lambda: torch.empty(5, dtype=F64).normal_(),
    "dropout": lambda: F.dropout(torch.ones(5, dtype=F64)),
    "distribution": lambda: torch.distributions.Gamma(2.0, 1.0).sample((5,)).double(),
    "generator": lambda: torch.rand(5, dtype=F64, generator=EXPLICIT),
    "permutation": lambda: torch.randperm(5, generator=EXPLICIT).double(),
    "python": lambda: random.random(),
    "numpy": lambda: torch.from_numpy(np.random.rand(5)),  # noqa: NPY002
}


@pytest.mark.parametrize(
    ("draw", "mode", "keep"),
    [(draw, mode, False) for draw in DRAWS for mode in ("double-backward", "reverse-over-forward")]
    + [
        (draw, mode, keep)
        for draw in ("dropout", "generator")
        for mode in ("auto", "forward-over-reverse")
        for keep in (0, 1)
    ],
)
def test_one_matrix_per_point_and_no_number_taken(draw, mode, keep):
    def loss():
        return ((W * DRAWS[draw]()) ** 4).sum()

    before = _states()
    H = Hessian(loss, [W], mode=mode, keep_graphs=bool(keep))
    first = dense(H)
    assert (dense(H) == first).all()
    assert (H @ torch.ones(5, dtype=F64) - first.sum(1)).abs().max() <= ROUNDING * first.abs().max()
    assert H.eigs(2).converged
    assert _states() == before
    # What is drawn at a point is what the program would draw there.
    assert error(first, dense_hessian(loss(), [W])) < ROUNDING
    if draw != "dropout":
        H.refresh()
        assert error(dense(H), first) > 1e-6


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("make", [Hessian, GGN, EmpiricalFisher, Fisher])
def test_dropout_in_batches_has_a_mask_for_each(make, keep):
    net, x = _net(), torch.ones(4, 4, dtype=F64)
    y = torch.zeros(4, dtype=torch.long)
    masks = []

    def closure(batch):
        outputs = net(batch)
        masks.append(outputs.detach())
        if make is Hessian:
            return F.cross_entropy(outputs, y)
        return outputs, F.cross_entropy(outputs, y, reduction="none" if make is EmpiricalFisher else "mean")

    state = torch.get_rng_state()
    operator = make(closure, net.parameters(), batches=[x, x], mode="double-backward", keep_graphs=keep)
    matrix = dense(operator)
    again = dense(operator)
    assert error(again, matrix) < ROUNDING
    assert torch.equal(torch.get_rng_state(), state)
    assert len(masks) == (2 if keep else 4)
    assert (masks[0] != masks[1]).any()
    assert all(torch.equal(mask, masks[i % 2]) for i, mask in enumerate(masks))
    measured = make(closure, net.parameters(), batches=[x, x], keep_graphs=keep)
    assert error(dense(measured), matrix) < ROUNDING
    assert error(dense(measured), matrix) < ROUNDING
    operator.refresh()
    torch.rand(1)
    assert error(dense(operator), matrix) > 1e-6


@pytest.mark.parametrize("generator", [None, EXPLICIT])
def test_a_loader_that_shuffles_comes_in_the_same_order(generator):
    x, y = data(6)
    net = _net()
    loader = DataLoader(TensorDataset(x.flatten(1), y), batch_size=4, shuffle=True, generator=generator)
    order = []

    def closure(batch):
        order.append(batch[1].tolist() + batch[0][:, 0].tolist())
        return F.cross_entropy(net(batch[0]), batch[1])

    before = _states()
    H = Hessian(closure, net.parameters(), batches=loader, mode="double-backward", keep_graphs=False)
    matrix = dense(H)
    assert error(dense(H), matrix) < ROUNDING
    assert len(order) == 4
    assert order[:2] == order[2:]
    assert _states() == before


def _outputs_of(rng):
    return W * torch.from_numpy(rng.random(5))


@pytest.mark.parametrize(
    ("make", "closure", "mode"),
    [
        (Hessian, lambda rng: (_outputs_of(rng) ** 4).sum(), "auto"),
        (Hessian, lambda rng: (_outputs_of(rng) ** 4).sum(), "double-backward"),
        (Hessian, lambda rng: (_outputs_of(rng) ** 4).sum(), "forward-over-reverse"),
        (Hessian, lambda rng: (_outputs_of(rng) ** 4).sum(), "reverse-over-forward"),
        (GGN, lambda rng: (o := _outputs_of(rng), (o**4).sum()), "double-backward"),
        (GGN, lambda rng: (o := _outputs_of(rng), (o**4).sum()), "forward"),
        (EmpiricalFisher, lambda rng: (o := _outputs_of(rng), o**4), "double-backward"),
        (Fisher, lambda rng: _outputs_of(rng).reshape(1, 5), "double-backward"),
    ],
)
def test_what_cannot_be_repeated_is_noticed(make, closure, mode):
    rng = np.random.default_rng(0)
    operator = make(lambda: closure(rng), [W], mode=mode, keep_graphs=False)
    with pytest.raises(RuntimeError, match="expected the same value whenever it is evaluated at one point"):
        dense(operator), dense(operator)
    if mode != "forward" and "over" not in mode:  # one evaluation, one matrix
        kept = make(lambda: closure(rng), [W], mode="double-backward")
        assert (dense(kept) == dense(kept)).all()


def test_a_closure_that_stays_nan_is_repeatable():
    H = Hessian(lambda: (W * float("nan")).square().sum(), [W], mode="double-backward", keep_graphs=False)
    for _ in range(2):
        assert torch.isnan(H @ torch.ones(5, dtype=F64)).all()


BUFFERS = {
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)),
    "cumulative": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=None), nn.Tanh(), nn.Linear(8, 3)),
    "instance norm": lambda: nn.Sequential(
        nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(),
        nn.Linear(8, 3),
    ),
    "spectral norm": lambda: nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "reverse-over-forward"])
@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_as_they_were(name, mode):
    net = BUFFERS[name]().double()
    x, y = data()
    x = x.flatten(1)
    held = {key: (value, value.clone()) for key, value in net.named_buffers()}

    def loss():
        return F.cross_entropy(net(x), y)

    if name == "spectral norm" and "forward" in mode:
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            Hessian(loss, net.parameters(), mode=mode) @ torch.ones(sum(p.numel() for p in net.parameters())).double()
    else:
        H = Hessian(loss, net.parameters(), mode=mode, keep_graphs=False)
        matrix = dense(H)
        assert error(dense(H), matrix) < ROUNDING
        copy = {key: value.clone() for key, value in net.state_dict().items()}
        # Spectral norm divides by a norm of its own iteration: some hundreds of roundings.
        assert error(matrix, dense_hessian(loss(), list(net.parameters()))) < 10 * ROUNDING
        net.load_state_dict(copy)
    for key, value in net.named_buffers():
        assert value is held[key][0]
        assert torch.equal(value, held[key][1])


def test_running_statistics_given_to_the_function_are_as_they_were():
    x, w = torch.randn(6, 3, dtype=F64), torch.randn(3, 3, dtype=F64, requires_grad=True)
    mean, variance = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
    for norm in (
        lambda z: F.batch_norm(z, mean, variance, training=True),
        lambda z: torch.batch_norm(z, None, None, mean, variance, True, 0.1, 1e-5, False),
        lambda z: F.instance_norm(z.view(2, 3, 3), mean, variance),
    ):
        dense(Hessian(lambda norm=norm: (norm(x @ w) ** 3).sum(), [w]))
        assert (mean == 0).all()
        assert (variance == 1).all()
