"""The parameters of an optimizer as one vector, with their gradients stored as another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from secant import _checks
from secant._parameters import FlatParameters


class FlatGradients(FlatParameters):
    """Parameters whose gradients are views of one vector, `grad`, into which backward accumulates.

    Args:
        op: the optimizer, for messages.
        params: as for `FlatParameters`, with at least one element in total.

    Raises:
        TypeError, ValueError: `params` is something else.
    """

    def __init__(self, op: str, params: Iterable[Tensor]) -> None:
        super().__init__(op, params)
        if self.n == 0:
            raise _checks.fail(op, "params", "at least one element", "empty tensors only")
        self.grad = self.vector()
        self._grads = self.split(self.grad)
        self._gathered = False
        self._learning: set[int] = set()  # parameters that were seen to require a gradient
        self.absent: tuple[int, ...] = ()  # those that had no gradient at the last gathering

    def zero_grad(self) -> None:
        """Zero `grad` and make its pieces the gradients of the parameters.

        Until a gradient has been gathered, and afterwards for the parameters that had none, the gradient becomes None
        instead, so that the next backward shows whether there is one, and of what kind: into a dense view a sparse
        gradient would be added without a word.
        """
        self.grad.zero_()
        for i, (p, view) in enumerate(zip(self.tensors, self._grads, strict=True)):
            given = self._gathered and i not in self.absent
            if p.grad is not (view if given else None):
                p.grad = view if given else None

    def grads(self) -> list[tuple[Tensor | None, bool]]:
        """List the gradients as they are, and of each whether it is a piece of `grad`."""
        return [(p.grad, p.grad is view) for p, view in zip(self.tensors, self._grads, strict=True)]

    def knowledge(self) -> tuple[Any, ...]:
        """Return what this remembers of earlier gradients, for `recall`."""
        return self._gathered, set(self._learning), self.absent

    def recall(self, knowledge: tuple[Any, ...]) -> None:
        """Remember what `knowledge` said, and nothing later."""
        self._gathered, self._learning, self.absent = knowledge

    def gather_grad(self) -> None:
        """Bring into `grad` what backward left elsewhere: only gradients that someone replaced are copied.

        A parameter without a gradient, or frozen since it had one, is listed in `absent`; its part of `grad` is zero.

        Raises:
            ValueError: a gradient is not dense.
        """
        absent = []
        for i, (p, view) in enumerate(zip(self.tensors, self._grads, strict=True)):
            if i in self._learning and not p.requires_grad:
                self._learning.discard(i)  # what is left of its gradient is old; one that is set from now on counts
                p.grad = None
            elif p.requires_grad:
                self._learning.add(i)
            g = p.grad
            if g is view:
                continue
            if g is None:
                view.zero_()
                absent.append(i)
                if not p.requires_grad:
                    continue
            elif g.layout is not torch.strided:
                raise _checks.fail(
                    self.op, f"params[{i}].grad", "a dense gradient (for an embedding: sparse=False)", g.layout
                )
            else:
                view.copy_(g)
            p.grad = view
        self._gathered, self.absent = True, tuple(absent)

    def freeze_(self, views: list[Tensor]) -> None:
        """Zero those parts of a vector that belong to parameters without a gradient: they do not move."""
        for i in self.absent:
            views[i].zero_()
