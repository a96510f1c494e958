"""What a step changes, kept until the step has ended, so that a closure that raises leaves no trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secant.ops.lbfgs import LBFGSHistory
from secant.optim._gradients import FlatGradients
from secant.optim._state import NUMBERS


class Undo:
    """The parameters, their gradients and the state of L-BFGS as they were when the step began.

    Nothing is read back to the host, and nothing is copied before it is about to change: gradients before the first
    evaluation, vectors before the first direction if an evaluation may follow it, and pairs when a full ring is about
    to give up one. So it holds at most 5 vectors, and 2 more for each pair learned in the step, up to the size of the
    ring.

    Args:
        flat: the parameters.
        history: the pairs.
        state: the numbers of the state, and everything else that is not in `vectors` or in `history`.
        vectors: those of the state, each of which is written in place.
    """

    def __init__(
        self, flat: FlatGradients, history: LBFGSHistory, state: dict[str, Any], vectors: list[Tensor]
    ) -> None:
        self._flat, self._state, self._vectors = flat, state, vectors
        self._rings = (history.s, history.y)
        self._small = [history.sy, history.yy, history.head, history.count]
        self._kept: list[Tensor] = []  # the vectors and the parameters, then the gradients: buffers, made when needed
        self._kept_grad: Tensor | None = None
        self._counters: list[Tensor] = []
        self._pairs: dict[int, tuple[Tensor, Tensor] | None] = {}
        self._grads: list[tuple[Tensor | None, Tensor | None]] = []
        self._active = False

    def begin(self) -> None:
        """Keep the numbers and the gradients."""
        flat = self._flat
        self._active = True
        self._numbers = {name: self._state[name] for name in NUMBERS}
        self._knowledge = flat.knowledge()
        grads = flat.grads()
        if any(mine for _, mine in grads):
            if self._kept_grad is None:
                self._kept_grad = torch.empty_like(flat.grad)
            self._kept_grad.copy_(flat.grad)
        self._grads = [(g, None if g is None or mine else g.detach().clone()) for g, mine in grads]

    def keep_vectors(self) -> None:
        """Keep the vectors of the state, the Gram matrices and the parameters, unless this step has done so."""
        if self._counters:
            return
        if not self._kept:
            self._kept = [torch.empty_like(x) for x in (*self._vectors, self._flat.grad)]
            self._kept_params = self._flat.split(self._kept[-1])
        torch._foreach_copy_(self._kept[:-1], self._vectors)
        self._flat.save(self._kept_params)
        self._counters = [x.clone() for x in self._small]

    def keep_pair(self, slot: int, *, full: bool) -> None:
        """Keep the pair in the slot that is about to be written; in a ring that is not full there is none."""
        if slot not in self._pairs:
            s, y = self._rings
            self._pairs[slot] = (s[slot].clone(), y[slot].clone()) if full else None

    @torch.no_grad()
    def restore(self) -> bool:
        """Put everything back, unless the step has ended: whether it was put back."""
        if not self._active:
            return False
        flat = self._flat
        if self._counters:
            torch._foreach_copy_(self._vectors, self._kept[:-1])
            flat.set_(self._kept_params)
            for slot, pair in self._pairs.items():
                for i, ring in enumerate(self._rings):
                    if pair is None:
                        ring[slot].zero_()
                    else:
                        ring[slot].copy_(pair[i])
            for x, old in zip(self._small, self._counters, strict=True):
                x.copy_(old)
        self._state.update(self._numbers)
        if self._kept_grad is not None:
            flat.grad.copy_(self._kept_grad)
        for p, (g, content) in zip(flat.tensors, self._grads, strict=True):
            if g is not None and content is not None:
                g.copy_(content)
            if p.grad is not g:
                p.grad = g
        flat.recall(self._knowledge)
        self.end()
        return True

    def end(self) -> None:
        """Let go of what only this step needs."""
        self._counters, self._pairs, self._grads, self._active = [], {}, [], False
