"""What the tests of this family share: families of matrices, LAPACK's test ratios, bad blocks, poisoned outputs.

The families follow the test matrices of LAPACK (DCHKPO, DCHKGE: random spectra up to a condition number of 0.1 / eps,
scaled near under- and overflow) and Higham's collection; the ratios and their threshold are those of DPOT03, DGET02,
DSYT21 and DSTT21. Every family is made in float64 and rounded to the dtype under test.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

#: LAPACK's own threshold for its test ratios (the line THRESH of dtest.in, 30 in the newer files).
THRESHOLD = 30.0
REAL = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)
DTYPES = REAL + HALF


def generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """C of the contract."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def largest_condition(n: int, dtype: torch.dtype) -> float:
    """LAPACK's 0.1 / eps where Cholesky cannot break down: below 1 / (n (n + 1) eps).

    Higham, Theorem 10.7: Cholesky runs to completion when lambda_min > n gamma_{n+1} of the matrix scaled to a unit
    diagonal; with u = eps / 2 the bound leaves a factor of two for rounding the matrix itself.
    """
    eps = torch.finfo(dtype).eps
    return max(1.0, min(0.1, 1.0 / (n * (n + 1))) / eps)


def orthogonal(batch: int, n: int, *key: object) -> Tensor:
    return torch.linalg.qr(torch.randn(batch, n, n, generator=generator("q", n, *key), dtype=torch.float64))[0]


def spectrum(kind: str, n: int, condition: float) -> Tensor:
    """n values from 1 / condition to 1: geometric, arithmetic, or clustered (all 1 but one)."""
    low = 1.0 / condition
    if kind == "geometric":
        return torch.logspace(math.log10(low), 0, n, dtype=torch.float64)
    if kind == "arithmetic":
        return torch.linspace(low, 1, n, dtype=torch.float64)
    values = torch.ones(n, dtype=torch.float64)
    values[0] = low
    return values


def random_spd(
    n: int, dtype: torch.dtype = torch.float32, batch: int = 3, condition: float = 100.0, kind: str = "geometric"
) -> Tensor:
    """Q diag(spectrum) Q^T, exactly symmetric."""
    q = orthogonal(batch, n, "spd", kind, condition)
    a = (q * spectrum(kind, n, condition)) @ q.mT
    return ((a + a.mT) / 2).to(dtype)


def random_symmetric(n: int, dtype: torch.dtype = torch.float32, batch: int = 3, condition: float = 100.0) -> Tensor:
    """As `random_spd`, geometric, with alternating signs: indefinite for n >= 2."""
    q = orthogonal(batch, n, "symmetric", condition)
    signs = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
    a = (q * (signs * spectrum("geometric", n, condition))) @ q.mT
    return ((a + a.mT) / 2).to(dtype)


def random_general(
    n: int, dtype: torch.dtype = torch.float32, batch: int = 3, condition: float = 100.0, kind: str = "geometric"
) -> Tensor:
    """U diag(spectrum) V^T."""
    u, v = orthogonal(batch, n, "u", kind, condition), orthogonal(batch, n, "v", kind, condition)
    return ((u * spectrum(kind, n, condition)) @ v.mT).to(dtype)


def scales(dtype: torch.dtype) -> tuple[float, float]:
    """Powers of two near under- and overflow that leave room for the inverse of a block of condition 100."""
    exponent = 900 if dtype is torch.float64 else 100
    return 2.0**-exponent, 2.0**exponent


def badly_scaled(n: int, dtype: torch.dtype, low: float = -5.0, high: float = math.log10(2e3)) -> tuple[Tensor, Tensor]:
    """(D C D, d): a well conditioned C between D = diag(d), d = 10^low .. 10^high in shuffled order."""
    order = torch.randperm(n, generator=generator("scaled", n))
    d = torch.logspace(low, high, n, dtype=torch.float64)[order] if n > 1 else torch.tensor([2e3], dtype=torch.float64)
    c = random_spd(n, torch.float64, 2, 10.0, "arithmetic")
    return (c * d[:, None] * d).to(dtype), d


def spd_families(n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name -> (B, n, n): blocks that are positive definite in `dtype`, however computed."""
    worst = largest_condition(n, dtype)
    middle = min(worst, math.sqrt(0.1 / torch.finfo(dtype).eps))
    small, big = scales(dtype)
    low_rank = torch.randn(3, n, max(1, n // 4), generator=generator("low rank", n), dtype=torch.float64)
    families = {
        "well conditioned": random_spd(n, dtype, 3, min(2.0, worst)),
        "near underflow": random_spd(n, dtype, 3, min(100.0, worst)) * small,
        "near overflow": random_spd(n, dtype, 3, min(100.0, worst)) * big,
        "diag(1e-5..2e3)": badly_scaled(n, dtype)[0],
        "low rank plus damping": (low_rank @ low_rank.mT / n + torch.eye(n) / min(1e3, worst)).to(dtype),
        "identity": torch.eye(n, dtype=dtype)[None],
        "diagonal": torch.diag(torch.logspace(-3, 3, n, dtype=torch.float64)).to(dtype)[None],
    }
    for kind in ("geometric", "arithmetic", "clustered"):
        families[f"{kind}, middle"] = random_spd(n, dtype, 3, middle, kind)
        families[f"{kind}, worst"] = random_spd(n, dtype, 3, worst, kind)
    return families


def permutations(n: int, dtype: torch.dtype, batch: int = 4) -> Tensor:
    rng = generator("permutation", n)
    return torch.stack([torch.eye(n, dtype=dtype)[torch.randperm(n, generator=rng)] for _ in range(batch)])


def kahan(n: int, theta: float = 1.2) -> Tensor:
    """Upper triangular, ill-conditioned without a small entry on the diagonal (Higham, section 8.3)."""
    s, c = math.sin(theta), math.cos(theta)
    rows = torch.tensor([s**i for i in range(n)], dtype=torch.float64)[:, None]
    return rows * (torch.eye(n, dtype=torch.float64) - c * torch.ones(n, n, dtype=torch.float64).triu(1))


def frank(n: int) -> Tensor:
    """Upper Hessenberg of determinant 1 with ill-conditioned small eigenvalues: min(i, j) reversed."""
    i = torch.arange(n, dtype=torch.float64)
    return (n - torch.maximum(i[:, None], i)).triu(-1)


def vandermonde(n: int) -> Tensor:
    """Powers of n equispaced points of [-1, 1]."""
    points = torch.linspace(-1, 1, n, dtype=torch.float64)
    return points[:, None] ** torch.arange(n)


def general_families(n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name -> (B, n, n): blocks for partial pivoting, none of them exactly singular."""
    small, big = scales(dtype)
    families = {
        "well conditioned": random_general(n, dtype, 3, 2.0),
        "near underflow": random_general(n, dtype, 3, 100.0) * small,
        "near overflow": random_general(n, dtype, 3, 100.0) * big,
        "permutations": permutations(n, dtype),
        "gaussian": torch.randn(4, n, n, generator=generator("gaussian", n), dtype=torch.float64).to(dtype),
        "kahan": kahan(n).to(dtype)[None],
        "frank": frank(n).to(dtype)[None],
        "vandermonde": vandermonde(n).to(dtype)[None],
    }
    if math.factorial(n - 1) > torch.finfo(dtype).max / n:  # an entry of the inverse
        del families["frank"]
    for kind in ("geometric", "arithmetic", "clustered"):
        families[f"{kind}, middle"] = random_general(n, dtype, 3, math.sqrt(0.1 / torch.finfo(dtype).eps), kind)
        families[f"{kind}, worst"] = random_general(n, dtype, 3, 0.1 / torch.finfo(dtype).eps, kind)
    return families


def symmetric_families(n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name -> (B, n, n): symmetric blocks for eigensolvers, repeated eigenvalues included."""
    small, big = scales(dtype)
    q = orthogonal(2, n, "repeated")
    values = torch.where(torch.arange(n) % 3 == 0, 2.0, -1.0).double()
    repeated = (q * values) @ q.mT
    return {
        "geometric": random_symmetric(n, dtype, 3, 1e3),
        "worst": random_symmetric(n, dtype, 3, 0.1 / torch.finfo(dtype).eps),
        "positive": random_spd(n, dtype, 3, 100.0, "arithmetic"),
        "clustered": random_spd(n, dtype, 3, 10.0, "clustered"),
        "repeated": ((repeated + repeated.mT) / 2).to(dtype),
        "near underflow": random_symmetric(n, dtype, 3, 100.0) * small,
        "near overflow": random_symmetric(n, dtype, 3, 100.0) * big,
        "identity": torch.eye(n, dtype=dtype)[None],
        "zero": torch.zeros(1, n, n, dtype=dtype),
        "ones": torch.ones(1, n, n, dtype=dtype),
        "diagonal": torch.diag(torch.linspace(-1, 1, n, dtype=torch.float64)).to(dtype)[None],
        "wilkinson": wilkinson(n).to(dtype)[None],
        "badly scaled": badly_scaled(n, dtype)[0],
    }


def wilkinson(n: int) -> Tensor:
    """Tridiagonal with pairs of nearly equal eigenvalues."""
    d = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2).abs()
    off = torch.ones(n - 1, dtype=torch.float64)
    return torch.diag(d) + torch.diag(off, 1) + torch.diag(off, -1)


def hilbert(n: int) -> tuple[Tensor, Tensor]:
    """(A, A^-1) in float64, both exact: the Hilbert matrix times lcm(1..2n-1) has integer entries.

    A is exact in float32 for n <= 9 and in float64 for n <= 20; `hilbert_sizes` says how far it is positive definite.
    """
    multiple = math.lcm(*range(1, 2 * n))
    a = torch.tensor([[multiple // (i + j + 1) for j in range(n)] for i in range(n)], dtype=torch.float64)
    from scipy.linalg import invhilbert  # which a machine that only tests a GPU need not have

    return a, torch.from_numpy(np.asarray(invhilbert(n), dtype=np.float64)) / multiple


def hilbert_sizes(dtype: torch.dtype) -> range:
    """Orders n whose Hilbert matrix has a condition number below 0.1 / eps: 5 in float32, 11 in float64."""
    return range(1, 6) if dtype is torch.float32 else range(1, 12)


def norm1(a: Tensor) -> Tensor:
    """||A||_1, the largest column sum, per block."""
    return a.abs().sum(-2).amax(-1)


def _reciprocal_power(x: Tensor) -> Tensor:
    """A power of two that brings x near 1, from its bits."""
    return ((1023 - torch.frexp(x).exponent.clamp(-1000, 1000).long()) << 52).view(torch.float64)


def _product_residual(a: Tensor, x: Tensor) -> Tensor:
    return norm1(torch.eye(a.shape[-1], dtype=torch.float64) - a @ x)


def inverse_ratio(a: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> float:
    """max ||I - A X||_1 / (n ||A||_1 ||X||_1 eps) over the batch (LAPACK's DPOT03), eps of `dtype` (of `a` if None).

    Computed in float64 after scaling both by powers of two, so that the norms neither over- nor underflow.
    """
    eps = torch.finfo(dtype or a.dtype).eps
    a, x = a.double().cpu(), x.double().cpu()
    shift = _reciprocal_power(norm1(a))[:, None, None]
    a, x = a * shift, x / shift
    ratio = _product_residual(a, x) / (a.shape[-1] * norm1(a) * norm1(x) * eps)
    return float("inf") if not torch.isfinite(ratio).all() else float(ratio.max())


def solve_ratio(a: Tensor, x: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> float:
    """max ||B - A X||_1 / (||A||_1 ||X||_1 eps) over columns and batch (LAPACK's DGET02 and DPOT02)."""
    eps = torch.finfo(dtype or a.dtype).eps
    a, x, b = a.double().cpu(), x.double().cpu(), b.double().cpu()
    shift = _reciprocal_power(norm1(a))[:, None, None]
    a, x = a * shift, x / shift
    residual = (b - a @ x).abs().sum(-2)
    size = norm1(a)[:, None] * x.abs().sum(-2) * eps
    ratio = torch.where(residual == 0, 0.0, residual / size)
    return float("inf") if not torch.isfinite(ratio).all() else float(ratio.max())


def orthogonality_ratio(v: Tensor, dtype: torch.dtype | None = None) -> float:
    """max ||I - V^T V||_1 / (n eps) over the batch (LAPACK's DDRVST)."""
    eps = torch.finfo(dtype or v.dtype).eps
    v = v.double().cpu()
    ratio = _product_residual(v.mT, v) / (v.shape[-1] * eps)
    return float("inf") if not torch.isfinite(ratio).all() else float(ratio.max())


def eigen_ratio(a: Tensor, w: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> float:
    """max ||A - V diag(w) V^T||_1 / (n ||A||_1 eps) over the batch (LAPACK's DDRVST), of the lower triangle of `a`."""
    eps = torch.finfo(dtype or a.dtype).eps
    a, w, v = mirrored(a.double().cpu()), w.double().cpu(), v.double().cpu()
    shift = _reciprocal_power(norm1(a))
    a, w = a * shift[:, None, None], w * shift[:, None]
    residual = norm1(a - (v * w[:, None, :]) @ v.mT)
    ratio = torch.where(residual == 0, 0.0, residual / (a.shape[-1] * norm1(a) * eps))
    return float("inf") if not torch.isfinite(ratio).all() else float(ratio.max())


def mirrored(a: Tensor) -> Tensor:
    """The symmetric matrix of the lower triangle."""
    return a.tril() + a.tril(-1).mT


class Bad(NamedTuple):
    """A block that has no result, and the code that says so."""

    name: str
    block: Tensor
    info: int


def _spoiled(n: int, dtype: torch.dtype, i: int, j: int, value: float, symmetric: bool) -> Tensor:
    a = (random_spd(n, dtype, 1, 10.0) if symmetric else random_general(n, dtype, 1, 10.0))[0]
    a[i, j] = value
    return a


def bad_spd(n: int, dtype: torch.dtype) -> list[Bad]:
    """Blocks that Cholesky refuses, with the index of the pivot.

    A non-finite entry (i, j) of the lower triangle spoils row i of the factor alone, so its pivot i is the first bad
    one; rows and columns of zeros leave a pivot of exactly 0, and so do two equal rows of ones.
    """
    cases = [Bad("zero", torch.zeros(n, n, dtype=dtype), 1), Bad("negative", -torch.eye(n, dtype=dtype), 1)]
    for k in sorted({0, n // 2, n - 1}):
        hole = random_spd(n, dtype, 1, 10.0)[0]
        hole[k], hole[:, k] = 0, 0
        cases.append(Bad(f"zero row {k}", hole, k + 1))
        down = torch.eye(n, dtype=dtype)
        down[k, k] = -1
        cases.append(Bad(f"negative pivot {k}", down, k + 1))
        for j in sorted({0, k}):
            for value in (math.nan, math.inf, -math.inf):
                cases.append(Bad(f"{value} at ({k}, {j})", _spoiled(n, dtype, k, j, value, True), k + 1))
    if n > 1:
        cases.append(Bad("ones", torch.ones(n, n, dtype=dtype), 2))
    return cases


def bad_general(n: int, dtype: torch.dtype) -> list[Bad]:
    """Blocks that LU refuses.

    A non-finite entry (i, j) stays in column j, in its row or in all that are left, so step j finds it.
    """
    cases = [Bad("zero", torch.zeros(n, n, dtype=dtype), 1)]
    for k in sorted({0, n // 2, n - 1}):
        hole = random_general(n, dtype, 1, 10.0)[0]
        hole[:, k] = 0
        cases.append(Bad(f"zero column {k}", hole, k + 1))
        for i in sorted({0, n - 1}):
            for value in (math.nan, math.inf, -math.inf):
                cases.append(Bad(f"{value} at ({i}, {k})", _spoiled(n, dtype, i, k, value, False), k + 1))
    if n > 1:
        cases.append(Bad("ones", torch.ones(n, n, dtype=dtype), 2))
    return cases


def bad_symmetric(n: int, dtype: torch.dtype) -> list[Bad]:
    """Blocks that have no eigenvalues: a non-finite entry in the lower triangle."""
    places = sorted({(0, 0), (n - 1, 0), (n - 1, n - 1), (n // 2, 0)})
    return [
        Bad(f"{value} at {place}", _spoiled(n, dtype, *place, value, True), -1)
        for place in places
        for value in (math.nan, math.inf, -math.inf)
    ]


def poisoned(*shape: int, dtype: torch.dtype, device: Any = None) -> Tensor:
    """An output that a kernel has to overwrite: NaN, or an impossible code for int32."""
    if dtype is torch.int32:
        return torch.full(shape, -(2**30) - 7, dtype=dtype, device=device)
    return torch.full(shape, math.nan, dtype=dtype, device=device)


# Calls of a backend module on poisoned outputs; every one returns what it wrote.


def run_inv(
    backend: ModuleType, a: Tensor, damping: float | Tensor | None = None, scaled: bool = False, spd: bool = True
) -> tuple[Tensor, Tensor]:
    out = poisoned(*a.shape, dtype=a.dtype, device=a.device)
    info = poisoned(len(a), dtype=torch.int32, device=a.device)
    backend.inv(a, damping, scaled, spd, out, info)
    return out, info


def run_solve(
    backend: ModuleType,
    a: Tensor,
    b: Tensor,
    damping: float | Tensor | None = None,
    scaled: bool = False,
    spd: bool = True,
) -> tuple[Tensor, Tensor]:
    out = poisoned(*b.shape, dtype=a.dtype, device=a.device)
    info = poisoned(len(a), dtype=torch.int32, device=a.device)
    backend.solve(a, b, damping, scaled, spd, out, info)
    return out, info


def run_eigh(backend: ModuleType, a: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    values = poisoned(*a.shape[:2], dtype=a.dtype, device=a.device)
    vectors = poisoned(*a.shape, dtype=a.dtype, device=a.device)
    info = poisoned(len(a), dtype=torch.int32, device=a.device)
    backend.eigh(a, values, vectors, info, basis)
    return values, vectors, info


def run_abs_inv(
    backend: ModuleType, a: Tensor, floor: float | Tensor, basis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    out = poisoned(*a.shape, dtype=a.dtype, device=a.device)
    info = poisoned(len(a), dtype=torch.int32, device=a.device)
    backend.abs_inv(a, floor, out, info, basis)
    return out, info


def run_inv_root(
    backend: ModuleType,
    a: Tensor,
    p: int,
    damping: float | Tensor | None = None,
    scaled: bool = False,
    clamped: bool = False,
    basis: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = poisoned(*a.shape, dtype=a.dtype, device=a.device)
    info = poisoned(len(a), dtype=torch.int32, device=a.device)
    backend.inv_root(a, p, damping, scaled, out, info, clamped, basis)
    return out, info


def semidefinite(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks for clamped roots: (a, fewest and most eigenvalues below zero that a solver may find).

    Gram matrices of every kind of rank, whose zero eigenvalues may be rounded to either side; nothing but zeros; what
    has no positive eigenvalue; and eigenvalues of both signs, none of them small.
    """
    rng = generator("semidefinite", n)
    a, least, most = [], [], []
    for rank in sorted({1, max(1, n // 4), n - 1 or 1, n}):
        g = torch.randn(n, rank, generator=rng, dtype=torch.float64)
        a.append(g @ g.mT / n)
        least.append(0)
        most.append(n - rank)
    q = orthogonal(1, n, "semidefinite")[0]
    signs = torch.where(torch.arange(n) % 3 == 0, -1.0, 2.0).double()
    below = int((signs < 0).sum())
    for x, k in ((torch.zeros(n, n), 0), (-torch.eye(n), n), ((q * signs) @ q.mT, below)):
        a.append(x.double())
        least.append(k)
        most.append(k)
    return mirrored(torch.stack(a).to(dtype)), torch.tensor(least), torch.tensor(most)


def check_clamped_roots(root: Callable[..., tuple[Tensor, Tensor]], n: int, dtype: torch.dtype) -> None:
    """root(a, p, damping) against eigenvectors of torch in float64.

    An eigenvalue may be wrong by 30 n eps ||A||, and the root moves by 1 / (p u^(1 + 1/p)) of that, u >= damping ||A||;
    twice for the vectors.
    """
    a, least, most = semidefinite(n, dtype)
    w, v = torch.linalg.eigh(mirrored(a.double()))
    size = w.abs().amax(-1)
    damping = torch.linspace(0.01, 0.1, len(a), dtype=compute_dtype(dtype))
    for p in (1, 2, 4):
        for amount in (0.02, damping):
            x, info = (y.cpu() for y in root(a, p, amount))
            each = amount.double() if isinstance(amount, Tensor) else torch.full((len(a),), amount, dtype=torch.float64)
            top = w[:, -1].clamp(min=0)
            u = w.clamp(min=0) + (each * top)[:, None]
            f = torch.where(u > 0, u ** (-1 / p), 0.0)
            want = (v * f[:, None, :]) @ v.mT
            assert torch.equal(x, x.mT)
            assert ((info >= least) & (info <= most)).all(), (info, least, most)
            none = top == 0
            assert not x[none].any()
            bound = 60 * n * torch.finfo(dtype).eps * size * (each * top) ** (-1 - 1 / p)
            error = (x.double() - want).abs().amax((1, 2))
            assert (error <= bound)[~none].all(), (p, error, bound)
