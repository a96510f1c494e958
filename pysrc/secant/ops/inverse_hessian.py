"""A dense inverse Hessian that learns from pairs by the self-scaled Broyden class: `InverseHessian`."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant.kernels.lbfgs import reference
from secant.kernels.lbfgs.contract import RULES, Dense, Pair
from secant.ops import _register
from secant.ops._takes_pairs import TakesPairs, settled_vectors


def flat_to_contract(
    h: Tensor,
    pair: Tensor,
    coefs: Tensor,
    count: Tensor,
    stats: Tensor,
    grad: Tensor | None,
    s: Tensor | None,
    y: Tensor | None,
    y_prev: Tensor | None,
    t: float | Tensor,
    tol: float,
    rule: int,
    out: Tensor | None,
    prev_out: Tensor | None,
) -> tuple[Any, ...]:
    """From the flat arguments of the schema to those of the family's contract."""
    offered = None if s is None or y is None else Pair(s, y, y_prev, t)
    grad = grad if out is not None else None
    return Dense(h, pair, coefs, count, stats), offered, grad, tol, rule, out, prev_out


def _settled(*args: Any) -> tuple[Any, ...]:
    """Check what a kernel would otherwise trust, for who calls the registered op itself."""
    op, state, (*vectors, tol, rule, out, prev_out) = "lbfgs_dense_update", Dense(*args[:5]), args[5:]
    _checks.tensor(op, "h", state.h, _checks.REAL)
    dtype, double, device = state.h.dtype, torch.float64, state.h.device
    n = state.pair.shape[-1] if state.pair.dim() else 0
    sizes = {"p": 2, "c": 5, "e": len(DenseStats._fields), "t": n * (n + 1) // 2}
    expected = zip(
        _kernel.arguments, state, ("t", "pn", "c", "", "e"), (dtype, dtype, double, torch.int32, double), strict=False
    )
    n = _checks.shapes(op, expected, device, sizes)["n"]
    if not 0 <= rule < len(RULES):
        raise _checks.fail(op, "rule", f"0 to {len(RULES) - 1}", rule)
    laid = settled_vectors(op, dtype, device, {"n": n}, (*vectors, out, prev_out))
    return (*state, *laid, tol, rule, out, prev_out)


_kernel = _register.Kernel(
    "lbfgs",
    "dense_update",
    "lbfgs_dense_update(Tensor(a!) h, Tensor(b!) pair, Tensor(c!) coefs, Tensor(d!) count, Tensor(e!) stats, "
    "Tensor? grad, Tensor? s, Tensor? y, Tensor? y_prev, Tensor t, float tol, int rule, Tensor(f!)? out, "
    "Tensor(g!)? prev_out)",
    settle=_settled,
    contract=flat_to_contract,
)


class DenseStats(NamedTuple):
    """What a step of `InverseHessian` knows at no extra cost; float64 views, (), on the device.

    gd: g.d. g_norm: |g|_2. g_max: |g|_inf. sy: s.y. s_norm: |s|. y_norm: |y|. accepted: 1.0 if H learns from the pair.
    yhy: y.Hy. tau, phi: of the update by this pair; 0 without one.
    """

    gd: Tensor
    g_norm: Tensor
    g_max: Tensor
    sy: Tensor
    s_norm: Tensor
    y_norm: Tensor
    accepted: Tensor
    yhy: Tensor
    tau: Tensor
    phi: Tensor


class InverseHessian(TakesPairs):
    r"""A dense approximation H of the inverse Hessian, updated within the self-scaled Broyden class.

    A pair s = x+ - x, y = g+ - g makes of H

        H+ = (1 / tau) [H - H y y^T H / (y.Hy) + phi v v^T] + s s^T / (s.y),
        v = (y.Hy)^(1/2) (s / (s.y) - H y / (y.Hy)),

    symmetric, with H+ y = s, and positive definite as H is. phi = 1 is BFGS, phi = 0 is DFP. H_0 = I, scaled by
    s.y / (y.Hy) of the first pair.

    One triangle is stored, and a call reads and writes it once: it makes the update that the last call has decided on,
    and multiplies the result by the gradient and by y. So the pair of a call enters the stored triangle at the next;
    `matrix` and every result have it already. n (n + 1) elements move where the formula in torch moves 10 n^2.
    Nothing here reads a value back to the host. A H that no longer descends (rounding, or numbers that are not finite)
    gives way to a multiple of I, decided on the device.

    Args:
        n: length of a vector, >= 1.
        rule: "ssbroyden": tau and phi by the formulas of Al-Baali, from b = s.Bs / s.y and h = y.Hy / s.y; "ssbfgs":
            phi = 1, tau = min(1, 1 / b); "bfgs": phi = tau = 1. B s is known of a step s = -t H g, as `step` is told;
            a pair that is appended makes the BFGS update.
        dtype: of vectors and triangle, float32 (default) or float64. Scalars are float64.
        device: of all tensors.
        curvature_tol: H learns from a pair when s.y > curvature_tol |s| |y| and everything is finite; else the pair
            changes nothing. None: the machine epsilon of `dtype`.

    Attributes:
        stats: `DenseStats` of the last call. count: int32 (), pairs since H was a multiple of I.

    References:
        Al-Baali, Spedicato, Maggioni, Broyden's quasi-Newton methods for a nonlinear system of equations and
        unconstrained optimization: a review and open problems, Optim. Methods Softw. 29 (2014), sections 4 and 5.
        Urban, Stefanou, Pons, Unveiling the optimization process of physics informed neural networks, J. Comput. Phys.
        523 (2025), arXiv 2405.04230, section 3. The formulas are in `kernels/lbfgs/reference.py`.

    Example:
        >>> h = secant.InverseHessian(2, dtype=torch.float64)
        >>> accepted = h.append(torch.tensor([1.0, 0.0]).double(), torch.tensor([2.0, 0.0]).double())
        >>> h.matrix()                      # H y = s; elsewhere the same scale
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
        >>> h.direction(torch.tensor([4.0, 1.0]).double())
        tensor([-2.0000, -0.5000], dtype=torch.float64)
    """

    #: Names of the updates.
    RULES: ClassVar[tuple[str, ...]] = RULES

    _kernel = _kernel

    def __init__(
        self,
        n: int,
        *,
        rule: str = "ssbroyden",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        curvature_tol: float | None = None,
    ) -> None:
        op = "InverseHessian"
        if rule not in RULES:
            raise _checks.fail(op, "rule", f"one of {RULES}", repr(rule))
        self._prepare(op, n, None, dtype, device, curvature_tol)
        self.rule, n = rule, self.n
        double: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        self._h = torch.zeros(n * (n + 1) // 2, dtype=dtype, device=self.device)
        self._pair = torch.zeros(2, n, dtype=dtype, device=self.device)
        self._coefs, self._stats = torch.zeros(5, **double), torch.zeros(len(DenseStats._fields), **double)
        self._count = torch.zeros((), dtype=torch.int32, device=self.device)
        self._stats_views = DenseStats(*self._stats.unbind())
        state = Dense(self._h, self._pair, self._coefs, self._count, self._stats)
        self._settle(state, self.curvature_tol, RULES.index(rule))
        self.reset()

    def __repr__(self) -> str:
        return f"InverseHessian(n={self.n}, rule={self.rule!r}, dtype={self.dtype}, device={self.device})"

    @property
    def stats(self) -> DenseStats:
        """Scalars of the last call, as views of `stats_tensor`."""
        return self._stats_views

    @property
    def stats_tensor(self) -> Tensor:
        """Return the scalars of the last call, float64 (10,), places as in `DenseStats`: one transfer."""
        return self._stats

    @property
    def count(self) -> Tensor:
        """Number of pairs since H was a multiple of I, int32, ()."""
        return self._count

    def matrix(self) -> Tensor:
        """Return H with every pair that was accepted, (n, n), symmetric, of `dtype`."""
        return reference.dense_matrix(self._state).to(self.dtype)

    def reset(self) -> None:
        """Forget every pair; the next direction is -grad. The triangle is written by the next call."""
        for x in (self._pair, self._coefs, self._count, self._stats):
            x.zero_()
        self._coefs[4] = 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return triangle, pair, coefficients and counter: four tensors of fixed shape (references).

        h (n (n + 1) / 2,): the lower triangle, row behind row, without the update that is due; pair (2, n) and coefs
        (5,), float64: that update.
        """
        return {"h": self._h, "pair": self._pair, "coefs": self._coefs, "count": self._count}

    def _check_contents(self, state: dict[str, Tensor]) -> None:
        if int(state["count"]) < 0:
            raise _checks.fail("load_state_dict", "state['count']", "a number >= 0", int(state["count"]))
