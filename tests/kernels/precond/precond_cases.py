"""What every backend of the `precond` family must do: one call of a backend on a device, against the reference.

What is not there arrives poisoned, around every tensor lies memory that must stay as it is, and what comes back is held
to bounds that are derived here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from secant.kernels.precond import reference
from secant.kernels.precond.contract import ADAM, APPLY, FIXED_RMS, GRAMS, NONE, RMS, SGD, Rule, Tensors
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CPU = torch.device("cpu")
PAD = 7  # entries around each tensor
POISON = 1.5e4  # exact in every dtype

#: Shape, tiles down and across, which sides. Odd, even, one row, one column, one entry, uneven cuts, vectors.
SHAPES: tuple[tuple[tuple[int, ...], int, int, str], ...] = (
    ((64, 64), 1, 1, "lr"),
    ((97, 64), 2, 1, "lr"),
    ((1, 1), 1, 1, "lr"),
    ((1, 37), 1, 1, "lr"),
    ((37, 1), 1, 1, "lr"),
    ((7, 5, 3, 3), 1, 2, "lr"),
    ((70, 130), 3, 3, "lr"),
    ((17, 33), 2, 3, "l"),
    ((33, 17), 1, 1, "r"),
    ((5, 9), 2, 2, ""),
    ((300,), 1, 1, ""),
    ((67,), 1, 4, ""),
    ((), 1, 1, ""),
)
RULE = Rule(0.9, 0.95, 0.9, 1e-8, 0.1, ADAM, False, False)
RULES = {
    "adam": RULE,
    "sgd": RULE._replace(graft=SGD),
    "rms": RULE._replace(graft=RMS),
    "none": RULE._replace(graft=NONE, maximize=True),
    "soap": RULE._replace(rotate=True),
}


def unit(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype is F64 else F32


class Guarded:
    """Tensors between entries that nobody may touch."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device, self.around = device, []

    def __call__(self, x: Tensor, order: str = "rows") -> Tensor:
        """A copy; "rows" contiguous, "columns" with the first dimension last in memory, "spread" with gaps."""
        shape = list(x.shape)
        if order == "columns" and x.dim() == 2:
            shape = shape[::-1]
        gap = 3 if order == "spread" and x.dim() == 2 else 1
        size = math.prod(shape) * gap
        memory = torch.full((size + 2 * PAD,), POISON, dtype=x.dtype, device=self.device)
        inner = memory[PAD : PAD + size].view([*shape[:-1], *(shape[-1:] and [shape[-1] * gap])])
        view = inner[..., ::gap] if gap > 1 else inner
        view = view.mT if order == "columns" and x.dim() == 2 else view
        view.copy_(x)
        touched = torch.zeros_like(memory, dtype=torch.bool)
        inside = touched[PAD : PAD + size].view(inner.shape)
        (inside[..., ::gap] if gap > 1 else inside).fill_(True)
        self.around.append((memory, touched))
        return view

    def check(self) -> None:
        for memory, touched in self.around:
            assert bool((memory[~touched] == POISON).all()), "memory around a tensor was written"


def tensors(
    dtype: torch.dtype, storage: torch.dtype, rule: Rule, seed: int = 0, shapes: Any = SHAPES
) -> tuple[Tensors, Tensor]:
    """Random tensors of these shapes with states of a run under way, and their layout, contiguous."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=F64)

    lists: list[list[Tensor]] = [[] for _ in Tensors._fields]
    rows = []
    for i, (shape, down, across, sides) in enumerate(shapes):
        m, n = (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
        nl, nr, tiles = -(-m // down), -(-n // across), down * across
        second = rule.rotate or rule.graft == ADAM or not sides
        averages = [reference.pack(x.mT @ x / 4) for x in (normal(tiles, 4, nl), normal(tiles, 4, nr))]
        roots = [normal(tiles, k, k) + 3 * math.sqrt(k) * torch.eye(k, dtype=F64) for k in (nl, nr)]
        if rule.rotate:
            roots = [torch.linalg.qr(x).Q for x in roots]
        else:
            roots = [(x + x.mT) / 2 for x in roots]
        has = [s in sides for s in "lr"]
        state = [normal(*shape), normal(*shape).square() if second else None]
        state += [x if h else None for x, h in zip(averages, has, strict=True)]
        state += [x if h else None for x, h in zip(roots, has, strict=True)]
        made = [normal(*shape).to(dtype), normal(*shape).to(dtype)]
        made += [(torch.empty(0, dtype=F64) if x is None else x).to(storage) for x in state]
        made.append(torch.tensor(float(3 + i)))
        for members, x in zip(lists, made, strict=True):
            members.append(x)
        rows.append((m, n, down, across, n, 1))
    return Tensors(*lists), torch.tensor(rows)


def run(
    backend: Any, given: Tensors, layout: Tensor, rule: Rule, phases: int = GRAMS | APPLY, lr: Any = 1e-2,
    device: str | torch.device = "cpu", order: str = "rows", **options: Any,
) -> tuple[Tensors, int]:  # fmt: skip
    """Step copies on a device; what they became, on the CPU and contiguous, and how many tiles were skipped."""
    guard = Guarded(device)
    copies = Tensors(*([guard(x, order if i < 2 else "rows") for x in members] for i, members in enumerate(given)))
    layout = layout.clone()
    for row, p in zip(layout, copies.params, strict=True):
        if p.dim() == 2:
            row[4], row[5] = p.stride(0), p.stride(1)
    before = [x.clone() for members in (copies.grads, *copies[6:]) for x in members]
    skipped = torch.tensor(5, device=device)
    backend.step(copies, layout, lr, rule, phases, skipped, **options)
    guard.check()
    for x, old in zip((x for members in (copies.grads, *copies[6:]) for x in members), before, strict=True):
        assert torch.equal(x.nan_to_num(9.0), old.nan_to_num(9.0)), "an input was written"
    return Tensors(*([x.cpu().contiguous() for x in members] for members in copies)), int(skipped) - 5


def widened(given: Tensors) -> Tensors:
    """The same in float64."""
    return Tensors(*([x.double() if i < 8 else x for x in members] for i, members in enumerate(given)))


def bounds(
    given: Tensors, layout: Tensor, rule: Rule, lr: float, dtype: torch.dtype, storage: torch.dtype
) -> list[list[Tensor]]:
    """How far params, exp_avg, exp_avg_sq, left and right of a backend may be from those of the reference.

    With u the unit of the arithmetic, a sum of k products has an error of k u times the sum of their absolute values
    (Higham, Accuracy and Stability, 3.5), and a rounding to storage adds its unit times the result.
    """
    exact, _ = run(reference, widened(given), layout, rule, lr=lr)
    store = 0.0 if storage is arithmetic(dtype) else unit(storage)
    keep = 0.0 if dtype is arithmetic(dtype) else unit(dtype)
    u = unit(arithmetic(dtype))
    found = [_bounds_of(given, exact, layout, rule, lr, k, u, store, keep) for k in range(len(layout))]
    return [list(members) for members in zip(*found, strict=True)]


def _bounds_of(
    given: Tensors, exact: Tensors, layout: Tensor, rule: Rule, lr: float, k: int, u: float, store: float, keep: float
) -> list[Tensor]:
    m, n, down, across = layout[k, :4].tolist()

    def tiles(x: Tensor) -> Tensor:
        return reference.cut(x.double().reshape(m, n).abs(), down, across)

    r, c = -(-m // down), -(-n // across)
    g, w = tiles(given.grads[k]), tiles(given.params[k])
    left, right = (
        torch.where(real, root[k].double().abs(), 0.0) if root[k].numel() else root[k].double()
        for root, real in (
            (given.left_root, reference._real(m, down, CPU).repeat_interleave(across, 0)),
            (given.right_root, reference._real(n, across, CPU).repeat(down, 1, 1)),
        )
    )
    avg = tiles(given.exp_avg[k]) * rule.beta1 + (1 - rule.beta1) * g
    avg_bound = (4 * u + store) * avg

    def times(x: Tensor, a: Tensor = left, b: Tensor = right) -> Tensor:
        x = a @ x if a.numel() else x
        return x @ b if b.numel() else x

    transposed = (left.mT if left.numel() else left, right)
    size = u * (r + c + 12)
    t = float(given.step[k])
    c1, c2 = 1 - rule.beta1**t, 1 - rule.beta2**t
    sq_bound = torch.empty(0)
    if given.exp_avg_sq[k].numel():
        old = tiles(given.exp_avg_sq[k])
        if rule.rotate and (left.numel() or right.numel()):
            # G' has an error of `size` |Q_l|^T |G| |Q_r|, its square of twice |G'| times that and its own square.
            turned = times(g, *transposed)
            sq_bound = 6 * u * old + (1 - rule.beta2) * (6 * u + 2 * size) * turned**2
        else:
            sq_bound = 6 * u * (old + g**2)
        sq_bound = sq_bound + store * tiles(exact.exp_avg_sq[k])
    # The step is taken apart again from the parameters of two calls that differ in weight decay alone: none.
    plain = rule._replace(weight_decay=0.0)
    moved = _step_of(given, layout, plain, k)
    p = reference.cut(moved.reshape(m, n), down, across)
    if rule.rotate and (left.numel() or right.numel()):
        v = tiles(exact.exp_avg_sq[k])
        root = (v / c2).sqrt() + rule.eps
        m_turned, m_error = times(avg, *transposed) / c1, size * times(avg, *transposed) / c1
        # A = M' / root: the error of V enters by half its relative size.
        a_error = m_error / root + m_turned / root * (10 * u + sq_bound / (2 * v).clamp(min=1e-300))
        step_bound = times(a_error + size * m_turned / root, left, right.mT if right.numel() else right)
    elif left.numel() or right.numel():
        raw = times(avg) / c1
        error = size * raw
        if rule.graft == NONE:
            step_bound = error
        else:
            # scale = |N| / |P|: relative to |P|, |P|'s own error is at most |error|; |N| has (entries + 12) u.
            signed = _raw(given, layout, plain, k)
            norm = signed.square().sum((1, 2), keepdim=True).sqrt()
            length = p.square().sum((1, 2), keepdim=True).sqrt()
            ratio = length / norm.clamp(min=1e-300)
            relative = error.square().sum((1, 2), keepdim=True).sqrt() / norm.clamp(min=1e-300) + 40 * u
            step_bound = ratio * error + p.abs() * relative * 1.1
    else:
        step_bound = p.abs() * 24 * u + size * p.abs()
    w_new = tiles(exact.params[k])
    w_bound = 4 * u * (w + w_new + lr * p.abs()) + lr * step_bound * 1.01 + keep * w_new

    def back(x: Tensor) -> Tensor:
        return reference.join(x, m, n, down, across) if x.numel() else x

    out = [back(w_bound), back(avg_bound), back(sq_bound)]
    for packed, product, terms in ((given.left[k], g @ g.mT, c), (given.right[k], g.mT @ g, r)):
        sums = packed.double().abs() + (reference.pack(product) if packed.numel() else 0.0)
        out.append(((terms + 6) * u + store) * sums)
    return out


def _only(given: Tensors, k: int) -> Tensors:
    return Tensors(*([members[k].clone()] for members in widened(given)))


def _step_of(given: Tensors, layout: Tensor, rule: Rule, k: int) -> Tensor:
    """The step P of one tensor, by the reference: what parameters of zero become at lr = -1."""
    one = _only(given, k)
    one.params[0].zero_()
    reference.step(one, layout[k : k + 1], -1.0, rule, APPLY, torch.zeros((), dtype=torch.int64))
    return one.params[0]


def _raw(given: Tensors, layout: Tensor, rule: Rule, k: int) -> Tensor:
    """The step before it is grafted, in tiles."""
    m, n, down, across = layout[k, :4].tolist()
    return reference.cut(_step_of(given, layout, rule._replace(graft=NONE), k).reshape(m, n), down, across)


def compare(
    backend: Any, dtype: torch.dtype, storage: torch.dtype, rule: Rule, device: Any = "cpu", order: str = "rows",
    seed: int = 0, shapes: Any = SHAPES, lr: Any = 1e-2, **options: Any,
) -> None:  # fmt: skip
    """A step of all shapes within the bounds."""
    given, layout = tensors(dtype, storage, rule, seed, shapes)
    got, skipped = run(backend, given, layout, rule, device=device, order=order, lr=lr, **options)
    right, _ = run(reference, widened(given), layout, rule, lr=float(lr))
    assert skipped == 0
    limits = bounds(given, layout, rule, float(lr), dtype, storage)
    for name, limit in zip(("params", "exp_avg", "exp_avg_sq", "left", "right"), limits, strict=True):
        for k, (x, y, most) in enumerate(zip(getattr(got, name), getattr(right, name), limit, strict=True)):
            error = (x.double() - y).abs().flatten()
            excess = (error - most.flatten().abs()).max() if x.numel() else torch.tensor(-1.0)
            assert excess <= 0, f"{name}[{k}], {layout[k].tolist()}: beyond the bound by {float(excess):.3g}"


def fixed_length(backend: Any, device: Any = "cpu") -> None:
    """A step that is grafted to "rms" has that root mean square in every tile; with "sgd" it is as long as M^."""
    for rule in (RULES["rms"], RULES["sgd"]):
        given, layout = tensors(F64, F64, rule, 1, SHAPES[1:2])
        given.params[0].zero_()
        got, _ = run(backend, given, layout, rule._replace(weight_decay=0.0), lr=-1.0, device=device)
        p = reference.cut(got.params[0], 2, 1)
        sizes = torch.tensor([49.0 * 64, 48 * 64], dtype=F64)
        if rule.graft == RMS:
            want = FIXED_RMS * sizes.sqrt()
        else:
            want = reference.cut(got.exp_avg[0], 2, 1).square().sum((1, 2)).sqrt() / (1 - 0.9 ** float(given.step[0]))
        torch.testing.assert_close(p.square().sum((1, 2)).sqrt(), want, rtol=1e-12, atol=0)


def bad_tiles(backend: Any, dtype: torch.dtype, rule: Rule, device: Any = "cpu", **options: Any) -> None:
    """Tiles with a gradient that is not finite stay as they are and are counted; all others are as without it."""
    given, layout = tensors(dtype, arithmetic(dtype), rule, 2)
    clean, _ = run(backend, given, layout, rule, device=device, **options)
    k = 6  # (70, 130) in 3 x 3 tiles
    given.grads[k][40, 3], given.grads[k][2, 129], given.grads[10][7] = math.nan, math.inf, -math.inf
    if dtype is not F16:
        given.grads[0][0, 0] = 1e38 if dtype is not F64 else 1e300  # whose square is not finite
    got, skipped = run(backend, given, layout, rule, device=device, **options)
    assert skipped == (3 if dtype is F16 else 4)
    bad = torch.zeros(9, dtype=torch.bool)
    bad[3], bad[2] = True, True  # rows 24.., columns 0..43; rows 0..23, columns 87..
    for name in ("params", "exp_avg", "exp_avg_sq"):
        for j, (x, old, new) in enumerate(
            zip(getattr(got, name), getattr(given, name), getattr(clean, name), strict=True)
        ):
            if j == k and x.numel():
                cuts = [reference.cut(y.double(), 3, 3) for y in (x, old, new)]
                assert torch.equal(cuts[0][bad], cuts[1][bad])
                assert torch.equal(cuts[0][~bad], cuts[2][~bad])
            else:
                assert torch.equal(x, old if j == 10 or (j == 0 and dtype is not F16) else new)
    for name in ("left", "right"):
        x, old, new = (getattr(y, name)[k] for y in (got, given, clean))
        assert torch.equal(x[bad], old[bad])
        assert torch.equal(x[~bad], new[~bad])


def bad_steps(backend: Any, device: Any = "cpu", **options: Any) -> None:
    """A root that is not finite costs the step of its tile, and no more."""
    given, layout = tensors(F32, F32, RULE, 3, SHAPES[:2])
    clean, _ = run(backend, given, layout, RULE, device=device, **options)
    given.left_root[1][1, 3, 3] = math.nan
    got, skipped = run(backend, given, layout, RULE, device=device, **options)
    assert skipped == 1
    for name in ("params", "exp_avg", "exp_avg_sq"):
        x, old, new = (getattr(y, name)[1] for y in (got, given, clean))
        assert torch.equal(x[49:], old[49:])
        assert torch.equal(x[:49], new[:49])
    assert torch.equal(got.left[1], clean.left[1])
    assert torch.equal(got.params[0], clean.params[0])


def two_phases(backend: Any, dtype: torch.dtype, rule: Rule, device: Any = "cpu", **options: Any) -> None:
    """GRAMS and then APPLY are, bit for bit, the two in one; alone, each leaves alone what is the other's."""
    given, layout = tensors(dtype, arithmetic(dtype), rule, 4)
    both, _ = run(backend, given, layout, rule, device=device, **options)
    first, _ = run(backend, given, layout, rule, GRAMS, device=device, **options)
    then, _ = run(backend, first, layout, rule, APPLY, device=device, **options)
    for name in ("params", "exp_avg", "exp_avg_sq", "left", "right"):
        for x, y, z, old in zip(*(getattr(t, name) for t in (both, then, first, given)), strict=True):
            assert torch.equal(x, y)
            if name not in ("left", "right"):
                assert torch.equal(z, old)
            elif x.numel():
                assert not torch.equal(z, old)


def zeros(backend: Any, dtype: torch.dtype, rule: Rule, device: Any = "cpu", **options: Any) -> None:
    """Without gradients and momenta nothing moves, and averages shrink."""
    given, layout = tensors(dtype, arithmetic(dtype), rule, 5)
    for name in ("grads", "exp_avg", "exp_avg_sq"):
        for x in getattr(given, name):
            x.zero_()
    got, skipped = run(backend, given, layout, rule._replace(weight_decay=0.0), device=device, **options)
    assert skipped == 0
    for x, old in zip(got.params, given.params, strict=True):
        assert torch.equal(x, old)
    for k, (x, old) in enumerate(zip(got.left, given.left, strict=True)):
        if x.numel():
            m, _, down, across = layout[k, :4].tolist()
            real = reference.pack(reference._real(m, down, x.device).repeat_interleave(across, 0))
            want = torch.where(real, rule.beta_gram * old.double(), old.double())
            torch.testing.assert_close(x, want.to(x.dtype))


def without_eps(backend: Any, dtype: torch.dtype, rule: Rule, device: Any = "cpu", **options: Any) -> None:
    """eps = 0: what has never had a gradient stays, and nothing is skipped; all else is as in the reference."""
    rule = rule._replace(eps=0.0, weight_decay=0.0)
    given, layout = tensors(dtype, arithmetic(dtype), rule, 6)
    for name in ("grads", "exp_avg", "exp_avg_sq"):
        for k, x in enumerate(getattr(given, name)):
            turned = rule.rotate and (given.left_root[k].numel() or given.right_root[k].numel())
            if x.numel() > 1 and not turned:  # rows of zeros; of a turned one no entry would be zero, but rounding
                x.view(x.shape[0], -1)[: (x.shape[0] + 1) // 2] = 0
            if k == 3:  # a tile of them
                x.zero_()
    got, skipped = run(backend, given, layout, rule, device=device, **options)
    right, none = run(reference, widened(given), layout, rule)
    assert skipped == none == 0
    for k, (x, y, old) in enumerate(zip(got.params, right.params, given.params, strict=True)):
        moved = (y - old.double()).abs().max()
        most = 2e3 * unit(arithmetic(dtype)) * moved + 4 * unit(dtype) * y.abs().max()
        assert bool(x.isfinite().all())
        assert (x.double() - y).abs().max() <= most
        if not (given.left_root[k].numel() or given.right_root[k].numel()):
            half = (x.shape[0] + 1) // 2 if x.numel() > 1 else 0
            assert torch.equal(x[:half], old[:half]) if half else True


def newton_schulz(
    backend: Any, batch: int, m: int, n: int, dtype: torch.dtype, device: Any = "cpu", **options: Any
) -> None:
    """Orthogonalised matrices: singular values as the polynomial says, and near the reference."""
    draw = torch.Generator().manual_seed(m * n + batch)
    x = torch.randn(batch, m, n, generator=draw, dtype=F64).to(dtype)
    out = torch.full(x.shape, math.nan, dtype=dtype, device=device)
    want = torch.empty(batch, m, n, dtype=F64)
    a, b, c = 3.4445, -4.7750, 2.0315
    backend.newton_schulz(x.to(device), 5, a, b, c, 1e-7, out, **options)
    reference.newton_schulz(x.double(), 5, a, b, c, 1e-7, want)
    s = torch.linalg.svdvals(x.double())
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(torch.linalg.svdvals(want).sort(-1).values, s.sort(-1).values, rtol=0, atol=1e-9)
    # A step multiplies an error by at most max |f'| = a (f' = a + 3 b s^2 + 5 c s^4 on [0, 1.2]), and adds the rounding
    # of three products with factors of norm at most |a| + |b| + |c| and entries that k = min(m, n) terms sum to.
    k = min(m, n)
    size = unit(arithmetic(dtype)) * (a + abs(b) + c) * (2 * k + max(m, n) + 20)
    most = sum(size * a**i for i in range(5)) * 1.2 + (unit(dtype) * 1.2 if dtype is not arithmetic(dtype) else 0)
    error = torch.linalg.matrix_norm(out.cpu().double() - want, ord="fro").max()
    assert error <= most * math.sqrt(k), f"{float(error):.3g} of {most * math.sqrt(k):.3g}"


def odd_matrices(backend: Any, device: Any = "cpu") -> None:
    """Zero stays zero, tiny and huge ones are scaled, and one that is not finite leaves its neighbours alone."""
    x = torch.randn(6, 12, 20, generator=torch.Generator().manual_seed(0))
    whole, out = torch.empty_like(x, device=device), torch.empty_like(x, device=device)
    args = (5, 3.4445, -4.7750, 2.0315, 1e-30)
    backend.newton_schulz(x.to(device), *args, whole)
    y = x.clone()
    y[1] = 0
    y[2] *= 2.0**-70  # exactly
    y[3] *= 2.0**100
    y[4, 3, 3] = math.nan
    backend.newton_schulz(y.to(device), *args, out)
    whole, out = whole.cpu(), out.cpu()
    assert torch.equal(out[1], torch.zeros(12, 20))
    torch.testing.assert_close(out[2:4], whole[2:4], rtol=1e-4, atol=1e-5)
    assert bool(out[4].isnan().all())
    assert torch.equal(out[[0, 5]], whole[[0, 5]])


def gram_matrices(batch: int, n: int, rank: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Symmetric matrices of a rank with eigenvalues over four decades; what is above the diagonal is poison."""
    draw = torch.Generator().manual_seed(seed + 1000 * n + rank)
    g = torch.randn(batch, n, rank, generator=draw, dtype=F64) * torch.logspace(0, -2, rank, dtype=F64)
    a = (g @ g.mT).to(dtype)
    upper = torch.ones(n, n, dtype=torch.bool).triu(1)
    return torch.where(upper, torch.tensor(math.nan, dtype=dtype), a)


def whole(a: Tensor) -> Tensor:
    """The symmetric matrices of these lower triangles, in float64."""
    return a.double().tril() + a.double().tril(-1).mT


def damped(a: Tensor, damping: float) -> Tensor:
    """A + damping |A| I, from the eigenvalues."""
    w = torch.linalg.eigvalsh(whole(a)).abs()
    top = w.amax(-1, keepdim=True)
    size = top * (w / top).pow(64).sum(-1, keepdim=True).pow(1 / 64)
    return whole(a) + damping * size[..., None] * torch.eye(a.shape[-1], dtype=F64)


def newton_inv_root(
    backend: Any, batch: int, n: int, rank: int, p: int, dtype: torch.dtype, device: Any = "cpu", **options: Any
) -> None:
    """Roots of Gram matrices of any rank within the bound of the docstring of `ops.newton_inv_root`.

    The damping is far above what rounding to their dtype makes of their zero eigenvalues.
    """
    damping = 1e-3 if dtype is arithmetic(dtype) else 0.1
    a = gram_matrices(batch, n, rank, dtype)
    out = torch.full(a.shape, math.nan, dtype=dtype, device=device)
    info = torch.full((batch,), 99, dtype=torch.int32, device=device)
    u = unit(arithmetic(dtype))
    steps = 40
    backend.newton_inv_root(a.to(device), p, damping, steps, math.sqrt(u / 8), out, info, **options)
    got = out.cpu().double()
    assert info.tolist() == [0] * batch
    assert torch.equal(got, got.mT)
    w, q = torch.linalg.eigh(damped(a, damping))
    want = (q * w.pow(-1 / p)[:, None, :]) @ q.mT
    k = 1 + 1 / damping
    keep = 0.0 if dtype is arithmetic(dtype) else unit(dtype) * math.sqrt(n)  # of the 2-norm, by rows
    # An error of n u |A| in A, and those of A + damping |A| I, of products and of M at each step.
    most = n * u * (4 * k + 6 * steps) + keep + 64 * 2.0**-53 * k
    error = torch.linalg.matrix_norm(got - want, ord=2) / torch.linalg.matrix_norm(want, ord=2)
    assert error.max() <= most, f"{float(error.max()):.3g} of {most:.3g}"


def odd_roots(backend: Any, device: Any = "cpu") -> None:
    """Zero, tiny, huge, not finite, indefinite, and not there yet: never NaN, each with its code, none in another's."""

    def root(a: Tensor, steps: int = 40) -> tuple[Tensor, Tensor]:
        out = torch.full(a.shape, math.nan, device=device)
        info = torch.full((len(a),), 99, dtype=torch.int32, device=device)
        backend.newton_inv_root(a.to(device), 2, 1e-3, steps, 8.6e-5, out, info)
        return out.cpu(), info.cpu()

    a = gram_matrices(8, 12, 12, F32)
    clean, codes = root(a)
    assert codes.tolist() == [0] * 8
    b = a.clone()
    b[1] = 0
    b[2] *= 2.0**-60
    b[3] *= 2.0**60
    b[4, 3, 3] = math.nan
    b[5, 7, 2] = math.inf
    b[6] = torch.diag(torch.tensor([1.0, -0.5] + [0.25] * 10))
    got, codes = root(b)
    assert bool(got.isfinite().all())
    assert codes[[0, 1, 2, 3, 4, 5, 7]].tolist() == [0, 0, 0, 0, -1, -1, 0]
    assert codes[6] > 0
    assert torch.equal(got[[0, 7]], clean[[0, 7]])
    assert not got[[1, 4, 5]].any()
    # A power of four in A is one of two in its root, exactly.
    assert torch.equal(got[2], clean[2] * 2.0**30)
    assert torch.equal(got[3], clean[3] * 2.0**-30)
    early, codes = root(a, 3)
    assert codes.tolist() == [3] * 8
    assert bool(early.isfinite().all())
    assert not torch.equal(early, clean)
