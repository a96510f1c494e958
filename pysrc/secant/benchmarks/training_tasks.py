"""What is trained on mini-batches: models at their start, batches, and what is measured. Nothing is downloaded.

Text is that of `pydoc_data.topics` in the standard library, which follows the version of Python; digits are those of
scikit-learn; the rest is drawn from a seed. A seed decides the start and the batches, never the data.
`HELD_OUT` is the task on which no default of any optimizer was tuned.
"""

from __future__ import annotations

import abc
import functools
import itertools
import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from secant.benchmarks import cart_pole, digits
from secant.benchmarks.residual_problems import Poisson2d

#: The task on which no default was tuned.
HELD_OUT = "topics"

Batch = Any


class Task(abc.ABC):
    """A model at its start, batches, and its error: what is to become small.

    Args:
        seed: of the start and of the batches. device: where.

    Attributes:
        model: to be trained. generator: of the batches, on the CPU. steps: of a run, which may be changed.
    """

    #: Name in tables.
    title: ClassVar[str]
    #: What `error` measures.
    measure: ClassVar[str] = "training loss"
    #: Steps of a run, and of a short one; between two measurements of the error.
    steps: int
    quick_steps: ClassVar[int] = 20
    every: ClassVar[int] = 10
    #: Error at which a run is over.
    target: ClassVar[float] = -math.inf
    #: Whether the model is made of layers, a module each, that are applied to the rows of a batch.
    layered: ClassVar[bool] = True
    #: By which the rates that are tried are multiplied, for everyone: how far the parameters have to go.
    scale: ClassVar[float] = 1.0

    model: nn.Module

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = self.make().to(device)

    @abc.abstractmethod
    def make(self) -> nn.Module:
        """Make the model, from torch's global generator."""

    @abc.abstractmethod
    def draw(self) -> Batch:
        """Draw the batch of a step."""

    @abc.abstractmethod
    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return outputs and mean loss of a batch, with their graph."""

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, with its graph."""
        return self.outputs(batch)[1]

    def residuals(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return residuals of a batch with their graph, where the loss is half their squared sum."""
        raise TypeError(f"{self.title}: the loss of this task is not a sum of squared residuals")

    @abc.abstractmethod
    def error(self) -> float:
        """Measure the error where the model is now, the same way at every step."""

    def validation(self) -> float | None:
        """Measure the loss on data that is not trained on; None where there is none."""
        return None

    def integers(self, high: int, *shape: int) -> Tensor:
        """Draw integers below `high` on the device."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)


class Pairs(NamedTuple):
    """Inputs and labels, a row each: to train on, and to validate."""

    x: Tensor
    y: Tensor
    validation_x: Tensor | None = None
    validation_y: Tensor | None = None


class Supervised(Task):
    """A model of inputs and labels; a batch is drawn with replacement, the error is of all of them."""

    batch: ClassVar[int]

    def __init__(self, seed: int, device: torch.device) -> None:
        self.data = self.pairs(device)
        super().__init__(seed, device)

    @abc.abstractmethod
    def pairs(self, device: torch.device) -> Pairs:
        """Return the data."""

    def criterion(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss: cross-entropy."""
        return nn.functional.cross_entropy(outputs, labels)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draw rows."""
        rows = self.integers(len(self.data.x), self.batch)
        return self.data.x[rows], self.data.y[rows]

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Apply the model."""
        x, y = batch
        found = self.model(x)
        return found, self.criterion(found, y)

    @torch.no_grad()
    def error(self) -> float:
        """Measure the loss of what is trained on."""
        return float(self.loss((self.data.x, self.data.y)))

    @torch.no_grad()
    def validation(self) -> float | None:
        """Measure the loss of the rest."""
        if self.data.validation_x is None:
            return None
        return float(self.loss((self.data.validation_x, self.data.validation_y)))


class DigitsMLP(Supervised):
    """The 1,437 digits by 64-128-64-10 with tanh, 17,226 parameters."""

    title, steps, batch = "digits MLP, 17,226 parameters", 600, 64

    def make(self) -> nn.Module:
        """Make the model."""
        return digits.mlp()

    def pairs(self, device: torch.device) -> Pairs:
        """Return the digits."""
        return Pairs(*_digits(device))


class DigitsCNN(DigitsMLP):
    """The digits under noise by two convolutions and a layer, with ReLU, 9,930 parameters.

    The pixels of a batch get noise that is drawn anew, those of the error once and for all: clean ones are fitted to
    losses of rounding, to which nothing can be said to be faster.
    """

    title, steps, batch = "digits CNN under pixel noise, 9,930 parameters", 400, 64
    #: Deviation of the noise, where 1 is that of a pixel.
    noise = 1.0

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(seed, device)
        self.clean, rest = self.data.x, self.data.validation_x
        assert rest is not None
        fixed = torch.Generator().manual_seed(0)
        self.data = self.data._replace(x=self._noisy(self.clean, fixed), validation_x=self._noisy(rest, fixed))

    def _noisy(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x + self.noise * torch.randn(x.shape, generator=generator).to(x)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draw rows, and noise on them."""
        rows = self.integers(len(self.clean), self.batch)
        return self._noisy(self.clean[rows], self.generator), self.data.y[rows]

    def make(self) -> nn.Module:
        """Make the model."""
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip


class DigitsAutoencoder(DigitsMLP):
    """The digits through 64-40-20-8-20-40-64 with sigmoid, to a mean squared error per standardised pixel."""

    title, steps, batch = "digits autoencoder, 7,232 parameters", 1000, 128

    def make(self) -> nn.Module:
        """Make the model."""
        widths = (64, 40, 20, 8, 20, 40, 64)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.Sigmoid()]
        return nn.Sequential(*layers[:-1])

    def pairs(self, device: torch.device) -> Pairs:
        """Return the digits, to be given back."""
        x, _, validation, _ = _digits(device)
        return Pairs(x, x, validation, validation)

    def criterion(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean squared error."""
        return nn.functional.mse_loss(outputs, labels)


@functools.cache
def _digits(device: torch.device) -> digits.Digits:
    return digits.load(device)


class Text(NamedTuple):
    """A text as numbers of characters, what is trained on and the rest, and how many characters there are."""

    train: Tensor
    validation: Tensor
    size: int


#: Share of a text that is trained on.
TRAINED = 0.9


@functools.cache
def text() -> Text:
    """Join the topics of pydoc by their names; the last tenth is for validation."""
    from pydoc_data.topics import topics

    joined = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: i for i, character in enumerate(sorted(set(joined)))}
    found = torch.tensor([alphabet[character] for character in joined])
    end = int(TRAINED * len(found))
    return Text(found[:end], found[end:], len(alphabet))


class _Layer(nn.Module):
    """A layer of a transformer: causal attention and a network, each on a normalised input and added to it.

    The attention is written out: torch's own has no second derivatives on a CPU.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Apply to x (B, T, D) with a mask (T, T) that is added to the scores."""
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.inputs(self.before_attention(x)).chunk(3, 2))
        scores = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[3]) + mask
        x = x + self.output((scores.softmax(3) @ v).transpose(1, 2).flatten(2))
        return x + self.network(self.before_network(x))


class Transformer(nn.Module):
    """A causal transformer over characters (B, T), to logits (B, T, characters)."""

    def __init__(self, size: int, context: int = 64, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(size, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, size)
        self.mask: Tensor
        self.register_buffer("mask", torch.full((context, context), -math.inf).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        length = x.shape[1]
        h = self.characters(x) + self.places(torch.arange(length, device=x.device).expand_as(x))
        for layer in self.layers:
            h = layer(h, self.mask[:length, :length])
        logits: Tensor = self.head(self.norm(h))
        return logits


class Characters(Task):
    """The next character of the text, by a transformer: 2 layers, width 64, context 64, 16 windows a step."""

    title, steps, quick_steps, context, batch = "character transformer", 600, 4, 64, 16
    #: Windows of which the errors are measured.
    measured = 64

    def make(self) -> nn.Module:
        """Make the model."""
        return Transformer(text().size, self.context)

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(seed, device)
        self.train, self.rest = text().train.to(device), text().validation.to(device)
        self.fixed = [self._spread(part) for part in (self.train, self.rest)]

    def _windows(self, part: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        found = part[at.unsqueeze(1) + torch.arange(self.context + 1, device=self.device)]
        return found[:, :-1], found[:, 1:]

    def _spread(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Take windows all over a text, as many in each part of it."""
        last = len(part) - self.context - 1
        return self._windows(part, torch.linspace(0, last, self.measured, device=self.device).long())

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draw windows."""
        return self._windows(self.train, self.integers(len(self.train) - self.context, self.batch))

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits (N, characters) and their cross-entropy."""
        x, y = batch
        logits = self.model(x).flatten(0, 1)
        return logits, nn.functional.cross_entropy(logits, y.flatten())

    @torch.no_grad()
    def error(self) -> float:
        """Measure the loss of windows of what is trained on."""
        return float(self.loss(self.fixed[0]))

    @torch.no_grad()
    def validation(self) -> float:
        """Measure the loss of windows of the rest."""
        return float(self.loss(self.fixed[1]))


#: Characters of a passage, trigrams that are told apart, and characters that a topic has at least.
PASSAGE, TRIGRAMS, SHORTEST = 128, 2048, 2000


class _Topics(NamedTuple):
    """Trigrams of all topics, one after the other; where passages may begin, and their topics."""

    trigrams: Tensor
    starts: Tensor
    labels: Tensor
    rest_starts: Tensor
    rest_labels: Tensor
    classes: int


@functools.cache
def _topics() -> _Topics:
    """Split each topic: passages lie in its first part or in its last tenth, in both never."""
    from pydoc_data.topics import topics

    names = [name for name in sorted(topics) if len(topics[name]) >= SHORTEST]
    parts: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
    trigrams, offset = [], 0
    for label, name in enumerate(names):
        codes = torch.tensor([ord(character) for character in topics[name]])
        hashed = (961 * codes[:-2] + 31 * codes[1:-1] + codes[2:]) % TRIGRAMS
        cut = int(TRAINED * len(hashed))
        for part, (low, high) in zip(parts, ((0, cut), (cut, len(hashed))), strict=True):
            starts = torch.arange(offset + low, offset + high - (PASSAGE - 2) + 1)
            part.append((starts, torch.full_like(starts, label)))
        trigrams.append(hashed)
        offset += len(hashed)
    (starts, labels), (rest, rest_labels) = ((torch.cat(x) for x in zip(*part, strict=True)) for part in parts)
    return _Topics(torch.cat(trigrams), starts, labels, rest, rest_labels, len(names))


class _Bag(nn.Module):
    """The mean of the embeddings of trigrams (B, T), through a hidden layer."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TRIGRAMS, 32)
        self.network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, count))

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        found: Tensor = self.network(self.embedding(x).mean(1))
        return found


class Topics(Task):
    """The topic of a passage of 128 characters by the trigrams in it: the task held out."""

    title, steps, batch, measured = "topics of passages (held out)", 600, 64, 1024

    def make(self) -> nn.Module:
        """Make the model."""
        return _Bag(_topics().classes)

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(seed, device)
        found = _topics()
        self.trigrams, self.starts, self.labels = (x.to(device) for x in found[:3])
        self.span = torch.arange(PASSAGE - 2, device=device)
        rest = torch.linspace(0, len(found.rest_starts) - 1, self.measured).long()
        here = torch.linspace(0, len(found.starts) - 1, self.measured).long()
        self.rest = self._passages(found.rest_starts[rest].to(device)), found.rest_labels[rest].to(device)
        self.fixed = self._passages(self.starts[here]), self.labels[here]

    def _passages(self, starts: Tensor) -> Tensor:
        return self.trigrams[starts.unsqueeze(1) + self.span]

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draw passages."""
        at = self.integers(len(self.starts), self.batch)
        return self._passages(self.starts[at]), self.labels[at]

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Apply the model."""
        x, y = batch
        found = self.model(x)
        return found, nn.functional.cross_entropy(found, y)

    @torch.no_grad()
    def error(self) -> float:
        """Measure the loss of passages of what is trained on."""
        return float(self.loss(self.fixed))

    @torch.no_grad()
    def validation(self) -> float:
        """Measure the loss of passages of the rest."""
        return float(self.loss(self.rest))


class Rotated(Supervised):
    """Logistic regression of 4,096 rows and 64 columns, whose covariance has eigenvalues from 1 to 1e-4, rotated.

    Every direction says as much of the label.
    """

    title, steps, batch = "logistic regression, rotated", 600, 32
    rotated, scale = True, 10.0
    rows, columns, smallest = 4096, 64, 1e-2

    def make(self) -> nn.Module:
        """Make the model, at zero."""
        model = nn.Linear(self.columns, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    def pairs(self, device: torch.device) -> Pairs:
        """Draw the data."""
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(self.rows, self.columns, generator=generator, dtype=torch.float64)
        logits = 3.0 * z @ torch.randn(self.columns, generator=generator, dtype=torch.float64) / self.columns**0.5
        y = torch.rand(self.rows, generator=generator, dtype=torch.float64) < torch.sigmoid(logits)
        basis = torch.linalg.qr(torch.randn(self.columns, self.columns, generator=generator, dtype=torch.float64))[0]
        x = z * torch.logspace(0, math.log10(self.smallest), self.columns, dtype=torch.float64)
        x = x @ basis if self.rotated else x
        return Pairs(x.float().to(device), y.float().unsqueeze(1).to(device))

    def criterion(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean logistic loss."""
        return nn.functional.binary_cross_entropy_with_logits(outputs, labels)


class AxisAligned(Rotated):
    """The same without the rotation: each column has its own scale."""

    title, rotated = "logistic regression, axis-aligned", False


class _Point(nn.Module):
    """A matrix to be moved."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start)

    def forward(self) -> Tensor:
        """Return it."""
        return self.x


class Quadratic(Task):
    """f(x) = x.A x / 2 of a matrix x of 16 x 16, A rotated with eigenvalues from 1 to 1e-6, under noise.

    The loss of a step is that of least squares on a batch: half the mean of (a.x - e)^2 over rows a of mean 0 and
    covariance A and errors e of deviation `noise`; its mean gradient is that of f. The error is f(x) / f(start).
    """

    title, measure, steps, layered = "noisy quadratic of condition 1e6", "f / f(start)", 600, False
    side, smallest, noise, batch = 16, 1e-6, 0.3, 8

    def make(self) -> nn.Module:
        """Draw the start."""
        return _Point(torch.randn(self.side, self.side))

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(seed, device)
        n, generator = self.side**2, torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        values = torch.logspace(0, math.log10(self.smallest), n, dtype=torch.float64)
        self.curvature = ((basis * values) @ basis.T).float().to(device)
        self.root = (basis * values.sqrt()).float().to(device)
        self.start = float(self._value(self.model().detach()))

    def _value(self, x: Tensor) -> Tensor:
        v = x.flatten()
        return 0.5 * v.dot(self.curvature @ v)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draw rows and errors."""
        drawn = torch.randn(self.batch, self.side**2 + 1, generator=self.generator).to(self.device)
        return drawn[:, :-1] @ self.root.T, self.noise * drawn[:, -1]

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what is left of the errors, and half their mean square."""
        a, e = batch
        left = a @ self.model().flatten() - e
        return left, 0.5 * left.square().mean()

    @torch.no_grad()
    def error(self) -> float:
        """Measure the value without noise, relative to that at the start."""
        return float(self._value(self.model())) / self.start


class FreshPoints(Task):
    """Poisson's equation on the unit square by 2-64-1 in float64; 300 points inside and 60 of the boundary anew a step.

    The error is |u - exact| / |exact|, relative, at other points.
    """

    title, measure, layered = "Poisson's equation, points drawn anew", "relative error", False
    steps, quick_steps, interior, boundary = 800, 4, 300, 60

    def make(self) -> nn.Module:
        """Make the network."""
        return nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1)).double()

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(seed, device)
        self.equation = Poisson2d(device=device)

    def draw(self) -> Poisson2d:
        """Draw points."""
        seed = int(torch.randint(2**62, (), generator=self.generator))
        return Poisson2d(self.interior, self.boundary, seed=seed, device=self.device)

    def residuals(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the residuals at the points of a batch."""
        found: tuple[Tensor, ...] = batch.residuals(self.model)
        return found

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the residuals, joined, and half their squared sum."""
        r = torch.cat(self.residuals(batch))
        return r, 0.5 * r.square().sum()

    def error(self) -> float:
        """Measure the error of the solution."""
        return self.equation.error(self.model)


class CartPole(Task):
    """A policy for the pole on a cart, ten episodes a step; the error is what the mean return lacks of 500.

    The mean is over the last 100 episodes, those not yet played counting nothing; 475 is solved.
    """

    title, measure = "CartPole by policy gradients", "500 - mean return of 100 episodes"
    steps, quick_steps, every, episodes = 120, 3, 1, 10
    target = cart_pole.STEPS - cart_pole.SOLVED

    def make(self) -> nn.Module:
        """Make the policy."""
        return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(seed, torch.device("cpu"))
        self.returns: list[float] = []

    def draw(self) -> cart_pole.Episodes:
        """Play."""
        played = cart_pole.play(self.model, self.episodes, self.generator)
        self.returns += played.returns.tolist()
        return played

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits of what was played, and the loss whose gradient is that of the policy."""
        return cart_pole.outputs(self.model, batch)

    def error(self) -> float:
        """Measure what the episodes lack."""
        return cart_pole.STEPS - sum(self.returns[-cart_pole.LAST :]) / cart_pole.LAST


TASKS: dict[str, type[Task]] = {
    "characters": Characters,
    "autoencoder": DigitsAutoencoder,
    "mlp": DigitsMLP,
    "cnn": DigitsCNN,
    HELD_OUT: Topics,
    "rotated": Rotated,
    "axis-aligned": AxisAligned,
    "quadratic": Quadratic,
    "pinn": FreshPoints,
    "cartpole": CartPole,
}
