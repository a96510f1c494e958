"""Cases of the `hvp` family: products with X and its like, checked before they are timed.

The yardstick of the products with X is one read of X by all threads, in turns with the rest (on a GPU, the bandwidth
of the same run). An answer is right when its largest error, relative to the largest component of the reference in
float64, stays below `TOLERANCE` rounding units of the arithmetic.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import secant
from secant import _checks, backends
from secant.benchmarks import machine
from secant.benchmarks.case import (
    Bar,
    Check,
    Contender,
    Row,
    around,
    dtype_name,
    find,
    serving,
    speed_bar,
)
from secant.benchmarks.case import Case as Base
from secant.benchmarks.families import Family
from secant.benchmarks.peers import compiled
from secant.benchmarks.timing import Timed

#: Name of the row that says how long reading X once takes.
READ = "one read of X"
#: In units of the machine epsilon. Peers sum rows in an order of their own, with errors that grow with N.
TOLERANCE = 2000.0
#: Largest X that the reference, which widens all of it to float64, is asked to handle.
REFERENCE_ELEMENTS = 1 << 22

#: Rows and columns of the cases with a bar.
BAR_SHAPES = ((100_000, 256), (200_000, 784))
#: Of Gram matrices: Jacobians of networks that Levenberg-Marquardt fits.
GRAM_SHAPES = ((3500, 449), (20_000, 1000))

Answer = tuple[Tensor, ...]
Call = Callable[[], Answer]


@dataclasses.dataclass(frozen=True)
class Case(Base):
    """A product: op; N rows of d features (cross entropy: of d logits), k vectors or classes.

    entries: those of a sparse row, as many for each, whose indices the call checks; 0 for dense rows.
    """

    n: int
    d: int
    k: int = 1
    dtype: torch.dtype = torch.float32
    entries: int = 0

    LIMIT = READ
    LIMITS = "reads of X"
    MAX_COPIES = 16

    @property
    def title(self) -> str:
        """Name op, shape, vectors or classes."""
        extra = {"glm_hvp": f", k = {self.k}", "softmax_hvp": f", {self.k} classes"}.get(self.op, "")
        return f"{self.op} {self.n:,} x {self.d:,}{extra}" + (f", {self.entries} entries a row" if self.entries else "")

    @property
    def label(self) -> str:
        """Add the dtype."""
        return f"{self.title}, {dtype_name(self.dtype)}"

    @property
    def compute(self) -> torch.dtype:
        """Return the dtype of the arithmetic."""
        return _checks.arithmetic(self.dtype)

    @property
    def limit_bytes(self) -> int:
        """Count X, or the logits. A sparse row has its entries, their columns and a pointer, int32."""
        if self.entries:
            return self.n * (self.entries * (self.dtype.itemsize + 4) + 4)
        return self.n * self.d * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Count X once, and the result; logits, u and the result once each."""
        if self.op == "cross_entropy_hvp":
            return 3 * self.limit_bytes
        if self.op == "gram":
            return self.limit_bytes + self.d**2 * self.dtype.itemsize
        per_row = {"glm_hvp": 1, "glm_value_grad": 2, "softmax_hvp": self.k}[self.op]
        return self.limit_bytes + (per_row * self.n + 2 * self.d * self.k) * self.compute.itemsize

    @property
    def flops(self) -> int:
        """Count the formula, an exponential as one.

        X V and its transpose 4 N d k, and what a row needs between them: a product with its weight, or the loss and
        its derivatives (about 10), or for each class a product with a probability, a sum, a difference and a product.
        An entry of logits: x - lse, exp, a product and a sum for p.u, u - p.u, a product. Of a Gram matrix a triangle.
        """
        if self.op == "gram":
            return self.n * self.d * (self.d + 1)
        if self.op == "cross_entropy_hvp":
            return 6 * self.n * self.d
        row = {"glm_hvp": self.k, "glm_value_grad": 10, "softmax_hvp": 4 * self.k}[self.op]
        return 4 * self.n * (self.entries or self.d) * self.k + row * self.n

    def serving(self, device: torch.device) -> list[str]:
        """List the backends that can serve it, the one that `auto` takes first."""
        large = self.n * self.d > REFERENCE_ELEMENTS
        return serving("hvp", device, self.dtype, large=large)

    def problem(self, device: torch.device, seed: int = 0) -> Problem:
        """Make random rows."""
        return Problem(self, device, seed)

    def names(self, device: torch.device) -> list[str]:
        """List every backend, then what one writes in torch, and that compiled."""
        return [*self.serving(device), "eager", "compiled"]

    def contender(self, problem: Problem, name: str) -> Contender:
        """Prepare the one of this name."""
        names = self.serving(problem.device)
        if name in names:
            call = _ours(problem)
            return Contender(self, name, "backend", Timed([call], around(name, names)), call, capturable=True)
        call = _peer(problem, compiled if name == "compiled" else lambda function: function)
        return Contender(self, name, "peer", Timed([call]), call)

    def judge(self, problem: Problem, contender: Contender, answer: Answer) -> Check:
        """Take the largest error, in units of the arithmetic; of logits also of their dtype."""
        bound = TOLERANCE * torch.finfo(self.compute).eps
        if self.op == "cross_entropy_hvp":
            bound = max(bound, 8 * torch.finfo(self.dtype).eps)
        return Check(problem.error(answer), bound)

    def limit(self, problem: Problem) -> Callable[[], None] | None:
        """Read a dense X once by all threads of a CPU."""
        if problem.device.type != "cpu" or not machine.can_read() or self.op == "cross_entropy_hvp" or self.entries:
            return None
        return functools.partial(machine.read, 1, problem.x)


class Problem:
    """Random rows, vectors and what else the op takes."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.case, self.device = case, device

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=case.compute, device=device)

        self.x = self._sparse(generator) if case.entries else normal(case.n, case.d).to(case.dtype)
        self.v = normal(case.d, case.k) / case.d**0.5
        self.weight = torch.rand(case.n, generator=generator, dtype=case.compute, device=device)
        self.target = (self.weight < 0.5).to(case.compute)
        if case.op == "softmax_hvp":
            self.probs = torch.softmax(normal(case.n, case.k), -1)
        if case.op == "cross_entropy_hvp":
            self.x *= 3
            self.u, self.lse = normal(case.n, case.d).to(case.dtype), torch.logsumexp(self.x.to(case.compute), -1)

    def _sparse(self, generator: torch.Generator) -> Tensor:
        case = self.case
        size = case.n * case.entries
        # A column out of each of as many ranges, so that those of a row differ and rise.
        places = torch.rand(case.n, case.entries, generator=generator, dtype=torch.float64)
        col = ((places + torch.arange(case.entries)) * case.d / case.entries).int().clamp(max=case.d - 1)
        crow = torch.arange(0, size + 1, case.entries, dtype=torch.int32)
        values = torch.randn(size, generator=generator, dtype=case.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            return torch.sparse_csr_tensor(crow, col.view(-1), values, (case.n, case.d), check_invariants=True)

    @functools.cached_property
    def exact(self) -> Answer:
        """Compute the reference's answer, in float64."""
        reference = backends.load("hvp", "reference")
        assert not isinstance(reference, str)
        wide = functools.partial(torch.empty, dtype=torch.float64, device=self.device)
        if self.case.op == "cross_entropy_hvp":
            out = wide(self.x.shape)
            reference.cross_entropy_hvp(self.x, self.u, None, out)
        elif self.case.op == "gram":
            out = wide(self.case.d, self.case.d)
            reference.gram(self.x, None, False, out)
        elif self.case.op == "glm_value_grad":
            value, grad = wide(()), wide(self.case.d)
            curvature = wide(self.case.n)
            reference.glm_value_grad(
                self.x, self.target, self.v[:, 0].contiguous(), "logistic", 1.0, None, 0.0, value, grad, curvature
            )
            return value, grad
        elif self.case.op == "softmax_hvp":
            out = wide(self.v.shape)
            reference.softmax_hvp(self.x, self.v, self.probs, None, 0.0, out)
        else:
            out = wide(self.v.shape)
            reference.glm_hvp(self.x, self.v, self.weight, 0.0, out)
        return (out,)

    def error(self, answer: Answer) -> float:
        """Find the largest error of any result, relative to its largest component; NaN when anything is."""
        found = []
        for result, exact in zip(answer, self.exact, strict=True):
            found.append(float((result.double() - exact).abs().max() / exact.abs().max()))
        return math.nan if any(math.isnan(x) for x in found) else max(found)


def _ours(problem: Problem) -> Call:
    case, x, v = problem.case, problem.x, problem.v
    if case.op == "glm_hvp":
        out = torch.empty_like(v)
        return lambda: (secant.ops.glm_hvp(x, v, problem.weight, out=out),)
    if case.op == "glm_value_grad":
        coef = v[:, 0].contiguous()
        return lambda: secant.ops.glm_value_grad(x, problem.target, coef, loss="logistic")[:2]
    if case.op == "softmax_hvp":
        return lambda: (secant.ops.softmax_hvp(x, v, problem.probs),)
    if case.op == "gram":
        out = x.new_empty(case.d, case.d)
        return lambda: (secant.ops.gram(x, out=out),)
    return lambda: (secant.ops.cross_entropy_hvp(x, problem.u, lse=problem.lse),)


def _glm_hvp(x: Tensor, v: Tensor, weight: Tensor) -> Answer:
    x = x.to(v.dtype)  # torch multiplies no bfloat16 by float32
    return (x.mT @ (weight[:, None] * (x @ v)),)


def _glm_hvp_single(x: Tensor, v: Tensor, weight: Tensor) -> Answer:
    x = x.to(v.dtype)
    return ((x.mT @ (weight * (x @ v))).unsqueeze(1),)


def _glm_value_grad(x: Tensor, coef: Tensor, target: Tensor) -> Answer:
    coef = coef.detach().requires_grad_()
    value = F.binary_cross_entropy_with_logits(x @ coef, target, reduction="sum")
    return value.detach(), *torch.autograd.grad(value, coef)


def _glm_value_grad_formula(x: Tensor, coef: Tensor, target: Tensor) -> Answer:
    z = x @ coef
    return (F.softplus(z) - target * z).sum(), x.T @ (torch.sigmoid(z) - target)


def _softmax_hvp(x: Tensor, v: Tensor, probs: Tensor) -> Answer:
    z = x @ v
    z += -(probs * z).sum(1, keepdim=True)  # as scikit-learn's LinearModelLoss
    return (x.T @ (z * probs),)


def _cross_entropy_hvp(logits: Tensor, u: Tensor) -> Answer:
    p = torch.softmax(logits, -1)
    return (p * (u - (p * u).sum(-1, keepdim=True)),)


def _gram(x: Tensor) -> Answer:
    return (x.T @ x,)


def _peer(problem: Problem, how: Callable[[Callable[..., Answer]], Callable[..., Answer]]) -> Call:
    """Make what computes the same with torch, as one writes it; `how`: as it is, or compiled."""
    x, v, op = problem.x, problem.v, problem.case.op
    if op == "glm_hvp" and problem.case.k == 1:
        return functools.partial(how(_glm_hvp_single), x, v.squeeze(1), problem.weight)
    if op == "glm_hvp":
        return functools.partial(how(_glm_hvp), x, v, problem.weight)
    if op == "glm_value_grad":  # by autograd in eager mode, by its formula where a compiler fuses that
        function = _glm_value_grad_formula if how is compiled else _glm_value_grad
        return functools.partial(how(function), x, v[:, 0].contiguous(), problem.target)
    if op == "softmax_hvp":
        return functools.partial(how(_softmax_hvp), x, v, problem.probs)
    if op == "gram":
        return functools.partial(how(_gram), x)
    return functools.partial(how(_cross_entropy_hvp), x, problem.u)


def cases(device: torch.device) -> list[Case]:
    """List what `python -m secant bench --family hvp` measures."""
    f32, bf16 = torch.float32, torch.bfloat16
    found = [Case("glm_hvp", n, d, k) for n, d in BAR_SHAPES for k in (1, 8)]
    found += [Case("glm_hvp", 200_000, 784, 1, bf16), Case("glm_hvp", 100_000, 256, 1, torch.float64)]
    found += [Case("glm_hvp", 100_000, 256, 64), Case("glm_hvp", 1_000_000, 8), Case("glm_hvp", 400, 100_000)]
    found += [Case("glm_value_grad", n, d) for n, d in (*BAR_SHAPES, (1_000_000, 8))]
    found += [Case("softmax_hvp", 100_000, 256, 10), Case("softmax_hvp", 200_000, 784, 10)]
    if device.type == "cpu":
        found += [Case("glm_hvp", 200_000, 10_000, k, entries=20) for k in (1, 8)]
    found += [Case("gram", n, d, dtype=dtype) for n, d in GRAM_SHAPES for dtype in (torch.float64, f32)]
    rows = 16384 if device.type == "cuda" else 512
    found += [Case("cross_entropy_hvp", rows, 50304, 1, dtype) for dtype in (f32, bf16)]
    return found


def small_cases(device: torch.device) -> list[Case]:
    """List a case of each op that takes no time, to see that it runs."""
    sparse = [Case("glm_hvp", 200, 50, 1, entries=5)] if device.type == "cpu" else []
    return [
        Case("glm_hvp", 200, 20),
        Case("glm_hvp", 200, 20, 8),
        Case("glm_value_grad", 200, 20),
        Case("softmax_hvp", 200, 20, 10),
        *sparse,
        Case("gram", 200, 50),
        Case("cross_entropy_hvp", 8, 300),
    ]


def groups(device: torch.device, *, quick: bool = False, full: bool = False) -> list[Sequence[Base]]:
    """List what `python -m secant bench` measures, a case after the other."""
    return [[case] for case in (small_cases(device) if quick else cases(device))]


def bars(rows: Sequence[Row], device: torch.device, bandwidth: float) -> list[Bar]:
    """Set the bars of the device, with what this run measured."""
    return gpu_bars(rows, bandwidth) if device.type == "cuda" else cpu_bars(rows)


def cpu_bars(rows: Sequence[Row]) -> list[Bar]:
    """Set the targets for two cores with AVX2."""
    targets = {("glm_hvp", 1): 2.5, ("glm_hvp", 8): 8.0, ("glm_value_grad", 1): 3.0, ("softmax_hvp", 10): 3.0}
    found = []
    for case in dict.fromkeys(row.case for row in rows):
        if case.op == "gram" and (case.n, case.d) in GRAM_SHAPES:
            found.append(speed_bar(rows, case, ("eager",), 1.6, title=case.label))
            continue
        target = targets.get((case.op, case.k))
        if target is None or case.dtype is not torch.float32 or (case.n, case.d) not in BAR_SHAPES:
            continue
        found.append(speed_bar(rows, case, ("eager",), target, title=case.title))
        if case == Case("glm_hvp", 200_000, 784):
            found.append(speed_bar(rows, case, (READ,), 1.5, title=case.title))
    return found


def gpu_bars(rows: Sequence[Row], bandwidth: float) -> list[Bar]:
    """Set the targets for an H100: shares of the copy bandwidth."""
    found = []
    for case in dict.fromkeys(row.case for row in rows):
        ours = find(rows, case)
        rate = ours.bytes_per_second if ours is not None else None
        share = None if rate is None else rate / bandwidth
        if case.op == "glm_hvp" and case.k == 1 and case.limit_bytes > 1 << 28:
            found.append(Bar(f"{case.title} against the copy bandwidth", 0.75, True, share, case=case))
        if case.op == "cross_entropy_hvp":
            found.append(Bar(f"{case.title} against the copy bandwidth", 0.7, True, share, case=case))
    return found


FAMILY = Family("Products", 1.5, groups, bars)
