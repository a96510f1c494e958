"""The 1,797 handwritten digits bundled with scikit-learn, and two models of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import secant
from secant.benchmarks import peers
from secant.benchmarks.optimizers import OPTIMIZERS, Steps, timed_step
from secant.benchmarks.timing import Clock

L2 = 1e-4
TEST_IMAGES = 360
HISTORY = 10


class Digits(NamedTuple):
    """Standardised pixels (N, 64) and labels (N,), split once and for all."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(device: torch.device, dtype: torch.dtype = torch.float32) -> Digits:
    """Load, shuffle with a fixed seed, split, and standardise by the mean and deviation of the training pixels.

    Raises:
        ImportError: scikit-learn is missing.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels, dtype=dtype)[order], torch.tensor(labels)[order]
    train, test = x[TEST_IMAGES:], x[:TEST_IMAGES]
    deviation = train.std(0)
    deviation[deviation == 0] = 1.0  # pixels that are blank in every image
    train, test = ((part - x[TEST_IMAGES:].mean(0)) / deviation for part in (train, test))
    split = (train, y[TEST_IMAGES:], test, y[:TEST_IMAGES])
    return Digits(*(part.to(device) for part in split))


def logistic_regression() -> nn.Module:
    """Make a multinomial model, 650 parameters."""
    return nn.Linear(64, 10)


def mlp() -> nn.Module:
    """Make 64-128-64-10 with tanh, 17,226 parameters."""
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10))


class Model(NamedTuple):
    """What to train: name, constructor, and how many iterations it can use before float32 ends the progress."""

    name: str
    make: Callable[[], nn.Module]
    iterations: int


MODELS = (Model("logistic regression", logistic_regression, 40), Model("MLP 64-128-64-10", mlp, 60))


class Task:
    """A model at its fixed initial point, with its full-batch objective: cross-entropy + L2 / 2 |w|^2."""

    def __init__(self, model: Model, data: Digits) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = model.make().to(data.train_x)
        self.data, self.params = data, list(self.net.parameters())
        self.weights = [p for p in self.params if p.dim() > 1]

    def loss(self) -> Tensor:
        """Compute the objective on the training images."""
        penalty = sum(w.square().sum() for w in self.weights)
        return nn.functional.cross_entropy(self.net(self.data.train_x), self.data.train_y) + 0.5 * L2 * penalty

    @torch.no_grad()
    def right(self) -> Tensor:
        """Tell of each test image whether it is classified correctly."""
        return self.net(self.data.test_x).argmax(1) == self.data.test_y

    def closure(self, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        """Make what both optimizers are given."""

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure


class Run(NamedTuple):
    """One training run: its steps, its last loss, and the test images that it classifies correctly."""

    steps: Steps
    loss: float
    right: Tensor

    @property
    def accuracy(self) -> float:
        """Return the share of the test images that are classified correctly."""
        return float(self.right.float().mean())


def chance_of_fewer(ours: Tensor, theirs: Tensor) -> float:
    """Return the chance of as many images lost as `ours` loses to `theirs`, were both as good as each other.

    Of the images that only one of the two classifies correctly each is then either's with even odds: the binomial tail
    P(X >= lost | lost + won, 1/2), McNemar's exact test on one side (Psychometrika 12, 1947).
    """
    lost, won = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    return sum(math.comb(lost + won, k) for k in range(lost, lost + won + 1)) / 2 ** (lost + won)


def _optimizer(name: str, task: Task, iterations: int) -> torch.optim.Optimizer:
    return OPTIMIZERS[name](
        task.params,
        max_iter=iterations,
        max_eval=10 * iterations,  # so that the iterations are what ends a run
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )


def train(name: str, model: Model, data: Digits, clock: Clock, iterations: int | None = None) -> Run:
    """Train from the initial point with the optimizer of this name, in one call of `step`."""
    task = Task(model, data)
    optimizer = _optimizer(name, task, iterations or model.iterations)
    steps = timed_step(optimizer, task.closure(optimizer), clock)
    with torch.no_grad():
        return Run(steps, float(task.loss()), task.right())


def recorded_pairs(data: Digits, *, every: int = 10, calls: int = 8) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (g, s, y), oldest pair first, from a run of the MLP: after each `every` iterations."""
    task = Task(MODELS[-1], data)
    optimizer = _optimizer("secant", task, every)
    closure = task.closure(optimizer)
    for _ in range(calls):
        optimizer.step(closure)  # type: ignore[arg-type]  # torch's annotation says float
        state = optimizer.state[task.params[0]]
        count, m = int(state["count"]), state["s"].shape[0]
        order = (int(state["head"]) - count + torch.arange(count)) % m
        yield state["prev_grad"].clone(), state["s"][order], state["y"][order]


def direction_errors(data: Digits) -> dict[str, float]:
    """Find the largest relative error of float32 directions on `recorded_pairs`, against float64 on the same pairs."""
    errors = {"secant": 0.0, "eager": 0.0}
    for g, s, y in recorded_pairs(data):
        want = peers.exact(g, s.unbind(), y.unbind()).d
        got = {"secant": secant.ops.two_loop(g, s, y), "eager": peers.EagerHistory(s, y).direction(g)}
        for name, d in got.items():
            errors[name] = max(errors[name], float((d.double() - want).norm() / want.norm()))
    return errors
