"""The textbook two-loop recursion in plain PyTorch: the definition that every other backend is tested against.

Every backend module of this family has the four functions below, with these signatures. The public functions of
`secant.ops.lbfgs` check and allocate; what arrives here is valid:

* rings are (B, m, n), Gram matrices (B, m, m) and counters (B,), with B = 1 for a flat problem; vectors are (B, n), or
  (n,) for a flat problem; the `s` and `y` of `two_loop` are (B, m, n), or (m, n) for a flat problem;
* vectors are contiguous, of dtype T in {float32, float64}; rings are contiguous, of dtype T' in {float32, float64,
  bfloat16}; in `two_loop` the last dimension of `s` and `y` is contiguous and the other strides are free, m, n >= 1;
* `sy`, `yy` and `stats` are float64, `head` and `count` int32, all on the device of the vectors;
* no function reads a value back to the host.

Dot products are accumulated in float64, where T and T' have no more than float32's digits possibly from runs of at most
256 products summed in float32; the recursion over coefficients runs in float64; vectors are combined in T.
This file computes everything in float64 and rounds once at the end.

References:
    Nocedal, Updating quasi-Newton matrices with limited storage, Math. Comp. 35 (1980), 773-782.
    Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithm 7.4, p. 178.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The columns of `stats`: what a direction costs nothing extra to know.
STATS = ("gd", "g_norm", "g_max", "sy", "s_norm", "y_norm", "accepted", "gamma")


def available() -> str | None:
    """Return None when this backend can run here, else the reason why it cannot."""
    return None


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when vectors of this device and dtype are supported, else the reason why they are not."""
    return None


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x[None]


def _recursion(g: Tensor, s: Tensor, y: Tensor, rho: Tensor, gamma: Tensor) -> Tensor:
    """d = -H g for pairs ordered oldest to newest; a pair with rho = 0 takes no part. All float64."""
    m = s.shape[-2]
    q = -g
    alpha = torch.zeros_like(rho)
    for i in reversed(range(m)):
        a = rho[:, i] * (s[:, i] * q).sum(-1)
        alpha[:, i] = a
        q = q - a[:, None] * y[:, i]
    r = gamma[:, None] * q
    for i in range(m):
        b = rho[:, i] * (y[:, i] * r).sum(-1)
        r = r + (alpha[:, i] - b)[:, None] * s[:, i]
    return r


def _masked(s: Tensor, y: Tensor, sy: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Valid pairs in float64: (s, y, rho, gamma), with invalid ones zeroed and rho = 0 there.

    gamma = s.y / y.y of the newest valid pair (Nocedal and Wright, eq. 7.20), 1 when there is none.
    """
    ok = torch.isfinite(sy) & torch.isfinite(yy) & (sy > 0)
    rho = torch.where(ok, 1.0 / torch.where(ok, sy, 1.0), 0.0)
    scale = torch.where(ok, sy / torch.where(ok, yy, 1.0), 1.0)
    m = sy.shape[-1]
    age = torch.arange(1, m + 1, device=sy.device) * ok  # the newest valid pair has the largest
    newest = age.argmax(-1, keepdim=True)
    gamma = torch.where(ok.any(-1), scale.gather(-1, newest)[:, 0], 1.0)
    keep = ok[..., None]
    return torch.where(keep, s, 0.0), torch.where(keep, y, 0.0), rho, gamma


def two_loop(grad: Tensor, s: Tensor, y: Tensor, gamma: float | None, out: Tensor) -> None:
    """out = -H grad, with pairs oldest first in `s`, `y`.

    A pair whose s.y or y.y is not finite, or whose s.y <= 0, is ignored. `gamma` None: s.y / y.y of the newest valid
    pair, 1 when there is none; else H_0 = gamma I.
    """
    g, s64, y64 = _rows(grad).double(), s.double(), y.double()
    if s.dim() == 2:
        s64, y64 = s64[None], y64[None]
    sy, yy = (s64 * y64).sum(-1), (y64 * y64).sum(-1)
    s64, y64, rho, auto = _masked(s64, y64, sy, yy)
    d = _recursion(g, s64, y64, rho, auto if gamma is None else torch.full_like(auto, gamma))
    out.copy_(d.view(out.shape))


def update(
    s_ring: Tensor,
    y_ring: Tensor,
    sy: Tensor,
    yy: Tensor,
    head: Tensor,
    count: Tensor,
    stats: Tensor,
    grad: Tensor | None,
    s: Tensor | None,
    y: Tensor | None,
    y_prev: Tensor | None,
    t: float | Tensor,
    tol: float,
    out: Tensor | None,
    prev_out: Tensor | None,
) -> None:
    """Append a pair to the ring if it passes the gate, then compute the direction.

    The pair (when `s` is given) is s' = t * s and y' = y - y_prev (y' = y when `y_prev` is None), computed in T and
    rounded to the dtype of the ring. With sy' = s'.y', ss' = s'.s', yy' = y'.y' in float64 of the rounded values, it
    is accepted when all three are finite and sy' > tol * sqrt(ss' yy'). An accepted pair replaces slot `head`, head
    becomes (head + 1) mod m and count min(count + 1, m); a rejected one changes nothing at all.

    Gram matrices, by slot: sy[i, j] = s_i.y_j where i is as old as j or older, 0 where i is newer (the recursion never
    asks for those); yy is symmetric. An empty slot holds zeros everywhere, so that sy[i, i] = 0 marks it: rho = 0.

    `t` is a number or a float64 tensor of (B,) or (1,) on the device. `out` (when given, with `grad`) receives
    d = -H grad with H_0 = gamma I as in `two_loop`; it may be the tensor `s`. `prev_out` (when given) receives `grad`;
    it may be the tensor `y_prev`. `stats` (B, 8) receives the columns `STATS`: g.d, |grad|_2, |grad|_inf (NaN if any
    entry is), s'.y', |s'|, |y'|, 1.0 if accepted, gamma; entries that this call had no cause to compute are 0.
    """
    m = s_ring.shape[1]
    stats.zero_()
    if s is not None:
        assert y is not None
        step = t.to(s.dtype)[:, None] if isinstance(t, Tensor) else t
        s_new = (_rows(s) * step).to(s_ring.dtype)
        y_new = _rows(y if y_prev is None else y - y_prev).to(y_ring.dtype)
        s64, y64 = s_new.double(), y_new.double()
        new_sy, new_ss, new_yy = (s64 * y64).sum(-1), (s64 * s64).sum(-1), (y64 * y64).sum(-1)
        finite = torch.isfinite(new_sy) & torch.isfinite(new_ss) & torch.isfinite(new_yy)
        ok = finite & (new_sy > tol * (new_ss.sqrt() * new_yy.sqrt()))
        slot = torch.arange(m, device=head.device) == head[:, None]  # (B, m)
        put = slot & ok[:, None]
        s_ring.copy_(torch.where(put[..., None], s_new[:, None], s_ring))
        y_ring.copy_(torch.where(put[..., None], y_new[:, None], y_ring))
        # Columns of the new pair against every slot, from the values as stored.
        col_sy = (s_ring.double() * y64[:, None]).sum(-1)
        col_yy = (y_ring.double() * y64[:, None]).sum(-1)
        column, row = put[:, None, :], put[:, :, None]
        sy.copy_(torch.where(column, col_sy[:, :, None], torch.where(row, 0.0, sy)))
        yy.copy_(torch.where(column, col_yy[:, :, None], torch.where(row, col_yy[:, None, :], yy)))
        head.copy_(torch.where(ok, (head + 1) % m, head))
        count.copy_(torch.where(ok, (count + 1).clamp(max=m), count))
        stats[:, 3], stats[:, 4], stats[:, 5], stats[:, 6] = new_sy, new_ss.sqrt(), new_yy.sqrt(), ok.double()
    if out is not None:
        assert grad is not None
        order = (head[:, None] + torch.arange(m, device=head.device)) % m  # oldest to newest
        take = order[..., None].expand(-1, -1, s_ring.shape[-1]).long()
        diag_sy = torch.diagonal(sy, dim1=-2, dim2=-1).gather(-1, order.long())
        diag_yy = torch.diagonal(yy, dim1=-2, dim2=-1).gather(-1, order.long())
        s64, y64, rho, gamma = _masked(
            s_ring.gather(1, take).double(), y_ring.gather(1, take).double(), diag_sy, diag_yy
        )
        g = _rows(grad).double()
        d = _recursion(g, s64, y64, rho, gamma)
        stats[:, 0], stats[:, 1] = (g * d).sum(-1), torch.linalg.vector_norm(g, dim=-1)
        stats[:, 2], stats[:, 7] = g.abs().amax(-1), gamma
        if prev_out is not None:
            prev_out.copy_(grad)
        out.copy_(d.view(out.shape))
