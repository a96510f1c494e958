"""What every backend of the `hvp` family offers, as types; the meaning is written down in `reference.py`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """The functions of a backend."""

    def glm_hvp(self, x: Tensor, v: Tensor, weight: Tensor, l2: float, out: Tensor) -> None:
        """out = X^T (weight * (X v)) + l2 v, for k vectors at once."""

    def glm_value_grad(
        self,
        x: Tensor,
        target: Tensor,
        coef: Tensor,
        loss: str,
        delta: float,
        sample_weight: Tensor | None,
        l2: float,
        value: Tensor,
        grad: Tensor,
        weight: Tensor,
    ) -> None:
        """Value, gradient and the second derivatives of the rows, of sum_i c_i loss(z_i, t_i) + l2/2 |coef|^2."""

    def softmax_hvp(
        self, x: Tensor, v: Tensor, probs: Tensor, sample_weight: Tensor | None, l2: float, out: Tensor
    ) -> None:
        """Product with the Hessian of multinomial logistic regression."""

    def softmax_value_grad(
        self,
        x: Tensor,
        target: Tensor,
        coef: Tensor,
        sample_weight: Tensor | None,
        l2: float,
        value: Tensor,
        grad: Tensor,
        probs: Tensor,
    ) -> None:
        """Value, gradient and probabilities of sum_i c_i (logsumexp(Z_i) - Z_i,target) + l2/2 |coef|^2, Z = X coef."""

    def cross_entropy_hvp(self, logits: Tensor, u: Tensor, lse: Tensor | None, out: Tensor) -> None:
        """out = (diag(p) - p p^T) u for every row, p = exp(logits - lse)."""

    def paired_matmul(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        e: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        p: Tensor | None,
        q: Tensor | None,
        out: Tensor,
    ) -> None:
        """out = scale * (a b + c e + bias) + p * q: a step of the R-operator through a layer."""

    def gram(self, x: Tensor, weight: Tensor | None, accumulate: bool, out: Tensor) -> None:
        """out = X^T diag(weight) X, or that added to the lower triangle of `out`; the upper one is its mirror image."""
