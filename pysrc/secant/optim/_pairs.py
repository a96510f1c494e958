"""Curvature pairs of a run whose groups may have learning rates of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from secant.ops import LBFGSHistory

Pairs = list[tuple[Tensor, Tensor]]


class ScaledHistory:
    """An `LBFGSHistory` in the coordinates R^(-1/2) x, where R = diag(lr_k / max lr).

    There a step is R^(-1/2) s, a change of the gradient R^(1/2) y, and the direction in x is -R^(1/2) H R^(1/2) g.

    Args:
        history: the pairs.
        scale: the diagonal of R^(1/2), None for the identity. Where it is 0 nothing moves.
    """

    def __init__(self, history: LBFGSHistory, scale: Tensor | None) -> None:
        self.history, self.scale = history, scale

    def step(self, grad: Tensor, prev_grad: Tensor, direction: Tensor, t: float) -> None:
        """Offer the pair s = t d, y = g - g_prev; then d becomes the direction and g_prev a copy of g, in place.

        `history.stats` is then of this direction, with the y_norm of this pair. See `LBFGSHistory.step`.
        """
        history, scale = self.history, self.scale
        if scale is None:
            history.step(grad, prev_grad, direction, t)
            return
        s, y = direction * t, grad - prev_grad
        history.append(torch.where(scale != 0, s / scale, 0.0), y.mul_(scale))
        y_norm = history.stats.y_norm.clone()
        prev_grad.copy_(grad)
        history.direction(torch.mul(grad, scale, out=direction), out=direction)
        direction.mul_(scale)
        history.stats.y_norm.copy_(y_norm)

    def pairs(self) -> Pairs:
        """List the pairs, oldest first."""
        head, count, m = int(self.history.head), int(self.history.count), self.history.history_size
        return [(self.history.s[i % m], self.history.y[i % m]) for i in range(head - count, head)]

    def offer(self, pairs: Pairs) -> None:
        """Append the newest of `pairs` that fit, through the gate of this history and in its dtype."""
        history = self.history
        for pair in pairs[-history.history_size :]:
            history.append(*(x.to(history.device, history.dtype).contiguous() for x in pair))

    def pairs_at(self, scale: Tensor | None) -> Pairs:
        """List the pairs as they are for another R; where one of the two lr is 0 there is nothing left of them."""
        if scale is None and self.scale is None:
            return self.pairs()
        one = torch.ones((), dtype=self.history.dtype, device=self.history.device)
        old, new = (one if x is None else x for x in (self.scale, scale))
        up, down = (torch.where((old != 0) & (new != 0), a / b, 0.0) for a, b in ((old, new), (new, old)))
        return [(s.to(up) * up, y.to(down) * down) for s, y in self.pairs()]
