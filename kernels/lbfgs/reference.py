"""The textbook two-loop recursion in plain PyTorch: the definition that every other backend is tested against.

Every backend module of this family has the functions of `contract.Backend`, and the first two below. The public
functions of `secant.ops.lbfgs` and `secant.ops.history` check and allocate; what arrives here is valid:

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
from secant.kernels.lbfgs.contract import EXTRAS, Dense, Pair, State
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


def _scales(sy: Tensor, yy: Tensor) -> tuple[Tensor, Tensor]:
    """(rho, gamma) from s_i.y_i and y_i.y_i, oldest first: rho = 0 for an invalid pair.

    gamma = s.y / y.y of the newest valid pair (Nocedal and Wright, eq. 7.20), 1 when there is none.
    """
    ok = torch.isfinite(sy) & torch.isfinite(yy) & (sy > 0)
    rho = torch.where(ok, 1.0 / torch.where(ok, sy, 1.0), 0.0)
    scale = torch.where(ok, sy / torch.where(ok, yy, 1.0), 1.0)
    m = sy.shape[-1]
    age = torch.arange(1, m + 1, device=sy.device) * ok  # the newest valid pair has the largest
    newest = age.argmax(-1, keepdim=True)
    return rho, torch.where(ok.any(-1), scale.gather(-1, newest)[:, 0], 1.0)


def two_loop(grad: Tensor, s: Tensor, y: Tensor, gamma: float | None, out: Tensor) -> None:
    """out = -H grad, with pairs oldest first in `s`, `y`.

    A pair whose s.y or y.y is not finite, or whose s.y <= 0, is ignored. `gamma` None: s.y / y.y of the newest valid
    pair, 1 when there is none; else H_0 = gamma I.
    """
    g, s64, y64 = _rows(grad).double(), s.double(), y.double()
    if s.dim() == 2:
        s64, y64 = s64[None], y64[None]
    sy, yy = (s64 * y64).sum(-1), (y64 * y64).sum(-1)
    rho, auto = _scales(sy, yy)
    keep = (rho != 0)[..., None]
    s64, y64 = torch.where(keep, s64, 0.0), torch.where(keep, y64, 0.0)
    d = _recursion(g, s64, y64, rho, auto if gamma is None else torch.full_like(auto, gamma))
    out.copy_(d.view(out.shape))


def update(
    state: State,
    pair: Pair | None,
    grad: Tensor | None,
    tol: float,
    out: Tensor | None,
    prev_out: Tensor | None,
) -> None:
    """Append a pair to the ring if it passes the gate, then compute the direction.

    The pair (when given) is s' = t * s and y' = y - y_prev (y' = y when `y_prev` is None), computed in T and rounded to
    the dtype of the ring. With sy' = s'.y', ss' = s'.s', yy' = y'.y' in float64 of the rounded values, it is accepted
    when all three are finite and sy' > tol * sqrt(ss' yy'). An accepted pair replaces slot `head`, head becomes
    (head + 1) mod m and count min(count + 1, m); a rejected one changes nothing at all.

    Gram matrices, by slot: sy[i, j] = s_i.y_j where i is as old as j or older, 0 where i is newer (the recursion never
    asks for those); yy is symmetric. An empty slot holds zeros everywhere, so that sy[i, i] = 0 marks it: rho = 0.

    `t` is a number or a float64 tensor of (B,) or (1,) on the device. `out`, given with `grad` and only then, receives
    d = -H grad with H_0 = gamma I as in `two_loop`; it may be the tensor `s`. `prev_out` (when given) receives `grad`;
    it may be the tensor `y_prev`. `stats` (B, 8) receives the columns `STATS`: g.d, |grad|_2, |grad|_inf (NaN if any
    entry is), s'.y', |s'|, |y'|, 1.0 if accepted, gamma; entries that this call had no cause to compute are 0.

    A backend may do the three parts in one; by themselves they are for a history whose elements are spread over
    processes: the sums add (the largest entry is a maximum), everybody solves the same, and each combines its own.
    """
    batch, m, _ = state.s.shape
    sums = state.sy.new_zeros(batch, 4 * m + EXTRAS)
    coefs = state.sy.new_zeros(batch, 2 * m + 2)
    dots(state, pair, grad, sums)
    solve(state, sums, coefs, tol, pair is not None, grad is not None)
    combine(state, pair, grad, coefs, out, prev_out)


def _new_pair(state: State, pair: Pair) -> tuple[Tensor, Tensor]:
    """s' and y' (B, n) as the rings store them."""
    step = pair.t.to(pair.s.dtype)[:, None] if isinstance(pair.t, Tensor) else pair.t
    y = pair.y if pair.y_prev is None else pair.y - pair.y_prev
    return (_rows(pair.s) * step).to(state.s.dtype), _rows(y).to(state.y.dtype)


def dots(state: State, pair: Pair | None, grad: Tensor | None, out: Tensor) -> None:
    """Sum the products that `solve` needs, in float64 of what is stored, over the elements at hand.

    out (B, 4 m + 8): s_i.g, y_i.g, s_i.y', y_i.y' for each slot i, one slot behind the other; then s'.y', s'.s', y'.y',
    s'.g, y'.g, g.g, max |g_i| (NaN if any g_i is), 0. What there is no pair or no gradient for is 0.
    """
    batch, m, _ = state.s.shape
    out.zero_()
    slots, extra = out[:, : 4 * m].view(batch, m, 4), out[:, 4 * m :]
    rows = torch.stack((state.s, state.y), 2).double()  # (B, m, 2, n)
    g = None if grad is None else _rows(grad).double()
    if g is not None:
        slots[..., :2] = (rows * g[:, None, None]).sum(-1)
        extra[:, 5], extra[:, 6] = (g * g).sum(-1), g.abs().amax(-1)
    if pair is not None:
        s, y = (x.double() for x in _new_pair(state, pair))
        slots[..., 2:] = (rows * y[:, None, None]).sum(-1)
        extra[:, 0], extra[:, 1], extra[:, 2] = (s * y).sum(-1), (s * s).sum(-1), (y * y).sum(-1)
        if g is not None:
            extra[:, 3], extra[:, 4] = (s * g).sum(-1), (y * g).sum(-1)


def solve(state: State, dots: Tensor, coefs: Tensor, tol: float, pair: bool, direction: bool) -> None:
    """Gate a pair, keep counters, Gram matrices and statistics, and compute the coefficients of a direction.

    coefs (B, 2 m + 2): -gamma; the slot of an accepted pair, -1 for none; the coefficients of the rows of S by slot,
    then those of Y, of which the new pair has its own. Without `direction` all but the second are of no meaning.

    The recursion on coefficients is Algorithm 2 of Chen, Wang, Zhou, Large-scale L-BFGS using MapReduce, NIPS 2014.
    """
    sy, yy, head, count, stats = state.sy, state.yy, state.head, state.count, state.stats
    m = sy.shape[-1]
    slots, extra = dots[:, : 4 * m].view(-1, m, 4).clone(), dots[:, 4 * m :]
    stats.zero_()
    coefs[:, 1] = -1.0
    if pair:
        new_sy, new_ss, new_yy = extra[:, :3].unbind(-1)
        finite = torch.isfinite(new_sy) & torch.isfinite(new_ss) & torch.isfinite(new_yy)
        ok = finite & (new_sy > tol * (new_ss.sqrt() * new_yy.sqrt()))
        put = (torch.arange(m, device=head.device) == head[:, None]) & ok[:, None]  # (B, m)
        coefs[:, 1] = torch.where(ok, head.double(), -1.0)
        slots = torch.where(put[..., None], extra[:, None, [3, 4, 0, 2]], slots)
        column, row = put[:, None, :], put[:, :, None]
        sy.copy_(torch.where(column, slots[:, :, None, 2], torch.where(row, 0.0, sy)))
        yy.copy_(torch.where(column, slots[:, :, None, 3], torch.where(row, slots[:, None, :, 3], yy)))
        head.copy_(torch.where(ok, (head + 1) % m, head))
        count.copy_(torch.where(ok, (count + 1).clamp(max=m), count))
        stats[:, 3], stats[:, 4], stats[:, 5], stats[:, 6] = new_sy, new_ss.sqrt(), new_yy.sqrt(), ok.double()
    if not direction:
        return
    order = ((head[:, None] + torch.arange(m, device=head.device)) % m).long()  # oldest to newest
    square = order[:, :, None].expand(-1, m, m), order[:, None, :].expand(-1, m, m)
    sy_o, yy_o = (x.gather(1, square[0]).gather(2, square[1]) for x in (sy, yy))
    sg, yg = (slots[..., k].gather(1, order) for k in (0, 1))
    rho, gamma = _scales(torch.diagonal(sy_o, dim1=1, dim2=2), torch.diagonal(yy_o, dim1=1, dim2=2))
    alpha, delta = torch.zeros_like(rho), torch.zeros_like(rho)
    for i in reversed(range(m)):
        # A slot that takes no part may hold anything: 0 times NaN would be NaN.
        x = -sg[:, i] - _used(alpha, sy_o[:, i]).sum(-1)
        alpha[:, i] = torch.where(rho[:, i] != 0, rho[:, i] * x, 0.0)
    for i in range(m):
        x = gamma * (-yg[:, i] - _used(alpha, yy_o[:, i]).sum(-1)) + _used(delta, sy_o[:, :, i]).sum(-1)
        delta[:, i] = torch.where(rho[:, i] != 0, alpha[:, i] - rho[:, i] * x, 0.0)
    coefs[:, 0] = -gamma
    cs, cy = coefs[:, 2 : 2 + m], coefs[:, 2 + m :]
    cs.scatter_(1, order, delta)
    cy.scatter_(1, order, -gamma[:, None] * alpha)
    stats[:, 0] = -gamma * extra[:, 5] + _used(cs, slots[..., 0]).sum(-1) + _used(cy, slots[..., 1]).sum(-1)
    stats[:, 1], stats[:, 2], stats[:, 7] = extra[:, 5].sqrt(), extra[:, 6], gamma


def _used(coefficients: Tensor, x: Tensor) -> Tensor:
    return torch.where(coefficients != 0, coefficients * x, 0.0)


def combine(
    state: State,
    pair: Pair | None,
    grad: Tensor | None,
    coefs: Tensor,
    out: Tensor | None,
    prev_out: Tensor | None,
) -> None:
    """Write an accepted pair into its slot; out = -gamma g + sum of the rows that have a coefficient; prev_out = g.

    A row without a coefficient is not read: it may hold anything.
    """
    if pair is not None:
        slots = torch.arange(state.s.shape[1], device=coefs.device)
        put = (slots == coefs[:, 1, None])[..., None]  # (B, m, 1)
        s, y = _new_pair(state, pair)
        state.s.copy_(torch.where(put, s[:, None], state.s))
        state.y.copy_(torch.where(put, y[:, None], state.y))
    if out is not None:
        assert grad is not None
        m = state.s.shape[1]
        d = coefs[:, :1] * _rows(grad).double()
        for first, ring in ((2, state.s), (2 + m, state.y)):
            c = coefs[:, first : first + m, None]
            d = d + torch.where(c != 0, c * ring.double(), 0.0).sum(1)
        if prev_out is not None:
            prev_out.copy_(grad)
        out.copy_(d.view(out.shape))


#: The columns of the `stats` of a dense update.
DENSE_STATS = ("gd", "g_norm", "g_max", "sy", "s_norm", "y_norm", "accepted", "yhy", "tau", "phi")
_SMALL = torch.finfo(torch.float64).eps


def dense_update(
    state: Dense,
    pair: Pair | None,
    grad: Tensor | None,
    tol: float,
    rule: int,
    out: Tensor | None,
    prev_out: Tensor | None,
) -> None:
    """Update a dense inverse Hessian by the pair before this one, multiply, and decide on the update by this one.

    The update that is due is, with coefs = (a, c_ss, c_sw, c_ww, delta) and the rows s, w of `state.pair`,

        H <- a H + c_ss s s^T + c_sw (s w^T + w s^T) + c_ww w w^T + delta I,

    in T, where H is not read if a = 0 (then the c are 0, too). So one pass over the triangle makes it and multiplies
    the result by grad and by y'. With w' = H y' (rounded to T), and s', y' as in `update`, the pair is accepted when
    everything is finite, s'.y' > tol |s'| |y'|, y'.w' > 0, |s'|^2 and |w'|^2 are normal numbers, and the coefficients
    below keep the entries of H in the range of T. The next update is then that of the self-scaled Broyden class,

        H+ = gamma / tau [H - w w^T / y.w + phi v v^T] + s s^T / s.y,    v = sqrt(y.w) (s / s.y - w / y.w),

    written as coefficients (`broyden`); tau and phi by `scaling`; gamma = s.y / y.w for the first pair, else 1. A pair
    that is rejected leaves (1, 0, 0, 0, 0), and `state.pair` as it was. The rows that are kept are s' and w' over
    powers of two near their lengths (`power_of_two`), with the coefficients that go with them: c_sw s' would leave the
    range of float32 where |y'| is below 1e-19 or above it, though H does not. Scaling by powers of two rounds nothing.

    `out`, given with `grad` and only then, receives -H+ grad. When that does not descend although grad is finite and
    not zero, H is spoilt: then H+ = gamma I with gamma = s'.y' / y'.y' of an accepted pair, else 1, and the count is 0.

    Vectors are (n,), `t` a number or a float64 tensor of (1,). `out` may be `pair.s`, `prev_out` (which receives grad)
    may be `pair.y_prev`. rule: the place in `contract.RULES`. `stats` (10,) receives the columns `DENSE_STATS`, 0 where
    this call had no cause to compute them.
    """
    h = dense_matrix(state)
    n, dtype = h.shape[0], state.h.dtype
    rows, columns = torch.tril_indices(n, n, device=state.h.device)
    state.h.copy_(h[rows, columns])
    h = h.to(dtype).double()
    zero = state.coefs.new_zeros(())
    one, stats = zero + 1, dict.fromkeys(DENSE_STATS, zero)
    s_unit = w_unit = one
    a, c_ss, c_sw, c_ww, delta = one, zero, zero, zero, zero
    accepted, gamma = zero != 0, one
    s = w = h.new_zeros(n)
    if pair is not None:
        step = pair.t.to(dtype).reshape(()) if isinstance(pair.t, Tensor) else pair.t
        y = (pair.y if pair.y_prev is None else pair.y - pair.y_prev).double()
        s, w = (pair.s * step).double(), (h @ y).to(dtype).double()
        sy, ss, yy, yhy, ww = s @ y, s @ s, y @ y, y @ w, w @ w
        sbs = zero if pair.y_prev is None else -_of(pair.t, zero) * (s @ pair.y_prev.double())
        first = state.count == 0
        tau, phi = scaling(sy, sbs, yhy, first, n, rule)
        terms = broyden(sy, yhy, tau, phi, torch.where(first, sy / yhy, one))
        size = terms[1].abs() * ss + 2 * terms[2].abs() * (ss.sqrt() * ww.sqrt()) + terms[3].abs() * ww
        accepted = (sy > tol * (ss.sqrt() * yy.sqrt())) & (yhy > 0) & torch.isfinite(yy) & torch.isfinite(ss)
        accepted = accepted & (torch.minimum(ss, ww) >= torch.finfo(torch.float64).tiny)
        accepted = accepted & (size + terms[0] < 0.25 * torch.finfo(dtype).max)
        a, c_ss, c_sw, c_ww = (torch.where(accepted, x, y) for x, y in zip(terms, (one, zero, zero, zero), strict=True))
        gamma = torch.where(accepted, sy / yy, one)
        stats |= {"sy": sy, "s_norm": ss.sqrt(), "y_norm": yy.sqrt(), "accepted": accepted.double(), "yhy": yhy}
        stats |= {"tau": torch.where(accepted, tau, zero), "phi": torch.where(accepted, phi, zero)}
        s_unit, w_unit = (torch.where(accepted, power_of_two(x), one) for x in (ss, ww))
        state.pair.copy_(torch.where(accepted, torch.stack((s / s_unit, w / w_unit)).to(dtype), state.pair))
    count = state.count + accepted
    if grad is not None and out is not None:
        g = grad.double()
        s, w = (torch.where(accepted, x, zero) for x in (s, w))
        gs, gw, gg = s @ g, w @ g, g @ g
        d = -(a * (h @ g) + (c_ss * gs + c_sw * gw) * s + (c_sw * gs + c_ww * gw) * w)
        gd = d @ g
        spoilt = ~(gd < 0) & (gg > 0) & torch.isfinite(gg)
        a, c_ss, c_sw, c_ww = (torch.where(spoilt, zero, x) for x in (a, c_ss, c_sw, c_ww))
        delta, count = torch.where(spoilt, gamma, zero), torch.where(spoilt, 0, count)
        d, gd = torch.where(spoilt, -gamma * g, d), torch.where(spoilt, -gamma * gg, gd)
        stats |= {"gd": gd, "g_norm": gg.sqrt(), "g_max": g.abs().max()}
        if prev_out is not None:
            prev_out.copy_(grad)
        out.copy_(d)
    kept = (c_ss * (s_unit * s_unit), c_sw * (s_unit * w_unit), c_ww * (w_unit * w_unit))
    state.coefs.copy_(torch.stack((a, *kept, delta)))
    state.count.copy_(count)
    state.stats.copy_(torch.stack([stats[name] for name in DENSE_STATS]))


def _of(t: float | Tensor, like: Tensor) -> Tensor:
    return t.reshape(()) if isinstance(t, Tensor) else like + t


def power_of_two(square: Tensor) -> Tensor:
    """Return the largest power of two whose square is at most `square`, a positive normal float64."""
    k = (torch.frexp(square).exponent.long() - 1) >> 1
    return ((k + 1023) << 52).view(torch.float64)


def dense_matrix(state: Dense) -> Tensor:
    """Return H with the update that is due, (n, n), symmetric, in float64."""
    n = state.pair.shape[-1]
    rows, columns = torch.tril_indices(n, n, device=state.h.device)
    h = torch.zeros(n, n, dtype=torch.float64, device=state.h.device)
    h[rows, columns] = state.h.double()
    h = h + h.tril(-1).T
    a, c_ss, c_sw, c_ww, delta = state.coefs.unbind()
    used = (c_ss != 0) | (c_sw != 0) | (c_ww != 0)
    s, w = torch.where(used, state.pair.double(), 0.0)
    h = torch.where(a != 0, a * h, 0.0) + delta * torch.eye(n, dtype=h.dtype, device=h.device)
    sw = torch.outer(s, w)
    return h + c_ss * torch.outer(s, s) + c_sw * (sw + sw.T) + c_ww * torch.outer(w, w)


def broyden(sy: Tensor, yhy: Tensor, tau: Tensor, phi: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (a, c_ss, c_sw, c_ww) of the update of the self-scaled Broyden class in `dense_update`."""
    a = gamma / tau
    return a, a * phi * yhy / sy / sy + 1 / sy, -a * phi / sy, -a * (1 - phi) / yhy


def scaling(sy: Tensor, sbs: Tensor, yhy: Tensor, first: Tensor, n: int, rule: int) -> tuple[Tensor, Tensor]:
    """Compute (tau, phi) from b = s.Bs / s.y and h = y.Hy / s.y, float64 scalars.

    Of a step s = -t H g it is known that s.Bs = -t s.g. Where it is not known (`sbs` not positive) and of the first
    pair, for which H is scaled anyhow, every rule makes BFGS. bfgs: tau = phi = 1. ssbfgs: tau = min(1, 1 / b),
    phi = 1. ssbroyden: with a = b h - 1, c = (a / (1 + a))^(1/2), rho = min(1, h (1 - c)),

        theta = max((rho - 1) / a, min(1 / rho, (1 - b) / b)),    sigma = 1 + a theta,    phi = (1 - theta) / sigma,
        tau = min(1, 1 / b) min(sigma^(-1/(n-1)), 1 / theta)      for theta > 0,
        tau = min(min(1, 1 / b) sigma^(-1/(n-1)), sigma)          else.

    References:
        Al-Baali, Numerical experience with a class of self-scaling quasi-Newton algorithms, J. Optim. Theory Appl. 96
        (1998). Al-Baali, Khalfan, Wide interval for efficient self-scaling quasi-Newton algorithms, Optim. Methods
        Softw. 20 (2005). Al-Baali, Spedicato, Maggioni, Broyden's quasi-Newton methods for a nonlinear system of
        equations and unconstrained optimization, Optim. Methods Softw. 29 (2014). Urban, Stefanou, Pons, Unveiling the
        optimization process of physics informed neural networks, J. Comput. Phys. 523 (2025), arXiv 2405.04230.
    """
    one = torch.ones_like(sy)
    if rule == 0:
        return one, one
    b, h = sbs / sy, yhy / sy
    plain = first | ~((b > 0) & torch.isfinite(b))
    b = torch.where(plain, one, b)
    shrink = (1 / b).clamp(max=1.0)
    if rule == 1:
        return shrink, one
    a = (b * h - 1).clamp(min=_SMALL)
    # 1 - c without cancellation.
    rho = (h / ((1 + a) * (1 + (a / (1 + a)).sqrt()))).clamp(max=1.0)
    theta = torch.maximum((rho - 1) / a, torch.minimum(1 / rho, (1 - b) / b))
    sigma = 1 + a * theta
    power = sigma ** (-1 / (n - 1)) if n > 1 else one
    above = shrink * torch.minimum(power, 1 / torch.where(theta > 0, theta, one))
    tau = torch.where(theta > 0, above, torch.minimum(shrink * power, sigma))
    return torch.where(plain, one, tau), torch.where(plain, one, (1 - theta) / sigma)
