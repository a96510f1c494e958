"""Curvature pairs of L-BFGS in rings of fixed shape, and the directions that they give: `LBFGSHistory`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from secant import _checks
from secant.kernels.lbfgs.contract import Pair, State
from secant.ops import _register
from secant.ops._takes_pairs import TakesPairs, settled_vectors
from secant.ops.lbfgs import MAX_HISTORY, STORAGE


def flat_to_contract(
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
) -> tuple[Any, ...]:
    """From the flat arguments of a schema to those of the family's contract."""
    pair = None if s is None or y is None else Pair(s, y, y_prev, t)
    return (
        State(s_ring, y_ring, sy, yy, head, count, stats),
        pair,
        grad if out is not None else None,
        tol,
        out,
        prev_out,
    )


def _settled(*args: Any) -> tuple[Any, ...]:
    """Check what a kernel would otherwise trust but the counters, for who calls the registered op itself."""
    op, state, (*vectors, tol, out, prev_out) = "lbfgs_update", State(*args[:7]), args[7:]
    given = next((x for x in (*vectors[:2], out) if x is not None), None)
    if given is None:
        raise _checks.fail(op, "grad, s", "one of them at least", "neither")
    _checks.tensor(op, "s_ring", state.s, STORAGE)
    _checks.tensor(op, "grad or s", given, _checks.REAL)
    storage, double, counter = state.s.dtype, torch.float64, torch.int32
    expected = zip(
        _kernel.arguments, state,
        ("bmn", "bmn", "bmm", "bmm", "b", "b", "be"),
        (storage, storage, double, double, counter, counter, double),
        strict=False,
    )  # fmt: skip
    sizes = _checks.shapes(op, expected, state.s.device, {"e": len(Stats._fields)})
    if sizes["m"] > MAX_HISTORY:
        raise _checks.fail(op, "s_ring", f"at most {MAX_HISTORY} pairs", sizes["m"])
    device = state.s.device
    return (*state, *settled_vectors(op, given.dtype, device, sizes, (*vectors, out, prev_out)), tol, out, prev_out)


_kernel = _register.Kernel(
    "lbfgs",
    "update",
    "lbfgs_update(Tensor(a!) s_ring, Tensor(b!) y_ring, Tensor(c!) sy, Tensor(d!) yy, Tensor(e!) head, "
    "Tensor(f!) count, Tensor(g!) stats, Tensor? grad, Tensor? s, Tensor? y, Tensor? y_prev, Tensor t, float tol, "
    "Tensor(h!)? out, Tensor(i!)? prev_out)",
    settle=_settled,
    contract=flat_to_contract,
    vector=(8, 7),  # s, else grad
)


class Stats(NamedTuple):
    """What a step of `LBFGSHistory` knows at no extra cost; float64 views, () or (B,), on the device.

    gd: g.d. g_norm: |g|_2. g_max: |g|_inf. sy: s.y. s_norm: |s|. y_norm: |y|. accepted: 1.0 if the pair entered the
    history. gamma: scale of H_0.
    """

    gd: Tensor
    g_norm: Tensor
    g_max: Tensor
    sy: Tensor
    s_norm: Tensor
    y_norm: Tensor
    accepted: Tensor
    gamma: Tensor


class LBFGSHistory(TakesPairs):
    """Curvature pairs of L-BFGS in rings of fixed shape, with the Gram matrices that turn a direction into two passes.

    With S^T g, Y^T g and the Gram matrices s_i.y_j and y_i.y_j the two-loop recursion runs on coefficients, so a
    direction reads the history twice (4 m n elements) and needs one reduction. H_0 = gamma I with gamma = s.y / y.y of
    the newest pair, 1 when there is none; a full ring gives up its oldest pair. Nothing here reads a value back to the
    host: which pairs are valid, where the ring starts and how many pairs it holds live on the device.

    Args:
        n: length of a vector, >= 1.
        history_size: m, number of pairs kept, 1 to 256.
        batch: None for one problem, or B >= 1 independent problems, each with its own ring.
        dtype: of gradients and directions, float32 (default) or float64.
        device: of all tensors.
        storage_dtype: of the pairs: float32, float64 or bfloat16; None: `dtype`. The Gram matrices are computed from
            the stored values, so the pairs stay consistent when they are rounded.
        curvature_tol: a pair enters when s.y > curvature_tol |s| |y| and everything is finite; a rejected pair changes
            nothing. None: the machine epsilon of `dtype`.

    Attributes:
        s, y: (m, n) or (B, m, n) rings. sy, yy: float64 (m, m) Gram matrices by slot. head, count: int32 () or (B,),
        next slot and number of pairs. stats: `Stats` of the last call.

    References:
        Byrd, Nocedal, Schnabel, Representations of quasi-Newton matrices, Math. Program. 63 (1994), section 3.
        Chen, Wang, Zhou, Large-scale L-BFGS using MapReduce, NIPS 2014, Algorithm 2 (the recursion on coefficients).

    Example:
        >>> history = secant.LBFGSHistory(3, 10)
        >>> accepted = history.append(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]))     # curvature 2
        >>> bool(accepted), int(history.count)
        (True, 1)
        >>> history.direction(torch.tensor([4.0, 1.0, 3.0]))        # H_0 = I / 2 where it knows nothing
        tensor([-2.0000, -0.5000, -1.5000])
    """

    _kernel = _kernel

    def __init__(
        self,
        n: int,
        history_size: int,
        *,
        batch: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        storage_dtype: torch.dtype | None = None,
        curvature_tol: float | None = None,
    ) -> None:
        op = "LBFGSHistory"
        self._prepare(op, n, batch, dtype, device, curvature_tol)
        self.history_size = _checks.integer(op, "history_size", history_size, 1, MAX_HISTORY)
        self.storage_dtype = dtype if storage_dtype is None else storage_dtype
        if self.storage_dtype not in STORAGE:
            raise TypeError(
                f"{op}: storage_dtype: expected float32, float64 or bfloat16, got {_checks.show(storage_dtype)}"
            )
        b, m, n, storage = self.batch or 1, self.history_size, self.n, self.storage_dtype
        kw: dict[str, Any] = {"device": self.device}
        self._s = torch.empty(b, m, n, dtype=storage, **kw)
        self._y = torch.empty(b, m, n, dtype=storage, **kw)
        if self.device.type == "cpu" and (prepare := getattr(self._backend(), "prepare", None)):
            prepare(self._s, self._y)  # before the zeros are written
        self._s.zero_()
        self._y.zero_()
        self._sy = torch.zeros(b, m, m, dtype=torch.float64, **kw)
        self._yy = torch.zeros(b, m, m, dtype=torch.float64, **kw)
        self._head = torch.zeros(b, dtype=torch.int32, **kw)
        self._count = torch.zeros(b, dtype=torch.int32, **kw)
        self._stats = torch.zeros(b, len(Stats._fields), dtype=torch.float64, **kw)
        self._stats_views = Stats(*(self._stats if batch is not None else self._stats[0]).unbind(-1))
        state = State(self._s, self._y, self._sy, self._yy, self._head, self._count, self._stats)
        self._settle(state, self.curvature_tol)

    def __repr__(self) -> str:
        batch = f", batch={self.batch}" if self.batch is not None else ""
        return (
            f"LBFGSHistory(n={self.n}, history_size={self.history_size}{batch}, dtype={self.dtype}, "
            f"device={self.device}, storage_dtype={self.storage_dtype})"
        )

    def _view(self, x: Tensor) -> Tensor:
        return x if self.batch is not None else x[0]

    @property
    def s(self) -> Tensor:
        """Ring of steps, (m, n) or (B, m, n), by slot."""
        return self._view(self._s)

    @property
    def y(self) -> Tensor:
        """Ring of gradient differences, (m, n) or (B, m, n), by slot."""
        return self._view(self._y)

    @property
    def sy(self) -> Tensor:
        """s_i.y_j by slot, float64, 0 where i is newer than j (the recursion never asks for those)."""
        return self._view(self._sy)

    @property
    def yy(self) -> Tensor:
        """y_i.y_j by slot, float64."""
        return self._view(self._yy)

    @property
    def head(self) -> Tensor:
        """Slot that the next accepted pair takes, int32, () or (B,)."""
        return self._view(self._head)

    @property
    def count(self) -> Tensor:
        """Number of pairs held, int32, () or (B,)."""
        return self._view(self._count)

    @property
    def stats(self) -> Stats:
        """Scalars of the last call, as views of `stats_tensor`."""
        return self._stats_views

    @property
    def stats_tensor(self) -> Tensor:
        """Return the scalars of the last call, float64, (8,) or (B, 8), columns as `Stats`: one transfer."""
        return self._view(self._stats)

    def reset(self) -> None:
        """Forget every pair; the next direction is -grad."""
        for x in self._state:
            x.zero_()

    def forget(self, which: Tensor) -> None:
        """Forget the pairs of some problems of a batch; their next direction is -grad.

        Args:
            which: (B,), bool, on the device.

        Raises:
            ValueError: it is no such mask, or this is no batch.
        """
        if which.dtype is not torch.bool or which.shape != (self.batch,):
            raise _checks.fail("forget", "which", f"a bool tensor ({self.batch},)", _checks.describe(which))
        for x in self._state:
            x.masked_fill_(which.view(-1, *[1] * (x.dim() - 1)), 0)

    def take(self, places: Tensor) -> LBFGSHistory:
        """Make a history of some of the problems of a batch, with their pairs.

        Args:
            places: (b,), int64, b >= 1, in any order.

        Raises:
            ValueError: it is no batch.
        """
        if self.batch is None:
            raise _checks.fail("take", "self", "a history with batch=B", "one of a single problem")
        new = LBFGSHistory(
            self.n,
            self.history_size,
            batch=len(places),
            dtype=self.dtype,
            device=self.device,
            storage_dtype=self.storage_dtype,
            curvature_tol=self.curvature_tol,
        )
        for mine, theirs in zip(new._state, self._state, strict=True):
            torch.index_select(theirs, 0, places, out=mine)
        return new

    def state_dict(self) -> dict[str, Tensor]:
        """Return rings, Gram matrices and counters: six tensors of fixed shape (references, as torch's modules)."""
        return {"s": self.s, "y": self.y, "sy": self.sy, "yy": self.yy, "head": self.head, "count": self.count}

    def _check_contents(self, state: dict[str, Tensor]) -> None:
        # A kernel takes these for places in the ring.
        for key, high in (("head", self.history_size - 1), ("count", self.history_size)):
            if state[key].numel():
                low, top = (int(x) for x in torch.aminmax(state[key]))
                if low < 0 or top > high:
                    raise _checks.fail(
                        "load_state_dict", f"state[{key!r}]", f"numbers in 0..{high}", f"values in {low}..{top}"
                    )
