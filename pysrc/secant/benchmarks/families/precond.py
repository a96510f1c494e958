"""Cases of the `precond` family: steps of tiles, orthogonalisation, and roots without eigenvectors.

A step is checked by what one makes of parameters of zero at rate 1, and timed at rate 0, with the same gradients again
and again: every pass is made, and the state tends to theirs. An answer is right when its largest error, relative to the
largest component of the reference in float64, stays below `TOLERANCE` rounding units of the arithmetic; a root when it
keeps the bound of `secant.ops.newton_inv_root`. torch's Muon computes in bfloat16, and is judged by its units.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import secant
from secant.benchmarks.case import Bar, Check, Contender, Row, around, dtype_name, serving
from secant.benchmarks.case import Case as Base
from secant.benchmarks.families import Family
from secant.benchmarks.peers import compiled
from secant.benchmarks.timing import Timed
from secant.ops.precond import ADAM, GRAFTS, MUON, Rule

#: In units of the machine epsilon: products of at most 512 terms, one after the other, and quotients of averages.
TOLERANCE = 2000.0
#: Of torch's Muon, in units of bfloat16: five steps, each of which multiplies an error by 3.4 at most.
MUON_TOLERANCE = 100.0
#: Tensors of a step that a compiler is given: it looks at each of them.
MOST_COMPILED = 40
#: Steps of `newton_schulz`; damping of a root.
STEPS, DAMPING = 5, 1e-4
#: Numbers of a step: those of Shampoo by default, and of SOAP.
BETA1, BETA2, BETA_GRAM, EPS, COUNT = 0.9, 0.95, 0.95, 1e-8, 5
RULES = {
    "shampoo": Rule(BETA1, BETA2, BETA_GRAM, EPS, 0.0, ADAM, False, False),
    "soap": Rule(BETA1, BETA2, BETA_GRAM, EPS, 0.0, GRAFTS.index("none"), True, False),
}

Answer = tuple[Tensor, ...]
Call = Callable[[], Answer]


@dataclasses.dataclass(frozen=True)
class Case(Base):
    """An op on `batch` matrices of m x n: the method of a step, or p of a root."""

    batch: int
    m: int
    n: int
    dtype: torch.dtype = torch.float32
    method: str = ""
    p: int = 0

    KIND = ("op", "method", "p")
    MAX_COPIES = 8

    @property
    def title(self) -> str:
        """Name op, method or power, and shape."""
        extra = f", {self.method}" if self.method else f", p = {self.p}" if self.p else ""
        return f"{self.op}{extra}, {self.batch} x {self.m} x {self.n}"

    @property
    def label(self) -> str:
        """Add the dtype."""
        return f"{self.title}, {dtype_name(self.dtype)}"

    @property
    def nbytes(self) -> int:
        """Count what the README of the kernels counts: a step's passes over each state; input and result of the others.

        Of a tile of n x n 11 + 2 / n times its parameters: gradient and roots once, parameter, two moments and two
        halves of Gram averages read and written.
        """
        size, entries = self.dtype.itemsize, self.m * self.n
        if self.op != "precond_step":
            return 2 * self.batch * entries * size
        halves = self.m * (self.m + 1) + self.n * (self.n + 1)
        return self.batch * (7 * entries + self.m**2 + self.n**2 + halves) * size

    @property
    def flops(self) -> float:
        """Count multiplications and additions of the products; of a Gram matrix a triangle.

        A step of Shampoo has two roots to multiply by, one of SOAP six bases; an entry needs about 20 operations
        besides. Of a root, log2(p) + 2 products a step, as many steps as the damping needs, and five squares.
        """
        m, n = sorted((self.m, self.n))
        if self.op == "newton_schulz":
            return 2.0 * self.batch * STEPS * (2 * m * m * n + m**3)
        if self.op == "newton_inv_root":
            steps = math.log(1 / DAMPING) / (self.p * math.log((self.p + 1) / self.p)) + 6
            return 2.0 * self.batch * n**3 * (steps * (math.log2(self.p) + 2) + 5)
        products = (1 if self.method == "shampoo" else 3) * self.m * self.n * (self.m + self.n)
        grams = self.m * self.n * (self.m + self.n + 2) / 2
        return self.batch * (2.0 * (products + grams) + 20 * self.m * self.n)

    def serving(self, device: torch.device) -> list[str]:
        """List the backends that can serve it, the one that `auto` takes first."""
        return serving("precond", device, self.dtype, large=self.nbytes > 1 << 20)

    def problem(self, device: torch.device, seed: int = 0) -> Problem:
        """Make random matrices and the states of a run under way."""
        return Problem(self, device, seed)

    def names(self, device: torch.device) -> list[str]:
        """List every backend, then what torch has, and what one writes in torch, as it is and compiled."""
        peers = {"newton_schulz": ["torch Muon", "eager bmm"], "newton_inv_root": ["block_inv_root", "eigh"]}
        fused = ["compiled"] if self.op != "precond_step" or self.batch <= MOST_COMPILED else []
        return [*self.serving(device), *peers.get(self.op, ["eager"]), *fused]

    def contender(self, problem: Problem, name: str) -> Contender:
        """Prepare the one of this name."""
        names = self.serving(problem.device)
        if self.op == "precond_step":
            make: Callable[[State, float], Call] = functools.partial(_torch_step, self, name == "compiled")
            make = _our_step if name in names else make
            timed, probe = make(problem.state, 0.0), make(problem.state.copy(), 1.0)
        else:
            timed = probe = _ours(problem) if name in names else _peer(problem, name)
        if name in names:
            return Contender(self, name, "backend", Timed([timed], around(name, names)), probe, name != "reference")
        return Contender(self, name, "peer", Timed([timed]), probe)

    def judge(self, problem: Problem, contender: Contender, answer: Answer) -> Check:
        """Take the largest error, and the bound of what is computed in the dtype of the contender."""
        if self.op == "newton_inv_root":
            return problem.root_check(answer, contender.kind == "backend" or contender.name == "compiled")
        muon = contender.name == "torch Muon"
        bound = MUON_TOLERANCE * torch.finfo(torch.bfloat16).eps if muon else TOLERANCE * torch.finfo(self.dtype).eps
        return Check(problem.error(answer), bound)


class State:
    """Tensors and states of a step, as `secant.ops.Tiles` takes them."""

    def __init__(self, case: Case, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        self.case, self.params, self.grads, self.states = case, params, grads, states

    def copy(self, dtype: torch.dtype | None = None) -> State:
        """Copy everything, in a dtype."""

        def one(x: Tensor) -> Tensor:
            return x.to(dtype if x.dim() else x.dtype, copy=True) if dtype is not None else x.clone()

        states = [{name: one(x) for name, x in state.items()} for state in self.states]
        return State(self.case, [one(x) for x in self.params], [one(x) for x in self.grads], states)

    def list(self, name: str) -> list[Tensor]:
        """List one tensor of each state."""
        return [state[name] for state in self.states]


class Problem:
    """Matrices of normal numbers; of a step, a state of them; of a root, Gram matrices of rank n / 2."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.case, self.device = case, device

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=case.dtype, device=device)

        if case.op == "precond_step":
            self.state = _state(case, normal)
            return
        self.x = normal(case.batch, case.m, case.n)
        if case.op == "newton_inv_root":
            half = self.x[..., : max(1, case.n // 2)]
            self.x = half @ half.mT / case.n

    @functools.cached_property
    def exact(self) -> Answer:
        """Compute the reference's answer, in float64."""
        with secant.use_backend("reference"):
            if self.case.op == "precond_step":
                return _our_step(self.state.copy(torch.float64), 1.0)()
            return (secant.ops.newton_schulz(self.x.double(), STEPS),)

    def error(self, answer: Answer) -> float:
        """Find the largest error of any result, relative to its largest component; NaN when anything is."""
        found = []
        for result, exact in zip(answer, self.exact, strict=True):
            found.append(float((result.double() - exact).abs().max() / exact.abs().max()))
        return math.nan if any(math.isnan(x) for x in found) else max(found)

    @functools.cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Decompose the matrices in float64, on the CPU, which has no slow way for many of them."""
        w, q = torch.linalg.eigh(self.x.double().cpu())
        return w.to(self.device), q.to(self.device)

    def root_check(self, answer: Answer, newton: bool) -> Check:
        """Compare roots with those of the eigenvalues, damped as their way is: by a norm, or by the largest."""
        x, info = answer
        bound = self.case.n * torch.finfo(self.case.dtype).eps / 2 * (4 * (1 + 1 / DAMPING) + 240)
        if bool((info < 0).any()) or not bool(x.isfinite().all()):
            return Check(math.nan, bound)
        w, q = self.eigen
        top = w[:, -1:] if not newton else w[:, -1:] * (w.abs() / w[:, -1:]).pow(64).sum(-1, keepdim=True).pow(1 / 64)
        f = (w.clamp(min=0) + DAMPING * top).pow(-1 / self.case.p)
        exact = (q * f[:, None, :]) @ q.mT
        sizes = torch.linalg.matrix_norm(exact, ord=2)
        return Check(float((torch.linalg.matrix_norm(x.double() - exact, ord=2) / sizes).max()), bound)


def _state(case: Case, normal: Callable[..., Tensor]) -> State:
    """Make the state of a run under way, with parameters of zero."""
    params = [torch.zeros_like(normal(case.m, case.n)) for _ in range(case.batch)]
    states = []
    for p in params:
        state = secant.ops.Tiles.new_state(p, block_size=None)
        state["step"].fill_(COUNT)
        state["exp_avg"].copy_(normal(case.m, case.n))
        state["exp_avg_sq"].copy_(normal(case.m, case.n).square())
        for side, n in (("left", case.m), ("right", case.n)):
            g, root = normal(n, n), normal(n, n) / n**0.5
            state[side].copy_(_packed(g @ g.mT / n).unsqueeze(0))
            if case.method == "soap":
                root = torch.linalg.qr(root.double()).Q.to(root.dtype)
            else:
                root = (root + root.mT) / 2 + 3 * torch.eye(n, dtype=case.dtype, device=root.device)
            state[f"{side}_root"].copy_(root.unsqueeze(0))
        states.append(state)
    return State(case, params, [normal(case.m, case.n) for _ in params], states)


def _packed(a: Tensor) -> Tensor:
    """Take the lower triangles of matrices, row behind row."""
    i, j = torch.tril_indices(*a.shape[-2:], device=a.device)
    return a[..., i, j]


def _whole(packed: Tensor, n: int) -> Tensor:
    """Make symmetric matrices of their lower triangles."""
    i, j = torch.tril_indices(n, n, device=packed.device)
    a = packed.new_zeros(*packed.shape[:-1], n, n)
    a[..., i, j] = packed
    a[..., j, i] = packed
    return a


def _our_step(state: State, lr: float) -> Call:
    """Make the call as an optimizer does; what it returns is made in the probe alone."""
    tiles = secant.ops.Tiles(state.params, state.states, block_size=None)
    rule, names = RULES[state.case.method], ("exp_avg", "exp_avg_sq", "left", "right")

    def step() -> Answer:
        tiles.step(state.grads, lr=lr, rule=rule)
        if not lr:
            return ()
        return torch.stack(state.params), *(torch.stack([x.squeeze(0) for x in state.list(name)]) for name in names)

    return step


def _torch_step(case: Case, fused: bool, state: State, lr: float) -> Call:
    """Make the same in torch: bmm of all tiles, and `torch._foreach_*` or, compiled, what a compiler fuses."""
    left, right = (_whole(torch.cat(state.list(name)), n) for name, n in (("left", case.m), ("right", case.n)))
    roots = [torch.cat(state.list(f"{side}_root")) for side in ("left", "right")]
    state = state.copy()
    function = _soap if case.method == "soap" else _shampoo
    function = compiled(function) if fused else function
    averages = [state.list(name) for name in ("exp_avg", "exp_avg_sq")]
    args: tuple[Any, ...] = (state.params, state.grads, *averages, left, right, *roots, lr)

    def step() -> Answer:
        function(*args)
        if not lr:
            return ()
        moments = [torch.stack(state.list(name)) for name in ("exp_avg", "exp_avg_sq")]
        return torch.stack(state.params), *moments, _packed(left), _packed(right)

    return step


_UNBIAS1, _UNBIAS2 = 1 - BETA1**COUNT, 1 - BETA2**COUNT


def _grams(grads: list[Tensor], left: Tensor, right: Tensor) -> Tensor:
    g = torch.stack(grads)
    left.lerp_(g @ g.mT, 1 - BETA_GRAM)
    right.lerp_(g.mT @ g, 1 - BETA_GRAM)
    return g


def _shampoo(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    left: Tensor,
    right: Tensor,
    left_root: Tensor,
    right_root: Tensor,
    lr: float,
) -> None:
    _grams(grads, left, right)
    torch._foreach_lerp_(exp_avg, grads, 1 - BETA1)
    torch._foreach_mul_(exp_avg_sq, BETA2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, value=1 - BETA2)
    p = left_root @ torch.stack(exp_avg) @ right_root
    below = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(below, _UNBIAS2**0.5)
    torch._foreach_add_(below, EPS)
    adam = torch._foreach_div(exp_avg, below)
    lengths = torch.stack(torch._foreach_norm(adam)) / (_UNBIAS1 * torch.linalg.vector_norm(p, dim=(1, 2)))
    torch._foreach_add_(params, (p * lengths[:, None, None]).unbind(), alpha=-lr)


def _soap(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    left: Tensor,
    right: Tensor,
    left_root: Tensor,
    right_root: Tensor,
    lr: float,
) -> None:
    g = left_root.mT @ _grams(grads, left, right) @ right_root
    torch._foreach_lerp_(exp_avg, grads, 1 - BETA1)
    m = left_root.mT @ torch.stack(exp_avg) @ right_root
    torch._foreach_mul_(exp_avg_sq, BETA2)
    torch._foreach_add_(exp_avg_sq, g.square().unbind(), alpha=1 - BETA2)
    p = m / _UNBIAS1 / ((torch.stack(exp_avg_sq) / _UNBIAS2).sqrt() + EPS)
    torch._foreach_add_(params, (left_root @ p @ right_root.mT).unbind(), alpha=-lr)


def _ours(problem: Problem) -> Call:
    x, case = problem.x, problem.case
    if case.op == "newton_schulz":
        out = torch.empty_like(x)
        return lambda: (secant.ops.newton_schulz(x, STEPS, out=out),)
    return lambda: secant.ops.newton_inv_root(x, case.p, damping=DAMPING)


def _bmm(x: Tensor) -> Answer:
    """Iterate all matrices at once, as one writes it."""
    a, b, c = MUON
    y = x.mT if x.shape[1] > x.shape[2] else x
    y = y / torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True)
    for _ in range(STEPS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if x.shape[1] > x.shape[2] else y,)


def _muon(x: Tensor) -> Answer:
    """Call what torch.optim.Muon does to a matrix, for each."""
    muon: Any = importlib.import_module("torch.optim._muon")
    return (torch.stack([muon._zeropower_via_newtonschulz(one, MUON, STEPS, 1e-7) for one in x]),)


def _coupled(x: Tensor, p: int) -> Answer:
    """Iterate as `secant.ops.newton_inv_root` does, by products of torch and to the last step."""
    reference: Any = importlib.import_module("secant.kernels.precond.reference")
    tolerance = math.sqrt(torch.finfo(x.dtype).eps) / 4
    answer: Answer = reference.coupled(x, p, DAMPING, secant.ops.precond._steps(p, DAMPING, tolerance), tolerance)
    return answer


def _eigh(x: Tensor, p: int) -> Answer:
    """Take the root of the eigenvalues, damped relative to the largest."""
    w, q = torch.linalg.eigh(x)
    w = (w.clamp(min=0) + DAMPING * w[:, -1:]).pow(-1 / p)
    return (q * w[:, None, :]) @ q.mT, torch.zeros(len(x), dtype=torch.int32, device=x.device)


def _block_root(x: Tensor, p: int) -> Answer:
    return secant.ops.block_inv_root(x, p, damping=("max", DAMPING))


def _peer(problem: Problem, name: str) -> Call:
    x, p = problem.x, problem.case.p
    if problem.case.op == "newton_schulz":
        function = {"torch Muon": _muon, "eager bmm": _bmm}.get(name) or compiled(_bmm)
        return functools.partial(function, x)
    root = {"block_inv_root": _block_root, "eigh": _eigh}.get(name) or compiled(_coupled)
    return functools.partial(root, x, p)


#: Tiles that fill a GPU, for one of what a CPU is given.
_MORE = {"cpu": 1, "cuda": 32}


def cases(device: torch.device) -> list[Case]:
    """List what `python -m secant bench --family precond` measures: the tiles of a small transformer, and others."""
    f32, f64, more = torch.float32, torch.float64, _MORE[device.type]
    found = [Case("precond_step", 30, 64, 64, f32, method) for method in RULES]
    steps = ((120, 32, f32), (300 * more, 64, f32), (30, 64, f64))
    found += [Case("precond_step", batch, n, n, dtype, "shampoo") for batch, n, dtype in steps]
    found += [Case("newton_schulz", b * more, m, n) for b, m, n in ((12, 64, 64), (4, 64, 256), (1, 512, 512))]
    roots = ((60 * more, 64, 2), (60 * more, 64, 4), (60 * more, 32, 2), (8, 128, 2))
    return [*found, *(Case("newton_inv_root", batch, n, n, f32, p=p) for batch, n, p in roots)]


def small_cases() -> list[Case]:
    """List a case of each op that takes no time, to see that it runs."""
    f32 = torch.float32
    steps = [Case("precond_step", 3, 8, 5, f32, method) for method in RULES]
    return [*steps, Case("newton_schulz", 3, 8, 5), Case("newton_inv_root", 3, 6, 6, f32, p=2)]


def groups(device: torch.device, *, quick: bool = False, full: bool = False) -> list[Sequence[Base]]:
    """List what `python -m secant bench` measures, a case after the other."""
    return [[case] for case in (small_cases() if quick else cases(device))]


def bars(rows: Sequence[Row], device: torch.device, bandwidth: float = 0.0) -> list[Bar]:
    """Set none: what an optimizer's step may take is a bar of `training`."""
    return []


FAMILY = Family("Preconditioned steps", 1.0, groups, bars)
