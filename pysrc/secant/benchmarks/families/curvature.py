"""Cases of `secant.curvature`: products with the Hessian and the GGN of an MLP 64-256-256-10, one vector and several.

Each contender has its state prepared, as a user has it who multiplies many times at one point. An answer is right when
its relative error against double backward in float64 stays below `TOLERANCE` rounding units: products of a few hundred
terms each, through three layers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from secant.benchmarks.case import Bar, Check, Contender, Row, dtype_name, find, speed_bar
from secant.benchmarks.case import Case as Base
from secant.benchmarks.families import Family
from secant.benchmarks.peers import compiled
from secant.benchmarks.timing import Timed
from secant.curvature import GGN, Hessian

#: Inputs, units of the two hidden layers, classes.
LAYERS = (64, 256, 256, 10)
#: In units of the machine epsilon.
TOLERANCE = 100.0
#: Rows of the cases, on a CPU and on a GPU; vectors at once.
BATCHES = {"cpu": (512,), "cuda": (512, 10_000, 100_000)}
COLUMNS = 8

Call = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Case(Base):
    """A product: op "Hessian" or "GGN"; n rows of data, k vectors."""

    n: int
    k: int = 1
    dtype: torch.dtype = torch.float32

    KIND = ("op", "k")

    @property
    def title(self) -> str:
        """Name op, rows and vectors."""
        return f"{self.op} of an MLP, batch {self.n:,}, " + ("a vector" if self.k == 1 else f"{self.k} vectors")

    @property
    def label(self) -> str:
        """Add the dtype."""
        return f"{self.title}, {dtype_name(self.dtype)}"

    @property
    def nbytes(self) -> int:
        """Count the data and the parameters once, the vectors and the results."""
        parameters = sum((a + 1) * b for a, b in _pairs())
        return (self.n * LAYERS[0] + (2 * self.k + 1) * parameters) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Count the matrix products that each vector needs once the network has been evaluated at the point.

        With W weights of a layer 12 N W for the Hessian: 4 N W for the tangent of its output, as much again for the
        tangents of either gradient. 8 N W for the GGN, whose second pass has no tangents but those of the output. The
        tangent of the data is zero and its gradient is not asked for: the first layer has a third, and a half.
        """
        first, rest = _pairs()[0], _pairs()[1:]
        weights, others = first[0] * first[1], sum(a * b for a, b in rest)
        return self.n * self.k * (4 * weights + (12 if self.op == "Hessian" else 8) * others)

    def problem(self, device: torch.device, seed: int = 0) -> Problem:
        """Make the network at a point, data, and vectors."""
        return Problem(self, device, seed)

    def names(self, device: torch.device) -> list[str]:
        """List ours, then what one writes in torch."""
        return list(_makers(self))

    def contender(self, problem: Problem, name: str) -> Contender:
        """Prepare the one of this name at the point."""
        call = _makers(self)[name](problem)
        return Contender(self, name, "backend" if name == "secant" else "peer", Timed([call]), call)

    def judge(self, problem: Problem, contender: Contender, answer: object) -> Check:
        """Compute the relative error of the product."""
        error = (_flat(answer).double() - problem.exact).norm() / problem.exact.norm()
        return Check(float(error), TOLERANCE * torch.finfo(self.dtype).eps)


def _pairs() -> list[tuple[int, int]]:
    return list(itertools.pairwise(LAYERS))


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in _pairs():
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Problem:
    """The network at a random point, random data, and vectors v (P, k)."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = _network().to(case.dtype)
            self.x = torch.randn(case.n, LAYERS[0], dtype=case.dtype)
            self.y = torch.randint(0, LAYERS[-1], (case.n,))
            self.v = torch.randn(sum(p.numel() for p in self.net.parameters()), case.k, dtype=case.dtype)
        self.net = self.net.to(device)
        self.x, self.y, self.v = (z.to(device) for z in (self.x, self.y, self.v))
        self.case, self.device, self.params = case, device, list(self.net.parameters())

    def loss(self) -> Tensor:
        """Compute the mean cross-entropy."""
        return nn.functional.cross_entropy(self.net(self.x), self.y)

    def parts(self) -> list[Tensor]:
        """Shape the vectors as the parameters are, (k, *shape) each."""
        sizes = [p.numel() for p in self.params]
        return [
            part.mT.reshape(-1, *p.shape).contiguous() for part, p in zip(self.v.split(sizes), self.params, strict=True)
        ]

    @functools.cached_property
    def exact(self) -> Tensor:
        """Compute the products in float64, (P, k)."""
        net = _network().to(self.x.device).double()
        net.load_state_dict(self.net.state_dict())
        if self.case.op == "GGN":
            return GGN.of(net, nn.CrossEntropyLoss(), self.x.double(), self.y) @ self.v.double()
        H = Hessian.of(net, nn.CrossEntropyLoss(), self.x.double(), self.y, mode="double-backward")
        return torch.stack([H @ v for v in self.v.double().unbind(1)], 1)


def _flat(answer: object) -> Tensor:
    """Join to (P, k) a tensor, or parts with or without a first dimension of the vectors."""
    if isinstance(answer, Tensor):
        return answer if answer.dim() == 2 else answer.unsqueeze(1)
    parts = list(answer.values() if isinstance(answer, dict) else answer)  # type: ignore[call-overload]
    count = len(parts[-1]) if parts[-1].dim() == 2 else 1
    return torch.cat([part.reshape(count, -1) for part in parts], 1).mT


def _ours(problem: Problem) -> Call:
    v = problem.v if problem.case.k > 1 else problem.v.squeeze(1)
    if problem.case.op == "GGN":
        G = GGN.of(problem.net, nn.CrossEntropyLoss(), problem.x, problem.y)
        return lambda: G @ v
    H = Hessian(problem.loss, problem.params)
    return lambda: H @ v


def _matvecs(problem: Problem) -> Call:
    """Make one product after the other with our own operator."""
    H, columns = Hessian(problem.loss, problem.params), list(problem.v.mT.contiguous())
    return lambda: torch.stack([H @ v for v in columns], 1)


def _double_backward(problem: Problem) -> Callable[[], Sequence[Tensor]]:
    """Multiply in eager mode, on a kept graph."""
    grads = torch.autograd.grad(problem.loss(), problem.params, create_graph=True)
    parts = [part[0] for part in problem.parts()]
    return lambda: torch.autograd.grad(grads, problem.params, parts, retain_graph=True)


def _forward_over_reverse(problem: Problem, *, fused: bool = False) -> Callable[[], dict[str, Tensor]]:
    """Make jvp(grad), of several vectors by vmap; `fused`: compiled."""
    names = [name for name, _ in problem.net.named_parameters()]
    point = dict(zip(names, (p.detach() for p in problem.params), strict=True))
    tangents = dict(zip(names, problem.parts(), strict=True))

    def loss(p: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(problem.net, p, (problem.x,)), problem.y)

    def product(p: dict[str, Tensor], t: dict[str, Tensor]) -> dict[str, Tensor]:
        return jvp(grad(loss), (p,), (t,))[1]

    if problem.case.k == 1:
        function, tangents = product, {name: part[0] for name, part in tangents.items()}
    else:
        function = torch.vmap(product, in_dims=(None, 0))
    return functools.partial(compiled(function) if fused else function, point, tangents)


Make = Callable[[Problem], Callable[[], object]]


def _makers(case: Case) -> dict[str, Make]:
    """List what makes the call of each contender, by name."""
    if case.op == "GGN":
        return {"secant": _ours}
    first: dict[str, Make] = {"matvecs": _matvecs} if case.k > 1 else {"double backward": _double_backward}
    fused = functools.partial(_forward_over_reverse, fused=True)
    return {"secant": _ours, **first, "jvp(grad)": _forward_over_reverse, "compiled": fused}


def groups(device: torch.device, *, quick: bool = False, full: bool = False) -> list[Sequence[Base]]:
    """List what `python -m secant bench` measures, a case after the other."""
    batches = (32,) if quick else BATCHES[device.type]
    return [[Case(op, n, k)] for n in batches for op, k in (("Hessian", 1), ("Hessian", COLUMNS), ("GGN", 1))]


def bars(rows: Sequence[Row], device: torch.device, bandwidth: float = 0.0) -> list[Bar]:
    """Set the targets for two cores: as fast as compiled jvp(grad), 1.5 times as fast as double backward."""
    case = Case("Hessian", 512)
    if device.type != "cpu" or find(rows, case) is None:
        return []
    targets = {"compiled": 1.0, "double backward": 1.5}
    return [speed_bar(rows, case, (peer,), target) for peer, target in targets.items()]


FAMILY = Family("Curvature", 4.0, groups, bars)
