"""The Fisher information and the empirical Fisher as linear operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secant import _checks
from secant.curvature import _losses
from secant.curvature._estimators import check_count, check_seed
from secant.curvature.ggn import _JacobianOperator
from secant.curvature.hessian import trainable

_LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
_REDUCTIONS = ("mean", "sum")


def _scale(op: str, reduction: str) -> bool:
    if reduction not in _REDUCTIONS:
        raise _checks.fail(op, "reduction", "'mean' or 'sum'", repr(reduction))
    return reduction == "mean"


class Fisher(_JacobianOperator):
    r"""The Fisher information with sampled labels, a Monte Carlo estimate that is a fixed matrix at each point.

        F = 1/N sum_n E_(y ~ p(y | f_n)) [g g^T],     g = J_n^T d(-log p(y | f_n))/df_n,    f_n the n-th output

    with the expectation replaced by the mean over `samples` labels drawn from the model itself. Its expectation over
    the draws is the Fisher information, which for these likelihoods is the GGN of their negative log-likelihood. No
    gradient of a single sample is formed: a product takes J v, the outputs' own small matrices, and J^T.

    The labels of a point are drawn from `seed` when it is built, so that all products there are with one matrix, and a
    new operator with the same seed has the same one; `resample` draws others.

    Args:
        closure: () -> outputs, or (outputs, loss) as for `GGN`, whose loss is not used; (batch) -> with `batches`.
            Row n of outputs, along every dimension but the last, is one prediction; for "bernoulli" and "gaussian"
            each number is one.
        params, batches, weights, keep_graphs, process_group: as for `Hessian`.
        likelihood: "categorical" (outputs are logits (..., C)), "bernoulli" (logits) or "gaussian" (means, of unit
            variance: the loss is half the squared error).
        samples: labels drawn for each prediction.
        reduction: "mean" divides by the number of predictions (of rows for "categorical", of numbers else), as the
            losses of torch do; "sum" does not.
        seed: of the labels.
        mode: as for `GGN`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `GGN`.

    References:
        Kunstner, Balles and Hennig, Limitations of the empirical Fisher approximation, NeurIPS (2019).
        Martens, New insights and perspectives on the natural gradient method, JMLR 21 (2020).

    Example:
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(50, 3)
        >>> F = secant.curvature.Fisher(lambda: model(x), model.parameters(), samples=10)
        >>> (F @ torch.ones(8)).shape
        torch.Size([8])
    """

    _PAIR = "(outputs, loss), or the outputs"

    def __init__(
        self,
        closure: Callable[..., Any],
        params: Iterable[Tensor],
        *,
        likelihood: str = "categorical",
        samples: int = 1,
        reduction: str = "mean",
        seed: int = 0,
        **options: Any,
    ) -> None:
        if likelihood not in _LIKELIHOODS:
            raise _checks.fail(self._name, "likelihood", " or ".join(map(repr, _LIKELIHOODS)), repr(likelihood))
        check_count(self._name, "samples", samples, 1)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"{self._name}: seed: expected an int, got {_checks.describe(seed)}")
        check_seed(self._name, seed)
        self.likelihood, self.samples, self.seed = likelihood, samples, seed
        self._mean = _scale(self._name, reduction)
        super().__init__(closure, params, **options)

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, **options: Any) -> Fisher:
        """Return the Fisher information of the predictions model(inputs).

        Args:
            options: those of the class.

        Raises:
            TypeError, ValueError: an argument is invalid.
        """
        return cls(lambda: model(inputs), trainable(cls.__name__, model), **options)

    def resample(self, seed: int) -> None:
        """Draw other labels, from this seed."""
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"{self._name}.resample: seed: expected an int, got {_checks.describe(seed)}")
        check_seed(f"{self._name}.resample", seed)
        self.seed = seed
        self.refresh()

    def _evaluators(self) -> Any:
        self._labels = self.generator(self.seed)  # one stream over the batches, the same in every pass over them
        return super()._evaluators()

    def _outputs(self, result: Any) -> Tensor:
        return super()._outputs((result, None) if isinstance(result, Tensor) else result)

    def _middle(self, outputs: Tensor, result: Any) -> _losses.Middle:
        logits = outputs.detach()
        residuals, scale = self._draws(logits)
        categorical = self.likelihood == "categorical"

        def middle(u: Tensor) -> Tensor:
            along = residuals * u
            if categorical:
                along = along.sum(-1, keepdim=True)
            return (residuals * along).sum(0).mul_(scale)

        def factors() -> Iterator[Tensor]:
            if categorical:
                yield from residuals * scale**0.5
                return
            along = (residuals.square().sum(0) * scale).sqrt()  # M is diagonal: one number of each row at a time
            for c in range(width):
                factor = torch.zeros_like(logits)
                factor[..., c] = along[..., c]
                yield factor

        if not categorical and logits.dim() == 0:
            return _losses.OuterMiddle(lambda: iter([(residuals.square().sum(0) * scale).sqrt()]), 1, middle)
        width = logits.shape[-1]
        return _losses.OuterMiddle(factors, logits.numel() // max(1, width), middle)

    def _draws(self, logits: Tensor) -> tuple[Tensor, float]:
        """Draw residuals (samples, *outputs.shape), and return with them what their squares are multiplied by."""
        residuals = torch.stack([self._residual(logits) for _ in range(self.samples)])
        count = logits.numel() // (logits.shape[-1] if self.likelihood == "categorical" else 1)
        return residuals, 1 / (self.samples * (count if self._mean else 1))

    def _residual(self, outputs: Tensor) -> Tensor:
        """d(-log p(y | f))/df with a drawn y."""
        if self.likelihood == "gaussian":
            return torch.randn(outputs.shape, dtype=outputs.dtype, device=outputs.device, generator=self._labels)
        if self.likelihood == "bernoulli":
            p = torch.sigmoid(outputs)
            return p - torch.bernoulli(p, generator=self._labels)
        if outputs.dim() < 1:
            raise _checks.fail(self._name, "closure", "logits of shape (..., C)", _checks.describe(outputs))
        p = torch.softmax(outputs, -1)
        y = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=self._labels).reshape(*p.shape[:-1], 1)
        return p.scatter_add(-1, y, -torch.ones_like(p[..., :1]))


class EmpiricalFisher(_JacobianOperator):
    r"""The second moment of the gradients of the single samples, at their true labels.

        E = 1/N sum_n g_n g_n^T,      g_n = J_n^T d loss_n / d f_n

    No gradient of a single sample is formed: g_n.v comes from J v, for all samples at once.

    Args:
        closure: () -> (outputs, losses), or (batch) -> with `batches`: outputs (N, ...) with their graph, and losses
            (N,), one per sample, the n-th computed from outputs[n] alone (a loss of torch with reduction="none").
        params, batches, weights, keep_graphs, process_group: as for `Hessian`.
        reduction: "mean" divides by N, "sum" does not.
        mode: as for `GGN`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `GGN`.

    References:
        Kunstner, Balles and Hennig, Limitations of the empirical Fisher approximation, NeurIPS (2019): what it is not.

    Example:
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(50, 3)
        >>> y = torch.randint(2, (50,))
        >>> def closure():
        ...     outputs = model(x)
        ...     return outputs, torch.nn.functional.cross_entropy(outputs, y, reduction="none")
        >>> E = secant.curvature.EmpiricalFisher(closure, model.parameters())
        >>> size = E.trace(100)        # the mean squared norm of the samples' gradients
    """

    _PAIR = "(outputs, losses)"

    def __init__(
        self, closure: Callable[..., Any], params: Iterable[Tensor], *, reduction: str = "mean", **options: Any
    ) -> None:
        self._mean = _scale(self._name, reduction)
        super().__init__(closure, params, **options)

    def _middle(self, outputs: Tensor, result: Any) -> _losses.Middle:
        losses = result[1]
        if not isinstance(losses, Tensor) or outputs.dim() < 1 or losses.shape != outputs.shape[:1]:
            expected = f"losses of shape ({len(outputs) if outputs.dim() else 'N'},), one per row of the outputs"
            raise _checks.fail(self._name, "closure", expected, _checks.describe(losses))
        found: tuple[Tensor | None, ...] = (None,)
        if losses.requires_grad:
            found = torch.autograd.grad(losses.sum(), [outputs], retain_graph=True, allow_unused=True)
        if found[0] is None:
            raise _checks.fail(self._name, "closure", "losses computed from the outputs", "some that do not use them")
        gradients = found[0].detach()
        scale = 1 / len(losses) if self._mean else 1.0
        rest = tuple(range(1, gradients.dim()))

        def middle(u: Tensor) -> Tensor:
            along = gradients * u
            return gradients * (along.sum(rest, keepdim=True) if rest else along).mul_(scale)

        return _losses.OuterMiddle(lambda: iter([gradients * scale**0.5]), len(losses), middle)
