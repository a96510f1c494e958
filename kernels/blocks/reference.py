"""Batched small blocks in plain PyTorch: the definition that every other backend is tested against.

Every backend module of this family has `available`, `supports` and the five functions below, with these signatures. The
public functions of `secant.ops.blocks` check and allocate; what arrives here is valid:

* `a` is (B, n, n), B >= 1, 1 <= n <= 64 (of `eigh`, `abs_inv` and `inv_root` 128 where a module has an `EIGEN_N` that
  says so, as this one and `cpu`), of dtype T in {float32, float64, bfloat16, float16}. Each block is contiguous
  and row-major, strides (any, n, 1); the stride between blocks is free, 0 and more than n * n included. B n^2 may
  exceed 2^31: indices are 64-bit.
* `b` of `solve` is (B, n, k), k >= 1, of T: each (n, k) contiguous and row-major, the stride between them free.
* `out` is (B, n, n), of `solve` (B, n, k), of T and contiguous. It may be `a` itself (same address and strides), in
  `solve` also `b` itself; else it overlaps no input. `values` is (B, n) and `vectors` (B, n, n), of T; `info` is (B,),
  int32; all contiguous.
* The arithmetic dtype C is float64 for T = float64, else float32. Here everything is computed in float64 and rounded
  once at the end.
* `damping` is None, a number, or a tensor (B,) of C, contiguous, on the device. `scaled` False: the matrix is
  A + damping I; True: A + damping diag(A), that is a_ii (1 + damping). `floor` is a positive number or a tensor
  likewise.
* `spd` True: only the lower triangle of `a` is read. False: a general matrix, partial pivoting. `eigh`, `abs_inv` and
  `inv_root` read the lower triangle only.
* `basis` is None or (B, n, n) of T, laid out as `a`: orthonormal columns in which each block is nearly diagonal, as the
  eigenvectors of what it was before. It is a hint: what is computed stays within the same bounds, whatever it holds,
  and a backend may ignore it, as this one does.
* `p` is 1, 2 or 4. `clamped` of `inv_root` comes with a `damping` and without `scaled`.
* No function reads a value back to the host (on a GPU the sweeps below all run, however early the blocks converge),
  none allocates by values.

What every backend owes:

* The output of a block depends on that block and its damping alone, bitwise, wherever it stands in the batch and
  however big the batch is: tails run the same arithmetic. A bad block has NaN in the whole of its own output and its
  code in `info`, and leaves all others as they are without it.
* `inv` and `solve`: info is 0 or the 1-based index, in the order of elimination, of the first pivot that is not finite
  and positive (spd) or not finite and different from zero (general): LAPACK's potrf and getrf.
* spd: Cholesky or LDL^T after symmetric scaling by powers of two taken from the diagonal. That is exact and changes
  nothing but over- and underflow: 1e-30 I, 1e30 I and diag(1e-20..1e18) work in float32. A diagonal entry that is not
  finite and positive is not scaled. No jitter: 1e-8 I inverts to 1e8 I within 4 ulp. The inverse is exactly symmetric.
* general: LU or Gauss-Jordan with row pivoting. Among equal candidates the first of largest magnitude is taken; NaN
  counts as larger than anything, so that it is found. [[0, 1], [1, 0]] inverts to itself, exactly. The whole matrix may
  be scaled by a power of two.
* `eigh`: ascending values, vectors in columns, A v_j = w_j v_j; cyclic Jacobi, each block converging by itself; the
  block may be scaled by a power of two. (The CPU takes QL for large blocks, with the bounds of LAPACK's tests.) info is
  0; -1 where the block has a non-finite entry (LAPACKE's convention:
  argument 1 holds a NaN), with NaN outputs; k > 0 where k off-diagonal entries were still above the tolerance after the
  cap on sweeps (LAPACK's syev), with NaN outputs in `abs_inv` and `inv_root` and the best effort in `eigh`.
* `abs_inv`: V diag(1 / max(|w|, floor)) V^T. `inv_root`: V diag(w^(-1/p)) V^T of the damped block; where an eigenvalue
  is <= 0, NaN and info = how many are. Both exactly symmetric.
* `inv_root`, `clamped`: V diag(r) V^T, r_i = u_i^(-1/p), u_i = max(w_i, 0) + damping max(w_n, 0), and r_i = 0 where
  u_i = 0, as in a pseudoinverse: a block of zeros has the root 0. info is how many w_i are < 0, which takes no result
  away; -3 where the cap on sweeps was reached, with NaN.

Each loop below runs over rows or columns and treats the batch element by element, with operations that IEEE 754 rounds
to the last bit, without a matrix product, a sum or a decomposition of torch's: that is what makes a block's bits
independent of its neighbours here, of the processor, and of the BLAS that torch was built with.

References:
    Golub and Van Loan, Matrix Computations, 4th ed., Algorithms 3.4.1 (LU), 4.2.2 (Cholesky), section 8.5 (Jacobi).
    Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapters 9, 10 and 14.
    Anderson et al., LAPACK Users' Guide, 3rd ed., xPOTRF, xGETRF, xSYEV.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest n of `eigh`, `abs_inv` and `inv_root`.
EIGEN_N = 128

#: Sweeps after which a block is given up, as EISPACK and LAPACK cap QL iterations per eigenvalue: 6 to 10 are usual.
SWEEPS = 30


def available() -> str | None:
    """Return None when this backend can run here, else the reason why it cannot."""
    return None


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when blocks of this device and dtype are supported, else the reason why they are not."""
    return None


def _diagonal(a: Tensor) -> Tensor:
    return a.diagonal(dim1=-2, dim2=-1)


def _mirrored(a: Tensor) -> Tensor:
    """Return the symmetric matrix whose lower triangle is that of `a`; the upper one may hold anything."""
    return a.tril() + a.tril(-1).mT


def _damped(a: Tensor, damping: float | Tensor | None, scaled: bool) -> Tensor:
    """Compute A + damping I or A + damping diag(A), as a copy in float64."""
    a = a.to(torch.float64, copy=True)
    if damping is not None:
        d = _diagonal(a)
        shift = damping.double()[:, None] if isinstance(damping, Tensor) else damping
        d.mul_(1.0 + shift) if scaled else d.add_(shift)
    return a


def _exponent(x: Tensor) -> Tensor:
    """e with 2^(e-1) <= |x| < 2^e; 0 where x is zero or not finite, and within the exponents that have inverses."""
    e = torch.frexp(torch.where(torch.isfinite(x), x, 0.0)).exponent
    return e.clamp(-1000, 1000)


def _power(e: Tensor) -> Tensor:
    """2^e from its bits (torch.ldexp goes through float32)."""
    return ((e.long() + 1023) << 52).view(torch.float64)


def _first(bad: Tensor) -> Tensor:
    """1-based index of the first True of each row, 0 where there is none."""
    return torch.where(bad.any(-1), bad.int().argmax(-1) + 1, 0).int()


def _finish(x: Tensor, bad: Tensor, out: Tensor) -> None:
    out.copy_(torch.where(bad[:, None, None], torch.nan, x))


def _cholesky(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L, s, info) with L L^T = S A S, s = diag(S) powers of two, from the lower triangle of `a`."""
    d = _diagonal(a)
    scale = torch.where(torch.isfinite(d) & (d > 0), _power(-(_exponent(d) // 2)), 1.0)
    w = _mirrored(a) * scale[:, :, None] * scale[:, None, :]
    n = a.shape[-1]
    l = torch.zeros_like(w)
    bad = torch.zeros(a.shape[:2], dtype=torch.bool, device=a.device)
    for j in range(n):
        pivot = w[:, j, j]
        bad[:, j] = ~(torch.isfinite(pivot) & (pivot > 0))
        l[:, j:, j] = w[:, j:, j] / pivot.sqrt()[:, None]
        w[:, j + 1 :, j + 1 :] -= l[:, j + 1 :, j, None] * l[:, None, j + 1 :, j]
    return l, scale, _first(bad)


def _substitute(t: Tensor, x: Tensor, upper: bool) -> Tensor:
    """Solve T x = x in place for a triangular T."""
    n = t.shape[-1]
    for i in reversed(range(n)) if upper else range(n):
        x[:, i] /= t[:, i, i, None]
        rest = slice(0, i) if upper else slice(i + 1, n)
        x[:, rest] -= t[:, rest, i, None] * x[:, i, None, :]
    return x


def _eliminate(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(A^-1 x, info) by Gaussian elimination with partial pivoting; overwrites both arguments."""
    n = a.shape[-1]
    scale = _power(-_exponent(a.abs().amax((1, 2))))[:, None, None]
    a *= scale
    w = torch.cat([a, x], -1)
    bad = torch.zeros(a.shape[:2], dtype=torch.bool, device=a.device)
    for j in range(n):
        chosen = (w[:, j:, j].abs().argmax(-1) + j)[:, None, None].expand(-1, 1, w.shape[-1])
        top = w.gather(1, chosen)
        w.scatter_(1, chosen, w[:, j : j + 1].clone())
        w[:, j : j + 1] = top
        pivot = w[:, j, j]
        bad[:, j] = ~(torch.isfinite(pivot) & (pivot != 0))
        factor = w[:, j + 1 :, j, None] / pivot[:, None, None]
        w[:, j + 1 :, j:] -= factor * w[:, j, None, j:]
    return _substitute(w[..., :n], w[..., n:], upper=True) * scale, _first(bad)


def inv(a: Tensor, damping: float | Tensor | None, scaled: bool, spd: bool, out: Tensor, info: Tensor) -> None:
    """out = (A + damping)^-1; see the module for `info`."""
    w = _damped(a, damping, scaled)
    n = w.shape[-1]
    identity = torch.eye(n, dtype=w.dtype, device=w.device).expand_as(w).clone()
    if spd:
        l, scale, code = _cholesky(w)
        root = _substitute(l, identity, upper=False)  # L^-1
        x = torch.zeros_like(w)
        for k in range(n):
            x += root[:, k, :, None] * root[:, k, None, :]
        # Mirrored, because the two orders of these products may round differently where they underflow.
        x = _mirrored(x * scale[:, :, None] * scale[:, None, :])
    else:
        x, code = _eliminate(w, identity)
    info.copy_(code)
    _finish(x, code != 0, out)


def solve(
    a: Tensor, b: Tensor, damping: float | Tensor | None, scaled: bool, spd: bool, out: Tensor, info: Tensor
) -> None:
    """out = (A + damping)^-1 b; see the module for `info`."""
    w, x = _damped(a, damping, scaled), b.to(torch.float64, copy=True)
    if spd:
        l, scale, code = _cholesky(w)
        x = _substitute(l, x * scale[:, :, None], upper=False)
        x = _substitute(l.mT, x, upper=True) * scale[:, :, None]
    else:
        x, code = _eliminate(w, x)
    info.copy_(code)
    _finish(x, code != 0, out)


def _eigh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, vectors, info) of the symmetric matrices whose lower triangles are those of `a`, by Jacobi rotations."""
    a = _mirrored(a.tril())
    n = a.shape[-1]
    identity = torch.eye(n, dtype=a.dtype, device=a.device)
    finite = torch.isfinite(a).all(-1).all(-1)
    w = torch.where(finite[:, None, None], a, identity)
    e = _exponent(w.abs().amax((1, 2)))
    w, v = w * _power(-e)[:, None, None], identity.expand_as(w)  # the eigenvectors are the rows of v here
    stages = [_Stage(n, i % 2, a) for i in range(2)]
    for _ in range(SWEEPS if n > 1 else 0):
        turned = torch.zeros((), dtype=torch.bool, device=a.device)
        for i in range(n):
            w, v, turn = stages[i % 2].turn(w, v)
            turned |= turn.any()
        w, v = _mirrored(w.flip(1, 2)), v.flip(1)  # a sweep reverses the order
        if a.device.type == "cpu" and not turned:
            break
    d = _diagonal(w)
    left = _above(d[:, :, None], d[:, None, :], w).tril(-1).sum((1, 2))
    values, order = ((d + 0.0) * _power(e)[:, None]).sort(stable=True)
    vectors = (v.mT + 0.0).gather(2, order[:, None, :].expand_as(v))  # no sign of a zero tells of the sweeps
    values = torch.where(finite[:, None], values, torch.nan)
    vectors = torch.where(finite[:, None, None], vectors, torch.nan)
    return values, vectors, torch.where(finite, left, -1).int()


def _above(pp: Tensor, qq: Tensor, pq: Tensor) -> Tensor:
    """Tell whether |a_pq| > eps sqrt(|a_pp a_qq|), the relative tolerance of Demmel and Veselic."""
    eps = torch.finfo(pq.dtype).eps
    return pq * pq > (pp * qq).abs() * (eps * eps)


class _Stage:
    """Rotations of the pairs (first, first + 1), (first + 2, first + 3), ..., which then change places.

    With the exchange, n stages of first = 0, 1, 0, ... meet every pair once. What each index needs lies side by side:
    its partner (itself where there is none), both in order, and the sign of the sine in its row.
    """

    def __init__(self, n: int, first: int, like: Tensor) -> None:
        i = torch.arange(n, device=like.device)
        other = (i - first).bitwise_xor(1) + first
        self.other = torch.where((i >= first) & (other < n), other, i)
        self.low, self.high = torch.minimum(i, self.other), torch.maximum(i, self.other)
        self.sign = (self.other - i).to(like.dtype)
        self.paired = self.sign != 0
        self.alone = (~self.paired).to(like.dtype)

    def turn(self, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(J W J^T, J V, which pairs needed it)."""
        d = _diagonal(w)
        pp, qq, pq = d[:, self.low], d[:, self.high], w[:, self.high, self.low]
        turn = _above(pp, qq, pq) & self.paired
        # tan of the smaller angle: 2 a_pq / (h +- sqrt(h^2 + 4 a_pq^2)), h = a_qq - a_pp, the sign that of h.
        h, twice = qq - pp, pq + pq
        root = (h * h + twice * twice).sqrt()
        t = torch.where(turn, twice / torch.where(h < 0, h - root, h + root), 0.0)
        c = 1.0 / (1.0 + t * t).sqrt()
        own, others = self.sign * (t * c) + self.alone, torch.where(self.paired, c, 0.0)
        values, rest = d[:, self.other] + self.sign * (t * pq), torch.where(turn, 0.0, pq)
        own, others = own[:, :, None], others[:, :, None]
        v = own * v + others * v.index_select(1, self.other)
        w = (own * w + others * w.index_select(1, self.other)).mT.contiguous()
        w = own * w + others * w.index_select(1, self.other)
        w[:, self.high, self.low] = w[:, self.low, self.high] = rest
        _diagonal(w).copy_(values)
        return w, v, turn


def _function(values: Tensor, vectors: Tensor) -> Tensor:
    """V diag(values) V^T, exactly symmetric."""
    x = torch.zeros_like(vectors)
    for k in range(values.shape[-1]):
        x += values[:, k, None, None] * (vectors[:, :, k, None] * vectors[:, None, :, k])
    return x


def eigh(a: Tensor, values: Tensor, vectors: Tensor, info: Tensor, basis: Tensor | None = None) -> None:
    """Compute A V = V diag(values), values ascending; see the module for `info`."""
    w, v, code = _eigh(a.double())
    values.copy_(w)
    vectors.copy_(v)
    info.copy_(code)


def abs_inv(a: Tensor, floor: float | Tensor, out: Tensor, info: Tensor, basis: Tensor | None = None) -> None:
    """out = V diag(1 / max(|w|, floor)) V^T; see the module for `info`."""
    w, v, code = _eigh(a.double())
    least = floor.double()[:, None] if isinstance(floor, Tensor) else torch.full_like(w[:, :1], floor)
    info.copy_(code)
    _finish(_function(1.0 / torch.maximum(w.abs(), least), v), code != 0, out)


def inv_root(
    a: Tensor,
    p: int,
    damping: float | Tensor | None,
    scaled: bool,
    out: Tensor,
    info: Tensor,
    clamped: bool = False,
    basis: Tensor | None = None,
) -> None:
    """out = (A + damping)^(-1/p), the symmetric positive definite root; see the module for `info`."""
    w, v, code = _eigh(_damped(a, None if clamped else damping, scaled))
    if clamped:
        code = torch.where(code == 0, (w < 0).sum(-1).int(), torch.where(code > 0, -3, code))
        amount = damping.double()[:, None] if isinstance(damping, Tensor) else damping or 0.0
        w = w.clamp(min=0)
        w = w + amount * w[:, -1:]
    else:
        code = torch.where(code == 0, (w <= 0).sum(-1).int(), code)
    info.copy_(code)
    nothing = w == 0
    for _ in range(p.bit_length() - 1):  # square roots, which are rounded alike wherever they stand; pow is not
        w = w.sqrt()
    f = torch.where(nothing, 0.0, 1.0 / w)
    _finish(_function(f, v), (code < 0) if clamped else (code != 0), out)
