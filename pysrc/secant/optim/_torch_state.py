"""States of `torch.optim.LBFGS`, for `secant.optim.LBFGS` to continue from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant.optim._pairs import Pairs

OP = "LBFGS.load_state_dict"
#: What such a state has from the first call on, from the first direction on, and from the second.
_FIRST = {"func_evals", "n_iter"}
_LATER = {"d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss"}
_STILL_LATER = {"al"}


def is_of_torch(state: Mapping[str, Any]) -> bool:
    """Tell whether the state is of `torch.optim.LBFGS`, at any point of a run."""
    return _FIRST <= state.keys() <= _FIRST | _LATER | _STILL_LATER


def from_torch(state: Mapping[str, Any], like: Tensor) -> tuple[dict[str, Any], Pairs]:
    """Read a state of `torch.optim.LBFGS`, whose last step is not a pair yet.

    Args:
        state: that state.
        like: a vector of the parameters: what the vectors in it have to be.

    Returns:
        The vectors `prev_grad` and `direction` and the numbers `func_evals`, `n_iter` and `t` of our state (not yet
        checked), and the pairs, oldest first.

    Raises:
        ValueError: something in it is not what torch leaves there.
    """

    def vector(name: str, got: object) -> Tensor:
        if not isinstance(got, Tensor) or got.shape != like.shape or got.dtype != like.dtype:
            raise _checks.fail(OP, f"state[{name!r}]", _checks.describe(like), _checks.describe(got))
        return got.to(like.device)

    found: dict[str, Any] = {"func_evals": state["func_evals"], "n_iter": state["n_iter"], "t": 0.0}
    if state.get("d") is None:
        zero = torch.zeros_like(like)
        return {**found, "prev_grad": zero, "direction": zero}, []
    t = state.get("t")
    found["t"] = t.item() if isinstance(t, Tensor) and t.numel() == 1 and not t.is_complex() else t
    found["prev_grad"] = vector("prev_flat_grad", state.get("prev_flat_grad"))
    found["direction"] = vector("d", state["d"])
    lists: list[list[Tensor]] = []
    for name in ("old_stps", "old_dirs"):
        got = state.get(name)
        if not isinstance(got, list):
            raise _checks.fail(OP, f"state[{name!r}]", "a list of vectors", _checks.describe(got))
        lists.append([vector(name, x) for x in got])
    if len(lists[0]) != len(lists[1]):
        raise _checks.fail(OP, "state['old_dirs']", f"{len(lists[0])} vectors, as in old_stps", len(lists[1]))
    return found, list(zip(*lists, strict=True))
