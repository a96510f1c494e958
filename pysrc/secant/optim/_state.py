"""States of `LBFGS` that come from elsewhere: checked, adopted from `torch.optim.LBFGS`, offered to another history."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant.ops.history import LBFGSHistory
from secant.optim._options import is_integer, is_number

OP = "LBFGS.load_state_dict"
#: What the state has besides tensors, at the start of a run.
NUMBERS: dict[str, Any] = {"func_evals": 0, "n_iter": 0, "t": 0.0, "first_grad_max": 0.0}
#: What the state of `torch.optim.LBFGS` has from the first call on, from the first direction on, and from the second.
_TORCH_FIRST = {"func_evals", "n_iter"}
_TORCH = {"d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss"}
_TORCH_MORE = {"al"}

Pairs = list[tuple[Tensor, Tensor]]


def check_state(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise unless `state` has tensors like these, and valid numbers."""
    expected = tensors.keys() | NUMBERS.keys()
    if state.keys() != expected:
        raise _checks.fail(OP, "state", f"keys {sorted(expected)}", sorted(map(str, state)))
    for name, x in tensors.items():
        got = state[name]
        if not isinstance(got, Tensor) or got.shape != x.shape or got.dtype != x.dtype or got.layout != x.layout:
            raise _checks.fail(OP, f"state[{name!r}]", _checks.describe(x), _checks.describe(got))
    _check_numbers(state)


def _check_numbers(state: dict[str, Any]) -> None:
    for name in ("func_evals", "n_iter"):
        if not is_integer(state[name], 0):
            raise _checks.fail(OP, f"state[{name!r}]", "an integer >= 0", _checks.describe(state[name]))
    for name in ("t", "first_grad_max"):
        if not is_number(state[name], 0.0):
            raise _checks.fail(OP, f"state[{name!r}]", "a finite number >= 0", _checks.describe(state[name]))


def is_of_torch(state: dict[str, Any]) -> bool:
    """Whether the state is of `torch.optim.LBFGS`, at any point of a run."""
    return _TORCH_FIRST <= state.keys() <= _TORCH_FIRST | _TORCH | _TORCH_MORE


def from_torch(state: dict[str, Any], like: Tensor) -> tuple[dict[str, Any], Pairs]:
    """Read a state of `torch.optim.LBFGS`, whose last step is not a pair yet.

    Args:
        state: that state.
        like: a vector of the parameters: what the vectors in it have to be.

    Returns:
        The vectors `prev_grad` and `direction` and the numbers of our state, and the pairs, oldest first.

    Raises:
        ValueError: something in it is not what torch leaves there.
    """
    t = state.get("t")
    if isinstance(t, Tensor) and t.numel() == 1 and not t.is_complex():
        t = t.item()
    numbers = {**NUMBERS, "func_evals": state["func_evals"], "n_iter": state["n_iter"], "t": 0.0 if t is None else t}
    _check_numbers(numbers)

    def vector(name: str, got: object) -> Tensor:
        if not isinstance(got, Tensor) or got.shape != like.shape or got.dtype != like.dtype:
            raise _checks.fail(OP, f"state[{name!r}]", _checks.describe(like), _checks.describe(got))
        return got.to(like.device)

    if state.get("d") is None:
        zero = torch.zeros_like(like)
        return {**numbers, "t": 0.0, "prev_grad": zero, "direction": zero}, []
    lists: list[list[Tensor]] = []
    for name in ("old_stps", "old_dirs"):
        got = state.get(name)
        if not isinstance(got, list):
            raise _checks.fail(OP, f"state[{name!r}]", "a list of vectors", _checks.describe(got))
        lists.append([vector(name, x) for x in got])
    if len(lists[0]) != len(lists[1]):
        raise _checks.fail(OP, "state['old_dirs']", f"{len(lists[0])} vectors, as in old_stps", len(lists[1]))
    vectors = {
        "prev_grad": vector("prev_flat_grad", state.get("prev_flat_grad")),
        "direction": vector("d", state["d"]),
    }
    return {**numbers, **vectors}, list(zip(*lists, strict=True))


def pairs_of(history: LBFGSHistory) -> Pairs:
    """The pairs that a history holds, oldest first."""
    head, count, m = int(history.head), int(history.count), history.history_size
    return [(history.s[i % m], history.y[i % m]) for i in range(head - count, head)]


def offer(history: LBFGSHistory, pairs: Pairs) -> None:
    """Append the newest of `pairs` that fit, in the dtype and on the device of `history`, through its own gate."""
    for pair in pairs[-history.history_size :]:
        s, y = (x.to(history.device, history.dtype).contiguous() for x in pair)
        history.append(s, y)
