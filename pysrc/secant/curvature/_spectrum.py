"""The distribution of eigenvalues that stochastic Lanczos quadrature finds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secant.curvature._estimators import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class SpectralDensity:
    """Nodes and weights of several quadratures, one per random vector, each an estimate of the same distribution.

    With theta and w of one quadrature, n sum_i w_i f(theta_i) estimates tr f(A), the sum of f over the eigenvalues.

    Args:
        nodes: (p, m) float64, on the CPU. weights: (p, m), not negative, of sum 1 in each row. n: how many eigenvalues.
    """

    def __init__(self, nodes: Tensor, weights: Tensor, n: int) -> None:
        self.nodes, self.weights, self.n = nodes, weights, n

    def __repr__(self) -> str:
        probes, steps = self.nodes.shape
        low, high = self.range
        return f"SpectralDensity(n={self.n}, probes={probes}, steps={steps}, from {low:.4g} to {high:.4g})"

    @property
    def range(self) -> tuple[float, float]:
        """Return the outermost nodes that carry weight; they lie within the spectrum, and close to its ends."""
        carried = self.nodes[self.weights > torch.finfo(torch.float64).eps]
        return float(carried.min()), float(carried.max())

    def _estimate(self, samples: Tensor) -> Estimate:
        count = len(samples)
        stderr = float(samples.std() / count**0.5) if count > 1 else float("nan")
        return Estimate(float(samples.mean()), stderr, count)

    def mean(self, f: Any) -> Estimate:
        """Estimate the mean of f over the eigenvalues, tr f(A) / n, and its standard error over the random vectors.

        Args:
            f: takes and returns a float64 tensor (p, m).

        Example:
            >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
            >>> H = secant.curvature.Hessian(lambda: (w**4).sum() / 12, [w])        # diag(1, 4, 9)
            >>> spectrum = H.spectrum(num_probes=20)
            >>> log_det = 3 * spectrum.mean(torch.log)        # about log 36
        """
        return self._estimate((self.weights * f(self.nodes)).sum(1))

    def trace(self) -> Estimate:
        """Estimate the sum of the eigenvalues. By Rademacher vectors, this is Hutchinson's estimate."""
        value, stderr, count = self.mean(lambda x: x)
        return Estimate(self.n * value, self.n * stderr, count)

    def fraction_below(self, x: float) -> Estimate:
        """Estimate the share of eigenvalues below x, in [0, 1]; of the share of a jump, the resolution decides."""
        return self.mean(lambda nodes: (nodes < x).double())

    def negative_share(self) -> Estimate:
        """Estimate the sum of the negative eigenvalues' magnitudes over that of all, in [0, 1].

        Unlike a count of negative eigenvalues it does not depend on how many round to zero. A ratio of means; the
        standard error is a jackknife's.
        """
        negative = (self.weights * self.nodes.clamp(max=0.0).neg()).sum(1)
        total = (self.weights * self.nodes.abs()).sum(1)
        if float(total.sum()) == 0.0:
            return Estimate(0.0, 0.0, len(total))
        value, count = float(negative.sum() / total.sum()), len(total)
        if count == 1:
            return Estimate(value, float("nan"), 1)
        without = (negative.sum() - negative) / (total.sum() - total)
        stderr = float(((count - 1) / count * (without - without.mean()).square().sum()).sqrt())
        return Estimate(value, stderr, count)

    def density(self, x: Tensor, *, width: float | None = None) -> Tensor:
        """Compute the density at x, a mixture of normal distributions around the nodes; it integrates to 1.

        Args:
            x: of any shape. width: their standard deviation; None: a hundredth of the range.

        Returns:
            float64, in the shape of `x`.
        """
        low, high = self.range
        width = width or max(0.01 * (high - low), 1e-12)
        at = torch.as_tensor(x, dtype=torch.float64).reshape(-1, 1)
        nodes, weights = self.nodes.reshape(1, -1), self.weights.reshape(1, -1) / len(self.nodes)
        bells = torch.exp(-0.5 * ((at - nodes) / width).square()) / (width * (2 * torch.pi) ** 0.5)
        return (bells * weights).sum(1).reshape(torch.as_tensor(x).shape)

    def plot(
        self,
        path: str | Path | None = None,
        *,
        ax: Axes | None = None,
        label: str | None = None,
        threshold: float | None = None,
        **style: Any,
    ) -> Axes:
        """Draw the number of eigenvalues against their value, both on logarithmic scales.

        The axis of the eigenvalues is about linear between -t and t and logarithmic outside; the curve is eigenvalues
        per unit of that axis (per decade, outside), smoothed over a twentieth of a decade. A single eigenvalue is a
        peak 8 high.

        Args:
            path: a file to write (PNG, PDF, ...). ax: axes to draw into; None: new ones. label: of the curve.
            threshold: t; None: a hundredth of the largest magnitude, below which nodes tell little. Axes that have a
                curve keep theirs.
            style: for matplotlib's `fill_between` (color, alpha).

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is missing.
        """
        from secant.curvature import _plot

        return _plot.draw(self, path, ax, label, threshold, style)
