"""Whole iterations of algorithms over the ops: no synchronisation, CUDA graphs, a second stream, two threads.

Each works in place on tensors that stay where they are, so that a graph can hold it. On a CPU the same code is checked
against plain float64 torch; on a GPU a replay has to do what the calls did, and each op is run where a synchronisation
is an error.
"""

from __future__ import annotations

import threading

import pytest
import torch

import secant
from secant.ops import (
    block_abs_inv,
    block_eigh,
    block_inv,
    block_inv_root,
    block_solve,
    cross_entropy_hvp,
    glm_hvp,
    glm_value_grad,
    gram,
    paired_matmul,
    softmax_hvp,
    softmax_value_grad,
    two_loop,
)
from triton_runner import watched

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class QuasiNewton:
    """L-BFGS with steps of a fixed length, on h/2 (x - c)^2: pair, direction and step, all on the device."""

    def __init__(self, device):
        g = torch.Generator().manual_seed(0)
        n = 1000
        self.h = (1 + 4 * torch.rand(n, generator=g)).to(device)
        self.c = torch.randn(n, generator=g).to(device)
        self.x = torch.zeros(n, device=device)
        self.grad, self.prev, self.d = (torch.zeros(n, device=device) for _ in range(3))
        self.history = secant.LBFGSHistory(n, 6, device=device)

    def iterate(self):
        torch.mul(self.h, self.x - self.c, out=self.grad)
        self.history.step(self.grad, self.prev, self.d, 0.5)
        self.x.add_(self.d, alpha=0.5)

    def state(self):
        return self.x

    def error(self):
        return float((self.x - self.c).abs().max())


class LogisticCG:
    """Ten conjugate gradient iterations on the Newton system of a logistic regression, a fixed number, masked."""

    def __init__(self, device):
        g = torch.Generator().manual_seed(1)
        self.a = torch.randn(400, 12, generator=g).to(device)
        self.y = (torch.rand(400, generator=g) < 0.5).float().to(device)
        self.x = torch.zeros(12, device=device)

    def iterate(self):
        _, grad, weight = glm_value_grad(self.a, self.y, self.x, loss="logistic", l2=1.0)
        step, r = torch.zeros_like(grad), -grad
        p, rr = r, r @ r
        for _ in range(10):
            q = glm_hvp(self.a, p, weight, l2=1.0)
            alpha = torch.where(rr > 0, rr / (p @ q), 0.0)
            step, r = step + alpha * p, r - alpha * q
            new = r @ r
            p, rr = r + torch.where(rr > 0, new / rr, 0.0) * p, new
        self.x.add_(step)

    def state(self):
        return self.x

    def error(self):
        _, grad, _ = glm_value_grad(self.a, self.y, self.x, loss="logistic", l2=1.0)
        return float(grad.abs().max() / len(self.a))


class BlockNewton:
    """Newton's method, preconditioned and solved block by block, on many small sums of exponentials."""

    def __init__(self, device):
        g = torch.Generator().manual_seed(2)
        self.a = torch.randn(500, 8, 3, generator=g).to(device)
        self.x = torch.zeros(500, 3, device=device)

    def iterate(self):
        e = torch.exp((self.a @ self.x[..., None])[..., 0])
        grad = (self.a.mT @ e[..., None])[..., 0] + self.x
        hessian = self.a.mT @ (e[..., None] * self.a)
        step, info = block_solve(hessian, grad, damping=1.0)
        self.x.sub_(torch.where((info == 0)[:, None], step, 0.1 * grad))

    def state(self):
        return self.x

    def error(self):
        e = torch.exp((self.a @ self.x[..., None])[..., 0])
        return float(((self.a.mT @ e[..., None])[..., 0] + self.x).abs().max())


ALGORITHMS = [QuasiNewton, LogisticCG, BlockNewton]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_converges(algorithm):
    task = algorithm(CPU)
    first = task.error()
    for _ in range(40 if algorithm is QuasiNewton else 9):
        task.iterate()
    assert task.error() < 1e-5 * max(1.0, first)


def eager_states(algorithm, count):
    task, states = algorithm(GPU), []
    for _ in range(count):
        task.iterate()
        states.append(task.state().clone())
    return states


@pytest.mark.parametrize("algorithm", [pytest.param(a, marks=gpu) for a in ALGORITHMS])
def test_a_replayed_graph_does_what_the_calls_did(algorithm):
    expected = eager_states(algorithm, 6)
    task = algorithm(GPU)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # warm-up: compilation, workspaces
            task.iterate()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        task.iterate()
    for state in expected[3:]:
        graph.replay()
        torch.testing.assert_close(task.state(), state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", [pytest.param(a, marks=gpu) for a in ALGORITHMS])
def test_on_a_second_stream(algorithm):
    expected = eager_states(algorithm, 4)[-1]
    task, stream = algorithm(GPU), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    busy = torch.randn(4096, 4096, device=GPU)
    with torch.cuda.stream(stream):
        for _ in range(4):
            task.iterate()
    for _ in range(4):
        busy = busy @ busy / 64  # the default stream has other work meanwhile
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(task.state(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=gpu)], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_threads_do_not_meet(algorithm, device):
    def run(task):
        for _ in range(5):
            task.iterate()

    alone = algorithm(device)
    run(alone)
    tasks = [algorithm(device) for _ in range(2)]
    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for task in tasks:
        torch.testing.assert_close(task.state(), alone.state(), rtol=1e-5, atol=1e-6)


def _calls():
    x, w, v = torch.randn(60, 7, device=GPU), torch.rand(60, device=GPU), torch.randn(7, 3, device=GPU)
    a = torch.randn(5, 9, 9, device=GPU)
    a = a @ a.mT + torch.eye(9, device=GPU)
    p, classes = torch.softmax(torch.randn(60, 3, device=GPU), -1), torch.zeros(60, dtype=torch.int64, device=GPU)
    s = torch.randn(4, 50, device=GPU)
    g, column = torch.randn(50, device=GPU), v[:, 0].contiguous()
    return {
        "two_loop": lambda: two_loop(g, s, s * 2),
        "block_inv": lambda: block_inv(a, damping=0.1),
        "block_inv general": lambda: block_inv(a, assume="general"),
        "block_solve": lambda: block_solve(a, a[..., 0]),
        "block_eigh": lambda: block_eigh(a),
        "block_abs_inv": lambda: block_abs_inv(a, floor=0.1),
        "block_inv_root": lambda: block_inv_root(a, 4),
        "glm_hvp": lambda: glm_hvp(x, v, w),
        "glm_value_grad": lambda: glm_value_grad(x, w, column, loss="huber"),
        "softmax_hvp": lambda: softmax_hvp(x, v, p),
        "softmax_value_grad": lambda: softmax_value_grad(x, classes, v),
        "cross_entropy_hvp": lambda: cross_entropy_hvp(x, x),
        "gram": lambda: gram(x, weight=w),
        "paired_matmul": lambda: paired_matmul(x, v, x, v, scale=p),
    }


NAMES = (
    "two_loop", "block_inv", "block_inv general", "block_solve", "block_eigh", "block_abs_inv", "block_inv_root",
    "glm_hvp", "glm_value_grad", "softmax_hvp", "softmax_value_grad", "cross_entropy_hvp", "gram",
    "paired_matmul",
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in NAMES])
def test_no_op_synchronises(name):
    calls = _calls()
    assert tuple(calls) == NAMES
    calls[name]()  # compilation and workspaces
    torch.cuda.synchronize()
    with watched(GPU):
        calls[name]()


@pytest.mark.parametrize("algorithm", [pytest.param(a, marks=gpu) for a in ALGORITHMS])
def test_no_iteration_synchronises(algorithm):
    task = algorithm(GPU)
    task.iterate()
    torch.cuda.synchronize()
    with watched(GPU):
        task.iterate()
