"""Steps preconditioned tile by tile, orthogonalisation, roots: `Tiles`, `newton_schulz`, `newton_inv_root`.

The mathematics and the bytes that must move are in `kernels/precond/README.md`; the contract between this module and
the kernels is in `kernels/precond/reference.py`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from secant import _checks
from secant.kernels.precond.contract import ADAM, APPLY, GRAFTS, GRAMS, NONE, Rule, Tensors
from secant.kernels.precond.reference import coupled
from secant.ops import _gate, _register
from secant.ops._blocks_dispatch import largest_eigenproblem
from secant.ops.blocks import block_eigh, block_inv_root

#: Coefficients of the quintic that Muon iterates (Jordan et al., 2024).
MUON = (3.4445, -4.7750, 2.0315)
_DTYPES = _checks.REAL + _checks.HALF
#: Entries of a tile that Adam steps: as many as share a core's first-level cache with their states.
_ADAM_ENTRIES = 2048
_STATES = ("exp_avg", "exp_avg_sq", "left", "right", "left_root", "right_root")
_CPU = torch.device("cpu")
#: Which matrices of a group are meant.
_Places: TypeAlias = slice | Tensor


def _contract(*args: Any) -> tuple[Any, ...]:
    lists, layout, lr, lr_value = args[:9], args[9], args[10], args[11]
    return Tensors(*lists), layout, lr_value if lr is None else lr, Rule(*args[12:20]), args[20], args[21]


def _settled(*args: Any) -> tuple[Any, ...]:
    """Check what a kernel would otherwise trust, for who calls the registered op itself; params become contiguous."""
    op = "precond_step"
    lists, layout = args[:9], args[9]
    count = len(lists[0])
    for name, members in zip(Tensors._fields, lists, strict=True):
        if len(members) != count or not count:
            raise _checks.fail(op, name, f"as many tensors as params, at least one ({count})", len(members))
    if layout.shape != (count, 6) or layout.dtype is not torch.int64 or layout.device.type != "cpu":
        raise _checks.fail(op, "layout", f"int64 on the CPU, of shape ({count}, 6)", _checks.describe(layout))
    rows = []
    for k, (given, (_, _, down, across, _, _)) in enumerate(
        zip(zip(*lists, strict=True), layout.tolist(), strict=True)
    ):
        rows.append(_check_member(op, k, Tensors(*given), lists, down, across))
    lr, skipped = args[10], args[21]
    device = lists[0][0].device
    if lr is not None and (lr.numel() != 1 or lr.dtype not in _checks.REAL or lr.device not in (device, _CPU)):
        raise _checks.fail(op, "lr", "a scalar of float32 or float64", _checks.describe(lr))
    _checks.shaped(op, "skipped", skipped, (), torch.int64, device)
    if not 0 <= args[17] < len(GRAFTS) or args[20] not in (GRAMS, APPLY, GRAMS | APPLY):
        raise _checks.fail(op, "graft, phases", "0 to 3, and 1 to 3", (args[17], args[20]))
    for k, (v, *roots) in enumerate(zip(lists[3], lists[6], lists[7], strict=True)):
        needs = args[18] or args[17] == ADAM or not any(x.numel() for x in roots)
        if needs and not v.numel():
            raise _checks.fail(op, f"exp_avg_sq[{k}]", "as many elements as the tensor", "none")
    settled = [[x.resolve_neg().contiguous() for x in members] for members in lists]
    return (*settled, torch.tensor(rows), *args[10:])


def _check_member(op: str, k: int, x: Any, lists: Any, down: int, across: int) -> list[int]:
    """Check the k-th tensor and its states; return its row of a layout, contiguous."""
    first = lists[0][0]
    _checks.shaped(op, f"params[{k}]", x.params, tuple(x.params.shape), first.dtype, first.device)
    if x.params.dtype not in _DTYPES or x.params.numel() == 0:
        raise _checks.fail(op, f"params[{k}]", "real numbers, at least one", _checks.describe(x.params))
    _checks.shaped(op, f"grads[{k}]", x.grads, tuple(x.params.shape), first.dtype, first.device)
    rows, columns = matrix(x.params.shape)
    if not (1 <= down <= rows and 1 <= across <= columns):
        raise _checks.fail(op, f"layout[{k}]", f"1 to {rows} tiles down and 1 to {columns} across", (down, across))
    tiles, sizes = down * across, {"left": -(-rows // down), "right": -(-columns // across)}
    storage = lists[2][0].dtype
    wide = _checks.arithmetic(first.dtype)
    if storage not in (wide, torch.bfloat16):
        raise _checks.fail(op, "exp_avg", f"{wide} or bfloat16", storage)
    shapes: dict[str, list[tuple[int, ...]]] = {"exp_avg": [(rows * columns,)], "exp_avg_sq": [(rows * columns,), (0,)]}
    for side, n in sizes.items():
        shapes[side] = [(tiles * (n * (n + 1) // 2),), (0,)]
        shapes[f"{side}_root"] = [(tiles * n * n,), (0,)]
    for name in _STATES:
        state = getattr(x, name)
        _checks.tensor(op, f"{name}[{k}]", state, (storage,), first.device)
        if (state.numel(),) not in shapes[name]:
            raise _checks.fail(op, f"{name}[{k}]", f"{shapes[name][0][0]} elements", state.numel())
    for side in sizes:
        if getattr(x, side).numel() > 0 and getattr(x, f"{side}_root").numel() == 0:
            raise _checks.fail(op, f"{side}_root[{k}]", f"as many tiles as {side}", "none")
    if x.step.numel() != 1 or x.step.dtype is not torch.float32 or x.step.device not in (first.device, _CPU):
        raise _checks.fail(op, f"step[{k}]", "a scalar of float32", _checks.describe(x.step))
    return [rows, columns, down, across, columns, 1]


def _settled_schulz(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Check what a kernel would otherwise trust, for who calls the registered op itself."""
    op = "newton_schulz"
    _checks.tensor(op, "x", x, _DTYPES)
    _checks.shapes(op, (("x", x, "bmn", x.dtype), ("out", rest[-1], "bmn", x.dtype)), x.device)
    return x.resolve_neg().contiguous(), *rest


def _settled_root(a: Tensor, p: int, *rest: Any) -> tuple[Any, ...]:
    """Check what a kernel would otherwise trust, for who calls the registered op itself."""
    op, (out, info) = "newton_inv_root", rest[-2:]
    _checks.tensor(op, "a", a, _DTYPES)
    _checks.shapes(
        op, (("a", a, "bnn", a.dtype), ("out", out, "bnn", a.dtype), ("info", info, "b", torch.int32)), a.device
    )
    if p not in (1, 2, 4):
        raise _checks.fail(op, "p", "1, 2 or 4", p)
    return a.resolve_neg().contiguous(), p, *rest


_step = _register.Kernel(
    "precond",
    "step",
    "precond_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!)[] left, Tensor(e!)[] right, Tensor[] left_root, Tensor[] right_root, Tensor[] step, Tensor layout, "
    "Tensor? lr, float lr_value, float beta1, float beta2, float beta_gram, float eps, float weight_decay, int graft, "
    "bool rotate, bool maximize, int phases, Tensor(f!) skipped)",
    settle=_settled,
    contract=_contract,
)
_newton_schulz = _register.Kernel(
    "precond",
    "newton_schulz",
    "newton_schulz(Tensor x, int steps, float a, float b, float c, float eps, Tensor(a!) out)",
    settle=_settled_schulz,
)
_newton_inv_root = _register.Kernel(
    "precond",
    "newton_inv_root",
    "newton_inv_root(Tensor a, int p, float damping, int steps, float tolerance, Tensor(a!) out, Tensor(b!) info)",
    settle=_settled_root,
)


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return the sides of the matrix that a tensor of this shape is: its first dimension by all others."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def tiling(shape: Sequence[int], block_size: int | None, max_side: int) -> tuple[int, int]:
    """Return how many tiles there are down and across: sides of at most `block_size` entries, or of `max_side`."""
    rows, columns = matrix(shape)
    side = max_side if block_size is None else block_size
    return (-(-rows // side), -(-columns // side)) if len(shape) > 1 else (1, -(-columns // _ADAM_ENTRIES))


def _strides(x: Tensor) -> tuple[int, int] | None:
    """Return the strides of the matrix that a tensor is, None where its other dimensions do not share one."""
    if x.is_contiguous():
        return matrix(x.shape)[1], 1
    *outer, last = [(n, s) for n, s in zip(x.shape[1:], x.stride()[1:], strict=True) if n > 1] or [(1, 1)]
    reach = last[1]
    size = last[0]
    for n, stride in reversed(outer):
        if stride != reach * size:
            return None
        size *= n
    return (x.stride(0), reach) if x.dim() > 1 else (x.numel(), x.stride(0))


class Tiles:
    """Steps tensors that are cut into tiles, each with preconditioners of its own: the machinery of Shampoo and SOAP.

    A tensor of two or more dimensions is a matrix, its first dimension by all others, and is cut evenly into tiles of
    at most `block_size` on each side (97 into 49 and 48). Each tile G of the gradient feeds the averages

        L <- beta_gram L + (1 - beta_gram) G G^T,      R <- beta_gram R + (1 - beta_gram) G^T G,

    of which `refresh` makes inverse roots or eigenvectors, and `step` applies what was made last. Vectors and scalars
    are stepped by Adam in the same call. The formulas are in `kernels/precond/reference.py`.

    Args:
        params: tensors with at least one element, all of one dtype (float32, float64, bfloat16, float16) and device.
        states: for each a dictionary of `new_state`, which is stepped in place.
        block_size, max_side: what `new_state` was given.
        skipped: None, or the counter to use: a scalar of int64 on the device.

    Attributes:
        skipped: scalar of int64 on the device: how many tiles were left as they were, because their gradient or their
            step was not finite, since it was created.

    Raises:
        ValueError: a tensor or a state is not what it may be.

    Example:
        >>> w = torch.eye(2)
        >>> state = secant.ops.Tiles.new_state(w)
        >>> tiles = secant.ops.Tiles([w], [state])
        >>> _ = state["step"].add_(1)
        >>> tiles.update_grams([torch.tensor([[3.0, 0.0], [0.0, 1.0]])])
        >>> state["left"]                               # .05 G G^T, the lower triangle
        tensor([[0.4500, 0.0000, 0.0500]])
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        *,
        block_size: int | None = 64,
        max_side: int = 1024,
        skipped: Tensor | None = None,
    ) -> None:
        op = "Tiles"
        if not params or len(params) != len(states):
            raise _checks.fail(op, "params, states", "as many, at least one", f"{len(params)} and {len(states)}")
        first = params[0]
        for i, p in enumerate(params):
            _checks.tensor(op, f"params[{i}]", p, _DTYPES)
            if not _gate.is_plain(p):
                raise _checks.fail(op, f"params[{i}]", "a plain tensor with memory of its own", type(p).__name__)
        self.device, self.dtype = first.device, first.dtype
        if skipped is None:
            skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.skipped = _checks.shaped(op, "skipped", skipped, (), torch.int64, self.device)
        self._params = list(params)
        empty = torch.empty(0, dtype=states[0]["exp_avg"].dtype, device=self.device)
        lists = [[s.get(name, empty) for s in states] for name in _STATES]
        self._states = (*lists, [s["step"] for s in states])
        tensors = (self._params, self._params, *self._states)
        self._cuts = [tiling(p.shape, block_size, max_side) for p in params]
        for k, given in enumerate(zip(*tensors, strict=True)):
            _check_member(op, k, Tensors(*given), tensors, *self._cuts[k])
            for name, x in zip(_STATES, given[2:], strict=False):
                if not x.is_contiguous():
                    raise _checks.fail(op, f"states[{k}][{name!r}]", "contiguous", f"strides {x.stride()}")
        #: Whether every tensor has an average of squares, as Adam's steps and lengths need.
        self.second_moment = all(x.numel() for x in self._states[1])
        self._groups = self._by_size()
        self._shares: dict[int, list[list[_Places]]] = {}
        self._lay_out()

    @staticmethod
    def new_state(
        param: Tensor,
        *,
        block_size: int | None = 64,
        max_side: int = 1024,
        one_sided: bool = False,
        second_moment: bool = True,
        dtype: torch.dtype | None = None,
        capturable: bool = False,
    ) -> dict[str, Tensor]:
        """Make the state of one tensor: averages of zero, and roots that are the identity.

        Args:
            param: the tensor.
            block_size: largest side of a tile; None: whole sides, up to `max_side`.
            max_side: sides that are longer are cut, whatever `block_size` is.
            one_sided: precondition the shorter side of each tile alone (the right one of squares).
            second_moment: whether there is an `exp_avg_sq`. Vectors have one always.
            dtype: of the state, that of the arithmetic by default, or bfloat16.
            capturable: whether `step` is on the device.

        Returns:
            exp_avg, exp_avg_sq: as `param`, contiguous. left (tiles, nl (nl + 1) / 2), right (tiles, nr (nr + 1) / 2):
            lower triangles; left_root (tiles, nl, nl), right_root (tiles, nr, nr). step: scalar of float32.
        """
        if param.numel() == 0:
            raise _checks.fail("Tiles.new_state", "param", "at least one element", f"shape {tuple(param.shape)}")
        dtype = _checks.arithmetic(param.dtype) if dtype is None else dtype
        rows, columns = matrix(param.shape)
        down, across = tiling(param.shape, block_size, max_side)
        make: dict[str, Any] = {"dtype": dtype, "device": param.device}
        state = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device if capturable else "cpu"),
            "exp_avg": torch.zeros(param.shape, **make),
        }
        if second_moment or param.dim() < 2:
            state["exp_avg_sq"] = torch.zeros(param.shape, **make)
        sides = {"left": -(-rows // down), "right": -(-columns // across)}
        if param.dim() < 2:
            sides = {}
        elif one_sided:
            shorter = "left" if sides["left"] < sides["right"] else "right"
            sides = {shorter: sides[shorter]}
        for side, n in sides.items():
            state[side] = torch.zeros(down * across, n * (n + 1) // 2, **make)
            state[f"{side}_root"] = torch.eye(n, **make).expand(down * across, n, n).clone()
        return state

    def update_grams(self, grads: Sequence[Tensor], *, beta_gram: float = 0.95, maximize: bool = False) -> None:
        """Update the Gram averages alone, so that roots can be made of them before `apply`."""
        rule = Rule(0.0, 0.0, beta_gram, 1.0, 0.0, NONE, False, maximize)
        self._launch(grads, 0.0, rule, GRAMS)

    def apply(self, grads: Sequence[Tensor], *, lr: float | Tensor, rule: Rule) -> None:
        """Do what `step` does but for the Gram averages."""
        self._launch(grads, lr, rule, APPLY)

    def step(self, grads: Sequence[Tensor], *, lr: float | Tensor, rule: Rule) -> None:
        """Update averages and parameters in one pass. The states' `step` has been counted already.

        Args:
            grads: one for each parameter, of its shape, dtype and device.
            lr: a number, or a scalar tensor.
            rule: the numbers of `kernels/precond/reference.py`.
        """
        self._launch(grads, lr, rule, GRAMS | APPLY)

    def refresh(
        self,
        *,
        root: int = 2,
        damping: float = 1e-4,
        beta_gram: float | None = None,
        method: str = "eigh",
        process_group: Any = None,
    ) -> None:
        """Compute (A / (1 - beta_gram^t) + damping lambda_max I)^(-e), e = 1 / root, of all Gram averages A.

        Negative eigenvalues count as zero, and lambda_max is the largest. Where an average is zero or not finite the
        root is left as it was, at first the identity. Matrices of one size are one batch.

        Args:
            root: 1, 2 or 4.
            damping: relative to the largest eigenvalue.
            method: "eigh", by eigenvalues, or "newton", by `newton_inv_root`: lambda_max is then the norm that it says,
                negative eigenvalues are what damping makes of them, and where it has not converged the root is left as
                it was, too.
            beta_gram: None: without the correction by 1 - beta_gram^t, which a graft undoes.
            process_group: None, or one whose processes all call this with equal averages: each finds the roots of some
                of the matrices, about equal in cost, and all get all of them, in one exchange.
        """

        def of(group: _Side, a: Tensor, mine: _Places, old: Tensor) -> tuple[Tensor, Tensor]:
            new, good = _root(a, root, damping) if method == "eigh" else _newton_root(a, root, damping)
            if beta_gram is not None:
                new = new * group.corrections(beta_gram, 1 / root, a)[mine, None, None]
            return new, good

        self._refresh(of, process_group)

    def refresh_basis(self, *, process_group: Any = None) -> None:
        """Compute the eigenvectors of all Gram averages, in the order of ascending eigenvalues.

        One whose average is not finite is left as it was.

        Args:
            process_group: as for `refresh`.
        """

        def of(group: _Side, a: Tensor, mine: _Places, old: Tensor) -> tuple[Tensor, Tensor]:
            if group.padding is not None:  # larger than all others, so that what is not there comes last
                _diagonal(a).add_(group.padding[mine] * (_diagonal(a).sum(1, keepdim=True) + 1))
            _, vectors, good = _eigh(a, old.to(a.dtype))
            return vectors, good

        self._refresh(of, process_group)

    def _refresh(
        self, of: Callable[[_Side, Tensor, _Places, Tensor], tuple[Tensor, Tensor]], process_group: Any
    ) -> None:
        """Replace the roots by what a function makes of averages; those that are not good stay."""
        ranks, rank = (1, 0) if process_group is None else (process_group.size(), process_group.rank())
        places = self._places_of(ranks)
        found = []
        for group, of_ranks in zip(self._groups, places, strict=True):
            mine = of_ranks[rank]
            old = group.roots_of(mine)
            if len(old):
                new, good = of(group, group.averages_of(mine), mine, old)
                old = torch.where(good[:, None, None], new.to(old.dtype), old)
            found.append(old)
        if ranks > 1 and found:
            found = _gathered(found, [group.count for group in self._groups], places, process_group)
        for group, new in zip(self._groups, found, strict=True):
            group.scatter(new)

    def _places_of(self, ranks: int) -> list[list[_Places]]:
        """Return which matrices of each group are whose."""
        if ranks == 1:
            return [[slice(None)] for _ in self._groups]
        if ranks not in self._shares:
            owners = shares([(group.count, group.n**3) for group in self._groups], ranks)
            self._shares[ranks] = [
                [torch.tensor(x, dtype=torch.int64, device=self.device) for x in of_ranks] for of_ranks in owners
            ]
        return self._shares[ranks]

    def _launch(self, grads: Sequence[Tensor], lr: float | Tensor, rule: Rule, phases: int) -> None:
        if phases & APPLY and not self.second_moment and (rule.rotate or rule.graft == ADAM):
            raise _checks.fail("Tiles", "states", "an exp_avg_sq in each of them", "some without")
        laid = self._laid(grads)
        rate, value = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
        params = self._params
        copies = None
        if self._scattered:
            copies = [p.contiguous() for p in params]
            params = copies
        _step.launch(params, laid, *self._states, self._layout, rate, value, *rule, phases, self.skipped)
        if copies is not None:
            for p, x in zip(self._params, copies, strict=True):
                if x is not p:
                    p.copy_(x)
        if phases & APPLY:
            _gate.written(*self._params)  # no graph has the states in it

    def _laid(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Check the gradients, and return them with the strides of the parameters."""
        if len(grads) != len(self._params):
            raise _checks.fail("Tiles", "grads", f"{len(self._params)} tensors", len(grads))
        laid = list(grads)
        for i, (g, p) in enumerate(zip(grads, self._params, strict=True)):
            if g.dtype is not p.dtype or g.shape != p.shape or g.device != p.device or g.layout is not torch.strided:
                _checks.shaped("Tiles", f"grads[{i}]", g, tuple(p.shape), p.dtype, p.device)
            if type(g) is not Tensor and type(g) is not torch.nn.Parameter:
                raise _checks.fail("Tiles", f"grads[{i}]", "a plain tensor with memory of its own", type(g).__name__)
            strides = p.stride()
            if strides != self._strides[i]:  # someone gave the parameter other memory
                self._lay_out()
                return self._laid(grads)
            if self._scattered:
                laid[i] = g.resolve_neg().contiguous()
            elif g.stride() != strides or g.is_neg():
                laid[i] = torch.empty_strided(p.shape, strides, dtype=p.dtype, device=p.device).copy_(g)
        return laid

    def _lay_out(self) -> None:
        """Write down where the entries of each parameter are."""
        self._strides = [p.stride() for p in self._params]
        found = [_strides(p) if not p.is_neg() and _gate.has_own_addresses(p) else None for p in self._params]
        #: Whether the dimensions of a parameter are no two strides: all are then stepped in contiguous copies.
        self._scattered = None in found
        rows = [matrix(p.shape) for p in self._params]
        strides = [(n, 1) if self._scattered or s is None else s for (_, n), s in zip(rows, found, strict=True)]
        self._layout = torch.tensor([(*a, *b, *c) for a, b, c in zip(rows, self._cuts, strides, strict=True)])

    def _by_size(self) -> list[_Side]:
        """Gather the Gram averages of one size into groups."""
        sizes: dict[int, list[_Member]] = {}
        _, _, left, right, left_root, right_root, step = self._states
        for k, p in enumerate(self._params):
            down, across = self._cuts[k]
            rows, columns = matrix(p.shape)
            heights = [n for n in _pieces(rows, down) for _ in range(across)]
            widths = _pieces(columns, across) * down
            for packed, root, real in ((left[k], left_root[k], heights), (right[k], right_root[k], widths)):
                if packed.numel():
                    n = max(real)
                    member = _Member(packed.view(len(real), -1), root.view(-1, n, n), step[k], real)
                    sizes.setdefault(n, []).append(member)
        return [_Side(n, members) for n, members in sorted(sizes.items())]


class _Member(NamedTuple):
    """Gram averages of one side of a tensor, their roots, the number of the step, and the sizes of the tiles."""

    packed: Tensor
    root: Tensor
    step: Tensor
    real: list[int]


class _Side:
    """Gram averages of one size, from whatever tensor and side."""

    def __init__(self, n: int, members: list[_Member]) -> None:
        self.n = n
        self.packed, self.roots = [x.packed for x in members], [x.root for x in members]
        self.steps = [x.step for x in members]
        device = self.packed[0].device
        i = torch.arange(n)
        low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
        self._entries = (high * (high + 1) // 2 + low).flatten().to(device)
        self._tiles = [len(x) for x in self.packed]
        self.count = sum(self._tiles)
        real = [size for x in members for size in x.real]
        #: (tiles, n): 1 on the diagonal where a tile is smaller; None where all are of this size.
        self.padding = None
        if min(real) < n:
            self.padding = (i >= torch.tensor(real)[:, None]).to(device, torch.float32)

    def averages_of(self, mine: _Places) -> Tensor:
        """Return averages as symmetric matrices (tiles, n, n), in the dtype of the arithmetic."""
        packed = (self.packed[0] if len(self.packed) == 1 else torch.cat(self.packed))[mine]
        return packed.index_select(1, self._entries).view(-1, self.n, self.n).to(_checks.arithmetic(packed.dtype))

    def corrections(self, beta: float, power: float, like: Tensor) -> Tensor:
        """Compute (1 - beta^t)^power for each tile, without waiting for the device."""
        parts = []
        for t, tiles in zip(self.steps, self._tiles, strict=True):
            if t.device == like.device and t.device.type != "cpu":
                parts.append((1 - beta ** t.to(like.dtype)).pow(power).expand(tiles))
            else:
                parts.append(like.new_full((tiles,), (1 - beta ** t.item()) ** power))
        return torch.cat(parts)

    def roots_of(self, mine: _Places) -> Tensor:
        """Return what was made of them, (tiles, n, n)."""
        return (self.roots[0] if len(self.roots) == 1 else torch.cat(self.roots))[mine]

    def scatter(self, new: Tensor) -> None:
        """Write what was made of all averages where it belongs."""
        torch._foreach_copy_(self.roots, new.split(self._tiles))


def shares(sizes: Sequence[tuple[int, float]], ranks: int) -> list[list[list[int]]]:
    """Share matrices out over processes, the dearest first, each to who has the least to do.

    No process has more to do than another by more than one matrix costs.

    Args:
        sizes: how many matrices each group has, and what one costs.

    Returns:
        Of each group and process, which matrices of the group it has, ascending.

    References:
        Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl. Math. 17 (1969).
    """
    found: list[list[list[int]]] = [[[] for _ in range(ranks)] for _ in sizes]
    loads = [(0.0, rank) for rank in range(ranks)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][1]):
        count, cost = sizes[i]
        for k in range(count):
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + cost, rank))
            found[i][rank].append(k)
    return found


def _gathered(mine: list[Tensor], counts: list[int], places: list[list[Any]], process_group: Any) -> list[Tensor]:
    """Gather from all processes the matrices of each group that are theirs, in one exchange."""
    ranks = process_group.size()
    squares = [x.shape[-1] ** 2 for x in mine]
    sizes = [[len(of_ranks[rank]) * n for of_ranks, n in zip(places, squares, strict=True)] for rank in range(ranks)]
    own = torch.cat([x.reshape(-1) for x in mine])
    padded = own.new_zeros(max(map(sum, sizes)))
    padded[: len(own)] = own
    received = [torch.empty_like(padded) for _ in range(ranks)]
    torch.distributed.all_gather(received, padded, group=process_group)
    found = [x.new_empty(count, *x.shape[1:]) for x, count in zip(mine, counts, strict=True)]
    for rank, flat in enumerate(received):
        parts = flat[: sum(sizes[rank])].split(sizes[rank])
        for whole, of_ranks, part in zip(found, places, parts, strict=True):
            whole[of_ranks[rank]] = part.view(-1, *whole.shape[1:])
    return found


def _pieces(size: int, pieces: int) -> list[int]:
    """Return the lengths into which a side is cut."""
    return [size // pieces + (i < size % pieces) for i in range(pieces)]


def _diagonal(a: Tensor) -> Tensor:
    return a.diagonal(dim1=1, dim2=2)


def _eigh(a: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(values, vectors, which came out) of symmetric matrices; `near`: eigenvectors of what they were before."""
    if a.shape[-1] <= largest_eigenproblem(a.device, a.dtype):
        w, v, info = block_eigh(a, vectors=near)
        return w, v, info == 0
    good = a.isfinite().all(-1).all(-1)
    w, v = torch.linalg.eigh(torch.where(good[:, None, None], a, 0.0))
    return w, v, good


def _root(a: Tensor, root: int, damping: float) -> tuple[Tensor, Tensor]:
    """(roots, which came out) of symmetric matrices, damped relative to their largest eigenvalues."""
    if a.shape[-1] <= largest_eigenproblem(a.device, a.dtype):
        x, info = block_inv_root(a, root, damping=("max", damping))
        return x, (info >= 0) & (_diagonal(a).amax(1) > 0)
    w, v, good = _eigh(a)
    top = w[:, -1:]
    w = torch.where(top > 0, w.clamp(min=0) + damping * top, 1.0).pow(-1 / root)
    return (v * w[:, None, :]) @ v.mT, good & (top[:, 0] > 0)


def _newton_root(a: Tensor, root: int, damping: float) -> tuple[Tensor, Tensor]:
    """(roots, which came out), by products of matrices."""
    x, info = newton_inv_root(a, root, damping=damping)
    return x, (info == 0) & (_diagonal(a).amax(1) > 0)


@_register.whole
def newton_schulz(
    x: Tensor,
    steps: int = 5,
    *,
    coefficients: tuple[float, float, float] = MUON,
    eps: float = 1e-7,
    out: Tensor | None = None,
) -> Tensor:
    """Orthogonalise matrices, X -> X (X^T X)^(-1/2) roughly, by the Newton-Schulz iteration of Muon.

    From X = x / max(|x|_F, eps), `steps` times

        X <- a X + (b A + c A^2) X,      A = X X^T,

    which takes each singular value s to a s + b s^3 + c s^5 and leaves the singular vectors. The default coefficients
    are Muon's: steep at zero and no fixed point at 1, so that after 5 steps singular values from about 0.01 on lie
    within 0.68 and 1.14. (15/8, -10/8, 3/8) converge to 1, from above zero and more slowly.

    Args:
        x: (..., m, n), float32, float64, bfloat16 or float16, any strides; computed in float32 or float64. A matrix
            with more rows than columns is taken transposed, which gives the same.
        steps: an integer, 0 to 100.
        coefficients: a, b and c, finite numbers.
        eps: a number > 0.
        out: as `x`; receives the result, and may be `x` itself.

    Returns:
        as `x`. A matrix of zeros stays one; one that is not finite becomes NaN, and the others are as without it.
        Differentiable, forward and reverse mode, any number of times, through products of torch.

    Raises:
        TypeError: `x` is no tensor, or of another dtype.
        ValueError: shapes, `steps`, `coefficients`, `eps` or `out` do not fit.

    References:
        Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024. Higham, Functions of Matrices,
        section 8.3.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
        >>> secant.ops.newton_schulz(x, 12, coefficients=(15 / 8, -10 / 8, 3 / 8))
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    op = "newton_schulz"
    _checks.tensor(op, "x", x, _DTYPES)
    if x.dim() < 2:
        raise _checks.fail(op, "x", "shape (..., m, n)", f"shape {tuple(x.shape)}")
    steps = _checks.integer(op, "steps", steps, 0, 100)
    if not isinstance(coefficients, (tuple, list)) or len(coefficients) != 3:
        raise _checks.fail(op, "coefficients", "three numbers", _checks.show(coefficients))
    a, b, c = (_checks.number(op, "coefficients", v) for v in coefficients)
    eps = _checks.positive(op, "eps", eps)
    if out is not None:
        _gate.output(op, out, tuple(x.shape), x.dtype, x.device, {"x": x}, same="x")
    if _gate.is_transformed(x):
        if out is not None:
            raise _checks.fail(op, "out", "None where x is differentiated or batched", "a tensor")
        return _iterated(x, steps, a, b, c, eps)
    # A registered op may not write to an input, so that a compiled call copies.
    direct = out is not None and out.is_contiguous() and not out.is_neg() and _gate.is_plain(x, out)
    result = out if out is not None and direct else x.new_empty(x.shape)
    if x.numel():
        flat = x.resolve_neg().reshape(-1, *x.shape[-2:]).contiguous()
        _newton_schulz(flat, steps, a, b, c, eps, result.view(-1, *x.shape[-2:]))
    if out is None:
        return result
    if not direct:
        return out.copy_(result)
    _gate.written(out)
    return out


def _iterated(x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """Iterate by differentiable functions of torch."""
    y = x.to(_checks.arithmetic(x.dtype))
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / (y * y).sum((-2, -1), keepdim=True).clamp(min=eps * eps).sqrt()
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).to(x.dtype)


@_register.whole
def newton_inv_root(a: Tensor, p: int, *, damping: float = 1e-4, steps: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute inverse p-th roots of positive semidefinite matrices by the coupled Newton iteration.

    For B = A + damping |A| I, with |A| = (sum_i |w_i|^64)^(1/64) of the eigenvalues w of A (the largest one to within
    n^(1/64), 7% at n = 64; from the norms of five squares), iterate from M = z B and X = I, z = (p + 1) / (2 (1 +
    damping) |A|),

        T = ((p + 1) I - M) / p,      X <- X T,      M <- T^p M,

    and return z^(1/p) X. M tends to I, quadratically in the end, and X to M^(-1/p) where it began. All of it is
    products of matrices, log2(p) + 2 a step, and some 20 steps for a damping of 1e-4: more arithmetic than the
    eigenvectors of `block_inv_root` take, but of the kind that a GPU does best, and for any size.

    In exact arithmetic X is right to u, the unit roundoff; a rounding error of u |M| in M moves its smallest
    eigenvalue, |M| / k, by the relative amount u k, as it does those that `block_inv_root` finds in this precision.
    To first order the relative error of X in the 2-norm is at most n u (4 k + 6 steps), k = 1 + 1 / damping at most.

    Args:
        a: (..., n, n), symmetric, float32, float64, bfloat16 or float16 (the last two are computed in float32), any
            strides; only the lower triangle is read.
        p: 1, 2 or 4.
        damping: a number > 0, at most 1e6, relative to |A|.
        steps: cap on the iteration, 1 to 500; None: as many as the smallest eigenvalue needs that is there after
            damping, and two more.

    Returns:
        (x, info): x as `a`, contiguous, exactly symmetric, without NaN; info (...), int32: 0; -1 where the matrix has
        an entry that is not finite, with zeros in x; k > 0 where it had not converged after k steps (|M - I|_F above
        sqrt(u / 8)) or was left off there, because |M - I|_F grew as it does where B has a negative eigenvalue; x is
        then what it was. A matrix of zeros has the root 0: what is preconditioned with it does not move.

        Differentiable in `a`, forward and reverse mode, any number of times, through products of torch.

    Raises:
        TypeError: `a` is no tensor, or of another dtype.
        ValueError: shape, `p`, `damping` or `steps` do not fit.

    References:
        Guo and Higham, A Schur-Newton method for the matrix p-th root and its inverse, SIAM J. Matrix Anal. Appl. 28
        (2006), equation (3.4); Higham, Functions of Matrices, section 7.3; Anil et al., Scalable second order
        optimization for deep learning, arXiv 2002.09018, Algorithm 2 (z, and giving up where the error grows).

    Example:
        >>> x, info = secant.ops.newton_inv_root(torch.diag(torch.tensor([4.0, 16.0])), 2, damping=1e-6)
        >>> x.diagonal()
        tensor([0.5000, 0.2500])
    """
    op = "newton_inv_root"
    _checks.tensor(op, "a", a, _DTYPES)
    if a.dim() < 2 or a.shape[-1] != a.shape[-2] or a.shape[-1] == 0:
        raise _checks.fail(op, "a", "square matrices, shape (..., n, n)", f"shape {tuple(a.shape)}")
    if not isinstance(p, int) or isinstance(p, bool) or p not in (1, 2, 4):
        raise _checks.fail(op, "p", "1, 2 or 4", _checks.show(p))
    damping = _checks.number(op, "damping", damping, "a number > 0, at most 1e6", lambda x: 0.0 < x <= 1e6)
    wide = _checks.arithmetic(a.dtype)
    tolerance = math.sqrt(torch.finfo(wide).eps) / 4
    cap = _steps(p, damping, tolerance) if steps is None else _checks.integer(op, "steps", steps, 1, 500)
    if _gate.is_transformed(a):
        y = a.to(wide)
        _, info = coupled(y.detach(), p, damping, cap, tolerance)
        x, _ = coupled(y, p, damping, cap + 2, 0.0)  # derivatives converge a step later
        return x.to(a.dtype), info
    out, info = a.new_empty(a.shape), a.new_empty(a.shape[:-2], dtype=torch.int32)
    if a.numel():
        flat = a.resolve_neg().reshape(-1, *a.shape[-2:]).contiguous()
        _newton_inv_root(flat, p, damping, cap, tolerance, out.view(flat.shape), info.view(-1))
    return out, info


def _steps(p: int, damping: float, tolerance: float) -> int:
    """Count the steps from both ends of the eigenvalues of M, and two for rounding and for their number."""
    most = 0
    for m in ((p + 1) / 2, (p + 1) / 2 * damping / (1 + damping)):
        k = 0
        while abs(1 - m) > tolerance and k < 497:
            m *= ((p + 1 - m) / p) ** p
            k += 1
        most = max(most, k)
    return most + 3
