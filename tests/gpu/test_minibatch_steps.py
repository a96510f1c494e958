"""Steps of the optimizers for mini-batches on a GPU: nothing is read back, and a graph repeats what a call does."""

import contextlib
import functools

import pytest
import torch

from secant.optim import KFAC, SOAP, AdaHessian, BlockAdam, Muon, Shampoo, Sophia, StochasticLBFGS, _tiled
from triton_runner import watched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

GPU = torch.device("cuda", 0)
OPTIMIZERS = {
    "shampoo": Shampoo,
    "soap": SOAP,
    "kfac": functools.partial(KFAC, update_every=1),
    "muon": Muon,
    "block-adam": functools.partial(BlockAdam, update_every=1),
    "adahessian": AdaHessian,
    "sophia": functools.partial(Sophia, update_every=1),
    "stochastic-lbfgs": functools.partial(StochasticLBFGS, average=0.5, update_every=1),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


class Training:
    """A network with fixed data; `step` is forward, backward and optimizer."""

    def __init__(self, name, **options):
        torch.manual_seed(0)
        layers = torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
        self.model = torch.nn.Sequential(*layers).cuda()
        self.x, self.y = torch.randn(64, 12, device="cuda"), torch.randn(64, 3, device="cuda")
        over = self.model if name == "kfac" else self.model.parameters()
        self.optimizer = OPTIMIZERS[name](over, **options)

    def backward(self):
        self.optimizer.zero_grad()
        loss = (self.model(self.x) - self.y).square().mean()
        loss.backward(create_graph=self.optimizer.is_second_order)

    def point(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).cpu()


@optimizers
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_synchronises_nothing(name, capturable):
    run = Training(name, capturable=capturable)
    for k in range(4):
        run.backward()
        with watched(GPU) if k else contextlib.nullcontext():  # the first builds the state
            run.optimizer.step()
    assert torch.isfinite(run.point()).all()


@optimizers
def test_a_graph_repeats_what_a_call_does(name, monkeypatch):
    """Ten steps by calls, and three by calls and seven by replays; signs of AdaHessian and Sophia are others.

    A graph holds a step of `Shampoo` and `SOAP` without a refresh, so that there are none after the second step.
    """
    monkeypatch.setattr(_tiled, "is_due", lambda t, every: t <= 2)
    expected, run = Training(name, capturable=True), Training(name, capturable=True)
    for _ in range(10):
        expected.backward()
        expected.optimizer.step()
    start = Training(name).point()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run.backward()
            run.optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.backward()
        run.optimizer.step()
    for _ in range(7):
        graph.replay()
    torch.cuda.synchronize()
    apart = (run.point() - expected.point()).norm() / (expected.point() - start).norm()
    # Float32 sums in another order, amplified over ten steps by as much as half the digits.
    assert apart < (1.0 if run.optimizer.is_second_order else torch.finfo(torch.float32).eps ** 0.5)
    assert all(run.optimizer.state[p]["step"].item() == 10 for p in run.model.parameters())


@optimizers
def test_a_graph_needs_steps_that_are_counted_on_the_device(name):
    run = Training(name)
    run.backward()
    run.optimizer.step()
    run.backward()
    with pytest.raises(ValueError, match="capturable: expected True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run.optimizer.step()
