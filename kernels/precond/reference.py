"""Preconditioned steps of tiles and orthogonalisation in plain PyTorch: the definition that all others are tested by.

Every backend module of this family has `available`, `supports` and the functions below, with these signatures. The
public functions of `secant.ops.precond` check and allocate; what arrives here is valid:

* K >= 1 tensors, all of one dtype T in {float32, float64, bfloat16, float16} and on one device. C, the dtype of the
  arithmetic, is float64 for T = float64, else float32. A tensor is a matrix (rows, columns): its first dimension by all
  others, one row for a vector or a scalar. rows, columns >= 1.
* `layout` is (K, 6), int64, contiguous, on the CPU: rows, columns, tiles down, tiles across, and the two strides, in
  elements, of param and grad alike. Entry (i, j) of matrix k is at `data_ptr() + i row_stride + j column_stride`.
* A side of n entries in p pieces is cut evenly: piece i begins at i * (n // p) + min(i, n % p), and the first n % p
  pieces have one entry more. There are down * across tiles, that of pieces (i, j) being number i * across + j. r and c
  are the sides of a tile, nl = ceil(rows / down) and nr = ceil(columns / across) those of the largest.
* `exp_avg` and `exp_avg_sq` are contiguous, of as many elements as the tensor, that is row-major (rows, columns), of
  the dtype Q in {C, bfloat16}; Q is the same in all states of a call. `exp_avg_sq` has no elements where nothing
  below reads it.
* `left` is (tiles, nl (nl + 1) / 2), `right` (tiles, nr (nr + 1) / 2), of Q, contiguous: lower triangles, row behind
  row, entry (i, j) at i (i + 1) / 2 + j. Of a smaller tile the first r (c) rows count, the rest is left alone.
  `left_root` is (tiles, nl, nl), `right_root` (tiles, nr, nr), of Q, contiguous; symmetric unless `rotate`. A side that
  is not preconditioned has no elements in either. A tensor with neither side is stepped by Adam, whatever the rule.
* `step` holds scalars of float32, on the device or on the CPU: t >= 1, the number of this step, counted already.
* `lr` is a number or a scalar of float32 or float64, on the device or on the CPU.
* `skipped` is a scalar of int64 on the device, which is added to.
* Nothing overlaps anything.

What a tile does, with all entries of param, grad and the states in C, and b^ = 1 - b^t:

    G = grad (-grad where maximize)
    1. GRAMS, of the sides that there are:
         L <- beta_gram L + (1 - beta_gram) G G^T          R <- beta_gram R + (1 - beta_gram) G^T G
    2. APPLY:
         M <- beta1 M + (1 - beta1) G                      exp_avg
         Shampoo:  V <- beta2 V + (1 - beta2) G^2          exp_avg_sq, where there is one
                   P = left_root M right_root / beta1^
                   A = (M / beta1^) / (sqrt(V / beta2^) + eps)
                   P <- P |N| / |P|, where N is A (graft "adam") or M / beta1^ ("sgd"), or |N| is FIXED_RMS sqrt(r c)
                   ("rms"); as it is ("none"), and zero where |P| is zero
         SOAP:     G' = Q_l^T G Q_r, M' = Q_l^T M Q_r      with left_root and right_root for Q_l and Q_r
                   V <- beta2 V + (1 - beta2) G'^2
                   P = Q_l [(M' / beta1^) / (sqrt(V / beta2^) + eps)] Q_r^T; no graft
         Adam:     V as in Shampoo, P = A
         W <- (1 - lr weight_decay) W - lr P

eps counts for the smallest normal number of C where it is less: where M and V are zero, A is. A side that is not there
multiplies by nothing. Norms are those of Frobenius over the tile.

What every backend owes:

* A tile depends on nothing but itself: the same bits wherever it stands and however many threads there are.
* A tile whose |G|^2 is not finite in C (NaN, infinity, or an overflow that would be one in the averages) is left as it
  is, parameter and states; so is one whose |P|^2 is not finite, but that its Gram averages are updated. With APPLY
  such tiles are added to `skipped`.
* GRAMS and APPLY in two calls are the two in one.
* A matrix that is iterated depends on nothing but itself, likewise.
* No function reads a value back to the host, none allocates by values, none has a temporary of the size of the model.
  (This module has one of the size of a tensor, in float64.)

References:
    Gupta, Koren, Singer, Shampoo: preconditioned stochastic tensor optimization, ICML 2018, Algorithm 1.
    Anil, Gupta, Koren, Regan, Singer, Scalable second order optimization for deep learning, 2020, section 4 (grafting).
    Vyas et al., SOAP: improving and stabilizing Shampoo using Adam, 2024, Algorithm 3.
    Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024 (the quintic iteration).
    Higham, Functions of Matrices, section 8.3 (Newton-Schulz for the polar factor) and 7.3 (coupled Newton).
    Guo and Higham, A Schur-Newton method for the matrix p-th root and its inverse, SIAM J. Matrix Anal. Appl. 28
    (2006), equation (3.4).
"""

from __future__ import annotations

import torch
from secant.kernels.precond.contract import (
    ADAM,
    APPLY,
    FIXED_RMS,
    GRAMS,
    GROWTH,
    RMS,
    SGD,
    SQUARINGS,
    Rule,
    Tensors,
    eps_of,
)
from torch import Tensor


def available() -> str | None:
    """Return None when this backend can run here, else the reason why it cannot."""
    return None


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when tensors of this device and dtype are supported, else the reason why they are not."""
    return None


def places(size: int, pieces: int, device: torch.device) -> Tensor:
    """Find where each entry of a side lies once its pieces are padded to the length of the first."""
    least, more = divmod(size, pieces)
    longest = least + (more > 0)
    i = torch.arange(size, device=device)
    piece = torch.where(i < more * (least + 1), i // (least + 1), (i - more) // max(least, 1))
    return i + piece * longest - (piece * least + piece.clamp(max=more))


def cut(x: Tensor, down: int, across: int) -> Tensor:
    """Cut a matrix into its tiles, (down * across, nl, nr), padded with zeros."""
    rows, columns = x.shape
    height, width = -(-rows // down), -(-columns // across)
    if rows < down * height:
        x = x.new_zeros(down * height, columns).index_copy_(0, places(rows, down, x.device), x)
    if columns < across * width:
        x = x.new_zeros(len(x), across * width).index_copy_(1, places(columns, across, x.device), x)
    return x.reshape(down, height, across, width).transpose(1, 2).reshape(-1, height, width)


def join(tiles: Tensor, rows: int, columns: int, down: int, across: int) -> Tensor:
    """Put tiles together again: the inverse of `cut`."""
    height, width = tiles.shape[1:]
    x = tiles.reshape(down, across, height, width).transpose(1, 2).reshape(down * height, across * width)
    if rows < len(x):
        x = x[places(rows, down, x.device)]
    return x if columns == x.shape[1] else x[:, places(columns, across, x.device)]


def pack(a: Tensor) -> Tensor:
    """Take the lower triangles of matrices (..., n, n), row behind row."""
    i, j = torch.tril_indices(*a.shape[-2:], device=a.device)
    return a[..., i, j]


def unpack(packed: Tensor, n: int) -> Tensor:
    """Make symmetric matrices (..., n, n) of their lower triangles."""
    i = torch.arange(n, device=packed.device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    return packed[..., high * (high + 1) // 2 + low]


def _real(size: int, pieces: int, device: torch.device) -> Tensor:
    """Mark the entries of the Gram matrix of each piece, (pieces, n, n): all but the padding of the smaller."""
    i = torch.arange(-(-size // pieces), device=device)
    length = size // pieces + (torch.arange(pieces, device=device) < size % pieces)
    real = i < length[:, None]
    return real[:, :, None] & real[:, None, :]


def _norm(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1), keepdim=True).sqrt()


def step(tensors: Tensors, layout: Tensor, lr: float | Tensor, rule: Rule, phases: int, skipped: Tensor) -> None:
    """Update Gram averages and momenta, precondition, graft, and write the parameters back; see the module.

    Args:
        tensors: the lists. layout: (K, 6). lr: number or scalar. rule: the numbers. phases: GRAMS, APPLY or both.
        skipped: scalar of int64.
    """
    for k, row in enumerate(layout.tolist()):
        param, grad, *states = (members[k] for members in tensors)
        _step_one(param, grad, *states, layout=row, lr=lr, rule=rule, phases=phases, skipped=skipped)


def _step_one(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    left: Tensor,
    right: Tensor,
    left_root: Tensor,
    right_root: Tensor,
    count: Tensor,
    *,
    layout: list[int],
    lr: float | Tensor,
    rule: Rule,
    phases: int,
    skipped: Tensor,
) -> None:
    rows, columns, down, across = layout[:4]
    arithmetic = torch.float64 if param.dtype is torch.float64 else torch.float32
    wide = [cut(x.reshape(rows, columns).double(), down, across) for x in (grad, param, exp_avg)]
    g, w, m = (-wide[0] if rule.maximize else wide[0]), wide[1], wide[2]
    good = g.square().sum((1, 2), keepdim=True).to(arithmetic).isfinite()

    of_left = _real(rows, down, param.device).repeat_interleave(across, 0)
    of_right = _real(columns, across, param.device).repeat(down, 1, 1)
    if phases & GRAMS:
        for packed, real, product in ((left, of_left, lambda: g @ g.mT), (right, of_right, lambda: g.mT @ g)):
            if packed.numel():
                new = rule.beta_gram * packed.double() + (1 - rule.beta_gram) * pack(product())
                packed.copy_(torch.where(good[:, 0] & pack(real), new, packed))
    if not phases & APPLY:
        return

    t = count.double().to(param.device) if count.device == param.device else count.item()
    corrected1, corrected2 = 1 - rule.beta1**t, 1 - rule.beta2**t
    has_left, has_right = left_root.numel() > 0, right_root.numel() > 0
    ql = torch.where(of_left, left_root.double(), 0.0) if has_left else None
    qr = torch.where(of_right, right_root.double(), 0.0) if has_right else None
    rotate = rule.rotate and (has_left or has_right)

    def multiplied(x: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        x = x if a is None else a @ x
        return x if b is None else x @ b

    def turned(x: Tensor, back: bool = False) -> Tensor:
        a, b = (None if q is None else q.mT for q in (ql, qr))
        return multiplied(x, ql, b) if back else multiplied(x, a, qr)

    m = rule.beta1 * m + (1 - rule.beta1) * g
    if exp_avg_sq.numel():
        v = cut(exp_avg_sq.reshape(rows, columns).double(), down, across)
        v = rule.beta2 * v + (1 - rule.beta2) * (turned(g) if rotate else g).square()
        adam = ((turned(m) if rotate else m) / corrected1) / ((v / corrected2).sqrt() + eps_of(rule, param.dtype))
    if rotate:
        p = turned(adam, back=True)
    elif has_left or has_right:
        p = multiplied(m, ql, qr) / corrected1
        if rule.graft == ADAM:
            p = p * _ratio(_norm(adam), p)
        elif rule.graft == SGD:
            p = p * _ratio(_norm(m / corrected1), p)
        elif rule.graft == RMS:
            sizes = cut(torch.ones(rows, columns, dtype=p.dtype, device=p.device), down, across).sum((1, 2), True)
            p = p * _ratio(FIXED_RMS * sizes.sqrt(), p)
    else:
        p = adam
    rate = lr.double().to(param.device) if isinstance(lr, Tensor) else lr
    new = (1 - rate * rule.weight_decay) * w - rate * p

    good = good & p.square().sum((1, 2), keepdim=True).to(arithmetic).isfinite()
    skipped.add_((~good).sum())

    def write(to: Tensor, new: Tensor, old: Tensor) -> None:
        to.copy_(join(torch.where(good, new, old), rows, columns, down, across).reshape(to.shape))

    write(param, new, w)
    write(exp_avg, m, wide[2])
    if exp_avg_sq.numel():
        write(exp_avg_sq, v, cut(exp_avg_sq.reshape(rows, columns).double(), down, across))


def _ratio(norm: Tensor, p: Tensor) -> Tensor:
    """|N| / |P|, and zero where |P| is."""
    size = _norm(p)
    return torch.where(size == 0, 0.0, norm / size)


def newton_schulz(x: Tensor, steps: int, a: float, b: float, c: float, eps: float, out: Tensor) -> None:
    """Iterate X <- a X + (b A + c A^2) X with A = X X^T, from X = x / max(|x|_F, eps).

    A matrix with more rows than columns is taken transposed, which gives the same and costs less.

    Args:
        x: (B, m, n), B, m, n >= 1, of T, contiguous. steps: >= 0. out: as x, contiguous; it may be x itself.
    """
    tall = x.shape[1] > x.shape[2]
    y = x.double().mT if tall else x.double()
    y = y / _norm(y).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    out.copy_(y.mT if tall else y)


def newton_inv_root(a: Tensor, p: int, damping: float, steps: int, tolerance: float, out: Tensor, info: Tensor) -> None:
    """out = (A + damping |A| I)^(-1/p) by the coupled Newton iteration; see `coupled`.

    Args:
        a: (B, n, n), B, n >= 1, of T, contiguous; the lower triangle is read. p: 1, 2 or 4. damping: > 0.
        steps: >= 1. tolerance: of |M - I|_F.
        out: as a, contiguous, no overlap. info: (B,), int32.
    """
    x, code = coupled(a.double(), p, damping, steps, tolerance)
    out.copy_(x)
    info.copy_(code)


def coupled(a: Tensor, p: int, damping: float, steps: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Compute (X, code) for symmetric matrices (..., n, n), in their dtype, by functions that have derivatives.

    |A| is the Schatten norm (sum_i |w_i|^64)^(1/64), from the Frobenius norms of A, A^2, ..., A^32: at least the
    largest eigenvalue and at most n^(1/64) times it. From

        M = z (A + damping |A| I),      X = I,      z = (p + 1) / (2 (1 + damping) |A|),

    whose eigenvalues lie within (0, (p + 1) / 2] if those of A are not negative, at most `steps` times

        T = ((p + 1) I - M) / p,      X <- X T,      M <- T^p M,

    until |M - I|_F <= tolerance, which is seen before X takes the T of this M: its own error is then at most
    (p + 1) / (2 p) tolerance^2. M grows at least by ((p + 1) / p)^p while it is small. The result is z^(1/p) X, its
    symmetric part.

    code is 0; -1 where a matrix has an entry that is not finite, with zeros in X; k > 0 where it was not there after k
    steps, or left off since |M - I|_F grew by `GROWTH`, as it does where A + damping |A| I has a negative eigenvalue:
    X is then what it was. Of a matrix of zeros X is zero. X has no NaN.
    """
    a = a.tril() + a.tril(-1).mT
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    top = a.detach().abs().amax((-2, -1), keepdim=True)  # the result does not depend on it
    good = top.isfinite()
    there = good & (top > 0)
    m = torch.where(there, a / torch.where(there, top, 1.0), eye)
    norm, power, t = _norm(m), 1.0, m
    factor = norm
    for _ in range(SQUARINGS):
        t = t / factor
        t = t @ t
        factor, power = _norm(t), power / 2
        norm = norm * factor**power
    z = (p + 1) / (2 * (1 + damping) * norm)
    m = z * (m + damping * norm * eye)
    x = eye.expand_as(m)
    active = torch.ones_like(there)
    code = torch.full_like(top, steps, dtype=torch.int32)
    last = torch.full_like(top, torch.inf)
    for k in range(steps):
        rest = (eye - m) / p
        error = p * _norm(rest.detach())
        grown = active & ~(error <= GROWTH * last)
        code, active, last = torch.where(grown, k, code), active & ~grown, error
        t = eye + rest
        x = torch.where(active, x @ t, x)
        reached = active & (error <= tolerance)
        code, active = torch.where(reached, 0, code), active & ~reached
        for _ in range(p.bit_length() - 1):
            t = t @ t
        m = torch.where(active, t @ m, m)
    scale = (z.double() / top.double()).pow(1 / p).clamp(max=torch.finfo(a.dtype).max).to(a.dtype)
    x = torch.where(there, (x + x.mT) / 2 * torch.where(there, scale, 1.0), 0.0)
    return x, torch.where(there, code, torch.where(good, 0, -1))[..., 0, 0].int()
